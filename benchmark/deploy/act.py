"""Episodes of an exported policy by onnxruntime, numpy and gymnasium: no torch, no script.

This is the whole of what a program needs to act. The policy takes raw observations, flattened in
gymnasium's order, and standard normal noise; its actions go to the environment as they are.

    python benchmark/deploy/act.py policy.onnx
    python benchmark/deploy/act.py policy.onnx --episodes 3 --seed 7
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, output, run, text, whole
from benchmark.files import exists, fail, read_json, write_text

import numpy as np


class OnnxPolicy:
    """An exported policy in one thread: policy(one observation, noise) -> action or chunk."""

    def __init__(self, file: Path | bytes):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        model = file if isinstance(file, bytes) else str(file)
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model, options, providers=providers)
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        shapes = {x.name: x.shape[1:] for x in self.session.get_inputs()}
        self.noise_shape = tuple(shapes["noise"]) if "noise" in shapes else None

    def batch(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """obs (B, ...), noise (B, *noise_shape) -> actions (B, [h,] *action_shape)."""
        inputs = {"observation": obs}
        if noise is not None:
            inputs["noise"] = noise
        (actions,) = self.session.run(None, inputs)
        return actions

    def __call__(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        return self.batch(obs[None], None if noise is None else noise[None])[0]


@dataclass
class Plan:
    """How episodes begin, and what noise their actions get."""

    seeds: list[int]  # one per episode
    noise: np.ndarray | None = None  # (episodes, calls, *noise_shape); None: drawn
    max_steps: int = 10_000  # of an episode


def make(env_id: str, env_kwargs: str):
    """The environment as it is: own observations, actions in its own units."""
    import gymnasium as gym

    gym.logger.min_level = gym.logger.ERROR + 1  # it warns of v4
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "disable")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # module:Id is also looked for there
    if env_id.startswith("dm_control/"):
        importlib.import_module("shimmy")  # registers the ids
    return gym.make(env_id, **json.loads(env_kwargs))


def flatten(space, obs) -> np.ndarray:
    """(obs_dim,) float32, as the policy was trained on."""
    import gymnasium as gym

    if not isinstance(space, gym.spaces.Box):
        obs = gym.spaces.flatten(space, obs)
    return np.asarray(obs).astype(np.float32).reshape(-1)


def play(policy: Callable, noise_shape, env_id: str, env_kwargs: str, plan: Plan) -> list[float]:
    """The return of an episode per seed; policy(obs, noise) -> an action or a chunk of them."""
    returns = []
    for i, seed in enumerate(plan.seeds):
        env = make(env_id, env_kwargs)
        rng = np.random.default_rng(seed)
        np.random.seed(seed)  # noqa: NPY002  OGBench's mazes draw from the global generator
        obs, _ = env.reset(seed=seed)
        total = 0.0
        chunk = []
        calls = 0
        for _ in range(plan.max_steps):
            if not chunk:
                noise = None
                if plan.noise is not None and calls < plan.noise.shape[1]:
                    noise = plan.noise[i, calls]
                elif noise_shape is not None:  # also where an episode outlasts all of torch's
                    noise = rng.standard_normal(noise_shape, np.float32)
                actions = policy(flatten(env.observation_space, obs), noise)
                # a policy of chunks has a dimension more; they are executed one by one
                chunk = list(actions.reshape(-1, *env.action_space.shape))
                calls += 1
            action = chunk.pop(0).astype(env.action_space.dtype)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(np.asarray(reward).item())
            if terminated or truncated:
                break
        env.close()
        returns.append(total)
    return returns


def milliseconds(policy: Callable, obs: np.ndarray, noise_shape, calls: int = 500) -> float:
    """Median of a call for one observation, warm."""
    noise = None if noise_shape is None else np.zeros(noise_shape, np.float32)
    seconds = []
    for _ in range(calls + 50):
        start = time.perf_counter()
        policy(obs, noise)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[50:]))


def read_plan(options: argparse.Namespace) -> Plan:
    """--plan: what export.py wants played; else seeds from --seed on."""
    if options.plan is None:
        return Plan(list(range(options.seed, options.seed + options.episodes)))
    content = read_json(options.plan, ["seeds", "max_steps"])
    noise = options.plan.with_suffix(".npy")
    array = np.load(noise) if noise.exists() else None
    return Plan(content["seeds"], array, content["max_steps"])


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("policy", type=text, help="written by export.py, .onnx")
    parser.add_argument("--episodes", type=whole(1, 10_000), default=10, help="to play")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of the first episode")
    parser.add_argument("--env-id", type=text, help="instead of the policy's; needed for module:Id")
    parser.add_argument(
        "--plan", type=Path, help="JSON with seeds; noise beside it, as export.py's"
    )
    parser.add_argument("--output", type=output(".json"), help="JSON to write results to")
    return parser.parse_args()


def open_policy(path: Path) -> OnnxPolicy:
    """Refuse in one line what export.py has not written."""
    if not exists(path) or not path.is_file():
        fail(f"{path} does not exist, or is no file")
    try:
        policy = OnnxPolicy(path)
    except ModuleNotFoundError:
        raise
    except Exception:  # onnxruntime has kinds of its own
        fail(f"{path} is damaged, or no ONNX file")
    if "env_id" not in policy.metadata:
        fail(f"{path} was not written by export.py")
    if "obs_shape" in policy.metadata:
        fail(f"{path} acts on frames; episodes are played here of numbers alone")
    return policy


def main() -> None:
    options = parse()
    policy = open_policy(Path(options.policy))
    known = policy.metadata
    env_id = options.env_id or known["env_id"]
    if ":" in env_id and not options.env_id:
        module = env_id.partition(":")[0]
        fail(f"{options.policy} would import {module}; if you trust it, add --env-id {env_id}")
    try:
        make(env_id, known["env_kwargs"]).close()
    except Exception as error:  # of any environment
        fail(f"cannot make {env_id}: {error}")
    plan = read_plan(options)
    returns = play(policy, policy.noise_shape, env_id, known["env_kwargs"], plan)
    obs = np.zeros(int(known["obs_dim"]), np.float32)
    ms = milliseconds(policy, obs, policy.noise_shape)
    for seed, value in zip(plan.seeds, returns, strict=True):
        print(f"seed {seed}: return {value:.4f}")
    print(f"return {np.mean(returns):.2f} +- {np.std(returns):.2f} {ms:.3f} ms/action")
    if options.output:
        result = {"returns": returns, "ms": ms, "torch": "torch" in sys.modules}
        write_text(options.output, json.dumps(result))


if __name__ == "__main__":
    run(main)
