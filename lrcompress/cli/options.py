"""Options of commands: those of recipe sections, and some that commands share; without torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from lrcompress.config import EvaluateSettings
from lrcompress.config.field_types import Percent
from lrcompress.runtime.errors import InputError


class SettingsCommand(click.Command):
    """A command whose options are the fields of recipe sections, read when they are needed."""

    def __init__(self, *args: Any, sections: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        fixed = super().get_params(context)
        return [*fixed[:-1], *_options(self.sections), fixed[-1]]


def _options(sections: tuple[str, ...]) -> list[click.Parameter]:
    from lrcompress.config import recipe

    options: list[click.Parameter] = []
    for kind in recipe.sections(*sections).values():
        for flag, name in recipe.flags(kind).items():
            if name != "source":
                options.append(_option(flag, kind.model_fields[name]))
    return options


def _option(flag: str, field: Any) -> click.Option:
    """Values stay text: pydantic converts and checks them, as it does for recipes."""
    name, kind = flag.replace("_", "-"), field.annotation
    help_text = field.description + _default_words(field.default)
    if kind is bool:
        return click.Option([f"--{name}/--no-{name}"], default=None, help=help_text)
    several = typing.get_origin(kind) in (tuple, dict)
    return click.Option(
        [f"--{name}"],
        default=None,
        multiple=several,
        metavar=_metavar(kind),
        help=help_text + (" May be repeated." if several else ""),
    )


def _default_words(default: object) -> str:
    if default in (None, (), {}) or isinstance(default, bool):
        return " [default: on]" if default is True else ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" [default: {shown}]"


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is dict:
        return "KEY=VALUE"
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user set."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def _say(flag: str) -> str:
    return "MODEL" if flag == "source" else f"--{flag.replace('_', '-')}"


def build_sections(
    sections: tuple[str, ...], options: Mapping[str, Any], **fixed: object
) -> dict[str, Any]:
    """Checked sections of a command's options; InputError names the flag that is wrong."""
    from lrcompress.config import recipe

    return recipe.sections_from_flat(recipe.sections(*sections), _given(options) | fixed, _say)


def build_recipe(sections: tuple[str, ...], source: str, options: Mapping[str, Any]) -> Any:
    """The recipe of a command's options; InputError names the flag that is wrong."""
    from lrcompress.config import recipe

    return recipe.Recipe(**build_sections(sections, options, source=source))


def _share(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return TypeAdapter[float](Percent).validate_python(value)
    except ValidationError:
        raise InputError(f"--max-loss {value!r} is no share: write one such as 1%") from None


MAX_LOSS = click.option(
    "--max-loss",
    metavar="SHARE",
    callback=_share,
    help="Exit with 3 unless the 95 % interval of every loss against the first model stays "
    "below it: a share of a perplexity, points of an accuracy.",
)


def check_max_loss(measured: EvaluateSettings, compared: bool, max_loss: float | None) -> None:
    """Raises InputError where there will be nothing to decide it by."""
    if max_loss is not None and not (compared and (measured.perplexity or measured.tasks)):
        raise InputError("--max-loss needs a --baseline to compare with, and a text or task")


_NEW: dict[str, Any] = {"type": click.Path(path_type=Path), "help": "New folder to write."}
OUT = click.option("--out", **_NEW)
NEW_OUT = click.option("--out", required=True, **_NEW)
RECIPE = click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)


RESUME = click.option(
    "--resume/--no-resume", default=True, help="Go on from an interrupted run. [default: on]"
)


def sweep_overrides(keep_ratio: str | None, method: str | None) -> Iterator[str]:
    """What the flags of `sweep` are as overrides; methods take the place of the variants."""
    for key, value in {"keep_ratios": keep_ratio, "methods": method}.items():
        if value is not None:
            yield f"sweep.{key}={value}"
    if method is not None:
        yield "sweep.variants={}"


FOLDERS = click.argument(
    "folders", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
WRITE_CARD = click.option(
    "--write-card",
    is_flag=True,
    help="Write the numbers into lrcompress.json and README.md of the checkpoint MODEL.",
)


def read_shard(text: str | None) -> tuple[int, int]:
    """'2/3' -> (2, 3); the whole where it is None."""
    number, slash, count = (text or "1/1").partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text!r} is no part: write one such as 1/3, from 1/3 to 3/3")
    return int(number), int(count)


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
