"""Variants of finetuning at equal tokens, from one compressed checkpoint.

    python benchmarks/training.py STUDENT TEACHER --train FILE ... --test FILE ... --out OUT.json

Each variant trains the compressed layers by the forward KL divergence from the teacher, for the
same number of tokens and with one schedule (a rise over a tenth of the steps, then a cosine). It is
measured by that divergence on windows of the test texts, in nats per token. What is varied: the
optimizer (AdamW, torch's Muon, Muon for the inputs of an FFN and AdamW for its output), the rate,
the mean of the weights over the steps, the batch late in the run, who wrote the text, and which
parameters train. Writes OUT after each variant, and goes on where OUT ends.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from lrcompress.config import ModelSettings
from lrcompress.data.corpora import read_corpus
from lrcompress.data.generated import sampled_blocks
from lrcompress.data.packing import Packing, bos_token, interleave, token_blocks
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.models.loading import load_model
from lrcompress.runtime.progress import silent
from lrcompress.training.losses import kl_divergence
from lrcompress.training.trainable import balance

WARM_UP = 0.1
TEST_WINDOWS = 4


@dataclass(frozen=True)
class Variant:
    """One way to train.

    muon: which matrices torch's Muon trains: none, all, or those of all layers but down.
    average: decay of the mean of the weights by step, which replaces them at the end; 0 has none.
    late: factor by which the batch grows for the last half of the tokens.
    text: who wrote the text: people (the files) or the teacher.
    attention: whether the attention's output projections train too.
    """

    rate: float = 1e-4
    muon: str = "none"
    momentum: float = 0.95
    average: float = 0.0
    late: int = 1
    text: str = "people"
    attention: bool = False


VARIANTS = {
    "AdamW 1e-4": Variant(),
    "AdamW 3e-4": Variant(rate=3e-4),
    "weights averaged": Variant(average=0.8),
    "AdamW 2e-4, weights averaged": Variant(rate=2e-4, average=0.8),
    "batch doubled late": Variant(late=2),
    "attention's output too": Variant(attention=True),
    "Muon 2e-4, momentum 0.8": Variant(rate=2e-4, muon="all", momentum=0.8),
    "Muon 2e-4, momentum 0.8; AdamW for down": Variant(rate=2e-4, muon="inputs", momentum=0.8),
    "half the text of the teacher": Variant(text="both"),
    "text of the teacher": Variant(text="teacher"),
}


def texts(options: argparse.Namespace, teacher: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Who wrote it -> training sequences (samples, length), in the order of training.

    The teacher writes only if a variant reads it.
    """
    count, length = options.steps * options.batch, options.length
    share = -(-count // len(options.train))
    packing = Packing(share, length, seed=0)
    files = [
        token_blocks(read_corpus(str(f), "calibration"), tokenizer, packing) for f in options.train
    ]
    people = interleave(files)[:count]
    if all(VARIANTS[name].text == "people" for name in options.variants):
        return {"people": people}
    written = sampled_blocks(teacher, bos_token(tokenizer), count, length, 0, silent)
    both = interleave([people[: count // 2], written[: count - count // 2]])
    return {"people": people, "teacher": written, "both": both}


def in_batches(blocks: Tensor, variant: Variant, size: int) -> list[Tensor]:
    """The sequences in batches of `size`; the last half in batches of `late` times as many."""
    half = len(blocks) // 2
    early, late = torch.split(blocks[:half], size), torch.split(blocks[half:], size * variant.late)
    return [*early, *late]


def parameters(student: nn.Module, variant: Variant) -> dict[str, nn.Parameter]:
    """Name -> parameter that trains; all others stop requiring a gradient."""
    compressed = {name for name, _ in compressed_layers(student)}
    kept = {}
    for name, parameter in student.named_parameters():
        layer = name.rpartition(".")[0]
        is_compressed = any(layer == c or layer.startswith(c + ".") for c in compressed)
        is_output = variant.attention and layer.endswith("self_attn.o_proj")
        parameter.requires_grad_(is_compressed or is_output)
        if parameter.requires_grad:
            kept[name] = parameter
    return kept


def optimizers(named: dict[str, nn.Parameter], variant: Variant) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that the variant gives it, AdamW for the rest."""

    def by_muon(name: str, parameter: nn.Parameter) -> bool:
        if parameter.ndim != 2 or variant.muon == "none":
            return False
        return variant.muon == "all" or ".down_proj" not in name

    matrices = [p for name, p in named.items() if by_muon(name, p)]
    rest = [p for name, p in named.items() if not by_muon(name, p)]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=variant.rate,
                weight_decay=0.0,
                momentum=variant.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        rate = 1e-4 if matrices else variant.rate
        made.append(torch.optim.AdamW(rest, lr=rate, weight_decay=0.0))
    return made


def schedule(progress: float) -> float:
    """The factor of the rate, at a share of the tokens from 0 to 1."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


class Average:
    """The exponential mean of parameters over the steps (Polyak and Juditsky 1992)."""

    def __init__(self, named: dict[str, nn.Parameter], decay: float) -> None:
        self.named, self.decay = named, decay
        self.means = {name: p.detach().clone() for name, p in named.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        for name, mean in self.means.items():
            mean.lerp_(self.named[name], 1 - self.decay)

    @torch.no_grad()
    def install(self) -> None:
        for name, mean in self.means.items():
            self.named[name].copy_(mean)


def divergence(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) in nats per predicted token of `tokens` (samples, length)."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target = teacher(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = student(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return kl_divergence(logits, target, 1.0)


@torch.no_grad()
def measured(student: Any, teacher: Any, tests: dict[str, Tensor]) -> dict[str, float]:
    """Test text -> its mean divergence."""
    return {
        name: sum(float(divergence(student, teacher, window[None])) for window in tokens)
        / len(tokens)
        for name, tokens in tests.items()
    }


def trained(student: Any, teacher: Any, blocks: Tensor, variant: Variant, size: int) -> None:
    """Trains `student` in place, on every sequence of `blocks` once."""
    named = parameters(student, variant)
    steppers, average = optimizers(named, variant), Average(named, variant.average)
    rates = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    seen = 0
    for batch in in_batches(blocks, variant, size):
        seen += len(batch)
        loss = divergence(student, teacher, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for stepper, peak in zip(steppers, rates, strict=True):
            for group, rate in zip(stepper.param_groups, peak, strict=True):
                group["lr"] = rate * schedule((seen - len(batch) / 2) / len(blocks))
            stepper.step()
            stepper.zero_grad()
        average.update()
    average.install()


def run(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a variant -> its settings, divergences before and after, and seconds."""
    teacher, tokenizer = load_model(ModelSettings(source=options.teacher, dtype="float32"))
    start, _ = load_model(ModelSettings(source=options.student, dtype="float32"))
    teacher.eval().requires_grad_(False)
    balance(start.eval())
    written = texts(options, teacher, tokenizer)
    packing = Packing(TEST_WINDOWS, options.length, seed=0)
    tests = {
        f.name: token_blocks(read_corpus(str(f), "test"), tokenizer, packing) for f in options.test
    }
    before = measured(start, teacher, tests)
    yield "before", {"divergence": before}
    for name in options.variants:
        variant, student = VARIANTS[name], copy.deepcopy(start)
        begin = time.perf_counter()
        trained(student, teacher, written[variant.text], variant, options.batch)
        seconds = time.perf_counter() - begin
        after = measured(student, teacher, tests)
        yield name, {"variant": asdict(variant), "divergence": after, "seconds": seconds}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--train", type=Path, action="append", required=True)
    parser.add_argument("--test", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("training.json"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--variants", action="append", choices=VARIANTS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.variants = [n for n in options.variants or VARIANTS if n not in results]
    for name, result in run(options) if options.variants else ():
        results[name] = result
        options.out.write_text(json.dumps(results, indent=1))
        click.echo(f"{name}: {result['divergence']}")


if __name__ == "__main__":
    main()
