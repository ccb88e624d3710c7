"""Flow maths of FPMD-M: jumps by an average velocity, the MeanFlow identity, pairs of times.

Data sit at time 0 and noise at time 1: z_t = (1 - t) a + t e, v = e - a, r <= t.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import (
    TRACED,
    act,
    distance,
    numpy_mlp,
    numpy_time_embedding,
    randomise,
    rng,
    spy,
)
from torch import nn

import fpmd_meanflow_online as fpmd

f64 = torch.float64


class Field(nn.Module):
    """An average velocity given by a formula of (z, r, t) that remembers how it was called."""

    def __init__(self, velocity, act_dim=1):
        super().__init__()
        self.velocity, self.act_dim, self.calls = velocity, act_dim, []

    def forward(self, obs, z, r, t):
        self.calls.append((obs, z, r, t))
        return self.velocity(z, r, t)


def generate(velocity, noise, flow_steps):
    obs = torch.zeros(noise.shape[-2], 3)
    return fpmd.generate(Field(velocity, noise.shape[-1]), obs, noise, flow_steps)


def make_network(seed=1, hidden_dim=16):
    """The script's own network for 3 observations and 2 actions, every weight of some size."""
    policy = fpmd.AverageVelocityField(3, 2, hidden_dim)
    randomise(policy, seed)
    return policy


def make_agent(**changes):
    torch.manual_seed(0)
    args = fpmd.Args(**{"hidden_dim": 16} | changes)
    return fpmd.Agent(3, 2, args, torch.device("cpu")), args


def gaussian_flow(mean, std):
    """Average velocity of the flow between N(mean, std^2) at time 0 and N(0, 1) at time 1.

    z_t is N((1 - t) mean, s_t^2) with s_t^2 = (1 - t)^2 std^2 + t^2, so the flow carries z from t
    to z_r = (1 - r) mean + s_r / s_t (z - (1 - t) mean); t - r cancels in u = (z - z_r) / (t - r).
    """

    def width(t):
        return ((1 - t) ** 2 * std**2 + t**2) ** 0.5

    def velocity(z, r, t):
        slope = (t + r - std**2 * (2 - t - r)) / (width(t) * (width(t) + width(r)))
        return slope * (z - (1 - t) * mean) - mean

    return velocity


# ---------------------------------------------------------------------------- generate


NOISE = torch.linspace(-3, 3, 14, dtype=f64)[:, None]


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_any_number_of_jumps_lands_on_the_data(steps, std):
    """On an exact average velocity one jump carries noise e to mean + std e, and so do T."""
    actions = generate(gaussian_flow(0.4, std), NOISE, steps)
    # to 1e-6, since the script's times are float32
    torch.testing.assert_close(actions, 0.4 + std * NOISE, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_wrong_jumps_miss_the_data(steps):
    """The test above can tell: the release's T > 1 and other slips land elsewhere."""
    velocity, right = gaussian_flow(0.4, 0.3), 0.4 + 0.3 * NOISE
    pairs = list(pairwise(k / steps for k in range(steps + 1)))[::-1]  # (r, t)

    def jumps(times, length):
        z = NOISE
        for r, t in times:
            z = z - length * velocity(z, r, t)
        return z

    wrong = {
        "added": jumps(pairs, -1 / steps),
        "r and t swapped": jumps([(t, r) for r, t in pairs], 1 / steps),
        "no 1 / T": jumps(pairs, 1),
        "time reversed": jumps(pairs[::-1], 1 / steps),
    }
    torch.testing.assert_close(jumps(pairs, 1 / steps), right)
    for name, actions in wrong.items():
        assert (actions - right).abs().max() > 0.01, name


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_time_runs_from_noise_to_data(steps):
    """The jumps are (r, t) = ((k - 1) / T, k / T) for k = T..1, each by u / T from where it is."""
    field, noise = Field(lambda z, r, t: z + 2 * r + t), torch.randn(3, 4, 1, generator=rng())
    actions = fpmd.generate(field, torch.zeros(4, 3), noise, steps)
    called = [(r.item(), t.item()) for _, _, r, t in field.calls]
    expected = [((k - 1) / steps, k / steps) for k in range(steps, 0, -1)]
    np.testing.assert_allclose(called, expected, atol=1e-7)
    assert field.calls[0][1].equal(noise)
    for r, t in expected:
        noise = noise - (noise + 2 * r + t) / steps
    torch.testing.assert_close(actions, noise)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_constant_field_is_exact_whatever_the_number_of_jumps(steps):
    """The T jumps of length 1 / T add up to one unit of time, subtracted."""
    noise, u = torch.randn(4, 2, dtype=f64, generator=rng()), torch.tensor([0.3, -2.0], dtype=f64)
    torch.testing.assert_close(generate(lambda z, r, t: u, noise, steps), noise - u)


def test_one_step_is_one_evaluation_between_noise_and_data():
    """a = clip(z - u(s, z, 0, 1)), z = prior_std e: one call of the acting policy, no critic."""
    agent, args = make_agent(flow_steps=20, prior_std=0.7)
    policy, obs, inputs, others = agent.acting_policy, torch.randn(500, 3), [], []
    with torch.no_grad():
        policy.net.rest[-1].weight *= 5  # many actions beyond the box
    policy.register_forward_pre_hook(lambda _, call: inputs.append(call))
    for module in agent.policy, agent.critic, agent.target_critic:
        module.register_forward_hook(lambda *_: others.append(1))
    actions = act(fpmd, agent, obs, args, rng(), "one_step")
    assert len(inputs) == 1 and others == []
    seen_obs, z, r, t = inputs[0]
    assert seen_obs.equal(obs) and z.equal(0.7 * torch.randn((500, 2), generator=rng()))
    assert r.eq(0).all() and t.eq(1).all()
    with torch.no_grad():
        unclipped = z - policy(obs, z, torch.zeros(1), torch.ones(1))
    assert actions.shape == (500, 2) and not actions.requires_grad
    assert unclipped.abs().max() > 1 and actions.abs().max() == 1
    torch.testing.assert_close(actions, unclipped.clamp(-1, 1))


def test_one_jump_and_no_instant_pairs_are_the_published_defaults():
    args = fpmd.Args()
    assert args.flow_steps == 1 and args.p_instant == 0 and args.prior_std == 0.5


# ---------------------------------------------------------------------------- the network


def test_network_broadcasts_over_candidates_and_times():
    """(N, B, act_dim) points with one (r, t) give row by row what B pairs of times give."""
    policy, obs, z = make_network(), torch.randn(6, 3), torch.randn(4, 6, 2)
    one, rows = (torch.full(shape, 1.0) for shape in ((1,), (6, 1)))
    with torch.no_grad():
        together = policy(obs, z, 0.3 * one, 0.8 * one)
        alone = torch.stack([policy(obs, row, 0.3 * rows, 0.8 * rows) for row in z])
    torch.testing.assert_close(together, alone)


def test_every_input_matters_and_times_are_told_apart():
    """Another s, r or t is another velocity, and so is (t, r) for (r, t)."""
    policy, obs, z = make_network(), torch.randn(6, 3), torch.randn(6, 2)
    r, t = torch.full((6, 1), 0.3), torch.full((6, 1), 0.8)
    with torch.no_grad():
        u = policy(obs, z, r, t)
        others = {
            "obs": policy(obs + 1, z, r, t),
            "z": policy(obs, z + 1, r, t),
            "r": policy(obs, z, r - 0.3, t),
            "t": policy(obs, z, r, t + 0.2),
            "swapped": policy(obs, z, t, r),
        }
    for name, other in others.items():
        assert (other - u).abs().amax(1).min() > 1e-3, name


# ---------------------------------------------------------------------------- policy_loss


def flow_batch(batch=64, seed=0):
    """float64 arguments of policy_loss after the policy: obs, actions, w, noise, r, t."""
    draw = np.random.default_rng(seed)
    obs, actions, noise = (torch.tensor(draw.normal(size=(batch, n))) for n in (3, 2, 2))
    r, t = torch.tensor(np.sort(draw.uniform(size=(2, batch, 1)), 0))
    return obs, actions, torch.tensor(draw.uniform(0.1, 3, batch)), noise, r, t


def meanflow_loss(policy, obs, actions, w, noise, r, t, h=1e-4):
    """The loss with du/dt by central differences along (z + h v, r, t + h)."""
    z, v = (1 - t) * actions + t * noise, noise - actions
    with torch.no_grad():
        ahead, behind = (policy(obs, z + s * v, r, t + s) for s in (h, -h))
        target = v - (t - r) * (ahead - behind) / (2 * h)
    return (w[:, None] * (policy(obs, z, r, t) - target) ** 2).sum() / z.numel()


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradient_against_finite_differences(compiled):
    """Value, and gradient of every weight with the target held constant; float64."""
    torch._dynamo.reset()
    policy, arguments = make_network().double(), flow_batch()
    parameters, losses = list(policy.parameters()), []
    function = fpmd.policy_loss
    if compiled:
        function = torch.compile(function, fullgraph=True, backend=TRACED)
    for loss_of in function, meanflow_loss:
        loss = loss_of(policy, *arguments)
        losses.append((loss, *torch.autograd.grad(loss, parameters)))
    for ours, expected in zip(*losses, strict=True):
        error = (ours - expected).abs().max() / expected.abs().max()
        assert error < 1e-6
    assert losses[0][0].dtype == f64


def test_loss_of_the_network_against_numpy():
    """The real network in float32, both time embeddings included, against float64."""
    policy, arguments = make_network(), flow_batch()
    loss = fpmd.policy_loss(policy, *(x.float() for x in arguments))
    obs, a, w, e, r, t = (x.numpy() for x in arguments)

    def u(step):
        z = (1 - t) * a + t * e + step * (e - a)
        times = zip((policy.r_mlp, policy.t_mlp), (r, t + step), strict=True)
        embeddings = [numpy_mlp(net, numpy_time_embedding(time)) for net, time in times]
        return numpy_mlp(policy.net, np.concatenate([obs, *embeddings, z], -1))

    target = e - a - (t - r) * (u(1e-5) - u(-1e-5)) / 2e-5
    expected = np.mean(w[:, None] * (u(0) - target) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_loss_vanishes_on_a_point(dtype):
    """All data at one point a: u = (z - a) / t meets its target exactly, sample by sample."""
    _, actions, w, noise, r, t = (x.to(dtype) for x in flow_batch())
    actions = actions[:1].expand_as(actions)
    field = Field(lambda z, r, t: (z - actions) / t, act_dim=2)
    loss = fpmd.policy_loss(field, torch.zeros(64, 3), actions, w, noise, r, t)
    assert loss.item() < (1e-20 if dtype == f64 else 1e-6)


@pytest.mark.parametrize("r, t", [(0, 1), (0, 0.6), (0.2, 0.7), (0.5, 0.5), (0.4, 1), (0.99, 1)])
def test_average_velocity_of_a_gaussian_satisfies_the_identity(r, t):
    """There the residual is zero in the mean, whatever z_t, so that no gradient is left.

    Gauss-Hermite nodes as batch and their weights as w make the expectation exact. The variance of
    the residual, which is the loss, is (s_r / s_t)^2 Var[v | z_t] = (s_r / s_t)^2 std^2 / s_t^2.
    """
    mean, std = 0.4, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    e, x = (torch.tensor(grid).reshape(-1, 1) for grid in np.meshgrid(nodes, nodes))
    w = torch.tensor(np.outer(weights, weights)).reshape(-1)
    exact, basis = gaussian_flow(mean, std), torch.zeros(3, dtype=f64, requires_grad=True)

    def velocity(z, r, t):
        return exact(z, r, t) + basis[0] + basis[1] * z + basis[2] * z**2

    times = torch.full_like(x, r), torch.full_like(x, t)
    arguments = torch.zeros(len(x), 1), mean + std * x, w / w.mean(), e, *times
    loss = fpmd.policy_loss(Field(velocity), *arguments)
    (gradient,) = torch.autograd.grad(loss, basis)
    variances = [(1 - time) ** 2 * std**2 + time**2 for time in (r, t)]
    assert gradient.abs().max() < 1e-12
    assert loss.item() == pytest.approx(variances[0] * std**2 / variances[1] ** 2, rel=1e-9)


def test_weights_weigh_samples():
    """w = (1, 0) drops the second sample: a weight is no factor of the whole loss."""
    policy, (obs, actions, _, noise, r, t) = make_network().double(), flow_batch(batch=2)
    actions = actions * torch.tensor([[1.0], [9.0]])  # two samples whose losses differ
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=f64)
    first, second, both = (
        fpmd.policy_loss(policy, obs, actions, w, noise, r, t).item() for w in weights
    )
    rows = (x[:1] for x in (obs, actions, weights[2], noise, r, t))
    assert first == pytest.approx(fpmd.policy_loss(policy, *rows).item() / 2, rel=1e-9)
    assert first + second == pytest.approx(both, rel=1e-9)
    assert abs(first - both / 2) > 0.1 * both  # what mean(loss) * mean(w) would be


# ---------------------------------------------------------------------------- pairs of times


def drawn_times(monkeypatch, p_instant, n=40_000):
    """r and t (n,) of one policy step, caught where the loss gets them."""
    agent, args = make_agent(p_instant=p_instant)
    calls = spy(monkeypatch, fpmd, "policy_loss")
    fpmd.update_policy(agent, torch.zeros(n, 3), torch.zeros(n, 2), torch.ones(n), args, rng())
    (*_, r, t), _ = calls[0]
    assert r.shape == t.shape == (n, 1)
    r, t = (x.squeeze(-1).double() for x in (r, t))
    assert (r >= 0).all() and (r <= t).all() and (t <= 1).all()
    return r, t


def assert_sorted_uniforms(r, t):
    """P(r > x) = (1 - x)^2, P(t < x) = x^2, P(t - r > x) = (1 - x)^2; means 1/3 and 2/3."""
    for values, cdf in (r, lambda x: 1 - (1 - x) ** 2), (t, torch.square):
        assert distance(values, cdf) < 2 / len(r) ** 0.5
    assert distance(t - r, lambda x: 1 - (1 - x) ** 2) < 2 / len(r) ** 0.5
    assert r.mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.01)


def test_times_are_two_sorted_uniforms(monkeypatch):
    """By default r < t everywhere, and pairs come close to (0, 1), where one-step samples ask."""
    r, t = drawn_times(monkeypatch, 0.0)
    assert (r < t).all() and (t - r).max() > 0.98
    assert_sorted_uniforms(r, t)


def test_all_pairs_instant(monkeypatch):
    """p_instant = 1 is flow matching: r = t, uniform."""
    r, t = drawn_times(monkeypatch, 1.0)
    assert r.equal(t) and distance(t, lambda x: x) < 2 / len(t) ** 0.5


def test_a_quarter_of_the_pairs_instant(monkeypatch):
    """p_instant = 0.25: a random quarter has r = t, uniform, the rest two sorted uniforms."""
    r, t = drawn_times(monkeypatch, 0.25)
    instant = r == t
    assert instant.double().mean().item() == pytest.approx(0.25, abs=0.01)  # 0.2 % is one std
    assert distance(t[instant], lambda x: x) < 2 / instant.sum() ** 0.5
    assert_sorted_uniforms(r[~instant], t[~instant])
