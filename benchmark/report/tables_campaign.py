"""Tables and sentences of a campaign."""

import math
import statistics
from benchmark.report import formatting as fmt
from benchmark.report.campaign import (
    ALGORITHMS,
    ONE_STEP,
    algorithms_of,
    beats,
    blocks,
    both_modes,
    comparisons,
    finals,
    load,
    mode_name,
    published_numbers,
    runs,
    scale,
    scores,
    tasks_of,
)
from benchmark.report.formatting import table_with_note
from benchmark.report.intervals import (
    LAST,
    RESAMPLES,
    best,
    bootstrap,
    common_step,
    final,
    interquartile_mean,
    interval,
    verdict,
)
from itertools import product
from pathlib import Path

import numpy as np

VERDICTS = {  # campaign.verdict's, in the order of a sentence, and as it says them
    "better": "better",
    "worse": "**worse**",
    "not distinguishable": "not distinguishable",
    "one seed": "without an interval, from one seed,",
    "not evaluated": "not evaluated by then",
}


def protocol_of(row: dict) -> str:
    """Of a published number."""
    parts = [row["statistic"], f"{fmt.steps_of(row)} steps", f"{row['seeds'] or '?'} seeds"]
    parts += [f"NFE {row['nfe']}"] * bool(row["nfe"])
    return ", ".join(parts)


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
            lines.append(line | {"hardware": fmt.hardware(rows), "commit": fmt.commits(rows)})
    episodes = {len(c.last_row["returns"].split()) for found in curves.values() for c in found}
    return table_with_note(lines, f"Evaluations of {fmt.joined_numbers(episodes)} episodes.")


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
            lines[name][env_id] = fmt.across_seeds(list(values))
    seeds = {len(found) for found in curves.values()}
    note = (
        f"The mean of the last {LAST} evaluations up to step "
        f"{' or '.join(f'{step:,.0f}' for step in sorted(steps))}, {fmt.joined_numbers(seeds)} "
        f"seed{'s' * (seeds != {1})}, ± Student's 95% interval. Evaluations: of the policy's "
        "network, for an action. A hyphen: not run."
    )
    return table_with_note(list(lines.values()), note)


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
            line["hours"] = fmt.hours(statistics.fmean(curve.seconds[-1] for curve in found))
            line["last five"] = fmt.across_seeds(list(final(found)))
            line["best"] = fmt.across_seeds(list(best(found)))
            row = published_numbers(env_id, algorithm)
            if row is None or mode != ALGORITHMS[algorithm].modes[0]:
                table.append(line | {"published": "-", "its protocol": "-"})
                continue
            spread = f" ± {fmt.number(float(row['return_std']))} (std)" if row["return_std"] else ""
            line["published"] = fmt.number(float(row["return_mean"])) + spread
            table.append(line | {"its protocol": f"{row['method']}: {protocol_of(row)}"})
    note = (
        f"*Last five*: mean of the last {LAST} evaluations. *Best*: the best evaluation of a run. "
        "Both ± Student's 95% interval of the mean over seeds, none for one seed."
    )
    note += " Where no run is finished, all are cut at their last common step." * waiting
    return table_with_note(table, note)


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
        line["one step"] = fmt.across_seeds(list(final(one, step)))
        if any(key[2] == "one_candidate" for key in curves):
            single = curves.get((env_id, algorithm, "one_candidate"))
            line["one candidate"] = fmt.across_seeds(list(final(single, step))) if single else "-"
        line["best of N"] = fmt.across_seeds(list(final(many, step)))
        ends = difference.mean(), interval(difference)
        table.append(
            line | {"one step - best of N": fmt.signed(*ends), "one step is": verdict(*ends)}
        )
        words.append(verdict(*ends))
    if not table:
        return "No runs yet."
    note = (
        "Last five evaluations. Both policies are the same network of the same run, so the "
        "difference is taken seed by seed, ± Student's 95% interval. One step is "
        f"{counted(words)} of {len(words)} cases."
    )
    return table_with_note(table, note)


def counted(words: list[str]) -> str:
    """better in 2, worse in 1, not distinguishable in 4."""
    said = {"one seed": "without a verdict"}
    found = [word for word in VERDICTS if word in words]
    return fmt.listed([f"{said.get(word, word)} in {words.count(word)}" for word in found])


def sentence(title: str, results: list[tuple[str, tuple[float, float], str]]) -> str:
    """What (task, difference and half width, where) come to, sorted by verdict."""
    places = {where for _, _, where in results}
    if len(places) == 1:
        title += f" ({places.pop()})"
    by_word = {word: [] for word in VERDICTS}
    for env_id, result, where in results:
        numbers = [] if math.isnan(result[0]) else [fmt.signed(*result)]
        numbers += [where] * bool(places)  # still there, so they differ
        by_word[verdict(*result)].append(f"{env_id} ({', '.join(numbers)})" if numbers else env_id)
    parts = [f"{VERDICTS[word]} on {fmt.listed(found)}" for word, found in by_word.items() if found]
    return f"{title}: {'; '.join(parts)}."


def standing(path: Path) -> str:
    """In words: where each one-step policy stands, at equal steps and at equal wall time."""
    curves, lines = load(path), []
    for (algorithm, baseline), found in comparisons(curves).items():
        names = ALGORITHMS[algorithm].name, ALGORITHMS[baseline].name
        at_step = [(e, c.at_step, f"{c.step:,.0f}") for e, c in found.items()]
        at_time = [(e, c.at_time, fmt.duration(c.seconds)) for e, c in found.items()]
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
                (fmt.duration(comparison.seconds), "at equal wall time", comparison.at_time),
            ):
                line["steps" if title == "at equal steps" else "wall time"] = where
                line[title] = "-" if math.isnan(result[0]) else fmt.signed(*result)
                line[f"{title} it is"] = verdict(*result)
            table.append(line)
    if not table:
        return "No runs of a one-step policy and a baseline on the same task yet."
    note = (
        f"Difference of means over seeds, ± Welch's 95% interval. At equal steps: the last {LAST} "
        "evaluations up to the last step that all runs of both reached; at equal wall time: the "
        "last fifth of the time up to the last one that all reached."
    )
    return table_with_note(table, note)


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
                line["IQM"] = fmt.bracketed(interquartile_mean(own), ends)
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
    return table_with_note(table, note)


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
    return table_with_note(table, note)
