"""Trained policies as they are deployed: read from policy.pt, with noise as an input.

What acts is a torch module from observations and standard normal noise to actions in [-1, 1], and
around it EnvironmentPolicy, whose actions are in the environment's own units.
"""

import copy
import importlib.util
import sys
from benchmark import scripts
from benchmark.cli import say
from benchmark.files import exists, fail
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor, nn

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- what acts
class OneStep(nn.Module):
    """A script's OneStepPolicy for standard normal noise: prior_std is inside."""

    def __init__(self, policy: nn.Module, prior_std: float, noise_dim: int):
        super().__init__()
        self.policy = policy
        self.prior_std = prior_std
        self.noise_shape = (noise_dim,)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs (B, obs_dim), noise (B, noise_dim) -> actions in [-1, 1] like noise."""
        scaled = noise if self.prior_std == 1 else self.prior_std * noise
        return self.policy(obs, scaled)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Noise for n actions, exactly what the script's act draws from this generator."""
        return torch.randn((n, *self.noise_shape), generator=rng)


class Denoising(nn.Module):
    """DPMD's one candidate: T evaluations, unrolled; noise (B, T, act_dim), the first one first."""

    def __init__(self, policy: nn.Module, module: ModuleType, prior_std: float):
        super().__init__()
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.generate = module.generate
        self.prior_std = prior_std
        self.noise_shape = (len(policy.signal), policy.act_dim)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs (B, obs_dim), noise (B, T, act_dim) -> actions in [-1, 1] (B, act_dim)."""
        first, *later = noise.unbind(1)
        return self.generate(self.policy, obs, self.prior_std * first, later)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Noise for n actions, exactly what the script's act draws from this generator."""
        steps, act_dim = self.noise_shape
        # the script's second draw is exploration noise, which deployed has no weight
        first, _, *later = torch.randn((steps + 1, 1, n, act_dim), generator=rng).squeeze(1)
        return torch.stack([first, *later], 1)


class MeanAction(nn.Module):
    """SAC's tanh of the mean, which takes no noise."""

    noise_shape = None

    def __init__(self, *parts: nn.Module):
        """parts: the policy, behind an encoder where it acts on frames."""
        super().__init__()
        self.policy = copy.deepcopy(nn.Sequential(*parts)).requires_grad_(False)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (B, ...) -> actions in (-1, 1) (B, act_dim)."""
        mean, _ = self.policy(obs)
        return mean.tanh()

    def draw(self, _n: int, _rng: Generator) -> None:
        return None


def networks(agent: nn.Module) -> dict[str, nn.Module]:
    """What acts, as policy.pt names it: what sees frames, if something does, comes first."""
    found = {"encoder": agent.encoder} if hasattr(agent, "encoder") else {}
    return found | {"policy": agent.acting_policy}


def actor(module: ModuleType, agent: nn.Module, args: Any) -> nn.Module:
    """The script's deployed policy as one of the modules above; raises ValueError for others."""
    policy = agent.acting_policy
    if hasattr(module, "OneStepPolicy"):
        deployed = module.OneStepPolicy(*networks(agent).values())
        return OneStep(deployed, args.prior_std, policy.act_dim).eval()
    if module.DEPLOYED == "one_candidate":
        return Denoising(policy, module, args.prior_std).eval()
    if hasattr(module, "GaussianPolicy"):
        return MeanAction(*networks(agent).values()).eval()
    raise ValueError(f"{module.__name__} has neither OneStepPolicy nor a policy known here")


class EnvironmentPolicy(nn.Module):
    """Actions in the environment's own units; with a chunk_size h > 0, h of them at once."""

    def __init__(self, policy: nn.Module, action_bounds: Tensor, chunk_size: int = 0):
        """action_bounds (2, *action_shape): low and high of every action."""
        super().__init__()
        self.policy = policy
        low, high = action_bounds
        self.shape = (chunk_size, *low.shape) if chunk_size else tuple(low.shape)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("centre", (low + high) / 2)
        self.register_buffer("half_range", (high - low) / 2)
        self.is_scaled = bool((self.half_range != 1).any())
        self.is_shifted = bool((self.centre != 0).any())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Observations (B, obs_dim) and noise, if any, -> actions (B, [h,] *action_shape)."""
        actions = self.policy(*inputs)
        if len(self.shape) > 1:
            actions = actions.unflatten(1, self.shape)
        # bounds of -1 and 1 are the usual case; then nothing is added to the graph
        if self.is_scaled:
            actions = actions * self.half_range
        if self.is_shifted:
            # a rounding error must not lead beyond a bound
            actions = (actions + self.centre).maximum(self.low).minimum(self.high)
        return actions


# ---------------------------------------------------------------------------- reading
@dataclass
class Trained:
    """A policy.pt with its script."""

    module: ModuleType
    args: Any  # the script's Args
    agent: nn.Module
    saved: dict
    actor: nn.Module  # to [-1, 1]

    @property
    def bounds(self) -> Tensor:
        """(2, *action_shape)."""
        return self.saved["action_bounds"]

    @property
    def sees_frames(self) -> bool:
        return "obs_shape" in self.saved

    def observation(self, n: int) -> Tensor:
        """n of them, all zero: numbers (n, obs_dim) float32, or stacks (n, *obs_shape) uint8."""
        if self.sees_frames:
            return torch.zeros(n, *self.saved["obs_shape"], dtype=torch.uint8)
        return torch.zeros(n, self.saved["obs_dim"])

    @property
    def chunk_size(self) -> int:
        """Actions at once; 0: the script knows no chunks."""
        return getattr(self.args, "chunk_size", 0)

    def in_own_units(self) -> EnvironmentPolicy:
        return EnvironmentPolicy(self.actor, self.bounds, self.chunk_size).eval()


def import_script(path: Path) -> ModuleType:
    """A script as a module, under a name of its own."""
    name = f"deployed_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def find_policy(source: Path) -> Path:
    """The policy.pt of a run directory, or the file itself."""
    file = source / "policy.pt" if source.is_dir() else source
    if not exists(file):
        fail(f"{file} does not exist")
    if not file.is_file():
        fail(f"{file} is no file")
    return file


def find_script(file: Path) -> Path:
    """The script that wrote a policy.pt, among those of this repository."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # many kinds
        fail(f"{file} is damaged, or no policy.pt")
    if not isinstance(content, dict) or "policy" not in content:
        fail(f"{file} is no policy.pt")
    if "action_bounds" not in content or not isinstance(content.get("script"), str):
        fail(f"{file} is of a version without action bounds; go on with --resume to write it anew")
    script = scripts().get(Path(content["script"]).stem)
    if script is None:
        fail(f"{file} was written by {content['script']!r}, which is not here: add --script")
    return script


def read(source: Path, script: Path | None = None) -> Trained:
    """A trained policy on the CPU; what is no policy.pt of the script is refused in one line."""
    file = find_policy(source)
    module = import_script(script or find_script(file))
    _, saved = module.load(str(file), "policy.pt")
    if unknown := saved.get("unknown"):
        say(f"warning: {file} has flags that its script does not know, ignored: {unknown}")
    args = replace(module.Args(), **saved["args"])
    try:
        check_sizes(saved)
        sizes = saved.get("obs_shape", saved.get("obs_dim")), saved["act_dim"]
        played = replace(args, evaluate=str(file))  # as such it needs no replay buffer
        module.refuse_too_large(played, *sizes, CPU)
        agent = module.Agent(*sizes, args, CPU)
        acting = networks(agent)
        ours = {name: network.state_dict() for name, network in acting.items()}
        module.refuse_unlike(saved, saved | ours | {"global_step": 0})
        for name, network in acting.items():
            network.load_state_dict(saved[name])
        return Trained(module, args, agent, saved, actor(module, agent, args))
    except Exception as error:
        fail(f"{file} does not fit {module.__file__}: {error}")


def check_sizes(saved: dict) -> None:
    """Raise ValueError unless sizes and bounds can be those of an environment."""
    for name in "obs_shape" if "obs_shape" in saved else "obs_dim", "act_dim":
        value = saved.get(name)
        sizes = value if isinstance(value, tuple) and name == "obs_shape" else [value]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{name} is {value!r}")
    bounds = saved.get("action_bounds")
    if not isinstance(bounds, Tensor) or bounds.numel() != 2 * saved["act_dim"]:
        raise ValueError(f"action_bounds are not two for each of {saved['act_dim']} actions")
    if len(bounds) != 2 or bounds.dtype != torch.float32 or not (bounds[0] < bounds[1]).all():
        raise ValueError("action_bounds do not rise")


def refuse_other_env(trained: Trained, typed: str | None, plays: bool) -> None:
    """Where an environment is made, a file alone must not decide which module is imported."""
    env_id = trained.args.env_id
    if typed and typed != env_id:
        fail(f"this policy was trained on {env_id}, not on {typed}")
    if plays and ":" in env_id and not typed:
        module = env_id.partition(":")[0]
        fail(f"this policy would import {module}; if you trust it, add --env-id {env_id}")


# ---------------------------------------------------------------------------- acting by torch
def reference(trained: Trained, obs: Tensor, seed: int) -> Tensor:
    """What the script's own act does, in the environment's own units, float64.

    obs (B, obs_dim) -> actions (B, [h,] *action_shape), from the noise of actor.draw and this seed.
    """
    module = trained.module
    act = module.MODES[module.DEPLOYED]
    rng = Generator().manual_seed(seed)
    actions = act(trained.agent, obs, trained.args, rng).double()
    low, high = trained.bounds.double()
    chunk = [trained.chunk_size] if trained.chunk_size else []
    actions = actions.reshape(len(obs), *chunk, *low.shape)
    return low + (high - low) * (actions + 1) / 2


@dataclass
class Episodes:
    """What one policy did: returns (n,), and per action obs and noise of all episodes."""

    returns: list[float]
    successes: list[float]  # (n,), NaN where the environment does not say
    obs: Tensor  # (calls, n, obs_dim)
    noise: Tensor | None  # (n, calls, *noise_shape)


def play(trained: Trained, episodes: int) -> Episodes:
    """The episodes that --evaluate plays, by torch and in the script's own environments."""
    module = trained.module
    args = trained.args
    envs = module.make_envs(args.env_id, episodes, env_kwargs=args.env_kwargs)
    module.try_out(envs, False)
    bounds = torch.from_numpy(envs.action_bounds)
    if not bounds.equal(trained.bounds):
        fail(f"{args.env_id} has action bounds {bounds.tolist()}, not {trained.bounds.tolist()}")
    deployed = module.MODES[module.DEPLOYED]
    seen = []

    def act(agent: nn.Module, obs: Tensor, args: Any, rng: Generator) -> Tensor:
        same = Generator().set_state(rng.get_state())
        seen.append((obs.clone(), trained.actor.draw(len(obs), same)))
        return deployed(agent, obs, args, rng)

    returns, successes, _ = module.evaluate(act, trained.agent, envs, args)
    envs.close()
    obs = torch.stack([obs for obs, _ in seen])
    noise = None
    if trained.actor.noise_shape:
        noise = torch.stack([noise for _, noise in seen], 1)
    return Episodes(returns.tolist(), successes.tolist(), obs, noise)


def episode_seeds(args: Any, episodes: int) -> list[int]:
    """What the scripts' evaluate seeds each of its episodes with, through SeededEpisodes."""
    import numpy as np

    keys = [(2 * args.seed + 1, i, 1) for i in range(episodes)]
    return [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys]
