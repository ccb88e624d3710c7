"""A run that was stopped and resumed equals one that was not, bit for bit (on CPU)."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import COMPILER, FILES, MODES_OF, SMALL, as_flags, known, load, one_only, wait_for
from fork_server import PATIENCE

ENVS = ["Ant-v4", "Humanoid-v4", "Walker2d-v5", "dm_control/cheetah-run-v0"]


def differences(a, b, path=""):
    """Where two nested checkpoints differ; the clock and the command line may.

    And, from pixels, the pieces in which the frames came into their file: one for each save.
    """
    if path.endswith(("wall_time", "charts/SPS", "total_timesteps", "buffer/pieces")):
        return []
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{path}/{i}")
        ]
    return [] if a == b or (a != a and b != b) else [path]


def rows(run_dir, name="metrics"):
    """The table without its clock."""
    table = [line.split(",") for line in (run_dir / f"{name}.csv").read_text().splitlines()]
    clock = [i for i, key in enumerate(table[0]) if key in ("wall_time", "charts/SPS")]
    return [[cell for i, cell in enumerate(row) if i not in clock] for row in table]


@pytest.mark.parametrize("env_id", ENVS)
def test_resumed_equals_uninterrupted(script, run, env_id):
    """Networks, targets, optimizers, statistics, buffer, generators, simulators, CSV rows."""
    # the policy's learning rate, a tensor that updates fill, must go on falling
    flags = known(script, {"policy_lr_decay": (5, 20)})
    # where no script's policy has just fallen in both of its environments
    flags["seed"] = 2 if script.__name__ == "fpmd_plus_online" else 1
    straight = run(env_id=env_id, total_timesteps=360, **flags)
    resumed = run(env_id=env_id, total_timesteps=200, **flags)
    before = load(resumed)
    assert any(len(e["actions"]) for e in before["envs"]["episodes"]), "not in mid-episode"
    header = (resumed / "metrics.csv").read_text().partition("\n")[0]
    with (resumed / "metrics.csv").open("a") as file:  # a killed run's rows after its checkpoint
        file.write("300" + ",9" * header.count(",") + "\n3")  # the last one torn off in its step
    again = script.main(
        script.Args(**(before["args"] | {"resume": str(resumed), "total_timesteps": 360}))
    )
    assert again == resumed
    assert differences(load(straight), load(resumed)) == []
    assert differences(load(straight, "policy.pt"), load(resumed, "policy.pt")) == []
    assert rows(straight) == rows(resumed)
    assert load(resumed)["global_step"] == 360 and differences(before, load(resumed)) != []


def test_what_another_process_saves_before_the_lock_is_not_lost(script, run, monkeypatch):
    """It may save and end between this one's first look at the checkpoint and its lock."""
    run_dir = run(total_timesteps=200)
    early = load(run_dir)
    script.main(script.Args(**(early["args"] | {"resume": str(run_dir), "total_timesteps": 240})))
    late = (run_dir / "checkpoint.pt").read_bytes()
    torch.save(early, run_dir / "checkpoint.pt")
    real = script.lock

    def slow(folder):
        (folder / "checkpoint.pt").write_bytes(late)
        return real(folder)

    monkeypatch.setattr(script, "lock", slow)
    monkeypatch.setattr(script, "train", lambda *_: None)
    seen = []
    monkeypatch.setattr(script.Run, "work", lambda run: seen.append(run.global_step))
    script.main(script.Args(**(early["args"] | {"resume": str(run_dir), "total_timesteps": 280})))
    assert seen == [240]


def go_on(script, run_dir, steps):
    """Resume it to that many steps."""
    args = load(run_dir)["args"] | {"resume": str(run_dir), "total_timesteps": steps}
    return script.main(script.Args(**args))


def test_numbers_that_a_play_back_returns_are_checked(script, run, monkeypatch, capsys):
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    broken = np.full(11, np.nan, np.float32), True
    monkeypatch.setattr(script.SeededEpisodes, "play_back", lambda *_: broken)
    with pytest.raises(SystemExit):
        go_on(script, run_dir, 300)
    assert "environment 0 returned NaN in observation 0" in capsys.readouterr().err


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)])
def test_a_learning_rate_goes_on(script, lr):
    """A number, which a copy's own schedule may change, or the agent's tensor, that it fills."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr)
    saved = adam.state_dict()
    saved["param_groups"][0]["lr"] = 2e-4
    script.load_optimizer(adam, saved)
    now = adam.param_groups[0]["lr"]
    assert now is lr if isinstance(lr, torch.Tensor) else now == 2e-4


def test_a_frozen_layer_can_be_resumed(script):
    """Adam has no state of a parameter without a gradient, as in a copy with a layer of its own."""
    parameters = [torch.nn.Parameter(torch.ones(2), requires_grad=i > 0) for i in range(3)]
    adam = torch.optim.Adam(parameters)
    sum(x.sum() for x in parameters).backward()
    adam.step()
    saved = adam.state_dict()
    script.load_optimizer(torch.optim.Adam(parameters), saved)
    del saved["state"][2]
    with pytest.raises(ValueError, match="lacks a parameter's state"):
        script.load_optimizer(torch.optim.Adam(parameters), saved)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel which files are mapped")
def test_a_resumed_run_lets_go_of_the_old_checkpoint(script, run, monkeypatch):
    """Else it keeps gigabytes on the disk until it ends, where nobody sees them."""
    run_dir = run(env_id="InvertedPendulum-v4", total_timesteps=200)  # short episodes
    ended = []
    real = script.Run.close
    monkeypatch.setattr(script.Run, "close", lambda run: (ended.append(run), real(run)))
    go_on(script, run_dir, 400)
    gc.collect()
    assert f"{run_dir}/checkpoint.pt" not in Path("/proc/self/maps").read_text() and ended


def test_asynchronous_envs_resume_as_well(script, run, monkeypatch):
    """One process per env gives the same run as all envs in one process, resumed or not."""
    call, sent = gym.vector.AsyncVectorEnv.call, []

    def recorded(envs, name, *args, **kwargs):
        sent.extend(args if name == "play_back" else [])
        return call(envs, name, *args, **kwargs)

    monkeypatch.setattr(gym.vector.AsyncVectorEnv, "call", recorded)
    straight = run(env_id="Hopper-v4", total_timesteps=300)
    resumed = run(env_id="Hopper-v4", total_timesteps=200, async_envs=True)
    go_on(script, resumed, 300)
    found = differences(load(straight), load(resumed))
    assert found == ["/args/async_envs"]
    # a tensor is sent as an open file, and 32 environments would need a thousand
    kinds = {type(episode["actions"]) for episodes in sent for episode in episodes}
    assert kinds == {np.ndarray}


@pytest.fixture
def start(tmp_path):
    """Starts Python in that folder, in a session of its own, and leaves nothing of it behind."""
    started = []

    def start(*command, **options):
        options |= {"cwd": tmp_path, "start_new_session": True}
        started.append(subprocess.Popen([sys.executable, *map(str, command)], **options))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@one_only
def test_ctrl_c_reaches_the_workers_as_well_and_the_run_is_saved(script, start, tmp_path):
    """A terminal sends SIGINT to the processes of the simulators too; they leave it to the run."""
    settings = known(script, SMALL) | {"env_id": "Hopper-v4", "total_timesteps": 1_000_000}
    settings["async_envs"] = True
    process = start(FILES[script.__name__], *as_flags(settings))
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.csv")))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 128 + signal.SIGINT
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] >= 100


@pytest.mark.slow
@COMPILER
@one_only
def test_ctrl_c_spares_the_compiler_and_the_run_is_saved(script, start, tmp_path):
    """A terminal sends SIGINT to the C++ compiler of the first update too, which must not die."""
    cxx, updating, compiling = (tmp_path / name for name in ("cxx", "updating", "compiling"))
    cxx.write_text(f'#!/bin/sh\n[ -e {updating} ] && : >{compiling}\nexec g++ "$@"\n')
    cxx.chmod(0o755)
    (tmp_path / "run.py").write_text(
        "import pathlib, fpmd_online as script\n"
        "update = script.update\n"
        f"def marked(*args, **options):\n"
        f"    pathlib.Path({str(updating)!r}).touch()\n"
        "    return update(*args, **options)\n"
        "script.update = marked\n"
        "def critic_alone(agent, explore, improve):\n"  # all of it takes two minutes
        "    agent.critic.compile(dynamic=False)\n"
        "    return explore, improve\n"
        "script.accelerate = critic_alone\n"
        "script.main(script.parse_args())\n"
    )
    settings = known(script, SMALL) | {"env_id": "Hopper-v4", "total_timesteps": 1_000_000}
    env = {"CXX": str(cxx), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"PYTHONPATH": str(FILES["fpmd_online"].parent)}
    flags = as_flags(settings | {"compile": True})
    process = start("run.py", *flags, env=os.environ | env)
    wait_for(compiling.exists)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 128 + signal.SIGINT
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] >= 100


def logging_run(script, start, folder):
    """A long run in a process of its own, once it has written its first row."""
    settings = known(script, SMALL) | {"env_id": "Hopper-v4", "total_timesteps": 1_000_000}
    command = FILES[script.__name__], *as_flags(settings)
    process = start(*command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(folder.glob("runs/*/metrics.csv")))
    return process


@one_only
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_two_signals_at_once_are_one(script, start, tmp_path, second):
    """GNU timeout signals a process and then its group, this process included."""
    process = logging_run(script, start, tmp_path)
    for signum in signal.SIGTERM, second:
        process.send_signal(signum)
        time.sleep(0.003)
    _, stderr = process.communicate(timeout=PATIENCE)
    (run_dir,) = tmp_path.glob("runs/*")
    either = 128 + signal.SIGTERM, 128 + second  # whichever Python handles first
    assert process.returncode in either and "stopped; go on" in stderr
    assert load(run_dir)["global_step"] >= 100


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(script, run, start, tmp_path, signum):
    """Exit status 128 + signal, a checkpoint at the step it stopped, and an exact continuation."""
    process = logging_run(script, start, tmp_path)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=PATIENCE)
    (run_dir,) = tmp_path.glob("runs/*")
    assert (
        process.returncode == 128 + signum and f"--resume {run_dir.relative_to(tmp_path)}" in stderr
    )
    step = load(run_dir)["global_step"]
    assert 100 <= step < 1_000_000
    args = script.Args(**load(run_dir)["args"])
    script.main(replace(args, resume=str(run_dir), total_timesteps=step + 50))
    straight = run(env_id="Hopper-v4", total_timesteps=step + 50)
    assert differences(load(straight), load(run_dir)) == []


def test_a_signal_during_an_evaluation_saves_at_once(script, run, monkeypatch, tmp_path):
    """The evaluation is given up, the step is saved, and a resumed run makes good for it first."""
    straight = run(env_id="Hopper-v4", total_timesteps=300, eval_every=200, eval_episodes=2)
    *modes, last = MODES_OF[script.__name__]
    act = script.MODES[last]

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)  # raise_signal would be for this thread alone
        return act(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(script.MODES, last, interrupted)
        run(env_id="Hopper-v4", eval_every=200, eval_episodes=2, seed=1)
    (run_dir,) = set(tmp_path.glob("runs/*")) - {tmp_path / straight}
    assert stopped.value.code == 128 + signal.SIGTERM and load(run_dir)["global_step"] == 200
    assert [row[2] for row in rows(run_dir, "evaluations")] == ["mode", *modes]
    args = script.Args(**load(run_dir)["args"])
    script.main(replace(args, resume=str(run_dir), total_timesteps=300))
    assert differences(load(straight), load(run_dir)) == []
    assert rows(straight, "evaluations") == rows(run_dir, "evaluations")


@pytest.mark.parametrize("log_every", [120, 1000])
def test_divergence_stops_before_the_next_checkpoint(script, run, monkeypatch, tmp_path, log_every):
    """One line names the bad quantity and the step; the file from before stays."""
    update = script.update

    def diverging(agent, *rest):
        metrics = update(agent, *rest)
        if agent.updates == 44:  # the loop counts this one when it is done
            with torch.no_grad():
                next(agent.critic.parameters()).view(-1)[0] = torch.inf
        return metrics

    monkeypatch.setattr(script, "update", diverging)
    with pytest.raises(SystemExit, match=r"diverged: .+ at step 3\d\d; step 240 is saved"):
        run(env_id="Hopper-v4", checkpoint_every=120, log_every=log_every, utd=0.2)
    (run_dir,) = tmp_path.glob("runs/*")
    saved = load(run_dir)
    assert saved["global_step"] == 240
    assert all(value.isfinite().all() for value in saved["agent"].values())


def test_nan_loss_stops_too(script, run, monkeypatch):
    """The loss is looked at as well as the weights."""
    update = script.update

    def diverging(agent, *rest):
        return update(agent, *rest) | {"losses/critic_loss": torch.tensor(torch.nan)}

    monkeypatch.setattr(script, "update", diverging)
    with pytest.raises(SystemExit, match="losses/critic_loss is NaN or infinite at step 200"):
        run(env_id="Hopper-v4")


def test_checkpoints_are_written_whole(script, run, monkeypatch):
    """A crash while writing leaves the previous checkpoint readable."""
    run_dir = run(env_id="Hopper-v4", total_timesteps=200)
    real_save = torch.save

    def crashing(content, path):
        real_save(content, path)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crashing)
    args = script.Args(**load(run_dir)["args"])
    with pytest.raises(SystemExit):
        script.main(replace(args, resume=str(run_dir), total_timesteps=300))
    assert load(run_dir)["global_step"] == load(run_dir, "policy.pt")["global_step"] == 200
