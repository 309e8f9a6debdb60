"""Draw the sections of a report as SVG, if matplotlib is there.

Text and axes take the colour of the text around them, so that a picture fits a light page and a
dark one. The same numbers give the same bytes.
"""

import io
import math
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from merging.models.kinds import Layer
from merging.runs.report import Number, Report
from merging.runs.sections import OUTPUT, Section

INSTALL = "pictures need matplotlib: pip install matplotlib"
WIDTH = 11.25  # inches: 1080 pixels of a page
INK, FAINT = "#010203", "#040506"  # stand for the colour of text, and a paler one
COLOURS = ("#4477aa", "#ee6677", "#228833", "#b8a12e", "#55b5d5", "#aa3377")  # after Paul Tol
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)))  # for more models than colours
LEFT, RIGHT, BETWEEN = 0.9, 0.9, 1.1  # inches, beside and between panels
ABOVE, BELOW, TITLE = 0.3, 0.42, 0.35  # inches, above and below panels
ROW, CHART = 0.24, 1.9  # inches: heights of a kind of tensor, of a chart of lines
LABEL, TICK = 0.11, 0.05  # inches from an axis to the middle of what is below it; of its ticks
MANY_LAYERS = 45  # from which a panel takes the whole width
CELL = re.compile(
    r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) \2 \nL \3 ([\d.]+) \nL \1 \4 \nL \1 \2 \n"'
    r' clip-path="[^"]*" style="fill: (#\w+|none)"/>'
)
KEY, LETTER = 0.2, 0.075  # inches: height of a line of names, width of a letter
LONGEST = 40  # characters of a model's name


def can_draw() -> bool:
    """Whether matplotlib is installed, and can be imported."""
    try:
        import matplotlib.backends.backend_svg
    except ImportError:
        return False
    return bool(matplotlib.backends.backend_svg)


def draw(report: Report, sections: Sequence[Section], titled: bool = False) -> str:
    """Return one picture of sections below each other, with their titles or without."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    heights = [_height(report, section) + TITLE * titled for section in sections]
    whole = sum(heights) or TITLE
    with _style("".join(section.title for section in sections)):
        figure = Figure(figsize=(WIDTH, whole))
        FigureCanvasSVG(figure)
        page = _Page(figure, whole)
        top = 0.0
        for section, height in zip(sections, heights, strict=True):
            if titled:
                page.text(0.1, top + TITLE / 2, section.title, size=11)
            if section.lines:
                _draw_lines(page, report, section, top + TITLE * titled)
            else:
                _draw_panels(page, report, section, top + TITLE * titled)
            top += height
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _plain(stream.getvalue())


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Draw with text as text, the placeholders' colours, and names that depend on nothing else."""
    import matplotlib

    colours = dict.fromkeys(("text.color", "axes.labelcolor"), INK)
    colours |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), FAINT)
    colours |= dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "axes.linewidth": 0.6}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(colours | settings)
        yield


def _plain(svg: str) -> str:
    """Return a picture as a page takes it: short, without what no page needs, in its colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = CELL.sub(_rectangle, svg)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r"<[^>]*>", lambda tag: _plain_tag(tag[0], used), svg)  # not the text between
    return re.sub(r"\n\s*", "\n", svg).strip()


def _plain_tag(tag: str, used: Container[str]) -> str:
    """Return a tag with short numbers, and with an id only if that is used."""
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
    tag = re.sub(r"font-family: [^;\"]*; | transform=\"rotate\(-0 [^\"]*\"", "", tag)
    tag = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", tag)
    tag = re.sub(rf"(fill|stroke): {FAINT}", r"\1: currentColor; \1-opacity: 0.4", tag)
    return tag.replace(INK, "currentColor")


def _rectangle(match: re.Match[str]) -> str:
    """Return a cell of a panel in a third of matplotlib's words; nothing for an empty one."""
    if match[5] == "none":
        return ""
    x, y, other_x, other_y = map(float, match.groups()[:4])
    left, top, width, height = min(x, other_x), min(y, other_y), abs(other_x - x), abs(other_y - y)
    place = f'x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {place} fill="{match[5]}" shape-rendering="crispEdges"/>'


class _Page:
    """A figure whose places are given in inches, from the left and from the top."""

    def __init__(self, figure: Any, height: float) -> None:
        self._figure, self._height = figure, height

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self._height - top - height
        return self._figure.add_axes(
            (left / WIDTH, bottom / self._height, width / WIDTH, height / self._height)
        )

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        y = 1 - top / self._height
        self._figure.text(left / WIDTH, y, text, va="center", parse_math=False, **style)

    def bar(self, mesh: Any, axes: Any, section: Section) -> None:
        bar = self._figure.colorbar(mesh, cax=axes, format=lambda x, _: section.told(x))
        bar.outline.set_visible(False)
        bar.locator = _locator(4)
        bar.update_ticks()


def _locator(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most)


# -------------------------------------------------------------------- panels of kinds and layers


def _per_row(report: Report) -> int:
    return 1 if len(report.layers) > MANY_LAYERS else 2


def _panel_height(report: Report) -> float:
    return ROW * len(report.kinds)


def _height(report: Report, section: Section) -> float:
    if section.lines:
        return _key(section)[1] + CHART + BELOW
    rows = math.ceil(len(section.panels) / _per_row(report))
    return rows * (ABOVE + _panel_height(report) + BELOW)


def _draw_panels(page: _Page, report: Report, section: Section, top: float) -> None:
    per_row, height = _per_row(report), _panel_height(report)
    width = (WIDTH - LEFT - RIGHT - BETWEEN * (per_row - 1)) / per_row
    grids = [_grid(report, part.values) for part in section.panels]
    scale = _scale(np.concatenate([grid[np.isfinite(grid)] for grid in grids]), section)
    for i, (part, grid) in enumerate(zip(section.panels, grids, strict=True)):
        left = LEFT + i % per_row * (width + BETWEEN)
        y = top + i // per_row * (ABOVE + height + BELOW) + ABOVE
        axes = page.axes(left, y, width, height)
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), **scale)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(report.kinds)) + 0.5, report.kinds)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _name_layers(axes, report.layers, width, 0.5)
        page.text(left - 0.05, y + height + LABEL, "layer", ha="right")
        page.text(left, y - ABOVE / 2, _short(part.name))
        if i == min(per_row, len(grids)) - 1:
            page.bar(mesh, page.axes(left + width + 0.12, y, 0.1, height), section)


def _grid(report: Report, values: Any) -> np.ndarray:
    """Return the numbers of cells as rows of kinds, NaN where there is none."""
    rows = [[values.get((layer, kind)) for layer in report.layers] for kind in report.kinds]
    return np.array(rows, dtype=np.float64)


def _scale(values: np.ndarray, section: Section) -> dict[str, Any]:
    """Return which numbers get which colours; of a few that stand out, the last colour."""
    if section.middle is not None:
        far = max(0.1, float(np.abs(values - section.middle).max()))
        return {"vmin": section.middle - far, "vmax": section.middle + far, "cmap": "coolwarm_r"}
    low, high = float(values.min()), float(values.max())
    high = min(high, max(3 * float(np.quantile(values, 0.9)), low))
    return {"vmin": low, "vmax": high if high > low else low + 1e-9, "cmap": _from_dark_to_light()}


def _from_dark_to_light() -> Any:
    """Return matplotlib's viridis without the ends, which dark and light pages swallow."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0.2, 0.95, 64)))


def _name_layers(axes: Any, layers: Sequence[Layer | None], width: float, middle: float) -> None:
    """Write layers' numbers below a chart, as many as there is room for, and names of stacks."""
    apart = math.ceil(0.3 / (width / len(layers)))  # columns that a number needs
    ticks: list[tuple[float, str]] = []
    for i, layer in enumerate(layers):
        if layer is None:
            ticks.append((i + middle, "\N{EN DASH}"))
        elif layer.number == 0 or (layer.number % apart == 0 and _has_room(i, layers, apart)):
            name = f"\n{layer.stack}" if layer.number == 0 and layer.stack else ""
            ticks.append((i + middle, f"{layer.number}{name}"))
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])


def _has_room(i: int, layers: Sequence[Layer | None], apart: int) -> bool:
    """Whether no stack begins just after a layer."""
    after = layers[i + 1 : i + apart]
    return not any(layer is not None and layer.number == 0 for layer in after)


# -------------------------------------------------------------------- lines from layer to layer


def _draw_lines(page: _Page, report: Report, section: Section, top: float) -> None:
    layers = [layer for layer in report.layers if layer is not None] or report.layers
    width = WIDTH - LEFT - RIGHT
    columns, above = _key(section)
    axes = page.axes(LEFT, top + above, width, CHART)
    for i, part in enumerate(section.lines):
        values: list[Number] = [part.values.get(layer) for layer in layers]
        of_output = part.name == OUTPUT and i == len(section.lines) - 1
        axes.plot(
            np.arange(len(layers)),
            np.array(values, dtype=np.float64),
            color=FAINT if of_output else COLOURS[i % len(COLOURS)],
            linestyle=":" if of_output else DASHES[i // len(COLOURS) % len(DASHES)],
            marker="o",
            markersize=3,
            lw=1.5,
            label=_short(part.name),
        )
    page.text(LEFT - 0.05, top + above + CHART + TICK + LABEL, "layer", ha="right")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.grid(axis="y", lw=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(_locator(5))
    axes.yaxis.set_major_formatter(lambda x, _: section.told(x))
    _name_layers(axes, layers, width, 0.0)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2
    )


def _key(section: Section) -> tuple[int, float]:
    """Return in how many columns the names of lines stand, and how high they are."""
    longest = max(len(_short(line.name)) for line in section.lines)
    columns = max(1, int((WIDTH - LEFT) / (LETTER * longest + 0.6)))
    return columns, KEY * math.ceil(len(section.lines) / columns) + 0.1


def _short(name: str) -> str:
    name = name.replace("\n", " ")
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[-LONGEST // 2 :]}"
