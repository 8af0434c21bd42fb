"""How a model is trained: a compressed one towards the dense, and a new one on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import Names


class TrainingSettings(Section):
    """What every training on text has."""

    data: Names = Field(
        (),
        description="Texts to train on, as for calibration; never the test text.",
    )
    max_steps: int = Field(200, ge=1, description="Optimizer steps.")
    batch_size: int = Field(
        2, ge=1, description="Sequences in an optimizer step, over all processes and passes."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes that a process splits its share of a step into."
    )
    shard: bool = Field(
        False,
        description="Split parameters, gradients and optimizer state over the processes (FSDP2).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the products in training; auto: bfloat16 on CUDA, else float32."
    )
    train_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence; default 512, or the model's maximum if less."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak rate of AdamW.")
    warm_up: float = Field(0.1, ge=0, lt=1, description="Share of the steps with a rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    beta2: float = Field(0.999, gt=0, lt=1, description="Memory of AdamW's squared gradients.")
    held_out: int = Field(8, ge=1, description="Sequences on which the best step is chosen.")
    eval_every: int = Field(20, ge=1, description="Steps between measurements and checkpoints.")
    patience: int | None = Field(
        None, ge=1, description="Measurements without improvement after which to stop."
    )
    tensorboard: str | None = Field(None, description="Folder for TensorBoard's logs.")
    seed: int = Field(0, ge=0, lt=2**32, description="Chooses the sequences and their order.")

    def _whole(self, asked: Mapping[str, bool]) -> Self:
        """Refuses what is `asked` for of things that a sharded model cannot do."""
        for name in (name for name, wanted in asked.items() if wanted and self.shard):
            raise ValueError(f"{name} needs whole layers in every process: leave it or shard out")
        return self


class FinetuneSettings(TrainingSettings):
    """Training of a compressed model towards its dense teacher."""

    teacher: str | None = Field(
        None, description="Dense model to learn from; default is the one that was compressed."
    )
    teacher_cache: str | None = Field(
        None,
        description="Folder that keeps the teacher's likeliest tokens, so that it runs once.",
    )
    teacher_top_k: int = Field(64, ge=1, description="Likeliest tokens kept at a position.")
    temperature: float = Field(1.0, gt=0, description="Softens both distributions.")
    cross_entropy: float = Field(
        0.0, ge=0, description="Weight of the language-model loss beside the divergence."
    )
    hidden_states: float = Field(
        0.0, ge=0, description="Weight of the relative squared error of every block's output."
    )
    train: Literal["factors", "norms", "all", "lora"] = Field(
        "factors",
        description="factors: compressed layers; norms: and norms; all: everything; lora: adapters "
        "on the compressed layers.",
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the adapters.")
    parametrization: Literal["auto", "balanced", "stored"] = Field(
        "auto",
        description="What trains of a low-rank layer. balanced: two factors that share its "
        "singular values, packed again at the end; stored: what is stored; auto: balanced, or "
        "stored where the model is sharded.",
    )
    self_guided: Literal["off", "full", "reduced"] = Field(
        "off",
        description="Let the dense weights carry the low-rank layers at first; reduced: in some "
        "steps only.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher_cache is not None and self.hidden_states:
            raise ValueError("teacher_cache keeps no hidden states: leave it or hidden_states out")
        whole = {
            "train lora": self.train == "lora",
            "parametrization balanced": self.parametrization == "balanced",
            "self_guided": self.self_guided != "off",
            "teacher_cache": self.teacher_cache is not None,
        }
        return self._whole(whole)

    @property
    def balances(self) -> bool:
        """Whether low-rank layers train as balanced factors."""
        return self.parametrization == "balanced" or (
            self.parametrization == "auto" and not self.shard
        )


class PretrainSettings(TrainingSettings):
    """Training of a new model from scratch, dense or low-rank."""

    source: str = Field(
        "llama-8m", description="config.json, a folder with one, or a preset such as llama-8m."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub id; without one, a tokenizer is trained on the data."
    )
    vocab_size: int = Field(
        4096, ge=257, description="Tokens of a tokenizer that is trained: byte-level BPE."
    )
    device: str = Field("auto", description="cpu, cuda, ...; auto takes a GPU if there is one.")
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="Share of the FFN parameters kept; without it all are dense."
    )
    dense_first: int = Field(1, ge=0, description="Leave the FFNs of this many first blocks dense.")
    rank_multiple: int = Field(8, ge=1, description="Ranks are multiples of this.")
    self_guided: Literal["off", "full", "reduced"] = Field(
        "off",
        description="Let trained dense weights carry the low-rank layers at first; reduced: in "
        "some steps only.",
    )
    dense_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the steps in which the model is dense, before its FFNs are "
        "factorized: a warm start.",
    )
    batch_size: int = Field(
        8, ge=1, description="Sequences in an optimizer step, over all processes and passes."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate of AdamW.")
    weight_decay: float = Field(0.1, ge=0, description="Of AdamW.")
    beta2: float = Field(0.95, gt=0, lt=1, description="Memory of AdamW's squared gradients.")

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.self_guided != "off" and self.keep_ratio is None:
            raise ValueError("self_guided needs low-rank layers: give keep_ratio")
        if self.dense_share and self.keep_ratio is None:
            raise ValueError("dense_share is of a low-rank model: give keep_ratio")
        if self.dense_share and not 0 < self.dense_steps < self.max_steps:
            raise ValueError(
                f"dense_share {self.dense_share:g} of {self.max_steps} steps leaves no "
                f"measurement, each {self.eval_every} steps, on both sides: set eval_every to less"
            )
        guided = self.self_guided != "off"
        return self._whole({"self_guided": guided, "dense_share": self.dense_share > 0})

    @property
    def dense_steps(self) -> int:
        """Steps before the factorization, to a whole measurement."""
        return round(self.dense_share * self.max_steps / self.eval_every) * self.eval_every
