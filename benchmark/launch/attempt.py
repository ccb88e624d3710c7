"""One attempt at a job, in a process of its own."""

import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from benchmark.files import fail
from benchmark.launch.jobs import run_dirs
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

LAUNCHER = str(Path(__file__).resolve().with_name("launch.py"))
HELD = 75  # exit status of an attempt at a job that another process is running, EX_TEMPFAIL


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


def environment(threads: int) -> dict:
    """One job's libraries keep to its threads, torch's compiler too; its log is never behind."""
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
    return dict.fromkeys(names, str(threads)) | {"PYTHONUNBUFFERED": "1"}
