"""What surrounds the scripts: it runs them (launch), times them (measure), draws and reports.

Each program is run by its path, `python benchmark/measure/speed.py`, from anywhere. Python then
looks for modules in the program's own folder, so every program first adds the repository's root;
`benchmark` and the scripts are imported from there by their full names.
What imports what: launch and report import no other folder, measure imports launch's collect.py,
and figures imports report's style. gpu.py stands on measure and starts programs as a user would.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmark" / "results", ROOT / "docs" / "figures"


def scripts() -> dict[str, Path]:
    """Every script by its name, the baselines' too."""
    return {
        path.stem: path for path in [*ROOT.glob("*_online.py"), *ROOT.glob("baselines/*_online.py")]
    }


def script_of(exp_name: str) -> Path:
    """fpmd_online.py for fpmd_online and for any longer name a variant was given."""
    candidates = [script for script in scripts().values() if exp_name.startswith(script.stem)]
    if not candidates:
        program = Path(sys.argv[0]).name
        sys.exit(f"{program}: error: --exp-name {exp_name} begins with the name of no script")
    return max(candidates, key=lambda script: len(script.stem))


def write_csv(rows: list[dict], output: Path) -> None:
    """One CSV of all rows; whoever reads it meanwhile sees the old file or the new one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(output)


def commit() -> str:
    """The checked-out commit, marked where the tree differs from it; empty without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()
