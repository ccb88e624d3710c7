"""Learning gate: a short run on a real task that must succeed. Slow, but part of the suite."""

import csv

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("script", ["fpmd_meanflow_online"], indirect=True)
def test_inverted_pendulum_is_solved(run):
    """The one-step policy balances for the whole 1,000 steps, in every episode, after 5,000 steps.

    Faster moving averages, learning rates and alpha than published, to fit into a minute or two.
    FPMD-R does the same in test_lecture.py.
    """
    run_dir = run(
        env_id="InvertedPendulum-v4",
        total_timesteps=5000,
        learning_starts=500,
        num_envs=5,
        batch_size=256,
        utd=1.0,
        num_candidates=8,
        flow_steps=4,
        hidden_dim=64,
        critic_lr=1e-3,
        policy_lr=(1e-3, 1e-3),
        tau=0.02,
        policy_delay=1,
        alpha_interval=10,
        eval_every=1250,
        eval_episodes=5,
    )
    rows = list(csv.DictReader((run_dir / "evaluations.csv").open()))
    one_step = [float(row["return_mean"]) for row in rows if row["mode"] == "one_step"]
    assert one_step[0] < 500, "solved before it learnt: the task is too easy to be a gate"
    assert max(one_step[-2:]) >= 950


@pytest.mark.slow
@pytest.mark.parametrize("script", ["fpmd_plus_online"], indirect=True)
def test_plus_solves_inverted_pendulum(run):
    """The same gate for FPMD+, with its rewards' scale and its temperature steered to 0.5."""
    run_dir = run(
        env_id="InvertedPendulum-v4",
        total_timesteps=5000,
        learning_starts=500,
        batch_size=128,
        num_candidates=8,
        target_kl=0.5,
        hidden_dim=64,
        policy_lr=1e-3,
        tau=0.02,
        eval_every=1250,
        eval_episodes=5,
    )
    rows = list(csv.DictReader((run_dir / "evaluations.csv").open()))
    one_step = [float(row["return_mean"]) for row in rows if row["mode"] == "one_step"]
    assert one_step[0] < 500 and max(one_step[-2:]) >= 950
