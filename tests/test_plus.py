"""FPMD+: C51 on normalised rewards, weights at a KL, regression on perturbations of one latent."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    COMPILER,
    OneStep,
    act,
    equal,
    layers,
    load,
    numpy_batch_norm,
    numpy_mlp,
    one_update,
    randomise,
    rng,
    spy,
    values,
)
from test_resume import differences
from test_speed import agent_after

import fpmd_meanflow_online as meanflow
import fpmd_plus_online as plus

f64 = torch.float64
SLOW = partial(pytest.param, marks=pytest.mark.slow)
OBS, ACT, BATCH = 4, 2, 32
SIZES = {"hidden_dim": 16, "num_candidates": 4, "num_atoms": 11}
OTHERS = [  # every setting beside the default
    {"imitation": "meanflow"},
    {"weights": "best"},
    {"num_atoms": 1},
    {"normalize_rewards": False, "v_max": 100.0},
    {"td_action": "best"},
]
NAMES = [" ".join(f"{key}={value}" for key, value in setting.items()) for setting in OTHERS]


@pytest.fixture(params=["fpmd_plus_online"])
def script(request):
    return plus


def make_agent(seed=0, act_dim=ACT, **changes):
    torch.manual_seed(seed)
    args = plus.Args(**SIZES | changes)
    return plus.Agent(OBS, act_dim, args, torch.device("cpu")), args


def make_batch(seed=0, dtype=torch.float32, n=BATCH):
    draw = np.random.default_rng(seed)
    batch = {key: draw.normal(size=(n, OBS)) for key in ("obs", "next_obs")}
    batch["actions"] = draw.uniform(-1, 1, (n, ACT))
    batch["rewards"] = 2 * draw.normal(size=n)
    batch["terminations"] = (np.arange(n) % 3 == 0).astype(float)
    return {key: torch.tensor(value, dtype=dtype) for key, value in batch.items()}


# ---------------------------------------------------------------------------- C51: the projection


def project_one(p, values, atoms):
    """Algorithm 1 of C51 for one state, atom by atom."""
    low, high, gap = atoms[0], atoms[-1], atoms[1] - atoms[0]
    projected = np.zeros(len(atoms))
    for share, value in zip(p, values, strict=True):
        position = min((min(max(value, low), high) - low) / gap, len(atoms) - 1)
        below = math.floor(position)
        above = min(below + 1, len(atoms) - 1)
        if position in (below, above):
            projected[round(position)] += share
        else:
            projected[below] += share * (above - position)
            projected[above] += share * (position - below)
    return projected


@pytest.mark.parametrize("atoms", [3, 11, 101])
def test_projection_against_a_loop(atoms):
    """Beyond both ends, between atoms, and on them."""
    draw = np.random.default_rng(0)
    support = np.linspace(-5, 5, atoms)
    p = draw.dirichlet(np.ones(atoms), 40)
    targets = draw.uniform(-7, 7, (40, atoms))
    targets[0] = support
    targets[1] = 9.0
    ours = plus.project(*map(torch.tensor, (p, targets, support))).numpy()
    expected = [project_one(*row, support) for row in zip(p, targets, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[0], p[0], rtol=0, atol=1e-12)
    assert ours[1][-1] == pytest.approx(1)


def test_projection_keeps_mass_and_within_the_range_the_mean():
    """Linear interpolation does; what is clipped loses the rest of its value."""
    draw = np.random.default_rng(1)
    support = torch.linspace(-5, 5, 101, dtype=f64)
    p = torch.tensor(draw.dirichlet(np.ones(101), 50))
    inside = torch.tensor(draw.uniform(-5, 5, (50, 101)))
    projected = plus.project(p, inside, support)
    torch.testing.assert_close(projected.sum(1), torch.ones(50, dtype=f64))
    torch.testing.assert_close(projected @ support, (p * inside).sum(1))
    assert (projected >= 0).all()
    beyond = plus.project(p, 3 * inside, support)
    torch.testing.assert_close(beyond.sum(1), torch.ones(50, dtype=f64))
    torch.testing.assert_close(beyond @ support, (p * (3 * inside).clamp(-5, 5)).sum(1))


# ---------------------------------------------------------------------------- C51: the loss


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def numpy_logits(critic, obs, actions):
    obs = numpy_batch_norm(critic.norm_obs, obs)
    actions = numpy_batch_norm(critic.norm_actions, actions)
    x = np.concatenate([obs, actions], -1)
    return np.stack([numpy_mlp(net, x) for net in (critic.z1, critic.z2)])  # (2, B, K)


def numpy_logits_of_both(critic, b, next_actions):
    """Of (s, a) and of (s', a'); BatchNorm sees both as one batch."""
    obs = np.concatenate([b["obs"], b["next_obs"]])
    actions = np.concatenate([b["actions"], next_actions.double().numpy()])
    return np.split(numpy_logits(critic, obs, actions), 2, 1)


def numpy_critic_loss(agent, batch, next_actions, scale, args):
    """Loss and Q in float64, state by state."""
    b = {key: value.double().numpy() for key, value in batch.items()}
    atoms = np.linspace(-args.v_max, args.v_max, args.num_atoms)
    logits, following = numpy_logits_of_both(agent.critic, b, next_actions)
    one = args.num_atoms == 1
    next_q = following[..., 0] if one else softmax(following) @ atoms
    q = logits[..., 0] if one else softmax(logits) @ atoms
    loss = 0.0
    for i in range(len(b["rewards"])):
        j = 0 if next_q[0, i] <= next_q[1, i] else 1
        bootstrap = 0.0 if b["terminations"][i] else args.gamma
        reward = b["rewards"][i] / scale
        if one:
            loss += sum((q[k, i] - reward - bootstrap * next_q[j, i]) ** 2 for k in (0, 1))
            continue
        y = project_one(softmax(following[j, i]), reward + bootstrap * atoms, atoms)
        for k in 0, 1:
            loss -= (y * np.log(softmax(logits[k, i]))).sum()
    return loss / len(b["rewards"]), q, next_q


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("changes", [{}, {"num_atoms": 1}], ids=str)
def test_critic_loss_against_numpy(gamma, changes):
    """Distribution of the critic with the smaller mean, per state; only termination ends it."""
    agent, args = make_agent(gamma=gamma, **changes)
    randomise(agent.critic, 1)
    agent.critic.train()
    batch, next_actions = make_batch(), torch.rand(BATCH, ACT, generator=rng()) * 2 - 1
    loss, q = plus.critic_loss(agent.critic, batch, next_actions, torch.tensor(0.7), args)
    expected, expected_q, next_q = numpy_critic_loss(agent, batch, next_actions, 0.7, args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(q.numpy(), expected_q, rtol=1e-3, atol=1e-4)
    smaller = next_q.argmin(0)
    assert 0 < smaller.mean() < 1, "one twin is the smaller everywhere"


def test_the_smaller_mean_is_not_the_smaller_logit():
    """A twin whose every state is better loses to the other, whatever the order of the two."""
    agent, args = make_agent(gamma=1.0)
    batch, next_actions = make_batch(), torch.zeros(BATCH, ACT)
    batch["terminations"] = torch.zeros(BATCH)
    batch["rewards"] = torch.zeros(BATCH)
    low, high = torch.zeros(11), torch.zeros(11)
    low[0], high[-1] = 3.0, 3.0
    p = low.softmax(0)
    expected = -(p * low.log_softmax(0)).sum() - (p * high.log_softmax(0)).sum()
    for pessimist, optimist in ("z1", "z2"), ("z2", "z1"):
        critic = copy.deepcopy(agent.critic).train()
        for name, logits in (pessimist, low), (optimist, high):
            last = getattr(critic, name).rest[-1]
            last.weight.data.zero_()
            last.bias.data.copy_(logits)
        loss, _ = plus.critic_loss(critic, batch, next_actions, torch.tensor(1.0), args)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_gradient_against_finite_differences():
    """Of every weight of both critics, along random directions, in float64."""
    agent, args = make_agent(gamma=0.0)  # else y would follow the weights
    agent.double().critic.train()
    batch, next_actions = make_batch(dtype=f64), torch.zeros(BATCH, ACT, dtype=f64)
    scale = torch.tensor(0.7, dtype=f64)

    def loss():
        return plus.critic_loss(agent.critic, batch, next_actions, scale, args)[0]

    parameters = list(agent.critic.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, found = torch.randn(parameter.shape, dtype=f64, generator=rng(1)), []
        with torch.no_grad():
            for step in 1e-6, -2e-6:
                parameter += step * direction
                found.append(loss().item())
            parameter += 1e-6 * direction
        slope = (found[0] - found[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("num_atoms", [1, 11])
def test_td_target_is_a_constant(num_atoms):
    """The loss has the gradient of the distance to a y that was known before."""
    agent, args = make_agent(num_atoms=num_atoms, gamma=0.9)
    randomise(agent.critic, 1)
    critic, batch = agent.critic.train(), make_batch()
    next_actions = torch.rand(BATCH, ACT, generator=rng()) * 2 - 1
    loss, q = plus.critic_loss(critic, batch, next_actions, torch.tensor(1.0), args)
    assert not q.requires_grad
    ours = torch.autograd.grad(loss, list(critic.parameters()))
    obs = torch.cat([batch["obs"], batch["next_obs"]])
    both = critic.logits(obs, torch.cat([batch["actions"], next_actions]))
    logits, following = both[:, :BATCH], both[:, BATCH:].detach()
    smaller = critic.mean(following).argmin(0)
    following = following[smaller, torch.arange(BATCH)]
    bootstrap = 0.9 * (1 - batch["terminations"][:, None])
    if num_atoms == 1:
        y = batch["rewards"][:, None] + bootstrap * following
        known = (logits - y).square().mean((1, 2)).sum()
    else:
        values = batch["rewards"][:, None] + bootstrap * critic.atoms
        y = plus.project(following.softmax(-1), values, critic.atoms)
        known = -(y * logits.log_softmax(-1)).sum(-1).mean(1).sum()
    expected = torch.autograd.grad(known, list(critic.parameters()))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- BatchNorm


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def test_only_a_critics_update_moves_the_averages_of_batch_norm():
    """By a hundredth towards mean and variance of (s, a) and (s', a') together."""
    agent, args = make_agent()
    old, batch = buffers(agent.critic), make_batch()
    obs = torch.randn(7, OBS)
    for mode in "explore", "best_of_n", "one_step":
        act(plus, agent, obs, args, rng(), mode)
    assert all(value.equal(old[name]) for name, value in agent.critic.named_buffers())
    one_update(plus, agent, batch, args, rng())
    new = buffers(agent.critic)
    both = torch.cat([batch["obs"], batch["next_obs"]])
    mean, var = 0.01 * both.mean(0), 0.99 + 0.01 * both.var(0)
    torch.testing.assert_close(new["norm_obs.running_mean"], mean)
    torch.testing.assert_close(new["norm_obs.running_var"], var)
    assert {name for name in new if new[name].equal(old[name])} == {"atoms"}
    assert not any(module.training for module in agent.critic.modules())


def test_batch_norm_ranks_an_action_alike_in_any_company():
    """Its averages normalise what acts: candidates do not depend on each other."""
    agent, args = make_agent()
    one_update(plus, agent, make_batch(), args, rng())
    obs, actions = torch.randn(5, OBS), torch.rand(6, 5, ACT)
    q = agent.critic(obs, actions)
    torch.testing.assert_close(agent.critic(obs[2:3], actions[4, 2:3]), q[:, 4, 2:3])


def test_q_is_the_mean_of_its_distribution():
    """On atoms over [-v_max, v_max]; candidates (N, B) broadcast over states."""
    agent, args = make_agent(v_max=3.0, num_atoms=7)
    randomise(agent.critic, 0)
    obs, actions = torch.randn(5, OBS), torch.rand(6, 5, ACT)
    q = agent.critic(obs, actions)
    assert q.shape == (2, 6, 5)
    logits = numpy_logits(agent.critic, np.tile(obs, (6, 1, 1)), actions.numpy())
    expected = softmax(logits) @ np.linspace(-3, 3, 7)
    np.testing.assert_allclose(q.detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    for net in agent.critic.z1, agent.critic.z2:
        names = [type(module).__name__ for module in layers(net)]
        assert names == ["FirstLayer", *["BatchNorm", "ReLU", "Linear"] * args.critic_layers]
    deeper, _ = make_agent(critic_layers=3)
    names = [type(module).__name__ for module in layers(deeper.critic.z1)]
    assert names == ["FirstLayer", *["BatchNorm", "ReLU", "Linear"] * 3]
    assert not any(isinstance(module, plus.BatchNorm) for module in agent.policy.modules())


# ---------------------------------------------------------------------------- rewards' scale


def numpy_scale(rewards, ended, gamma, v_max):
    """From all discounted returns so far, (steps, num_envs) each; without a recursion over them."""
    running, seen = np.zeros(rewards.shape[1]), []
    for row, ends in zip(rewards, ended, strict=True):
        running = gamma * running + row
        seen.append(running.copy())
        running[ends] = 0
    return max(np.std(seen), np.abs(seen).max() / v_max)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("mean", "gamma"), [(0.0, 0.99), (5.0, 0.9), (-2.0, 1.0)])
def test_reward_scale_against_numpy(num_envs, mean, gamma):
    """Several environments whose episodes end at different steps."""
    draw = np.random.default_rng(0)
    args = plus.Args(num_envs=num_envs, gamma=gamma)
    scale = plus.RewardScale(args)
    assert scale.scale.item() == 1
    rewards, ended = draw.normal(mean, 1, (400, num_envs)), draw.random((400, num_envs)) < 0.05
    for step in range(400):
        scale.observe(rewards[step], ended[step], args)
        if step in (0, 10, 100, 399):
            expected = numpy_scale(rewards[: step + 1], ended[: step + 1], gamma, args.v_max)
            assert scale.scale.item() == pytest.approx(expected, rel=1e-4), step


def test_either_term_of_the_scale_can_win():
    """A rare large return against an even spread; no reward at all must not divide by zero."""
    args = plus.Args()
    rare, even, none, tiny = (plus.RewardScale(args) for _ in range(4))
    for step in range(1_000):
        rare.observe(np.array([100.0 * (step == 500)]), np.array([True]), args)
        even.observe(np.array([(-1.0) ** step]), np.array([True]), args)
        none.observe(np.zeros(1), np.array([False]), args)
        tiny.observe(np.array([1e-9 * (-1) ** step]), np.array([True]), args)
    assert rare.scale.item() == pytest.approx(100 / 5) and even.scale.item() == pytest.approx(1)
    assert none.scale.item() == pytest.approx(1e-15)
    assert tiny.scale.item() == pytest.approx(1e-9)
    fixed = replace(args, normalize_rewards=False)
    unused = plus.RewardScale(fixed)
    unused.observe(np.array([100.0]), np.array([True]), fixed)
    assert unused.scale.item() == 1 and unused.count.item() == 0


def test_a_runs_scale_is_that_of_its_rewards(run):
    """The loop shows it every step of every environment, terminated and truncated ones alike."""
    run_dir = run(env_id="Hopper-v4", num_envs=3, total_timesteps=600)
    saved = load(run_dir)
    rewards, ended = (
        saved["buffer"][key].double().numpy().reshape(-1, 3) for key in ("rewards", "terminations")
    )
    assert ended.sum() > 5  # and no episode was cut so early
    expected = numpy_scale(rewards, ended > 0, 0.99, 5.0)
    assert saved["agent"]["reward_scale.scale"].item() == pytest.approx(expected, rel=1e-4)
    assert saved["agent"]["reward_scale.count"].item() == 600
    run_dir = run(env_id="probe_envs:Endless-v0", num_envs=2, total_timesteps=200)
    largest = (1 - 0.99**8) / (1 - 0.99)  # cut after 8 steps of reward 1
    assert load(run_dir)["agent"]["reward_scale.largest"].item() == pytest.approx(largest, rel=1e-4)


def test_critics_see_divided_rewards():
    """And what is logged is in the units of the environment."""
    agent, args = make_agent()
    agent.reward_scale.scale.fill_(4.0)
    agent.critic.atoms.mul_(1.0)
    batch = make_batch()
    divided = batch | {"rewards": batch["rewards"] / 4}
    other, _ = make_agent()
    ours = one_update(plus, agent, batch, args, rng())
    theirs = one_update(plus, other, divided, args, rng())
    assert ours["losses/critic_loss"].item() == pytest.approx(theirs["losses/critic_loss"].item())
    assert ours["losses/q_values"].item() == pytest.approx(4 * theirs["losses/q_values"].item())
    assert ours["charts/reward_scale"].item() == 4
    agent.reward_scale.scale.fill_(7.0)
    assert ours["charts/reward_scale"].item() == 4, "the log's number is the agent's own tensor"


# ---------------------------------------------------------------------------- weights


def draw_scores(seed=0, n=8, batch=256):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, batch)), dtype=torch.float32)


def test_weights_in_closed_form():
    """softmax_i(Q_i / (sigma lambda)) within each state, sigma the mean std within a state."""
    agent, args = make_agent(temperature_init=0.3)
    scores = 3 * draw_scores()
    scores[:, 7] *= 10  # a state of larger differences has sharper weights, not another sigma
    w = plus.candidate_weights(agent, scores, args)
    q = scores.double().numpy()
    sigma = np.mean([np.std(q[:, i]) for i in range(q.shape[1])])
    expected = np.exp(q / (sigma * 0.3))
    np.testing.assert_allclose(w.numpy(), expected / expected.sum(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(w.sum(0), torch.ones(256))


def test_weights_do_not_see_a_constant_or_the_rewards_scale():
    """Q + c(s) and c Q give the same weights, so that they mean the same on every task."""
    agent, args = make_agent()
    scores = draw_scores()
    w = plus.candidate_weights(agent, scores, args)
    shifted = scores + 5 * torch.randn(256, generator=rng())
    for other in shifted, 40 * scores, 0.01 * scores:
        torch.testing.assert_close(
            plus.candidate_weights(agent, other, args), w, rtol=1e-3, atol=1e-5
        )
    assert (plus.candidate_weights(agent, -scores, args) - w).abs().max() > 0.1


@pytest.mark.parametrize(
    ("target_kl", "temperature", "share", "forward", "aside"),
    [(0.3, 1.24, 0.63, 0.71, 0.46), (1.0, 0.49, 0.32, 1.20, 0.69), (1.5, 0.25, 0.21, 1.37, 0.83)],
)
def test_what_a_kl_means(target_kl, temperature, share, forward, aside):
    """The page's table: a linear Q, 8 candidates in 6 dimensions, lengths in stds of the noise."""
    agent, args = make_agent(temperature_init=temperature)
    noise = torch.randn(8, 100_000, 6, generator=rng())
    w = plus.candidate_weights(agent, noise[:, :, 0], args)
    assert plus.update_temperature(agent, w, args).item() == pytest.approx(target_kl, rel=0.03)
    assert (1 / w.square().sum(0)).mean().item() / 8 == pytest.approx(share, rel=0.03)
    moved = (w[:, :, None] * noise).sum(0)
    assert moved[:, 0].mean().item() == pytest.approx(forward, rel=0.03)
    assert moved[:, 1:].std().item() == pytest.approx(aside, rel=0.03)


def test_the_best_alone():
    agent, args = make_agent(weights="best")
    scores = draw_scores()
    w = plus.candidate_weights(agent, scores, args)
    assert w.argmax(0).equal(scores.argmax(0)) and w.sum(0).eq(1).all() and w.dtype == scores.dtype
    assert w.max(0).values.eq(1).all()


def test_equal_scores_weigh_alike():
    agent, args = make_agent()
    w = plus.candidate_weights(agent, torch.full((4, 9), 2.0), args)
    torch.testing.assert_close(w, torch.full((4, 9), 0.25))


def numpy_kl(w):
    """sum_i w_i log(N w_i), mean over states."""
    w = w.double().numpy()
    terms = np.where(w > 0, w * np.log(np.maximum(len(w) * w, 1e-300)), 0)
    return terms.sum(0).mean()


@pytest.mark.parametrize("start", [0.02, 20.0])
@pytest.mark.parametrize("target", [0.2, 1.0])
def test_temperature_converges_to_the_target_kl(start, target):
    """From weights too sharp and from weights too even, on scores that stand still."""
    agent, args = make_agent(temperature_init=start, target_kl=target, temperature_rate=0.05)
    scores = draw_scores()
    before = numpy_kl(plus.candidate_weights(agent, scores, args))
    assert before > target + 0.5 if start < 1 else before < target / 10
    for _ in range(1_500):
        w = plus.candidate_weights(agent, scores, args)
        kl = plus.update_temperature(agent, w, args)
    assert kl.item() == pytest.approx(numpy_kl(w), rel=1e-4, abs=1e-6)
    assert kl.item() == pytest.approx(target, rel=0.01)


def test_one_step_of_the_temperature():
    """log lambda moves by the rate times the KL too much; not at all at rate 0 or for the best."""
    scores, rates = draw_scores(), {0.01: 0.01, 0.0: 0.0}
    for rate, expected in rates.items():
        agent, args = make_agent(temperature_rate=rate)
        w = plus.candidate_weights(agent, scores, args)
        kl = plus.update_temperature(agent, w, args).item()
        moved = agent.log_temperature.item() - math.log(0.4)
        assert moved == pytest.approx(expected * (kl - 1), abs=1e-6) and abs(kl - 1) > 0.1
    agent, args = make_agent(weights="best")
    for _ in range(100):  # its KL, log N, is no temperature's fault
        w = plus.candidate_weights(agent, scores, args)
        assert plus.update_temperature(agent, w, args).item() == pytest.approx(math.log(8))
    assert agent.log_temperature.item() == pytest.approx(math.log(0.4))


@pytest.mark.parametrize(("scores", "end"), [("even", 7.0), ("uneven", -7.0)])
def test_a_kl_out_of_reach_stays_finite(scores, end):
    """The temperature stops before exp under- or overflows, and weights are still weights."""
    target = 1e-4 if scores == "even" else 5.0
    agent, args = make_agent(target_kl=target, temperature_rate=1.0)
    found = draw_scores()
    for _ in range(500):
        w = plus.candidate_weights(agent, found, args)
        plus.update_temperature(agent, w, args)
    assert w.isfinite().all()
    assert end > 0 or agent.log_temperature.item() == pytest.approx(end)
    assert abs(agent.log_temperature.item()) <= 7
    torch.testing.assert_close(w.sum(0), torch.ones(256))


# ---------------------------------------------------------------------------- candidates


def test_candidates_share_a_latent():
    """a_i = clip(a(s, e)) + noise_scale n_i: one evaluation of the policy for all of them."""
    field = OneStep(lambda z: 0.5 * z, act_dim=2, script=plus)
    args = plus.Args(num_candidates=6, noise_scale=0.1)
    candidates, own, z = plus.propose(field, torch.zeros(4_000, 3), 0.1, args, rng())
    assert candidates.shape == (6, 4_000, 2) and own.shape == z.shape == (4_000, 2)
    assert len(field.calls) == 1 and field.calls[0][1] is z
    assert z.std().item() == pytest.approx(args.prior_std, rel=0.03)
    torch.testing.assert_close(own, 0.5 * z)
    noise = candidates - own.clamp(-1, 1)
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)
    table = torch.corrcoef(torch.cat([noise[..., 0], own[None, :, 0]]))
    assert (table - torch.eye(7)).abs().max() < 0.1


def test_candidates_are_clipped_for_critics_and_environments_alone(monkeypatch):
    """Clipped ones would draw an action at the bound inwards, by 0.4 of the noise."""
    agent, args = make_agent(noise_scale=0.5, num_candidates=64, td_action="sample")
    at_bound = OneStep(lambda z: torch.ones_like(z), act_dim=ACT, script=plus)
    candidates, _, _ = plus.propose(at_bound, torch.zeros(500, OBS), 0.5, args, rng())
    assert candidates.mean().item() == pytest.approx(1, abs=0.01)
    asked = spy(monkeypatch, plus.TwinCritic, "logits")
    imitated = spy(monkeypatch, plus, "update_policy")
    one_update(plus, agent, make_batch(), args, rng())
    taken = plus.act_explore(agent, torch.randn(99, OBS), args, rng())
    assert len(asked) == 3  # at s', in the loss, in acting
    assert {actions.abs().max().item() for (_, _, actions), _ in asked} == {1}
    assert taken.abs().max() <= 1
    (_, _, _, candidates, *_), _ = imitated[0]
    assert candidates.abs().max() > 1


@pytest.mark.parametrize("slope", [2.0, -2.0])
def test_what_is_beyond_the_bounds_comes_back_to_them(slope):
    """Candidates beyond the bound look alike; around it they lead back, inwards if Q does."""
    agent, args = make_agent(act_dim=1, num_candidates=8)
    own, obs, generator = torch.full((500, 1), 5.0), torch.zeros(500, OBS), rng()
    field = OneStep(lambda z: own, act_dim=1, script=plus)
    for _ in range(100):
        candidates, _, _ = plus.propose(field, obs, 0.2, args, generator)
        w = plus.candidate_weights(agent, slope * candidates.clamp(-1, 1).squeeze(-1), args)
        own = own + 0.3 * ((w[:, :, None] * candidates).sum(0) - own)
    end = own.mean().item()
    assert 1 <= end < 1.4 if slope > 0 else end < 0


def test_meanflows_candidates_have_latents_of_their_own():
    field = OneStep(lambda z: 0.5 * z, act_dim=2, script=plus)
    args = plus.Args(num_candidates=6, imitation="meanflow")
    candidates, own, z = plus.propose(field, torch.zeros(4_000, 3), 0.0, args, rng())
    assert own.shape == z.shape == candidates.shape == (6, 4_000, 2)
    torch.testing.assert_close(candidates, (0.5 * z).clamp(-1, 1))
    table = torch.corrcoef(z[..., 0])
    assert (table - torch.eye(6)).abs().max() < 0.1


def test_generate_is_one_jump_from_time_one_to_zero():
    agent, _ = make_agent()
    randomise(agent.policy, 0)
    obs, z = torch.randn(9, OBS), torch.randn(3, 9, ACT)
    expected = meanflow.generate(agent.policy, obs, z, 1)
    torch.testing.assert_close(plus.generate(agent.policy, obs, z), expected)


@pytest.mark.parametrize("imitation", ["regression", "meanflow"])
@pytest.mark.parametrize("td_action", ["sample", "best"])
def test_update_uses_one_generation_for_both_losses(monkeypatch, imitation, td_action):
    """The first candidate or the best is a'; all of them, by their weights, are imitated at s'."""
    agent, args = make_agent(imitation=imitation, td_action=td_action)
    randomise(agent.critic, 1)
    critic, batch = copy.deepcopy(agent.critic), make_batch()
    calls = {
        name: spy(monkeypatch, plus, name)
        for name in ("propose", "critic_loss", "update_policy", "policy_loss")
    }
    one_update(plus, agent, batch, args, rng())
    ((given, (candidates, _, z)),) = calls["propose"]
    assert given[0] is agent.policy and given[1].equal(batch["next_obs"])
    assert given[2] == args.noise_scale
    clipped = candidates.clamp(-1, 1)
    with torch.no_grad():
        scores = critic(batch["next_obs"], clipped).amin(0)
    best = scores.argmax(0)
    rows = torch.arange(BATCH)
    expected = clipped[0] if td_action == "sample" else clipped[best, rows]
    assert calls["critic_loss"][0][0][2].equal(expected)
    assert 0 < (best == 0).float().mean() < 1
    (_, obs, step_z, step_candidates, w, *_), _ = calls["update_policy"][0]
    assert obs.equal(batch["next_obs"]) and step_candidates.equal(candidates) and step_z.equal(z)
    sigma = scores.double().numpy().std(0).mean()
    ours = softmax(scores.double().numpy() / (sigma * 0.4), 0)
    np.testing.assert_allclose(w.numpy(), ours, rtol=1e-3, atol=1e-6)
    (_, loss_obs, loss_z, targets, noise, r, t, _), loss = calls["policy_loss"][0]
    assert loss_obs.equal(batch["next_obs"]) and loss.requires_grad
    assert not any(x.requires_grad for x in (loss_z, targets, noise, r, t))
    if imitation == "regression":
        torch.testing.assert_close(targets, (w[:, :, None] * candidates).sum(0))
        assert loss_z.equal(z)
    else:  # one of them each, not always the best
        gaps = (clipped - targets).abs().amax(-1)
        assert gaps.amin(0).max() == 0 and 0 < (gaps.argmin(0) == best).float().mean() < 1
        assert (r <= t).all() and noise.shape == targets.shape


def test_meanflow_draws_candidates_by_their_weights(monkeypatch):
    """The i-th with probability w_i."""
    agent, args = make_agent(imitation="meanflow")
    candidates = torch.arange(4.0)[:, None, None].expand(4, 20_000, ACT) / 4
    w = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None].expand(4, 20_000)
    calls = spy(monkeypatch, plus, "policy_loss")
    obs, z = torch.zeros(20_000, OBS), torch.zeros(4, 20_000, ACT)
    plus.update_policy(agent, obs, z, candidates, w, args, rng(), plus.policy_loss)
    drawn = (4 * calls[0][0][3][:, 0]).long()
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, w[:, 0], rtol=0, atol=0.015)


# ---------------------------------------------------------------------------- imitation


def test_regression_on_the_mean_is_regression_on_all():
    """grad ||a - sum_i w_i a_i||^2 = sum_i w_i grad ||a - a_i||^2, and so 2 sum_i w_i (a - a_i)."""
    agent, args = make_agent()
    randomise(agent.policy, 0)
    policy = agent.policy
    draw = np.random.default_rng(0)
    obs, z = (torch.tensor(draw.normal(size=(BATCH, n)).astype("f")) for n in (OBS, ACT))
    candidates = torch.tensor(draw.uniform(-1, 1, (8, BATCH, ACT)).astype("f"))
    w = torch.tensor(draw.dirichlet(np.ones(8), BATCH).T.astype("f"))
    targets = (w[:, :, None] * candidates).sum(0)
    loss = plus.policy_loss(policy, obs, z, targets, None, None, None, args)
    a = plus.generate(policy, obs, z)
    assert loss.item() == pytest.approx(((a - targets) ** 2).mean().item())
    of_all = (w[:, :, None] * (a - candidates).square()).sum(0).mean()
    parameters = list(policy.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, of_all))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    free = a.detach().requires_grad_()
    (slope,) = torch.autograd.grad((free - targets).square().mean(), free)
    pull = 2 * (w[:, :, None] * (free - candidates)).sum(0) / free.numel()
    torch.testing.assert_close(slope, pull.detach())


def test_a_small_perturbation_estimates_the_critics_gradient():
    """The weighted mean moves by noise_scale^2 dQ/da / (sigma lambda), as docs derive it."""
    n, noise_scale = 400_000, 0.01
    slope = torch.tensor([2.0, -1.0], dtype=f64)
    noise = torch.randn(n, 1, 2, dtype=f64, generator=rng())
    scores = (noise_scale * noise) @ slope  # (N, 1)
    agent, args = make_agent(temperature_init=3.0)
    w = plus.candidate_weights(agent.double(), scores, args)
    moved = (w[:, :, None] * noise_scale * noise).sum(0)[0]
    sigma = noise_scale * slope.norm()
    expected = noise_scale**2 * slope / (sigma * 3.0)
    torch.testing.assert_close(moved, expected, rtol=0.02, atol=0)
    length = moved.norm().item()
    assert length == pytest.approx(noise_scale / 3.0, rel=0.02)  # whatever Q's units are


def test_meanflow_is_fpmd_ms_loss():
    """With equal weights, whatever z was."""
    agent, args = make_agent(imitation="meanflow")
    randomise(agent.policy, 0)
    draw = rng()
    obs, z, targets, noise = (torch.randn(BATCH, n, generator=draw) for n in (OBS, ACT, ACT, ACT))
    r, t = torch.rand((2, BATCH, 1), generator=draw).sort(0).values
    ours = plus.policy_loss(agent.policy, obs, z, targets, noise, r, t, args)
    ones = torch.ones(BATCH)
    theirs = meanflow.policy_loss(agent.policy, obs, targets, ones, noise, r, t)
    parameters = list(agent.policy.parameters())
    torch.testing.assert_close(ours, theirs)
    for x, y in zip(*(torch.autograd.grad(x, parameters) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y)


# ---------------------------------------------------------------------------- an update


def test_moving_averages_start_equal_and_frozen():
    agent, args = make_agent()
    fast, slow = agent.policy, agent.acting_policy
    assert all(equal(values(fast), values(slow)))
    assert not any(p.requires_grad for p in slow.parameters())
    assert not {id(p) for p in fast.parameters()} & {id(p) for p in slow.parameters()}
    assert agent.log_temperature.exp().item() == pytest.approx(args.temperature_init)
    assert not values(agent.critic.z1)[0].equal(values(agent.critic.z2)[0])
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimized = [p for o in agent.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in trained}


@pytest.mark.parametrize("tau", [0.005, 0.3])
def test_moving_averages_move_by_tau_at_every_update(tau):
    agent, args = make_agent(tau=tau)
    fast, slow = agent.policy, agent.acting_policy
    one_update(plus, agent, make_batch(), args, rng())
    before = values(slow)
    one_update(plus, agent, make_batch(1), args, rng(1))
    for b, f, s in zip(before, values(fast), values(slow), strict=True):
        assert not s.equal(b)
        torch.testing.assert_close(s, (1 - tau) * b + tau * f, rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in slow.parameters())


@pytest.mark.parametrize("setting", [{}, *OTHERS], ids=["default", *NAMES])
def test_steps_are_adams_on_the_two_losses(monkeypatch, setting):
    """One each per update, on this update's gradient alone; neither trains the other's network."""
    agent, args = make_agent(**setting)
    manual = copy.deepcopy(agent.policy), copy.deepcopy(agent.critic)
    sizes = args.policy_lr, args.critic_lr
    betas = args.adam_beta1, 0.999
    assert betas[0] == 0.5
    adams = [torch.optim.Adam(n.parameters(), x, betas) for n, x in zip(manual, sizes, strict=True)]
    calls = [spy(monkeypatch, plus, name) for name in ("policy_loss", "critic_loss")]
    for i in range(3):
        one_update(plus, agent, make_batch(i), args, rng(i))
    recorded = [list(c) for c in calls]
    for i in range(3):
        _, *rest = recorded[0][i][0]
        adams[0].zero_grad()
        plus.policy_loss(manual[0], *rest).backward()
        adams[0].step()
        _, *rest = recorded[1][i][0]
        adams[1].zero_grad()
        manual[1].train()
        plus.critic_loss(manual[1], *rest)[0].backward()
        adams[1].step()
    for network, copied, size in zip((agent.policy, agent.critic), manual, sizes, strict=True):
        for ours, expected in zip(values(network), values(copied), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=size / 100)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in agent.optimizers.items()
    }
    assert steps == {"critic": {3}, "policy": {3}} and agent.updates == 3
    groups = [group for adam in agent.optimizers.values() for group in adam.param_groups]
    assert [group["betas"] for group in groups] == [betas] * 2  # three steps hardly know the second


@pytest.mark.parametrize("setting", [{}, *OTHERS], ids=["default", *NAMES])
def test_metrics_against_numpy(monkeypatch, setting):
    agent, args = make_agent(**setting)
    calls = spy(monkeypatch, plus, "update_policy")
    proposals = spy(monkeypatch, plus, "propose")
    before = agent.log_temperature.item()
    metrics = one_update(plus, agent, make_batch(), args, rng())
    assert metrics.keys() == set(plus.METRICS)
    assert all(x.shape == () and x.isfinite() and not x.requires_grad for x in metrics.values())
    (_, _, _, candidates, w, *_), _ = calls[0]
    kl = numpy_kl(w)
    w = w.double().numpy()
    assert metrics["policy/kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["policy/ess"].item() == pytest.approx((1 / (4 * (w**2).sum(0))).mean(), rel=1e-4)
    spread = candidates.clamp(-1, 1).double().numpy().std(0).mean()
    assert metrics["policy/candidate_spread"].item() == pytest.approx(spread, rel=1e-4)
    step = 0 if args.weights == "best" else 0.01 * (kl - 1)
    assert metrics["policy/temperature"].item() == pytest.approx(math.exp(before + step), rel=1e-5)
    _, (_, own, _) = proposals[0]
    assert 0 < metrics["policy/flow_spread"].item() < 2 * own.std().item()


@pytest.mark.parametrize("imitation", ["regression", "meanflow"])
@pytest.mark.parametrize("prior_std", [0.2, 0.5])
def test_latent_spread_of_a_known_generator(imitation, prior_std):
    """Latents e ~ N(0, prior_std^2) carried to 0.3 + 0.6 e have a std of 0.6 prior_std."""
    field = OneStep(lambda z: 0.3 + 0.6 * z, act_dim=2, script=plus)
    args = plus.Args(imitation=imitation, prior_std=prior_std)
    obs = torch.zeros(20_000, 3)
    _, own, _ = plus.propose(field, obs, 0.4, args, rng())
    spread = plus.latent_spread(field, obs, own, args, rng(1))
    assert spread.item() == pytest.approx(0.6 * prior_std, rel=0.02)
    still = OneStep(lambda z: 0 * z, act_dim=2, script=plus)
    _, own, _ = plus.propose(still, obs, 0.4, args, rng())
    assert plus.latent_spread(still, obs, own, args, rng(1)).item() < 1e-6


def test_bfloat16_generates_but_does_not_rank(monkeypatch):
    selections = spy(monkeypatch, plus, "select_action")
    for precision in "float32", "bfloat16":
        agent, args = make_agent(precision=precision)
        critic = copy.deepcopy(agent.critic)
        metrics = one_update(plus, agent, make_batch(), args, rng())
        assert all(x.isfinite() for x in metrics.values())
        (_, obs, candidates), (actions, scores) = selections[-1]
        with torch.no_grad():
            torch.testing.assert_close(scores, critic(obs, candidates).amin(0))
        assert scores.dtype == actions.dtype == candidates.dtype == torch.float32
    exact, rounded = (inputs[2] for inputs, _ in selections)
    assert 0 < (exact - rounded).abs().max() < 0.1


# ---------------------------------------------------------------------------- acting


@pytest.mark.parametrize("mode", ["explore", "best_of_n", "one_step"])
def test_acting_follows_the_moving_average_and_the_online_critic(mode):
    agent, args = make_agent()
    obs = torch.randn(50, OBS)
    before = act(plus, agent, obs, args, rng(), mode)
    assert before.shape == (50, ACT) and before.abs().max() <= 1 and not before.requires_grad
    other = make_agent(seed=1)[0]
    agent.policy = other.policy
    assert act(plus, agent, obs, args, rng(), mode).equal(before)
    agent.critic = other.critic
    assert act(plus, agent, obs, args, rng(), mode).equal(before) == (mode == "one_step")
    agent.acting_policy = other.policy
    assert not act(plus, agent, obs, args, rng(), mode).isclose(before).all(-1).any()


def test_exploring_ranks_perturbations_and_best_of_n_latents():
    """Both take the best of N by the smaller Q; only exploring adds noise."""
    agent, args = make_agent(noise_scale=0.3)
    randomise(agent.critic, 1)
    obs = torch.randn(200, OBS)
    candidates, _, _ = plus.propose(agent.acting_policy, obs, 0.3, args, rng())
    with torch.no_grad():
        candidates = candidates.clamp(-1, 1)
        best = agent.critic(obs, candidates).amin(0).argmax(0)
    explored = act(plus, agent, obs, args, rng(), "explore")
    assert explored.equal(candidates[best, torch.arange(200)].detach())
    z = 0.5 * torch.randn((4, 200, ACT), generator=rng())
    with torch.no_grad():
        own = plus.generate(agent.acting_policy, obs, z).clamp(-1, 1)
        best = agent.critic(obs, own).amin(0).argmax(0)
    expected = own[best, torch.arange(200)]
    assert act(plus, agent, obs, args, rng(), "best_of_n").equal(expected)


# ---------------------------------------------------------------------------- learning


@pytest.mark.parametrize("imitation", ["regression", SLOW("meanflow")])
@pytest.mark.parametrize("weights", ["softmax", "best"])
@pytest.mark.parametrize("more", [{}, SLOW({"num_atoms": 1})], ids=str)
def test_a_bandit_is_learnt(imitation, weights, more):
    """Reward 1 - 4 |a - a*|^2 / 2 at one state: one step lands at a*, from a start elsewhere."""
    optimum = torch.tensor([0.5, -0.3])
    changes = {"hidden_dim": 24, "num_candidates": 8, "num_atoms": 21, "tau": 0.05}
    changes |= {"critic_lr": 3e-3, "policy_lr": 2e-3, "v_max": 3.0, "normalize_rewards": False}
    agent, args = make_agent(**changes | {"imitation": imitation, "weights": weights} | more)
    generator, n = rng(), 64
    batch = {"obs": torch.zeros(n, OBS), "next_obs": torch.zeros(n, OBS)}
    batch["terminations"] = torch.ones(n)
    start = act(plus, agent, torch.zeros(500, OBS), args, rng(), "one_step")
    for _ in range(800 if "num_atoms" in more else 500):
        batch["actions"] = 2 * torch.rand((n, ACT), generator=generator) - 1
        batch["rewards"] = 1 - 2 * (batch["actions"] - optimum).square().sum(-1)
        one_update(plus, agent, batch, args, generator)
    actions = act(plus, agent, torch.zeros(500, OBS), args, rng(), "one_step")
    error = (actions.mean(0) - optimum).norm()
    assert error < 0.15 < (start.mean(0) - optimum).norm(), error
    q = agent.critic(torch.zeros(1, OBS), optimum[None]).mean()
    assert q.item() == pytest.approx(1, abs=0.15)


def test_a_latent_climbs_its_own_hill():
    """Where nothing couples latents, both of two equal modes stay; docs say what a network does."""
    agent, args = make_agent()
    hills, generator = torch.tensor([-0.6, 0.6]), rng()
    start = 0.5 * torch.randn(2_000, 1, generator=generator)  # an action of each latent
    own = start.clone()
    for _ in range(200):
        noise = torch.randn((8, 2_000, 1), generator=generator)
        candidates = own + 0.1 * noise
        scores = -(candidates - hills).square().amin(-1)
        w = plus.candidate_weights(agent, scores, args)
        own += 0.3 * ((w[:, :, None] * candidates).sum(0) - own)
        plus.update_temperature(agent, w, args)
    assert ((own - hills).abs().amin(-1) < 0.15).float().mean() > 0.95
    far = start.abs() > 0.1
    assert (own.sign() == start.sign())[far].float().mean() > 0.99


@pytest.mark.slow
def test_a_network_does_not_keep_both_hills():
    """Latents share its weights: the larger group drags the other along. Expected, not hidden."""
    agent, args = make_agent(act_dim=1, hidden_dim=32, num_candidates=8, policy_lr=1e-3)
    hills, generator, obs = torch.tensor([-0.6, 0.6]), rng(), torch.zeros(128, OBS)
    for _ in range(1_000):
        with torch.no_grad():
            candidates, _, z = plus.propose(agent.policy, obs, 0.2, args, generator)
            w = plus.candidate_weights(agent, -(candidates - hills).square().amin(-1), args)
        plus.update_policy(agent, obs, z, candidates, w, args, generator, plus.policy_loss)
        plus.update_temperature(agent, w, args)
    z = 0.5 * torch.randn((1_000, 1), generator=generator)
    with torch.no_grad():
        actions = plus.generate(agent.policy, torch.zeros(1_000, OBS), z)
    near = ((actions - hills).abs() < 0.2).float().mean(0)
    assert near.sum() > 0.95 and near.max() > 0.95


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "setting", [{"num_envs": 3}, *map(SLOW, OTHERS)], ids=["num_envs=3", *NAMES]
)
def test_every_setting_trains_and_resumes_exactly(run, setting):
    """The rewards' scale, its running returns and the temperature are part of the state."""
    own = {"target_kl": plus.Args.target_kl} if setting.get("weights") == "best" else {}
    straight = run(env_id="Hopper-v4", total_timesteps=300, **setting, **own)
    resumed = run(env_id="Hopper-v4", total_timesteps=201, **setting, **own)
    before = load(resumed)
    plus.main(plus.Args(**before["args"] | {"resume": str(resumed), "total_timesteps": 300}))
    after = load(resumed)
    assert differences(load(straight), after) == []
    moved = differences(before["agent"], after["agent"])
    assert any(name.startswith("/acting_policy") for name in moved)
    assert any("running_mean" in name for name in moved)
    assert ("/reward_scale.returns" in moved) == setting.get("normalize_rewards", True)


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("setting", OTHERS, ids=NAMES)
def test_every_setting_compiles(setting):
    """To what it computes eagerly, but for rounding."""
    torch._dynamo.reset()
    setting = setting | {"num_candidates": 8}
    (plain, ours), (fast, theirs) = (agent_after(plus, 10, f, **setting) for f in (False, True))
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
