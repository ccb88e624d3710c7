"""A script in miniature, to launch in place of one that learns: the same command line, files, exact
--resume and answer to SIGTERM, within milliseconds. Its return at a step follows from the seed and
from all steps before, so only a run that went on from its checkpoint has it right."""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class Args:
    env_id: str = "Ant-v4"
    env_kwargs: str = "{}"
    seed: int = 1
    total_timesteps: int = 100
    num_envs: int = 1
    exp_name: str = Path(__file__).stem
    runs_dir: str = "runs"
    checkpoint_every: int = 10
    eval_every: int = 5
    resume: str = ""
    torch_threads: int = 0
    utd: float = 1.0
    device: str = "auto"
    step_seconds: float = 0.0
    misbehave: str = ""  # see main


MODES = {"one_step": None, "best_of_n": None}
MAY_CHANGE = {"resume", "total_timesteps", "torch_threads", "log_every"}


def parse_args(argv=None):
    parser, default = argparse.ArgumentParser(), Args()
    if "--resume" in (argv or sys.argv):
        words = argv or sys.argv
        saved = Path(words[words.index("--resume") + 1], "checkpoint.pt").read_text()
        default = Args(**json.loads(saved)["args"])
    for field in fields(Args):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=field.type, default=getattr(default, field.name))
    return Args(**vars(parser.parse_args(argv)))


def fail(message):
    print(f"fake_online.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args):
    if args.utd <= 0:
        fail(f"--utd {args.utd} must be above 0")


def make_env(env_id, env_kwargs):
    if env_id.startswith("Sized") and "size" not in json.loads(env_kwargs):
        fail(f"{env_id} needs a size")
    if env_id.startswith("No"):
        fail(f"cannot make {env_id!r}")
    return open(os.devnull)  # anything that can be closed


def replace(path, text):
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def append(path, **row):
    with path.open("a") as file:
        if file.tell() == 0:
            file.write(",".join(row) + "\n")
        file.write(",".join(map(str, row.values())) + "\n")


def main(args):
    step, value, start, stop = 0, args.seed, time.time(), []
    if args.resume:
        run_dir = Path(args.resume)
        saved = json.loads((run_dir / "checkpoint.pt").read_text())
        step, value = saved["step"], saved["value"]
        for path in run_dir.glob("*.csv"):
            head, *rows = path.read_text().splitlines(keepends=True)
            path.write_text(head + "".join(r for r in rows if int(r.split(",")[0]) <= step))
    else:
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
        run_dir = Path(args.runs_dir, name.replace("/", "-"))
        run_dir.mkdir(parents=True)
        versions = dict.fromkeys(("python", "torch", "gymnasium", "mujoco", "commit"), "1")
        (run_dir / "versions.json").write_text(json.dumps(versions | {"device": "", "threads": 1}))
    replace(run_dir / "args.json", json.dumps(asdict(args)))
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda s, _: sys.exit(128 + s) if stop else stop.append(s))
    if args.resume and args.eval_every:  # what was due when it was stopped
        path = run_dir / "evaluations.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
        found = [row[3] for row in rows if row[0] == str(step)]
        for mode in MODES:
            if step % 5 == 0 and mode not in found:
                row = {"global_step": step, "updates": step, "wall_time": 1.0}
                append(path, **row, mode=mode, return_mean=value % 1000)
    print(f"gpus {os.environ.get('CUDA_VISIBLE_DEVICES')} parent {os.getppid()}", flush=True)
    while step < args.total_timesteps and not stop:
        time.sleep(args.step_seconds)
        step, value = step + 1, value * 1103515245 + 12345 & 0x7FFFFFFF
        if step % 5 == 0 or step == args.total_timesteps:
            row = {"global_step": step, "updates": step, "wall_time": round(time.time() - start, 3)}
            append(run_dir / "metrics.csv", **row)
            lost = run_dir.parent / "lost"
            for mode in MODES if args.eval_every else ():
                cut_off = mode == "best_of_n" and args.misbehave == f"stopped evaluating {step}"
                if cut_off and not lost.exists():
                    lost.touch()
                    continue
                append(run_dir / "evaluations.csv", **row, mode=mode, return_mean=value % 1000)
        if step % args.checkpoint_every == 0 or step == args.total_timesteps or stop:
            time.sleep(0.5 * bool(stop))  # so that a second signal would find it at it
            saved = {"step": step, "value": value, "args": asdict(args) | {"resume": ""}}
            replace(run_dir / "checkpoint.pt", json.dumps(saved))
        if args.misbehave == f"always at {step}":
            print("the end is near\nValueError: no good", file=sys.stderr)
            sys.exit(1)
        once = run_dir.parent / f"once at {step}"
        if args.misbehave == once.name and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(128 + stop[0] if stop else 0)


if __name__ == "__main__":
    main(parse_args())
