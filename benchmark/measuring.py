"""What the timing programs share: copies of scripts to time, and where the numbers were made."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from collect import ROOT, scripts

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
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    row = {"device": (names or [sys.platform])[0], "threads": torch.get_num_threads()}
    return row | {"torch": torch.__version__, "commit": commit}
