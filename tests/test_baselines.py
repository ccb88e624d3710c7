"""The comparators. SAC: the density of its actions, losses, entropy, who moves by how much. DPMD:
noise schedules, denoising, its loss; the rest of it is FPMD's text, as sync_shared.py says, which
FPMD's tests cover."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import (
    FILES,
    MODES,
    act,
    count,
    equal,
    numpy_mlp,
    numpy_time_embedding,
    one_update,
    randomise,
    rng,
    set_statistics,
    spy,
    to_nearest_mode,
    values,
)
from torch import distributions, nn

import dpmd_online as dpmd
import sac_online as sac

f64 = torch.float64
OBS, ACT, BATCH = 4, 2, 32


def make_agent(script, act_dim=ACT, seed=0, **changes):
    torch.manual_seed(seed)
    args = script.Args(**{"hidden_dim": 16} | changes)
    return script.Agent(OBS, act_dim, args, torch.device("cpu")), args


def make_batch(seed=0):
    draw = np.random.default_rng(seed)
    batch = {key: draw.normal(size=(BATCH, OBS)) for key in ("obs", "next_obs")}
    batch["actions"] = draw.uniform(-1, 1, (BATCH, ACT))
    batch["rewards"] = draw.normal(size=BATCH)
    batch["terminations"] = (np.arange(BATCH) % 3 == 0).astype(float)
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in batch.items()}


def numpy_q(critic, obs, actions):
    """Q_1 and Q_2 in float64: (2, B)."""
    x = np.concatenate([obs, actions], -1)
    return np.stack([numpy_mlp(q, x)[:, 0] for q in (critic.q1, critic.q2)])


# ---------------------------------------------------------------------------- SAC: networks


@pytest.mark.parametrize("activation", ["mish", "gelu", "relu"])
def test_sac_has_the_published_sizes_on_ant(activation):
    """27 observations and 8 actions, three hidden layers of 256, mean and log std in one layer."""
    agent = sac.Agent(27, 8, sac.Args(activation=activation), torch.device("cpu"))
    assert count(agent.policy) == 142_864
    assert count(agent.critic.q1) == count(agent.critic.q2) == 141_057
    assert agent.acting_policy is agent.policy
    trained = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 142_864 + 2 * 141_057 + 1  # and log alpha
    optimized = [p for o in agent.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in trained}


@pytest.mark.parametrize("name, module", [("mish", nn.Mish), ("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_sac_layers(name, module):
    """The activation stands between the linear layers of every network; GELU is the exact one."""
    agent, _ = make_agent(sac, activation=name, hidden_layers=2)
    for net in agent.policy.net, agent.critic.q1, agent.critic.q2, agent.target_critic.q2:
        assert [type(m) for m in net] == [nn.Linear, module] * 2 + [nn.Linear]
        assert all(m.approximate == "none" for m in net if isinstance(m, nn.GELU))
    assert all(equal(values(agent.critic), values(agent.target_critic)))
    assert not any(p.requires_grad for p in agent.target_critic.parameters())


def test_sac_starts_with_the_alpha_it_was_given():
    assert make_agent(sac)[0].log_alpha.item() == pytest.approx(1)  # the release's log alpha
    assert make_agent(sac, alpha_init=0.3)[0].log_alpha.exp().item() == pytest.approx(0.3)


def test_sac_clips_the_log_std():
    """Below and above the range it is the range's end; between, as the network has it."""
    agent, _ = make_agent(sac, log_std_range=(-0.2, 0.1))
    randomise(agent.policy, 1)
    obs = torch.randn(500, OBS, generator=rng())
    with torch.no_grad():
        (mean, log_std), raw = agent.policy(obs), agent.policy.net(obs)
    assert log_std.equal(raw[:, ACT:].clip(-0.2, 0.1)) and log_std.unique().numel() > 10
    assert {log_std.min().item(), log_std.max().item()} == {np.float32(-0.2), np.float32(0.1)}
    assert mean.equal(raw[:, :ACT])


# ---------------------------------------------------------------------------- SAC: density


class Gaussian(nn.Module):
    """A policy with given mean and standard deviation."""

    def __init__(self, mean, std, act_dim=1):
        super().__init__()
        self.mean, self.std, self.act_dim = (torch.as_tensor(x) for x in (mean, std, act_dim))

    def forward(self, obs):
        shape = torch.broadcast_shapes((len(obs), 1), self.mean.shape, self.std.shape)
        return self.mean.expand(shape), self.std.log().expand(shape)


@pytest.mark.parametrize("correction", [True, False])
def test_log_prob_is_that_of_the_squashed_gaussian(correction):
    """Against torch.distributions in float64; without the correction it is the density of u."""
    draw = np.random.default_rng(0)
    mean, std = torch.tensor(draw.normal(size=(64, 3))), torch.tensor(draw.uniform(0.2, 1, (64, 3)))
    e = torch.tensor(draw.normal(size=(64, 3)))
    actions, log_probs = sac.sample(Gaussian(mean, std), torch.zeros(64, 1), e, correction)
    normal, u = distributions.Normal(mean, std), mean + std * e
    squashed = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    expected = squashed.log_prob(actions) if correction else normal.log_prob(u)
    torch.testing.assert_close(actions, u.tanh())
    torch.testing.assert_close(log_probs, expected.sum(-1), rtol=1e-6, atol=1e-6)
    assert (squashed.log_prob(actions) - normal.log_prob(u)).sum(-1).abs().min() > 0.1


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.4), (-1.5, 0.8)])
def test_density_integrates_to_one(mean, std):
    """exp(log pi) over the actions in (-1, 1), by the trapezoidal rule; uncorrected it does not."""
    a = torch.linspace(-1, 1, 400_001, dtype=f64)[1:-1, None]
    e, totals = (a.atanh() - mean) / std, []
    policy = Gaussian(torch.tensor(mean, dtype=f64), torch.tensor(std, dtype=f64))
    for correction in True, False:
        actions, log_probs = sac.sample(policy, torch.zeros(len(a), 1), e, correction)
        torch.testing.assert_close(actions, a)
        totals.append(torch.trapezoid(log_probs.exp(), a.squeeze(-1)).item())
    assert totals[0] == pytest.approx(1, abs=1e-4) and totals[1] < 0.9


def test_log_prob_stays_finite_where_tanh_is_one():
    """Far out log(1 - tanh(u)^2) is 2 log 2 - 2 |u|; so are its gradients finite in float32."""
    mean = torch.tensor([[-60.0], [-15.0], [15.0], [60.0]], requires_grad=True)
    _, log_probs = sac.sample(Gaussian(mean, 1.0), torch.zeros(4, 1), torch.zeros(4, 1), True)
    expected = 2 * mean.abs().squeeze() - 2 * math.log(2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_probs, expected)
    (gradient,) = torch.autograd.grad(log_probs.sum(), mean)
    torch.testing.assert_close(gradient, 2 * mean.sign())


# ---------------------------------------------------------------------------- SAC: acting


def test_sac_acts_by_its_mean_or_by_a_sample():
    """one_step is tanh(mean) and draws nothing; sampled and explore have the density of sample."""
    agent, args = make_agent(sac, act_dim=1)
    agent.acting_policy = Gaussian(0.3, 0.5)
    obs, generator = torch.zeros(20_000, OBS), rng()
    before = generator.get_state()
    mean = act(sac, agent, obs, args, generator, "one_step")
    assert mean.shape == (20_000, 1) and mean.allclose(torch.tensor(0.3).tanh())
    assert generator.get_state().equal(before)
    for mode in "sampled", "explore":
        u = act(sac, agent, obs, args, generator, mode).atanh()
        assert u.mean().item() == pytest.approx(0.3, abs=0.02)  # 0.0035 is one std
        assert u.std().item() == pytest.approx(0.5, abs=0.01)  # 0.0025
    assert list(sac.MODES) == ["one_step", "sampled"] and sac.DEPLOYED == "one_step"
    assert {sac.cost_of(mode, args) for mode in sac.MODES} == {(1, 1)}


# ---------------------------------------------------------------------------- SAC: losses


def test_sac_critic_loss_against_numpy():
    """y = c r + gamma (1 - terminated) (min Q' - alpha log pi); a constant for the gradient."""
    agent, args = make_agent(sac, gamma=0.9, reward_scale=0.7)
    randomise(agent.critic, 1)
    randomise(agent.target_critic, 2)
    batch, next_actions = make_batch(), torch.rand(BATCH, ACT, generator=rng()) * 2 - 1
    bonus = torch.randn(BATCH, generator=rng(1))
    next_actions.requires_grad_(True)
    bonus.requires_grad_(True)
    arguments = agent.critic, agent.target_critic, batch, next_actions, bonus, args
    loss, q = sac.critic_loss(*arguments)
    b = {key: value.double().numpy() for key, value in batch.items()}
    next_q = numpy_q(agent.target_critic, b["next_obs"], next_actions.detach().double().numpy())
    bonus_ = bonus.detach().double().numpy()
    y = 0.7 * b["rewards"] + 0.9 * (1 - b["terminations"]) * (next_q.min(0) + bonus_)
    expected = numpy_q(agent.critic, b["obs"], b["actions"])
    assert loss.item() == pytest.approx(((expected - y) ** 2).mean(1).sum(), rel=1e-5)
    np.testing.assert_allclose(q.numpy(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert next_actions.grad is None and bonus.grad is None and not q.requires_grad
    assert np.abs(next_q[0] - next_q[1]).min() < np.abs(next_q[0] - next_q[1]).max()


def test_sac_distributional_loss_against_a_loop():
    """Atoms moved by reward and bonus, shared by their neighbours; the smaller mean's critic."""
    changes = {"gamma": 0.9, "reward_scale": 0.7, "num_atoms": 11, "v_max": 2.0}
    agent, args = make_agent(sac, **changes)
    randomise(agent.critic, 1)
    randomise(agent.target_critic, 2)
    batch, next_actions = make_batch(), torch.rand(BATCH, ACT, generator=rng()) * 2 - 1
    bonus = torch.randn(BATCH, generator=rng(1), requires_grad=True)
    loss, q = sac.critic_loss(agent.critic, agent.target_critic, batch, next_actions, bonus, args)
    atoms = np.linspace(-2, 2, 11)
    with torch.no_grad():
        following = agent.target_critic.logits(batch["next_obs"], next_actions).double()
        logits = agent.critic.logits(batch["obs"], batch["actions"]).double()
    p, log_p = following.softmax(-1).numpy(), logits.log_softmax(-1).numpy()
    expected = 0.0
    for i in range(BATCH):
        j = int(np.argmin(p[:, i] @ atoms))
        target = np.zeros(11)
        for k, mass in enumerate(p[j, i]):
            future = 0.9 * (1 - batch["terminations"][i].item()) * (atoms[k] + bonus[i].item())
            place = (np.clip(0.7 * batch["rewards"][i].item() + future, -2, 2) + 2) / 0.4
            below = min(int(place), 9)
            target[below] += mass * (below + 1 - place)
            target[below + 1] += mass * (place - below)
        expected -= (target * log_p[:, i]).sum() / BATCH
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(q, logits.softmax(-1).numpy() @ atoms, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert bonus.grad is None and not q.requires_grad


def test_sac_with_batch_norm_needs_no_target_critics():
    """Its averages move in the critics' step alone, by (s, a) and (s', a') as one batch."""
    agent, args = make_agent(sac, num_atoms=11, critic_batch_norm=True)
    assert agent.target_critic is agent.critic
    batch = make_batch()
    _, next_e = torch.randn((2, BATCH, ACT), generator=rng())
    with torch.no_grad():
        next_actions, _ = sac.sample(agent.policy, batch["next_obs"], next_e, True)
    seen = torch.cat(
        [
            torch.cat([batch["obs"], batch["actions"]], 1),
            torch.cat([batch["next_obs"], next_actions], 1),
        ]
    )
    sac.update(agent, batch, args, rng(), True)
    norm = agent.critic.norm
    torch.testing.assert_close(norm.running_mean, 0.01 * seen.mean(0))
    torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * seen.var(0))
    names = [type(module).__name__ for module in agent.critic.q1]
    assert names == [*["Linear", "BatchNorm", "Mish"] * 3, "Linear"]
    before = norm.running_mean.clone()
    sac.policy_loss(agent.policy, agent.critic, batch["obs"], next_e, torch.tensor(0.1), True)
    assert norm.running_mean.equal(before)


def test_sac_learns_from_rewards_divided_by_their_scale():
    """An update with scale 4 is one without on quarter rewards; Q is logged in raw ones."""
    after, metrics = [], []
    for scale, factor in (4.0, 1.0), (1.0, 0.25):
        agent, args = make_agent(sac, num_atoms=11, normalize_rewards=True)
        agent.reward_scale.scale.fill_(scale)
        batch = make_batch()
        batch["rewards"] = factor * batch["rewards"]
        metrics.append(sac.update(agent, batch, args, rng(), True))
        after.append(torch.cat([x.flatten() for x in agent.critic.parameters()]))
    torch.testing.assert_close(*after)
    logged, divided = metrics
    torch.testing.assert_close(logged["losses/q_values"], 4 * divided["losses/q_values"])
    assert logged["charts/reward_scale"].item() == 4
    agent.reward_scale.scale.fill_(7.0)
    assert divided["charts/reward_scale"].item() == 1, "the log's number is the agent's own tensor"
    assert not torch.equal(
        after[0], torch.cat([x.flatten() for x in agent.target_critic.parameters()])
    )


@pytest.mark.parametrize("correction", [True, False])
def test_sac_policy_loss_against_numpy(correction):
    """mean of alpha log pi - min(Q_1, Q_2) at the reparameterised action, and the entropy."""
    agent, _ = make_agent(sac, log_std_range=(-1.0, 1.0))
    randomise(agent.policy, 1)
    randomise(agent.critic, 2)
    obs, e = make_batch()["obs"], 0.5 * torch.randn(BATCH, ACT, generator=rng())
    alpha = torch.tensor(0.4)
    loss, entropy = sac.policy_loss(agent.policy, agent.critic, obs, e, alpha, correction)
    output, e = numpy_mlp(agent.policy.net, obs.double().numpy()), e.double().numpy()
    std = np.exp(output[:, ACT:].clip(-1, 1))
    a = np.tanh(output[:, :ACT] + std * e)
    log_prob = -0.5 * e**2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    log_prob = (log_prob - correction * np.log1p(-(a**2))).sum(-1)
    q = numpy_q(agent.critic, obs.double().numpy(), a)
    assert entropy.item() == pytest.approx(-log_prob.mean(), rel=1e-3)
    assert loss.item() == pytest.approx((0.4 * log_prob - q.min(0)).mean(), rel=1e-3)
    assert np.abs(q[0] - q[1]).mean() > 0.1  # the twins do disagree on this batch


def test_sac_policy_gradient_against_finite_differences():
    """Through the action into the policy: along random directions, as central differences."""
    agent, _ = make_agent(sac, activation="gelu", log_std_range=(-9.0, 9.0))
    policy, critic = agent.policy.double(), agent.critic.double()
    obs, e = make_batch()["obs"].double(), torch.randn(BATCH, ACT, dtype=f64, generator=rng())
    arguments, parameters = (critic, obs, e, 0.4, True), list(policy.parameters())
    gradients = torch.autograd.grad(sac.policy_loss(policy, *arguments)[0], parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, losses = torch.randn(parameter.shape, dtype=f64, generator=rng(1)), []
        with torch.no_grad():
            for step in 1e-5, -2e-5:  # forwards, then back past the start
                parameter += step * direction
                losses.append(sac.policy_loss(policy, *arguments)[0].item())
            parameter += 1e-5 * direction
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


# ---------------------------------------------------------------------------- SAC: updates


@pytest.mark.parametrize("changes, beta1", [({}, 0.9), ({"adam_beta1": 0.5}, 0.5)])
def test_optimizers_average_as_told(changes, beta1):
    agent, _ = make_agent(sac, **changes)
    groups = [group for adam in agent.optimizers.values() for group in adam.param_groups]
    assert [group["betas"] for group in groups] == [(beta1, 0.999)] * 3


@pytest.mark.parametrize("entropy, moves", [(-1.0, -1), (-2.0, 0), (-2.5, 1)])
def test_alpha_moves_towards_the_target_entropy(entropy, moves):
    """More entropy than -act_dim: alpha falls; less: it grows, by Adam's first step."""
    agent, args = make_agent(sac)
    before = agent.log_alpha.item()
    sac.update_alpha(agent, torch.tensor(entropy), args)
    step = agent.log_alpha.item() - before
    assert step == pytest.approx(moves * args.alpha_lr, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_alpha_settles_where_the_entropy_is_the_target(scale):
    """With an entropy that grows with alpha, here log alpha, the fixed point is -scale * d."""
    agent, args = make_agent(sac, alpha_lr=0.03, target_entropy_scale=scale)
    for _ in range(1_000):
        sac.update_alpha(agent, agent.log_alpha.detach().clone(), args)
    assert agent.log_alpha.item() == pytest.approx(-scale * ACT, abs=0.01)


@pytest.mark.parametrize("correction", [True, False])
def test_sac_update_hands_over_the_right_numbers(correction, monkeypatch):
    """New actions at s' and at s by the policy before its step, alpha before its own."""
    agent, args = make_agent(sac, tanh_correction=correction, alpha_init=0.7)
    randomise(agent.policy, 1)
    policy, batch = copy.deepcopy(agent.policy), make_batch()
    critic_calls = spy(monkeypatch, sac, "critic_loss")
    policy_calls = spy(monkeypatch, sac, "policy_loss")
    alpha_calls = spy(monkeypatch, sac, "update_alpha")
    metrics = one_update(sac, agent, batch, args, rng())
    e, next_e = torch.randn((2, BATCH, ACT), generator=rng())
    with torch.no_grad():
        actions, log_probs = sac.sample(policy, batch["next_obs"], next_e, correction)
        _, at_s = sac.sample(policy, batch["obs"], e, correction)
    (_, _, _, next_actions, bonus, _), _ = critic_calls[0]
    assert next_actions.equal(actions) and not bonus.requires_grad
    torch.testing.assert_close(bonus, -0.7 * log_probs)
    (_, critic, obs, noise, alpha, flag), (loss, entropy) = policy_calls[0]
    assert critic is agent.critic and obs.equal(batch["obs"]) and noise.equal(e)
    assert alpha.item() == pytest.approx(0.7) and not alpha.requires_grad and flag is correction
    torch.testing.assert_close(entropy, -at_s.mean())
    assert alpha_calls[0][0][1].equal(entropy) and not alpha_calls[0][0][1].requires_grad
    assert metrics["losses/policy_loss"].equal(loss) and agent.updates == 1
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())


def test_sac_losses_train_their_own_networks(monkeypatch):
    """Without the critics' step the critics stay bit-identical, without the policy's the policy."""
    for frozen, moving in ("critic", "policy"), ("policy", "critic"):
        agent, args = make_agent(sac)
        monkeypatch.setattr(agent.optimizers[frozen], "step", lambda: None)
        old = {name: values(module) for name, module in agent.named_children()}
        one_update(sac, agent, make_batch(), args, rng())
        assert all(equal(old[frozen], values(getattr(agent, frozen))))
        assert not any(equal(old[moving], values(getattr(agent, moving))))


def test_the_policys_loss_leaves_no_gradient_in_the_critics(monkeypatch):
    """After an update the critics hold the gradient of their own loss and nothing more."""
    agent, args = make_agent(sac)
    critic, calls = copy.deepcopy(agent.critic), spy(monkeypatch, sac, "critic_loss")
    target, batch = copy.deepcopy(agent.target_critic), make_batch()
    one_update(sac, agent, batch, args, rng())
    (_, _, _, *rest), _ = calls[0]
    loss, _ = sac.critic_loss(critic, target, batch, *rest)
    expected = torch.autograd.grad(loss, list(critic.parameters()))
    for p, gradient in zip(agent.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert all(p.grad is None for p in agent.target_critic.parameters())


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_sac_optimizer_steps_and_target_critics(critic_steps):
    """Per update critic_steps steps of the critics, one of policy and alpha; Q' moves by tau."""
    agent, args = make_agent(sac, critic_steps=critic_steps, tau=0.3)
    for update in range(3):
        old = values(agent.target_critic)
        one_update(sac, agent, make_batch(update), args, rng(update))
        new, fast = values(agent.target_critic), values(agent.critic)
        for before, after, f in zip(old, new, fast, strict=True):
            torch.testing.assert_close(after, 0.7 * before + 0.3 * f, rtol=1e-5, atol=1e-6)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in agent.optimizers.items()
    }
    assert steps == {"critic": {3 * critic_steps}, "policy": {3}, "alpha": {3}}


# ---------------------------------------------------------------------------- DPMD: FPMD's twin


def test_dpmd_has_fpmds_size_and_defaults():
    """The noise predictor has the shape of FPMD-R's velocity field; what both can set is equal."""
    import fpmd_online as fpmd

    agent = dpmd.Agent(27, 8, dpmd.Args(), torch.device("cpu"))
    assert count(agent.policy) == 148_024 and count(agent.critic.q1) == 141_057
    ours, theirs = vars(dpmd.Args()), vars(fpmd.Args())
    assert set(ours) - set(theirs) == {"beta_schedule"}
    assert set(theirs) - set(ours) <= {"particle_temperature"}
    assert {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]} == {"exp_name"}
    assert not [key for key in agent.state_dict() if "alpha_bar" in key]


# ---------------------------------------------------------------------------- DPMD: schedules


def numpy_schedule(kind, steps):
    """betas and alpha_bar of the two papers' code."""
    if kind == "linear":
        betas = 0.8 * np.linspace(1e-4, 0.999, steps)
    else:
        f = [math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(steps + 1)]
        betas = np.array([min(1 - f[k + 1] / f[k], 0.999) for k in range(steps)])
    return betas, np.cumprod(1 - betas)


SCHEDULES = pytest.mark.parametrize("kind", ["cosine", "linear"])


@SCHEDULES
@pytest.mark.parametrize("steps", [4, 20])
def test_noise_schedule_against_numpy(kind, steps):
    """And it falls from nearly all signal to nearly none."""
    betas, alpha_bar = numpy_schedule(kind, steps)
    ours = dpmd.noise_schedule(kind, steps)
    np.testing.assert_allclose(ours.numpy(), alpha_bar, rtol=1e-10)
    assert betas.min() > 0 and betas.max() < 1 and (np.diff(alpha_bar) < 0).all()
    if steps == 20:
        assert alpha_bar[0] > 0.98 and alpha_bar[-1] < 1e-3


@SCHEDULES
def test_the_flag_chooses_the_schedule(kind):
    """The agent's policy and its moving average denoise, and learn, with the schedule asked for."""
    agent, _ = make_agent(dpmd, beta_schedule=kind)
    for policy in agent.policy, agent.acting_policy:
        np.testing.assert_allclose(policy.signal, numpy_schedule(kind, 20)[1], rtol=1e-10)
        np.testing.assert_allclose(policy.alpha_bar.numpy(), policy.signal, rtol=1e-5)


# ---------------------------------------------------------------------------- DPMD: denoising


class Field(nn.Module):
    """A noise predictor given by a formula of (x, k) that remembers the levels it was asked at."""

    def __init__(self, formula, kind="cosine", steps=5, act_dim=1):
        super().__init__()
        self.formula, self.act_dim, self.levels = formula, act_dim, []
        self.alpha_bar = torch.tensor(numpy_schedule(kind, steps)[1])
        self.signal = self.alpha_bar.tolist()

    def forward(self, obs, x, k):
        self.levels.append(k.item())
        return self.formula(x, k.item())


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_denoising_against_ddpm(kind, steps):
    """x_{k-1} from the posterior's mean and variance by their textbook formulas, down to 0."""
    field = Field(lambda x, k: torch.sin(3 * x) + 0.1 * k, kind, steps)
    x, noise = torch.randn(7, 1, dtype=f64), torch.randn(steps - 1, 7, 1, dtype=f64)
    actions = dpmd.generate(field, torch.zeros(7, 3), x, noise)
    (betas, alpha_bar), z = numpy_schedule(kind, steps), x.numpy()
    for i, k in enumerate(range(steps - 1, -1, -1)):
        eps, before = np.sin(3 * z) + 0.1 * k, alpha_bar[k - 1] if k else 1.0
        x_0 = z / np.sqrt(alpha_bar[k]) - eps * np.sqrt(1 / alpha_bar[k] - 1)
        x_0 = np.clip(x_0, -1, 1)
        mean = betas[k] * np.sqrt(before) / (1 - alpha_bar[k]) * x_0
        mean += (1 - before) * np.sqrt(1 - betas[k]) / (1 - alpha_bar[k]) * z
        variance = betas[k] * (1 - before) / (1 - alpha_bar[k])
        z = mean + np.sqrt(variance) * (noise[i].numpy() if k else 0)
    np.testing.assert_allclose(actions.numpy(), z, rtol=1e-9, atol=1e-9)
    assert field.levels == list(range(steps - 1, -1, -1))


@SCHEDULES
@pytest.mark.parametrize("given", [0, 1, 19])
def test_an_oracle_lands_on_its_point(kind, given):
    """All actions at one point a: the noise is (x - sqrt(A) a) / sqrt(1 - A), from any level."""
    a, signal = torch.tensor([0.3, -0.8], dtype=f64), numpy_schedule(kind, 20)[1]

    def formula(x, k):
        return (x - signal[k] ** 0.5 * a) / (1 - signal[k]) ** 0.5

    field, noise = Field(formula, kind, 20, 2), torch.randn(given, 9, 2, dtype=f64)
    actions = dpmd.generate(field, torch.zeros(9, 3), torch.randn(9, 2, dtype=f64), noise)
    torch.testing.assert_close(actions, a.expand(9, 2), rtol=1e-9, atol=1e-9)
    assert field.levels == list(range(19, 18 - given, -1))


def dpmd_agent(**changes):
    return make_agent(dpmd, **{"num_candidates": 3, "flow_steps": 5, "prior_std": 0.7} | changes)


def calls_of(agent):
    """How often each network is asked, in the order of the names."""
    calls = {name: [] for name in ("acting_policy", "policy", "critic", "target_critic")}
    for name, seen in calls.items():
        getattr(agent, name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
    return calls


@pytest.mark.parametrize(
    "mode, asked",
    [("one_step", [1, 0]), ("one_candidate", [5, 0]), ("best_of_n", [5, 1]), ("explore", [5, 1])],
)
def test_dpmd_modes_cost_what_they_say(mode, asked):
    """Evaluations of the acting policy and of the online critic, none of the others."""
    agent, args = dpmd_agent()
    calls = calls_of(agent)
    actions = act(dpmd, agent, torch.randn(50, OBS), args, rng(), mode)
    assert [len(seen) for seen in calls.values()] == [asked[0], 0, asked[1], 0]
    assert actions.shape == (50, ACT) and actions.abs().max() <= 1 and not actions.requires_grad
    if mode != "explore":
        assert dpmd.cost_of(mode, args) == (asked[0], 3 if mode == "best_of_n" else 1)
    assert dpmd.DEPLOYED == next(iter(dpmd.MODES)) == "one_candidate"


def test_one_step_is_the_action_predicted_from_noise():
    """x_0 in the highest level's noise alone: (x - sqrt(1 - A) eps(s, x, T-1)) / sqrt(A)."""
    agent, args = dpmd_agent()
    obs, inputs = torch.randn(5_000, OBS), []
    agent.acting_policy.register_forward_pre_hook(lambda _, call: inputs.append(call))
    actions = act(dpmd, agent, obs, args, rng(), "one_step")
    (_, x, k), signal = inputs[0], numpy_schedule("cosine", 5)[1][-1]
    assert len(inputs) == 1 and k.item() == 4
    assert x.std().item() == pytest.approx(0.7, rel=0.03)  # 10,000 draws: 0.7 %
    with torch.no_grad():
        eps = agent.acting_policy(obs, x, torch.tensor([4]))
    expected = ((x - (1 - signal) ** 0.5 * eps) / signal**0.5).reshape(5_000, ACT)
    torch.testing.assert_close(actions, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_dpmd_noise_is_independent_and_of_the_right_size():
    """prior_std on the first level, 1 on the others, std on every candidate after the last."""
    args, obs = dpmd.Args(num_candidates=4, flow_steps=3, prior_std=0.2), torch.zeros(4_000, 3)
    seen = []
    field = Field(lambda x, k: seen.append(x) or torch.zeros_like(x), "linear", 3)
    plain = dpmd.propose(field, obs, 0.0, args, rng())
    noisy = dpmd.propose(field, obs, 0.15, args, rng())
    exploration, start = noisy - plain, seen[0]
    assert plain.shape == (4, 4_000, 1) and plain.abs().max() <= 1 < noisy.abs().max()
    assert start.std().item() == pytest.approx(0.2, rel=0.03)  # 16,000 draws: 0.6 %
    assert exploration.std().item() == pytest.approx(0.15, rel=0.03)
    both = torch.cat([start, plain, exploration]).squeeze(-1)
    correlations = torch.corrcoef(both)  # a candidate's actions follow from its own start
    correlations[torch.arange(4), torch.arange(4, 8)] = 0
    correlations[torch.arange(4, 8), torch.arange(4)] = 0
    assert (correlations - torch.eye(12)).abs().max() < 0.08  # five std of 4,000 draws


def test_exploring_adds_alpha_times_noise_scale():
    """explore is best_of_n with the noise of the schedule on every candidate, then clipped."""
    agent, args = dpmd_agent(num_candidates=1, alpha_init=4.0, noise_scale=0.02)
    agent.acting_policy = Field(lambda x, k: x / 2, "linear", 5, ACT)  # most actions inside
    obs = torch.zeros(5_000, OBS)
    quiet, noisy = (act(dpmd, agent, obs, args, rng(), mode) for mode in ("best_of_n", "explore"))
    inside = (quiet.abs() < 0.6).all(-1)
    assert inside.float().mean() > 0.2
    assert (noisy - quiet)[inside].std().item() == pytest.approx(0.08, rel=0.06)


# ---------------------------------------------------------------------------- DPMD: learning


@SCHEDULES
def test_dpmd_policy_loss_against_numpy(kind):
    """w || eps(s, x_k, k) - e ||^2 at x_k = sqrt(A_k) a + sqrt(1 - A_k) e, mean over all."""
    agent, _ = make_agent(dpmd, beta_schedule=kind)
    policy, draw = agent.policy, np.random.default_rng(0)
    randomise(policy, 1)
    obs, a, e = (draw.normal(size=(BATCH, n)) for n in (OBS, ACT, ACT))
    w, k = draw.uniform(0.1, 3, BATCH), draw.integers(0, 20, (BATCH, 1))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (obs, a, w, e)]
    loss = dpmd.policy_loss(policy, *tensors, torch.tensor(k))
    signal = numpy_schedule(kind, 20)[1][k]
    x = np.sqrt(signal) * a + np.sqrt(1 - signal) * e
    embedding = numpy_mlp(policy.time_mlp, numpy_time_embedding(k))
    eps = numpy_mlp(policy.net, np.concatenate([obs, embedding, x], -1))
    assert loss.item() == pytest.approx(np.mean(w[:, None] * (eps - e) ** 2), rel=1e-5)


def test_dpmd_update_hands_over_the_right_numbers(monkeypatch):
    """At s' with the TD action, FPMD's weights, levels uniform over 0..T-1, noise N(0, I)."""
    agent, args = dpmd_agent(num_candidates=4, alpha_init=2.0)
    set_statistics(agent, 0.3, 0.6)
    batch = {key: x.repeat_interleave(200, 0) for key, x in make_batch().items()}
    policy_calls = spy(monkeypatch, dpmd, "policy_loss")
    critic_calls = spy(monkeypatch, dpmd, "critic_loss")
    selections = spy(monkeypatch, dpmd, "select_action")
    proposals = spy(monkeypatch, dpmd, "propose")
    before, statistics = values(agent.critic), torch.stack([agent.q_mean, agent.q_std])
    metrics = one_update(dpmd, agent, batch, args, rng())
    (policy, obs, actions, w, noise, k), _ = policy_calls[0]
    (best, scores) = selections[0][1]
    assert policy is agent.policy is proposals[0][0][0] and len(proposals) == 1
    assert proposals[0][0][2].item() == pytest.approx(0.2)  # alpha noise_scale
    assert obs.equal(batch["next_obs"]) and actions.equal(best)
    assert critic_calls[0][0][3].equal(best) and not any(equal(before, values(agent.critic)))
    q = scores.amax(0)
    torch.testing.assert_close(w, len(q) * (q / (0.6 * 3)).softmax(0))
    assert not any(x.requires_grad for x in (actions, w, noise, k)) and w.std() > 0
    assert k.shape == (6_400, 1) and noise.std().item() == pytest.approx(1, abs=0.04)
    assert (torch.bincount(k[:, 0], minlength=5) - 1_280).abs().max() < 160  # five std
    now = torch.stack([q.mean(), q.std(correction=0)])
    after = torch.stack([agent.q_mean, agent.q_std])
    torch.testing.assert_close(after, statistics.lerp(now, args.q_stats_rate))
    ess = w.sum() ** 2 / (len(w) * (w**2).sum())
    assert metrics["policy/ess"].item() == pytest.approx(ess.item(), rel=1e-4)
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())


def test_dpmd_losses_train_their_own_networks():
    """Policy and moving averages move at every second update, the critics at every one."""
    agent, args = dpmd_agent()
    for update in range(3):
        old = {name: values(module) for name, module in agent.named_children()}
        metrics = one_update(dpmd, agent, make_batch(update), args, rng(update))
        same = {name: equal(old[name], values(module)) for name, module in agent.named_children()}
        assert not any(same.pop("critic"))
        for name, tensors in same.items():
            assert any(tensors) == (update % 2 != 0) == all(tensors), name
        assert ("losses/policy_loss" in metrics) == (update % 2 == 0)
    steps = {int(s["step"]) for s in agent.optimizers["critic"].state.values()}
    assert steps == {3 * args.critic_steps}


@SCHEDULES
@pytest.mark.parametrize("prior_std", [0.5, 1.0])
def test_an_oracle_lands_on_four_points(kind, prior_std):
    """With the exact mean action in x_k, softmax weights of the points, all four are found."""
    signal, noise = numpy_schedule(kind, 20)[1], torch.randn(20, 2_000, 2, generator=rng())

    def formula(x, k):
        gaps = (x[..., None, :] - signal[k] ** 0.5 * MODES).square().sum(-1)
        mean = (-gaps / (2 * (1 - signal[k]))).softmax(-1) @ MODES
        return (x - signal[k] ** 0.5 * mean) / (1 - signal[k]) ** 0.5

    field = Field(formula, kind, 20, 2)
    actions = dpmd.generate(field, torch.zeros(2_000, 3), prior_std * noise[0], noise[1:])
    gap, shares = to_nearest_mode(actions)
    assert gap < 0.01 and shares.min() > 0.2


@pytest.mark.slow
def test_dpmd_finds_four_points():
    """A network fitted to the points finds all in twenty steps; in one step it does not.

    With cosine levels: at the lowest linear ones small networks take much longer to fit.
    """
    torch.manual_seed(0)
    agent, args = make_agent(dpmd, hidden_dim=64, prior_std=1.0)
    policy, updates = agent.policy, 3_000
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for update in range(updates):
        points, k = MODES[torch.randint(4, (256,))], torch.randint(20, (256, 1))
        noise = torch.randn(256, ACT)
        loss = dpmd.policy_loss(policy, torch.zeros(256, OBS), points, torch.ones(256), noise, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        optimizer.step()
    agent.acting_policy, obs = policy, torch.zeros(2_000, OBS)
    gap, shares = to_nearest_mode(act(dpmd, agent, obs, args, rng(), "one_candidate"))
    assert gap < 0.15 and shares.min() > 0.1
    assert to_nearest_mode(act(dpmd, agent, obs, args, rng(), "one_step"))[0] > 2 * gap


def test_all_scripts_are_under_test():
    """Those of the top folder, and the baselines."""
    assert {"sac_online", "dpmd_online", "fpmd_online", "mvp_online"} <= set(FILES)
