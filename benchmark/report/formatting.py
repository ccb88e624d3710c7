"""How the report reads CSVs, writes numbers and tables, and places the labels of figures."""

import csv
import re
import statistics
import sys
from itertools import pairwise
from pathlib import Path

from campaign import interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmark" / "results", ROOT / "docs" / "figures"


def read(path: Path) -> list[dict]:
    if not path.exists():
        sys.exit(f"report.py: error: {path} is missing")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(value: float) -> str:
    """All digits before the point, one after it for small values: -0.3, 26.8, 1,001."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1f}"


def digits(value: float) -> str:
    """Three significant digits without an exponent: 0.123, 1.23, 1,230."""
    return f"{float(f'{value:.3g}'):,g}"


def markdown(rows: list[dict]) -> str:
    """A Markdown table with the rows' keys as its head; columns of numbers are aligned right."""
    table = [[str(cell) for cell in row.values()] for row in rows]
    numeric = [all(re.match(r"[-+?\d]", c) for c in column) for column in zip(*table, strict=True)]
    lines = [rows[0], ["--:" if right else ":--" for right in numeric], *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def joined(rows: list[dict], column: str) -> str:
    return ", ".join(sorted({row[column] for row in rows}))


def joined_numbers(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def hours(seconds: float) -> str:
    """Of a run: 1.4, or 0.07 where it took less than one."""
    return f"{seconds / 3600:.{1 if seconds >= 3600 else 2}f}"


def steps_of(row: dict) -> str:
    """Environment steps of a published number, which not every source states."""
    return f"{int(row['env_steps']):,}" if row["env_steps"] else "?"


def commits(rows: list[dict]) -> str:
    """Short hashes; a trailing -dirty stays."""
    short = {re.sub(r"^(\w{7})\w+", r"\1", row["commit"]) for row in rows}
    return ", ".join(f"`{commit or 'unknown'}`" for commit in sorted(short))


def hardware(rows: list[dict]) -> str:
    threads = joined(rows, "threads")
    return f"{joined(rows, 'device')}, {threads} thread{'s' * (threads != '1')}"


def across_seeds(values: list[float]) -> str:
    """The mean, with Student's 95% interval if there are several seeds."""
    mean = number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(interval(values))}"


def references() -> dict:
    """Mean return by (env_id, policy), for the policies random and zero."""
    rows = read(RESULTS / "reference_policies.csv")
    return {(row["env_id"], row["policy"]): float(row["return_mean"]) for row in rows}


# ---------------------------------------------------------------------------- figures
def pyplot():
    """matplotlib without a screen, in the report's style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    return plt


def save(figure, output: Path) -> None:
    from PIL import Image  # matplotlib needs it too

    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=200)
    Image.open(output).convert("RGB").quantize(128).save(output, optimize=True)  # a third the size
    print(f"drew {output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}")


def spread_out(heights: list[float], gap: float) -> list[float]:
    """Heights for labels: near the given ones, in their order, at least gap apart."""
    order, placed = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for _ in range(100):  # neighbours push each other away
        for below, above in pairwise(order):
            push = max(0, gap - (placed[above] - placed[below])) / 2
            placed[below], placed[above] = placed[below] - push, placed[above] + push
    return placed


def label_ends(panel, labels: list[tuple], gap: float, x: float = 1.02, **style) -> None:
    """Beside the panel, at x of its width: (height, text, colour) each, at least gap apart."""
    heights = spread_out([height for height, _, _ in labels], gap)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        place = {"xycoords": ("axes fraction", "data"), "va": "center"}
        panel.annotate(text, (x, height), color=colour, **place, **style)


def thousands(steps: float, _) -> str:
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"
