"""How every figure looks: the only place that sets matplotlib's defaults, colours and widths."""

import io
import math
from benchmark import ROOT
from benchmark.files import whole_file
from benchmark.report.intervals import interval
from itertools import pairwise
from pathlib import Path

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart: an algorithm has the same
# one in every figure
ALGORITHMS = {
    "fpmd_online": "#0072B2",
    "fpmd_meanflow_online": "#D55E00",
    "fpmd_plus_online": "#56B4E9",
    "mvp_online": "#009E73",
    "sac_online": "#000000",
    "dpmd_online": "#CC79A7",
}
# what one algorithm is compared with itself by: variants, one step and many
FIRST, SECOND, THIRD, FOURTH = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
DARK, GREY, LIGHT = "0.35", "0.7", "0.92"  # words beside curves, what is in the background, grids
WIDTH = 8.0  # inches, of every figure: a README's column
SUFFIXES = ".png", ".pdf", ".svg"  # of pictures
FEW = 5  # seeds that are drawn one by one
DASHES = (0, (4, 1.2))
DOTS = (0, (1, 1))
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "legend.frameon": False,
}


def pyplot():
    """matplotlib without a screen, in this style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= STYLE
    return plt


def grid_of_panels(count: int, height: float, columns: int = 3, **kwargs):
    """A figure and its panels, so many in a row, each as high as given."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = WIDTH, height * rows
    figure, panels = pyplot().subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    for panel in panels.flat[count:]:
        panel.remove()
    return figure, panels.flat[:count]


def save(figure, output: Path) -> None:
    from PIL import Image  # matplotlib needs it too

    kind = output.suffix.lower().removeprefix(".")
    with whole_file(output, "wb") as file:
        if kind == "png":
            pixels = io.BytesIO()
            figure.savefig(pixels, format=kind)
            image = Image.open(pixels).convert("RGB").quantize(128)  # a third the size
            image.save(file, kind, optimize=True)
        else:
            figure.savefig(file, format=kind)
    pyplot().close(figure)
    print(f"drew {output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}")


def draw_seeds(panel, x, values: np.ndarray, colour: str, dashes="-") -> None:
    """The mean of curves (seeds, x), and thinner each of them.

    With more than FEW seeds Student's interval takes the seeds' place, as a band.
    """
    mean = values.mean(0)
    panel.plot(x, mean, color=colour, lw=1.8, ls=dashes, zorder=3)
    if 1 < len(values) <= FEW:
        panel.plot(x, values.T, color=colour, lw=0.6, alpha=0.5, ls=dashes, zorder=2)
    elif len(values) > 1:
        half = np.array([interval(at) for at in values.T])
        panel.fill_between(x, mean - half, mean + half, color=colour, alpha=0.1, lw=0, zorder=1)


def draw_interval(panel, values: np.ndarray | None, ends, value: float, y: float, colour: str):
    """A mean on a row of its own: its interval as a bar, and a tick for each value."""
    if not np.isnan(ends).any():
        panel.plot(ends, (y, y), color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
    if values is not None:
        panel.plot(values, [y] * len(values), "|", color=colour, ms=7)
    panel.plot(value, y, "o", color=colour, ms=5)


def draw_rows(panel, rows: list[np.ndarray], names: list[str], colours: list[str]) -> None:
    """Rows of seeds' values, from the top: their mean with Student's interval, and a name."""
    for y, (values, colour) in enumerate(zip(rows, colours, strict=True)):
        mean, half = values.mean(), interval(values)
        draw_interval(panel, values, (mean - half, mean + half), mean, y, colour)
    name_rows(panel, names, colours)
    panel.set_ylim(len(rows) - 0.5, -0.5)


def name_rows(panel, names: list[str], colours: list[str]) -> None:
    """Names in their colours in place of a vertical axis."""
    panel.set_yticks(range(len(names)), names)
    for label, colour in zip(panel.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Heights for labels: near the given ones, in their order, at least gap apart."""
    order, placed = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for _ in range(100):  # neighbours push each other away
        for below, above in pairwise(order):
            push = max(0, gap - (placed[above] - placed[below])) / 2
            placed[below], placed[above] = placed[below] - push, placed[above] + push
    return placed


def label_ends(panel, labels: list[tuple], gap: float, x: float = 1.02) -> None:
    """Beside the panel, at x of its width: (height, text, colour) each, at least gap apart."""
    heights = spread_out([height for height, _, _ in labels], gap)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        place = {"xycoords": ("axes fraction", "data"), "va": "center"}
        panel.annotate(text, (x, height), color=colour, **place)


def plain(text: str) -> str:
    """Words that matplotlib is to draw as they are: $ begins no formula, _ hides no label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def thousands(steps: float, _) -> str:
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"


def with_commas(value: float, _) -> str:
    return f"{value:,.0f}"
