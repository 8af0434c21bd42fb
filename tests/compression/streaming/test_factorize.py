"""Streaming gives the same checkpoint as `factorize` in memory; an interrupted run resumes."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrcompress.checkpoint import folder as checkpoint_folder
from lrcompress.compression.streaming import streamed_calibration
from lrcompress.compression.streaming.block_compressor import BlockCompressor
from lrcompress.compression.streaming.block_moments import BlockMoments
from lrcompress.compression.streaming.block_store import Activations, BlockFiles
from lrcompress.compression.streaming.factorize import StreamingCompressor
from lrcompress.layers import bfloat16_linears
from lrcompress.layers.block_runner import BlockRunner
from lrcompress.models.loading import load
from tests.conftest import interrupt, invoke, small_recipe
from tests.tiny import (
    STANDARD,
    byte_tokenizer,
    logits,
    saved_model,
    saved_record,
    saved_weights,
    sink_model,
    tiny_model,
)

SIZE = ("--num-samples", "9", "--seq-len", "64")
TEXT = ("--calibration", "pydoc", *SIZE)
SELF_TEXT = ("--calibration", "self", *TEXT)
GRADIENTS = ("--gradient-samples", "2")


def factorized(dense: Path, out: Path, *flags: str, text: tuple[str, ...] = TEXT) -> Path:
    result = invoke("factorize", dense, "--out", out, *text, *GRADIENTS, *flags)
    assert result.exit_code == 0, result.output
    return out


def check_same(
    dense: Path,
    folder: Path,
    *flags: str,
    but: tuple[str, ...] = (),
    text: tuple[str, ...] = TEXT,
) -> None:
    """Every tensor, the config, and the record but for the files and what `but` names."""
    folders = (
        factorized(dense, folder / "plain", *flags, text=text),
        factorized(dense, folder / "streamed", "--streaming", *flags, text=text),
    )
    plain, streamed = map(saved_weights, folders)
    assert plain.keys() == streamed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, streamed[name]), name
    excluded = {"files", *but}  # streaming puts the weights into other files
    records = [{k: v for k, v in saved_record(f).items() if k not in excluded} for f in folders]
    assert records[0] == records[1]
    configs = [(f / "config.json").read_text() for f in folders]
    assert configs[0] == configs[1]
    assert not [*folder.glob(".*")]


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--method", "auto")),
        ("llama", ("--method", "svd", "--exclude", "*.gate_proj", "--dense-first", "1")),
        ("gpt2", ("--method", "fisher", "--form", "factored")),
        ("gemma2", ("--method", "nystrom", "--dtype", "bfloat16")),
        ("qwen2", ("--method", "ppm", "--refine")),
        ("phi3", ("--method", "whitened", "--sequential", "anchored")),
        ("opt", ("--method", "auto", "--refine", "--dtype", "bfloat16")),
        ("falcon", ("--method", "auto", "--refine", "--sequential", "anchored")),
    ],
)
def test_the_same_bit_for_bit(tmp_path: Path, family: str, flags: tuple[str, ...]) -> None:
    dense = saved_model(tmp_path / "dense", family)
    check_same(dense, tmp_path, "--keep-ratio", "0.6", *flags)


def test_the_same_bit_for_bit_with_products_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16_linears, "MINIMUM_WIDTH", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    check_same(saved_model(tmp_path / "dense"), tmp_path, "--keep-ratio", "0.6")


@pytest.mark.parametrize("text", [SIZE, SELF_TEXT], ids=["alone", "beside another text"])
def test_the_whole_model_writes_the_text(tmp_path: Path, text: tuple[str, ...]) -> None:
    check_same(saved_model(tmp_path / "dense"), tmp_path, "--keep-ratio", "0.6", text=text)


def test_gradients_of_answers_are_the_same(tmp_path: Path) -> None:
    dense, chats = saved_model(tmp_path / "dense"), tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "?" * 14}, {"role": "assistant", "content": "Yes. " * 8}]
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    text = ("--calibration", str(chats), "--chat-template", "none", *SIZE)
    answers = ("--keep-ratio", "0.6", "--loss-on", "answers")
    check_same(dense, tmp_path, *answers, text=text)
    whole = factorized(dense, tmp_path / "whole", "--keep-ratio", "0.6", text=text)
    first, second = saved_weights(tmp_path / "plain"), saved_weights(whole)
    assert first.keys() != second.keys() or any(
        not torch.equal(first[name], second[name]) for name in first
    )


def test_text_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, out = saved_model(tmp_path / "dense"), tmp_path / "out"
    flags = ("--keep-ratio", "0.6", "--streaming")
    with monkeypatch.context() as patch:
        interrupt(patch, BlockFiles, "write_candidates", 1)
        result = invoke("factorize", dense, "--out", out, *SIZE, *GRADIENTS, *flags)
        assert result.exit_code == 130
    monkeypatch.setattr(streamed_calibration, "load_model", None)  # it would be called to write
    again = factorized(dense, out, *flags, text=SIZE)
    monkeypatch.undo()
    undisturbed = factorized(dense, tmp_path / "undisturbed", *flags, text=SIZE)
    assert saved_record(again) == saved_record(undisturbed)


def test_a_model_that_does_not_fit_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = saved_model(tmp_path / "dense")
    monkeypatch.setattr(streamed_calibration, "free_memory", lambda _: 2**16)
    flags = ("--keep-ratio", "0.6", "--streaming")
    result = invoke("factorize", dense, "--out", tmp_path / "out", *SIZE, *flags)
    assert result.exit_code == 1
    assert re.search(r"whole model .* 0\.\d GiB, and 0\.0 GiB are free: name a text", result.output)
    assert not (tmp_path / "out").exists()


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    """Weights in many files on the way in, and from_pretrained on the way out."""
    model = tiny_model(num_hidden_layers=3, tie_word_embeddings=True)
    dense = tmp_path / "dense"
    model.save_pretrained(dense, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(dense)
    assert len([*dense.glob("*.safetensors")]) > 3
    check_same(dense, tmp_path, "--keep-ratio", "0.6", "--method", "whitened")
    plain, streamed = (load(tmp_path / name)[0] for name in ("plain", "streamed"))
    assert len([*(tmp_path / "streamed").glob("*.safetensors")]) == 1 + 3
    assert torch.equal(logits(plain), logits(streamed))
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


def test_weights_that_are_stored_otherwise_than_computed(tmp_path: Path) -> None:
    """Experts are one tensor in the model and many in the files."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **STANDARD, vocab_size=257, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    flags = ("--keep-ratio", "0.6", "--method", "whitened", "--include", "*.q_proj")
    # in memory the experts count as linears that were not chosen
    check_same(tmp_path / "dense", tmp_path, *flags, but=("counts", "notes"))


def test_records_of_outliers_are_the_same(tmp_path: Path) -> None:
    """Every linear has the shares, one that stays dense too, and the note counts all blocks."""
    dense = tmp_path / "dense"
    sink_model(block=1, num_hidden_layers=3).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    check_same(dense, tmp_path, "--keep-ratio", "0.9", "--method", "fisher")
    record = saved_record(tmp_path / "streamed")
    shares = {linear["name"]: linear["input_outlier_share"] for linear in record["linears"]}
    assert {"dense", "pivoted"} == {linear["form"] for linear in record["linears"]}
    assert [name for name, share in shares.items() if share > 0.5] == [
        f"model.layers.1.mlp.{role}_proj" for role in ("gate", "up", "down")
    ]
    assert all(linear["gradient_outlier_share"] is not None for linear in record["linears"])
    assert any("of the energy of inputs in 1 of 3 blocks" in note for note in record["notes"])


STEPS: list[tuple[type, str, int]] = [
    (Activations, "write", 14),
    (BlockMoments, "_input_gradient", 3),
    (BlockFiles, "write_candidates", 2),
    (BlockFiles, "write", 2),
    (BlockCompressor, "finish", 2),
    (StreamingCompressor, "_result", 1),
]


@pytest.mark.parametrize(("kind", "method", "at"), STEPS)
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, at: int
) -> None:
    dense = saved_model(tmp_path / "dense", num_hidden_layers=3)
    flags = ("--keep-ratio", "0.6", "--streaming", "--refine", "--sequential", "anchored")
    with monkeypatch.context() as patch:
        interrupt(patch, kind, method, at)
        result = invoke("factorize", dense, "--out", tmp_path / "out", *TEXT, *GRADIENTS, *flags)
        assert result.exit_code == 130
        assert "goes on from what was finished" in result.output
    assert not (tmp_path / "out").exists()
    calls = interrupt(monkeypatch, BlockRunner, "run", 0)
    again = factorized(dense, tmp_path / "out", *flags)
    resumed = len(calls)
    undisturbed = factorized(dense, tmp_path / "undisturbed", *flags)
    assert resumed < len(calls) - resumed  # what was finished was not done again
    first, second = saved_weights(again), saved_weights(undisturbed)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert saved_record(again) == saved_record(undisturbed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-perplexity-increase", "1%", *TEXT), "with streaming use keep_ratio"),
        (("--rank", "500", *TEXT), "rank 500 does not fit"),
    ],
)
def test_what_cannot_be_streamed_is_said(
    tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    dense = saved_model(tmp_path / "dense")
    result = invoke("factorize", dense, "--out", tmp_path / "out", "--streaming", *flags)
    assert result.exit_code == 2
    assert words in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_at_the_end_costs_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out = saved_model(tmp_path / "dense"), tmp_path / "out"
    flags = ("--streaming", "--keep-ratio", "0.6", "--method", "whitened")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "write_record", full)
        result = invoke("factorize", dense, "--out", out, *TEXT, *GRADIENTS, *flags)
        assert result.exit_code == 1
        assert "the disk is full" in result.output
    assert not out.exists()
    calls = interrupt(monkeypatch, BlockCompressor, "block", 0)
    factorized(dense, out, *flags)
    assert not calls


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    flags = ("--streaming", "--keep-ratio", "0.6", "--method", "svd")
    result = invoke("factorize", tmp_path / "dense", "--out", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert "weight of model.layers.1.mlp.up_proj is not finite" in result.output


def test_a_run_streams(tmp_path: Path, text: Path) -> None:
    dense = saved_model(tmp_path / "dense")
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text)
    sets = ("--set", "factorize.streaming=true", "--set", "calibration.data=pydoc")
    result = invoke("run", recipe, tmp_path / "out", *sets)
    assert result.exit_code == 0, result.output
    assert "Streaming needs at most" in result.output
    assert saved_weights(tmp_path / "out" / "model")
    assert not [*(tmp_path / "out").glob(".model*")]
