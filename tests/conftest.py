"""What all tests share: the scripts under test, small settings, main() in an empty folder, a field
and a network whose outputs are known independently."""

import contextlib
import copy
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fork_server import PATIENCE, ForkServer
from torch import nn

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*_online.py"), *ROOT.glob("baselines/*_online.py")]
FILES = {path.stem: path for path in sorted(FILES)}  # every script
OFFLINE = [name for name in FILES if "offline" in name]  # start from a dataset; own test files
# their environments are rendered and their agents take frames: own test file, and where the
# generic tests need no environment of numbers
PIXELS = [name for name in FILES if "pixels" in name]
SCRIPTS = [name for name in FILES if name not in [*OFFLINE, *PIXELS]]
OF_NUMBERS = [name for name in FILES if name not in PIXELS]  # their environments give numbers
FLOWS = [name for name in SCRIPTS if FILES[name].parent == ROOT]
FPMD = ["fpmd_meanflow_online", "fpmd_online"]  # the published method
STEPPED = [name for name in FLOWS if name != "fpmd_plus_online"]  # T jumps in training
CANDIDATES = [*FLOWS, "dpmd_online"]  # they generate N and take the best
MIRROR = [*FPMD, "dpmd_online"]  # policy mirror descent, whatever the policy
MODES_OF = {name: ["one_step", "best_of_n"] for name in FLOWS}  # of evaluation, deployed first
MODES_OF["dpmd_online"] = ["one_candidate", "one_step", "best_of_n"]
MODES_OF["sac_online"] = ["one_step", "sampled"]
FPMD_PIXELS = [name for name in PIXELS if "fpmd" in name]
MODES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])  # a toy's four points
SMALL = {
    "total_timesteps": 400,
    "learning_starts": 100,
    "num_envs": 2,
    "batch_size": 16,
    "buffer_size": 10_000,
    "num_candidates": 2,
    "flow_steps": 2,
    "target_kl": 0.3,  # two candidates cannot be farther from 1 / N than log 2
    "hidden_dim": 16,
    "log_every": 100,
    "eval_every": 0,
    "compile": False,
    "torch_threads": 1,
    "device": "cpu",
}


SEEN = {"image_size": 24, "encoder_channels": 4, "feature_dim": 8, "action_repeat": 1}
SEEN |= {"async_envs": False}


def small(script):
    """SMALL, for any script."""
    return SMALL | (SEEN if script.__name__ in PIXELS else {})


def obs_of(script, obs_dim=3):
    """What an Agent is told of its observations: how many numbers, or the shape of a stack."""
    return (3, 24, 24, 3) if script.__name__ in PIXELS else obs_dim


def images_batch(batch_size=16, act_dim=2, seed=0, shape=(3, 24, 24, 3)):
    """A batch of noise, as a script from pixels samples it."""
    draw = rng(seed)
    images = torch.randint(0, 256, (2, batch_size, *shape), generator=draw, dtype=torch.uint8)
    return {
        "obs": images[0],
        "next_obs": images[1],
        "actions": 2 * torch.rand((batch_size, act_dim), generator=draw) - 1,
        "rewards": torch.randn(batch_size, generator=draw),
        "terminations": torch.zeros(batch_size),
    }


# here one script is tested fast and the others slowly: what is tested is mostly the same text
FAST = {"fpmd_online", "fpmd_meanflow_pixels_online"}
ONE_IS_FAST = {"test_probes", "test_resume", "test_data", "test_speed", "test_trust", "test_pixels"}
ONE_IS_FAST |= {"test_video_of_a_replay", "test_a_script_runs_alone"}
ONE_IS_FAST |= {"test_triton_is_loaded_before_opengl", "test_run_directory"}
ONE_IS_FAST |= {"test_environments_train_with_the_same_command"}
# but not what SAC from pixels has alone
OF_SAC_ALONE = {"test_sac_acts_by_its_mean_or_by_a_sample"}
OF_SAC_ALONE |= {"test_sac_losses_against_their_formulas"}
OF_SAC_ALONE |= {"test_a_sac_update_hands_over_the_right_numbers"}


# and here one script is tested alone: harder tests, run for all, include what these would show
ONE_IS_ENOUGH = {"test_constant_reward", "test_reward_depends_on_observation"}
ONE_IS_ENOUGH |= {"test_video_of_a_replay"}
# of those from pixels, where what trains or starts a program is the same text in all
OF_PIXELS = """
    test_a_run_stores_what_happened
    test_other_stacks
    test_resumed_equals_uninterrupted_when_frames_were_overwritten
    test_asynchronous_envs_are_the_same_run
    test_a_kill_between_frames_and_checkpoint_loses_nothing
    test_frames_that_do_not_fit_are_refused
    test_what_moved_has_a_stack_of_its_own
    test_a_checkpoint_that_contradicts_itself_is_refused
    test_a_film_is_made_of_what_the_agent_saw
    test_the_size_of_the_frames_is_said
    test_what_cannot_be_seen_is_refused_in_one_line
    test_a_single_frame_does_not_show_velocity
    test_a_rendered_run_resumes_to_the_bit
    test_a_camera_that_is_not_there_is_refused
    test_pictures_have_the_size_and_the_camera_asked_for
    test_without_opengl_it_says_what_to_install
"""
ONE_IS_ENOUGH |= set(OF_PIXELS.split())
# and here those whose critics, or whose rules and files, have a text of their own
OWN_TEXT_ONLY = {"test_time_limit_is_no_termination", "test_reward_comes_later"}
OWN_TEXT_ONLY |= {"test_reward_depends_on_both"}
OWN_TEXT_ONLY |= {"test_flags_and_environments_are_refused_in_one_line"}
OWN_TEXT_ONLY |= {"test_files_of_runs_are_refused_in_one_line"}
LIKE_OTHERS = {"fpmd_meanflow_online", "dpmd_online", "mvp_offline_to_online"}
ALWAYS_SLOW = {"test_time_limit_is_no_termination", "test_reward_depends_on_both"}
ALWAYS_SLOW |= {"test_constant_reward", "test_reward_depends_on_observation"}
ALWAYS_SLOW |= {"test_ray_survives_the_same_kills"}
ALWAYS_SLOW |= {"test_end_to_end_on_real_physics", "test_a_moving_square_is_followed"}
ALWAYS_SLOW |= {"test_asynchronous_envs_are_the_same_run", "test_the_program_as_it_is_typed"}
ALWAYS_SLOW |= {"test_a_graph_of_frames_acts_as_its_script"}
ALWAYS_SLOW |= {"test_a_policy_is_what_acts_and_knows_sizes_and_bounds"}


# a shell's background job ignores Ctrl-C, and so would the programs under test
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The README's command leaves out what is marked slow; .ci/run has it run afterwards."""
    dropped = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        script = parameters.get("script", parameters.get("name"))
        names = {item.module.__name__, item.originalname}
        another = script in FILES and script not in FAST and not names & OF_SAC_ALONE
        if names & ALWAYS_SLOW or (names & ONE_IS_FAST and another):
            item.add_marker(pytest.mark.slow)
        if (names & ONE_IS_ENOUGH and another) or (names & OWN_TEXT_ONLY and script in LIKE_OTHERS):
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def wait_for(condition, seconds=PATIENCE):
    """What condition() returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def no_opengl():
    """Why nothing can be rendered here, or "" where it can."""
    probe = "import mujoco; mujoco.GLContext(8, 8).free()"
    env = {"MUJOCO_GL": "egl", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=env)
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


def known(script, settings):
    """Those of the settings that the script has: SAC has no candidates and no steps."""
    return {key: value for key, value in settings.items() if hasattr(script.Args, key)}


def as_flags(settings):
    """The command line for Args(**settings)."""
    flags = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        is_switch = isinstance(value, bool)
        flags.append(f"--{'' if value else 'no-'}{name}" if is_switch else f"--{name}={value}")
    return flags


one_only = pytest.mark.parametrize("script", ["fpmd_online"], indirect=True)
fpmd_only = pytest.mark.parametrize("script", FPMD, indirect=True)
stepped_only = pytest.mark.parametrize("script", STEPPED, indirect=True)
flows_only = pytest.mark.parametrize("script", FLOWS, indirect=True)
# torch.compile without the C++ at its end, whose making takes most of the time: test_speed.py
TRACED = "aot_eager_decomp_partition"
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


@pytest.fixture(scope="session")
def server():
    """Starts programs without their imports' seconds."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_environment_variables():
    """A script chooses MuJoCo's OpenGL for its whole process; the next test chooses anew."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each algorithm's script, imported as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(env_id=..., ...) trains at SMALL size in an empty folder; returns the run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    return lambda **changes: script.main(script.Args(**(known(script, SMALL) | changes)))


def load(run_dir: Path, name: str = "checkpoint.pt") -> dict:
    """What a run saved; the buffer's rows by column."""
    content = torch.load(run_dir / name, weights_only=True)
    if isinstance(content.get("buffer"), torch.Tensor):  # from pixels it has parts already
        content["buffer"] = columns_of(content)
    return content


def columns_of(checkpoint: dict) -> dict:
    """obs (n, obs_dim), actions (n, act_dim), rewards (n,) ... of a replay buffer's rows."""
    obs_dim = checkpoint["envs"]["obs"].shape[1]
    act_dim = checkpoint["envs"]["episodes"][0]["actions"].shape[1]
    sizes = {"obs": obs_dim, "actions": act_dim, "rewards": 1, "next_obs": obs_dim}
    sizes |= {"terminations": 1}
    if checkpoint["buffer"].shape[1] > sum(sizes.values()):
        sizes["ends"] = 1
    parts = checkpoint["buffer"].split(list(sizes.values()), 1)
    named = zip(sizes, parts, strict=True)
    return {name: x if name in ("obs", "actions", "next_obs") else x[:, 0] for name, x in named}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class OneStep(nn.Module):
    """A field whose one step over all of the flow's time carries noise z to carry(z).

    FPMD-R and MVP add its answer to z; FPMD-M and FPMD+, whose noise is at time 1, subtract it.
    Unless told the script, a call with two times is taken for one of FPMD-M's.
    """

    def __init__(self, carry, act_dim=1, script=None):
        super().__init__()
        self.carry, self.act_dim, self.calls = carry, act_dim, []
        names = "fpmd_meanflow_online", "fpmd_plus_online"
        self.adds = script is not None and script.__name__ not in names

    def forward(self, obs, z, *times):
        self.calls.append((obs, z, *times))
        step = self.carry(z) - z
        return step if self.adds or len(times) == 1 else -step


def fit(script, draw, updates, lr, hidden_dim):
    """FPMD's policy after regression on targets and weights, draw(256) -> (256, act_dim), (256,).

    Steps are the script's own, the learning rate falls to 0. MVP's is in test_mvp.py.
    """
    torch.manual_seed(0)
    act_dim, obs, generator = draw(256)[0].shape[1], torch.zeros(256, 1), rng()
    args = script.Args(hidden_dim=hidden_dim)
    agent = script.Agent(1, act_dim, args, torch.device("cpu"))
    for update in range(updates):
        agent.policy_lr.fill_(lr * (1 - update / updates))
        script.update_policy(agent, obs, *draw(256), args, generator)
    return agent.policy


def act(script, agent, obs, args, rng, mode):
    """Actions in a mode of evaluation, or as in training: "explore"."""
    function = script.act_explore if mode == "explore" else script.MODES[mode]
    return function(agent, obs, args, rng)


def one_update(script, agent, batch, args, rng, improve=None):
    """What the training loop does for one update; improve may be `script.update` made faster."""
    improve_policy = script.prepare_update(agent, args)
    metrics = (improve or script.update)(agent, batch, args, rng, improve_policy)
    agent.updates += 1
    return metrics


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: what ran while it was recording, replay runs again."""

    recording = None

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph, stream=None):
        """Stands in for torch.cuda.graph."""
        cls.recording = graph
        try:
            yield
        finally:
            cls.recording = None

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        outputs = self.function()
        pairs = zip(outputs, self.outputs, strict=True)
        if isinstance(outputs, dict):
            pairs = [(outputs[key], self.outputs[key]) for key in self.outputs]
        for new, held in pairs:
            held.copy_(new)


def recordable(function):
    """The function, but while a FakeGraph records it computes without a trace, as CUDA's would.

    A real graph needs nothing of the kind: it records what is launched and launches nothing.
    """

    def wrapper(agent, inputs, args, rng, *key):
        graph = FakeGraph.recording
        if graph is None:
            return function(agent, inputs, args, rng, *key)
        weights, draws = copy.deepcopy(agent.state_dict()), rng.get_state()
        states = {name: copy.deepcopy(o.state_dict()) for name, o in agent.optimizers.items()}
        graph.outputs = function(agent, inputs, args, rng, *key)
        graph.function = lambda: function(agent, inputs, args, rng, *key)
        agent.load_state_dict(weights)
        rng.set_state(draws)
        for name, state in states.items():
            (group,) = agent.optimizers[name].param_groups
            lr = group["lr"]  # maybe the agent's tensor, which must stay the same one
            agent.optimizers[name].load_state_dict(state)
            agent.optimizers[name].param_groups[0]["lr"] = lr
        return graph.outputs

    return wrapper


def set_statistics(agent, *values):
    """Running mean and std of Q over states, and its std within a state, or the first of them."""
    names = ("q_mean", "q_std", "q_std_within")[: len(values)]
    for name, value in zip(names, values, strict=True):
        getattr(agent, name).fill_(value)


def get_statistics(agent):
    return torch.stack([agent.q_mean, agent.q_std, agent.q_std_within])


def randomise(module, seed):
    """Weights and biases of a size that makes every equation matter."""
    generator = rng(seed)
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)


def distance(values, cdf):
    """Kolmogorov distance to a law; 95 % of draws are below 1.36 / sqrt(len(values))."""
    return (cdf(values.sort().values) - torch.arange(len(values)) / len(values)).abs().max()


def count(module):
    return sum(p.numel() for p in module.parameters())


def spy(monkeypatch, owner, name):
    """Let a function of a script run as ever, and keep (arguments, result) of every call."""
    function, calls = getattr(owner, name), []

    def wrapper(*args):
        snapshot = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        calls.append((snapshot, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(xs, ys):
    """Per tensor: equal to the bit?"""
    return [x.equal(y) for x, y in zip(xs, ys, strict=True)]


def layers(net):
    """The modules of a script's MLP in order; the first layer's parts count as one linear layer."""
    return list(net) if isinstance(net, nn.Sequential) else [net.first, *net.rest]


def first_weight(net):
    """The first layer's weight (out, in), its parts side by side."""
    first = layers(net)[0]
    return torch.cat([part.weight.detach() for part in getattr(first, "parts", [first])], 1)


def numpy_batch_norm(module, x):
    """By the batch's mean and variance in training, else by their moving averages; in float64."""
    mean, var = x.mean(0), x.var(0)
    if not module.training:
        mean, var = (v.double().numpy() for v in (module.running_mean, module.running_var))
    x = (x - mean) / np.sqrt(var + module.eps)
    weight, *bias = (p.detach().double().numpy() for p in module.parameters())
    return x * weight + sum(bias)


def numpy_mlp(net, x):
    """The script's linear layers, norms and activation, in float64.

    x are all inputs side by side, in the order of the first layer's parts.
    """
    first, *rest = layers(net)
    x = x @ first_weight(net).double().numpy().T
    for bias in (p.detach().double().numpy() for p in first.parameters() if p.ndim == 1):
        x = x + bias
    for module in rest:
        weights = [p.detach().double().numpy() for p in module.parameters()]
        if isinstance(module, nn.Linear):
            x = x @ weights[0].T + sum(weights[1:])
        elif isinstance(module, nn.LayerNorm):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
            x = x * weights[0] + weights[1]
        elif isinstance(module, nn.BatchNorm1d):
            x = numpy_batch_norm(module, x)
        elif isinstance(module, nn.GELU):
            x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        elif isinstance(module, nn.ReLU):
            x = np.maximum(x, 0)
        else:
            x = x * np.tanh(np.log1p(np.exp(x)))
    return x


def to_nearest_mode(actions):
    """Mean distance to the nearest of MODES, and the share of actions at each of them."""
    distances, modes = torch.cdist(actions, MODES).min(1)
    return distances.mean().item(), torch.bincount(modes, minlength=4) / len(actions)


def numpy_time_embedding(t):
    """0.25 [sin(t f), cos(t f)] with f_j = 10000^(-j/8), (..., 1) -> (..., 16)."""
    angles = t * 10_000.0 ** (-np.arange(8) / 8)
    return 0.25 * np.concatenate([np.sin(angles), np.cos(angles)], -1)
