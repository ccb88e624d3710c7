"""One gradient update of FPMD: who moves by how much, reference values, schedules, statistics."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import (
    act,
    count,
    equal,
    first_weight,
    fpmd_only,
    get_statistics,
    layers,
    numpy_mlp,
    one_update,
    randomise,
    rng,
    set_statistics,
    spy,
    values,
)

torch.set_num_threads(1)
pytestmark = fpmd_only

OBS, ACT, BATCH = 4, 2, 32
MODES = ["temperature", "clip_alpha", "none", "particles"]


def make_agent(script, act_dim=ACT, seed=0, **changes):
    torch.manual_seed(seed)
    args = script.Args(**{"hidden_dim": 16, "num_candidates": 4, "flow_steps": 3} | changes)
    return script.Agent(OBS, act_dim, args, torch.device("cpu")), args


def make_batch(seed=0, dtype=torch.float32):
    draw = np.random.default_rng(seed)
    batch = {key: draw.normal(size=(BATCH, OBS)) for key in ("obs", "next_obs")}
    batch["actions"] = draw.uniform(-1, 1, (BATCH, ACT))
    batch["rewards"] = draw.normal(size=BATCH)
    batch["terminations"] = (np.arange(BATCH) % 3 == 0).astype(float)
    return {key: torch.tensor(value, dtype=dtype) for key, value in batch.items()}


# ---------------------------------------------------------------------------- sizes


def test_parameter_counts_on_ant(script):
    """The published networks: 27 observations and 8 actions of Ant-v4, hidden layers of 256."""
    agent = script.Agent(27, 8, script.Args(), torch.device("cpu"))
    policy = {"fpmd_online": 148_024, "fpmd_meanflow_online": 153_192}[script.__name__]
    assert count(agent.critic.q1) == count(agent.critic.q2) == 141_057
    assert count(agent.policy) == policy
    trained = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == policy + 2 * 141_057 + 1  # policy, twins, log alpha
    optimized = [p for o in agent.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in trained}


def test_critic_layer_norm_stands_before_every_activation(script):
    """Linear, LayerNorm, Mish in each hidden layer of the critics, none where it is not asked."""
    agent, _ = make_agent(script, critic_layer_norm=True)
    plain, _ = make_agent(script)
    for critic in agent.critic, agent.target_critic:
        for net in critic.q1, critic.q2:
            names = [type(module).__name__ for module in layers(net)]
            assert names == ["FirstLayer", *["LayerNorm", "Mish", "Linear"] * 3]
            assert count(net) == count(plain.critic.q1) + 3 * 2 * 16
    for module in *plain.modules(), *agent.policy.modules():
        assert type(module).__name__ != "LayerNorm"


def test_moving_averages_start_equal_and_frozen(script):
    """Targets begin as copies that no optimizer and no gradient touches; the twins differ."""
    agent, _ = make_agent(script)
    pairs = (agent.policy, agent.acting_policy), (agent.critic, agent.target_critic)
    for fast, slow in pairs:
        assert all(equal(values(fast), values(slow)))
        assert not any(p.requires_grad for p in slow.parameters())
        assert not {id(p) for p in fast.parameters()} & {id(p) for p in slow.parameters()}
    assert not first_weight(agent.critic.q1).equal(first_weight(agent.critic.q2))


# ---------------------------------------------------------------------------- isolation


def test_update_policy_is_the_policys_alone(script):
    """Its gradient reaches every parameter of the policy and no other; its EMA moves as well."""
    agent, args = make_agent(script)
    before = {name: values(module) for name, module in agent.named_children()}
    alpha = agent.log_alpha.item()
    arguments = torch.randn(BATCH, OBS), torch.randn(BATCH, ACT), torch.ones(BATCH)
    metrics = script.update_policy(agent, *arguments, args, rng())
    assert not any(x.requires_grad for x in metrics.values()) and agent.log_alpha.item() == alpha
    moved = {
        name for name, old in before.items() if not all(equal(old, values(getattr(agent, name))))
    }
    assert moved == {"policy", "acting_policy"}
    with_gradient = {
        name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None
    }
    assert with_gradient == {"policy"} and all(p.grad.any() for p in agent.policy.parameters())


def test_critic_step_leaves_the_policy_alone(script):
    """Between policy updates neither policy nor moving averages move, the critic always does."""
    agent, args = make_agent(script, policy_delay=3)
    for update in range(7):
        old = {name: values(module) for name, module in agent.named_children()}
        metrics = one_update(script, agent, make_batch(update), args, rng(update))
        same = {name: equal(old[name], values(module)) for name, module in agent.named_children()}
        assert not any(same.pop("critic"))
        for name, tensors in same.items():
            assert any(tensors) == (update % 3 != 0) == all(tensors), name
        assert ("losses/policy_loss" in metrics) == (update % 3 == 0)
    assert agent.updates == 7


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_gets_constants(script, mode, monkeypatch):
    """Neither targets nor weights carry a gradient, or the policy step would train the critics."""
    agent, args = make_agent(script, weight_mode=mode)
    calls = spy(monkeypatch, script, "policy_loss")
    one_update(script, agent, make_batch(), args, rng())
    (_, obs, actions, w, *noise_and_times), loss = calls[0]
    assert not any(x.requires_grad for x in (obs, actions, w, *noise_and_times))
    assert loss.requires_grad and len(noise_and_times) >= 2
    assert actions.abs().max() <= 1 and w.shape == (BATCH,)


def test_policy_trains_at_the_next_state_with_the_td_action(script, monkeypatch):
    """One generation serves both losses: s' and its best of N; noise is N(0, I), whatever the time.

    How times are drawn is in test_flow.py and test_meanflow.py.
    """
    agent, args = make_agent(script)
    critic_calls = spy(monkeypatch, script, "critic_loss")
    policy_calls = spy(monkeypatch, script, "policy_loss")
    generations = spy(monkeypatch, script, "generate")
    batch = {key: x.repeat_interleave(200, 0) for key, x in make_batch().items()}
    one_update(script, agent, batch, args, rng())
    (_, obs, actions, _, noise, *times), _ = policy_calls[0]
    assert len(generations) == 1 and generations[0][0][0] is agent.policy
    assert obs.equal(batch["next_obs"]) and actions.equal(critic_calls[0][0][3])
    assert noise.shape == actions.shape
    assert noise.std().item() == pytest.approx(1, abs=0.04)  # 12,800 draws: 0.6 %
    for t in times:
        assert t.shape == (6_400, 1)
        assert abs(torch.corrcoef(torch.cat([t, noise], 1).T)[0, 1:]).max() < 0.06  # 1.2 %


@pytest.mark.parametrize("tau", [0.005, 0.3])
def test_moving_averages_move_by_tau(script, tau):
    """slow <- (1 - tau) slow + tau fast with the fast weights after their step."""
    agent, args = make_agent(script, tau=tau)
    one_update(script, agent, make_batch(), args, rng())  # fast and slow part
    pairs = (agent.policy, agent.acting_policy), (agent.critic, agent.target_critic)
    old = [values(slow) for _, slow in pairs]
    one_update(script, agent, make_batch(1), args, rng(1))  # moves the critic alone
    one_update(script, agent, make_batch(2), args, rng(2))
    for before, (fast, slow) in zip(old, pairs, strict=True):
        for b, f, s in zip(before, values(fast), values(slow), strict=True):
            assert not s.equal(b)
            torch.testing.assert_close(s, (1 - tau) * b + tau * f, rtol=1e-5, atol=1e-7)
        # else the graph of all updates so far hangs on the moving averages, and memory grows
        assert not any(p.requires_grad for p in slow.parameters())


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_critic_steps_repeat_adam_on_one_gradient(script, critic_steps, monkeypatch):
    """critic_steps Adam steps per update, all on the gradient at the weights before them."""
    agent, args = make_agent(script, critic_steps=critic_steps, critic_lr=1e-3)
    manual = copy.deepcopy(agent.critic)
    adam, calls = (
        torch.optim.Adam(manual.parameters(), 1e-3),
        spy(monkeypatch, script, "critic_loss"),
    )
    for update in range(2):
        batch, target = make_batch(update), copy.deepcopy(agent.target_critic)
        one_update(script, agent, batch, args, rng(update))
        next_actions = calls[-1][0][3]
        with torch.no_grad():
            next_q = target(batch["next_obs"], next_actions).amin(0)
            y = 0.2 * batch["rewards"] + 0.99 * (1 - batch["terminations"]) * next_q
        adam.zero_grad()
        (manual(batch["obs"], batch["actions"]) - y).square().mean(1).sum().backward()
        for _ in range(critic_steps):
            adam.step()
        for ours, expected in zip(values(agent.critic), values(manual), strict=True):
            # steps are 1e-3 and a gradient near zero is amplified by Adam: 1 % of a step
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    steps = {int(state["step"]) for state in agent.optimizers["critic"].state.values()}
    assert steps == {2 * critic_steps}


def test_policy_steps_are_adam_on_the_policy_loss(script, monkeypatch):
    """Every policy update is one Adam step on this update's gradient alone, to its own targets."""
    agent, args = make_agent(script)
    manual, calls = copy.deepcopy(agent.policy), spy(monkeypatch, script, "policy_loss")
    adam, steps = (
        torch.optim.Adam(manual.parameters(), 3e-4),
        spy(monkeypatch, script, "update_policy"),
    )
    for update in range(5):
        one_update(script, agent, make_batch(update), args, rng(update))
    calls = list(calls)  # what follows is spied on as well
    for ((_, *arguments), _), ((_, *given), _) in zip(calls, steps, strict=True):
        assert all(equal(arguments[:3], given[:3]))  # obs, actions, w
        adam.zero_grad()
        script.policy_loss(manual, *arguments).backward()
        adam.step()
    assert len(calls) == 3
    for ours, expected in zip(values(agent.policy), values(manual), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=3e-6)  # 1 % of a step


def test_optimizer_steps_are_counted(script):
    """Ten updates: twenty critic steps, five policy steps, none of alpha."""
    agent, args = make_agent(script)
    for update in range(10):
        one_update(script, agent, make_batch(update), args, rng(update))
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in agent.optimizers.items()
    }
    assert steps == {"critic": {20}, "policy": {5}, "alpha": set()} and agent.updates == 10


# ---------------------------------------------------------------------------- reference values


def both_temperatures(value):
    """For whichever mode is asked for."""
    return {"temperature": value, "particle_temperature": value}


def numpy_q(critic, obs, actions):
    x = np.concatenate([obs, actions], -1)
    return numpy_mlp(critic.q1, x)[:, 0], numpy_mlp(critic.q2, x)[:, 0]


def float64(batch):
    return {key: value.double().numpy() for key, value in batch.items()}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_loss_against_numpy(script, layer_norm):
    """Sum over the twins of the mean squared error to the clipped double-Q target."""
    agent, args = make_agent(script, gamma=0.9, reward_scale=0.7, critic_layer_norm=layer_norm)
    randomise(agent.critic, 1)
    randomise(agent.target_critic, 2)
    batch, next_actions = make_batch(), torch.rand(BATCH, ACT, generator=rng()) * 2 - 1
    loss, q = script.critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)

    b = float64(batch)
    next_q = numpy_q(agent.target_critic, b["next_obs"], next_actions.double().numpy())
    y = 0.7 * b["rewards"] + 0.9 * (1 - b["terminations"]) * np.minimum(*next_q)
    q_1, q_2 = numpy_q(agent.critic, b["obs"], b["actions"])
    expected = np.mean((q_1 - y) ** 2) + np.mean((q_2 - y) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(q.numpy(), [q_1, q_2], rtol=1e-4, atol=1e-5)
    wrong = 0.7 * b["rewards"] + 0.9 * (1 - b["terminations"]) * np.maximum(*next_q)
    assert np.abs(wrong - y).max() > 0.1  # the twins do disagree on this batch


def test_terminated_rows_do_not_bootstrap(script):
    """Only where terminations is 1 the next state does not matter."""
    agent, args = make_agent(script)
    batch, next_actions = make_batch(), torch.zeros(BATCH, ACT)
    moved = batch | {"next_obs": batch["next_obs"] + 1}
    rows = batch["terminations"].bool()
    for kept, matters in (rows, False), (~rows, True):
        losses = [
            script.critic_loss(
                agent.critic,
                agent.target_critic,
                {key: value[kept] for key, value in version.items()},
                next_actions[kept],
                args,
            )[0]
            for version in (batch, moved)
        ]
        assert losses[0].isclose(losses[1]) != matters


def test_td_target_is_a_constant(script):
    """No gradient flows through y, even if target critic and next actions would carry one."""
    agent, args = make_agent(script)
    agent.target_critic.requires_grad_(True)
    next_actions = torch.zeros(BATCH, ACT, requires_grad=True)
    arguments = agent.critic, agent.target_critic, make_batch(), next_actions, args
    loss, q = script.critic_loss(*arguments)
    loss.backward()
    assert next_actions.grad is None and not q.requires_grad
    assert all(p.grad is None for p in agent.target_critic.parameters())
    assert all(p.grad.any() for p in agent.critic.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_update_hands_the_right_targets_to_the_policy(script, mode, monkeypatch):
    """Targets and weights of a whole update, from its candidates, worked out in numpy."""
    agent, args = make_agent(script, weight_mode=mode, alpha_init=2.0, **both_temperatures(0.8))
    set_statistics(agent, 0.3, 0.6, 0.4)
    randomise(agent.critic, 1)
    critic, batch = copy.deepcopy(agent.critic), make_batch()
    selections, steps = (
        spy(monkeypatch, script, "select_action"),
        spy(monkeypatch, script, "update_policy"),
    )
    one_update(script, agent, batch, args, rng())
    candidates = selections[0][0][2].double().numpy()  # (N, B, act_dim)
    (_, obs, targets, w, *_), _ = steps[0]

    next_obs, rows = float64(batch)["next_obs"], np.arange(BATCH)
    scores = np.array([np.minimum(*numpy_q(critic, next_obs, a)) for a in candidates])
    q = scores.max(0)
    expected = {
        "temperature": np.exp(q / (0.6 * 0.8)) / np.exp(q / (0.6 * 0.8)).mean(),
        "clip_alpha": np.exp(np.clip(q - 0.3 / 0.6, -3, 3) / 2.0),
    }.get(mode, np.ones(BATCH))
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-4)
    best = np.clip(candidates[scores.argmax(0), rows], -1, 1)
    clipped = np.abs(q - 0.3 / 0.6) >= 3
    assert obs.equal(batch["next_obs"]) and 0 < clipped.mean() < 1
    if mode == "particles":  # drawn from the state's own candidates, not always the best
        gaps = np.abs(np.clip(candidates, -1, 1) - targets.double().numpy()).max(-1)
        assert (gaps.min(0) < 1e-6).all() and 0 < (gaps.argmin(0) == scores.argmax(0)).mean() < 1
    else:
        np.testing.assert_allclose(targets.numpy(), best, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_effective_sample_size(script, mode, monkeypatch):
    """policy/ess is in (0, 1]: Kish's (sum w)^2 / (B sum w^2), per state for particles."""
    agent, args = make_agent(script, weight_mode=mode, **both_temperatures(0.1))
    steps = spy(monkeypatch, script, "update_policy")
    selections = spy(monkeypatch, script, "select_action")
    ess = one_update(script, agent, make_batch(), args, rng())["policy/ess"].item()
    w = steps[0][0][3].double().numpy()[:, None]  # (B, 1)
    if mode == "particles":  # sigma is 1 at the start
        w = np.exp(selections[0][1][1].double().numpy() / 0.1)  # (N, B)
    expected = (w.sum(0) ** 2 / (len(w) * (w**2).sum(0))).mean()
    assert ess == pytest.approx(expected, rel=1e-4) and 1 / len(w) < ess <= 1 + 1e-6
    assert (ess > 1 - 1e-6) == (mode == "none")


def test_update_explores_with_the_noise_of_acting(script, monkeypatch):
    """Candidates of an update carry noise of std alpha noise_scale, as those that act."""
    agent, args = make_agent(script, alpha_init=2.0, noise_scale=0.3)
    calls = spy(monkeypatch, script, "propose")
    metrics = one_update(script, agent, make_batch(), args, rng())
    act(script, agent, torch.zeros(1, OBS), args, rng(), "explore")
    assert [call[0][2].item() for call in calls] == pytest.approx([0.6, 0.6])
    assert metrics["policy/alpha"].item() == pytest.approx(2.0)
    spread = calls[0][1].double().numpy().std(0).mean()
    assert metrics["policy/candidate_spread"].item() == pytest.approx(spread, rel=1e-5)
    flow = script.flow_spread(calls[0][1], 0.6).item()
    assert metrics["policy/flow_spread"].item() == pytest.approx(flow, rel=1e-5)


def test_flow_spread_leaves_out_the_noise(script):
    """Of actions that differ by 0.3 and carry noise of 0.7; one action alone has no spread."""
    actions = 0.3 * torch.randn((8, 4096, ACT), generator=rng())
    noisy = actions + 0.7 * torch.randn(actions.shape, generator=rng(1))
    assert script.flow_spread(noisy, torch.tensor(0.7)).item() == pytest.approx(0.3, rel=0.05)
    assert script.flow_spread(actions, 0.0).item() == pytest.approx(0.3, rel=0.05)
    assert script.flow_spread(0 * actions, 0.7).item() == 0
    assert script.flow_spread(noisy[:1], 0.0).item() == 0


def test_metrics_are_detached_scalars(script):
    """What is logged keeps no graph alive."""
    agent, args = make_agent(script)
    metrics = one_update(script, agent, make_batch(), args, rng())
    assert {"losses/critic_loss", "losses/q_values", "policy/alpha"} <= metrics.keys()
    assert all(x.shape == () and x.isfinite() and not x.requires_grad for x in metrics.values())


# ---------------------------------------------------------------------------- schedules


ALPHAS = {1: 4.97, 50: 3.55, 100: 2.59, 200: 1.51, 300: 1.01, 400: 0.77, 600: 0.59, 800: 0.55}


@pytest.mark.parametrize("act_dim", [1, 17])
def test_alpha_follows_the_published_schedule(script, act_dim):
    """alpha after update_alpha number n (every 1,250 steps: 50 at 62,500), for any act_dim."""
    agent, args = make_agent(script, act_dim=act_dim)
    assert args.alpha_interval == 1_250 and agent.log_alpha.exp().item() == pytest.approx(5)
    alphas = {}
    for n in range(1, 3_001):
        script.update_alpha(agent, args)
        alphas[n] = agent.log_alpha.exp().item()
    assert {n: alphas[n] for n in ALPHAS} == pytest.approx(ALPHAS, rel=0.01)  # table: two decimals
    fixed_point = math.exp(-1.5 - 0.5 * math.log(2 * math.pi * math.e)) / 0.1  # 0.540
    assert alphas[3_000] == pytest.approx(fixed_point, rel=0.01)
    assert agent.alpha_updates == 3_000 and agent.updates == 0
    assert not agent.log_alpha.grad.requires_grad


@pytest.mark.parametrize(
    "policy_update, lr",
    [(0, 3e-4), (25_000, 3e-4), (37_500, 2.325e-4), (50_000, 1.65e-4), (75_000, 3e-5), (1e6, 3e-5)],
)
def test_policy_learning_rate_schedule(script, policy_update, lr):
    """3e-4 until policy update 25,000, linear to 3e-5 at 75,000; Adam's first step is lr long."""
    agent, args = make_agent(script)
    agent.updates, old = args.policy_delay * int(policy_update), values(agent.policy)
    one_update(script, agent, make_batch(), args, rng())
    assert agent.optimizers["policy"].param_groups[0]["lr"].item() == pytest.approx(lr)
    assert agent.optimizers["critic"].param_groups[0]["lr"] == 3e-4
    moves = [(p - q).abs().max().item() for p, q in zip(values(agent.policy), old, strict=True)]
    assert max(moves) == pytest.approx(lr, rel=0.01)


# ---------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("rate", [0.001, 1.0])
def test_running_statistics(script, rate, monkeypatch):
    """Mean and std of Q(s', a*) over states, mean std over candidates; std of ddof 0."""
    agent, args = make_agent(script, q_stats_rate=rate)
    selections, old = spy(monkeypatch, script, "select_action"), np.array([0.0, 1.0, 1.0])
    for update in range(3):
        one_update(script, agent, make_batch(update), args, rng(update))
        scores = selections[-1][1][1].double().numpy()  # (N, B)
        q = scores.max(0)
        old = (1 - rate) * old + rate * np.array([q.mean(), q.std(), scores.std(0).mean()])
        np.testing.assert_allclose(get_statistics(agent).numpy(), old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["temperature", "clip_alpha"])
def test_weights_use_the_statistics_from_before(script, mode, monkeypatch):
    """Weights see the past only; at rate 1 the statistics from after are quite different."""
    agent, args = make_agent(script, weight_mode=mode, q_stats_rate=1.0)
    set_statistics(agent, 0.5, 2.0, 3.0)
    before, seen, targets = get_statistics(agent), [], script.mirror_descent_targets

    def looking(agent, *rest):
        seen.append(get_statistics(agent))
        return targets(agent, *rest)

    monkeypatch.setattr(script, "mirror_descent_targets", looking)
    steps, selections = (
        spy(monkeypatch, script, name) for name in ("update_policy", "select_action")
    )
    one_update(script, agent, make_batch(), args, rng())
    assert len(seen) == 1 and seen[0].equal(before)
    after = get_statistics(agent)
    assert not after.isclose(before).any()
    q = selections[0][1][1].amax(0)
    expected, later = (  # with the statistics from before, and with those from after
        (q / (3 * std)).softmax(0) * BATCH
        if mode == "temperature"
        else ((q - mean / std).clamp(-3, 3) / 5).exp()
        for mean, std, _ in (before, after)
    )
    torch.testing.assert_close(steps[0][0][3], expected)
    assert (later / expected - 1).abs().max() > 0.02


def test_particles_use_the_statistics_from_before(script, monkeypatch):
    """The same of sigma_s, seen in the effective sample size of softmax(Q / (sigma_s lambda))."""
    agent, args = make_agent(
        script, weight_mode="particles", q_stats_rate=1.0, particle_temperature=0.05
    )
    set_statistics(agent, 0.5, 2.0, 3.0)
    selections = spy(monkeypatch, script, "select_action")
    ess = one_update(script, agent, make_batch(), args, rng())["policy/ess"].item()
    scores = selections[0][1][1].double().numpy()  # (N, B)
    before, after = (
        (p.sum(0) ** 2 / (len(p) * (p**2).sum(0))).mean()
        for p in (np.exp(scores / (sigma * 0.05)) for sigma in (3.0, agent.q_std_within.item()))
    )
    assert ess == pytest.approx(before, rel=1e-4) and abs(after - before) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_constant_q_stays_finite(script, mode):
    """A critic that says the same everywhere gives sigma = 0, and no NaN for it."""
    agent, args = make_agent(script, weight_mode=mode, q_stats_rate=1.0)
    with torch.no_grad():
        agent.critic.q1.rest[-1].weight.zero_()
        agent.critic.q2.rest[-1].weight.zero_()
    agent.optimizers["critic"].param_groups[0]["lr"] = 0.0
    for update in range(3):
        metrics = one_update(script, agent, make_batch(update), args, rng(update))
    assert all(x.isfinite() for x in metrics.values())
    statistics = get_statistics(agent)
    assert statistics.isfinite().all() and (statistics[1:] > 0).all()
    assert all(p.isfinite().all() for p in agent.policy.parameters())


# ---------------------------------------------------------------------------- precision


def test_bfloat16_generates_but_does_not_rank(script, monkeypatch):
    """precision=bfloat16 rounds candidates a little; scores are those of the float32 critic."""
    selections = spy(monkeypatch, script, "select_action")
    for precision in "float32", "bfloat16":
        agent, args = make_agent(script, precision=precision, flow_steps=20)
        critic = copy.deepcopy(agent.critic)
        metrics = one_update(script, agent, make_batch(), args, rng())
        assert all(x.isfinite() for x in metrics.values())
        (_, obs, candidates), (actions, scores) = selections[-1]
        with torch.no_grad():
            assert scores.equal(critic(obs, candidates.float()).amin(0))
        assert scores.dtype == actions.dtype == torch.float32
    (exact, rounded) = (inputs[2] for inputs, _ in selections)
    assert 0 < (exact - rounded).abs().max() < 0.1  # three digits, twenty steps
    assert all(p.dtype == torch.float32 for p in agent.parameters())
