"""Flow maths of FPMD-R, Euler sampling and the conditional flow matching loss; acting and the small
layers of FPMD's scripts. FPMD-M's own flow is in test_meanflow.py, MVP in test_mvp.py."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import (
    OneStep,
    act,
    flows_only,
    fpmd_only,
    known,
    numpy_mlp,
    numpy_time_embedding,
    randomise,
    rng,
    spy,
    stepped_only,
)
from torch import nn

import fpmd_online as fpmd

torch.set_num_threads(1)
f64 = torch.float64


class Field(nn.Module):
    """A velocity field given by a formula of (z, t) that remembers how it was called."""

    def __init__(self, velocity, act_dim=1):
        super().__init__()
        self.velocity, self.act_dim, self.calls = velocity, act_dim, []

    def forward(self, obs, z, t):
        self.calls.append((obs, z, t))
        return self.velocity(z, t)


def generate(velocity, noise, flow_steps):
    obs = torch.zeros(noise.shape[-2], 3)
    return fpmd.generate(Field(velocity, noise.shape[-1]), obs, noise, flow_steps)


def make_agent(script, obs_dim=3, act_dim=2, field=None, seed=0, **changes):
    """A small agent and its args; field, if any, takes the place of the policy that acts."""
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 16, "num_candidates": 4, "flow_steps": 3}
    args = script.Args(**known(script, sizes | changes))
    agent = script.Agent(obs_dim, act_dim, args, torch.device("cpu"))
    agent.acting_policy = field or agent.acting_policy
    return agent, args


def count_calls(module):
    """A list that grows by one with every forward pass of module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ---------------------------------------------------------------------------- generate


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_constant_field_is_exact_whatever_the_number_of_steps(steps):
    """The T steps of length 1/T add up to one unit of time."""
    noise = torch.randn(4, 2, dtype=f64, generator=rng())
    actions = generate(lambda z, t: torch.tensor([0.3, -2.0], dtype=f64), noise, steps)
    torch.testing.assert_close(actions, noise + torch.tensor([0.3, -2.0], dtype=f64))


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("c", [-0.8, 1.5])
def test_linear_field_gives_the_euler_product(steps, c):
    """v = c z + b: z_T = (1 + c/T)^T (z_0 + b/c) - b/c, for any leading shape."""
    noise, b = torch.randn(3, 4, 2, dtype=f64, generator=rng()), 0.7
    expected = (1 + c / steps) ** steps * (noise + b / c) - b / c
    torch.testing.assert_close(generate(lambda z, t: c * z + b, noise, steps), expected)


def test_linear_field_converges_to_the_exponential():
    """Euler is first order: the error to e^c z_0 halves when T doubles."""
    noise = torch.ones(1, 1, dtype=f64)
    errors = [abs(generate(lambda z, t: z, noise, 2**k).item() - math.e) for k in range(4, 11)]
    ratios = np.array(errors[1:]) / errors[:-1]
    assert errors[-1] < 2e-3  # e / 2T to leading order
    np.testing.assert_allclose(ratios, 0.5, atol=0.02)  # off by O(1/T), T >= 16


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_time_runs_over_left_end_points(steps):
    """Noise sits at t = 0: the field is asked at k/T, k = 0..T-1, so v = t adds (T-1) / 2T."""
    field, noise = Field(lambda z, t: t), torch.randn(4, 1, generator=rng())
    actions = fpmd.generate(field, torch.zeros(4, 3), noise, steps)
    times = torch.cat([t.reshape(-1)[:1] for _, _, t in field.calls])
    torch.testing.assert_close(times, torch.arange(steps) / steps)
    torch.testing.assert_close(actions, noise + (steps - 1) / (2 * steps))
    assert field.calls[0][1].equal(noise)


def gaussian_velocity(mean, std):
    """E[a - e | z_t = z] for a ~ N(mean, std^2), e ~ N(0, 1), z_t = (1 - t) e + t a."""

    def velocity(z, t):
        slope = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2)
        return mean + slope * (z - t * mean)

    return velocity


def test_gaussian_flow_converges_to_its_closed_form():
    """The marginal velocity of a Gaussian target carries z_0 to mean + std z_0, at first order."""
    noise, mean, std = torch.linspace(-3, 3, 13, dtype=f64)[:, None], 0.4, 0.3
    velocity, errors = gaussian_velocity(mean, std), []
    for steps in 100, 200, 400, 800:
        actions = generate(velocity, noise, steps)
        errors.append((actions - (mean + std * noise)).abs().max().item())
    assert errors[-1] < 1e-2  # one step is off by 0.9, see below
    np.testing.assert_allclose(np.array(errors[1:]) / errors[:-1], 0.5, atol=0.05)


def test_one_step_of_a_gaussian_flow_is_the_mean():
    """At t = 0 the velocity is E[a] - z: one Euler step forgets the noise."""
    noise = torch.linspace(-3, 3, 13, dtype=f64)[:, None]
    actions = generate(gaussian_velocity(0.4, 0.3), noise, 1)
    torch.testing.assert_close(actions, torch.full_like(noise, 0.4))


def test_velocity_field_broadcasts_over_candidates_and_times():
    """(N, B, act_dim) points with one time give row by row what (B, act_dim) with B times give."""
    torch.manual_seed(0)
    policy = fpmd.VelocityField(3, 2, hidden_dim=16)
    obs, z = torch.randn(6, 3), torch.randn(4, 6, 2)
    with torch.no_grad():
        together = policy(obs, z, torch.full((1,), 0.3))
        alone = torch.stack([policy(obs, row, torch.full((6, 1), 0.3)) for row in z])
        later = policy(obs, z, torch.full((1,), 0.8))
    torch.testing.assert_close(together, alone)
    assert (together - later).abs().max() > 1e-3  # the time is really used


# ---------------------------------------------------------------------------- policy_loss


def flow_batch(batch=64, obs_dim=3, act_dim=2, seed=0):
    """float64 arguments of policy_loss after the policy: obs, actions, w, noise, t."""
    draw = np.random.default_rng(seed)
    shapes = (batch, obs_dim), (batch, act_dim), (batch, act_dim)
    obs, actions, noise = (torch.tensor(draw.normal(size=shape)) for shape in shapes)
    w, t = torch.tensor(draw.uniform(0.1, 3, batch)), torch.tensor(draw.uniform(size=(batch, 1)))
    return obs, actions, w, noise, t


def test_policy_loss_against_numpy():
    """The field sees (s, (1 - t) e + t a, t) and its target is a - e; mean over batch and dims."""
    obs, actions, w, noise, t = flow_batch()
    field = Field(lambda z, t: torch.sin(3 * z) + t, act_dim=2)
    loss = fpmd.policy_loss(field, obs, actions, w, noise, t)
    a, e, times = actions.numpy(), noise.numpy(), t.numpy()
    z = (1 - times) * e + times * a
    errors = np.sin(3 * z) + times - (a - e)
    expected = (w.numpy()[:, None] * errors**2).sum() / errors.size
    seen_obs, seen_z, seen_t = field.calls[0]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert seen_obs.equal(obs) and seen_t.equal(t)
    np.testing.assert_allclose(seen_z.numpy(), z, rtol=1e-12, atol=1e-12)


def test_weights_weigh_samples():
    """w = (1, 0) drops the second sample: a weight is no factor of the whole loss."""
    obs, actions, _, noise, t = flow_batch(batch=2)
    field, weights = Field(lambda z, t: z), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    first, second, both = (
        fpmd.policy_loss(field, obs, actions, w.double(), noise, t).item() for w in weights
    )
    alone = fpmd.policy_loss(
        field, obs[:1], actions[:1], torch.ones(1, dtype=f64), noise[:1], t[:1]
    )
    assert first == pytest.approx(alone.item() / 2, rel=1e-12)
    assert first + second == pytest.approx(both, rel=1e-12)
    assert abs(first - both / 2) > 0.1 * both  # what mean(loss) * mean(w) would be


@pytest.mark.parametrize("time", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_marginal_velocity_minimises_the_loss(time):
    """On a Gaussian target the minimiser among linear fields is the exact marginal velocity.

    Gauss-Hermite nodes as batch and their weights as w make the expectation exact.
    """
    mean, std = 0.4, 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    e, x = (torch.tensor(grid).reshape(-1, 1) for grid in np.meshgrid(nodes, nodes))
    w = torch.tensor(np.outer(weights, weights)).reshape(-1)
    w = w / w.mean()
    a, t = mean + std * x, torch.full_like(x, time)
    exact = gaussian_velocity(mean, std)
    intercept = exact(torch.zeros(1, dtype=f64), time).item()
    slope = exact(torch.ones(1, dtype=f64), time).item() - intercept
    coefficients = torch.tensor([slope, intercept], dtype=f64, requires_grad=True)
    field = Field(lambda z, t: coefficients[0] * z + coefficients[1])
    loss = fpmd.policy_loss(field, torch.zeros(len(x), 1), a, w, e, t)
    (gradient,) = torch.autograd.grad(loss, coefficients)
    residual = std**2 / ((1 - time) ** 2 + (time * std) ** 2)  # Var[a - e | z_t]
    assert gradient.abs().max() < 1e-12
    assert loss.item() == pytest.approx(residual, rel=1e-12)


def test_policy_gradient_against_finite_differences():
    """The gradient of every weight, along random directions, agrees with central differences."""
    torch.manual_seed(0)
    policy = fpmd.VelocityField(3, 2, hidden_dim=8).double()
    arguments, parameters = flow_batch(), list(policy.parameters())
    gradients = torch.autograd.grad(fpmd.policy_loss(policy, *arguments), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, losses = torch.randn(parameter.shape, dtype=f64, generator=rng(1)), []
        with torch.no_grad():
            for step in 1e-5, -2e-5:  # forwards, then back past the start
                parameter += step * direction
                losses.append(fpmd.policy_loss(policy, *arguments).item())
            parameter += 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


def test_policy_loss_of_the_network_against_numpy():
    """The real network in float32, time embedding included, against float64."""
    policy, (obs, a, w, e, t) = fpmd.VelocityField(3, 2, hidden_dim=16), flow_batch()
    randomise(policy, 1)
    loss = fpmd.policy_loss(policy, *(x.float() for x in (obs, a, w, e, t)))
    obs, a, w, e, t = (x.numpy() for x in (obs, a, w, e, t))
    embedding = numpy_mlp(policy.time_mlp, numpy_time_embedding(t))
    v = numpy_mlp(policy.net, np.concatenate([obs, embedding, (1 - t) * e + t * a], -1))
    expected = np.mean(w[:, None] * (v - (a - e)) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_times_are_uniform(monkeypatch):
    """Every policy step draws t ~ U(0, 1), one per sample."""
    agent, args = make_agent(fpmd)
    calls, n = spy(monkeypatch, fpmd, "policy_loss"), 20_000
    fpmd.update_policy(agent, torch.zeros(n, 3), torch.zeros(n, 2), torch.ones(n), args, rng())
    (*_, times), _ = calls[0]
    t = times.squeeze(-1).sort().values
    distance = (t - torch.arange(n) / n).abs().max()
    # Kolmogorov: 95 % of draws are below 0.0096
    assert times.shape == (n, 1) and distance < 0.015


def test_one_step_is_one_evaluation_at_noise():
    """a = clip(z_0 + v(s, z_0, 0)): one call of the acting policy, no critic, inside the box."""
    agent, args = make_agent(fpmd, flow_steps=20)
    policy, obs, inputs = agent.acting_policy, torch.randn(500, 3), []
    with torch.no_grad():
        policy.net.rest[-1].weight *= 5  # many actions beyond the box
    policy.register_forward_pre_hook(lambda _, call: inputs.append(call))
    others = [count_calls(module) for module in (agent.policy, agent.critic, agent.target_critic)]
    actions = act(fpmd, agent, obs, args, rng(), "one_step")
    assert len(inputs) == 1 and others == [[], [], []]
    _, noise, t = inputs[0]
    assert noise.equal(args.prior_std * torch.randn((500, 2), generator=rng()))
    with torch.no_grad():
        unclipped = noise + policy(obs, noise, torch.zeros(1))
    assert t.abs().max() == 0 and actions.shape == (500, 2) and not actions.requires_grad
    assert unclipped.abs().max() > 1 and actions.abs().max() == 1
    torch.testing.assert_close(actions, unclipped.clamp(-1, 1))


# ---------------------------------------------------------------------------- acting


@stepped_only
def test_propose_counts_steps_and_noises_every_candidate(script):
    """N candidates by T evaluations each; exploration noise is independent per candidate."""
    args = script.Args(num_candidates=5, flow_steps=3, prior_std=0.2)  # all stay inside the box
    field, obs = OneStep(lambda z: 0.5 * z, script=script), torch.zeros(4_000, 3)
    quiet, loud = torch.tensor([0, 0.15])
    plain = script.propose(field, obs, quiet, args, rng())
    noise = script.propose(field, obs, loud, args, rng()) - plain
    assert plain.shape == (5, 4_000, 1) and len(field.calls) == 2 * 3
    assert noise.std().item() == pytest.approx(0.15, rel=0.03)  # 20,000 draws: 0.5 %
    correlations = torch.corrcoef(torch.cat([noise, plain]).squeeze(-1))
    assert (correlations - torch.eye(10)).abs().max() < 0.08  # five std of 4,000 draws


@flows_only
@pytest.mark.parametrize("mode", ["explore", "best_of_n", "one_step"])
@pytest.mark.parametrize("prior_std", [0.1, 0.25])
def test_prior_std_scales_the_noise(script, prior_std, mode):
    """Without velocity an action is its noise ~ N(0, prior_std^2)."""
    field = OneStep(lambda z: z, script=script)
    changes = {"prior_std": prior_std, "num_candidates": 1, "noise_scale": 0.0}
    agent, args = make_agent(script, act_dim=1, field=field, **changes)
    actions = act(script, agent, torch.zeros(20_000, 3), args, rng(), mode)
    assert actions.mean().item() == pytest.approx(0, abs=0.03 * prior_std)  # 0.7 % is one std
    assert actions.std().item() == pytest.approx(prior_std, rel=0.03)  # 0.5 % is one std


@fpmd_only
@pytest.mark.parametrize("mode", ["explore", "best_of_n"])
def test_acting_samples_the_moving_average_and_ranks_with_the_online_critic(script, mode):
    """T evaluations of acting_policy, one of critic, none of policy and target_critic."""
    agent, args = make_agent(script, flow_steps=7, prior_std=1.0)
    names = "acting_policy", "policy", "critic", "target_critic"
    calls = [count_calls(getattr(agent, name)) for name in names]
    actions = act(script, agent, torch.randn(100, 3), args, rng(), mode)
    assert [len(c) for c in calls] == [7, 0, 1, 0]
    assert actions.shape == (100, 2) and not actions.requires_grad
    assert actions.abs().max() == 1  # with N(0, 1) noise some action meets the box, none leaves it


@fpmd_only
@pytest.mark.parametrize("mode", ["explore", "best_of_n", "one_step"])
def test_acting_follows_the_weights_of_the_moving_average(script, mode):
    """New online weights change nothing, new acting weights change every action."""
    agent, args = make_agent(script)
    obs = torch.randn(50, 3)
    before = act(script, agent, obs, args, rng(), mode)
    agent.policy = make_agent(script, seed=1)[0].policy
    assert act(script, agent, obs, args, rng(), mode).equal(before)
    agent.acting_policy = copy.deepcopy(agent.policy)
    unchanged = act(script, agent, obs, args, rng(), mode).isclose(before).all(-1)
    assert unchanged.float().mean() < 0.2  # those in a corner of the box both times


@fpmd_only
def test_exploration_noise_is_alpha_times_noise_scale(script):
    """explore adds N(0, (alpha noise_scale)^2), the other modes add nothing."""
    field = OneStep(torch.zeros_like)
    changes = {"noise_scale": 0.02, "num_candidates": 1, "alpha_init": 4.0, "flow_steps": 1}
    agent, args = make_agent(script, act_dim=1, field=field, **changes)
    noisy, quiet = (
        act(script, agent, torch.zeros(20_000, 3), args, rng(), mode)
        for mode in ("explore", "best_of_n")
    )
    assert quiet.abs().max() < 1e-6
    assert noisy.std().item() == pytest.approx(4.0 * 0.02, rel=0.03)  # 0.5 % is one std


# ---------------------------------------------------------------------------- layers


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def mish(script, request, monkeypatch):
    """Mish by either of its formulas; the compiled one is run eagerly here."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)
    return script.FastMish()


@fpmd_only
def test_mish_and_its_gradient_match_torch(mish):
    """x tanh(softplus(x)) from deep negative to where it is x, in float64."""
    x = torch.linspace(-40, 60, 4_001, dtype=f64, requires_grad=True)
    ours, reference = mish(x), nn.functional.mish(x)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@fpmd_only
def test_mish_does_not_overflow_in_float32(mish):
    """Values and gradients stay finite where exp does not."""
    x = torch.tensor([-1e4, -90.0, 45.0, 90.0, 1e4], requires_grad=True)
    y = mish(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 45.0, 90.0, 1e4]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))


@fpmd_only
def test_time_embedding_against_numpy(script):
    """0.25 [sin(t f), cos(t f)] with f_j = 10000^(-j/8), of the raw flow time."""
    t = np.linspace(0, 1, 21)[:, None]
    ours = script.time_embedding(torch.tensor(t, dtype=torch.float32))
    np.testing.assert_allclose(ours.numpy(), numpy_time_embedding(t), rtol=0, atol=2e-7)  # float32


@fpmd_only
def test_initial_weights_are_cut_normal_with_fan_in(script):
    """Weights N(0, 1 / fan_in) cut at two std (so of std 0.88 / sqrt(fan_in)), biases zero."""
    torch.manual_seed(0)
    net = script.MLP((60, 40), 300, 7)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    shapes = [(m.in_features, m.out_features) for m in linears]
    assert shapes == [(60, 300), (40, 300), (300, 300), (300, 300), (300, 7)]
    # the parts of the first layer are one layer of 100 inputs, with one bias
    for linear, fan_in in zip(linears, [100, 100, 300, 300, 300], strict=True):
        scaled = linear.weight.detach() * fan_in**0.5
        assert scaled.abs().max() <= 2
        assert scaled.std().item() == pytest.approx(0.8796, rel=0.04)  # 2,100 draws: 1.3 %
    biases = [m.bias for m in linears if m.bias is not None]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)


@flows_only
def test_first_layer_is_a_linear_layer_on_concatenated_inputs(script):
    """By parts, so that states (B, ...) broadcast over candidates (N, B, ...)."""
    torch.manual_seed(0)
    first = script.FirstLayer(5, 3, 2, out_dim=8)
    randomise(first, 1)
    x, y, z = torch.randn(6, 5), torch.randn(1, 3), torch.randn(4, 6, 2)
    weight = torch.cat([part.weight for part in first.parts], 1)
    (bias,) = (part.bias for part in first.parts if part.bias is not None)
    whole = torch.cat([x.expand(4, 6, 5), y.expand(4, 6, 3), z], -1)
    torch.testing.assert_close(first(x, y, z), nn.functional.linear(whole, weight, bias))
