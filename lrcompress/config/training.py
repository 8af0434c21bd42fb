"""Settings of training: a compressed model towards its dense teacher, or a new model on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import (
    CHAT_TEMPLATE_TEXT,
    LOSS_ON_TEXT,
    LossOn,
    NameList,
    PathText,
    Share,
)

# optimizer steps of a training whose length the user leaves open
DEFAULT_STEPS = 200
# optimizer steps that no training reaches: of one that ends by time
UNREACHABLE_STEPS = 10**9


class TrainingSettings(Section):
    """Settings that finetuning and pretraining share.

    One of `max_steps` and `minutes` is None.
    """

    data: NameList = Field(
        (),
        description="Texts to train on, written as for calibration; never the test text.",
    )
    chat_template: str = Field("auto", description=CHAT_TEMPLATE_TEXT)
    max_steps: int | None = Field(
        None,
        ge=1,
        description=f"Optimizer steps; default {DEFAULT_STEPS} without minutes.",
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="Minutes of training, held-out measurements included, instead of max_steps.",
    )
    batch_size: int = Field(
        2, ge=1, description="Sequences in an optimizer step, in all processes and passes together."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes of each process in an optimizer step."
    )
    shard: bool = Field(
        False,
        description="Split parameters, gradients and optimizer state over the processes (FSDP2).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, which saves memory."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of matrix products; auto: bfloat16 on CUDA, else float32."
    )
    train_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence; default 512, or the model's maximum if less."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    warm_up: Share = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the steps, or of the minutes, in which the rate rises.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    beta2: float = Field(
        0.999, gt=0, lt=1, description="AdamW's decay of the mean of squared gradients."
    )
    held_out: int = Field(
        8, ge=1, description="Held-out sequences, on which the best step is chosen."
    )
    eval_every: int = Field(
        20, ge=1, description="Steps from one measurement, with its checkpoint, to the next."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after this number of measurements without improvement."
    )
    tensorboard: PathText | None = Field(None, description="Folder for TensorBoard logs.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed for the choice and the order of sequences."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        """Raises ValueError for two lengths; fills in DEFAULT_STEPS where there is none."""
        if not isinstance(values, Mapping):
            return values
        lengths = [key for key in ("minutes", "max_steps") if values.get(key) is not None]
        if len(lengths) == 2:
            raise ValueError("minutes and max_steps exclude each other: leave one of them out")
        return values if lengths else {**values, "max_steps": DEFAULT_STEPS}

    @property
    def step_limit(self) -> int:
        """Optimizer steps; more than any training takes where the minutes end it."""
        return UNREACHABLE_STEPS if self.max_steps is None else self.max_steps

    def _refuse_with_minutes(self, in_use: Mapping[str, bool]) -> None:
        """Raises ValueError if time ends the training and a setting that needs steps is in use."""
        for name, used in in_use.items():
            if used and self.minutes is not None:
                raise ValueError(
                    f"{name} needs a number of steps: leave it out, or give max_steps, not minutes"
                )

    def _refuse_with_shard(self, in_use: Mapping[str, bool]) -> Self:
        """Raises ValueError if the model is sharded and a setting that prevents this is in use."""
        for name, used in in_use.items():
            if used and self.shard:
                raise ValueError(
                    f"{name} needs whole layers in every process: leave it or shard out"
                )
        return self


class FinetuneSettings(TrainingSettings):
    """Training of a compressed model towards its dense teacher."""

    loss_on: LossOn = Field("all", description=LOSS_ON_TEXT)
    teacher: str | None = Field(
        None, description="Dense model to learn from; default is the model that was compressed."
    )
    teacher_cache: PathText | None = Field(
        None,
        description="Folder that stores the teacher's most likely tokens, so that it runs once.",
    )
    teacher_top_k: int = Field(
        64, ge=1, description="Most likely tokens to store for each position."
    )
    temperature: float = Field(
        1.0, gt=0, description="Temperature of both distributions; higher is softer."
    )
    cross_entropy: float = Field(
        0.0, ge=0, description="Weight of the language-model loss, added to the divergence."
    )
    hidden_states: float = Field(
        0.0, ge=0, description="Weight of the relative squared error of the output of every block."
    )
    train: Literal["factors", "norms", "all", "lora"] = Field(
        "factors",
        description="What is trained. factors: compressed layers; norms: these and norms; all: "
        "everything; lora: adapters on the compressed layers.",
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the adapters.")
    parametrization: Literal["auto", "balanced", "stored"] = Field(
        "auto",
        description="What is trained of a low-rank layer. balanced: two factors that share its "
        "singular values, converted to the stored form at the end; stored: the stored tensors; "
        "auto: stored if the model is sharded, else balanced.",
    )
    self_guided: Literal["off", "full", "reduced"] = Field(
        "off",
        description="Mix the dense weights into the low-rank layers; their share falls from 1 to 0 "
        "over the first half of the steps. reduced: only in some of these steps.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.teacher_cache is not None and self.hidden_states:
            raise ValueError("teacher_cache keeps no hidden states: leave it or hidden_states out")
        guided = self.self_guided != "off"
        self._refuse_with_minutes(
            {"self_guided": guided, "teacher_cache": self.teacher_cache is not None}
        )
        needs_whole_layers = {
            "train lora": self.train == "lora",
            "parametrization balanced": self.parametrization == "balanced",
            "self_guided": guided,
            "teacher_cache": self.teacher_cache is not None,
        }
        return self._refuse_with_shard(needs_whole_layers)

    @property
    def balances(self) -> bool:
        """Whether low-rank layers train as balanced factors."""
        return self.parametrization == "balanced" or (
            self.parametrization == "auto" and not self.shard
        )


class PretrainSettings(TrainingSettings):
    """Training of a new model from scratch, dense or low-rank."""

    source: str = Field(
        "llama-8m", description="A config.json, a folder with one, or a preset such as llama-8m."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub id; without one, a tokenizer is trained on the data."
    )
    vocab_size: int = Field(
        4096, ge=257, description="Tokens of the trained tokenizer, which is byte-level BPE."
    )
    device: str = Field("auto", description="cpu, cuda, ...; auto uses a GPU if there is one.")
    keep_ratio: Share | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the FFN parameters to keep; default is a dense model.",
    )
    dense_first: int = Field(
        1, ge=0, description="Leave the FFNs of this number of first blocks dense."
    )
    rank_multiple: int = Field(8, ge=1, description="Ranks are multiples of this.")
    self_guided: Literal["off", "full", "reduced"] = Field(
        "off",
        description="Mix dense weights, which are trained too, into the low-rank layers; their "
        "share falls from 1 to 0 over the first half of the steps. reduced: only in some of these "
        "steps.",
    )
    dense_share: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the steps in which the model is still dense, before its FFNs are "
        "factorized (warm start).",
    )
    batch_size: int = Field(
        8, ge=1, description="Sequences in an optimizer step, in all processes and passes together."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of AdamW.")
    beta2: float = Field(
        0.95, gt=0, lt=1, description="AdamW's decay of the mean of squared gradients."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        guided, warm_start = self.self_guided != "off", self.dense_share > 0
        self._refuse_with_minutes({"self_guided": guided, "dense_share": warm_start})
        if guided and self.keep_ratio is None:
            raise ValueError("self_guided needs low-rank layers: give keep_ratio")
        if warm_start and self.keep_ratio is None:
            raise ValueError("dense_share needs low-rank layers: give keep_ratio")
        if warm_start and not 0 < self.dense_steps < self.step_limit:
            raise ValueError(
                f"dense_share {self.dense_share:g} of {self.step_limit} steps leaves no "
                f"measurement, each {self.eval_every} steps, on both sides: set eval_every to less"
            )
        return self._refuse_with_shard({"self_guided": guided, "dense_share": warm_start})

    @property
    def dense_steps(self) -> int:
        """Steps before the factorization, rounded to a multiple of `eval_every`."""
        return round(self.dense_share * self.step_limit / self.eval_every) * self.eval_every
