"""Options of commands: those of recipe sections, and some that commands share; without torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from lrcompress.protocols import InputError
from lrcompress.values import Percent


class SettingsCommand(click.Command):
    """A command whose options are the fields of recipe sections, read when they are needed."""

    def __init__(self, *args: Any, sections: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        fixed = super().get_params(context)
        return [*fixed[:-1], *_options(self.sections), fixed[-1]]


def _options(sections: tuple[str, ...]) -> list[click.Parameter]:
    from lrcompress import recipe

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
    shown = ",".join(default) if isinstance(default, tuple) else default
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


def build_recipe(sections: tuple[str, ...], source: str, options: Mapping[str, Any]) -> Any:
    """The recipe of a command's options; InputError names the flag that is wrong."""
    from lrcompress import recipe

    return recipe.Recipe(**build_settings(sections, source, options))


def build_settings(
    sections: tuple[str, ...], source: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The sections of a command's options, by their names."""
    from lrcompress import recipe

    flat = _given(options) | {"source": source}
    return recipe.from_flat(recipe.sections(*sections), flat, _say)


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


def read_shard(text: str | None) -> tuple[int, int]:
    """'2/3' -> (2, 3); the whole where it is None."""
    number, slash, count = (text or "1/1").partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text!r} is no part: write one such as 1/3, from 1/3 to 3/3")
    return int(number), int(count)


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
