"""Tables of training runs: results, ablations, success rates, and what they are compared with."""

import re
import statistics
from benchmark.report import formatting as fmt
from benchmark.report.formatting import table_with_note
from benchmark.report.intervals import LAST, half_width, interval
from benchmark.report.training_runs import (
    PUBLISHED_100K,
    SETTING,
    beside_sac,
    climb,
    curve,
    cut,
    cut_seeds,
    experiments,
    is_blind,
    last,
    method_of,
    names,
    offline_steps,
    split_flags,
    successes,
)
from collections import defaultdict
from pathlib import Path

ABLATION_LAST = 3  # the same in short runs that are compared with each other

COMPARED = "FPMD+", "SAC, same critic"
OVERVIEW = "**FPMD+**", "**SAC, same critic**", "SAC", "CrossQ"
OVERVIEW += "Simba (UTD 2)", "SimbaV2 (UTD 2)", "XQC (UTD 2)", "FlashSAC"

PAIRED = (
    "± Student's 95% interval over seeds; differences are taken seed by seed, "
    "bold where their interval excludes zero"
)


def results(path: Path) -> str:
    table, flags, episodes, reference = [], [], set(), fmt.references()
    found = experiments(path)
    for key, seeds in found.items():
        (env_id, own), flag = names(found, SETTING)[key], key[-1]
        seeds = cut_seeds(seeds)
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
            "hours": fmt.hours(statistics.fmean(float(e["wall_time"]) for e in ends)),
        }
        for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
            curves = [curve(run, mode)[1] for run in seeds.values()]
            row[title] = fmt.across_seeds([statistics.fmean(returns[-LAST:]) for returns in curves])
            row[f"{title}, best"] = fmt.across_seeds([max(returns) for returns in curves])
        for policy, title in ("random", "random"), ("zero", "zero action"):
            known = (env_id, policy) in reference
            row[title] = fmt.number(reference[env_id, policy]) if known else "?"
        table.append(row | {"hardware": fmt.hardware(ends), "commit": fmt.commits(ends)})
        flags.append(f"{env_id} `--total-timesteps {planned}{' ' * bool(flag)}{flag}`")
        episodes |= {len(row["returns"].split()) for run in seeds.values() for row in run}
    several = any(row["seeds"] > 1 for row in table)
    spread = ", ± Student's 95% interval over seeds" if several else ""
    note = (
        f"Returns are the mean of the last {LAST} evaluations of "
        f"{fmt.joined_numbers(episodes)} episodes{spread}; *best* is the best "
        f"evaluation so far. Flags beyond the defaults: {'; '.join(flags)}."
    )
    return table_with_note(table, note)


def from_pixels(path: Path) -> str:
    """Runs from pixels, each by itself, and below them the same behind black pictures."""
    table, ends, found = [], [], experiments(path)
    for key in sorted(found, key=is_blind):
        for seed, run in sorted(found[key].items()):
            ends.append(last(run))
            row = {"pictures": "black" if is_blind(key) else "of the task", "seed": seed}
            row |= {"agent steps": f"{int(ends[-1]['global_step']):,}"}
            for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
                returns = curve(run, mode)[1]
                mean = statistics.fmean(returns[-ABLATION_LAST:])
                row[f"{title}, last three"] = fmt.number(mean)
                row[f"{title}, last"] = fmt.number(returns[-1])
            table.append(row | {"minutes": f"{float(ends[-1]['wall_time']) / 60:.0f}"})
    counts = {len(end["returns"].split()) for end in ends}
    note = (
        f"Returns of {fmt.joined_numbers(counts)} episodes: the mean of the last "
        f"{ABLATION_LAST} evaluations, and the last. {fmt.made_with(ends)}"
    )
    return table_with_note(table, note)


def last_evaluations(path: Path) -> str:
    """The very last evaluation of every run, to set beside single figures of other people's."""
    table = []
    for (_, env_id, _), seeds in experiments(path).items():
        for seed, run in seeds.items():
            end = last(run)
            row = {"environment": env_id, "seed": seed, "steps": f"{int(end['global_step']):,}"}
            row |= {"updates": f"{int(end['updates']):,}"}
            for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
                row[title] = fmt.number(curve(run, mode)[1][-1])
            table.append(row)
    return fmt.markdown(table)


def ablation(path: Path, average: int = ABLATION_LAST) -> str:
    """Variants of one setting, each against the one without flags of its own, seed by seed.

    Of each run the mean of the last so many evaluations counts.
    """
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
                {seed: statistics.fmean(curve(run, mode)[1][-average:]) for seed, run in runs}
                for runs in (found[key].items(), plain[key[:2]].items())
            ]
            row[title] = fmt.across_seeds(list(ends[0].values()))
            paired = [end - ends[1][seed] for seed, end in ends[0].items() if seed in ends[1]]
            row[f"{title}, minus default"] = fmt.difference(paired) if own else ""
        table.append(row)
        episodes |= {len(row["returns"].split()) for run in found[key].values() for row in run}
    ends = [run[-1] for seeds in found.values() for run in seeds.values()]
    shared = set.intersection(*(set(split_flags(key)) for key in found)) - {""}
    flags = f"flags of all: `{' '.join(sorted(shared))}`; " if shared else ""
    updates = " or ".join(f"{n:,}" for n in sorted({int(row["updates"]) for row in ends}))
    averaged = "the last evaluation"
    if average > 1:
        averaged = f"the mean of the last {average} evaluations"
    note = (
        f"Returns are {averaged} of {fmt.joined_numbers(episodes)} episodes, "
        f"{PAIRED}. "
        f"{int(ends[0]['global_step']):,} steps, {updates} updates, "
        f"{flags}{fmt.hardware(ends)}, commit {fmt.commits(ends)}."
    )
    return table_with_note(table, note)


def steps_of_a_climb(path: Path) -> str:
    """Variants that add one ingredient after another, each against the one above, by seed."""
    table, ends, above = [], [], {}
    for added, seeds in climb(cut(experiments(path))).items():
        returns = {seed: curve(run, "one_step")[1][-1] for seed, run in seeds.items()}
        gain = [value - above[seed] for seed, value in returns.items() if seed in above]
        row = {"what is added": added, "seeds": len(seeds)}
        row["one step"] = fmt.across_seeds(list(returns.values()))
        row["minus the row above"] = fmt.difference(gain) if above else ""
        table.append(row)
        above = returns
        ends += [run[-1] for run in seeds.values()]
    counts = {len(end["returns"].split()) for end in ends}
    note = (
        f"{ends[0]['env_id']}, the last evaluation of {fmt.joined_numbers(counts)} episodes, "
        f"{PAIRED}. "
        f"{int(ends[0]['global_step']):,} steps, {int(ends[0]['updates']):,} updates, "
        f"{fmt.hardware(ends)}, commit {fmt.commits(ends)}."
    )
    return table_with_note(table, note)


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
            row[f"{title}, after offline"] = fmt.across_seeds(offline)
            if mode == "best_of_n":
                row["mean while online"] = fmt.across_seeds([statistics.fmean(r) for r in online])
            row[f"{title}, at the end"] = fmt.across_seeds(final)
            if mode == "best_of_n":
                rise = [late - early for early, late in zip(offline, final, strict=True)]
                row["rise"] = fmt.across_seeds(rise)
        table.append(row)
        ends += [last(run) for run in seeds.values()]
        episodes |= {len(row["returns"].split()) for run in seeds.values() for row in run}
    shared = set.intersection(*(set(split_flags(key)) for key in found))
    steps = fmt.joined_numbers({int(end["global_step"]) for end in ends})
    note = (
        f"Success rates in per cent of {fmt.joined_numbers(episodes)} episodes, ± Student's 95% "
        f"interval over seeds; the rise is taken seed by seed. {steps} steps in all, flags of "
        f"all: `{' '.join(sorted(shared))}`; {fmt.hardware(ends)}, commit {fmt.commits(ends)}."
    )
    return table_with_note(table, note)


def cut_off(path: Path) -> str:
    """Offline runs that were stopped before their end: every evaluation that there is."""
    table, found = [], experiments(path)
    variants, ends = names(found), []
    for key in sorted(found, key=lambda key: natural(variants[key][1])):
        _, own = variants[key]
        for seed, run in sorted(found[key].items()):
            for row in run:
                if row["mode"] == "one_step":
                    line = {"variant": f"`{own}`" if own else "the default", "seed": seed}
                    line["updates"] = f"{int(row['updates']):,}"
                    table.append(line | {"one step": f"{100 * float(row['success_rate']):.0f}"})
                else:
                    table[-1]["best of N"] = f"{100 * float(row['success_rate']):.0f}"
            ends.append(last(run))
    shared = set.intersection(*(set(split_flags(key)) for key in found))
    counts = fmt.joined_numbers({len(end["returns"].split()) for end in ends})
    note = (
        f"Success rates in per cent of {counts} episodes. Flags of all: "
        f"`{' '.join(sorted(shared))}`; {fmt.hardware(ends)}, commit {fmt.commits(ends)}."
    )
    return table_with_note(table, note)


def natural(text: str) -> list:
    """To sort by: words before numbers, numbers by their size."""
    parts = re.findall(r"[\d.]+|[^\d.]+", text)
    return [(0, part, 0.0) if not part[0].isdigit() else (1, "", float(part)) for part in parts]


def offline(path: Path) -> str:
    """Success in the offline phase: the last evaluation, the mean of the last three, the best."""
    table, found = [], experiments(path)
    variants, ends = names(found), []
    for key in sorted(found, key=lambda key: natural(variants[key][1])):
        seeds, (env_id, own) = found[key], variants[key]
        row = {"task": env_id.split(":")[-1], "variant": f"`{own}`" if own else "the default"}
        row |= {"seeds": len(seeds)}
        for mode, title in ("one_step", "one step"), ("best_of_n", "best of N"):
            rates = [
                [rate for step, rate in successes(run, mode).items() if step <= offline_steps(key)]
                for run in seeds.values()
            ]
            row[f"{title}: last"] = fmt.across_seeds([r[-1] for r in rates])
            row[f"{title}: last three"] = fmt.across_seeds(
                [statistics.fmean(r[-3:]) for r in rates]
            )
            row[f"{title}: best"] = fmt.across_seeds([max(r) for r in rates])
        table.append(row)
        ends += [last(run) for run in seeds.values()]
    shared = set.intersection(*(set(split_flags(key)) for key in found))
    counts = {len(end["returns"].split()) for end in ends}
    steps = fmt.joined_numbers({offline_steps(key) for key in found})
    note = (
        f"Success rates in per cent of {fmt.joined_numbers(counts)} episodes after {steps} offline "
        "updates: of the last evaluation, the mean of the last three, and the best; ± Student's "
        f"95% interval over seeds. Flags of all: `{' '.join(sorted(shared))}`; "
        f"{fmt.hardware(ends)}, commit {fmt.commits(ends)}."
    )
    return table_with_note(table, note)


def reformulations(path: Path) -> str:
    """c - u for seven c on four modes: learnt, and what a perfect network would learn."""
    rows, table = fmt.read(path), []
    titles = {"distance": "distance", "within": "within 3 std", "transport": "transport"}
    for form in dict.fromkeys(row["form"] for row in rows):
        line = {"g": f"${form}$"}
        for what in "learnt", "exact":
            own = [row for row in rows if row["form"] == form and row["what"] == what]
            for key, title in titles.items():
                mean = statistics.fmean(float(row[key]) for row in own)
                line[f"{what}: {title}"] = f"{mean:.0%}" if key == "within" else f"{mean:.3f}"
        table.append(line)
    seeds = len({row["seed"] for row in rows if row["what"] == "learnt"})
    note = (
        "Distance: mean to the nearest mode, 0.063 for fresh data. Transport: the exact optimal "
        f"transport distance to fresh data. Means of {seeds} seeds after "
        f"{fmt.joined_numbers({int(row['updates']) for row in rows})} updates."
    )
    return table_with_note(table, note)


def alphas(path: Path) -> str:
    """What alpha does to a policy of MeanFlowQL by the end of the offline phase."""
    rows, table = fmt.read(path), []
    for row in rows:
        alpha, q = float(row["alpha"]), float(row["q_value"])
        normalised = row["normalize_q"] == "True"
        table.append(
            {
                "task": row["env_id"].partition(":")[2],
                "flags": f"`{'--normalize-q ' * normalised}--alpha {alpha:g}`",
                "mean Q": fmt.number(q),
                "alpha against Q itself": fmt.number(alpha * abs(q) if normalised else alpha),
                "distance to the data": f"{float(row['mse_to_data']):.2f}",
                "beyond the bounds": f"{100 * float(row['outside_box']):.0f} %",
                "spread of candidates": f"{float(row['candidate_spread']):.2f}",
            }
        )
    note = (
        "Means over the last tenth of the offline updates, one seed: Q of the data's actions; "
        "squared distance of one-step actions to the data's; share of coordinates beyond the "
        "bounds before the clip; std over candidates. With `--normalize-q`, alpha times mean |Q| "
        "is the alpha of the same balance of imitation and Q; the penalty at the bounds weighs "
        f"mean |Q| times more than without. Commit {fmt.commits(rows)}."
    )
    return table_with_note(table, note)


def screen(path: Path, step: str = "environment step", modes=("one_step",)) -> str:
    """Returns of short runs as they went, a row per task, setting and mode."""
    rows, several = [row for row in fmt.read(path) if row["mode"] in modes], len(modes) > 1
    steps = sorted({int(row["global_step"]) for row in rows})
    are_rates = all(0 <= float(row["return_mean"]) <= 1 for row in rows)
    number = "{:.2f}".format if are_rates else fmt.number
    runs = defaultdict(list)
    for row in rows:
        key = row["env_id"], row["setting"], row["commit"], row["seed"], row["mode"]
        runs[key].append(row)
    table = []
    for (env_id, setting, commit, seed, mode), own in runs.items():
        returns = {int(row["global_step"]): float(row["return_mean"]) for row in own}
        line = {"task": env_id, "setting": setting, "seed": seed}
        if several:
            line["acts by"] = mode.replace("_", " ")
        line |= {f"{s / 1000:g}k": number(returns[s]) if s in returns else "-" for s in steps}
        table.append(line | {"commit": f"`{commit[:7]}`"})
    episodes = {len(row["returns"].split()) for row in rows}
    of = "" if several else " of one step"
    note = (
        f"Mean return{of} in {fmt.joined_numbers(episodes)} episodes, by {step}. "
        f"{fmt.made_with(rows)}"
    )
    return table_with_note(table, note)


def at_100k(path: Path, methods: tuple[str, ...] = ()) -> str:
    """One-step returns at a number of steps, ours, SAC's in its file, and the published ones.

    methods: show these alone, on the tasks of our own runs, without where numbers come from.
    """
    rows = beside_sac(path)
    steps = {row["total_timesteps"] for row in rows}
    rows = [row for row in rows if row["global_step"] == row["total_timesteps"]]
    published = [row for row in fmt.read(PUBLISHED_100K) if {row["env_steps"]} == steps]
    returns, cells = defaultdict(list), {}
    for row in rows:
        returns[f"**{method_of(row)}**", row["env_id"]].append(float(row["return_mean"]))
    for place, own in returns.items():
        cells[place] = f"{fmt.across_seeds(own)} ({len(own)})"
    for row in published:
        half = half_width(float(row["return_std"]), int(row["seeds"]))
        mean = fmt.number(float(row["return_mean"]))
        cells[row["method"], row["env"]] = f"{mean} ± {fmt.number(half)} ({row['seeds']})"
    # tasks in the order in which they were published
    env_ids = dict.fromkeys([row["env"] for row in published] + [row["env_id"] for row in rows])
    if methods:
        env_ids = [env_id for env_id in env_ids if env_id in {row["env_id"] for row in rows}]
    table = [
        {"method": method} | {env_id: cells.get((method, env_id), "-") for env_id in env_ids}
        for method in methods or dict.fromkeys(method for method, _ in cells)
    ]
    at = " and ".join(f"{int(step):,}" for step in steps)
    note = (
        f"The evaluation at {at} steps, an update per step, or two at UTD 2. ± Student's 95% "
        "interval of the mean; in brackets the seeds. In bold our runs, one step (SAC: the mean "
        "action), 10 episodes"
    )
    dm_control = "Those of dm_control take each action twice: 50,000 decisions."
    if methods:
        return table_with_note(table, f"{note}; the others are published. {dm_control}")
    origin = (
        "The others are recomputed from result files: SAC, CrossQ, BRO, Simba, SimbaV2 and TD-MPC2 "
        "from SimbaV2's repository, the rest their authors'."
    )
    return table_with_note(table, f"{note}: {fmt.made_with(rows)} {origin} {dm_control}")


def means(runs: list[list[dict]], first: int) -> list[float]:
    """Of each run's returns from evaluation first on."""
    return [statistics.fmean(float(row["return_mean"]) for row in rows[first:]) for rows in runs]


def beside_same_critic(path: Path) -> str:
    """FPMD+ against SAC with its critic: whole runs and their ends, which one evaluation blurs."""
    runs, finished, table = defaultdict(list), defaultdict(lambda: defaultdict(list)), []
    for row in beside_sac(path):
        runs[row["env_id"], method_of(row), row["seed"]].append(row)
    for (env_id, method, _), rows in runs.items():
        if rows[-1]["global_step"] == rows[-1]["total_timesteps"]:
            finished[env_id][method].append(rows)
    for env_id, own in finished.items():
        ours, theirs = (own[method] for method in COMPARED)
        if not ours or not theirs:
            continue
        clock = statistics.fmean(float(rows[-1]["wall_time"]) for rows in theirs)
        by_then = [[row for row in rows if float(row["wall_time"]) <= clock] for rows in ours]
        measures = {
            "all evaluations": (means(ours, 0), means(theirs, 0)),
            f"the last {LAST}": (means(ours, -LAST), means(theirs, -LAST)),
            "the last when SAC ends": (means(by_then, -1), means(theirs, -1)),
        }
        for measure, pair in measures.items():
            line = {"task": env_id, "mean of": measure}
            for method, values in zip(COMPARED, pair, strict=True):
                line[method] = f"{fmt.across_seeds(values)} ({len(values)})"
            table.append(line | {"difference": fmt.unpaired(*pair)})
    note = (
        "Returns of one step (SAC: the mean action). ± Student's 95% interval over the seeds in "
        "brackets; of a difference Welch's, bold where it excludes zero. For some 5,000 updates "
        "SAC has an entropy bonus that [the atoms cannot hold](baselines.md#sac). When SAC ends: "
        "after its runs' mean minutes; cores were shared, so these vary by a third."
    )
    return table_with_note(table, note)


def constraint(path: Path) -> str:
    """Errors of the mean velocity on the 1-D flow whose mean velocity is known."""
    rows, table = fmt.read(path), []
    for ivc_coef in sorted({float(row["ivc_coef"]) for row in rows}):
        own = [row for row in rows if float(row["ivc_coef"]) == ivc_coef]
        line = {"lambda": f"{ivc_coef:g}", "seeds": len(own)}
        for key, title in ("boundary_error", "u(z, t, t)"), ("jump_error", "jump u(e, 0, 1)"):
            values = [float(row[key]) for row in own]
            line[title] = f"{statistics.fmean(values):.3f} ± {interval(values):.3f}"
        table.append(line)
    updates = fmt.joined_numbers({int(row["updates"]) for row in rows})
    note = (
        f"Root mean square errors after {updates} updates, ± Student's 95% interval over seeds. "
        "Velocities and actions are of the order of 1."
    )
    return table_with_note(table, note)


def reference_policies(path: Path) -> str:
    rows, table = fmt.read(path), {}
    for row in rows:
        entry = table.setdefault(row["env_id"], {"environment": row["env_id"]})
        name = {"random": "random", "zero": "zero action"}[row["policy"]]
        spread = fmt.number(float(row["return_std"]))
        entry[name] = f"{fmt.number(float(row['return_mean']))} ± {spread}"
    note = (
        f"Mean ± standard deviation over {fmt.joined(rows, 'episodes')} episodes; mujoco "
        f"{fmt.joined(rows, 'mujoco')}, gymnasium {fmt.joined(rows, 'gymnasium')}."
    )
    return table_with_note(list(table.values()), note)


def published(path: Path) -> str:
    table = []
    for row in fmt.read(path):
        spread = f" ± {fmt.number(float(row['return_std']))}" if row["return_std"] else ""
        entry = {"method": row["method"], "environment": row["env"]}
        entry |= {"return": fmt.number(float(row["return_mean"])) + spread}
        entry |= {"statistic": row["statistic"], "steps": fmt.steps_of(row)}
        entry |= {"seeds": row["seeds"] or "?", "NFE": row["nfe"] or "-"}
        table.append(entry | {"source": row["source"], "trust": row["trust"]})
    return fmt.markdown(table)
