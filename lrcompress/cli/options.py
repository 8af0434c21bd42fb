"""Options of commands: those made from recipe sections, and those that several commands share.

Imports neither torch nor pydantic, which only commands that run need.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress.cli.stdout import reserve_for_json
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path

if TYPE_CHECKING:
    from lrcompress.config import EvaluateSettings


# keyword argument -> its flag, where Python reserves the word
FLAG_WORDS = {"target": "for"}


class SettingsCommand(click.Command):
    """A command with an option for every field of some recipe sections.

    The options are made when the command is parsed, so that other commands do not import them.
    """

    def __init__(self, *args: Any, sections: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        *declared, help_option = super().get_params(context)
        return [*declared, *_section_options(self.sections), help_option]


class OneLineChoice(click.Choice[str]):
    """A choice whose error for a missing option is one line."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Choose from {', '.join(self.choices)}"


def _section_options(sections: tuple[str, ...]) -> list[click.Parameter]:
    from lrcompress.config import recipe

    return [
        _field_option(flag, section.model_fields[name])
        for section in recipe.sections(*sections).values()
        for flag, name in recipe.flags(section).items()
        if name != "source"
    ]


def _field_option(flag: str, field: Any) -> click.Option:
    """The option of a section's field. Its value stays text: pydantic converts and checks it, as it
    does for recipes."""
    name, kind = _flag_word(flag), field.annotation
    help_text = field.description + _default_text(field.default)
    if kind is bool:
        return click.Option([f"--{name}/--no-{name}"], default=None, help=help_text)
    is_multiple = typing.get_origin(kind) in (tuple, dict)
    return click.Option(
        [f"--{name}", flag],
        default=None,
        multiple=is_multiple,
        metavar=_metavar(kind),
        help=help_text + (" May be repeated." if is_multiple else ""),
    )


def _flag_word(name: str) -> str:
    """The flag, without its dashes, of the keyword argument `name`."""
    return FLAG_WORDS.get(name, name).replace("_", "-")


def _default_text(default: object) -> str:
    if default in (None, (), {}) or isinstance(default, bool):
        return " [default: on]" if default is True else ""
    text = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" [default: {text}]"


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is dict:
        return "KEY=VALUE"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # of a Literal, the latter
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _set_by_user(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


def _as_typed(key: str) -> str:
    """How the user writes the setting `key` on the command line."""
    return "MODEL" if key == "source" else f"--{_flag_word(key)}"


def build_sections(
    sections: tuple[str, ...], options: Mapping[str, Any], **fixed: object
) -> dict[str, Any]:
    """Checked recipe sections, by name, from a command's options and `fixed` values.

    Raises InputError, which names the wrong option.
    """
    from lrcompress.config import recipe

    values = _set_by_user(options) | fixed
    return recipe.sections_from_flat(recipe.sections(*sections), values, _as_typed)


def build_recipe(sections: tuple[str, ...], source: str, options: Mapping[str, Any]) -> Any:
    """The recipe from a command's options; InputError names the wrong option."""
    from lrcompress.config import recipe

    return recipe.Recipe(**build_sections(sections, options, source=source))


def _parse_max_loss(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> Mapping[str, float]:
    """Name -> largest loss; the name is empty for one that is asked of every metric."""
    limits: dict[str, float] = {}
    for value in values:
        name, _sign, share = value.rpartition("=")
        if name in limits:
            raise InputError(
                f"--max-loss {value!r}: a loss for {name or 'every metric'} is given twice"
            )
        limits[name] = _parse_share(value, share)
    return limits


def _parse_share(value: str, share: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from lrcompress.config.field_types import Percent

    try:
        return TypeAdapter[float](Percent).validate_python(share)
    except ValidationError:
        raise InputError(
            f"--max-loss {value!r} has no share: write one such as 1%, or mmlu=1%"
        ) from None


def check_max_loss(
    settings: EvaluateSettings, has_baseline: bool, max_loss: Mapping[str, float]
) -> None:
    """Raises InputError where `max_loss` is set and no metric will be compared with a baseline."""
    if max_loss and not (has_baseline and (settings.perplexity or settings.tasks)):
        raise InputError("--max-loss needs a --baseline to compare with, and a text or task")


def sweep_overrides(keep_ratio: str | None, method: str | None) -> Iterator[str]:
    """The options of `sweep` as recipe overrides; methods replace the recipe's variants."""
    for key, value in {"keep_ratios": keep_ratio, "methods": method}.items():
        if value is not None:
            yield f"sweep.{key}={value}"
    if method is not None:
        yield "sweep.variants={}"


def read_shard(text: str | None) -> tuple[int, int]:
    """'2/3' -> (2, 3), the second of three shards; None -> (1, 1), everything."""
    number, slash, count = (text or "1/1").partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard {text!r} is not a shard: write one such as 1/3, from 1/3 to 3/3")
    return int(number), int(count)


class UserPath(click.ParamType[Path]):
    """A path in which ~ and $VARIABLES are expanded, also where the shell did not."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        return user_path(str(value))


_PATH = UserPath()
RECIPE = click.argument("recipe_file", metavar="RECIPE", type=_PATH)
OUT_FOLDER = click.argument("out", type=_PATH)
FOLDERS = click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=_PATH)
NEW_OUT = click.option("--out", required=True, type=_PATH, help="New folder for the checkpoint.")
OUT = click.option(
    "--out", type=_PATH, help="New folder for the report; without it, results are only printed."
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe key; dots separate nested keys. May be repeated.",
)
RESUME = click.option(
    "--resume/--no-resume", default=True, help="Resume an interrupted run. [default: on]"
)
MAX_LOSS = click.option(
    "--max-loss",
    metavar="[NAME=]SHARE",
    multiple=True,
    callback=_parse_max_loss,
    help="Largest loss allowed against the first model, such as 1%: relative for a perplexity, in "
    "percentage points for an accuracy. The exit code is 3 unless the 95 % interval of every "
    "metric stays below it. A group of tasks stands for its parts. NAME= asks it of one text, task "
    "or group. May be repeated.",
)
WRITE_CARD = click.option(
    "--write-card",
    is_flag=True,
    help="Also write the numbers into lrcompress.json and README.md of the checkpoint MODEL.",
)
JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=reserve_for_json,
    help="Print JSON and nothing else.",
)
