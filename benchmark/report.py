"""Rebuild the tables, figures and code excerpts of README.md and docs/.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a key of TABLES below.
Every number comes from a CSV in benchmark/results. An excerpt stands between
`<!-- code:SCRIPT.FUNCTION -->` and `<!-- /code -->` and is that function's source. Links of the
form [`function`](script.py#L1) get the function's line. Whoever edits one of these by hand loses
it here. Only the figures need matplotlib (benchmark/requirements.txt).

    python benchmark/report.py             # rewrite tables and excerpts, then the figures
    python benchmark/report.py --tables    # without the figures
    python benchmark/report.py --check     # write nothing; exit 1 if something is out of date
"""

import argparse
import ast
import math
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import campaign_report
from campaign import LAST, interval
from formatting import (
    FIGURES,
    RESULTS,
    ROOT,
    across_seeds,
    commits,
    digits,
    hardware,
    hours,
    joined,
    joined_numbers,
    label_ends,
    markdown,
    number,
    pyplot,
    read,
    references,
    save,
    steps_of,
    thousands,
)

TABLE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code:([\w/]+)\.(\w+) -->\n).*?(<!-- /code -->)", re.DOTALL)
LINK = re.compile(r"(\[`(\w+)`\]\((?:\.\./)*([\w/]+)\.py#L)\d+\)")  # [`function`](script.py#L1)
ABLATION_LAST = 3  # the same in short runs that are compared with each other


# ---------------------------------------------------------------------------- training runs


def experiments(path: Path) -> dict:
    """Runs that differ in nothing but the seed: {(algorithm, env_id, flags): {seed: rows}}."""
    found = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        found[row["algorithm"], row["env_id"], row["flags"]][row["seed"]].append(row)
    return found


def curve(rows: list[dict], mode: str) -> tuple[list[int], list[float]]:
    """Steps and mean returns of one run's evaluations in one mode."""
    rows = [row for row in rows if row["mode"] == mode]
    return [int(r["global_step"]) for r in rows], [float(r["return_mean"]) for r in rows]


def split_flags(key: tuple) -> list[str]:
    """Of an experiment, each with its values; none is an empty one."""
    return re.split(r" (?=--)", key[-1])


def names(found: dict) -> dict:
    """What to call each experiment: its environment, and flags that not all there share."""
    flags = {key: split_flags(key) for key in found}
    result = {}
    for key in found:
        others = [set(flags[other]) for other in found if other[:2] == key[:2]]
        own = [flag for flag in flags[key] if flag not in set.intersection(*others)]
        own = [flag for flag in own if not flag.startswith(("--num-cand", "--flow-st", "--utd"))]
        result[key] = key[1], " ".join(own)  # those three have a column
    return result


def last(rows: list[dict]) -> dict:
    """The last row of the acting rule, the mode whose rows know N and T."""
    return [row for row in rows if row["mode"] == "best_of_n"][-1]


def results(path: Path) -> str:
    table, flags, episodes, reference = [], [], set(), references()
    found = experiments(path)
    for key, seeds in found.items():
        (env_id, own), flag = names(found)[key], key[-1]
        name = env_id + f" `{own}`" * bool(own)
        ends = [last(run) for run in seeds.values()]
        end = min(ends, key=lambda row: int(row["global_step"]))
        steps, planned = int(end["global_step"]), int(end["total_timesteps"])
        row = {
            "environment": name,
            "N, T, UTD": f"{end['num_candidates']}, {end['nfe']}, {end['utd']}",
            "steps": f"{steps:,}" if steps == planned else f"{steps:,} of {planned:,}",
            "updates": f"{int(end['updates']):,}",
            "seeds": len(seeds),
            "hours": hours(statistics.fmean(float(e["wall_time"]) for e in ends)),
        }
        for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
            curves = [curve(run, mode)[1] for run in seeds.values()]
            row[title] = across_seeds([statistics.fmean(returns[-LAST:]) for returns in curves])
            row[f"{title}, best"] = across_seeds([max(returns) for returns in curves])
        for policy, title in ("random", "random"), ("zero", "zero action"):
            known = (env_id, policy) in reference
            row[title] = number(reference[env_id, policy]) if known else "?"
        table.append(row | {"hardware": hardware(ends), "commit": commits(ends)})
        flags.append(f"{env_id} `--total-timesteps {planned}{' ' * bool(flag)}{flag}`")
        episodes |= {len(row["returns"].split()) for run in seeds.values() for row in run}
    several = any(row["seeds"] > 1 for row in table)
    spread = ", ± Student's 95% interval over seeds" if several else ""
    note = (
        f"Returns are the mean of the last {LAST} evaluations of "
        f"{joined_numbers(episodes)} episodes{spread}; *best* is the best "
        f"evaluation so far. Flags beyond the defaults: {'; '.join(flags)}."
    )
    return markdown(table) + "\n\n" + note


def last_evaluations(path: Path) -> str:
    """The very last evaluation of every run, to set beside single figures of other people's."""
    table = []
    for (_, env_id, _), seeds in experiments(path).items():
        for seed, run in seeds.items():
            end = last(run)
            row = {"environment": env_id, "seed": seed, "steps": f"{int(end['global_step']):,}"}
            row |= {"updates": f"{int(end['updates']):,}"}
            for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
                row[title] = number(curve(run, mode)[1][-1])
            table.append(row)
    return markdown(table)


def cut(found: dict) -> dict:
    """The same, all runs of a script on a task up to where the shortest of them ends."""
    ends = defaultdict(list)
    for key, seeds in found.items():
        ends[key[:2]] += [int(rows[-1]["global_step"]) for rows in seeds.values()]
    return {
        key: {
            seed: [row for row in rows if int(row["global_step"]) <= min(ends[key[:2]])]
            for seed, rows in seeds.items()
        }
        for key, seeds in found.items()
    }


def ablation(path: Path) -> str:
    """Variants of one setting, each against the one without flags of its own, seed by seed."""
    table, found = [], cut(experiments(path))
    labels, episodes = names(found), set()
    plain = {key[:2]: found[key] for key, (_, own) in labels.items() if not own}
    several = len({key[0] for key in found}) > 1
    for key, (env_id, own) in sorted(labels.items(), key=lambda item: (item[0][0], item[1])):
        row = {"script": f"`{key[0]}`"} if several else {}
        row |= {"environment": env_id, "variant": f"`{own}`" if own else "the default"}
        row |= {"seeds": len(found[key])}
        for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
            if not curve(next(iter(found[key].values())), mode)[1]:  # SAC has no candidates
                row |= {title: "-", f"{title}, minus default": "-"}
                continue
            ends = [
                {seed: statistics.fmean(curve(run, mode)[1][-ABLATION_LAST:]) for seed, run in runs}
                for runs in (found[key].items(), plain[key[:2]].items())
            ]
            row[title] = across_seeds(list(ends[0].values()))
            paired = [end - ends[1][seed] for seed, end in ends[0].items() if seed in ends[1]]
            row[f"{title}, minus default"] = across_seeds(paired) if own else ""
            if own and len(paired) > 1 and abs(statistics.fmean(paired)) > interval(paired):
                row[f"{title}, minus default"] = f"**{row[f'{title}, minus default']}**"
        table.append(row)
        episodes |= {len(row["returns"].split()) for run in found[key].values() for row in run}
    ends = [run[-1] for seeds in found.values() for run in seeds.values()]
    shared = set.intersection(*(set(split_flags(key)) for key in found)) - {""}
    flags = f"flags of all: `{' '.join(sorted(shared))}`; " if shared else ""
    updates = " or ".join(f"{n:,}" for n in sorted({int(row["updates"]) for row in ends}))
    note = (
        f"Returns are the mean of the last {ABLATION_LAST} evaluations of "
        f"{joined_numbers(episodes)} episodes, ± Student's 95% interval over seeds; differences "
        "are taken seed by seed, bold where their interval excludes zero. "
        f"{int(ends[0]['global_step']):,} steps, {updates} updates, "
        f"{flags}{hardware(ends)}, commit {commits(ends)}."
    )
    return markdown(table) + "\n\n" + note


def offline_steps(key: tuple) -> int:
    """Where the online phase of an experiment begins; the default is mvp_offline_to_online's."""
    given = re.search(r"--offline-steps (\d+)", key[-1])
    return int(given[1]) if given else 1_000_000


def successes(rows: list[dict], mode: str) -> dict[int, float]:
    """Success rate in per cent at each step of one run's evaluations in one mode."""
    rows = [row for row in rows if row["mode"] == mode]
    return {int(row["global_step"]): 100 * float(row["success_rate"]) for row in rows}


def success_rates(path: Path) -> str:
    """Offline-to-online runs: successes at the end of the offline phase, and what is added."""
    table, found = [], experiments(path)
    variants, ends, episodes = names(found), [], set()
    for key, seeds in sorted(found.items(), key=lambda item: variants[item[0]][1]):
        env_id, own = variants[key]
        start = offline_steps(key)
        row = {"task": env_id.split(":")[-1], "variant": f"`{own}`" if own else "the default"}
        row |= {"seeds": len(seeds)}
        for mode, title in ("best_of_n", "best of N"), ("one_step", "one step"):
            offline, online, final = [], [], []
            for run in seeds.values():
                rates = successes(run, mode)
                offline.append(rates[start])
                online.append([rate for step, rate in rates.items() if step > start])
                final.append(online[-1][-1])
            row[f"{title}, after offline"] = across_seeds(offline)
            if mode == "best_of_n":
                row["mean while online"] = across_seeds([statistics.fmean(r) for r in online])
            row[f"{title}, at the end"] = across_seeds(final)
            if mode == "best_of_n":
                rise = [late - early for early, late in zip(offline, final, strict=True)]
                row["rise"] = across_seeds(rise)
        table.append(row)
        ends += [last(run) for run in seeds.values()]
        episodes |= {len(row["returns"].split()) for run in seeds.values() for row in run}
    shared = set.intersection(*(set(split_flags(key)) for key in found))
    steps = joined_numbers({int(end["global_step"]) for end in ends})
    note = (
        f"Success rates in per cent of {joined_numbers(episodes)} episodes, ± Student's 95% "
        f"interval over seeds; the rise is taken seed by seed. {steps} steps in all, flags of "
        f"all: `{' '.join(sorted(shared))}`; {hardware(ends)}, commit {commits(ends)}."
    )
    return markdown(table) + "\n\n" + note


def constraint(path: Path) -> str:
    """Errors of the mean velocity on the 1-D flow whose mean velocity is known."""
    rows, table = read(path), []
    for ivc_coef in sorted({float(row["ivc_coef"]) for row in rows}):
        own = [row for row in rows if float(row["ivc_coef"]) == ivc_coef]
        line = {"lambda": f"{ivc_coef:g}", "seeds": len(own)}
        for key, title in ("boundary_error", "u(z, t, t)"), ("jump_error", "jump u(e, 0, 1)"):
            values = [float(row[key]) for row in own]
            line[title] = f"{statistics.fmean(values):.3f} ± {interval(values):.3f}"
        table.append(line)
    updates = joined_numbers({int(row["updates"]) for row in rows})
    note = (
        f"Root mean square errors after {updates} updates, ± Student's 95% interval over seeds. "
        "Velocities and actions are of the order of 1."
    )
    return markdown(table) + "\n\n" + note


def reference_policies(path: Path) -> str:
    table = {}
    for row in read(path):
        entry = table.setdefault(row["env_id"], {"environment": row["env_id"]})
        name = {"random": "random", "zero": "zero action"}[row["policy"]]
        spread = number(float(row["return_std"]))
        entry[name] = f"{number(float(row['return_mean']))} ± {spread}"
    versions = f"mujoco {joined(read(path), 'mujoco')}, gymnasium {joined(read(path), 'gymnasium')}"
    note = f"Mean ± standard deviation over {joined(read(path), 'episodes')} episodes; {versions}."
    return markdown(list(table.values())) + "\n\n" + note


def published(path: Path) -> str:
    table = []
    for row in read(path):
        spread = f" ± {number(float(row['return_std']))}" if row["return_std"] else ""
        entry = {"method": row["method"], "environment": row["env"]}
        entry |= {"return": number(float(row["return_mean"])) + spread}
        entry |= {"statistic": row["statistic"], "steps": steps_of(row)}
        entry |= {"seeds": row["seeds"] or "?", "NFE": row["nfe"] or "-"}
        table.append(entry | {"source": row["source"], "trust": row["trust"]})
    return markdown(table)


# ---------------------------------------------------------------------------- speed

PARTS = {  # measurement in speed.py: its column
    "generation": "generating",
    "ranking": "ranking",
    "learning": "learning",
}
VARIANTS = {
    "other Mish": "Mish by the other formula (torch's own compiled, one exponential eager)",
    "concatenated inputs": "first layer on concatenated inputs",
    "one piece": "all candidates in one piece",
    "ReLU": "ReLU instead of Mish (not the method: what activations cost)",
}


def computed(row: dict) -> str:
    """eager, compiled or compiled, bfloat16."""
    return row["mode"] + f", {row['precision']}" * (row["precision"] != "float32")


def by_case(rows: list[dict]) -> dict:
    """{(script, N, T, how it is computed): {measurement: row}} of what depends on N and T."""
    found = defaultdict(dict)
    for row in rows:
        if row["num_candidates"] or row["script"] == "sac_online":
            key = row["script"], row["num_candidates"], row["flow_steps"], computed(row)
            found[key][row["measurement"]] = row
    return found


def milliseconds(row: dict | None) -> float:
    return float(row["milliseconds"]) if row else math.nan


def times(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f} x"


def spread(row: dict) -> float:
    """The distance of the quartiles in terms of the median."""
    return (float(row["quartile_3"]) - float(row["quartile_1"])) / milliseconds(row)


def conditions(rows: list[dict]) -> str:
    """How many repetitions, where, and with what."""
    most = max(int(row["repetitions"]) for row in rows)
    return (
        f"Medians of {most} interleaved repetitions, Ant-v4's sizes, batch "
        f"{joined(rows, 'batch_size')}; {hardware(rows)}, torch {joined(rows, 'torch')}, commit "
        f"{commits(rows)}."
    )


def rates(rows: list[dict]) -> str:
    """The machine's own rates, as measured in the same run."""
    fastest = {}  # where several processes measured, their best
    for row in rows:
        name, ms = row["measurement"], milliseconds(row)
        if name.startswith("matmul"):
            rate, unit = 2 * int(row["multiply_adds"]) / ms / 1e6, "GFLOP/s"
            text = f"{name.removeprefix('matmul ')} in {row['precision']}"
        elif name.startswith("copy"):
            rate, unit = float(row["compulsory_megabytes"]) / ms, "GB/s read and written"
            text = f"a {name.removeprefix('copy ')} copy"
        else:
            continue
        fastest[text, unit] = max(rate, fastest.get((text, unit), 0.0))
    return ", ".join(f"{text} {digits(rate)} {unit}" for (text, unit), rate in fastest.items())


def speed(path: Path) -> str:
    rows, table, spreads = read(path), [], [0.0]
    cases = by_case(rows)
    for (script, n, t, how), case in cases.items():
        sizes = f"{n}, {t}" if n else "-"
        line = {"script": f"`{script}`", "N, T": sizes, "computed": how}
        update = case.get("update")
        eager = milliseconds(cases.get((script, n, t, "eager"), {}).get("update"))
        line["update"] = f"{digits(milliseconds(update))} ms" if update else "-"
        faster = eager / milliseconds(update)
        line["faster than eager"] = times(faster)
        line["over the floor"] = f"{float(update['ratio_to_floor']):.2f} x" if update else "-"
        for name, title in PARTS.items():
            row = case.get(name)
            ratio = f" ({float(row['ratio_to_floor']):.2f})" if row else ""
            line[title] = f"{digits(milliseconds(row))} ms{ratio}" if row else "-"
        acting, first = case.get("acting"), case.get("first-update")
        line["acting"] = f"{digits(milliseconds(acting))} ms" if acting else "-"
        line["first update"] = f"{digits(milliseconds(first) / 1000)} s" if first else "-"
        table.append(line)
        spreads += [spread(update)] if update else []
    peaks = [float(row["peak_megabytes"]) for row in rows if row["peak_megabytes"]]
    note = (
        f"{conditions(rows)} The middle half of an update's repetitions spans at most "
        f"{max(spreads):.0%} of its median. The floor is what the counted multiply-adds take at "
        "the best rate of a plain matrix product of that precision in the same run, or what the "
        "bytes that must move take at the rate of a large copy, whichever is longer; in brackets "
        f"the parts' ratios to theirs. Measured: {rates(rows)}. *Acting* is an exploring step of 5 "
        "environments; *first update* has empty compile caches. Peak memory of "
        f"{'the whole measurement' if len(set(peaks)) == 1 else 'a call'}: "
        f"{digits(max(peaks))} MB."
    )
    return markdown(table) + "\n\n" + note


def speed_of_acting(path: Path) -> str:
    """One-step actions beside a SAC actor's, and what the simulator takes."""
    rows, table = read(path), []
    sac = [row for row in rows if (row["script"], row["measurement"]) == ("sac", "one-step")]
    for row in rows:
        names = {"one-step": f"`{row['script']}`, one step for one state, as evaluated in training"}
        names["one-step deployed"] = f"`{row['script']}`, the same deployed (`for_one_step`)"
        names["environments"] = "5 Ant-v4, one random step of each"
        if row["script"] == "sac":
            names["one-step"] = "SAC actor of the same width, a sample for one state"
            names["one-step mean"] = "SAC actor of the same width, its mean"
        if name := names.get(row["measurement"]):
            line = {"what": name, "time": f"{digits(milliseconds(row))} ms"}
            ratio = milliseconds(row) / milliseconds(sac[0]) if sac else math.nan
            line["against SAC"] = times(ratio)
            count = row["multiply_adds"]
            table.append(line | {"multiply-adds": f"{int(count):,}" if count else "-"})
    if not table:
        return "no actions measured"
    return f"{markdown(table)}\n\nEager float32, from array to array. {conditions(rows)}"


def speed_of_variants(path: Path) -> str:
    """Generation in ways that were not kept, against the one that was."""
    rows, lines = read(path), defaultdict(dict)
    for (_, n, t, how), case in by_case(rows).items():
        for name, label in VARIANTS.items():
            if row := case.get(f"generation, {name}"):
                kept, name = milliseconds(case.get("generation")), f"{n}, {t}, {how}"
                lines["as it is"][name] = "-" if math.isnan(kept) else f"{digits(kept)} ms"
                ratio = milliseconds(row) / kept
                lines[label][name] = times(ratio)
    if not lines:
        return "no variants measured"
    table = markdown([{"generating, N, T": label} | line for label, line in lines.items()])
    return f"{table}\n\nTime against the script's own. {conditions(rows)}"


def end_to_end(path: Path) -> str:
    rows, table = read(path), []
    eager = {row["script"]: row for row in rows if row["mode"] == "eager"}
    for row in rows:
        rate = float(row["steps_per_second"])
        line = {"script": f"`{row['script']}`", "computed": computed(row)}
        line["N, T, UTD"] = f"{row['num_candidates']}, {row['flow_steps']}, {row['utd']}"
        line["steps per second"] = digits(rate)
        faster = milliseconds(eager.get(row["script"])) / milliseconds(row)
        line["faster than eager"] = times(faster)
        line["hours per million steps"] = digits(1e6 / rate / 3600)
        line["peak memory"] = f"{digits(float(row['peak_megabytes']))} MB"
        full = digits(float(row["full_buffer_megabytes"]))
        table.append(line | {"with a full buffer": f"{full} MB"})
    low, high = min(rows, key=spread), max(rows, key=spread)
    note = (
        f"{joined(rows, 'env_id')}, {joined(rows, 'repetitions')} runs of "
        f"{joined(rows, 'total_timesteps')} steps each, in turn, without evaluations and "
        "checkpoints. Steps per second are the median over stretches of 500 steps after "
        f"compilation, whose middle half spans {spread(low):.0%} to {spread(high):.0%} of it. "
        "Memory is the process's peak, and that of a run with 1,000,000 stored transitions, the "
        f"checkpoint at its end included. {hardware(rows)}, torch {joined(rows, 'torch')}, commit "
        f"{commits(rows)}."
    )
    return markdown(table) + "\n\n" + note


def whole_runs(path: Path) -> str:
    """Steps per second of whole runs, alone and side by side."""
    rows, table = read(path), []
    for row in rows:
        rate = float(row["steps_per_second_each"])
        line = {"what runs": row["what"], "runs at once": row["runs"]}
        line |= {"algorithm": row["algorithm"], "steps per second, each": number(rate)}
        table.append(line | {"minutes per million steps": f"{1e6 / rate / 60:.1f}"})
    note = (
        f"Ant-v4, published setting, evaluation off, each over {joined(rows, 'seconds')} s after "
        f"compilation. {joined(rows, 'device')}, torch {joined(rows, 'torch')}, commit "
        f"{commits(rows)}."
    )
    return markdown(table) + "\n\n" + note


def proofs(path: Path) -> str:
    """Outcomes of tests/test_cuda.py, a row per test."""
    rows, found = read(path), defaultdict(list)
    for row in rows:
        found[row["test"].split("[")[0]].append(row)
    table = []
    for test, own in found.items():
        line = {"test": test.removeprefix("test_").replace("_", " ")}
        for outcome in "passed", "failed":
            line[outcome] = sum(row["outcome"] == outcome for row in own)
        errors = [
            float(part.split(": ")[1])
            for row in own
            for part in row["properties"].split("; ")
            if part.startswith("relative error")
        ]
        exact = [e for e, row in zip(errors, [r for r in own if r["properties"]], strict=False)
                 if "tf32" not in row["test"]]  # fmt: skip
        line["largest relative error, float32"] = f"{max(exact):.1e}" if exact else "-"
        line["with TF32"] = f"{max(errors):.1e}" if len(errors) > len(exact) else "-"
        table.append(line)
    note = (
        f"Counted over scripts. {joined(rows, 'device')}, torch {joined(rows, 'torch')}, commit "
        f"{commits(rows)}."
    )
    return markdown(table) + "\n\n" + note


def evaluation_cost(path: Path) -> str:
    """Seconds of an evaluation, and how many steps of training they equal."""
    rows, table = read(path), []
    cases = defaultdict(list)
    for row in rows:
        cases[row["script"], row["env_id"], row["num_candidates"], row["utd"]].append(row)
    for (script, env_id, n, utd), runs in cases.items():
        step, seconds = (
            statistics.median(float(run[key]) for run in runs)
            for key in ("training_ms_per_step", "evaluation_seconds")
        )
        line = {"script": f"`{script}`", "environment": env_id, "N, UTD": f"{n}, {utd}"}
        line |= {"runs": len(runs), "training": f"{digits(step)} ms per step"}
        line |= {"an evaluation": f"{digits(seconds)} s"}
        line["of training between two"] = f"{seconds / (25 * step):.0%}"
        table.append(line)
    note = (
        f"An evaluation is {joined(rows, 'episodes')} episodes in each of "
        f"{joined(rows, 'modes')} modes; between two lie 25,000 steps by default. Medians over "
        f"training runs that shared the machine; {hardware(rows)}, commit {commits(rows)}."
    )
    return markdown(table) + "\n\n" + note


def against_authors(path: Path) -> str:
    """Update times beside the authors' code, which was timed by hand in turn with ours."""
    rows, table = read(path), []
    cases = defaultdict(list)
    for row in rows:
        key = row["script"], row["num_candidates"], row["flow_steps"], row["precision"]
        cases[key].append([float(row["authors_ms"]), float(row["ours_ms"])])
    for (script, n, t, precision), pairs in cases.items():
        theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = [own / other for other, own in pairs]
        line = {"script": f"`{script}`", "N, T": f"{n}, {t}", "generation in": precision}
        line |= {"authors' JAX": f"{digits(theirs)} ms", "ours": f"{digits(ours)} ms"}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.append(line | {"ratio": f"{statistics.median(ratios):.2f}", "over rounds": spread})
    note = (
        f"Medians of {len(rows) // len(cases)} rounds; in each, the authors' update and ours ran "
        "one after the other in processes of their own, medians of 12 updates after compilation, "
        f"batch 256, Ant-v4's sizes. Theirs is compiled by jax {joined(rows, 'jax')} and its "
        f"metrics are read after every update, as it does. {hardware(rows)}, torch "
        f"{joined(rows, 'torch')}, commit {commits(rows)}."
    )
    return f"{markdown(table)}\n\n{note}"


def precision(path: Path) -> str:
    """What bfloat16 changes, one line per way to use it, over runs."""
    rows, table = read(path), []
    titles = {
        "generation": "generating in bfloat16, ranking in float32",
        "ranking": "ranking in bfloat16",
        "ranking, best 4 again": "the same, its best four ranked again in float32",
        "ranking, head": "ranking in bfloat16 but for the last layer",
        "ranking, head, best 4 again": "the same, its best four ranked again in float32",
    }
    for what, title in titles.items():
        own = [row for row in rows if row["what"] == what]
        line = {"used for": title}
        for column, name, unit in (
            ("same choice as float32", "agreement", "%"),
            ("Q lost by the choice", "q_loss", "%"),
            ("error of the chosen Q", "q_error", "%"),
            ("error of an action", "action_error", ""),
        ):
            values = [float(row[name]) for row in own if row[name]]
            low, high = (
                f"{100 * v:.3g} %" if unit else f"{v:.2g}"
                for v in (min(values, default=0), max(values, default=0))
            )
            line[column] = (low if low == high else f"{low} to {high}") if values else ""
        table.append(line)
    agents = {(row["env_id"], row["seed"]): row for row in rows}.values()
    listed = "; ".join(
        f"{row['env_id']} seed {row['seed']}, {int(row['global_step']):,} steps, spread of Q over "
        f"candidates {float(row['q_spread']):.2g} at a mean Q of {float(row['q_mean']):.2g}"
        for row in agents
    )
    note = "Range over agents. Losses and errors of Q are in terms of that spread. Agents of "
    return f"{markdown(table)}\n\n{note}{joined(rows, 'algorithm')}: {listed}."


# ---------------------------------------------------------------------------- figures


def draw_learning_curves(path: Path, output: Path) -> None:
    """A panel per experiment: both evaluation modes against environment steps."""
    plt = pyplot()
    found, reference = experiments(path), references()
    columns = min(len(found), 2)
    rows = math.ceil(len(found) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(found) :]:
        panel.remove()
    for panel, (key, seeds) in zip(panels.flat, found.items(), strict=False):
        env_id, own = names(found)[key]
        labels = []  # (height, text, colour), beside the right end
        for mode, colour in ("best_of_n", "#D55E00"), ("one_step", "#0072B2"):
            curves = [curve(run, mode) for run in seeds.values()]
            length = min(len(returns) for _, returns in curves)
            steps, values = curves[0][0][:length], [returns[:length] for _, returns in curves]
            mean = [statistics.fmean(at) for at in zip(*values, strict=True)]
            for returns in values if len(seeds) > 1 else []:
                panel.plot(steps, returns, color=colour, lw=0.6, alpha=0.4)
            panel.plot(steps, mean, color=colour, lw=1.6, marker="o", ms=2.5, clip_on=False)
            labels.append((mean[-1], mode, colour))
        for policy in "zero", "random":
            if (env_id, policy) in reference:
                height = reference[env_id, policy]
                panel.plot((0, steps[-1]), (height, height), color="0.35", ls=":", lw=1.4, zorder=1)
                labels.append((height, policy, "0.35"))
        end = last(next(iter(seeds.values())))
        texts = {"one_step": "one step", "best_of_n": f"best of {end['num_candidates']}"}
        texts |= {"zero": "zero action", "random": "random"}
        low, high = panel.get_ylim()
        labels = [(height, texts[name], colour) for height, name, colour in labels]
        label_ends(panel, labels, 0.065 * (high - low))
        panel.set_ylim(low, high)
        panel.set_xlim(0, steps[-1])
        panel.xaxis.set_major_locator(plt.MaxNLocator(4))
        panel.xaxis.set_major_formatter(thousands)
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        panel.grid(axis="y", color="0.92")
        panel.set_axisbelow(True)
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        setting = f"N = {end['num_candidates']}, T = {end['nfe']}, {count}"
        own = f"UTD {end['utd']} {own}" if own else ""  # what tells this panel from another
        own = textwrap.wrap(own, 50, break_on_hyphens=False)
        title = "\n".join([f"{env_id}  ({setting})", *own])
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("environment steps")
    for panel in panels[:, 0]:
        panel.set_ylabel("evaluation return")
    save(figure, output)


def draw_success_rates(path: Path, output: Path) -> None:
    """Success of best of N against steps, a line per variant, the online phase shaded."""
    plt = pyplot()
    found = experiments(path)
    variants = names(found)
    figure, panel = plt.subplots(figsize=(5.5, 3), layout="constrained")
    ends = []
    colours = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
    for key, colour in zip(sorted(found, key=lambda k: variants[k][1]), colours, strict=False):
        runs = [successes(run, "best_of_n") for run in found[key].values()]
        steps = sorted(set.intersection(*map(set, runs)))
        mean = [statistics.fmean(run[step] for run in runs) for step in steps]
        for run in runs if len(runs) > 1 else []:
            panel.plot(steps, [run[step] for step in steps], color=colour, lw=0.6, alpha=0.4)
        panel.plot(steps, mean, color=colour, lw=1.8, marker="o", ms=3, clip_on=False)
        ends.append((mean[-1], variants[key][1] or "the default", colour))
        panel.axvspan(offline_steps(key), steps[-1], color="0.95", lw=0, zorder=0)
    label_ends(panel, ends, 7)
    panel.annotate("online", (offline_steps(key), 97), (4, 0), textcoords="offset points",
                   va="top", color="0.35")  # fmt: skip
    panel.set(ylim=(0, 100), ylabel="success rate, %", xlabel="steps, offline then online")
    panel.set_xlim(0, steps[-1])
    panel.xaxis.set_major_formatter(thousands)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    save(figure, output)


# ---------------------------------------------------------------------------- main

TABLES = {  # name in the markers: (what writes it, from which CSV)
    "precision": (precision, "precision.csv"),
    "authors-cpu": (against_authors, "authors_cpu.csv"),
    "results-cpu": (results, "fpmd_online_cpu.csv"),
    "meanflow-cpu": (results, "fpmd_meanflow_online_cpu.csv"),
    "meanflow-200k": (results, "fpmd_meanflow_online_200k_cpu.csv"),
    "meanflow-seeds": (last_evaluations, "fpmd_meanflow_online_cpu.csv"),
    "weight-modes": (ablation, "weight_modes_cpu.csv"),
    "weight-modes-utd1": (ablation, "weight_modes_utd1_cpu.csv"),
    "mvp-cpu": (results, "mvp_online_cpu.csv"),
    "offline-to-online": (success_rates, "offline_to_online_cpu.csv"),
    "constraint": (constraint, "constraint.csv"),
    "compile-cpu": (ablation, "compile_cpu.csv"),
    "short-runs": (ablation, "short_runs_cpu.csv"),
    "reference-policies": (reference_policies, "reference_policies.csv"),
    "published": (published, "published_results.csv"),
    "speed-cpu": (speed, "speed_cpu.csv"),
    "speed-acting-cpu": (speed_of_acting, "speed_cpu.csv"),
    "speed-variants-cpu": (speed_of_variants, "speed_cpu.csv"),
    "end-to-end-cpu": (end_to_end, "end_to_end_cpu.csv"),
    "evaluation-cost-cpu": (evaluation_cost, "evaluation_cost_cpu.csv"),
    "speed-cuda": (speed, "speed_cuda.csv"),
    "prove-cuda": (proofs, "prove_cuda.csv"),
    "rates-cuda": (whole_runs, "rates_cuda.csv"),
    **campaign_report.TABLES,
}
DRAWINGS = {  # figure: (what draws it, from which CSV)
    "fpmd_online_cpu.png": (draw_learning_curves, "fpmd_online_cpu.csv"),
    "fpmd_meanflow_online_cpu.png": (draw_learning_curves, "fpmd_meanflow_online_cpu.csv"),
    "fpmd_meanflow_online_200k_cpu.png": (
        draw_learning_curves,
        "fpmd_meanflow_online_200k_cpu.csv",
    ),
    "mvp_online_cpu.png": (draw_learning_curves, "mvp_online_cpu.csv"),
    "offline_to_online_cpu.png": (draw_success_rates, "offline_to_online_cpu.csv"),
    "compile_cpu.png": (draw_learning_curves, "compile_cpu.csv"),
    **campaign_report.DRAWINGS,
}


def definition(script: str, name: str) -> tuple[str, ast.AST]:
    """The text of a script, and where it defines a function or a class."""
    path = ROOT / f"{script}.py"
    text = path.read_text() if path.exists() else ""
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return text, node
    sys.exit(f"report.py: error: there is no function {name} in {script}.py")


def rebuild(path: Path) -> tuple[str, list[str]]:
    """The document's text with all its blocks new, and the names of those that changed."""
    text, changed = path.read_text(), []
    depth = len(path.relative_to(ROOT).parts) - 1  # 0: README.md, 1: docs/, 2: docs/campaigns/
    figures = "](" + ("docs/" if depth == 0 else "../" * (depth - 1))

    def block(match: re.Match, name: str, content: str) -> str:
        new = f"{match[1]}\n{content}\n\n{match[match.lastindex]}"
        if new != match[0]:
            changed.append(name)
        return new

    def table(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            sys.exit(f"report.py: error: {path.name} asks for {name}; known: {', '.join(TABLES)}")
        build, csv = TABLES[name]
        return block(match, name, build(RESULTS / csv).replace("](docs/", figures))

    def code(match: re.Match) -> str:
        excerpt = ast.get_source_segment(*definition(match[2], match[3]))
        return block(match, f"{match[2]}.{match[3]}", f"```python\n{excerpt}\n```")

    def link(match: re.Match) -> str:
        new = f"{match[1]}{definition(match[3], match[2])[1].lineno})"
        if new != match[0]:
            changed.append(f"line of {match[3]}.{match[2]}")
        return new

    new = LINK.sub(link, CODE.sub(code, TABLE.sub(table, text)))
    for kind, pattern in ("table", TABLE), ("code", CODE):
        if text.count(f"<!-- {kind}:") != len(pattern.findall(text)):
            sys.exit(f"report.py: error: {path.name}: a {kind} has no <!-- /{kind} --> of its own")
    return new, changed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="leave the figures as they are")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a change")
    args = parser.parse_args()
    stale = False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        text, changed = rebuild(path) if path.exists() else ("", [])
        for name in changed:
            news = "is out of date" if args.check else "rewritten"
            print(f"{path.relative_to(ROOT)}: {name} {news}")
        stale |= bool(changed)
        if changed and not args.check:
            path.write_text(text)
    if args.check:
        sys.exit(int(stale))
    for figure, (draw, source) in DRAWINGS.items():
        if not args.tables and (RESULTS / source).exists():
            draw(RESULTS / source, FIGURES / figure)


if __name__ == "__main__":
    main()
