"""One policy improvement step on a one-state bandit with a known Q, against its closed form.

pi_old = N(0, 0.25^2) is exact in one step of any script, there is no exploration noise, and sigma
lambda is fixed. `update` itself makes the weighted regression targets; their law is compared with a
density on a grid by the Kolmogorov distance, the largest difference of distribution functions.
With 200,000 states that distance is below 0.006 for the right density (1.4 / sqrt(effective
samples)); each wrong variant of an equation must be three times further away than the tolerance.
"""

import copy
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import FPMD, OneStep, fit, rng, set_statistics
from torch import nn

import fpmd_online as fpmd

torch.set_num_threads(1)

STATES, TOLERANCE = 200_000, 0.01
MEAN, SIGMA, SPREAD, ALPHA = -1.5, 0.5, 0.8, 0.5  # statistics of Q; clip_alpha does clip
GRID = np.linspace(-1, 1, 8_001)  # the box holds all of pi_old but 6e-5


@pytest.fixture(params=FPMD)
def script(request):
    """Each script that improves its policy by mirror descent."""
    return importlib.import_module(request.param)


def old_policy(std=0.25):
    """The field that carries N(0, 1) to N(0, std^2) in one step."""
    return OneStep(lambda z: std * z)


def population(actions):
    """The field that carries N(0, 1) to the law of given actions in one step, by quantiles."""
    ordered = actions.squeeze(-1).sort().values

    def carry(z):
        place = (1 + torch.erf(z / 2**0.5)) / 2 * (len(ordered) - 1)
        low = place.long().clamp(max=len(ordered) - 2)
        return torch.lerp(ordered[low], ordered[low + 1], place - low)

    return OneStep(carry)


class KnownQ(nn.Module):
    """Twin critics given by formulas of the action."""

    def __init__(self, *twins):
        super().__init__()
        self.twins, self.offset = twins, nn.Parameter(torch.zeros(()))  # update needs a gradient

    def forward(self, obs, actions):
        a = actions.squeeze(-1)
        return torch.stack([q(a) for q in self.twins]) + self.offset


def tent(a):
    """min(Q_1, Q_2) peaks at 0.09 with 0.75; max(Q_1, Q_2) has its minimum there."""
    return 8 * a, 1.5 - 8 * a


TENT = KnownQ(lambda a: tent(a)[0], lambda a: tent(a)[1])


def improve(script, policy, critic, states=STATES, seed=0, **args):
    """One update: what reaches update_policy, actions (B,) and weights (B,), and the metrics."""
    args = {"num_candidates": 1, "flow_steps": 1, "prior_std": 1.0, "noise_scale": 0.0} | args
    args = script.Args(**args, alpha_init=ALPHA, hidden_dim=8)
    agent, targets = script.Agent(1, 1, args, torch.device("cpu")), []
    policy.unused = nn.Parameter(torch.zeros(()))  # the moving averages want a parameter
    agent.policy, agent.critic = policy, critic
    agent.acting_policy = copy.deepcopy(policy).requires_grad_(False)
    agent.target_critic = copy.deepcopy(critic).requires_grad_(False)
    set_statistics(agent, MEAN, SIGMA, SPREAD)

    def catch(agent, obs, actions, w, *_):
        targets.extend([actions.squeeze(-1), w])
        return {}

    batch = {key: torch.zeros(states, 1) for key in ("obs", "next_obs", "actions")}
    batch |= {key: torch.zeros(states) for key in ("rewards", "terminations")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update_policy", catch)
        metrics = script.update(agent, batch, args, rng(seed), improve_policy=True)
    return *targets, metrics


def improvement_targets(*setting, **args):
    """Regression targets (B,) and their weights (B,) of one `update`, caught before the fit."""
    return improve(*setting, **args)[:2]


def distance(targets, density):
    """Kolmogorov distance between weighted targets and an unnormalised density on GRID."""
    actions, w = (x.double().numpy() for x in targets)
    order = np.argsort(actions)
    mass = np.concatenate([[0], np.cumsum(w[order])]) / w.sum()
    empirical = mass[np.searchsorted(actions[order], GRID, side="right")]
    exact = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return np.abs(empirical - exact / exact[-1]).max()


def assert_law(targets, right, wrong):
    """The targets follow the right density, and the test can tell every wrong one from it."""
    assert distance(targets, right) < TOLERANCE
    for name, density in wrong.items():
        assert distance(targets, density) > 3 * TOLERANCE, name


def best_of(n, q):
    """Law of the best of n draws from pi_old: n F(q)^(n-1) pi_old, F the law of q under pi_old."""
    pi, order, cdf = PI.copy(), np.argsort(q), np.empty_like(q)
    cdf[order] = np.cumsum(pi[order]) / pi.sum()
    return n * cdf ** (n - 1) * pi


PI = np.exp(-0.5 * (GRID / 0.25) ** 2)
Q, Q_MAX = np.minimum(*tent(GRID)), np.maximum(*tent(GRID))


# ---------------------------------------------------------------------------- the law per mode


def test_temperature_tilts_the_old_policy(script):
    """N = 1: the targets' law is pi_old exp(Q / (sigma lambda)), the mirror-descent solution."""
    options = {"weight_mode": "temperature", "temperature": 2.0}
    targets = improvement_targets(script, old_policy(), TENT, **options)
    wrong = {
        "sign flipped": PI * np.exp(-Q / (SIGMA * 2)),
        "weight missing": PI,
        "max of the twins": PI * np.exp(Q_MAX / (SIGMA * 2)),
        "sigma missing": PI * np.exp(Q / 2),
        "lambda missing": PI * np.exp(Q / SIGMA),
        "sigma within states": PI * np.exp(Q / (SPREAD * 2)),
    }
    assert_law(targets, PI * np.exp(Q / (SIGMA * 2)), wrong)
    assert targets[1].mean().item() == pytest.approx(1, rel=1e-4)  # float32 sum of 200,000


def test_none_imitates_the_best_of_n(script):
    """Unweighted targets follow n F(Q)^(n-1) pi_old: a law that forgets how much better Q is."""
    targets = improvement_targets(script, old_policy(), TENT, weight_mode="none", num_candidates=8)
    wrong = {
        "worst of N": best_of(8, -Q),
        "no ranking": PI,
        "ranked by the max of the twins": best_of(8, Q_MAX),
        "ranked by the first twin": best_of(8, tent(GRID)[0]),
        "best of N / 2": best_of(4, Q),
    }
    assert_law(targets, best_of(8, Q), wrong)
    assert targets[1].eq(1).all()


def test_temperature_tilts_the_best_of_n(script):
    """N > 1: the default mode weighs the best-of-N law, which is greedier than mirror descent."""
    options = {"weight_mode": "temperature", "temperature": 2.0, "num_candidates": 4}
    targets = improvement_targets(script, old_policy(), TENT, **options)
    tilt = np.exp(Q / (SIGMA * 2))
    wrong = {"no ranking": PI * tilt, "weight missing": best_of(4, Q)}
    assert_law(targets, best_of(4, Q) * tilt, wrong)


def test_clip_alpha_keeps_the_precedence_of_the_release(script):
    """N = 1: pi_old exp(clip(q - m / sigma, -3, 3) / alpha), where only m is divided by sigma."""
    targets = improvement_targets(script, old_policy(), TENT, weight_mode="clip_alpha")

    def law(n, low=-3, high=3, alpha=ALPHA):
        return PI * np.exp(np.clip(n, low, high) / alpha)

    right = Q - MEAN / SIGMA
    wrong = {
        "(q - m) / sigma": law((Q - MEAN) / SIGMA),
        "not clipped": law(right, -np.inf, np.inf),
        "clipped to one": law(right, -1, 1),
        "sign flipped": law(-right),
        "alpha missing": law(right, alpha=1),
        "times alpha": law(right, alpha=1 / ALPHA),
        "weight missing": PI,
        "max of the twins": law(Q_MAX - MEAN / SIGMA),
    }
    assert_law(targets, law(right), wrong)


def test_particles_tilt_within_each_state(script):
    """Resampling N candidates by softmax(Q / (sigma_s lambda)) gives the tilted pi_old, w = 1."""
    options = {"weight_mode": "particles", "particle_temperature": 1.25, "num_candidates": 64}
    targets = improvement_targets(script, old_policy(), TENT, STATES // 2, **options)
    wrong = {
        "sign flipped": PI * np.exp(-Q / (SPREAD * 1.25)),
        "weight missing": PI,
        "best of N": best_of(64, Q),
        "sigma across states": PI * np.exp(Q / (SIGMA * 1.25)),
        "sigma missing": PI * np.exp(Q / 1.25),
        "max of the twins": PI * np.exp(Q_MAX / (SPREAD * 1.25)),
    }
    assert_law(targets, PI * np.exp(Q / (SPREAD * 1.25)), wrong)
    assert targets[1].eq(1).all()


def test_particles_are_exact_up_to_one_over_n(script):
    """The bias of resampling falls like 1 / N: a quarter from N = 2 to 8, and again to 32."""
    exact, distances = PI * np.exp(Q / (SPREAD * 0.5)), []
    for n in 2, 8, 32:
        options = {"weight_mode": "particles", "particle_temperature": 0.5, "num_candidates": n}
        targets = improvement_targets(script, old_policy(), TENT, STATES // 2, **options)
        distances.append(distance(targets, exact))
    assert distances[0] > 0.1
    assert distances[1] < 0.5 * distances[0] and distances[2] < 0.5 * distances[1]


# ---------------------------------------------------------------------------- ranking


def test_select_action_against_a_loop(script):
    """argmax of min(Q_1, Q_2) of the unclipped candidates of one state, clipped afterwards."""
    torch.manual_seed(0)
    critic, obs = script.TwinCritic(3, 2, hidden_dim=16), torch.randn(40, 3)
    candidates = 2 * torch.randn(6, 40, 2)
    with torch.no_grad():
        actions, scores = script.select_action(critic, obs, candidates)
        for state in range(40):
            rows = candidates[:, state]
            q = torch.minimum(critic.q1(obs[state][None], rows), critic.q2(obs[state][None], rows))
            torch.testing.assert_close(scores[:, state], q)
            torch.testing.assert_close(actions[state], rows[q.argmax()].clamp(-1, 1))
    assert candidates.abs().max() > 1 and actions.abs().max() == 1


# ---------------------------------------------------------------------------- weights


def weights(script, q, **args):
    """The weights of states whose best candidate has this Q."""
    args = script.Args(**args, alpha_init=ALPHA, hidden_dim=8)
    agent = script.Agent(1, 1, args, torch.device("cpu"))
    set_statistics(agent, MEAN, SIGMA, SPREAD)
    scores = torch.as_tensor(q)[None]  # (1, B)
    candidates = torch.zeros(*scores.shape, 1)
    return script.mirror_descent_targets(agent, candidates, scores, args, rng())[1]


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("sign", [-1, 1])
def test_temperature_weights_do_not_overflow(script, size, sign):
    """exp(Q / (sigma lambda)) overflows from Q = 133 on; only differences of Q may count."""
    q = sign * size + torch.linspace(-5, 5, 256)
    w = weights(script, q)
    assert w.isfinite().all() and w.mean().item() == pytest.approx(1, rel=1e-5)
    expected = (q.double() / (SIGMA * 3)).softmax(0) * 256
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-6)
    spread_out = weights(script, torch.linspace(-size, size, 256))
    assert spread_out.isfinite().all() and spread_out.mean().item() == pytest.approx(1, rel=1e-5)


def test_temperature_weights_ignore_a_shift_of_q(script):
    """Adding a constant to Q changes nothing, to the bit where the sum is exact."""
    q = torch.arange(256) / 64
    w = weights(script, q)
    assert w.equal(weights(script, q + 1024)) and w.std() > 0.1


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_other_weights_do_not_overflow(script, size):
    """clip_alpha is bounded by exp(+-3 / alpha), none is 1, particles stay probabilities."""
    q = torch.linspace(-size, size, 256)
    w = weights(script, q, weight_mode="clip_alpha")
    assert w.min().item() == pytest.approx(math.exp(-3 / ALPHA), rel=1e-5)
    assert w.max().item() == pytest.approx(math.exp(3 / ALPHA), rel=1e-5)
    assert weights(script, q, weight_mode="none").eq(1).all()
    assert weights(script, q, weight_mode="particles").eq(1).all()
    options = {"weight_mode": "particles", "num_candidates": 8}
    critic = KnownQ(*[lambda a: size * a] * 2)
    drawn, _, metrics = improve(script, old_policy(), critic, 256, **options)
    greedy = options | {"weight_mode": "none"}
    best, _ = improvement_targets(script, old_policy(), critic, 256, **greedy)
    assert drawn.equal(best)
    assert metrics["policy/ess"].item() == pytest.approx(1 / 8, abs=1e-3)  # near ties count
    for constant in -size, size:
        critic = KnownQ(*[lambda a, constant=constant: constant + 0 * a] * 2)
        assert improve(script, old_policy(), critic, 256, **options)[2]["policy/ess"].item() == 1


def given_or_default(name, value):
    """Arguments that set a value, or none of them."""
    return {} if value is None else {name: value}


@pytest.mark.parametrize("given, used", [(None, 3.0), (3.0, 3.0), (0.7, 0.7)])
def test_temperature_mode_defaults_to_three(script, given, used):
    """Two weights differ by exp((q_2 - q_1) / (sigma lambda)), lambda = 3 unless given."""
    options = {"weight_mode": "temperature"} | given_or_default("temperature", given)
    low, high = weights(script, [-1.0, 1.5], particle_temperature=9.0, **options)
    assert (high / low).item() == pytest.approx(math.exp(2.5 / (SIGMA * used)), rel=1e-5)


@pytest.mark.parametrize("given, used", [(None, 0.5), (0.5, 0.5), (3.0, 3.0)])
def test_particles_mode_defaults_to_one_half(script, given, used):
    """Each state's p is the softmax of Q / (sigma_s lambda) over its own candidates.

    Two kinds of state with three candidates each: how often each is drawn, and the effective
    sample size, which is a function of p.
    """
    scores = np.array([[0.0, 7.0], [0.3, 7.0], [1.0, 7.6]])  # (N, kinds)
    candidates = torch.tensor(scores / 10, dtype=torch.float32).repeat(1, 20_000)[..., None]
    policy, critic = OneStep(lambda z: candidates), KnownQ(*[lambda a: 10 * a] * 2)
    options = {"weight_mode": "particles", "num_candidates": 3, "temperature": 9.0}
    options |= given_or_default("particle_temperature", given)
    drawn, w, metrics = improve(script, policy, critic, 40_000, **options)
    p = np.exp(scores / (SPREAD * used))
    p /= p.sum(0)
    for kind in 0, 1:  # the first two candidates of the second kind are one action
        values, place = np.unique(scores[:, kind] / 10, return_inverse=True)
        expected = np.bincount(place, p[:, kind])
        gaps = (drawn[kind::2, None] - torch.tensor(values)).abs()
        assert gaps.amin(1).max() < 1e-6
        frequencies = torch.bincount(gaps.argmin(1), minlength=len(values)) / 20_000
        np.testing.assert_allclose(frequencies, expected, atol=0.015)  # 0.35 % is one std
    ess = (1 / (3 * (p**2).sum(0))).mean()
    assert metrics["policy/ess"].item() == pytest.approx(ess, rel=1e-5) and w.eq(1).all()


# ---------------------------------------------------------------------------- two optima


def bimodal(bonus=0.0):
    """Optima at -0.5 and 0.5, the second one better by bonus; sigma lambda is meant to be 0.02."""
    return KnownQ(*[lambda a: bonus * (a > 0) - (a.abs() - 0.5).square()] * 2)


TWO_OPTIMA = {"weight_mode": "temperature", "temperature": 0.02 / SIGMA}


def shares(actions, w):
    """Weighted shares of actions within 0.25 of -0.5, 0.5 and 0."""
    near = [(actions - centre).abs() < 0.25 for centre in (-0.5, 0.5, 0)]
    return [(w[rows].sum() / w.sum()).item() for rows in near]


def test_targets_of_one_step_keep_two_equal_optima(script):
    """The weighted targets have both modes and nothing between; a Gaussian fitted to their moments
    puts two fifths of its mass there."""
    actions, w = improvement_targets(script, old_policy(0.35), bimodal(), 50_000, **TWO_OPTIMA)
    left, right, between = shares(actions, w)
    assert left > 0.45 and right > 0.45 and between < 0.05
    mean = (w * actions).mean() / w.mean()
    std = ((w * (actions - mean).square()).mean() / w.mean()).sqrt()
    gaussian = mean + std * torch.randn(50_000, generator=rng())
    assert shares(gaussian, torch.ones(50_000))[2] > 0.3


def test_one_step_keeps_two_equal_optima():
    """A flow fitted to the weighted targets has both modes and little between.

    Of FPMD-R: FPMD-M needs more updates to part modes as wide as these (test_toy.py fits it).
    """
    actions, w = improvement_targets(fpmd, old_policy(0.35), bimodal(), 50_000, **TWO_OPTIMA)

    def draw(n):
        rows = torch.randint(len(w), (n,))
        return actions[rows, None], w[rows]

    policy = fit(fpmd, draw, updates=1_500, lr=2e-3, hidden_dim=64)
    with torch.no_grad():
        fitted = fpmd.generate(policy, torch.zeros(5_000, 1), torch.randn(5_000, 1), 40)
    left, right, between = shares(fitted.squeeze(-1), torch.ones(5_000))
    assert left > 0.4 and right > 0.4 and between < 0.1


def iterate(script, critic, rounds, **options):
    """The law after a number of exact improvement steps, as a population of 50,000 actions."""
    policy = old_policy(0.35)
    for seed in range(rounds):
        actions, w = improvement_targets(script, policy, critic, 50_000, seed, **options)
        rows = torch.multinomial(w, 50_000, replacement=True, generator=rng(seed))
        actions = actions[rows]
        policy = population(actions)
    return actions


GREEDY = {"weight_mode": "none", "num_candidates": 32}
MIRROR = {"weight_mode": "temperature", "temperature": 0.02 / SIGMA, "num_candidates": 1}


def test_iterated_argmax_loses_the_slightly_worse_optimum(script):
    """Expected, not hidden: a tenth of sigma lambda between two optima, and three best-of-N steps
    keep one, where three mirror-descent steps hold the other at exp(-0.3) of it."""
    greedy, mirror = (iterate(script, bimodal(0.002), 3, **options) for options in (GREEDY, MIRROR))
    assert (greedy < 0).float().mean() < 0.001
    expected = 1 / (1 + math.exp(3 * 0.1))  # 0.426
    assert (mirror < 0).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_iterated_argmax_narrows_equal_optima_to_points(script):
    """Expected, not hidden: best-of-N multiplies the density at an optimum by N each time."""
    greedy, mirror = (iterate(script, bimodal(), 3, **options) for options in (GREEDY, MIRROR))
    widths = [(actions.abs() - 0.5).std().item() for actions in (greedy, mirror)]
    assert widths[0] < 0.005 and widths[1] > 0.05
    assert (mirror < 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
