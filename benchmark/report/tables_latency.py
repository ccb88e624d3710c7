"""The table of latency.py."""

import math
from benchmark.report import formatting as fmt
from benchmark.report.formatting import table_with_note
from pathlib import Path

# whose layers have which widths; other policies have the first
FLOORS = {"": "matrix products, 3 x 256", "MVP": "matrix products, 4 x 512"}
FLOORS |= {name: name for name in FLOORS.values()}


def latency(path: Path) -> str:
    """Milliseconds per action, a row per policy and batch; ratios to SAC in the same mode."""
    rows, table = fmt.read(path), []
    by = {(r["batch"], r["policy"], r["steps"], r["mode"]): r for r in rows}
    modes = dict.fromkeys(row["mode"] for row in rows)
    names = {"SAC, sampled": "a sampled SAC action", "SAC": "SAC's mean action"}
    timed = {(row["policy"], row["mode"]) for row in rows}
    standards = {  # onnxruntime has no sampled action
        mode: next((name for name in names if (name, mode) in timed), None) for mode in modes
    }
    cases = dict.fromkeys((row["batch"], row["policy"], row["steps"]) for row in rows)
    for batch, policy, steps in sorted(cases, key=lambda case: int(case[0])):
        line = {"actions at once": batch, "policy": policy, "network evaluations": steps}
        for mode in modes:
            row = by.get((batch, policy, steps, mode))
            kinds = "median", "mean", "p99"
            cells = [fmt.digits(float(row[f"{kind}_ms"])) if row else "-" for kind in kinds]
            line |= {f"{mode}: {kind}": cell for kind, cell in zip(kinds, cells, strict=True)}
            reference = by.get((batch, standards[mode], "1", mode))
            known = row and reference
            ratio = float(row["median_ms"]) / float(reference["median_ms"]) if known else math.nan
            line[f"{mode}: against SAC"] = f"{ratio:.2f} x" if known else "-"
            floor = by.get((batch, FLOORS.get(policy, FLOORS[""]), "1", mode))
            if mode == "onnxruntime":
                known = row and floor and steps == "1"
                ratio = float(row["median_ms"]) / float(floor["median_ms"]) if known else math.nan
                line["onnxruntime: over products"] = f"{ratio:.2f} x" if known else "-"
        table.append(line)
    first = next((row for row in rows if row["mode"] != "onnxruntime"), rows[0])
    standard = standards.get(first["mode"])
    note = (
        "Milliseconds of a call, from an observation on the device to actions on the CPU; ratios "
        f"of medians to {names.get(standard, 'SAC')}{onnx_note(standards)}. "
        "Interleaved rounds of one run, "
        f"{first['calls']} calls each, Ant-v4's sizes. {first['hardware']}, {first['threads']} "
        f"thread{'s' * (first['threads'] != '1')}, torch {first['torch']}, commit "
        f"{fmt.commits(rows)}."
    )
    return table_with_note(table, note)


def onnx_note(standards: dict[str, str | None]) -> str:
    """What is different about onnxruntime's columns, if there are any."""
    if "onnxruntime" not in standards:
        return ""
    words = "onnxruntime in one thread: to SAC's mean action, and to matrix products of its widths"
    return f" ({words})"
