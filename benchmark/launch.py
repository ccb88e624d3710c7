"""Run a campaign, environments x scripts x seeds x flags, on this machine or on a Ray cluster.

    python benchmark/launch.py benchmark/campaigns/cpu.toml
    python benchmark/launch.py --name first-try --scripts mvp_online --envs Hopper-v4 \\
        --seeds 1 2 --flags="--total-timesteps 20000"

The same command again goes on where the last one ended, however that was: finished jobs are
skipped, the others resume from their checkpoints. A job is one run of one script. It has a folder
of its own, <runs-dir>/<name>/<job>/, with the script's run directory, log.txt, lock and, once it
has finished, done.json. The evaluations of all jobs become benchmark/results/campaign_<name>.csv.

Exit status: 0 all finished, 1 a job keeps failing, 2 bad input, 130 or 143 stopped by a signal.
"""

import argparse
import ctypes
import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import collect

ROOT, LAUNCHER = collect.ROOT, str(Path(__file__).resolve())
HELD = 75  # exit status of an attempt at a job that another process is running, EX_TEMPFAIL
ASK_AGAIN = 3  # seconds until the next attempt at it
REPORT_EVERY = 60  # seconds between lines of progress where no terminal shows the table
# what a script lets change on --resume, so that it is no part of what tells one job from another
MAY_CHANGE = {"total_timesteps", "log_every", "capture_video", "torch_threads", "track"}
MAY_CHANGE |= {"wandb_project_name", "wandb_entity"}
OURS = {"env_id", "seed", "exp_name", "runs_dir", "resume", "evaluate"}  # not for --flags
# what a campaign file may say, each an option of the command line as well
KEYS = {"name": str, "envs": list, "seeds": list, "flags": str, "scripts": (list, dict)}
KEYS |= {"variants": dict, "engine": str, "ray-address": str, "runs-dir": str, "output": str}
KEYS |= dict.fromkeys(("workers", "threads", "workers-per-gpu", "max-restarts"), int)
DEFAULTS = {"flags": "", "variants": {"": ""}, "engine": "local", "ray_address": "", "workers": 0}
DEFAULTS |= {"threads": 1, "workers_per_gpu": 0, "max_restarts": 3, "runs_dir": "runs"}
# What a script makes of its flags, found without training: a line of JSON per command line.
CHECK = """
import dataclasses, importlib, json, sys
asked = json.load(sys.stdin)
script = importlib.import_module(asked["script"])
for argv in asked["command_lines"]:
    args = script.parse_args(argv)
    script.check_args(dataclasses.replace(args, **asked["instead"]))
    print(json.dumps([dataclasses.asdict(args), dataclasses.asdict(script.Args())]))
for env_id in asked["envs"]:
    script.make_env(env_id).close()
"""


def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr, exit status 2."""
    print(f"launch.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------- the campaign


@dataclass
class Job:
    script: Path
    env_id: str
    seed: int
    variant: str  # what the campaign calls these flags
    command: list[str]  # all but where the run is to be
    args: dict  # the same as the script understands it
    dir: Path
    state: str = "waiting"  # then running, and done or failed in the end
    deaths: int = 0
    handle: Any = None  # what the engine knows it by while it runs
    not_before: float = 0.0
    last: dict = field(default_factory=dict)  # the progress that the table shows

    def __str__(self) -> str:
        return " ".join([self.script.stem, self.env_id, f"seed {self.seed}", self.variant]).strip()

    def run_dirs(self) -> list[Path]:
        return run_dirs(self.dir, self.script)

    def saved(self) -> list[Path]:
        """The run that can go on: one, or none yet."""
        return [path for path in self.run_dirs() if (path / "checkpoint.pt").exists()]

    def finished(self) -> bool:
        """done.json says so, for as many steps as asked for, and what it speaks of is there."""
        with suppress(OSError, ValueError, KeyError):
            done = json.loads((self.dir / "done.json").read_text())
            reached = done["total_timesteps"] >= self.args["total_timesteps"]
            return reached and (self.dir / done["run_dir"] / "checkpoint.pt").exists()
        return False

    def finish(self) -> bool:
        """After exit status 0: write done.json if the log of the run agrees that all is done."""
        for run_dir in self.saved():
            rows = read_rows(run_dir / "metrics.csv")
            step = int(rows[-1]["global_step"]) if rows else 0
            if step + self.args["num_envs"] <= self.args["total_timesteps"]:
                return False
            done = {"run_dir": run_dir.name, "total_timesteps": self.args["total_timesteps"]}
            (self.dir / "done.tmp").write_text(json.dumps(done | {"global_step": step}) + "\n")
            (self.dir / "done.tmp").replace(self.dir / "done.json")
            return True
        return False

    def log_tail(self, lines: int = 12) -> str:
        path = self.dir / "log.txt"
        log = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(f"    {line}" for line in log[-lines:])


def run_dirs(job_dir: Path, script: Path) -> list[Path]:
    return sorted(path for path in job_dir.glob(f"*__{script.stem}__*") if path.is_dir())


def read_campaign(path: Path) -> dict:
    """A campaign file's keys, each of the right kind."""
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        fail(f"there is no campaign file {path}")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        fail(f"{path}: {error}")
    for key, value in content.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1) or [", ".join(sorted(KEYS))]
            fail(f"{path} has the unknown key {key!r}; known is {near[0]}")
        kind = str if key in ("envs", "scripts", "variants") else int
        items = value.values() if isinstance(value, dict) else value
        wrong = type(value) is bool or not isinstance(value, KEYS[key])
        if wrong or (isinstance(value, list | dict) and {type(item) for item in items} - {kind}):
            fail(f"{path}: {key} = {value!r} is not of the kind that docs/results.md describes")
    return {"name": path.stem} | {key.replace("-", "_"): content[key] for key in content}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line on top of the campaign file on top of the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("campaign", nargs="?", type=Path, default=None, help="a file of benchmark/campaigns")
    add("--name", help="of the job folders' parent and of the CSV (default: the file's name)")
    add("--scripts", nargs="+", metavar="SCRIPT", help="mvp_online, baselines/sac_online, ...")
    add("--envs", nargs="+", metavar="ENV_ID")
    add("--seeds", nargs="+", type=int, metavar="SEED")
    add("--flags", help="for every job, after those of the file: --flags='--utd 0.2'")
    add("--variant", action="append", metavar="NAME=FLAGS", help="one more setting to compare")
    add("--engine", choices=["local", "ray"], help="this machine (default) or a Ray cluster")
    add("--ray-address", help="of a cluster that runs already (default: one of our own)")
    add("--workers", type=int, help="jobs at a time (default: what cores, GPUs or cluster hold)")
    add("--threads", type=int, help="CPU threads per job (default: 1)")
    add("--workers-per-gpu", type=int, help="jobs that share a GPU (default: 0, no assignment)")
    add("--max-restarts", type=int, help="times a job may die before it is given up (default: 3)")
    add("--runs-dir", help="where the job folders are (default: runs)")
    add("--output", help="CSV of all evaluations (default: benchmark/results/campaign_<name>.csv)")
    add("--dry-run", action="store_true", default=False, help="print the commands, run nothing")
    typed = vars(parser.parse_args(argv))
    file = read_campaign(typed["campaign"]) if typed["campaign"] else {}
    options = DEFAULTS | file | typed
    options |= {"flags": file.get("flags", ""), "typed_flags": typed.get("flags", "")}
    flags = file.get("scripts", {}) if isinstance(file.get("scripts"), dict) else {}
    names = [name.removesuffix(".py") for name in options.get("scripts", [])]
    options["scripts"] = {name: flags.get(name, "") for name in names}
    if "variant" in typed:
        options["variants"] = dict(text.partition("=")[::2] for text in typed["variant"])
    for key in "name", "scripts", "envs", "seeds", "variants":
        if not options.get(key):
            fail(f"a campaign needs {key}: give --{key} or a campaign file that has it")
    if not re.fullmatch(r"\w[\w.-]*", options["name"]):
        fail(f"--name {options['name']} must be a plain file name")
    for key, low in ("workers", 0), ("threads", 1), ("workers_per_gpu", 0), ("max_restarts", 0):
        if options[key] < low:
            fail(f"--{key.replace('_', '-')} {options[key]} must be {low} or more")
    if options["engine"] not in ("local", "ray"):
        fail(f"engine {options['engine']!r} is neither local nor ray")
    if options["ray_address"] and options["engine"] != "ray":
        fail("--ray-address wants --engine ray")
    default = ROOT / "benchmark" / "results" / f"campaign_{options['name']}.csv"
    options["output"] = Path(options.get("output") or default)
    return argparse.Namespace(**options)


def understood(script: Path, command_lines: list[list[str]], envs: list[str], engine: str) -> list:
    """Ask the script itself what it makes of each: its arguments and its defaults."""
    asked = {"script": script.stem, "command_lines": command_lines, "envs": envs}
    # this machine may lack the device that a cluster's have
    asked["instead"] = {"device": "cpu"} if engine == "ray" else {}
    path = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:  # jobs do not run in the current one either
        answer = subprocess.run(
            [sys.executable, "-P", "-c", CHECK],
            input=json.dumps(asked),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    if answer.returncode:
        words = re.sub(r"[─│╭╮╰╯]", " ", answer.stderr).split()  # a parser may draw a box
        fail(f"{script.stem} refuses its flags: {' '.join(words)[-600:]}")
    lines = [line for line in answer.stdout.splitlines() if line.startswith("[{")]
    return [json.loads(line) for line in lines]


def settings(options: argparse.Namespace) -> list[tuple[Path, str, list[str]]]:
    """Scripts x variants with the flags of each; of a flag given twice the later counts."""
    known = collect.scripts().values()
    found = []
    for (name, own), (variant, more) in product(options.scripts.items(), options.variants.items()):
        if (script := ROOT / f"{name}.py") not in known:
            names = ", ".join(sorted(str(path.relative_to(ROOT).with_suffix("")) for path in known))
            fail(f"there is no script {name}; there are {names}")
        try:
            flags = shlex.split(f"{options.flags} {own} {options.typed_flags} {more}")
        except ValueError as error:
            fail(f"flags of {name}: {error}")
        for flag in flags:
            key = flag.lstrip("-").partition("=")[0].replace("-", "_")
            if flag.startswith("--") and key in OURS | {"torch_threads"}:
                fail(f"{flag} is not for flags: the launcher gives each job its own (--threads)")
        found.append((script, variant, [*flags, "--torch-threads", str(options.threads)]))
    return found


def plan(options: argparse.Namespace) -> list[Job]:
    """All jobs, seeds outermost: a campaign that ends early has whole seeds. Nothing is written."""
    jobs, meaning, flags_of = [], {}, {}
    envs, seeds = list(dict.fromkeys(options.envs)), list(dict.fromkeys(options.seeds))
    if min(seeds) < 0:
        fail(f"--seeds {min(seeds)} must be 0 or more")
    for script, variant, flags in settings(options):
        flags_of.setdefault(script, {})[variant] = flags
    for i, (script, variants) in enumerate(flags_of.items()):
        keys = list(product([script], variants, envs))
        lines = [["--env-id", env_id, *variants[variant]] for _, variant, env_id in keys]
        # one script's look at the environments is enough: all make them alike
        answers = understood(script, lines, [] if i else envs, options.engine)
        meaning |= dict(zip(keys, answers, strict=True))
    for seed, (script, variant, env_id) in product(seeds, meaning):
        args, default = meaning[script, variant, env_id]
        args = args | {"seed": seed}
        own = {k: v for k, v in args.items() if k not in MAY_CHANGE | OURS and v != default[k]}
        slug = re.sub(r"[^\w.]+", "-", collect.flags(args, script)).strip("-")[:60] or "defaults"
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]", "-", f"{script.stem}__{env_id}__{seed}__{slug}-{digest}")
        folder = Path(options.runs_dir, options.name, name).absolute()
        command = [str(script), "--env-id", env_id, "--seed", str(seed)]
        command += flags_of[script][variant]
        jobs.append(Job(script, env_id, seed, variant, command, args, folder))
        refuse_other_run(jobs[-1])
    first = {}
    for job in jobs:
        key = job.script, job.env_id, job.seed, collect.flags(job.args, job.script)
        other = first.setdefault(key, job)
        if other is not job:  # the CSV could not tell them apart
            fail(f"variant {job.variant!r} repeats {other.variant!r} for {job.script.stem}")
    return jobs


def refuse_other_run(job: Job) -> None:
    """A stored run must be this job's beginning: other defaults, say, would mix two settings."""
    for run_dir in job.saved():
        stored = {}
        with suppress(OSError, ValueError):  # torn by a kill; the checkpoint still knows
            stored = json.loads((run_dir / "args.json").read_text())
        for key, value in job.args.items():
            before = stored.get(key, value)
            if before != value and key not in MAY_CHANGE | OURS:
                flag = key.replace("_", "-")
                fail(f"{run_dir} was run with --{flag} {before}, not {value}; use another --name")
        if stored.get("total_timesteps", 0) > job.args["total_timesteps"]:
            steps = stored["total_timesteps"]
            fail(f"{run_dir} was started with --total-timesteps {steps}, which may only grow")


# ------------------------------------------------------- one attempt at a job, in its own process


def start(parent: int, job_dir: Path, command: list[str]) -> NoReturn:
    """`launch.py --start PARENT JOB_DIR COMMAND`: take the job's lock, then become the script.

    The process that trains holds the lock, so nothing is started twice even if everything else is
    killed, and the lock ends with it: POSIX locks survive exec but are not inherited by a fork, as
    flock's are, which a simulator's process could hold on to after the script was killed.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's processes block some
    if sys.platform == "linux":  # the script saves and ends when what watches over it is killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, kept by exec
    lock = os.open(job_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(HELD)
    if os.getppid() != parent:  # killed before prctl
        sys.exit(128 + signal.SIGTERM)
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    os.set_inheritable(lock, True)
    runs = run_dirs(job_dir, Path(command[0]))
    saved = [path for path in runs if (path / "checkpoint.pt").exists()]
    if len(saved) > 1:
        fail(f"{job_dir} has several runs, {' and '.join(path.name for path in saved)}: keep one")
    for path in set(runs) - set(saved):
        shutil.rmtree(path)  # ended before its first checkpoint: nothing can go on from it
    where = ["--resume", str(saved[0])] if saved else ["--runs-dir", str(job_dir)]
    print(time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join([*command, *where]), flush=True)
    os.execv(sys.executable, [sys.executable, *command, *where])


def spawn(job_dir: Path, command: list[str], env: dict) -> subprocess.Popen:
    """An attempt in a session of its own: a terminal's Ctrl-C shall reach the launcher alone."""
    with (job_dir / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, LAUNCHER, "--start", str(os.getpid()), str(job_dir), *command],
            cwd=job_dir,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(process: subprocess.Popen) -> int | None:
    """Its exit status, None while it runs; what a killed script left running ends with it."""
    status = process.poll()
    if status is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return status


# ---------------------------------------------------------------------------- engines


def environment(threads: int) -> dict:
    """One job's libraries keep to its threads, torch's compiler too; its log is never behind."""
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
    return dict.fromkeys(names, str(threads)) | {"PYTHONUNBUFFERED": "1"}


class Local:
    """A fixed number of jobs at a time on this machine, the GPUs dealt out in turn."""

    def __init__(self, options: argparse.Namespace):
        places = [{}] * (options.workers or max(1, (os.cpu_count() or 1) // options.threads))
        if options.workers_per_gpu:
            gpus = self.visible_gpus()
            if not gpus:
                fail("--workers-per-gpu finds no GPU; --workers-per-gpu 0 does without")
            places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * options.workers_per_gpu]
            places = places[: options.workers or None]
        self.free = [environment(options.threads) | place for place in places]

    def visible_gpus(self) -> list[str]:
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
        if not shutil.which("nvidia-smi"):
            return []
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        return [str(i) for i in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]

    def has_room(self) -> bool:
        return bool(self.free)

    def start(self, job: Job):
        place = self.free.pop(0)
        return spawn(job.dir, job.command, place), place

    def poll(self, handle) -> int | None:
        process, place = handle
        status = ended(process)
        if status is not None:
            self.free.append(place)
        return status

    def stop(self, handle, hard: bool) -> None:
        handle[0].terminate()  # a script saves on the first signal and is killed by the second


class Ray:
    """The same attempts as Ray tasks: one machine or many that share the runs' file system."""

    def __init__(self, options: argparse.Namespace):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # without --workers-per-gpu a job sees the GPUs, as it does without Ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            fail("--engine ray needs Ray: pip install -r benchmark/requirements.txt")
        self.ray, self.options, self.tasks = ray, options, 0
        address = options.ray_address or os.environ.get("RAY_ADDRESS", "local")
        cpus = (options.workers or max(1, os.cpu_count() // options.threads)) * options.threads
        own = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            fail(f"--ray-address {address}: {error}")
        # rounded down, so that as many as asked for fit
        share = math.floor(1e4 / options.workers_per_gpu) / 1e4 if options.workers_per_gpu else 0
        if not self.places():
            print("launch.py: the cluster cannot hold a single job so far", file=sys.stderr)
        env = environment(options.threads)

        def attempt(job_dir: Path, command: list[str]) -> int:
            process = spawn(job_dir, command, env)
            try:
                while (status := ended(process)) is None:
                    time.sleep(0.2)  # in Python, where a cancellation can interrupt it
                return status
            except BaseException:  # ray.cancel: the launcher was told to stop
                process.terminate()
                return process.wait()

        # no retries of Ray's own: the launcher counts deaths, whatever has died
        remote = ray.remote(num_cpus=options.threads, num_gpus=share, max_retries=0)
        self.attempt = remote(attempt)

    def places(self) -> int:
        """Jobs the machines that are there can hold: they may come and go."""
        there, per_gpu = self.ray.cluster_resources(), self.options.workers_per_gpu
        places = int(there.get("CPU", 0)) // self.options.threads
        return min(places, int(there.get("GPU", 0) * per_gpu)) if per_gpu else places

    def has_room(self) -> bool:
        return self.tasks < (self.options.workers or self.places())

    def start(self, job: Job):
        self.tasks += 1
        return self.attempt.remote(job.dir, job.command)

    def poll(self, handle) -> int | str | None:
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        self.tasks -= 1
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return f"Ray's {type(error).__name__}"

    def stop(self, handle, hard: bool) -> None:
        self.ray.cancel(handle, force=hard)


# ---------------------------------------------------------------------------- progress


def read_rows(path: Path) -> list[dict]:
    """First and last complete row of a growing CSV, of which the ends alone are read."""
    with suppress(OSError), path.open("rb") as file:
        head, sep, rest = file.read(1 << 14).partition(b"\n")
        first = rest.partition(b"\n")[0] if b"\n" in rest else b""
        file.seek(max(len(head) + len(sep), file.seek(0, os.SEEK_END) - (1 << 14)))
        tail = file.read().split(b"\n")[:-1]  # what follows the last newline is half a row
        names = head.decode().split(",")
        rows = [dict(zip(names, row.decode().split(","), strict=False)) for row in [first, *tail]]
        return [rows[0], rows[-1]] if tail else []
    return []


def look(job: Job) -> dict:
    """How far a job is: steps, seconds per step of learning, its last evaluation."""
    now = {"step": 0, "pace": None, "score": ""}
    for run_dir in job.run_dirs()[-1:]:
        if rows := read_rows(run_dir / "metrics.csv"):
            step, begun = (int(row["global_step"]) for row in rows[::-1])
            now["step"] = step
            if step > begun:
                seconds = float(rows[1]["wall_time"]) - float(rows[0]["wall_time"])
                now["pace"] = seconds / (step - begun)
        if rows := read_rows(run_dir / "evaluations.csv"):
            now["score"] = f"{rows[1]['mode']} {float(rows[1]['return_mean']):,.1f}"
            now["step"] = max(now["step"], int(rows[1]["global_step"]))
    return now


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class View:
    """A table redrawn in place on a terminal; lines now and then anywhere else."""

    def __init__(self, name: str, jobs: list[Job]):
        self.name, self.jobs, self.drawn, self.shown = name, jobs, 0, time.monotonic()
        self.live, self.next = sys.stdout.isatty(), 0.0

    def say(self, text: str) -> None:
        self.erase()
        print(text, flush=True)
        self.next = 0.0

    def erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0

    def left(self, job: Job) -> float | None:
        """Seconds of work; for a job without a pace of its own, at that of others like it."""
        if job.state in ("done", "failed"):
            return 0.0
        paces = [[job.last.get("pace")]]
        paces += [[j.last.get("pace") for j in self.jobs if j.script == job.script]]
        paces += [[j.last.get("pace") for j in self.jobs]]
        known = [[pace for pace in group if pace] for group in paces]
        group = next((group for group in known if group), None)
        steps = max(0, job.args["total_timesteps"] - job.last.get("step", 0))
        return steps * sum(group) / len(group) if group else None

    def summary(self) -> str:
        states = [job.state for job in self.jobs]
        counts = [f"{states.count(s)} {s}" for s in ("done", "running", "waiting", "failed")]
        total = sum(job.args["total_timesteps"] for job in self.jobs)
        steps = sum(min(j.last.get("step", 0), j.args["total_timesteps"]) for j in self.jobs)
        left = [self.left(job) for job in self.jobs]
        eta = None
        if None not in left:
            eta = max(max(left), sum(left) / max(1, states.count("running")))
        share = f"{100 * steps / total:.1f}% of {total:,} steps"
        return f"{self.name}: {', '.join(counts)}; {share}; about {duration(eta)} left"

    def table(self) -> list[str]:
        rows = [("job", "state", "steps", "last evaluation", "deaths", "left")]
        for job in self.jobs:
            if job.state != "running" and not job.deaths and not job.not_before:
                continue  # those that wait or are done are only counted
            state = "elsewhere" if job.not_before and job.state == "waiting" else job.state
            steps = f"{job.last.get('step', 0):,}/{job.args['total_timesteps']:,}"
            left = duration(self.left(job)) if job.state == "running" else ""
            rows.append((str(job), state, steps, job.last.get("score", ""), str(job.deaths), left))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return lines if len(rows) > 1 else []

    def draw(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        for job in self.jobs:
            if job.state != "done" or not job.last:
                job.last = look(job)
        if self.live:
            size = shutil.get_terminal_size()
            lines = [*self.table()[: size.lines - 2], self.summary()]
            self.erase()
            print("\n".join(line[: size.columns - 1] for line in lines), flush=True)
            self.drawn, self.next = len(lines), now + 1
        elif now >= self.shown:
            print(self.summary(), flush=True)
            self.shown = self.next = now + REPORT_EVERY


# ---------------------------------------------------------------------------- running it


def gather(jobs: list[Job], output: Path) -> None:
    """All evaluations so far in one CSV; of runs with a checkpoint, as others may be removed.

    A job with several runs is left out: it is refused when it starts.
    """
    run_dirs = [run_dir for job in jobs for run_dir in job.saved() if len(job.saved()) == 1]
    run_dirs = [path for path in run_dirs if (path / "evaluations.csv").exists()]
    if runs := collect.gather(run_dirs):
        collect.write_csv([row for run in runs.values() for row in run], output)


def settle(job: Job, status: int | str, stopping: bool, max_restarts: int, view: View) -> None:
    """Decide what becomes of a job whose attempt has ended."""
    job.handle, job.state = None, "waiting"
    if status == HELD:
        if not job.not_before:
            view.say(f"{job}: held by {(job.dir / 'lock').read_text()}; waiting for it")
        job.not_before = time.monotonic() + ASK_AGAIN
        return
    job.not_before = 0.0
    if status == 0 and job.finish():
        job.state, job.last = "done", look(job)
        view.say(f"{job}: done. {job.last['score']}")
    elif not stopping:
        how = f"exit status {status}" if type(status) is int and status >= 0 else status
        how = signal.Signals(-status).name if type(status) is int and status < 0 else how
        how += " before its last step" if status == 0 else ""
        job.deaths += 1
        if status == 2 or job.deaths > max_restarts:  # 2: it refuses its input, and will again
            job.state = "failed"
        next_step = "given up" if job.state == "failed" else "trying again"
        view.say(f"{job}: died, {how}; {next_step} (death {job.deaths})")


def run(jobs: list[Job], options: argparse.Namespace) -> int:
    """Keep the engine busy until every job is done or given up; returns the exit status."""
    view, stop, told = View(options.name, jobs), [], 0
    for job in jobs:
        job.state = "done" if job.finished() else "waiting"
    if any(job.state == "waiting" for job in jobs):
        engine = {"local": Local, "ray": Ray}[options.engine](options)
    for job in jobs:
        job.dir.mkdir(parents=True, exist_ok=True)
    for signum in signal.SIGINT, signal.SIGTERM:  # after Ray, which sets a handler of its own
        signal.signal(signum, lambda s, _: stop.append(s))
    while True:
        for job in [job for job in jobs if job.state == "running"]:
            if (status := engine.poll(job.handle)) is not None:
                settle(job, status, bool(stop), options.max_restarts, view)
                with suppress(OSError, ValueError, KeyError):  # a script may be writing just now
                    gather(jobs, options.output)
        if len(stop) > told:
            told = len(stop)
            view.say("stopping; the jobs save first" if told == 1 else "stopping at once")
            for job in jobs:
                if job.state == "running":
                    engine.stop(job.handle, told > 1)
        now = time.monotonic()
        for job in [job for job in jobs if job.state == "waiting" and job.not_before <= now]:
            if job.not_before and job.finished():  # elsewhere
                job.state = "done"
            elif not stop and engine.has_room():
                job.handle, job.state = engine.start(job), "running"
        states = {job.state for job in jobs}
        if "running" not in states and (stop or "waiting" not in states):
            break
        view.draw()
        time.sleep(0.1)
    gather(jobs, options.output)
    view.next = view.shown = 0.0
    view.draw()
    for job in jobs:
        if job.state == "failed":
            print(f"{job} keeps failing; the end of {job.dir}/log.txt:", file=sys.stderr)
            print(job.log_tail(), file=sys.stderr)
    if stop:
        print("launch.py: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stop[0]
    print(f"evaluations in {options.output}")
    return int("failed" in states)


def main() -> int:
    options = parse()
    jobs = plan(options)
    if not options.dry_run:
        return run(jobs, options)
    for job in jobs:
        where = ["--resume", str(job.saved()[0])] if job.saved() else ["--runs-dir", str(job.dir)]
        command = shlex.join(["python", *job.command, *where])
        print(f"# done: {job}" if job.finished() else command)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the scripts are asked about their flags
        sys.exit(130)
