"""FPMD-R: online reinforcement learning with a rectified-flow policy that acts in one step.

A velocity field v(s, z, t) carries noise (t = 0) to an action (t = 1). Training samples it with
T = 20 Euler steps and keeps the best of N = 32 candidates; policy mirror descent pulls the flow
towards them. As the policy concentrates its flow straightens, and one Euler step is enough to act.

    generate            z_0 = prior_std * e,  z_{k+1} = z_k + v(s, z_k, k/T) / T,  a = z_T
    select_action       a* = argmax over N candidates a_i of min(Q_1, Q_2)(s, a_i)
    critic_loss         y = r + gamma (1 - terminated) min(Q'_1, Q'_2)(s', a*),  (Q_j(s, a) - y)^2
    importance_weights  w = exp((Q(s', a*) - max Q) / (sigma lambda)), divided by its batch mean
    policy_loss         w || v(s', z_t, t) - (a* - e) ||^2  with  z_t = (1 - t) e + t a*

Noise e ~ N(0, I) sits at t = 0, the action at t = 1; Q' and the acting policy are slow copies.
The method comes first, the plumbing after it.

    python fpmd_online.py --env-id Ant-v4
    python fpmd_online.py --evaluate runs/<run>/policy.pt --eval-episodes 10

Paper: Flow Policy Mirror Descent, arXiv:2507.23675; authors' code: tianyyiii/flow_policy_iclr.
What differs from it: docs/fpmd_online.md.
"""

import copy
import difflib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import metadata
from itertools import pairwise
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
    seed: int = 1  # seeds networks, noise, replay sampling, warm-up actions and every episode
    total_timesteps: int = 1_000_000  # environment steps over all envs, warm-up included
    num_envs: int = 5  # parallel training environments
    exp_name: str = "fpmd_online"  # second part of the run directory's name
    runs_dir: str = "runs"  # where run directories are created
    log_every: int = 1_000  # environment steps between rows of metrics.csv
    eval_every: int = 25_000  # environment steps between evaluations, 0: never
    eval_episodes: int = 10  # episodes per evaluation, all side by side
    checkpoint_every: int = 50_000  # environment steps between checkpoints, 0: only at the end
    capture_video: bool = False  # film the first episode of every one-step evaluation
    track: bool = False  # mirror the run to Weights & Biases
    wandb_project_name: str = "one-step-flow-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    resume: str | None = None  # checkpoint.pt or a run directory to go on with
    evaluate: str | None = None  # policy.pt to replay with one step per action, without training

    # --- algorithm: defaults are the published setting ---
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the slow copies (target critics, acting policy)
    batch_size: int = 256  # transitions per update, B
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    learning_starts: int = 30_000  # environment steps with random actions before learning
    utd: float = 0.2  # gradient updates per environment step
    num_candidates: int = 32  # N, actions generated per state; the critics keep the best
    flow_steps: int = 20  # T, Euler steps per generated action (NFE) while training
    prior_std: float = 0.5  # std of z_0 when sampling; training always noises with N(0, I)
    weight_mode: Literal["temperature", "clip_alpha", "none", "particles"] = "temperature"  # w
    temperature: float | None = None  # lambda; unset: 3 (temperature), 0.5 (particles)
    reward_scale: float = 0.2  # rewards are multiplied by this
    critic_lr: float = 3e-4  # Adam step size of the critics
    critic_steps: int = 2  # Adam steps on each critic gradient; 2 is the authors' code, 1 is clean
    policy_lr: tuple[float, float] = (3e-4, 3e-5)  # Adam step size of the policy, first and last
    policy_lr_decay: tuple[int, int] = (25_000, 75_000)  # linear between these policy updates
    policy_delay: int = 2  # updates per step of the policy and of the slow copies
    q_stats_rate: float = 0.001  # rate of the running mean and std of Q
    noise_scale: float = 0.1  # exploration noise std is alpha * noise_scale
    alpha_init: float = 5.0  # alpha at the start
    alpha_lr: float = 7e-3  # Adam step size of log alpha
    alpha_interval: int = 1_250  # environment steps between updates of alpha
    target_entropy_scale: float = 1.5  # alpha decays until the noise's entropy is -scale * act_dim
    hidden_dim: int = 256  # width of the three hidden layers of every network

    # --- speed: how it is computed ---
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, mps
    compile: bool = False  # compile the networks of the update; the first updates take a minute
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of generation
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8; give 1 to side-by-side runs
    async_envs: bool = False  # one process per environment (pays off for slow simulators)


# ---------------------------------------------------------------------------- networks

TIME_DIM = 16  # width of the sinusoidal time embedding


class Mish(nn.Module):
    """x tanh(softplus(x)) with a single exponential, which is what it costs."""

    def forward(self, x: Tensor) -> Tensor:
        e = x.clamp(max=20).exp()  # from there on Mish is x to float precision
        n = e * (e + 2)
        return x * n / (n + 2)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with Mish between; weights N(0, 1 / fan_in) cut at two std, as in haiku."""
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), Mish()]
        std = fan_in**-0.5
        nn.init.trunc_normal_(layers[-2].weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def time_embedding(t: Tensor) -> Tensor:
    """Sines and cosines of the raw flow time, 8 frequencies from 1 down: (..., 1) -> (..., 16)."""
    angles = t * 10_000 ** (-torch.arange(0, 1, 2 / TIME_DIM, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(TIME_DIM)


class VelocityField(nn.Module):
    """v(s, z, t): velocity at flow time t of a point z on its way to an action for state s."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.act_dim = act_dim
        self.time_mlp = mlp(TIME_DIM, 2 * TIME_DIM, TIME_DIM)
        self.net = mlp(obs_dim + act_dim + TIME_DIM, *[hidden_dim] * 3, act_dim)

    def forward(self, obs: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """obs (B, obs_dim), z (..., B, act_dim), t (1,) or (B, 1) -> velocity like z."""
        rows, embedding = z.shape[:-1], self.time_mlp(time_embedding(t))
        return self.net(torch.cat([obs.expand(*rows, -1), z, embedding.expand(*rows, -1)], -1))


class TwinCritic(nn.Module):
    """Two independent action values Q_1 and Q_2."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, *[hidden_dim] * 3, 1)
        self.q2 = mlp(obs_dim + act_dim, *[hidden_dim] * 3, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, obs_dim), actions (..., B, act_dim) -> Q (2, ..., B)."""
        x = torch.cat([obs.expand(*actions.shape[:-1], -1), actions], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class Agent(nn.Module):
    """All that learns: networks, their slow copies, log alpha, statistics of Q, optimizers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.policy = VelocityField(obs_dim, act_dim, args.hidden_dim)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_dim)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)  # the one that acts
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        # running mean and std of Q(s, a*) over states, running mean of its std over candidates
        self.register_buffer("q_stats", torch.tensor([0.0, 1.0, 1.0]))
        self.to(device)
        self.updates = self.alpha_updates = 0
        self.optimizers = {
            "critic": torch.optim.Adam(self.critic.parameters(), args.critic_lr, fused=True),
            "policy": torch.optim.Adam(self.policy.parameters(), args.policy_lr[0], fused=True),
            "alpha": torch.optim.Adam([self.log_alpha], args.alpha_lr),
        }


# ---------------------------------------------------------------------------- acting


def generate(policy: nn.Module, obs: Tensor, noise: Tensor, flow_steps: int) -> Tensor:
    """Euler's method for dz/dt = v(s, z, t) from noise at t = 0 to an action at t = 1.

    obs (B, obs_dim), noise z_0 (..., B, act_dim) -> unclipped actions like noise. With
    flow_steps = 1 this is the one-step policy: a = z_0 + v(s, z_0, 0).
    """
    z = noise
    for k in range(flow_steps):
        t = torch.full((1,), k / flow_steps, device=z.device)
        z = z + policy(obs, z, t) / flow_steps
    return z


def propose(policy: nn.Module, obs: Tensor, std: Tensor, args: Args, rng: Generator) -> Tensor:
    """N candidates per state, exploration noise of that std on each: (N, B, act_dim), unclipped."""
    shape = (2, args.num_candidates, len(obs), policy.act_dim)
    noise, exploration = torch.randn(shape, generator=rng, device=obs.device)
    candidates = generate(policy, obs, args.prior_std * noise, args.flow_steps)
    return candidates + std * exploration


def select_action(critic: TwinCritic, obs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Best of N: argmax_i min(Q_1, Q_2)(s, a_i), one rule for acting, TD and imitation.

    obs (B, obs_dim), candidates (N, B, act_dim) -> actions in the box (B, act_dim), scores (N, B).
    """
    scores = critic(obs, candidates).amin(0)
    return take(candidates, scores.argmax(0)).clamp(-1, 1), scores


@torch.no_grad()
def act(agent: Agent, obs: Tensor, args: Args, rng: Generator, explore: bool = True) -> Tensor:
    """The acting rule, best of N from the slow policy: obs (B, obs_dim) -> (B, act_dim)."""
    std = agent.log_alpha.exp() * args.noise_scale * explore
    candidates = propose(agent.target_policy, obs, std, args, rng)
    return select_action(agent.critic, obs, candidates)[0]


@torch.no_grad()
def one_step_action(policy: nn.Module, obs: Tensor, args: Args, rng: Generator) -> Tensor:
    """The policy as deployed: one candidate, one Euler step, no critic: -> (B, act_dim)."""
    noise = torch.randn((len(obs), policy.act_dim), generator=rng, device=obs.device)
    return generate(policy, obs, args.prior_std * noise, flow_steps=1).clamp(-1, 1)


def take(candidates: Tensor, index: Tensor) -> Tensor:
    """Candidate number index (B,) of each state: (N, B, act_dim) -> (B, act_dim)."""
    return candidates[index, torch.arange(len(index), device=index.device)]


# ---------------------------------------------------------------------------- learning


def importance_weights(q: Tensor, q_stats: Tensor, alpha: Tensor, args: Args) -> Tensor:
    """Mirror-descent weights w of the regression targets, from q = Q(s', a*): (B,) -> (B,).

    temperature: exp(q / (sigma lambda)), from max_pi E[Q] - lambda KL(pi || pi_old); clip_alpha:
    exp(clip(q - m / sigma, -3, 3) / alpha), as the authors released it; else 1.
    """
    mean, std, _ = q_stats
    if args.weight_mode == "temperature":
        w = ((q - q.max()) / (std * (args.temperature or 3.0))).exp()  # no overflow: q <= q.max()
        return w / w.mean()
    if args.weight_mode == "clip_alpha":  # dividing m alone by sigma is the release's quirk
        return ((q - mean / std).clamp(-3, 3) / alpha).exp()
    return torch.ones_like(q)


def candidate_probabilities(scores: Tensor, q_stats: Tensor, args: Args) -> Tensor:
    """Weight-mode particles: pi_old exp(Q / lambda) on each state's N candidates, (N, B)."""
    scale = q_stats[2] * (args.temperature or 0.5)
    return ((scores - scores.mean(0)) / scale).softmax(0)


def critic_loss(
    critic: TwinCritic, target_critic: TwinCritic, batch: dict, next_actions: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Clipped double-Q regression: the loss and Q (2, B); only termination stops bootstrapping."""
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).amin(0)  # (B,)
        bootstrap = args.gamma * (1 - batch["terminations"])
        y = args.reward_scale * batch["rewards"] + bootstrap * next_q  # (B,)
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach()


def policy_loss(
    policy: nn.Module, obs: Tensor, actions: Tensor, w: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Conditional flow matching to the targets a*: mean of w || v(s, z_t, t) - (a* - e) ||^2.

    obs (B, obs_dim), actions a* and noise e ~ N(0, I) (B, act_dim), w (B,), t ~ U(0, 1) (B, 1).
    """
    z_t = (1 - t) * noise + t * actions
    return (w[:, None] * (policy(obs, z_t, t) - (actions - noise)).square()).mean()


def update_alpha(agent: Agent, args: Args) -> None:
    """Adam step on -log_alpha (H_target - H_noise); no data in it, so alpha follows a schedule."""
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.1) + agent.log_alpha.detach()
    agent.log_alpha.grad = agent.policy.act_dim * (entropy + args.target_entropy_scale)
    agent.optimizers["alpha"].step()  # the authors keep 0.1 here even if noise_scale is another
    agent.alpha_updates += 1


def update_policy(
    agent: Agent, obs: Tensor, actions: Tensor, w: Tensor, args: Args, rng: Generator
) -> Tensor:
    """One policy step towards actions (B, act_dim), then one step of the slow copies."""
    t = torch.rand((len(obs), 1), generator=rng, device=obs.device)
    noise = torch.randn(actions.shape, generator=rng, device=obs.device)
    loss = policy_loss(agent.policy, obs, actions, w, noise, t)
    optimizer, step = agent.optimizers["policy"], agent.updates // args.policy_delay
    optimizer.param_groups[0]["lr"] = float(np.interp(step, args.policy_lr_decay, args.policy_lr))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for slow, fast in (agent.target_critic, agent.critic), (agent.target_policy, agent.policy):
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), args.tau)
    return loss.detach()


def update(agent: Agent, batch: dict, args: Args, rng: Generator) -> dict[str, Tensor]:
    """One gradient update from a batch of (B, ...) tensors; returns scalars for the log."""
    next_obs, alpha = batch["next_obs"], agent.log_alpha.detach().exp()
    # one generation at s' serves both losses: the TD action is also what the policy imitates
    autocast = torch.autocast(next_obs.device.type, torch.bfloat16, args.precision == "bfloat16")
    with torch.no_grad():
        with autocast:  # generating only: ranking needs Q to more than bfloat16's three digits
            candidates = propose(agent.policy, next_obs, alpha * args.noise_scale, args, rng)
        next_actions, scores = select_action(agent.critic, next_obs, candidates)
    best_q, spread = scores.amax(0), scores.std(0, correction=0)  # (B,), (B,)

    loss, q = critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)
    agent.optimizers["critic"].zero_grad()
    loss.backward()
    for _ in range(args.critic_steps):  # the authors step twice on one gradient
        agent.optimizers["critic"].step()
    metrics = {"losses/critic_loss": loss.detach(), "losses/q_values": q.mean()}

    if agent.updates % args.policy_delay == 0:
        actions, w = next_actions, importance_weights(best_q, agent.q_stats, alpha, args)
        ess = w.mean().square() / w.square().mean()  # effective sample size / B
        if args.weight_mode == "particles":
            p = candidate_probabilities(scores, agent.q_stats, args)  # (N, B)
            index = torch.multinomial(p.T, 1, generator=rng).squeeze(1)  # (B,)
            actions = take(candidates, index).clamp(-1, 1)
            ess = (1 / (len(p) * p.square().sum(0))).mean()  # effective candidates / N
        metrics["losses/policy_loss"] = update_policy(agent, next_obs, actions, w, args, rng)
        clipped = (best_q - agent.q_stats[0] / agent.q_stats[1]).abs() >= 3  # as clip_alpha would
        metrics |= {"policy/ess": ess, "policy/clipped_fraction": clipped.float().mean()}

    q_now = torch.stack([best_q.mean(), best_q.std(correction=0), spread.mean()])
    agent.q_stats.lerp_(q_now, args.q_stats_rate)  # after its use: weights see the past only
    agent.q_stats[1:].clamp_(min=1e-6)  # a constant Q must not end in 0 / 0
    agent.updates += 1
    candidate_spread = candidates.std(0, correction=0).mean()
    return metrics | {"policy/alpha": alpha, "policy/candidate_spread": candidate_spread}


# ---------------------------------------------------------------------------- plumbing
# What serves every algorithm alike has the same text in every script of this project.


def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class SeededEpisodes(gym.Wrapper):
    """Give every episode its own seed, so that a checkpoint can rebuild an unfinished one.

    A simulator's state cannot be saved exactly. The seed of its reset and the actions since then
    can, and playing them back is exact to the bit.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index, self.rng, self.episode_seed, self.actions = index, None, 0, []

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None or self.rng is None:
            self.rng = np.random.default_rng(seed)
        self.episode_seed, self.actions = int(self.rng.integers(2**31)), []
        return self.env.reset(seed=self.episode_seed, options=options)

    def step(self, action):
        self.actions.append(np.array(action))
        return self.env.step(action)

    def episode_state(self) -> dict:
        actions = torch.as_tensor(np.array(self.actions, np.float32))
        rng = json.dumps(self.rng.bit_generator.state)
        return {"seed": self.episode_seed, "actions": actions, "rng": rng}

    def restore_episode(self, states: list[dict]) -> np.ndarray:
        """Play back this env's entry of states (one per env); returns the current observation."""
        state, self.rng = states[self.index], np.random.default_rng()
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.episode_seed, self.actions = state["seed"], list(state["actions"].numpy())
        obs, _ = self.env.reset(seed=self.episode_seed)
        for action in self.actions:
            obs = self.env.step(action)[0]
        return obs


def make_env(env_id: str, index: int = 0, render_mode: str | None = None) -> gym.Env:
    """Flat float32 observations, actions in [-1, 1]; what cannot be trained on is refused."""
    # papers report the outdated v4, and float32 is what the networks want
    warnings.filterwarnings("ignore", ".*(is out of date|precision lowered|overflow encountered).*")
    mujoco = metadata.version("mujoco")
    if env_id.startswith("dm_control/"):
        if int(mujoco.split(".")[0]) >= 4:
            fail(f"{env_id} needs mujoco below 4, not {mujoco}: pip install 'mujoco>=3.17,<4'")
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "disable")  # else it warns that there is no screen
        import shimmy  # noqa: F401  registers the ids, in every worker process too
    try:
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        near = ", ".join(difflib.get_close_matches(env_id, gym.registry, n=4, cutoff=0.4))
        reason = " ".join(str(error).split())
        fail(f"unknown environment {env_id!r}; nearest registered: {near or 'none'} ({reason})")
    except (gym.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        fail(f"{env_id} cannot be made, mujoco here is {mujoco}: {reason}")
    space, actions = env.observation_space, env.action_space
    leaves = space.values() if isinstance(space, gym.spaces.Dict) else [space]
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        fail(f"{env_id} has actions {actions}; only a vector of continuous actions (Box) will do")
    if not (actions.is_bounded() and (actions.low < actions.high).all()):
        fail(f"{env_id} has unbounded actions {actions}; every action needs a low and a high")
    if not all(isinstance(leaf, gym.spaces.Box) for leaf in leaves):
        fail(f"{env_id} has observations {space}; only a Box or a Dict of Boxes will do")
    if any(len(leaf.shape) > 2 or leaf.dtype == np.uint8 for leaf in leaves):
        fail(f"{env_id} has image observations {space}; only state vectors will do")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return SeededEpisodes(gym.wrappers.RecordEpisodeStatistics(env), index)


def make_envs(env_id: str, count: int, in_processes: bool = False, film: bool = False):
    """Vector env whose done step already returns the next episode's first observation."""
    modes = ["rgb_array" if film else None] + [None] * (count - 1)  # only the first env is filmed
    makers = [partial(make_env, env_id, i, mode) for i, mode in enumerate(modes)]
    vector = gym.vector.AsyncVectorEnv if in_processes else gym.vector.SyncVectorEnv
    return vector(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def episode_seeds(seed: int, stream: int, count: int) -> list[int]:
    """Independent seeds for the envs of a run's stream: 0 training, 1 evaluation."""
    return [int(s) for s in np.random.SeedSequence((seed, stream)).generate_state(count)]


def choose_opengl() -> None:
    """Find a renderer that works without a screen; mujoco reads MUJOCO_GL once, at its import."""
    if sys.platform != "linux" or "DISPLAY" in os.environ:
        return
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for backend in [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]:
        env = os.environ | {"MUJOCO_GL": backend}
        if subprocess.run(probe, env=env, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    fail("--capture-video finds no OpenGL: apt-get install libegl1 libegl-mesa0 (or libosmesa6)")


class ReplayBuffer:
    """Ring buffer of transitions, on the device that learns from it."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        shapes = {"obs": (obs_dim,), "actions": (act_dim,), "rewards": ()}
        shapes |= {"next_obs": (obs_dim,), "terminations": ()}
        self.data = {k: torch.empty((capacity, *s), device=device) for k, s in shapes.items()}
        self.capacity, self.device, self.position, self.size = capacity, device, 0, 0

    def add(self, *transitions: np.ndarray) -> None:
        """Store one transition per env, arrays (num_envs, ...) in the order of self.data."""
        n = len(transitions[0])
        index = (self.position + torch.arange(n, device=self.device)) % self.capacity
        for stored, new in zip(self.data.values(), transitions, strict=True):
            stored[index] = torch.as_tensor(new, dtype=torch.float32, device=self.device)
        self.position, self.size = (self.position + n) % self.capacity, self.size + n
        self.size = min(self.size, self.capacity)

    def sample(self, batch_size: int, rng: Generator) -> dict[str, Tensor]:
        """Uniformly, with replacement: tensors (batch_size, ...)."""
        index = torch.randint(self.size, (batch_size,), generator=rng, device=self.device)
        return {key: value[index] for key, value in self.data.items()}


def evaluate(envs, policy, seed: int, device: torch.device, film: Path | None = None):
    """One episode in every env, side by side: returns (num_envs,) and successes (NaN: unknown).

    The envs are reseeded, so all evaluations of a run start from the same states. policy maps
    observations (num_envs, obs_dim) to actions. The first env's episode is filmed if asked for.
    """
    obs, _ = envs.reset(seed=episode_seeds(seed, 1, envs.num_envs))
    running, frames = np.full(envs.num_envs, True), []
    returns, successes = np.zeros(envs.num_envs), np.full(envs.num_envs, np.nan)
    while running.any():
        if film and running[0]:
            frames.append(envs.envs[0].render())
        actions = policy(torch.as_tensor(obs, device=device)).cpu().numpy()
        obs, _, terminations, truncations, infos = envs.step(actions)
        for i in np.flatnonzero((terminations | truncations) & running):
            final = infos["final_info"]
            returns[i], running[i] = final["episode"]["r"][i], False
            successes[i] = final.get("success", final.get("is_success", successes))[i]
    if film:
        from gymnasium.utils.save_video import save_video  # slow to import

        dt = getattr(envs.envs[0].unwrapped, "dt", 1 / 30)  # MuJoCo's and dm_control's own clock
        save_video(frames, film.parent, lambda _: True, name_prefix=film.name, fps=1 / dt)
    return returns, successes


class RunLogger:
    """CSV rows and TensorBoard events in the run directory; wandb, if asked for, mirrors them."""

    def __init__(self, run_dir: Path, args: Args, global_step: int):
        self.run_dir, self.wandb = run_dir, None
        for path in run_dir.glob("*.csv"):  # what a resumed run does again must not stand twice
            head, *rows = path.read_text().splitlines(keepends=True)
            rows = [r for r in rows if r[-1] == "\n" and int(r.split(",")[0]) <= global_step]
            path.write_text("".join([head, *rows]))
        if args.track:
            import wandb

            names = {"name": run_dir.name, "id": run_dir.name, "resume": "allow"}
            names |= {"project": args.wandb_project_name, "entity": args.wandb_entity}
            wandb.init(**names, config=asdict(args), dir=run_dir, sync_tensorboard=True)
            self.wandb = wandb
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1)

    def row(self, name: str, values: dict) -> None:
        """Append to <name>.csv; the keys of the first row are the columns."""
        with (self.run_dir / f"{name}.csv").open("a") as file:
            if file.tell() == 0:
                file.write(",".join(values) + "\n")
            file.write(",".join(str(value) for value in values.values()) + "\n")

    def scalars(self, values: dict[str, float], global_step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, global_step)

    def close(self) -> None:
        self.writer.close()
        if self.wandb:
            films = sorted(self.run_dir.glob("videos/*.mp4"))
            self.wandb.log({f"videos/{f.stem}": self.wandb.Video(str(f)) for f in films})
            self.wandb.finish()


def new_run_dir(args: Args, device: torch.device) -> Path:
    """Create runs/<env>__<exp>__<seed>__<time>; mkdir fails rather than share one."""
    env, now = args.env_id.replace("/", "-").replace(":", "-"), time.time()
    stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{now % 1 * 1e6:06.0f}"
    run_dir = Path(args.runs_dir, f"{env}__{args.exp_name}__{args.seed}__{stamp}")
    run_dir.mkdir(parents=True)
    names = "torch", "gymnasium", "mujoco", "dm-control", "numpy"
    versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in names}
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    with suppress(OSError):  # no git here
        versions["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions |= {"device": device_name(device), "threads": torch.get_num_threads()}
    for name, content in ("args", asdict(args)), ("versions", versions):
        (run_dir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return run_dir


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform knows the name elsewhere
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def save(path: Path, content: dict) -> None:
    """Write a temporary file, then replace: a crash leaves the old file or the new one whole."""
    torch.save(content, path.with_name(path.name + ".tmp"))
    os.replace(path.with_name(path.name + ".tmp"), path)


def load(path: str, name: str) -> tuple[Path, dict]:
    """Read what save() wrote, given the file or its run directory; refuse anything else."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.exists():
        fail(f"{file} does not exist")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds, all with the same meaning here
        fail(f"{file} cannot be read: it is truncated or no {name}")
    key = "episodes" if name == "checkpoint.pt" else "policy"
    if not isinstance(content, dict) or not {key, "args", "global_step"} <= set(content):
        fail(f"{file} is no {name} of this project")
    if set(content["args"]) != {field.name for field in fields(Args)}:
        fail(f"{file} was not written by this version of {Path(__file__).name}")
    return file, content


def save_run(run_dir, args, agent, buffer, envs, rng, warmup_rng, progress: dict) -> None:
    """policy.pt to use the policy, checkpoint.pt to go on training exactly where it stopped."""
    content = progress | {"args": asdict(replace(args, resume=None))}
    policy = {"policy": agent.target_policy.state_dict(), "critics": agent.critic.state_dict()}
    save(run_dir / "policy.pt", policy | {k: content[k] for k in ("args", "global_step")})
    content |= {"agent": agent.state_dict(), "counters": [agent.updates, agent.alpha_updates]}
    content["optimizers"] = {key: opt.state_dict() for key, opt in agent.optimizers.items()}
    filled = {key: value[: buffer.size].clone() for key, value in buffer.data.items()}
    content |= {"buffer": filled, "position": buffer.position}
    content |= {"rng": rng.get_state(), "device": rng.device.type}
    content["warmup_rng"] = json.dumps(warmup_rng.bit_generator.state)
    content["episodes"] = list(envs.call("episode_state"))
    save(run_dir / "checkpoint.pt", content)


def restore_run(saved: dict, agent, buffer, envs, rng, warmup_rng) -> np.ndarray:
    """Undo save_run; returns the observations the envs were at."""
    agent.load_state_dict(saved["agent"])
    agent.updates, agent.alpha_updates = saved["counters"]
    for key, optimizer in agent.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][key])
    buffer.position, buffer.size = saved["position"], len(saved["buffer"]["rewards"])
    for key, value in saved["buffer"].items():
        buffer.data[key][: buffer.size] = value
    rng.set_state(saved["rng"])
    warmup_rng.bit_generator.state = json.loads(saved["warmup_rng"])
    return np.stack(envs.call("restore_episode", saved["episodes"]))


def check_finite(values: dict, global_step: int) -> None:
    """Stop a diverged run before it overwrites its last good checkpoint."""
    for key, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise SystemExit(f"diverged: {key} is NaN or infinite at step {global_step}")


def check_args(args: Args) -> torch.device:
    """Refuse values that cannot work; returns the device to run on."""
    may_be_zero = "seed", "eval_every", "checkpoint_every", "torch_threads", "noise_scale"
    for key, value in asdict(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            least = "0 or more" if key in may_be_zero else "above 0"
            if not (math.isfinite(value) and (value > 0 or (value == 0 and least == "0 or more"))):
                fail(f"--{key.replace('_', '-')} {value} must be {least}")
            if key in ("gamma", "tau", "q_stats_rate") and value > 1:
                fail(f"--{key.replace('_', '-')} {value} must be at most 1")
    updates = args.utd * (args.total_timesteps - args.learning_starts)
    first, last = args.policy_lr_decay
    for wrong, message in (
        (args.batch_size > args.learning_starts, "--batch-size exceeds --learning-starts"),
        (args.batch_size > args.buffer_size, "--batch-size exceeds --buffer-size"),
        (args.num_envs > args.buffer_size, "--num-envs exceeds --buffer-size"),
        (
            args.learning_starts > args.total_timesteps,
            "--learning-starts exceeds --total-timesteps",
        ),
        (updates < 1, "no update: raise --utd or --total-timesteps"),
        (not min(args.policy_lr) >= 0, "--policy-lr must be 0 or more"),
        (not 0 <= first <= last, "--policy-lr-decay needs two rising update counts"),
    ):
        if wrong:
            fail(message)
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {args.device} is not to be had here; --device auto takes what there is")
    if args.precision == "tf32" and device.type != "cuda":
        fail("--precision tf32 needs CUDA; float32 and bfloat16 work everywhere")
    return device


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; --resume and --evaluate take their defaults from the stored arguments."""
    args = tyro.cli(Args, args=argv)
    if args.resume or args.evaluate:
        name = "checkpoint.pt" if args.resume else "policy.pt"
        stored = load(args.resume or args.evaluate, name)[1]["args"]
        args = tyro.cli(Args, args=argv, default=Args(**stored))
    return args


# ---------------------------------------------------------------------------- main

EPISODE = "charts/episodic_return", "charts/episodic_length"
MAY_CHANGE = {"resume", "total_timesteps", "log_every", "capture_video", "torch_threads"}
MAY_CHANGE |= {"track", "wandb_project_name", "wandb_entity"}  # on --resume


def replay(args: Args, device: torch.device) -> None:
    """--evaluate: run a saved policy with one network evaluation per action."""
    file, saved = load(args.evaluate, "policy.pt")
    envs = make_envs(args.env_id, args.eval_episodes, film=args.capture_video)
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    policy = VelocityField(obs_dim, act_dim, args.hidden_dim).to(device)
    try:
        policy.load_state_dict(saved["policy"])
    except RuntimeError:
        fail(f"{file} was trained on {saved['args']['env_id']} and does not fit {args.env_id}")
    rng = Generator(device).manual_seed(args.seed)
    one_step = partial(one_step_action, policy, args=args, rng=rng)
    film = file.parent / "videos" / "evaluate" if args.capture_video else None
    returns, successes = evaluate(envs, one_step, args.seed, device, film)
    for episode, value in enumerate(returns):
        print(f"episode {episode}: return {value:.2f}")
    print(
        f"return {returns.mean():.2f} +- {returns.std():.2f}, success rate {successes.mean():.2f}"
    )
    milliseconds, obs = [], torch.zeros((1, obs_dim), device=device)
    for _ in range(300):
        start = time.perf_counter()
        one_step(obs).cpu()
        milliseconds.append(1000 * (time.perf_counter() - start))
    print(
        f"{np.median(milliseconds):.3f} ms per action, one state at a time, {device_name(device)}"
    )
    envs.close()


def evaluate_both(agent: Agent, envs, args: Args, film: Path | None) -> list[dict]:
    """Rows for evaluations.csv: one_step is the papers' claim, best_of_n the acting rule."""
    rows, device = [], agent.log_alpha.device
    for mode in "one_step", "best_of_n":
        rng = Generator(device).manual_seed(args.seed)
        policy = partial(act, agent, args=args, rng=rng, explore=False)
        nfe, num_candidates = args.flow_steps, args.num_candidates
        if mode == "one_step":
            policy = partial(one_step_action, agent.target_policy, args=args, rng=rng)
            nfe = num_candidates = 1
        returns, successes = evaluate(envs, policy, args.seed, device, film)
        film = None  # the one-step episode is the one to see
        row = {"mode": mode, "nfe": nfe, "num_candidates": num_candidates}
        row |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
        row["success_rate"] = "" if np.isnan(successes).any() else float(successes.mean())
        rows.append(row | {"returns": " ".join(f"{value:.4f}" for value in returns)})
    return rows


def main(args: Args) -> Path | None:
    """Train and return the run directory; the loop is act, step, store, learn, log."""
    saved = None
    if args.resume:
        file, saved = load(args.resume, "checkpoint.pt")
        for key in {k for k, v in asdict(args).items() if v != saved["args"][k]} - MAY_CHANGE:
            fail(f"--{key.replace('_', '-')} differs from the run that --resume goes on with")
        if saved["global_step"] + args.num_envs > args.total_timesteps:
            fail(f"{file} is at step {saved['global_step']}: raise --total-timesteps to go on")
    device = check_args(args)
    if saved and saved["device"] != device.type:
        fail(f"{file} was written on {saved['device']} and can only go on there")
    if args.capture_video:
        choose_opengl()
    torch.set_num_threads(args.torch_threads or min(8, torch.get_num_threads()))
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if args.evaluate:
        return replay(args, device)

    envs = make_envs(args.env_id, args.num_envs, args.async_envs)  # first, because it may fork
    eval_envs = make_envs(args.env_id, args.eval_episodes, film=args.capture_video)
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(obs_dim, act_dim, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    rng = Generator(device).manual_seed(args.seed)  # all noise and replay sampling
    warmup_rng = np.random.default_rng(args.seed)
    if saved:
        run_dir, global_step, wall_time = file.parent, saved["global_step"], saved["wall_time"]
        metrics, recent = saved["metrics"], deque(saved["recent"], maxlen=20)
        obs = restore_run(saved, agent, buffer, envs, rng, warmup_rng)
    else:
        run_dir, global_step, wall_time = new_run_dir(args, device), 0, 0.0
        metrics, recent = {}, deque(maxlen=20)  # recent training episodes: (return, length)
        obs, _ = envs.reset(seed=episode_seeds(args.seed, 0, args.num_envs))
    logger = RunLogger(run_dir, args, global_step)
    updates = int(args.utd * (args.total_timesteps - args.learning_starts) + 1e-9)
    rows = args.batch_size * args.num_candidates
    print(f"{args.env_id}: {obs_dim} observations, {act_dim} actions, writing to {run_dir}")
    print(
        f"{updates:,} updates on {device_name(device)}, {torch.get_num_threads()} CPU threads; "
        f"each evaluates the policy on {rows * args.flow_steps:,} rows and the critics on "
        f"{2 * rows:,}: --num-candidates, --flow-steps and --utd scale it",
        flush=True,
    )
    if args.compile:
        for network in agent.policy, agent.critic, agent.target_critic:
            network.compile(dynamic=False)

    stop, start_time = [], time.perf_counter() - wall_time

    def request_stop(signum, _frame):  # the second one interrupts at once
        stop.append(signum)
        signal.signal(signum, signal.default_int_handler)

    def due(every: int) -> bool:
        return every > 0 and global_step % every < args.num_envs

    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None)
    with ExitStack() as cleanup:
        for resource in envs, eval_envs, logger, bar:
            cleanup.callback(resource.close)
        for signum in signal.SIGINT, signal.SIGTERM:
            cleanup.callback(signal.signal, signum, signal.signal(signum, request_stop))
        while global_step + args.num_envs <= args.total_timesteps and not stop:
            # act: uniformly at random at first, then the slow policy with exploration noise
            if global_step < args.learning_starts:
                actions = warmup_rng.uniform(-1, 1, (args.num_envs, act_dim)).astype(np.float32)
            else:
                actions = act(agent, torch.as_tensor(obs, device=device), args, rng).cpu().numpy()
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            global_step += args.num_envs

            # store: where an episode ended, next_obs already belongs to the one after it
            last_obs = next_obs.copy()
            for i in np.flatnonzero(terminations | truncations):
                last_obs[i] = infos["final_obs"][i]
                episode = infos["final_info"]["episode"]
                recent.append([float(episode["r"][i]), float(episode["l"][i])])
                logger.scalars(dict(zip(EPISODE, recent[-1], strict=True)), global_step)
            buffer.add(obs, actions, rewards, last_obs, terminations)
            obs = next_obs

            # learn: the number of updates follows from utd alone, whatever num_envs is
            learning_steps = global_step - args.learning_starts
            while agent.updates < int(args.utd * learning_steps + 1e-9):
                metrics |= update(agent, buffer.sample(args.batch_size, rng), args, rng)
            while agent.alpha_updates * args.alpha_interval < learning_steps:
                update_alpha(agent, args)

            # log, evaluate, save
            last = global_step + args.num_envs > args.total_timesteps
            wall_time = round(time.perf_counter() - start_time, 3)
            row = {"global_step": global_step, "updates": agent.updates, "wall_time": wall_time}
            bar.update(args.num_envs)
            if agent.updates and (due(args.log_every) or last):
                metrics = {key: float(value) for key, value in metrics.items()}
                check_finite(metrics | agent.state_dict(), global_step)
                means = np.mean(recent, 0).tolist() if recent else ["", ""]
                sps = {"charts/SPS": round(global_step / wall_time, 1)}
                logger.row("metrics", row | dict(zip(EPISODE, means, strict=True)) | sps | metrics)
                logger.scalars(metrics | sps, global_step)
                bar.set_postfix(updates=agent.updates, episodic_return=means[0])
            if args.eval_every and (due(args.eval_every) or last):
                film = run_dir / "videos" / f"step-{global_step}" if args.capture_video else None
                for result in evaluate_both(agent, eval_envs, args, film):
                    logger.row("evaluations", row | result)
                    name = "eval" if result["mode"] == "one_step" else "eval_best_of_n"
                    stats = {k: v for k, v in result.items() if isinstance(v, float)}
                    logger.scalars({f"{name}/{k}": v for k, v in stats.items()}, global_step)
                    text = "step {global_step:,}: {mode} {return_mean:.1f} +- {return_std:.1f}"
                    bar.write(text.format(**row, **result))
            if due(args.checkpoint_every) or last or stop:
                check_finite(agent.state_dict(), global_step)
                progress = {"global_step": global_step, "wall_time": wall_time}
                progress |= {"metrics": metrics, "recent": list(recent)}
                save_run(run_dir, args, agent, buffer, envs, rng, warmup_rng, progress)
    if stop:
        print(f"stopped at step {global_step:,}; go on with --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    return run_dir


if __name__ == "__main__":
    main(parse_args())
