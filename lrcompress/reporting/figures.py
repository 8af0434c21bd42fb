"""Draws one picture of a report by matplotlib: as SVG in the text colour of its page, and PNG."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, NullFormatter

from lrcompress.runtime.atomic_io import writing

FOLDER = "figures"
# a placeholder: in the SVG it becomes the text colour of the page
INK = "#010203"
# distinct on light and dark pages, and for most colour-blind readers
COLOURS = ("#5b8ff9", "#e8853d", "#2fa37c", "#c063c0", "#b8a11f", "#8a8f98")
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.titlesize": "medium",
    "font.size": 10.5,
    "figure.constrained_layout.use": True,
    "grid.color": "#88888855",
    "image.cmap": "viridis",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of models and texts may contain $
}
# inches of a figure, and of the one for phones, where the whole figure shrinks to the screen
WIDTH, NARROW = 6.0, 4.2
NO_DATE: Any = {"Date": None, "Creator": None}
# inches that an entry of a legend takes, with the space around it, and each character of its label
LEGEND_HANDLE, LEGEND_CHARACTER = 0.7, 0.085
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
ON_DARK = "<style>@media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"


@dataclass(frozen=True)
class Picture:
    """A picture with its title and text alternative, as SVG and PNG."""

    name: str
    """Of its files, without a suffix."""
    section: str
    """The part of the page that shows it."""
    title: str
    text: str
    """The text alternative: what the picture shows, in words."""
    svg: str
    """An element to put into an HTML page."""
    narrow: str
    """The same for a phone, in which the type is larger against the picture."""
    png: bytes

    @property
    def file(self) -> str:
        """The content of an SVG file, readable on dark pages too."""
        head, _, body = self.svg.partition(">")
        return f"{head} {NAMESPACES}>{ON_DARK}{body}"


def draw(
    name: str,
    section: str,
    title: str,
    text: str,
    paint: Callable[[Figure], None],
    size: tuple[float, float] = (WIDTH, 3.0),
) -> Picture:
    """A Picture of what `paint` draws on an empty figure; `size` is in inches.

    Equal drawings give equal bytes.
    """
    svg, png = io.StringIO(), io.BytesIO()
    with _painted(name, paint, size) as figure:
        figure.savefig(svg, format="svg", metadata=NO_DATE)
        figure.savefig(png, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    narrow = io.StringIO()
    with _painted(f"narrow {name}", paint, (NARROW, size[1])) as figure:
        figure.savefig(narrow, format="svg", metadata=NO_DATE)
    return Picture(
        name=name,
        section=section,
        title=title,
        text=text,
        svg=_inline_svg(svg.getvalue(), text),
        narrow=_inline_svg(narrow.getvalue(), text),
        png=png.getvalue(),
    )


@contextmanager
def _painted(
    name: str, paint: Callable[[Figure], None], size: tuple[float, float]
) -> Iterator[Figure]:
    """The figure; ids in its SVG depend on `name`."""
    style: Any = STYLE | {"svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(size)
        paint(figure)
        yield figure


def legend(figure: Figure) -> None:
    """Puts one legend above all panels, with each label once."""
    handle_of: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        handle_of = dict(zip(labels, handles, strict=True)) | handle_of
    if handle_of:
        longest = max(map(len, handle_of))
        columns = int(figure.get_figwidth() / (LEGEND_HANDLE + LEGEND_CHARACTER * longest))
        figure.legend(
            handle_of.values(),
            handle_of.keys(),
            loc="outside upper left",
            ncols=min(max(columns, 1), 4),
        )


def plain_log_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis by plain numbers, the closer together the less it spans."""
    low, high = axis.get_view_interval()
    if high > 100 * low:
        labelled = [1.0]
    else:
        labelled = (
            [1.0, 2.0, 5.0]
            if high > 8 * low
            else [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]
        )
    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _inline_svg(svg: str, text: str) -> str:
    """The <svg> element of a file: with a text alternative, without the ids that nothing uses."""
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    used_ids = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used_ids else "", body)
    body = body.replace(INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    return body.replace("<svg ", f'<svg role="img" aria-label="{_attribute(text)}" ', 1).strip()


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def write(folder: Path, pictures: Sequence[Picture]) -> None:
    """Replaces `folder`/figures by an SVG and a PNG of each picture; without any, removes it."""
    if not pictures:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return
    with writing(folder / FOLDER, replace=True) as partial:
        for picture in pictures:
            (partial / f"{picture.name}.svg").write_text(picture.file, "utf-8")
            (partial / f"{picture.name}.png").write_bytes(picture.png)
