"""gpu.py's second stage: speed.py, whole runs alone and side by side, latency.py."""

import contextlib
import itertools
import shutil
import signal
import subprocess
import time
from benchmark import scripts
from benchmark.files import Refused, read_table, write_csv
from benchmark.measure.gpu_job import Failed, Job, Mps, origin, stop
from pathlib import Path

MODES = "eager eager-tf32 compiled graph graph-tf32 captured captured-tf32 captured-bfloat16"
SPEED = {  # script: --settings and --modes of speed.py
    "fpmd_meanflow_online": ("32,1", MODES),
    "fpmd_online": ("32,20", MODES),
    "mvp_online": ("32,1", "eager compiled graph captured captured-tf32"),
    "meanflowql_offline_to_online": ("", "eager compiled graph captured captured-tf32"),
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
NAMES = {"fpmd_meanflow_online": "FPMD-M", "fpmd_online": "FPMD-R", "sac_online": "SAC"}


def speed(job: Job) -> dict:
    """speed.py for all scripts: they get ready side by side and time one after the other."""
    names = ["mvp_online", "sac_online"] if job.smoke else list(SPEED)
    found, errors, processes = [], [], {}
    for name in names:
        settings, modes = SPEED[name]
        command = [
            "benchmark/measure/speed.py",
            "--hold",
            "--device",
            job.device,
            "--scripts",
            name,
        ]
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
            found += read_table(job.output / f"speed_{name}.csv")
        except (Failed, Refused, OSError) as error:
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
    command = ["benchmark/measure/latency.py", "--device", job.device, "--output", output.resolve()]
    command += ["--modes", "eager", *([] if job.smoke else ["captured"])]
    command += ["--calls", 20 if job.smoke else 200, "--threads", 1]
    command += ["--policies", "FPMD-R", "FPMD-M", "MVP", "SAC", "DPMD"]
    job.wait("latency", job.start("latency", command), 100)
    rows = read_table(output)
    for row in rows:
        case = (
            f"{row['policy']:14s} {row['steps']:>3s} steps, batch {row['batch']:>4s}, {row['mode']}"
        )
        print(f"    {case:44s} median {row['median_ms']} ms, 99th percentile {row['p99_ms']} ms")
    return {"rows": len(rows)}
