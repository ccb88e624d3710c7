"""FPMD-M: online reinforcement learning with a MeanFlow policy that acts in one step.

The average velocity u(s, z_t, r, t) of a flow between two times r <= t jumps from noise (t = 1) to
an action (r = 0) in one network evaluation. Training keeps the best of N = 32 candidates;
policy mirror descent pulls the policy towards them, by regression on the MeanFlow identity.
Below, e ~ N(0, I), z_t = (1 - t) a* + t e, v = e - a*, and Q' are the target critics.

    generate       z_1 = prior_std * e,  a = z_1 - u(s, z_1, 0, 1)
    select_action  a* = argmax over N candidates a_i of min(Q_1, Q_2)(s, a_i)
    critic_loss    y = r + gamma (1 - terminated) min(Q'_1, Q'_2)(s', a*),  (Q_j(s, a) - y)^2
    mirror_descent_targets   w = exp((Q(s', a*) - max Q) / (sigma lambda)) / its batch mean
    policy_loss    w || u(s', z_t, r, t) - sg(v - (t - r) du/dt) ||^2

    python fpmd_meanflow_online.py --env-id Ant-v4
    python fpmd_meanflow_online.py --evaluate runs/<run>/policy.pt --eval-episodes 10

Four parts: 1 METHOD, 2 TRAINING, 3 PLUMBING, 4 SPEED. Stop after part 2, and you have read
the algorithm end to end, from env.step to the optimizers.

Paper: One-Step Flow Policy Mirror Descent, arXiv:2507.23675; code: tianyyiii/flow_policy_iclr.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0",
#     "dm-control==1.0.50", "shimmy==2.0.1", "tyro==1.0.17", "tensorboard==2.21.0",
#     "wandb==0.31.0", "tqdm==4.70.1", "imageio-ffmpeg==0.8.1", "moviepy==2.2.1",
# ]
# ///

import copy
import difflib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

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
    seed: int = 1  # seeds networks, noise, replay sampling and every episode
    total_timesteps: int = 1_000_000  # environment steps, over all envs
    num_envs: int = 5  # parallel training environments
    exp_name: str = Path(__file__).stem  # second part of the run directory's name
    runs_dir: str = "runs"  # where run directories are created
    log_every: int = 1_000  # steps between rows of metrics.csv
    eval_every: int = 25_000  # steps between evaluations, 0: never
    eval_episodes: int = 10  # episodes per evaluation, all side by side
    checkpoint_every: int = 50_000  # steps between checkpoints, 0: only at the end
    capture_video: bool = False  # film an episode of every one-step evaluation
    track: bool = False  # mirror the run to Weights & Biases
    wandb_project_name: str = "one-step-flow-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    resume: str | None = None  # checkpoint.pt or a run directory to go on with
    evaluate: str | None = None  # policy.pt to replay, one step per action

    # --- algorithm: defaults are the published setting ---
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of target critics and acting policy
    batch_size: int = 256  # transitions per update, B
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    learning_starts: int = 30_000  # random environment steps before learning
    utd: float = 0.2  # gradient updates per environment step
    num_candidates: int = 32  # N, actions generated per state
    flow_steps: int = 1  # T, jumps per action (NFE) in training
    p_instant: float = 0.0  # share of the batch with r = t, where u is v
    prior_std: float = 0.5  # std of z_1 when sampling; 1 in the loss
    weight_mode: Literal["temperature", "clip_alpha", "none", "particles"] = "temperature"  # of w
    temperature: float = 3.0  # lambda, in std of Q over states
    particle_temperature: float = 0.5  # lambda, in std of Q within a state
    reward_scale: float = 0.2  # rewards are multiplied by this
    critic_lr: float = 3e-4  # Adam step size of the critics
    critic_layer_norm: bool = False  # LayerNorm in the critics
    critic_steps: int = 2  # Adam steps per critic gradient; the authors take 2
    policy_lr: tuple[float, float] = (3e-4, 3e-5)  # the policy's, first and last
    policy_lr_decay: tuple[int, int] = (25_000, 75_000)  # linear between these policy updates
    policy_delay: int = 2  # updates per step of the policy and of the moving averages
    q_stats_rate: float = 0.001  # rate of the running mean and std of Q
    noise_scale: float = 0.1  # exploration noise std is alpha * noise_scale
    alpha_init: float = 5.0  # alpha multiplies the noise (it is not SAC's); its start
    alpha_lr: float = 7e-3  # Adam step size of log alpha
    alpha_interval: int = 1_250  # steps between updates of alpha
    target_entropy_scale: float = 1.5  # alpha decays until the noise has entropy -scale * act_dim
    hidden_dim: int = 256  # width of the hidden layers

    # --- speed: how it is computed ---
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, mps
    compile: bool = True  # compile and, on CUDA, record updates
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # bfloat16: in generating
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8
    async_envs: bool = False  # one process per env, for slow simulators


# ============ 1 METHOD: networks, acting, learning
TIME_DIM = 16  # width of the sinusoidal time embedding


def linear(in_dim: int, out_dim: int, fan_in: int, bias: bool = True) -> nn.Linear:
    """A linear layer with weights N(0, 1 / fan_in) cut at two std, as in haiku."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    std = fan_in**-0.5
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class FirstLayer(nn.Module):
    """A linear layer on concatenated inputs: a sum of one linear map per input."""

    def __init__(self, *input_dims: int, out_dim: int):
        super().__init__()
        last = len(input_dims) - 1  # one bias is enough
        self.parts = nn.ModuleList(
            linear(dim, out_dim, fan_in=sum(input_dims), bias=i == last)
            for i, dim in enumerate(input_dims)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(part(x) for part, x in zip(self.parts, inputs, strict=True))


class MLP(nn.Module):
    """So many hidden layers, Mish between (after LayerNorm, if asked) and a linear last one."""

    def __init__(self, input_dims: tuple, hidden_dim: int, out_dim: int, hidden=3, norm=False):
        super().__init__()
        self.first = FirstLayer(*input_dims, out_dim=hidden_dim)
        rest = []
        for dim in [hidden_dim] * (hidden - 1) + [out_dim]:
            if norm:
                rest.append(nn.LayerNorm(hidden_dim))
            rest += [nn.Mish(), linear(hidden_dim, dim, fan_in=hidden_dim)]
        self.rest = nn.Sequential(*rest)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.rest(self.first(*inputs))


def time_embedding(t: Tensor) -> Tensor:
    """Sines and cosines of the flow time, 8 frequencies: (..., 1) -> (..., 16)."""
    angles = t * 10_000 ** (-torch.arange(0, 1, 2 / TIME_DIM, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(TIME_DIM)


class AverageVelocityField(nn.Module):
    """u(s, z, r, t): average velocity over [r, t] of the flow through z at time t."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.act_dim = act_dim
        self.r_mlp = MLP((TIME_DIM,), 2 * TIME_DIM, TIME_DIM, hidden=1)
        self.t_mlp = MLP((TIME_DIM,), 2 * TIME_DIM, TIME_DIM, hidden=1)
        self.net = MLP((obs_dim, TIME_DIM, TIME_DIM, act_dim), hidden_dim, act_dim)

    def forward(self, obs: Tensor, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """obs (B, obs_dim), z (..., B, act_dim), r and t (1,) or (B, 1) -> velocity like z."""
        # z last: all that is summed before it has no candidates yet
        return self.net(obs, self.r_mlp(time_embedding(r)), self.t_mlp(time_embedding(t)), z)


class QNetwork(MLP):
    """Q(s, a): obs (B, obs_dim), actions (..., B, act_dim) -> (..., B)."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(obs, actions).squeeze(-1)


class TwinCritic(nn.Module):
    """Two independent action values Q_1 and Q_2."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256, layer_norm=False):
        super().__init__()
        self.q1 = QNetwork((obs_dim, act_dim), hidden_dim, 1, norm=layer_norm)
        self.q2 = QNetwork((obs_dim, act_dim), hidden_dim, 1, norm=layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, obs_dim), actions (..., B, act_dim) -> Q (2, ..., B)."""
        return torch.stack([self.q1(obs, actions), self.q2(obs, actions)])


class Agent(nn.Module):
    """All that learns: networks, log alpha, running statistics of Q, optimizers."""

    counters = "updates", "alpha_updates"  # attributes that a checkpoint keeps

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.policy = AverageVelocityField(obs_dim, act_dim, args.hidden_dim)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_dim, args.critic_layer_norm)
        # moving averages (EMA): the policy that acts, and the target network
        self.acting_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        self.register_buffer("q_mean", torch.tensor(0.0))  # of Q(s, a*) over states
        self.register_buffer("q_std", torch.tensor(1.0))
        self.register_buffer("q_std_within", torch.tensor(1.0))  # of Q within a state
        self.to(device)
        self.device = device
        self.updates = 0
        self.alpha_updates = 0
        # a tensor, which a recorded CUDA graph reads when it is replayed
        self.policy_lr = torch.tensor(args.policy_lr[0], device=device)
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "policy": adam(self.policy.parameters(), self.policy_lr),
            "alpha": torch.optim.Adam([self.log_alpha], args.alpha_lr),
        }


# ------------ acting
def generate(policy: nn.Module, obs: Tensor, z: Tensor, flow_steps: int) -> Tensor:
    """T jumps z_r = z_t - (t - r) u(s, z_t, r, t) from noise at t = 1 to an action at t = 0.

    obs (B, obs_dim), noise z = z_1 (..., B, act_dim) -> unclipped actions z_0 like it.
    """
    for k in range(flow_steps, 0, -1):
        r = torch.full((1,), (k - 1) / flow_steps, device=z.device)
        t = torch.full((1,), k / flow_steps, device=z.device)
        z = z - policy(obs, z, r, t) / flow_steps  # t - r = 1 / T, which the release lacks
    return z


def propose(policy: nn.Module, obs: Tensor, std, args: Args, rng: Generator) -> Tensor:
    """N candidates plus noise of that std: (N, B, act_dim), unclipped."""
    shape = (2, args.num_candidates, len(obs), policy.act_dim)
    noise, exploration = torch.randn(shape, generator=rng, device=obs.device)
    return generate(policy, obs, args.prior_std * noise, args.flow_steps) + std * exploration


def take(candidates: Tensor, index: Tensor) -> Tensor:
    """candidates (N, B, act_dim), index (B,) -> clipped actions (B, act_dim)."""
    return candidates.take_along_dim(index[None, :, None], 0).squeeze(0).clamp(-1, 1)


def select_action(critic: nn.Module, obs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Best of N: argmax_i min(Q_1, Q_2)(s, a_i) -> actions (B, act_dim), scores (N, B)."""
    scores = critic(obs, candidates).amin(0)  # (N, B)
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
    """Best of N candidates, each with noise of std alpha * noise_scale."""
    std = agent.log_alpha.exp() * args.noise_scale
    candidates = propose(agent.acting_policy, obs, std, args, rng)
    return select_action(agent.critic, obs, candidates)[0]


MODES = {"one_step": act_one_step, "best_of_n": act_best_of_n}  # of evaluation
DEPLOYED = "one_step"


def cost_of(mode: str, args: Args) -> tuple[int, int]:
    """Network evaluations per candidate (NFE), and candidates per action."""
    return (1, 1) if mode == "one_step" else (args.flow_steps, args.num_candidates)


# ------------ learning
def critic_loss(critic, target_critic, batch: dict, next_actions: Tensor, args: Args):
    """Clipped double-Q: loss and Q (2, B); only termination ends bootstrapping."""
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).amin(0)  # (B,)
        bootstrap = args.gamma * (1 - batch["terminations"])
        y = args.reward_scale * batch["rewards"] + bootstrap * next_q
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach()


def particle_probabilities(agent: Agent, scores: Tensor, args: Args) -> Tensor:
    """pi_old exp(Q / lambda) on the candidates: scores (N, B) -> p (N, B)."""
    return (scores / (agent.q_std_within * args.particle_temperature)).softmax(0)


def mirror_descent_targets(
    agent: Agent, candidates: Tensor, scores: Tensor, args: Args, rng: Generator
) -> tuple[Tensor, Tensor]:
    """What the policy imitates: actions (B, act_dim) and their weights w (B,).

    Ideally of pi_old exp(Q / lambda), pi_old = policy: its best of N, weighted across states.
    """
    q = scores.amax(0)  # (B,)
    best = take(candidates, scores.argmax(0))  # (B, act_dim)
    if args.weight_mode == "temperature":  # lambda in units of Q's std over states
        # subtracting the maximum prevents an overflow and cancels in the mean
        w = ((q - q.max()) / (agent.q_std * args.temperature)).exp()
        return best, w / w.mean()
    if args.weight_mode == "clip_alpha":  # as the authors released it
        clip_limit = 3.0
        shifted = q - agent.q_mean / agent.q_std  # the release's; (q - mean) / std was meant?
        alpha = agent.log_alpha.detach().exp()
        return best, (shifted.clamp(-clip_limit, clip_limit) / alpha).exp()
    if args.weight_mode == "particles":  # within each state, resample its candidates
        p = particle_probabilities(agent, scores, args)  # (N, B)
        # of clocks with rates p, the i-th rings first with probability p_i
        clocks = torch.empty_like(p).exponential_(generator=rng) / p
        return take(candidates, clocks.argmin(0)), torch.ones_like(q)
    return best, torch.ones_like(q)  # none: every best candidate counts alike


def policy_loss(
    policy: nn.Module, obs: Tensor, actions: Tensor, w: Tensor, noise: Tensor, r: Tensor, t: Tensor
) -> Tensor:
    """MeanFlow regression: mean of w || u - sg(v - (t - r) du/dt) ||^2.

    states obs (B, obs_dim), their actions a*, noise e (B, act_dim), w (B,), r <= t (B, 1).
    """
    z_t = (1 - t) * actions + t * noise
    v = noise - actions
    tangents = v, torch.zeros_like(r), torch.ones_like(t)  # along the path, while r stays
    u, du_dt = torch.func.jvp(partial(policy, obs), (z_t, r, t), tangents)
    error = u - (v - (t - r) * du_dt).detach()  # (B, act_dim)
    return (w[:, None] * error.square()).mean()


def move_towards(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """Exponential moving average: slow <- (1 - tau) slow + tau fast."""
    with torch.no_grad():
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)


def update_critic(agent: Agent, batch: dict, next_actions: Tensor, args: Args) -> dict:
    """Adam steps of the critics on one gradient; the authors take two."""
    loss, q = critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)
    agent.optimizers["critic"].zero_grad()
    loss.backward()
    for _ in range(args.critic_steps):
        agent.optimizers["critic"].step()
    return {"losses/critic_loss": loss.detach(), "losses/q_values": q.mean()}


def update_policy(agent: Agent, obs, actions, w, args: Args, rng: Generator, loss_fn=None) -> dict:
    """Adam step towards actions (B, act_dim); loss_fn may be policy_loss compiled."""
    first, second, coin = torch.rand((3, len(obs), 1), generator=rng, device=obs.device)
    r, t = torch.where(coin < args.p_instant, first, torch.stack([first, second]).sort(0).values)
    noise = torch.randn(actions.shape, generator=rng, device=obs.device)
    loss = (loss_fn or policy_loss)(agent.policy, obs, actions, w, noise, r, t)
    agent.optimizers["policy"].zero_grad()
    loss.backward()
    agent.optimizers["policy"].step()
    move_towards(agent.acting_policy, agent.policy, args.tau)
    return {"losses/policy_loss": loss.detach()}


def update_q_statistics(agent: Agent, scores: Tensor, rate: float) -> None:
    """Mean and std of the best score over states, and std within a state; scores (N, B)."""
    q = scores.amax(0)  # (B,)
    agent.q_mean.lerp_(q.mean(), rate)
    agent.q_std.lerp_(q.std(correction=0), rate).clamp_(min=1e-6)  # 0 would divide Q
    agent.q_std_within.lerp_(scores.std(0, correction=0).mean(), rate).clamp_(min=1e-6)


def update(agent: Agent, batch: dict, args: Args, rng, improve_policy: bool, loss_fn=None) -> dict:
    """One gradient update from a batch of (B, ...) tensors; returns scalars for the log."""
    # what changes between calls is a tensor, so that a CUDA graph can record an update
    next_obs = batch["next_obs"]
    alpha = agent.log_alpha.detach().exp()
    # one generation at s', by the policy itself, serves the TD target and what is imitated
    with torch.no_grad():
        # ranking needs Q to more than bfloat16's three digits
        with torch.autocast(rng.device.type, torch.bfloat16, args.precision == "bfloat16"):
            candidates = propose(agent.policy, next_obs, alpha * args.noise_scale, args, rng)
        next_actions, scores = select_action(agent.critic, next_obs, candidates)
    metrics = update_critic(agent, batch, next_actions, args)
    metrics["policy/candidate_spread"] = candidates.std(0, correction=0).mean()
    if improve_policy:
        targets, w = mirror_descent_targets(agent, candidates, scores, args, rng)
        metrics |= update_policy(agent, next_obs, targets, w, args, rng, loss_fn)
        move_towards(agent.target_critic, agent.critic, args.tau)  # as seldom as the policy
        if args.weight_mode == "particles":
            w = particle_probabilities(agent, scores, args)  # (N, B)
        # effective sample size / sample size
        metrics["policy/ess"] = (w.mean(0).square() / w.square().mean(0)).mean()
    update_q_statistics(agent, scores, args.q_stats_rate)  # last: weights see only the past
    return metrics | {"policy/alpha": alpha}


def policy_lr_at(args: Args, policy_updates: int) -> float:
    """Adam step size of the policy: constant, then linear, then constant."""
    return float(np.interp(policy_updates, args.policy_lr_decay, args.policy_lr))


def prepare_update(agent: Agent, args: Args) -> bool:
    """Set the policy's learning rate; says whether this update improves the policy."""
    agent.policy_lr.fill_(policy_lr_at(args, agent.updates // args.policy_delay))
    return agent.updates % args.policy_delay == 0


def update_alpha(agent: Agent, args: Args) -> None:
    """Adam step on -log_alpha (H_target - H_noise), a schedule: no data in it."""
    scale = 0.1  # of the authors, even if noise_scale is another
    entropy = 0.5 * math.log(2 * math.pi * math.e * scale**2) + agent.log_alpha.detach()
    agent.log_alpha.grad = agent.policy.act_dim * (entropy + args.target_entropy_scale)
    agent.optimizers["alpha"].step()
    agent.alpha_updates += 1


def follow_steps(agent: Agent, args: Args, global_step: int) -> None:
    """What environment steps drive, not updates: the decay of alpha."""
    while agent.alpha_updates * args.alpha_interval < global_step - args.learning_starts:
        update_alpha(agent, args)


# ============ 2 TRAINING: buffer, evaluation, the loop; the same in every script
class ReplayBuffer:
    """Ring buffer of transitions, on the device that learns from it."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.shapes = {"obs": (obs_dim,), "actions": (act_dim,), "rewards": ()}
        self.shapes |= {"next_obs": (obs_dim,), "terminations": ()}
        width = sum(math.prod(shape) for shape in self.shapes.values())
        self.rows = torch.empty((capacity, width), device=device)  # a transition each
        self.data = self.columns(self.rows)
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
    """An episode per env: returns and successes (NaN: unknown), (num_envs,)."""
    rng = Generator(agent.device).manual_seed(args.seed)  # all evaluations start alike
    obs, _ = envs.reset(seed=[2 * args.seed + 1] * envs.num_envs)  # odd; each env adds its index
    running = np.full(envs.num_envs, True)
    returns = np.zeros(envs.num_envs)
    successes = np.full(envs.num_envs, np.nan)
    while running.any() and not stop:
        if frames is not None and running[0]:
            frames.append(envs.envs[0].render())
        actions = act(agent, torch.as_tensor(obs, device=agent.device), args, rng)
        obs, _, terminations, truncations, infos = envs.step(actions.cpu().numpy())
        for i in np.flatnonzero((terminations | truncations) & running):
            running[i] = False
            final = infos["final_info"]
            returns[i] = final["episode"]["r"][i]
            for name in "is_success", "success":
                if name in final:
                    successes[i] = final[name][i]
    return returns, successes


def updates_due(args: Args, global_step: int) -> int:
    """Gradient updates that belong to this many environment steps."""
    return int(args.utd * (global_step - args.learning_starts) + 1e-9)  # 0.29 * 100 is 29


def train(agent: Agent, buffer: ReplayBuffer, envs, run, args: Args, rng, obs) -> None:
    """Act, learn, step, store, from obs (num_envs, obs_dim); run counts, logs and saves."""
    explore, improve = act_explore, update
    if args.compile:
        explore, improve = accelerate(agent, explore, improve, args)  # the same, faster
    while not run.finished():
        # act: uniformly at random at first, then with exploration noise
        if run.global_step < args.learning_starts:
            actions = 2 * torch.rand(envs.action_space.shape, generator=rng, device=rng.device) - 1
        else:
            states = torch.as_tensor(obs).to(agent.device, non_blocking=True)
            actions = explore(agent, states, args, rng)
        actions = actions.cpu().numpy()
        run.global_step += args.num_envs
        if args.async_envs:
            envs.step_async(actions)

        # learn from what is stored so far; GPU or processes overlap it with the simulators
        while agent.updates < updates_due(args, run.global_step):
            improve_policy = prepare_update(agent, args)
            batch = buffer.sample(args.batch_size, rng)
            run.metrics |= improve(agent, batch, args, rng, improve_policy)
            agent.updates += 1
        follow_steps(agent, args, run.global_step)

        # step: where an episode ended, next_obs already belongs to the one after it
        transition = envs.step_wait() if args.async_envs else envs.step(actions)
        next_obs, rewards, terminations, truncations, infos = transition
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]
            episode = infos["final_info"]["episode"]
            run.metrics["charts/episodic_return"] = float(episode["r"][i])
            run.metrics["charts/episodic_length"] = float(episode["l"][i])

        # store
        outcome = {"rewards": rewards, "next_obs": last_obs, "terminations": terminations}
        buffer.add(obs=obs, actions=actions, **outcome)
        obs = next_obs
        run.after_step()  # log, evaluate, save


# ============ 3 PLUMBING: environments, files, arguments; the same in every script
def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class SeededEpisodes(gym.Wrapper):
    """Seed every episode: its seed and actions rebuild it exactly, as no state can."""

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index = index
        self.episode = {"seed": 0, "count": 0, "actions": []}

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.episode |= {"seed": seed, "count": 0}
        self.episode |= {"count": self.episode["count"] + 1, "actions": []}
        key = (self.episode["seed"], self.index, self.episode["count"])
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action: np.ndarray):
        self.episode["actions"].append(action.copy())
        *transition, info = self.env.step(action)
        # what nobody reads would cost a vector env a tenth of a step
        read = {"episode", "success", "is_success"} & info.keys()
        return *transition, {name: info[name] for name in read}

    def restore(self, episodes: list[dict]) -> np.ndarray:
        """Play back this env's entry of episodes; returns the last observation."""
        saved = episodes[self.index]
        self.episode = saved | {"count": saved["count"] - 1}
        obs, _ = self.reset()
        for action in saved["actions"].numpy():
            obs = self.step(action)[0]
        return obs


def make_env(env_id: str, index: int = 0, film: bool = False) -> gym.Env:
    """Flat float32 observations, actions in [-1, 1]; other envs are refused."""
    # papers report the outdated v4; float32 is what the networks want
    harmless = "is out of date|precision lowered|overflow encountered"
    warnings.filterwarnings("ignore", f".*({harmless}).*")
    if torch.multiprocessing.parent_process():  # Ctrl-C is for the run
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        # else dm_control warns
        os.environ.setdefault("MUJOCO_GL", "disable")
    mujoco = metadata.version("mujoco")
    if env_id.startswith("dm_control/"):
        if int(mujoco.split(".")[0]) >= 4:
            cure = "pip install 'mujoco>=3.17,<4'"
            fail(f"{env_id} needs mujoco below 4, not {mujoco}: {cure}")
        # registers the ids, in every worker process too
        import shimmy  # noqa: F401
    render = {"render_mode": "rgb_array"} if film else {}
    try:
        env = gym.make(env_id, **render)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=4, cutoff=0.4)
        known = f"Registered ids near it: {', '.join(near)}"
        fail(f"cannot make {env_id!r} (mujoco {mujoco}): {error} {known}")
    raw = env.unwrapped
    if film and hasattr(raw, "mujoco_renderer") and raw.model.ncam:
        raw.mujoco_renderer.camera_id = 0  # it follows

    Box = gym.spaces.Box
    space = env.action_space
    if not (isinstance(space, Box) and space.is_bounded() and len(space.shape) == 1):
        reason = "only bounded vectors of numbers (Box) will do"
        fail(f"{env_id} has actions {space}; {reason}")
    space = env.observation_space
    leaves = [space]
    if isinstance(space, gym.spaces.Dict):
        leaves = space.values()
    if not all(isinstance(leaf, Box) and leaf.dtype.kind == "f" for leaf in leaves):
        reason = "only vectors of numbers will do, images will not"
        fail(f"{env_id} has observations {space}; {reason}")
    env = gym.wrappers.FlattenObservation(env)
    env = gym.wrappers.DtypeObservation(env, np.float32)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return SeededEpisodes(gym.wrappers.RecordEpisodeStatistics(env), index)


def make_envs(env_id: str, n: int, in_processes: bool = False, film: bool = False):
    """A vector env whose last step of an episode returns the next one's first obs."""
    makers = [partial(make_env, env_id, i, film and i == 0) for i in range(n)]
    vector = gym.vector.SyncVectorEnv
    if in_processes:
        vector = gym.vector.AsyncVectorEnv
    return vector(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def choose_opengl() -> None:
    """Render without a screen, through EGL unless MUJOCO_GL says otherwise."""
    if "DISPLAY" in os.environ:
        return
    # mujoco reads this once, when it is imported
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        mujoco.GLContext(8, 8).make_current()
    except Exception:  # each library fails in its own way
        install = "apt-get install libegl1 libegl-mesa0"
        fail(f"--capture-video finds no OpenGL: {install}, or set MUJOCO_GL")


def write_video(frames: list, env: gym.Env, file: Path) -> None:
    """Write one episode of env to <file>-episode-0.mp4."""
    from gymnasium.utils.save_video import save_video  # slow to import

    # MuJoCo's and dm_control's own clock
    dt = getattr(env.unwrapped, "dt", 1 / 30)
    save_video(frames, file.parent, lambda _: True, name_prefix=file.name, fps=1 / dt)


def describe_machine(device: torch.device) -> dict:
    """Versions, commit and hardware."""
    versions = {"python": sys.version.split()[0]}
    for package in "torch", "gymnasium", "mujoco", "dm-control", "numpy":
        # dm-control may be missing
        if find_spec(package.replace("-", "_")):
            versions[package] = metadata.version(package)
    git = "git describe --always --dirty --abbrev=40"
    how = {"shell": True, "capture_output": True, "text": True}
    commit = subprocess.run(git, cwd=Path(__file__).parent, **how)
    name = sys.platform
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
    versions |= {"commit": commit.stdout.strip(), "device": name}
    return versions | {"threads": torch.get_num_threads()}


def make_run_dir(args: Args, device: torch.device) -> Path:
    """Make runs/<env>__<exp>__<seed>__<time>; mkdir fails rather than share one."""
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
    run_dir = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
    run_dir.mkdir(parents=True)
    write_json(run_dir / "versions.json", describe_machine(device))
    return run_dir


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def cut_csv(path: Path, global_step: int) -> None:
    """Drop rows beyond global_step, which a resumed run repeats, and one torn off."""
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    size = len(header)
    for row in rows:
        if row.endswith("\n") and int(row.split(",")[0]) <= global_step:
            size += len(row)
    os.truncate(path, size)


@dataclass
class Run:
    """How far a run is, and all that it writes."""

    args: Args
    agent: Agent
    buffer: ReplayBuffer
    envs: gym.vector.VectorEnv
    eval_envs: gym.vector.VectorEnv
    rng: Generator
    stop: "StopSignal"

    def __post_init__(self):
        args = self.args
        self.stopped = False
        self.global_step = 0
        self.start = time.perf_counter()
        # the first columns of metrics.csv
        self.metrics = {
            "charts/episodic_return": math.nan,
            "charts/episodic_length": math.nan,
            "charts/SPS": math.nan,
        }
        if args.resume:
            file, saved = load(args.resume, "checkpoint.pt")
            refuse_changes(args, saved, self.rng.device)
            self.dir = file.parent
            self.first_obs = self.restore(saved)
        else:
            # even: evaluation has the odd seeds
            self.first_obs, _ = self.envs.reset(seed=[2 * args.seed] * args.num_envs)
            self.dir = make_run_dir(args, self.rng.device)
        write_json(self.dir / "args.json", asdict(args))
        for path in self.dir.glob("*.csv"):
            cut_csv(path, self.global_step)
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
        self.writer = SummaryWriter(self.dir, purge_step=self.global_step + 1)
        self.bar = tqdm(
            total=args.total_timesteps,
            initial=self.global_step,
            unit="step",
            disable=None,
        )

    def at_last_step(self) -> bool:
        return self.global_step + self.args.num_envs > self.args.total_timesteps

    def finished(self) -> bool:
        return self.at_last_step() or self.stopped

    def due(self, every: int) -> bool:
        """Every so many steps, and at the last one; 0: at the last one only."""
        passed = every > 0 and self.global_step % every < self.args.num_envs
        return passed or self.at_last_step()

    def after_step(self) -> None:
        """Log, evaluate and save, if due."""
        args = self.args
        self.bar.update(args.num_envs)
        self.now = {
            "global_step": self.global_step,
            "updates": self.agent.updates,
            "wall_time": round(time.perf_counter() - self.start, 3),
        }
        if self.due(args.log_every) and self.agent.updates:
            self.log()
        if args.eval_every and self.due(args.eval_every):
            self.evaluate_modes()
        # decided once: a later signal waits for the next step
        self.stopped = bool(self.stop)
        if self.stopped or self.due(args.checkpoint_every):
            self.save()

    def refuse_divergence(self) -> None:
        """End a run that diverged before it replaces its last good checkpoint."""
        self.metrics = {name: float(value) for name, value in self.metrics.items()}
        for name, value in (self.metrics | self.agent.state_dict()).items():
            finite = torch.as_tensor(value).isfinite().all()
            if not finite and not name.startswith("charts/"):
                where = f"{name} is NaN or infinite at step {self.global_step}"
                raise SystemExit(f"diverged: {where}")

    def write(self, name: str, row: dict, plotted: dict) -> None:
        """Append to <name>.csv, whose columns are the first row's; NaN stays empty."""
        with (self.dir / f"{name}.csv").open("a") as file:
            if file.tell() == 0:
                file.write(",".join(row) + "\n")
            # NaN is not equal to itself
            cells = ["" if x != x else str(x) for x in row.values()]
            file.write(",".join(cells) + "\n")
        for key, value in plotted.items():
            self.writer.add_scalar(key, value, self.global_step)

    def log(self) -> None:
        self.refuse_divergence()
        speed = self.global_step / self.now["wall_time"]
        self.metrics["charts/SPS"] = round(speed, 1)
        self.write("metrics", self.now | self.metrics, self.metrics)
        self.bar.set_postfix(episodic_return=self.metrics["charts/episodic_return"])

    def evaluate_modes(self) -> None:
        """Evaluate every mode; a signal does not wait for it, but gives it up."""
        self.refuse_divergence()
        args = self.args
        envs = self.eval_envs
        for mode, act in MODES.items():
            frames = [] if args.capture_video and mode == DEPLOYED else None
            with torch.compiler.set_stance("force_eager"):  # too short to compile for
                results = evaluate(act, self.agent, envs, args, frames, self.stop)
            if self.stop:
                return
            if frames:
                write_video(frames, envs.envs[0], self.dir / f"videos/{self.global_step}")
            returns, successes = results
            nfe, num_candidates = cost_of(mode, args)
            row = {
                "mode": mode,
                "nfe": nfe,
                "num_candidates": num_candidates,
                "return_mean": returns.mean(),
                "return_std": returns.std(),
                "success_rate": successes.mean(),
                "returns": " ".join(f"{x:.4f}" for x in returns),
            }
            names = "return_mean", "return_std"
            plotted = {f"eval_{mode}/{name}": row[name] for name in names}
            self.write("evaluations", self.now | row, plotted)
            tqdm.write(f"step {self.global_step:,}: {mode} {returns.mean():.1f}")

    def save(self) -> None:
        """policy.pt to use the policy, checkpoint.pt to go on exactly from here."""
        self.refuse_divergence()
        agent = self.agent
        args = asdict(replace(self.args, resume=None))
        policy = {
            "policy": agent.acting_policy.state_dict(),
            "critics": agent.critic.state_dict(),
            "args": args,
            "global_step": self.global_step,
        }
        size = self.buffer.size
        optimizers = agent.optimizers.items()
        episodes = []
        for episode in self.envs.get_attr("episode"):
            actions = torch.tensor(np.array(episode["actions"]))
            episodes.append(episode | {"actions": actions})
        state = {
            "args": args,
            "metrics": self.metrics,
            "agent": agent.state_dict(),
            "counters": {name: getattr(agent, name) for name in agent.counters},
            "optimizers": {name: x.state_dict() for name, x in optimizers},
            "buffer": {name: x[:size].clone() for name, x in self.buffer.data.items()},
            "position": self.buffer.position,
            "rng": self.rng.get_state(),
            "device": self.rng.device.type,
            "episodes": episodes,
        }
        files = {"policy.pt": policy, "checkpoint.pt": self.now | state}
        for name, content in files.items():
            torch.save(content, self.dir / f"{name}.tmp")
            # a crash leaves the old file whole
            os.replace(self.dir / f"{name}.tmp", self.dir / name)

    def restore(self, saved: dict) -> np.ndarray:
        """Undo save; returns the observations the envs were at."""
        self.global_step = saved["global_step"]
        self.metrics = saved["metrics"]
        self.agent.load_state_dict(saved["agent"])
        for name, value in saved["counters"].items():
            setattr(self.agent, name, value)
        for name, optimizer in self.agent.optimizers.items():
            # a tensor must stay the same: agent.policy_lr is one
            lr = optimizer.param_groups[0]["lr"]
            optimizer.load_state_dict(saved["optimizers"][name])
            optimizer.param_groups[0]["lr"] = lr
        self.buffer.position = saved["position"]
        self.buffer.size = len(saved["buffer"]["rewards"])
        for name, column in saved["buffer"].items():
            self.buffer.data[name][: self.buffer.size] = column
        self.rng.set_state(saved["rng"])
        obs = np.stack(self.envs.call("restore", saved["episodes"]))
        # playing the simulators back is not the run's time
        self.start = time.perf_counter() - saved["wall_time"]
        return obs

    def close(self) -> None:
        for resource in self.bar, self.writer, self.envs, self.eval_envs:
            resource.close()


def load(path: str, name: str) -> tuple[Path, dict]:
    """Read what Run.save wrote, given the file or its folder; refuse anything else."""
    file = Path(path)
    if file.is_dir():
        file = file / name
    needed = {"checkpoint.pt": "episodes", "policy.pt": "policy"}
    keys = {"args", "global_step", needed[name]}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        assert keys <= set(content)
        assert set(content["args"]) == {field.name for field in fields(Args)}
    except Exception:  # torch raises many kinds for a damaged file
        script = Path(__file__).name
        fail(f"{file} is missing, damaged or no {name} of this version of {script}")
    return file, content


MAY_BE_ZERO = {"seed", "eval_every", "checkpoint_every", "torch_threads", "noise_scale"}
MAY_BE_ZERO |= {"policy_lr_decay", "p_instant"}
AT_MOST_ONE = {"gamma", "tau", "q_stats_rate", "p_instant"}
RISING = {"policy_lr_decay"}
MAY_CHANGE = {"resume", "total_timesteps", "log_every", "capture_video", "torch_threads"}
MAY_CHANGE |= {"track", "wandb_project_name", "wandb_entity"}  # on --resume


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_args(args: Args) -> None:
    """Refuse numbers that cannot work."""
    limits = dict.fromkeys(AT_MOST_ONE, (1, "at most 1"))
    limits["num_envs"] = (args.buffer_size, "at most --buffer-size")
    limits["batch_size"] = (args.learning_starts, "at most --learning-starts")
    limits["learning_starts"] = (args.total_timesteps, "at most --total-timesteps")
    rules = []
    for name, value in asdict(args).items():
        if isinstance(value, bool | str | None) or name in RISING:
            continue
        limit, high = limits.get(name, (sys.float_info.max, "finite"))
        low = "0 or more" if name in MAY_BE_ZERO else "above 0"
        for number in np.atleast_1d(value).tolist():
            holds = 0 < number <= limit or (number == 0 and name in MAY_BE_ZERO)
            rules.append((holds, f"{flag(name)} {number} must be {low} and {high}"))
    for name in RISING:
        first, last = getattr(args, name)
        lowest = 0 if name in MAY_BE_ZERO else -sys.float_info.max
        holds = lowest <= first < last < math.inf
        low = "0 or more" if lowest == 0 else "finite"
        rules.append((holds, f"{flag(name)} {first} {last} must be {low} and rise"))
    updates = args.utd * (args.total_timesteps - args.learning_starts)
    message = f"--utd {args.utd} gives no update; raise it or --total-timesteps"
    rules.append((updates >= 1, message))
    for holds, message in rules:
        if not holds:
            fail(message)


def refuse_changes(args: Args, saved: dict, device: torch.device) -> None:
    """A checkpoint goes on with its own arguments, on its own kind of device."""
    for name, value in saved["args"].items():
        if name not in MAY_CHANGE and value != getattr(args, name):
            fail(f"{flag(name)} cannot change on --resume; it was {value}")
    if saved["device"] != device.type:
        fail(f"{args.resume} was written on {saved['device']} and can only go on there")


def choose_device(args: Args) -> torch.device:
    """The device to run on; one that is not there is refused."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"--device {name} is not to be had here; --device auto takes what there is")
    if args.precision == "tf32" and device.type != "cuda":
        fail(f"--precision tf32 needs a CUDA GPU, not --device {device}")
    return device


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; --resume and --evaluate start from the stored arguments."""
    args = tyro.cli(Args, args=argv)
    if path := args.resume or args.evaluate:
        name = "checkpoint.pt" if args.resume else "policy.pt"
        _, saved = load(path, name)
        stored = Args(**saved["args"])
        args = tyro.cli(Args, args=argv, default=stored)
    return args


class StopSignal:
    """Note the first SIGINT or SIGTERM, to save and end; a second exits at once."""

    def __init__(self):
        self.signum = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self):
        self.handlers = {}
        for signum in signal.SIGINT, signal.SIGTERM:
            self.handlers[signum] = signal.signal(signum, self.note)
        # Compilers inherit this mask and so outlive a terminal's Ctrl-C, of which this process
        # still hears through an older thread, that of TensorBoard's writer.
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *_):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum: int, _frame) -> None:
        if self:
            sys.exit(128 + signum)
        self.signum = signum


# ============ 4 SPEED: compiled and recorded updates; the deployed policy; main
class FastMish(nn.Mish):
    """Mish x tanh(softplus(x)); with a single exponential where it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            # eager: one pass over memory counts for more
            return super().forward(x)
        # from 20 on Mish is x to float precision
        e = x.clamp(max=20).exp()
        n = e * (e + 2)
        return x * n / (n + 2)


class Captured:
    """function(agent, inputs, args, rng, *key) as one CUDA graph per key, a single launch.

    A graph repeats its kernels on the same addresses. So inputs are copied there, outputs hold
    until the next call, learning rates are tensors, and Adam (capturable) counts its steps on the
    GPU. Gradients live in the graph's own memory and are used up in it. The generator may belong
    to several graphs: each replay moves its offset on by what the recording drew.
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


def accelerate(
    agent: Agent, explore: Callable, improve: Callable, _args: Args
) -> tuple[Callable, Callable]:
    """The two functions compiled, and on CUDA recorded; or as they are, and a line why."""
    device = agent.device
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler or no Triton
        reason = str(error).splitlines()[0]
        print(f"going on without --compile: {reason}", file=sys.stderr)
        return explore, improve
    for module in agent.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Mish):
                setattr(module, name, FastMish())
    for network in agent.policy, agent.critic, agent.target_critic:
        network.compile(dynamic=False)
    improve = partial(improve, loss_fn=torch.compile(policy_loss, dynamic=False))
    if device.type != "cuda":
        return explore, improve
    torch.cuda.synchronize(device)
    # the default stream cannot be captured
    torch.cuda.set_stream(torch.cuda.Stream(device))
    return Captured(explore), Captured(improve)


class OneStepPolicy(nn.Module):
    """The deployed policy: noise z = prior_std * e -> action = clip(z - u(s, z, 0, 1)).

    The times are constant, so their share of the first layer becomes a bias.
    """

    def __init__(self, policy: AverageVelocityField):
        super().__init__()
        policy = copy.deepcopy(policy).requires_grad_(False)
        self.from_obs, from_r, from_t, self.from_z = policy.net.first.parts
        r = torch.zeros(1, device=self.from_z.bias.device)
        self.from_z.bias += from_r(policy.r_mlp(time_embedding(r)))
        self.from_z.bias += from_t(policy.t_mlp(time_embedding(r + 1)))
        self.rest = policy.net.rest

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs (B, obs_dim), noise (..., B, act_dim) -> actions like noise."""
        velocity = self.rest(self.from_obs(obs) + self.from_z(noise))
        return (noise - velocity).clamp(-1, 1)


def replay(args: Args, agent: Agent, envs) -> None:
    """--evaluate: episodes of a saved policy, as it is deployed."""
    file, saved = load(args.evaluate, "policy.pt")
    if args.env_id != saved["args"]["env_id"]:
        fail(f"{file} was trained on {saved['args']['env_id']}, not on {args.env_id}")
    agent.acting_policy.load_state_dict(saved["policy"])
    act = MODES[DEPLOYED]
    frames = [] if args.capture_video else None
    returns, _ = evaluate(act, agent, envs, args, frames)
    if frames:
        write_video(frames, envs.envs[0], file.parent / "videos/evaluate")
    for episode, value in enumerate(returns):
        print(f"episode {episode}: return {value:.4f}")
    obs = torch.zeros(1, *envs.single_observation_space.shape, device=agent.device)
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
    threads = args.torch_threads or min(8, torch.get_num_threads())
    torch.set_num_threads(threads)
    tf32 = args.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    warnings.filterwarnings("ignore", ".*(capturable=True|matmul_precision).*")
    if args.capture_video:
        choose_opengl()
    # first, because it may fork
    envs = make_envs(args.env_id, args.num_envs, args.async_envs)
    film = args.capture_video
    # filming wants the simulators in this process
    processes = args.async_envs and not film
    eval_envs = make_envs(args.env_id, args.eval_episodes, processes, film)
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(obs_dim, act_dim, args, device)
    if args.evaluate:
        return replay(args, agent, eval_envs)

    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    # random actions, noise, replay sampling
    rng = Generator(device).manual_seed(args.seed)
    stop = StopSignal()
    run = Run(args, agent, buffer, envs, eval_envs, rng, stop)
    sizes = f"{obs_dim} observations, {act_dim} actions"
    print(f"{args.env_id}: {sizes}; writing to {run.dir}")
    with stop:
        train(agent, buffer, envs, run, args, rng, run.first_obs)
    run.close()
    if run.stopped:
        print(f"stopped; go on with --resume {run.dir}", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    return run.dir


if __name__ == "__main__":
    main(parse_args())
