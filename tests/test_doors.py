"""Two doors, one hidden: what policies with one mode and with two can earn there."""

import math
from benchmark import soft_targets
from types import SimpleNamespace

import door_envs
import gymnasium as gym
import numpy as np
import pytest
import torch

EPISODES = 4_000


def mean_return(draw):
    """Of that many episodes, each try at draw()."""
    env = gym.make("door_envs:HiddenDoors-v0")
    total = 0.0
    for seed in range(EPISODES):
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(np.array([draw()], np.float32))
            over = terminated or truncated
            total += reward
    return total / EPISODES


@pytest.mark.parametrize("places, expected", [
    ([0.5], 1 / 2),  # the same door again and again
    ([-0.4, 0.6], 1 - 1 / 2**4),  # one of two, evenly
    ([-0.5, 0.5, 0.5, 0.5], 1 - (0.25**4 + 0.75**4) / 2),  # one of them more often
    ([0.0, -0.34, -0.66, 1.0], 0),  # walls
])  # fmt: skip
def test_success_is_that_of_independent_tries(places, expected):
    rng = np.random.default_rng(0)
    found = mean_return(lambda: rng.choice(places))
    assert abs(found - expected) < 4 * 0.5 / math.sqrt(EPISODES)


def hit(door, mean, std, squash):
    """Probability that squash(N(mean, std^2)) lies in a door, by the distribution function."""
    ends = door - door_envs.HALF_WIDTH, door + door_envs.HALF_WIDTH
    low, high = ((squash(end) - mean) / (std * math.sqrt(2)) for end in ends)
    return (math.erf(high) - math.erf(low)) / 2


@pytest.mark.parametrize("squash, expected", [(math.atanh, 0.534), (lambda x: x, 0.5)])
def test_no_gaussian_passes_both_doors_often(squash, expected):
    """Whatever its mean and std, squashed by tanh as SAC's or not: the docs' bound."""
    best = 0
    for mean in np.linspace(-1, 1, 81):
        for std in np.geomspace(0.05, 2, 81):
            rates = (hit(door, mean, std, squash) for door in door_envs.DOORS)
            best = max(best, sum(1 - (1 - rate) ** door_envs.TRIES for rate in rates) / 2)
    assert best == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [1, 2])
def test_soft_targets_divide_out_where_candidates_come_from(temperature):
    """Nine candidates in ten lie at one door; targets are of exp(Q / lambda) all the same."""
    agent = SimpleNamespace(q_std_within=torch.tensor(2.0))
    args = SimpleNamespace(weight_mode="particles", particle_temperature=temperature / 2)
    rng = torch.Generator().manual_seed(0)
    places = torch.where(torch.rand(100, 4_000, generator=rng) < 0.9, -0.5, 0.5)
    candidates = places[..., None] + 0.01 * torch.randn(100, 4_000, 1, generator=rng)
    for advantage in 0.0, 1.0:
        scores = advantage * (places > 0)
        actions, w = soft_targets.soft_targets(agent, candidates, scores, args, rng)
        expected = 1 / (1 + math.exp(-advantage / temperature))
        assert (actions > 0).float().mean().item() == pytest.approx(expected, abs=0.03)
        assert (w == 1).all()


def test_density_is_a_sum_of_gaussian_kernels():
    actions = torch.tensor([0.0, 0.1, 0.9]).view(3, 1, 1)
    at_zero = 1 + math.exp(-1 / 2) + math.exp(-81 / 2)
    density = soft_targets.log_density(actions).exp()
    assert density[0].item() == pytest.approx(at_zero, rel=1e-5)
    assert density.shape == (3, 1)


@pytest.fixture
def changed(monkeypatch):
    """FPMD-M as benchmark/soft_targets.py changes it, for one test."""
    for name in "ALGORITHM", "own_rules", "mirror_descent_targets":
        monkeypatch.setattr(soft_targets.fpmd, name, getattr(soft_targets.fpmd, name))
    soft_targets.change_the_script()
    return soft_targets.fpmd


def test_soft_targets_are_not_recorded_as_other_weights(capsys, changed):
    with pytest.raises(SystemExit):
        soft_targets.fpmd.main(soft_targets.fpmd.parse_args([]))
    assert "soft targets need --weight-mode particles" in capsys.readouterr().err


def test_soft_targets_train_as_a_script(tmp_path, changed, monkeypatch, capsys):
    """The command of docs/two_doors.md, for a few updates; the function is the one used."""
    flags = "--env-id door_envs:HiddenDoors-v0 --weight-mode particles --total-timesteps 40"
    flags += " --learning-starts 20 --batch-size 8 --num-candidates 4 --hidden-dim 8 --utd 1"
    flags += " --eval-every 0 --no-compile --exp-name fpmd_meanflow_online_soft"
    flags += f" --runs-dir {tmp_path}"
    calls = []

    def targets(agent, candidates, *rest):
        calls.append(candidates.shape)
        return soft_targets.soft_targets(agent, candidates, *rest)

    assert changed.mirror_descent_targets is soft_targets.soft_targets
    monkeypatch.setattr(changed, "mirror_descent_targets", targets)
    run_dir = changed.main(changed.parse_args(flags.split()))
    assert (run_dir / "policy.pt").exists()
    assert set(calls) == {(4, 8, 1)}
    # the script itself would go on with its own targets
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        changed.parse_args(["--resume", str(run_dir)])
    assert "it is of FPMD-M with soft targets, not FPMD-M" in capsys.readouterr().err
