"""What a training run has put into its directory, finished or still growing."""

import ast
import json
import shlex
import sys
from benchmark import scripts
from benchmark.files import fail, is_number, read_json, read_table, read_text
from functools import cache
from pathlib import Path

# flags with a column of their own, and those that change no result
NOT_A_FLAG = {"env_id", "seed", "total_timesteps", "exp_name", "runs_dir", "device"}
NOT_A_FLAG |= {"log_every", "eval_every", "eval_episodes", "checkpoint_every", "capture_video"}
NOT_A_FLAG |= {"track", "wandb_project_name", "wandb_entity", "resume", "evaluate"}
NOT_A_FLAG |= {"torch_threads", "async_envs"}
FILES = "args.json", "versions.json", ".lock", "metrics.csv", "evaluations.csv"
NEEDED = "env_id", "seed", "exp_name", "total_timesteps"


def script_of(exp_name: str) -> Path | None:
    """fpmd_online.py for fpmd_online and for any longer name a variant was given."""
    candidates = [script for script in scripts().values() if exp_name.startswith(script.stem)]
    return max(candidates, key=lambda script: len(script.stem), default=None)


@cache
def defaults(script: Path) -> dict:
    """The script's Args as they stand in its text: nothing is imported or run."""
    found = {}
    for node in ast.parse(read_text(script)).body:
        if not (isinstance(node, ast.ClassDef) and node.name == "Args"):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                try:
                    found[field.target.id] = ast.literal_eval(field.value)
                except ValueError:  # an expression, as exp_name's
                    continue
    return found


def flags(args: dict, script: Path | None) -> str:
    """What one would type to get args, beyond NOT_A_FLAG, as one string."""
    default = json.loads(json.dumps(defaults(script))) if script else {}  # tuples become lists
    words = []
    for key, value in args.items():
        if key in NOT_A_FLAG or (key in default and value == default[key]):
            continue
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words.append(shlex.join([f"--{name}", *map(str, values)]))
    return " ".join(words)


def run_dirs_in(source: Path) -> list[Path]:
    """The folder itself, or the runs in it if it is a launcher's or holds several of those."""
    if (source / "args.json").exists():
        return [source]
    return sorted(path.parent for path in source.rglob("args.json")) or [source]


def all_run_dirs(sources: list[Path]) -> list[Path]:
    return [path for source in sources for path in run_dirs_in(source)]


def refuse_other_folders(run_dir: Path) -> None:
    """Refuse what is no run directory; one that was made just now may be empty."""
    if not run_dir.exists():
        fail(f"{run_dir} does not exist")
    if not run_dir.is_dir():
        fail(f"{run_dir} is neither a run directory nor a CSV")
    if any(run_dir.iterdir()) and not any((run_dir / name).exists() for name in FILES):
        fail(f"{run_dir} is no run directory")


def read_args(run_dir: Path, needed: tuple[str, ...] = NEEDED) -> dict:
    """The run's arguments."""
    path = run_dir / "args.json"
    args = read_json(path, needed)
    for name, kind in ("env_id", str), ("exp_name", str), ("seed", int), ("total_timesteps", int):
        if name in args and type(args[name]) is not kind:
            fail(f"{path} has {name} {args[name]!r}")
    return args


def read_evaluations(run_dir: Path) -> list[dict]:
    """The complete rows so far, of each step and mode one; none if nothing was evaluated yet."""
    path = run_dir / "evaluations.csv"
    if not path.exists():
        return []
    rows = read_table(path, ["mode"], ["global_step", "return_mean"], growing=True)
    refuse_repeated(path, rows)
    return rows


def refuse_repeated(path: Path, rows: list[dict]) -> None:
    """Two processes in one directory, or a file pasted twice: which rows are right?"""
    seen = set()
    for row in rows:
        key = row["global_step"], row["mode"]
        if key in seen:
            fail(f"{path} has {key[1]} at step {key[0]} twice in one run")
        seen.add(key)


def read_metrics(run_dir: Path) -> list[dict]:
    """The complete rows so far of what a run logs; cells may be empty."""
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    return read_table(path, numbers=["global_step", "updates", "wall_time"], growing=True)


def has_learned(row: dict) -> bool:
    """Whether a row of metrics.csv is of a time with updates: before, its losses are empty."""
    losses = [value for name, value in row.items() if name.startswith("losses/")]
    return not losses or any(map(is_number, losses))


def leave_out(run_dir: Path, why: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {run_dir} is left out: {why}", file=sys.stderr)
