"""pretrain: a new model, dense or low-rank from the first step, resumable to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.config import PretrainSettings
from lrcompress.layers.lowrank import FactoredLinear, compressed_layers
from lrcompress.runtime.errors import InputError
from lrcompress.training import new_model, pretrain
from lrcompress.training.self_guided import Guidance
from lrcompress.training.trainer import TextTrainer
from tests.conftest import interrupt, invoke
from tests.tiny import byte_tokenizer, tiny_model, tokens

QUICK: dict[str, Any] = {
    "data": ["pydoc"], "max_steps": 12, "train_length": 32, "held_out": 4, "eval_every": 4,
    "learning_rate": 3e-3, "batch_size": 4, "rank_multiple": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the tokenizer of the tiny llama, and no weights."""
    folder = tmp_path_factory.mktemp("config")
    tiny_model().config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def quick_settings(config: Path, **settings: Any) -> PretrainSettings:
    return PretrainSettings(**(QUICK | {"source": str(config)} | settings))


def pretrained(config: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return pretrain.pretrain_to(quick_settings(config, tokenizer=str(config), **settings), out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_dense_model_is_an_ordinary_folder(config: Path, tmp_path: Path, text: Path) -> None:
    record = pretrained(config, tmp_path / "out", data=[str(text)], train_length=64)
    trained = record["pretrained"]
    assert trained["after"] < trained["before"]
    assert [step for step, _ in trained["losses"]] == [0, 4, 8, 12]
    assert trained["tokens"] == 12 * 4 * 64
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in stored
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Trained from scratch, on {text}" in card
    assert "low-rank" not in card.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", text.name]
    flags = ("--perplexity", text, "--no-speed", "--context-length", 64)
    result = invoke("eval", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert "was trained on" in result.output


def test_all_but_the_first_block_are_low_rank(config: Path, tmp_path: Path) -> None:
    record = pretrained(config, tmp_path / "out", keep_ratio=0.5)
    model, tokenizer = lrcompress.load(str(tmp_path / "out"))
    layers = dict(compressed_layers(model))
    assert {name.split(".")[2] for name in layers} == {"1"}
    assert len(layers) == 3
    assert record["counts"]["selected"]["keep_ratio"] == pytest.approx(0.5, abs=0.05)
    assert record["pretrained"]["after"] < record["pretrained"]["before"]
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_factors_begin_as_the_truncated_dense_weights(config: Path) -> None:
    settings = quick_settings(config, tokenizer=str(config))
    dense = new_model.new_model(new_model.read_config(str(config)), settings).model
    low = settings.model_copy(update={"keep_ratio": 0.5})
    model = new_model.new_model(new_model.read_config(str(config)), low).model
    for name, layer in compressed_layers(model):
        assert isinstance(layer, FactoredLinear)
        U, S, V = torch.linalg.svd(dense.get_submodule(name).weight.detach())
        best = (U[:, : layer.rank] * S[: layer.rank]) @ V[: layer.rank]
        torch.testing.assert_close(layer.product(), best, rtol=1e-3, atol=1e-5)
        for norms in (layer.A.weight.norm(dim=1), layer.B.weight.norm(dim=0)):
            torch.testing.assert_close(norms.sort().values.flip(0), S[: layer.rank].sqrt())


@pytest.mark.parametrize("how", ["full", "reduced"])
def test_guides_train_and_are_removed(config: Path, tmp_path: Path, how: str) -> None:
    """The guided run differs from the plain one, and leaves nothing of the guides behind."""
    plain = pretrained(config, tmp_path / "plain", keep_ratio=0.5)
    guided = pretrained(config, tmp_path / "out", keep_ratio=0.5, self_guided=how)
    assert guided["pretrained"]["after"] < guided["pretrained"]["before"]
    counts = [record["pretrained"]["trained_parameters"] for record in (guided, plain)]
    assert counts[0] - counts[1] == guided["counts"]["selected"]["dense"]
    after, unguided = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in unguided.items()}
    assert any(not torch.equal(after[name], unguided[name]) for name in after)


def test_guides_get_gradients_until_their_share_is_zero(config: Path) -> None:
    settings = quick_settings(config, keep_ratio=0.5, self_guided="full")
    new = new_model.new_model(new_model.read_config(str(config)), settings)
    guidance = Guidance(steps=8, reduced=False, seed=0)
    assert guidance.guided_steps == 4
    with guidance.guiding(new.guide_pairs, train_guides=True):
        new.model.train()
        for share, has_gradient in ((0.5, True), (0.0, False)):
            guidance.share = share
            new.model.zero_grad()
            new.model(input_ids=tokens(), labels=tokens()).loss.backward()
            for _, guide in new.guide_pairs:
                assert (guide.weight.grad is not None) == has_gradient
    assert not any("guide" in name for name, _ in new.model.named_parameters())


WARM: dict[str, Any] = {"keep_ratio": 0.5, "dense_share": 0.3}  # 4 steps of 12


def test_a_warm_start_is_dense_at_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases read different text; the second starts from the truncated weights of the first."""
    steps = list[tuple[int, torch.Tensor]]()  # compressed layers and batch of every step
    training_step = TextTrainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        steps.append((len(list(compressed_layers(model))), inputs["input_ids"].clone()))
        return training_step(self, model, inputs, *more)

    monkeypatch.setattr(TextTrainer, "training_step", recorded)
    record = pretrained(config, tmp_path / "out", **WARM)
    assert [layers for layers, _ in steps] == [0] * 4 + [3] * 8
    rows = [tuple(row.tolist()) for _, batch in steps for row in batch]
    assert len(set(rows)) == len(rows) == 12 * 4
    trained = record["pretrained"]
    assert [step for step, _ in trained["losses"]] == [0, 4, 4, 8, 12]
    assert (trained["steps"], trained["tokens"]) == (12, 12 * 4 * 32)
    assert trained["after"] < trained["before"] == trained["losses"][0][1]
    assert trained["best_step"] > 4
    model, _ = lrcompress.load(str(tmp_path / "out"))
    assert len(list(compressed_layers(model))) == 3
    assert record["counts"]["selected"]["keep_ratio"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("settings", [{}, {"keep_ratio": 0.5, "self_guided": "reduced"}, WARM])
def test_an_interrupted_run_ends_with_the_same_weights(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    pretrained(config, tmp_path / "undisturbed", **settings)
    steps = interrupt(monkeypatch, TextTrainer, "training_step", 7)
    with pytest.raises(KeyboardInterrupt):
        pretrained(config, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    pretrained(config, tmp_path / "out", **settings)
    assert len(steps) == 7 + 12 - 4  # from the checkpoint at step 4
    expected, resumed = weights(tmp_path / "undisturbed"), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_command_with_a_preset_and_a_trained_tokenizer(tmp_path: Path) -> None:
    flags = ("--data", "pydoc", "--vocab-size", 300, "--max-steps", 2, "--train-length", 32)
    more = ("--held-out", 2, "--keep-ratio", 0.32, "--batch-size", 2)
    result = invoke("pretrain", "llama-0.3m", "--out", tmp_path / "out", *flags, *more)
    assert result.exit_code == 0, result.output
    assert "Held-out loss" in result.output
    model, tokenizer = lrcompress.load(str(tmp_path / "out"))
    assert len(tokenizer) == model.config.vocab_size == 300
    text = "def f(x):\n    return 'ä'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_divergence_stops_with_one_sentence(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training (diverged|gained nothing).*--learning-rate"):
        pretrained(config, tmp_path / "out", learning_rate=1e6)
    assert not list(tmp_path.iterdir())


def test_bad_inputs_are_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"model_type": ')
    (tmp_path / "small.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    data = ("--data", "pydoc")
    for arguments, words in (
        (("llama-0.3m",), "give --data"),
        (("llama-0.3", *data), "did you mean 'llama-0.3m'"),
        ((tmp_path / "torn.json", *data), "is not JSON"),
        ((tmp_path / "small.json", *data, "--tokenizer", config), "set it to 257"),
        (("llama-0.3m", *data, "--self-guided", "full"), "give keep_ratio"),
        (("llama-0.3m", *data, "--dense-share", "0.5"), "give keep_ratio"),
        (
            ("llama-0.3m", *data, "--dense-share", "0.01", "--keep-ratio", "0.5"),
            "leaves no measurement",
        ),
        (("llama-0.3m", *data, "--shard"), "torchrun --nproc-per-node N -m lrcompress pretrain"),
        (
            ("llama-0.3m", *data, "--shard", "--keep-ratio", "0.5", "--self-guided", "full"),
            "self_guided needs whole layers",
        ),
        (("llama-0.3m", *data, "--tokenizer", tmp_path), "holds no tokenizer"),
        (("llama-0.3m", *data, "--vocab-size", "900000"), "--vocab-size"),
    ):
        result = invoke("pretrain", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert not (tmp_path / "out").exists()


def test_a_model_without_weights_has_the_same_shapes(config: Path) -> None:
    settings = quick_settings(config, keep_ratio=0.5)
    model = new_model.new_model(new_model.read_config(str(config)), settings).model
    bare = new_model.bare_model(new_model.read_config(str(config)), settings)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == shapes
