"""Learning from pixels: frames, the encoder, what trains what, and a resume with its frames.

Most of it needs no OpenGL: pixel_envs draws with numpy. What does need it is skipped, with the
reason, where there is none.
"""

from dataclasses import replace

import numpy as np
import pixel_envs
import pytest
import torch
from conftest import FILES, rng
from test_resume import differences, rows

PIXELS = [name for name in FILES if "pixels" in name]
SMALL = {
    "image_size": 24,
    "action_repeat": 1,
    "total_timesteps": 400,
    "learning_starts": 100,
    "num_envs": 2,
    "batch_size": 16,
    "buffer_size": 10_000,
    "num_candidates": 2,
    "hidden_dim": 16,
    "encoder_channels": 4,
    "feature_dim": 8,
    "log_every": 100,
    "eval_every": 0,
    "utd": 0.1,
    "compile": False,
    "torch_threads": 1,
    "device": "cpu",
    "async_envs": False,
}
SHAPE = (3, 24, 24, 3)  # of an observation: frames, height, width, colours
CPU = torch.device("cpu")


@pytest.fixture(params=PIXELS)
def script(request):
    """Each script that learns from pixels, imported as a module."""
    return __import__(request.param)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(env_id=..., ...) trains at SMALL size in an empty folder; returns the run directory."""
    monkeypatch.chdir(tmp_path)
    return lambda **changes: script.main(script.Args(**(SMALL | changes)))


def load(run_dir, name="checkpoint.pt"):
    return torch.load(run_dir / name, weights_only=True)


def made_up_batch(batch_size=16, act_dim=2, seed=0, shape=SHAPE):
    draw = rng(seed)
    images = torch.randint(0, 256, (2, batch_size, *shape), generator=draw, dtype=torch.uint8)
    return {
        "obs": images[0],
        "next_obs": images[1],
        "actions": 2 * torch.rand((batch_size, act_dim), generator=draw) - 1,
        "rewards": torch.randn(batch_size, generator=draw),
        "terminations": torch.zeros(batch_size),
    }


def make_agent(script, act_dim=2, **changes):
    torch.manual_seed(0)
    args = script.Args(**(SMALL | changes))
    return script.Agent((args.frame_stack, *SHAPE[1:]), act_dim, args, CPU), args


# ------------------------------------------------------------------ frames and their buffer


class Happened:
    """A vector env of pixel_envs.Coded, played at random into a buffer; what happened, in order."""

    def __init__(self, script, steps, num_envs=3, **changes):
        args = script.Args(**(SMALL | {"num_envs": num_envs} | changes))
        args = replace(args, env_id="pixel_envs:Coded-v0")
        pixel_envs.Coded.made = 0
        envs = script.make_envs(args, num_envs)
        pixel_envs.Coded.log.clear()
        self.buffer = script.ReplayBuffer(args, SHAPE, 1, CPU)
        draw = np.random.default_rng(0)
        obs, _ = envs.reset(seed=[0] * num_envs)
        self.first_obs = obs
        self.resets = num_envs
        for _ in range(steps):
            actions = draw.uniform(-1, 1, (num_envs, 1)).astype(np.float32)
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            ends = terminations | truncations
            self.buffer.add(obs, actions, rewards, infos["last_obs"], terminations, ends)
            obs = next_obs
            self.resets += ends.sum()
        self.obs = obs
        self.log = list(pixel_envs.Coded.log)

    def stored(self):
        """All that sampling can give, the oldest first."""
        size = self.buffer.size

        class EveryOne:
            """Stands in for a generator: each age once."""

        with pytest.MonkeyPatch.context() as patch:
            ages = torch.arange(size - 1, -1, -1)
            patch.setattr(torch, "randint", lambda *_, **__: ages)
            EveryOne.device = CPU
            return self.buffer.sample(size, EveryOne)


def assert_equal_to_log(stored, log):
    assert len(stored["rewards"]) == len(log) > 0
    _, before, actions, rewards, after, terminated = zip(*log, strict=True)
    assert np.array_equal(stored["obs"].numpy(), np.stack(before))
    assert np.array_equal(stored["next_obs"].numpy(), np.stack(after))
    assert np.array_equal(stored["actions"].numpy()[:, 0], np.array(actions, np.float32))
    assert np.array_equal(stored["rewards"].numpy(), np.array(rewards, np.float32))
    assert np.array_equal(stored["terminations"].numpy(), np.array(terminated, np.float32))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_buffer_holds_what_happened(script, num_envs):
    """Against a list of stacks: episodes of length 1 to 5, staggered, ended in both ways."""
    happened = Happened(script, 60, num_envs)
    assert_equal_to_log(happened.stored(), happened.log)
    ends = {(row[5], row[3] % 10) for row in happened.log}
    assert {(True, 1), (False, 1)} <= ends  # an episode of length 1 that terminates


@pytest.mark.parametrize("buffer_size", [9, 30, 31, 32])
def test_buffer_goes_round(script, buffer_size):
    """Many times: what is left is the end of what happened, whole, and not much less of it."""
    happened = Happened(script, 200, 3, buffer_size=buffer_size, total_timesteps=100)
    size = happened.buffer.size
    assert_equal_to_log(happened.stored(), happened.log[-size:])
    assert happened.buffer.written > 5 * len(happened.buffer.frames)
    # short episodes bring up to twice as many frames as steps, and frames decide
    assert buffer_size // 3 * 3 >= size >= buffer_size // 3


def test_frames_find_room_where_episodes_are_short(script):
    """A run shorter than its buffer keeps all of it, whatever its episodes are like."""
    happened = Happened(script, 100, 3, total_timesteps=300)
    assert happened.buffer.size == 300
    assert happened.buffer.written > script.expected_frames(script.Args(**SMALL, seed=1)) - 200
    assert_equal_to_log(happened.stored(), happened.log)


def test_each_frame_is_stored_once(script):
    """One frame per step and one per episode; the rest of a transition is small."""
    happened = Happened(script, 100, 3)
    buffer = happened.buffer
    assert buffer.written == 300 + len({(r[0], r[3] // 10) for r in happened.log if r[3] % 10 == 1})
    frame = 24 * 24 * 3
    assert buffer.frames[0].nbytes == frame
    assert buffer.rows[0].nbytes + buffer.numbers[0].nbytes <= 4 * (1 + 2) + 4 * 4


def test_a_stack_begins_with_copies_of_the_first_frame(script):
    happened = Happened(script, 1, 3)
    assert (happened.first_obs == happened.first_obs[:, :1]).all()
    f0 = happened.first_obs[:, 0]
    stored = happened.stored()["next_obs"].numpy()
    assert np.array_equal(stored[:, 0], f0) and np.array_equal(stored[:, 1], f0)
    assert (stored[:, 2] != f0).any()


def test_sampling_is_uniform_over_what_is_there(script):
    happened = Happened(script, 200, 3, buffer_size=30, total_timesteps=100)
    batch = happened.buffer.sample(20_000, rng())
    found, counts = np.unique(batch["rewards"].numpy(), return_counts=True)
    assert set(found) == {float(row[3]) for row in happened.log[-happened.buffer.size :]}
    expected = 20_000 / happened.buffer.size
    assert np.abs(counts - expected).max() < 6 * expected**0.5


# ------------------------------------------------------------------ resume


def alike(a, b):
    """Where two checkpoints differ, but for how the saves cut the frames into pieces."""
    return [path for path in differences(a, b) if not path.endswith("/pieces")]


def go_on(script, run_dir, steps):
    args = script.Args(**load(run_dir)["args"])
    return script.main(replace(args, resume=str(run_dir), total_timesteps=steps))


def frames_of(run_dir):
    return np.fromfile(run_dir / "frames.bin", np.uint8)


def test_resumed_equals_uninterrupted(script, run):
    """To the bit: networks, optimizers, buffer, frames, generators, episodes, tables."""
    straight = run(env_id="pixel_envs:Seeded-v0", total_timesteps=300)
    resumed = run(env_id="pixel_envs:Seeded-v0", total_timesteps=200)
    before = load(resumed)
    assert any(len(e["actions"]) for e in before["envs"]["episodes"]), "not in mid-episode"
    assert go_on(script, resumed, 300) == resumed
    assert alike(load(straight), load(resumed)) == []
    assert alike(load(straight, "policy.pt"), load(resumed, "policy.pt")) == []
    assert rows(straight) == rows(resumed)
    assert np.array_equal(frames_of(straight), frames_of(resumed))
    assert load(resumed)["global_step"] == 300 and alike(before, load(resumed)) != []


def test_resumed_equals_uninterrupted_when_frames_were_overwritten(script, run):
    """The ring has gone round before the stop and goes round again after it."""
    settings = {"env_id": "pixel_envs:Seeded-v0", "buffer_size": 61}
    straight = run(total_timesteps=400, **settings)
    resumed = run(total_timesteps=250, **settings)
    go_on(script, resumed, 400)
    assert alike(load(straight), load(resumed)) == []
    frames = frames_of(resumed)
    (size,) = {frames_of(straight).size, frames.size}
    saved = load(resumed)["buffer"]
    assert size == saved["written"] * 24 * 24 * 3
    # what nobody needs may be missing, but not what a transition names
    lowest = saved["numbers"].min() * 24 * 24 * 3
    assert np.array_equal(frames_of(straight)[lowest:], frames[lowest:])


def test_asynchronous_envs_are_the_same_run(script, run):
    """One process per env, in training and evaluation, through a fork server."""
    settings = {"env_id": "pixel_envs:Seeded-v0", "eval_every": 100, "eval_episodes": 2}
    here = run(total_timesteps=200, **settings)
    there = run(total_timesteps=110, async_envs=True, **settings)
    go_on(script, there, 200)
    assert alike(load(here), load(there)) == ["/args/async_envs"]
    resumed_at = "110"
    table = [row for row in rows(there, "evaluations") if row[0] != resumed_at]
    assert rows(here, "evaluations") == table


def test_a_kill_between_frames_and_checkpoint_loses_nothing(script, run, monkeypatch):
    """frames.bin is ahead of checkpoint.pt then, and what is too much is cut off."""
    settings = {"env_id": "pixel_envs:Seeded-v0", "checkpoint_every": 100}
    straight = run(total_timesteps=300, **settings)
    killed = run(total_timesteps=200, **settings)
    size = frames_of(killed).size
    write_whole = script.write_whole

    def dies(path, write):
        if path.suffix == ".pt":
            raise KeyboardInterrupt  # as a kill: nothing is tidied up
        write_whole(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "write_whole", dies)
        go_on(script, killed, 300)
    assert frames_of(killed).size > size and load(killed)["global_step"] == 200
    go_on(script, killed, 300)
    assert alike(load(straight), load(killed)) == []
    assert np.array_equal(frames_of(straight), frames_of(killed))


@pytest.mark.parametrize("damage", ["missing", "shorter", "foreign", "swapped"])
def test_frames_that_do_not_fit_are_refused(script, run, capsys, damage):
    run_dir = run(env_id="pixel_envs:Seeded-v0", total_timesteps=200)
    path = run_dir / "frames.bin"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(content[:-1])
    elif damage == "foreign":
        path.write_bytes(bytes(len(content)))
    else:
        path.write_bytes(content[24:] + content[:24])
    before = {file: file.stat().st_mtime_ns for file in run_dir.iterdir() if file.name != ".lock"}
    with pytest.raises(SystemExit) as stopped:
        go_on(script, run_dir, 300)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and "frames.bin" in stderr
    assert stderr.splitlines()[-1].startswith(f"{script.__name__}.py: error: ")
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
