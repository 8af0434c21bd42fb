"""bench serve: numbers, turns, prompts, what is written, and servers that are always stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lrcompress.checkpoint.record import drop_measured, read_record
from tests.benchmark.conftest import bench_json
from tests.benchmark.serving.fake_server import order, program, serve
from tests.conftest import invoke, refusal

QUICK = ("--batch-size", "1,4", "--prompt-length", 8, "--new-tokens", 6, "--repeats", 3)


def _values(content: dict[str, Any], model: str) -> dict[str, float]:
    return {m["name"]: m["value"] for m in content["metrics"] if m["model"] == model}


def test_numbers_are_those_of_the_server(factorized: Path) -> None:
    """A first token after 0.1 s, then one each 0.02 s; the dense model takes twice as long.

    Sleeps are never shorter, and on a busy machine longer.
    """
    with serve(first=0.2, step=0.04) as dense, serve(first=0.1, step=0.02) as url:
        content = bench_json("serve", factorized, *QUICK, "--url", url, "--baseline-url", dense)
    values = _values(content, "factorized")
    for size in (1, 4):
        assert 100 <= values[f"time to first token, batch {size}"] < 200
        assert 0.5 * 50 * size < values[f"decode, batch {size}"] <= 50.5 * size
        assert 0.5 * 70 * size < values[f"total, batch {size}"] <= 70.5 * size
        assert _values(content, "dense")[f"time to first token, batch {size}"] >= 200
    metric = content["metrics"][-1]
    assert len(metric["rounds"]) == 3
    assert metric["low"] == min(metric["rounds"])
    assert metric["high"] == max(metric["rounds"])
    assert metric["conditions"]["version"] == "fake 1.2"
    assert metric["conditions"]["runs"] == 3


def test_models_take_turns_with_the_same_prompts(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with serve("d", journal=str(journal)) as dense, serve("m", journal=str(journal)) as url:
        bench_json("serve", "small", *QUICK, "--url", url, "--baseline-url", dense)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    rounds = [[lines.pop(0) for _ in range(2 * size)] for size in (1, 4) for _ in range(4)]
    assert not lines
    orders = ["".join(dict.fromkeys(line["name"] for line in round_)) for round_ in rounds]
    assert orders == ["md", "dm", "md", "dm"] * 2
    prompts = [{tuple(line["prompt"]) for line in round_} for round_ in rounds]
    assert [len(each) for each in prompts] == [1] * 4 + [4] * 4
    assert len(set.union(*prompts)) == 4 + 16
    for line in (line for round_ in rounds for line in round_):
        assert len(line["prompt"]) == 8
        assert (line["max_tokens"], line["temperature"], line["ignore_eos"]) == (6, 0, True)
        assert line["cache_salt"]


@pytest.fixture
def checkpoint(factorized: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be written to, and that the fake server serves."""
    folder = tmp_path / "small"
    shutil.copytree(factorized, folder)
    order(folder)
    return folder


@pytest.fixture
def baseline(dense: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    shutil.copytree(dense, folder)
    order(folder)
    return folder


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    return program(tmp_path / "vllm")


def _pids(*folders: Path) -> list[int]:
    return [int(pid) for folder in folders for pid in (folder / "pids").read_text().split()]


def _all_ended(*folders: Path) -> bool:
    """Whether every server and its child process has ended."""
    end = time.monotonic() + 10
    pids = _pids(*folders)
    while pids and time.monotonic() < end:
        pids = [pid for pid in pids if _runs(pid)]
    return not pids


def _runs(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"  # of an orphan that nobody waits for
    return False


def test_servers_are_started_and_stopped(
    checkpoint: Path, baseline: Path, vllm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    command = ("bench", "serve", checkpoint, "--baseline", baseline, "--server", vllm, *QUICK)
    more = ("--arguments", "--dtype 'bfloat16'", "--threads", 1, "--out", out, "--write-card")
    result = invoke(*command, *more)
    assert result.exit_code == 0, result.output
    assert len(_pids(checkpoint, baseline)) == 4
    assert _all_ended(checkpoint, baseline)
    log = (out / "servers" / "factorized.log").read_text().splitlines()[0]
    assert log.startswith(f"starting serve {checkpoint} --host 127.0.0.1 --port ")
    assert "--max-model-len 14 --max-num-seqs 4 --gpu-memory-utilization 0.45" in log
    assert log.endswith("--no-enable-prefix-caching --dtype bfloat16")
    assert (out / "servers" / "dense.log").is_file()
    page = (out / "report.html").read_text("utf-8")
    assert "time to first token, batch 4</span> (ms)" in page
    assert "arguments --dtype bfloat16" in page


def test_numbers_are_in_the_card_and_in_later_reports(
    checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    with serve() as url:
        served = ("bench", "serve", checkpoint, "--url", url, *QUICK, "--write-card")
        assert invoke(*served, "--engine", "vllm").exit_code == 0
        assert invoke(*served, "--engine", "llama.cpp").exit_code == 0
    record = json.loads((checkpoint / "lrcompress.json").read_text())
    assert list(record["served"]) == ["vllm", "llama.cpp"]
    assert record["served"]["llama.cpp"][0]["conditions"]["version"] == "b42-fake"
    card = (checkpoint / "README.md").read_text("utf-8")
    assert "## Served by vllm" in card
    assert "| decode, batch 4 (tokens/s) |" in card
    out = tmp_path / "report"
    short = ("--perplexity", text, "--context-length", 64, "--limit", 1, "--no-speed")
    assert invoke("eval", checkpoint, *short, "--write-card", "--out", out).exit_code == 0
    for file in (out / "report.html", out / "report.md", checkpoint / "README.md"):
        assert "Served by llama.cpp" in file.read_text("utf-8")
    again = invoke("report", out, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "report.html").read_text() == (out / "report.html").read_text()


def test_the_report_is_shown_again(tmp_path: Path) -> None:
    out, again = tmp_path / "report", tmp_path / "again"
    with serve() as url, serve() as dense:
        command = ("bench", "serve", "m", *QUICK, "--url", url, "--baseline-url", dense)
        assert invoke(*command, "--out", out).exit_code == 0
    assert invoke("report", out, "--out", again).exit_code == 0
    for file in ("metrics.json", "metrics.csv", "report.md", "report.html"):
        assert (again / file).read_text("utf-8") == (out / file).read_text("utf-8")


def test_numbers_go_when_the_model_changes(checkpoint: Path) -> None:
    with serve() as url:
        served = ("bench", "serve", checkpoint, "--url", url, *QUICK, "--write-card")
        assert invoke(*served).exit_code == 0
    record = read_record(checkpoint)
    assert record is not None
    drop_measured(record)
    assert "served" not in record


def test_damaged_numbers_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "lrcompress.json"
    record = json.loads(file.read_text())
    record["served"] = {"vllm": [{"model": "dense"}]}
    file.write_text(json.dumps(record))
    with serve() as url:
        error = refusal("bench", "serve", checkpoint, "--url", url, *QUICK)
    assert "is damaged (served.vllm.0.name: field required)" in error


def test_without_a_baseline_the_model_is_measured_alone() -> None:
    with serve() as url:
        content = bench_json("serve", "m", *QUICK, "--url", f"{url}/v1/")
    assert {metric["model"] for metric in content["metrics"]} == {"m"}


def test_llama_cpp_serves_gguf_files(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("small.gguf", "dense.gguf"):
        (tmp_path / name).touch()
    order(tmp_path)
    server = program(tmp_path / "llama-server")
    out = tmp_path / "report"
    result = invoke(
        *("bench", "serve", tmp_path / "small.gguf", "--baseline", tmp_path / "dense.gguf"),
        *("--server", server, "--checkpoint", checkpoint, "--write-card", "--threads", 2),
        *(*QUICK, "--out", out),
    )
    assert result.exit_code == 0, result.output
    log = (out / "servers" / "factorized.log").read_text().splitlines()[0]
    assert f"starting --model {tmp_path / 'small.gguf'} --host 127.0.0.1 --port" in log
    assert log.endswith("--ctx-size 56 --parallel 4 --threads 2")
    assert "llama.cpp" in json.loads((checkpoint / "lrcompress.json").read_text())["served"]


SIGNALS = {"Ctrl-C": signal.SIGINT, "kill": signal.SIGTERM, "hang-up": signal.SIGHUP}


@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
def test_an_interruption_stops_the_servers(
    number: signal.Signals, checkpoint: Path, baseline: Path, vllm: Path, tmp_path: Path
) -> None:
    order(checkpoint, signals_parent=number)
    out = tmp_path / "report"
    before = signal.getsignal(number)
    command = ("bench", "serve", checkpoint, "--baseline", baseline, "--server", vllm, *QUICK)
    result = invoke(*command, "--out", out)
    assert result.exit_code == 130
    assert "interrupted; nothing half-written was left" in result.output
    assert _all_ended(checkpoint, baseline)
    assert signal.getsignal(number) == before
    assert not out.exists()


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, where logs of servers that failed stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


TRACEBACK = """\
(EngineCore pid=7) ERROR 11-29 lines of a traceback
(EngineCore pid=7) ValueError: mlp.up_proj: tensor A is missing
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."""


def test_a_server_that_ends_is_shown(
    checkpoint: Path, baseline: Path, vllm: Path, logs: Path
) -> None:
    order(checkpoint, dies_at_start=TRACEBACK)
    command = ("bench", "serve", checkpoint, "--baseline", baseline, "--server", vllm, *QUICK)
    result = invoke(*command)
    assert result.exit_code == 2
    *lines, error = result.stderr.strip().splitlines()
    assert error.startswith(f"Error: vllm with '{checkpoint}' ended with exit code 3: ")
    assert "ValueError: mlp.up_proj: tensor A is missing; its log is " in error
    assert "(EngineCore pid=7) ERROR 11-29 lines of a traceback" in lines
    (log,) = logs.glob("*/factorized.log")
    assert str(log) in error
    assert _all_ended(checkpoint, baseline)


def test_a_server_that_ends_later_is_named(checkpoint: Path, vllm: Path, logs: Path) -> None:
    order(checkpoint, dies_on_request=True)
    error = refusal(
        "bench", "serve", checkpoint, "--baseline", checkpoint, "--server", vllm, *QUICK
    )
    assert "ended with exit code 7: RuntimeError: the device is lost" in error
    assert _all_ended(checkpoint)


def test_a_server_that_never_is_ready(checkpoint: Path, vllm: Path, logs: Path) -> None:
    order(checkpoint, never_ready=True)
    command = ("bench", "serve", checkpoint, "--baseline", checkpoint, "--server", vllm, *QUICK)
    error = refusal(*command, "--timeout", 2)
    assert "does not go on: not ready after 2 s, give more by --timeout" in error
    assert _all_ended(checkpoint)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"stops_after": 3}, "gave 3 of 6 tokens, so its speed cannot be compared"),
        ({"cached": 4}, "took 4 tokens of a new prompt from its cache"),
        ({"text_shift": 1}, "dense and m have different tokenizers"),
        ({"refusal": "too long"}, "refused (HTTP 400): too long"),
    ],
)
def test_a_server_with_other_numbers_is_refused(
    behaviour: dict[str, Any], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    with serve() as dense, serve(**behaviour) as url:
        command = ("bench", "serve", "m", "--url", url, "--baseline-url", dense)
        assert words in refusal(*command, *QUICK, "--out", out)
    assert not out.exists()


def test_what_cannot_be_started_is_refused(
    checkpoint: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    cases = [
        ((checkpoint,), "vllm is not on the PATH"),
        ((gguf,), "llama-server is not on the PATH"),
        ((checkpoint, "--server", "/no/vllm"), "--server '/no/vllm' is not a program"),
        ((checkpoint, "--python", sys.executable), "has no vllm: install it there"),
        ((checkpoint, "--engine", "llama.cpp"), "llama.cpp serves GGUF files"),
        ((gguf, "--engine", "vllm"), "vllm serves folders"),
        ((checkpoint, "--engine", "tgi"), "--engine: input should be 'vllm' or 'llama.cpp'"),
        ((dense, "--write-card"), "is no checkpoint of lrcompress"),
        ((gguf, "--write-card"), "is no checkpoint of lrcompress"),
        ((checkpoint, "--url", "localhost:8000"), "is not the URL of a server"),
        ((checkpoint, "--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        ((checkpoint, "--baseline-url", "http://x"), "baseline_url needs url"),
        ((checkpoint, "--url", "http://x", "--threads", 1), "threads is for servers that are"),
        ((checkpoint, "--python", "a", "--server", "b"), "give one of them"),
        ((checkpoint, "--arguments", "'"), "cannot be split into arguments"),
        ((checkpoint, "--out", tmp_path), "exists"),
    ]
    for arguments, words in cases:
        assert words in refusal("bench", "serve", *arguments), arguments


def test_prompts_that_the_text_does_not_fill_are_refused() -> None:
    with serve() as url:
        error = refusal("bench", "serve", "m", "--url", url, "--prompt-length", 5000)
    assert "--prompt-length 5000 is more than the 5000 tokens of the text" in error


def test_arguments_for_xllamacpp_are_refused() -> None:
    from lrcompress.benchmark.serving.engines import LlamaCpp, ServerRequest
    from lrcompress.runtime.errors import InputError

    request = ServerRequest("x.gguf", 80, 192, 32, 2, 3, ())
    python, script, model, *options = LlamaCpp().python_command("py", request)
    assert Path(script).is_file()
    assert (python, model) == ("py", "x.gguf")
    assert " ".join(options) == "--port 80 --context 6144 --parallel 32 --threads 3"
    with pytest.raises(InputError, match="xllamacpp has no command line"):
        LlamaCpp().python_command("py", ServerRequest("x", 80, 192, 32, 2, None, ("-ngl", "9")))


def test_vllm_gets_its_threads_unpinned() -> None:
    from lrcompress.benchmark.serving.engines import VLLM, ServerRequest

    request = ServerRequest("small", 80, 192, 32, 1, 3, ("--enforce-eager",))
    environment = VLLM().environment(request)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    command = VLLM().python_command("py", request)
    assert command[:5] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", "small"]
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.9"
    assert command[-1] == "--enforce-eager"
    assert os.environ.get("OMP_NUM_THREADS") != "3"
