"""The commands as a user types them, and their messages when something is wrong."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcompress
from tests.conftest import SMALL, invoke
from tests.tiny import assert_loads_without_lrcompress, logits, saved_model, tiny_model

EVAL = ("--limit", "2", "--context-length", "64", "--no-speed")


def test_help_is_fast_and_needs_no_torch() -> None:
    script = (
        "import sys; from lrcompress.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "factorize" in done.stdout
    assert time.perf_counter() - started < 1.0  # 0.2 s here; room for a busy machine


COMMANDS = ["factorize", "eval", "report", "inspect", "export", "verify", "run", "sweep", "check"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: main {command}" in result.output


def test_factorize_reports_what_it_wrote(factorized: Path) -> None:
    record = json.loads((factorized / "lrcompress.json").read_text())
    model, tokenizer = lrcompress.load(factorized)
    assert tokenizer is not None
    assert record["saved"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["counts"]["model"]["kept"] == record["saved"]["parameters"]
    assert record["calibration"]["tokens"] == 4 * 64
    assert record["recipe"]["factorize"]["keep_ratio"] == 0.6
    assert set(record["versions"]) == {"python", "lrcompress", "lm-eval", "torch", "transformers"}
    assert "import lrcompress" in (factorized / "README.md").read_text()


def test_rank_above_break_even_stays_dense_and_says_so(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("factorize", dense, "--out", out, "--rank", "30", "--method", "svd")
    assert result.exit_code == 0
    assert "6 linears: 6 dense." in result.output
    assert "breaks even at rank 23" in result.output
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_eval_beside_a_baseline_writes_reports(
    dense: Path, factorized: Path, text: Path, tmp_path: Path
) -> None:
    task = tmp_path / "task.jsonl"
    rows = [{"query": f"Q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(4)]
    task.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "report"
    result = invoke(
        "eval", factorized, "--baseline", dense, "--perplexity", text, "--out", out,
        "--limit", "2", "--context-length", "64", "--tasks", f"{task},{text}",
        "--prompt-length", "8", "--new-tokens", "2", "--repeats", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    names = {metric["name"] for metric in metrics if metric["model"] == "factorized"}
    comparisons = json.loads((out / "metrics.json").read_text())["comparisons"]
    assert {comparison["metric"] for comparison in comparisons} == {
        f"token perplexity, {text}", "task acc", "task acc_norm"
    }  # fmt: skip
    assert {comparison["samples"] for comparison in comparisons} == {2}
    samples = json.loads((out / "metrics.json").read_text())["samples"]
    assert len(samples) == 2 * len(comparisons)
    for sample in samples:
        assert all(len(value) == 2 for value in sample["values"])
    for page in ("report.md", "report.html"):
        assert "Is the difference real?" in (out / page).read_text()
    accuracy = next(m for m in metrics if m["name"] == "task acc")
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert names >= {"token perplexity", "task acc", "prefill", "decode", "parameters"}
    assert any("word_perplexity" in name for name in names)
    assert names == {metric["name"] for metric in metrics if metric["model"] == "dense"}
    for name in ("report.md", "report.html"):
        page = (out / name).read_text()
        assert "token perplexity" in page
    assert "factorized / dense" in (out / "report.md").read_text()
    assert "http://" not in (out / "report.html").read_text()


def test_reloaded_model_measures_the_same(dense: Path, tmp_path: Path, text: Path) -> None:
    model, tokenizer = lrcompress.load(dense)
    lrcompress.factorize(model, tokenizer, keep_ratio=0.6, num_samples=4, seq_len=64)
    lrcompress.save(model, tmp_path / "out", tokenizer)
    settings: dict[str, Any] = {"perplexity": [str(text)], "context_length": 64, "speed": False}
    metrics = lrcompress.evaluate(model, tokenizer, **settings)
    reloaded_metrics = lrcompress.evaluate(*lrcompress.load(tmp_path / "out"), **settings)
    assert metrics == reloaded_metrics


def test_inspect_lists_the_linears_as_text_and_json(dense: Path, factorized: Path) -> None:
    result = invoke("inspect", dense)
    assert "model.layers.1.mlp.down_proj" in result.output
    assert "32 x 88" in result.output
    inspection = json.loads(invoke("inspect", factorized, "--json", "--energy").stdout)
    assert inspection["parameters"] == sum(
        p.numel() for p in lrcompress.load(factorized)[0].parameters()
    )
    assert {row["role"] for row in inspection["rows"]} == {"gate", "up", "down"}
    for row in inspection["rows"]:
        limit = row["rank"] or min(row["shape"])
        assert limit >= row["energy_ranks"][1] >= row["energy_ranks"][0] >= 1


def test_export_dense_loads_without_lrcompress(factorized: Path, tmp_path: Path) -> None:
    assert invoke("export", factorized, "--out", tmp_path / "dense", "--to", "dense").exit_code == 0
    assert_loads_without_lrcompress(factorized, tmp_path / "dense", "", 1e-4)


def test_export_standalone_loads_without_lrcompress(factorized: Path, tmp_path: Path) -> None:
    out = tmp_path / "standalone"
    assert invoke("export", factorized, "--out", out, "--to", "standalone").exit_code == 0
    assert_loads_without_lrcompress(factorized, out, "trust_remote_code=True", 0)
    assert {file.name for file in out.glob("*.py")} == {"modeling_lowrank.py", "experts.py"}


def test_max_loss_decides_the_exit_code(dense: Path, factorized: Path, text: Path) -> None:
    measured = ("--perplexity", text, *EVAL, "--limit", "6")
    command = ("eval", factorized, *measured)
    within = invoke(*command, "--baseline", dense, "--max-loss", "10000%")
    assert within.exit_code == 0, within.output
    assert "PASS: it is shown that factorized lost at most 10000 % in every metric" in within.output
    named = invoke(
        *command, "--baseline", dense, "--max-loss", "1%", "--max-loss", f"{text}=10000%"
    )
    assert named.exit_code == 0, named.output
    assert f"factorized lost at most 10000 % in {text}, 1 % elsewhere, against" in named.output
    # with random weights either may be the worse
    pairs = ((dense, factorized), (factorized, dense))
    strict = [invoke("eval", a, *measured, "--baseline", b, "--max-loss", "1e-9") for a, b in pairs]
    beyond = max(strict, key=lambda result: result.exit_code)
    assert beyond.exit_code == 3
    loser = "factorized" if beyond is strict[1] else "dense"
    assert f"token perplexity, {text}: {loser} may have lost" in beyond.output
    assert "by the 95 % interval of this row alone." in beyond.output
    assert "FAIL" in beyond.output
    for wrong in (
        ("--max-loss", "1%"),
        ("--baseline", dense, "--max-loss", "much"),
        ("--baseline", dense, "--max-loss", "x=much"),
        ("--baseline", dense, "--max-loss", "1%", "--max-loss", "2%"),
    ):
        refused = invoke(*command, *wrong)
        assert refused.exit_code == 2
        assert "--max-loss" in refused.output


def test_lm_eval_command_line_loads_low_rank_models(factorized: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "some words to score " * 3}) for _ in range(2)))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list: [{metric: byte_perplexity}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "lrcompress.lm_eval", "run", "--model", "hf", "--model_args",
         f"pretrained={factorized}", "--tasks", tmp_path / "mine.yaml", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = invoke("eval", factorized, "--perplexity", f"{rows}", "--tasks", tmp_path / "mine.yaml",
                  "--no-speed", "--context-length", "256", "--out", tmp_path / "out")  # fmt: skip
    assert ours.exit_code == 0, ours.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    value = next(m["value"] for m in metrics if m["name"] == "mine byte_perplexity")
    assert f"{value:.4f}" in done.stdout


def _wrong(tmp_path: Path, dense: Path) -> dict[str, tuple[list[object], str]]:
    """name -> arguments of a wrong command, and a part of the sentence that it prints."""
    out = tmp_path / "out"
    files = {name: tmp_path / name for name in ("empty.txt", "binary.txt", "short.txt", "a.jsonl")}
    files["empty.txt"].write_text("\n")
    files["binary.txt"].write_bytes(bytes(range(256)))
    files["short.txt"].write_text("three short words")
    files["a.jsonl"].write_text('{"body": "words"}\n')
    (tmp_path / "hollow").mkdir()
    broken = shutil.copytree(dense, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    weightless = shutil.copytree(dense, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    taken = tmp_path / "taken"
    taken.mkdir()
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "config.json").write_text('{"model_type": "alien"}')

    def factorize(*more: object, model: object = dense) -> list[object]:
        return ["factorize", model, "--out", out, *SMALL, *more]

    keep = ("--keep-ratio", "0.5")
    return {
        "missing folder": (factorize(*keep, model="./nowhere"), "'./nowhere' does not exist"),
        "missing gguf": (factorize(*keep, model="no.gguf"), "'no.gguf' does not exist"),
        "hub offline": (factorize(*keep, model="some/model"), "cannot be loaded from the hub"),
        "no config": (factorize(*keep, model=tmp_path / "hollow"), "has no config.json"),
        "not causal": (factorize(*keep, model=t5), "is an encoder-decoder model"),
        "unknown type": (factorize(*keep, model=alien), "alien"),
        "broken weights": (factorize(*keep, model=broken), "cannot be loaded"),
        "no weights": (factorize(*keep, model=weightless), "cannot be loaded"),
        "a file": (factorize(*keep, model=files["short.txt"]), "is a file"),
        "no budget": (factorize(), "set exactly one of rank, keep_ratio"),
        "two budgets": (factorize(*keep, "--rank", "4"), "set exactly one of rank, keep_ratio"),
        "rank 0": (factorize("--rank", "0"), "--rank: input should be greater than or equal to 1"),
        "rank too big": (factorize("--rank", "33"), "use 1..32"),
        "rank a word": (factorize("--rank", "many"), "--rank: input should be a valid integer"),
        "keep 1.7": (factorize("--keep-ratio", "1.7"), "less than or equal to 1, not '1.7'"),
        "keep 0": (factorize("--keep-ratio", "0"), "greater than 0"),
        "method": (
            factorize(*keep, "--method", "magic"),
            "from svd, asvd, whitened, fisher",
        ),
        "method option": (
            factorize(*keep, "--method-options", "dampin=1"),
            "did you mean 'damping'?",
        ),
        "option value": (factorize(*keep, "--method-options", "damping=7"), "not in (0, 1]"),
        "policy": (factorize(*keep, "--ranks", "magic"), "choose from uniform, loss_aware"),
        "form": (
            factorize(*keep, "--form", "magic"),
            "input should be 'factored' or",
        ),
        "exclude": (factorize(*keep, "--exclude", "*.nothing"), "matches no linear layer"),
        "exclude all": (factorize(*keep, "--exclude", "*"), "nothing is left to factorize"),
        "empty text": (factorize(*keep, "--calibration", files["empty.txt"]), "is empty"),
        "binary text": (factorize(*keep, "--calibration", files["binary.txt"]), "not UTF-8 text"),
        "no text": (factorize(*keep, "--calibration", "no.txt"), "'no.txt' does not exist"),
        "too little": (factorize(*keep, "--calibration", files["short.txt"]), "holds 17 tokens"),
        "field": (factorize(*keep, "--calibration", files["a.jsonl"]), "fields: body"),
        "hub data": (factorize(*keep, "--calibration", "wikitext2"), "hub gave no data set"),
        "too long": (factorize(*keep, "--seq-len", "999"), "exceeds the model's maximum of 256"),
        "device": (factorize(*keep, "--device", "cuda:7"), "device 'cuda:7' is not available"),
        "dtype": (factorize(*keep, "--dtype", "int3"), "--dtype: input should be 'auto'"),
        "out exists": (["factorize", dense, "--out", taken, *keep], "exists: choose another"),
        "task": (["eval", dense, "--tasks", "arc_eazy", *EVAL], "did you mean arc_easy"),
        "task file": (["eval", dense, "--tasks", "no.yaml", *EVAL], "'no.yaml' does not exist"),
        "eval out": (["eval", dense, "--out", taken, *EVAL], "exists: choose another"),
        "stride": (["eval", dense, "--stride", "65", *EVAL], "exceeds the context length 64"),
        "export form": (
            ["export", dense, "--out", out],
            "Missing option '--to'. Choose from dense, standalone, gguf",
        ),
        "export dense": (
            ["export", dense, "--out", out, "--to", "dense"],
            "has no low-rank layers",
        ),
        "recipe": (["run", "no.yaml", out], "'no.yaml' does not exist"),
    }


WRONG = [
    "missing folder", "missing gguf", "hub offline", "no config", "not causal", "unknown type",
    "broken weights", "no weights", "a file", "no budget", "two budgets", "rank 0",
    "rank too big", "rank a word", "keep 1.7", "keep 0", "method", "method option",
    "option value", "policy", "form", "exclude", "exclude all", "empty text", "binary text",
    "no text", "too little", "field", "hub data", "too long", "device", "dtype", "out exists",
    "task", "task file", "eval out", "stride", "export form", "export dense", "recipe",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_sentence(name: str, tmp_path: Path, dense: Path) -> None:
    cases = _wrong(tmp_path, dense)
    assert set(cases) == set(WRONG)
    arguments, sentence = cases[name]
    before = {path.name for path in tmp_path.iterdir()}
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    error = result.stderr[result.stderr.index("Error: ") :]
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == before, "something was left behind"


def test_already_low_rank_is_refused(factorized: Path, tmp_path: Path) -> None:
    result = invoke("factorize", factorized, "--out", tmp_path / "o", "--rank", "4", *SMALL)
    assert result.exit_code == 2
    assert "already compressed" in result.stderr


def test_full_disk_is_one_sentence(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrcompress.checkpoint import folder as checkpoint_folder

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "write_weights", full)
    out = tmp_path / "out"
    result = invoke("factorize", dense, "--out", out, "--rank", "4", "--method", "svd")
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_one_sentence(dense: Path) -> None:
    result = invoke("factorize", dense, "--out", "/proc/lrcompress/out", "--rank", "4", *SMALL)
    assert result.exit_code in (1, 2)
    assert "/proc" in result.stderr
    assert "Traceback" not in result.stderr


# shells start background jobs with Ctrl-C ignored, and what the tests start would inherit that
LISTENING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from lrcompress.cli.app import main; main()"
)


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", num_hidden_layers=24)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "factorize", model, "--out", tmp_path / "out",
         "--keep-ratio", "0.5", "--calibration", "pydoc", "--num-samples", "1000",
         "--seq-len", "200"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "of memory" in process.stderr.readline()
    assert "Calibrating" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.strip().endswith("Error: interrupted; nothing half-written was left")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_out_of_memory_is_one_sentence(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrcompress.checkpoint import record

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")

    monkeypatch.setattr(record, "load_model", full)
    result = invoke("eval", dense)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: out of memory: try --dtype bfloat16")
    assert result.stderr.count("\n") == 1
