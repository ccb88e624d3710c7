"""What every piece of gpu.py needs: processes with time limits, MPS, the origin of numbers."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from benchmark import ROOT, commit
from benchmark.files import Refused, read_json
from dataclasses import dataclass, field
from pathlib import Path


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
    campaigns: list[Path] = field(default_factory=list)  # files of launch.py to run instead
    processes: list[subprocess.Popen] = field(default_factory=list)  # all that were started

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
        process = subprocess.Popen(command, env=env | options.pop("env", {}), **options)
        log.close()
        self.processes.append(process)
        return process

    def end_all(self) -> None:
        """Kill what a piece has left running, halted ones too."""
        for process in self.processes:
            stop(process, signal.SIGKILL)
            process.wait()
        self.processes.clear()

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


def origin(job: Job) -> dict:
    """Where and with what the numbers were made, as far as the piece `machine` got."""
    found = {}
    with contextlib.suppress(Refused):
        found = read_json(job.output / "machine.json").get("found", {})
    device = found.get("card") or "a CPU"
    return {"device": device, "torch": found.get("torch", ""), "commit": commit()}
