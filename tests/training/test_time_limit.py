"""Training by time: the clock decides the learning rate and the end, of resumed runs too."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

import lrcompress
from lrcompress.config import FinetuneSettings, ModelSettings
from lrcompress.config.recipe import ScalingRecipe, checked
from lrcompress.data import training_text
from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.training import finetune, job, loop, time_limit
from lrcompress.training.distillation import DistillationTrainer
from lrcompress.training.time_limit import TimeLimit
from lrcompress.workflows.scaling.ladder import variant_settings
from tests.conftest import interrupt, invoke, refusal
from tests.tiny import QUICK_FINETUNE, finetuned

STEP, MEASUREMENT = 5.0, 2.0  # seconds on the clock
# 12 steps of QUICK_FINETUNE would take longer
TIMED = {key: value for key, value in QUICK_FINETUNE.items() if key != "max_steps"} | {"minutes": 1}


class Clock:
    """A clock that only trainings move: by their steps and their measurements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.rates = 100.0, list[float]()
        self.step = STEP
        monkeypatch.setattr(loop, "TimeLimit", partial(TimeLimit, clock=lambda: self.now))
        train, evaluate = DistillationTrainer.training_step, DistillationTrainer.evaluate

        def training_step(trainer: Any, *arguments: Any) -> Any:
            self.rates.append(trainer.optimizer.param_groups[0]["lr"])
            self.now += self.step
            return train(trainer, *arguments)

        def timed_evaluate(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
            self.now += MEASUREMENT
            return evaluate(trainer, *arguments, **keywords)

        monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
        monkeypatch.setattr(DistillationTrainer, "evaluate", timed_evaluate)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def timed(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    checked = FinetuneSettings(**(TIMED | settings))
    record = finetune.finetune_to(ModelSettings(source=str(source)), checked, out)
    trained: dict[str, Any] = record["finetuned"]
    return trained


def test_training_ends_with_its_time(factorized: Path, tmp_path: Path, clock: Clock) -> None:
    trained = timed(factorized, tmp_path / "out")
    # 2 + 4 steps + 2 + 4 steps + 2 = 46 s; two more steps are over at 56 s, a third at 61 s
    assert [step for step, _ in trained["losses"]] == [0, 4, 8, 11]
    assert trained["steps"] == 11
    assert clock.now == 100 + 11 * STEP + 4 * MEASUREMENT
    assert trained["settings"]["minutes"] == 1
    assert trained["settings"]["max_steps"] is None
    assert trained["after"] < trained["before"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| minutes asked for | steps |" in card
    assert "| 1 | 11 |" in card


def test_a_slower_pace_takes_fewer_steps(factorized: Path, tmp_path: Path, clock: Clock) -> None:
    clock.step = 3 * STEP
    assert timed(factorized, tmp_path / "out")["steps"] == 4  # 2 + 4 * 15 s


def test_the_learning_rate_follows_the_time(factorized: Path, tmp_path: Path, clock: Clock) -> None:
    timed(factorized, tmp_path / "out", warm_up=0.25)
    # seconds after the step before last, of the 58 s, when the rate of a step is set
    seconds = [0, 7, 12, 17, 22, 29, 34, 39, 44, 51, 56]
    for rate, share in zip(clock.rates, (second / 58 for second in seconds), strict=True):
        cosine = (1 + math.cos(math.pi * (share - 0.25) / 0.75)) / 2
        expected = share / 0.25 if share < 0.25 else cosine
        assert rate == pytest.approx(3e-3 * expected)


def test_a_resumed_training_has_the_rest_of_its_time(
    factorized: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupt(monkeypatch, DistillationTrainer, "training_step", 7)
    with pytest.raises(KeyboardInterrupt):
        timed(factorized, tmp_path / "out")
    clock.now += 1000  # nothing trains meanwhile
    trained = timed(factorized, tmp_path / "out")
    assert [step for step, _ in trained["losses"]] == [0, 4, 8, 11]
    assert len(calls) == 7 + 11 - 4  # from the checkpoint at step 4
    # the rate goes on where the checkpoint was: step 5 again has that of step 5
    assert clock.rates[6:] == pytest.approx(clock.rates[4:6] + clock.rates[8:], rel=1e-12)


def test_a_training_whose_time_is_over_is_not_trained_on(
    factorized: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MachineError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_checkpoint", fails)
        with pytest.raises(MachineError):
            timed(factorized, tmp_path / "out")
    monkeypatch.setattr(DistillationTrainer, "training_step", None)  # would fail if it were called
    assert timed(factorized, tmp_path / "out")["steps"] == 11


def test_progress_counts_seconds(factorized: Path, tmp_path: Path, clock: Clock) -> None:
    messages, totals = list[str](), list[int | None]()

    def note(items: Any, description: str, total: int | None = None) -> Any:
        totals.append(total)
        for item in items:
            messages.append(f"{description} {item}")
            yield item

    source, settings = ModelSettings(source=str(factorized)), FinetuneSettings(**TIMED)
    finetune.finetune_to(source, settings, tmp_path / "out", note)
    assert totals == [60]
    assert len(messages) == 60
    assert messages[6].startswith("Training (seconds) ")
    assert "0:53 left" in messages[6]  # after the first step, which ended at 7 s


def test_all_processes_have_the_share_of_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here another process has come further than the main one."""
    now = [0.0]
    limit = TimeLimit(100, 0.1, lambda: now[0])
    arguments, state, control = TrainingArguments("x"), TrainerState(), TrainerControl()
    limit.on_train_begin(arguments, state, control)
    monkeypatch.setattr(time_limit, "run_on_main", lambda function: 0.5)
    now[0] = 200.0
    limit.on_optimizer_step(arguments, state, control)
    limit.on_step_end(arguments, state, control)
    assert limit.share == 0.5
    assert not control.should_training_stop


def test_a_time_below_one_measurement_ends_after_one_step() -> None:
    now = [0.0]
    limit = TimeLimit(1, 0.1, lambda: now[0])
    arguments, state, control = TrainingArguments("x"), TrainerState(), TrainerControl()
    limit.on_train_begin(arguments, state, control)
    now[0] = 3.0
    limit.on_evaluate(arguments, state, control)
    limit.on_optimizer_step(arguments, state, control)
    limit.on_step_end(arguments, state, control)
    assert limit.share == 1
    assert limit.rate == pytest.approx(0, abs=1e-12)
    assert control.should_training_stop
    assert control.should_evaluate
    assert control.should_save


def test_what_does_not_go_with_minutes_is_refused(factorized: Path, tmp_path: Path) -> None:
    for flags, words in (
        (("--max-steps", 200), "minutes and max_steps exclude each other"),
        (("--self-guided", "full"), "self_guided needs a number of steps"),
        (("--teacher-cache", "c"), "teacher_cache needs a number of steps"),
        (("--minutes", 0), "--minutes: input should be greater than 0"),
        (("--minutes", "soon"), "--minutes: input should be a valid number"),
    ):
        arguments = ("finetune", factorized, "--data", "pydoc", "--minutes", 1, *flags)
        assert words in refusal(*arguments, "--out", tmp_path / "out")
    pretrain = ("pretrain", "llama-0.3m", "--data", "pydoc", "--keep-ratio", 0.5, "--minutes", 1)
    for name, value in (("dense_share", 0.5), ("self_guided", "full")):
        error = refusal(*pretrain, f"--{name.replace('_', '-')}", value, "--out", tmp_path / "out")
        assert f"{name} needs a number of steps" in error
    assert list(tmp_path.iterdir()) == []


def test_too_little_time_proposes_more(factorized: Path, tmp_path: Path, clock: Clock) -> None:
    clock.step = 100
    with pytest.raises(InputError, match="or more --minutes"):
        # at the rate 0 of the first step, stored weights stay as they are to the last bit
        timed(factorized, tmp_path / "out", parametrization="stored")


def test_pretraining_ends_with_its_time(tmp_path: Path) -> None:
    flags = ("--data", "pydoc", "--train-length", 32, "--held-out", 2, "--vocab-size", 260)
    out, minutes = tmp_path / "new", ("--minutes", 0.01)
    result = invoke("pretrain", "llama-0.3m", "--out", out, *flags, *minutes, "--eval-every", 1)
    assert result.exit_code == 0, result.output
    trained = json.loads((out / "lrcompress.json").read_text())["pretrained"]
    assert 1 < trained["steps"] < 100


def test_without_minutes_there_are_steps() -> None:
    assert FinetuneSettings().max_steps == 200
    assert FinetuneSettings(max_steps=3).step_limit == 3
    settings = FinetuneSettings(minutes=2)
    assert settings.max_steps is None
    assert FinetuneSettings(**settings.model_dump()) == settings


def test_a_scaling_study_takes_no_minutes() -> None:
    sizes: dict[str, Any] = {name: {} for name in ("llama-0.3m", "llama-0.9m", "llama-2.5m")}
    scaling = {"sizes": sizes, "variants": {"low": {"keep_ratio": 0.5}}}
    for values, words in (
        ({"pretrain": {"minutes": 5}}, "pretrain.minutes"),
        ({"scaling": scaling | {"variants": {"low": {"minutes": 5}}}}, "low.minutes"),
    ):
        with pytest.raises(InputError, match=words):
            variant_settings(checked(ScalingRecipe, {"scaling": scaling} | values))


def test_the_text_is_for_ten_steps_in_a_second(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lrcompress.load(str(dense))
    settings = FinetuneSettings(**(TIMED | {"minutes": 0.1, "train_length": 32}))
    tokens = training_text.training_text(model, tokenizer, settings, "finetune").tokens
    assert tokens.shape == (4 + 0.1 * 60 * 10 * 2, 32)
    monkeypatch.setattr(training_text, "MAX_TIMED_TOKENS", 7 * 2 * 32 + 1)
    tokens = training_text.training_text(model, tokenizer, settings, "finetune").tokens
    assert tokens.shape == (4 + 7 * 2, 32)


def test_minutes_decide_the_fingerprint(factorized: Path) -> None:
    source = ModelSettings(source=str(factorized))
    inputs = [
        finetune.FinetuneJob(source, FinetuneSettings(minutes=m), lambda x, *_: x, None)
        for m in (1, 2)
    ]
    assert inputs[0].fingerprint_inputs() != inputs[1].fingerprint_inputs()


def test_steps_leave_training_as_it_was(factorized: Path, tmp_path: Path) -> None:
    record = finetuned(factorized, tmp_path / "out")["finetuned"]
    assert record["settings"]["minutes"] is None
    assert record["steps"] == 12
    assert "minutes" not in (tmp_path / "out" / "README.md").read_text()
