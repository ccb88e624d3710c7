"""MVP: online reinforcement learning with a mean velocity policy that acts in one step.

The mean velocity u(s, z, t, r) of a flow between two times t <= r jumps from noise (t = 0) to an
action (r = 1) in one network evaluation. Training generates N = 32 candidates and keeps the one
that the critics rank highest: it acts, it makes the TD target, and the policy imitates it. The
MeanFlow identity teaches u from the flow's instantaneous velocity v; the instantaneous velocity
constraint (IVC) pins u to v at the boundary t = r. Below, e ~ N(0, I), z_t = (1 - t) e + t a*,
v = a* - e, Q is the mean of two critics, and Q' that of the target critics.

    generate       a = e + u(s, e, 0, 1)
    select_action  a* = argmax over N candidates a_i of Q(s, a_i)
    critic_loss    y = r + gamma (1 - terminated) Q'(s', a*),  (Q_j(s, a) - y)^2
    policy_loss    || u(s', z_t, t, r) - sg(v + (r - t) du/dt) ||^2
                   + lambda || u(s', z_t, t, t) - v ||^2

    python mvp_online.py --env-id Ant-v4
    python mvp_online.py --evaluate runs/<run>/policy.pt --eval-episodes 10

Four parts: 1 METHOD, 2 TRAINING, 3 PLUMBING, 4 SPEED. Stop after part 2, and you have read
the algorithm end to end, from env.step to the optimizers.

Paper: Mean Velocity Policy, https://arxiv.org/abs/2602.13810; no code is public.
Critics: Q-chunking's, https://github.com/ColinQiyangLi/qc
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0",
#     "dm-control==1.0.50; python_version < '3.13'", "shimmy==2.0.1", "tyro==1.0.17",
#     "tensorboard==2.21.0", "wandb==0.31.0", "tqdm==4.70.1", "imageio-ffmpeg==0.8.1",
#     "moviepy==2.2.1",
# ]
# ///

import atexit
import copy
import fcntl
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # --- run: what is trained, for how long, and what is written down ---
    env_id: str = "Ant-v4"  # gymnasium id, dm_control/<domain>-<task>-v0 or module:EnvId
    env_kwargs: str = "{}"  # JSON object, arguments of the environment's constructor
    seed: int = 1  # seeds networks, noise, replay sampling and every episode
    total_timesteps: int = 1_000_000  # environment steps, over all envs
    num_envs: int = 1  # parallel training environments
    exp_name: str = Path(__file__).stem  # second part of the run directory's name
    runs_dir: str = "runs"  # where run directories are created
    log_every: int = 1_000  # steps between rows of metrics.csv
    eval_every: int = 25_000  # steps between evaluations, 0: never
    eval_episodes: int = 10  # episodes per evaluation, all side by side
    eval_max_steps: int = 10_000  # an episode of an evaluation is cut after so many steps
    checkpoint_every: int = 50_000  # steps between checkpoints, 0: only at the end
    capture_video: bool = False  # film an episode of every one-step evaluation
    track: bool = False  # mirror the run to Weights & Biases
    wandb_project_name: str = "one-step-flow-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    resume: str | None = None  # checkpoint.pt or a run directory to go on with
    evaluate: str | None = None  # policy.pt to replay, one step per action

    # --- algorithm: defaults are the published networks, and our setting for learning from scratch
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics
    batch_size: int = 256  # transitions per update, B
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    learning_starts: int = 5_000  # random environment steps before learning
    utd: float = 1.0  # update-to-data ratio: gradient updates per environment step
    num_candidates: int = 32  # N, actions generated per state
    flow_steps: int = 1  # T, jumps per action (NFE) in training
    ivc_coef: float = 1.0  # lambda, weight of the constraint (IVC)
    imitation_target: Literal["best_of_n", "replay"] = "best_of_n"  # a*: TD action, or replayed one
    prior_std: float = 1.0  # std of e when sampling; 1 in the loss
    noise_scale: float = 0.0  # std of candidates' noise, in acting and learning
    reward_scale: float = 1.0  # rewards are multiplied by this
    critic_lr: float = 3e-4  # Adam step size of the critics
    policy_lr: float = 3e-4  # Adam step size of the policy
    hidden_dim: int = 512  # width of the hidden layers
    hidden_layers: int = 4  # their number

    # --- speed: how it is computed ---
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, mps
    compile: bool = True  # compile and, on CUDA, record updates
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # bfloat16 in generating alone
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8
    async_envs: bool = False  # one process per env, for slow simulators


# ============ 1 METHOD: networks, acting, learning
def linear(in_dim: int, out_dim: int, fan_in: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Glorot-uniform weights: U(-b, b), b^2 = 6 / (fan_in + out_dim)."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    bound = math.sqrt(6 / (fan_in + out_dim))
    nn.init.uniform_(layer.weight, -bound, bound)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class FirstLayer(nn.Module):
    """A linear layer on concatenated inputs: a sum of one linear map per input."""

    def __init__(self, *input_dims: int, out_dim: int, bias: bool = True):
        super().__init__()
        last = len(input_dims) - 1  # one bias is enough
        self.parts = nn.ModuleList(
            linear(dim, out_dim, fan_in=sum(input_dims), bias=bias and i == last)
            for i, dim in enumerate(input_dims)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(part(x) for part, x in zip(self.parts, inputs, strict=True))


class MLP(nn.Module):
    """Linear layers with GELU between, or with GELU and LayerNorm."""

    def __init__(self, input_dims: tuple, hidden_dim: int, out_dim: int, hidden=4, norm=False):
        super().__init__()
        self.first = FirstLayer(*input_dims, out_dim=hidden_dim)
        rest = []
        for dim in [hidden_dim] * (hidden - 1) + [out_dim]:
            rest.append(nn.GELU("tanh"))
            if norm:
                rest.append(nn.LayerNorm(hidden_dim, eps=1e-6))
            rest.append(linear(hidden_dim, dim, fan_in=hidden_dim))
        self.rest = nn.Sequential(*rest)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.rest(self.first(*inputs))


class MeanVelocityField(nn.Module):
    """u(s, z, t, r): mean velocity over [t, r] of the flow at point z and time t."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 512, hidden_layers: int = 4):
        super().__init__()
        self.act_dim = act_dim
        self.net = MLP((obs_dim, 1, 1, act_dim), hidden_dim, act_dim, hidden_layers)

    def forward(self, obs: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """obs (B, obs_dim), z (..., B, act_dim), t and r (1,) or (B, 1) -> velocity like z."""
        # z last: all that is summed before it has no candidates yet
        return self.net(obs, t, r, z)


class QNetwork(MLP):
    """Q(s, a): obs (B, obs_dim), actions (..., B, act_dim) -> (..., B)."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(obs, actions).squeeze(-1)


class TwinCritic(nn.Module):
    """Two independent action values Q_1 and Q_2."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 512, hidden_layers: int = 4):
        super().__init__()
        self.q1 = QNetwork((obs_dim, act_dim), hidden_dim, 1, hidden_layers, norm=True)
        self.q2 = QNetwork((obs_dim, act_dim), hidden_dim, 1, hidden_layers, norm=True)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, obs_dim), actions (..., B, act_dim) -> Q (2, ..., B)."""
        return torch.stack([self.q1(obs, actions), self.q2(obs, actions)])


class Agent(nn.Module):
    """All that learns: networks, optimizers."""

    counters = ("updates",)  # attributes that a checkpoint keeps

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        super().__init__()
        sizes = (args.hidden_dim, args.hidden_layers)
        self.policy = MeanVelocityField(obs_dim, act_dim, *sizes)
        self.critic = TwinCritic(obs_dim, act_dim, *sizes)
        self.acting_policy = self.policy  # no moving average of it
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(device)
        self.device = device
        self.updates = 0
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "policy": adam(self.policy.parameters(), args.policy_lr),
        }


# ------------ acting
def generate(policy: nn.Module, obs: Tensor, z: Tensor, flow_steps: int) -> Tensor:
    """T jumps z_r = z_t + (r - t) u(s, z_t, t, r) from noise at t = 0 to an action at r = 1.

    obs (B, obs_dim), noise z = z_0 (..., B, act_dim) -> unclipped actions z_1 like it.
    """
    for k in range(flow_steps):
        t = torch.full((1,), k / flow_steps, device=z.device)
        r = torch.full((1,), (k + 1) / flow_steps, device=z.device)
        z = z + policy(obs, z, t, r) / flow_steps
    return z


def propose(policy: nn.Module, obs: Tensor, std, args: Args, rng: Generator) -> Tensor:
    """N candidates plus noise of that std: (N, B, act_dim), clipped."""
    shape = (2, args.num_candidates, len(obs), policy.act_dim)
    noise, exploration = torch.randn(shape, generator=rng, device=obs.device)
    actions = generate(policy, obs, args.prior_std * noise, args.flow_steps)
    # clipped before ranking: the critics know no action beyond the bounds
    return (actions + std * exploration).clamp(-1, 1)


def take(candidates: Tensor, index: Tensor) -> Tensor:
    """candidates (N, B, act_dim), index (B,) -> clipped actions (B, act_dim)."""
    return candidates.take_along_dim(index[None, :, None], 0).squeeze(0).clamp(-1, 1)


def select_action(critic: nn.Module, obs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Best of N: argmax_i mean(Q_1, Q_2)(s, a_i) -> actions (B, act_dim), scores (N, B)."""
    scores = critic(obs, candidates).mean(0)  # (N, B)
    return take(candidates, scores.argmax(0)), scores


@torch.no_grad()
def act_one_step(agent: Agent, obs: Tensor, args: Args, rng: Generator) -> Tensor:
    """As deployed: one candidate, one step, no critic; -> actions (B, act_dim)."""
    noise = torch.randn((len(obs), agent.policy.act_dim), generator=rng, device=obs.device)
    return generate(agent.acting_policy, obs, args.prior_std * noise, 1).clamp(-1, 1)


@torch.no_grad()
def act_best_of_n(agent: Agent, obs: Tensor, args: Args, rng: Generator) -> Tensor:
    """The same rule as in training, without exploration noise."""
    candidates = propose(agent.acting_policy, obs, 0.0, args, rng)
    return select_action(agent.critic, obs, candidates)[0]


@torch.no_grad()
def act_explore(agent: Agent, obs: Tensor, args: Args, rng: Generator) -> Tensor:
    """Best of N, with noise on every candidate."""
    candidates = propose(agent.acting_policy, obs, args.noise_scale, args, rng)
    return select_action(agent.critic, obs, candidates)[0]


MODES = {"one_step": act_one_step, "best_of_n": act_best_of_n}  # of evaluation
DEPLOYED = "one_step"


def cost_of(mode: str, args: Args) -> tuple[int, int]:
    """Network evaluations per candidate (NFE), and candidates per action."""
    return (1, 1) if mode == "one_step" else (args.flow_steps, args.num_candidates)


# ------------ learning
def critic_loss(critic, target_critic, batch: dict, next_actions: Tensor, args: Args):
    """Mean-Q: loss and Q (2, B); only termination ends bootstrapping."""
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).mean(0)  # (B,)
        bootstrap = args.gamma * (1 - batch["terminations"])
        y = args.reward_scale * batch["rewards"] + bootstrap * next_q
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach()


def imitation_targets(batch: dict, next_actions: Tensor, args: Args) -> tuple:
    """States (B, obs_dim) and the actions (B, act_dim) that the policy imitates there."""
    if args.imitation_target == "replay":
        return batch["obs"], batch["actions"]
    return batch["next_obs"], next_actions  # one generation at s' serves both losses


def policy_loss(
    policy: nn.Module, obs: Tensor, actions: Tensor, noise: Tensor, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """MeanFlow || u - sg(v + (r - t) du/dt) ||^2 and IVC || u(s, z_t, t, t) - v ||^2.

    obs (B, obs_dim), actions a* and noise e (B, act_dim), t <= r (B, 1).
    """
    z_t = (1 - t) * noise + t * actions
    v = actions - noise
    # dz/dt = v, dt/dt = 1, dr/dt = 0: along the path of the flow, while r stays
    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    u, du_dt = torch.func.jvp(partial(policy, obs), (z_t, t, r), tangents)
    target = (v + (r - t) * du_dt).detach()
    boundary = policy(obs, z_t, t, t)
    return (u - target).square().mean(), (boundary - v).square().mean()


def move_towards(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """Exponential moving average: slow <- (1 - tau) slow + tau fast."""
    with torch.no_grad():
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)


def update_critic(agent: Agent, batch: dict, next_actions: Tensor, args: Args) -> dict:
    """Adam step of the critics."""
    loss, q = critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)
    agent.optimizers["critic"].zero_grad()
    loss.backward()
    agent.optimizers["critic"].step()
    return {"losses/critic_loss": loss.detach(), "losses/q_values": q.mean()}


def update_policy(agent: Agent, obs, actions, args: Args, rng: Generator, loss_fn=None) -> dict:
    """Adam step towards actions (B, act_dim); loss_fn may be policy_loss compiled."""
    t, r = torch.rand((2, len(obs), 1), generator=rng, device=obs.device).sort(0).values
    noise = torch.randn(actions.shape, generator=rng, device=obs.device)
    loss_fn = loss_fn or policy_loss
    meanflow, constraint = loss_fn(agent.policy, obs, actions, noise, t, r)
    agent.optimizers["policy"].zero_grad()
    (meanflow + args.ivc_coef * constraint).backward()
    agent.optimizers["policy"].step()
    return {"losses/policy_loss": meanflow.detach(), "losses/ivc_loss": constraint.detach()}


def update(agent: Agent, batch: dict, args: Args, rng, _improve_policy=True, loss_fn=None) -> dict:
    """One gradient update from a batch of (B, ...) tensors; returns scalars for the log."""
    # what changes between calls is a tensor, so that a CUDA graph can record an update
    next_obs = batch["next_obs"]
    with torch.no_grad():
        # ranking needs Q to more than bfloat16's three digits
        with torch.autocast(rng.device.type, torch.bfloat16, args.precision == "bfloat16"):
            candidates = propose(agent.policy, next_obs, args.noise_scale, args, rng)
        next_actions, scores = select_action(agent.critic, next_obs, candidates)
    metrics = update_critic(agent, batch, next_actions, args)
    metrics["policy/best_of_n_gain"] = (scores.amax(0) - scores.mean(0)).mean()
    metrics["policy/candidate_spread"] = candidates.std(0, correction=0).mean()
    metrics["policy/flow_spread"] = flow_spread(candidates, args.noise_scale)
    obs, actions = imitation_targets(batch, next_actions, args)
    metrics |= update_policy(agent, obs, actions, args, rng, loss_fn)
    move_towards(agent.target_critic, agent.critic, args.tau)
    return metrics


def prepare_update(_agent: Agent, _args: Args) -> bool:
    """Says whether this update improves the policy: every one does."""
    return True


def follow_steps(_agent: Agent, _args: Args, _global_step: int) -> None:
    """What environment steps drive, not updates: nothing."""


# ============ 2 TRAINING: buffer, evaluation, the loop; the same in every script
class ReplayBuffer:
    """Ring buffer of transitions, on the device that learns from it."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.shapes = {"obs": (obs_dim,), "actions": (act_dim,), "rewards": ()}
        self.shapes |= {"next_obs": (obs_dim,), "terminations": ()}
        width = sum(math.prod(shape) for shape in self.shapes.values())
        self.rows = torch.empty((capacity, width), device=device)  # a transition each
        self.position = 0
        self.size = 0

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (..., width) as named views (..., *shape)."""
        parts = rows.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {
            name: part.view(*rows.shape[:-1], *self.shapes[name])
            for name, part in zip(self.shapes, parts, strict=True)
        }

    def add(self, **transitions: np.ndarray) -> None:
        """Store a transition per env: arrays (num_envs, ...) by column name."""
        n = len(transitions["obs"])
        device = self.rows.device
        columns = [np.reshape(transitions[name], (n, -1)) for name in self.shapes]
        rows = np.concatenate(columns, 1, dtype=np.float32)
        index = (self.position + torch.arange(n, device=device)) % len(self.rows)
        # one transfer; pageable memory has been read when the call returns
        self.rows[index] = torch.from_numpy(rows).to(device, non_blocking=True)
        self.position = (self.position + n) % len(self.rows)
        self.size = min(self.size + n, len(self.rows))

    def sample(self, batch_size: int, rng: Generator) -> dict[str, Tensor]:
        """Uniformly, with replacement: tensors (batch_size, ...)."""
        index = torch.randint(self.size, (batch_size,), generator=rng, device=rng.device)
        return self.columns(self.rows[index])


def evaluate(act: Callable, agent: Agent, envs, args: Args, frames=None, stop=()):
    """An episode per env: returns, successes (NaN: unknown), cut at the limit?, (num_envs,)."""
    rng = Generator(agent.device).manual_seed(args.seed)  # all evaluations start alike
    obs, _ = envs.reset(seed=[2 * args.seed + 1] * envs.num_envs)  # odd; each env adds its index
    running = np.full(envs.num_envs, True)
    returns = np.zeros(envs.num_envs)
    successes = np.full(envs.num_envs, np.nan)
    steps = 0
    while running.any() and steps < args.eval_max_steps and not stop:
        if frames is not None and running[0]:
            frames.append(envs.picture())
        actions = act(agent, torch.as_tensor(obs, device=agent.device), args, rng)
        obs, rewards, terminations, truncations, infos = envs.step(actions.cpu().numpy())
        returns[running] += rewards[running]
        ended = running & (terminations | truncations)
        successes[ended] = infos["successes"][ended]
        running &= ~ended
        steps += 1
    return returns, successes, running


def updates_due(args: Args, global_step: int) -> int:
    """Gradient updates that belong to this many environment steps."""
    return int(args.utd * (global_step - args.learning_starts) + 1e-9)  # 0.29 * 100 is 29


def train(agent: Agent, buffer: ReplayBuffer, envs, run, args: Args, rng, obs) -> None:
    """Act, learn, step, store, from obs (num_envs, obs_dim); run counts, logs and saves."""
    explore, improve = act_explore, update
    if args.compile:
        explore, improve = accelerate(agent, explore, improve)  # the same, faster
    while not run.finished():
        # act: uniformly at random at first, then with exploration noise
        if run.global_step < args.learning_starts:
            actions = 2 * torch.rand(envs.action_space.shape, generator=rng, device=rng.device) - 1
        else:
            states = torch.as_tensor(obs).to(agent.device, non_blocking=True)
            actions = explore(agent, states, args, rng)
        actions = actions.cpu().numpy()
        run.begin_step()
        envs.step_async(actions)  # with --async-envs the simulators work from here on

        # learn from what is stored so far; GPU or processes overlap it with the simulators
        while agent.updates < updates_due(args, run.global_step):
            improve_policy = prepare_update(agent, args)
            batch = buffer.sample(args.batch_size, rng)
            run.metrics |= improve(agent, batch, args, rng, improve_policy)
            agent.updates += 1
        follow_steps(agent, args, run.global_step)

        # step, store: where an episode ended, next_obs already belongs to the one after it
        next_obs, rewards, terminations, _, infos = envs.step_wait()
        run.metrics |= infos["charts"]  # return and length of an episode that has ended
        outcome = {"rewards": rewards, "next_obs": infos["last_obs"], "terminations": terminations}
        buffer.add(obs=obs, actions=actions, **outcome)
        obs = next_obs
        run.after_step()  # log, evaluate, save


# ============ 3 PLUMBING: environments, files, arguments; the same in every script
def fail(message: str, status: int = 2) -> NoReturn:
    """End in one line on stderr: status 2 refuses bad input, 1 is a failure in mid-run."""
    with suppress(OSError):  # nobody may be there to read it
        line = " ".join(message.split())[:900]
        print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    raise SystemExit(status)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def warn(message: str) -> None:
    """One line on stderr about a run that goes on."""
    tqdm.write(f"{Path(__file__).name}: warning: {message}", file=sys.stderr)


def say(line: str) -> None:
    """Print above the progress bar, at once: into a file, Python would hold it back."""
    tqdm.write(line)
    sys.stdout.flush()


class EnvironmentFailure(RuntimeError):
    """What comes from an environment cannot be used, or nothing comes any more."""


class SeededEpisodes(gym.Wrapper):
    """An environment with flat float32 observations, whose every episode is seeded.

    An episode's seed and actions rebuild it exactly, as no state can.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        flat = gym.spaces.flatten_space(env.observation_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, flat.shape, np.float32)
        self.index = index
        self.first_seed = 0
        self.count = 0  # episodes begun since that seed

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.first_seed = seed
            self.count = 0
        self.count += 1
        key = (self.first_seed, self.index, self.count)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        what = "reset"
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
            what = "observation"
            return self.flatten(obs), {}
        except (Exception, SystemExit) as error:
            raise self.failure(what, error) from error

    def step(self, action: np.ndarray):
        what = "step"
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            what = "reward"
            reward = np.asarray(reward, float).item()  # some have shape (1,)
            what = "termination or truncation"
            ends = [(False, True).index(end) for end in (terminated, truncated)]
            what = "observation"
            obs = self.flatten(obs)
            what = "success"
            outcome = {}
            # what nobody reads would cost a vector env a tenth of a step
            if any(ends):
                success = info.get("success", info.get("is_success", math.nan))
                outcome["success"] = np.asarray(success, float).item()
        except (Exception, SystemExit) as error:
            raise self.failure(what, error) from error
        return obs, reward, bool(ends[0]), bool(ends[1]), outcome

    def flatten(self, obs) -> np.ndarray:
        """(obs_dim,) float32."""
        space = self.env.observation_space
        if not isinstance(space, gym.spaces.Box):
            obs = gym.spaces.flatten(space, obs)
        numbers = np.asarray(obs)
        if numbers.dtype.kind not in "fiub" or numbers.size != self.observation_space.shape[0]:
            raise ValueError(f"{numbers.dtype} {numbers.shape} instead of {space}")
        return numbers.astype(np.float32).reshape(-1)

    def failure(self, what: str, error: BaseException) -> EnvironmentFailure:
        return EnvironmentFailure(f"environment {self.index}, {what}: {reason(error)}")

    def play_back(self, episodes: list[dict]) -> tuple[np.ndarray, bool]:
        """Rebuild this env's running episode; where it stands, and whether it still runs."""
        saved = episodes[self.index]
        self.first_seed = saved["seed"]
        self.count = saved["count"] - 1
        obs, _ = self.reset()
        for action in saved["actions"]:
            obs, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:
                return self.reset()[0], False
        return obs, True


class GuardedEnvs(gym.vector.VectorWrapper):
    """The one door for what environments return: checked, counted, recorded for a resume.

    infos of a step hold last_obs (num_envs, obs_dim), the observations before an autoreset,
    successes (num_envs,), NaN where an episode goes on or does not say, and charts for the log.
    """

    def __init__(self, env: gym.vector.VectorEnv):
        super().__init__(env)
        self.processes = getattr(env, "processes", [])
        self.obs_dim = env.single_observation_space.shape[0]
        self.act_dim = env.single_action_space.shape[0]
        self.action_bounds = self.guard(env.get_attr, "action_bounds")[0]
        self.actions = None  # sent, not yet answered
        # processes that do not hear SIGTERM would hang the interpreter's exit
        atexit.register(self.close)

    def reset(self, *, seed: list[int], options=None):
        obs, _ = self.guard(self.env.reset, seed=seed, options=options)
        self.returns = np.zeros(self.num_envs)
        self.lengths = np.full(self.num_envs, -1)
        self.refuse_bad_numbers(obs, self.returns)
        self.lengths += 1
        self.episodes = [{"seed": int(x), "count": 1, "actions": []} for x in seed]
        self.obs = obs
        return obs, {}

    def step(self, actions: np.ndarray):
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions
        if self.processes:
            self.guard(self.env.step_async, actions)

    def step_wait(self):
        if self.processes:
            transition = self.guard(self.env.step_wait)
        else:
            transition = self.guard(self.env.step, self.actions)
        obs, rewards, terminations, truncations, infos = transition
        ended = np.flatnonzero(terminations | truncations)
        last_obs = obs
        successes = np.full(self.num_envs, np.nan)
        if len(ended):
            last_obs = obs.copy()
            for i in ended:
                last_obs[i] = infos["final_obs"][i]
                successes[i] = infos["final_info"]["success"][i]
            self.refuse_bad_numbers(last_obs, rewards)
        self.refuse_bad_numbers(obs, rewards)
        self.returns += rewards
        self.lengths += 1
        for episode, action in zip(self.episodes, self.actions, strict=True):
            episode["actions"].append(action)
        outcome = {"last_obs": last_obs, "successes": successes, "charts": {}}
        for i in ended:
            outcome["charts"]["charts/episodic_return"] = float(self.returns[i])
            outcome["charts"]["charts/episodic_length"] = float(self.lengths[i])
            self.begin_episode(i)
        self.obs = obs
        self.actions = None
        return obs, rewards, terminations, truncations, outcome

    def begin_episode(self, i: int) -> None:
        self.episodes[i] |= {"count": self.episodes[i]["count"] + 1, "actions": []}
        self.returns[i] = 0
        self.lengths[i] = 0

    def guard(self, function: Callable, *args, **options):
        """Call it, hearing signals; an error is the environment's failure."""
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # it may hang
        try:
            return function(*args, **options)
        except (EOFError, OSError) as error:
            died = f"the process of an environment has died ({reason(error)})"
            raise EnvironmentFailure(died) from error
        except EnvironmentFailure:
            raise
        except Exception as error:
            raise EnvironmentFailure(reason(error)) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def refuse_bad_numbers(self, obs: np.ndarray, rewards: np.ndarray) -> None:
        """NaN, infinity and what float32 cannot hold must not reach the buffer."""
        # cheap; what is large is looked at closely
        if math.isfinite(np.vdot(obs, obs) + np.vdot(rewards, np.float32(rewards))):
            return
        for name, values in {"observation": obs, "reward": rewards[:, None]}.items():
            bad = ~(np.abs(values) <= np.finfo(np.float32).max)
            for i, j in np.argwhere(bad)[:1]:
                what = f"{values[i, j]} in {name} {j}".replace("nan", "NaN")
                at = f"at step {self.lengths[i] + 1} of its episode"
                raise EnvironmentFailure(f"environment {i} returned {what} {at}")

    def picture(self) -> np.ndarray:
        """Render the first env: (height, width, 3)."""
        frame = self.guard(self.env.envs[0].render)
        if np.ndim(frame) != 3:
            raise EnvironmentFailure(f"render returned {type(frame)}, which is no picture")
        return frame

    def state(self) -> dict:
        """What restore needs."""
        episodes = []
        for episode in self.episodes:
            actions = np.array(episode["actions"], np.float32).reshape(-1, self.act_dim)
            episodes.append(episode | {"actions": torch.from_numpy(actions)})
        names = "obs", "returns", "lengths"
        tensors = {name: torch.tensor(getattr(self, name)) for name in names}
        return tensors | {"episodes": episodes}

    def restore(self, saved: dict) -> None:
        """Play back the running episodes; what then stands elsewhere is said."""
        self.reset(seed=[episode["seed"] for episode in saved["episodes"]])
        # a tensor costs each process an open file
        episodes = [x | {"actions": x["actions"].numpy()} for x in saved["episodes"]]
        played = self.guard(self.env.call, "play_back", episodes)
        self.obs = np.stack([obs for obs, _ in played])
        self.returns[:] = saved["returns"]
        self.lengths[:] = saved["lengths"]
        self.refuse_bad_numbers(self.obs, self.returns)
        for i, episode in enumerate(episodes):
            self.episodes[i] = episode | {"actions": list(episode["actions"])}
            if not played[i][1]:
                self.begin_episode(i)
        moved = np.flatnonzero((self.obs != saved["obs"].numpy()).any(1))
        if len(moved):
            warn(f"environments {moved} did not play back: the run goes on from another state")

    def close(self, **_options) -> None:
        """End the processes, were they busy or dead."""
        atexit.unregister(self.close)
        if self.env.closed:
            return
        with suppress(Exception):  # the run is over, whatever an env says to it
            if self.actions is None or not self.processes:
                self.env.close()
        for process in self.processes:
            process.kill()
        self.env.closed = True


def refuse_actions(env_id: str, space: gym.Space) -> None:
    """Numbers within bounds that can be rescaled will do."""
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or space.low.size == 0:
        fail(f"{env_id} has actions {space}; only a Box of bounded floats will do")
    for i, (low, high) in enumerate(zip(space.low.flat, space.high.flat, strict=True)):
        if not -1e6 <= low < high <= 1e6:
            fail(f"{env_id} has bounds {low}, {high} of action {i}; they must rise, within 1e6")


def refuse_observations(env_id: str, space: gym.Space) -> None:
    """Numbers will do, also in a Dict or a Tuple; images and text will not."""
    spaces = gym.spaces
    if isinstance(space, spaces.Dict):
        space = spaces.Tuple(space.values())
    if isinstance(space, spaces.Tuple):
        for part in space:
            refuse_observations(env_id, part)
        return
    numbers = spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete
    if not isinstance(space, numbers) or spaces.flatdim(space) == 0:
        fail(f"{env_id} has observations {space}; only numbers will do")
    if space.dtype == np.uint8 and len(space.shape) > 1:
        fail(f"{env_id} has observations {space}; these scripts do not learn from images")


def load_simulator(env_id: str) -> None:
    """Register what gymnasium does not know by itself."""
    # `module:Id` is also looked for where the user stands
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        # else dm_control warns
        os.environ.setdefault("MUJOCO_GL", "disable")
    if not env_id.startswith("dm_control/"):
        return
    try:
        assert metadata.version("mujoco") < "4", "mujoco is too new"
        import dm_control  # noqa: F401
        import shimmy  # noqa: F401  registers the ids, in every process
    except (ImportError, AssertionError) as error:
        cure = "pip install dm-control shimmy 'mujoco<4', with Python below 3.13"
        fail(f"{env_id} needs more: {cure} ({error})")


def make_env(env_id: str, index: int = 0, film: bool = False, env_kwargs: str = "{}") -> gym.Env:
    """Flat float32 observations, actions (act_dim,) in [-1, 1]; other envs are refused."""
    gym.logger.min_level = gym.logger.ERROR + 1  # papers use v4
    warnings.filterwarnings("ignore", ".*overflow encountered.*")  # refused later
    if torch.multiprocessing.parent_process():
        for signum in STOPPING:  # they are for the run
            signal.signal(signum, signal.SIG_IGN)
    options = json.loads(env_kwargs)
    if film:
        options["render_mode"] = "rgb_array"
    load_simulator(env_id)
    mujoco = sys.modules.get("mujoco") if index else None
    if mujoco:  # the first env has shown what it says
        mujoco.set_mju_user_warning(lambda _: None)
    try:
        env = gym.make(env_id, **options)
    except (Exception, SystemExit) as error:  # a module of others runs here
        fail(f"cannot make {env_id!r}: {reason(error)}")
    warnings.filterwarnings("ignore", ".*torch.jit.*")  # dm_control shows all
    if mujoco:
        mujoco.set_mju_user_warning(None)
    raw = env.unwrapped
    if film and hasattr(raw, "mujoco_renderer") and raw.model.ncam:
        raw.mujoco_renderer.camera_id = 0  # it follows
    refuse_actions(env_id, env.action_space)
    refuse_observations(env_id, env.observation_space)
    space = env.action_space
    clip = partial(np.clip, a_min=space.low, a_max=space.high)  # rounding may leave the bounds
    env = gym.wrappers.TransformAction(env, clip, space)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    if len(space.shape) != 1:
        flat = gym.spaces.flatten_space(env.action_space)
        env = gym.wrappers.TransformAction(env, lambda x: x.reshape(space.shape), flat)
    env = SeededEpisodes(env, index)
    env.action_bounds = np.float32([space.low, space.high])  # in its own units
    return env


def make_envs(
    env_id: str, n: int, in_processes: bool = False, film: bool = False, env_kwargs: str = "{}"
) -> GuardedEnvs:
    """A vector env whose last step of an episode returns the next one's first obs."""
    makers = [partial(make_env, env_id, i, film and i == 0, env_kwargs) for i in range(n)]
    vector = gym.vector.SyncVectorEnv
    if in_processes:
        vector = gym.vector.AsyncVectorEnv
    # a signal waits until all processes are known
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return GuardedEnvs(vector(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def try_out(envs: GuardedEnvs, film: bool) -> None:
    """A reset, a step and a picture, before anything is written; else refuse."""
    try:
        envs.reset(seed=[0] * envs.num_envs)
        envs.step(np.zeros(envs.action_space.shape, np.float32))
        if film:
            envs.picture()
    except EnvironmentFailure as error:
        fail(str(error))


def choose_opengl() -> None:
    """Render without a screen, through EGL unless MUJOCO_GL says otherwise."""
    with suppress(ImportError):  # after Mesa's LLVM, loading its own would crash
        import triton  # noqa: F401
    if "DISPLAY" in os.environ:
        return
    # mujoco reads this when imported
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        mujoco.GLContext(8, 8).make_current()
    except Exception:  # many kinds
        install = "apt-get install libegl1 libegl-mesa0"
        fail(f"--capture-video finds no OpenGL: {install}, or set MUJOCO_GL")


def write_video(frames: list, env: gym.Env, file: Path) -> None:
    """Write one episode of env to <file>-episode-0.mp4."""
    from gymnasium.utils.save_video import save_video  # slow to import

    # dm_control has a clock alone
    fps = env.metadata.get("render_fps") or 1 / getattr(env.unwrapped, "dt", 1 / 30)
    save_video(frames, file.parent, lambda _: True, name_prefix=file.name, fps=fps)


def versions() -> dict:
    """Of all that a bit-exact resume depends on."""
    found = {"python": sys.version.split()[0]}
    for package in "torch", "gymnasium", "mujoco", "dm-control", "numpy":
        with suppress(metadata.PackageNotFoundError):  # dm-control may be missing
            found[package] = metadata.version(package)
    return found


def describe_machine(device: torch.device) -> dict:
    """Versions, commit and hardware."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    with suppress(OSError):  # no git
        here = Path(__file__).resolve().parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout
    name = sys.platform
    with suppress(OSError, TypeError):  # not on every machine
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    machine = {"commit": commit.strip(), "device": name, "threads": torch.get_num_threads()}
    return versions() | machine


def make_run_dir(args: Args, device: torch.device) -> Path:
    """Make runs/<env>__<exp>__<seed>__<time>; mkdir fails rather than share one."""
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
    run_dir = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
    if len(os.fsencode(run_dir.name)) > 255:
        fail("--exp-name is too long")
    try:
        run_dir.mkdir(parents=True)
        write_json(run_dir / "versions.json", describe_machine(device))
    except OSError as error:
        fail(f"{error.strerror}: cannot make the run directory {run_dir}")
    return run_dir


def lock(run_dir: Path):
    """Keep a run directory to this process, until it ends; returns what must stay open."""
    file = (run_dir / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{run_dir} is in use by another process")
    except OSError:  # some network file systems know no locks
        warn(f"{run_dir} cannot be locked: keep others away")
    return file


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside it, then replace: a crash leaves the old file whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def rows_on_record(path: Path, global_step: int) -> list[dict[str, str]]:
    """A table's rows up to global_step; a resumed run repeats later ones, and a torn one."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
    header, *table = [line.rstrip("\n").split(",") for line in lines] or [[]]
    kept = [cells for cells in table if int(cells[0]) <= global_step]
    return [dict(zip(header, cells, strict=True)) for cells in kept]


def as_text(rows: list[dict[str, str]]) -> str:
    """The table of rows with the same columns."""
    table = [rows[0].keys(), *[row.values() for row in rows]]
    return "".join(",".join(cells) + "\n" for cells in table)


def steps_of(args: Args) -> int:
    """Length of the run in environment steps."""
    return args.total_timesteps


def phases(_args: Args) -> tuple[int, ...]:
    """Steps at which a part of the run ends, before its last one: none."""
    return ()


@dataclass
class Run:
    """How far a run is, and all that it writes."""

    args: Args
    agent: Agent
    buffer: ReplayBuffer
    envs: GuardedEnvs
    eval_envs: GuardedEnvs
    rng: Generator
    stop: "StopSignal"

    def __post_init__(self):
        args = self.args
        self.stopped = False
        self.sound = True  # nothing is half done
        self.global_step = 0
        self.saved_step = None  # of the checkpoint on disk
        self.recorded = set()  # tables' rows of this step that exist already
        self.reports_success = False
        self.tables = {}  # a resumed run's rows
        self.start = time.time()
        names = "charts/episodic_return", "charts/episodic_length", "charts/SPS"
        self.columns = [*names, *METRICS]
        self.metrics = dict.fromkeys(self.columns, math.nan)
        if args.resume:
            self.dir = load(args.resume, "checkpoint.pt")[0].parent
            self.lock = lock(self.dir)
            file, saved = load(args.resume, "checkpoint.pt")  # now nobody else writes it
            refuse_changes(args, saved, self.rng.device)
            self.restore(file, saved)
            self.read_record()
        else:
            # even: evaluation has the odd seeds
            self.envs.reset(seed=[2 * args.seed] * self.envs.num_envs)
            self.dir = make_run_dir(args, self.rng.device)
            self.lock = lock(self.dir)
        self.commit = describe_machine(self.rng.device)["commit"]
        self.take_stock()

    def read_record(self) -> None:
        """Which rows the tables hold; what a signal or a crash left out is done first."""
        for name in "metrics", "evaluations":
            path = self.dir / f"{name}.csv"
            try:
                self.tables[name] = rows_on_record(path, self.global_step)
            except (OSError, ValueError, KeyError) as error:
                fail(f"{path} is damaged: {reason(error)}")
            for row in self.tables[name]:
                if int(row["global_step"]) == self.global_step:
                    self.recorded.add(row.get("mode", name))
                self.reports_success |= bool(row.get("success_rate"))

    def open(self) -> None:
        """Open what is written to; after a resume, tables and charts agree with the checkpoint."""
        args = self.args
        for part in self.dir.glob("*.tmp"):
            if re.search(r"\.(pt|csv|json)\.\d+\.tmp$", part.name):  # a kill's, amid write_whole
                part.unlink()
        write_json(self.dir / "args.json", asdict(args))
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=self.dir.name,
                resume="allow",
                config=asdict(args),
                sync_tensorboard=True,
            )
            wandb.save(f"{self.dir}/videos/*.mp4", base_path=self.dir)
        # 0: charts are drawn anew from the tables, since a kill loses what was not yet flushed
        self.writer = SummaryWriter(self.dir, purge_step=0)
        for name, rows in self.tables.items():
            table = self.dir / f"{name}.csv"
            if rows:
                write_text(table, as_text(rows))
            else:
                table.unlink(missing_ok=True)
            for row in rows:
                self.plot(row)
        self.told = (time.time(), self.global_step)
        self.bar = tqdm(total=steps_of(args), initial=self.global_step, unit="step", disable=None)

    def at_last_step(self) -> bool:
        return self.global_step + self.envs.num_envs > steps_of(self.args)

    def finished(self) -> bool:
        return self.at_last_step() or self.stopped

    def due(self, every: int) -> bool:
        """Every so many steps, and at the end of a phase; 0: there alone."""
        passed = every > 0 and self.global_step % every < self.envs.num_envs
        return passed or self.global_step in phases(self.args) or self.at_last_step()

    def missing(self) -> list[str]:
        """Rows due at this step that are not on record: a table, or modes of evaluation."""
        names = []
        if self.global_step > 0 and self.due(self.args.log_every):
            names.append("metrics")
        if self.global_step > 0 and self.args.eval_every and self.due(self.args.eval_every):
            names += MODES
        return [name for name in names if name not in self.recorded]

    def begin_step(self) -> None:
        """Count it; until after_step the agent is ahead of what is stored."""
        self.global_step += self.envs.num_envs
        self.sound = False

    def after_step(self) -> None:
        self.sound = True
        self.recorded.clear()
        self.bar.update(self.envs.num_envs)
        self.work()

    def take_stock(self) -> dict:
        """The first columns of every table, at a step that is complete."""
        self.now = {
            "global_step": self.global_step,
            "updates": self.agent.updates,
            "wall_time": round(time.time() - self.start, 3),
        }
        return self.now

    def work(self) -> None:
        """Log, save, evaluate: what is due and not on record, after a resume as after a step."""
        self.take_stock()
        missing = self.missing()
        if "metrics" in missing:
            self.log()
        # decided here: a later signal waits for the next step
        self.stopped = bool(self.stop)
        if self.stopped or self.due(self.args.checkpoint_every):
            self.save()
        for mode in MODES:
            if mode in missing and not self.stopped:
                self.evaluate_mode(mode)
                self.stopped = bool(self.stop)
        if self.stopped:
            self.save()
        self.show_progress()

    def refuse_divergence(self) -> None:
        """End a run that diverged before it replaces its last good checkpoint."""
        self.metrics = {name: float(value) for name, value in self.metrics.items()}
        computed = self.agent.state_dict()
        if self.agent.updates:
            computed |= self.metrics
        for name, value in computed.items():
            finite = torch.as_tensor(value).isfinite().all()
            if not finite and not name.startswith("charts/"):
                where = f"{name} is NaN or infinite at step {self.global_step}"
                raise SystemExit(f"diverged: {where}; {self.what_is_saved()}")

    def write(self, name: str, row: dict) -> None:
        """Append to <name>.csv, whose columns are the first row's; NaN stays empty."""
        # NaN is not equal to itself
        row = {key: "" if x != x else str(x) for key, x in row.items()}
        path = self.dir / f"{name}.csv"
        text = ",".join(row.values()) + "\n"
        if not path.exists():
            text = ",".join(row) + "\n" + text
        with path.open("a") as file:
            file.write(text)
        self.plot(row)

    def plot(self, row: dict[str, str]) -> None:
        """A table's row as TensorBoard's curves: text in, text that is no number left out."""
        row = dict(row)
        step = int(row.pop("global_step"))
        walltime = self.start + float(row["wall_time"])
        if mode := row.pop("mode", None):
            names = "return_mean", "return_std", "success_rate"
            row = {f"eval_{mode}/{name}": row[name] for name in names}
        for name, text in row.items():
            if "/" in name and text:
                self.writer.add_scalar(name, float(text), step, walltime)

    def log(self) -> None:
        self.refuse_divergence()
        if new := self.metrics.keys() - self.columns:
            fail(f"add {new} to METRICS")
        speed = self.global_step / max(self.now["wall_time"], 1e-3)
        self.metrics["charts/SPS"] = round(speed, 1)
        self.write("metrics", self.now | self.metrics)
        self.bar.set_postfix(episodic_return=self.metrics["charts/episodic_return"])

    def show_progress(self) -> None:
        """A line a minute where no progress bar can be drawn."""
        seconds = time.time() - self.told[0]
        if not self.bar.disable or seconds < 60:
            return
        speed = (self.global_step - self.told[1]) / seconds
        self.told = (time.time(), self.global_step)
        steps = steps_of(self.args)
        hours = (steps - self.global_step) / max(speed, 1e-9) / 3600
        # the warm-up is faster
        left = f", {hours:.1f} h left" if self.agent.updates else ""
        reward = self.metrics["charts/episodic_return"]
        told = "" if math.isnan(reward) else f"return {reward:.1f}, "  # no episode yet
        say(f"step {self.global_step:,} of {steps:,}: {told}{speed:.0f}/s{left}")

    def evaluate_mode(self, mode: str) -> None:
        """Play episodes; a signal gives them up."""
        self.refuse_divergence()
        args = self.args
        envs = self.eval_envs
        frames = [] if args.capture_video and mode == DEPLOYED else None
        with torch.compiler.set_stance("force_eager"):  # too short to compile for
            results = evaluate(MODES[mode], self.agent, envs, args, frames, self.stop)
        if self.stop:
            return
        if frames:
            write_video(frames, envs.env.envs[0], self.dir / f"videos/{self.global_step}")
        returns, successes, cut = results
        # an episode that does not say so has not succeeded, where others do say it
        self.reports_success |= bool(np.isfinite(successes).any())
        if self.reports_success:
            successes = np.nan_to_num(successes)
        nfe, num_candidates = cost_of(mode, args)
        row = {
            "mode": mode,
            "nfe": nfe,
            "num_candidates": num_candidates,
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "success_rate": successes.mean(),
            "episodes_cut": cut.sum(),
            "returns": " ".join(f"{x:.4f}" for x in returns),
        }
        self.write("evaluations", self.now | row)
        success = f", success rate {successes.mean():.2f}" if self.reports_success else ""
        say(f"step {self.global_step:,}: {mode} {returns.mean():.1f}{success}")

    def state(self) -> dict:
        """All that restore needs to go on exactly from here."""
        agent = self.agent
        rows = self.buffer.rows[: self.buffer.size].cpu().numpy()
        return {
            "algorithm": ALGORITHM,
            "args": asdict(replace(self.args, resume=None)),
            "versions": versions(),
            "metrics": self.metrics,
            "agent": agent.state_dict(),
            "counters": {name: getattr(agent, name) for name in agent.counters},
            "optimizers": {name: x.state_dict() for name, x in agent.optimizers.items()},
            "buffer": torch.from_numpy(rows),  # on a CPU no copy, and not the empty rest
            "position": self.buffer.position,
            "rng": self.rng.get_state(),
            "device": self.rng.device.type,
            "envs": self.envs.state(),
        }

    def save(self) -> None:
        """policy.pt to use the policy, checkpoint.pt to go on exactly from here."""
        if self.saved_step == self.global_step:
            return
        self.refuse_divergence()
        state = self.now | self.state()
        policy = {
            "algorithm": ALGORITHM,
            "script": Path(__file__).name,
            "commit": self.commit,
            "policy": self.agent.acting_policy.state_dict(),
            "args": state["args"],
            "obs_dim": self.envs.obs_dim,
            "act_dim": self.envs.act_dim,
            "action_bounds": torch.from_numpy(self.envs.action_bounds),  # low, high
            "global_step": self.global_step,
        }
        for name, content in {"policy.pt": policy, "checkpoint.pt": state}.items():
            write_whole(self.dir / name, partial(torch.save, content))
        self.saved_step = self.global_step

    def restore(self, file: Path, saved: dict) -> None:
        """Undo save, before anything is written; what does not fit is refused."""
        agent = self.agent
        buffer = self.buffer
        self.envs.reset(seed=[0] * self.envs.num_envs)
        ours = self.take_stock() | self.state()
        try:
            for name in "args", "versions":
                ours[name] = saved[name]
            refuse_unlike(saved, ours)
            self.global_step = saved["global_step"]
            self.start -= saved["wall_time"]
            self.metrics = saved["metrics"]
            agent.load_state_dict(saved["agent"])
            for name, value in saved["counters"].items():
                setattr(agent, name, value)
            for name, optimizer in agent.optimizers.items():
                load_optimizer(optimizer, saved["optimizers"][name])
            buffer.size = len(saved["buffer"])
            buffer.rows[: buffer.size] = saved["buffer"]
            buffer.position = saved["position"]
            if buffer.size < len(buffer.rows) and buffer.position != buffer.size:
                raise ValueError("position is not behind the last row")
            self.rng.set_state(saved["rng"])
            self.envs.restore(saved["envs"])
            for name, version in versions().items():
                before = saved["versions"].get(name, version)
                if before != version:
                    warn(f"{name} was {before}, is {version}: the run goes on, not bit for bit")
        except Exception as error:
            fail(f"{file} is not of this version or task: {reason(error)}")
        self.saved_step = self.global_step
        if self.global_step > steps_of(self.args):
            fail(f"{file} has {self.global_step:,} steps already; raise --total-timesteps")

    def how_to_go_on(self) -> str:
        module = f" --env-id {self.args.env_id}" if ":" in self.args.env_id else ""
        return f"go on with --resume {self.dir}{module}"

    def what_is_saved(self) -> str:
        if self.saved_step is None or not (self.dir / "checkpoint.pt").exists():
            return f"no checkpoint was written to {self.dir}"
        return f"step {self.saved_step:,} is saved; {self.how_to_go_on()}"

    def give_up(self, error: Exception) -> NoReturn:
        """A failure in mid-run: save what is sound, keep the traceback, end in one line."""
        with suppress(OSError):
            (self.dir / "traceback.txt").write_text(traceback.format_exc())
        if self.sound or isinstance(error, EnvironmentFailure):
            # the step that failed is not stored, and its environments are played back
            self.global_step = self.now["global_step"]
            with suppress(Exception):
                self.save()
        fail(f"{reason(error)}; {self.what_is_saved()}", status=1)

    def close(self) -> None:
        for name in "bar", "writer", "envs", "eval_envs", "lock":
            # a disk may be full, or a failure came before they are there
            with suppress(OSError, AttributeError):
                getattr(self, name).close()


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load its state, but keep a learning rate that is a tensor of the agent's."""
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(copy.deepcopy(saved))  # not views of its file
    (group,) = optimizer.param_groups
    if isinstance(lr, Tensor):
        group["lr"] = lr
    if len(optimizer.state) not in (0, sum(x.requires_grad for x in group["params"])):
        raise ValueError("an optimizer lacks a parameter's state")
    for parameter, state in optimizer.state.items():  # torch would notice in mid-run
        shapes = {state["exp_avg"].shape, state["exp_avg_sq"].shape}
        if shapes != {parameter.shape} or state["step"].numel() != 1:
            raise ValueError("an optimizer's state has another shape")


def layout(x):
    """What a saved state is made of, but for the number of rows; NaN and minus raise ValueError."""
    if isinstance(x, Tensor):
        if not x.isfinite().all():
            raise ValueError("NaN or infinity in a tensor")
        return x.dtype, x.ndim, x.shape[1:]
    if isinstance(x, dict):
        # an optimizer has no state before its first step
        return {key: layout(part) for key, part in x.items() if key != "state"}
    if isinstance(x, list | tuple):
        return [layout(part) for part in x]
    if isinstance(x, int) and x < 0:
        raise ValueError(f"{x} is below zero")
    return type(x)


def refuse_unlike(saved, ours) -> None:
    """Raise ValueError where a loaded state is not built as ours is."""
    theirs = layout(saved)
    mine = layout(ours)
    different = [key for key in mine | theirs if theirs.get(key) != mine.get(key)]
    if different:
        raise ValueError(f"not as this script writes it: {different}")


def load(path: str, name: str) -> tuple[Path, dict]:
    """Read what Run.save wrote, given the file or its folder; refuse anything else."""
    file = Path(path)
    if path and os.path.isdir(path):
        file = file / name
    if not os.path.isfile(file):  # Path's own raises for a name that is too long
        option = "--resume" if name == "checkpoint.pt" else "--evaluate"
        fail(f"{option} {path!r}: there is no {name}, it does not exist")
    try:
        with zipfile.ZipFile(file) as archive:
            torn = archive.testzip()  # checksums, as torch does not
        assert torn is None
        # mmap: the buffer is not held twice
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # many kinds
        fail(f"{file} is damaged, or was not written by these scripts")
    other = f"{file} is not of this version of {Path(__file__).name}"
    needed = {"algorithm", "args", "global_step"}
    needed.add("envs" if name == "checkpoint.pt" else "policy")
    if not isinstance(content, dict) or not needed <= content.keys():
        fail(f"{other}, or no {name}")
    if content["algorithm"] != ALGORITHM or not isinstance(content["args"], dict):
        fail(f"{other}: it is of {content['algorithm']}, not {ALGORITHM}")
    known = asdict(Args())
    flags = content["args"].keys()
    if name == "checkpoint.pt" and flags != known.keys():
        fail(f"{other}: it has other flags, {flags ^ known.keys()}")
    if unknown := flags - known.keys():
        content["unknown"] = sorted(map(str, unknown))
    content["args"] = {key: x for key, x in content["args"].items() if key in known}
    for key, value in content["args"].items():
        kind = type(known[key])
        whole = kind is float and type(value) is int
        if known[key] is not None and type(value) is not kind and not whole:
            fail(f"{other}: {flag(key)} is {value!r}")
    return file, content


def flow_spread(candidates: Tensor, noise_std) -> Tensor:
    """Std of actions (N, B, act_dim) less that of the noise on them: variances add."""
    variance = candidates.var(0, correction=min(1, len(candidates) - 1)).mean()
    return (variance - noise_std**2).clamp(min=0).sqrt()


# what update returns, and so the columns of metrics.csv
METRICS = "losses/critic_loss", "losses/q_values", "losses/policy_loss"
METRICS += "losses/ivc_loss", "policy/best_of_n_gain", "policy/candidate_spread"
METRICS += ("policy/flow_spread",)
ALGORITHM = __doc__.partition(":")[0]  # of whom a file is, whatever the script is called
MAY_BE_ZERO = {"seed", "eval_every", "checkpoint_every", "torch_threads", "noise_scale"}
MAY_BE_ZERO |= {"ivc_coef"}
AT_MOST = {"gamma": 1, "tau": 1}
AT_MOST |= {"seed": 2**32 - 1, "num_envs": 10_000, "eval_episodes": 10_000}
AT_MOST |= {"utd": 1_000, "torch_threads": 1_024}
RISING = set()
# flags that do something only where another one has this value
NEEDS = {"wandb_entity": ("track", True), "wandb_project_name": ("track", True)}
MAY_CHANGE = {"resume", "total_timesteps", "log_every", "capture_video", "torch_threads"}
MAY_CHANGE |= {"track", "wandb_project_name", "wandb_entity", "checkpoint_every"}  # on --resume


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def own_rules(args: Args) -> list[tuple[bool, str]]:
    """What else must hold, and the line to say where it does not."""
    steps = args.total_timesteps // max(args.num_envs, 1) * args.num_envs
    updates = args.utd * (steps - args.learning_starts)
    limits = [("num_envs", "learning_starts"), ("num_envs", "buffer_size")]
    limits += [("batch_size", "learning_starts"), ("learning_starts", "total_timesteps")]
    rules = [
        (getattr(args, name) <= getattr(args, limit), f"{flag(name)} must be at most {flag(limit)}")
        for name, limit in limits
    ]
    return [
        *rules,
        (updates >= 1, "--utd gives no update; raise it or --total-timesteps"),
    ]


def check_args(args: Args) -> None:
    """Refuse what cannot work, or would do nothing."""
    rules = []
    # a default is fine
    given = {name: x for name, x in asdict(args).items() if x != getattr(Args, name)}
    for name, value in given.items():
        if isinstance(value, str):
            printable = value.strip() and (value.isprintable() or name == "env_kwargs")
            rules.append((printable, f"{flag(name)} {value!r} must be text, and not empty"))
        elif name in RISING:
            first, last = value
            lowest = 0 if name in MAY_BE_ZERO else -1e15
            holds = lowest <= first < last <= 1e15
            words = f"must rise, from {lowest:g} or more to at most 1e15"
            rules.append((holds, f"{flag(name)} {first} {last} {words}"))
        elif not isinstance(value, bool | None):
            limit = AT_MOST.get(name, 1e15)
            low = "0 or more" if name in MAY_BE_ZERO else "above 0"
            for x in np.atleast_1d(value).tolist():
                holds = 0 < x <= limit or (x == 0 and name in MAY_BE_ZERO)
                rules.append((holds, f"{flag(name)} {x} must be {low} and at most {limit:g}"))
    for name, (other, wanted) in NEEDS.items():
        holds = getattr(args, name) == getattr(Args, name) or getattr(args, other) == wanted
        rules.append((holds, f"{flag(name)} does nothing unless {flag(other)} is {wanted}"))
    for holds, message in rules + own_rules(args):
        if not holds:
            fail(message)
    try:
        # int refuses NaN and Infinity, which are no JSON; --capture-video sets the render_mode
        assert "render_mode" not in dict(json.loads(args.env_kwargs, parse_constant=int))
    except (ValueError, TypeError, AssertionError):
        fail(f"--env-kwargs {args.env_kwargs} is no JSON object like '{{\"key\": 1}}'")


def refuse_changes(args: Args, saved: dict, device: torch.device) -> None:
    """A checkpoint goes on with its own arguments, on its own kind of device."""
    for name, value in saved["args"].items():
        if name not in MAY_CHANGE and value != getattr(args, name):
            fail(f"{flag(name)} cannot change on --resume; it was {value}")
    if saved.get("device") != device.type:
        fail(f"{args.resume} is not of this device; it can go on on {saved.get('device')} only")


def choose_device(args: Args) -> torch.device:
    """The device to run on; one that is not there is refused."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        assert device.type in ("cpu", "cuda", "mps")
    except Exception:  # many kinds
        fail(f"--device {name} is not to be had here; --device auto takes what there is")
    if args.precision == "tf32" and device.type != "cuda":
        fail(f"--precision tf32 needs a CUDA GPU, not --device {device}")
    return device


def memory_of(device: torch.device) -> float:
    """Bytes to be had, on the GPU or within this machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = math.inf
    with suppress(OSError, TypeError):
        found = re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
        available = 1024 * int(found[1])
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.stat").read_text().split()[1])  # file caches can go
        available = min(available, limit - used)
    return available


def refuse_too_large(args: Args, obs_dim: int, act_dim: int, device: torch.device) -> None:
    """Refuse now what memory cannot hold."""
    states = max(args.batch_size, args.eval_episodes)
    candidates = getattr(args, "num_candidates", 1)
    numbers = {
        "buffer_size": 0 if args.evaluate else args.buffer_size * (2 * obs_dim + act_dim + 3),
        "hidden_dim": 50 * args.hidden_dim**2,  # networks, averages, gradients, moments
        "hidden_layers": 16 * getattr(args, "hidden_layers", 0) * (100 + args.hidden_dim) ** 2,
        "num_candidates": 4 * candidates * states * args.hidden_dim,
        "num_atoms": 3 * args.batch_size * getattr(args, "num_atoms", 0) ** 2,
    }
    name = max(numbers, key=numbers.get)
    needed = 4 * sum(numbers.values())
    memory = memory_of(device)
    if needed > memory:
        much = f"needs about {needed / 1e9:.3g} GB of memory"
        fail(f"{flag(name)} {getattr(args, name, '')} {much}; {memory / 1e9:.3g} GB are free")


def grouped(default: Args) -> type:
    """Args as a dataclass of its groups, from its comments, for --help."""
    types = get_type_hints(Args)
    groups = {}
    above = ""
    source = Path(__file__).read_text()
    for line in source[source.index("class Args:") :].split("\n\n\n")[0].splitlines():
        if heading := re.match(r"    # --- (\w+): ", line):
            members = groups.setdefault(heading[1], [])
        elif found := re.match(r"    (\w+): .*?(?:  # (.+))?$", line):
            kind = Annotated[types[found[1]], tyro.conf.arg(help=found[2] or above)]
            members.append((found[1], kind, field(default=getattr(default, found[1]))))
        above = line.strip(" #")
    parts = [(name, make_dataclass(name, members)) for name, members in groups.items()]
    whole = [(name, part, field(default_factory=part)) for name, part in parts]
    return make_dataclass("Flags", whole)


def read_flags(argv: list[str] | None, default: Args) -> Args:
    """The command line over defaults; tyro's frame around an error becomes one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            groups = tyro.cli(tyro.conf.OmitArgPrefixes[grouped(default)], args=argv)
    except SystemExit as end:
        if end.code:
            words = []
            for line in said.getvalue().splitlines()[1:]:
                if line.startswith(("│ ─", "╰")):
                    break
                words.append(line.strip("│ "))
            given = argv or sys.argv[1:]
            fail(f"{' '.join(words)} in: {' '.join(given)}")
        raise
    flat = {}
    for group in vars(groups).values():
        flat |= vars(group)
    return Args(**flat)


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; --resume and --evaluate start from the stored arguments."""
    args = read_flags(argv, Args())
    if args.resume and args.evaluate:
        fail("--resume goes on training and --evaluate plays a policy: give one of them")
    for path, name in (args.resume, "checkpoint.pt"), (args.evaluate, "policy.pt"):
        if path is not None:
            file, saved = load(path, name)
            stored = replace(Args(), **saved["args"])
            module = stored.env_id.partition(":")[0]
            if stored.env_id not in (args.env_id, module) and module not in sys.modules:
                fail(f"{file} would import {module}; if you trust it, add --env-id {stored.env_id}")
            if "unknown" in saved:
                warn(f"{file} has flags that are unknown here and ignored: {saved['unknown']}")
            args = read_flags(argv, stored)
    return args


STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def ignored(signum: int) -> bool:
    """Only nohup may decide that a signal does not stop a run."""
    return signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN


class StopSignal:
    """Note the first signal that asks to stop, to save and end; a later one exits at once."""

    def __init__(self):
        self.signum = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self):
        self.handlers = {}
        for signum in STOPPING:
            if not ignored(signum):
                self.handlers[signum] = signal.signal(signum, self.note)
        # Compilers inherit this mask and so outlive a terminal's Ctrl-C; this process still
        # hears of it through TensorBoard's older thread.
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.handlers)
        return self

    def __exit__(self, *_):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum: int, _frame) -> None:
        # timeout(1) signals a process and then its group: that is one wish
        if self and time.monotonic() - self.since > 1:
            sys.exit(128 + signum)
        if not self:
            self.signum = signum
            self.since = time.monotonic()


# ============ 4 SPEED: compiled and recorded updates; the deployed policy; main
class Captured:
    """function(agent, inputs, args, rng, *key) as one CUDA graph per key, a single launch.

    A graph repeats its kernels on the same addresses. So inputs are copied there, outputs hold
    until the next call, learning rates are tensors, and Adam (capturable) counts its steps on the
    GPU. A generator may serve several graphs: a replay moves its offset on.
    Three calls are not recorded: they compile, choose kernels and allocate.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.calls = {}
        self.graphs = {}

    def __call__(self, agent, inputs, args: Args, rng: Generator, *key):
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            return self.function(agent, inputs, args, rng, *key)
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(rng)  # replays go on drawing from it
            static = copy.deepcopy(inputs)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                outputs = self.function(agent, static, args, rng, *key)
            self.graphs[key] = (graph, static, outputs)
        graph, static, outputs = self.graphs[key]
        if isinstance(inputs, Tensor):
            static.copy_(inputs)
        else:
            for name, value in inputs.items():
                static[name].copy_(value)
        graph.replay()
        return outputs


def go_eager(error: Exception) -> None:
    """Nothing is compiled from here on; says why."""
    torch.compiler.set_stance("force_eager")
    needs = "which needs g++ (apt-get install g++) or on a GPU Triton"
    warn(f"going on without --compile, {needs}: {reason(error).splitlines()[0]}")


class OrEager:
    """fast(agent, inputs, args, rng, *key), or plain for good if fast fails in its first calls."""

    def __init__(self, fast: Callable, plain: Callable):
        self.function = fast
        self.plain = plain
        self.calls = {}

    def __call__(self, agent, inputs, args: Args, rng: Generator, *key):
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] > 3:
            return self.function(agent, inputs, args, rng, *key)
        states = [x.state for x in agent.optimizers.values()]
        new = [state for state in states if not state]
        held = [*agent.state_dict().values()]
        held += [x for state in states for part in state.values() for x in part.values()]
        before = copy.deepcopy(held)
        draws = rng.get_state()
        try:
            return self.function(agent, inputs, args, rng, *key)
        except Exception as error:  # a compiler's, or of a torn cache
            go_eager(error)
        torch._foreach_copy_(held, before)  # in place: a graph may hold it
        for state in new:
            state.clear()
        rng.set_state(draws)
        self.function = self.plain
        return self.plain(agent, inputs, args, rng, *key)


def accelerate(agent: Agent, explore: Callable, improve: Callable) -> tuple[Callable, Callable]:
    """The two functions compiled, and on CUDA recorded; or as they are, and a line why."""
    say("the first updates are compiled, which takes a minute or more")
    try:
        for network in agent.policy, agent.critic, agent.target_critic:
            network.compile(dynamic=False)
        fast = partial(improve, loss_fn=torch.compile(policy_loss, dynamic=False))
    except Exception as error:
        go_eager(error)
        return explore, improve
    explore = OrEager(explore, explore)
    improve = OrEager(fast, improve)
    if agent.device.type != "cuda":
        return explore, improve
    torch.cuda.synchronize(agent.device)
    torch.compiler.config.force_cudagraph_gc = True  # else amid a recording
    # the default stream cannot be captured
    torch.cuda.set_stream(torch.cuda.Stream(agent.device))
    return Captured(explore), Captured(improve)


class OneStepPolicy(nn.Module):
    """The deployed policy: noise z = prior_std * e -> action = clip(z + u(s, z, 0, 1)).

    The times are constant, so their share of the first layer becomes a bias.
    """

    def __init__(self, policy: MeanVelocityField):
        super().__init__()
        policy = copy.deepcopy(policy).requires_grad_(False)
        self.from_obs, _, from_r, self.from_z = policy.net.first.parts
        self.from_z.bias += from_r.weight.squeeze(1)  # r = 1, and t = 0 adds nothing
        self.rest = policy.net.rest

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs (B, obs_dim), noise (..., B, act_dim) -> actions like noise."""
        velocity = self.rest(self.from_obs(obs) + self.from_z(noise))
        return (noise + velocity).clamp(-1, 1)


def replay(args: Args, agent: Agent, envs) -> None:
    """--evaluate: episodes of a saved policy, as it is deployed."""
    file, saved = load(args.evaluate, "policy.pt")
    bounds = torch.from_numpy(envs.action_bounds)
    if args.env_id != saved["args"].get("env_id", args.env_id):
        fail(f"{file} was trained on {saved['args']['env_id']}, not on {args.env_id}")
    try:
        ours = {"policy": agent.acting_policy.state_dict(), "global_step": 0}
        refuse_unlike(saved, saved | ours)
        if not bounds.equal(saved.get("action_bounds", bounds)):
            raise ValueError("its actions had other bounds")
        agent.acting_policy.load_state_dict(saved["policy"])
    except Exception as error:
        fail(f"{file} is not of this version or task: {reason(error)}")
    act = MODES[DEPLOYED]
    frames = [] if args.capture_video else None
    returns, successes, cut = evaluate(act, agent, envs, args, frames)
    if frames:
        write_video(frames, envs.env.envs[0], file.parent / "videos/evaluate")
    for episode, value in enumerate(returns):
        print(f"episode {episode}: return {value:.4f}{', cut' if cut[episode] else ''}")
    if np.isfinite(successes).any():  # else the environment does not say
        print(f"success rate {np.nan_to_num(successes).mean():.2f}")
    obs = torch.zeros(1, envs.obs_dim, device=agent.device)
    rng = Generator(agent.device)
    start = time.perf_counter()
    for _ in range(500):
        act(agent, obs, args, rng).cpu()
    ms = 1000 * (time.perf_counter() - start) / 500
    print(f"return {returns.mean():.2f} +- {returns.std():.2f} {ms:.3f} ms/action")


def main(args: Args) -> Path | None:
    """Train and return the run directory, or replay a policy."""
    check_args(args)
    device = choose_device(args)
    say(f"{ALGORITHM} on {args.env_id}, seed {args.seed}, {device}")
    torch.set_num_threads(args.torch_threads or min(8, torch.get_num_threads()))
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    warnings.filterwarnings("ignore", ".*(capturable=True|matmul_precision).*")
    film = args.capture_video
    if film:
        choose_opengl()
    # first, because it may fork
    make = partial(make_envs, args.env_id, env_kwargs=args.env_kwargs)
    envs = make(args.num_envs, args.async_envs)
    # filming wants the simulators in this process
    eval_envs = make(args.eval_episodes, args.async_envs and not film, film)
    try_out(eval_envs, film)
    refuse_too_large(args, envs.obs_dim, envs.act_dim, device)
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(envs.obs_dim, envs.act_dim, args, device)
    if args.evaluate:
        return replay(args, agent, eval_envs)

    buffer = ReplayBuffer(args.buffer_size, envs.obs_dim, envs.act_dim, device)
    # random actions, noise, replay sampling
    rng = Generator(device).manual_seed(args.seed)
    run = Run(args, agent, buffer, envs, eval_envs, rng, StopSignal())
    return run_to_the_end(run)


def run_to_the_end(run: Run) -> Path:
    """Train; a signal or a failure ends in a checkpoint and one line."""
    if run.finished() and not run.missing():
        say(f"{run.dir} is complete")
        return run.dir
    try:
        run.open()
        sizes = f"{run.envs.obs_dim} observations, {run.envs.act_dim} actions"
        say(f"{sizes}, replay buffer of {run.buffer.rows.nbytes / 1e9:.2f} GB; {run.dir}")
        with run.stop:
            run.work()  # what a stop left undone
            train(run.agent, run.buffer, run.envs, run, run.args, run.rng, run.envs.obs)
            run.close()
    except Exception as error:
        run.give_up(error)
    finally:
        run.close()
    if run.stopped:
        print(f"stopped; {run.how_to_go_on()}", file=sys.stderr)
        raise SystemExit(128 + run.stop.signum)
    return run.dir


def leave(signum: int, _frame) -> NoReturn:
    """Nothing is saved yet; an exception might be caught on its way."""
    for process in torch.multiprocessing.active_children():
        process.kill()
    os._exit(128 + signum)


def cli() -> None:
    """The command line: whatever goes wrong ends in one line."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by the shell, as 2>&- does
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    for signum in STOPPING:
        if not ignored(signum):
            signal.signal(signum, leave)
    try:
        main(parse_args())
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        status = 1 if isinstance(error, OSError) else 2  # a pipe that is closed, a full disk
        fail(f"{reason(error)} (python -X dev shows where)", status)
    finally:
        for signum in STOPPING:  # all is saved
            signal.signal(signum, signal.SIG_IGN)
        for stream in sys.stdout, sys.stderr:
            try:
                stream.flush()
            except OSError:  # nobody reads any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    cli()
