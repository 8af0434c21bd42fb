"""benchmarks/serving.py: sizes of its models, and the overheads that it reads from speeds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HIDDEN, WIDTH = 2048, 5632


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "serving.py"
    spec = importlib.util.spec_from_file_location("serving", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["narrowed", "factored", "pivoted"])
def test_forms_keep_the_same_share(script: ModuleType, form: str) -> None:
    records = script.records(form, 0.6, HIDDEN, WIDTH)
    kept = sum(map(script.parameters, records.values()))
    assert kept / (6 * HIDDEN * WIDTH) == pytest.approx(0.6, abs=0.01)


def test_overheads_are_those_of_the_speeds(script: ModuleType) -> None:
    """A token takes 1 s and 1 s for 1000 parameters; each of 6 linears of the pivoted model takes
    as long as 50 more."""
    sizes = {"dense": 1200, "narrowed": 600, "pivoted": 720, "factored": 600}
    costs = sizes | {"pivoted": 720 + 6 * 50}
    machine = (1, 3, 0.5)  # is as fast in each round
    speeds = {form: [fast / (1 + cost / 1000) for fast in machine] for form, cost in costs.items()}
    assert script.overhead("pivoted", speeds, sizes) == pytest.approx(50)
    assert script.overhead("factored", speeds, sizes) == pytest.approx(0, abs=1e-9)
    assert script.overhead("narrowed", speeds, sizes) is None
    slow = speeds | {"narrowed": [0.1] * 3}
    assert script.overhead("pivoted", slow, sizes) is None
    assert "| pivoted | 0.495 (0.2475 to 1.485)" in script.table({"decode": speeds}, sizes)
