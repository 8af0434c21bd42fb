"""Reads YAML files, flags and keyword arguments into validated settings and recipes."""

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
    ServeBenchSettings,
    SweepSettings,
)
from lrcompress.config.effort import with_effort
from lrcompress.config.field_types import allowed_words
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import read_yaml
from lrcompress.runtime.sanitize import shortened

DEFAULT_KEEP_RATIO = 0.8
# limits of an error message: mistakes that it names, and characters of a refused value
MAX_REASONS, MAX_VALUE_LENGTH = 5, 200
# turns the path of a key, such as "factorize.rank", into the word that the user wrote for it
KeyToWords = Callable[[str], str]


class Recipe(Section):
    """The recipe of `lrcompress run` and `lrcompress sweep`."""

    model: ModelSettings
    calibration: CalibrationSettings = CalibrationSettings()
    factorize: FactorizeSettings = Field(
        default_factory=lambda: FactorizeSettings(keep_ratio=DEFAULT_KEEP_RATIO)
    )
    refine: RefineSettings = RefineSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="before")
    @classmethod
    def _apply_effort(cls, values: Any) -> Any:
        return with_effort(values) if isinstance(values, dict) else values


class ScalingRecipe(Section):
    """The recipe of `lrcompress scaling`: a ladder of models that are trained from scratch."""

    pretrain: PretrainSettings = PretrainSettings()
    scaling: ScalingSettings

    @model_validator(mode="after")
    def _check_pretrain(self) -> Self:
        if self.pretrain.shard:
            raise ValueError(
                "pretrain.shard splits one model over processes: leave it out; "
                "scaling --shard I/N shares whole models between them"
            )
        if self.pretrain.minutes is not None:
            raise ValueError(
                "pretrain.minutes: scaling.tokens_per_parameter decides how long a model trains: "
                "leave it out"
            )
        return self


# sections of commands that are not part of a recipe
COMMAND_SECTIONS: dict[str, type[Section]] = {
    "ffn_bench": FFNBenchSettings,
    "model_bench": ModelBenchSettings,
    "serve_bench": ServeBenchSettings,
    "quantize": QuantizeSettings,
}


def sections(*names: str) -> dict[str, type[Section]]:
    """Name -> class of the sections `names`, of recipes and of commands."""
    fields = Recipe.model_fields | ScalingRecipe.model_fields
    classes = {name: field.annotation for name, field in fields.items()} | COMMAND_SECTIONS
    return {name: classes[name] for name in names}  # type: ignore[misc]


def flags(section: type[Section]) -> dict[str, str]:
    """Name of the flag or keyword argument -> name of the field, for all fields of `section`."""
    return {
        str((info.json_schema_extra or {}).get("flag", name)): name  # type: ignore[union-attr]
        for name, info in section.model_fields.items()
    }


def sections_from_flat(
    classes: Mapping[str, type[Section]],
    values: Mapping[str, Any],
    key_to_words: KeyToWords = str,
) -> dict[str, Any]:
    """Flags or keyword arguments -> validated sections, by the keys of `classes`.

    Raises InputError for a name that no section has, and for values that a section refuses.
    """
    known_flags = {flag for section in classes.values() for flag in flags(section)}
    for name in values:
        if name not in known_flags:
            raise InputError(f"{key_to_words(name)}: unknown{allowed_words(name, known_flags)}")
    field_values = with_effort(
        {key: _field_values(section, values) for key, section in classes.items()}
    )
    return {
        key: _section(section, field_values[key], key_to_words) for key, section in classes.items()
    }


def _field_values(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values`, by flag, that are fields of `section`, by field."""
    return {field: values[flag] for flag, field in flags(section).items() if flag in values}


def _section(
    section: type[Section], field_values: Mapping[str, Any], key_to_words: KeyToWords
) -> Section:
    flag_of = {field: flag for flag, field in flags(section).items()}

    def path_to_words(path: str) -> str:
        field, _, item = path.partition(".")
        words = key_to_words(flag_of.get(field, field))
        is_list_index = item.isdigit()
        return f"{words}.{item}" if item and not is_list_index else words

    return checked(section, field_values, path_to_words)


S = TypeVar("S", bound=BaseModel)


def checked(model: type[S], values: Mapping[str, Any], key_to_words: KeyToWords = str) -> S:
    """`values` as an instance of `model`.

    Raises one InputError that names up to MAX_REASONS refused keys and the remedy for each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors()[:MAX_REASONS]
        reasons = [_explain(model, dict(mistake), key_to_words) for mistake in mistakes]
        more = error.error_count() - len(reasons)
        raise InputError("; ".join(reasons) + (f"; and {more} more" if more else "")) from None


def _explain(model: type[BaseModel], error: dict[str, Any], key_to_words: KeyToWords) -> str:
    """One mistake, as pydantic describes it, in words."""
    path = ".".join(str(part) for part in error["loc"])
    words = key_to_words(path)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(model, error["loc"][:-1])
        return f"{words}: unknown key{allowed_words(str(error['loc'][-1]), fields)}"
    if error["type"] == "missing":
        return f"{words}: required"
    if error["type"] == "value_error":
        return f"{words}: {message}" if path else message
    value = shortened(repr(error["input"]), MAX_VALUE_LENGTH)
    return f"{words}: {message[0].lower()}{message[1:]}, not {value}"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The fields of the model that stands at `path` inside `model`; none if there is no model."""
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, after overrides KEY=VALUE, where KEY is like factorize.rank.

    Raises InputError if the file is missing or not YAML, and for every mistake in it.
    """
    return _read(path, overrides, Recipe)


def read_scaling_recipe(path: Path, overrides: Iterable[str] = ()) -> ScalingRecipe:
    """As `read_recipe`, for the recipe of a scaling study."""
    return _read(path, overrides, ScalingRecipe)


def read_any_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe | ScalingRecipe:
    """As `read_recipe`; a file with a section `scaling` is the recipe of a scaling study."""
    read = read_scaling_recipe if "scaling" in _read_values(path) else read_recipe
    return read(path, overrides)


def _read(path: Path, overrides: Iterable[str], recipe_type: type[S]) -> S:
    values = _read_values(path)
    for override in overrides:
        _override(values, override)
    return checked(recipe_type, values)


def _read_values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"recipe {str(path)!r} does not exist: give a YAML file")
    try:
        values = read_yaml(path.read_text("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"recipe {str(path)!r} is not UTF-8 text: convert it") from None
    except ValueError as error:
        raise InputError(f"recipe {str(path)!r} is not YAML of plain values: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {str(path)!r} holds no keys: start with 'model: {{source: ...}}'")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    """Applies one KEY=VALUE to `values`, in place."""
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
    """The recipe as YAML with every key, defaults included; reading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
