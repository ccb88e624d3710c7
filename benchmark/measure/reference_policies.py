"""What a policy that learned nothing earns: uniformly random actions, and the zero action.

Returns are measured by the training script's own environments and `evaluate`, so they stand on
the same scale as its evaluations: every episode has its own seed, actions are those of the
rescaled box [-1, 1] (zero is the middle of the original one), and return_std is the standard
deviation over episodes.

    python benchmark/measure/reference_policies.py              # all tasks of the results
    python benchmark/measure/reference_policies.py --env-ids Ant-v5 --episodes 50 --output ant.csv
"""

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import RESULTS
from benchmark.cli import Parser, output, run, text, whole
from benchmark.files import write_csv

import torch
from torch import Tensor

import fpmd_online as fpmd

ENV_IDS = [
    "Ant-v4",
    "HalfCheetah-v4",
    "Hopper-v4",
    "Humanoid-v4",
    "InvertedPendulum-v4",
    "Swimmer-v4",
    "Walker2d-v4",
    "dm_control/cheetah-run-v0",
    "dm_control/cartpole-swingup-v0",
]


def act_randomly(agent, obs: Tensor, _args: fpmd.Args, rng: torch.Generator) -> Tensor:
    """Uniform actions (B, act_dim), as a script draws them before it learns."""
    return 2 * torch.rand((len(obs), agent.act_dim), generator=rng) - 1


def act_zero(agent, obs: Tensor, _args: fpmd.Args, _rng: torch.Generator) -> Tensor:
    return torch.zeros(len(obs), agent.act_dim)


POLICIES = {"random": act_randomly, "zero": act_zero}


def measure(env_id: str, episodes: int, seed: int) -> list[dict]:
    """One row per policy for one environment."""
    envs, args = fpmd.make_envs(env_id, episodes), fpmd.Args(seed=seed)
    act_dim = envs.single_action_space.shape[0]
    agent = SimpleNamespace(act_dim=act_dim, device=torch.device("cpu"))
    rows = []
    for policy, act in POLICIES.items():
        returns, *_ = fpmd.evaluate(act, agent, envs, args)
        row = {"env_id": env_id, "policy": policy, "episodes": episodes}
        row |= {"return_mean": f"{returns.mean():.4f}", "return_std": f"{returns.std():.4f}"}
        rows.append(row | {key: metadata.version(key) for key in ("mujoco", "gymnasium")})
        print(*rows[-1].values(), flush=True)
    envs.close()
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--env-ids", nargs="+", type=text, default=ENV_IDS, metavar="ID")
    words = "per environment and policy"
    parser.add_argument("--episodes", type=whole(1, 10_000), default=20, help=words)
    words = "of the episodes and random actions"
    parser.add_argument("--seed", type=whole(0, 2**62), default=1, help=words)
    default = str(RESULTS / "reference_policies.csv")
    words = "CSV to write, as a whole"
    parser.add_argument("--output", type=output(), default=default, help=words)
    args = parser.parse_args()
    for env_id in args.env_ids:
        fpmd.make_env(env_id).close()  # refused before the first one takes its time
    rows = [row for env_id in args.env_ids for row in measure(env_id, args.episodes, args.seed)]
    write_csv(rows, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
