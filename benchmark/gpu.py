"""All that a lent GPU can tell, in minutes: is it right, how fast is it, what does it learn?

    prove   versions, the card; tests/test_cuda.py: eager, graph, compiled and captured updates
            agree, a resumed run is an uninterrupted one, every script trains
    time    benchmark/speed.py for every script; whole runs alone and side by side, with simulators
            in the process and in processes of their own; benchmark/latency.py
    train   runs at the published budget side by side, the next ones of TRAIN, as many as will
            finish at the speeds that were measured

Each piece runs in processes of its own within a time limit of its own. What it finds is on disk at
once; what fails is recorded with the end of its output, and the next piece begins. Started again
with the same --output, only what is missing or failed is done.

    python benchmark/gpu.py --minutes 9 --output gpu
    python benchmark/gpu.py --minutes 2 --output gpu --stages prove
    python benchmark/gpu.py --output smoke --smoke   # all of it at toy size, without a GPU

In --output: <piece>.json (status, seconds, what it found), logs/, runs/, and of the pieces
prove_cuda.csv, speed_cuda.csv, rates_cuda.csv, latency_cuda.csv and campaign_cuda.csv.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import collect
from collect import ROOT, scripts, write_csv

STAGES = "prove", "time", "train"
MODES = "eager eager-tf32 compiled graph graph-tf32 captured captured-tf32 captured-bfloat16"
SPEED = {  # script: --settings and --modes of speed.py
    "fpmd_meanflow_online": ("32,1", MODES),
    "fpmd_online": ("32,20", MODES),
    "mvp_online": ("32,1", "eager compiled graph captured captured-tf32"),
    "sac_online": ("", "eager compiled graph captured captured-tf32"),
}
FLAGS = ["--precision=tf32", "--torch-threads=1"]  # of the runs; JAX, too, multiplies in TF32
ASYNC = [*FLAGS, "--async-envs"]
RATES = {  # what runs together: (script, flags) of each
    "FPMD-M": [("fpmd_meanflow_online", ASYNC)],
    "FPMD-M, simulators in the process": [("fpmd_meanflow_online", FLAGS)],
    "FPMD-M, float32": [("fpmd_meanflow_online", ASYNC[1:])],
    "FPMD-M, eager": [("fpmd_meanflow_online", [*ASYNC, "--no-compile"])],
    "FPMD-R": [("fpmd_online", ASYNC)],
    "SAC": [("sac_online", ASYNC)],
    "three FPMD-M": [("fpmd_meanflow_online", ASYNC)] * 3,
    "three FPMD-M, MPS": [("fpmd_meanflow_online", ASYNC)] * 3,
    "six, MPS": [("fpmd_meanflow_online", ASYNC)] * 3 + [("sac_online", ASYNC)] * 3,
}
TRAIN = [  # (script, environment, seed), most telling first
    *[("fpmd_meanflow_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("sac_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_meanflow_online", "HalfCheetah-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_meanflow_online", "Humanoid-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_online", "HalfCheetah-v4", seed) for seed in (1, 2, 3)],
    *[
        ("fpmd_meanflow_online", env_id, seed)
        for env_id in ("Walker2d-v4", "Hopper-v4", "Swimmer-v4")
        for seed in (1, 2, 3)
    ],
]
OWN_FLAGS = {"sac_online": ["--reward-scale=1", "--alpha-init=1", "--alpha-lr=1e-3"]}
NAMES = {"fpmd_meanflow_online": "FPMD-M", "fpmd_online": "FPMD-R", "sac_online": "SAC"}
TOGETHER = "six, MPS", "three FPMD-M, MPS", "three FPMD-M", "FPMD-M"  # of RATES, to train
EVALUATING, COMPILING = 50, 40  # seconds of a run's evaluations, until it is up to speed


class Failed(Exception):
    """A piece did not work; the text says why."""


@dataclass
class Job:
    """What every piece needs to know."""

    output: Path
    deadline: float  # on time.monotonic's clock
    smoke: bool
    steps: int = 1_000_000  # of a training run
    at_least: int = 0  # runs to train, whether or not they can finish

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def start(self, name: str, command: list, **options) -> subprocess.Popen:
        """A process group whose output goes to logs/<name>.txt."""
        log = (self.output / "logs" / f"{name}.txt").open("a")
        options = {"stdout": log, "stderr": log, "start_new_session": True, "cwd": ROOT} | options
        env = os.environ | {"PYTHONUNBUFFERED": "1", "GPU_SMOKE": str(int(self.smoke))}
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # of each of many processes
        env.pop("PYTEST_XDIST_WORKER", None)  # ours, when a test started this program
        command = [sys.executable, *map(str, command)]
        return subprocess.Popen(command, env=env | options.pop("env", {}), **options)

    def tail(self, name: str, lines: int = 12) -> str:
        text = (self.output / "logs" / f"{name}.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait(self, name: str, process: subprocess.Popen, limit: float) -> None:
        """Until it ends well; Failed with the end of its output if it does not."""
        try:
            status = process.wait(max(1, min(limit, self.left)))
        except subprocess.TimeoutExpired:
            stop(process, signal.SIGKILL)
            raise Failed(f"{name}: not ready after its time limit\n{self.tail(name)}") from None
        if status:
            raise Failed(f"{name}: exit status {status}\n{self.tail(name)}")


def stop(process: subprocess.Popen, signum: int) -> None:
    """Signal a process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signum)


class Mps:
    """NVIDIA's server that lets kernels of several processes run at once, while it is entered.

    Without it processes take turns on the card. env: what a process needs in order to use it.
    """

    def __init__(self, job: Job):
        self.program = None if job.smoke else shutil.which("nvidia-cuda-mps-control")
        names = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
        folder = (job.output / f"mps-{time.monotonic_ns()}").resolve()
        self.env = {name: str(folder) for name in names} if self.program else {}
        folder.mkdir(exist_ok=True)

    def __enter__(self):
        if self.program:
            call = [self.program, "-d"]
            subprocess.run(call, env=os.environ | self.env, check=True, timeout=20)
        return self

    def __exit__(self, *_):
        if self.program:
            env = os.environ | self.env
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([self.program], input="quit\n", text=True, env=env, timeout=10)


# ---------------------------------------------------------------------------- prove
def machine(job: Job) -> dict:
    """Versions and the card."""
    code = (
        "import json, platform, os, torch, gymnasium, mujoco, numpy\n"
        "p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, "
        "'gymnasium': gymnasium.__version__, 'mujoco': mujoco.__version__, "
        "'numpy': numpy.__version__, 'cores': os.cpu_count(), 'card': p and p.name, "
        "'memory_gib': p and round(p.total_memory / 2**30, 1), "
        "'multiprocessors': p and p.multi_processor_count}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Failed(done.stderr[-2000:])
    found = json.loads(done.stdout)
    if smi := shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        done = subprocess.run([smi, query, "--format=csv"], capture_output=True, text=True)
        found["nvidia_smi"] = done.stdout.strip()
    return found


def origin(job: Job) -> dict:
    """Where and with what the numbers were made, as far as the piece `machine` got."""
    path = job.output / "machine.json"
    found = json.loads(path.read_text()).get("found", {}) if path.exists() else {}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = found.get("card") or "a CPU"
    return {"device": device, "torch": found.get("torch", ""), "commit": commit}


def pytest_runtest_logreport(report) -> None:
    """With -p gpu: pytest writes each test's outcome to $GPU_REPORT as soon as it has it."""
    path = os.environ.get("GPU_REPORT")
    if not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid.split("::")[-1], "outcome": report.outcome}
        row |= {"seconds": round(report.duration, 1), "properties": dict(report.user_properties)}
        if report.failed:
            row["why"] = report.longreprtext[-1500:]
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def tests(job: Job) -> dict:
    """tests/test_cuda.py, every outcome on disk at once."""
    report = (job.output / "tests.jsonl").resolve()
    report.unlink(missing_ok=True)
    env = {"GPU_REPORT": str(report), "PYTHONPATH": str(ROOT / "benchmark")}
    env["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    workers = "2" if job.smoke else "10"
    command = ["-m", "pytest", "-p", "gpu", "-n", workers, "-q", "--tb=short", "-m", "cuda"]
    command += ["tests/test_cuda.py"]
    if job.smoke:
        command += ["-k", "test_a_graph or (test_main_trains and eager and mvp)"]
    process = job.start("tests", command, env=env)
    failed = None
    try:
        job.wait("tests", process, 240)
    except Failed as error:
        failed = error
    rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    for row in rows:
        row["properties"] = "; ".join(f"{k}: {v}" for k, v in row["properties"].items())
        print(
            f"    {row['outcome']:8s} {row['seconds']:6.1f} s  {row['test']}  {row['properties']}"
        )
        if row["outcome"] == "failed":
            print("\n".join(f"        {line}" for line in row["why"].splitlines()[-6:]))
        row["why"] = row.get("why", "")
    if rows:
        write_csv([row | origin(job) for row in rows], job.output / f"prove_{job.device}.csv")
    if failed:
        raise failed
    return {
        outcome: sum(row["outcome"] == outcome for row in rows)
        for outcome in {row["outcome"] for row in rows}
    }


# ---------------------------------------------------------------------------- time
def speed(job: Job) -> dict:
    """speed.py for all scripts: they get ready side by side and time one after the other."""
    names = ["mvp_online", "sac_online"] if job.smoke else list(SPEED)
    found, errors, processes = [], [], {}
    for name in names:
        settings, modes = SPEED[name]
        command = ["benchmark/speed.py", "--hold", "--device", job.device, "--scripts", name]
        command += ["--settings", settings] if settings else []
        only = ["update", "generation", "ranking", "learning", "acting", "one-step"]
        command += ["--only", *only, *(["environments"] if name == names[0] else [])]
        command += ["--modes", *(["eager"] if job.smoke else modes.split())]
        command += ["--repetitions", 2 if job.smoke else 9, "--threads", 2]
        command += ["--batch-size", 16] if job.smoke else []
        command += ["--output", (job.output / f"speed_{name}.csv").resolve()]
        pipes = {"stdin": subprocess.PIPE, "text": True}
        processes[name] = job.start(f"speed_{name}", command, **pipes)
    ready = time.monotonic() + min(180, job.left)
    while time.monotonic() < ready:
        waiting = [
            name
            for name, process in processes.items()
            if process.poll() is None and job.tail(f"speed_{name}", 1) != "warm"
        ]
        if not waiting:
            break
        time.sleep(0.2)
    for name, process in processes.items():
        try:
            if process.poll() is None:
                process.stdin.write("\n")
                process.stdin.flush()
            job.wait(f"speed_{name}", process, 60)
            with (job.output / f"speed_{name}.csv").open(newline="") as file:
                found += list(csv.DictReader(file))
        except (Failed, OSError) as error:
            errors.append(str(error))
            stop(process, signal.SIGKILL)
    if found:
        write_csv(found, job.output / "speed_cuda.csv")
    for row in found:
        case = (
            f"{row['script']:22s} {row['mode']:9s} {row['precision']:9s} {row['measurement']:24s}"
        )
        print(f"    {case} {row['milliseconds']:>10s} ms  {row['ratio_to_floor']:>8s} x floor")
    if errors:
        raise Failed("\n".join(errors))
    return {"rows": len(found)}


def last_step(run_dir: Path) -> int:
    """Of metrics.csv, 0 before there is one."""
    path = run_dir / "metrics.csv"
    rows = path.read_text().splitlines() if path.exists() else []
    return int(rows[-1].split(",")[0]) if len(rows) > 1 and rows[-1][:1].isdigit() else 0


def rates(job: Job) -> dict:
    """Steps per second of whole runs, alone and side by side.

    All of them start at once; whoever has learnt a little is halted. Then each group has a few
    seconds for itself. So nobody compiles while another one is timed.
    """
    folder = job.output / "rates"
    shutil.rmtree(folder, ignore_errors=True)
    groups = dict(itertools.islice(RATES.items(), 2)) if job.smoke else RATES
    try:
        mps = contextlib.ExitStack()
        try:
            env = mps.enter_context(Mps(job)).env
        except (OSError, subprocess.SubprocessError) as error:
            print(f"    no MPS: {error}")
            groups, env = {name: g for name, g in groups.items() if "MPS" not in name}, {}
        with mps:
            return time_groups(job, folder, groups, env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def time_groups(job: Job, folder: Path, groups: dict, mps: dict) -> dict:
    processes, needed = {}, {}
    for group, members in groups.items():
        needed[group] = []
        for script, flags in members:
            env = mps if "MPS" in group else {}
            same = [n for n, (s, f, e, _) in processes.items() if (s, f, e) == (script, flags, env)]
            free = [name for name in same if name not in needed[group]]
            if not free:  # groups share processes that are alike
                name = f"{script}-{len(processes)}"
                process = start_rate(job, name, folder / name, script, flags, env)
                processes[name] = script, flags, env, process
                free = [name]
            needed[group].append(free[0])
    started, limit = {}, time.monotonic() + min(80, job.left)
    while len(started) < len(processes) and time.monotonic() < limit:
        for name, (*_, process) in processes.items():
            if name not in started and process.poll() is not None:
                started[name] = None
            elif name not in started:
                (run_dir,) = list((folder / name).glob("*")) or [folder / name]
                if last_step(run_dir) >= (2500 if job.smoke else 4000):
                    stop(process, signal.SIGSTOP)
                    started[name] = run_dir
        time.sleep(0.02)
    for name in set(processes) - set(started):
        stop(processes[name][-1], signal.SIGKILL)
    rows, errors, where = [], [], origin(job)
    for group, members in needed.items():
        if missing := [name for name in members if not started.get(name)]:
            errors += [f"{group}: {n} did not start\n{job.tail(f'rates-{n}', 8)}" for n in missing]
            continue
        for name in members:
            stop(processes[name][-1], signal.SIGCONT)
        time.sleep(0.5)
        before, clock = {name: last_step(started[name]) for name in members}, time.monotonic()
        time.sleep(2 if job.smoke else 4)
        spent = time.monotonic() - clock
        after = {name: last_step(started[name]) for name in members}
        for name in members:
            stop(processes[name][-1], signal.SIGSTOP)
        per_second = {}
        for name in members:
            own = per_second.setdefault(NAMES[processes[name][0]], [])
            own.append((after[name] - before[name]) / spent)
        for algorithm, each in per_second.items():
            rate = sum(each) / len(each)
            row = {"what": group, "runs": len(members), "algorithm": algorithm}
            row |= {"seconds": round(spent, 2), "steps_per_second_each": round(rate, 1)}
            row["seconds_per_million_steps"] = round(1e6 / max(1e-9, rate), 1)
            rows.append(row)
            write_csv([row | where for row in rows], job.output / f"rates_{job.device}.csv")
            print(f"    {row}", flush=True)
    for *_, process in processes.values():
        stop(process, signal.SIGKILL)
    if errors:
        print("\n".join(errors))
    if not rows:
        raise Failed("\n".join(errors))
    return {f"{row['what']}: {row['algorithm']}": row["steps_per_second_each"] for row in rows}


def start_rate(job, name: str, directory: Path, script: str, flags: list, env: dict):
    """A run of the published setting that learns after 2,000 steps and only writes its log."""
    flags = [*flags, "--env-id=Ant-v4", "--total-timesteps=1000000", "--log-every=250"]
    flags += ["--learning-starts=2000", "--eval-every=0", "--checkpoint-every=0"]
    flags += [f"--runs-dir={directory.resolve()}", f"--device={job.device}"]
    if job.smoke:
        flags += ["--no-compile", "--num-candidates=2", "--batch-size=16"]
        flags = [flag for flag in flags if "tf32" not in flag]
    return job.start(f"rates-{name}", [scripts()[script], *flags], env=env)


def latency(job: Job) -> dict:
    """latency.py: one-step actions for one state and for 256."""
    output = job.output / f"latency_{job.device}.csv"
    command = ["benchmark/latency.py", "--device", job.device, "--output", output.resolve()]
    command += ["--modes", "eager", *([] if job.smoke else ["captured"])]
    command += ["--calls", 20 if job.smoke else 200, "--threads", 1]
    command += ["--policies", "FPMD-R", "FPMD-M", "MVP", "SAC", "DPMD"]
    job.wait("latency", job.start("latency", command), 100)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        case = (
            f"{row['policy']:14s} {row['steps']:>3s} steps, batch {row['batch']:>4s}, {row['mode']}"
        )
        print(f"    {case:44s} median {row['median_ms']} ms, 99th percentile {row['p99_ms']} ms")
    return {"rows": len(rows)}


# ---------------------------------------------------------------------------- train
def plan(job: Job, steps: int) -> tuple[list[tuple], bool]:
    """The first group of TOGETHER that finishes at its measured speed, and whether with MPS.

    Its members are the next ones of TRAIN with the group's scripts. If none finishes and there is
    an --at-least, it is the group of that size or more that comes furthest.
    """
    measured = json.loads((job.output / "rates.json").read_text())["found"]
    slowest = {}
    for group in TOGETHER:
        rates = [rate for key, rate in measured.items() if key.startswith(f"{group}: ")]
        if rates:
            slowest[group] = min(rates)
    finishing = [
        group
        for group, rate in slowest.items()
        if 1.05 * steps / rate + EVALUATING + COMPILING <= job.left
    ]
    enough = [group for group in slowest if len(RATES[group]) >= job.at_least > 0]
    if not finishing and not enough:
        return [], False
    group = finishing[0] if finishing else max(enough, key=slowest.get)
    runs = list(TRAIN)
    for script, _ in RATES[group]:
        runs.append(runs.pop(next(i for i, run in enumerate(runs) if run[0] == script)))
    return runs[-len(RATES[group]) :], "MPS" in group


def train(job: Job) -> dict:
    """Whole runs side by side; their evaluations in campaign_cuda.csv."""
    steps = 1_000 if job.smoke else job.steps
    chosen, mps = (TRAIN[:2], False) if job.smoke else plan(job, steps)
    if not chosen:
        raise Failed(f"no run of {steps:,} steps can finish in {job.left:.0f} s: none was started")
    names = [f"{NAMES[script]} {env_id} seed {seed}" for script, env_id, seed in chosen]
    sharing = ", with MPS" if mps else ""
    print(f"    in {job.left:.0f} s {steps:,} steps each{sharing}: {names}", flush=True)
    with contextlib.ExitStack() as stack:
        env = {}
        if mps:
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # or they take turns
                env = stack.enter_context(Mps(job)).env
        return train_together(job, chosen, steps, env)


def train_together(job: Job, chosen: list[tuple], steps: int, env: dict) -> dict:
    """Side by side until all are done or the time is."""
    directory, processes = (job.output / "runs").resolve(), {}
    for script, env_id, seed in chosen:
        flags = [f"--env-id={env_id}", f"--seed={seed}", f"--total-timesteps={steps}"]
        flags += ["--eval-every=100000", "--checkpoint-every=0", *ASYNC]
        flags += [f"--runs-dir={directory}", f"--device={job.device}"]
        if job.smoke:
            flags = [flag for flag in flags if "tf32" not in flag]
            flags += ["--no-compile", "--num-candidates=2", "--batch-size=16", "--eval-episodes=1"]
            flags += ["--learning-starts=500", "--eval-every=500"]
        flags += OWN_FLAGS.get(script, [])
        name = f"train-{script}-{env_id}-{seed}"
        processes[name] = job.start(name, [scripts()[script], *flags], env=env)

    def running() -> list[str]:
        return [name for name, process in processes.items() if process.poll() is None]

    unfinished = []
    for margin, signum in (25, signal.SIGTERM), (8, signal.SIGKILL):  # save, or at least collect
        while running() and job.left > margin:
            time.sleep(0.5)
        unfinished = unfinished or running()
        for name in running():
            os.kill(processes[name].pid, signum)
    for name in running():
        stop(processes[name], signal.SIGKILL)
        processes[name].wait()
    failed = [
        f"{name}: exit status {process.returncode}\n{job.tail(name, 6)}"
        for name, process in processes.items()
        if process.returncode and name not in unfinished
    ]
    runs = sorted(directory.glob("*"))
    if found := collect.gather(runs):
        rows = [row for run in found.values() for row in run]
        write_csv(rows, job.output / f"campaign_{job.device}.csv")
        for run in found.values():
            row = run[-1]
            curve = [f"{float(r['return_mean']):.0f}" for r in run if r["mode"] == "one_step"]
            what = f"{row['algorithm']:22s} {row['env_id']:15s} seed {row['seed']}"
            print(f"    {what} {row['global_step']:>8s} steps {row['wall_time']:>8s} s  {curve}")
    if failed or unfinished:
        raise Failed("\n".join([*failed, *(f"{name} was stopped" for name in unfinished)]))
    return {"runs": len(chosen)}


# ---------------------------------------------------------------------------- all
PIECES: list[tuple[str, str, Callable]] = [
    ("prove", "machine", machine),
    ("prove", "tests", tests),
    ("time", "speed", speed),
    ("time", "rates", rates),
    ("time", "latency", latency),
    ("train", "train", train),
]


def run_piece(job: Job, name: str, function: Callable) -> dict:
    """Its JSON, which is on disk when this returns."""
    path, start = job.output / f"{name}.json", time.monotonic()
    if path.exists() and json.loads(path.read_text())["status"] == "ok":
        return json.loads(path.read_text()) | {"seconds": 0, "note": "done before"}
    print(f"{name}: {job.left:.0f} s left", flush=True)
    result = {"status": "ok"}
    try:
        result["found"] = function(job)
    except Failed as error:
        result |= {"status": "failed", "why": str(error)}
    except Exception as error:  # whatever it is, the next piece has its turn
        result |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - start, 1)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"  {name}: {result['status']} after {result['seconds']} s", flush=True)
    if "why" in result:
        print("\n".join(f"    {line}" for line in result["why"].splitlines()), flush=True)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="for everything together")
    parser.add_argument("--output", type=Path, required=True, help="folder, made if missing")
    several = {"nargs": "+", "choices": STAGES, "metavar": "STAGE"}
    text = f"of {', '.join(STAGES)}"
    parser.add_argument("--stages", **several, default=list(STAGES), help=text)
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="of the stages' pieces")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of a training run")
    text = "train so many even if they should not finish"
    parser.add_argument("--at-least", type=int, default=0, metavar="RUNS", help=text)
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    return parser.parse_args()


def main() -> None:
    options = parse()
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    job = Job(options.output, deadline, options.smoke, options.steps, options.at_least)
    results = {}
    for stage, name, function in PIECES:
        if stage in options.stages and (not options.only or name in options.only):
            results[name] = run_piece(job, name, function)
    print("\npiece      status    seconds")
    for name, result in results.items():
        print(f"{name:10s} {result['status']:9s} {result['seconds']:>7}")
    sys.exit(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    main()
