"""What all tests share: the scripts under test, small settings, main() in an empty folder."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_online.py"))
SMALL = {
    "total_timesteps": 400,
    "learning_starts": 100,
    "num_envs": 2,
    "batch_size": 16,
    "buffer_size": 10_000,
    "num_candidates": 2,
    "flow_steps": 2,
    "hidden_dim": 16,
    "log_every": 100,
    "eval_every": 0,
    "torch_threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each algorithm's script, imported as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(env_id=..., ...) trains at SMALL size in an empty folder; returns the run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    return lambda **changes: script.main(script.Args(**(SMALL | changes)))


def load(run_dir: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)
