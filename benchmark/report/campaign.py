"""What a campaign holds: its runs by task, algorithm and mode, and who may be set beside whom.

Nothing fails because a campaign is young: tasks, algorithms and seeds that are missing have no
row and no interval.
"""

from benchmark import RESULTS
from benchmark.files import fail
from benchmark.report.formatting import bracketed, read, references
from benchmark.report.intervals import (
    Comparison,
    Curve,
    Scores,
    bootstrap,
    common_step,
    compare,
    final,
    probability_of_improvement,
    read_curves,
)
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np


@dataclass
class Algorithm:
    name: str
    modes: tuple[str, ...]  # those of the table per task; the first one everywhere else
    published: tuple[str, ...]  # its methods in published_results.csv, the closest first


VARIANT = "FPMD (variant not named)"
ALGORITHMS = {
    "fpmd_online": Algorithm("FPMD-R", ("one_step",), ("FPMD-R", VARIANT)),
    "fpmd_meanflow_online": Algorithm("FPMD-M", ("one_step",), ("FPMD-M", VARIANT)),
    "fpmd_plus_online": Algorithm("FPMD+", ("one_step",), ()),
    "mvp_online": Algorithm("MVP", ("one_step",), ("MVP",)),
    "sac_online": Algorithm("SAC", ("one_step", "sampled"), ("SAC",)),
    "dpmd_online": Algorithm("DPMD", ("best_of_n", "one_candidate"), ("DPMD/SDAC", "DPMD")),
}
ONE_STEP = "fpmd_online", "fpmd_meanflow_online", "fpmd_plus_online", "mvp_online"
BASELINES = "sac_online", "dpmd_online"
MODES = {"one_step": "one step", "best_of_n": "best of N", "one_candidate": "one candidate"}
MODES |= {"sampled": "sampled action"}
Curves = dict[tuple[str, str, str], list[Curve]]


@cache
def load(path: Path) -> Curves:
    try:
        curves = read_curves(read(path))
    except ValueError as error:
        fail(f"{path.name} has {error}")
    if unknown := {algorithm for _, algorithm, _ in curves} - set(ALGORITHMS):
        fail(f"report/campaign.py's ALGORITHMS lacks {', '.join(unknown)}")
    return curves


def tasks_of(curves: Curves) -> list[str]:
    return sorted({env_id for env_id, _, _ in curves})


def algorithms_of(curves: Curves) -> list[str]:
    """Those with runs, in the order of ALGORITHMS."""
    return [name for name in ALGORITHMS if any(key[1] == name for key in curves)]


def runs(curves: Curves, env_id: str, algorithm: str) -> list[Curve]:
    """In the mode that the algorithm is judged by; none if it has not run there."""
    return curves.get((env_id, algorithm, ALGORITHMS[algorithm].modes[0]), [])


def both_modes(curves: Curves, env_id: str, algorithm: str):
    """The same runs one step and best of N, and the step up to which; None if there are none."""
    pair = [curves.get((env_id, algorithm, mode), []) for mode in ("one_step", "best_of_n")]
    seeds = set.intersection(*({curve.seed for curve in found} for found in pair))
    one, many = ([curve for curve in found if curve.seed in seeds] for found in pair)
    return (one, many, common_step(one, many)) if seeds else None


def mode_name(algorithm: str, mode: str) -> str:
    return "mean action" if (algorithm, mode) == ("sac_online", "one_step") else MODES[mode]


def published_numbers(env_id: str, algorithm: str) -> dict | None:
    """The closest row of published_results.csv for that task, environment version included."""
    rows = [r for r in read(RESULTS / "published_results.csv") if r["env"] == env_id]
    known = {row["method"]: row for row in reversed(rows)}
    return next((known[m] for m in ALGORITHMS[algorithm].published if m in known), None)


def scale(env_id: str) -> tuple[float, float] | None:
    """What scores 0 and 1 on a task: random actions, and SAC's published return after 1M steps."""
    low, row = references().get((env_id, "random")), published_numbers(env_id, "sac_online")
    return None if low is None or row is None else (low, float(row["return_mean"]))


def finals(curves: Curves, algorithms: list[str], env_id: str) -> tuple[float, list[np.ndarray]]:
    """The last step that all their runs have reached, and each algorithm's final returns there."""
    found = [runs(curves, env_id, name) for name in algorithms]
    step = common_step(*found)
    return step, [final(own, step) for own in found]


def scores(curves: Curves, algorithms: list[str], env_ids: list[str]) -> dict[str, Scores]:
    """Normalised final returns of their runs, on each task at equal steps."""
    found = {name: [] for name in algorithms}
    for env_id in env_ids:
        low, high = scale(env_id)
        for name, returns in zip(algorithms, finals(curves, algorithms, env_id)[1], strict=True):
            found[name].append((returns - low) / (high - low))
    return found


def shared(curves: Curves, algorithms: list[str]) -> list[str]:
    """The tasks on which all these algorithms have runs."""
    return [e for e in tasks_of(curves) if all(runs(curves, e, name) for name in algorithms)]


def beats(curves: Curves, algorithm: str, other: str) -> tuple[str, int] | None:
    """Probability of improvement with its interval, and over how many tasks: it needs no scale."""
    if not (env_ids := shared(curves, [algorithm, other])):
        return None
    pairs = [finals(curves, [algorithm, other], env_id)[1] for env_id in env_ids]
    groups = [list(group) for group in zip(*pairs, strict=True)]
    ends = bootstrap(probability_of_improvement, *groups)
    return bracketed(probability_of_improvement(*groups), ends), len(env_ids)


def blocks(curves: Curves) -> list[tuple[list[str], list[str]]]:
    """(tasks, algorithms) that may be set side by side: who has run everywhere, then everybody."""
    all_of_them = algorithms_of(curves)
    scaled = [env_id for env_id in tasks_of(curves) if scale(env_id)]
    complete = [name for name in all_of_them if all(runs(curves, e, name) for e in scaled)]
    common = [env_id for env_id in shared(curves, all_of_them) if scale(env_id)]
    found = [(scaled, complete), (common, all_of_them)]
    found = [block for i, block in enumerate(found) if all(block) and block not in found[:i]]
    return found


def comparisons(curves: Curves) -> dict[tuple[str, str], dict[str, Comparison]]:
    """{(one-step policy, baseline): {env_id: comparison}}, where both have runs."""
    found = {}
    for algorithm, baseline in product(ONE_STEP, BASELINES):
        pairs = {e: [runs(curves, e, x) for x in (algorithm, baseline)] for e in tasks_of(curves)}
        if pairs := {env_id: compare(*pair) for env_id, pair in pairs.items() if all(pair)}:
            found[algorithm, baseline] = pairs
    return found
