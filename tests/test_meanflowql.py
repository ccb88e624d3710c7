"""MeanFlowQL: the reformulated MeanFlow loss, the value loss and its box, candidates ranked by the
target critics, the learning rate, observation statistics, both phases and resuming.

Data are at time 0 and noise is at time 1: z_t = (1 - t) a + t e, v = e - a, g = z - u.
"""

import copy
import inspect
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import (
    COMPILER,
    FILES,
    MODES,
    ROOT,
    TRACED,
    act,
    count,
    distance,
    equal,
    first_weight,
    load,
    numpy_mlp,
    one_update,
    randomise,
    rng,
    spy,
    to_nearest_mode,
    values,
)
from test_contract import python
from test_mvp import make_batch
from test_offline_to_online import COUNTED, datasets, made_up_dataset  # noqa: F401  a fixture
from test_offline_to_online import SETTINGS as BOTH
from test_resume import differences, rows
from torch import nn

import meanflowql_offline_to_online as script

f64 = torch.float64
CPU = torch.device("cpu")
SETTINGS = {key: value for key, value in BOTH.items() if key != "chunk_size"}
PLAIN = {"adaptive_power": 0.0, "target_clip": 1e9}  # squares, as the identity is written


class Field(nn.Module):
    """A policy given by a formula of (z, t) that remembers how it was called."""

    def __init__(self, g, act_dim=1):
        super().__init__()
        self.g, self.act_dim, self.calls = g, act_dim, []

    def forward(self, obs, z, t):
        self.calls.append((obs, z, t))
        return self.g(z, t)


class Value(nn.Module):
    """Twin critics given by a formula of the actions (..., act_dim) -> (...), less or more by 1."""

    def __init__(self, q):
        super().__init__()
        self.q, self.calls = q, []

    def forward(self, obs, actions):
        self.calls.append(actions)
        return torch.stack([self.q(actions) - 1, self.q(actions) + 1])


def make_agent(act_dim=2, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 16, "hidden_layers": 2, "num_candidates": 4}
    args = script.Args(**(sizes | changes))
    return script.Agent(3, act_dim, args, CPU), args


def make_policy(seed=1):
    """The script's own network for 3 observations and 2 actions, every weight of some size."""
    policy = script.ResidualPolicy(3, 2, 16, 2)
    randomise(policy, seed)
    return policy


def flow_batch(batch=64, seed=0):
    """float64 arguments of policy_loss after the policy: obs, actions, noise, t."""
    draw = np.random.default_rng(seed)
    obs, actions, noise = (torch.tensor(draw.normal(size=(batch, n))) for n in (3, 2, 2))
    return obs, actions, noise, torch.tensor(draw.uniform(size=(batch, 1)))


# ---------------------------------------------------------------------------- networks


def test_parameter_counts_on_ant():
    """27 observations and 8 actions of Ant-v4, four hidden layers of 512; statistics beside."""
    agent = script.Agent(27, 8, script.Args(), CPU)
    assert count(agent.policy) == 811_016
    assert count(agent.critic.q1) == count(agent.critic.q2) == 811_009
    assert agent.acting_policy is agent.policy
    trained = {id(p) for p in agent.parameters() if p.requires_grad}
    optimized = [p for o in agent.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == trained
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
    assert all(equal(values(agent.critic), values(agent.target_critic)))


def test_every_input_matters():
    policy, obs, z = make_policy(), torch.randn(6, 3), torch.randn(6, 2)
    t = torch.full((6, 1), 0.3)
    with torch.no_grad():
        g = policy(obs, z, t)
        for other in policy(obs + 1, z, t), policy(obs, z + 1, t), policy(obs, z, t + 0.2):
            assert (other - g).abs().amax(1).min() > 1e-3


def test_network_broadcasts_over_candidates():
    policy, obs, z = make_policy(), torch.randn(6, 3), torch.randn(4, 6, 2)
    with torch.no_grad():
        together = policy(obs, z, torch.ones(1))
        alone = torch.stack([policy(obs, row, torch.ones(6, 1)) for row in z])
    torch.testing.assert_close(together, alone)


def test_an_untrained_policy_acts_zero():
    """The last layer starts at zero: inside the bounds whatever the noise, in every mode."""
    agent, args = make_agent(hidden_dim=32)
    assert first_weight(agent.policy.net).any()  # the others do not
    for mode in "one_step", "best_of_n", "explore":
        actions = act(script, agent, torch.randn(50, 3), args, rng(), mode)
        assert actions.shape == (50, 2) and not actions.any()


def test_statistics_are_the_data_alone():
    """In all three networks, in float64 from the data; what is constant is left alone."""
    agent, _ = make_agent()
    obs = np.float32(np.random.default_rng(0).normal(1000, 0.1, (5000, 3)))
    obs[:, 1] = 7
    script.fit_statistics(agent, obs)
    for network in agent.policy, agent.critic, agent.target_critic:
        mean, std = network.normalise.mean.numpy(), network.normalise.std.numpy()
        assert np.allclose(mean, obs.mean(0, dtype=np.float64), rtol=1e-7) and std[1] == 1
        assert np.allclose(std[[0, 2]], obs.std(0, dtype=np.float64)[[0, 2]], rtol=1e-6)
    inputs = []
    agent.policy.net.register_forward_pre_hook(lambda _, call: inputs.append(call[0]))
    agent.policy(torch.from_numpy(obs), torch.zeros(5000, 2), torch.ones(1))
    assert (
        inputs[0].mean(0).abs().max() < 0.01 and (inputs[0].std(0)[[0, 2]] - 1).abs().max() < 0.01
    )


def test_networks_see_normalised_observations():
    """Other units of the observations give the same actions and values."""
    agent, args = make_agent()
    randomise(agent.policy, 1)
    other, obs = copy.deepcopy(agent), np.random.default_rng(0).normal(size=(200, 3))
    scale, shift = np.array([2.0, 300.0, 0.1]), np.array([5.0, -1.0, 0.0])
    script.fit_statistics(agent, obs)
    script.fit_statistics(other, scale * obs + shift)
    results = []
    for who, seen in (agent, obs), (other, scale * obs + shift):
        seen = torch.tensor(seen, dtype=torch.float32)
        actions = act(script, who, seen, args, rng(), "best_of_n")
        results.append((actions, who.critic(seen, actions), who.target_critic(seen, actions)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------- policy_loss


def reference_loss(policy, obs, a, e, t, args, h=1e-4):
    """D per row from 2(1-t) a + (2t-1) e - t dg/dt, dg/dt by central differences along the path."""
    z, v = (1 - t) * a + t * e, e - a
    with torch.no_grad():
        slope = (policy(obs, z + h * v, t + h) - policy(obs, z - h * v, t - h)) / (2 * h)
        target = 2 * (1 - t) * a + (2 * t - 1) * e - t * slope
        target = target.clamp(-args.target_clip, args.target_clip)
    error = (policy(obs, z, t) - target).square().sum(1) / a.shape[1]
    weight = (error.detach() + 1e-4) ** -args.adaptive_power
    return (weight * error).sum() / len(a), error.mean()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("changes", [PLAIN, {}, {"target_clip": 0.7, "adaptive_power": 1.0}])
def test_loss_and_gradient_against_finite_differences(compiled, changes):
    """Value, and gradient of every weight with target and weight held constant; float64."""
    torch._dynamo.reset()
    policy, arguments, args = make_policy().double(), flow_batch(), script.Args(**changes)
    function = script.policy_loss
    if compiled:
        function = torch.compile(function, fullgraph=True, backend=TRACED, dynamic=False)
    found = []
    for losses in function(policy, *arguments, args), reference_loss(policy, *arguments, args):
        gradients = torch.autograd.grad(losses[0], list(policy.parameters()))
        found.append((*losses, *gradients))
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() / y.abs().max() < 1e-6
    assert not function(policy, *arguments, args)[1].requires_grad


def test_loss_of_the_network_against_numpy():
    """The real network in float32 against float64, with the published clip and weight."""
    policy, arguments, args = make_policy(), flow_batch(), script.Args()
    loss, error = script.policy_loss(policy, *(x.float() for x in arguments), args)
    obs, a, e, t = (x.numpy() for x in arguments)

    def g(step):
        z = (1 - t) * a + t * e + step * (e - a)
        return numpy_mlp(policy.net, np.concatenate([obs, t + step, z], -1))

    target = 2 * (1 - t) * a + (2 * t - 1) * e - t * (g(1e-5) - g(-1e-5)) / 2e-5
    d = np.mean((g(0) - target.clip(-5, 5)) ** 2, 1)
    assert np.abs(target).max() > 5  # the clip acts on this batch
    assert loss.item() == pytest.approx(np.mean(d * (d + 1e-4) ** -0.2), rel=1e-4)
    assert error.item() == pytest.approx(np.mean(d), rel=1e-4)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.7, 1.0])
def test_gaussian_data_have_a_known_fixed_point(t):
    """g* = z - u of the flow between N(m, s^2) at time 0 and noise: no gradient is left.

    The flow carries z from t to 0 by Phi = m + s / sqrt((1 - t)^2 s^2 + t^2) (z - (1 - t) m), and
    u = (z - Phi) / t. Four points (+-1, +-1) have the moments of two Gaussians that the
    expectations need, up to the third. Other signs and factors in the target leave a gradient.
    """
    mean, std = 0.4, 0.3
    e, x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=f64)] * 2).T[..., None]
    basis, times = torch.zeros(3, dtype=f64, requires_grad=True), torch.full_like(e, t)

    def exact(z, t):
        width = ((1 - t) ** 2 * std**2 + t**2).sqrt()
        phi = mean + std / width * (z - (1 - t) * mean)
        return z - (z - phi) / t

    def policy(z, t):
        return exact(z, t) + basis[0] + basis[1] * z + basis[2] * z**2

    args, obs = script.Args(**PLAIN), torch.zeros(4, 1)
    actions = mean + std * x
    loss, _ = script.policy_loss(Field(policy), obs, actions, e, times, args)
    (gradient,) = torch.autograd.grad(loss, basis)
    assert gradient.abs().max() < 1e-12
    # one step from noise is the law of the data, whatever t was trained
    jump = script.generate(
        Field(exact), torch.zeros(9, 1), torch.linspace(-3, 3, 9, dtype=f64)[:, None]
    )
    torch.testing.assert_close(jump, mean + std * torch.linspace(-3, 3, 9, dtype=f64)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_loss_vanishes_on_a_point(dtype):
    """All actions at one point a: u = (z - a) / t, sample by sample."""
    _, actions, noise, t = (x.to(dtype) for x in flow_batch())
    actions, t = actions[:1].expand_as(actions), t.clamp(min=0.2)
    field = Field(lambda z, t: z - (z - actions) / t, 2)
    loss, _ = script.policy_loss(field, None, actions, noise, t, script.Args(**PLAIN))
    assert loss.item() < (1e-20 if dtype == f64 else 1e-5)


def test_weights_count_each_sample_by_its_own_error():
    """w = (D + c)^-power per sample: mean of w D, not mean of w times mean of D."""
    _, actions, noise, t = flow_batch()
    noise = noise * torch.linspace(0.01, 3, 64, dtype=f64)[:, None]  # errors of every size
    arguments = Field(lambda z, t: 0 * z, 2), None, actions, noise, t
    losses = {}
    for power in 0.0, 0.2, 1.0:
        args = script.Args(adaptive_power=power, target_clip=1e9)
        losses[power], error = script.policy_loss(*arguments, args)
    d = (2 * (1 - t) * actions + (2 * t - 1) * noise).square().mean(1)
    assert losses[0.0].item() == pytest.approx(error.item()) == pytest.approx(d.mean().item())
    for power in 0.2, 1.0:
        assert losses[power].item() == pytest.approx((d / (d + 1e-4) ** power).mean().item())
    together = (d.mean() * ((d + 1e-4) ** -0.2).mean()).item()
    assert abs(losses[0.2].item() / together - 1) > 0.02


def caught_losses(monkeypatch, name="policy_loss"):
    """The arguments with which an update calls one of the losses."""
    caught, loss = [], getattr(script, name)

    def catch(*arguments):
        caught.append(arguments)
        return loss(*arguments)

    monkeypatch.setattr(script, name, catch)
    return caught


@pytest.mark.parametrize("steps", [0, 1, 50, 10_000])
def test_times_are_uniform_or_on_a_grid(monkeypatch, steps):
    """On (0, 1), or on 1/T, ..., 1: at t = 1, where the policy acts, for any T."""
    n = 40_000
    agent, args = make_agent(time_steps=steps, num_candidates=1)
    caught = caught_losses(monkeypatch)
    one_update(script, agent, make_batch(n=n), args, rng())
    ((*_, noise, t, _),) = caught
    t = t.squeeze(1).double()
    assert t.min() > 0 and t.max() <= 1
    assert (
        torch.corrcoef(torch.cat([noise.T, t.float()[None]])).fill_diagonal_(0).abs().max() < 0.02
        or steps == 1
    )
    if steps == 0 or steps == 10_000:
        assert distance(t, lambda x: x) < 2 / n**0.5
    else:
        numbers = (t * steps).round().long()
        assert (t - numbers / steps).abs().max() < 1e-6
        counts = torch.bincount(numbers, minlength=steps + 1)
        assert counts[0] == 0 and (counts[1:] - n / steps).abs().max() < 5 * (n / steps) ** 0.5


# ---------------------------------------------------------------------------- value_loss


def test_value_gradient_climbs_within_the_box_and_the_bound_leads_back():
    """Inside: -dQ/da over the batch. Outside: nothing of Q, the sign of the way back alone."""
    points = torch.tensor([[-0.5], [0.2], [0.9], [1.5], [-3.0]], dtype=f64)
    slope = torch.tensor([2.0], dtype=f64)
    shift = torch.zeros(5, 1, dtype=f64, requires_grad=True)
    critic = Value(lambda a: slope * a.squeeze(-1))
    policy = Field(lambda z, t: points + shift)
    args = script.Args()
    loss, bound, actions = script.value_loss(policy, critic, torch.zeros(5, 1), points, args)
    clipped = torch.tensor([-0.5, 0.2, 0.9, 1.0, -1.0], dtype=f64)
    assert loss.item() == pytest.approx(-2 * clipped.mean().item())
    assert critic.calls[0].squeeze(-1).equal(clipped)  # clipped before Q, not after
    assert bound.item() == pytest.approx((0.5 + 2.0) / 5) and actions.equal(points)
    (of_q,) = torch.autograd.grad(loss, shift, retain_graph=True)
    (of_bound,) = torch.autograd.grad(bound, shift)
    assert of_q.squeeze(1).tolist() == pytest.approx([-0.4, -0.4, -0.4, 0, 0])
    assert of_bound.squeeze(1).tolist() == pytest.approx([0, 0, 0, 0.2, -0.2])
    assert not actions.requires_grad
    ((_, z, t),) = policy.calls
    assert z.equal(points) and t.tolist() == [1]  # where it acts


@pytest.mark.parametrize("scale", [1e-3, 1.0, 500.0])
def test_normalized_value_loss_does_not_know_the_rewards_scale(scale):
    """Divided by mean |Q|, a constant: the same loss and gradient for every scale of Q."""
    z = torch.randn(40, 2, generator=rng(), dtype=f64)
    results = []
    for factor in 1.0, scale:
        weight = torch.ones(2, dtype=f64, requires_grad=True)
        critic = Value(lambda a, factor=factor: factor * (a.sum(-1) - 3))
        policy = Field(lambda z, t, weight=weight: 0.3 * z * weight)
        args = script.Args(normalize_q=True)
        loss, *_ = script.value_loss(policy, critic, torch.zeros(40, 1), z, args)
        plain, *_ = script.value_loss(policy, critic, torch.zeros(40, 1), z, script.Args())
        gradients = [torch.autograd.grad(x, weight)[0] for x in (loss, plain)]
        q = factor * ((0.3 * z).clamp(-1, 1).sum(-1) - 3)
        torch.testing.assert_close(loss, plain / q.abs().mean())
        torch.testing.assert_close(gradients[0], gradients[1] / q.abs().mean())
        results.append((loss, gradients[0]))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------- acting


def test_one_step_is_one_evaluation_at_time_one():
    """a = clip(g(s, z, 1)), z = prior_std e; no critic is asked."""
    agent, args = make_agent(prior_std=0.7)
    randomise(agent.policy, 1)
    policy, obs, inputs, others = agent.policy, torch.randn(500, 3), [], []
    policy.register_forward_pre_hook(lambda _, call: inputs.append(call))
    for module in agent.critic, agent.target_critic:
        module.register_forward_hook(lambda *_: others.append(1))
    actions = act(script, agent, obs, args, rng(), "one_step")
    ((seen, z, t),) = inputs
    assert others == [] and seen.equal(obs) and t.tolist() == [1]
    assert z.equal(0.7 * torch.randn((500, 2), generator=rng()))
    with torch.no_grad():
        unclipped = policy(obs, z, t)
    assert unclipped.abs().max() > 1 and actions.equal(unclipped.clamp(-1, 1))
    assert not actions.requires_grad


def test_the_target_critics_rank_clipped_candidates(monkeypatch):
    """By the mean of the two, in an update and while acting; the online critics have no say."""
    agent, args = make_agent(prior_std=2.0, num_candidates=8)
    for seed, network in enumerate([agent.policy, agent.critic, agent.target_critic]):
        randomise(network, seed)
    slow, selections = copy.deepcopy(agent.target_critic), spy(monkeypatch, script, "select_action")
    losses = spy(monkeypatch, script, "critic_loss")
    done = [
        act(script, agent, torch.randn(50, 3), args, rng(), m) for m in ("explore", "best_of_n")
    ]
    one_update(script, agent, make_batch(), args, rng())
    for (_, obs, candidates), (actions, scores) in selections:
        assert len(candidates) == 8 and (candidates.abs() == 1).float().mean() > 0.1
        with torch.no_grad():
            assert scores.equal(slow(obs, candidates).mean(0))
        assert actions.equal(candidates[scores.argmax(0), torch.arange(len(obs))])
    assert done[0].equal(selections[0][1][0]) and done[1].equal(selections[1][1][0])
    assert losses[0][0][3].equal(selections[2][1][0])  # the TD action
    assert script.cost_of("best_of_n", args) == (1, 8)


def test_two_candidates_for_one_state_are_ranked_along_the_right_axis():
    """N x B = 2 is where the authors' code takes candidates for critics."""
    agent, args = make_agent(num_candidates=2, act_dim=1)
    randomise(agent.policy, 3)
    randomise(agent.target_critic, 4)
    with torch.no_grad():
        agent.policy.net.rest[-1].weight *= 0.1  # else both are at the same bound
    obs, firsts = torch.randn(1, 3), 0
    for seed in range(20):
        candidates = script.propose(agent.policy, obs, args, rng(seed))
        action = act(script, agent, obs, args, rng(seed), "best_of_n")
        q = [(agent.target_critic(obs, a).mean().item(), a.item()) for a in candidates]
        assert action.shape == (1, 1) and action.item() == max(q)[1]
        firsts += max(q)[1] == candidates[0].item()
    assert 0 < firsts < 20


def test_the_deployed_policy_is_one_step():
    """OneStepPolicy, with t = 1 in the bias, equals generate, statistics included."""
    agent, _ = make_agent()
    randomise(agent.policy, 5)
    script.fit_statistics(agent, np.random.default_rng(0).normal(3, 2, (100, 3)))
    deployed, obs = script.OneStepPolicy(agent.policy), torch.randn(9, 3)
    for shape in (9, 2), (4, 9, 2):
        noise = torch.randn(shape)
        with torch.no_grad():
            expected = script.generate(agent.policy, obs, noise).clamp(-1, 1)
            torch.testing.assert_close(deployed(obs, noise), expected)


# ---------------------------------------------------------------------------- critics


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_critic_loss_against_numpy(q_agg):
    """Mean over both critics and the batch of (Q - y)^2, y from the target twins' mean or min."""
    agent, args = make_agent(gamma=0.9, q_agg=q_agg)
    randomise(agent.critic, 1)
    randomise(agent.target_critic, 2)
    batch, next_actions = make_batch(), torch.rand(32, 2, generator=rng()) * 2 - 1
    loss, q = script.critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)
    b = {key: value.double().numpy() for key, value in batch.items()}

    def twins(critic, obs, actions):
        inputs = np.concatenate([obs, actions], -1)
        return np.stack([numpy_mlp(net, inputs)[:, 0] for net in (critic.q1, critic.q2)])

    next_q = twins(agent.target_critic, b["next_obs"], next_actions.double().numpy())
    next_q = {"mean": next_q.mean(0), "min": next_q.min(0)}[q_agg]
    y = b["rewards"] + 0.9 * (1 - b["terminations"]) * next_q
    expected = twins(agent.critic, b["obs"], b["actions"])
    assert loss.item() == pytest.approx(np.mean((expected - y) ** 2), rel=1e-5)
    np.testing.assert_allclose(q.numpy(), expected, rtol=1e-4, atol=1e-5)
    agent.target_critic.requires_grad_(True)
    script.critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)[0].backward()
    assert all(p.grad is None for p in agent.target_critic.parameters())


# ---------------------------------------------------------------------------- an update


@pytest.mark.parametrize("changes", [{}, {"alpha": 0.3, "bound_coef": 2.0, "max_grad_norm": 0.0}])
def test_updates_are_one_backward_pass_as_the_authors(changes, monkeypatch):
    """Five updates against all losses in one graph, each network's gradient cut to its limit.

    total = L_critic + L_Q + bound + alpha L_MF with all parameters from before the step; the
    actor's part is blind to the critics' parameters and the reverse.
    """
    agent, args = make_agent(critic_lr=1e-3, policy_lr=(2e-3, 2e-3), **changes)
    randomise(agent.policy, 1)
    policy, critic = copy.deepcopy(agent.policy), copy.deepcopy(agent.critic)
    adams = torch.optim.Adam(policy.parameters(), 2e-3), torch.optim.Adam(critic.parameters(), 1e-3)
    caught, valued = caught_losses(monkeypatch), caught_losses(monkeypatch, "value_loss")
    calls, shortened = spy(monkeypatch, script, "critic_loss"), 0
    args.lr_warmup = 0.0
    agent.updates = args.offline_steps  # a constant rate
    for update in range(5):
        batch, slow = make_batch(update), copy.deepcopy(agent.target_critic)
        metrics = one_update(script, agent, batch, args, rng(update))
        obs, actions, noise, t, _ = caught[-1][1:]
        assert obs.equal(batch["obs"]) and actions.equal(batch["actions"])
        other = valued[-1][3]
        meanflow, _ = reference_loss(policy, obs, actions, noise, t, args, 2e-3)
        own = policy(obs, other, torch.ones(1))
        value = -critic(obs, own.clamp(-1, 1)).mean()
        bound = (own.abs() - 1).clamp(min=0).mean()
        with torch.no_grad():
            next_q = slow(batch["next_obs"], calls[-1][0][3]).mean(0)
            y = batch["rewards"] + 0.99 * (1 - batch["terminations"]) * next_q
        td = (critic(batch["obs"], batch["actions"]) - y).square().mean()
        actor = value + args.bound_coef * bound + args.alpha * meanflow
        for loss, net in (actor, policy), (td, critic):
            gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            norm = sum(g.square().sum() for g in gradients).sqrt()
            limit = args.max_grad_norm or math.inf
            shortened += int(norm > limit)
            name = "policy" if net is policy else "critic"
            assert metrics[f"losses/{name}_grad_norm"].item() == pytest.approx(
                norm.item(), rel=0.01
            )
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.grad = g * min(1, limit / norm)
        for adam in adams:
            adam.step()
        expected = {"meanflow_loss": meanflow, "value_loss": value, "bound_loss": bound}
        for name, loss in (expected | {"critic_loss": td}).items():
            assert metrics[f"losses/{name}"].item() == pytest.approx(
                loss.item(), rel=2e-3, abs=1e-6
            )
    assert bound > 0 and (shortened > 3) == (args.max_grad_norm > 0)
    for ours, manual in (agent.policy, policy), (agent.critic, critic):
        for x, y in zip(values(ours), values(manual), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=4e-4)  # 4 % of five steps


def test_an_update_has_three_draws_of_noise(monkeypatch):
    """For the flow, for the value and for the candidates, each N(0, prior_std^2), unrelated."""
    agent, args = make_agent(prior_std=1.5, num_candidates=1)
    caught, valued = caught_losses(monkeypatch), caught_losses(monkeypatch, "value_loss")
    generations = spy(monkeypatch, script, "generate")
    one_update(script, agent, make_batch(n=20_000), args, rng())
    candidates = generations[0][0][2][0]
    draws = torch.stack([caught[0][3], valued[0][3], candidates]).flatten(1)
    assert (draws.std(1) - 1.5).abs().max() < 0.03
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.03
    assert generations[0][0][1].equal(caught[0][1]) is False  # candidates are for s'


def test_losses_reach_their_own_networks_alone():
    """A policy without learning rate stays while critics learn, and the reverse, to the bit."""
    for still, moves in ("policy", "critic"), ("critic", "policy"):
        agent, args = make_agent(offline_steps=10)
        randomise(agent.policy, 1)
        script.prepare_update(agent, args)
        rates = {"policy": agent.policy_lr, "critic": torch.tensor(args.critic_lr)}
        agent.optimizers["critic"].param_groups[0]["lr"] = rates["critic"]
        rates[still].zero_()
        before = {name: values(getattr(agent, name)) for name in (still, moves)}
        script.update(agent, make_batch(), args, rng())
        assert all(equal(before[still], values(getattr(agent, still))))
        assert not any(equal(before[moves], values(getattr(agent, moves))))


def test_a_policy_step_leaves_the_critics_as_they_are():
    """Neither their weights nor their gradients change, to the bit, nor does the target's."""
    agent, args = make_agent()
    randomise(agent.policy, 1)
    for p in agent.critic.parameters():
        p.grad = torch.full_like(p, 0.25)
    before = values(agent.critic), values(agent.target_critic), values(agent.policy)
    script.update_policy(agent, make_batch(), args, rng())
    assert all(equal(before[0], values(agent.critic)))
    assert all(equal(before[1], values(agent.target_critic)))
    assert not any(equal(before[2], values(agent.policy)))
    assert all(p.grad.eq(0.25).all() for p in agent.critic.parameters())
    assert all(p.grad is None for p in agent.target_critic.parameters())


def test_target_critics_move_by_tau():
    agent, args = make_agent(tau=0.3)
    for update in range(3):
        old = values(agent.target_critic)
        one_update(script, agent, make_batch(update), args, rng(update))
        for b, f, s in zip(old, values(agent.critic), values(agent.target_critic), strict=True):
            assert not s.equal(b)
            torch.testing.assert_close(s, 0.7 * b + 0.3 * f, rtol=1e-5, atol=1e-7)


def test_learning_rate():
    """Linear to 5 % of the offline steps, half a cosine to their end, then the last value."""
    args = script.Args(offline_steps=1000, policy_lr=(1e-3, 1e-4))
    expected = {0: 2e-5, 24: 5e-4, 49: 1e-3, 50: 1e-3, 525: 5.5e-4, 1000: 1e-4, 5000: 1e-4}
    for update, rate in expected.items():
        assert script.policy_lr_at(args, update) == pytest.approx(rate)
    table = [script.policy_lr_at(args, update) for update in range(1100)]
    assert np.argmax(table) in (49, 50) and max(table) == pytest.approx(1e-3)
    assert (np.diff(table[50:]) <= 0).all() and (np.diff(table[:50]) > 0).all()
    never = script.Args(offline_steps=1000, policy_lr=(1e-3, 1e-4), lr_warmup=0.0)
    assert script.policy_lr_at(never, 0) == 1e-3
    always = script.Args(offline_steps=10, lr_warmup=1.0)
    assert script.policy_lr_at(always, 9) == pytest.approx(1e-4)
    assert script.policy_lr_at(script.Args(offline_steps=0), 0) == 1e-5
    assert script.policy_lr_at(script.Args(offline_steps=3), 0) == pytest.approx(1e-4)


def test_the_policys_adam_takes_that_rate():
    """A tensor that the optimizer holds; Adam's first step is as long as the rate."""
    agent, args = make_agent(offline_steps=1000)
    agent.updates = 24
    before = values(agent.policy)
    metrics = one_update(script, agent, make_batch(), args, rng())
    assert agent.optimizers["policy"].param_groups[0]["lr"] is agent.policy_lr
    assert metrics["charts/policy_lr"].item() == pytest.approx(5e-5)
    moved = max((a - b).abs().max() for a, b in zip(before, values(agent.policy), strict=True))
    assert moved.item() == pytest.approx(5e-5, rel=0.01)


def test_metrics(monkeypatch):
    """Detached scalars; how far own actions are from the data's and how often beyond the box."""
    agent, args = make_agent(prior_std=2.0)
    randomise(agent.policy, 1)
    selections, valued = (
        spy(monkeypatch, script, name) for name in ("select_action", "value_loss")
    )
    batch = make_batch()
    metrics = one_update(script, agent, batch, args, rng())
    assert all(x.shape == () and x.isfinite() and not x.requires_grad for x in metrics.values())
    (_, _, candidates), (_, scores) = selections[0]
    own = valued[0][1][2]
    expected = {
        "policy/best_of_n_gain": (scores.amax(0) - scores.mean(0)).mean(),
        "policy/candidate_spread": candidates.double().std(0, correction=0).mean(),
        "policy/flow_spread": candidates.double().std(0, correction=0).mean(),
        "policy/outside_box": ((own > 1) | (own < -1)).double().mean(),
        "policy/mse_to_data": (own.clamp(-1, 1) - batch["actions"]).square().mean(),
    }
    assert 0 < expected["policy/outside_box"] < 1
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
    losses = {f"losses/{name}" for name in ("meanflow_loss", "value_loss", "bound_loss")}
    losses |= {"losses/critic_loss", "losses/q_values", "losses/policy_grad_norm"}
    losses |= {"losses/critic_grad_norm", "policy/meanflow_error", "charts/policy_lr"}
    assert losses | set(expected) == set(metrics)


def test_bfloat16_generates_but_does_not_rank(monkeypatch):
    selections = spy(monkeypatch, script, "select_action")
    for precision in "float32", "bfloat16":
        agent, args = make_agent(precision=precision)
        randomise(agent.policy, 1)
        slow = copy.deepcopy(agent.target_critic)
        one_update(script, agent, make_batch(), args, rng())
        (_, obs, candidates), (actions, scores) = selections[-1]
        with torch.no_grad():
            assert scores.equal(slow(obs, candidates).mean(0))
        assert candidates.dtype == scores.dtype == actions.dtype == torch.float32
    (exact, rounded) = (inputs[2] for inputs, _ in selections)
    assert 0 < (exact - rounded).abs().max() < 0.1


@COMPILER
@pytest.mark.slow
def test_compiled_updates_equal_plain_ones():
    """Parameters, targets and metrics after 10 updates, to rounding."""
    torch._dynamo.reset()
    results = []
    for fast in False, True:
        agent, args = make_agent(num_candidates=50, time_steps=50, offline_steps=100)
        improve = script.update
        if fast:
            _, improve = script.accelerate(agent, script.act_explore, improve)
        generator = rng(7)
        for seed in range(10):
            metrics = one_update(script, agent, make_batch(seed), args, generator, improve)
        assert not fast or improve.function is not improve.plain, "went on without compiling"
        results.append((agent.state_dict(), metrics))
    (plain, plain_metrics), (compiled, metrics) = results
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------- learning


def one_step_to_modes(loss, updates=2000):
    """Mean distance to the nearest of four points, and shares, of 4,000 one-step actions.

    The points have a width of 0.05, so that the data's own distance is 0.06.
    """
    torch.manual_seed(0)
    policy, obs = script.ResidualPolicy(1, 2, 128, 3), torch.zeros(128, 1)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3, fused=True)
    args = script.Args(offline_steps=updates, policy_lr=(2e-3, 2e-4))
    for update in range(updates):
        actions = MODES[torch.randint(4, (128,))] + 0.05 * torch.randn(128, 2)
        meanflow, _ = loss(policy, obs, actions, torch.randn(128, 2), torch.rand(128, 1), args)
        optimizer.param_groups[0]["lr"] = script.policy_lr_at(args, update)
        optimizer.zero_grad()
        meanflow.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        noise = torch.randn(4000, 2, generator=rng())
        return to_nearest_mode(script.generate(policy, torch.zeros(4000, 1), noise))


def changed(function, old, new):
    """A function of the script with one expression replaced."""
    source = inspect.getsource(function)
    assert source.count(old) == 1
    names = {}
    exec(source.replace(old, new), vars(script).copy(), names)
    return names[function.__name__]


@pytest.mark.slow
def test_one_step_finds_all_modes():
    """The distance was 0.11 when this was written; noise has 0.84."""
    distance, shares = one_step_to_modes(script.policy_loss)
    assert distance < 0.15 and shares.min() > 0.2


@pytest.mark.slow
def test_the_naive_residual_cannot():
    """g = e - u: the target's mean is no MeanFlow identity, whatever the budget (0.33 then)."""
    naive = changed(script.policy_loss, "z_t + (t - 1) * v", "noise - v")
    assert one_step_to_modes(naive)[0] > 0.25


@pytest.mark.slow
def test_learns_which_half_of_the_data_succeeds(tmp_path, monkeypatch):
    """Data go left or right, rewarded on the right: Q moves one unranked step there.

    With alpha so large that only imitation counts the step is either; the best of N still chooses.
    """
    draw = np.random.default_rng(0)
    side = draw.choice([-0.5, 0.5], 1200)
    actions = side[:, None] + 0.02 * draw.standard_normal((1200, 1))
    obs, end = np.zeros((1200, 1)), np.ones(1200)
    data = {"obs": obs, "actions": actions, "rewards": 1.0 * (side > 0)}
    data |= {"next_obs": obs, "terminations": end, "ends": end}
    monkeypatch.setattr(script, "load_dataset", lambda args: data)
    monkeypatch.chdir(tmp_path)
    settings = {"offline_steps": 1500, "total_timesteps": 0, "learning_starts": 0}
    settings |= {"hidden_dim": 64, "num_candidates": 16, "batch_size": 128, "critic_lr": 1e-3}
    settings |= {"policy_lr": (1e-3, 1e-4), "env_id": "probe_envs:Both-v0", "tau": 0.05}
    shares = {}
    for alpha in 0.3, 1000.0:
        args = script.Args(**(SETTINGS | settings | {"alpha": alpha}))
        agent = script.Agent(1, 1, args, CPU)
        agent.load_state_dict(load(script.main(args))["agent"])
        start = torch.zeros(400, 1)
        for mode in "one_step", "best_of_n":
            chosen = act(script, agent, start, args, rng(), mode)
            shares[alpha, mode] = (chosen > 0).float().mean().item()
    assert shares[0.3, "one_step"] > 0.9 and shares[0.3, "best_of_n"] > 0.9
    assert 0.3 < shares[1000.0, "one_step"] < 0.7 and shares[1000.0, "best_of_n"] > 0.9


# ---------------------------------------------------------------------------- both phases


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


@pytest.mark.parametrize(("offline", "utd", "starts"), [(150, 1.0, 50), (0, 0.5, 0), (70, 2.0, 9)])
def test_updates_of_both_phases(run, monkeypatch, offline, utd, starts):
    """One per offline step; then utd per online step beyond learning_starts."""
    phases = {"offline_steps": offline, "utd": utd, "learning_starts": starts}
    saved = load(run(total_timesteps=100, **phases))
    assert saved["counters"]["updates"] == offline + int(utd * (100 - starts))
    assert saved["global_step"] == offline + 100 and len(saved["buffer"]["rewards"]) == 300


def test_offline_alone_is_the_default(run):
    """No online step; evaluated and saved at the end; 200 transitions stay 200."""
    assert script.Args().total_timesteps == 0
    run_dir = run(total_timesteps=0, learning_starts=0, eval_every=1000)
    saved = load(run_dir)
    assert saved["global_step"] == saved["counters"]["updates"] == 150
    assert len(saved["buffer"]["rewards"]) == 200
    assert [row[:2] for row in rows(run_dir, "evaluations")[1:]] == [["150", "150"]] * 2
    modes = [row[2] for row in rows(run_dir, "evaluations")[1:]]
    assert modes == ["one_step", "best_of_n"]  # the deployed one first


def test_online_steps_are_stored_behind_the_data(run):
    """Raw observations, the executed action, the true last observation of an episode."""
    COUNTED.clear()
    saved = load(run("Counting-v0", total_timesteps=60))
    stored = {key: value[200:] for key, value in saved["buffer"].items()}
    steps = torch.arange(60) % 7
    assert torch.equal(stored["obs"][:, 0], steps.float())
    assert torch.equal(stored["next_obs"][:, 0], steps + 1.0)
    assert torch.equal(stored["terminations"].nonzero()[:, 0], torch.arange(6, 60, 14))
    actions = [pair for _, pair in COUNTED[-60:]]
    assert stored["actions"].tolist() == [pytest.approx(pair) for pair in actions]


@pytest.mark.parametrize("normalize", [True, False])
def test_statistics_come_from_the_data_and_stay(run, normalize):
    """Not from the padded buffer, nor from what is collected; they are saved with the policy."""
    run_dir = run("Counting-v0", total_timesteps=60, normalize_obs=normalize)
    obs = made_up_dataset(1, 2)["obs"]
    saved, policy = load(run_dir), load(run_dir, "policy.pt")
    expected = (obs.mean(), obs.std()) if normalize else (0, 1)
    for state in saved["agent"], {f"policy.{k}": v for k, v in policy["policy"].items()}:
        found = state["policy.normalise.mean"].item(), state["policy.normalise.std"].item()
        assert found == pytest.approx(expected, abs=1e-6)
    assert saved["agent"]["target_critic.normalise.mean"].item() == pytest.approx(expected[0])


@pytest.mark.parametrize("stop", [80, 228])
def test_stopped_runs_go_on_exactly(run, monkeypatch, tmp_path, stop):
    """SIGTERM in the offline phase and in the online one: the same to the bit."""
    straight = load(run("Hopper-v4"))
    real, seen = script.ReplayBuffer.sample, []

    def interrupting(buffer, *rest):
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
    script.main(script.Args(**(saved["args"] | {"resume": str(run_dir)})))
    assert differences(straight, load(run_dir)) == []


def test_an_offline_run_goes_online_later(run):
    """--resume with --total-timesteps: what a run that was told so from the start becomes."""
    straight = run("Hopper-v4", learning_starts=0)
    longer = run("Hopper-v4", learning_starts=0, total_timesteps=0)
    args = load(longer)["args"] | {"resume": str(longer), "total_timesteps": 150}
    script.main(script.Args(**args))
    assert differences(load(straight), load(longer)) == []


def test_end_to_end_on_real_physics(datasets, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The maze offline and online; its last evaluation is what --evaluate repeats."""
    monkeypatch.chdir(tmp_path)
    flags = {"env_id": "ogbench:pointmaze-medium-singletask-task1-v0", "eval_every": 1000}
    flags |= {"dataset": str(datasets / "pointmaze-medium.npz")}
    run_dir = script.main(script.Args(**(SETTINGS | flags)))
    table = rows(run_dir, "evaluations")
    column = dict(zip(table[0], table[-2], strict=True))
    assert column["mode"] == "one_step" and column["success_rate"] == "0.0"
    assert len(load(run_dir)["buffer"]["rewards"]) == 1500 + 150
    capsys.readouterr()
    script.main(script.parse_args(["--evaluate", str(run_dir)]))
    out = capsys.readouterr().out
    assert "success rate 0.00" in out and "ms/action" in out
    returns = [line.split()[-1] for line in out.splitlines() if line.startswith("episode")]
    assert returns == column["returns"].split()


def test_the_script_runs_alone(datasets, tmp_path):  # noqa: F811
    """Copied into an empty folder, without the repository, on a dataset given by its path."""
    name = script.__name__
    shutil.copy(FILES[name], tmp_path)
    flags = "--env-id ogbench:pointmaze-medium-singletask-task1-v0 --offline-steps 60 --device cpu"
    flags += f" --dataset {datasets}/pointmaze-medium.npz --hidden-dim 16 --no-compile"
    flags += " --eval-every 0 --eval-episodes 1"
    result = python(f"{name}.py", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = tmp_path.glob("runs/*")
    assert load(run_dir)["global_step"] == 60


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no/such.npz"}, "cannot load --dataset no/such.npz"),
        ({"alpha": -1.0}, "--alpha -1.0 must be 0 or more"),
        ({"lr_warmup": 1.1}, "--lr-warmup 1.1 must be 0 or more and at most 1"),
        ({"policy_lr": (1e-3, 0.0)}, "--policy-lr 0.0 must be above 0"),
        ({"time_steps": -1}, "--time-steps -1 must be 0 or more"),
        ({"target_clip": 0.0}, "--target-clip 0.0 must be above 0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm -1.0 must be 0 or more"),
        ({"offline_steps": 0, "total_timesteps": 0, "learning_starts": 0}, "gives no update"),
        ({"dataset": "cube-double-play-singletask-v0"}, "data for it begin with cube-single-"),
        ({"total_timesteps": 0, "learning_starts": 0, "utd": 0.5}, "--utd does nothing without"),
        ({"total_timesteps": 0}, "--learning-starts must be at most --total-timesteps"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"env_id": "ogbench:cube-single-singletask-v0"} | changes
    pytest.importorskip("ogbench")
    with pytest.raises(SystemExit) as stopped:
        script.main(script.Args(**settings))
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and message in stderr and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_zeroes_that_switch_something_off():
    zero = {"alpha": 0.0, "bound_coef": 0.0, "adaptive_power": 0.0, "max_grad_norm": 0.0}
    script.check_args(script.Args(**zero, lr_warmup=0.0, time_steps=0, total_timesteps=0))


@pytest.mark.parametrize("size", [0, 10_001])
def test_a_dataset_of_the_wrong_size_is_refused(tmp_path, monkeypatch, capsys, size):
    monkeypatch.chdir(tmp_path)
    data = {name: column[:size] for name, column in made_up_dataset(1, 1, 10_001).items()}
    monkeypatch.setattr(script, "load_dataset", lambda args: data)
    with pytest.raises(SystemExit):
        script.main(script.Args(**(SETTINGS | {"env_id": "probe_envs:Both-v0"})))
    assert f"holds {size:,} transitions" in capsys.readouterr().err


# ---------------------------------------------------------------------------- one's own data


def own_arrays(**changes):
    """What an .npz of one's own holds, for probe_envs' Both: 20 transitions, two trajectories."""
    data = made_up_dataset(1, 1, 20)
    names = {"obs": "observations", "next_obs": "next_observations", "ends": "terminals"}
    arrays = {names.get(name, name): column for name, column in data.items()}
    return arrays | {"masks": 1 - arrays.pop("terminations")} | changes


@pytest.mark.parametrize("module", ["meanflowql_offline_to_online", "mvp_offline_to_online"])
def test_a_dataset_of_ones_own_needs_no_ogbench(tmp_path, monkeypatch, module):
    """Six arrays, read as they are; only actions are kept off the bounds."""
    module, arrays = __import__(module), own_arrays()
    arrays["actions"][0] = 1
    np.savez(tmp_path / "own.npz", **arrays)
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    args = module.Args(env_id="probe_envs:Both-v0", dataset=str(tmp_path / "own.npz"))
    data = module.load_dataset(args)
    expected = made_up_dataset(1, 1, 20)
    assert set(data) == set(expected) and data["actions"][0] == 1 - 1e-5
    for name in set(data) - {"actions"}:
        assert np.array_equal(data[name], expected[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, "KeyError: 'masks'"),
        ({"actions": np.zeros((20, 2))}, "actions of shape (20, 2), not (20, 1)"),
        ({"observations": np.zeros((20, 3))}, "obs of shape (20, 3), not (20, 1)"),
        ({"next_observations": np.zeros((19, 1))}, "next_obs of shape (19, 1), not (20, 1)"),
        ({"rewards": np.zeros((20, 1))}, "rewards of shape (20, 1), not (20,)"),
        ({"rewards": np.full(20, np.nan)}, "rewards holds NaN or is out of range"),
        ({"observations": np.full((20, 1), np.inf)}, "observations holds NaN or is out of range"),
        ({"actions": np.full((20, 1), 1.5)}, "actions beyond -1 and 1"),
        ({"terminals": np.zeros(20)}, "no trajectory ends: the last of terminals must be 1"),
    ],
)
@pytest.mark.parametrize("module", ["meanflowql_offline_to_online", "mvp_offline_to_online"])
def test_what_does_not_fit_is_refused_in_a_line(
    tmp_path, monkeypatch, capsys, module, changes, message
):
    module = __import__(module)
    arrays = {name: x for name, x in own_arrays(**changes).items() if x is not None}
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(SystemExit) as stopped:
        args = module.Args(env_id="probe_envs:Both-v0", dataset=str(tmp_path / "own.npz"))
        module.load_dataset(args)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and message in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "buttons"), [("scene", 2), ("puzzle-3x3", 9)])
def test_arms_press_buttons_for_a_dataset(tmp_path, name, buttons):
    """The oracles' plans change the world, and the task's rewards say so."""
    pytest.importorskip("ogbench")
    path = tmp_path / "data.npz"
    program = ROOT / "benchmark/measure/make_dataset.py"
    result = python(program, name, "--steps=300", "--episode-length=300", "--output", path)
    assert result.returncode == 0, result.stderr
    states = np.load(path)["button_states"]
    assert states.shape == (301, buttons) and np.diff(states, axis=0).any()
    args = script.Args(env_id=f"ogbench:{name}-singletask-task1-v0", dataset=str(path))
    data = script.load_dataset(args)
    assert len(np.unique(data["rewards"])) > 1 and data["rewards"].max() <= 0
    assert len(data["obs"]) == 300 and data["ends"].sum() == 1
