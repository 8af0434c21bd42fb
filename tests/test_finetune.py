"""finetune: towards the teacher, resumable to the same weights, safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrcompress import recovery, tune
from lrcompress.distill import DistillationTrainer, kl_divergence
from lrcompress.protocols import InputError
from lrcompress.settings import FinetuneSettings, ModelSettings
from tests.conftest import invoke

QUICK: dict[str, Any] = {
    "data": ["pydoc"], "max_steps": 12, "train_length": 64, "held_out": 4, "eval_every": 4,
    "learning_rate": 3e-3,
}  # fmt: skip


def finetuned(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    checked = FinetuneSettings(**(QUICK | settings))
    return tune.finetune_to(ModelSettings(source=str(source)), checked, out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_divergence_is_zero_at_the_teacher_and_has_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(300, 17, generator=generator)
    student = torch.randn(300, 17, generator=generator, requires_grad=True)
    assert float(kl_divergence(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    kl_divergence(student, teacher, 1.0).backward()  # type: ignore[no-untyped-call]
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 300
    torch.testing.assert_close(student.grad, expected.detach())


def test_closer_to_the_teacher_on_held_out_text(factorized: Path, tmp_path: Path) -> None:
    record = finetuned(factorized, tmp_path / "out")
    done = record["finetuned"]
    assert done["best"] < done["before"]
    assert [step for step, _ in done["losses"]] == [0, 4, 8, 12]
    assert done["tokens"] == 12 * 2 * 64
    before, after = weights(factorized), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mlp." in name for name in changed)
    assert (
        "Trained towards the dense model, on pydoc" in (tmp_path / "out" / "README.md").read_text()
    )
    stored = json.loads((tmp_path / "out" / "lrcompress.json").read_text())
    assert stored["finetuned"]["sha256"] == done["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("what", ["norms", "all"])
def test_more_can_be_trained(factorized: Path, tmp_path: Path, what: str) -> None:
    finetuned(factorized, tmp_path / "out", train=what, cross_entropy=0.1, temperature=2.0)
    before, after = weights(factorized), weights(tmp_path / "out")
    outside = {n for n in before if ".mlp." not in n and not torch.equal(before[n], after[n])}
    assert outside
    assert what == "all" or all("norm" in name for name in outside)


def test_an_interrupted_run_ends_with_the_same_weights(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetuned(factorized, tmp_path / "undisturbed")
    original, steps = DistillationTrainer.training_step, []

    def breaks(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        finetuned(factorized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finetuned(factorized, tmp_path / "out")
    assert len(steps) == 7 + 12 - 4  # from the checkpoint at step 4
    expected, found = weights(tmp_path / "undisturbed"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((4, "{}"), (8, '{"half')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / recovery.STATE).write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert recovery.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_divergence_stops_with_one_sentence(factorized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training diverged.*--learning-rate"):
        finetuned(factorized, tmp_path / "out", learning_rate=1e6)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said(dense: Path, factorized: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((factorized,), "give --data"),
        ((dense, "--data", "pydoc", "--teacher", dense), "factorize it first"),
        ((factorized, "--data", "pydoc", "--held-out", "100000"), "too few to hold"),
        ((factorized, "--data", "nowhere.txt"), "nowhere.txt"),
        ((factorized, "--data", "pydoc", "--train", "some"), "factors"),
    ):
        result = invoke("finetune", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert not (tmp_path / "out").exists()


def test_command(dense: Path, factorized: Path, tmp_path: Path) -> None:
    flags = ("--data", "pydoc", "--max-steps", 2, "--train-length", 32, "--held-out", 2)
    result = invoke("finetune", factorized, "--out", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    assert "Held-out loss" in result.output
    quick = ("--limit", 1, "--no-speed", "--context-length", 64)
    result = invoke("eval", tmp_path / "out", "--baseline", dense, *quick)
    assert "finetuned / dense" in result.output
