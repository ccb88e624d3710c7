"""The real main() on probe environments of increasing difficulty: values in closed form."""

import pytest
import torch
from conftest import MIRROR, fpmd_only, known, load

LEARN = {
    "total_timesteps": 2200,
    "learning_starts": 200,
    "utd": 1.0,
    "batch_size": 64,
    "num_candidates": 8,
    "flow_steps": 4,
    "hidden_dim": 32,
    "critic_lr": 1e-3,
    "tau": 0.05,
    "gamma": 0.9,
    "reward_scale": 0.2,
}
OWN = {name: {"policy_lr": (1e-3, 1e-3), "alpha_interval": 20} for name in MIRROR}
OWN["mvp_online"] = {"policy_lr": 1e-3, "hidden_layers": 2}
# returns of at most 10 in rewards of 1, and atoms beyond them; most of a run is its warm-up's scale
OWN["fpmd_plus_online"] = {"policy_lr": 1e-3, "v_max": 12.0, "num_atoms": 41}
OWN["sac_online"] = {"policy_lr": 1e-3, "hidden_layers": 2, "alpha_init": 0.1}


def trained(script, run, name, **changes):
    settings = known(script, LEARN | OWN[script.__name__] | changes)
    if "flow_steps" in settings:
        settings["flow_steps"] = min(settings["flow_steps"], script.Args().flow_steps)
    run_dir = run(env_id=f"probe_envs:{name}-v0", **settings)
    args = script.Args(**load(run_dir)["args"])
    agent = script.Agent(1, 1, args, torch.device("cpu"))
    agent.load_state_dict(load(run_dir)["agent"])
    return agent, args


def critic_alone(script):
    """Settings for where no action matters: nothing to choose, no bonus for entropy."""
    if script.__name__ == "sac_online":
        return {"alpha_init": 1e-4}
    if script.__name__ == "fpmd_plus_online":
        return {"num_candidates": 2, "weights": "best", "target_kl": 1.0}
    return {"num_candidates": 1, "flow_steps": 1}


def q_values(agent, args, obs):
    """Q_1 and Q_2 of the environment's rewards at an observation, over the box: (2, 21)."""
    actions = torch.linspace(-1, 1, 21)[:, None]
    scale = 1 / args.reward_scale if hasattr(args, "reward_scale") else agent.reward_scale.scale
    with torch.no_grad():
        return scale * agent.critic(torch.full((21, 1), float(obs)), actions)


def deployed_actions(script, agent, args, obs):
    rng = torch.Generator().manual_seed(0)
    obs = torch.full((256, 1), float(obs))
    return script.MODES[script.DEPLOYED](agent, obs, args, rng)


def test_constant_reward(script, run):
    agent, args = trained(script, run, "Constant", **critic_alone(script))
    assert q_values(agent, args, 0) == pytest.approx(1, abs=0.1)


def test_reward_depends_on_observation(script, run):
    agent, args = trained(script, run, "Observed", **critic_alone(script))
    assert q_values(agent, args, 1) == pytest.approx(1, abs=0.2)
    assert q_values(agent, args, -1) == pytest.approx(-1, abs=0.2)


def test_reward_comes_later(script, run):
    """Bootstrapping: the first step is worth gamma times the second."""
    changes = critic_alone(script)
    if script.__name__ == "mvp_online":
        changes["total_timesteps"] = 4200  # its LayerNorm makes bumps that take longer to go
    agent, args = trained(script, run, "Delayed", **changes)
    assert q_values(agent, args, 1) == pytest.approx(1, abs=0.1)
    q = q_values(agent, args, 0)
    if script.__name__ == "mvp_online":  # its Q has bumps over the actions: the mean is judged
        q = q.mean(-1)
    assert q == pytest.approx(0.9, abs=0.1)


def test_time_limit_is_no_termination(script, run):
    """Cut after 8 steps of reward 1, an endless task is still worth 1 / (1 - gamma).

    Treated as termination, the mean value over the 8 steps would be below 8.
    """
    agent, args = trained(script, run, "Endless", total_timesteps=4200, **critic_alone(script))
    assert q_values(agent, args, 0) == pytest.approx(1 / (1 - 0.9), abs=0.75)


@fpmd_only
def test_reward_depends_on_action(script, run):
    """The deployed policy, one candidate from one step, finds an optimum inside the box."""
    assert_finds_the_optimum(script, run)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["fpmd_online"], indirect=True)
def test_reward_depends_on_action_with_particles(script, run):
    """The other modes differ from the default in their weights alone: test_mirror_descent.py."""
    assert_finds_the_optimum(script, run, weight_mode="particles")


@pytest.mark.parametrize("script", ["mvp_online"], indirect=True)
@pytest.mark.parametrize("ivc_coef", [0.0, 1.0])
def test_reward_depends_on_action_for_mvp(script, run, ivc_coef):
    """The same with and without the constraint, which takes longer."""
    assert_finds_the_optimum(script, run, ivc_coef=ivc_coef, total_timesteps=3200)


@pytest.mark.parametrize("script", ["fpmd_plus_online"], indirect=True)
@pytest.mark.parametrize("imitation", ["regression", "meanflow"])
def test_reward_depends_on_action_for_plus(script, run, imitation):
    """Whichever way the weighted candidates are imitated."""
    assert_finds_the_optimum(script, run, imitation=imitation)


@pytest.mark.parametrize("script", ["dpmd_online"], indirect=True)
def test_reward_depends_on_action_for_dpmd(script, run):
    """One candidate, denoised in all steps."""
    assert_finds_the_optimum(script, run)


@pytest.mark.parametrize("script", ["sac_online"], indirect=True)
@pytest.mark.parametrize("tanh_correction", [True, False])
def test_reward_depends_on_action_for_sac(script, run, tanh_correction):
    """The squashed mean, with the entropy of the action and with that before tanh."""
    assert_finds_the_optimum(script, run, tanh_correction=tanh_correction)


def assert_finds_the_optimum(script, run, **changes):
    settings = {"reward_scale": 2.0} | changes
    agent, args = trained(script, run, "Acted", **settings)
    actions = deployed_actions(script, agent, args, 0)
    assert actions.mean().item() == pytest.approx(0.5, abs=0.15)
    assert (actions - 0.5).abs().mean() < 0.2


def test_reward_depends_on_both(script, run):
    changes = {"total_timesteps": 3200, "reward_scale": 2.0}
    if script.__name__ == "mvp_online":
        changes["noise_scale"] = 0.2  # without, it stops exploring at once: most seeds fail
    agent, args = trained(script, run, "Both", **changes)
    for obs in (-1, 1):
        actions = deployed_actions(script, agent, args, obs)
        assert actions.mean().item() == pytest.approx(0.5 * obs, abs=0.15)
