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

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import RESULTS, script_of, write_csv
from benchmark.measure.measuring import load_script

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


@torch.no_grad()
def measure(run_dir: str) -> list[dict]:
    """Rows of the CSV for one run."""
    stored = json.loads((Path(run_dir) / "args.json").read_text())
    name = script_of(stored["exp_name"]).stem
    script = load_script(name)
    _, saved = script.load(run_dir, "checkpoint.pt")
    args = script.Args(**saved["args"])
    args.num_candidates = CANDIDATES
    buffer, draw = saved["buffer"], torch.Generator().manual_seed(0)
    sizes = buffer["obs"].shape[1], buffer["actions"].shape[1]
    agent = script.Agent(*sizes, args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    obs = buffer["next_obs"][torch.randint(len(buffer["obs"]), (STATES,), generator=draw)]
    std, candidates = agent.log_alpha.exp() * args.noise_scale, {}
    for low in False, True:
        with bfloat16(low):
            rng = torch.Generator().manual_seed(1)
            candidates[low] = script.propose(agent.policy, obs, std, args, rng)
    exact, moved = candidates[False], candidates[True]
    q, q_moved = (agent.critic(obs, each).amin(0) for each in (exact, moved))  # (N, B)
    spread = q.std(0).mean().item()
    row = {"algorithm": name, "env_id": args.env_id, "seed": args.seed}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run directories with a checkpoint")
    default = RESULTS / "precision.csv"
    parser.add_argument("--output", type=Path, default=default, help="CSV to write")
    options = parser.parse_args()
    rows = [row for run_dir in options.runs for row in measure(run_dir)]
    for row in rows:
        row |= {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, float)}
    write_csv(rows, options.output)
    print(f"wrote {options.output}; benchmark/report/report.py makes the table")


if __name__ == "__main__":
    main()
