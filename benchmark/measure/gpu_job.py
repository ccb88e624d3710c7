"""What every piece of gpu.py needs: processes with time limits, MPS, the origin of numbers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmark import ROOT, commit


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


def origin(job: Job) -> dict:
    """Where and with what the numbers were made, as far as the piece `machine` got."""
    path = job.output / "machine.json"
    found = json.loads(path.read_text()).get("found", {}) if path.exists() else {}
    device = found.get("card") or "a CPU"
    return {"device": device, "torch": found.get("torch", ""), "commit": commit()}
