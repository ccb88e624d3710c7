"""What evaluations cost in training runs, read off the clock in their metrics.csv.

A row is logged before the evaluation of the same step, so that the stretch after it holds the
evaluation of all modes; the other stretches of a run are training alone. Both are medians.

    python benchmark/measure/evaluation_cost.py runs/* --output evaluation_cost_cpu.csv
"""

import argparse
import csv
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import script_of, write_csv


def measure(run_dir: Path) -> dict | None:
    """One row; None for a run that is too short to have two evaluations with stretches between."""
    args, versions = (json.loads((run_dir / f"{n}.json").read_text()) for n in ("args", "versions"))
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(int(row["global_step"]), float(row["wall_time"])) for row in csv.DictReader(file)]
    every, training, evaluating = args["eval_every"], [], []
    for (step, start), (following, end) in pairwise(rows[1:]):  # before it, compilation
        if following - step == args["log_every"]:
            stretches = evaluating if every and step % every == 0 else training
            stretches.append(end - start)
    if not training or not evaluating:
        print(f"evaluation_cost.py: {run_dir} is too short, left out", file=sys.stderr)
        return None
    stretch = statistics.median(training)
    row = {"script": script_of(args["exp_name"]).stem, "env_id": args["env_id"]}
    row |= {"seed": args["seed"], "episodes": args["eval_episodes"], "modes": 2}
    row |= {"num_candidates": args["num_candidates"], "utd": args["utd"]}
    row["training_ms_per_step"] = round(1000 * stretch / args["log_every"], 3)
    row["evaluation_seconds"] = round(statistics.median(evaluating) - stretch, 2)
    row |= {key: versions[key] for key in ("device", "threads", "torch", "commit")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for run_dir in args.run_dirs if (row := measure(run_dir))]
    if not rows:
        sys.exit("evaluation_cost.py: error: no run is long enough")
    rows.sort(key=lambda row: (row["script"], row["env_id"], row["seed"]))
    write_csv(rows, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
