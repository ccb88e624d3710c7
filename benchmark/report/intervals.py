"""The statistics of a campaign: many runs of several algorithms on several tasks, few seeds each.

Pure functions on numpy arrays, nothing drawn or formatted. Definitions across tasks are those of
Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice (NeurIPS
2021, arXiv:2108.13264; their library is rliable), except that a task whose seeds are not all there
still counts as much as any other. What they call scores is a list here with an array per task: the
scores of its runs, which may be of different number. Resamples may come before the runs' axis.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LAST = 5  # evaluations averaged at the end of a run
SHARE = 0.2  # of a given wall time, its last part, over which a curve is averaged
LEVEL = 0.95  # of every interval
RESAMPLES = 2_000  # of the bootstrap
Scores = list[np.ndarray]  # per task (..., runs)


# ---------------------------------------------------------------------------- over seeds
def student_t(freedom: float, level: float = LEVEL) -> float:
    """The x with P(|T| < x) = level, T of Student's law with that many degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, freedom))


def half_width(std: float, n: int) -> float:
    """Half of Student's interval of the mean, t s / sqrt(n), from n values of that std."""
    return student_t(n - 1) * std / np.sqrt(n)


def interval(values: Iterable[float]) -> float:
    """Half the width of Student's interval of the mean, t s / sqrt(n); NaN for a single value."""
    values = np.asarray(list(values), float)
    if len(values) < 2:
        return np.nan
    return half_width(values.std(ddof=1), len(values))


def welch(first: Iterable[float], second: Iterable[float]) -> tuple[float, float]:
    """Difference of two means and half the width of Welch's interval of it, NaN for one value.

    Welch (1947): variances may differ; the degrees of freedom are Satterthwaite's, at least those
    of the smaller sample.
    """
    samples = [np.asarray(list(values), float) for values in (first, second)]
    difference = samples[0].mean() - samples[1].mean()
    if min(map(len, samples)) < 2:
        return difference, np.nan
    parts = [values.var(ddof=1) / len(values) for values in samples]  # variances of the means
    if not (variance := sum(parts)):
        return difference, 0.0
    shares = [(part / variance) ** 2 for part in parts]
    freedom = 1 / sum(s / (len(v) - 1) for s, v in zip(shares, samples, strict=True))
    return difference, student_t(freedom) * np.sqrt(variance)


def verdict(difference: float, half_width: float) -> str:
    """What an interval of a difference says in a word."""
    if np.isnan(difference):
        return "not evaluated"
    if np.isnan(half_width):
        return "one seed"
    if abs(difference) <= half_width:
        return "not distinguishable"
    return "better" if difference > 0 else "worse"


# ---------------------------------------------------------------------------- across tasks
def interquartile_mean(scores: Scores) -> np.ndarray:
    """IQM: the mean of the middle half of all runs of all tasks (Agarwal et al., section 4.3).

    Every task weighs the same. Where the quarter ends within a run's weight, that run counts in
    part; scipy's trim_mean, which rliable calls, keeps it whole.
    """
    weights = np.concatenate([np.full(task.shape[-1], 1 / task.shape[-1]) for task in scores])
    values = np.concatenate(scores, -1)
    order = values.argsort(-1)
    ends = weights[order].cumsum(-1) / weights.sum()
    ends = np.concatenate([np.zeros_like(ends[..., :1]), ends], -1)
    kept = np.diff(ends.clip(0.25, 0.75))
    return (kept * np.take_along_axis(values, order, -1)).sum(-1) / kept.sum(-1)


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold, averaged over tasks (their section 4.2)."""
    return np.mean([(task[..., None] > thresholds).mean(-2) for task in scores], 0)


def probability_of_improvement(first: Scores, second: Scores) -> np.ndarray:
    """P(a run of the first beats one of the second) on a random task (their section 4.3).

    The Mann-Whitney statistic of each task, a tie counting half, averaged over tasks.
    """
    pairs = zip(first, second, strict=True)
    wins = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in pairs]
    return (np.mean(wins, 0) + 1) / 2


def bootstrap(statistic: Callable, *groups: Scores, resamples: int = RESAMPLES) -> np.ndarray:
    """Percentile interval of statistic(*groups) by the stratified bootstrap: (2, ...).

    Runs are drawn with replacement within each task and group (their section 4.1), from a fixed
    seed. Few runs a task hold less than the spread of all runs, so the interval is then too narrow:
    with three, about 88 % of them hold the truth in place of 95 (tests/test_campaign.py).
    """
    rng = np.random.default_rng(0)
    drawn = [
        [task[rng.integers(len(task), size=(resamples, len(task)))] for task in scores]
        for scores in groups
    ]
    return np.percentile(statistic(*drawn), [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)


# ---------------------------------------------------------------------------- curves
@dataclass
class Curve:
    """The evaluations of one run in one mode."""

    seed: str
    steps: np.ndarray
    seconds: np.ndarray  # of wall time since the run began
    returns: np.ndarray
    last_row: dict  # of the CSV
    finished: bool


def read_curves(rows: list[dict]) -> dict[tuple[str, str, str], list[Curve]]:
    """{(env_id, algorithm, mode): a curve per seed} of collect.py's rows.

    While a campaign runs, a run that is still young would hold back those that are through:
    unfinished runs count only where there is no finished one.
    """
    runs, flags = defaultdict(lambda: defaultdict(list)), {}
    for row in rows:
        key = row["env_id"], row["algorithm"]
        if flags.setdefault(key, row["flags"]) != row["flags"]:
            text = f"{key[1]} on {key[0]} with two settings: {flags[key]!r} and {row['flags']!r}"
            raise ValueError(text)
        runs[*key, row["mode"]][row["seed"]].append(row)
    curves = {}
    for key, seeds in runs.items():
        columns = "global_step", "wall_time", "return_mean"
        found = []
        for seed, run in seeds.items():
            arrays = (np.array([float(row[name]) for row in run]) for name in columns)
            # the last evaluation may come a few steps before the planned number
            finished = int(run[-1]["global_step"]) >= 0.99 * int(run[-1]["total_timesteps"])
            found.append(Curve(seed, *arrays, run[-1], finished))
        curves[key] = [curve for curve in found if curve.finished] or found
    return curves


def common_step(*groups: list[Curve]) -> float:
    """The last step that all these runs have reached."""
    return min(curve.steps[-1] for curves in groups for curve in curves)


def common_time(*groups: list[Curve]) -> float:
    """The last wall time that all these runs have reached, in seconds."""
    return min(curve.seconds[-1] for curves in groups for curve in curves)


def final(curves: list[Curve], step: float | None = None) -> np.ndarray:
    """Per run the mean of its last five evaluations up to that step, or to the last common one.

    NaN where there is none.
    """
    step = common_step(curves) if step is None else step
    ends = [curve.returns[curve.steps <= step][-LAST:] for curve in curves]
    return np.array([end.mean() if len(end) else np.nan for end in ends])


def best(curves: list[Curve]) -> np.ndarray:
    """Per run its best evaluation up to the last common step."""
    step = common_step(curves)
    return np.array([curve.returns[curve.steps <= step].max() for curve in curves])


def at_time(curves: list[Curve], seconds: float) -> np.ndarray:
    """Per run the mean of its curve over the last fifth of that wall time.

    Straight lines join the evaluations. The last five evaluations would span different times: of
    a slow algorithm they would reach back to its beginnings. NaN where none came early enough.
    """
    times = np.linspace((1 - SHARE) * seconds, seconds, 201)
    return np.array([
        np.interp(times, curve.seconds, curve.returns, left=np.nan).mean() for curve in curves
    ])  # fmt: skip


def mean_curve(curves: list[Curve], against: str) -> tuple[np.ndarray, np.ndarray]:
    """Where any run was evaluated, as far as all were: that axis (n,) and returns (runs, n)."""
    axes = [getattr(curve, against) for curve in curves]
    grid = np.unique(np.concatenate(axes))
    grid = grid[(grid >= max(x[0] for x in axes)) & (grid <= min(x[-1] for x in axes))]
    joined = [np.interp(grid, x, c.returns) for x, c in zip(axes, curves, strict=True)]
    return grid, np.array(joined)


@dataclass
class Comparison:
    """One algorithm against another on one task; a positive difference is in the first's favour."""

    step: float
    at_step: tuple[float, float]  # difference, half the width of its interval
    seconds: float
    at_time: tuple[float, float]


def compare(first: list[Curve], second: list[Curve]) -> Comparison:
    """At the last step and at the last wall time that all runs of both have reached."""
    step, seconds = common_step(first, second), common_time(first, second)
    return Comparison(
        step,
        welch(final(first, step), final(second, step)),
        seconds,
        welch(at_time(first, seconds), at_time(second, seconds)),
    )
