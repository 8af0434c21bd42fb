"""What the README and the pages of docs/ show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.conftest import invoke
from tests.gguf_models import write_donor

README = Path("README.md").read_text("utf-8")
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
COMMANDS = re.findall(
    r"^lrcompress (\w+ .*?) +#",
    "\n".join(Path(page).read_text("utf-8") for page in ("README.md", "docs/commands.md")),
    re.MULTILINE,
)
# need a recipe of their own, and are tested with those that the repository has
WITH_RECIPE = ("run", "sweep", "scaling", "check")
QUICK = {
    "bench": ("--prompt-length", "8", "--new-tokens", "2", "--training-length", "8"),
    "eval": ("--limit", "1", "--repeats", "2"),
    "finetune": ("--max-steps", "2", "--train-length", "64", "--held-out", "2"),
    "pretrain": (
        *("--max-steps", "2", "--train-length", "32", "--held-out", "2"),
        *("--batch-size", "2", "--vocab-size", "260"),
    ),
}


def test_python_example_runs(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    exec(code.replace('"MODEL"', repr(str(dense))), {"print": lambda *a: shown.append(a)})
    assert (tmp_path / "small" / "lrcompress.json").is_file()
    assert any("token perplexity" in str(line) for line in shown)


def test_every_command_has_an_example() -> None:
    from lrcompress.cli.app import main

    assert {line.split()[0] for line in COMMANDS} == set(main.commands)


def test_commands_run(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TRAIN.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    write_donor(Path("DENSE.gguf"), AutoConfig.from_pretrained(dense), "llama")
    outputs = set()
    for line in COMMANDS:
        arguments = line.replace("MODEL", str(dense)).split()
        if arguments[0] in WITH_RECIPE or line.startswith("bench serve"):  # see test_serving.py
            continue
        if "--out" in arguments:
            output = arguments[arguments.index("--out") + 1]
            if output in outputs:  # the README and the list of commands make the same folders
                continue
            outputs.add(output)
        result = invoke(*arguments, *QUICK.get(arguments[0], ()))
        assert result.exit_code == 0, (line, result.output)
    assert outputs >= {
        "small",
        "tuned",
        "report",
        "plain",
        "alone",
        "int8",
        "large",
        "new",
        "slim.gguf",
    }


def test_tree_names_every_room() -> None:
    tree = README[README.index("## Where the code is") :]
    rooms = {path.parent.name for path in Path("lrcompress").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == rooms
    assert len(rooms) == 14


def test_readme_stays_short() -> None:
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page.resolve()
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in _anchors(file.read_text("utf-8")), f"{page}: {target}"


def _anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


MENTIONED = re.compile(
    r"`((?:lrcompress|tests|recipes|benchmarks|docs)/[\w/.]+\.(?:py|yaml|md|jinja|sh))`"
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in MENTIONED.findall(page.read_text("utf-8")):
        assert Path(name).is_file() or "NAME" in name, f"{page}: {name}"
