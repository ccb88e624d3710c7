"""What the timing programs share: copies of scripts to time, and where the numbers were made."""

import argparse
import importlib.util
import itertools
import sys
import tempfile
from benchmark import RESULTS, commit, scripts
from benchmark.cli import as_argument, whole
from benchmark.files import check_output, fail
from pathlib import Path
from types import ModuleType

import torch

COPIES = itertools.count()


def load_script(name: str, **replaced) -> ModuleType:
    """A copy of the script as a module of its own, with other values for some of its globals.

    What is compiled belongs to the copy's functions, so each case has torch's usual number of
    recompilations to itself, as in a process of its own.
    """
    spec = importlib.util.spec_from_file_location(f"{name}_{next(COPIES)}", scripts()[name])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(replaced)
    return module


def provenance(device: torch.device) -> dict:
    """Where and with what the numbers were made."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    names = [torch.cuda.get_device_name(device)] if device.type == "cuda" else names
    row = {"device": (names or [sys.platform])[0], "threads": torch.get_num_threads()}
    return row | {"torch": torch.__version__, "commit": commit()}


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --threads, which use_machine reads."""
    device = as_argument(check_device)
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1")
    text = "CPU threads of torch; unset: what the scripts take, all up to 8"
    parser.add_argument("--threads", type=whole(0, 1024), default=0, help=text)


def check_device(name: str) -> str:
    """Refuse what torch does not know, or has not got."""
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"{name!r} is neither cpu nor cuda")
    if device.type not in ("cpu", "cuda"):
        fail(f"{name!r} is neither cpu nor cuda")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        fail(f"{name}: torch finds {count} GPUs")
    return name


def use_machine(options: argparse.Namespace) -> torch.device:
    """The device of the options; torch is told its threads."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads or min(8, torch.get_num_threads()))
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default one cannot be captured
    return device


def default_output(
    parser: argparse.ArgumentParser, options: argparse.Namespace, kind: str, partly: list[str]
) -> Path:
    """benchmark/results/<kind>_<device>.csv, but a temporary file if one of partly was given."""
    quick = any(getattr(options, key) != parser.get_default(key) for key in partly)
    folder = Path(tempfile.mkdtemp()) if quick else RESULTS
    path = folder / f"{kind}_{torch.device(options.device).type}.csv"
    check_output(path)
    return path
