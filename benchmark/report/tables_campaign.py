"""Tables and figures of a campaign and of the latency measurement; report.py puts them in place.

Nothing here is a statistic (campaign.py) and nothing fails because a campaign is young: tasks,
algorithms and seeds that are missing have no row or no interval, and a CSV that is missing says so.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
from campaign import (
    LAST,
    RESAMPLES,
    Comparison,
    Curve,
    Scores,
    best,
    bootstrap,
    common_step,
    compare,
    final,
    interquartile_mean,
    interval,
    mean_curve,
    performance_profile,
    probability_of_improvement,
    read_curves,
    verdict,
)
from formatting import (
    FIGURES,
    RESULTS,
    ROOT,
    across_seeds,
    commits,
    digits,
    hardware,
    hours,
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


@dataclass
class Algorithm:
    name: str
    colour: str  # of Okabe and Ito's, which colour-blind readers can tell apart
    modes: tuple[str, ...]  # those of the table per task; the first one everywhere else
    published: tuple[str, ...]  # its methods in published_results.csv, the closest first


VARIANT = "FPMD (variant not named)"
ALGORITHMS = {
    "fpmd_online": Algorithm("FPMD-R", "#0072B2", ("one_step",), ("FPMD-R", VARIANT)),
    "fpmd_meanflow_online": Algorithm("FPMD-M", "#D55E00", ("one_step",), ("FPMD-M", VARIANT)),
    "mvp_online": Algorithm("MVP", "#009E73", ("one_step",), ("MVP",)),
    "sac_online": Algorithm("SAC", "#000000", ("one_step", "sampled"), ("SAC",)),
    "dpmd_online": Algorithm(
        "DPMD", "#CC79A7", ("best_of_n", "one_candidate"), ("DPMD/SDAC", "DPMD")
    ),
}
ONE_STEP = "fpmd_online", "fpmd_meanflow_online", "mvp_online"
BASELINES = "sac_online", "dpmd_online"
MODES = {"one_step": "one step", "best_of_n": "best of N", "one_candidate": "one candidate"}
MODES |= {"sampled": "sampled action"}
VERDICTS = {  # campaign.verdict's, in the order of a sentence, and as it says them
    "better": "better",
    "worse": "**worse**",
    "not distinguishable": "not distinguishable",
    "one seed": "without an interval, from one seed,",
    "not evaluated": "not evaluated by then",
}
Curves = dict[tuple[str, str, str], list[Curve]]


# ---------------------------------------------------------------------------- what there is
@cache
def load(path: Path) -> Curves:
    try:
        curves = read_curves(read(path))
    except ValueError as error:
        sys.exit(f"report.py: error: {path.name} has {error}")
    if unknown := {algorithm for _, algorithm, _ in curves} - set(ALGORITHMS):
        sys.exit(f"report.py: error: campaign_report.py's ALGORITHMS lacks {', '.join(unknown)}")
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


# ---------------------------------------------------------------------------- words
def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"


def signed(difference: float, half_width: float) -> str:
    """+120 ± 45; without an interval if there is none."""
    text = "+" * int(difference > 0) + number(difference)
    return text if math.isnan(half_width) else f"{text} ± {number(half_width)}"


def bracketed(value: float, ends: np.ndarray) -> str:
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def protocol_of(row: dict) -> str:
    """Of a published number."""
    parts = [row["statistic"], f"{steps_of(row)} steps", f"{row['seeds'] or '?'} seeds"]
    parts += [f"NFE {row['nfe']}"] * bool(row["nfe"])
    return ", ".join(parts)


# ---------------------------------------------------------------------------- tables
def protocol(path: Path) -> str:
    """What ran: a row per algorithm and setting."""
    curves, table = load(path), {}
    for (env_id, algorithm, mode), found in sorted(curves.items()):
        if mode == ALGORITHMS[algorithm].modes[0]:
            rows = [curve.last_row for curve in found]
            acting = curves.get((env_id, algorithm, "best_of_n"), found)[0].last_row
            key = algorithm, rows[0]["flags"], rows[0]["total_timesteps"], rows[0]["utd"]
            case = table.setdefault(key, {"tasks": {}, "rows": [], "acting": acting})
            case["tasks"][env_id] = len(found)
            case["rows"] += rows
    lines = []
    for name in algorithms_of(curves):
        for (algorithm, flags, planned, utd), case in table.items():
            if algorithm != name:
                continue
            acting, rows = case["acting"], case["rows"]
            several = acting["mode"] == "best_of_n"
            sizes = f"{acting['num_candidates']}, {acting['nfe']}" if several else "-"
            line = {
                "algorithm": ALGORITHMS[name].name,
                "judged by": mode_name(name, rows[0]["mode"]),
            }
            line |= {"N, T": sizes, "UTD": utd, "steps": f"{int(planned):,}"}
            seeds = [f"{env_id} ({count})" for env_id, count in case["tasks"].items()]
            line |= {"tasks (seeds)": ", ".join(seeds), "flags": f"`{flags}`" if flags else "-"}
            lines.append(line | {"hardware": hardware(rows), "commit": commits(rows)})
    episodes = {len(c.last_row["returns"].split()) for found in curves.values() for c in found}
    return f"{markdown(lines)}\n\nEvaluations of {joined_numbers(episodes)} episodes."


def overview(path: Path) -> str:
    """A row per algorithm with its final returns on each task, at equal steps, and what it cost."""
    curves = load(path)
    lines, steps = {}, set()
    for name in algorithms_of(curves):
        own = [curve for env_id in tasks_of(curves) for curve in runs(curves, env_id, name)]
        row, style = own[0].last_row, ALGORITHMS[name]
        lines[name] = {"algorithm": style.name, "policy": mode_name(name, style.modes[0])}
        lines[name]["evaluations an action"] = int(row["nfe"]) * int(row["num_candidates"])
        lines[name] |= dict.fromkeys(tasks_of(curves), "-")
        minutes = statistics.fmean(curve.seconds[-1] for curve in own) / 60
        lines[name]["minutes a run"] = f"{minutes:,.0f}"
    for env_id in tasks_of(curves):
        there = [name for name in lines if runs(curves, env_id, name)]
        step, returns = finals(curves, there, env_id)
        steps.add(step)
        for name, values in zip(there, returns, strict=True):
            lines[name][env_id] = across_seeds(list(values))
    seeds = {len(found) for found in curves.values()}
    note = (
        f"The mean of the last {LAST} evaluations up to step "
        f"{' or '.join(f'{step:,.0f}' for step in sorted(steps))}, {joined_numbers(seeds)} "
        f"seed{'s' * (seeds != {1})}, ± Student's 95% interval. Evaluations: of the policy's "
        "network, for an action. A hyphen: not run."
    )
    return f"{markdown(list(lines.values()))}\n\n{note}"


def per_task(path: Path) -> str:
    """Final and best returns of every algorithm on every task, published ones beside them."""
    curves, table, waiting = load(path), [], False
    for env_id, algorithm in product(tasks_of(curves), algorithms_of(curves)):
        for mode in ALGORITHMS[algorithm].modes:
            if not (found := curves.get((env_id, algorithm, mode))):
                continue
            end = min((curve.last_row for curve in found), key=lambda r: int(r["global_step"]))
            steps, planned = int(common_step(found)), int(end["total_timesteps"])
            finished = all(curve.finished for curve in found)
            waiting |= not finished
            line = {"environment": env_id, "algorithm": ALGORITHMS[algorithm].name}
            line |= {"policy": mode_name(algorithm, mode), "seeds": len(found)}
            line |= {"steps": f"{steps:,}" if finished else f"{steps:,} of {planned:,}"}
            line |= {"updates": f"{int(end['updates']):,}"}
            line["hours"] = hours(statistics.fmean(curve.seconds[-1] for curve in found))
            line["last five"] = across_seeds(list(final(found)))
            line["best"] = across_seeds(list(best(found)))
            row = published_numbers(env_id, algorithm)
            if row is None or mode != ALGORITHMS[algorithm].modes[0]:
                table.append(line | {"published": "-", "its protocol": "-"})
                continue
            spread = f" ± {number(float(row['return_std']))} (std)" if row["return_std"] else ""
            line["published"] = number(float(row["return_mean"])) + spread
            table.append(line | {"its protocol": f"{row['method']}: {protocol_of(row)}"})
    note = (
        f"*Last five*: mean of the last {LAST} evaluations. *Best*: the best evaluation of a run. "
        "Both ± Student's 95% interval of the mean over seeds, none for one seed."
    )
    note += " Where no run is finished, all are cut at their last common step." * waiting
    return f"{markdown(table)}\n\n{note}"


def one_step_against_n(path: Path) -> str:
    """The deployed policy against the rule that collects data, in the same runs."""
    curves, table, words = load(path), [], []
    for env_id, algorithm in product(tasks_of(curves), algorithms_of(curves)):
        if not (pair := both_modes(curves, env_id, algorithm)):
            continue
        one, many, step = pair
        difference = final(one, step) - final(many, step)
        size = many[0].last_row
        line = {"environment": env_id, "algorithm": ALGORITHMS[algorithm].name}
        line |= {"N, T": f"{size['num_candidates']}, {size['nfe']}", "seeds": len(one)}
        line["one step"] = across_seeds(list(final(one, step)))
        if any(key[2] == "one_candidate" for key in curves):
            single = curves.get((env_id, algorithm, "one_candidate"))
            line["one candidate"] = across_seeds(list(final(single, step))) if single else "-"
        line["best of N"] = across_seeds(list(final(many, step)))
        ends = difference.mean(), interval(difference)
        table.append(line | {"one step - best of N": signed(*ends), "one step is": verdict(*ends)})
        words.append(verdict(*ends))
    if not table:
        return "No runs yet."
    note = (
        "Last five evaluations. Both policies are the same network of the same run, so the "
        "difference is taken seed by seed, ± Student's 95% interval. One step is "
        f"{counted(words)} of {len(words)} cases."
    )
    return f"{markdown(table)}\n\n{note}"


def counted(words: list[str]) -> str:
    """better in 2, worse in 1, not distinguishable in 4."""
    said = {"one seed": "without a verdict"}
    found = [word for word in VERDICTS if word in words]
    return listed([f"{said.get(word, word)} in {words.count(word)}" for word in found])


def comparisons(curves: Curves) -> dict[tuple[str, str], dict[str, Comparison]]:
    """{(one-step policy, baseline): {env_id: comparison}}, where both have runs."""
    found = {}
    for algorithm, baseline in product(ONE_STEP, BASELINES):
        pairs = {e: [runs(curves, e, x) for x in (algorithm, baseline)] for e in tasks_of(curves)}
        if pairs := {env_id: compare(*pair) for env_id, pair in pairs.items() if all(pair)}:
            found[algorithm, baseline] = pairs
    return found


def sentence(title: str, results: list[tuple[str, tuple[float, float], str]]) -> str:
    """What (task, difference and half width, where) come to, sorted by verdict."""
    places = {where for _, _, where in results}
    if len(places) == 1:
        title += f" ({places.pop()})"
    by_word = {word: [] for word in VERDICTS}
    for env_id, result, where in results:
        numbers = [] if math.isnan(result[0]) else [signed(*result)]
        numbers += [where] * bool(places)  # still there, so they differ
        by_word[verdict(*result)].append(f"{env_id} ({', '.join(numbers)})" if numbers else env_id)
    parts = [f"{VERDICTS[word]} on {listed(found)}" for word, found in by_word.items() if found]
    return f"{title}: {'; '.join(parts)}."


def standing(path: Path) -> str:
    """In words: where each one-step policy stands, at equal steps and at equal wall time."""
    curves, lines = load(path), []
    for (algorithm, baseline), found in comparisons(curves).items():
        names = ALGORITHMS[algorithm].name, ALGORITHMS[baseline].name
        at_step = [(e, c.at_step, f"{c.step:,.0f}") for e, c in found.items()]
        at_time = [(e, c.at_time, duration(c.seconds)) for e, c in found.items()]
        sentences = [f"**{names[0]} against {names[1]}.**", sentence("At equal steps", at_step)]
        sentences.append(sentence("At equal wall time", at_time))
        probability, tasks = beats(curves, algorithm, baseline)
        sentences.append(
            f"A run of {names[0]} ends above one of {names[1]} with probability {probability} "
            f"over {tasks} task{'s' * (tasks > 1)}."
        )
        lines.append(f"- {' '.join(sentences)}")
    return "\n".join(lines) or "No runs of a one-step policy and a baseline on the same task yet."


def differences(path: Path) -> str:
    """The numbers behind the words, a row per task and pair."""
    curves, table = load(path), []
    found = comparisons(curves)
    for env_id in tasks_of(curves):
        for (algorithm, baseline), tasks in found.items():
            if env_id not in tasks:
                continue
            comparison = tasks[env_id]
            seeds = [str(len(runs(curves, env_id, name))) for name in (algorithm, baseline)]
            line = {"environment": env_id, "policy": ALGORITHMS[algorithm].name}
            line |= {"against": ALGORITHMS[baseline].name, "seeds": " and ".join(seeds)}
            for where, title, result in (
                (f"{comparison.step:,.0f}", "at equal steps", comparison.at_step),
                (duration(comparison.seconds), "at equal wall time", comparison.at_time),
            ):
                line["steps" if title == "at equal steps" else "wall time"] = where
                line[title] = "-" if math.isnan(result[0]) else signed(*result)
                line[f"{title} it is"] = verdict(*result)
            table.append(line)
    if not table:
        return "No runs of a one-step policy and a baseline on the same task yet."
    note = (
        f"Difference of means over seeds, ± Welch's 95% interval. At equal steps: the last {LAST} "
        "evaluations up to the last step that all runs of both reached; at equal wall time: the "
        "last fifth of the time up to the last one that all reached."
    )
    return f"{markdown(table)}\n\n{note}"


def across_tasks(path: Path) -> str:
    """IQM and mean of normalised final returns."""
    curves, table = load(path), []
    for env_ids, algorithms in blocks(curves):
        steps = {finals(curves, algorithms, env_id)[0] for env_id in env_ids}
        for algorithm, own in scores(curves, algorithms, env_ids).items():
            line = {"tasks": len(env_ids), "algorithm": ALGORITHMS[algorithm].name}
            line["steps"] = " or ".join(f"{step:,.0f}" for step in sorted(steps))
            line["runs"] = sum(map(len, own))
            if any(len(task) > 1 for task in own):
                ends = bootstrap(interquartile_mean, own)
                line["IQM"] = bracketed(interquartile_mean(own), ends)
            else:
                line["IQM"] = f"{interquartile_mean(own):.2f}"
            table.append(line | {"mean": f"{np.mean([task.mean() for task in own]):.2f}"})
    if not table:
        return "No task with a scale that all algorithms have run on yet."
    counts = " and ".join(f"{len(tasks)}: {', '.join(tasks)}" for tasks, _ in blocks(curves))
    unscaled = [env_id for env_id in tasks_of(curves) if not scale(env_id)]
    note = f"Tasks: {counts}; on each, all up to the last step that all their runs have reached."
    if unscaled:
        note += f" Without a published SAC return, so not counted: {', '.join(unscaled)}."
    note += f" In brackets the 95% interval of {RESAMPLES:,} stratified bootstrap samples."
    return f"{markdown(table)}\n\n{note}"


def improvement(path: Path) -> str:
    """Probability of improvement of every one-step policy over every baseline and each other."""
    curves, table = load(path), []
    names = algorithms_of(curves)
    for algorithm in [name for name in names if name in ONE_STEP]:
        line = {"P(row beats column)": ALGORITHMS[algorithm].name}
        for other in names:
            found = None if other == algorithm else beats(curves, algorithm, other)
            cell = f"{found[0]}, {found[1]}" if found else "-"
            line[ALGORITHMS[other].name] = cell
        table.append(line)
    if not table:
        return "No runs yet."
    note = (
        "At the last step that both have reached on a task. In brackets the bootstrap's 95% "
        "interval, then the number of tasks that both have run."
    )
    return f"{markdown(table)}\n\n{note}"


# ---------------------------------------------------------------------------- latency
def latency(path: Path) -> str:
    """Milliseconds per action, a row per policy and batch; ratios to a sampled SAC action."""
    rows, table = read(path), []
    by = {(r["batch"], r["policy"], r["steps"], r["mode"]): r for r in rows}
    modes = dict.fromkeys(row["mode"] for row in rows)
    names = {"SAC, sampled": "a sampled SAC action", "SAC": "SAC's mean action"}
    policies = {row["policy"] for row in rows}
    standard = next((name for name in names if name in policies), None)
    cases = dict.fromkeys((row["batch"], row["policy"], row["steps"]) for row in rows)
    for batch, policy, steps in sorted(cases, key=lambda case: int(case[0])):
        line = {"actions at once": batch, "policy": policy, "network evaluations": steps}
        for mode in modes:
            row = by.get((batch, policy, steps, mode))
            kinds = "median", "mean", "p99"
            cells = [digits(float(row[f"{kind}_ms"])) if row else "-" for kind in kinds]
            line |= {f"{mode}: {kind}": cell for kind, cell in zip(kinds, cells, strict=True)}
            reference = by.get((batch, standard, "1", mode))
            known = row and reference
            ratio = float(row["median_ms"]) / float(reference["median_ms"]) if known else math.nan
            line[f"{mode}: against SAC"] = f"{ratio:.2f} x" if known else "-"
        table.append(line)
    first = rows[0]
    note = (
        "Milliseconds of a call, from an observation on the device to actions on the CPU; ratios "
        f"of medians to {names.get(standard, 'SAC')}. Interleaved rounds of one run, "
        f"{first['calls']} calls each, Ant-v4's sizes. {first['hardware']}, {first['threads']} "
        f"thread{'s' * (first['threads'] != '1')}, torch {first['torch']}, commit {commits(rows)}."
    )
    return f"{markdown(table)}\n\n{note}"


def draw_latency(path: Path, output: Path) -> None:
    """Bars of the median, a panel per batch size, the 99th percentile as a tick."""
    rows, plt = read(path), pyplot()
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    cases = list(dict.fromkeys((row["policy"], row["steps"]) for row in rows))
    modes = [m for m in ("eager", "compiled", "captured") if any(r["mode"] == m for r in rows)]
    size = 8, 0.8 + 0.44 * len(cases)
    figure, panels = plt.subplots(1, len(batches), figsize=size, squeeze=False, sharey=True,
                                  layout="constrained")  # fmt: skip
    colours = {a.name: a.colour for a in ALGORITHMS.values()}
    for panel, batch in zip(panels[0], batches, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        low = min(float(row["median_ms"]) for row in own)
        high = max(float(row["p99_ms"]) for row in own)
        left = 10 ** math.floor(math.log10(low / 1.5))
        for row in own:
            place = cases.index((row["policy"], row["steps"]))
            offset = 0.4 * (modes.index(row["mode"]) - (len(modes) - 1) / 2)
            colour, ms = colours[row["policy"].split(",")[0]], float(row["median_ms"])
            full = row["mode"] == modes[-1]
            style = {"color": colour, "alpha": 1.0 if full else 0.45, "height": 0.36, "lw": 0}
            panel.barh(place + offset, ms - left, left=left, **style)
            panel.plot(float(row["p99_ms"]), place + offset, "|", color="0.35", ms=7)
            words = f"{row['mode']} " if place == 0 and len(modes) > 1 else ""
            x = max(float(row["p99_ms"]), ms)
            offset_points = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            text = f"{digits(ms)} ms" + f" {words}".rstrip()
            panel.annotate(text, (x, place + offset), (5, -0.5), **offset_points)
        panel.set_xscale("log")
        panel.set_xlim(left, high * (high / left) ** 0.45)
        panel.set_yticks(range(len(cases)))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.set_xlabel("milliseconds, logarithmic")
        title = "one action" if batch == "1" else f"{batch} actions at once"
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0][0].invert_yaxis()
    labels = [p + (f", {steps} steps" if steps != "1" else "") for p, steps in cases]
    panels[0][0].set_yticklabels(labels)
    save(figure, output)
    plt.close(figure)


# ---------------------------------------------------------------------------- figures
def grid_of_panels(plt, count: int, height: float, **kwargs):
    """A figure as wide as a README, and its panels, three in a row if there are that many."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = 8 if columns > 1 else 5, height * rows
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False,
                                  layout="constrained", **kwargs)  # fmt: skip
    for panel in panels.flat[count:]:
        panel.remove()
    return figure, panels.flat[:count]


FEW = 5  # seeds that are drawn one by one


def draw_curves(path: Path, output: Path, against: str = "steps") -> None:
    """A panel per task: every algorithm's mean over seeds, and thinner each seed.

    With more than FEW seeds Student's interval takes the seeds' place, as a band.
    """
    curves, plt, reference = load(path), pyplot(), references()
    env_ids = tasks_of(curves)
    figure, panels = grid_of_panels(plt, len(env_ids), 2.5)
    unit, label = 1, "environment steps"
    if against == "seconds":
        longest = max(curve.seconds[-1] for found in curves.values() for curve in found)
        unit, label = (3600, "hours") if longest >= 3600 else (60, "minutes")
    for panel, env_id in zip(panels, env_ids, strict=True):
        labels, seen, end = [], [], 0.0  # (height, text, colour) beside the right end
        drawn = []
        for algorithm in algorithms_of(curves):
            if not (found := runs(curves, env_id, algorithm)):
                continue
            x, values = mean_curve(found, against)
            if not len(x):
                continue
            mean, style = values.mean(0), ALGORITHMS[algorithm]
            x = x / unit
            dashes = "-" if algorithm in ONE_STEP else (0, (4, 1.2))
            panel.plot(x, mean, color=style.colour, lw=1.8, ls=dashes, zorder=3)
            if 1 < len(found) <= FEW:
                thin = {"color": style.colour, "lw": 0.6, "alpha": 0.5, "ls": dashes, "zorder": 2}
                panel.plot(x, values.T, **thin)
            elif len(found) > 1:
                half = np.array([interval(at) for at in values.T])
                band = {"color": style.colour, "alpha": 0.1, "lw": 0, "zorder": 1}
                panel.fill_between(x, mean - half, mean + half, **band)
            seen += [values.min(), values.max()]
            end = max(end, x[-1])
            drawn.append((x[-1], mean[-1], style.colour))
            seeds = f" ({len(found)})" if len(found) != most_seeds(curves) else ""
            labels.append((mean[-1], style.name + seeds, style.colour))
        for policy, text in ("random", "random"), ("zero", "zero action"):
            if (env_id, policy) in reference:
                height = reference[env_id, policy]
                panel.axhline(height, color="0.5", ls=":", lw=1, zorder=0)
                labels.append((height, text, "0.4"))
                seen.append(height)
        low, high = min(seen), max(seen)
        low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
        panel.set_ylim(low, high)  # of the runs: a band may leave it
        panel.set_xlim(0, end)
        for x, height, colour in drawn:
            panel.plot(x, height, "o", color=colour, ms=3, clip_on=False, zorder=4)
            if x < 0.97 * end:  # it stopped earlier: lead the eye to its label
                panel.plot((x, end), (height, height), color=colour, lw=0.5, ls=(0, (1, 3)))
        label_ends(panel, labels, 0.085 * (high - low), 1.03, fontsize=8)
        panel.set_title(env_id, fontsize=9, loc="left")
        panel.xaxis.set_major_locator(plt.MaxNLocator(4))
        if against == "steps":
            panel.xaxis.set_major_formatter(thousands)
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", color="0.93")
        panel.set_axisbelow(True)
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("evaluation return", fontsize=9)
    save(figure, output)
    plt.close(figure)


def most_seeds(curves: Curves) -> int:
    return max(map(len, curves.values()))


def draw_across_tasks(path: Path, output: Path) -> None:
    """IQM with intervals on the left, performance profiles in the same colours on the right."""
    curves, plt = load(path), pyplot()
    found = [block for block in blocks(curves) if len(block[1]) > 1] or blocks(curves)
    if not found:
        print(f"{output.name} left out: no task with a scale that all algorithms have run on")
        return
    env_ids, algorithms = found[0]
    own = scores(curves, algorithms, env_ids)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8, 2.9), layout="constrained", width_ratios=(1, 1.4)
    )
    everything = np.concatenate([task for scored in own.values() for task in scored])
    low, high = min(0.0, everything.min()), everything.max()
    thresholds = np.linspace(low - 0.02, high + 0.03 * (high - low), 301)
    for i, (name, scored) in enumerate(own.items()):
        style = ALGORITHMS[name]
        value, ends = interquartile_mean(scored), bootstrap(interquartile_mean, scored)
        left.plot(ends, (i, i), color=style.colour, lw=5, alpha=0.3, solid_capstyle="butt")
        left.plot(value, i, "o", color=style.colour, ms=6)
        beside = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        left.annotate(f"{value:.2f}", (value, i), (0, 6), color=style.colour, **beside)
        share = performance_profile(scored, thresholds)
        band = bootstrap(lambda s: performance_profile(s, thresholds), scored, resamples=500)
        dashes = "-" if name in ONE_STEP else (0, (4, 1.2))
        right.plot(thresholds, share, color=style.colour, lw=1.5, ls=dashes)
        right.fill_between(thresholds, *band, color=style.colour, alpha=0.12, lw=0)
    left.set_yticks(range(len(own)), [ALGORITHMS[name].name for name in own])
    for label, name in zip(left.get_yticklabels(), own, strict=True):
        label.set_color(ALGORITHMS[name].colour)
    left.set_ylim(len(own) - 0.5, -0.7)
    left.set_xlim(min(0, left.get_xlim()[0]))
    left.set_xlabel("interquartile mean of scores")
    left.grid(axis="x", color="0.93")
    left.spines["left"].set_visible(False)
    left.tick_params(axis="y", length=0)
    right.set_xlabel("score: 0 random, 1 SAC's published at 1M steps")
    right.set_ylabel("share of runs above it")
    right.set_ylim(0, 1.02)
    right.set_xlim(thresholds[0], thresholds[-1])
    title = f"{len(env_ids)} task{'s' * (len(env_ids) > 1)}"
    if absent := [ALGORITHMS[name].name for name in algorithms_of(curves) if name not in own]:
        title += f", {listed(absent)} not on all of them"
    left.set_title(title, fontsize=9, loc="left")
    save(figure, output)
    plt.close(figure)


def draw_one_step_against_n(path: Path, output: Path) -> None:
    """A panel per task: one step minus best of N, seed by seed, with Student's interval.

    DPMD is in the table alone: it was not made for one step, and its loss would be the scale.
    """
    curves, plt = load(path), pyplot()
    pairs = {}
    for env_id, algorithm in product(tasks_of(curves), ONE_STEP):
        if pair := both_modes(curves, env_id, algorithm):
            one, many, step = pair
            pairs.setdefault(env_id, {})[algorithm] = final(one, step) - final(many, step)
    if not pairs:
        print(f"{output.name} left out: no runs with both policies")
        return
    height = 0.7 + 0.27 * max(map(len, pairs.values()))
    figure, panels = grid_of_panels(plt, len(pairs), height)
    for panel, (env_id, own) in zip(panels, pairs.items(), strict=True):
        panel.axvline(0, color="0.6", lw=1, zorder=0)
        for i, (name, values) in enumerate(own.items()):
            colour, half = ALGORITHMS[name].colour, interval(values)
            if not math.isnan(half):
                ends = values.mean() - half, values.mean() + half
                panel.plot(ends, (i, i), color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
            panel.plot(values, [i] * len(values), "|", color=colour, ms=7)
            panel.plot(values.mean(), i, "o", color=colour, ms=5)
        panel.set_yticks(range(len(own)), [ALGORITHMS[name].name for name in own])
        for label, name in zip(panel.get_yticklabels(), own, strict=True):
            label.set_color(ALGORITHMS[name].colour)
        panel.set_ylim(len(own) - 0.5, -0.5)
        panel.set_title(env_id, fontsize=9, loc="left")
        panel.xaxis.set_major_locator(plt.MaxNLocator(4))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:+,g}" if x else "0")
        panel.tick_params(axis="y", length=0)
        panel.tick_params(labelsize=8)
        panel.spines["left"].set_visible(False)
    figure.supxlabel("return of one step minus best of N", fontsize=9)
    save(figure, output)
    plt.close(figure)


# ---------------------------------------------------------------------------- what report.py asks
def or_not_yet(build: Callable[[Path], str], text: str) -> Callable[[Path], str]:
    return lambda path: build(path) if path.exists() else text


def image(alt: str, name: str) -> Callable[[Path], str]:
    """A link from the repository's root; report.py makes it one from the document."""
    link = f"![{alt}]({(FIGURES / name).relative_to(ROOT)})"
    return lambda path: link


TABLES, DRAWINGS = {}, {}  # {name: (what writes it, CSV)}, {figure: (what draws it, CSV)}
for name in "cpu", "pendulum", "cartpole", "cuda":
    source = f"campaign_{name}.csv"
    tables = {
        "overview": overview,
        "protocol": protocol,
        "tasks": per_task,
        "one-step": one_step_against_n,
        "standing": standing,
        "differences": differences,
    }
    figures = {
        "steps": (draw_curves, "Return against steps"),
        "time": (partial(draw_curves, against="seconds"), "Return against wall time"),
    }
    if name in ("cpu", "cuda"):  # several tasks
        tables |= {"across": across_tasks, "improvement": improvement}
        figures["one_step"] = draw_one_step_against_n, "One step minus best of N"
        figures["across"] = draw_across_tasks, "IQM, performance profiles"
    for figure, (draw, alt) in figures.items():
        DRAWINGS[f"campaign_{name}_{figure}.png"] = draw, source
        tables["figure-" + figure.replace("_", "-")] = image(alt, f"campaign_{name}_{figure}.png")
    for table, build in tables.items():
        TABLES[f"campaign-{name}-{table}"] = or_not_yet(build, "No runs yet."), source
for where, machine in ("cpu", "a CPU"), ("cuda", "a GPU"):
    figure, source = f"latency_{where}.png", f"latency_{where}.csv"
    link = image(f"Milliseconds per action on {machine}", figure)
    for table, build in (f"latency-{where}", latency), (f"figure-latency-{where}", link):
        TABLES[table] = or_not_yet(build, "Not measured yet."), source
    DRAWINGS[figure] = draw_latency, source
