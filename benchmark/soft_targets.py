"""FPMD-M with the target exp(Q / lambda) in place of pi_old exp(Q / lambda): it keeps equal modes.

It differs from fpmd_meanflow_online.py in one function and has the same flags:

    PYTHONPATH=tests python benchmark/soft_targets.py --env-id door_envs:HiddenDoors-v0 \
        --exp-name fpmd_meanflow_online_soft --weight-mode particles ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from torch import Generator, Tensor

import fpmd_meanflow_online as fpmd

own_rules, mirror_descent_targets = fpmd.own_rules, fpmd.mirror_descent_targets  # as they are
BANDWIDTH = 0.1  # std of the kernels, in actions of [-1, 1]; a third of a door's width


def log_density(actions: Tensor) -> Tensor:
    """Of the law that actions (N, B, act_dim) were drawn from, at each: (N, B), up to a constant.

    A kernel estimate, with a Gaussian around every action; too coarse for many dimensions.
    """
    squares = (actions[:, None] - actions).square().sum(-1)  # (N, N, B)
    return (-squares / (2 * BANDWIDTH**2)).logsumexp(1)


def soft_targets(
    agent: fpmd.Agent, candidates: Tensor, scores: Tensor, args: fpmd.Args, rng: Generator
) -> tuple[Tensor, Tensor]:
    """A candidate (B, act_dim) of those (N, B, act_dim), as if drawn from exp(Q / lambda); 1 (B,).

    Importance sampling: Q - lambda log p in place of Q divides by p, the candidates' density.
    The metric policy/ess stays that of the weights without it.
    """
    temperature = agent.q_std_within * args.particle_temperature  # lambda
    soft_scores = scores - temperature * log_density(candidates.clamp(-1, 1))
    return mirror_descent_targets(agent, candidates, soft_scores, args, rng)


def rules_of_particles(args: fpmd.Args) -> list[tuple[bool, str]]:
    """Those of the script, and that its other weights are not asked for."""
    needed = "soft targets need --weight-mode particles"
    return [*own_rules(args), (args.weight_mode == "particles", needed)]


def change_the_script() -> None:
    """Put soft targets into FPMD-M, and a name of their own into the files that runs write."""
    fpmd.ALGORITHM = "FPMD-M with soft targets"
    fpmd.own_rules = rules_of_particles
    fpmd.mirror_descent_targets = soft_targets


if __name__ == "__main__":
    change_the_script()
    fpmd.cli()
