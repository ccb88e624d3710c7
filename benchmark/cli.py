"""How every program of benchmark/ takes a command line, and how it ends: in one line.

Bad input is `<program>: error: ...` with exit status 2, and nothing has been written. What goes
wrong in mid-work is one line with status 1. Signals end with 128 + their number.
TRACEBACK=1 in the environment shows where an exception comes from.
"""

import argparse
import os
import signal
import sys
import traceback
from benchmark.files import Refused, check_folder, check_output, fail
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

MOST_WORDS = 2_000  # characters of a message: input may be a megabyte on one line


def say(message: str) -> None:
    """A line on stderr that names the program, if there is a stderr."""
    line = " ".join(str(message).split())[:MOST_WORDS]
    with suppress(OSError, ValueError, AttributeError):  # closed, full or none at all
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {line}\n")
        sys.stderr.flush()


class Stopped(KeyboardInterrupt):
    """A signal that asks to end, raised so that whatever is half done is tidied up."""

    def __init__(self, signum: int):
        self.signum = signum


def raise_stopped(signum: int, _frame) -> NoReturn:
    raise Stopped(signum)


def explain(error: BaseException) -> int:
    """Say in one line what has happened; returns the exit status."""
    if os.environ.get("TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        signum = signal.Signals(getattr(error, "signum", signal.SIGINT))
        say(f"stopped by {signum.name}")
        return 128 + signum
    if isinstance(error, BrokenPipeError):  # `| head -1`: nobody wants to hear more
        return 128 + signal.SIGPIPE
    if isinstance(error, Refused):
        say(f"error: {error}")
        return 2
    if isinstance(error, ModuleNotFoundError):
        say(f"error: {error}: pip install -r benchmark/requirements.txt")
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror}")
    else:
        say(f"error: {type(error).__name__}: {error} (TRACEBACK=1 shows where)")
    return 1


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call main and exit with the status it returns; whatever goes wrong is one line."""
    for signum in signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(signum, raise_stopped)
    status = 0
    try:
        try:
            status = main() or 0
        except SystemExit as end:  # --help, or a script's own refusal, which has said why
            status = end.code or 0
        if sys.stdout:
            sys.stdout.flush()
    except BaseException as error:
        status = explain(error)
        forget_stdout()
    sys.exit(status)


def forget_stdout() -> None:
    """Where stdout takes nothing more, Python would complain about it once again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except AttributeError:  # there never was one
        pass


def early_hook(_kind, error: BaseException, _traceback) -> None:
    """What fails before main is called, a missing package or Ctrl-C while torch loads."""
    explain(error)


main_file = getattr(sys.modules.get("__main__"), "__file__", None)
if main_file and Path(main_file).resolve().is_relative_to(Path(__file__).parent.resolve()):
    sys.excepthook = early_hook  # a program of ours: no test, no notebook


# ---------------------------------------------------------------------------- arguments
class Parser(argparse.ArgumentParser):
    """Refuses in one line where argparse prints its usage first."""

    def __init__(self, description: str, **kwargs):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=how, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(message)


def as_argument(check: Callable[[str], object]) -> Callable[[str], object]:
    """A type for add_argument, whose refusals are said with the flag's name."""

    def parse(text: str):
        try:
            return check(text)
        except Refused as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def number(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """A type for add_argument: a number from low to high, so neither NaN nor infinite."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            fail(f"{text[:60]!r} is no {'whole ' if kind is int else ''}number")
        if not low <= value <= high:
            fail(f"{text[:60]} must be {low:,} or more and at most {high:,}")
        return value

    return as_argument(check)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A type for add_argument: a whole number from low to high."""
    return number(low, high, int)


def text(words: str) -> str:
    """A type for add_argument: anything but nothing, which an unset shell variable gives."""
    if not words.strip():
        raise argparse.ArgumentTypeError("is empty")
    return words


def output(*suffixes: str) -> Callable[[str], Path]:
    """A type for add_argument: a file that can be written, with one of the suffixes if given.

    Give defaults as strings: argparse checks those too, but only where they are used.
    """

    def check(words: str) -> Path:
        path = Path(text(words))
        if suffixes and path.suffix.lower() not in suffixes:
            fail(f"{path} must end with {' or '.join(suffixes)}")
        check_output(path)
        return path

    return as_argument(check)


def folder(words: str) -> Path:
    """A type for add_argument: a folder that is there and can be written, or can be made."""
    path = Path(text(words))
    as_argument(check_folder)(path)
    return path
