"""Two doors, one hidden: what policies with one mode and with two can earn there."""

import math

import door_envs
import gymnasium as gym
import numpy as np
import pytest

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
