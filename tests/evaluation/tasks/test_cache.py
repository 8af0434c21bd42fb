"""Results of tasks are computed once, and again when anything that decides them changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lrcompress
from lrcompress.evaluation.tasks.cache import model_fingerprint
from lrcompress.runtime.errors import InputError
from tests.conftest import interrupt, invoke
from tests.evaluation.tasks.conftest import ROWS, WORDS, quality, write_rows, write_yaml
from tests.tiny import byte_tokenizer, tiny_model


def test_again_costs_nothing(tmp_path: Path, dense: Path, passes: list[int]) -> None:
    tasks = (write_yaml(tmp_path), write_rows(tmp_path / "other.jsonl", ROWS[:4]))
    cache = tmp_path / "cache"
    first = quality(lrcompress.load(dense)[0], *tasks, cache=cache)
    assert len(passes) == 3 * (8 + 4)
    assert first == quality(lrcompress.load(dense)[0], *tasks, cache=cache)
    assert first == quality(tiny_model(), *tasks, cache=cache)  # wherever it comes from
    assert len(passes) == 3 * (8 + 4)
    assert first == quality(tiny_model(), *tasks)
    assert len(passes) == 2 * 3 * (8 + 4)


def change_rows(folder: Path, _: Any) -> None:
    write_rows(folder / "mine-rows.jsonl", [{**row, "gold": 0} for row in ROWS])


def change_prompt(folder: Path, _: Any) -> None:
    write_yaml(folder, text="'Q: {{query}}'")


def change_weights(_: Path, model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3


def change_config(_: Path, model: Any) -> None:
    model.config.rms_norm_eps = 0.1


CHANGES: dict[str, Callable[[Path, Any], None] | dict[str, Any]] = {
    "weights": change_weights,
    "config": change_config,
    "rows": change_rows,
    "prompt": change_prompt,
    "limit": {"limit": 4},
    "num_fewshot": {"num_fewshot": 1},
    "seed": {"seed": 5},
    "context": {"context_length": 64},
    "batch": {"batch_size": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_result_is_asked_anew(
    change: str, tmp_path: Path, passes: list[int]
) -> None:
    model, task, cache = tiny_model(), write_yaml(tmp_path), tmp_path / "cache"
    quality(model, task, cache=cache)
    before = len(passes)
    apply = CHANGES[change]
    more = apply if isinstance(apply, dict) else {}
    if not isinstance(apply, dict):
        apply(tmp_path, model)
    changed = quality(model, task, cache=cache, **more)
    assert len(passes) > before
    assert changed == quality(model, task, **more)


def test_code_beside_a_task_file_counts(tmp_path: Path, passes: list[int]) -> None:
    (tmp_path / "words.py").write_text(
        "def right(doc):\n    return helper(doc)\ndef helper(doc):\n    return doc['gold']\n"
    )
    task = write_yaml(tmp_path)
    task.write_text(task.read_text().replace(": gold", ": !function words.right"))
    model, cache = tiny_model(), tmp_path / "cache"
    quality(model, task, cache=cache)
    before = len(passes)
    quality(model, task, cache=cache)
    assert len(passes) == before
    code = (tmp_path / "words.py").read_text().replace("doc['gold']", "0 * doc['gold'] + 1")
    (tmp_path / "words.py").write_text(code)
    quality(model, task, cache=cache)
    assert len(passes) == 2 * before


def test_tokenizer_and_tensors_are_in_the_fingerprint() -> None:
    model = tiny_model()
    mark = model_fingerprint(model, byte_tokenizer())
    used = byte_tokenizer()
    used(["a", "bb"], padding=True, truncation=True, max_length=8)
    assert model_fingerprint(tiny_model(), used) == mark
    assert model_fingerprint(model, byte_tokenizer(bos=True)) != mark
    assert model_fingerprint(tiny_model(seed=1), byte_tokenizer()) != mark
    assert model_fingerprint(tiny_model().to(torch.bfloat16), byte_tokenizer()) != mark


def test_an_added_task_is_computed_alone(tmp_path: Path, passes: list[int]) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    task, added = write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS[:2])
    first = quality(model, task, cache=cache)
    before = len(passes)
    metrics = quality(model, added, task, cache=cache)
    assert len(passes) == before + 3 * 2
    assert metrics[2:] == first


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"key": 1, "result": {"logs": []}}', None])
def test_a_damaged_file_is_made_anew(damage: str | None, tmp_path: Path, passes: list[int]) -> None:
    model, cache, task = tiny_model(), tmp_path / "cache", write_yaml(tmp_path)
    first = quality(model, task, cache=cache)
    before = len(passes)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2] if damage is None else damage)
    assert quality(model, task, cache=cache) == first
    assert len(passes) == 2 * before
    assert file.read_text() == whole
    assert [path for path in cache.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("at", [10, 30])
def test_an_interrupted_evaluation_goes_on(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    tasks = (write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS))
    whole = quality(model, *tasks)
    with monkeypatch.context() as patch:
        interrupt(patch, LlamaForCausalLM, "forward", at)
        with pytest.raises(KeyboardInterrupt):
            quality(model, *tasks, cache=cache)
    more = interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)
    assert quality(model, *tasks, cache=cache) == whole
    assert len(more) == 2 * 3 * 8 - (at - 1)
    assert not list(cache.rglob("*.db"))


def test_texts_that_are_done_are_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"{w} " * 40} for w in WORDS[:3]])
    whole = quality(model, texts)
    assert whole == quality(model, texts, cache=tmp_path / "other")
    count = interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)
    quality(model, texts)
    total = len(count)
    with monkeypatch.context() as patch:
        done = interrupt(patch, LlamaForCausalLM, "forward", total)
        with pytest.raises(KeyboardInterrupt):
            quality(model, texts, cache=cache)
        assert len(done) == total
    count.clear()
    assert quality(model, texts, cache=cache) == whole
    assert 0 < len(count) <= total / 3 + 1


def test_damaged_answers_are_given_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, task = tiny_model(), tmp_path / "cache", write_yaml(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, LlamaForCausalLM, "forward", 5)
        with pytest.raises(KeyboardInterrupt):
            quality(model, task, cache=cache)
    (answers,) = cache.rglob("*.db")
    answers.write_bytes(b"no data base" * 100)
    assert quality(model, task, cache=cache) == quality(model, task)


def test_the_cache_can_be_off_and_is_where_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    model, task = tiny_model(), write_yaml(tmp_path)
    quality(model, task)
    result = invoke("eval", tmp_path, "--tasks", "no.yaml")
    assert "'no.yaml' does not exist" in result.stderr
    assert not (tmp_path / "caches").exists()
    lrcompress.evaluate(model, byte_tokenizer(), perplexity=[], speed=False, tasks=[str(task)])
    assert len(list((tmp_path / "caches" / "lrcompress" / "tasks").rglob("mine-*.json"))) == 1
    with pytest.raises(InputError, match="is not a folder that can be written: name another"):
        quality(model, task, cache=task / "under-a-file")
