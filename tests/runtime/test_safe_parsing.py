"""YAML and JSON of others: plain data of bounded size, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.runtime.safe_parsing import MAX_VALUES, read_json, read_yaml
from tests.conftest import refusal


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
    error = refusal("check", file)
    assert words in error
    assert len(error) < 2200
    assert not Path("BROKEN").exists()


def test_aliases_that_stand_for_little_are_read() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {d: 1e-3}") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": "1e-3"},
    }  # fmt: skip


def test_json_of_others() -> None:
    assert read_json('{"a": 1' + "0" * 400 + "}") == {"a": float("inf")}
    assert read_json('"\\ud83d\\ude00"') == "😀"
    for text, words in {
        "[" * 10**5: "nested too deeply",
        '"\\ud800"': "half of a character",
    }.items():
        with pytest.raises(ValueError, match=words):
            read_json(text)
