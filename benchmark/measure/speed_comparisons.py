"""What speed.py compares the scripts with: the machine, the simulators, a SAC actor, variants."""

import itertools
import math
from benchmark.measure.measuring import load_script
from benchmark.measure.speed_cases import (
    ACT_DIM,
    ENV_ID,
    NUM_ENVS,
    OBS_DIM,
    Case,
    functions,
    make_case,
)
from benchmark.measure.speed_clock import Measurement, Part, row_of
from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

PRODUCT = 8192, 256, 256  # the large matrix product whose rate the floors use
COPY = 2**28  # bytes of the large copy, beyond any cache


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


def environment_step(module: ModuleType) -> Callable:
    """The script's own vector of environments under random actions, resets included."""
    envs, rng = module.make_envs(ENV_ID, NUM_ENVS), np.random.default_rng(0)
    spaces = envs.single_observation_space, envs.single_action_space
    assert [space.shape for space in spaces] == [(OBS_DIM,), (ACT_DIM,)]
    envs.reset(seed=[0] * NUM_ENVS)
    return lambda: envs.step(rng.uniform(-1, 1, (NUM_ENVS, ACT_DIM)).astype(np.float32))


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


# ---------------------------------------------------------------------------- looked at, not kept
class OtherMish(nn.Mish):
    """Mish by the formula a script does not use: torch's if compiled, one exponential if not."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        e = x.clamp(max=20).exp()
        n = e * (e + 2)
        return x * n / (n + 2)


class Concatenated(load_script("fpmd_online").FirstLayer):
    """A first layer that multiplies states and times once per candidate."""

    def forward(self, *inputs: Tensor) -> Tensor:
        rows = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        inputs = torch.cat([x.expand(*rows, -1) for x in inputs], -1)
        weight = torch.cat([part.weight for part in self.parts], 1)
        return nn.functional.linear(inputs, weight, self.parts[-1].bias)


FIRST_LAYERS = {"concatenated inputs": Concatenated}  # name: what stands in for FirstLayer
ACTIVATIONS = {  # name: what stands in for Mish
    "other Mish": OtherMish,
    "ReLU": nn.ReLU,  # not the method: shows what activations cost
}


def variants(case: Case, mode: str) -> list[Measurement]:
    """Generation done in other ways, each checked to give the same actions (but for ReLU)."""
    timed, kept = [], functions(case)["generation"][0]
    for name in *ACTIVATIONS, *FIRST_LAYERS:
        replaced = {"FirstLayer": FIRST_LAYERS[name]} if name in FIRST_LAYERS else {}
        other = make_case(
            case.script, case.setting, mode, case.args.batch_size, case.device, **replaced
        )
        for module in other.agent.modules():  # nothing has been compiled yet
            for key, child in module.named_children():
                if isinstance(child, nn.Mish) and name in ACTIVATIONS:
                    setattr(module, key, ACTIVATIONS[name]())
        other.agent.policy.load_state_dict(case.agent.policy.state_dict())
        function, does = functions(other)["generation"]
        if name != "ReLU" and case.precision == "float32":
            for each in case, other:
                each.rng.manual_seed(0)
            torch.testing.assert_close(function(), kept(), rtol=1e-3, atol=1e-3)
        timed.append(Measurement(case.row(f"generation, {name}"), function, does))
    return timed
