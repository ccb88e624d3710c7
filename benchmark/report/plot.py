"""Draw learning curves of your own runs: run directories, folders of them, or campaign CSVs.

A panel per environment and a colour per script, or per setting where a script has several. With
at most five seeds each is a thin line; the thick one is their mean, as far as all of them have
come, and the band its Student 95% interval. Runs may still be training.

    python benchmark/report/plot.py runs/* --output curves.png
    python benchmark/report/plot.py benchmark/results/campaign_cpu.csv --output curves.png
    python benchmark/report/plot.py runs/* --output curves.png --x wall_time --mode best_of_n
    python benchmark/report/plot.py runs/* --output losses.png --metric losses/critic_loss
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, output, run, text
from benchmark.files import fail
from benchmark.report import style
from benchmark.report.own_runs import Series, label_series, read_series

import numpy as np

AXES = {"steps": "global_step", "updates": "updates", "wall_time": "wall_time"}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
DASHES = ["-", (0, (4, 1.2)), (0, (1, 1))]  # of the first mode, the second, any further


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", type=text, metavar="RUN_DIR_OR_CSV")
    words = "picture to write: .png, .pdf or .svg"
    parser.add_argument("--output", type=output(*style.SUFFIXES), required=True, help=words)
    words = "against environment steps (default), gradient updates or time since the start"
    parser.add_argument("--x", choices=AXES, default="steps", help=words)
    words = "of evaluation, several with dashes; unset: each script's deployed one"
    parser.add_argument("--mode", nargs="+", type=text, default=[], help=words)
    what = parser.add_mutually_exclusive_group()
    words = "success rates in place of returns"
    what.add_argument("--success", action="store_true", help=words)
    words = "a column of metrics.csv in place of returns: losses/critic_loss"
    what.add_argument("--metric", type=text, metavar="COLUMN", help=words)
    options = parser.parse_args()
    if options.metric and options.mode:
        fail("--mode is of evaluations, --metric is not")
    return options


def mean_over_seeds(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Where any seed has a value, as far as all have come: x (n,) and values (seeds, n)."""
    first = max(x[0] for x, _ in series.curves)
    last = min(x[-1] for x, _ in series.curves)
    grid = np.unique(np.concatenate([x for x, _ in series.curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.array([np.interp(grid, x, y) for x, y in series.curves])


def draw(panel, series: Series, colour: str, dashes, unit: float) -> list[float]:
    """Seeds, mean and band of one setting; returns the heights that must be seen."""
    seeds = len(series.curves)
    seen = [value for _, y in series.curves for value in (y.min(), y.max())]
    if 1 < seeds <= style.FEW:
        for x, y in series.curves:
            panel.plot(x / unit, y, color=colour, lw=0.6, alpha=0.5, ls=dashes, zorder=2)
    grid, values = mean_over_seeds(series)
    if not len(grid):  # a seed that has not come to where another one begins
        return seen
    mean = values.mean(0)
    if seeds > 1:
        half = np.array([style.interval(at) for at in values.T])
        band = mean - half, mean + half
        alpha = 0.08 if seeds <= style.FEW else 0.15  # of few seeds it is wide
        panel.fill_between(grid / unit, *band, color=colour, alpha=alpha, lw=0, zorder=1)
    # one value is no line
    marker = "o" if len(grid) == 1 else ""
    panel.plot(grid / unit, mean, color=colour, lw=1.8, ls=dashes, marker=marker, ms=4, zorder=3)
    if seeds > style.FEW:
        seen = [mean.min(), mean.max()]
    return seen


def colours_of(found: list[Series]) -> dict[tuple, str]:
    """Each setting's colour: its script's, or one of its own where a script has several."""
    settings = dict.fromkeys((series.name, series.flags) for series in found)
    names = [name for name, _ in settings]
    chosen = {}
    for setting in settings:
        name = setting[0]
        used = set(chosen.values()) | {
            colour for other, colour in style.ALGORITHMS.items() if other in names
        }
        free = [colour for colour in COLOURS if colour not in used] or COLOURS
        own = style.ALGORITHMS.get(name)
        if own is None or own in chosen.values():
            own = free[len(chosen) % len(free)]
        chosen[setting] = own
    return chosen


def unit_of(axis: str, longest: float) -> tuple[float, str]:
    """What the horizontal axis counts in, and its label."""
    if axis == "steps":
        return 1, "environment steps"
    if axis == "updates":
        return 1, "gradient updates"
    for seconds, name in (3600, "hours"), (60, "minutes"):
        if longest >= seconds:
            return seconds, name
    return 1, "seconds"


def finish_panel(panel, seen: list[float], end: float, options: argparse.Namespace) -> None:
    """Limits and ticks: the curves fill the panel, which a band may leave."""
    low, high = min(seen), max(seen)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1
    panel.set_ylim(low - margin, high + margin)
    if options.success:
        panel.set_ylim(-3, 103)
    panel.set_xlim(0, end or 1)
    panel.locator_params(axis="x", nbins=5)
    if options.x != "wall_time":
        few = panel.get_xlim()[1] < 10_000
        panel.xaxis.set_major_formatter(style.with_commas if few else style.thousands)
    if max(map(abs, panel.get_ylim())) >= 1000:
        panel.yaxis.set_major_formatter(style.with_commas)
    panel.grid(axis="y")


def draw_all(found: list[Series], options: argparse.Namespace):
    """The figure: a panel per environment, one legend below them."""
    env_ids = sorted({series.env_id for series in found})
    colours, labels = colours_of(found), label_series(found)
    modes = list(dict.fromkeys(series.mode for series in found))
    # each script's own deployed mode needs no dashes: it is named beside the script
    dashes = {mode: DASHES[min(modes.index(mode), 2) if options.mode else 0] for mode in modes}
    longest = max(x[-1] for series in found for x, _ in series.curves)
    unit, x_label = unit_of(options.x, longest)
    figure, panels = style.grid_of_panels(len(env_ids), 2.5 if len(env_ids) > 1 else 3.4)
    for panel, env_id in zip(panels, env_ids, strict=True):
        seen, own = [], [series for series in found if series.env_id == env_id]
        for series in own:
            colour = colours[series.name, series.flags]
            seen += draw(panel, series, colour, dashes[series.mode], unit)
        end = max(x[-1] for series in own for x, _ in series.curves)
        finish_panel(panel, seen, end / unit, options)
        panel.set_title(style.plain(env_id))
        panel.set_xlabel(x_label)
    lines = {}  # in the legend once, whatever the number of panels
    for series in found:
        how = {"color": colours[series.name, series.flags], "ls": dashes[series.mode]}
        lines[style.plain(labels[series.setting])] = how
    add_legend(figure, lines)
    y_label = "success rate, %" if options.success else options.metric or "evaluation return"
    for panel in panels[:: min(len(panels), 3)]:
        panel.set_ylabel(style.plain(y_label))
    return figure


def add_legend(figure, lines: dict[str, dict]) -> None:
    """Below the panels, which keep their height: {label: how its line is drawn}."""
    widest = max(map(len, lines))
    columns = max(1, min(4, 120 // (widest + 8)))
    handles = [style.pyplot().Line2D([], [], lw=1.8, **how) for how in lines.values()]
    figure.legend(handles, list(lines), loc="outside lower center", ncols=columns)
    rows = -(-len(lines) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.17 * rows)


def main() -> None:
    options = parse()
    sources = [Path(name) for name in options.sources]
    found = read_series(sources, options, AXES[options.x])
    warnings.simplefilter("ignore")  # matplotlib's, of glyphs that a font lacks and the like
    style.save(draw_all(found, options), options.output)


if __name__ == "__main__":
    run(main)
