"""What users rely on: the command line, refusals, files, a script that stands alone."""

import csv
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import fields, make_dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    CANDIDATES,
    FILES,
    FPMD,
    MIRROR,
    OFFLINE,
    PIXELS,
    ROOT,
    SCRIPTS,
    SMALL,
    STEPPED,
    as_flags,
    images_batch,
    known,
    load,
    obs_of,
    one_only,
    small,
)
from fork_server import PATIENCE


def small_flags(script):
    return as_flags(known(script, SMALL))


def python(*command, **options):
    command = [sys.executable, *map(str, command)]
    options = {"capture_output": True, "text": True, "timeout": PATIENCE} | options
    return subprocess.run(command, **options)


def commands(scripts):
    """`python <script>.py ...` in the README and the docs, once each, lines joined."""
    found = {}
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if re.match(rf"\s*python (baselines/)?({'|'.join(scripts)})\.py", part):
                        words = shlex.split(part, comments=True)
                        found[shlex.join(words)] = words
    return [pytest.param(words, id=line) for line, words in found.items()]


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize("script", FILES, indirect=True)
def test_help_is_clean(script, server, tmp_path):
    """Every field is explained, in groups with headings, and nothing is printed to stderr."""
    result = server.run(FILES[script.__name__], ["--help"], tmp_path)
    assert result.status == 0 and result.err == ""
    for field in fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in result.out
    heads = [line.strip("╭╮─│ :").lower() for line in result.out.splitlines()]
    for group in "run", "algorithm", "speed":
        assert any(re.match(rf"{group}\b(\W|$)", head) for head in heads), group


@pytest.mark.parametrize("script", FILES, indirect=True)
def test_every_argument_is_used_and_explained(script):
    source = FILES[script.__name__].read_text()
    body = source.split("class Args:", 1)[1]
    for field in fields(script.Args):
        beside, above = rf"^    {field.name}: .*  # \w", rf"^    # \w.*\n    {field.name}: "
        assert re.search(f"{beside}|{above}", body, re.MULTILINE), field.name
        assert re.search(rf"\bargs\.{field.name}\b", body), f"{field.name} is never used"


@pytest.mark.parametrize("command", commands(SCRIPTS))
def test_documented_commands_work(command, tmp_path, monkeypatch):
    """They parse as written; training runs at a small size, replays find the run just made."""
    script = __import__(Path(command[1]).stem)
    assert FILES[script.__name__] == ROOT / command[1]
    monkeypatch.chdir(tmp_path)
    if "--resume" in command or "--evaluate" in command:
        run_dir = script.main(script.Args(**(known(script, SMALL) | {"env_id": "Hopper-v4"})))
        for flag, name in ("--resume", ""), ("--evaluate", "policy.pt"):
            if flag in command:
                command[command.index(flag) + 1] = str(run_dir / name)
        small = ["--total-timesteps=500"] if "--resume" in command else ["--eval-episodes=1"]
        small += ["--no-capture-video"]
    else:
        args = script.parse_args(command[2:])
        small = [*small_flags(script), "--total-timesteps=200"]
        if args.precision == "tf32":  # which only a GPU has
            small += ["--precision=float32"]
        if "--weights" in command:  # of the best alone there is no KL
            small = [flag for flag in small if "target-kl" not in flag]
    script.main(script.parse_args([*command[2:], *small]))


@pytest.mark.parametrize("command", commands(OFFLINE))
def test_documented_offline_commands_parse(command):
    """They are run in those scripts' own tests, on data that needs no download."""
    script = importlib.import_module(Path(command[1]).stem)
    args = script.parse_args([] if "--evaluate" in command else command[2:])
    script.check_args(args)
    assert script.choose_device(args).type == "cpu" and args.env_id.startswith("ogbench:")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env-id Antt-v4", "Did you mean: `Ant`?"),
        ("--env-id dm_control/cheetah-rum-v0", "Did you mean: `cheetah-run`?"),
        ("--env-id no_such_module:Env-v0", "No module named 'no_such_module'"),
        ("--env-id CartPole-v1", "Discrete(2)"),
        ("--env-id probe_envs:Unbounded-v0", "bounds -inf, inf of action 0; they must rise"),
        ("--env-id probe_envs:Image-v0", "do not learn from images"),
        ("--env-id Pusher-v4", "mujoco<3"),
        ("--env-id CarRacing-v3", "Box2D is not installed"),
        ("--resume missing", "--resume 'missing': there is no checkpoint.pt"),
        ("--resume truncated.pt", "damaged"),
        ("--resume foreign.pt", "no checkpoint.pt"),
        ("--evaluate missing.pt", "--evaluate 'missing.pt': there is no policy.pt"),
        ("--evaluate truncated.pt", "damaged"),
        ("--evaluate foreign.pt", "no policy.pt"),
        ("--total-timesteps 0", "--total-timesteps 0 must be above 0"),
        ("--num-envs -1", "--num-envs -1 must be above 0"),
        ("--eval-episodes 0", "--eval-episodes 0 must be"),
        ("--eval-every -1", "--eval-every -1 must be 0 or more"),
        ("--batch-size 200", "--batch-size must be at most --learning-starts"),
        ("--num-envs 101", "--num-envs must be at most --learning-starts"),
        ("--learning-starts 500", "at most --total-timesteps"),
        ("--buffer-size 1", "--num-envs must be at most --buffer-size"),
        ("--gamma 0", "--gamma 0.0 must be above 0"),
        ("--gamma 1.01", "--gamma 1.01 must be above 0 and at most 1"),
        ("--tau 2", "--tau 2.0 must be"),
        ("--tau nan", "--tau nan must be"),
        ("--critic-lr -0.1", "--critic-lr -0.1"),
        ("--utd 0", "--utd 0.0 must be above 0"),
        ("--utd 0.001", "gives no update"),
        ("--num-envs 70 --total-timesteps 200 --learning-starts 150", "gives no update"),
        ("--device cuda:7", "--device cuda:7"),
        ("--device tpu9", "--device tpu9"),
    ],
)
def test_bad_input_is_refused(script, tmp_path, monkeypatch, capsys, flags, message):
    """One clear line, exit status 2, and nothing new on disk."""
    assert_refused(script, tmp_path, monkeypatch, capsys, flags, message)


SCALED = [name for name in SCRIPTS if name != "fpmd_plus_online"]  # have a --reward-scale
STEERS = ["target-kl 0.5", "temperature-init 0.5", "temperature-rate 0.5"]
REFUSED_BY_PLUS = [
    ("--policy-lr 0", "--policy-lr 0.0 must be above 0 and at most"),
    ("--num-atoms 0", "--num-atoms 0 must be above 0"),
    ("--num-atoms 2", "--num-atoms 2 is too few"),
    ("--num-atoms 1000000", "--num-atoms 1000000 needs about"),
    ("--critic-layers 0", "--critic-layers 0 must be above 0"),
    ("--critic-layers 1000000000000", "--critic-layers 1000000000000 needs about"),
    ("--target-kl 0.7", "--target-kl must be below the log of --num-candidates, 0.69"),
    ("--target-kl 0", "--target-kl 0.0 must be above 0"),
    ("--temperature-init 0.0001", "--temperature-init must be at least 0.001"),
    ("--temperature-init 1001", "--temperature-init 1001.0 must be above 0 and at most 1000"),
    ("--temperature-rate 1.1", "--temperature-rate 1.1 must be 0 or more and at most 1"),
    ("--temperature-rate 0", "--target-kl does nothing with --temperature-rate 0"),
    *[(f"--weights best --target-kl 1 --{x}", "unless --weights is softmax") for x in STEERS],
    ("--noise-scale 0", "--noise-scale 0 leaves --imitation regression nothing"),
    ("--num-candidates 1", "--num-candidates 1 leaves nothing to choose from"),
    ("--num-candidates 1 --weights best --target-kl 1", "leaves nothing to choose from"),
    ("--num-atoms 1 --no-normalize-rewards --v-max 6", "--v-max does nothing"),
    ("--no-normalize-rewards", "--no-normalize-rewards needs a --v-max that holds returns"),
]


C51 = "--normalize-rewards --reward-scale 1"
MANY_STEPS = "--total-timesteps 110000 --learning-starts 100000 --batch-size 100000"


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        *[("fpmd_plus_online", *case) for case in REFUSED_BY_PLUS],
        ("sac_online", "--critic-batch-norm --tau 0.02", "--tau does nothing unless"),
        ("sac_online", f"{MANY_STEPS} {C51} --num-atoms 1001", "--num-atoms 1001 needs about"),
        ("sac_online", "--num-atoms 101", "--num-atoms needs --normalize-rewards, or its own"),
        ("sac_online", "--normalize-rewards", "--normalize-rewards needs --reward-scale 1"),
        ("sac_online", "--v-max 6", "--v-max does nothing without --num-atoms or"),
        *[(name, "--num-candidates 0", "--num-candidates 0") for name in CANDIDATES],
        *[(name, "--flow-steps 0", "--flow-steps 0") for name in [*STEPPED, "dpmd_online"]],
        *[(name, "--reward-scale inf", "--reward-scale inf must be") for name in SCALED],
        *[(name, "--noise-scale -1", "--noise-scale -1.0 must be 0 or") for name in CANDIDATES],
        *[(name, "--policy-lr -1 1", "--policy-lr -1.0 must be above 0") for name in MIRROR],
        *[(name, "--policy-lr 1e-3 0", "--policy-lr 0.0 must be above 0") for name in MIRROR],
        *[(name, "--temperature 0", "--temperature 0.0") for name in MIRROR],
        *[(name, "--particle-temperature 0", "--particle-temperature 0.0") for name in FPMD],
        *[(name, "--policy-lr-decay 9 9", "9 9 must rise, from 0 or more") for name in MIRROR],
        *[(name, "--policy-lr-decay -5 9", "-5 9 must rise, from 0 or more") for name in MIRROR],
        ("mvp_online", "--policy-lr 0", "--policy-lr 0.0 must be above 0 and at most"),
        ("mvp_online", "--ivc-coef -1", "--ivc-coef -1.0 must be 0 or more and at most"),
        ("mvp_online", "--ivc-coef nan", "--ivc-coef nan must be 0 or more"),
        ("mvp_online", "--hidden-layers 0", "--hidden-layers 0 must be above 0"),
        ("mvp_online", "--prior-std 0", "--prior-std 0.0 must be above 0"),
        ("sac_online", "--policy-lr 0", "--policy-lr 0.0 must be above 0 and at most"),
        ("sac_online", "--alpha-init 0", "--alpha-init 0.0 must be above 0"),
        ("sac_online", "--hidden-layers 0", "--hidden-layers 0 must be above 0"),
        ("sac_online", "--log-std-range 1 -1", "--log-std-range 1.0 -1.0 must rise"),
        ("sac_online", "--log-std-range -inf 1", "--log-std-range -inf 1.0 must rise"),
        ("sac_online", "--log-std-range -5 nan", "--log-std-range -5.0 nan must rise"),
    ],
    indirect=["script"],
)
def test_bad_input_of_one_method_is_refused(script, tmp_path, monkeypatch, capsys, flags, message):
    assert_refused(script, tmp_path, monkeypatch, capsys, flags, message)


def test_mvp_takes_a_coefficient_of_zero():
    """Without the constraint, and without exploration noise."""
    script = __import__("mvp_online")
    script.check_args(script.Args(ivc_coef=0.0, noise_scale=0.0, device="cpu"))


@pytest.mark.parametrize("script", ["fpmd_meanflow_online"], indirect=True)
@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_share_of_instant_pairs_is_a_share(script, tmp_path, monkeypatch, capsys, value):
    message = f"--p-instant {value} must be 0 or more and at most 1"
    flags = f"--p-instant={value}"
    assert_refused(script, tmp_path, monkeypatch, capsys, flags, message)
    for share in 0.0, 1.0:
        script.check_args(script.Args(p_instant=share, device="cpu"))


def assert_refused(script, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.pt").write_bytes(b"PK\x03\x04 and then nothing")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        script.main(script.parse_args([*small_flags(script), *flags.split()]))
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and sorted(tmp_path.rglob("*")) == before
    assert stderr.startswith(f"{script.__name__}.py: error: ") and message in stderr
    assert stderr.count("\n") == 1


def test_dm_control_needs_an_older_mujoco_than_4(script, monkeypatch, capsys):
    monkeypatch.setattr(script.metadata, "version", lambda name: "4.0.0")
    with pytest.raises(SystemExit):
        script.make_env("dm_control/cheetah-run-v0")
    line = capsys.readouterr().err
    assert "'mujoco<4'" in line and "mujoco is too new" in line


def test_video_without_opengl_is_refused(script, monkeypatch, capsys, tmp_path):
    """The message says which package to install."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")  # so that it will be as it was, whatever main sets
        monkeypatch.delenv(name)
    monkeypatch.setattr("mujoco.GLContext", None, raising=False)
    with pytest.raises(SystemExit) as stopped:
        script.main(script.Args(**known(script, SMALL), capture_video=True))
    assert stopped.value.code == 2 and "apt-get install libegl1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", FILES, indirect=True)
@pytest.mark.parametrize("display", [None, ":0"])
def test_triton_is_loaded_before_opengl(script, display, monkeypatch, tmp_path):
    """CUDA builds of torch bring it; its LLVM crashes when it comes after that of Mesa."""
    (tmp_path / "triton.py").write_text("import loaded\n\nloaded.names.append('triton')\n")
    loaded = SimpleNamespace(names=[])
    monkeypatch.setitem(sys.modules, "loaded", loaded)
    monkeypatch.setitem(sys.modules, "triton", None)  # afterwards it is as it was
    del sys.modules["triton"]
    monkeypatch.syspath_prepend(tmp_path)

    def context(*_size):
        loaded.names.append("OpenGL")
        return Mock()

    monkeypatch.setattr("mujoco.GLContext", context, raising=False)
    os.environ.pop("DISPLAY", None)
    if display:
        os.environ["DISPLAY"] = display
    script.choose_opengl(*(["Hopper-v4"] if script.__name__ in PIXELS else []))
    assert loaded.names == ["triton"] if display else loaded.names == ["triton", "OpenGL"]


@one_only  # all share it
def test_a_changed_argument_is_refused_on_resume(script, run, capsys):
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    args = script.Args(**load(run_dir)["args"])
    with pytest.raises(SystemExit):
        script.main(replace(args, resume=str(run_dir), gamma=0.5))
    assert "--gamma cannot change on --resume; it was 0.99" in capsys.readouterr().err


@one_only  # all share it
def test_other_flags_may_change_on_resume(script, run):
    """What says when to save, and not what is learnt."""
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    args = script.Args(**load(run_dir)["args"])
    script.main(replace(args, resume=str(run_dir), total_timesteps=220, checkpoint_every=10))
    assert load(run_dir)["args"]["checkpoint_every"] == 10


def test_a_default_is_never_refused(script, monkeypatch):
    """Who copies a script adds flags: zero, a negative number or no text may mean nothing."""
    new = {"bonus": 0.0, "log_std_min": -5.0, "note": "", "bounds": (-1.0, -2.0)}
    fields = [(name, type(value), value) for name, value in new.items()]
    more = make_dataclass("Args", fields, bases=(script.Args,))
    monkeypatch.setattr(script, "Args", more)
    script.check_args(more())
    with pytest.raises(SystemExit):
        script.check_args(more(log_std_min=-4.0))


@one_only  # all share it
def test_a_metric_without_a_column_is_named(script, run, monkeypatch, capsys):
    """Who copies a script adds one to update; a row of another length would end the table."""
    real = script.update
    monkeypatch.setattr(
        script, "update", lambda *given: real(*given) | {"policy/novelty": torch.ones(())}
    )
    with pytest.raises(SystemExit):
        run(env_id="Hopper-v4", total_timesteps=200)
    assert "add {'policy/novelty'} to METRICS" in capsys.readouterr().err


def test_resume_starts_from_the_stored_arguments(script, run):
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    args = script.parse_args(["--resume", str(run_dir), "--total-timesteps", "220"])
    assert args == script.Args(
        **(load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": 220})
    )


@one_only  # all share it
def test_a_resumed_run_says_how_far_it_went(script, run):
    """args.json holds what the run was last told, or reports would call it unfinished."""
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    args = script.Args(**load(run_dir)["args"])
    script.main(replace(args, resume=str(run_dir), total_timesteps=220))
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 220


# ------------------------------------------------------------------ files and environments


def test_run_directory(script, run):
    """The files of a run and what they hold; the policy loads without the script's help."""
    run_dir = run(env_id="probe_envs:Constant-v0", eval_every=200, seed=7)
    assert re.fullmatch(
        rf"probe_envs-Constant-v0__{script.__name__}__7__\d{{8}}-\d{{6}}-\d{{6}}", run_dir.name
    )
    names = {"args.json", "versions.json", "metrics.csv", "evaluations.csv"}
    assert names | {"policy.pt", "checkpoint.pt"} <= {path.name for path in run_dir.iterdir()}
    assert list(run_dir.glob("events.out.tfevents.*")) and not list(run_dir.glob("*.tmp"))
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 7
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["torch"] == metadata.version("torch") and versions["device"]
    header = (run_dir / "evaluations.csv").read_text().split("\n")[0]
    assert header == (
        "global_step,updates,wall_time,mode,nfe,num_candidates,"
        "return_mean,return_std,success_rate,episodes_cut,returns"
    )
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["global_step"] for row in rows] == ["100", "200", "300", "400"]
    charts = ["charts/episodic_return", "charts/episodic_length", "charts/SPS"]
    now = ["global_step", "updates", "wall_time"]
    assert list(rows[0]) == [*now, *charts, *script.METRICS]
    learnt = [[row[name] != "" for name in script.METRICS] for row in rows]
    assert not any(learnt[0]) and all(map(all, learnt[1:]))  # learning starts at step 100
    assert all(row[name] for row in rows for name in charts)
    saved = load(run_dir, "policy.pt")
    learnt = {"algorithm", "script", "commit", "policy", "args", "global_step"}
    assert set(saved) == learnt | {"obs_dim", "act_dim", "action_bounds"}
    assert saved["script"] == f"{script.__name__}.py"
    assert saved["commit"] == versions["commit"]
    policy = script.Agent(1, 1, script.Args(hidden_dim=16), torch.device("cpu")).policy
    assert set(saved["policy"]) == {name for name, _ in policy.named_parameters()}
    assert type(saved["args"]) is dict and saved["global_step"] == 400
    policy.load_state_dict(saved["policy"])


def choices():
    """Every script with each value of the flags that change what an update does."""
    for name in FILES:
        types = get_type_hints(importlib.import_module(name).Args)
        flags = {"weight_mode", "imitation_target", "imitation", "weights", "td_action"}
        flags &= types.keys()
        found = [(flag, value) for flag in sorted(flags) for value in get_args(types[flag])]
        for flag, value in found or [(None, "")]:
            yield pytest.param(name, {flag: value} if flag else {}, id=f"{name}-{value}")


@pytest.mark.parametrize(("script", "choice"), list(choices()), indirect=["script"])
def test_metrics_are_what_an_update_returns(script, choice):
    """METRICS names the columns of metrics.csv and of a checkpoint before there are any."""
    args = script.Args(**known(script, small(script)), **choice)
    agent = script.Agent(obs_of(script), 2, args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    if script.__name__ in PIXELS:
        batch = images_batch()
    else:
        size = args if hasattr(args, "chunk_size") else args.buffer_size
        buffer = script.ReplayBuffer(size, 3, 2, torch.device("cpu"))
        draw = np.random.default_rng(0)
        buffer.add(**{name: draw.random((50, *shape)) for name, shape in buffer.shapes.items()})
        batch = buffer.sample(16, generator)
    assert script.prepare_update(agent, args)  # the first one improves the policy
    metrics = script.update(agent, batch, args, generator, True)
    charts = {"charts/success"} if script.__name__ in OFFLINE else set()  # of the loop, not of it
    assert len(script.METRICS) == len(set(script.METRICS))
    assert set(script.METRICS) == metrics.keys() | charts


@one_only  # all share it
def test_two_launches_in_one_second_do_not_share(script, run, monkeypatch, capsys):
    settings = {"env_id": "probe_envs:Constant-v0", "total_timesteps": 110, "utd": 0.1}
    assert len({run(**settings) for _ in range(3)}) == 3
    monkeypatch.setattr(script.time, "time_ns", lambda: 0)  # nor in one microsecond
    monkeypatch.setattr(script.time, "strftime", lambda form: "now")
    run_dir = run(**settings)
    before = {path: path.stat().st_mtime_ns for path in sorted(run_dir.iterdir())}
    with pytest.raises(SystemExit) as stopped:
        run(**settings)
    line = f"File exists: cannot make the run directory {run_dir}"
    assert stopped.value.code == 2 and line in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in sorted(run_dir.iterdir())} == before


@pytest.mark.parametrize("in_processes", [False, True])
def test_a_policy_knows_sizes_and_bounds(script, run, in_processes):
    """In the environment's own units, each with its own bounds, also from another process."""
    settings = {"async_envs": True} if in_processes else {}
    saved = load(run(env_id="probe_envs:Bounded-v0", total_timesteps=110, **settings), "policy.pt")
    assert (saved["obs_dim"], saved["act_dim"]) == (2, 4)
    assert saved["action_bounds"].dtype == torch.float32
    low, high = saved["action_bounds"]
    assert low.tolist() == [[-2.0, 0.0], [-0.5, 1.0]] and high.tolist() == [[2.0, 3.0], [0.5, 9.0]]


def test_a_policy_of_a_version_with_critics_in_it_still_plays(script, run, capsys):
    """Files from before it held sizes and bounds; what --evaluate needs is as it was."""
    run_dir = run(env_id="probe_envs:Succeeding-v0")
    saved = load(run_dir, "policy.pt")
    older = {name: saved[name] for name in ("algorithm", "policy", "args", "global_step")}
    critics = script.Agent(1, 1, script.Args(hidden_dim=16), torch.device("cpu")).critic
    torch.save(older | {"critics": critics.state_dict()}, run_dir / "policy.pt")
    script.main(script.parse_args(["--evaluate", str(run_dir), "--eval-episodes=2"]))
    assert capsys.readouterr().out.count("return 3.0000") == 2


@one_only  # all share it
def test_replay_prints_returns_and_latency(script, run, capsys):
    run_dir = run(env_id="probe_envs:Succeeding-v0")
    script.main(script.parse_args(["--evaluate", str(run_dir / "policy.pt"), "--eval-episodes=3"]))
    out = capsys.readouterr().out
    assert out.count("return 3.0000") == 3 and "return 3.00 +- 0.00" in out
    assert re.search(r"\d+\.\d{3} ms/action", out)


def test_replay_equals_the_last_evaluation(script, run, capsys):
    """The same policy, episodes and noise as the run's row of the deployed mode, the first."""
    run_dir = run(env_id="Hopper-v4", eval_every=400, eval_episodes=3)
    row = (run_dir / "evaluations.csv").read_text().splitlines()[1]
    script.main(script.parse_args(["--evaluate", str(run_dir)]))
    assert (
        re.findall(r"episode \d: return (\S+)", capsys.readouterr().out)
        == row.split(",")[-1].split()
    )


@one_only  # all share it
def test_replay_on_another_env_is_refused(script, run, capsys):
    run_dir = run(env_id="probe_envs:Constant-v0")
    with pytest.raises(SystemExit):
        script.main(script.parse_args(["--evaluate", str(run_dir), "--env-id", "Hopper-v4"]))
    assert "was trained on probe_envs:Constant-v0" in capsys.readouterr().err


@one_only  # all share it
def test_replay_of_actions_with_other_bounds_is_refused(script, run, capsys):
    """Actions of [-1, 1] would mean something else there."""
    run_dir = run(env_id="probe_envs:Succeeding-v0")
    saved = load(run_dir, "policy.pt")
    torch.save(saved | {"action_bounds": saved["action_bounds"] / 2}, run_dir / "policy.pt")
    with pytest.raises(SystemExit):
        script.main(script.parse_args(["--evaluate", str(run_dir), "--eval-episodes=2"]))
    assert "its actions had other bounds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env_id",
    [
        "Ant-v4",
        "HalfCheetah-v5",
        "dm_control/walker-walk-v0",
        "probe_envs:Both-v0",
        "probe_envs:Scalar-v0",  # its action is a number, not a vector
    ],
)
def test_environments_train_with_the_same_command(script, run, env_id):
    run_dir = run(env_id=env_id, total_timesteps=150)
    assert load(run_dir)["global_step"] == 150


@one_only  # all share it
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_keep_to_their_bounds(script, dtype):
    """At both ends, which a trained policy often sits at; the environment looks."""
    rng = np.random.default_rng(0)
    for low in np.round(rng.uniform(-3, 1, 40), 2):
        bounds = {"low": low, "high": round(low + rng.uniform(0.1, 3), 2), "dtype": dtype}
        env = script.make_env("odd_envs:StrictActions-v0", env_kwargs=json.dumps(bounds))
        env.reset(seed=0)
        for end in -1, 0.3, 1:
            env.step(np.full(2, end, np.float32))


@pytest.mark.parametrize(
    ("env_id", "camera"), [("Ant-v4", 0), ("HalfCheetah-v5", 0), ("InvertedPendulum-v4", -1)]
)
def test_the_camera_follows(script, env_id, camera):
    """Gymnasium's default camera lets an Ant walk out of the picture."""
    assert script.make_env(env_id, film=True).unwrapped.mujoco_renderer.camera_id == camera


@pytest.mark.parametrize("backend", ["egl", pytest.param("osmesa", marks=pytest.mark.slow)])
def test_video_of_a_replay(script, run, backend):
    """One mp4 with moving pictures; skipped where that OpenGL is not installed."""
    probe = python(
        "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()", env={"MUJOCO_GL": backend}
    )
    if probe.returncode:
        pytest.skip(f"no {backend} here: {probe.stderr.strip().splitlines()[-1]}")
    run_dir = run(env_id="Hopper-v4", total_timesteps=150)
    flags = ["--evaluate", run_dir, "--eval-episodes=1", "--capture-video"]
    result = python(FILES[script.__name__], *flags, env={"MUJOCO_GL": backend, "HOME": "/tmp"})
    assert result.returncode == 0, result.stderr
    import imageio.v3 as iio

    (film,) = (run_dir / "videos").glob("*.mp4")
    frames = iio.imread(film)
    assert frames.ndim == 4 and len(frames) > 3 and frames.std() > 10
    assert (frames[0].astype(int) != frames[-1]).mean() > 0.01


# ------------------------------------------------------------------ alone, and in the README


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_alone(name, tmp_path):
    """Copied into an empty folder, without the repository."""
    shutil.copy(FILES[name], tmp_path)
    flags = [*small_flags(__import__(name)), "--env-id=HalfCheetah-v4", "--total-timesteps=150"]
    result = python(f"{name}.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] == 150


def test_probe_envs_are_valid_environments():
    """The tests' own environments satisfy gymnasium, so that a failure is the script's."""
    from gymnasium.utils.env_checker import check_env

    for name in ("Constant", "Observed", "Delayed", "Acted", "Both"):
        check_env(gym.make(f"probe_envs:{name}-v0").unwrapped, skip_render_check=True)


@one_only
def test_simulators_say_a_thing_once(script, capfd):
    """What MuJoCo says of HalfCheetah's model is not repeated per environment; later words are."""
    script.make_envs("HalfCheetah-v4", 3).close()
    assert capfd.readouterr().err.count("'settotalmass' is deprecated") == 1
    assert sys.modules["mujoco"].get_mju_user_warning() is None


@one_only
@pytest.mark.parametrize(("reward", "told"), [(math.nan, ""), (12.34, "return 12.3, ")])
def test_progress_names_a_return_once_there_is_one(script, reward, told, capsys):
    """On data, and before the first episode ends, there is none."""
    run = SimpleNamespace(
        bar=SimpleNamespace(disable=True),
        told=(time.time() - 100, 0),
        global_step=500,
        args=script.Args(total_timesteps=1000),
        agent=SimpleNamespace(updates=0),
        metrics={"charts/episodic_return": reward},
    )
    script.Run.show_progress(run)
    assert capsys.readouterr().out == f"step 500 of 1,000: {told}5/s\n"


@one_only
def test_dm_controls_taste_for_warnings_is_undone(script):
    """It shows every DeprecationWarning from its import on: dozens of torch's while compiling."""
    pytest.importorskip("dm_control")
    script.make_envs("dm_control/cartpole-swingup-v0", 1).close()
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("`torch.jit.script` is deprecated.", DeprecationWarning, stacklevel=1)
    assert not seen


@one_only
def test_readme_snippet_acts(script, run, monkeypatch):
    """The lines that load a policy and act, as printed."""
    run_dir = run(env_id="Hopper-v4", total_timesteps=150)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run_dir)
    names = {}
    exec(snippet, names)
    assert names["act"](torch.zeros(11)).shape == (3,)  # numbers: test_export.py
