"""The folder of a scaling study: whose it is, which of its points are done, and its report."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.config.recipe import ScalingRecipe, to_yaml
from lrcompress.reporting import figures
from lrcompress.reporting.metric import Metric
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import discard, replace_text, writing
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import refuse_links
from lrcompress.workflows.scaling import report as scaling_report
from lrcompress.workflows.scaling.point import ScalingPoint
from lrcompress.workflows.scaling.report import ScalingReport

RECIPE, POINTS, TOKENIZER, WORK, SPEED = (
    "recipe.yaml", "points", "tokenizer", "training", "speed.json",
)  # fmt: skip


def refuse_studies(folders: Iterable[Path]) -> None:
    """Raises InputError where one of `folders` has the report of a scaling study."""
    for folder in folders:
        if (folder / scaling_report.JSON).is_file():
            raise InputError(
                f"{str(folder)!r} is a scaling study: read its scaling.md or scaling.html, which "
                "lrcompress scaling writes anew"
            )


@dataclass(frozen=True)
class ScalingFolder:
    """One recipe's folder: recipe.yaml, tokenizer/, points/, training/ in between, the report."""

    recipe: ScalingRecipe
    out: Path

    def claim(self) -> None:
        """Makes the folder a study's. Raises InputError where it holds something else, a link, or
        the tokenizer of other texts."""
        refuse_links(self.out)
        if self.out.exists() and not self._is_study():
            raise InputError(
                f"output {str(self.out)!r} exists and is no scaling study: choose another name"
            )
        recipe = self.out / RECIPE
        text = to_yaml(self.recipe)
        if recipe.exists() and recipe.read_bytes() != text.encode():
            for name in scaling_report.FORMATS:  # they are of other settings
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / figures.FOLDER, ignore_errors=True)
        (self.out / POINTS).mkdir(parents=True, exist_ok=True)
        replace_text(recipe, text)

    def _is_study(self) -> bool:
        if not self.out.is_dir():
            return False
        names = {path.name for path in self.out.iterdir()}
        own = {RECIPE, POINTS, TOKENIZER, WORK, figures.FOLDER, *scaling_report.FORMATS}
        left = {name for name in names - own if not name.startswith(".")}
        return not names or (POINTS in names and not left)

    @property
    def tokenizer(self) -> Path:
        """Of the texts and the vocabulary that the recipe names."""
        asked = self.recipe.pretrain
        named = [asked.tokenizer, asked.vocab_size, *asked.data]
        texts = [fingerprints.data_state(spec) for spec in asked.data]
        mark = fingerprints.digest([named, texts], "pretrain")
        return self.out / TOKENIZER / mark[:16]

    def keep_tokenizer(self, tokenizer: Any) -> None:
        with writing(self.tokenizer) as folder:
            tokenizer.save_pretrained(folder)

    def text_state(self) -> list[Any]:
        """Of all that the sequences of tokens come from."""
        file = self.tokenizer / "tokenizer.json"
        mark = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        specs = (*self.recipe.pretrain.data, *self.recipe.scaling.test)
        return [mark, list(specs), [fingerprints.data_state(spec) for spec in specs]]

    def point(self, name: str, inputs: Any, make: Callable[[Path], ScalingPoint]) -> None:
        """Makes the point and keeps it, unless the folder has it, made of the same inputs.

        The checkpoints of a training are in a folder that `make` is given, until it is done.
        """
        if self._known(name, inputs) is None:
            mark = fingerprints.digest(inputs, "pretrain")
            work = self.out / WORK / f"{name}-{mark[:16]}"
            with locks.beside(work, replace=True):  # another shard may be at it
                content = {"inputs": mark, "point": asdict(make(work))}
                fingerprints.write_state(self.out / POINTS / f"{name}.json", content)
                discard(work, work)

    def _known(self, name: str, inputs: Any) -> ScalingPoint | None:
        known = fingerprints.read_state(self.out / POINTS / f"{name}.json")
        if known.get("inputs") != fingerprints.digest(inputs, "pretrain"):
            return None
        try:
            return ScalingPoint.from_dict(known["point"])
        except (KeyError, TypeError, ValueError):  # a damaged one is made again
            return None

    def speeds(self, inputs: Any, make: Callable[[], list[Metric]]) -> None:
        if self._speeds(inputs) is None:
            found = [asdict(metric) for metric in make()]
            content = {"inputs": fingerprints.digest(inputs, "benchmark"), "metrics": found}
            fingerprints.write_state(self.out / POINTS / SPEED, content)

    def _speeds(self, inputs: Any) -> list[Metric] | None:
        known = fingerprints.read_state(self.out / POINTS / SPEED)
        if known.get("inputs") != fingerprints.digest(inputs, "benchmark"):
            return None
        return [Metric(**metric) for metric in known["metrics"]]

    def write(self, wanted: Mapping[str, Any], speed_inputs: Any) -> list[ScalingPoint]:
        """The report of those points, by name and inputs, that are there; returns them."""
        found = {name: self._known(name, inputs) for name, inputs in wanted.items()}
        points = [point for point in found.values() if point is not None]
        missing = [name for name, point in found.items() if point is None]
        speeds = self._speeds(speed_inputs) or []
        report = ScalingReport(self.recipe.scaling, points, missing, speeds)
        scaling_report.write(self.out, report)
        return points
