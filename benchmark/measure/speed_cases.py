"""What speed.py times: a script at one setting, computed in one way, and the parts of its update.

All that depends on how the scripts are built, and is no plain call of one of their functions, is in
make_case and functions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.measure.measuring import load_script
from benchmark.measure.speed_clock import Measurement, Part, row_of, seconds

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
