"""What evaluations cost in training runs, read off the clock in their metrics.csv.

A row is logged before the evaluation of the same step, so that the stretch after it holds the
evaluation of all modes; the other stretches of a run are training alone. Both are medians.

    python benchmark/measure/evaluation_cost.py runs/* --output evaluation_cost_cpu.csv
"""

import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, output, run
from benchmark.files import fail, read_json, write_csv
from benchmark.runs import has_learned, leave_out, read_args, read_metrics, script_of

ARGS = "exp_name", "env_id", "seed", "eval_every", "log_every", "eval_episodes", "utd"
VERSIONS = "device", "threads", "torch", "commit"


def measure(run_dir: Path) -> dict | None:
    """One row; None for a run that is too short to have two evaluations with stretches between."""
    args = read_args(run_dir, ARGS)
    versions = read_json(run_dir / "versions.json", VERSIONS)
    script = script_of(args["exp_name"])
    if script is None:
        fail(f"{run_dir}: --exp-name {args['exp_name']} begins with the name of no script")
    rows = [row for row in read_metrics(run_dir) if has_learned(row)]
    rows = [(int(row["global_step"]), float(row["wall_time"])) for row in rows]
    every, training, evaluating = args["eval_every"], [], []
    for (step, start), (following, end) in pairwise(rows[1:]):  # before it, compilation
        if following - step == args["log_every"]:
            stretches = evaluating if every and step % every == 0 else training
            stretches.append(end - start)
    if not training or not evaluating:
        leave_out(run_dir, "too short")
        return None
    stretch = statistics.median(training)
    row = {"script": script.stem, "env_id": args["env_id"]}
    row |= {"seed": args["seed"], "episodes": args["eval_episodes"], "modes": 2}
    row |= {"num_candidates": args.get("num_candidates", ""), "utd": args["utd"]}
    row["training_ms_per_step"] = round(1000 * stretch / args["log_every"], 3)
    row["evaluation_seconds"] = round(statistics.median(evaluating) - stretch, 2)
    row |= {key: versions[key] for key in VERSIONS}
    return row


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--output", type=output(), required=True, help="CSV to write")
    args = parser.parse_args()
    rows = [row for run_dir in args.run_dirs if (row := measure(run_dir))]
    if not rows:
        fail("no run is long enough")
    rows.sort(key=lambda row: (row["script"], row["env_id"], row["seed"]))
    write_csv(rows, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
