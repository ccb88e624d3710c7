"""What speed.py times: a script at one setting, computed in one way, and the parts of its update.

All that depends on how the scripts are built, and is no plain call of one of their functions, is in
make_case and functions.
"""

from benchmark.files import fail
from benchmark.measure.measuring import load_script
from benchmark.measure.speed_clock import Measurement, Part, row_of
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ENV_ID, OBS_DIM, ACT_DIM, NUM_ENVS = "Ant-v4", 27, 8, 5
SETTINGS = {  # script: its (num_candidates, flow_steps)
    "fpmd_online": [(32, 20), (32, 1), (8, 1)],
    "fpmd_meanflow_online": [(32, 1), (8, 1)],
    "mvp_online": [(32, 1), (8, 1)],
    "fpmd_plus_online": [(8, "")],
    "meanflowql_offline_to_online": [(5, "")],
    "sac_online": [("", "")],
}
# their updates are not taken apart
WHOLE = "meanflowql_offline_to_online", "sac_online", "fpmd_plus_online"
FLOWS = [name for name in SETTINGS if name not in WHOLE]
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
    explore: Callable  # the script's functions of these names, or what accelerate made of them
    improve: Callable

    def row(self, measurement: str) -> dict:
        return row_of(self.script, self.setting, self.mode, self.precision, measurement)

    @property
    def device(self) -> torch.device:
        return self.rng.device


@cache
def refuse_without_compiler(device: torch.device) -> None:
    """Eager updates must not pass for compiled ones; scripts go on with those."""
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds
        first_line = str(error).partition("\n")[0]
        fail(f"nothing can be compiled here, choose --modes eager: {first_line}")


def make_case(script, setting, mode, batch_size, device, **replaced) -> Case:
    """A fresh agent, accelerated if the mode says so; nothing has been computed with it yet."""
    module, (kind, precision) = load_script(script, **replaced), (MODES | CUDA_MODES)[mode]
    sizes = dict(zip(("num_candidates", "flow_steps"), setting, strict=True))
    sizes = {key: value for key, value in sizes.items() if value and hasattr(module.Args, key)}
    args = module.Args(**sizes, precision=precision, batch_size=batch_size)
    torch.manual_seed(0)
    agent = module.Agent(OBS_DIM, ACT_DIM, args, device)
    explore, improve = module.act_explore, module.update
    if kind in ("compiled", "captured"):
        refuse_without_compiler(device)
        explore, improve = module.accelerate(agent, explore, improve)
        if device.type == "cuda":  # there accelerate records them, too
            explore, improve = explore.function, improve.function
        # where they fail, nothing else may be timed in their place
        explore, improve = explore.function, improve.function
    if kind in ("graph", "captured"):
        explore, improve = module.Captured(explore), module.Captured(improve)
    batch = {
        "obs": torch.randn((batch_size, OBS_DIM), device=device),
        "actions": torch.rand((batch_size, ACT_DIM), device=device) * 2 - 1,
        "rewards": torch.randn(batch_size, device=device),
        "next_obs": torch.randn((batch_size, OBS_DIM), device=device),
        "terminations": torch.zeros(batch_size, device=device),
    }
    rng = torch.Generator(device).manual_seed(0)
    what = script, setting, kind, precision
    return Case(*what, module, args, agent, batch, rng, explore, improve)


def policy_delay(args) -> int:
    """Updates of the critics per update of the policy; MVP has no such flag."""
    return getattr(args, "policy_delay", 1)


def functions(case: Case) -> dict[str, tuple[Callable, int]]:
    """{measurement: (function, how often one call does it)}, those of PER_CASE and one-step."""
    module, args, agent, rng = case.module, case.args, case.agent, case.rng
    if case.script not in FLOWS:
        return whole_functions(case)
    next_obs, std = case.batch["next_obs"], torch.tensor(0.1, device=case.device)
    rows = args.num_candidates, args.batch_size
    candidates = 2 * torch.rand((*rows, ACT_DIM), device=case.device) - 1
    ranked = candidates[0], torch.randn(rows, device=case.device)
    improve_alone = case.improve  # with a graph of its own, where there are graphs
    if case.mode in ("graph", "captured"):
        improve_alone = module.Captured(case.improve.function)

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
        own = module.propose, module.select_action
        module.propose, module.select_action = lambda *_: candidates, lambda *_: ranked
        try:
            update(case, improve_alone)
        finally:
            module.propose, module.select_action = own

    policy = module.OneStepPolicy(agent.acting_policy)

    @torch.no_grad()
    def deployed(agent, obs, args, rng):
        noise = torch.randn((len(obs), ACT_DIM), generator=rng, device=obs.device)
        return policy(obs, args.prior_std * noise)

    return whole_functions(case) | {
        "generation": (generation, 1),
        "ranking": (ranking, 1),
        "learning": (learning, policy_delay(args)),
        "one-step deployed": (partial(from_array, case, deployed, 1), 1),
    }


def update(case: Case, improve: Callable) -> None:
    """policy_delay updates, one of which improves the policy, as the training loop makes them."""
    for i in range(policy_delay(case.args)):
        improve(case.agent, case.batch, case.args, case.rng, i == 0)


def from_array(case: Case, act: Callable, num_envs: int) -> np.ndarray:
    """Actions for that many environments, from array to array."""
    obs = np.random.default_rng(0).standard_normal((num_envs, OBS_DIM), np.float32)
    obs = torch.as_tensor(obs, device=case.device)
    return act(case.agent, obs, case.args, case.rng).cpu().numpy()


def whole_functions(case: Case) -> dict[str, tuple[Callable, int]]:
    """What every script has: an update, an exploring action, an action of one step."""
    one_step = case.module.MODES["one_step"]
    return {
        "update": (partial(update, case, case.improve), policy_delay(case.args)),
        "acting": (partial(from_array, case, case.explore, NUM_ENVS), 1),
        "one-step": (partial(from_array, case, one_step, 1), 1),
    }


def in_graph(case: Case) -> Callable:
    """A decorator: what a captured case does in its own graph is timed in a graph, too."""

    def decorate(function: Callable) -> Callable:
        if case.mode not in ("graph", "captured"):
            return function
        captured = case.module.Captured(lambda *_: {"out": function()})
        return lambda: captured(None, {}, case.args, case.rng, "alone")

    return decorate


def parts(case: Case, counted: dict[str, float]) -> dict[str, tuple[Part, ...]]:
    """What generation, ranking, learning and a whole update cannot do without."""
    n, batch = getattr(case.args, "num_candidates", 0), case.args.batch_size
    policy, critics = (
        sum(p.numel() for p in network.parameters())
        for network in (case.agent.policy, case.agent.critic)
    )
    states, actions = batch * OBS_DIM, batch * ACT_DIM
    slow = case.agent.acting_policy is not case.agent.policy
    numbers = {  # float32 numbers that move
        # weights and states in; two kinds of noise in, candidates out
        "generation": policy + states + 3 * n * actions,
        # weights, states and candidates in; scores and the best action out
        "ranking": critics + states + n * actions + n * batch + actions,
        # batch, best actions and scores in; critics and their two moments in and out, targets in;
        # in one of policy_delay updates policy and moments too, and all moving averages in and out
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


def first_update(case: Case) -> Measurement:
    """As in a new process without compile caches, but for the compiler's own imports.

    Nothing of this case has been compiled yet: its module has functions of its own, and the caches
    of kernels, in memory and on disk, are put aside.
    """
    from torch._inductor.utils import fresh_cache

    first = partial(case.improve, case.agent, case.batch, case.args, case.rng, True)
    measurement = Measurement(case.row("first-update"), first)
    with fresh_cache():
        measurement.repeat(case.device)
    measurement.function = None  # there is only one first
    return measurement
