"""Model folders that somebody tampered with: refused by name before they are loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.models import loading
from lrcompress.runtime.errors import InputError
from tests.conftest import QUICK_EVAL, SMALL, invoke, refusal
from tests.tiny import copied_model

# absurd numbers make libraries warn
pytestmark = pytest.mark.filterwarnings("ignore")


class CreatesFile:
    """Creates a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00001.bin"])
def test_pickles_are_never_loaded(name: str, dense: Path, tmp_path: Path) -> None:
    created = tmp_path / "created"
    folder = copied_model(dense, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(CreatesFile(created)))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for command in (
        ("factorize", folder, "--out", tmp_path / "out", "--keep-ratio", "0.5", *SMALL),
        ("eval", folder, *QUICK_EVAL),
        ("inspect", folder, "--energy"),
        ("export", folder, "--out", tmp_path / "out", "--to", "dense"),
    ):
        assert "save it as safetensors with transformers' save_pretrained" in refusal(*command)
    assert not created.exists()
    pickle.loads((folder / name).read_bytes())
    assert created.exists(), "the pickle is harmless"


def test_pickles_by_other_names(dense: Path, tmp_path: Path) -> None:
    created = tmp_path / "created"
    pickled = pickle.dumps(CreatesFile(created))
    disguised = copied_model(dense, tmp_path / "disguised")
    (disguised / "model.safetensors").write_bytes(pickled)
    assert "cannot be loaded" in refusal("eval", disguised, *QUICK_EVAL)
    adapted = copied_model(dense, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["x"]}')
    (adapted / "adapter_model.bin").write_bytes(pickled)
    assert "has an adapter (adapter_config.json)" in refusal("eval", adapted, *QUICK_EVAL)
    assert not created.exists()


@pytest.mark.parametrize("known_type", [True, False])
def test_code_of_a_model_is_run_only_if_asked(
    known_type: bool, dense: Path, tmp_path: Path
) -> None:
    created = tmp_path / "created"
    maps = {name: f"modeling_it.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    keys = {"auto_map": maps} | ({} if known_type else {"model_type": "never_heard_of"})
    folder = copied_model(dense, tmp_path / "model", **keys)
    (folder / "modeling_it.py").write_text(f"open({str(created)!r}, 'w')\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_it.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for command in (
        ("inspect", folder),
        ("eval", folder, *QUICK_EVAL),
        ("factorize", folder, "--out", tmp_path / "out", "--keep-ratio", "0.5", *SMALL),
    ):
        result = invoke(*command)
        assert result.exit_code == (0 if known_type else 2), result.output
        assert known_type or "if you trust it give --trust-remote-code" in result.stderr
    assert not created.exists()
    # the code creates a file, but no model
    refusal("eval", folder, "--trust-remote-code", *QUICK_EVAL)
    assert created.exists()


def change_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Changes the record of the first layer that has a rank; returns its name."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    name: str = next(name for name, record in modules.items() if record["form"] == "pivoted")
    change(modules[name])
    file.write_text(json.dumps(config))
    return name


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rank": lambda record: record.update(rank=record["rank"] - 1),
    "rank 0": lambda record: record.update(rank=0),
    "rank of a billion": lambda record: record.update(rank=10**9),
    "rank a text": lambda record: record.update(rank="8"),
    "rank true": lambda record: record.update(rank=True),
    "rank missing": lambda record: record.pop("rank"),
    "shape": lambda record: record.update(shape=record["shape"][::-1]),
    "shape larger": lambda record: record.update(shape=[10**9, 10**9]),
    "shape negative": lambda record: record.update(shape=[-1, -1]),
    "form": lambda record: record.update(form="factored"),
    "form narrowed": lambda record: record.update(form="narrowed"),
    "form unknown": lambda record: record.update(form="__class__"),
}


@pytest.fixture(scope="module")
def pivoted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose low-rank layers are pivoted."""
    out = tmp_path_factory.mktemp("pivoted") / "model"
    options = ("--keep-ratio", "0.6", "--method", "fisher", *SMALL)
    result = invoke("factorize", dense, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


def check_both_refuse(folder: Path, name: str) -> None:
    """lrcompress and transformers by itself, each naming the module."""
    assert name in refusal("eval", folder, *QUICK_EVAL)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    # of shapes transformers itself says which in its log
    assert name in str(raised.value) or "ignore_mismatched_sizes" in str(raised.value)


@pytest.mark.parametrize("kind", RECORDS)
def test_tampered_records_are_refused_by_name(kind: str, pivoted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted, tmp_path / "model")
    check_both_refuse(folder, change_record(folder, RECORDS[kind]))


TENSORS: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "pivot repeated": lambda t, n: t[f"{n}.order"].__setitem__(0, t[f"{n}.order"][1]),
    "pivot out of range": lambda t, n: t[f"{n}.order"].__setitem__(0, 10**6),
    "pivot negative": lambda t, n: t[f"{n}.order"].__setitem__(0, -1),
    "order of floats": lambda t, n: t.update({f"{n}.order": t[f"{n}.order"].float()}),
    "order missing": lambda t, n: t.pop(f"{n}.order"),
    "order too short": lambda t, n: t.update({f"{n}.order": t[f"{n}.order"][:-1].clone()}),
    "dtype of one part": lambda t, n: t.update({f"{n}.Z.weight": t[f"{n}.Z.weight"].half()}),
    "integers": lambda t, n: t.update({f"{n}.C.weight": t[f"{n}.C.weight"].int()}),
    "missing": lambda t, n: t.pop(f"{n}.C.weight"),
    "other shape": lambda t, n: t.update({f"{n}.C.weight": t[f"{n}.C.weight"][:-1].clone()}),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tampered_tensors_are_refused_by_name(kind: str, pivoted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted, tmp_path / "model")
    name = change_record(folder, lambda _: None)
    tensors = load_file(folder / "model.safetensors")
    TENSORS[kind](tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    check_both_refuse(folder, name)


def test_a_dense_weight_that_is_none_is_named(pivoted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted, tmp_path / "model")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    save_file(
        tensors | {f"{name}.weight": tensors[f"{name}.weight"].int()},
        folder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    check_both_refuse(folder, name)
    tensors.pop(f"{name}.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    check_both_refuse(folder, name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_cut_weights_are_one_sentence(share: float, factorized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(factorized, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for command in (
        ("eval", folder, *QUICK_EVAL),
        ("export", folder, "--out", tmp_path / "x", "--to", "dense"),
    ):
        assert "cannot be loaded" in refusal(*command)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", 3, "no"])
def test_an_index_names_files_of_its_folder(name: Any, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "other")
    folder = copied_model(dense, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not a file in its folder" in refusal("eval", folder, *QUICK_EVAL)


def test_a_config_cannot_ask_for_more_memory_than_the_files_hold(
    dense: Path, tmp_path: Path
) -> None:
    for number, keys in enumerate(
        ({"vocab_size": 10**9}, {"num_hidden_layers": 10**7}, {"intermediate_size": 10**8})
    ):
        folder = copied_model(dense, tmp_path / f"{number}", **keys)
        assert "asks for far more" in refusal("eval", folder, *QUICK_EVAL)


CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 0}, {"model_type": ["llama"]}, {"hidden_size": "x"}, {"dtype": "int8"},
    {"dtype": "float8_e4m3fn"}, {"attn_implementation": "some/kernel"},
)  # fmt: skip


@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_a_config_of_no_model_is_one_sentence(
    keys: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    folder = copied_model(dense, tmp_path / "model", **keys)
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": {"type": "BPE"}}', "\0"])
def test_a_damaged_tokenizer_is_one_sentence(text: str, dense: Path, tmp_path: Path) -> None:
    folder = copied_model(dense, tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    assert "cannot be loaded" in refusal("eval", folder, *QUICK_EVAL)
