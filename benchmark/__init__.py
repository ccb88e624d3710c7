"""What surrounds the scripts: it runs them (launch), times them (measure), draws and reports.

Each program is run by its path, `python benchmark/measure/speed.py`, from anywhere. Python then
searches the program's own folder only, so its first line after the imports of libraries puts the
repository's root there; `benchmark` and every script are then imported by their full names.
Arrows between folders: launch and measure know none of the others, report knows neither of them,
figures knows report's style, and gpu.py starts programs of launch and measure.
"""

import csv
import os
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
