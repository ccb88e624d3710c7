"""Tables of what is measured with a clock: speed.py, gpu.py, evaluations, and of bfloat16."""

import math
import statistics
from benchmark.report import formatting as fmt
from benchmark.report.formatting import table_with_note
from collections import defaultdict
from pathlib import Path

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
    updates = [row for row in rows if row["measurement"] == "update"]
    counts = fmt.joined_numbers({int(row["repetitions"]) for row in updates})
    return (
        f"Medians of {counts} interleaved repetitions, Ant-v4's sizes, batch "
        f"{fmt.joined(rows, 'batch_size')}; {fmt.made_with(rows)}"
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
    return ", ".join(f"{text} {fmt.digits(rate)} {unit}" for (text, unit), rate in fastest.items())


def speed(path: Path) -> str:
    rows, table, spreads = fmt.read(path), [], [0.0]
    cases = by_case(rows)
    for (script, n, t, how), case in cases.items():
        sizes = ", ".join(filter(None, (n, t))) or "-"
        line = {"script": f"`{script}`", "N, T": sizes, "computed": how}
        update = case.get("update")
        eager = milliseconds(cases.get((script, n, t, "eager"), {}).get("update"))
        line["update"] = f"{fmt.digits(milliseconds(update))} ms" if update else "-"
        faster = eager / milliseconds(update)
        line["faster than eager"] = times(faster)
        line["over the floor"] = f"{float(update['ratio_to_floor']):.2f} x" if update else "-"
        for name, title in PARTS.items():
            row = case.get(name)
            ratio = f" ({float(row['ratio_to_floor']):.2f})" if row else ""
            line[title] = f"{fmt.digits(milliseconds(row))} ms{ratio}" if row else "-"
        acting, first = case.get("acting"), case.get("first-update")
        line["acting"] = f"{fmt.digits(milliseconds(acting))} ms" if acting else "-"
        line["first update"] = f"{fmt.digits(milliseconds(first) / 1000)} s" if first else "-"
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
        f"{fmt.digits(max(peaks))} MB."
    )
    return table_with_note(table, note)


def speed_of_acting(path: Path) -> str:
    """One-step actions beside a SAC actor's, and what the simulator takes."""
    rows, table = fmt.read(path), []
    sac = [row for row in rows if (row["script"], row["measurement"]) == ("sac", "one-step")]
    for row in rows:
        names = {"one-step": f"`{row['script']}`, one step for one state, as evaluated in training"}
        names["one-step deployed"] = f"`{row['script']}`, the same deployed (`OneStepPolicy`)"
        names["environments"] = "5 Ant-v4, one random step of each"
        if row["script"] == "sac":
            names["one-step"] = "SAC actor of the same width, a sample for one state"
            names["one-step mean"] = "SAC actor of the same width, its mean"
        if name := names.get(row["measurement"]):
            line = {"what": name, "time": f"{fmt.digits(milliseconds(row))} ms"}
            ratio = milliseconds(row) / milliseconds(sac[0]) if sac else math.nan
            line["against SAC"] = times(ratio)
            count = row["multiply_adds"]
            table.append(line | {"multiply-adds": f"{int(count):,}" if count else "-"})
    if not table:
        return "no actions measured"
    note = f"Eager float32, from array to array. {conditions(rows)}"
    return table_with_note(table, note)


def speed_of_variants(path: Path) -> str:
    """Generation in ways that were not kept, against the one that was."""
    rows, lines = fmt.read(path), defaultdict(dict)
    for (_, n, t, how), case in by_case(rows).items():
        for name, label in VARIANTS.items():
            if row := case.get(f"generation, {name}"):
                kept, name = milliseconds(case.get("generation")), f"{n}, {t}, {how}"
                lines["as it is"][name] = "-" if math.isnan(kept) else f"{fmt.digits(kept)} ms"
                ratio = milliseconds(row) / kept
                lines[label][name] = times(ratio)
    if not lines:
        return "no variants measured"
    table = [{"generating, N, T": label} | line for label, line in lines.items()]
    return table_with_note(table, f"Time against the script's own. {conditions(rows)}")


def end_to_end(path: Path) -> str:
    rows, table = fmt.read(path), []
    eager = {row["script"]: row for row in rows if row["mode"] == "eager"}
    for row in rows:
        rate = float(row["steps_per_second"])
        line = {"script": f"`{row['script']}`", "computed": computed(row)}
        line["N, T, UTD"] = f"{row['num_candidates']}, {row['flow_steps']}, {row['utd']}"
        line["steps per second"] = fmt.digits(rate)
        faster = milliseconds(eager.get(row["script"])) / milliseconds(row)
        line["faster than eager"] = times(faster)
        line["hours per million steps"] = fmt.digits(1e6 / rate / 3600)
        line["peak memory"] = f"{fmt.digits(float(row['peak_megabytes']))} MB"
        full = fmt.digits(float(row["full_buffer_megabytes"]))
        table.append(line | {"with a full buffer": f"{full} MB"})
    low, high = min(rows, key=spread), max(rows, key=spread)
    note = (
        f"{fmt.joined(rows, 'env_id')}, {fmt.joined(rows, 'repetitions')} runs of "
        f"{fmt.joined(rows, 'total_timesteps')} steps each, in turn, without evaluations and "
        "checkpoints. Steps per second are the median over stretches of 500 steps after "
        f"compilation, whose middle half spans {spread(low):.0%} to {spread(high):.0%} of it. "
        "Memory is the process's peak, and that of a run with 1,000,000 stored transitions, the "
        f"checkpoint at its end included. {fmt.made_with(rows)}"
    )
    return table_with_note(table, note)


def whole_runs(path: Path) -> str:
    """Steps per second of whole runs, alone and side by side."""
    rows, table = fmt.read(path), []
    for row in rows:
        rate = float(row["steps_per_second_each"])
        line = {"what runs": row["what"], "runs at once": row["runs"]}
        line |= {"algorithm": row["algorithm"], "steps per second, each": fmt.number(rate)}
        table.append(line | {"minutes per million steps": f"{1e6 / rate / 60:.1f}"})
    note = (
        f"Ant-v4, published setting, evaluation off, each over "
        f"{fmt.joined(rows, 'seconds')} s after compilation. {fmt.made_on(rows)}"
    )
    return table_with_note(table, note)


def proofs(path: Path) -> str:
    """Outcomes of tests/test_cuda.py, a row per test."""
    rows, found = fmt.read(path), defaultdict(list)
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
    return table_with_note(table, f"Counted over scripts. {fmt.made_on(rows)}")


def evaluation_cost(path: Path) -> str:
    """Seconds of an evaluation, and how many steps of training they equal."""
    rows, table = fmt.read(path), []
    cases = defaultdict(list)
    for row in rows:
        cases[row["script"], row["env_id"], row["num_candidates"], row["utd"]].append(row)
    for (script, env_id, n, utd), runs in cases.items():
        step, seconds = (
            statistics.median(float(run[key]) for run in runs)
            for key in ("training_ms_per_step", "evaluation_seconds")
        )
        line = {"script": f"`{script}`", "environment": env_id, "N, UTD": f"{n}, {utd}"}
        line |= {"runs": len(runs), "training": f"{fmt.digits(step)} ms per step"}
        line |= {"an evaluation": f"{fmt.digits(seconds)} s"}
        line["of training between two"] = f"{seconds / (25 * step):.0%}"
        table.append(line)
    note = (
        f"An evaluation is {fmt.joined(rows, 'episodes')} episodes in each of "
        f"{fmt.joined(rows, 'modes')} modes; between two lie 25,000 steps by default. Medians over "
        f"training runs that shared the machine; {fmt.hardware(rows)}, commit {fmt.commits(rows)}."
    )
    return table_with_note(table, note)


def against_authors(path: Path) -> str:
    """Update times beside the authors' code, which was timed by hand in turn with ours."""
    rows, table = fmt.read(path), []
    cases = defaultdict(list)
    for row in rows:
        key = row["script"], row["num_candidates"], row["flow_steps"], row["precision"]
        cases[key].append([float(row["authors_ms"]), float(row["ours_ms"])])
    for (script, n, t, precision), pairs in cases.items():
        theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = [own / other for other, own in pairs]
        line = {"script": f"`{script}`", "N, T": f"{n}, {t}", "generation in": precision}
        line |= {"authors' JAX": f"{fmt.digits(theirs)} ms", "ours": f"{fmt.digits(ours)} ms"}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.append(line | {"ratio": f"{statistics.median(ratios):.2f}", "over rounds": spread})
    note = (
        f"Medians of {len(rows) // len(cases)} rounds; in each, the authors' update and ours ran "
        "one after the other in processes of their own, medians of 12 updates after compilation, "
        f"batch 256, Ant-v4's sizes. Theirs is compiled by jax {fmt.joined(rows, 'jax')} and its "
        f"metrics are read after every update, as it does. {fmt.made_with(rows)}"
    )
    return table_with_note(table, note)


def precision(path: Path) -> str:
    """What bfloat16 changes, one line per way to use it, over runs."""
    rows, table = fmt.read(path), []
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
    return table_with_note(table, f"{note}{fmt.joined(rows, 'algorithm')}: {listed}.")
