"""gpu.py --campaigns: those of launch.py side by side on one GPU, as far as the time reaches."""

import contextlib
import os
import signal
import subprocess
import time
from benchmark.measure.gpu_job import Failed, Job, Mps
from pathlib import Path

# seconds before the end at which runs are asked to save, are stopped at once, and all is killed
STOPPING = (30, signal.SIGTERM), (8, signal.SIGTERM), (2, signal.SIGKILL)
TOY = """--total-timesteps 400 --learning-starts 200 --eval-every 200 --checkpoint-every 200
    --eval-episodes 1 --batch-size 16 --no-compile"""


def campaigns(job: Job) -> dict:
    """Every campaign's evaluations so far in <its file's name>_cuda.csv; the cores are shared."""
    # a process waits for its GPU in a loop, so more of them than cores would wait for each other
    workers = max(1, len(os.sched_getaffinity(0)) // len(job.campaigns))
    with contextlib.ExitStack() as stack:
        env = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # or they take turns
            env |= stack.enter_context(Mps(job)).env
        processes = {path: start(job, path, workers, env) for path in job.campaigns}
        wait(job, list(processes.values()))
    wrong = [
        f"{path.stem}: exit status {process.returncode}\n{job.tail(path.stem, 6)}"
        for path, process in processes.items()
        if process.returncode
    ]
    if wrong:  # what was found by then is in the CSVs all the same
        raise Failed("\n".join(wrong))
    return {"campaigns": len(processes)}


def start(job: Job, path: Path, workers: int, env: dict) -> subprocess.Popen:
    command = ["benchmark/launch/launch.py", path.resolve(), "--workers", workers]
    command += ["--runs-dir", (job.output / "runs").resolve()]
    command += ["--output", (job.output / f"{path.stem}_{job.device}.csv").resolve()]
    if job.smoke:
        command += [f"--flags={TOY}", "--seeds", 1, "--envs", "Pendulum-v1"]
    else:
        command += ["--flags=--precision tf32"]
    return job.start(path.stem, command, env=env)


def wait(job: Job, processes: list[subprocess.Popen]) -> None:
    """Until all have ended; when the time is up launch.py hands two signals on to its runs."""
    running = processes
    for margin, signum in STOPPING:
        while (running := [p for p in running if p.poll() is None]) and job.left > margin:
            time.sleep(0.2)
        for process in running:
            process.send_signal(signum)
    for process in processes:
        process.wait()
