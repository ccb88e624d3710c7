"""What surrounds the scripts: it runs them (launch), times them (measure), draws and reports, and
takes trained policies to where they act (deploy).

Each program is run by its path, `python benchmark/measure/speed.py`, from anywhere. Python then
looks for modules in the program's own folder, so every program first adds the repository's root;
`benchmark` and the scripts are imported from there by their full names. It imports `benchmark`
before anything that takes long: from then on whatever fails is one line (cli.py).
What imports what: cli.py, files.py and runs.py serve all; deploy, launch and report import no other
folder, measure imports launch's collect.py and deploy's graphs, and figures imports report's style.
gpu.py stands on measure and starts programs as a user would.
"""

import subprocess
from benchmark import cli as cli  # how a program ends, also while it is still importing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmark" / "results", ROOT / "docs" / "figures"


def scripts() -> dict[str, Path]:
    """Every script by its name, the baselines' too."""
    return {
        path.stem: path for path in [*ROOT.glob("*_online.py"), *ROOT.glob("baselines/*_online.py")]
    }


def commit() -> str:
    """The checked-out commit, marked where the tree differs from it; empty without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # not installed
        return ""
