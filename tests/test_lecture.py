"""docs/lecture.ipynb: what is committed was run, and what it says is so."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

LECTURE = ROOT / "docs/lecture.ipynb"
CELLS = json.loads(LECTURE.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_was_run_from_top_to_bottom():
    """Every cell, in order and without an error; outputs are small and name nobody's folders."""
    done = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in done] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in done for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    text = LECTURE.read_text()
    assert len(text) < 400_000 and "/tmp/" not in text and "/home/" not in text


def test_every_section_has_an_exercise():
    sections = "".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown").split(
        "## "
    )
    assert len(sections) == 7
    assert all("*Exercise.*" in section for section in sections[1:6])


IMPORT = "from IPython.display import clear_output, display\n"
STAND_IN = "clear_output = display = lambda *args, **kwargs: None\n"  # Jupyter is not installed
RESULTS = """
import json
print("RESULTS", json.dumps({
    "spreads": spreads.tolist(), "one_step": one_step_errors, "many": many_step_errors,
    "rewards": [one_earned[0], one_earned[-50:].mean()], "gaps": [gap.max(), gap[-50:].mean()],
    "returns": returns["one_step"], "disagree": (actions - many).abs().mean().item()},
    default=float))
"""


@pytest.mark.slow
def test_it_shows_what_it_says(tmp_path):
    """Its cells as one program, from the folder in which Jupyter starts it."""
    pytest.importorskip("matplotlib")
    program = tmp_path / "lecture.py"
    text = "\n".join([*CODE, RESULTS])
    assert IMPORT in text
    program.write_text(text.replace(IMPORT, STAND_IN))
    env = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program]
    done = subprocess.run(command, cwd=ROOT / "docs", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rsplit("RESULTS", 1)[1])
    # section 3: the error of one step is the spread, that of twenty is not
    assert found["one_step"] == pytest.approx(found["spreads"], rel=0.25, abs=0.02)
    assert max(found["many"]) < 0.1
    # section 4: the policy finds the hill, and one step comes to agree with twenty
    first, last = found["rewards"]
    assert first < 0.5 and last > 0.8
    widest, end = found["gaps"]
    assert widest > 0.3 and end < 0.2
    # section 5: the pole stands
    assert len(found["returns"]) == 8 and found["returns"][0] < 500
    assert max(found["returns"][-2:]) >= 950
    # section 6: where it acts, the policy is narrow
    assert found["disagree"] < 0.3
