"""A process that has imported what is slow to import, and forks for every command line it is given.

So a case costs tenths of a second, not seconds, and each still runs a program as python does: its
text as __main__, in a session, folder and environment of its own, with an exit status.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATIENCE = 300  # seconds; what takes longer hangs, as a busy machine may need a minute or two
MEMORY = 12 << 30  # bytes a program may reserve: what asks for more shall fail, not the machine
SLOW_IMPORTS = "torch", "torch._dynamo", "gymnasium.wrappers", "tyro", "numpy", "tqdm"
SLOW_IMPORTS += ("torch.utils.tensorboard",)


# ---------------------------------------------------------------------------- whoever asks
@dataclass
class Result:
    status: int | None  # as a shell's script sees it, negative: killed by that signal, None: hung
    out: str
    err: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err


class Process:
    """A program that runs; its standard streams go to files."""

    def __init__(self, server: "ForkServer", pid: int, streams: list[Path]):
        self.server, self.pid, self.streams, self.status = server, pid, streams, None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def wait(self, sweep: bool = True) -> Result:
        """Until it ends; then nothing that it started is left, unless it shall not be swept."""
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        status = self.status
        if sweep:
            self.server.ask(sweep=self.pid)
        return Result(status, *(path.read_text(errors="replace") for path in self.streams))

    def send(self, signum: int, group: bool = False) -> None:
        """A signal to the process or to all of its group; it may have ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid:  # forked, but not yet in a session of its own
                time.sleep(0.001)
            (os.killpg if group else os.kill)(self.pid, signum)


class ForkServer:
    def __init__(self):
        names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"
        env = os.environ | dict.fromkeys(names, "1") | {"PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
        env.pop("PYTHONWARNINGS", None)
        command = [sys.executable, str(HERE / "fork_server.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)
        self.lock, self.count = threading.Lock(), 0

    def ask(self, **request):
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, program: Path, argv: list, cwd: Path, env=None, **options) -> Process:
        """options: stdout, stderr: "closed", "broken" (no reader) or a path; file_size, a limit."""
        with self.lock:
            self.count += 1
            number = self.count
        streams = [Path(f"{cwd}.{number}.{name}") for name in ("out", "err")]
        for path in streams:
            path.write_text("")
        request = {"program": str(program), "argv": [str(word) for word in argv], "cwd": str(cwd)}
        request |= {"env": env or {}, "stdout": str(streams[0]), "stderr": str(streams[1])}
        return Process(self, self.ask(**(request | options)), streams)

    def run(self, program: Path, argv: list, cwd: Path, env=None, **options) -> Result:
        return self.start(program, argv, cwd, env, **options).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------- the server
def children() -> set[int]:
    """Its own and, as it reaps orphans, those that outlived their parents."""
    found = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in found.read_text().split()} if found.exists() else set()


def sweep(pid: int, running: set[int]) -> None:
    """Kill what is left of a program: its group, and orphans that made themselves another."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    running.discard(pid)
    for _ in range(50):
        left = children() - running
        if not left:
            break
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def open_as(what: str) -> int | None:
    """A file descriptor to write to; None: closed."""
    if what == "closed":
        return None
    if what == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open(what, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def become(request: dict, code) -> None:
    """In the forked child: run the program as python would."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in (1, "stdout"), (2, "stderr"):
        file = open_as(request[name])
        if file is None:
            os.close(number)
            setattr(sys, name, None)  # as python itself does
        else:
            os.dup2(file, number)
            os.close(file)
    if "file_size" in request:
        limit = request["file_size"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [request["program"], *request["argv"]]
    sys.path[0] = str(Path(request["program"]).parent)
    sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path.append(str(HERE))  # for the environments of the tests
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = request["program"]
    end(exit_status(code, vars(main)))


def exit_status(code, names: dict) -> int:
    """Of the program, with what the interpreter prints at its end."""
    try:
        exec(code, names)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """As python ends, but that it does not free objects one by one, which takes a while."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.write(2, f"Exception ignored: {error!r}\n".encode())
            status = 120
    os._exit(status & 255)


def serve() -> tuple[dict, object]:
    """Answer requests; in a forked child, return what it shall become."""
    # else a KeyboardInterrupt may be raised, and lost, before a program's first line is reached
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans are handed to it
    running, codes = set(), {}
    for line in requests:
        request, answer = json.loads(line), None
        if "program" in request:
            program = request["program"]
            if program not in codes:
                codes[program] = compile(Path(program).read_text(), program, "exec")
            pid = os.fork()
            if pid == 0:
                requests.close()
                answers.close()
                return request, codes[program]
            running.add(pid)
            answer = pid
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            sweep(request["sweep"], running)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in list(running):
        sweep(pid, running)
    sys.exit()


if __name__ == "__main__":
    for name in SLOW_IMPORTS:
        __import__(name)
    __import__("torch").set_num_threads(1)
    gc.collect()
    gc.freeze()  # or a child's first collection would copy all of this
    become(*serve())
