"""YAML, flags or keyword arguments -> one checked, frozen Recipe; the only reader of user input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from lrcompress.config import (
    CalibrationSettings,
    EvaluateSettings,
    FactorizeSettings,
    FFNBenchSettings,
    FinetuneSettings,
    ModelBenchSettings,
    ModelSettings,
    PretrainSettings,
    QuantizeSettings,
    RefineSettings,
    ScalingSettings,
    Section,
    SweepSettings,
)
from lrcompress.config.field_types import allowed_words
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import read_yaml
from lrcompress.runtime.sanitize import shortened

DEFAULT_KEEP_RATIO = 0.8
# mistakes that one sentence names, and characters of a refused value in it
REASONS, SHOWN = 5, 200


class Recipe(Section):
    """A whole run: `lrcompress run RECIPE OUT`."""

    model: ModelSettings
    calibration: CalibrationSettings = CalibrationSettings()
    factorize: FactorizeSettings = Field(
        default_factory=lambda: FactorizeSettings(keep_ratio=DEFAULT_KEEP_RATIO)
    )
    refine: RefineSettings = RefineSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    sweep: SweepSettings = SweepSettings()


class ScalingRecipe(Section):
    """A ladder of models trained from scratch: `lrcompress scaling RECIPE OUT`."""

    pretrain: PretrainSettings = PretrainSettings()
    scaling: ScalingSettings

    @model_validator(mode="after")
    def _whole_models(self) -> Self:
        if self.pretrain.shard:
            raise ValueError(
                "pretrain.shard splits one model over processes: leave it out; "
                "scaling --shard I/N shares whole models between them"
            )
        return self


# what a command can set that no recipe has
BESIDE: dict[str, type[Section]] = {
    "ffn_bench": FFNBenchSettings,
    "model_bench": ModelBenchSettings,
    "quantize": QuantizeSettings,
}


def sections(*names: str) -> dict[str, type[Section]]:
    """Name -> kind of the recipe's sections, and of those beside it."""
    fields = Recipe.model_fields | ScalingRecipe.model_fields
    kinds = {name: field.annotation for name, field in fields.items()}
    return {name: (kinds | BESIDE)[name] for name in names}  # type: ignore[misc]


def flags(kind: type[Section]) -> dict[str, str]:
    """Name as a flag or keyword argument -> field of the section."""
    return {
        str((info.json_schema_extra or {}).get("flag", name)): name  # type: ignore[union-attr]
        for name, info in kind.model_fields.items()
    }


def sections_from_flat(
    kinds: Mapping[str, type[Section]],
    values: Mapping[str, Any],
    say: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Flags or keyword arguments -> checked sections by their recipe keys.

    Raises InputError for a name that no section has, and for values that a section refuses.
    """
    known = {flag for kind in kinds.values() for flag in flags(kind)}
    for name in values:
        if name not in known:
            raise InputError(f"{say(name)}: unknown{allowed_words(name, known)}")
    return {section: _section(kind, values, say) for section, kind in kinds.items()}


def _section(kind: type[Section], values: Mapping[str, Any], say: Callable[[str], str]) -> Section:
    names = flags(kind)
    words = {field: flag for flag, field in names.items()}
    given = {field: values[flag] for flag, field in names.items() if flag in values}

    def said(path: str) -> str:
        field, _, item = path.partition(".")
        flag = say(words.get(field, field))
        return flag if item.isdigit() or not item else f"{flag}.{item}"  # one of a list, or a key

    return checked(kind, given, said)


S = TypeVar("S", bound=BaseModel)


def checked(kind: type[S], values: Mapping[str, Any], say: Callable[[str], str] = str) -> S:
    """`values` as a `kind`; raises one InputError that names every refused key and the remedy.

    `say` turns a key's path into the words of its source, such as a flag.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        reasons = [_explain(kind, dict(e), say) for e in error.errors()[:REASONS]]
        more = error.error_count() - len(reasons)
        raise InputError("; ".join(reasons) + (f"; and {more} more" if more else "")) from None


def _explain(kind: type[BaseModel], error: dict[str, Any], say: Callable[[str], str]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(kind, error["loc"][:-1])
        return f"{say(path)}: unknown key{allowed_words(str(error['loc'][-1]), fields)}"
    if error["type"] == "missing":
        return f"{say(path)}: required"
    if error["type"] == "value_error":
        return f"{say(path)}: {message}" if path else message
    given = shortened(repr(error["input"]), SHOWN)
    return f"{say(path)}: {message[0].lower()}{message[1:]}, not {given}"


def _fields_at(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with KEY=VALUE overrides of dotted keys."""
    return _read(path, overrides, Recipe)


def read_scaling(path: Path, overrides: Iterable[str] = ()) -> ScalingRecipe:
    """The same of a ladder's recipe."""
    return _read(path, overrides, ScalingRecipe)


def read_any(path: Path, overrides: Iterable[str] = ()) -> Recipe | ScalingRecipe:
    """The same of either kind: a recipe with a section `scaling` is a ladder's."""
    read = read_scaling if "scaling" in _values(path) else read_recipe
    return read(path, overrides)


def _read(path: Path, overrides: Iterable[str], kind: type[S]) -> S:
    values = _values(path)
    for override in overrides:
        _override(values, override)
    return checked(kind, values)


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"recipe {str(path)!r} does not exist: give a YAML file")
    try:
        values = read_yaml(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"recipe {str(path)!r} is not YAML of plain values: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {str(path)!r} holds no keys: start with 'model: {{source: ...}}'")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r} has no '=': write --set factorize.keep_ratio=0.6")
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override!r}: {part!r} is not a section")
    try:
        values[last] = read_yaml(text)
    except ValueError:
        values[last] = text


def to_yaml(recipe: Section) -> str:
    """The resolved recipe, every key written out; reading it back gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
