"""Milliseconds per action: one-step policies beside the same in many steps, DPMD and SAC.

Everything is timed in one process on Ant-v4's sizes with the published networks, untrained since
weights change no time. A call takes observations that are on the device and returns actions on the
CPU. One step is the script's OneStepPolicy, as it is deployed; FPMD-R in more steps is generate;
DPMD and SAC act as they are deployed, DPMD with 20 steps of one candidate. Rounds of all cases take
turns, so that a drift of the machine hits them alike; single calls are timed, so that there is a
99th percentile.

compiled: generate (all T steps in one), or without one the policy, through torch.compile.
captured: the eager call recorded as one CUDA graph.
onnxruntime: what export.py writes, from and to numpy, in one thread of a CPU. Beside it stand plain
matrix products of the same widths and nothing else, through the same door: the floor.

    python benchmark/measure/latency.py --threads 1
    python benchmark/measure/latency.py --device cuda
    python benchmark/measure/latency.py --threads 1 --modes eager --calls 200 --output quick.csv
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import scripts
from benchmark.cli import Parser, output, run, whole
from benchmark.deploy import policies
from benchmark.deploy.act import OnnxPolicy
from benchmark.deploy.export import to_onnx, with_fast_activations
from benchmark.deploy.policies import CPU
from benchmark.files import fail, write_csv
from benchmark.measure.measuring import (
    add_machine_flags,
    default_output,
    load_script,
    provenance,
    use_machine,
)

import numpy as np
import torch
from torch import Tensor, nn

OBS_DIM, ACT_DIM = 27, 8  # Ant-v4's
BURST = 20  # calls of a case in a row
POLICIES = {  # name, number of steps: (script, mode of act or None for generate)
    ("FPMD-R", 1): ("fpmd_online", "one_step"),
    ("FPMD-M", 1): ("fpmd_meanflow_online", "one_step"),
    ("MVP", 1): ("mvp_online", "one_step"),
    ("SAC", 1): ("sac_online", "one_step"),
    ("SAC, sampled", 1): ("sac_online", "sampled"),
    ("FPMD-R", 5): ("fpmd_online", None),
    ("FPMD-R", 20): ("fpmd_online", None),
    ("DPMD", 20): ("dpmd_online", "one_candidate"),
}
MODES = "eager", "compiled", "onnxruntime", "captured"
FLOORS = {"matrix products, 3 x 256": (256, 3), "matrix products, 4 x 512": (512, 4)}


@dataclass
class Case:
    """What one row of the CSV times."""

    policy: str
    steps: int
    batch: int
    mode: str
    call: Callable[[], Tensor | np.ndarray]
    seconds: list[float] = field(default_factory=list)


def action(
    module: ModuleType, act_mode: str | None, steps: int, batch: int, mode: str, device
) -> Callable[[], Tensor]:
    """A function from nothing to actions (batch, act_dim) on the CPU."""
    args = module.Args()
    torch.manual_seed(0)
    agent, rng = module.Agent(OBS_DIM, ACT_DIM, args, device), torch.Generator(device)
    obs = torch.randn((batch, OBS_DIM), generator=rng.manual_seed(0), device=device)
    if act_mode is not None:
        nfe, _ = module.cost_of(act_mode, args)
        if nfe != steps:
            raise ValueError(f"{module.__name__} takes {nfe} steps in {act_mode}")
    if act_mode == "one_step" and hasattr(module, "OneStepPolicy"):
        policy = module.OneStepPolicy(agent.acting_policy)  # as it is deployed
    elif hasattr(module, "generate"):
        policy = partial(module.generate, agent.acting_policy, flow_steps=steps)
    else:
        policy = None  # SAC's act is all there is
    if act_mode == "one_candidate" or policy is None:
        function = module.MODES[act_mode]
        if mode == "compiled" and policy:
            module.generate = torch.compile(module.generate, dynamic=False)  # looked up there
        elif mode == "compiled":
            agent.acting_policy.compile(dynamic=False)
    else:
        if mode == "compiled":
            policy = torch.compile(policy, dynamic=False)

        @torch.no_grad()
        def function(agent, obs, args, rng) -> Tensor:
            noise = torch.randn((batch, ACT_DIM), generator=rng, device=device)
            return policy(obs, args.prior_std * noise).clamp(-1, 1)

    if mode == "captured":
        function = module.Captured(function)
    return lambda: function(agent, obs, args, rng).cpu()


class Products(nn.Module):
    """The matrix products of a policy's layers, without biases and activations."""

    def __init__(self, hidden_dim: int, hidden_layers: int):
        super().__init__()
        dims = [OBS_DIM + ACT_DIM, *[hidden_dim] * hidden_layers, ACT_DIM]
        weights = [torch.randn(shape) / shape[0] ** 0.5 for shape in pairwise(dims)]
        self.weights = nn.ParameterList(nn.Parameter(w) for w in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        """obs (B, obs_dim), noise (B, act_dim) -> (B, act_dim)."""
        x = torch.cat(inputs, 1)
        for weight in self.weights:
            x = x @ weight
        return x


def exported(model: nn.Module, noise_shape: tuple | None, batch: int) -> Callable[[], np.ndarray]:
    """A function from nothing to actions (batch, act_dim): the model through onnxruntime."""
    inputs = [torch.zeros(2, OBS_DIM)]
    if noise_shape:
        inputs.append(torch.zeros(2, *noise_shape))
    policy = OnnxPolicy(to_onnx(model, tuple(inputs), {}))
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((batch, OBS_DIM), np.float32)

    def call() -> np.ndarray:
        noise = rng.standard_normal((batch, *noise_shape), np.float32) if noise_shape else None
        return policy.batch(obs, noise)

    return call


def exported_policy(
    module: ModuleType, act_mode: str | None, steps: int, batch: int
) -> Callable[[], np.ndarray]:
    """The same of a script's policy as it is deployed; others raise ValueError."""
    if act_mode != module.DEPLOYED:
        raise ValueError("only what is deployed is exported")
    args = module.Args()
    torch.manual_seed(0)
    agent = module.Agent(OBS_DIM, ACT_DIM, args, CPU)
    actor = policies.actor(module, agent, args)
    bounds = torch.ones(2, ACT_DIM) * torch.tensor([[-1.0], [1.0]])
    model = with_fast_activations(policies.EnvironmentPolicy(actor, bounds), module)
    if module.cost_of(act_mode, args)[0] != steps:
        raise ValueError(f"{module.__name__} takes other steps than {steps}")
    return exported(model, actor.noise_shape, batch)


def cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Everything that can be timed, compiled and warm; what cannot has a line on stderr."""
    found = []
    floors = FLOORS.items() if "onnxruntime" in options.modes else ()
    for policy, sizes in floors:
        for batch in options.batches if policy in options.policies else ():
            make = partial(exported, Products(*sizes), (ACT_DIM,), batch)
            add_case(found, Case(policy, 1, batch, "onnxruntime", make), device)
    for (policy, steps), (script, act_mode) in POLICIES.items():
        if policy not in options.policies:
            continue
        if script not in scripts():
            print(f"left out: {policy}, there is no {script}.py", file=sys.stderr)
            continue
        for batch in options.batches:
            for mode in options.modes:
                module = load_script(script)
                make = partial(action, module, act_mode, steps, batch, mode, device)
                if mode == "onnxruntime":
                    make = partial(exported_policy, module, act_mode, steps, batch)
                add_case(found, Case(policy, steps, batch, mode, make), device)
    return found


def add_case(found: list[Case], case: Case, device: torch.device) -> None:
    """Make the call that a case times, and warm it up; what cannot be has a line on stderr."""
    steps = f"{case.steps} step{'s' * (case.steps > 1)}"
    what = f"{case.policy}, {steps}, batch {case.batch}, {case.mode}"
    try:
        if case.mode == "onnxruntime" and device.type != "cpu":
            raise ValueError("it is timed on a CPU")
        case.call = case.call()
        for _ in range(5):
            actions = case.call()
        on_cpu = isinstance(actions, np.ndarray) or actions.device.type == "cpu"
        assert actions.shape == (case.batch, ACT_DIM) and on_cpu
    except Exception as error:  # above all no compiler, or a package that is missing
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"left out: {what}: {reason[0]}", file=sys.stderr)
        return
    found.append(case)
    print(f"ready: {what}", file=sys.stderr)


def time_all(found: list[Case], calls: int, device: torch.device) -> None:
    """Bursts of every case in turn; the first two calls of a burst find cold caches, uncounted."""
    gc.collect()
    gc.disable()
    while found and len(found[0].seconds) < calls:
        for case in found:
            for i in range(BURST + 2):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                case.call()  # its .cpu() waits for the device
                spent = time.perf_counter() - start
                if i >= 2:
                    case.seconds.append(spent)
    gc.enable()


def to_rows(found: list[Case], device: torch.device) -> list[dict]:
    origin, rows = provenance(device), []
    for case in found:
        ms = 1000 * np.array(case.seconds)
        row = {"policy": case.policy, "steps": case.steps, "batch": case.batch, "mode": case.mode}
        threads = 1 if case.mode == "onnxruntime" else origin["threads"]
        row |= {"device": device.type, "threads": threads}
        row |= {"mean_ms": f"{ms.mean():.4f}", "median_ms": f"{np.median(ms):.4f}"}
        row |= {"p99_ms": f"{np.percentile(ms, 99):.4f}", "calls": len(ms)}
        row |= {"torch": origin["torch"], "hardware": origin["device"], "commit": origin["commit"]}
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    several = {"nargs": "+", "metavar": "NAME"}
    add_machine_flags(parser)
    names = [*FLOORS, *dict.fromkeys(policy for policy, _ in POLICIES)]
    parser.add_argument("--policies", **several, choices=names, default=names, help="which")
    parser.add_argument("--modes", **several, choices=MODES, default=list(MODES[:3]), help="which")
    text = "actions at once"
    several = {"nargs": "+", "metavar": "B", "type": whole(1, 10**5)}
    parser.add_argument("--batches", **several, default=[1, 256], help=text)
    text = "of every case, at least"
    parser.add_argument("--calls", type=whole(1, 10**7), default=1_000, help=text)
    text = (
        "CSV to write, as a whole; unset: benchmark/results/latency_<device>.csv, but a temporary "
        "file if only a part is measured"
    )
    parser.add_argument("--output", type=output(), help=text)
    options = parser.parse_args()
    if options.output is None:
        partly = ["policies", "modes", "batches", "calls"]
        options.output = default_output(parser, options, "latency", partly)
    return options


def main() -> None:
    options = parse()
    device = use_machine(options)
    found = cases(options, device)
    if not found:
        fail("nothing to measure")
    time_all(found, options.calls, device)
    rows = to_rows(found, device)
    write_csv(rows, options.output)
    print(f"wrote {options.output}; benchmark/report/report.py makes the table")


if __name__ == "__main__":
    run(main)
