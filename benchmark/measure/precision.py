"""How far bfloat16 moves what an update decides, on trained agents: results/precision.csv.

For states of the replay buffer in each run's checkpoint, and 32 candidates per state from the same
noise in float32 and bfloat16:

    generation   error of the candidates, whether float32 critics choose the same one of them, and
                 the error of its Q, in terms of the spread of Q over a state's candidates
    ranking      whether critics in bfloat16 choose what float32 ones do among float32 candidates,
                 and how much Q that loses; alone, with the last layer in float32 (head), and with
                 the best 4 ranked again in float32

    python benchmark/measure/precision.py runs/<run> [runs/<run> ...]
"""

import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import RESULTS
from benchmark.cli import Parser, output, run
from benchmark.files import fail, write_csv
from benchmark.measure.measuring import load_script
from benchmark.runs import read_args, script_of

import torch
from torch import Tensor, nn

STATES, CANDIDATES, AGAIN = 4096, 32, 4


def bfloat16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled)


def head_in_float32(net: nn.Module, *inputs: Tensor) -> Tensor:
    """A critic of which only the last layer computes in float32."""
    *hidden, head = net.rest
    with bfloat16():
        x = net.first(*inputs)
        for layer in hidden:
            x = layer(x)
    return head(x.float())


def judge(chosen: Tensor, q: Tensor) -> dict:
    """How often (B,) indices are float32's choice, and the Q they lose in terms of its spread."""
    loss = q.amax(0) - q.gather(0, chosen[None])[0]
    return {
        "agreement": (chosen == q.argmax(0)).float().mean().item(),
        "q_loss": (loss.mean() / q.std(0).mean()).item(),
    }


def script_of_run(run_dir: Path) -> ModuleType:
    """A copy of the script that made it, which must be one that ranks candidates."""
    name = read_args(run_dir)["exp_name"]
    path = script_of(name)
    if path is None:
        fail(f"{run_dir}: --exp-name {name} begins with the name of no script")
    script = load_script(path.stem)
    if not hasattr(script, "propose"):
        fail(f"{run_dir} is a run of {path.name}, which generates no candidates")
    return script


@torch.no_grad()
def measure(run_dir: str) -> list[dict]:
    """Rows of the CSV for one run."""
    script = script_of_run(Path(run_dir))
    _, saved = script.load(run_dir, "checkpoint.pt")
    args = script.Args(**saved["args"])
    args.num_candidates = CANDIDATES
    rows, draw = saved["buffer"], torch.Generator().manual_seed(0)
    if not len(rows):
        fail(f"{run_dir}'s checkpoint holds no transitions yet")
    envs, device = saved["envs"], torch.device("cpu")
    sizes = envs["obs"].shape[1], envs["episodes"][0]["actions"].shape[1]
    agent = script.Agent(*sizes, args, device)
    agent.load_state_dict(saved["agent"])
    rows = rows[torch.randint(len(rows), (STATES,), generator=draw)]
    obs = script.ReplayBuffer(1, *sizes, device).columns(rows)["next_obs"]
    std, candidates = agent.log_alpha.exp() * args.noise_scale, {}
    for low in False, True:
        with bfloat16(low):
            rng = torch.Generator().manual_seed(1)
            candidates[low] = script.propose(agent.policy, obs, std, args, rng)
    exact, moved = candidates[False], candidates[True]
    q, q_moved = (agent.critic(obs, each).amin(0) for each in (exact, moved))  # (N, B)
    spread = q.std(0).mean().item()
    row = {"algorithm": Path(script.__file__).stem, "env_id": args.env_id, "seed": args.seed}
    row |= {"global_step": saved["global_step"], "q_mean": q.mean().item(), "q_spread": spread}
    error = {
        "action_error": (moved - exact).abs().mean().item(),
        "q_error": ((q_moved.amax(0) - q.amax(0)).abs().mean() / spread).item(),
    }
    rows = [row | {"what": "generation"} | judge(q_moved.argmax(0), q) | error]
    with bfloat16():
        alone = agent.critic(obs, exact).amin(0)
    twins = agent.critic.q1, agent.critic.q2
    head = torch.stack([head_in_float32(net, obs, exact) for net in twins])
    for what, ranked in ("ranking", alone), ("ranking, head", head.squeeze(-1).amin(0)):
        top = ranked.topk(AGAIN, 0).indices
        best_of_top = top.gather(0, q.gather(0, top).argmax(0)[None])[0]
        rows.append(row | {"what": what} | judge(ranked.argmax(0), q))
        rows.append(row | {"what": f"{what}, best {AGAIN} again"} | judge(best_of_top, q))
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories with a checkpoint")
    default = str(RESULTS / "precision.csv")
    parser.add_argument("--output", type=output(), default=default, help="CSV to write")
    options = parser.parse_args()
    for run_dir in options.runs:
        script_of_run(Path(run_dir))  # refused before the first one takes its time
    rows = [row for run_dir in options.runs for row in measure(run_dir)]
    for row in rows:
        row |= {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, float)}
    write_csv(rows, options.output)
    print(f"wrote {options.output}; benchmark/report/report.py makes the table")


if __name__ == "__main__":
    run(main)
