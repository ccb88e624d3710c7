"""What strangers met, one test each: nothing lost, nothing silently wrong, no input that hangs.

Numbers in the docstrings are those of the list of findings. Refusals by the hundred are in
test_bad_inputs.py, stops at random instants in test_stops.py.
"""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import odd_envs
import pytest
import torch
from bad_inputs import OFFLINE, of, small, write_dataset
from conftest import COMPILER, FILES, MODES_OF, OF_NUMBERS, as_flags, load
from test_resume import rows

ONE = pytest.mark.parametrize("name", ["fpmd_online"])
TWO = pytest.mark.parametrize("name", ["fpmd_online", *OFFLINE])


@pytest.fixture
def run(server, tmp_path):
    """run(name, changes, *more flags) in an empty folder that has a dataset."""
    write_dataset(tmp_path)

    def function(name, changes=None, *more, **options):
        flags = as_flags(small(name) | (changes or {}))
        return server.run(FILES[name], [*flags, *more], tmp_path, **options)

    return function


@pytest.fixture
def resume(server, tmp_path):
    """resume(name, env_id, *more flags) of the run in the folder."""

    def function(name, env_id, *more, **options):
        flags = ["--resume", the_run(tmp_path), "--env-id", of(name, env_id), *more]
        return server.run(FILES[name], flags, tmp_path, **options)

    return function


def the_run(folder: Path) -> Path:
    (run_dir,) = folder.glob("runs/*")
    return run_dir


def evaluations(run_dir: Path) -> list[dict]:
    with (run_dir / "evaluations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def returns(run_dir: Path) -> list[str]:
    return [row["returns"] for row in evaluations(run_dir)]


def assert_one_line(result, name: str, status: int, *words: str) -> str:
    """One line that begins as an error does; before it a run may have warned of other things."""
    lines = [line for line in result.err.splitlines() if ": error: " in line]
    assert not result.traceback and len(lines) == 1, result.err
    assert result.status == status and lines[0].startswith(f"{name}.py: error: "), lines[0]
    if status == 2:
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert any(word in lines[0] for word in words) or not words, lines[0]
    return lines[0]


def warnings_of(result) -> list[str]:
    return [line for line in result.err.splitlines() if line.strip()]


def assert_no_junk(run_dir: Path) -> None:
    """What was saved can be gone on from: nothing in it is NaN or infinite."""
    for name, column in load(run_dir)["buffer"].items():
        assert column.isfinite().all(), name


# ---------------------------------------------------------------------------- A: lost or wrong
@TWO
def test_an_interrupted_evaluation_is_made_up_for(run, resume, tmp_path, name):
    """1: its row is written first, whatever is left to train."""
    steps = small(name)["total_timesteps"]
    env = {"ODD_STEP": str(steps + 20), "ODD_SIGNAL": str(int(signal.SIGTERM))}
    env["ODD_WHERE"] = str(tmp_path / "sent")
    changes = {"env_id": of(name, "odd_envs:Signalling-v0"), "eval_every": 10**6}
    changes |= {"eval_episodes": 4, "log_every": 10**6}
    assert run(name, changes, env=env).status == 128 + signal.SIGTERM
    before = load(the_run(tmp_path))["global_step"]
    assert resume(name, "odd_envs:Signalling-v0").status == 0
    found = [(row["global_step"], row["mode"]) for row in evaluations(the_run(tmp_path))]
    modes = MODES_OF.get(name, ["one_step", "best_of_n"])
    assert found[: len(modes)] == [(str(before), mode) for mode in modes]
    assert len(set(found)) == len(found)
    assert str(before) in {row[0] for row in rows(the_run(tmp_path))}


def test_a_second_resume_waits_for_nobody(run, server, tmp_path):
    """3: whoever holds the directory's lock, the other is told so in a line."""
    fcntl = pytest.importorskip("fcntl")
    assert run("fpmd_online").status == 0
    run_dir = the_run(tmp_path)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with (run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flags = ["--resume", run_dir, "--env-id", "odd_envs:Sound-v0", "--total-timesteps=300"]
        result = server.run(FILES["fpmd_online"], flags, tmp_path)
        assert_one_line(result, "fpmd_online", 2, run_dir.name)
        assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert server.run(FILES["fpmd_online"], flags, tmp_path).status == 0


@TWO
@pytest.mark.parametrize(
    ("env_id", "rates"),
    [
        ("odd_envs:Stagger-v0", None),
        ("odd_envs:StaggerSame-v0", None),
        ("odd_envs:SuccessOnTheWay-v0", 0.0),
        ("odd_envs:SuccessIsAnArray-v0", 1.0),
        ("odd_envs:SuccessIsANumber-v0", 1.0),
        ("odd_envs:NeverSaysSuccess-v0", ""),
        ("probe_envs:Solving-v0", None),
    ],
)
def test_success_rates_do_not_depend_on_who_ends_together(run, tmp_path, name, env_id, rates):
    """4: an episode without the key has not succeeded; it is read at the episode's end."""
    if name in OFFLINE and env_id.startswith("probe_envs"):
        pytest.skip("there is no dataset for it")
    changes = {"env_id": of(name, env_id), "eval_every": 10**6, "eval_episodes": 12}
    result = run(name, changes)
    assert result.status == 0, result.err
    found = {row["success_rate"] for row in evaluations(the_run(tmp_path))}
    if rates == "":
        assert found == {""}
        return
    assert len(found) == 1 and "" not in found  # the same episodes in every mode
    (found,) = (float(value) for value in found)
    if rates is not None:
        assert found == rates
    else:
        assert 0.2 < found < 0.8 and found == pytest.approx(round(12 * found) / 12)


@ONE
def test_staggered_success_is_that_of_each_episode(run, tmp_path, name):
    """4: against the environments themselves, asked one by one."""
    changes = {"env_id": "odd_envs:Stagger-v0", "eval_every": 10**6, "eval_episodes": 12}
    assert run(name, changes).status == 0
    good = []
    script = __import__(name)
    for i in range(12):
        env = script.make_env("odd_envs:Stagger-v0", i)
        env.reset(seed=2 * small(name)["seed"] + 1 if "seed" in small(name) else 3)
        good.append(env.unwrapped.good)
    expected = str(np.mean(good))
    assert {row["success_rate"] for row in evaluations(the_run(tmp_path))} == {expected}


@TWO
@pytest.mark.parametrize("env_id", ["odd_envs:Clock-v0", "odd_envs:PythonRandom-v0"])
def test_a_play_back_that_ends_elsewhere_is_said(run, resume, tmp_path, name, env_id):
    """5: the run goes on, but not exactly, and one line says so."""
    more = f"--total-timesteps={small(name)['total_timesteps'] + 55}"
    run(name, {"env_id": of(name, env_id), "total_timesteps": small(name)["total_timesteps"] - 7})
    result = resume(name, env_id, more)
    said = [line for line in warnings_of(result) if "goes on from another state" in line]
    if name in OFFLINE and env_id == "odd_envs:Clock-v0":
        # this script seeds numpy's generator, for OGBench's mazes
        assert result.status == 0 and said == []
    else:
        assert result.status == 0 and len(said) == 1, result.err


@TWO
@pytest.mark.parametrize(
    ("env_id", "env"),
    [
        ("odd_envs:Upgraded-v0", {"ODD_VERSION": "1"}),
        ("odd_envs:EndsSooner-v0", {"ODD_LIMIT": "2"}),
    ],
)
def test_a_simulator_that_changed_in_between_is_said(run, resume, tmp_path, name, env_id, env):
    """5: another version's dynamics, and an episode that now ends before it did."""
    # both stop in mid-episode
    steps = small(name)["total_timesteps"] - (12 if name not in OFFLINE else 5)
    assert run(name, {"env_id": of(name, env_id), "total_timesteps": steps}).status == 0
    more = f"--total-timesteps={steps + 40}"
    result = resume(name, env_id, more, env=env)
    said = [line for line in warnings_of(result) if "goes on from another state" in line]
    assert result.status == 0 and len(said) == 1, result.err
    assert_no_junk(the_run(tmp_path))


@TWO
def test_a_sound_play_back_says_nothing(run, resume, name):
    """5: no warning where there is nothing to warn of."""
    steps = small(name)["total_timesteps"]
    run(name, {"total_timesteps": steps - 8})
    result = resume(name, "odd_envs:Sound-v0", f"--total-timesteps={steps + 20}")
    assert result.status == 0 and warnings_of(result) == []


FIRST_WORDS = {"Obs": "observation", "Reward": "reward", "Reset": "observation"}
JUNK = [f"odd_envs:{kind}Later-v0" for kind in ("ObsNan", "ObsInf", "ObsHuge")]
JUNK += [f"odd_envs:{kind}Later-v0" for kind in ("RewardNan", "RewardInf", "RewardHuge")]
JUNK += ["odd_envs:RewardBeyondFloat32Later-v0"]
JUNK += [f"odd_envs:{kind}Later-v0" for kind in ("ResetNan", "ResetInf")]


def first_are_fast(env_ids, fast):
    """Parameters, of which all but the named ones are left to the slow tests."""
    fast = {env_id for env_id in env_ids if re.split("[:-]", env_id)[1] in fast}
    slow = [pytest.mark.slow]
    return [pytest.param(x, marks=[] if x in fast else slow) for x in env_ids]


JUNK_FAST = "ObsNanLater", "RewardBeyondFloat32Later", "ResetInfLater"
SOUND_FAST = "EpisodeKey", "RewardArray", "NestedDictObs", "MatrixAction", "DoubleStats"
FAIL_FAST = "StepAssertsLater", "RewardNoneLater", "ObsShortLater", "ResetRaisesLater"


@TWO
@pytest.mark.parametrize("env_id", first_are_fast(JUNK, JUNK_FAST))
def test_numbers_that_are_none_are_named_and_never_stored(run, tmp_path, name, env_id):
    """6: which environment, what of it, at which step; what is saved is sound."""
    steps = 2 * small(name)["total_timesteps"]
    result = run(
        name, {"env_id": of(name, env_id), "checkpoint_every": 10, "total_timesteps": steps}
    )
    line = assert_one_line(result, name, 1, *odd_envs.FAILS[env_id])
    assert re.search(r"environment \d+ returned .* at step \d+", line), line
    what = next(word for start, word in FIRST_WORDS.items() if start in env_id)
    assert what in line and "--resume" in line and "diverged" not in line
    assert_no_junk(the_run(tmp_path))


@ONE
def test_the_component_and_the_step_are_right(run, tmp_path, name):
    """6: as in the sentence that the issue gives."""
    result = run(name, {"env_id": "odd_envs:ObsNanLater-v0", "total_timesteps": 400})
    line = assert_one_line(result, name, 1)
    # the second of three, whether one counts from 0 or from 1
    step = re.search(r"environment 0 returned NaN in observation [12] at step (\d+)", line)[1]
    assert int(step) == 10  # of its episode
    envs = load(the_run(tmp_path))["envs"]  # as they were before that step
    assert envs["lengths"][0] == len(envs["episodes"][0]["actions"]) == 9


@TWO
def test_what_the_environment_broke_is_not_lost(run, resume, tmp_path, name):
    """6, 14: the state before is saved, and the run can go on from it (to break again)."""
    env_id = "odd_envs:StepRaisesLater-v0"
    result = run(name, {"env_id": of(name, env_id), "checkpoint_every": 0})
    line = assert_one_line(result, name, 1, "the simulator exploded")
    run_dir = the_run(tmp_path)
    assert run_dir.name in line and "--resume" in line
    trace = (run_dir / "traceback.txt").read_text()
    assert "Traceback" in trace and "odd_envs.py" in trace
    saved = load(run_dir)["global_step"]
    assert saved > (small(name)["offline_steps"] if name in OFFLINE else 0)
    assert_no_junk(run_dir)
    again = resume(name, env_id)
    assert_one_line(again, name, 1, "the simulator exploded")
    assert load(run_dir)["global_step"] >= saved


@ONE
def test_a_buffer_that_no_machine_holds_is_refused(run, tmp_path, name):
    """7: in a line with its size and the flag, before anything is written."""
    changes = {"env_id": "odd_envs:HugeObs-v0", "buffer_size": 10**9}
    assert_one_line(run(name, changes), name, 2, "--buffer-size")
    assert not (tmp_path / "runs").exists()


@ONE
def test_a_policy_plays_where_its_buffer_would_not_fit(name, monkeypatch):
    """7: --evaluate makes no buffer, so none is counted."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "memory_of", lambda device: 1e9)
    args = script.Args(buffer_size=10**8)
    with pytest.raises(SystemExit):
        script.refuse_too_large(args, 3, 1, torch.device("cpu"))
    script.refuse_too_large(replace(args, evaluate="policy.pt"), 3, 1, torch.device("cpu"))


@ONE
def test_a_container_has_what_its_limit_leaves(name, monkeypatch):
    """7: less what its processes hold; files that are cached can go."""
    script = importlib.import_module(name)
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000000 kB\n"}

    class Files(type(Path())):
        def read_text(self):
            if str(self) not in files:
                raise FileNotFoundError(self)
            return files[str(self)]

    monkeypatch.setattr(script, "Path", Files)
    cpu = torch.device("cpu")
    assert script.memory_of(cpu) == 2_048_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert script.memory_of(cpu) == 2_048_000_000
    files["/sys/fs/cgroup/memory.max"] = "1000000000\n"
    files["/sys/fs/cgroup/memory.stat"] = "anon 300000000\nfile 500000000\n"
    assert script.memory_of(cpu) == 700_000_000
    del files["/proc/meminfo"]
    assert script.memory_of(cpu) == 700_000_000


@ONE
def test_the_size_of_a_large_buffer_is_told(run, name):
    """7: in GiB or MiB, before training."""
    result = run(name, {"env_id": "odd_envs:HugeObs-v0", "buffer_size": 10_000})
    assert result.status == 0 and re.search(r"\d (GiB|MiB|GB|MB)", result.out + result.err)


@pytest.mark.slow
@ONE
def test_saving_does_not_hold_the_buffer_twice(run, tmp_path, name):
    """7: nor does resuming. The peak of memory grows by one buffer, not by two."""
    peaks = {}
    code = (
        "import resource, sys, torch; sys.argv[0] = {path!r}; import {name} as script\n"
        "torch.set_num_threads(1)\n"
        "script.main(script.parse_args())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    code = code.format(path=str(FILES[name]), name=name)
    path = os.pathsep.join([str(FILES[name].parent), str(Path(__file__).parent)])
    env = os.environ | {"PYTHONPATH": path}
    for obs, env_id in ("small", "odd_envs:Sound-v0"), ("large", "odd_envs:HugeObs-v0"):
        # 28 kB a transition with 3,500 observations, 84 MiB in all
        settings = small(name) | {"env_id": env_id, "buffer_size": 3_000, "num_envs": 10}
        settings |= {"total_timesteps": 3_000, "learning_starts": 2_990, "batch_size": 2}
        settings |= {"hidden_dim": 2, "log_every": 10**6, "checkpoint_every": 0, "utd": 0.1}
        command = [sys.executable, "-c", code, *as_flags(settings)]
        options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
        result = subprocess.run(command, **options)
        assert result.returncode == 0, result.stderr
        peaks[obs] = float(result.stdout.split()[-1])
    assert peaks["large"] - peaks["small"] < 1.7 * 80, peaks


@ONE
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--total-timesteps=400", "--num-envs=401"], "--num-envs"),
        (["--resume", ""], "--resume"),
        (["--evaluate", ""], "--evaluate"),
        (["--policy-lr", "1e-4", "nan"], "--policy-lr"),
        (["--policy-lr-decay", "10", "5"], "--policy-lr-decay"),
        (["--policy-lr-decay", "-5", "10"], "--policy-lr-decay"),
        (["--weight-mode", "none", "--temperature", "1"], "--temperature"),
    ],
)
def test_flags_that_were_taken_in_silence(run, tmp_path, name, flags, word):
    """8"""
    assert_one_line(run(name, None, *flags), name, 2, word)
    assert not (tmp_path / "runs").exists()


@TWO
def test_fewer_steps_than_done_are_refused(run, resume, tmp_path, name):
    """8: args.json stays as it was."""
    run(name)
    before = (the_run(tmp_path) / "args.json").read_bytes()
    result = resume(name, "odd_envs:Sound-v0", "--total-timesteps=50")
    assert_one_line(result, name, 2, "--total-timesteps")
    assert (the_run(tmp_path) / "args.json").read_bytes() == before


@TWO
def test_only_the_runs_own_tables_are_cut(run, resume, tmp_path, name):
    """9"""
    run(name)
    mine = the_run(tmp_path) / "notes.csv"
    mine.write_text("day,what\nmonday,began\n99999999,1\n")
    steps = small(name)["total_timesteps"] + 20
    result = resume(name, "odd_envs:Sound-v0", f"--total-timesteps={steps}")
    assert result.status == 0, result.err
    assert mine.read_text() == "day,what\nmonday,began\n99999999,1\n"


@ONE
def test_a_table_that_a_power_cut_left_is_mended(run, resume, tmp_path, name):
    """9: zeros at its end, as file systems leave them, are no row."""
    run(name, {"total_timesteps": 200})
    table = the_run(tmp_path) / "metrics.csv"
    before = rows(the_run(tmp_path))
    with table.open("ab") as file:
        file.write(bytes(100))
    result = resume(name, "odd_envs:Sound-v0", "--total-timesteps=300")
    assert result.status == 0, result.err
    assert rows(the_run(tmp_path))[: len(before)] == before and b"\0" not in table.read_bytes()


# ---------------------------------------------------------------------------- B: crashes, hangs
@TWO
def test_an_evaluation_ends_even_if_its_episodes_do_not(run, tmp_path, name):
    """11: they are cut, and the row says how many were."""
    changes = {"env_id": of(name, "odd_envs:NoLimit-v0"), "eval_every": 10**6}
    result = run(name, changes, "--eval-max-steps=30")
    assert result.status == 0, result.err
    for row in evaluations(the_run(tmp_path)):
        assert row["episodes_cut"] == "2" and len(row["returns"].split()) == 2
    header = list(evaluations(the_run(tmp_path))[0])
    assert header.index("episodes_cut") + 1 == header.index("returns")


@TWO
def test_episodes_that_end_are_not_cut(run, tmp_path, name):
    """11: nor is one that ends with the last step allowed."""
    changes = {"env_id": of(name, "odd_envs:Sound-v0"), "eval_every": 10**6}
    assert run(name, changes, "--eval-max-steps=20").status == 0
    assert {row["episodes_cut"] for row in evaluations(the_run(tmp_path))} == {"0"}


@ONE
def test_a_replay_ends_as_well(run, server, tmp_path, name):
    """11: --evaluate of an endless environment says what it cut."""
    changes = {"env_id": "odd_envs:NoLimit-v0", "eval_every": 0}
    assert run(name, changes, "--eval-max-steps=30").status == 0
    flags = ["--evaluate", the_run(tmp_path), "--env-id", "odd_envs:NoLimit-v0"]
    result = server.run(FILES[name], flags, tmp_path)
    assert result.status == 0 and "cut" in result.out + result.err


@TWO
@pytest.mark.parametrize("env_id", ["odd_envs:ActFixed-v0", "odd_envs:WideAction-v0"])
def test_actions_that_cannot_be_rescaled_are_refused(run, tmp_path, name, env_id):
    """12: the line names the component."""
    result = run(name, {"env_id": of(name, env_id)})
    assert_one_line(result, name, 2, *odd_envs.REFUSED[env_id])
    assert not (tmp_path / "runs").exists()


SOUND = [env_id for env_id in odd_envs.WORKS if "HugeObs" not in env_id]


@pytest.mark.parametrize("env_id", first_are_fast(SOUND, SOUND_FAST))
def test_odd_but_sound_environments_train_and_evaluate(run, tmp_path, env_id):
    """13, 22, 23: info["episode"], rewards of shape (1,), integers, dicts, matrices."""
    name = OF_NUMBERS[SOUND.index(env_id) % len(OF_NUMBERS)]
    name = name if name not in OFFLINE else "fpmd_online"
    result = run(name, {"env_id": env_id, "eval_every": 100, "log_every": 50})
    assert result.status == 0 and not result.traceback, result.err
    assert_no_junk(the_run(tmp_path))
    assert len(evaluations(the_run(tmp_path))) == 2 * len(MODES_OF[name])
    assert len(rows(the_run(tmp_path))) > 1


@ONE
@pytest.mark.parametrize("env_id", ["odd_envs:EpisodeKey-v0", "odd_envs:DoubleStats-v0"])
def test_returns_are_the_runs_own_statistics(run, tmp_path, name, env_id):
    """13: whatever the environment says about its episodes."""
    found = {}
    for kind in env_id, "odd_envs:Sound-v0":
        folder = tmp_path / kind.split(":")[1]
        changes = {"env_id": kind, "eval_every": 100, "runs_dir": str(folder)}
        assert run(name, changes).status == 0
        (run_dir,) = folder.iterdir()
        found[kind] = returns(run_dir), [row[3:5] for row in rows(run_dir)]
    assert found[env_id] == found["odd_envs:Sound-v0"]


@ONE
def test_a_run_saves_before_it_evaluates(run, tmp_path, name):
    """14: an evaluation that fails costs what it was to find out, not what was learnt."""
    # of 25 steps in training; the 30th is taken in the second mode of the evaluation
    changes = {"env_id": "odd_envs:StepRaisesLater-v0", "num_envs": 20, "total_timesteps": 500}
    result = run(name, changes | {"eval_every": 10**6, "checkpoint_every": 0})
    assert_one_line(result, name, 1, "exploded")
    assert load(the_run(tmp_path))["global_step"] == 500


@ONE
@pytest.mark.parametrize("env_id", odd_envs.FILMED)
def test_what_a_film_needs_is_tried_at_the_start(run, tmp_path, name, env_id):
    """14: not after 25,000 steps."""
    changes = {"env_id": env_id, "eval_every": 100, "capture_video": True}
    result = run(name, changes, env={"MUJOCO_GL": "egl"})
    assert_one_line(result, name, 2)
    assert not (tmp_path / "runs").exists()


OWN = """
import gymnasium, odd_envs
gymnasium.register("Mine-v0", odd_envs.TakesArguments)
"""


@ONE
def test_ones_own_environment_is_found_where_one_is(run, tmp_path, name):
    """15: a module in the current folder, or in a package there."""
    (tmp_path / "my_env.py").write_text(OWN)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "my_env.py").write_text(OWN)
    for module in "my_env", "package.my_env":
        result = run(name, {"env_id": f"{module}:Mine-v0"})
        assert result.status == 0, result.err


@TWO
def test_arguments_of_an_environment(run, resume, server, tmp_path, name):
    """15: as JSON, in training, evaluation, on --resume and on --evaluate."""
    env_id = of(name, "odd_envs:TakesArguments-v0")
    changes = {"env_id": env_id, "eval_every": 10**6}
    result = run(name, changes, "--env-kwargs", '{"bonus": 2.5, "names": ["a"]}')
    assert result.status == 0, result.err
    run_dir = the_run(tmp_path)
    assert returns(run_dir)[-1] == "70.0000 70.0000"  # 20 steps of 2.5 + 1
    flags = ["--evaluate", run_dir, "--env-id", env_id]
    assert "return 70.00 +- 0.00" in server.run(FILES[name], flags, tmp_path).out
    steps = small(name)["total_timesteps"] + 20
    assert resume(name, env_id, f"--total-timesteps={steps}").status == 0
    assert returns(run_dir)[-1] == "70.0000 70.0000"
    other = resume(name, env_id, f"--total-timesteps={steps + 9}", "--env-kwargs", '{"bonus": 1}')
    assert_one_line(other, name, 2, "--env-kwargs")


@ONE
def test_a_missing_dm_control_is_a_line_and_other_suites_go_on(server, tmp_path, name):
    """16: with what to install; Pendulum does not need it, nor do versions.json's versions."""
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        "import sys, runpy\n"
        "from importlib import metadata, util\n"
        "missing = {'dm_control', 'shimmy', 'dm-control', 'Shimmy', 'labmaze'}\n"
        "version, find_spec = metadata.version, util.find_spec\n"
        "def no_version(name):\n"
        "    if name in missing:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = no_version\n"
        "util.find_spec = lambda name, *rest: None if name in missing else find_spec(name, *rest)\n"
        "for name in missing:\n"
        "    sys.modules[name] = None\n"
        "path = sys.argv.pop(1)\n"
        "sys.argv[0] = path\n"
        "runpy.run_path(path, run_name='__main__')\n"
    )
    flags = as_flags(small(name))
    control = [*flags, "--env-id", "dm_control/cheetah-run-v0"]
    result = server.run(blocked, [FILES[name], *control], tmp_path)
    assert_one_line(result, name, 2, "pip install")
    assert not (tmp_path / "runs").exists()
    result = server.run(blocked, [FILES[name], *flags, "--env-id", "Pendulum-v1"], tmp_path)
    assert result.status == 0, result.err
    versions = json.loads((the_run(tmp_path) / "versions.json").read_text())
    assert "dm-control" not in versions or not versions["dm-control"]


def rewritten(run_dir: Path, file: str, function) -> None:
    content = load(run_dir, file)
    torch.save(function(content), run_dir / file)


@TWO
def test_a_policy_of_an_older_version_is_read(run, server, tmp_path, name):
    """17: fields that it lacks have their defaults, those that are gone are named."""
    run(name)
    run_dir = the_run(tmp_path)
    flags = ["--evaluate", run_dir, "--env-id", of(name, "odd_envs:Sound-v0")]
    flags += ["--eval-episodes=2", "--device=cpu"]
    expected = server.run(FILES[name], flags, tmp_path)
    for field in "log_every", "critic_lr", "wandb_entity":
        assert field in load(run_dir, "policy.pt")["args"]

    def older(content):
        args = dict(content["args"])
        for field in "log_every", "critic_lr", "wandb_entity":
            del args[field]
        return content | {"args": args | {"gone_since": 3}}

    rewritten(run_dir, "policy.pt", older)
    result = server.run(FILES[name], flags, tmp_path)
    assert result.status == 0 and not result.traceback, result.err
    pattern = r"episode \d: return \S+"
    assert re.findall(pattern, result.out) == re.findall(pattern, expected.out) != []
    said = [line for line in warnings_of(result) if "gone_since" in line]
    assert len(said) == 1, result.err


@TWO
@pytest.mark.parametrize(
    ("option", "file"), [("--resume", "checkpoint.pt"), ("--evaluate", "policy.pt")]
)
def test_three_messages_for_three_things(run, server, tmp_path, name, option, file):
    """17: what is missing, what is damaged, and what is of another script are not the same."""
    run(name)
    path = the_run(tmp_path) / file
    sound = path.read_bytes()
    rest = ["--env-id", of(name, "odd_envs:Sound-v0"), "--total-timesteps=9999"]

    def refusal(words):
        result = server.run(FILES[name], [option, path, *rest], tmp_path)
        return assert_one_line(result, name, 2, words)

    path.write_bytes(sound[: len(sound) // 2])
    damaged = refusal("damaged")
    torch.save({"weights": torch.ones(3)}, path)
    foreign = refusal("not of this")
    path.unlink()
    missing = refusal("does not exist")
    assert len({damaged, foreign, missing}) == 3
    assert "damaged" not in foreign + missing and "does not exist" not in damaged + foreign


@TWO
def test_a_flipped_byte_of_any_tensor_is_noticed(run, resume, tmp_path, name):
    """18: of network, optimizer, buffer or generator: the middle of each of the file's records."""
    from bad_inputs import flipped, records

    run(name)
    path = the_run(tmp_path) / "checkpoint.pt"
    sound = path.read_bytes()
    places = [begin + size // 2 for entry, (begin, size) in records(sound).items() if size > 3]
    for at in places[:: max(1, len(places) // 12)]:
        path.write_bytes(flipped(sound, at))
        result = resume(name, "odd_envs:Sound-v0", "--total-timesteps=400")
        assert_one_line(result, name, 2, "damaged")


@pytest.mark.slow
@COMPILER
def test_a_damaged_compile_cache_falls_back_to_eager(run, server, tmp_path):
    """19: libraries of 0 bytes, as a kill leaves them; that of a trial is whole."""
    cache = tmp_path / "cache"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    trial = tmp_path / "trial.py"
    trial.write_text("import torch\ntorch.compile(torch.exp)(torch.ones(1))\n")
    assert server.run(trial, [], tmp_path, env).status == 0
    whole = set(cache.rglob("*.so"))
    assert run("fpmd_online", {"compile": True}, env=env).status == 0
    damaged = set(cache.rglob("*.so")) - whole
    assert whole and damaged
    for library in damaged:
        library.write_bytes(b"")
    result = run("fpmd_online", {"compile": True}, env=env)
    assert result.status == 0 and not result.traceback, result.err
    said = [line for line in warnings_of(result) if "--compile" in line]
    assert len(said) == 1, result.err


@ONE
def test_a_session_keeps_its_signals_after_an_exception(monkeypatch, tmp_path, name):
    """20: the stop button of a notebook still works after an error in main."""
    script = __import__(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])

    def broken(*args, **options):
        raise ZeroDivisionError("in an update")

    monkeypatch.setattr(script, "update", broken)
    signums = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {signum: signal.getsignal(signum) for signum in signums}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        with pytest.raises((ZeroDivisionError, SystemExit)):
            script.main(script.Args(**small(name)))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        assert {signum: signal.getsignal(signum) for signum in signums} == handlers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


STRANGER = """
import pathlib
pathlib.Path("imported").touch()
import gymnasium, odd_envs
gymnasium.register("Mine-v0", odd_envs.Base)
"""


@ONE
@pytest.mark.parametrize(
    ("option", "file"), [("--resume", "checkpoint.pt"), ("--evaluate", "policy.pt")]
)
def test_a_file_does_not_decide_what_is_imported(run, server, tmp_path, name, option, file):
    """21: the id must be typed; then it is."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    run(name, {"env_id": "stranger:Mine-v0"}, env={"PYTHONPATH": str(tmp_path)})
    if not list(tmp_path.glob("runs/*")):
        pytest.fail("the environment in the current folder was not found")
    (tmp_path / "imported").unlink()
    run_dir = the_run(tmp_path)
    flags = [option, run_dir / file]
    more = ["--total-timesteps=300"] if option == "--resume" else []
    result = server.run(FILES[name], [*flags, *more], tmp_path)
    assert_one_line(result, name, 2, "--env-id")
    assert not (tmp_path / "imported").exists()
    flags += ["--env-id", "stranger:Mine-v0"]
    assert server.run(FILES[name], [*flags, *more], tmp_path).status == 0
    assert (tmp_path / "imported").exists()


# ---------------------------------------------------------------------------- C: wording, silence
SOME_FAIL = [env_id for env_id in odd_envs.FAILS if env_id not in JUNK]


@pytest.mark.parametrize("env_id", first_are_fast(SOME_FAIL, FAIL_FAST))
def test_what_breaks_in_mid_run_is_a_line(run, tmp_path, env_id):
    """14, 22: whatever the environment does: the words that help, and what was learnt is saved."""
    name = "fpmd_online" if SOME_FAIL.index(env_id) % 2 else "sac_online"
    result = run(name, {"env_id": env_id, "total_timesteps": 400, "checkpoint_every": 0})
    line = assert_one_line(result, name, 1, *odd_envs.FAILS[env_id])
    assert "--resume" in line and load(the_run(tmp_path))["global_step"] > 20
    assert_no_junk(the_run(tmp_path))


@ONE
@pytest.mark.parametrize("env_id", ["odd_envs:StepRaisesLater-v0", "odd_envs:ObsNanLater-v0"])
def test_the_same_in_processes_of_their_own(run, tmp_path, name, env_id):
    """22: a worker's exception is its main process's one line, and saved is what is sound."""
    changes = {"env_id": env_id, "async_envs": True, "total_timesteps": 400, "checkpoint_every": 0}
    result = run(name, changes)
    assert_one_line(result, name, 1, *odd_envs.FAILS[env_id])
    assert load(the_run(tmp_path))["global_step"] > 20
    assert_no_junk(the_run(tmp_path))


@ONE
def test_a_killed_worker_is_a_line(run, tmp_path, name):
    """22: neither a hang nor an EOFError; what can no longer be asked for is not saved."""
    changes = {"env_id": "odd_envs:Dies-v0", "async_envs": True, "checkpoint_every": 20}
    result = run(name, changes | {"total_timesteps": 400})
    line = assert_one_line(result, name, 1)
    assert "--resume" in line and load(the_run(tmp_path))["global_step"] >= 20


@ONE
def test_a_deleted_run_directory_is_a_line(run, tmp_path, name):
    """22: while it runs; there is no traceback.txt to write either."""
    env = {"ODD_DELETE": str(tmp_path / "runs")}
    result = run(name, {"env_id": "odd_envs:Hermit-v0", "checkpoint_every": 50}, env=env)
    assert_one_line(result, name, 1)


@ONE
@pytest.mark.parametrize("limit", [20_000, 60_000, 200_000])
def test_a_full_disk_is_a_line(run, tmp_path, name, limit):
    """22: files end at a limit; the old checkpoint survives, and half a file does not stay."""
    changes = {"total_timesteps": 2_000, "checkpoint_every": 100, "hidden_dim": 64}
    result = run(name, changes, file_size=limit)
    assert_one_line(result, name, 1)
    run_dir = the_run(tmp_path)
    assert not list(run_dir.glob("*.tmp"))
    for file in run_dir.glob("*.pt"):
        load(run_dir, file.name)


@ONE
@pytest.mark.parametrize("stdout", ["broken", "closed", "/dev/full"])
def test_an_output_that_is_gone_is_no_traceback(run, tmp_path, name, stdout):
    """22: `| head -1`, `>&-`, a full disk under the log."""
    result = run(name, {"eval_every": 50}, stdout=stdout)
    assert not result.traceback and "Exception ignored" not in result.err, result.err
    if result.status:
        assert_one_line(result, name, 1)
        for file in tmp_path.glob("runs/*/checkpoint.pt"):  # if it had begun
            load(file.parent)
    else:
        assert load(the_run(tmp_path))["global_step"] > 0


@ONE
def test_a_closed_stderr_is_no_reason_to_stop(run, tmp_path, name):
    """22: `2>&-`; a run that needs it for nothing is complete."""
    assert run(name, {"eval_every": 50}, stderr="closed").status == 0
    assert load(the_run(tmp_path))["global_step"] == 200


@pytest.mark.slow
@COMPILER
@ONE
def test_a_cache_folder_that_cannot_be_made_is_no_traceback(run, tmp_path, name):
    """22: torch's compiler wants one; the run goes on without it, or says so in a line."""
    (tmp_path / "file").write_text("")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = run(name, {"compile": True}, env=env)
    assert not result.traceback and result.status == 0, result.err


@ONE
def test_a_million_in_floating_point_fills_no_screen(run, tmp_path, name):
    """23: --total-timesteps 1e6 is refused in a line, or understood."""
    result = run(name, None, "--total-timesteps", "1e3")
    if result.status == 0:
        assert load(the_run(tmp_path))["global_step"] == 1_000
    else:
        assert_one_line(result, name, 2, "--total-timesteps")


@ONE
@pytest.mark.parametrize("env_id", ["odd_envs:ImageObs-v0", "odd_envs:DiscreteAction-v0"])
def test_refusals_say_what_is_wrong_with_a_space(run, name, env_id):
    """23: images are images, and not "vectors of numbers only"."""
    line = assert_one_line(run(name, {"env_id": env_id}), name, 2, *odd_envs.REFUSED[env_id])
    assert len(line) < 400


@ONE
@pytest.mark.parametrize(("env_id", "fps"), [("odd_envs:Sound-v0", 10), ("odd_envs:Bare-v0", 30)])
def test_films_run_at_the_speed_that_the_environment_names(run, tmp_path, name, env_id, fps):
    """24: metadata["render_fps"], and 30 where it names none."""
    changes = {"env_id": env_id, "eval_every": 10**6, "capture_video": True}
    result = run(name, changes, env={"MUJOCO_GL": "egl", "DISPLAY": ":0"})
    assert result.status == 0, result.err
    import imageio.v3 as iio

    films = list((the_run(tmp_path) / "videos").glob("*.mp4"))
    assert films and iio.immeta(films[0])["fps"] == pytest.approx(fps, rel=0.01)


@ONE
def test_returns_are_told_from_the_first_episode_on(run, tmp_path, name):
    """25: rows of metrics.csv before learning starts."""
    run(name, {"log_every": 20, "learning_starts": 150})
    table = rows(the_run(tmp_path))
    first = table[1]
    assert int(first[0]) < 150 and any(row[2] for row in table[1:4])


@ONE
def test_the_first_line_comes_before_the_slow_part(server, tmp_path, name):
    """25: something is on the screen before environments are made and updates compiled."""
    (tmp_path / "slow_env.py").write_text(
        "import time, gymnasium, odd_envs\n"
        "class Slow(odd_envs.Base):\n"
        "    def __init__(self, render_mode=None):\n"
        "        time.sleep(1)\n"
        "        open('made', 'w').close()\n"
        "gymnasium.register('Mine-v0', Slow)\n"
    )
    flags = as_flags(small(name) | {"env_id": "slow_env:Mine-v0"})
    process = server.start(FILES[name], flags, tmp_path)
    said = ""
    while not said.strip() and not (tmp_path / "made").exists() and process.poll() is None:
        time.sleep(0.01)
        said = "".join(path.read_text() for path in process.streams)
    process.send(signal.SIGKILL)
    process.wait()
    assert said.strip() and "error" not in said and not (tmp_path / "made").exists()


@pytest.mark.slow
def test_what_the_compiler_lacks_is_named(run, tmp_path):
    """26: without g++ a line says what to install."""
    (tmp_path / "bin").mkdir()
    env = {"PATH": str(tmp_path / "bin"), "CXX": "", "CC": ""}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run("fpmd_online", {"compile": True}, env=env)
    assert result.status == 0, result.err
    said = [line for line in warnings_of(result) if "--compile" in line]
    assert len(said) == 1 and "g++" in said[0] and "install" in said[0], result.err


@pytest.mark.parametrize("name", FILES)
def test_every_flag_says_more_than_its_letter(name):
    """28: a comment of at least two words, since --help shows it."""
    text = FILES[name].read_text()
    for field in fields(__import__(name).Args):
        line = rf"^    {field.name}: .*  # (.*)$|^    # (.*)\n    {field.name}: "
        comment = next(filter(None, re.search(line, text, re.MULTILINE).groups()))
        assert len(comment.split()) > 1, f"{field.name}: {comment}"


@pytest.mark.parametrize("name", FILES)
def test_no_shell_is_started(name):
    """29: programs are run from lists of words."""
    assert "shell" not in re.sub(
        r"#.*|\"\"\".*?\"\"\"", "", FILES[name].read_text(), flags=re.DOTALL
    )


@pytest.mark.parametrize("name", FILES)
def test_papers_and_repositories_are_links(name):
    """29: and UTD is spelled out once."""
    text = FILES[name].read_text()
    for number in set(re.findall(r"arXiv:(\d+\.\d+)", text)):
        assert f"https://arxiv.org/abs/{number}" in text
    assert "update-to-data" in text.lower() or "updates per environment step" in text.lower()


def test_the_number_of_odd_environments():
    """Those of the list, and at least 25 more of the same kinds."""
    kinds = {*odd_envs.REFUSED, *odd_envs.FAILS, *odd_envs.WORKS, *odd_envs.FILMED}
    assert len(kinds) > 34
