"""What one update costs, and what of it: generating candidates, ranking them, learning.

Everything is timed in one process on Ant-v4's sizes, with the repetitions of all measurements
interleaved, so that a drift of the machine hits them alike; medians are reported. The floating
point operations are counted by torch and set against the rate of a plain 8192 x 256 x 256 matrix
product in the same run. Three measurements change one thing in the generation: torch's own Mish,
ReLU (not the method: it shows the floor), and the first layer's state part computed once per
state instead of once per candidate and Euler step.

    python benchmark/update_cost.py
    python benchmark/update_cost.py --threads 2 --compile --output update_cost_2.csv
    python benchmark/update_cost.py --device cuda --compile
"""

import argparse
import copy
import csv
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from report import update_cost
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fpmd_online as fpmd  # noqa: E402

OBS_DIM, ACT_DIM, BATCH_SIZE = 27, 8, 256  # Ant-v4
SETTINGS = (32, 20), (32, 1), (8, 4)  # (num_candidates, flow_steps)
LEARNS = "update", "learning"  # the measurements that need gradients


def with_activation(policy: nn.Module, activation: type[nn.Module]) -> nn.Module:
    """A copy of the policy in which another activation takes Mish's place."""
    policy = copy.deepcopy(policy)
    for layers in policy.net, policy.time_mlp:
        for i, layer in enumerate(layers):
            if isinstance(layer, fpmd.Mish):
                layers[i] = activation()
    return policy


class StateOnce(nn.Module):
    """The same velocity field, its first layer's product with the states given beforehand."""

    def __init__(self, policy: fpmd.VelocityField):
        super().__init__()
        self.policy = policy

    def state_part(self, obs: Tensor) -> Tensor:
        return linear(obs, self.policy.net[0].weight[:, :OBS_DIM], self.policy.net[0].bias)

    def forward(self, state_part: Tensor, z: Tensor, t: Tensor) -> Tensor:
        weight = self.policy.net[0].weight
        embedding = self.policy.time_mlp(fpmd.time_embedding(t))
        rows = state_part + linear(embedding, weight[:, OBS_DIM + ACT_DIM :])  # (B, hidden_dim)
        hidden = linear(z, weight[:, OBS_DIM : OBS_DIM + ACT_DIM]) + rows  # (N, B, hidden_dim)
        return self.policy.net[1:](hidden)


def measurements(num_candidates: int, flow_steps: int, device: torch.device, compiled: bool):
    """What is timed at one setting: {name: (function, how often one call does it)}."""
    torch.manual_seed(0)
    args = fpmd.Args(num_candidates=num_candidates, flow_steps=flow_steps)
    agent = fpmd.Agent(OBS_DIM, ACT_DIM, args, device)
    policies = {
        "generation": agent.policy,
        "generation, nn.Mish": with_activation(agent.policy, nn.Mish),
        "generation, ReLU": with_activation(agent.policy, nn.ReLU),
    }
    state_once = StateOnce(agent.policy)
    if compiled:  # as the script's --compile does
        for network in *policies.values(), state_once, agent.critic, agent.target_critic:
            network.compile(dynamic=False)

    rng = torch.Generator(device).manual_seed(0)
    batch = {
        "obs": torch.randn((BATCH_SIZE, OBS_DIM), device=device),
        "actions": torch.rand((BATCH_SIZE, ACT_DIM), device=device) * 2 - 1,
        "rewards": torch.randn(BATCH_SIZE, device=device),
        "next_obs": torch.randn((BATCH_SIZE, OBS_DIM), device=device),
        "terminations": torch.zeros(BATCH_SIZE, device=device),
    }
    obs, std = batch["next_obs"], torch.tensor(0.1, device=device)
    noise = torch.randn((num_candidates, BATCH_SIZE, ACT_DIM), device=device)
    state_rows = obs.repeat(num_candidates, 1)  # (N * B, obs_dim)
    weight = agent.policy.net[0].weight[:, :OBS_DIM].detach()

    def update():  # the policy learns in one of policy_delay updates
        for _ in range(args.policy_delay):
            fpmd.update(agent, batch, args, rng)

    with torch.no_grad():
        candidates = fpmd.propose(agent.policy, obs, std, args, rng)
        ranked = fpmd.select_action(agent.critic, obs, candidates)

    def learning():  # an update whose candidates and their ranking cost nothing
        known = {"propose": lambda *_: candidates, "select_action": lambda *_: ranked}
        with patch.multiple(fpmd, **known):
            update()

    def generation_state_once():
        return fpmd.generate(state_once, state_once.state_part(obs), noise, flow_steps)

    def state_part_alone():
        for _ in range(flow_steps):
            linear(state_rows, weight)

    with torch.no_grad():  # the same actions, or the comparison would say nothing
        actions = fpmd.generate(agent.policy, obs, noise, flow_steps)
        torch.testing.assert_close(generation_state_once(), actions, rtol=1e-3, atol=1e-4)
    timed = {"update": (update, args.policy_delay), "learning": (learning, args.policy_delay)}
    for name, policy in policies.items():
        timed[name] = partial(fpmd.propose, policy, obs, std, args, rng), 1
    timed["generation, state part once"] = generation_state_once, 1
    timed["state part alone"] = state_part_alone, 1
    timed["ranking"] = partial(fpmd.select_action, agent.critic, obs, candidates), 1
    one_step = partial(fpmd.act, agent, obs[:1], args, rng, "one_step")
    return timed | {"one-step action": (one_step, 1)}


def seconds(function, calls: int, device: torch.device) -> float:
    """Mean time of a call; a GPU works asynchronously, so its queue is emptied on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return (models or [sys.platform])[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--compile", action="store_true", help="time compiled networks as well")
    parser.add_argument("--repetitions", type=int, default=15, help="of every measurement")
    text = "CSV to write, as a whole; unset: benchmark/results/update_cost_<cpu or cuda>.csv"
    parser.add_argument("--output", type=Path, help=text)
    args = parser.parse_args()
    device = torch.device(args.device)
    output = args.output or ROOT / "benchmark" / "results" / f"update_cost_{device.type}.csv"
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32, as the script's float32
    torch._dynamo.config.recompile_limit = 64  # every setting compiles a version of its own

    a, b = torch.randn((8192, 256), device=device), torch.randn((256, 256), device=device)
    timed = {("", "", "eager", "matmul 8192x256x256"): (partial(torch.mm, a, b), 1)}
    for mode in ["eager", "compiled"] if args.compile else ["eager"]:
        for setting in SETTINGS:
            for name, entry in measurements(*setting, device, mode == "compiled").items():
                timed[(*setting, mode, name)] = entry

    flops, calls, times = {}, {}, {key: [] for key in timed}
    for key, (function, _) in timed.items():  # compile, warm up, count, and see how long it takes
        *setting, mode, name = key
        with torch.set_grad_enabled(name in LEARNS):
            if mode == "eager":
                with FlopCounterMode(display=False) as counter:
                    function()
                flops[(*setting, name)] = counter.get_total_flops()
            seconds(function, 3, device)
            calls[key] = math.ceil(0.02 / seconds(function, 1, device))  # at least 20 ms
    for repetition in range(args.repetitions):
        for key, (function, _) in timed.items():
            with torch.set_grad_enabled(key[-1] in LEARNS):
                times[key].append(seconds(function, calls[key], device))
        print(f"\rrepetition {repetition + 1} of {args.repetitions}", end="", file=sys.stderr)
    print(file=sys.stderr)

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    rows = []
    for key, (_, times_done) in timed.items():
        num_candidates, flow_steps, mode, name = key
        low, median, high = np.percentile(times[key], (25, 50, 75)) / times_done
        operations = flops[num_candidates, flow_steps, name] / times_done
        row = {"num_candidates": num_candidates, "flow_steps": flow_steps, "mode": mode}
        row |= {"measurement": name, "milliseconds": f"{1000 * median:.4f}"}
        row |= {"quartile_1": f"{1000 * low:.4f}", "quartile_3": f"{1000 * high:.4f}"}
        row |= {"multiply_adds": round(operations / 2)}
        row |= {"gflop_per_s": f"{operations / median / 1e9:.2f}"}
        row |= {"batch_size": BATCH_SIZE, "repetitions": args.repetitions}
        row |= {"device": device_name(device), "threads": torch.get_num_threads()}
        rows.append(row | {"torch": torch.__version__, "commit": commit})
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(update_cost(output))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
