"""FPMD's two policies fitted to four points of the plane: what takes many steps, and what one."""

import pytest
import torch
from conftest import MODES, fit, rng, to_nearest_mode

import fpmd_meanflow_online as fpmd_m
import fpmd_online as fpmd_r


@pytest.fixture(scope="module")
def samples():
    """samples(script, T): 4,000 actions in T steps of a policy fitted to the points, from N(0, I).

    w = 1, and pairs of times as the script draws them by default.
    """
    policies = {}

    def draw(n):
        return MODES[torch.randint(4, (n,))], torch.ones(n)

    def sample(script, steps):
        if script not in policies:
            policies[script] = fit(script, draw, updates=2_000, lr=3e-3, hidden_dim=256)
        noise = torch.randn(4_000, 2, generator=rng())
        with torch.no_grad():
            return script.generate(policies[script], torch.zeros(4_000, 1), noise, steps)

    return sample


@pytest.mark.slow
def test_rectified_flow_needs_many_steps(samples):
    """FPMD-R: twenty Euler steps find all four points; one step collapses towards their mean.

    At t = 0 the velocity is E[a] - e whatever e, so that is theory: the mean is 0.71 from a point.
    """
    distance, shares = to_nearest_mode(samples(fpmd_r, 20))
    assert distance < 0.15 and shares.min() > 0.1
    collapsed = samples(fpmd_r, 1)
    assert to_nearest_mode(collapsed)[0] > 0.5 and collapsed.std(0).max() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 20])
def test_meanflow_needs_one_step(samples, steps):
    """FPMD-M: one step finds all four points, and so do twenty of a twentieth each."""
    distance, shares = to_nearest_mode(samples(fpmd_m, steps))
    assert distance < 0.25 and shares.min() > 0.1
