"""From env.step to the replay buffer: what is learnt from is what happened."""

import gymnasium as gym
import numpy as np
import probe_envs
import pytest
import torch
from conftest import MODES_OF, known, load


@pytest.fixture
def coded_log():
    probe_envs.LOG.clear()
    probe_envs.Coded.made = 0
    return probe_envs.LOG


@pytest.mark.parametrize("buffer_size", [10_000, 37])
def test_buffer_holds_what_happened(run, coded_log, buffer_size):
    """Against the envs' own list: true last observations, termination alone, order, wrap-around."""
    settings = {"total_timesteps": 150, "learning_starts": 120, "buffer_size": buffer_size}
    saved = load(run(env_id="probe_envs:Coded-v0", num_envs=3, eval_episodes=1, **settings))
    del coded_log[0]  # the one step that evaluation's only env is tried with
    numbers = sorted({row[0][0] for row in coded_log})  # the vector env also makes a dummy
    expected = coded_log[-buffer_size:]
    stored = saved["buffer"]
    assert len(numbers) == 3 and len(stored["rewards"]) == len(expected) == min(150, buffer_size)
    order = np.roll(np.arange(len(expected)), -saved["position"]) if buffer_size == 37 else ...
    columns = stored["obs"], stored["actions"], stored["rewards"], stored["next_obs"]
    for column, values in zip(
        [*columns, stored["terminations"]], zip(*expected, strict=True), strict=True
    ):
        assert np.array_equal(column.numpy()[order], np.array(values, np.float32))
    assert stored["terminations"].sum() > 0
    truncated = [row for row in expected if row[0][1] % 2 == 0 and not row[4]]
    assert truncated, "no truncated episode was seen"


def test_sampling_is_uniform_with_replacement(script):
    """Every stored row equally often, and never one that was not stored."""
    buffer = script.ReplayBuffer(50, 1, 1, torch.device("cpu"))
    for i in range(20):
        x = np.full((1, 1), i)
        row = {"obs": x, "actions": x, "rewards": x[0], "next_obs": x, "terminations": np.zeros(1)}
        buffer.add(**row)
    batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
    counts = np.bincount(batch["rewards"].int().numpy(), minlength=20)
    assert len(counts) == 20 and np.abs(counts - 1000).max() < 150
    assert torch.equal(batch["rewards"], batch["obs"][:, 0])


def test_env_is_flat_float32_and_scaled(script):
    """Dict observations in key order; -1 and 1 are the ends of a lopsided action range."""
    env = script.make_env("probe_envs:Named-v0")
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32 and obs.tolist() == [1, 2, 3]
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), env.action_space.dtype)
    for scaled, raw in (-1, 0.0), (0, 0.5), (1, 1.0):
        assert env.step(np.full(2, scaled, np.float32))[1] == pytest.approx(raw)


@pytest.mark.parametrize("num_envs", [1, 2, 5])
@pytest.mark.parametrize("utd", [0.3, 1.0, 2.0])
def test_updates_follow_from_utd_alone(script, run, monkeypatch, num_envs, utd):
    """utd * (steps after the warm-up), whatever num_envs is; and they are real gradient steps."""
    steps = []

    def counted(agent, *rest):
        steps.append(1)
        return dict.fromkeys(script.METRICS, torch.zeros(()))

    monkeypatch.setattr(script, "update", counted)
    run_dir = run(env_id="probe_envs:Constant-v0", num_envs=num_envs, utd=utd)
    assert len(steps) == round(utd * 300) == load(run_dir)["counters"]["updates"]


def test_training_moves_every_network(script, run):
    """Not just 'did not crash': each network differs from its initial weights."""
    settings = {"env_id": "probe_envs:Both-v0", "total_timesteps": 200}
    saved = load(run(**settings))
    end, args = saved["agent"], script.Args(**saved["args"])
    torch.manual_seed(args.seed)
    start = script.Agent(1, 1, args, torch.device("cpu")).state_dict()
    frozen = {key for key in start if torch.equal(start[key], end[key])}
    # atoms never move, and the scale has tests of its own
    assert not {key for key in frozen if ".atoms" not in key and "reward_scale." not in key}


def test_same_seed_same_run_and_other_seed_other_run(run):
    """Every number but the clock's; a different seed changes them."""

    def rows(seed):
        run_dir = run(env_id="Hopper-v4", seed=seed, eval_every=200, eval_episodes=2)
        names = ("metrics", "evaluations")
        tables = [np.genfromtxt(run_dir / f"{n}.csv", str, delimiter=",") for n in names]
        clock = [np.isin(t[0], ["wall_time", "charts/SPS"]) for t in tables]
        return [t[:, ~c].tolist() for t, c in zip(tables, clock, strict=True)]

    first, again, other = rows(3), rows(3), rows(4)
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


def test_evaluation_does_not_disturb_training(run):
    """The same weights with and without evaluations on the way."""
    weights = [
        load(run(env_id="Hopper-v4", eval_every=every, eval_episodes=2))["agent"]
        for every in (0, 100)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_every_episode_has_its_own_seed(script):
    """First observations differ between envs, episodes, seeds and from evaluation's."""
    envs = script.make_envs("Hopper-v4", 2)
    seen = []
    for seed in 2, 4, 3:  # two runs' training streams, one evaluation stream
        for reset in ([seed] * 2, None, None):
            seen += [tuple(obs) for obs in envs.env.reset(seed=reset)[0]]
    assert len(set(seen)) == len(seen) == 18
    assert tuple(envs.reset(seed=[2, 2])[0][0]) == seen[0]


def test_success_rate_is_the_share_of_successful_episodes(script, run):
    """At the end of each evaluation episode; returns are listed per episode."""
    run_dir = run(env_id="probe_envs:Succeeding-v0", eval_every=400, eval_episodes=40)
    rows = np.genfromtxt(run_dir / "evaluations.csv", str, delimiter=",")
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["mode"] for row in table] == MODES_OF[script.__name__]
    assert 0.2 < float(table[0]["success_rate"]) < 0.8
    assert len({row["success_rate"] for row in table}) == 1  # the same first observations
    assert table[0]["returns"].split() == ["3.0000"] * 40
    costs = {row["mode"]: (row["nfe"], row["num_candidates"]) for row in table}
    jumps = "1" if script.__name__ == "fpmd_plus_online" else "2"
    known_costs = {"one_step": ("1", "1"), "best_of_n": (jumps, "2")}
    known_costs |= {"one_candidate": ("2", "1"), "sampled": ("1", "1")}
    assert costs == {mode: known_costs[mode] for mode in costs}


@pytest.mark.parametrize("in_processes", [False, True])
@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_passes_through_the_vector_env(script, in_processes, key):
    """SeededEpisodes drops what nobody reads of an env's infos; success must reach evaluate."""
    name = {"success": "Succeeding", "is_success": "Solving"}[key]
    envs = script.make_envs(f"probe_envs:{name}-v0", 6, in_processes)
    args = script.Args(**known(script, {"hidden_dim": 8, "num_candidates": 2, "flow_steps": 1}))
    agent = script.Agent(1, 1, args, torch.device("cpu"))
    first, _ = envs.reset(seed=[2 * args.seed + 1] * 6)  # those that an evaluation starts from
    expected = (first[:, 0] > 0).astype(float)
    assert 0 < expected.mean() < 1
    returns, successes, cut = script.evaluate(script.MODES[script.DEPLOYED], agent, envs, args)
    assert successes.tolist() == expected.tolist() and returns.tolist() == [3.0] * 6
    assert cut.tolist() == [False] * 6
    infos = envs.env.step(np.zeros((6, 1), np.float32))[-1]
    assert infos == {}, "of a step within an episode"
    envs.close()


def test_success_rate_is_empty_where_there_is_none(run):
    run_dir = run(env_id="probe_envs:Constant-v0", eval_every=400)
    header, row, *_ = (run_dir / "evaluations.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["success_rate"] == ""


def test_evaluation_counts_the_first_episode_of_every_env(script, coded_log):
    """Envs that finish early start again while the others run on; that does not count."""
    envs = script.make_envs("probe_envs:Coded-v0", 8)
    coded_log.clear()
    args = script.Args(**known(script, {"hidden_dim": 8, "num_candidates": 2, "flow_steps": 1}))
    agent = script.Agent(3, 2, args, torch.device("cpu"))
    returns, successes, cut = script.evaluate(script.MODES[script.DEPLOYED], agent, envs, args)
    expected = {}
    for obs, _, reward, _, _ in coded_log:
        expected.setdefault(obs[0], {}).setdefault(obs[1], []).append(reward)
    first = [sum(next(iter(episodes.values()))) for episodes in expected.values()]
    assert max(len(episodes) for episodes in expected.values()) > 1
    assert returns.tolist() == sorted(first) and np.isnan(successes).all() and not cut.any()


def test_evaluation_and_training_share_no_seed(script, run, monkeypatch):
    made, make_envs = [], script.make_envs
    monkeypatch.setattr(
        script, "make_envs", lambda *a, **k: made.append(make_envs(*a, **k)) or made[-1]
    )
    for seed in 0, 1, 2:
        run(env_id="Hopper-v4", eval_every=400, eval_episodes=2, seed=seed, total_timesteps=120)
    seeds = [set(envs.env.get_attr("first_seed")) for envs in made]
    assert len(seeds) == 6 and len(set.union(*seeds)) == 6
