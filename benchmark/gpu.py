"""All that a lent GPU can tell, in minutes: is it right, how fast is it, what does it learn?

    prove   versions, the card; tests/test_cuda.py: eager, graph, compiled and captured updates
            agree, a resumed run is an uninterrupted one, every script trains
    time    benchmark/speed.py for every script; whole runs alone and side by side, with simulators
            in the process and in processes of their own; benchmark/latency.py
    train   runs at the published budget side by side, in the order of TRAIN, as many as will finish
            at the speeds that were measured

Each piece runs in processes of its own within a time limit of its own. What it finds is on disk at
once; what fails is recorded with the end of its output, and the next piece begins. Started again
with the same --output, only what is missing or failed is done.

    python benchmark/gpu.py --minutes 9 --output gpu
    python benchmark/gpu.py --minutes 2 --output gpu --stages prove
    python benchmark/gpu.py --output smoke --smoke   # all of it at toy size, without a GPU

In --output: <piece>.json (status, seconds, what it found), logs/, runs/, and of the pieces
prove.csv, speed_cuda.csv, rates_cuda.csv, latency_cuda.csv and campaign_cuda.csv.
"""

import argparse
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
from dataclasses import dataclass, field
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
    "FPMD-R": [("fpmd_online", ASYNC)],
    "SAC": [("sac_online", ASYNC)],
    "three FPMD-M": [("fpmd_meanflow_online", [*ASYNC, f"--seed={s}"]) for s in (1, 2, 3)],
    "FPMD-M, eager": [("fpmd_meanflow_online", [*ASYNC, "--no-compile"])],
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
NAMES = {"fpmd_meanflow_online": "FPMD-M", "fpmd_online": "FPMD-R", "sac_online": "SAC"}


class Failed(Exception):
    """A piece did not work; the text says why."""


@dataclass
class Job:
    """What every piece needs to know."""

    output: Path
    deadline: float  # on time.monotonic's clock
    smoke: bool
    rates: dict[str, float] = field(default_factory=dict)  # steps per second of each run

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
        write_csv(rows, job.output / "prove.csv")
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
        only = "update generation ranking learning acting one-step".split()
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
    groups, jobs = (dict(itertools.islice(RATES.items(), 2)) if job.smoke else RATES), {}
    for group, members in groups.items():
        for i, (script, flags) in enumerate(members):
            name = f"{group} {i + 1}".replace(",", "").replace(" ", "-")
            flags = [*flags, "--env-id=Ant-v4", "--total-timesteps=1000000", "--log-every=250"]
            flags += ["--learning-starts=2000", "--eval-every=0", "--checkpoint-every=0"]
            flags += [f"--runs-dir={(folder / name).resolve()}", f"--device={job.device}"]
            if job.smoke:
                flags += ["--no-compile", "--num-candidates=2", "--batch-size=16"]
                flags = [f for f in flags if "tf32" not in f]
            process = job.start(f"rates-{name}", [scripts()[script], *flags])
            jobs[name] = (group, process, folder / name)
    started = {}
    limit = time.monotonic() + min(150, job.left)
    while len(started) < len(jobs) and time.monotonic() < limit:
        for name, (_, process, directory) in jobs.items():
            if name not in started and process.poll() is not None:
                started[name] = None
            elif name not in started:
                (run_dir,) = list(directory.glob("*")) or [directory]
                if last_step(run_dir) >= (2500 if job.smoke else 4000):
                    os.killpg(process.pid, signal.SIGSTOP)
                    started[name] = run_dir
        time.sleep(0.02)
    rows, errors = [], []
    for group in groups:
        members = [name for name, (own, _, _) in jobs.items() if own == group]
        if not all(started.get(name) for name in members):
            errors += [f"{name} did not start\n{job.tail(f'rates-{name}', 8)}" for name in members]
            continue
        for name in members:
            os.killpg(jobs[name][1].pid, signal.SIGCONT)
        time.sleep(0.5)
        before, clock = {name: last_step(started[name]) for name in members}, time.monotonic()
        time.sleep(2 if job.smoke else 6)
        spent = time.monotonic() - clock
        after = {name: last_step(started[name]) for name in members}
        for name in members:
            os.killpg(jobs[name][1].pid, signal.SIGSTOP)
        each = [(after[name] - before[name]) / spent for name in members]
        row = {"what": group, "runs": len(members), "seconds": round(spent, 2)}
        row["steps_per_second_each"] = round(sum(each) / len(each), 1)
        row["seconds_per_million_steps"] = round(1e6 / max(1e-9, sum(each) / len(each)), 1)
        rows.append(row)
        write_csv(rows, job.output / f"rates_{job.device}.csv")
        print(f"    {row}")
    for _, process, _ in jobs.values():
        stop(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    if errors:
        raise Failed("\n".join(errors))
    return {row["what"]: row["steps_per_second_each"] for row in rows}


def latency(job: Job) -> dict:
    """latency.py: one-step actions for one state and for 256."""
    output = job.output / f"latency_{job.device}.csv"
    command = ["benchmark/latency.py", "--device", job.device, "--output", output.resolve()]
    command += ["--modes", "eager", *([] if job.smoke else ["captured"])]
    command += ["--calls", 20 if job.smoke else 400, "--threads", 1]
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
def plan(job: Job, steps: int) -> list[tuple]:
    """The longest beginning of TRAIN that should be done in time, side by side.

    A run alone takes 1 / rate seconds a step; of side-by-side ones each takes no less, and all of
    them together no less than what three FPMD-M showed the machine to do. Evaluations come on top.
    """
    measured = json.loads((job.output / "rates.json").read_text())["found"]
    alone = {script: measured[NAMES[script]] for script in NAMES if NAMES[script] in measured}
    together = 3 * measured.get("three FPMD-M", 0)  # steps per second of FPMD-M
    chosen, share = [], 0.0
    for script, env_id, seed in TRAIN:
        if script not in alone or not together:
            continue
        new_share = share + alone["fpmd_meanflow_online"] / alone[script] / together
        seconds = steps * max(
            new_share, 1 / min(alone[s] for s in {script, *(c[0] for c in chosen)})
        )
        if 1.1 * seconds + EVALUATING + COMPILING > job.left:
            break
        chosen.append((script, env_id, seed))
        share = new_share
    return chosen


EVALUATING = 60  # seconds of a run's evaluations
COMPILING = 30  # seconds until a run is up to speed


def train(job: Job) -> dict:
    """Whole runs side by side; their evaluations in campaign_cuda.csv."""
    steps = 1_000 if job.smoke else job.steps
    chosen = TRAIN[:2] if job.smoke else job.chosen or plan(job, steps)
    if not chosen:
        raise Failed(f"no run of {steps:,} steps can finish in {job.left:.0f} s: none was started")
    print(f"    {len(chosen)} runs of {steps:,} steps in {job.left:.0f} s: {chosen}")
    directory, processes = (job.output / "runs").resolve(), {}
    for script, env_id, seed in chosen:
        flags = [f"--env-id={env_id}", f"--seed={seed}", f"--total-timesteps={steps}"]
        flags += ["--eval-every=100000", "--checkpoint-every=0", *ASYNC]
        flags += [f"--runs-dir={directory}", f"--device={job.device}"]
        if job.smoke:
            flags = [flag for flag in flags if "tf32" not in flag]
            flags += ["--no-compile", "--num-candidates=2", "--batch-size=16", "--eval-episodes=1"]
            flags += ["--learning-starts=500", "--eval-every=500"]
        name = f"train-{script}-{env_id}-{seed}"
        processes[name] = job.start(name, [scripts()[script], *flags])
    unfinished = []
    margin = 12  # seconds to stop, to collect, to write
    while any(process.poll() is None for process in processes.values()):
        if job.left < margin:
            unfinished = [name for name, p in processes.items() if p.poll() is None]
            for name in unfinished:
                stop(processes[name], signal.SIGKILL)
            break
        time.sleep(0.5)
    failed = [
        f"{name}: exit status {process.wait()}\n{job.tail(name, 6)}"
        for name, process in processes.items()
        if process.wait() and name not in unfinished
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
    text = "train the first so many of TRAIN, whatever the measured speeds promise"
    parser.add_argument("--runs", type=int, help=text)
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    return parser.parse_args()


def main() -> None:
    options = parse()
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    job = Job(options.output, deadline, options.smoke)
    job.steps, job.chosen = options.steps, TRAIN[: options.runs] if options.runs else None
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
