"""What docs/serving.md shows works as it stands there, as far as no server is needed.

Servers are replaced by a program that answers as they do.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from transformers import AutoConfig

from lrcompress.benchmark.serving.server_process import deadline, free_ports
from tests.benchmark.serving.fake_server import order, program, serve
from tests.conftest import SMALL, invoke
from tests.gguf_models import write_donor

REPOSITORY = Path.cwd()
PAGE = Path("docs/serving.md").read_text("utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
QUICK = ("--batch-size", "1", "--prompt-length", "8", "--new-tokens", "4", "--repeats", "3")
GGUF_BENCH = "lrcompress bench serve small.gguf --baseline dense.gguf"


def _section(title: str) -> list[str]:
    """The commands of lrcompress under a heading, without the word lrcompress."""
    text = PAGE[PAGE.index(f"\n## {title}\n") :].split("\n## ")[1]
    return [
        line.removeprefix("lrcompress ")
        for line in COMMANDS
        if line.startswith("lrcompress ") and line in text
    ]


def _run(line: str, *more: object) -> None:
    result = invoke(*shlex.split(line), *more)
    assert result.exit_code == 0, (line, result.output)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user, with vLLM's environment in VLLM."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VLLM" / "bin").mkdir(parents=True)
    program(tmp_path / "VLLM" / "bin" / "vllm")
    return tmp_path


def test_the_page_shows_five_commands_for_each_engine() -> None:
    programs = [line.split()[0] for line in COMMANDS]
    assert programs.count("curl") == 3
    for server in ("VLLM/bin/vllm", "llama-server", "ollama"):
        assert server in programs
    assert GGUF_BENCH in COMMANDS


def test_vllm(environment: Path, dense: Path) -> None:
    model = environment / "MODEL"
    shutil.copytree(dense, model)
    factorize, bench = _section("vLLM")
    _run(factorize, *SMALL)
    for folder in (model, environment / "small"):
        order(folder)
    # the program in place of the Python of an environment that has vLLM
    _run(bench.replace("--python VLLM/bin/python", "--server VLLM/bin/vllm"), *QUICK)


def test_any_other_program(environment: Path, dense: Path) -> None:
    shutil.copytree(dense, environment / "MODEL")
    factorize, export = _section("Any other program")
    _run(factorize, *SMALL)
    _run(export)
    sizes = [
        (environment / name / "model.safetensors").stat().st_size for name in ("small", "plain")
    ]
    assert sizes[1] <= sizes[0]


@pytest.fixture
def dense_gguf(environment: Path, dense: Path) -> Path:
    """The tiny llama as a GGUF file, in the working folder."""
    config = AutoConfig.from_pretrained(dense)
    donor = write_donor(environment / "donor.gguf", config, "llama")
    _run(f"export {dense} --to gguf --out MODEL.gguf --type f32 --like {donor}")
    return environment / "MODEL.gguf"


def test_llama_cpp(environment: Path, dense_gguf: Path) -> None:
    order(environment)
    server = program(environment / "llama-server")
    options = {"factorize": SMALL, "bench": ("--server", server, *QUICK)}
    for line in _section("llama.cpp"):
        _run(line, *options.get(line.split()[0], ()))


def test_a_real_server(environment: Path, dense_gguf: Path) -> None:
    """llama.cpp itself, by xllamacpp in this environment, answers what is asked of it."""
    out = environment / "report"
    options = ("--python", sys.executable, "--threads", 1, "--out", out, *QUICK)
    bench = GGUF_BENCH.removeprefix("lrcompress ")
    _run(bench.replace("small", "MODEL").replace("dense", "MODEL"), *options)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))["metrics"]
    assert len(metrics) == 6
    assert all(metric["value"] > 0 for metric in metrics)
    assert metrics[0]["conditions"]["version"].startswith("xllamacpp ")


def test_xllamacpp_serves_until_ctrl_c(environment: Path, dense_gguf: Path) -> None:
    (line,) = (line for line in COMMANDS if "xllamacpp_server.py" in line)
    _, script, model, _, _ = line.split()
    dense_gguf.rename(model)
    port = str(free_ports(1)[0])
    command = [sys.executable, REPOSITORY / script, model, "--port", port, "--threads", "1"]
    log = environment / "log"
    with log.open("w") as output, subprocess.Popen(command, stderr=output) as process:
        for _ in deadline(60):
            if f"{model} is served at http://127.0.0.1:{port}" in log.read_text("utf-8"):
                break
            assert process.poll() is None, log.read_text("utf-8")
        body = json.dumps({"prompt": "The sea is", "max_tokens": 4}).encode()
        with urlopen(f"http://127.0.0.1:{port}/v1/completions", body) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
    assert "Traceback" not in log.read_text("utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl() -> None:
    for line in COMMANDS:
        if line.startswith("curl "):
            with serve() as url:
                command = shlex.split(re.sub(r"http://127.0.0.1:\d+", url, line))
                answer = subprocess.run(command, capture_output=True, check=True, text=True)
            assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 32
