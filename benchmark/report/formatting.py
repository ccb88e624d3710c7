"""How the report reads CSVs, and writes numbers, words and tables."""

import math
import re
import statistics
from benchmark import RESULTS
from benchmark.files import fail, read_table
from benchmark.report.intervals import interval, welch
from pathlib import Path


def read(path: Path) -> list[dict]:
    rows = read_table(path)
    if not rows:
        fail(f"{path} holds no rows")
    return rows


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


def table_with_note(rows: list[dict], note: str) -> str:
    """What stands between two markers: the table and, below it, what its numbers are."""
    return f"{markdown(rows)}\n\n{note}"


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


def made_with(rows: list[dict]) -> str:
    """The end of most notes: hardware, torch, commit."""
    return f"{hardware(rows)}, torch {joined(rows, 'torch')}, commit {commits(rows)}."


def made_on(rows: list[dict]) -> str:
    """The same for a GPU, where the CPU's threads say little."""
    return f"{joined(rows, 'device')}, torch {joined(rows, 'torch')}, commit {commits(rows)}."


def across_seeds(values: list[float]) -> str:
    """The mean, with Student's 95% interval if there are several seeds."""
    mean = number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {number(interval(values))}"


def difference(values: list[float]) -> str:
    """The same of differences, bold where their interval excludes zero."""
    text = across_seeds(values)
    sure = len(values) > 1 and abs(statistics.fmean(values)) > interval(values)
    return f"**{text}**" if sure else text


def unpaired(first: list[float], second: list[float]) -> str:
    """Difference of two means with Welch's interval, bold where that excludes zero."""
    difference, half = welch(first, second)
    if math.isnan(half):
        return number(difference)
    text = f"{number(difference)} ± {number(half)}"
    return f"**{text}**" if abs(difference) > half else text


def references() -> dict:
    """Mean return by (env_id, policy), for the policies random and zero."""
    rows = read(RESULTS / "reference_policies.csv")
    return {(row["env_id"], row["policy"]): float(row["return_mean"]) for row in rows}


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"


def signed(difference: float, half_width: float) -> str:
    """+120 ± 45; without an interval if there is none."""
    text = "+" * int(difference > 0) + number(difference)
    return text if math.isnan(half_width) else f"{text} ± {number(half_width)}"


def bracketed(value: float, ends) -> str:
    """0.53 [0.41, 0.66]."""
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
