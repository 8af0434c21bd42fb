"""Effort: what it chooses, that a user's own settings win, and that a resolved recipe stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrcompress.config import CalibrationSettings, FactorizeSettings
from lrcompress.config.effort import EFFORTS
from lrcompress.config.recipe import (
    Recipe,
    checked,
    read_recipe,
    sections,
    sections_from_flat,
    to_yaml,
)
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke

COUNTS = ("max_samples", "max_generated_samples", "gradient_samples")
QUICK, BEST = (
    tuple(EFFORTS[effort]["calibration"][name] for name in COUNTS) for effort in ("quick", "best")
)


def recipe(effort: Any, calibration: Any = None, **factorize: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"source": "x"},
        "factorize": {"keep_ratio": 0.8, "effort": effort},
    }
    values["factorize"] |= factorize
    return checked(Recipe, values if calibration is None else values | {"calibration": calibration})


def counts(calibration: CalibrationSettings) -> tuple[int, ...]:
    return tuple(getattr(calibration, name) for name in COUNTS)


def test_every_effort_has_its_choices() -> None:
    default, quick, best = map(recipe, ("default", "quick", "best"))
    assert default.calibration == CalibrationSettings()
    assert default.factorize == FactorizeSettings(keep_ratio=0.8)
    assert counts(quick.calibration) == QUICK
    assert quick.factorize.sequential == "independent"
    assert counts(best.calibration) == tuple(2 * count for count in counts(default.calibration))
    assert best.factorize.sequential == "anchored"
    assert {effort.factorize.effort for effort in (default, quick, best)} == set(EFFORTS)


def test_the_page_shows_the_choices() -> None:
    page = Path("docs/concepts.md").read_text("utf-8")
    efforts = [recipe(effort).model_dump() for effort in ("quick", "default", "best")]
    for section, key in [("factorize", "sequential"), *(("calibration", key) for key in COUNTS)]:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{section}.{key}`"))
        cells = [cell.strip(" `").split("`")[0] for cell in row.split("|")[2:5]]
        assert cells == [str(effort[section][key]) for effort in efforts]


def test_what_the_user_sets_wins() -> None:
    best = recipe(
        "best", {"gradient_samples": 3, "max_generated_samples": 9}, sequential="independent"
    )
    assert counts(best.calibration) == (BEST[0], 9, 3)
    assert best.factorize.sequential == "independent"
    assert recipe("best", {"num_samples": 7}).calibration.num_samples == 7


def test_a_method_that_reads_no_text_is_not_anchored() -> None:
    assert recipe("best", method="svd").factorize.sequential == "independent"
    assert recipe("best", method="asvd").factorize.sequential == "anchored"


def test_flags_and_keyword_arguments_have_the_same_choices() -> None:
    values: dict[str, Any] = {"effort": "best", "keep_ratio": 0.8, "gradient_samples": 2}
    flat = sections_from_flat(sections("calibration", "factorize"), values)
    nested = recipe("best", {"gradient_samples": 2})
    assert flat == {"calibration": nested.calibration, "factorize": nested.factorize}


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_resolved_recipe_reads_back_equal(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    resolved = recipe(effort, {"max_samples": 30})
    file.write_text(to_yaml(resolved))
    assert read_recipe(file) == resolved
    # all keys are set now, so another word changes only itself
    changed = read_recipe(file, ["factorize.effort=quick"])
    assert changed.calibration == resolved.calibration
    assert changed.factorize.sequential == resolved.factorize.sequential


def test_set_chooses_an_effort(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {source: x}\nfactorize: {keep_ratio: 0.6}\n")
    assert counts(read_recipe(file, ["factorize.effort=quick"]).calibration) == QUICK


@pytest.mark.parametrize("word", ["fast", "Best", ["best"], None, 1])
def test_a_wrong_word_is_named(word: object) -> None:
    sentence = r"factorize\.effort: input should be 'quick', 'default' or 'best', not"
    with pytest.raises(InputError, match=sentence):
        recipe(word)


@pytest.mark.parametrize("calibration", [3, ["self"]])
def test_sections_of_a_wrong_type_are_named(calibration: object) -> None:
    with pytest.raises(InputError, match="calibration: input should be"):
        recipe("best", calibration)
    with pytest.raises(InputError, match="factorize: input should be"):
        checked(Recipe, {"model": {"source": "x"}, "factorize": calibration})


def test_the_record_has_the_word_and_its_choices(dense: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "small", ("--seq-len", "32", "--rank-multiple", "2")
    result = invoke(
        *("factorize", dense, "--out", out, "--keep-ratio", "0.6", "--effort", "quick", *flags)
    )
    assert result.exit_code == 0, result.output
    record = json.loads((out / "lrcompress.json").read_text("utf-8"))
    assert record["recipe"]["factorize"]["effort"] == "quick"
    assert counts(CalibrationSettings(**record["recipe"]["calibration"])) == QUICK
    assert record["calibration"]["num_samples"] == QUICK[1]
    refused = invoke("factorize", dense, "--out", tmp_path / "no", "--rank", "4", "--effort", "x")
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "--effort: input should be 'quick', 'default' or 'best', not 'x'" in refused.stderr
