"""What an update, an action and an environment step cost, and how far that is from the floor.

Everything is timed in one process on Ant-v4's sizes, with the repetitions of all measurements
interleaved, so that a drift of the machine hits them alike; medians and quartiles are written.
Every script runs eager, compiled (its own accelerate), and compiled with bfloat16 generation; on
CUDA also with TF32 products, and recorded as CUDA graphs, plain (graph) and compiled (captured):

    update          a whole update, mean over policy_delay of them; its parts one by one:
    generation      proposing N candidates per state
    ranking         choosing the best by two critics
    learning        the rest: losses, gradients, optimizers, slow copies
    acting          actions for 5 environments while training, from array to array
    one-step        an action of one network evaluation for one state, from array to array, as in
                    training's evaluations and deployed (the script's for_one_step)
    sac             the same of a SAC actor of the same width: a sample, and the mean
    environments    one step of 5 Ant-v4
    first-update    the very first update, once, with empty compile caches

Floors: see `Part`. --variants adds techniques that were looked at and not kept. --end-to-end
trains instead (see `end_to_end`) and writes another file. Where only a part is measured, the
committed results are left alone.

    python benchmark/speed.py --variants
    python benchmark/speed.py --only update generation --modes eager compiled --settings 8,1
    python benchmark/speed.py --device cuda
    python benchmark/speed.py --end-to-end --threads 1
"""

import argparse
import contextlib
import csv
import io
import itertools
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from collect import ROOT, write_csv
from measuring import load_script, provenance
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ENV_ID, OBS_DIM, ACT_DIM, NUM_ENVS = "Ant-v4", 27, 8, 5
SETTINGS = {  # script: its (num_candidates, flow_steps)
    "fpmd_online": [(32, 20), (32, 1), (8, 1)],
    "fpmd_meanflow_online": [(32, 1), (8, 1)],
    "mvp_online": [(32, 1), (8, 1)],
    "sac_online": [("", "")],
}
FLOWS = [name for name in SETTINGS if name != "sac_online"]
MODES = {  # on the command line: (mode, precision) in the CSV
    "eager": ("eager", "float32"),
    "compiled": ("compiled", "float32"),
    "bfloat16": ("compiled", "bfloat16"),
}
CUDA_MODES = {
    "eager-tf32": ("eager", "tf32"),
    "graph": ("graph", "float32"),
    "graph-tf32": ("graph", "tf32"),
    "captured": ("captured", "float32"),
    "captured-tf32": ("captured", "tf32"),
    "captured-bfloat16": ("captured", "bfloat16"),
}
PER_CASE = "update", "generation", "ranking", "learning", "acting"  # per setting and mode
MEASUREMENTS = *PER_CASE, "one-step", "sac", "environments", "first-update"
PRODUCT = 8192, 256, 256  # the large matrix product whose rate the floors use
COPY = 2**28  # bytes of the large copy, beyond any cache
LONG_ENOUGH = 0.02  # seconds that a repetition takes at least
END_TO_END = {  # flags of the training runs of --end-to-end
    "env_id": ENV_ID,
    "num_candidates": 8,
    "flow_steps": 1,
    "utd": 0.2,
    "learning_starts": 1_000,
    "log_every": 500,
    "eval_every": 0,
    "checkpoint_every": 0,
}


# ---------------------------------------------------------------------------- what is timed
@dataclass
class Part:
    """Work whose shortest time on this machine is max(2 m / R, b / W).

    m: its multiply-adds as torch counts them in what the script executes eagerly (FPMD-M's JVP then
    multiplies by zero tangents of weights, too: a twentieth of learning, which compiling drops).
    R: the best rate of a plain product in its precision, 8192 or as many rows as the script's
    pieces have, by 256 x 256. b: the bytes that cannot but move, all float32, as if nothing stayed
    in a cache from call to call: every weight once, inputs, outputs, and for learning each
    parameter with its Adam moments and slow copy, in and out; no activations. W: bytes read and
    written per second by a large copy. The floor of an update is the sum of its parts' floors,
    since they run one after another.
    """

    multiply_adds: float
    megabytes: float
    precision: str

    def floor(self, rates: dict[str, float], bandwidth: float) -> float:
        """Seconds, from {precision: multiply-adds per second} and megabytes per second."""
        return max(self.multiply_adds / rates[self.precision], self.megabytes / bandwidth)


@dataclass
class Measurement:
    """One row of the CSV: what is called, how often a call does it, and what came out."""

    what: dict  # script, num_candidates, flow_steps, mode, precision, measurement
    function: Callable | None  # None: nothing to repeat
    does: int = 1
    multiply_adds: float = math.nan
    parts: tuple[Part, ...] = ()
    megabytes: float = math.nan  # the most a call allocates on a GPU
    calls: int = 1
    seconds: list[float] = field(default_factory=list)  # of doing it once, per repetition

    def set_precision(self) -> None:
        """The one that this measurement's products are to have, while others have their own."""
        tf32 = self.what["precision"] == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    def repeat(self, device: torch.device) -> None:
        self.set_precision()
        self.seconds.append(seconds(self.function, self.calls, device) / self.does)

    def warm_up(self, device: torch.device) -> None:
        """Compile, fill caches, and see how many calls make a repetition long enough."""
        self.set_precision()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            seconds(self.function, 2, device)
            torch.cuda.reset_peak_memory_stats(device)
            seconds(self.function, 1, device)
            self.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        seconds(self.function, 2, device)
        self.calls = math.ceil(LONG_ENOUGH / seconds(self.function, 1, device))


@dataclass
class Case:
    """A script at one setting and in one mode, with an agent and a batch to update it on."""

    script: str
    setting: tuple[int, int]
    mode: str
    precision: str
    module: ModuleType
    args: object
    agent: nn.Module
    batch: dict[str, Tensor]
    rng: torch.Generator

    def row(self, measurement: str) -> dict:
        return row_of(self.script, self.setting, self.mode, self.precision, measurement)

    @property
    def device(self) -> torch.device:
        return self.rng.device


def row_of(script="", setting=("", ""), mode="eager", precision="float32", measurement="") -> dict:
    row = {"script": script, "num_candidates": setting[0], "flow_steps": setting[1]}
    return row | {"mode": mode, "precision": precision, "measurement": measurement}


def make_case(script, setting, mode, batch_size, device, **replaced) -> Case:
    """A fresh agent, accelerated if the mode says so; nothing has been computed with it yet."""
    module, (kind, precision) = load_script(script, **replaced), (MODES | CUDA_MODES)[mode]
    sizes = dict(zip(("num_candidates", "flow_steps"), setting, strict=True))
    sizes = {key: value for key, value in sizes.items() if value}
    args = module.Args(**sizes, precision=precision, batch_size=batch_size)
    torch.manual_seed(0)
    agent = module.Agent(OBS_DIM, ACT_DIM, args, device)
    if kind in ("compiled", "captured"):
        module.accelerate(agent, args, device)
        if agent.policy_loss is module.policy_loss:  # accelerate has said why
            sys.exit("speed.py: error: nothing can be compiled here; choose --modes eager")
    if kind == "compiled":  # on CUDA accelerate does both
        agent.act, agent.learn = module.act, module.learn
    elif kind == "graph":
        agent.act, agent.learn = module.Captured(module.act), module.Captured(module.learn)
    batch = {
        "obs": torch.randn((batch_size, OBS_DIM), device=device),
        "actions": torch.rand((batch_size, ACT_DIM), device=device) * 2 - 1,
        "rewards": torch.randn(batch_size, device=device),
        "next_obs": torch.randn((batch_size, OBS_DIM), device=device),
        "terminations": torch.zeros(batch_size, device=device),
    }
    rng = torch.Generator(device).manual_seed(0)
    return Case(script, setting, kind, precision, module, args, agent, batch, rng)


def policy_delay(args) -> int:
    """Updates of the critics per update of the policy; MVP has no such flag."""
    return getattr(args, "policy_delay", 1)


def functions(case: Case) -> dict[str, tuple[Callable, int]]:
    """{measurement: (function, how often one call does it)}, those of PER_CASE and one-step."""
    module, args, agent, rng = case.module, case.args, case.agent, case.rng
    if not hasattr(module, "propose"):
        return functions_of_sac(case)
    next_obs, std = case.batch["next_obs"], torch.tensor(0.1, device=case.device)
    delay = policy_delay(args)
    rows = args.num_candidates, args.batch_size
    candidates = 2 * torch.rand((*rows, ACT_DIM), device=case.device) - 1
    ranked = candidates[0], torch.randn(rows, device=case.device)
    obs = np.random.default_rng(0).standard_normal((NUM_ENVS, OBS_DIM), np.float32)

    captures = case.mode in ("graph", "captured")
    learn_alone = module.Captured(module.learn) if captures else module.learn

    def update():
        for _ in range(delay):
            module.update(agent, case.batch, args, rng)

    @in_graph(case)
    @torch.no_grad()
    def generation():
        with torch.autocast(case.device.type, torch.bfloat16, args.precision == "bfloat16"):
            return module.propose(agent.policy, next_obs, std, args, rng)

    @in_graph(case)
    @torch.no_grad()
    def ranking():
        return module.select_action(agent.critic, next_obs, candidates)

    def learning():  # an update whose candidates and their ranking cost nothing
        own = module.propose, module.select_action, agent.learn
        module.propose, module.select_action = lambda *_: candidates, lambda *_: ranked
        agent.learn = learn_alone
        try:
            update()
        finally:
            module.propose, module.select_action, agent.learn = own

    def act(obs, mode, agent=agent):
        obs = torch.as_tensor(obs, device=case.device)
        return agent.act(agent, obs, args, rng, mode).cpu().numpy()

    folded = module.for_one_step(agent.target_policy)  # as the script's --evaluate does
    deployed = SimpleNamespace(act=module.act, target_policy=folded, policy=agent.policy)

    return {
        "update": (update, delay),
        "generation": (generation, 1),
        "ranking": (ranking, 1),
        "learning": (learning, delay),
        "acting": (lambda: act(obs, "explore"), 1),
        "one-step": (lambda: act(obs[:1], "one_step"), 1),
        "one-step deployed": (lambda: act(obs[:1], "one_step", deployed), 1),
    }


def in_graph(case: Case) -> Callable:
    """A decorator: what a captured case does in its own graph is timed in a graph, too."""

    def decorate(function: Callable) -> Callable:
        if case.mode not in ("graph", "captured"):
            return function
        captured = case.module.Captured(lambda *_: {"out": function()})
        return lambda: captured(None, {}, case.args, case.rng, "alone")

    return decorate


def functions_of_sac(case: Case) -> dict[str, tuple[Callable, int]]:
    """The same of SAC, which generates and ranks nothing: all of an update is learning."""
    module, args, agent, rng = case.module, case.args, case.agent, case.rng
    obs = np.random.default_rng(0).standard_normal((NUM_ENVS, OBS_DIM), np.float32)

    def update():
        module.update(agent, case.batch, args, rng)

    def act(obs, mode):
        obs = torch.as_tensor(obs, device=case.device)
        return agent.act(agent, obs, args, rng, mode).cpu().numpy()

    return {
        "update": (update, 1),
        "acting": (lambda: act(obs, "explore"), 1),
        "one-step": (lambda: act(obs[:1], "one_step"), 1),
    }


def parts(case: Case, counted: dict[str, float]) -> dict[str, tuple[Part, ...]]:
    """What generation, ranking, learning and a whole update cannot do without."""
    n, batch = getattr(case.args, "num_candidates", 0), case.args.batch_size
    policy, critics = (
        sum(p.numel() for p in network.parameters())
        for network in (case.agent.policy, case.agent.critic)
    )
    states, actions = batch * OBS_DIM, batch * ACT_DIM
    slow = case.agent.target_policy is not case.agent.policy
    numbers = {  # float32 numbers that move
        # weights and states in; two kinds of noise in, candidates out
        "generation": policy + states + 3 * n * actions,
        # weights, states and candidates in; scores and the best action out
        "ranking": critics + states + n * actions + n * batch + actions,
        # batch, best actions and scores in; critics and their two moments in and out, targets in;
        # in one of policy_delay updates policy and moments too, and all slow copies in and out
        "learning": 2 * states + 2 * actions + (2 + n) * batch + 7 * critics
        + ((6 + 2 * slow) * policy + critics) / policy_delay(case.args),
    }  # fmt: skip
    if "generation" not in counted:
        part = Part(counted["update"], 4 * numbers["learning"] / 1e6, case.precision)
        return {"update": (part,)}
    others = "tf32" if case.precision == "tf32" else "float32"
    precision = {"generation": case.precision, "ranking": others, "learning": others}
    part = {
        key: (Part(counted[key], 4 * number / 1e6, precision[key]),)
        for key, number in numbers.items()
    }
    return part | {"update": part["generation"] + part["ranking"] + part["learning"]}


def count(function: Callable, does: int) -> float:
    """Multiply-adds of doing it once, eagerly."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2 / does


def piece_rows(case: Case) -> int:
    """How many rows the networks of an accelerated float32 update see at a time on a CPU."""
    rows = torch.get_num_threads() * 2**20 // 4 // case.args.hidden_dim
    candidates = getattr(case.args, "num_candidates", 1)
    return min(rows, candidates * case.args.batch_size)


def seconds(function: Callable, calls: int, device: torch.device) -> float:
    """Mean time of a call; a GPU works asynchronously, so its queue is emptied on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def first_update(case: Case) -> Measurement:
    """As in a new process without compile caches, but for the compiler's own imports.

    Nothing of this case has been compiled yet: its module has functions of its own, and the caches
    of kernels, in memory and on disk, are put aside.
    """
    from torch._inductor.utils import fresh_cache

    update = partial(case.module.update, case.agent, case.batch, case.args, case.rng)
    with fresh_cache():
        spent = seconds(update, 1, case.device)
    return Measurement(case.row("first-update"), None, seconds=[spent])


# ---------------------------------------------------------------------------- to compare with
class SACActor(nn.Module):
    """A squashed Gaussian with the scripts' width, depth and activation, CleanRL's log std."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        sizes, layers = [OBS_DIM, *[hidden_dim] * 3], []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Mish()]
        self.net = nn.Sequential(*layers)
        self.mean, self.log_std = (nn.Linear(hidden_dim, ACT_DIM) for _ in range(2))

    @torch.no_grad()
    def act(self, obs: Tensor, rng: torch.Generator | None) -> Tensor:
        """tanh of the mean, or with a generator of a sample."""
        h = self.net(obs)
        z = self.mean(h)
        if rng is not None:
            std = (-5 + 0.5 * 7 * (self.log_std(h).tanh() + 1)).exp()  # log std in [-5, 2]
            z = z + std * torch.randn(z.shape, generator=rng, device=z.device)
        return z.tanh()


def sac_actions(case: Case) -> dict[str, Callable]:
    """The same way from array to array as a one-step action."""
    actor = SACActor(case.args.hidden_dim).to(case.device)
    obs = np.random.default_rng(0).standard_normal((1, OBS_DIM), np.float32)

    def act(rng):
        return actor.act(torch.as_tensor(obs, device=case.device), rng).cpu().numpy()

    return {"one-step": lambda: act(case.rng), "one-step mean": lambda: act(None)}


def environment_step(module: ModuleType) -> Callable:
    """The script's own vector of environments under random actions, resets included."""
    envs, rng = module.make_envs(ENV_ID, NUM_ENVS), np.random.default_rng(0)
    spaces = envs.single_observation_space, envs.single_action_space
    assert [space.shape for space in spaces] == [(OBS_DIM,), (ACT_DIM,)]
    envs.reset(seed=[0] * NUM_ENVS)
    return lambda: envs.step(rng.uniform(-1, 1, (NUM_ENVS, ACT_DIM)).astype(np.float32))


def machine(rows: set[int], device: torch.device) -> list[Measurement]:
    """Plain matrix products in both precisions, and a large copy."""
    timed = []
    sizes = [(m, *PRODUCT[1:]) for m in sorted({PRODUCT[0], *rows}, reverse=True)]
    precisions = ["float32", "bfloat16"] + ["tf32"] * (device.type == "cuda")
    for size, precision in itertools.product(sizes, precisions):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        a = torch.randn(size[:2], device=device).to(dtype)
        b = torch.randn(size[1:], device=device).to(dtype)
        out = torch.empty((size[0], size[2]), device=device, dtype=dtype)
        what = row_of(precision=precision)
        what |= {"measurement": "matmul " + "x".join(map(str, size))}
        product = partial(torch.mm, a, b, out=out)
        timed.append(Measurement(what, product, multiply_adds=math.prod(size)))
    source, target = (torch.zeros(COPY // 4, device=device) for _ in range(2))
    moved = Part(0, 2 * COPY / 1e6, "float32")
    copying = row_of(measurement=f"copy {COPY // 2**20} MiB")
    return [*timed, Measurement(copying, partial(target.copy_, source), parts=(moved,))]


# ---------------------------------------------------------------------------- looked at, not kept
class OtherMish(nn.Module):
    """Mish by the formula a script does not use: torch's if compiled, one exponential if not."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return nn.functional.mish(x)
        e = x.clamp(max=20).exp()
        n = e * (e + 2)
        return x * n / (n + 2)


class Concatenated(load_script("fpmd_online").MLP):
    """MLP whose first layer multiplies states and times once per candidate."""

    def forward(self, *inputs: Tensor) -> Tensor:
        rows = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        return nn.Sequential.forward(self, torch.cat([x.expand(*rows, -1) for x in inputs], -1))


VARIANTS = {  # name: what stands in for a global of the script
    "other Mish": {"Mish": OtherMish},
    "concatenated inputs": {"MLP": Concatenated},
    "one piece": {"in_blocks": lambda network, dim, rows: network},
    "ReLU": {"Mish": nn.ReLU},  # not the method: shows what activations cost
}


def variants(case: Case, mode: str) -> list[Measurement]:
    """Generation done in other ways, each checked to give the same actions (but for ReLU)."""
    timed, kept = [], functions(case)["generation"][0]
    for name, replaced in VARIANTS.items():
        other = make_case(
            case.script, case.setting, mode, case.args.batch_size, case.device, **replaced
        )
        other.agent.policy.load_state_dict(case.agent.policy.state_dict())
        function, does = functions(other)["generation"]
        if name != "ReLU" and case.precision == "float32":
            for each in case, other:
                each.rng.manual_seed(0)
            torch.testing.assert_close(function(), kept(), rtol=1e-3, atol=1e-3)
        timed.append(Measurement(case.row(f"generation, {name}"), function, does))
    return timed


# ---------------------------------------------------------------------------- one process
def collect(options: argparse.Namespace, device: torch.device) -> list[Measurement]:
    """Everything to be timed; first updates are timed at once, while nothing is compiled yet."""
    timed, rows, only = [], set(), options.only
    for script in options.scripts:
        for setting in options.settings or SETTINGS[script]:
            sizes = script, setting
            case = make_case(*sizes, "eager", options.batch_size, device)
            counted = {name: count(*entry) for name, entry in functions(case).items()}
            rows.add(piece_rows(case))
            for mode in options.modes:
                if mode.endswith("bfloat16") and script not in FLOWS:
                    continue
                case = make_case(*sizes, mode, options.batch_size, device)
                if "first-update" in only:
                    print(f"first update of {script} {setting} {mode}", file=sys.stderr)
                    timed.append(first_update(case))
                floors = parts(case, counted)
                for name, entry in functions(case).items():
                    if name in only and name in PER_CASE:
                        extra = counted[name], floors.get(name, ())
                        timed.append(Measurement(case.row(name), *entry, *extra))
                if options.variants and script == "fpmd_online":
                    timed += variants(case, mode)
        case = make_case(script, SETTINGS[script][-1], "eager", options.batch_size, device)
        if "one-step" in only and script in FLOWS:
            for name in "one-step", "one-step deployed":
                entry = functions(case)[name]
                timed.append(Measurement(row_of(script, measurement=name), *entry, count(*entry)))
    if "sac" in only:
        case = make_case("fpmd_online", (1, 1), "eager", options.batch_size, device)  # its width
        for name, function in sac_actions(case).items():
            what = row_of("sac", measurement=name)
            timed.append(Measurement(what, function, 1, count(function, 1)))
    if "environments" in only:
        what = row_of(measurement="environments")
        timed.append(Measurement(what, environment_step(case.module)))
    return machine(rows, device) + timed


def time_all(
    timed: list[Measurement], repetitions: int, device: torch.device, hold: bool = False
) -> None:
    """Warm everything up (hold: and wait for a line on stdin), then repeat everything in turn."""
    repeated = [measurement for measurement in timed if measurement.function]
    for i, measurement in enumerate(repeated):
        print(f"\rwarming up {i + 1} of {len(repeated)}", end="", file=sys.stderr)
        measurement.warm_up(device)
    print(file=sys.stderr)
    if hold:
        print("warm", flush=True)
        sys.stdin.readline()
    for repetition in range(repetitions):
        for measurement in repeated:
            measurement.repeat(device)
        print(f"\rrepetition {repetition + 1} of {repetitions}", end="", file=sys.stderr)
    print(file=sys.stderr)


def to_rows(timed: list[Measurement], batch_size: int, device: torch.device) -> list[dict]:
    """The CSV. peak_megabytes: on a GPU what a call allocates, on a CPU the process at its peak."""
    median = {id(m): float(np.median(m.seconds)) for m in timed}
    rates, rows = {}, []
    peak = peak_megabytes(resource.getrusage(resource.RUSAGE_SELF))
    for m in timed:
        if m.what["measurement"].startswith("matmul"):
            rate = m.multiply_adds / median[id(m)]
            rates[m.what["precision"]] = max(rate, rates.get(m.what["precision"], 0))
        if m.what["measurement"].startswith("copy"):
            bandwidth = m.parts[0].megabytes / median[id(m)]
    for m in timed:
        quartiles = 1000 * np.percentile(m.seconds, (25, 75))
        floor = sum(part.floor(rates, bandwidth) for part in m.parts)
        row = m.what | {"milliseconds": f"{1000 * median[id(m)]:.4f}"}
        row |= {"quartile_1": f"{quartiles[0]:.4f}", "quartile_3": f"{quartiles[1]:.4f}"}
        row["multiply_adds"] = "" if math.isnan(m.multiply_adds) else round(m.multiply_adds)
        megabytes = sum(part.megabytes for part in m.parts)
        row["compulsory_megabytes"] = f"{megabytes:.3f}" if m.parts else ""
        row["floor_ms"] = f"{1000 * floor:.4f}" if m.parts else ""
        row["ratio_to_floor"] = f"{median[id(m)] / floor:.3f}" if m.parts else ""
        megabytes = peak if device.type != "cuda" else m.megabytes
        row["peak_megabytes"] = "" if math.isnan(megabytes) else f"{megabytes:.1f}"
        rows.append(row | {"batch_size": batch_size, "repetitions": len(m.seconds)})
    return rows


def peak_megabytes(usage: resource.struct_rusage) -> float:
    """The most memory a process has had resident; Linux counts kilobytes, macOS bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# ---------------------------------------------------------------------------- whole runs
def step_times(run_dir: Path) -> list[float]:
    """Seconds per environment step between the rows of metrics.csv.

    The first row comes after hundreds of updates, so compiling is over by then.
    """
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(int(r["global_step"]), float(r["wall_time"])) for r in csv.DictReader(file)]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(rows)]


def full_buffer(module: ModuleType) -> type:
    """A replay buffer that is full of random transitions from the start."""

    class FullBuffer(module.ReplayBuffer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            rng, rows = np.random.default_rng(0), max(1, self.capacity // 100)
            while self.size < self.capacity:
                shapes = [(rows, *value.shape[1:]) for value in self.data.values()]
                self.add(*(rng.standard_normal(shape, np.float32) for shape in shapes))

    return FullBuffer


def train(script: str, mode: str, options: argparse.Namespace, full: bool) -> tuple:
    """Run the script's main: its step times, and the process's peak memory in megabytes.

    With a full buffer only for a few updates, but with the checkpoint at the end, which copies the
    buffer. The memory is what this process had resident, so it wants one of its own; compilers
    that it started are not in it. On a GPU, which holds the buffer, it is what torch allocated.
    """
    module, (kind, precision) = load_script(script), MODES[mode]
    if full:
        module.ReplayBuffer = full_buffer(module)
    steps = END_TO_END["learning_starts"] + 100 if full else options.steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = END_TO_END | {"total_timesteps": steps, "runs_dir": folder, "exp_name": script}
        flags |= {"compile": kind == "compiled", "precision": precision}
        flags |= {"device": options.device, "torch_threads": options.threads}
        times = step_times(module.main(module.Args(**flags)))
    if options.device.startswith("cuda"):
        return times, torch.cuda.max_memory_allocated(torch.device(options.device)) / 1e6
    return times, peak_megabytes(resource.getrusage(resource.RUSAGE_SELF))


def end_to_end(options: argparse.Namespace) -> list[dict]:
    """Steps per second of whole training runs, modes in turn, and their memory.

    Every run has a process of its own. Step times are differences between the rows of a run's
    metrics.csv, all of them after compilation; medians and quartiles are over all runs' rows.
    """
    cases = list(itertools.product(options.scripts, options.modes))
    times, peaks, full_peaks = ({case: [] for case in cases} for _ in range(3))
    for repetition in range(options.repetitions + 1):
        full = repetition == options.repetitions  # one run more, for its memory
        for case in cases:
            what = "with a full buffer" if full else f"run {repetition + 1}"
            print(f"training {' '.join(case)}, {what}", file=sys.stderr)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds_per_step, peak = pool.submit(train, *case, options, full).result()
            times[case] += [] if full else seconds_per_step
            (full_peaks if full else peaks)[case].append(peak)
    rows, setting = [], (END_TO_END["num_candidates"], END_TO_END["flow_steps"])
    for script, mode in cases:
        low, median, high = 1000 * np.percentile(times[script, mode], (25, 50, 75))
        row = row_of(script, setting, *MODES[mode], "environment step while training")
        row |= {"env_id": ENV_ID, "utd": END_TO_END["utd"], "milliseconds": f"{median:.4f}"}
        row |= {"quartile_1": f"{low:.4f}", "quartile_3": f"{high:.4f}"}
        row["steps_per_second"] = f"{1000 / median:.2f}"
        row["peak_megabytes"] = f"{np.median(peaks[script, mode]):.1f}"
        row["full_buffer_megabytes"] = f"{full_peaks[script, mode][0]:.1f}"
        row |= {"batch_size": 256, "total_timesteps": options.steps}
        rows.append(row | {"repetitions": options.repetitions})
    return rows


# ---------------------------------------------------------------------------- main
def parse_setting(text: str) -> tuple[int, int]:
    num_candidates, flow_steps = map(int, text.split(","))
    return num_candidates, flow_steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    text = "CPU threads of torch; unset: what the scripts take, all up to 8"
    parser.add_argument("--threads", type=int, default=0, help=text)
    scripts = list(SETTINGS)
    parser.add_argument("--scripts", **several, choices=scripts, default=FLOWS, help="which")
    text = "N,T of every script; unset: those of SETTINGS"
    parser.add_argument("--settings", nargs="+", type=parse_setting, metavar="N,T", help=text)
    text = f"of {', '.join(MODES)}, on CUDA also {', '.join(CUDA_MODES)}"
    modes = MODES | CUDA_MODES
    parser.add_argument("--modes", **several, choices=modes, default=list(MODES), help=text)
    text = f"of {', '.join(MEASUREMENTS)}"
    parser.add_argument("--only", **several, choices=MEASUREMENTS, default=MEASUREMENTS, help=text)
    parser.add_argument("--variants", action="store_true", help="generation in other ways, too")
    parser.add_argument("--batch-size", type=int, default=256, help="transitions per update")
    text = "of every measurement (15), of every training run (3)"
    parser.add_argument("--repetitions", type=int, help=text)
    text = "once warm, say so and wait for a line on stdin: others may time alone meanwhile"
    parser.add_argument("--hold", action="store_true", help=text)
    parser.add_argument("--end-to-end", action="store_true", help="time training runs instead")
    text = "of a training run, 1000 of them random"
    parser.add_argument("--steps", type=int, default=4_000, help=text)
    text = (
        "CSV to write, as a whole; unset: benchmark/results/<speed or end_to_end>_<device>.csv, "
        "but a temporary file if only a part is measured"
    )
    parser.add_argument("--output", type=Path, help=text)
    options = parser.parse_args()
    if options.steps < (least := END_TO_END["learning_starts"] + 2 * END_TO_END["log_every"]):
        parser.error(f"--steps {options.steps} must be at least {least}")
    if options.output is None:
        partly = "scripts", "settings", "modes", "only", "batch_size", "repetitions", "steps"
        quick = any(getattr(options, key) != parser.get_default(key) for key in partly)
        folder = Path(tempfile.mkdtemp()) if quick else ROOT / "benchmark" / "results"
        kind = "end_to_end" if options.end_to_end else "speed"
        options.output = folder / f"{kind}_{torch.device(options.device).type}.csv"
    options.repetitions = options.repetitions or (3 if options.end_to_end else 15)
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads or min(8, torch.get_num_threads()))
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default one cannot be captured
    if options.end_to_end:
        rows = end_to_end(options)
    else:
        timed = collect(options, device)
        time_all(timed, options.repetitions, device, options.hold)
        rows = to_rows(timed, options.batch_size, device)
    rows = [row | provenance(device) for row in rows]
    write_csv(rows, options.output)
    print(f"wrote {options.output}; benchmark/report.py makes the tables")


if __name__ == "__main__":
    main()
