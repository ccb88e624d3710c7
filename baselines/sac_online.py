"""SAC: soft actor-critic, the Gaussian policy that flow policies are compared with.

A network gives the mean and the standard deviation of a Gaussian, which tanh squashes into [-1, 1].
The policy climbs the critics' gradient, and its entropy, which a learnt alpha holds at -act_dim.
Below, e ~ N(0, I), d is act_dim, and Q' are the target critics.

    sample        u = mean + std e,  a = tanh(u),  log pi = log N(u; mean, std) - sum log(1 - a^2)
    critic_loss   y = r + gamma (1 - terminated) (min(Q'_1, Q'_2)(s', a') - alpha log pi(a'|s')),
                  (Q_j(s, a) - y)^2
    policy_loss   alpha log pi(a|s) - min(Q_1, Q_2)(s, a)  for a new a at s
    update_alpha  log alpha (H - H_target)  with  H = -E[log pi],  H_target = -d

    python baselines/sac_online.py --env-id Ant-v4
    python baselines/sac_online.py --evaluate runs/<run>/policy.pt --eval-episodes 10

The defaults match fpmd_online.py's networks, critics and budget; CleanRL's setting:

    python baselines/sac_online.py --num-envs 1 --learning-starts 5000 --utd 1 --reward-scale 1 \
        --hidden-layers 2 --activation relu --log-std-range -5 2 --critic-lr 1e-3 --critic-steps 1 \
        --alpha-init 1 --alpha-lr 1e-3

Four parts: 1 METHOD, 2 TRAINING, 3 PLUMBING, 4 SPEED. Who stops after the second has read the
algorithm end to end, from env.step to the optimizers.

Paper: arXiv:1812.05905; code: CleanRL's sac_continuous_action.py, tianyyiii/flow_policy_iclr.
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
    seed: int = 1  # seeds networks, noise, replay sampling, warm-up actions and every episode
    total_timesteps: int = 1_000_000  # environment steps over all envs, warm-up included
    num_envs: int = 5  # parallel training environments
    exp_name: str = Path(__file__).stem  # second part of the run directory's name
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
    evaluate: str | None = None  # policy.pt to replay with its mean action, without training

    # --- algorithm: defaults match FPMD's setting; CleanRL's is the command above ---
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the moving averages (target critics)
    batch_size: int = 256  # transitions per update, B
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    learning_starts: int = 30_000  # environment steps with random actions before learning
    utd: float = 0.2  # gradient updates per environment step
    reward_scale: float = 0.2  # rewards are multiplied by this
    tanh_correction: bool = True  # log pi is the action's; without, that of u, as FPMD's authors do
    log_std_range: tuple[float, float] = (-20.0, 0.5)  # log std is clipped to this
    critic_lr: float = 3e-4  # Adam step size of the critics
    critic_steps: int = 2  # Adam steps on each critic gradient, as in FPMD; SAC's own is 1
    policy_lr: float = 3e-4  # Adam step size of the policy
    alpha_init: float = 2.718281828459045  # alpha at the start: e, as in the FPMD authors' SAC
    alpha_lr: float = 3e-4  # Adam step size of log alpha
    target_entropy_scale: float = 1.0  # alpha holds the policy's entropy at -scale * act_dim
    activation: Literal["mish", "gelu", "relu"] = "mish"  # after every hidden layer
    hidden_dim: int = 256  # width of the hidden layers of every network
    hidden_layers: int = 3  # their number

    # --- speed: how it is computed ---
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, mps
    compile: bool = True  # compile, and on CUDA capture, an update; the first ones take a minute
    precision: Literal["float32", "tf32"] = "float32"  # of matrix products; tf32: on a GPU
    torch_threads: int = 0  # CPU threads of torch, 0: at most 8; give 1 to side-by-side runs
    async_envs: bool = False  # one process per environment (pays off for slow simulators)


# ========================= 1 METHOD: networks, acting, learning =========================
def linear(in_dim: int, out_dim: int, fan_in: int, bias: bool = True) -> nn.Linear:
    """A linear layer with weights N(0, 1 / fan_in) cut at two std, as in haiku."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    std = fan_in**-0.5
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """Linear layers, with an activation after every hidden one."""

    def __init__(self, in_dim: int, out_dim: int, args: Args):
        activation = {"mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}[args.activation]
        hidden = []
        dim = in_dim
        for _ in range(args.hidden_layers):
            hidden += [linear(dim, args.hidden_dim, fan_in=dim), activation()]
            dim = args.hidden_dim
        super().__init__(*hidden, linear(dim, out_dim, fan_in=dim))


class GaussianPolicy(nn.Module):
    """A Gaussian over u given the state; the action is tanh(u)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.act_dim = act_dim
        self.log_std_range = args.log_std_range
        self.net = MLP(obs_dim, 2 * act_dim, args)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, obs_dim) -> mean and log std of u, (B, act_dim) each."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(*self.log_std_range)


class QNetwork(MLP):
    """An action value Q(s, a): obs (B, obs_dim), actions (B, act_dim) -> (B,)."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return super().forward(torch.cat([obs, actions], -1)).squeeze(-1)


class TwinCritic(nn.Module):
    """Two independent action values Q_1 and Q_2."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.q1 = QNetwork(obs_dim + act_dim, 1, args)
        self.q2 = QNetwork(obs_dim + act_dim, 1, args)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs (B, obs_dim), actions (B, act_dim) -> Q (2, B)."""
        return torch.stack([self.q1(obs, actions), self.q2(obs, actions)])


class Agent(nn.Module):
    """All that learns: networks, log alpha, optimizers."""

    counters = ("updates",)  # attributes that a checkpoint keeps

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.policy = GaussianPolicy(obs_dim, act_dim, args)
        self.critic = TwinCritic(obs_dim, act_dim, args)
        self.acting_policy = self.policy  # no moving average: what learns is also what acts
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))
        self.to(device)
        self.device = device
        self.updates = 0

        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "policy": adam(self.policy.parameters(), args.policy_lr),
            "alpha": adam([self.log_alpha], args.alpha_lr),
        }


# ---------------------------------------------------------------------------- acting
def sample(
    policy: nn.Module, obs: Tensor, e: Tensor, tanh_correction: bool
) -> tuple[Tensor, Tensor]:
    """a = tanh(u) for u = mean + std e, and log pi(a|s), or that of u without the correction.

    log pi = sum log N(e; 0, I) - log std - log(1 - a^2), whose last term is the correction.
    obs (B, obs_dim), noise e (B, act_dim) -> actions (B, act_dim), log_probs (B,).
    """
    mean, log_std = policy(obs)
    u = mean + log_std.exp() * e
    log_probs = -0.5 * e.square() - 0.5 * math.log(2 * math.pi) - log_std  # (B, act_dim)
    if tanh_correction:
        # log(1 - tanh(u)^2) in a form that stays finite where tanh(u) rounds to 1
        log_probs = log_probs - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return u.tanh(), log_probs.sum(-1)


@torch.no_grad()
def act_one_step(agent: Agent, obs: Tensor, _args: Args, _rng: Generator) -> Tensor:
    """As deployed: tanh of the mean, no noise, no critic; obs (B, obs_dim) -> (B, act_dim)."""
    mean, _ = agent.acting_policy(obs)
    return mean.tanh()


@torch.no_grad()
def act_explore(agent: Agent, obs: Tensor, _args: Args, rng: Generator) -> Tensor:
    """A draw from the policy, tanh(mean + std e): its own entropy is what explores."""
    mean, log_std = agent.acting_policy(obs)
    e = torch.randn(mean.shape, generator=rng, device=obs.device)
    return (mean + log_std.exp() * e).tanh()


MODES = {"one_step": act_one_step, "sampled": act_explore}  # of evaluation
DEPLOYED = "one_step"


def cost_of(_mode: str, _args: Args) -> tuple[int, int]:
    """Network evaluations per candidate (NFE) and candidates per action in this mode."""
    return 1, 1


# ---------------------------------------------------------------------------- learning
def critic_loss(
    critic: TwinCritic,
    target_critic: TwinCritic,
    batch: dict,
    next_actions: Tensor,
    bonus: Tensor,
    args: Args,
) -> tuple[Tensor, Tensor]:
    """Clipped double-Q regression: the loss and Q (2, B); only termination stops bootstrapping.

    next_actions a' (B, act_dim) and their entropy bonus -alpha log pi(a'|s') (B,).
    """
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], next_actions).amin(0) + bonus  # (B,)
        bootstrap = args.gamma * (1 - batch["terminations"])
        y = args.reward_scale * batch["rewards"] + bootstrap * next_q
    q = critic(batch["obs"], batch["actions"])  # (2, B)
    return (q - y).square().mean(1).sum(), q.detach()


def policy_loss(
    policy: nn.Module,
    critic: nn.Module,
    obs: Tensor,
    e: Tensor,
    alpha: Tensor,
    tanh_correction: bool,
) -> tuple[Tensor, Tensor]:
    """Mean of alpha log pi(a|s) - min(Q_1, Q_2)(s, a) for a from noise e (B, act_dim), and H.

    The gradient reaches the policy through a, so it is the critics' slope that improves it.
    """
    actions, log_probs = sample(policy, obs, e, tanh_correction)
    q = critic(obs, actions).amin(0)  # (B,)
    return (alpha * log_probs - q).mean(), -log_probs.mean()


def move_towards(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """Exponential moving average: slow <- (1 - tau) slow + tau fast."""
    with torch.no_grad():
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)


def update_critic(
    agent: Agent, batch: dict, next_actions: Tensor, bonus: Tensor, args: Args
) -> dict:
    """Adam steps of the critics on one gradient; SAC's authors take one."""
    critics = agent.critic, agent.target_critic
    loss, q = critic_loss(*critics, batch, next_actions, bonus, args)
    agent.optimizers["critic"].zero_grad()
    loss.backward()
    for _ in range(args.critic_steps):
        agent.optimizers["critic"].step()
    return {"losses/critic_loss": loss.detach(), "losses/q_values": q.mean()}


def update_policy(
    agent: Agent, obs: Tensor, e: Tensor, alpha: Tensor, args: Args, loss=None
) -> dict:
    """Adam step on new actions at obs from noise e (B, act_dim); loss: policy_loss, compiled."""
    networks = agent.policy, agent.critic
    loss, entropy = (loss or policy_loss)(*networks, obs, e, alpha, args.tanh_correction)
    agent.optimizers["policy"].zero_grad()
    loss.backward(inputs=list(agent.policy.parameters()))  # through the critics, not into them
    agent.optimizers["policy"].step()
    return {"losses/policy_loss": loss.detach(), "policy/entropy": entropy.detach()}


def update_alpha(agent: Agent, entropy: Tensor, args: Args) -> None:
    """Adam step on log_alpha (H - H_target): alpha grows as long as the entropy is too low."""
    agent.log_alpha.grad = entropy + args.target_entropy_scale * agent.policy.act_dim
    agent.optimizers["alpha"].step()


def update(
    agent: Agent, batch: dict, args: Args, rng: Generator, _improve_policy: bool, loss=None
) -> dict[str, Tensor]:
    """One gradient update from a batch of (B, ...) tensors; returns scalars for the log.

    Every update improves the policy. No counter of Python's is read, so that a CUDA graph can
    record it whole.
    """
    obs = batch["obs"]
    alpha = agent.log_alpha.detach().exp()
    shape = (2, len(obs), agent.policy.act_dim)
    e, next_e = torch.randn(shape, generator=rng, device=obs.device)
    with torch.no_grad():
        next_actions, log_probs = sample(
            agent.policy, batch["next_obs"], next_e, args.tanh_correction
        )
    metrics = update_critic(agent, batch, next_actions, -alpha * log_probs, args)
    metrics |= update_policy(agent, obs, e, alpha, args, loss)
    update_alpha(agent, metrics["policy/entropy"], args)
    move_towards(agent.target_critic, agent.critic, args.tau)
    return metrics | {"policy/alpha": alpha}


def prepare_update(_agent: Agent, _args: Args) -> bool:
    """Say whether the update at hand improves the policy: all of SAC's do."""
    return True


def follow_steps(_agent: Agent, _args: Args, _global_step: int) -> None:
    """What environment steps drive, not updates: nothing in SAC."""


# ======== 2 TRAINING: replay buffer, evaluation, the loop; the same in every script ========
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
        """Store one transition per env: arrays (num_envs, ...) under the names of the columns."""
        n, device = len(transitions["obs"]), self.rows.device
        columns = [np.reshape(transitions[name], (n, -1)) for name in self.shapes]
        rows = np.concatenate(columns, 1, dtype=np.float32)
        index = (self.position + torch.arange(n, device=device)) % len(self.rows)
        # one transfer; from pageable memory it has left the array when the call returns
        self.rows[index] = torch.from_numpy(rows).to(device, non_blocking=True)
        self.position = (self.position + n) % len(self.rows)
        self.size = min(self.size + n, len(self.rows))

    def sample(self, batch_size: int, rng: Generator) -> dict[str, Tensor]:
        """Uniformly, with replacement: tensors (batch_size, ...)."""
        index = torch.randint(self.size, (batch_size,), generator=rng, device=rng.device)
        return self.columns(self.rows[index])


def evaluate(act: Callable, agent: Agent, envs, args: Args, frames=None, stop=()):
    """One episode per env: returns and successes (NaN: unknown), (num_envs,); frames: to film."""
    rng = Generator(agent.device).manual_seed(args.seed)  # all evaluations start alike
    obs, _ = envs.reset(seed=[2 * args.seed + 1] * envs.num_envs)  # training has the even seeds
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
    # 0.2 * 5 must give 1, however it rounds
    return int(args.utd * (global_step - args.learning_starts) + 1e-9)


def train(agent: Agent, buffer: ReplayBuffer, envs, run, args: Args, rng: Generator, obs) -> None:
    """Act, learn, step, store; obs (num_envs, obs_dim) is where the envs are."""
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

        # learn from what is stored so far, while GPU or processes overlap it with the simulators
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
        row = {"obs": obs, "actions": actions, "rewards": rewards, "terminations": terminations}
        buffer.add(**row, next_obs=last_obs)
        obs = next_obs
        run.after_step()  # log, evaluate, save


# ======== 3 PLUMBING: environments, files, arguments; the same in every script ========
def fail(message: str) -> NoReturn:
    """Refuse bad input: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class SeededEpisodes(gym.Wrapper):
    """Seed every episode anew: its seed and actions rebuild it exactly, as no saved state can."""

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
    warnings.filterwarnings("ignore", ".*(is out of date|precision lowered|overflow encountered).*")
    if torch.multiprocessing.parent_process():  # a worker: Ctrl-C is for the run, which saves
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "disable")  # else dm_control warns
    mujoco = metadata.version("mujoco")
    if env_id.startswith("dm_control/"):
        if int(mujoco.split(".")[0]) >= 4:
            fail(f"{env_id} needs mujoco below 4, not {mujoco}: pip install 'mujoco>=3.17,<4'")
        import shimmy  # noqa: F401  registers the ids, in every worker process too
    render = {"render_mode": "rgb_array"} if film else {}
    try:
        env = gym.make(env_id, **render)
    except (gym.error.Error, ImportError) as error:
        near = ", ".join(difflib.get_close_matches(env_id, gym.registry, n=4, cutoff=0.4))
        fail(f"cannot make {env_id!r} (mujoco {mujoco}): {error} Registered ids near it: {near}")
    if film and hasattr(env.unwrapped, "mujoco_renderer") and env.unwrapped.model.ncam:
        env.unwrapped.mujoco_renderer.camera_id = 0  # it follows

    Box, actions = gym.spaces.Box, env.action_space
    if not (isinstance(actions, Box) and actions.is_bounded() and len(actions.shape) == 1):
        fail(f"{env_id} has actions {actions}; only bounded vectors of numbers (Box) will do")
    space = env.observation_space
    leaves = space.values() if isinstance(space, gym.spaces.Dict) else [space]
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


def write_video(frames: list, env: gym.Env, file: Path) -> None:
    """Write one episode of env to <file>-episode-0.mp4."""
    from gymnasium.utils.save_video import save_video  # slow to import

    dt = getattr(env.unwrapped, "dt", 1 / 30)  # MuJoCo's and dm_control's own clock
    save_video(frames, file.parent, lambda _: True, name_prefix=file.name, fps=1 / dt)


def describe_machine(device: torch.device) -> dict:
    """Versions, commit and hardware."""
    versions = {"python": sys.version.split()[0]}
    for package in "torch", "gymnasium", "mujoco", "dm-control", "numpy":
        if find_spec(package.replace("-", "_")):  # dm-control may be missing
            versions[package] = metadata.version(package)
    git = "git describe --always --dirty --abbrev=40"
    folder = Path(__file__).parent
    commit = subprocess.run(git, shell=True, cwd=folder, capture_output=True, text=True)
    name = sys.platform
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists() and "model name\t: " in cpuinfo.read_text():
        name = cpuinfo.read_text().split("model name\t: ")[1].splitlines()[0]
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
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= global_step]
    os.truncate(path, len(header + "".join(kept)))


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
        charts = "charts/episodic_return", "charts/episodic_length", "charts/SPS"
        self.metrics = dict.fromkeys(charts, math.nan)  # the first columns of metrics.csv
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

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            where |= {"id": self.dir.name, "resume": "allow"}
            wandb.init(**where, config=asdict(args), sync_tensorboard=True)
            wandb.save(f"{self.dir}/videos/*.mp4", base_path=self.dir)
        self.writer = SummaryWriter(self.dir, purge_step=self.global_step + 1)
        progress = {"total": args.total_timesteps, "initial": self.global_step}
        self.bar = tqdm(**progress, unit="step", disable=None)

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
        self.now = {"global_step": self.global_step, "updates": self.agent.updates}
        self.now["wall_time"] = round(time.perf_counter() - self.start, 3)
        if self.due(args.log_every) and self.agent.updates:
            self.log()
        if args.eval_every and self.due(args.eval_every):
            self.evaluate()
        self.stopped = bool(self.stop)  # decided once: a later signal waits for the next step
        if self.stopped or self.due(args.checkpoint_every):
            self.save()

    def refuse_divergence(self) -> None:
        """End a run that diverged before it replaces its last good checkpoint."""
        self.metrics = {name: float(value) for name, value in self.metrics.items()}
        for name, value in (self.metrics | self.agent.state_dict()).items():
            finite = torch.as_tensor(value).isfinite().all()
            if not finite and not name.startswith("charts/"):
                raise SystemExit(f"diverged: {name} is NaN or infinite at step {self.global_step}")

    def write(self, name: str, row: dict, plotted: dict) -> None:
        """Append to <name>.csv, columns from the first row, NaN empty; plot in TensorBoard."""
        with (self.dir / f"{name}.csv").open("a") as file:
            if file.tell() == 0:
                file.write(",".join(row) + "\n")
            cells = ["" if x != x else str(x) for x in row.values()]  # NaN is not itself
            file.write(",".join(cells) + "\n")
        for key, value in plotted.items():
            self.writer.add_scalar(key, value, self.global_step)

    def log(self) -> None:
        self.refuse_divergence()
        self.metrics["charts/SPS"] = round(self.global_step / self.now["wall_time"], 1)
        self.write("metrics", self.now | self.metrics, self.metrics)
        self.bar.set_postfix(episodic_return=self.metrics["charts/episodic_return"])

    def evaluate(self) -> None:
        """Evaluate every mode; a signal does not wait for it, but gives it up."""
        self.refuse_divergence()
        for mode, act in MODES.items():
            frames = [] if self.args.capture_video and mode == DEPLOYED else None
            with torch.compiler.set_stance("force_eager"):  # not worth compiling for
                results = evaluate(act, self.agent, self.eval_envs, self.args, frames, self.stop)
            if self.stop:
                return
            if frames:
                write_video(frames, self.eval_envs.envs[0], self.dir / f"videos/{self.global_step}")
            returns, successes = results
            nfe, candidates = cost_of(mode, self.args)
            row = {"mode": mode, "nfe": nfe, "num_candidates": candidates}
            scores = {"return_mean": returns.mean(), "return_std": returns.std()}
            row |= scores | {"success_rate": successes.mean()}
            row["returns"] = " ".join(f"{x:.4f}" for x in returns)
            plotted = {f"eval_{mode}/{name}": x for name, x in scores.items()}
            self.write("evaluations", self.now | row, plotted)
            tqdm.write(f"step {self.global_step:,}: {mode} {returns.mean():.1f}")

    def save(self) -> None:
        """policy.pt to use the policy, checkpoint.pt to go on training exactly where it stopped."""
        self.refuse_divergence()
        agent = self.agent
        args = asdict(replace(self.args, resume=None))
        policy = {"policy": agent.acting_policy.state_dict(), "critics": agent.critic.state_dict()}
        policy |= {"args": args, "global_step": self.global_step}
        size = self.buffer.size
        episodes = self.envs.get_attr("episode")
        state = {
            "args": args,
            "metrics": self.metrics,
            "agent": agent.state_dict(),
            "counters": {name: getattr(agent, name) for name in agent.counters},
            "optimizers": {name: opt.state_dict() for name, opt in agent.optimizers.items()},
            "buffer": {name: x[:size].clone() for name, x in self.buffer.data.items()},
            "position": self.buffer.position,
            "rng": self.rng.get_state(),
            "device": self.rng.device.type,
            "episodes": [e | {"actions": torch.tensor(np.array(e["actions"]))} for e in episodes],
        }
        for name, content in ("policy.pt", policy), ("checkpoint.pt", self.now | state):
            torch.save(content, self.dir / f"{name}.tmp")
            os.replace(self.dir / f"{name}.tmp", self.dir / name)  # a crash leaves one whole

    def restore(self, saved: dict) -> np.ndarray:
        """Undo save; returns the observations the envs were at."""
        self.global_step = saved["global_step"]
        self.start -= saved["wall_time"]
        self.metrics = saved["metrics"]
        self.agent.load_state_dict(saved["agent"])
        for name, value in saved["counters"].items():
            setattr(self.agent, name, value)
        for name, optimizer in self.agent.optimizers.items():
            lr = optimizer.param_groups[0]["lr"]  # perhaps the tensor agent.policy_lr
            optimizer.load_state_dict(saved["optimizers"][name])
            optimizer.param_groups[0]["lr"] = lr
        self.buffer.position = saved["position"]
        self.buffer.size = len(saved["buffer"]["rewards"])
        for name, column in saved["buffer"].items():
            self.buffer.data[name][: self.buffer.size] = column
        self.rng.set_state(saved["rng"])
        return np.stack(self.envs.call("restore", saved["episodes"]))

    def close(self) -> None:
        for resource in self.bar, self.writer, self.envs, self.eval_envs:
            resource.close()


def load(path: str, name: str) -> tuple[Path, dict]:
    """Read what Run.save wrote, given the file or its folder; refuse anything else."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    keys = {"args", "global_step", "episodes" if name == "checkpoint.pt" else "policy"}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        assert keys <= set(content) and set(content["args"]) == {f.name for f in fields(Args)}
    except Exception:  # torch raises many kinds for a damaged file
        fail(f"{file} is missing, damaged or no {name} of this version of {Path(__file__).name}")
    return file, content


MAY_BE_ZERO = {"seed", "eval_every", "checkpoint_every", "torch_threads"}
AT_MOST_ONE = {"gamma", "tau"}
RISING = {"log_std_range"}
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
        holds = -math.inf < first < last < math.inf
        rules.append((holds, f"{flag(name)} {first} {last} must be finite and rise"))
    updates = args.utd * (args.total_timesteps - args.learning_starts)
    rules.append((updates >= 1, f"--utd {args.utd} gives no update; raise it or --total-timesteps"))
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


class StopSignal:
    """Note the first SIGINT or SIGTERM, so that the run saves; the second exits at once."""

    def __init__(self):
        self.signum = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        # Compilers inherit this mask and so outlive a terminal's Ctrl-C. This process still
        # hears of it, through the thread of TensorBoard's writer, which is older than the mask.
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


# ================= 4 SPEED: compiled and recorded updates, the deployed policy ==============
class FastMish(nn.Mish):
    """Mish x tanh(softplus(x)); compiled, with one exponential, most of what it costs."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)  # eager: one pass over memory counts for more
        e = x.clamp(max=20).exp()  # from there on Mish is x to float precision
        n = e * (e + 2)
        return x * n / (n + 2)


class Captured:
    """function(agent, inputs, args, rng, *key) as one CUDA graph per key, a single launch.

    It reads and writes the addresses of its recording: inputs are copied there, outputs hold until
    the next call. The first three calls are not recorded: they compile, choose kernels, allocate.
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
            graph.register_generator_state(rng)  # each replay draws on where the last one stopped
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
    """The two functions compiled, and on CUDA recorded; or they themselves, and a line why."""
    device = agent.device
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler or Triton; torch has many ways to say so
        print(f"going on without --compile: {str(error).splitlines()[0]}", file=sys.stderr)
        return explore, improve
    for module in agent.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Mish):
                setattr(module, name, FastMish())
    for network in agent.policy, agent.critic, agent.target_critic:
        network.compile(dynamic=False)
    improve = partial(improve, loss=torch.compile(policy_loss, dynamic=False))
    if device.type != "cuda":
        return explore, improve
    torch.cuda.synchronize(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # the default one cannot be captured
    return Captured(explore), Captured(improve)


def replay(args: Args, agent: Agent, envs) -> None:
    """--evaluate: episodes of a saved policy as it is deployed, and its time per action."""
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
    torch.set_num_threads(args.torch_threads or min(8, torch.get_num_threads()))
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    warnings.filterwarnings("ignore", ".*(capturable=True|float32_matmul_precision).*")
    if args.capture_video and not {"DISPLAY", "MUJOCO_GL"} & os.environ.keys():
        fail(
            "--capture-video without a screen needs OpenGL: apt-get install libegl1, MUJOCO_GL=egl"
        )
    envs = make_envs(args.env_id, args.num_envs, args.async_envs)  # first, because it may fork
    film = args.capture_video  # which wants the simulators in this process
    eval_envs = make_envs(args.env_id, args.eval_episodes, args.async_envs and not film, film)
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    torch.manual_seed(args.seed)  # the networks' initial weights
    agent = Agent(obs_dim, act_dim, args, device)
    if args.evaluate:
        return replay(args, agent, eval_envs)

    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    rng = Generator(device).manual_seed(args.seed)  # random actions, noise, replay sampling
    stop = StopSignal()
    run = Run(args, agent, buffer, envs, eval_envs, rng, stop)
    print(f"{args.env_id}: {obs_dim} observations, {act_dim} actions; writing to {run.dir}")
    with stop:
        train(agent, buffer, envs, run, args, rng, run.first_obs)
    run.close()
    if run.stopped:
        print(f"stopped; go on with --resume {run.dir}", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    return run.dir


if __name__ == "__main__":
    main(parse_args())
