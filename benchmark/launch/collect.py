"""Gather the evaluations of training runs in one tidy CSV, a row per evaluation and mode.

Run directories may be finished or still growing. The same directories give the same file, in
whatever order they are named. The flags column holds what differs from the script's defaults.
CSVs that this wrote elsewhere may stand among the directories: so machines share a campaign.

    python benchmark/launch/collect.py runs/* --output benchmark/results/fpmd_online_cpu.csv
    python benchmark/launch/collect.py a.csv b.csv --output benchmark/results/campaign_cpu.csv
"""

import argparse
import ast
import csv
import json
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import script_of, write_csv

# flags with a column of their own, and those that change no result
NOT_A_FLAG = {"env_id", "seed", "total_timesteps", "exp_name", "runs_dir", "device"}
NOT_A_FLAG |= {"log_every", "eval_every", "eval_episodes", "checkpoint_every", "capture_video"}
NOT_A_FLAG |= {"track", "wandb_project_name", "wandb_entity", "resume", "evaluate"}
NOT_A_FLAG |= {"torch_threads", "async_envs"}
KEY = "algorithm", "env_id", "flags", "seed"  # what tells one run from another
VERSIONS = "python", "torch", "gymnasium", "mujoco", "device", "threads", "commit"


@cache
def defaults(script: Path) -> dict:
    """The script's Args as they stand in its text: nothing is imported or run."""
    classes = [
        node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    args = next(node for node in classes if node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    fields = [field for field in fields if field.target.id != "exp_name"]  # an expression
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


def flags(args: dict, script: Path) -> str:
    """What one would type to get args, beyond NOT_A_FLAG, as one string."""
    words, default = [], json.loads(json.dumps(defaults(script)))  # tuples become lists
    for key, value in args.items():
        if key in NOT_A_FLAG or (key in default and value == default[key]):
            continue
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([f"--{name}", *map(str, values)]))
    return " ".join(words)


def read_run(run_dir: Path) -> list[dict]:
    """The rows of one run directory; none if it has not been evaluated yet."""
    evaluations = run_dir / "evaluations.csv"
    if not evaluations.exists():
        print(f"collect.py: no evaluations in {run_dir}, left out", file=sys.stderr)
        return []
    args = json.loads((run_dir / "args.json").read_text())
    versions = json.loads((run_dir / "versions.json").read_text())
    script = script_of(args["exp_name"])
    run = {"algorithm": script.stem, "env_id": args["env_id"], "seed": args["seed"]}
    setting = {
        "flags": flags(args, script),
        "utd": args["utd"],
        "total_timesteps": args["total_timesteps"],
    }
    setting |= {key: versions.get(key, "") for key in VERSIONS}
    lines = evaluations.read_text().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]  # the last may be half written
    return [run | row | setting for row in csv.DictReader(complete)]


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV that this program wrote."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"collect.py: error: {path}: {error}")
    if not rows or not {*KEY, *VERSIONS} <= set(rows[0]):
        sys.exit(f"collect.py: error: {path} is not a CSV of collect.py")
    return [row | {"seed": int(row["seed"])} for row in rows]


def gather(sources: list[Path]) -> dict[tuple, list[dict]]:
    """The rows of each run under what tells it from the others, in that order; no two alike."""
    runs = {}
    for source in sorted(sources):
        found = {}
        for row in read_csv(source) if source.suffix == ".csv" else read_run(source):
            found.setdefault(tuple(row[name] for name in KEY), []).append(row)
        if twice := set(found) & set(runs):
            text = f"{source} repeats {min(twice)}: name only one of the two"
            sys.exit(f"collect.py: error: {text}")
        runs |= found
    return {key: runs[key] for key in sorted(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN_DIR_OR_CSV")
    parser.add_argument("--output", type=Path, required=True, help="CSV to write, as a whole")
    args = parser.parse_args()
    if not (runs := gather(args.sources)):
        sys.exit("collect.py: error: nothing to write")
    rows = [row for run in runs.values() for row in run]
    write_csv(rows, args.output)
    print(f"{len(runs)} runs, {len(rows)} rows in {args.output}")


if __name__ == "__main__":
    main()
