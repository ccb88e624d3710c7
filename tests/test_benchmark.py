"""benchmark/measure/speed.py: a small run of it, and the arithmetic of what it writes."""

import csv
import json
import math
import subprocess
import sys
from benchmark.files import Refused
from benchmark.measure import precision, speed_cases, speed_end_to_end
from benchmark.report import tables_speed

import pytest
import torch
from conftest import COMPILER, FLOWS, FPMD, ROOT, STEPPED

COLUMNS = "script,num_candidates,flow_steps,mode,precision,measurement,milliseconds,quartile_1,"
COLUMNS += "quartile_3,multiply_adds,compulsory_megabytes,floor_ms,ratio_to_floor,peak_megabytes,"
COLUMNS += "batch_size,repetitions,device,threads,torch,commit"


MAIN = 'if __name__ == "__main__"'
PROGRAMS = [path for path in (ROOT / "benchmark").rglob("*.py") if MAIN in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_every_program_runs_by_its_path_from_anywhere(path, server, tmp_path):
    """--help, without the matplotlib and Ray that only a figure or a cluster needs."""
    for name in "matplotlib", "ray":
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    result = server.run(path, ["--help"], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert result.status == 0 and "usage: " in result.out, result.err


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("launch", ["measure", "report", "figures", "deploy"]),
        ("deploy", ["launch", "measure", "report", "figures"]),
        ("measure", ["report", "figures"]),
        ("report", ["launch", "measure", "figures", "deploy"]),
        ("figures", ["launch", "measure", "deploy"]),
    ],
)
def test_folders_know_only_what_is_below_them(folder, others):
    for path in (ROOT / "benchmark" / folder).glob("*.py"):
        for other in others:
            assert f"from benchmark.{other}" not in path.read_text(), path


def test_a_small_measurement(tmp_path):
    """All scripts eagerly; the variants check for themselves that they give the same actions."""
    output = tmp_path / "speed.csv"
    flags = "--only update generation ranking learning one-step sac --modes eager --settings 2,1"
    flags += f" --batch-size 16 --repetitions 1 --threads 1 --variants --output {output}"
    command = [sys.executable, ROOT / "benchmark" / "measure" / "speed.py", *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "over the floor" in tables_speed.speed(output)
    assert "first layer on concatenated inputs" in tables_speed.speed_of_variants(output)
    with output.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert ",".join(reader.fieldnames) == COLUMNS
    assert all(0 < float(row["quartile_1"]) <= float(row["milliseconds"]) for row in rows)
    timed = {(row["script"], row["measurement"]): row for row in rows}
    fastest = {"float32": 0, "bfloat16": 0}  # multiply-adds per millisecond
    for row in rows:
        if row["measurement"].startswith("matmul"):
            rate = int(row["multiply_adds"]) / float(row["milliseconds"])
            fastest[row["precision"]] = max(fastest[row["precision"]], rate)
    copy = timed["", "copy 256 MiB"]
    bandwidth = float(copy["compulsory_megabytes"]) / float(copy["milliseconds"])
    for script in STEPPED:
        parts = [timed[script, name] for name in ("generation", "ranking", "learning")]
        for row in parts:
            floor = max(
                int(row["multiply_adds"]) / fastest["float32"],
                float(row["compulsory_megabytes"]) / bandwidth,
            )
            assert float(row["floor_ms"]) == pytest.approx(floor, rel=0.01)
        update, floors = timed[script, "update"], [float(row["floor_ms"]) for row in parts]
        assert float(update["floor_ms"]) == pytest.approx(sum(floors), rel=0.01)
        ratio = float(update["milliseconds"]) / float(update["floor_ms"])
        assert math.isfinite(ratio)
        assert float(update["ratio_to_floor"]) == pytest.approx(ratio, rel=0.01)
        counts = sum(int(row["multiply_adds"]) for row in parts)
        assert int(update["multiply_adds"]) == pytest.approx(counts, abs=2)
        assert timed[script, "one-step"]["num_candidates"] == ""
    # three hidden layers and the mean of the actor for one state, a sample wants the log std too
    mean = 27 * 256 + 2 * 256**2 + 256 * 8
    assert int(timed["sac", "one-step mean"]["multiply_adds"]) == mean
    assert int(timed["sac", "one-step"]["multiply_adds"]) == mean + 256 * 8
    # deployed, the noise is an input and no time is embedded
    for script in FPMD:
        deployed = int(timed[script, "one-step deployed"]["multiply_adds"])
        assert deployed == mean + 8 * 256 < int(timed[script, "one-step"]["multiply_adds"])


def test_every_policy_that_acts_in_one_step_is_measured():
    assert set(speed_cases.FLOWS) == set(STEPPED)  # taken apart
    assert set(FLOWS) <= set(speed_cases.SETTINGS)


def test_step_times_leave_out_what_comes_before_the_first_row(tmp_path):
    text = "global_step,updates,wall_time\n1500,100,60.0\n2000,200,65.0\n2500,300,75.0\n"
    (tmp_path / "metrics.csv").write_text(text)
    assert speed_end_to_end.step_times(tmp_path) == [0.01, 0.02]


def test_rows_from_before_learning_have_no_pace(tmp_path):
    """Their losses are empty, and a step costs next to nothing."""
    text = "global_step,updates,wall_time,losses/critic_loss\n500,0,1.0,\n1000,0,2.0,\n"
    (tmp_path / "metrics.csv").write_text(f"{text}1500,100,60.0,1\n2000,200,65.0,1\n2500,300,75")
    assert speed_end_to_end.step_times(tmp_path) == [0.01]


@COMPILER
def test_what_is_timed_as_compiled_never_steps_aside(monkeypatch):
    """Scripts go on eagerly where compiling fails; those updates must not be timed in its place."""
    case = speed_cases.make_case("fpmd_online", (2, 1), "compiled", 16, torch.device("cpu"))
    assert not isinstance(case.improve, case.module.OrEager)
    assert "loss_fn" in case.improve.keywords

    def compile(function, **how):
        raise RuntimeError("no compiler here\nand more about it")

    monkeypatch.setattr(torch, "compile", compile)
    speed_cases.refuse_without_compiler.cache_clear()
    with pytest.raises(Refused, match=r"choose --modes eager: no compiler here$"):
        speed_cases.make_case("fpmd_online", (2, 1), "compiled", 16, torch.device("cpu"))


@pytest.mark.parametrize("script", ["fpmd_online", "dpmd_online"], indirect=True)
def test_precision_of_a_run(run):
    """Rows of one checkpoint: shares are shares, and bfloat16 does move the actions, a little."""
    run_dir = run(env_id="Hopper-v4", total_timesteps=150)
    generation, *ranking = precision.measure(str(run_dir))
    assert [row["what"] for row in ranking][::2] == ["ranking", "ranking, head"]
    for row in generation, *ranking:
        assert row["global_step"] == 150 and 0.5 < row["agreement"] <= 1 and row["q_spread"] > 0
        assert 0 <= row["q_loss"] < 0.1
    assert 0 < generation["action_error"] < 0.05


@pytest.mark.parametrize("name", ["fpmd_online", "sac_online"])
def test_a_buffer_can_be_full_from_the_start(name):
    module = speed_cases.load_script(name)
    buffer = speed_end_to_end.full_buffer(module)(1000, 3, 2, torch.device("cpu"))
    assert buffer.size == 1000
    batch = buffer.sample(50, torch.Generator())
    assert batch["obs"].shape == (50, 3) and batch["obs"].std() > 0.5


def test_reference_policies(tmp_path):
    """Doing nothing on a pendulum that falls, and the same numbers again."""
    tables = []
    for name in "first.csv", "second.csv":
        flags = "--env-ids", "InvertedPendulum-v4", "--episodes", "3", "--output", tmp_path / name
        command = [sys.executable, ROOT / "benchmark" / "measure" / "reference_policies.py", *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        with (tmp_path / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert tables[0] == tables[1] and [row["policy"] for row in tables[0]] == ["random", "zero"]
    assert all(1 < float(row["return_mean"]) < 200 for row in tables[0])


def test_what_an_evaluation_costs_is_read_off_the_clock(tmp_path):
    """1,000 steps take 2 s, 5 s where an evaluation lies between; the first stretch compiles."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    args = {"exp_name": "mvp_online", "env_id": "Ant-v4", "seed": 3, "eval_every": 5000}
    args |= {"eval_episodes": 10, "num_candidates": 8, "utd": 0.2, "log_every": 1000}
    versions = {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0123456"}
    (run_dir / "args.json").write_text(json.dumps(args))
    (run_dir / "versions.json").write_text(json.dumps(versions))
    clock, lines = 0.0, ["global_step,updates,wall_time,losses/critic_loss"]
    lines += [f"-{step},0,0.1," for step in range(12_000, 0, -1000)]  # before learning starts
    for step in range(1000, 13_000, 1000):
        lines.append(f"{step},0,{clock},0.5")
        clock += {1000: 60, 5000: 5, 7000: 30, 10_000: 5}.get(step, 2)  # 7000: the machine paused
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    program, output = ROOT / "benchmark" / "measure" / "evaluation_cost.py", tmp_path / "cost.csv"
    subprocess.run([sys.executable, program, run_dir, "--output", output], check=True)
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["script"] == "mvp_online" and row["commit"] == "0123456"
    assert float(row["training_ms_per_step"]) == 2 and float(row["evaluation_seconds"]) == 3
