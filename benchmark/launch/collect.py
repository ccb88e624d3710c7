"""Gather the evaluations of training runs in one tidy CSV, a row per evaluation and mode.

Run directories may be finished or still growing. The same directories give the same file, in
whatever order they are named. The flags column holds what differs from the script's defaults, a
name of one's own (--exp-name) included: that tells a changed copy from the script.
A folder of them, or of a campaign's jobs, stands for all in it.
CSVs that this wrote elsewhere may stand among the directories: so machines share a campaign.

    python benchmark/launch/collect.py runs/* --output benchmark/results/fpmd_online_cpu.csv
    python benchmark/launch/collect.py a.csv b.csv --output benchmark/results/campaign_cpu.csv
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, output, run
from benchmark.files import fail, read_json, read_table, write_csv
from benchmark.runs import (
    all_run_dirs,
    flags,
    leave_out,
    read_args,
    read_evaluations,
    refuse_other_folders,
    refuse_repeated,
    script_of,
)

KEY = "algorithm", "env_id", "flags", "seed"  # what tells one run from another
VERSIONS = "python", "torch", "gymnasium", "mujoco", "device", "threads", "commit"


def read_run(run_dir: Path) -> list[dict]:
    """The rows of one run directory; none if it has not been evaluated yet."""
    refuse_other_folders(run_dir)
    evaluations = read_evaluations(run_dir)
    if not evaluations:
        return []
    args = read_args(run_dir)
    versions = read_json(run_dir / "versions.json")
    script = script_of(args["exp_name"])
    if script is None:
        name = args["exp_name"]
        fail(f"{run_dir}: --exp-name {name} begins with the name of no script, <x>_online.py here")
    own = {"algorithm": script.stem, "env_id": args["env_id"], "seed": args["seed"]}
    # somebody's own name may be that of a changed copy, no further seed of the script
    renamed = ["--exp-name", args["exp_name"]] if args["exp_name"] != script.stem else []
    setting = {
        "flags": f"{shlex.join(renamed)} {flags(args, script)}".strip(),
        "utd": args.get("utd", ""),
        "total_timesteps": args["total_timesteps"],
    }
    setting |= {key: versions.get(key, "") for key in VERSIONS}
    return [own | row | setting for row in evaluations]


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV that this program wrote."""
    needed = [*KEY, *VERSIONS, "mode"]
    rows = read_table(path, needed, ["seed", "global_step", "return_mean"])
    if not rows:
        fail(f"{path} holds no rows")
    if odd := next((row["seed"] for row in rows if not row["seed"].isdecimal()), None):
        fail(f"{path} has the seed {odd}")
    return [row | {"seed": int(row["seed"])} for row in rows]


def gather(sources: list[Path]) -> dict[tuple, list[dict]]:
    """The rows of each run under what tells it from the others, in that order; no two alike."""
    runs = {}
    for source in sorted(all_run_dirs(sources)):
        found = {}
        is_csv = source.suffix == ".csv" and not source.is_dir()
        for row in read_csv(source) if is_csv else read_run(source):
            found.setdefault(tuple(row[name] for name in KEY), []).append(row)
        if twice := set(found) & set(runs):
            fail(f"{source} repeats {min(twice)}: name only one of the two")
        for rows in found.values():
            refuse_repeated(source, rows)
        runs |= found
    return {key: runs[key] for key in sorted(runs)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN_DIR_OR_CSV")
    parser.add_argument("--output", type=output(), required=True, help="CSV to write, as a whole")
    args = parser.parse_args()
    runs = gather(args.sources)
    if not runs:
        names = ", ".join(map(str, args.sources))
        fail(f"nothing to write: no run in {names} has an evaluation yet")
    for source in sorted(all_run_dirs(args.sources)):
        if source.suffix != ".csv" and not read_evaluations(source):
            leave_out(source, "no evaluations yet")
    rows = [row for own in runs.values() for row in own]
    write_csv(rows, args.output)
    print(f"{len(runs)} runs, {len(rows)} rows in {args.output}")


if __name__ == "__main__":
    run(main)
