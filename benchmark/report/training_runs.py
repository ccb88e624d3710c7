"""Training runs as the tables and figures of single algorithms read them from collect.py's CSV."""

import re
from benchmark import RESULTS
from benchmark.report.formatting import read
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

PUBLISHED_100K = RESULTS / "published_100k.csv"
SETTING = "--num-candidates", "--flow-steps", "--utd"  # N, T, UTD have a place of their own
INGREDIENTS = {  # of FPMD+, by the flag that switches each off
    "--num-atoms 1": "C51",
    "--no-normalize-rewards": "normalised rewards",
    "--td-action best": "a sampled TD action",
    "--imitation meanflow": "one latent",
    "--weights best": "weights for all candidates",
    "--critic-lr 0.0003": "critics' step size 1e-3",
    "--policy-lr 0.0003": "policy's step size 1e-3",
    "--adam-beta1 0.9": "Adam's beta_1 0.5",
}


def experiments(path: Path) -> dict:
    """Runs that differ in nothing but the seed: {(algorithm, env_id, flags): {seed: rows}}."""
    found = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        found[row["algorithm"], row["env_id"], row["flags"]][row["seed"]].append(row)
    return found


def until(seeds: dict, end: int) -> dict:
    """One experiment's runs {seed: rows} up to a step."""
    return {
        seed: [row for row in rows if int(row["global_step"]) <= end]
        for seed, rows in seeds.items()
    }


def cut_seeds(seeds: dict) -> dict:
    """One experiment's runs, all up to where the shortest of them ends."""
    return until(seeds, min(int(rows[-1]["global_step"]) for rows in seeds.values()))


def cut(found: dict) -> dict:
    """The same, all runs of a script on a task up to where the shortest of them ends."""
    ends = defaultdict(list)
    for key, seeds in found.items():
        ends[key[:2]] += [int(rows[-1]["global_step"]) for rows in seeds.values()]
    return {key: until(seeds, min(ends[key[:2]])) for key, seeds in found.items()}


def curve(rows: list[dict], mode: str) -> tuple[list[int], list[float]]:
    """Steps and mean returns of one run's evaluations in one mode."""
    rows = [row for row in rows if row["mode"] == mode]
    return [int(r["global_step"]) for r in rows], [float(r["return_mean"]) for r in rows]


def successes(rows: list[dict], mode: str) -> dict[int, float]:
    """Success rate in per cent at each step of one run's evaluations in one mode."""
    rows = [row for row in rows if row["mode"] == mode]
    return {int(row["global_step"]): 100 * float(row["success_rate"]) for row in rows}


def beside_sac(path: Path) -> list[dict]:
    """One-step evaluations of FPMD+ and of SAC, whose campaign has a file of its own."""
    sac = path.with_name("sac_100k_cpu.csv")
    rows = read(path) + (read(sac) if sac.exists() else [])
    return [row for row in rows if row["mode"] == "one_step"]


def method_of(row: dict) -> str:
    """A run's method among those that are compared at the same number of updates."""
    flags = row["flags"]  # what differs from the defaults: a beta_1 of 0.5 in FPMD+, 0.9 in SAC
    if row["algorithm"] == "fpmd_plus_online":
        noise = re.search(r"--noise-scale (\S+)", flags)
        if noise:
            return f"FPMD+, noise {noise[1]}"
        return "FPMD+, slow policy" if "--adam-beta1 0.9" in flags else "FPMD+"
    fast = "--adam-beta1" in flags
    if "--critic-batch-norm" in flags:
        return "SAC, same critic" if fast else "SAC, same critic, slow policy"
    return "SAC, fast policy" if fast else "SAC"


def is_blind(key: tuple) -> bool:
    """Whether an experiment hides a task behind black pictures (tests/pixel_envs.py)."""
    return key[1] == "pixel_envs:Blind-v0"


def split_flags(key: tuple) -> list[str]:
    """Of an experiment, each with its values; none is an empty one."""
    return re.split(r" (?=--)", key[-1])


def names(found: dict, but: tuple[str, ...] = ()) -> dict:
    """What to call each experiment: its environment, and flags that not all there share.

    but: flags that are said elsewhere.
    """
    flags = {key: split_flags(key) for key in found}
    result = {}
    for key in found:
        others = [set(flags[other]) for other in found if other[:2] == key[:2]]
        own = [flag for flag in flags[key] if flag not in set.intersection(*others)]
        own = [flag for flag in own if flag.partition(" ")[0] not in but]
        result[key] = key[1], " ".join(own)
    return result


def climb(found: dict) -> dict:
    """Variants of one task, from the most flags to none: {what each adds: {seed: rows}}."""
    flags = {key: [flag for flag in split_flags(key) if flag] for key in found}
    order = sorted(found, key=lambda key: -len(flags[key]))
    result = {"FPMD-M's learning": found[order[0]]}
    for before, key in pairwise(order):
        added = [flag for flag in flags[before] if flag not in flags[key]]
        result["+ " + ", ".join(INGREDIENTS[flag] for flag in added)] = found[key]
    return result


def last(rows: list[dict]) -> dict:
    """The last row of the acting rule, the mode whose rows know N and T."""
    return [row for row in rows if row["mode"] == "best_of_n"][-1]


def offline_steps(key: tuple) -> int:
    """Where the online phase of an experiment begins; the default is mvp_offline_to_online's."""
    given = re.search(r"--offline-steps (\d+)", key[-1])
    return int(given[1]) if given else 1_000_000
