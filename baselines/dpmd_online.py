"""DPMD: online reinforcement learning with a diffusion policy, FPMD's twin and main comparator.

A network predicts the noise in an action at each of T = 20 levels. Training denoises level by level
and keeps the best of N = 32 candidates; policy mirror descent pulls the policy towards them. Below,
e ~ N(0, I), and A_k (alpha bar) is the share of signal left at level k. The method comes first.

    predict_action  x_0 = clip((x - sqrt(1 - A_k) eps(s, x, k)) / sqrt(A_k), -1, 1)  for x = x_k
    generate        x_{T-1} = prior_std * e,  x_{k-1} ~ p(x_{k-1} | x_k, x_0),  a = x_0 at k = 0
    select_action, critic_loss, importance_weights: as in fpmd_online.py, word for word
    policy_loss     w || eps(s', x_k, k) - e ||^2  with  x_k = sqrt(A_k) a* + sqrt(1 - A_k) e

    python baselines/dpmd_online.py --env-id Ant-v4
    python baselines/dpmd_online.py --evaluate runs/<run>/policy.pt --eval-episodes 10

Paper: arXiv:2502.00361; as the comparator of FPMD (arXiv:2507.23675): tianyyiii/flow_policy_iclr.
"""

import copy
import difflib
import json
import math
import os
import signal
import subprocess
import sys
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
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
    exp_name: str = Path(__file__).stem  # second part of the run directory's name
    runs_dir: str = "runs"  # where run directories are created
    log_every: int = 1_000  # environment steps between rows of metrics.csv
    eval_every: int = 25_000  # environment steps between evaluations, 0: never
    eval_episodes: int = 10  # episodes per evaluation, all side by side
    checkpoint_every: int = 50_000  # environment steps between checkpoints, 0: only at the end
    capture_video: bool = False  # film the first episode of every one-candidate evaluation
    track: bool = False  # mirror the run to Weights & Biases
    wandb_project_name: str = "one-step-flow-rl"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    resume: str | None = None  # checkpoint.pt or a run directory to go on with
    evaluate: str | None = None  # policy.pt to replay with one candidate per action, no training
    # --- algorithm: defaults are the published setting ---
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the slow copies (target critics, acting policy)
    batch_size: int = 256  # transitions per update, B
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    learning_starts: int = 30_000  # environment steps with random actions before learning
    utd: float = 0.2  # gradient updates per environment step
    num_candidates: int = 32  # N, actions generated per state; the critics keep the best
    flow_steps: int = 20  # T, denoising steps per generated action (NFE), deployed as well
    beta_schedule: Literal["cosine", "linear"] = "cosine"  # FPMD's code; linear: DPMD's own
    prior_std: float = 0.5  # std of x_{T-1} when sampling; training always noises with N(0, I)
    weight_mode: Literal["temperature", "clip_alpha", "none"] = "temperature"  # w
    temperature: float | None = None  # lambda; unset: 3
    reward_scale: float = 0.2  # rewards are multiplied by this
    critic_lr: float = 3e-4  # Adam step size of the critics
    critic_layer_norm: bool = False  # LayerNorm before every activation of the critics
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
    compile: bool = True  # compile, and on CUDA capture, an update; the first ones take a minute
    precision: Literal["float32", "tf32"] = "float32"  # of matrix products; tf32: on a GPU
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8; give 1 to side-by-side runs
    async_envs: bool = False  # one process per environment (pays off for slow simulators)


# ---------------------------------------------------------------------------- networks
TIME_DIM = 16  # width of the sinusoidal time embedding


class Mish(nn.Module):
    """x tanh(softplus(x)); compiled, with a single exponential, which is most of what it costs."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return nn.functional.mish(x)  # eager: one pass over memory counts for more
        e = x.clamp(max=20).exp()  # from there on Mish is x to float precision
        n = e * (e + 2)
        return x * n / (n + 2)


class MLP(nn.Sequential):
    """Linear layers with Mish between; weights N(0, 1 / fan_in) cut at two std, as in haiku."""

    def __init__(self, *sizes: int, layer_norm: bool = False):
        modules = []
        for fan_in, fan_out in pairwise(sizes):
            linear, std = nn.Linear(fan_in, fan_out), fan_in**-0.5
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)
            modules += [linear, *[nn.LayerNorm(fan_out)] * layer_norm, Mish()]
        super().__init__(*modules[: -1 - layer_norm])  # the last layer is linear alone

    def forward(self, *inputs: Tensor) -> Tensor:
        """Of cat(inputs, -1), by parts: what all candidates share is multiplied only once."""
        (first, *layers), linear = self, nn.functional.linear
        weights = first.weight.split([x.shape[-1] for x in inputs], 1)
        (x, w), *rest = sorted(zip(inputs, weights, strict=True), key=lambda part: part[0].numel())
        x = sum((linear(*part) for part in rest), start=linear(x, w, first.bias))
        for layer in layers:
            x = layer(x)
        return x


def time_embedding(t: Tensor) -> Tensor:
    """Sines and cosines of the raw level k, 8 frequencies from 1 down: (..., 1) -> (..., 16)."""
    angles = t * 10_000 ** (-torch.arange(0, 1, 2 / TIME_DIM, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(TIME_DIM)


def noise_schedule(kind: str, flow_steps: int) -> Tensor:
    """A_k = prod_{i <= k} (1 - beta_i), from nearly 1 to nearly 0: (T,), float64."""
    betas = 0.8 * torch.linspace(1e-4, 0.999, flow_steps, dtype=torch.float64)
    if kind == "cosine":
        t = torch.linspace(0, 1, flow_steps + 1, dtype=torch.float64)
        signal = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


class NoisePredictor(nn.Module):
    """eps(s, x, k): the noise in a point x at level k on its way to an action for state s."""

    def __init__(self, obs_dim: int, act_dim: int, alpha_bar: Tensor, hidden_dim: int = 256):
        super().__init__()
        self.act_dim = act_dim
        self.time_mlp = MLP(TIME_DIM, 2 * TIME_DIM, TIME_DIM)
        self.net = MLP(obs_dim + act_dim + TIME_DIM, *[hidden_dim] * 3, act_dim)
        self.signal = alpha_bar.tolist()  # numbers to sample with, a tensor to learn from
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)

    def forward(self, obs: Tensor, x: Tensor, k: Tensor) -> Tensor:
        """obs (B, obs_dim), x (..., B, act_dim), k (1,) or (B, 1) -> noise like x."""
        return self.net(obs, x, self.time_mlp(time_embedding(k)))


class TwinCritic(nn.Module):
    """Two independent action values Q_1 and Q_2."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256, layer_norm: bool = False):
        super().__init__()
        self.q1 = MLP(obs_dim + act_dim, *[hidden_dim] * 3, 1, layer_norm=layer_norm)
        self.q2 = MLP(obs_dim + act_dim, *[hidden_dim] * 3, 1, layer_norm=layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, obs_dim), actions (..., B, act_dim) -> Q (2, ..., B)."""
        return torch.stack([self.q1(obs, actions), self.q2(obs, actions)]).squeeze(-1)


class Agent(nn.Module):
    """All that learns: networks, their slow copies, log alpha, statistics of Q, optimizers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        super().__init__()
        alpha_bar = noise_schedule(args.beta_schedule, args.flow_steps)
        self.policy = NoisePredictor(obs_dim, act_dim, alpha_bar, args.hidden_dim)
        self.critic = TwinCritic(obs_dim, act_dim, args.hidden_dim, args.critic_layer_norm)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)  # the one that acts
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        self.register_buffer("q_stats", torch.tensor([0.0, 1.0]))  # running mean, std of Q(s, a*)
        self.to(device)
        self.device, self.updates, self.alpha_updates = device, 0, 0
        warnings.filterwarnings(
            "ignore", ".*(capturable=True|float32_matmul_precision).*"
        )  # the first steps are not captured
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "critic": adam(self.critic.parameters(), args.critic_lr),
            # a tensor, which a recorded graph reads when it is replayed
            "policy": adam(
                self.policy.parameters(), torch.tensor(args.policy_lr[0], device=device)
            ),
            "alpha": torch.optim.Adam([self.log_alpha], args.alpha_lr),
        }
        t, n = args.flow_steps, args.num_candidates  # the first mode is how DPMD is deployed
        self.modes = {"one_candidate": (t, 1), "one_step": (1, 1), "best_of_n": (t, n)}
        self.act, self.learn, self.policy_loss = act, learn, policy_loss  # accelerate's handles


# ---------------------------------------------------------------------------- acting
def predict_action(policy: nn.Module, obs: Tensor, x: Tensor, k: int) -> Tensor:
    """x_0 in the box, if x (..., B, act_dim) at level k holds just the predicted noise."""
    noise, signal = policy(obs, x, torch.full((1,), k, device=x.device)), policy.signal[k]
    return ((x - (1 - signal) ** 0.5 * noise) / signal**0.5).clamp(-1, 1)


def generate(policy: nn.Module, obs: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """From x = x_{T-1}, x_{k-1} ~ N(c x_0 + d x_k, var) for each noise given, then x_0 from there.

    obs (B, obs_dim), x (..., B, act_dim), noise (at most T - 1, ..., B, act_dim) -> actions like x.
    """
    k = len(policy.signal) - 1
    for e in noise:
        now, below = policy.signal[k], policy.signal[k - 1]
        keep = now / below  # 1 - beta_k
        c, d = below**0.5 * (1 - keep) / (1 - now), keep**0.5 * (1 - below) / (1 - now)
        var = (1 - keep) * (1 - below) / (1 - now)
        x, k = c * predict_action(policy, obs, x, k) + d * x + var**0.5 * e, k - 1
    return predict_action(policy, obs, x, k)


def propose(policy: nn.Module, obs: Tensor, std: Tensor, args: Args, rng: Generator) -> Tensor:
    """N candidates per state, exploration noise of that std on each: (N, B, act_dim), unclipped."""
    shape = (args.flow_steps + 1, args.num_candidates, len(obs), policy.act_dim)
    noise = torch.randn(shape, generator=rng, device=obs.device)
    return generate(policy, obs, args.prior_std * noise[0], noise[2:]) + std * noise[1]


def select_action(critic: TwinCritic, obs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Best of N: argmax_i min(Q_1, Q_2)(s, a_i), one rule for acting, TD and imitation.

    obs (B, obs_dim), candidates (N, B, act_dim) -> actions in the box (B, act_dim), scores (N, B).
    """
    scores = critic(obs, candidates).amin(0)  # (N, B)
    return candidates.take_along_dim(scores.argmax(0)[None, :, None], 0)[0].clamp(-1, 1), scores


@torch.no_grad()
def act(agent: Agent, obs: Tensor, args: Args, rng: Generator, mode: str) -> Tensor:
    """Actions of the slow policy, obs (B, obs_dim) -> (B, act_dim). one_candidate: as it is
    deployed, no critic; one_step: x_0 from noise alone; best_of_n; explore: the same with noise.
    """
    steps, n = agent.modes.get(mode, agent.modes["best_of_n"])
    args = replace(args, flow_steps=steps, num_candidates=n)
    std = agent.log_alpha.exp() * args.noise_scale * (mode == "explore")
    candidates = propose(agent.target_policy, obs, std, args, rng)
    return select_action(agent.critic, obs, candidates)[0] if n > 1 else candidates[0].clamp(-1, 1)


# ---------------------------------------------------------------------------- learning
def importance_weights(q: Tensor, q_stats: Tensor, alpha: Tensor, args: Args) -> Tensor:
    """Mirror-descent weights w of the regression targets, from q = Q(s', a*): (B,) -> (B,).

    temperature: exp(q / (sigma lambda)), from max_pi E[Q] - lambda KL(pi || pi_old); clip_alpha:
    exp(clip(q - m / sigma, -3, 3) / alpha), as the authors released it; else 1. q_stats: m, sigma.
    """
    if args.weight_mode == "temperature":
        return len(q) * ((q - q.max()) / (q_stats[1] * (args.temperature or 3.0))).softmax(0)
    if args.weight_mode == "clip_alpha":  # dividing m alone by sigma is the release's quirk
        return ((q - q_stats[0] / q_stats[1]).clamp(-3, 3) / alpha).exp()
    return torch.ones_like(q)


def critic_loss(
    critic: TwinCritic, target_critic: TwinCritic, batch: dict, next_actions: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Clipped double-Q regression: the loss and Q (2, B); only termination stops bootstrapping."""
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).amin(0)  # (B,)
        y = args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach()


def policy_loss(
    policy: nn.Module, obs: Tensor, actions: Tensor, w: Tensor, noise: Tensor, k: Tensor
) -> Tensor:
    """Denoising score matching to the targets a*: mean of w || eps(s, x_k, k) - e ||^2.

    obs (B, obs_dim), actions a* and noise e ~ N(0, I) (B, act_dim), w (B,), k in 0..T-1 (B, 1).
    """
    signal = policy.alpha_bar[k]  # (B, 1)
    x_k = signal.sqrt() * actions + (1 - signal).sqrt() * noise
    return (w[:, None] * (policy(obs, x_k, k) - noise).square()).mean()


def update_alpha(agent: Agent, args: Args) -> None:
    """Adam step on -log_alpha (H_target - H_noise); no data in it, so alpha follows a schedule."""
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.1) + agent.log_alpha.detach()
    agent.log_alpha.grad = agent.policy.act_dim * (entropy + args.target_entropy_scale)
    agent.optimizers["alpha"].step()  # the authors keep 0.1 here even if noise_scale is another
    agent.alpha_updates += 1


def learn(agent: Agent, batch: dict, args: Args, rng: Generator, improve: bool) -> dict:
    """All of an update but its count and the learning rate; a CUDA graph may stand in for it."""
    next_obs, alpha = batch["next_obs"], agent.log_alpha.detach().exp()
    # one generation at s' serves both losses: the TD action is also what the policy imitates
    with torch.no_grad():
        candidates = propose(agent.policy, next_obs, alpha * args.noise_scale, args, rng)
        next_actions, scores = select_action(agent.critic, next_obs, candidates)
    best_q = scores.amax(0)  # (B,)

    loss, q = critic_loss(agent.critic, agent.target_critic, batch, next_actions, args)
    agent.optimizers["critic"].zero_grad()
    loss.backward()
    for _ in range(args.critic_steps):  # the authors step twice on one gradient
        agent.optimizers["critic"].step()
    metrics = {"losses/critic_loss": loss.detach(), "losses/q_values": q.mean()}
    metrics["policy/candidate_spread"] = candidates.std(0, correction=0).mean()

    if improve:
        w = importance_weights(best_q, agent.q_stats, alpha, args)
        metrics["policy/ess"] = w.mean().square() / w.square().mean()  # effective sample size / B
        k = torch.randint(args.flow_steps, (len(w), 1), generator=rng, device=w.device)
        noise = torch.randn(next_actions.shape, generator=rng, device=w.device)
        loss = agent.policy_loss(agent.policy, next_obs, next_actions, w, noise, k)
        agent.optimizers["policy"].zero_grad()
        loss.backward()
        metrics["losses/policy_loss"] = loss.detach()

    # after their use, since weights see the past only; a constant Q must not end in 0 / 0
    q_now = torch.stack([best_q.mean(), best_q.std(correction=0)])
    agent.q_stats.lerp_(q_now, args.q_stats_rate)[1:].clamp_(min=1e-6)

    if improve:
        agent.optimizers["policy"].step()
        for slow, fast in (agent.target_critic, agent.critic), (agent.target_policy, agent.policy):
            fast = [p.data for p in fast.parameters()]
            torch._foreach_lerp_(list(slow.parameters()), fast, args.tau)
    return metrics | {"policy/alpha": alpha}


def update(agent: Agent, batch: dict, args: Args, rng: Generator) -> dict[str, Tensor]:
    """One gradient update from a batch of (B, ...) tensors; returns scalars for the log."""
    step, wait = divmod(agent.updates, args.policy_delay)
    lr = np.interp(step, args.policy_lr_decay, args.policy_lr)
    agent.optimizers["policy"].param_groups[0]["lr"].fill_(lr)
    agent.updates += 1
    return agent.learn(agent, batch, args, rng, not wait)


# -------------------------------------------------- plumbing, the same text in every script
def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class SeededEpisodes(gym.Wrapper):
    """Seed every episode anew: its seed and actions rebuild it exactly, as no saved state can."""

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index, self.episode = index, {"seed": 0, "count": 0, "actions": []}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.episode |= {"seed": seed, "count": 0}
        self.episode |= {"count": self.episode["count"] + 1, "actions": []}
        key = self.episode["seed"], self.index, self.episode["count"]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        self.episode["actions"].append(action.copy())
        return self.env.step(action)

    def restore(self, episodes: list[dict]) -> np.ndarray:
        """Play back this env's entry of episodes (one per env) and return the last observation."""
        saved = episodes[self.index]
        self.episode = saved | {"count": saved["count"] - 1}
        obs, _ = self.reset()
        for action in saved["actions"].numpy():
            obs = self.step(action)[0]
        return obs


def make_env(env_id: str, index: int = 0, film: bool = False) -> gym.Env:
    """Flat float32 observations, actions in [-1, 1]; what cannot be trained on is refused."""
    # papers report the outdated v4; float32 is what the networks want, infinite bounds included
    warnings.filterwarnings("ignore", ".*(is out of date|precision lowered|overflow encountered).*")
    if torch.multiprocessing.parent_process():  # a worker: Ctrl-C is for the run, which saves
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    mujoco = metadata.version("mujoco")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "disable")  # else dm_control warns: there is no screen
    if env_id.startswith("dm_control/"):
        if int(mujoco.split(".")[0]) >= 4:
            fail(f"{env_id} needs mujoco below 4, not {mujoco}: pip install 'mujoco>=3.17,<4'")
        import shimmy  # noqa: F401  registers the ids, in every worker process too
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if film else {}))
    except (gym.error.Error, ImportError) as error:
        near = ", ".join(difflib.get_close_matches(env_id, gym.registry, n=4, cutoff=0.4))
        fail(f"cannot make {env_id!r} (mujoco {mujoco}): {error} Registered ids near it: {near}")
    if film and hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
        env.unwrapped.mujoco_renderer.camera_id = 0  # follow: the default one stays where it is
    space, actions, Box = env.observation_space, env.action_space, gym.spaces.Box
    leaves = space.values() if isinstance(space, gym.spaces.Dict) else [space]
    if not (isinstance(actions, Box) and actions.is_bounded() and len(actions.shape) == 1):
        fail(f"{env_id} has actions {actions}; only bounded vectors of numbers (Box) will do")
    if not all(isinstance(leaf, Box) and leaf.dtype.kind == "f" for leaf in leaves):
        fail(f"{env_id} has observations {space}; only vectors of numbers will do, images will not")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return SeededEpisodes(gym.wrappers.RecordEpisodeStatistics(env), index)


def make_envs(env_id: str, n: int, in_processes: bool = False, film: bool = False):
    """Vector env whose done step already returns the next episode's first observation."""
    makers = [partial(make_env, env_id, i, film and i == 0) for i in range(n)]
    vector = gym.vector.AsyncVectorEnv if in_processes else gym.vector.SyncVectorEnv
    return vector(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def choose_opengl() -> None:
    """Find a renderer that needs no screen, before mujoco's import reads MUJOCO_GL for good."""
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for backend in "egl", "osmesa", "glfw":
        os.environ["MUJOCO_GL"] = backend
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return
    fail("--capture-video finds no OpenGL: apt-get install libegl1 libegl-mesa0 (or libosmesa6)")


# all that makes an update faster, and nothing else, follows; --no-compile does without
def in_blocks(network: Callable, dim: int, rows: int) -> Callable:
    """The network, on a CPU fed with pieces of x (N, B, ...) of that many rows or one candidate."""

    def call(obs: Tensor, x: Tensor, *times: Tensor) -> Tensor:
        if x.ndim == 2 or x.device.type != "cpu":
            return network(obs, x, *times)
        pieces = x.split(max(1, rows // x.shape[1]))
        return torch.cat([network(obs, piece, *times) for piece in pieces], dim)

    return call


class Captured:
    """function(agent, inputs, args, rng, key) as one CUDA graph per key, a single launch.

    It reads and writes the addresses of its recording: inputs are copied there, outputs hold until
    the next call. The first three calls are not recorded: they compile, choose kernels, allocate.
    """

    def __init__(self, function: Callable):
        self.function, self.calls, self.graphs = function, Counter(), {}

    def __call__(self, agent, inputs, args: Args, rng: Generator, key):
        self.calls[key] += 1
        if self.calls[key] <= 3:
            return self.function(agent, inputs, args, rng, key)
        if key not in self.graphs:
            graph, static = torch.cuda.CUDAGraph(), copy.deepcopy(inputs)
            graph.register_generator_state(rng)  # each replay draws on where the last one stopped
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.graphs[key] = graph, static, self.function(agent, static, args, rng, key)
        graph, static, outputs = self.graphs[key]
        for name in inputs if isinstance(inputs, dict) else [...]:  # tensor[...] is all of it
            static[name].copy_(inputs[name])
        graph.replay()
        return outputs


def accelerate(agent, args: Args, device: torch.device) -> None:
    """--compile: compile what an update calls, capture it on CUDA, or say in a line why not."""
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler or Triton; torch has many ways to say so
        print(f"going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
        return
    # one layer's float32 activations then fill a megabyte per thread, a usual cache
    rows = torch.get_num_threads() * 2**20 // 4 // args.hidden_dim
    for network, dim in (agent.policy, 0), (agent.critic, 1), (agent.target_critic, 1):
        network.forward = in_blocks(torch.compile(network.forward, dynamic=False), dim, rows)
    agent.policy_loss = torch.compile(agent.policy_loss, dynamic=False)
    if device.type == "cuda":
        agent.act, agent.learn = Captured(agent.act), Captured(agent.learn)
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # the default one cannot be captured


@torch.no_grad()
def for_one_step(policy: NoisePredictor) -> NoisePredictor:
    """A copy that embeds nothing, faster per step: a table holds the embedding of every level."""
    folded, device = copy.deepcopy(policy), policy.alpha_bar.device
    levels = torch.arange(len(policy.signal), device=device)[:, None]
    table = policy.time_mlp(time_embedding(levels))  # (T, TIME_DIM)
    folded.forward = lambda obs, x, k: folded.net(obs, x, table[k])
    return folded


class ReplayBuffer:
    """Ring buffer of transitions, on the device that learns from it."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        dims = {"obs": (obs_dim,), "actions": (act_dim,), "rewards": (), "next_obs": (obs_dim,)}
        dims["terminations"] = ()
        self.dims = dims
        self.rows = torch.empty((capacity, sum(map(math.prod, dims.values()))), device=device)
        self.data = self.columns(self.rows)
        self.capacity, self.device, self.position, self.size = capacity, device, 0, 0

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (..., width) as named views (..., *dims)."""
        parts = rows.split([math.prod(dim) for dim in self.dims.values()], -1)
        shapes = zip(self.dims.items(), parts, strict=True)
        return {key: part.view(*rows.shape[:-1], *dim) for (key, dim), part in shapes}

    def add(self, *transitions: np.ndarray) -> None:
        """Store one transition per env, arrays (num_envs, ...) in the order of self.data."""
        n = len(transitions[0])
        rows = np.concatenate([np.reshape(x, (n, -1)) for x in transitions], 1, dtype=np.float32)
        index = (self.position + torch.arange(n, device=self.device)) % self.capacity
        # one transfer; from pageable memory it has left the array when the call returns
        self.rows[index] = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, batch_size: int, rng: Generator) -> dict[str, Tensor]:
        """Uniformly, with replacement: tensors (batch_size, ...)."""
        index = torch.randint(self.size, (batch_size,), generator=rng, device=self.device)
        return self.columns(self.rows[index])


def evaluate(agent: Agent, envs, args: Args, mode: str, film: Path, stop=()) -> dict:
    """One episode per env, side by side: a row for evaluations.csv; films the first mode."""
    rng = Generator(agent.device).manual_seed(args.seed)  # all evaluations start alike
    obs, _ = envs.reset(seed=[2 * args.seed + 1] * envs.num_envs)  # training has the even seeds
    running, frames = np.full(envs.num_envs, True), []
    returns, success = np.zeros(envs.num_envs), np.full(envs.num_envs, np.nan)
    while running.any() and not stop:
        if args.capture_video and mode == next(iter(agent.modes)) and running[0]:
            frames.append(envs.envs[0].render())
        actions = act(agent, torch.as_tensor(obs, device=rng.device), args, rng, mode)
        obs, _, terminations, truncations, infos = envs.step(actions.cpu().numpy())
        for i in np.flatnonzero((terminations | truncations) & running):
            final, running[i] = infos["final_info"], False
            returns[i] = final["episode"]["r"][i]
            success[i] = final.get("success", final.get("is_success", success))[i]
    if frames:
        from gymnasium.utils.save_video import save_video  # slow to import

        dt = getattr(envs.envs[0].unwrapped, "dt", 1 / 30)  # MuJoCo's and dm_control's own clock
        save_video(frames, film.parent, lambda _: True, name_prefix=film.name, fps=1 / dt)
    row = {"mode": mode, "nfe": agent.modes[mode][0], "num_candidates": agent.modes[mode][1]}
    row |= {"return_mean": returns.mean(), "return_std": returns.std()}
    return row | {"success_rate": success.mean(), "returns": " ".join(f"{x:.4f}" for x in returns)}


class RunLogger:
    """The run directory: its CSV files and TensorBoard events, which wandb mirrors if asked to."""

    def __init__(self, args: Args, device: torch.device, run_dir: Path | None, global_step: int):
        self.run_dir = run_dir or self.create(args, device)
        (self.run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        for path in self.run_dir.glob("*.csv"):  # what a resumed run repeats must not stand twice
            head, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
            rows = [r for r in rows if r[-1:] == b"\n" and int(r.split(b",")[0]) <= global_step]
            os.truncate(path, len(head) + sum(map(len, rows)))
        if args.track:
            import wandb

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            where |= {"id": self.run_dir.name, "resume": "allow"}
            wandb.init(**where, config=asdict(args), sync_tensorboard=True)
            wandb.save(f"{self.run_dir}/videos/*.mp4", base_path=self.run_dir)
        self.writer = SummaryWriter(self.run_dir, purge_step=global_step + 1)

    def create(self, args: Args, device: torch.device) -> Path:
        """Make runs/<env>__<exp>__<seed>__<time>; mkdir fails rather than share one."""
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
        run_dir = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
        run_dir.mkdir(parents=True)
        versions = {"python": sys.version.split()[0]}
        for package in "torch", "gymnasium", "mujoco", "dm-control", "numpy":
            with suppress(metadata.PackageNotFoundError):  # dm-control may be missing
                versions[package] = metadata.version(package)
        git, here = "git describe --always --dirty --abbrev=40", Path(__file__).parent
        run = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True)
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        cpu = [line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")]
        gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
        versions |= {"commit": run.stdout.strip(), "device": (gpu + cpu + [sys.platform])[0]}
        versions["threads"] = torch.get_num_threads()
        (run_dir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
        return run_dir

    def row(self, name: str, values: dict, plotted: dict) -> None:
        """Append to <name>.csv, columns from the first row, NaN empty; TensorBoard gets plotted."""
        with (self.run_dir / f"{name}.csv").open("a") as file:
            if file.tell() == 0:
                file.write(",".join(values) + "\n")
            file.write(",".join("" if v != v else str(v) for v in values.values()) + "\n")
        for key, value in plotted.items():
            self.writer.add_scalar(key, value, values["global_step"])


def save_run(run_dir, args, agent, buffer, envs, rng, progress: dict) -> None:
    """policy.pt to use the policy, checkpoint.pt to go on training exactly where it stopped."""
    state = progress | {"args": asdict(replace(args, resume=None))}
    policy = {"policy": agent.target_policy.state_dict(), "critics": agent.critic.state_dict()}
    policy |= {key: state[key] for key in ("args", "global_step")}
    counters = {key: value for key, value in vars(agent).items() if type(value) is int}
    state |= {"agent": agent.state_dict(), "counters": counters}
    state["optimizers"] = {key: opt.state_dict() for key, opt in agent.optimizers.items()}
    state["buffer"] = {key: value[: buffer.size].clone() for key, value in buffer.data.items()}
    state |= {"position": buffer.position, "rng": rng.get_state(), "device": rng.device.type}
    episodes = envs.get_attr("episode")
    state["episodes"] = [e | {"actions": torch.tensor(np.array(e["actions"]))} for e in episodes]
    for name, content in ("policy.pt", policy), ("checkpoint.pt", state):
        torch.save(content, run_dir / f"{name}.tmp")
        os.replace(run_dir / f"{name}.tmp", run_dir / name)  # a crash leaves the old or the new one


def load(path: str, name: str) -> tuple[Path, dict]:
    """Read what save_run wrote, given the file or its run directory; refuse anything else."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    keys = {"args", "global_step", "episodes" if name == "checkpoint.pt" else "policy"}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        assert keys <= set(content) and set(content["args"]) == {f.name for f in fields(Args)}
    except Exception:  # torch raises many kinds for a damaged file
        fail(f"{file} is missing, damaged or no {name} of this version of {Path(__file__).name}")
    return file, content


def restore_run(saved: dict, agent, buffer, envs, rng) -> np.ndarray:
    """Undo save_run; returns the observations the envs were at."""
    agent.load_state_dict(saved["agent"])
    vars(agent).update(saved["counters"])
    for key, optimizer in agent.optimizers.items():
        settings = optimizer.state_dict()["param_groups"]  # a learning rate on its own device
        optimizer.load_state_dict(saved["optimizers"][key] | {"param_groups": settings})
    buffer.position, buffer.size = saved["position"], len(saved["buffer"]["rewards"])
    for key, value in saved["buffer"].items():
        buffer.data[key][: buffer.size] = value
    rng.set_state(saved["rng"])
    return np.stack(envs.call("restore", saved["episodes"]))


def check_args(args: Args) -> torch.device:
    """Refuse values that cannot work; returns the device to run on."""
    numbers = {k: v for k, v in asdict(args).items() if type(v) in (int, float)}
    numbers |= {"policy_lr": min(args.policy_lr), "policy_lr_decay": max(args.policy_lr_decay)}
    zero_ok = "seed", "eval_every", "checkpoint_every", "torch_threads", "noise_scale"
    limits = dict.fromkeys(("gamma", "tau", "q_stats_rate"), (1, "at most 1"))
    limits["num_envs"] = args.buffer_size, "at most --buffer-size"
    limits["batch_size"] = args.learning_starts, "at most --learning-starts"
    limits["learning_starts"] = args.total_timesteps, "at most --total-timesteps"
    for key, value in numbers.items():
        limit, high = limits.get(key, (sys.float_info.max, "finite"))
        low = "0 or more" if key in zero_ok else "above 0"
        if not (0 < value <= limit or (value == 0 and key in zero_ok)):
            fail(f"--{key.replace('_', '-')} {value} must be {low} and {high}")
    if args.utd * (args.total_timesteps - args.learning_starts) < 1:
        fail(f"--utd {args.utd} gives no update; raise it or --total-timesteps")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=auto if args.device == "auto" else args.device).device
    except (RuntimeError, AssertionError):
        fail(f"--device {args.device} is not to be had here; --device auto takes what there is")
    if args.precision == "tf32" and device.type != "cuda":
        fail(f"--precision tf32 needs a CUDA GPU, not --device {device}")
    return device


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; --resume and --evaluate take their defaults from the stored arguments."""
    args = tyro.cli(Args, args=argv)
    if path := args.resume or args.evaluate:
        _, saved = load(path, "checkpoint.pt" if args.resume else "policy.pt")
        args = tyro.cli(Args, args=argv, default=Args(**saved["args"]))
    return args


# ---------------------------------------------------------------------------- main
def replay(args: Args, agent: Agent, envs) -> None:
    """--evaluate: the saved policy as it is deployed, which is its first mode."""
    file, saved = load(args.evaluate, "policy.pt")
    if args.env_id != saved["args"]["env_id"]:
        fail(f"{file} was trained on {saved['args']['env_id']}, not on {args.env_id}")
    agent.target_policy.load_state_dict(saved["policy"])
    agent.target_policy, mode = for_one_step(agent.target_policy), next(iter(agent.modes))
    result = evaluate(agent, envs, args, mode, file.parent / "videos" / "evaluate")
    for episode, value in enumerate(result["returns"].split()):
        print(f"episode {episode}: return {value}")
    obs = torch.zeros(1, *envs.single_observation_space.shape, device=agent.device)
    rng = Generator(obs.device)
    ms = min(timeit.repeat(lambda: act(agent, obs, args, rng, mode).cpu(), number=100)) * 10
    print("return {return_mean:.2f} +- {return_std:.2f}".format(**result), f"{ms:.3f} ms/action")


def main(args: Args) -> Path | None:
    """Train and return the run directory; the loop is act, learn, step, store, log."""
    file, saved, device = None, None, check_args(args)
    torch.set_num_threads(args.torch_threads or min(8, torch.get_num_threads()))
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if args.resume:
        file, saved = load(args.resume, "checkpoint.pt")
        may_change = "resume", "total_timesteps", "log_every", "capture_video", "torch_threads"
        may_change += "track", "wandb_project_name", "wandb_entity"
        for key, value in saved["args"].items():
            if value != getattr(args, key) and key not in may_change:
                fail(f"--{key.replace('_', '-')} cannot change on --resume; it was {value}")
        if saved["device"] != device.type:
            fail(f"{file} was written on {saved['device']} and can only go on there")
    if args.capture_video and not {"DISPLAY", "MUJOCO_GL"} & set(os.environ):
        choose_opengl()
    envs = make_envs(args.env_id, args.num_envs, args.async_envs)  # first, because it may fork
    film = args.capture_video  # which wants the simulators in this process
    eval_envs = make_envs(args.env_id, args.eval_episodes, args.async_envs and not film, film)
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(obs_dim, act_dim, args, device)
    if args.evaluate:
        return replay(args, agent, eval_envs)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    rng = Generator(device).manual_seed(args.seed)  # random actions, noise, replay sampling
    charts = "charts/episodic_return", "charts/episodic_length", "charts/SPS"
    if saved:
        global_step, start, metrics = saved["global_step"], saved["wall_time"], saved["metrics"]
        obs = restore_run(saved, agent, buffer, envs, rng)
    else:
        global_step, start, metrics = 0, 0.0, dict.fromkeys(charts, math.nan)
        obs, _ = envs.reset(seed=[2 * args.seed] * args.num_envs)
    logger = RunLogger(args, device, file and file.parent, global_step)
    run_dir, rows = logger.run_dir, args.batch_size * args.num_candidates
    print(f"{args.env_id}: {obs_dim} observations, {act_dim} actions; writing to {run_dir}")
    print(f"one update evaluates {rows * args.flow_steps:,} policy rows, {2 * rows:,} critic rows")
    # compilers inherit this and outlive a terminal's Ctrl-C, which the writer's thread lets in
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if args.compile:
        accelerate(agent, args, device)
    stop, stopping, start = [], False, time.perf_counter() - start
    for signum in signal.SIGINT, signal.SIGTERM:  # one finishes the step and saves, two kill
        signal.signal(signum, lambda s, _: sys.exit(128 + s) if stop else stop.append(s))
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None)
    while global_step + args.num_envs <= args.total_timesteps and not stopping:
        # act: uniformly at random at first, then the slow policy with exploration noise
        if global_step < args.learning_starts:
            actions = 2 * torch.rand((args.num_envs, act_dim), generator=rng, device=device) - 1
        else:
            actions = agent.act(
                agent, torch.as_tensor(obs).to(device, non_blocking=True), args, rng, "explore"
            )
        actions = actions.cpu().numpy()
        global_step += args.num_envs

        # learn from what is stored so far, while GPU or processes overlap it with the simulators
        if args.async_envs:
            envs.step_async(actions)
        while agent.updates < int(args.utd * (global_step - args.learning_starts) + 1e-9):
            metrics |= update(agent, buffer.sample(args.batch_size, rng), args, rng)
        while agent.alpha_updates * args.alpha_interval < global_step - args.learning_starts:
            update_alpha(agent, args)

        # step and store: where an episode ended, next_obs already belongs to the one after it
        step = envs.step_wait() if args.async_envs else envs.step(actions)
        next_obs, rewards, terminations, truncations, infos = step
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]
            for chart, key in zip(charts[:2], "rl", strict=True):
                metrics[chart] = float(infos["final_info"]["episode"][key][i])
        buffer.add(obs, actions, rewards, last_obs, terminations)
        obs = next_obs

        # log, evaluate, save
        last = global_step + args.num_envs > args.total_timesteps
        wall_time = round(time.perf_counter() - start, 3)
        row = {"global_step": global_step, "updates": agent.updates, "wall_time": wall_time}
        bar.update(args.num_envs)
        logging = last or global_step % args.log_every < args.num_envs
        evaluating = args.eval_every and (last or global_step % args.eval_every < args.num_envs)
        saving = last or stop or global_step % (args.checkpoint_every or math.inf) < args.num_envs
        if logging or evaluating or saving:  # a diverged run must not replace its last checkpoint
            metrics = {key: float(value) for key, value in metrics.items()}
            for key, value in (metrics | agent.state_dict()).items():
                if key[:6] != "charts" and not torch.as_tensor(value).isfinite().all():
                    raise SystemExit(f"diverged: {key} is NaN or infinite at step {global_step}")
        if logging and agent.updates:
            metrics["charts/SPS"] = round(global_step / wall_time, 1)
            logger.row("metrics", row | metrics, metrics)
            bar.set_postfix(episodic_return=metrics[charts[0]])
        for mode in agent.modes if evaluating else ():
            result = evaluate(agent, eval_envs, args, mode, run_dir / f"videos/{global_step}", stop)
            if stop:  # a signal does not wait for the evaluation, which is given up
                break
            plotted = {f"eval_{mode}/{key}": result[key] for key in ("return_mean", "return_std")}
            logger.row("evaluations", row | result, plotted)
            tqdm.write("step {global_step:,}: {mode} {return_mean:.1f}".format(**row, **result))
        stopping = bool(stop)  # decided once: a signal from here on waits for the next step
        if saving or stopping:
            save_run(run_dir, args, agent, buffer, envs, rng, row | {"metrics": metrics})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for resource in bar, logger.writer, envs, eval_envs:
        resource.close()
    if stopping:
        print(f"stopped; go on with --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop[0])
    return run_dir


if __name__ == "__main__":
    main(parse_args())
