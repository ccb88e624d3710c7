"""A trained policy as ONNX or torch.export's program, everything around it inside the graph.

The graph takes raw observations and standard normal noise and gives actions in the environment's
own units: prior_std, the normalisation of observations, the clip and the rescaling are in it, the
batch size is free. Metadata say what it is of. SAC takes no noise; DPMD takes one for each of its T
steps; a policy of chunks gives (batch, h, ...). A policy from pixels takes stacks of bytes, and its
encoder is in the graph; no episodes are played with it.

Before anything is written the graph is compared with the script: the largest difference over 1,000
observations, and ten episodes by the graph alone (by onnxruntime in a process without torch) beside
the same episodes by torch, with the same noise.

    python benchmark/deploy/export.py runs/<run> --output policy.onnx
    python benchmark/deploy/export.py policy.pt --output policy.pt2 --episodes 0
"""

import argparse
import copy
import importlib.util
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, output, run, text, whole
from benchmark.deploy import act, policies
from benchmark.deploy.policies import Trained
from benchmark.files import exists, fail, whole_file

import numpy as np
import torch
from torch import Tensor, nn

OPSET = 20  # the first with GELU's tanh formula as one operator
CHECKED = 1_000  # observations
TOLERANCE = 1e-4  # largest difference to torch, as a share of half an action's range
ONNX_PACKAGES = "onnx", "onnxscript", "onnxruntime"


# ---------------------------------------------------------------------------- formats
def describe(trained: Trained) -> dict[str, str]:
    """Metadata of a graph; bounds as JSON lists."""
    saved = trained.saved
    low, high = trained.bounds.tolist()
    found = {
        "algorithm": saved["algorithm"],
        "script": saved["script"],
        "commit": saved["commit"],
        "global_step": str(saved["global_step"]),
        "env_id": trained.args.env_id,
        "env_kwargs": trained.args.env_kwargs,
        "act_dim": str(saved["act_dim"]),
        "action_low": json.dumps(low),
        "action_high": json.dumps(high),
    }
    if trained.sees_frames:
        found["obs_shape"] = json.dumps(saved["obs_shape"])
    else:
        found["obs_dim"] = str(saved["obs_dim"])
    if trained.chunk_size:
        found["chunk_size"] = str(trained.chunk_size)
    return found


def examples(trained: Trained) -> tuple[Tensor, ...]:
    """Inputs to trace with: a batch of three, as sizes of one are taken for constants."""
    inputs = [trained.observation(3)]
    if trained.actor.noise_shape:
        inputs.append(torch.zeros(3, *trained.actor.noise_shape))
    return tuple(inputs)


def free_batch(inputs: tuple[Tensor, ...]) -> dict:
    """Dynamic shapes of EnvironmentPolicy.forward(*inputs): the batch size is free."""
    batch = torch.export.Dim("batch")
    return {"inputs": tuple({0: batch} for _ in inputs)}


def with_fast_activations(model: nn.Module, module) -> nn.Module:
    """A copy in which Mish is the script's FastMish, which is traced as one exponential."""
    model = copy.deepcopy(model)
    if hasattr(module, "FastMish"):
        for part in list(model.modules()):
            for name, child in part.named_children():
                if isinstance(child, nn.Mish):
                    setattr(part, name, module.FastMish())
    return model


def to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], metadata: dict[str, str]) -> bytes:
    """An ONNX file: inputs observation and noise, output action; the compiler is not needed.

    inputs: of model.forward(*inputs), for a batch of two or more.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecated calls
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=["observation", "noise"][: len(inputs)],
            output_names=["action"],
            dynamic_shapes=free_batch(inputs),
            verbose=False,
        )
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def to_program(model: nn.Module, inputs: tuple[Tensor, ...], metadata: dict[str, str]) -> bytes:
    """A file for torch.export.load; metadata.json lies inside."""
    program = torch.export.export(model, inputs, dynamic_shapes=free_batch(inputs))
    stream = io.BytesIO()
    extra = {"metadata.json": json.dumps(metadata)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not on a CPU
        torch.export.save(program, stream, extra_files=extra)
    return stream.getvalue()


def serialise(trained: Trained, suffix: str) -> bytes:
    """The file's content in the format of its suffix."""
    model = trained.in_own_units()
    rest = examples(trained), describe(trained)
    if suffix == ".onnx":
        return to_onnx(with_fast_activations(model, trained.module), *rest)
    return to_program(model, *rest)


def batched(content: bytes, suffix: str) -> Callable:
    """The file's content as a function of arrays: (obs, noise or None) -> actions, by batch."""
    if suffix == ".onnx":
        return act.OnnxPolicy(content).batch
    return by_torch(torch.export.load(io.BytesIO(content)).module())


def by_torch(model: Callable) -> Callable:
    """A torch module as a function of arrays: (obs, noise or None) -> actions, by batch."""

    @torch.no_grad()
    def call(obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        arrays = [obs] if noise is None else [obs, noise]
        return model(*map(torch.from_numpy, arrays)).numpy()

    return call


def single(batch: Callable) -> Callable:
    """The same for one observation, without a batch: -> an action, or a chunk."""
    return lambda obs, noise: batch(obs[None], None if noise is None else noise[None])[0]


# ---------------------------------------------------------------------------- checks
def difference(trained: Trained, batch: Callable, obs: Tensor) -> tuple[float, float]:
    """Largest difference to the script's own act: as it is, and as a share of half the range.

    obs (B, ...); the noise is drawn from a seed of its own.
    """
    expected = policies.reference(trained, obs, seed=1)
    noise = trained.actor.draw(len(obs), torch.Generator().manual_seed(1))
    found = torch.from_numpy(batch(obs.numpy(), None if noise is None else noise.numpy()))
    if found.shape != expected.shape:
        raise RuntimeError(f"actions of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    error = (found.double() - expected).abs()
    low, high = trained.bounds.double()
    return error.max().item(), (error / ((high - low) / 2)).max().item()


def observations(trained: Trained, played: policies.Episodes | None) -> Tensor:
    """1,000 of the episodes', (1000, ...); noise if none was played."""
    rng = torch.Generator().manual_seed(0)
    if played is None:
        noise = trained.observation(CHECKED)
        return noise.random_(generator=rng) if trained.sees_frames else noise.normal_(generator=rng)
    seen = played.obs.flatten(0, 1)
    return seen[torch.randint(len(seen), (CHECKED,), generator=rng)]


def plan_of(trained: Trained, played: policies.Episodes) -> act.Plan:
    """The same episodes once more, with the same noise."""
    seeds = policies.episode_seeds(trained.args, len(played.returns))
    noise = None if played.noise is None else played.noise.numpy()
    return act.Plan(seeds, noise, trained.args.eval_max_steps)


def play_without_torch(content: bytes, trained: Trained, plan: act.Plan) -> dict:
    """Episodes by act.py in a process of its own: returns, ms per action, torch imported?"""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "policy.onnx").write_bytes(content)
        start = {"seeds": plan.seeds, "max_steps": plan.max_steps}
        (folder / "plan.json").write_text(json.dumps(start))
        if plan.noise is not None:
            np.save(folder / "plan.npy", plan.noise)
        command = [sys.executable, act.__file__, folder / "policy.onnx"]
        command += ["--env-id", trained.args.env_id, "--plan", folder / "plan.json"]
        command += ["--output", folder / "result.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]
            raise RuntimeError(f"no episodes by onnxruntime: {last}")
        return json.loads((folder / "result.json").read_text())


def play_program(batch: Callable, trained: Trained, plan: act.Plan) -> dict:
    """Episodes by a torch.export program: returns, ms per action."""
    policy = single(batch)
    args = trained.args
    shape = trained.actor.noise_shape
    returns = act.play(policy, shape, args.env_id, args.env_kwargs, plan)
    return {"returns": returns, "ms": milliseconds(policy, trained)}


def milliseconds(policy: Callable, trained: Trained) -> float:
    """Median of a call for one observation."""
    return act.milliseconds(policy, trained.observation(1)[0].numpy(), trained.actor.noise_shape)


def report(name: str, result: dict) -> str:
    values = result["returns"]
    words = f"{name}: {result['ms']:.3f} ms an action"
    if values:
        words += f", return of {len(values)} episodes {np.mean(values):.2f} +- {np.std(values):.2f}"
    return words


# ---------------------------------------------------------------------------- program
def export(trained: Trained, path: Path, episodes: int = 10) -> list[str]:
    """Write the policy to path, after checks, in the format of its suffix; what to print.

    Raises RuntimeError if the graph does not act as torch does; then nothing is written.
    """
    model, suffix = trained.in_own_units(), path.suffix.lower()
    played = policies.play(trained, episodes) if episodes else None
    content = serialise(trained, suffix)
    batch = batched(content, suffix)
    error, share = difference(trained, batch, observations(trained, played))
    if not share < TOLERANCE:
        raise RuntimeError(f"the graph's actions differ from torch's by up to {error:.3g}")
    ms = milliseconds(single(by_torch(model)), trained)
    torch_result = {"returns": played.returns if played else [], "ms": ms}
    if played is None:
        result = {"returns": [], "ms": milliseconds(single(batch), trained)}
    elif suffix == ".onnx":
        result = play_without_torch(content, trained, plan_of(trained, played))
    else:
        result = play_program(batch, trained, plan_of(trained, played))
    with whole_file(path, "wb") as file:
        file.write(content)
    name = "onnxruntime" if suffix == ".onnx" else "torch.export"
    name += ", without torch" if result.get("torch") is False else ""
    sizes = trained.observation(1).shape[1:], trained.actor.noise_shape or (), model.shape
    obs, noise, actions = (", ".join(map(str, shape)) for shape in sizes)
    noise = f", noise (batch, {noise})" if noise else ""
    return [
        f"largest difference to torch over {CHECKED:,} observations: {error:.2g}",
        report("torch", torch_result),
        report(name, result),
        f"wrote {path}, {len(content) / 1e6:.1f} MB: observation (batch, {obs}){noise} "
        f"-> action (batch, {actions})",
    ]


def refuse_missing_packages(suffix: str) -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if suffix == ".onnx" and missing:
        cure = "pip install -r benchmark/requirements.txt"
        fail(f"an .onnx file needs {' and '.join(missing)}: {cure}")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("policy", type=text, help="a run directory or its policy.pt")
    words = "file to write: .onnx, or .pt2 for torch.export.load"
    parser.add_argument("--output", type=output(".onnx", ".pt2"), required=True, help=words)
    words = "to play by torch and by the graph; 0: no simulator is needed"
    parser.add_argument("--episodes", type=whole(0, 10_000), default=10, help=words)
    words = "the script that wrote it, if that is none of this repository's"
    parser.add_argument("--script", type=text, help=words)
    words = "must be typed where it is module:Id, since a file must not decide what is imported"
    parser.add_argument("--env-id", type=text, help=words)
    return parser.parse_args()


def main() -> None:
    options = parse()
    refuse_missing_packages(options.output.suffix.lower())
    script = Path(options.script) if options.script else None
    if script and not (exists(script) and script.suffix == ".py"):
        fail(f"--script {script} is no Python file")
    torch.set_num_threads(1)
    trained = policies.read(Path(options.policy), script)
    if trained.sees_frames and options.episodes:
        fail(f"{options.policy} acts on frames, of which no episodes are played: add --episodes 0")
    policies.refuse_other_env(trained, options.env_id, plays=bool(options.episodes))
    for line in export(trained, options.output, options.episodes):
        print(line)


if __name__ == "__main__":
    run(main)
