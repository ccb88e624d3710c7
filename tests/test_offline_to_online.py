"""MVP offline-to-online: the dataset, chunks of actions and their returns, both phases, resuming.

What the script has in common with mvp_online.py is tested there, and that it is the same here.
"""

import os
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    COMPILER,
    ROOT,
    SMALL,
    act,
    count,
    equal,
    load,
    numpy_mlp,
    one_update,
    randomise,
    rng,
    spy,
    values,
)
from test_contract import python
from test_mvp import make_batch
from test_resume import differences, go_on, rows

import mvp_offline_to_online as script
import mvp_online as mvp

CPU = torch.device("cpu")
SETTINGS = {key: SMALL[key] for key in ("batch_size", "hidden_dim", "num_candidates", "log_every")}
SETTINGS |= {"compile": False, "torch_threads": 1, "device": "cpu", "buffer_size": 10_000}
SETTINGS |= {"offline_steps": 150, "total_timesteps": 150, "learning_starts": 50, "chunk_size": 3}
SETTINGS |= {"hidden_layers": 2, "eval_every": 0, "eval_episodes": 2, "dataset": "made here"}


def made_up_dataset(obs_dim, act_dim, n=200, seed=0):
    """Random transitions for ReplayBuffer.add; episodes of 3 to 12 steps, half terminate."""
    draw, ends = np.random.default_rng(seed), np.zeros(n)
    last = np.cumsum(draw.integers(3, 13, n))
    ends[last[last < n]] = ends[-1] = 1
    terminations = ends * (np.cumsum(ends) % 2)
    shapes = (n, obs_dim), (n, act_dim), (n,), (n, obs_dim)
    names = "obs", "actions", "rewards", "next_obs"
    data = {name: draw.uniform(-1, 1, shape) for name, shape in zip(names, shapes, strict=True)}
    return data | {"terminations": terminations, "ends": ends}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(env_id=..., ...) trains at a small size on made-up data; returns the run directory."""

    def train(env_id="probe_envs:Both-v0", **changes):
        space = script.make_env(env_id)
        dims = space.observation_space.shape[0], space.action_space.shape[0]
        monkeypatch.setattr(script, "load_dataset", lambda args: made_up_dataset(*dims))
        return script.main(script.Args(**(SETTINGS | {"env_id": env_id} | changes)))

    monkeypatch.chdir(tmp_path)
    return train


def make_agent(act_dim=2, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 16, "hidden_layers": 2, "num_candidates": 4}
    args = script.Args(**(sizes | {"chunk_size": 3} | changes))
    return script.Agent(3, act_dim, args, CPU), args


def make_chunks(args, act_dim=2, n=32, seed=0):
    """A batch like ReplayBuffer.sample's; a third of the chunks outlast their episode."""
    batch, h = make_batch(seed, n), args.chunk_size
    draw = np.random.default_rng(seed + 1)
    batch["actions"] = torch.tensor(draw.uniform(-1, 1, (n, h * act_dim)), dtype=torch.float32)
    ended = np.where(np.arange(n) % 3 == 1, draw.integers(1, h + 1, n), h)  # steps that happened
    valid = np.arange(h) < ended[:, None]
    return batch | {"valid": torch.tensor(valid, dtype=torch.float32)}


# ------------------------------------------------------------------ chunks in the buffer


@pytest.mark.parametrize("capacity", [300, 97])
@pytest.mark.parametrize("h", [1, 3, 5])
def test_chunks_against_a_list(capacity, h):
    """Rewards, masks and ends of every chunk by brute force; none crosses the seam of the ring."""
    args = script.Args(buffer_size=capacity, chunk_size=h, gamma=0.9)
    buffer = script.ReplayBuffer(args, 2, 1, CPU)
    columns = made_up_dataset(2, 1, 200)
    number = np.arange(200)
    columns["obs"][:, 0] = number  # recognise a transition
    columns["next_obs"][:, 0] = number + 0.5
    columns["terminations"][::17] = 1  # a demonstration goes on after success
    buffer.add(**{name: column[:60] for name, column in columns.items()})
    for i in range(60, 200):
        buffer.add(**{name: column[i : i + 1] for name, column in columns.items()})
    stored = number[-min(capacity, 200) :]
    batch = buffer.sample(20_000, rng())
    first = batch["obs"][:, 0].int().numpy()
    starts = np.bincount(first, minlength=200)
    possible = (number >= stored[0]) & (number <= stored[-1] - h + 1)
    assert ((starts > 0) == possible).all()  # every chunk within the ring, and no other
    assert np.abs(starts[possible] / (20_000 / possible.sum()) - 1).max() < 0.6
    names = "actions", "rewards", "next_obs", "terminations", "ends"
    actions, rewards, next_obs, terminations, ends = (columns[name] for name in names)
    for row in np.unique(first, return_index=True)[1]:
        i, alive, total, terminated, valid = first[row], True, 0.0, False, []
        for k in range(h):
            valid.append(alive)
            if alive:
                total += 0.9**k * rewards[i + k]
                terminated = terminated or bool(terminations[i + k])
            alive = alive and not ends[i + k]
        assert batch["valid"][row].bool().tolist() == valid
        assert batch["rewards"][row].item() == pytest.approx(total, abs=1e-6)
        assert batch["terminations"][row].item() == terminated
        assert batch["next_obs"][row, 0].item() == next_obs[i + h - 1, 0]
        assert batch["actions"][row].tolist() == pytest.approx(actions[i : i + h, 0].tolist())
    assert 0 < batch["terminations"].mean() < 1
    valid = batch["valid"][:, -1] > 0
    assert h == 1 or 0 < valid.float().mean() < 1
    assert 0 < batch["terminations"][valid].mean() < 1


# ------------------------------------------------------------------ losses


def test_critic_loss_is_h_step_regression_in_float64():
    """y = R + gamma^h (1 - terminated) mean Q'(s_h, a*); chunks never executed count 0."""
    agent, args = make_agent(gamma=0.9, reward_scale=0.5)
    for seed, module in enumerate([agent.critic, agent.target_critic]):
        randomise(module, seed)
    batch = make_chunks(args)
    draw = torch.rand(32, 6, generator=rng(5)) * 2 - 1
    loss, q = script.critic_loss(agent.critic, agent.target_critic, batch, draw, args)
    x = {key: value.double().numpy() for key, value in batch.items()}

    def twin(critic, obs, actions):
        inputs = np.concatenate([obs, actions], -1)
        return np.stack([numpy_mlp(net, inputs)[:, 0] for net in (critic.q1, critic.q2)])

    next_q = twin(agent.target_critic, x["next_obs"], draw.double().numpy()).mean(0)
    y = 0.5 * x["rewards"] + 0.9**3 * (1 - x["terminations"]) * next_q
    expected = twin(agent.critic, x["obs"], x["actions"])
    executed = x["valid"].all(1)
    assert 0 < executed.sum() < 32
    square = np.where(executed, (expected - y) ** 2, 0)
    assert loss.item() == pytest.approx(square.sum() / 32, rel=1e-5)
    assert np.allclose(q.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_policy_loss_weighs_every_entry_of_a_chunk():
    """Mean over all entries, with those after the end of an episode at weight zero."""
    agent, args = make_agent()
    randomise(agent.policy, 3)
    batch = make_chunks(args)
    w = batch["valid"].repeat_interleave(2, 1)
    noise = torch.randn(32, 6, generator=rng(1))
    t, r = torch.rand((2, 32, 1), generator=rng(2)).sort(0).values

    meanflow, constraint = script.policy_loss(
        agent.policy, batch["obs"], batch["actions"], w, noise, t, r
    )
    u = agent.policy(batch["obs"], (1 - t) * noise + t * batch["actions"], t, t)
    boundary = (w * (u - (batch["actions"] - noise)).square()).mean()
    assert constraint.item() == pytest.approx(boundary.item(), rel=1e-5)
    first = torch.arange(6) < 4  # the loss is a sum over entries, each with its own weight
    parts = [
        script.policy_loss(agent.policy, batch["obs"], batch["actions"], w * mask, noise, t, r)
        for mask in (first, ~first)
    ]
    for whole, part, rest in zip((meanflow, constraint), *parts, strict=True):
        assert part.item() > 0 and whole.item() == pytest.approx((part + rest).item(), rel=1e-5)
    nothing = script.policy_loss(agent.policy, batch["obs"], batch["actions"], 0 * w, noise, t, r)
    assert [part.item() for part in nothing] == [0, 0]


def test_mask_of_a_chunk_reaches_every_action_dimension(monkeypatch):
    """valid (B, h) counts steps, w (B, h * act_dim) entries of the chunk: a1 a1 a2 a2 a3 a3."""
    agent, args = make_agent(imitation_target="replay")
    batch, calls = make_chunks(args), spy(monkeypatch, script, "policy_loss")
    one_update(script, agent, batch, args, rng())
    (_, obs, actions, w, *_), _ = calls[0]
    assert torch.equal(w, batch["valid"][:, [0, 0, 1, 1, 2, 2]])
    assert torch.equal(obs, batch["obs"]) and torch.equal(actions, batch["actions"])


def test_imitating_the_td_chunk(monkeypatch):
    agent, args = make_agent(imitation_target="best_of_n")
    batch, calls = make_chunks(args), spy(monkeypatch, script, "policy_loss")
    chosen = []
    critic_loss = script.critic_loss
    monkeypatch.setattr(script, "critic_loss", lambda *a: chosen.append(a[3]) or critic_loss(*a))
    one_update(script, agent, batch, args, rng())
    (_, obs, actions, w, *_), _ = calls[0]
    assert torch.equal(obs, batch["next_obs"]) and torch.equal(actions, chosen[0])
    assert torch.equal(w, torch.ones(32, 6))


@pytest.mark.parametrize("target", ["replay", "best_of_n"])
def test_a_chunk_of_one_is_mvp_online(target):
    """With h = 1 an update is mvp_online's to the bit: one method, two ways to the data."""
    sizes = {"hidden_dim": 16, "hidden_layers": 2, "num_candidates": 4, "imitation_target": target}
    agents = []
    for module, changes in (mvp, {}), (script, {"chunk_size": 1}):
        torch.manual_seed(0)
        args, generator = module.Args(**sizes, **changes), rng(4)
        agent = module.Agent(3, 2, args, CPU)
        for seed in range(3):
            batch = make_batch(seed)
            batch |= {"valid": torch.ones(32, 1)} if module is script else {}
            one_update(module, agent, batch, args, generator)
        agents.append(agent)
    assert all(equal(values(agents[0]), values(agents[1])))


@COMPILER
@pytest.mark.slow
def test_compiled_updates_equal_plain_ones():
    """Parameters, targets and metrics after 10 updates, to rounding; masked chunks included."""
    torch._dynamo.reset()
    results = []
    for fast in False, True:
        agent, args = make_agent(num_candidates=50)
        improve = script.update
        if fast:
            _, improve = script.accelerate(agent, script.act_explore, improve)
        generator = rng(7)
        for seed in range(10):
            batch = make_chunks(args, seed=seed)
            metrics = one_update(script, agent, batch, args, generator, improve)
        assert not fast or improve.function is not improve.plain, "went on without compiling"
        results.append((agent.state_dict(), metrics))
    (plain, plain_metrics), (compiled, metrics) = results
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-3, atol=1e-5)


def test_parameter_counts_of_the_published_size():
    """Ant's 27 observations, chunks of five 8-dimensional actions."""
    agent = script.Agent(27, 8, script.Args(), CPU)
    assert count(agent.policy) == 844_328
    assert count(agent.critic.q1) == count(agent.critic.q2) == 827_393


# ------------------------------------------------------------------ both phases


COUNTED = []  # (step, action) of every step any Counting has made


class Counting(gym.Env):
    """Observes the step's number; episodes of 7 steps, by turns terminated and truncated."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.count = 0, getattr(self, "count", 0) + 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        COUNTED.append((self.steps - 1, tuple(np.float32(action).tolist())))
        done, odd = self.steps == 7, self.count % 2 == 1
        obs = np.full(1, self.steps, np.float32)
        return obs, float(self.steps), done and odd, done and not odd, {"success": odd}


gym.register("Counting-v0", Counting, disable_env_checker=True)


def test_chunks_are_executed_open_loop(run, monkeypatch):
    """Seven steps with h = 3 are planned at steps 0, 3 and 6; an episode's end drops the rest."""
    plans, explore = [], script.act_explore

    def remembered(agent, obs, *rest):
        plans.append((obs[0].item(), explore(agent, obs, *rest)))
        return plans[-1][1]

    monkeypatch.setattr(script, "act_explore", remembered)
    COUNTED.clear()
    saved = load(run("Counting-v0", total_timesteps=60))
    expected = []
    for (start, chunk), number in zip(plans, [3, 3, 1] * 9, strict=False):
        pairs = [tuple(pair) for pair in chunk.reshape(3, 2)[:number].tolist()]
        expected += [(int(start) + i, pair) for i, pair in enumerate(pairs)]
    assert COUNTED[-60:] == expected[:60]
    stored = {key: value[200:] for key, value in saved["buffer"].items()}
    steps = torch.arange(60) % 7
    assert torch.equal(stored["obs"][:, 0], steps.float())
    assert torch.equal(stored["next_obs"][:, 0], steps + 1.0)  # the true last observation
    assert torch.equal(stored["rewards"], steps + 1.0)
    assert torch.equal(stored["ends"], (steps == 6).float())
    assert torch.equal(stored["terminations"].nonzero()[:, 0], torch.arange(6, 60, 14))
    actions = [pair for _, pair in COUNTED[-60:]]
    assert stored["actions"].tolist() == [pytest.approx(pair) for pair in actions]


@pytest.mark.parametrize(("offline", "utd", "starts"), [(150, 1.0, 50), (0, 0.5, 0), (70, 2.0, 9)])
def test_updates_of_both_phases(run, monkeypatch, offline, utd, starts):
    """One per offline step; then utd per online step beyond learning_starts."""
    seen, real = [], script.update

    def counted(agent, *rest):
        seen.append(agent.updates)
        return real(agent, *rest)

    monkeypatch.setattr(script, "update", counted)
    phases = {"offline_steps": offline, "utd": utd, "learning_starts": starts}
    run_dir = run(total_timesteps=100, **phases)
    saved = load(run_dir)
    assert len(seen) == saved["counters"]["updates"] == offline + int(utd * (100 - starts))
    assert saved["global_step"] == offline + 100 and len(saved["buffer"]["rewards"]) == 300


def test_the_dataset_is_learnt_from_first(run):
    """Without an online step worth mentioning, the networks have moved; all data is kept."""
    run_dir = run(total_timesteps=1, learning_starts=1, eval_every=1000)
    saved = load(run_dir)
    torch.manual_seed(1)
    start = script.Agent(1, 1, script.Args(**SETTINGS), CPU).state_dict()
    assert all(not torch.equal(start[key], saved["agent"][key]) for key in start)
    obs = made_up_dataset(1, 1)["obs"]
    assert np.allclose(saved["buffer"]["obs"][:200], obs) and saved["position"] == 201
    table = rows(run_dir, "evaluations")  # at the end of each phase, whatever --eval-every is
    assert [row[0] for row in table[1:]] == ["150", "150", "151", "151"]


def test_evaluation_is_open_loop_and_counts_successes():
    _, args = make_agent(chunk_size=3)
    agent, envs = script.Agent(1, 2, args, CPU), script.make_envs("Counting-v0", 2)
    for mode, cost in ("one_step", (1, 1)), ("best_of_n", (1, 4)):
        plans = []

        def remembered(agent, obs, *rest, mode=mode, plans=plans):
            plans.append((obs[:, 0].tolist(), script.MODES[mode](agent, obs, *rest)))
            return plans[-1][1]

        COUNTED.clear()
        returns, successes, cut = script.evaluate(remembered, agent, envs, args)
        assert [obs for obs, _ in plans] == [[0, 0], [3, 3], [6, 6]]
        chunks = [chunk.reshape(2, 3, 2).swapaxes(0, 1).reshape(6, 2) for _, chunk in plans]
        planned = [tuple(pair) for pair in torch.cat(chunks).tolist()]  # env by env, step by step
        assert [pair for _, pair in COUNTED] == planned[:14]
        assert returns.tolist() == [28, 28] and script.cost_of(mode, args) == cost
        assert successes.tolist() == [mode == "one_step"] * 2 and not cut.any()
        envs.env.reset()  # odd episodes succeed, the next evaluation has even ones


def test_stopped_runs_go_on_exactly(run, monkeypatch, tmp_path):
    """SIGTERM in the offline phase and within a chunk of the online one: the same to the bit."""
    straight = load(run("Hopper-v4"))
    for stop in 80, 228:
        real = script.ReplayBuffer.sample
        seen = []

        def interrupting(buffer, *rest, stop=stop, seen=seen, real=real):
            seen.append(1)
            if len(seen) == (80 if stop == 80 else 178):  # 150 offline, 28 beyond learning_starts
                os.kill(os.getpid(), signal.SIGTERM)  # raise_signal would be for this thread alone
                time.sleep(0.1)  # until another has it
            return real(buffer, *rest)

        before = set(tmp_path.glob("runs/*"))
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(script.ReplayBuffer, "sample", interrupting)
            run("Hopper-v4")
        (run_dir,) = set(tmp_path.glob("runs/*")) - before
        saved = load(run_dir)
        assert stopped.value.code == 128 + signal.SIGTERM and saved["global_step"] == stop
        assert stop == 80 or len(saved["plan"]) > 0, "not within a chunk"
        script.main(script.Args(**(saved["args"] | {"resume": str(run_dir)})))
        assert differences(straight, load(run_dir)) == []


@pytest.mark.parametrize("moved", [False, True])
def test_no_chunk_goes_on_from_another_state(run, monkeypatch, moved):
    """An episode that does not play back ends in the buffer, and its plan with it."""
    run_dir = run("Hopper-v4")
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    saved["plan"] = torch.zeros(2, 1, 3)
    saved["envs"]["obs"] += moved
    torch.save(saved, run_dir / "checkpoint.pt")
    seen = []

    def train(agent, buffer, envs, run, *_):
        ends = buffer.columns(buffer.rows)["ends"]
        seen.append((len(run.plan), ends[buffer.position - 1].item()))
        assert run.bar.total == script.steps_of(run.args)  # of both phases

    monkeypatch.setattr(script, "train", train)
    steps = saved["args"]["total_timesteps"] + 20
    script.main(script.Args(**(saved["args"] | {"resume": str(run_dir), "total_timesteps": steps})))
    assert seen == [(0, 1) if moved else (2, 0)]


@pytest.mark.slow
def test_learns_which_half_of_the_data_succeeds(tmp_path, monkeypatch):
    """Data that goes left or right by whole chunks, rewarded at the end of one to the right.

    The policy imitates both, the critics know better: best of N succeeds, one candidate half the
    time. Q of the two chunks is 1 and 0.
    """
    draw = np.random.default_rng(0)
    side = draw.choice([-0.5, 0.5], 400).repeat(3)
    actions = side[:, None] + 0.02 * draw.standard_normal((1200, 1))
    end = np.arange(1200) % 3 == 2
    obs = np.zeros((1200, 1))
    data = {"obs": obs, "actions": actions, "rewards": end * (side > 0)}
    data |= {"next_obs": obs, "terminations": end, "ends": end}
    settings = {"offline_steps": 1500, "total_timesteps": 1, "learning_starts": 1, "utd": 1.0}
    settings |= {"hidden_dim": 64, "num_candidates": 16, "batch_size": 128, "policy_lr": 1e-3}
    settings |= {"critic_lr": 1e-3, "gamma": 1.0, "prior_std": 1.0}
    monkeypatch.setattr(script, "load_dataset", lambda args: data)
    monkeypatch.chdir(tmp_path)
    args = script.Args(**(SETTINGS | {"env_id": "probe_envs:Both-v0"} | settings))
    run_dir = script.main(args)
    agent = script.Agent(1, 1, args, CPU)
    agent.load_state_dict(load(run_dir)["agent"])
    start, generator = torch.zeros(400, 1), rng()
    one, best = (
        act(script, agent, start, args, generator, mode).mean(1)
        for mode in ("one_step", "best_of_n")
    )
    assert 0.3 < (one > 0).float().mean() < 0.7 and (best > 0).float().mean() > 0.97
    chunks = torch.tensor([[0.5] * 3, [-0.5] * 3])
    q = agent.critic(torch.zeros(2, 1), chunks).mean(0)
    assert q[0].item() == pytest.approx(1, abs=0.1) and q[1].item() == pytest.approx(0, abs=0.1)


def test_the_global_generator_is_each_environments_own():
    """OGBench's mazes draw from numpy's: neighbours and evaluations must not change the draws."""

    class Drawing(gym.Env):
        observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return np.random.rand(1), {}  # noqa: NPY002

        def step(self, action):
            return np.random.rand(1), 0.0, False, False, {}  # noqa: NPY002

    def draws(env, steps):
        return [env.step(np.zeros(1))[0].item() for _ in range(steps)]

    alone, disturbed = (script.SeededEpisodes(Drawing(), 0) for _ in range(2))
    neighbour = script.SeededEpisodes(Drawing(), 1)
    first = alone.reset(seed=3)[0].item(), *draws(alone, 6)
    again = [disturbed.reset(seed=3)[0].item(), *draws(disturbed, 3)]
    neighbour.reset(seed=3)
    assert draws(neighbour, 2) != list(first[1:3])
    assert [*again, *draws(disturbed, 3)] == list(first) and len(set(first)) == 7


# ------------------------------------------------------------------ OGBench


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A cube and a maze, 1,500 steps each, made by benchmark/measure/make_dataset.py."""
    pytest.importorskip("ogbench")
    folder = tmp_path_factory.mktemp("data")
    for name in "cube-single", "pointmaze-medium":
        flags = ["--steps=1500", "--episode-length=500", "--output", folder / f"{name}.npz"]
        result = python(ROOT / "benchmark/measure/make_dataset.py", name, *flags)
        assert result.returncode == 0, result.stderr
        assert "1,500 transitions in 3 episodes" in result.stdout
    return folder


def load_for(datasets, name, task="singletask-task2"):
    path = str(datasets / f"{name}.npz")
    args = script.Args(env_id=f"ogbench:{name}-{task}-v0", dataset=path)
    return script.load_dataset(args), np.load(path)


@pytest.mark.parametrize("name", ["cube-single", "pointmaze-medium"])
def test_dataset_holds_the_format_of_ogbench(datasets, name):
    file = np.load(datasets / f"{name}.npz")
    assert set(file) == {"observations", "actions", "terminals", "qpos", "qvel"}
    assert {file[key].shape[0] for key in file} == {1503}
    assert file["terminals"].nonzero()[0].tolist() == [500, 1001, 1502]
    assert file["observations"].dtype == file["actions"].dtype == np.float32
    assert np.abs(file["actions"]).max() <= 1
    first = file["observations"][[0, 501, 1002]]
    assert len(np.unique(first, axis=0)) == 3  # episodes begin differently


@pytest.mark.parametrize("name", ["cube-single", "pointmaze-medium"])
def test_the_same_seed_makes_the_same_dataset(datasets, tmp_path, name):
    for seed, same in (0, True), (1, False):
        path = tmp_path / f"{seed}.npz"
        flags = ["--steps=60", "--episode-length=500", f"--seed={seed}", "--output", path]
        result = python(ROOT / "benchmark/measure/make_dataset.py", name, *flags)
        assert result.returncode == 0, result.stderr
        ours, other = np.load(datasets / f"{name}.npz"), np.load(path)
        assert np.array_equal(ours["observations"][:400], other["observations"][:400]) == same


def test_maze_transitions_are_the_simulators(datasets):
    """From each observation the dataset's action leads to the dataset's next observation."""
    data, _ = load_for(datasets, "pointmaze-medium")
    names = "obs", "actions", "rewards", "next_obs", "terminations", "ends"
    obs, actions, rewards, next_obs, terminations, ends = (data[name] for name in names)
    env = gym.make("ogbench:pointmaze-medium-singletask-task2-v0")
    env.reset(seed=0)
    for i in [*range(0, 1500, 97), 499]:
        env.unwrapped.set_xy(obs[i])
        reached, reward, terminated, *_ = env.step(actions[i])
        assert np.allclose(reached, next_obs[i], atol=1e-5)
        assert (reward, terminated) == (rewards[i], terminations[i])
    assert ends.nonzero()[0][-1] == 1499 and len(obs) == 1500


def test_cube_rewards_are_distances_to_the_task(datasets):
    """-1 until the cube is within 4 cm of where the task wants it; success terminates.

    The demonstration goes on after it, so chunks that contain it are whole and the critics learn
    from them, as Q-chunking's do.
    """
    data, file = load_for(datasets, "cube-single")
    names = "actions", "rewards", "terminations", "ends"
    actions, rewards, terminations, ends = (data[name] for name in names)
    env = gym.make("ogbench:cube-single-singletask-task2-v0")
    env.reset(seed=0)
    (target,) = env.unwrapped._data.mocap_pos
    kept = ~file["terminals"]
    near = np.linalg.norm(file["qpos"][kept, 14:17] - target, axis=1) <= 0.04
    assert np.array_equal(rewards, near - 1.0) and np.array_equal(terminations, near)
    assert 0 < near.sum() < near.size and ends.nonzero()[0].tolist() == [499, 999, 1499]
    assert np.abs(actions).max() <= 1 - 1e-5


def test_the_expert_moves_the_cube(datasets):
    """The dataset is of some use: the cube is lifted and set down elsewhere."""
    cube = np.load(datasets / "cube-single.npz")["qpos"][:501, 14:17]
    assert cube[:, 2].max() > 0.08 and np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.05


def test_end_to_end_on_real_physics(datasets, tmp_path, monkeypatch, capsys):
    """Offline, online, both evaluations, a resumed run and a replay on the maze."""
    monkeypatch.chdir(tmp_path)
    flags = {"env_id": "ogbench:pointmaze-medium-singletask-task1-v0", "eval_every": 1000}
    flags |= {"dataset": str(datasets / "pointmaze-medium.npz"), "chunk_size": 5}
    straight = script.main(script.Args(**(SETTINGS | flags)))
    table = rows(straight, "evaluations")
    column = dict(zip(table[0], table[-1], strict=True))
    assert column["success_rate"] == "0.0" and column["returns"] == "-1000.0000 -1000.0000"
    assert len(table) == 5 and len(load(straight)["buffer"]["rewards"]) == 1500 + 150
    shorter = script.main(script.Args(**(SETTINGS | flags | {"total_timesteps": 73})))
    args = load(shorter)["args"] | {"resume": str(shorter), "total_timesteps": 150}
    script.main(script.Args(**args))
    assert differences(load(straight), load(shorter)) == []
    script.main(script.parse_args(["--evaluate", str(straight), "--eval-episodes", "1"]))
    out = capsys.readouterr().out
    assert "success rate 0.00" in out and "ms/chunk" in out


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no/such.npz"}, "cannot load --dataset no/such.npz"),
        ({"chunk_size": 0}, "--chunk-size 0 must be above 0"),
        ({"offline_steps": -1}, "--offline-steps -1 must be 0 or more"),
        ({"learning_starts": 151}, "at most --total-timesteps"),
        ({"offline_steps": 0, "utd": 0.001}, "gives no update"),
        ({"env_id": "ogbench:cube-single-v0"}, "not in the single-task mode"),
        ({"env_id": "ogbench:scene-singletask-v0"}, "cannot load --dataset"),
        ({"env_id": "Hopper-v4"}, "cannot load --dataset"),
        # without a network: it is refused before the download
        ({"dataset": "cube-double-play-singletask-v0"}, "data for it begin with cube-single-"),
        ({"total_timesteps": 50, "learning_starts": 50, "utd": 0.5}, "--utd does nothing without"),
    ],
)
def test_bad_input_is_refused(datasets, tmp_path, monkeypatch, capsys, changes, message):
    changes = {"dataset": str(datasets / "cube-single.npz")} | changes
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"env_id": "ogbench:cube-single-singletask-v0"} | changes
    with pytest.raises(SystemExit) as stopped:
        script.main(script.Args(**settings))
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and message in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "chunk_size", "message"),
    [
        (10_001, 3, "holds 10,001 transitions"),
        (2, 3, "--chunk-size 3: --dataset has trajectories of 2 at most"),
        # episodes of 3 to 12 steps: no chunk of 13 would be learnt from, in silence
        (200, 13, "--chunk-size 13: --dataset has trajectories of 12 at most"),
    ],
)
def test_a_dataset_of_the_wrong_size_is_refused(
    run, capsys, monkeypatch, size, chunk_size, message
):
    data = made_up_dataset(1, 1, size)
    assert size != 200 or np.diff(np.flatnonzero(data["ends"])).max() == 12
    monkeypatch.setattr(script, "load_dataset", lambda args: data)
    settings = SETTINGS | {"env_id": "probe_envs:Both-v0", "chunk_size": chunk_size}
    with pytest.raises(SystemExit):
        script.main(script.Args(**settings))
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_dataset_alone(run):
    """No online step: evaluated and saved at the end, and a resume may add a phase online."""
    run_dir = run(total_timesteps=0, learning_starts=0, eval_every=1000)
    saved = load(run_dir)
    assert saved["global_step"] == saved["counters"]["updates"] == 150
    assert saved["position"] == 200
    assert [row[:2] for row in rows(run_dir, "evaluations")[1:]] == [["150", "150"]] * 2
    go_on(script, run_dir, 50)
    assert load(run_dir)["global_step"] == 200 and load(run_dir)["position"] == 250


@pytest.mark.parametrize(("chunk_size", "warned"), [(3, False), (6, True)])
def test_terminations_that_no_chunk_shows_are_told(
    tmp_path, monkeypatch, capsys, chunk_size, warned
):
    """A demonstration that ends at its success must be as long as a chunk."""
    data = made_up_dataset(1, 1)
    last = np.flatnonzero(data["ends"])
    data["terminations"][last] = np.diff(last, prepend=-1) < 6  # at the ends of short ones alone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "load_dataset", lambda args: data)
    monkeypatch.setattr(script, "run_to_the_end", lambda run: None)
    settings = SETTINGS | {"env_id": "probe_envs:Both-v0", "chunk_size": chunk_size}
    script.main(script.Args(**settings))
    assert ("shorter than --chunk-size" in capsys.readouterr().err) == warned


def test_without_ogbench_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    with pytest.raises(SystemExit):
        script.main(script.Args(**SETTINGS))
    stderr = capsys.readouterr().err
    assert "pip install ogbench==1.2.2" in stderr and stderr.count("\n") == 1
