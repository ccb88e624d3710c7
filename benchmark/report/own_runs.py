"""Curves of run directories and of collect.py's CSVs, as plot.py draws them."""

import argparse
import difflib
from benchmark.files import fail, is_number, read_table
from benchmark.report.campaign import ALGORITHMS, MODES, mode_name
from benchmark.runs import (
    all_run_dirs,
    flags,
    leave_out,
    read_args,
    read_evaluations,
    read_metrics,
    refuse_other_folders,
    refuse_repeated,
    script_of,
)
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NUMBERS = "global_step", "updates", "wall_time", "return_mean"
LONGEST = 100  # characters of a name in the legend
KEY = "algorithm", "env_id", "flags", "seed", "mode"


@dataclass
class Run:
    """One run of one seed: rows of its evaluations, or of its metrics."""

    source: Path
    name: str  # of the script, or what --exp-name calls a copy of it
    env_id: str
    flags: str  # beyond the script's defaults
    seed: str
    rows: list[dict]


@dataclass
class Series:
    """Runs of one setting on one environment in one mode of evaluation."""

    name: str
    env_id: str
    flags: str
    mode: str
    curves: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def setting(self) -> tuple[str, str, str]:
        return self.name, self.flags, self.mode


# ---------------------------------------------------------------------------- reading
def read_series(sources: list[Path], options: argparse.Namespace, axis: str) -> list[Series]:
    """What the options ask for of all sources; refused if there is nothing to draw."""
    runs = []
    for source in all_run_dirs(sources):
        if source.suffix == ".csv" and not source.is_dir():
            runs += read_collected(source, options.metric)
        else:
            runs += read_run(source, options.metric)
    refuse_same_seed(runs)
    drawn = [run for run in runs if run.rows]
    if not drawn:
        what = "row of metrics" if options.metric else "evaluation"
        fail(f"nothing to draw: none of {len(runs)} runs has a complete {what} yet")
    if options.metric:
        found = of_metric(drawn, options.metric, axis)
    else:
        found = of_evaluations(drawn, options, axis)
    # the algorithms' usual order, then the others by name
    known = list(ALGORITHMS)
    order = {name: known.index(name) for name in known}
    return sorted(found, key=lambda series: (order.get(series.name, 99), series.name, series.flags))


def read_run(run_dir: Path, metric: str | None) -> list[Run]:
    """A run directory; without rows, and a line that says so, while it is too young."""
    refuse_other_folders(run_dir)
    rows = read_metrics(run_dir) if metric else read_evaluations(run_dir)
    if not rows:
        leave_out(run_dir, f"no {'metrics' if metric else 'evaluations'} yet")
        if not (run_dir / "args.json").exists():
            return [Run(run_dir, "", "", "", str(run_dir), [])]
    args = read_args(run_dir)
    script = script_of(args["exp_name"])
    # a longer name is somebody's own: kept apart from the script's other runs
    name = args["exp_name"]
    own_flags = flags(args, script)
    return [Run(run_dir, name, args["env_id"], own_flags, str(args["seed"]), rows)]


def read_collected(path: Path, metric: str | None) -> list[Run]:
    """The runs of a CSV that collect.py or the launcher wrote."""
    if metric:
        fail(f"{path} has evaluations alone: --metric needs run directories")
    runs = {}
    for row in read_table(path, KEY, NUMBERS):
        name, env_id, own_flags, seed, _ = (row[key] for key in KEY)
        run = Run(path, name, env_id, own_flags, seed, [])
        runs.setdefault((name, env_id, own_flags, seed), run).rows.append(row)
    for run in runs.values():
        refuse_repeated(path, run.rows)
    return list(runs.values())


def refuse_same_seed(runs: list[Run]) -> None:
    """A seed that counts twice would make the interval too narrow."""
    seen = {}
    for run in runs:
        key = run.name, run.env_id, run.flags, run.seed
        other = seen.setdefault(key, run)
        if other is not run and other.source == run.source:
            fail(f"{run.source} is named twice")
        if other is not run:
            what = f"{run.name} on {run.env_id} with seed {run.seed}"
            fail(f"{other.source} and {run.source} are both {what}: name only one of the two")


# ---------------------------------------------------------------------------- what is drawn
def of_evaluations(runs: list[Run], options: argparse.Namespace, axis: str) -> list[Series]:
    """Returns or success rates, in the modes asked for or each script's deployed one."""
    known = list(dict.fromkeys(row["mode"] for run in runs for row in run.rows))
    for mode in options.mode:
        if mode not in known:
            fail(f"--mode {mode}: these runs were evaluated as {', '.join(known)}")
    column = "success_rate" if options.success else "return_mean"
    found = {}
    for run in runs:
        modes = options.mode or [run.rows[0]["mode"]]  # scripts evaluate it first
        for mode in modes:
            rows = [row for row in run.rows if row["mode"] == mode]
            key = run.name, run.env_id, run.flags, mode
            scale = 100 if options.success else 1
            add_curve(found, key, rows, axis, column, scale)
    if not found:
        fail("--success: these environments report no successes")
    return list(found.values())


def of_metric(runs: list[Run], metric: str, axis: str) -> list[Series]:
    """A column of metrics.csv, where it has numbers."""
    known = sorted({name for run in runs for name in run.rows[0]})
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=3) or known
        fail(f"--metric {metric}: metrics.csv has no such column, but {', '.join(near)}")
    found = {}
    for run in runs:
        rows = [row for row in run.rows if is_number(row.get(metric, ""))]
        if not rows:
            leave_out(run.source, f"no numbers in {metric}")
        add_curve(found, (run.name, run.env_id, run.flags, ""), rows, axis, metric, 1)
    if not found:
        fail(f"--metric {metric}: no numbers so far")
    return list(found.values())


def add_curve(
    found: dict, key: tuple, rows: list[dict], axis: str, column: str, scale: float
) -> None:
    """One run's curve, if it has one: cells without a number are left out."""
    points = []
    for row in rows:
        if is_number(row.get(column, "")) and is_number(row.get(axis, "")):
            points.append((float(row[axis]), scale * float(row[column])))
    if points:
        x, y = np.array(sorted(points)).T
        found.setdefault(key, Series(*key)).curves.append((x, y))


def label_series(found: list[Series]) -> dict[tuple, str]:
    """{setting: what the legend calls it}, with the flags and modes that tell it from others."""
    labels = {}
    for setting in dict.fromkeys(series.setting for series in found):
        name, own_flags, mode = setting
        others = [s.flags for s in found if s.name == name]
        label = ALGORITHMS[name].name if name in ALGORITHMS else name
        if len(set(others)) > 1:
            shared = set.intersection(*(set(split(text)) for text in others))
            own = [flag for flag in split(own_flags) if flag not in shared]
            label = " ".join([label, *own])
        if mode:
            words = mode_name(name, mode) if mode in MODES else mode.replace("_", " ")
            label += f", {words}"
        counts = {len(series.curves) for series in found if series.setting == setting}
        low, high = min(counts), max(counts)
        seeds = str(low) if low == high else f"{low} to {high}"
        label = label if len(label) <= LONGEST else f"{label[: LONGEST - 3]}..."
        labels[setting] = f"{label} ({seeds} seed{'s' * (high > 1)})"
    return labels


def split(own_flags: str) -> list[str]:
    """Of '--utd 1.0 --policy-lr 1e-4 1e-5' each flag with its values."""
    return [f"--{part.strip()}" for part in f" {own_flags}".split(" --") if part.strip()]
