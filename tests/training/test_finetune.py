"""finetune: lower loss towards the teacher, exact resuming, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

import lrcompress
from lrcompress.cli import display
from lrcompress.config import FinetuneSettings, ModelSettings
from lrcompress.data.training_text import training_text
from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.training import finetune, job
from lrcompress.training.distillation import DistillationTrainer
from lrcompress.training.losses import kl_divergence
from lrcompress.training.self_guided import guide_pairs
from lrcompress.training.teacher_cache import TeacherCache
from tests.conftest import interrupt, invoke
from tests.tiny import QUICK_FINETUNE, finetuned, saved_model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_closer_to_the_teacher_on_held_out_text(factorized: Path, tmp_path: Path) -> None:
    record = finetuned(factorized, tmp_path / "out")
    trained = record["finetuned"]
    assert trained["after"] < trained["before"]
    assert [step for step, _ in trained["losses"]] == [0, 4, 8, 12]
    assert trained["tokens"] == 12 * 2 * 64
    before, after = weights(factorized), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mlp." in name for name in changed)
    assert (
        "Trained towards the dense model, on pydoc" in (tmp_path / "out" / "README.md").read_text()
    )
    stored = json.loads((tmp_path / "out" / "lrcompress.json").read_text())
    assert stored["finetuned"]["sha256"] == trained["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("train", ["norms", "all"])
def test_norms_or_all_parameters_can_be_trained(
    factorized: Path, tmp_path: Path, train: str
) -> None:
    finetuned(factorized, tmp_path / "out", train=train, cross_entropy=0.1, temperature=2.0)
    before, after = weights(factorized), weights(tmp_path / "out")
    outside = {n for n in before if ".mlp." not in n and not torch.equal(before[n], after[n])}
    assert outside
    assert train == "all" or all("norm" in name for name in outside)


@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (None, {}),
        (12, {}),
        (12, {"train": "lora"}),
        (12, {"self_guided": "reduced", "patience": 3}),
        (12, {"parametrization": "stored", "teacher_cache": "cache", "precision": "bfloat16"}),
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(
    dense: Path,
    factorized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int | None,
    settings: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)  # where the cache is
    source = factorized
    if rank:
        source = tmp_path / "low"
        flags = ("--rank", rank, "--form", "pivoted")
        assert invoke("factorize", dense, "--out", source, *flags).exit_code == 0
    finetuned(source, tmp_path / "undisturbed", **settings)
    steps = interrupt(monkeypatch, DistillationTrainer, "training_step", 7)
    with pytest.raises(KeyboardInterrupt):
        finetuned(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    finetuned(source, tmp_path / "out", **settings)
    assert len(steps) == 7 + 12 - 4  # from the checkpoint at step 4
    expected, resumed = weights(tmp_path / "undisturbed"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_divergence_stops_with_one_sentence(factorized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training diverged.*--learning-rate"):
        finetuned(factorized, tmp_path / "out", learning_rate=1e30)
    assert not (tmp_path / "out").exists()


def test_narrowed_layers_have_no_guide(factorized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every FFN is narrowed.*--self-guided"):
        finetuned(factorized, tmp_path / "out", self_guided="full")
    assert not (tmp_path / "out").exists()


def test_bad_inputs_are_refused(dense: Path, factorized: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((factorized,), "give --data"),
        ((dense, "--data", "pydoc", "--teacher", dense), "factorize it first"),
        ((factorized, "--data", "pydoc", "--held-out", "100000"), "too few to hold"),
        ((factorized, "--data", "nowhere.txt"), "nowhere.txt"),
        ((factorized, "--data", "pydoc", "--train", "some"), "factors"),
        ((factorized, "--data", "pydoc", "--shard", "--train", "lora"), "train lora"),
        ((factorized, "--data", "pydoc", "--shard"), "torchrun"),
        (
            (factorized, "--data", "pydoc", "--hidden-states", 1, "--teacher-cache", "c"),
            "keeps no hidden states",
        ),
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_teacher_runs_once_with_a_cache(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    live = finetuned(factorized, tmp_path / "live", precision=precision)["finetuned"]
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 256}
    settings = {"precision": precision} | cache
    cached = finetuned(factorized, tmp_path / "cached", **settings)["finetuned"]
    # with 256 of 257 tokens the cache is exact
    for measured, expected in zip(cached["losses"], live["losses"], strict=True):
        assert measured == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(TeacherCache, "_predict", None)  # would fail if it were called
    again = finetuned(factorized, tmp_path / "again", **settings)["finetuned"]
    assert again["after"] == cached["after"]
    files = list((tmp_path / "cache").glob("*/*"))
    assert {file.suffix for file in files} == {".safetensors"}


def test_adapters_are_merged_into_the_factors(factorized: Path, tmp_path: Path) -> None:
    record = finetuned(factorized, tmp_path / "out", train="lora", lora_rank=4)
    before, after = weights(factorized), weights(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(".mlp." in name for name in changed)
    count = record["finetuned"]["trained_parameters"]
    assert 0 < count < sum(before[name].numel() for name in changed)
    measured = held_out_loss(tmp_path / "out", factorized, record)
    assert measured == pytest.approx(record["finetuned"]["after"], rel=1e-5)


def held_out_loss(out: Path, source: Path, record: dict[str, Any]) -> float:
    """The loss of a saved model on the held-out text of its training, measured anew."""
    model, tokenizer = lrcompress.load(str(out), dtype="float32")
    teacher, _ = lrcompress.load(record["source"], dtype="float32")
    settings = FinetuneSettings(**QUICK_FINETUNE)
    held = training_text(model, tokenizer, settings, "finetune").tokens[: settings.held_out]
    with torch.no_grad():
        pair = [m(input_ids=held).logits[:, :-1].flatten(0, 1) for m in (model, teacher)]
    return float(kl_divergence(pair[0], pair[1], 1.0))


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_balanced_factors_are_packed_again(dense: Path, tmp_path: Path, form: str) -> None:
    flags = ("--rank", 12, "--method", "svd", "--form", form)
    assert invoke("factorize", dense, "--out", tmp_path / "low", *flags).exit_code == 0
    record = finetuned(tmp_path / "low", tmp_path / "out", parametrization="balanced")
    trained, forms = record["finetuned"], {m["form"] for m in layout_of(tmp_path / "out").values()}
    assert forms == {form}
    assert trained["after"] < trained["before"]
    assert held_out_loss(tmp_path / "out", tmp_path / "low", record) == pytest.approx(
        trained["after"], rel=1e-3
    )


def layout_of(folder: Path) -> dict[str, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    modules: dict[str, dict[str, Any]] = config["quantization_config"]["modules"]
    return modules


@pytest.mark.parametrize(("how", "train"), [("full", "factors"), ("reduced", "lora")])
def test_self_guided_training(dense: Path, tmp_path: Path, how: str, train: str) -> None:
    assert invoke("factorize", dense, "--out", tmp_path / "low", "--rank", 12).exit_code == 0
    trained = finetuned(tmp_path / "low", tmp_path / "out", self_guided=how, train=train)[
        "finetuned"
    ]
    assert trained["after"] < trained["before"]
    assert trained["guided_share"] == 1


def test_the_share_of_guided_layers_is_reported(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert invoke("factorize", dense, "--out", tmp_path / "low", "--rank", 12).exit_code == 0
    monkeypatch.setattr(finetune, "guide_pairs", lambda *models: guide_pairs(*models)[:1])
    trained = finetuned(tmp_path / "low", tmp_path / "out", self_guided="full")["finetuned"]
    layers = len(layout_of(tmp_path / "low"))
    assert layers > 1
    assert trained["guided_share"] == 1 / layers
    display.show_training(trained, "out")
    assert f"guided {1 / layers:.0%} of the compressed layers" in capsys.readouterr().out


def test_hidden_states_are_matched(factorized: Path, tmp_path: Path) -> None:
    trained = finetuned(factorized, tmp_path / "out", hidden_states=1.0)["finetuned"]
    plain = finetuned(factorized, tmp_path / "plain")["finetuned"]
    assert trained["before"] > plain["before"]
    assert trained["after"] < trained["before"]


def test_stops_early_without_improvement(factorized: Path, tmp_path: Path) -> None:
    trained = finetuned(
        factorized, tmp_path / "out", learning_rate=0.03, max_steps=60, eval_every=2, patience=2
    )["finetuned"]
    assert trained["steps"] < 60
    assert trained["steps"] - trained["best_step"] == 4
    assert trained["diverged"] is None


def test_the_best_weights_before_divergence_are_saved(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DistillationTrainer.training_step

    def breaks(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 9:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).fill_(torch.nan)
        return original(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "training_step", breaks)
    with pytest.raises(InputError, match=r"diverged.*holds the best weights before it, of step 8"):
        finetuned(factorized, tmp_path / "out")
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "out").values())
    stored = json.loads((tmp_path / "out" / "lrcompress.json").read_text())
    assert "nan" in stored["finetuned"]["diverged"]


def test_curves_go_to_tensorboard(factorized: Path, tmp_path: Path) -> None:
    finetuned(factorized, tmp_path / "out", tensorboard=str(tmp_path / "logs"))
    assert [file for file in (tmp_path / "logs").iterdir() if "tfevents" in file.name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_keep_their_precision(dense: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    flags = ("--rank", 12, "--method", "svd", "--dtype", name)
    assert invoke("factorize", dense, "--out", tmp_path / "low", *flags).exit_code == 0
    trained = finetuned(
        tmp_path / "low", tmp_path / "out", precision="bfloat16", gradient_checkpointing=True
    )["finetuned"]
    assert trained["after"] < trained["before"]
    assert {t.dtype for n, t in weights(tmp_path / "out").items() if "order" not in n} == {dtype}


def test_progress_shows_pace_and_loss(factorized: Path, tmp_path: Path) -> None:
    messages: list[str] = []

    def note(items: Any, description: str, total: int | None = None) -> Any:
        for item in items:
            messages.append(f"{description} {item}")
            yield item

    finetune.finetune_to(
        ModelSettings(source=str(factorized)),
        FinetuneSettings(**QUICK_FINETUNE),
        tmp_path / "out",
        note,
    )
    assert re.search(r"Training loss \d+\.\d+, [\d,]+ tokens/s, 0:0\d left", messages[-1])
    assert len(messages) == 12


def test_no_resume_starts_over(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = interrupt(monkeypatch, DistillationTrainer, "training_step", 6)
    checked = FinetuneSettings(**QUICK_FINETUNE)
    source = ModelSettings(source=str(factorized))
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune_to(source, checked, tmp_path / "out")
    finetune.finetune_to(source, checked, tmp_path / "out", resume=False)
    assert len(steps) == 6 + 12


def test_one_sequence_with_a_nan_loss_stops_training(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = DistillationTrainer.compute_loss, []

    def spoils(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        loss = original(self, model, inputs, *rest, **more)
        calls.append(model.training)
        first_of_second = not model.training and calls.count(False) == 5
        return (loss[0] * torch.nan, *loss[1:]) if first_of_second else loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", spoils)
    with pytest.raises(InputError, match=r"diverged: the held-out loss is nan at step 4"):
        finetuned(factorized, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_run_that_had_ended_is_not_trained_on(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = {"learning_rate": 0.01, "max_steps": 60, "eval_every": 2, "patience": 2}
    finetuned(factorized, tmp_path / "undisturbed", **stops)

    def fails(*_: Any, **__: Any) -> Any:
        raise MachineError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", fails)
        with pytest.raises(MachineError):
            finetuned(factorized, tmp_path / "out", **stops)
    monkeypatch.setattr(DistillationTrainer, "training_step", None)  # would fail if it were called
    record = finetuned(factorized, tmp_path / "out", **stops)
    assert record["finetuned"]["tokens_per_second"] is None
    expected, resumed = weights(tmp_path / "undisturbed"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    display.show_training(record["finetuned"], "out")


def test_two_teachers_have_separate_caches(dense: Path, factorized: Path, tmp_path: Path) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache")}
    finetuned(factorized, tmp_path / "out", **cache)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    finetuned(factorized, tmp_path / "again", teacher=str(other), **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_full_disk_in_training_is_reported(
    factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("write failed: No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(MachineError, match="free some space, then the same command goes on"):
        finetuned(factorized, tmp_path / "out")


def test_a_teacher_of_other_shape_is_refused_for_hidden_states(
    factorized: Path, tmp_path: Path
) -> None:
    other = saved_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(InputError, match="leave --hidden-states out"):
        finetuned(factorized, tmp_path / "out", teacher=str(other), hidden_states=1.0)
