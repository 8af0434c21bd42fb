"""What others may have written is never run, never followed elsewhere, and refused by name."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.config import ScalingSettings
from lrcompress.models import loading
from lrcompress.reporting import report
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import Report
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import MAX_VALUES, read_json, read_yaml
from lrcompress.runtime.sanitize import printable
from lrcompress.workflows.scaling import report as scaling_report
from lrcompress.workflows.scaling.report import ScalingReport
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import SweepReport
from tests.conftest import SMALL, invoke, small_recipe
from tests.samples import DETAILS, METRICS, RECORD, points, scaling_points

# absurd numbers make numpy and matplotlib warn, as they should
pytestmark = pytest.mark.filterwarnings("ignore")

EVAL = ("--perplexity", "pydoc", "--context-length", "64", "--limit", "1", "--no-speed")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def sentence(*arguments: object) -> str:
    """What a refused command says: one sentence, exit code 2, no output."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("Error: ") :]
    assert error.count("\n") == 1
    return error


def changed(folder: Path, out: Path, **keys: Any) -> Path:
    """A copy of a model folder with other keys in its config."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | keys))
    return out


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00001.bin"])
def test_pickles_are_never_loaded(name: str, dense: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = changed(dense, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(made)))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for command in (
        ("factorize", folder, "--out", tmp_path / "out", "--keep-ratio", "0.5", *SMALL),
        ("eval", folder, *EVAL),
        ("inspect", folder, "--energy"),
        ("export", folder, "--out", tmp_path / "out", "--to", "dense"),
    ):
        assert "save it as safetensors with transformers' save_pretrained" in sentence(*command)
    assert not made.exists()
    pickle.loads((folder / name).read_bytes())
    assert made.exists(), "the pickle is harmless"


def test_pickles_by_other_names(dense: Path, tmp_path: Path) -> None:
    made, pickled = tmp_path / "made", pickle.dumps(Touch(tmp_path / "made"))
    disguised = changed(dense, tmp_path / "disguised")
    (disguised / "model.safetensors").write_bytes(pickled)
    assert "cannot be loaded" in sentence("eval", disguised, *EVAL)
    adapted = changed(dense, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["x"]}')
    (adapted / "adapter_model.bin").write_bytes(pickled)
    assert "has an adapter (adapter_config.json)" in sentence("eval", adapted, *EVAL)
    assert not made.exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_is_run_only_if_asked(known: bool, dense: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    maps = {name: f"modeling_it.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    keys = {"auto_map": maps} | ({} if known else {"model_type": "never_heard_of"})
    folder = changed(dense, tmp_path / "model", **keys)
    (folder / "modeling_it.py").write_text(f"open({str(made)!r}, 'w')\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_it.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for command in (
        ("inspect", folder),
        ("eval", folder, *EVAL),
        ("factorize", folder, "--out", tmp_path / "out", "--keep-ratio", "0.5", *SMALL),
    ):
        result = invoke(*command)
        assert result.exit_code == (0 if known else 2), result.output
        assert known or "if you trust it give --trust-remote-code" in result.stderr
    assert not made.exists()
    sentence("eval", folder, "--trust-remote-code", *EVAL)  # the code makes a file and no model
    assert made.exists()


def _record(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
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


def _both_refuse(folder: Path, name: str) -> None:
    """lrcompress and transformers by itself, each naming the module."""
    assert name in sentence("eval", folder, *EVAL)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    # of shapes transformers itself says which in its log
    assert name in str(raised.value) or "ignore_mismatched_sizes" in str(raised.value)


@pytest.mark.parametrize("kind", RECORDS)
def test_tampered_records_are_refused_by_name(kind: str, pivoted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted, tmp_path / "model")
    _both_refuse(folder, _record(folder, RECORDS[kind]))


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
    name = _record(folder, lambda _: None)
    tensors = load_file(folder / "model.safetensors")
    TENSORS[kind](tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _both_refuse(folder, name)


def test_a_dense_weight_that_is_none_is_named(pivoted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pivoted, tmp_path / "model")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    save_file(
        tensors | {f"{name}.weight": tensors[f"{name}.weight"].int()},
        folder / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    _both_refuse(folder, name)
    tensors.pop(f"{name}.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _both_refuse(folder, name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_cut_weights_are_one_sentence(share: float, factorized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(factorized, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for command in (
        ("eval", folder, *EVAL),
        ("export", folder, "--out", tmp_path / "x", "--to", "dense"),
    ):
        assert "cannot be loaded" in sentence(*command)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", 3, "no"])
def test_an_index_names_files_of_its_folder(name: Any, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "other")
    folder = changed(dense, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not a file in its folder" in sentence("eval", folder, *EVAL)


def test_a_config_cannot_ask_for_more_memory_than_the_files_hold(
    dense: Path, tmp_path: Path
) -> None:
    for number, keys in enumerate(
        ({"vocab_size": 10**9}, {"num_hidden_layers": 10**7}, {"intermediate_size": 10**8})
    ):
        folder = changed(dense, tmp_path / f"{number}", **keys)
        assert "asks for far more" in sentence("eval", folder, *EVAL)


def test_paths_stay_in_the_folders_that_they_name(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "has no GGUF file" in sentence("inspect", dense, "--gguf-file", "../x.gguf")
    for file in ("/etc/hosts", "../../x.gguf"):
        assert "leads out of its package" in sentence("inspect", f"package:torch/{file}")
    assert "is not a path" in sentence("inspect", "~nobody-of-that-name/model")
    assert "too long" in sentence("inspect", "/" + "a" * 5000)
    assert "no package '__main__'" in sentence("eval", dense, "--perplexity", "package:__main__")


def test_links_are_not_followed_out_of_a_run(dense: Path, text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text)
    for command, own in (("run", "samples"), ("sweep", "points")):
        out = tmp_path / command
        out.mkdir()
        (out / own).symlink_to(precious)
        assert "is a link" in sentence(command, recipe, out)
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_card_is_not_written_through_a_link(factorized: Path, tmp_path: Path) -> None:
    folder, other = shutil.copytree(factorized, tmp_path / "model"), tmp_path / "other"
    other.write_text("mine")
    for name in ("README.md", ".README.md.partial", ".lrcompress.json.partial"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(other)
    result = invoke("eval", folder, "--write-card", *EVAL)
    assert result.exit_code == 0, result.output
    assert other.read_text() == "mine"
    assert not (folder / "README.md").is_symlink()


def test_a_sweep_names_points_of_its_folder(tmp_path: Path) -> None:
    sweep_report.write(tmp_path, SweepReport("here", tuple(points())))
    (tmp_path / "points").mkdir()
    known = json.loads((tmp_path / "sweep.json").read_text())
    known["points"][1]["variant"] = "../../outside"
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    assert "is damaged" in sentence("report", tmp_path)


def _nested(depth: int) -> str:
    return "model: {source: " + "[" * depth + "]" * depth + "}"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n"
                                        for n in range(1, 9))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!python/object/apply:os.mkdir [BROKEN]", "could not determine a constructor"),
        ("model: !!python/name:os.system", "could not determine a constructor"),
        (BOMB, f"stand for more than {MAX_VALUES:,} values"),
        (MERGED, f"stand for more than {MAX_VALUES:,} values"),
        ("model: &a {source: *a}", f"stand for more than {MAX_VALUES:,} values"),
        (_nested(2000), "nested too deeply"),
        ("model: {source: 2001-01-01}", "it has a date: put it into quotes"),
        ("model: {source: 2001-99-99}", "month must be in 1..12"),
        ("model: {source: !!binary aGk=}", "it has a bytes"),
        ("model: {source: !!set {a, b}}", "it has a set"),
        ('model: {source: "\\ud800"}', "half of a character"),
        (f"model: {{source: x}}\ncalibration: {{seed: {'9' * 5000}}}", "limit (4300 digits)"),
        ("model: {source: x}\nevaluate: {limit: 1e30}", "evaluate.limit"),
        ("model: {source: x}\ncalibration: {num_samples: 99999999999999999999}", "is larger than"),
        ("model: {source: x}\nfinetune: {learning_rate: .inf}", "finite number"),
        ("model: {source: x}\nfinetune: {weight_decay: .nan}", "finetune.weight_decay"),
        (f"model: {{source: x}}\nfactorize: {{target_size: '{'9' * 400}'}}", "than any machine"),
        ("model: {source: x}\n" + "".join(f"k{n}: 1\n" for n in range(500)), "and 495 more"),
        ("x" * 300_000, "more than 200,000 characters"),
    ],
)
def test_recipes_are_plain_data_of_bounded_size(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    error = sentence("check", file)
    assert words in error
    assert len(error) < 2200
    assert not Path("BROKEN").exists()


def test_aliases_that_stand_for_little_are_read() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {d: 1e-3}") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": "1e-3"},
    }  # fmt: skip


def test_a_task_file_makes_no_objects(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for tag in ("!!python/object/apply:os.mkdir [BROKEN]", "!!python/name:os.system", "["):
        file.write_text(f"task: mine\ndoc_to_text: {tag}\n")
        assert "cannot be run" in sentence("eval", dense, "--tasks", file, *EVAL)
    assert not Path("BROKEN").exists()


def test_json_of_others() -> None:
    assert read_json('{"a": 1' + "0" * 400 + "}") == {"a": float("inf")}
    assert read_json('"\\ud83d\\ude00"') == "😀"
    for text, words in {
        "[" * 10**5: "nested too deeply",
        '"\\ud800"': "half of a character",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_json(text)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "NaN", "-Infinity", "1e999", "null", '"x"'])
def test_numbers_of_a_report_that_are_none(value: str, tmp_path: Path) -> None:
    report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
    file = tmp_path / "metrics.json"
    text = file.read_text()
    assert text.count('"value": 1200') == 1
    file.write_text(text.replace('"value": 1200', f'"value": {value}'))
    result = invoke("report", tmp_path)
    assert result.exit_code == (2 if value in ("null", '"x"') else 0), result.output


def test_what_a_terminal_would_obey_is_shown(tmp_path: Path) -> None:
    assert printable("a\x1b[2J\u202eb\r\n 日本\u3000") == "a\\x1b[2J\\u202eb\\r\\n 日本\u3000"
    report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
    file = tmp_path / "metrics.json"
    named = re.sub('"low"(?!:)', r'"low\\u001b]0;pwned\\u0007"', file.read_text())
    file.write_text(named)
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "low\\x1b]0;pwned\\x07" in result.stdout
    assert "\x1b" not in sentence("inspect", "./\x1b[2J")


CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 0}, {"model_type": ["llama"]}, {"hidden_size": "x"}, {"dtype": "int8"},
    {"dtype": "float8_e4m3fn"}, {"attn_implementation": "some/kernel"},
)  # fmt: skip


@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_a_config_of_no_model_is_one_sentence(
    keys: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    folder = changed(dense, tmp_path / "model", **keys)
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": {"type": "BPE"}}', "\0"])
def test_a_damaged_tokenizer_is_one_sentence(text: str, dense: Path, tmp_path: Path) -> None:
    folder = changed(dense, tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    assert "cannot be loaded" in sentence("eval", folder, *EVAL)


ATTACK = "\"'><script>broken()</script><img src=x onerror=broken()>{{ 7 * 7 }}</svg></style>]]>"


def _attacking(value: Any, spared: tuple[str, ...] = ("role", "form", "sha256")) -> Any:
    """`value` with the attack behind every text in it."""
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, Mapping):
        return {
            _attacking(key) if key in ("dense", "low", "50", "99") else key: one
            if key in spared
            else _attacking(one, spared)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_attacking(one, spared) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        kept = ("name", "unit", *spared) if isinstance(value, Metric) else spared
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(
            value, **{k: one if k in kept else _attacking(one, spared) for k, one in parts.items()}
        )
    return value


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _pages() -> Iterator[tuple[str, str]]:
    metrics = tuple(_attacking(METRICS))
    made = Report(ATTACK, metrics, _attacking(DETAILS), _attacking(RECORD), (ATTACK,))
    yield "report", report.html(made)
    yield "sweep", sweep_report.html(SweepReport(ATTACK, tuple(_attacking(points()))))
    low = f"low{ATTACK}"
    ladder = scaling_points({"dense": 0.35, low: 0.40})
    ladder[0] = replace(ladder[0], size=ATTACK, device=ATTACK, diverged=ATTACK)
    settings = ScalingSettings(
        sizes={name: {} for name in ("a", "b", "c")}, variants={"low": {}}, resamples=50
    )
    found = ScalingReport(settings, ladder, [ATTACK], metrics[:1])
    yield "scaling", scaling_report.html(found)
    whole = ScalingReport(settings, ladder[1:], [], [])
    yield "scaling with pictures", scaling_report.html(whole)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(_pages())


@pytest.mark.parametrize("name", ["report", "sweep", "scaling", "scaling with pictures"])
def test_pages_hold_nothing_but_their_own_elements(name: str, pages: dict[str, str]) -> None:
    page, elements = pages[name], _Elements()
    elements.feed(page)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not [names for _, names in elements.found if any(n.startswith("on") for n in names)]
    assert tags.count("svg") == page.count("</svg>")
    assert "broken()" in page
    assert "{{ 7 * 7 }}" in page, "the attack was read as a template"
