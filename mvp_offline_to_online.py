r"""MVP, offline-to-online: pre-train a mean velocity policy on a dataset, then fine-tune it online.

Policy and losses are those of mvp_online.py, which is the better one to start reading with.
Three things differ. A dataset of a sparse-reward task fills the replay buffer before anything is
collected. The policy plans a chunk of h = 5 actions that is executed open loop. It imitates what
the buffer holds. Of N = 32 planned chunks the critics' favourite is executed and makes the h-step
TD target. What a chunk holds from after the end of its episode counts for nothing.
Below, e ~ N(0, I), z_t = (1 - t) e + t a, v = a - e for a chunk a of the buffer, Q is the mean of
two critics, and Q' that of the target critics.

    generate       a = e + u(s, e, 0, 1), a chunk of h actions
    select_action  a* = argmax over N candidates a_i of Q(s, a_i)
    critic_loss    y = sum_{i<h} gamma^i r_i + gamma^h (1 - terminated) Q'(s_h, a*),
                   (Q_j(s, a) - y)^2
    policy_loss    || u(s, z_t, t, r) - sg(v + (r - t) du/dt) ||^2
                   + lambda || u(s, z_t, t, t) - v ||^2

    python mvp_offline_to_online.py --env-id ogbench:cube-double-singletask-task2-v0 \
        --dataset cube-double-play-singletask-task2-v0
    python mvp_offline_to_online.py --evaluate runs/<run>/policy.pt --eval-episodes 50

Four parts: 1 METHOD, 2 TRAINING, 3 PLUMBING, 4 SPEED. Stop after part 2, and you have read
the algorithm end to end, from env.step to the optimizers.

Paper: Mean Velocity Policy, arXiv:2602.13810; no code is public. Chunks, critics: Q-chunking's.
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
    env_id: str = "ogbench:cube-double-singletask-task2-v0"  # module:EnvId, or any gymnasium id
    dataset: str = "cube-double-play-singletask-task2-v0"  # OGBench's name, or a path to an .npz
    seed: int = 1  # seeds networks, noise, replay sampling and every episode
    offline_steps: int = 1_000_000  # updates on the dataset alone, at first
    total_timesteps: int = 1_000_000  # environment steps online
    exp_name: str = Path(__file__).stem  # second part of the run directory's name
    runs_dir: str = "runs"  # where run directories are created
    log_every: int = 1_000  # steps between rows of metrics.csv, offline too
    eval_every: int = 100_000  # steps between evaluations, 0: never
    eval_episodes: int = 50  # episodes per evaluation, all side by side
    checkpoint_every: int = 100_000  # steps between checkpoints, 0: after each phase
    capture_video: bool = False  # film an episode of every one-step evaluation
    track: bool = False  # mirror the run to Weights & Biases
    wandb_project_name: str = "one-step-flow-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    resume: str | None = None  # checkpoint.pt or a run directory to go on with
    evaluate: str | None = None  # policy.pt to replay, one jump per chunk

    # --- algorithm: defaults are the published setting, as far as it is known ---
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics
    batch_size: int = 256  # chunks per update, B
    buffer_size: int = 2_000_000  # transitions the replay buffer holds, dataset included
    learning_starts: int = 5_000  # online steps before learning goes on
    utd: float = 1.0  # gradient updates per online step
    chunk_size: int = 5  # h, actions planned at once and executed open loop
    num_candidates: int = 32  # N, chunks generated per state
    flow_steps: int = 1  # T, jumps per action (NFE) in training
    ivc_coef: float = 1.0  # lambda, weight of the constraint (IVC)
    imitation_target: Literal["best_of_n", "replay"] = "replay"  # a: TD action, or the buffer's
    prior_std: float = 1.0  # std of e when sampling; 1 in the loss
    noise_scale: float = 0.0  # std of exploration noise
    reward_scale: float = 1.0  # rewards are multiplied by this
    critic_lr: float = 3e-4  # Adam step size of the critics
    policy_lr: float = 3e-4  # Adam step size of the policy
    hidden_dim: int = 512  # width of the hidden layers
    hidden_layers: int = 4  # their number

    # --- speed: how it is computed ---
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, mps
    compile: bool = True  # compile and, on CUDA, record updates
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # bfloat16: in generating
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8


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
        plan_dim = args.chunk_size * act_dim
        self.policy = MeanVelocityField(obs_dim, plan_dim, *sizes)
        self.critic = TwinCritic(obs_dim, plan_dim, *sizes)
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
    """h-step mean-Q: loss and Q (2, B); only termination ends bootstrapping.

    A chunk that outlasts its episode was never executed as a whole: no loss.
    """
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).mean(0)  # (B,)
        bootstrap = args.gamma**args.chunk_size * (1 - batch["terminations"])
        y = args.reward_scale * batch["rewards"] + bootstrap * next_q
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    executed = batch["valid"][:, -1]  # (B,)
    return (executed * (q - y).square()).mean(1).sum(), q.detach()


def imitation_targets(batch: dict, next_actions: Tensor, args: Args) -> tuple:
    """States (B, obs_dim), chunks that the policy imitates there, and weights.

    Chunks and weights are (B, h * act_dim); 1 where an action counts, else 0.
    """
    if args.imitation_target == "replay":
        act_dim = next_actions.shape[1] // args.chunk_size
        w = batch["valid"].repeat_interleave(act_dim, 1)  # (B, h) -> (B, h * act_dim)
        return batch["obs"], batch["actions"], w
    # one generation at s' serves both losses
    return batch["next_obs"], next_actions, torch.ones_like(next_actions)


def policy_loss(
    policy: nn.Module, obs: Tensor, actions: Tensor, w, noise: Tensor, t: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """MeanFlow || u - sg(v + (r - t) du/dt) ||^2 and IVC || u(s, z_t, t, t) - v ||^2.

    obs (B, obs_dim), chunks a, weights w and noise e (B, h * act_dim), t <= r (B, 1).
    """
    z_t = (1 - t) * noise + t * actions
    v = actions - noise
    # dz/dt = v, dt/dt = 1, dr/dt = 0: along the path of the flow, while r stays
    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    u, du_dt = torch.func.jvp(partial(policy, obs), (z_t, t, r), tangents)
    target = (v + (r - t) * du_dt).detach()
    boundary = policy(obs, z_t, t, t)
    return (w * (u - target).square()).mean(), (w * (boundary - v).square()).mean()


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


def update_policy(agent: Agent, obs, actions, w, args: Args, rng: Generator, loss_fn=None) -> dict:
    """Adam step towards chunks (B, h * act_dim); loss_fn may be policy_loss compiled."""
    t, r = torch.rand((2, len(obs), 1), generator=rng, device=obs.device).sort(0).values
    noise = torch.randn(actions.shape, generator=rng, device=obs.device)
    loss_fn = loss_fn or policy_loss
    meanflow, constraint = loss_fn(agent.policy, obs, actions, w, noise, t, r)
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
    obs, actions, w = imitation_targets(batch, next_actions, args)
    metrics |= update_policy(agent, obs, actions, w, args, rng, loss_fn)
    move_towards(agent.target_critic, agent.critic, args.tau)
    return metrics


def prepare_update(_agent: Agent, _args: Args) -> bool:
    """Says whether this update improves the policy: every one does."""
    return True


# ============ 2 TRAINING: buffer, evaluation, the loop of both phases
class ReplayBuffer:
    """Ring buffer of the transitions of one env in their order, dataset first."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        self.chunk_size = args.chunk_size
        self.gamma = args.gamma
        self.shapes = {"obs": (obs_dim,), "actions": (act_dim,), "rewards": ()}
        self.shapes |= {"next_obs": (obs_dim,), "terminations": ()}
        self.shapes |= {"ends": ()}  # an end is a termination or a truncation
        width = sum(math.prod(shape) for shape in self.shapes.values())
        self.rows = torch.empty((args.buffer_size, width), device=device)  # a transition each
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
        """Store n successive transitions: arrays (n, ...) by column name."""
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
        """Chunks of h steps with uniform starts, never across the seam of the ring.

        obs, next_obs (B, obs_dim): before the first, after the last step
        actions (B, h * act_dim)
        rewards (B,): sum of gamma^i r_i
        terminations (B,): whether any step terminated
        valid (B, h): 1 until an episode has ended before the step
        """
        h = self.chunk_size
        oldest = self.position - self.size
        starts = self.size - h + 1
        start = torch.randint(starts, (batch_size, 1), generator=rng, device=rng.device)
        steps = torch.arange(h, device=rng.device)
        chunk = self.columns(self.rows[(oldest + start + steps) % len(self.rows)])  # (B, h, ...)
        going_on = (1 - chunk["ends"]).cumprod(1)  # after each step
        valid = torch.cat([torch.ones_like(going_on[:, :1]), going_on[:, :-1]], 1)
        return {
            "obs": chunk["obs"][:, 0],
            "actions": chunk["actions"].flatten(1),
            "rewards": (self.gamma**steps * valid * chunk["rewards"]).sum(1),
            "next_obs": chunk["next_obs"][:, -1],
            "terminations": (valid * chunk["terminations"]).amax(1),
            "valid": valid,
        }


def as_plan(chunks: Tensor, args: Args) -> list[np.ndarray]:
    """Chunks (num_envs, h * act_dim) -> h actions (num_envs, act_dim) to execute."""
    actions = chunks.cpu().numpy().reshape(len(chunks), args.chunk_size, -1)
    return list(actions.swapaxes(0, 1))


def evaluate(act: Callable, agent: Agent, envs, args: Args, frames=None, stop=()):
    """An episode per env: returns and successes (NaN: unknown), (num_envs,)."""
    rng = Generator(agent.device).manual_seed(args.seed)  # all evaluations start alike
    obs, _ = envs.reset(seed=[2 * args.seed + 1] * envs.num_envs)  # odd; each env adds its index
    plan = []  # of all episodes together, as they began together
    running = np.full(envs.num_envs, True)
    returns = np.zeros(envs.num_envs)
    successes = np.full(envs.num_envs, np.nan)
    while running.any() and not stop:
        if frames is not None and running[0]:
            frames.append(envs.envs[0].render())
        if not plan:
            chunks = act(agent, torch.as_tensor(obs, device=agent.device), args, rng)
            plan = as_plan(chunks, args)
        obs, _, terminations, truncations, infos = envs.step(plan.pop(0))
        for i in np.flatnonzero((terminations | truncations) & running):
            running[i] = False
            final = infos["final_info"]
            returns[i] = final["episode"]["r"][i]
            for name in "is_success", "success":
                if name in final:
                    successes[i] = final[name][i]
    return returns, successes


def updates_due(args: Args, global_step: int) -> int:
    """One update per offline step, then utd per online step beyond learning_starts."""
    offline = min(global_step, args.offline_steps)
    online = max(0, global_step - args.offline_steps - args.learning_starts)
    # 0.2 * 5 must give 1, however it rounds
    return offline + int(args.utd * online + 1e-9)


def train(agent: Agent, buffer: ReplayBuffer, envs, run, args: Args, rng, obs) -> None:
    """Learn; after the offline phase act, step, store, learn; obs (1, obs_dim)."""
    explore, improve = act_explore, update
    if args.compile:
        explore, improve = accelerate(agent, explore, improve, args)  # the same, faster
    while not run.finished():
        run.global_step += 1
        if run.global_step > args.offline_steps:
            # act: plan a chunk of actions, execute it open loop
            if not run.plan:
                states = torch.as_tensor(obs).to(agent.device, non_blocking=True)
                run.plan = as_plan(explore(agent, states, args, rng), args)
            actions = run.plan.pop(0)

            # step: where an episode ended, next_obs already belongs to the one after it
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            last_obs = next_obs.copy()
            ends = terminations | truncations
            if ends[0]:
                run.plan = []
                last_obs[0] = infos["final_obs"][0]
                final = infos["final_info"]
                run.metrics["charts/episodic_return"] = float(final["episode"]["r"][0])
                run.metrics["charts/episodic_length"] = float(final["episode"]["l"][0])
                run.metrics["charts/success"] = float(final.get("success", [math.nan])[0])

            # store
            outcome = {"rewards": rewards, "next_obs": last_obs, "terminations": terminations}
            buffer.add(obs=obs, actions=actions, **outcome, ends=ends)
            obs = next_obs

        # learn, in both phases
        while agent.updates < updates_due(args, run.global_step):
            improve_policy = prepare_update(agent, args)
            batch = buffer.sample(args.batch_size, rng)
            run.metrics |= improve(agent, batch, args, rng, improve_policy)
            agent.updates += 1
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
        np.random.seed(seed)  # noqa: NPY002  OGBench's mazes draw from the global generator
        obs, _ = self.env.reset(seed=seed, options=options)
        self.random_state = np.random.get_state()  # noqa: NPY002  of this env's own stream of it
        return obs, {}

    def step(self, action: np.ndarray):
        self.episode["actions"].append(action.copy())
        np.random.set_state(self.random_state)  # noqa: NPY002
        *transition, info = self.env.step(action)
        self.random_state = np.random.get_state()  # noqa: NPY002
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


def load_dataset(args: Args) -> dict[str, np.ndarray]:
    """OGBench's data for ReplayBuffer.add, rewarded for the task of --env-id."""
    env = gym.make(args.env_id)
    try:
        from ogbench.relabel_utils import relabel_dataset
        from ogbench.utils import load_dataset, make_env_and_datasets

        if args.dataset.endswith(".npz"):
            data = load_dataset(args.dataset, add_info=True)
            relabel_dataset(args.env_id, env, data)
        else:
            data, _ = make_env_and_datasets(args.dataset, dataset_only=True, cur_env=env)
        shapes = (data["observations"].shape[1:], data["actions"].shape[1:])
        expected = (env.observation_space.shape, env.action_space.shape)
        assert shapes == expected, "of another task"
    except Exception as error:  # no file or network, another format, no goal
        fail(f"cannot load --dataset {args.dataset} for {args.env_id}: {error!r}")
    return {
        "obs": data["observations"],
        "actions": data["actions"].clip(-1 + 1e-5, 1 - 1e-5),
        "rewards": data["rewards"],
        "next_obs": data["next_observations"],
        "terminations": 1 - data["masks"],  # success, after which a demonstration goes on
        "ends": data["terminals"],  # of trajectories
    }


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
        self.plan = []  # the rest of the chunk in execution
        # the first columns of metrics.csv
        self.metrics = {
            "charts/episodic_return": math.nan,
            "charts/episodic_length": math.nan,
            "charts/success": math.nan,
            "charts/SPS": math.nan,
        }
        if args.resume:
            file, saved = load(args.resume, "checkpoint.pt")
            refuse_changes(args, saved, self.rng.device)
            self.dir = file.parent
            self.first_obs = self.restore(saved)
        else:
            # even: evaluation has the odd seeds
            self.first_obs, _ = self.envs.reset(seed=[2 * args.seed])
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
            total=args.offline_steps + args.total_timesteps,
            initial=self.global_step,
            unit="step",
            disable=None,
        )

    def at_last_step(self) -> bool:
        return self.global_step == self.args.offline_steps + self.args.total_timesteps

    def finished(self) -> bool:
        return self.at_last_step() or self.stopped

    def due(self, every: int) -> bool:
        """Every so many steps, and at the last one of each phase; 0: at these alone."""
        passed = every > 0 and self.global_step % every == 0
        ends_offline = self.global_step == self.args.offline_steps
        return passed or ends_offline or self.at_last_step()

    def after_step(self) -> None:
        """Log, evaluate and save, if due."""
        args = self.args
        self.bar.update()
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
            names = "return_mean", "return_std", "success_rate"
            plotted = {f"eval_{mode}/{name}": row[name] for name in names}
            self.write("evaluations", self.now | row, plotted)
            text = f"{mode} {returns.mean():.1f}, success rate {successes.mean():.2f}"
            tqdm.write(f"step {self.global_step:,}: {text}")

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
            "plan": torch.tensor(np.array(self.plan)),
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
        self.plan = list(saved["plan"].numpy())
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
MAY_BE_ZERO |= {"ivc_coef", "offline_steps", "learning_starts"}
AT_MOST_ONE = {"gamma", "tau"}
RISING = set()
MAY_CHANGE = {"resume", "total_timesteps", "log_every", "capture_video", "torch_threads"}
MAY_CHANGE |= {"track", "wandb_project_name", "wandb_entity"}  # on --resume


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_args(args: Args) -> None:
    """Refuse numbers that cannot work."""
    limits = dict.fromkeys(AT_MOST_ONE, (1, "at most 1"))
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
    missing = args.env_id.startswith("ogbench:") and not find_spec("ogbench")
    rules.append((not missing, f"{args.env_id} needs OGBench: pip install ogbench==1.2.2"))
    updates = args.offline_steps + args.utd * (args.total_timesteps - args.learning_starts)
    message = f"--utd {args.utd} gives no update; raise it or --offline-steps"
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
    """The deployed policy: noise z = prior_std * e -> chunk = clip(z + u(s, z, 0, 1)).

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
    if args.env_id != saved["args"]["env_id"]:
        fail(f"{file} was trained on {saved['args']['env_id']}, not on {args.env_id}")
    agent.acting_policy.load_state_dict(saved["policy"])
    act = MODES[DEPLOYED]
    frames = [] if args.capture_video else None
    returns, successes = evaluate(act, agent, envs, args, frames)
    if frames:
        write_video(frames, envs.envs[0], file.parent / "videos/evaluate")
    for episode, value in enumerate(returns):
        print(f"episode {episode}: return {value:.4f}")
    print(f"success rate {successes.mean():.2f}")
    obs = torch.zeros(1, *envs.single_observation_space.shape, device=agent.device)
    rng = Generator(agent.device)
    start = time.perf_counter()
    for _ in range(500):
        act(agent, obs, args, rng).cpu()
    ms = 1000 * (time.perf_counter() - start) / 500
    print(f"return {returns.mean():.2f} +- {returns.std():.2f} {ms:.3f} ms/chunk")


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
    envs = make_envs(args.env_id, 1)
    eval_envs = make_envs(args.env_id, args.eval_episodes, film=args.capture_video)
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(obs_dim, act_dim, args, device)
    if args.evaluate:
        return replay(args, agent, eval_envs)

    buffer = ReplayBuffer(args, obs_dim, act_dim, device)
    if not args.resume:  # a checkpoint's buffer holds the dataset already
        data = load_dataset(args)
        n = len(data["obs"])
        if not args.chunk_size <= n <= args.buffer_size:
            fail(f"--dataset holds {n:,} transitions: no chunk, or over --buffer-size")
        buffer.add(**data)
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
