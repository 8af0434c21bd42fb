"""A picture of a report: drawn by matplotlib, as SVG in the reader's text colour, and as PNG."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Sequence
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
# what is drawn in it becomes the text colour of the page that shows the SVG
INK = "#010203"
# told apart in light and dark, and by most colour-blind readers
COLOURS = ("#5b8ff9", "#e8853d", "#2fa37c", "#c063c0", "#b8a11f", "#8a8f98")
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "grid.color": "#88888855",
    "image.cmap": "viridis",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of models and texts may hold a $
}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
ON_DARK = "<style>@media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"


@dataclass(frozen=True)
class Picture:
    """`name` is that of its files, `section` the part of a page that it belongs to; `text` says
    what it shows to who cannot see it. `svg` is an element of a page."""

    name: str
    section: str
    title: str
    text: str
    svg: str
    png: bytes

    @property
    def file(self) -> str:
        """The SVG as a file of its own, readable on a dark page too."""
        head, _, body = self.svg.partition(">")
        return f"{head} {NAMESPACES}>{ON_DARK}{body}"


def draw(
    name: str,
    section: str,
    title: str,
    text: str,
    onto: Callable[[Figure], None],
    size: tuple[float, float] = (7.5, 3.2),
) -> Picture:
    """What `onto` draws on an empty figure of `size` inches; equal drawings give equal bytes."""
    style: Any = STYLE | {"svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(size)
        onto(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return Picture(name, section, title, text, _inline(svg.getvalue(), text), png.getvalue())


def legend(figure: Figure) -> None:
    """Above all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    if found:
        figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=4)


def plain_logarithms(axis: Axis) -> None:
    """Numbers as they are read, enough of them where the axis spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _inline(svg: str, text: str) -> str:
    """The element alone, with a text alternative, and no ids but those that it refers to."""
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(
        r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body
    ).replace(INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    return body.replace("<svg ", f'<svg role="img" aria-label="{_attribute(text)}" ', 1).strip()


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def write(folder: Path, pictures: Sequence[Picture]) -> None:
    """Writes `folder`/figures with an SVG and a PNG of each; what stood there gives way to it."""
    if not pictures:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return
    with writing(folder / FOLDER, replace=True) as partial:
        for picture in pictures:
            (partial / f"{picture.name}.svg").write_text(picture.file, "utf-8")
            (partial / f"{picture.name}.png").write_bytes(picture.png)
