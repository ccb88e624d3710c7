"""Bad input by the hundred, over every program with a command line: flags, files, environments.

A case says which program, which words, what lies in its folder, and what the answer must be. Flags
are found in Args and in the programs' parsers, so a new flag or script is covered as it comes.
"""

import ast
import importlib
import io
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import odd_envs
import torch
from conftest import FILES, OF_NUMBERS, OFFLINE, ROOT, SMALL, as_flags, known

PROGRAMS = {
    path.stem: path
    for path in sorted((ROOT / "benchmark").rglob("*.py"))
    if path.stem != "cli" and "__main__" in path.read_text() and "Parser(" in path.read_text()
}
PROGRAMS["launch"] = ROOT / "benchmark" / "launch" / "launch.py"

# ---- what the flags may be, beyond what their types say
ZERO_IS_FINE = {"seed", "eval_every", "checkpoint_every", "torch_threads", "noise_scale"}
ZERO_IS_FINE |= {"policy_lr_decay", "ivc_coef", "p_instant", "offline_steps", "log_std_range"}
ZERO_IS_FINE |= {"lr_warmup", "alpha", "time_steps", "adaptive_power", "bound_coef"}
ZERO_IS_FINE |= {"max_grad_norm", "temperature_rate"}
ANY_SIGN = {"log_std_range"}
SHARES = {"gamma", "tau", "q_stats_rate", "p_instant", "temperature_rate"}  # at most 1
MUST_RISE = {"policy_lr_decay", "log_std_range"}
MAY_CHANGE = {"resume", "total_timesteps", "log_every", "capture_video", "torch_threads", "track"}
MAY_CHANGE |= {"wandb_project_name", "wandb_entity", "checkpoint_every"}  # on --resume
TOO_LARGE = {  # for any machine
    "seed": "18446744073709551616",
    "buffer_size": "1000000000000",
    "hidden_dim": "1000000000",
    "num_candidates": "1000000000",
    "torch_threads": "100000000000000",
    "utd": "1e308",
    "hidden_layers": "1000000000",
    "critic_layers": "1000000000000",
    "num_atoms": "1000000",
}
NO_INT64 = "1" + 30 * "0"
NO_FLOAT32 = "1e39"
# kinds of answers
MISSING, DAMAGED, FOREIGN = ["does not exist"], ["damaged"], ["not of this"]
INSIDE = DAMAGED + FOREIGN
# what policy.pt holds for those who have no simulator; --evaluate does without
FOR_A_ROBOT = {"script", "commit", "obs_dim", "act_dim", "action_bounds"}


@dataclass
class Case:
    name: str
    program: Path
    argv: list[str]
    words: list[str] = field(default_factory=list)  # any of them is in the line
    statuses: tuple = (2,)
    prepare: Callable[[Path], None] | None = None  # fills the folder
    env: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)  # of ForkServer.start

    @property
    def prefixes(self) -> list[str]:
        """A program that asks a script passes on what the script says."""
        names = [self.program, *([] if self.program in FILES.values() else FILES.values())]
        return [f"{path.name}: error: " for path in names]


# ---------------------------------------------------------------------------- small and sound
OFFLINE_SMALL = {key: SMALL[key] for key in ("batch_size", "hidden_dim", "num_candidates")}
OFFLINE_SMALL |= {"compile": False, "torch_threads": 1, "device": "cpu", "buffer_size": 10_000}
OFFLINE_SMALL |= {"offline_steps": 60, "total_timesteps": 60, "learning_starts": 10}
OFFLINE_SMALL |= {"chunk_size": 3, "hidden_layers": 2, "eval_every": 0, "log_every": 20}
OFFLINE_SMALL |= {"dataset": "data.npz", "env_id": "odd_mazes:Sound-v0"}


def load_script(name: str):
    return importlib.import_module(name)


def small(name: str) -> dict:
    """Settings under which a script trains within a second; the offline one on data.npz."""
    script = load_script(name)
    settings = OFFLINE_SMALL if name in OFFLINE else SMALL | {"total_timesteps": 200}
    settings = {"env_id": "odd_envs:Sound-v0", "eval_episodes": 2} | settings
    return known(script, settings)


def dataset(n=240, obs_dim=3, act_dim=2, length=12, seed=0) -> dict[str, np.ndarray]:
    """A sound .npz in OGBench's format, for the mazes of odd_mazes."""
    draw = np.random.default_rng(seed)
    return {
        "observations": draw.normal(size=(n, obs_dim)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "terminals": np.arange(n) % length == length - 1,
        "qpos": draw.normal(size=(n, 2)).astype(np.float32),
        "qvel": draw.normal(size=(n, 2)).astype(np.float32),
    }


def write_dataset(folder: Path) -> None:
    np.savez(folder / "data.npz", **dataset())


def base(name: str) -> dict:
    """What every case of a script starts from, as fields of Case."""
    return {
        "program": FILES[name],
        "argv": as_flags(small(name)),
        "prepare": write_dataset if name in OFFLINE else None,
    }


def start(name: str, title: str, *more: str, words=(), prepare=None, **rest) -> Case:
    """A run of a script with more flags and, if needed, more files."""
    common = base(name)

    def fill(folder: Path) -> None:
        for function in common["prepare"], prepare:
            if function:
                function(folder)

    argv = [*common["argv"], *more]
    return Case(f"{name} {title}", FILES[name], argv, list(words), prepare=fill, **rest)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------- flags of the scripts
def bad_numbers(name: str, kind: type, script: str) -> Iterator[str]:
    """Values of a number that must be refused."""
    yield from ("nan", "inf", "-inf", "many", "", "1,5", "0x10", "None")
    if name not in ANY_SIGN:
        yield "-1"
    if name not in ZERO_IS_FINE and not (name == "learning_starts" and script in OFFLINE):
        yield "0"
    if kind is int:
        yield from ("1.5", NO_INT64)
    else:
        yield from (NO_FLOAT32, "1e400", "-1e400")
    if name in SHARES:
        yield "1.01"
    if name in TOO_LARGE:
        yield TOO_LARGE[name]


def flag_cases(name: str) -> Iterator[Case]:
    """Every flag of Args with every value that its type or its sense forbids."""
    script = load_script(name)
    hints = get_type_hints(script.Args)
    for item in fields(script.Args):
        key, kind, option = item.name, hints[item.name], flag(item.name)
        if kind in (int, float):
            for value in bad_numbers(key, kind, name):
                yield start(name, f"{option} {value!r}", f"{option}={value}", words=[option])
        elif get_origin(kind) is tuple:
            yield from pair_cases(name, key, get_args(kind)[0], item.default)
        elif kind is bool:
            yield start(name, f"{option}=yes", f"{option}=yes", words=[option])
            yield start(name, f"{option} maybe", option, "maybe", words=["maybe", option])
        elif get_args(kind) and str not in get_args(kind):  # Literal
            for value in "no_such", "", str(get_args(kind)[0]).upper():
                yield start(name, f"{option} {value!r}", option, value, words=[option])
        else:
            yield start(name, f"{option} ''", option, "", words=[option])
            yield start(name, f"{option} without a value", option, words=[option])


def pair_cases(name: str, key: str, kind: type, default: tuple) -> Iterator[Case]:
    """Two numbers: each of them wrong, one too few, one too many, in the wrong order."""
    option, good = flag(key), [str(x) for x in default]
    for position in 0, 1:
        for value in bad_numbers(key, kind, name):
            values = list(good)
            values[position] = value
            title = f"{option} {' '.join(map(repr, values))}"
            yield start(name, title, option, *values, words=[option])
    yield start(name, f"{option} with one value", option, good[0], words=[option])
    yield start(
        name, f"{option} with three values", option, *good, good[1], words=[option, good[1]]
    )
    if key in MUST_RISE:
        yield start(name, f"{option} falls", option, *reversed(good), words=[option])
        yield start(name, f"{option} stays", option, good[1], good[1], words=[option])


LONG = 300 * "x"
WRITES_NOWHERE = {  # --runs-dir, or what is prepared in its place
    "under a file": "file/runs",
    "is a file": "file",
    "under a device": "/dev/null/runs",
    "in /proc": "/proc/runs",
    "with a long name": LONG,
    "ends nowhere": "broken_link/runs",
}


def occupied(folder: Path) -> None:
    (folder / "file").write_text("mine\n")
    (folder / "broken_link").symlink_to(folder / "file")


def string_cases(name: str) -> Iterator[Case]:
    """Words, devices, folders and combinations that cannot work."""
    add = [
        ("an unknown flag", ["--no-such-flag", "1"], ["--no-such-flag"]),
        ("a flag of another library", ["--lr", "3e-4"], ["--lr"]),
        ("a stray word", ["Ant-v4"], ["Ant-v4"]),
        ("a stray dash", ["-"], []),
        ("a short flag", ["-s", "1"], ["-s"]),
        ("a long exp_name", ["--exp-name", LONG], ["--exp-name", "long"]),
        ("an exp_name with NUL's relatives", ["--exp-name", "a\nb"], ["--exp-name"]),
        ("seed 2^64", ["--seed", str(2**64)], ["--seed"]),
        ("resume and evaluate", ["--resume", "a", "--evaluate", "b"], ["--resume", "--evaluate"]),
    ]
    if name not in OFFLINE:
        add += [
            ("too few steps", ["--utd", "1e-6"], ["--utd"]),
            ("more envs than steps", ["--num-envs", "201"], ["--num-envs"]),
            ("a batch before its data", ["--batch-size", "101"], ["--batch-size"]),
            ("learning after the end", ["--learning-starts", "201"], ["--learning-starts"]),
            ("a buffer too small", ["--buffer-size", "1"], ["--buffer-size"]),
        ]
    else:
        add += [
            ("no step at all", ["--offline-steps=0", "--total-timesteps=0"], ["steps"]),
            ("learning after the end", ["--learning-starts", "61"], ["--learning-starts"]),
            ("chunks longer than the data", ["--chunk-size", "5000"], ["chunk"]),
            ("a buffer too small", ["--buffer-size", "10"], ["--buffer-size"]),
        ]
    names = {item.name for item in fields(load_script(name).Args)}
    if "weight_mode" in names and "particle_temperature" in names:
        unused = ["--weight-mode", "particles", "--temperature", "1"]
        add.append(("a temperature without effect", unused, ["--temperature"]))
        unused = ["--weight-mode", "temperature", "--particle-temperature", "1"]
        add.append(("another without effect", unused, ["--particle-temperature"]))
    if "weight_mode" in names:
        unused = ["--weight-mode", "none", "--temperature", "1"]
        add.append(("a third without effect", unused, ["--temperature"]))
    if "td_action" in names:
        mean = ["--num-atoms", "1", "--no-normalize-rewards", "--v-max", "6"]
        add += [
            ("a KL out of reach", ["--target-kl", "0.7"], ["--target-kl"]),
            ("a KL that steers nothing", ["--weights", "best"], ["--target-kl"]),
            ("a fixed KL", ["--temperature-rate", "0"], ["--target-kl"]),
            ("two atoms", ["--num-atoms", "2"], ["--num-atoms"]),
            ("atoms without effect", mean, ["--v-max"]),
            ("atoms too near for raw rewards", ["--no-normalize-rewards"], ["--v-max"]),
            ("a choice of one", ["--num-candidates", "1"], ["--num-candidates"]),
            ("candidates all alike", ["--noise-scale", "0"], ["--noise-scale"]),
        ]
    devices = "tpu9", "cuda:7", "cuda", "hpu", "meta", "mps", "xpu", "cpu:banana", "cuda:-1", "CPU"
    add += [(f"device {x}", ["--device", x], [x]) for x in devices]
    add.append(("tf32 on a CPU", ["--precision", "tf32"], ["tf32"]))
    for title, more, words in add:
        yield start(name, title, *more, words=words)
    for title, runs_dir in WRITES_NOWHERE.items():
        words = ["--runs-dir", "run directory", runs_dir]
        yield start(
            name, f"runs_dir {title}", "--runs-dir", runs_dir, words=words, prepare=occupied
        )
    yield from kwargs_cases(name)


def kwargs_cases(name: str) -> Iterator[Case]:
    """--env-kwargs that are no JSON object, or not the environment's."""
    bad = "{", "[1]", "3", '"a"', "bonus=1", "{'bonus': 1}", '{"no_such": 1}', '{"bonus": NaN}'
    bad += ("null", "{}}", '{"render_mode": "human"}')
    for value in bad:
        env_id = f"{odd_module(name)}:TakesArguments-v0"
        more = ["--env-id", env_id, "--env-kwargs", value]
        yield start(name, f"env_kwargs {value}", *more, words=["--env-kwargs", "no_such", "NaN"])


# ---------------------------------------------------------------------------- environments
def odd_module(name: str) -> str:
    """The odd environments' module, under the name by which OGBench finds rewards."""
    return "odd_mazes" if name in OFFLINE else "odd_envs"


MODULES = {  # files in the current folder, and what the refusal says
    "syntax": ("def\n", ["syntax"]),
    "raises": ("raise RuntimeError('no license\\nhere')\n", ["no license here"]),
    "asserts": ("assert False\n", ["AssertionError"]),
    "exits": ("import sys\nsys.exit(3)\n", ["exits"]),
    "exits_well": ("raise SystemExit\n", ["exits_well"]),
    "imports": ("import no_such_package\n", ["no_such_package"]),
    "misses_name": ("from gymnasium import no_such_name\n", ["no_such_name"]),
    "registers_nothing": ("", ["X"]),
    "bad_entry": (
        "import gymnasium\ngymnasium.register('X-v0', 'no_module_here:X')\n",
        ["no_module_here"],
    ),
    "bad_class": (
        "import gymnasium\ngymnasium.register('X-v0', 'bad_class:NoClass')\n",
        ["NoClass"],
    ),
    "no_env": ("import gymnasium\ngymnasium.register('X-v0', lambda: 3)\n", []),
    "bytes": ("\x00\x01", ["bytes"]),
}
IDS = {
    "NoSuchEnv-v0": ["NoSuchEnv"],
    "Antt-v4": ["Did you mean: `Ant`"],
    "Ant-v999": ["Ant"],
    "Hopper-v1": ["Hopper"],
    "Pusher-v4": ["mujoco"],
    "dm_control/cheetah-rum-v0": ["Did you mean: `cheetah-run`"],
    "dm_control/": ["dm_control/"],
    "CartPole-v1": ["Discrete(2)"],
    "no_such_module:Env-v0": ["no_such_module"],
    "no.such.package:Env-v0": ["no"],
    "odd_envs:NoSuch-v0": ["NoSuch"],
    "odd_envs:": ["odd_envs:"],
    ":Hopper-v4": [":Hopper-v4"],
    "a:b:c": ["a:b:c"],
    "../env.py": ["../env.py"],
    "env.py:Env": ["env.py"],
    "1bad:Env-v0": ["1bad"],
    "Hopper-v4 ": ["Hopper-v4"],
    "Hopper v4": ["Hopper v4"],
    "hopper-v4": ["Did you mean: `Hopper`"],
    "-": ["-"],
    "höpper-v4": ["pper-v4"],
    "Hopper-v4\n": ["Hopper-v4"],
    5_000 * "E": ["EEEE"],
}


def env_cases(name: str) -> Iterator[Case]:
    """Ids that are none, modules that cannot be imported, environments that will not do."""
    for env_id, words in IDS.items():
        yield start(name, f"env_id {env_id[:30]!r}", f"--env-id={env_id}", words=words)
    for module, (text, words) in MODULES.items():

        def write(folder: Path, module=module, text=text) -> None:
            (folder / f"{module}.py").write_text(text)

        more = ["--env-id", f"{module}:X-v0"]
        yield start(name, f"module that {module}", *more, words=words, prepare=write)
    refused = list(odd_envs.REFUSED.items())
    if name not in ("fpmd_online", *OFFLINE):  # the plumbing is the same text
        refused = refused[OF_NUMBERS.index(name) :: len(OF_NUMBERS)]
    for env_id, words in refused:
        yield start(name, env_id, "--env-id", of(name, env_id), words=words)
    for env_id, words in odd_envs.FILMED.items():
        more = ["--env-id", of(name, env_id), "--capture-video", "--eval-every=50"]
        screen = {"MUJOCO_GL": "egl"}
        yield start(name, f"a film of {env_id}", *more, words=words, env=screen)
    size = ["--buffer-size", "1000000000"]
    more = ["--env-id", of(name, "odd_envs:HugeObs-v0"), *size]
    yield start(name, "a buffer of terabytes", *more, words=["--buffer-size", "memory"])


def of(name: str, env_id: str) -> str:
    return env_id.replace("odd_envs", odd_module(name))


# ---------------------------------------------------------------------------- damaged files
def change(content: dict, path: tuple, value) -> dict:
    """A copy with another value at a path of keys; None of the original changes."""
    key, *rest = path
    copy = list(content) if isinstance(content, list) else dict(content)
    if rest:
        copy[key] = change(copy[key], tuple(rest), value)
    elif value is REMOVED:
        del copy[key]
    else:
        copy[key] = value
    return copy


REMOVED = object()
TAIL = torch.ones(1)


def replaced(path: tuple, value) -> Callable:
    return lambda content: change(content, path, value)


def first(content: dict) -> str:
    return next(iter(content))


def reshaped(path: tuple) -> Callable:
    """The tensor there has one row more."""

    def function(content: dict) -> dict:
        tensor = content
        for key in path:
            tensor = tensor[key]
        row = tensor[:1] if tensor.ndim else tensor
        return change(
            content,
            path,
            torch.cat([tensor.reshape(-1, *row.shape[1:]), row.reshape(-1, *row.shape[1:])]),
        )

    return function


def inner_changes(kind: str, content: dict, name: str) -> Iterator[tuple[str, Callable]]:
    """(title, what it makes of the content): files that are whole, but do not fit together."""
    for key in [name for name in content if name not in FOR_A_ROBOT]:
        yield f"without {key}", replaced((key,), REMOVED)
        if key == "updates":  # of the log; the counters hold it as well
            continue
        for value in None, "text", [], 3.5, {}:
            harmless = (key, value) in [("wall_time", 3.5), ("versions", {})]
            other = type(value) is not type(content[key]) or value in ([], {})
            if other and not harmless:
                yield f"{key} is {value!r}", replaced((key,), value)
    yield "global_step is negative", replaced(("global_step",), -5)
    yield "global_step is a truth value", replaced(("global_step",), True)
    yield "args lists", replaced(("args",), list(content["args"].items()))
    for key, value in ("hidden_dim", "16"), ("hidden_dim", 17), ("env_id", 3), ("gamma", None):
        yield f"args.{key} is {value!r}", replaced(("args", key), value)
    for key, value in ("gamma", 2.0), ("num_envs", -1), ("hidden_dim", 10**9), ("seed", 1.5):
        if key in content["args"]:
            yield f"args.{key} is {value!r}", replaced(("args", key), value)
    networks = ["agent"] if kind == "checkpoint.pt" else ["policy"]
    for key in networks:
        some = first(content[key])
        yield f"{key} lacks {some}", replaced((key, some), REMOVED)
        yield f"{key} has one more", replaced((key, "surprise"), TAIL)
        yield f"{key}.{some} is text", replaced((key, some), "text")
        yield f"{key}.{some} has another shape", reshaped((key, some))
        flat = torch.zeros(content[key][some].numel() + 1)
        yield f"{key}.{some} is flat", replaced((key, some), flat)
        whole = torch.zeros(content[key][some].shape, dtype=torch.complex64)
        yield f"{key}.{some} is complex", replaced((key, some), whole)
        last = list(content[key])[-1]
        yield f"{key}.{last} has another shape", reshaped((key, last))
    if kind == "checkpoint.pt":
        yield from changes_of_a_checkpoint(content, name)


def changes_of_a_checkpoint(content: dict, name: str) -> Iterator[tuple[str, Callable]]:
    """What it takes to go on: buffer, optimizers, generators, episodes."""
    for key in content["args"]:
        yield f"args lacks {key}", replaced(("args", key), REMOVED)
    yield "args with one more", replaced(("args", "surprise"), 1)
    for key in content["counters"]:
        yield f"counters.{key} missing", replaced(("counters", key), REMOVED)
        yield f"counters.{key} is text", replaced(("counters", key), "many")
        yield f"counters.{key} is negative", replaced(("counters", key), -1)
    yield "counters that would replace a method", replaced(("counters", "forward"), 1)
    for key, optimizer in content["optimizers"].items():
        path = ("optimizers", key)
        yield f"optimizer {key} missing", replaced(path, REMOVED)
        yield f"optimizer {key} without groups", replaced((*path, "param_groups"), [])
        yield f"optimizer {key} without state", replaced((*path, "state"), REMOVED)
        state = optimizer["state"]
        if state:
            index = first(state)
            if len(state) > 1:  # none at all is the state before a first step
                yield f"optimizer {key} lacks one", replaced((*path, "state", index), REMOVED)
            yield (
                f"optimizer {key} has another shape",
                replaced((*path, "state", index, "exp_avg"), torch.zeros(7, 7)),
            )
            yield f"optimizer {key} has text", replaced((*path, "state", index, "step"), "one")
    buffer = content["buffer"]  # a row per transition
    yield "buffer is wider", replaced(("buffer",), torch.cat([buffer, buffer[:, :1]], 1))
    yield "buffer is narrower", replaced(("buffer",), buffer[:, 1:].clone())
    yield "buffer is flat", replaced(("buffer",), buffer.flatten())
    yield "buffer of doubles", replaced(("buffer",), buffer.double())
    for column in 0, buffer.shape[1] // 2, buffer.shape[1] - 1:
        spoilt = buffer.clone()
        spoilt[0, column] = torch.nan
        yield f"buffer has NaN in column {column}", replaced(("buffer",), spoilt)
    size = content["args"]["buffer_size"]
    yield "a buffer beyond its size", replaced(("buffer",), buffer[:1].expand(size + 1, -1))
    yield "an empty buffer", replaced(("buffer",), buffer[:0])
    for value in -1, 10**9, 1.5, "text":
        yield f"position {value!r}", replaced(("position",), value)
    yield "rng too short", replaced(("rng",), content["rng"][:100])
    yield "rng of floats", replaced(("rng",), content["rng"].float())
    yield "rng of zeros", replaced(("rng",), torch.zeros(0, dtype=torch.uint8))
    yield "written on a GPU", replaced(("device",), "cuda")
    episodes = content["envs"]["episodes"]
    episode = episodes[0]
    yield "one episode more", replaced(("envs", "episodes"), [*episodes, episode])
    yield "one episode less", replaced(("envs", "episodes"), episodes[1:])
    for key in episode:
        yield f"episode without {key}", replaced(("envs", "episodes", 0, key), REMOVED)
        yield f"episode's {key} is text", replaced(("envs", "episodes", 0, key), "text")
    yield (
        "actions of another width",
        replaced(("envs", "episodes", 0, "actions"), torch.zeros(3, 7)),
    )
    spoilt = torch.full((3, 2), torch.nan)
    yield "actions of NaN", replaced(("envs", "episodes", 0, "actions"), spoilt)
    for key in "obs", "returns", "lengths":
        yield f"envs without {key}", replaced(("envs", key), REMOVED)
        yield f"envs' {key} is text", replaced(("envs", key), "text")
        yield f"envs' {key} of another shape", replaced(("envs", key), torch.zeros(7))
    yield "a negative count", replaced(("envs", "episodes", 0, "count"), -3)
    if "plan" in content:
        yield "a plan of another width", replaced(("plan",), torch.zeros(2, 1, 7))


def records(data: bytes) -> dict[str, tuple[int, int]]:
    """Of a zip file: where the bytes of each entry begin, and how many there are."""
    found = {}
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        found[info.filename] = (info.header_offset + 30 + name + extra, info.compress_size)
    return found


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def byte_changes(data: bytes) -> Iterator[tuple[str, bytes, list[str]]]:
    """(title, bytes, words): files as disks, copies and downloads leave them."""
    entries = {name: where for name, where in records(data).items() if where[1]}
    tensors = [where for name, where in entries.items() if "/data/" in name]
    big = sorted(tensors, key=lambda where: where[1])
    some = [big[0], big[len(big) // 3], big[-2], big[-1]]
    for number, (begin, size) in enumerate(some):
        for share in 0.0, 0.5, 0.999:
            at = begin + int(share * size)
            yield f"a byte of tensor {number} at {share}", flipped(data, at), DAMAGED
    pickle = next(where for name, where in entries.items() if name.endswith("data.pkl"))
    for share in 0.05, 0.3, 0.5, 0.8, 0.99:
        at = pickle[0] + int(share * pickle[1])
        yield f"a byte of the pickle at {share}", flipped(data, at), DAMAGED
    for size in 0, 1, 10, 100, len(data) // 2, len(data) - 100, len(data) - 1:
        yield f"cut after {size} of {len(data)} bytes", data[:size], DAMAGED
    begin = 0.4 * len(data)
    hole = data[: int(begin)] + bytes(4096) + data[int(begin) + 4096 :]
    yield "a hole of zeros", hole, DAMAGED
    yield "zeros alone", bytes(len(data)), INSIDE
    yield "text", b"not a checkpoint\n", INSIDE
    yield "a web page", b"<!DOCTYPE html>\n<html>404</html>\n", INSIDE
    junk = io.BytesIO()
    with zipfile.ZipFile(junk, "w") as archive:
        archive.writestr("readme.txt", "junk")
    yield "a zip of junk", junk.getvalue(), INSIDE
    # pickle: os.system("touch owned")
    yield "a pickle with code", b"cposix\nsystem\n(S'touch owned'\ntR.", INSIDE
    for title, content in ("a tensor", torch.ones(3)), ("a list", [1, 2]), ("nothing", None):
        yield f"torch's file of {title}", saved(content), INSIDE
    yield "torch's file of another project", saved({"model": {"w": torch.ones(2)}}), FOREIGN
    yield "torch's file of a module", saved_whole(torch.nn.Linear(1, 1)), INSIDE


def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


saved_whole = saved


def file_cases(name: str, run_dir: Path, others: dict[str, Path]) -> Iterator[Case]:
    """--resume and --evaluate of files that are damaged, foreign or inconsistent.

    run_dir is a complete run of the script, and others those of other scripts.
    """
    for kind, option in ("checkpoint.pt", "--resume"), ("policy.pt", "--evaluate"):
        data = (run_dir / kind).read_bytes()
        content = torch.load(run_dir / kind, weights_only=True)
        common = {"name": name, "run_dir": run_dir, "kind": kind, "option": option}
        for title, changed, words in byte_changes(data):
            yield file_case(title, changed, words, **common)
        for title, function in inner_changes(kind, content, name):
            words = [*INSIDE, *words_of(title)]
            yield file_case(title, lambda f=function, c=content: saved(f(c)), words, **common)
        for other, folder in others.items():
            yield file_case(f"of {other}", (folder / kind).read_bytes(), FOREIGN, **common)
        swapped = "policy.pt" if kind == "checkpoint.pt" else "checkpoint.pt"
        yield file_case(f"a {swapped}", (run_dir / swapped).read_bytes(), FOREIGN, **common)
        yield from path_cases(name, run_dir, kind, option)


def words_of(title: str) -> list[str]:
    """What a refusal may say as well, where the flag or the device is what is wrong."""
    if title.startswith("args."):
        return [flag(title.removeprefix("args.").split()[0]), "was trained on"]
    if title in ("args is {}", "args lacks env_id"):  # the default is another environment then
        return ["would import"]
    return ["written on"] if "device" in title or "GPU" in title else []


def go_on(name: str) -> list[str]:
    """With --resume there must be something left to do, or nothing would be read."""
    return ["--total-timesteps", str(2 * small(name)["total_timesteps"])]


def file_case(title, changed, words, name, run_dir, kind, option) -> Case:
    """The run in the folder `run`, with another file of that kind; odd ones are named directly."""

    def fill(folder: Path) -> None:
        shutil.copytree(run_dir, folder / "run")
        content = changed() if callable(changed) else changed
        (folder / "run" / kind).write_bytes(content)

    argv = [option, "run", *(go_on(name) if option == "--resume" else [])]
    case = Case(f"{name} {option} {title}", FILES[name], argv, list(words), prepare=fill)
    # of a file alone no module is imported, so the environment's is named, as it must be
    case.argv += ["--env-id", small(name)["env_id"]]
    return case


def path_cases(name: str, run_dir: Path, kind: str, option: str) -> Iterator[Case]:
    """Paths at which there is nothing, or something else."""

    def fill(folder: Path) -> None:
        (folder / "empty").mkdir()
        (folder / "file").write_text("mine\n")
        (folder / "folders" / kind).mkdir(parents=True)
        (folder / "link").symlink_to("nowhere")
        shutil.copytree(run_dir, folder / "run")
        (folder / "run" / kind).unlink()

    more = go_on(name) if option == "--resume" else []
    more += ["--env-id", small(name)["env_id"]]
    paths = {"no_such": MISSING, "no/such/run": MISSING, "empty": MISSING, "run": MISSING}
    paths |= {f"run/{kind}": MISSING, "link": MISSING, "file/run": MISSING}
    paths |= {"folders": INSIDE + MISSING, f"folders/{kind}": INSIDE + MISSING}
    paths |= {"file": INSIDE, "run/args.json": INSIDE, "/dev/null": MISSING}
    paths |= {LONG: [*MISSING, "long"]}
    for path, words in paths.items():
        title = f"{name} {option} {path[:40]}"
        yield Case(title, FILES[name], [option, path, *more], words, prepare=fill)


def resume_cases(name: str, run_dir: Path) -> Iterator[Case]:
    """A sound run, and a command line that cannot go on with it."""
    script = load_script(name)
    hints = get_type_hints(script.Args)

    def fill(folder: Path) -> None:
        write_dataset(folder)
        shutil.copytree(run_dir, folder / "run")

    def case(title: str, *more: str, words: list[str]) -> Case:
        argv = ["--resume", "run", "--env-id", small(name)["env_id"], *go_on(name), *more]
        return Case(f"{name} --resume {title}", FILES[name], argv, words, prepare=fill)

    sound = small(name)
    for item in fields(script.Args):
        if item.name in MAY_CHANGE | {"evaluate"}:
            continue
        value, option = sound.get(item.name, item.default), flag(item.name)
        more = [f"{option}={value}"]
        if item.name == "env_id":
            more = [option, of(name, "odd_envs:Stagger-v0")]
        elif item.name == "env_kwargs":
            more = [option, '{"bonus": 2}']
        elif item.name == "device":
            continue  # one that is not there is refused before
        elif hints[item.name] is bool:
            more = as_flags({item.name: not value})
        elif get_args(hints[item.name]) and str not in get_args(hints[item.name]):
            if isinstance(value, tuple):
                more = [option, *[str(2 * x) for x in value]]
            else:
                others = [x for x in get_args(hints[item.name]) if x not in (value, "tf32")]
                if not others:
                    continue
                more = [option, others[0]]
        elif isinstance(value, str):
            more = [option, f"{value}x"]
        elif isinstance(value, float):
            more = [option, str(value / 2 or 0.5)]
        elif isinstance(value, int):
            more = [option, str(value + 1)]
        words = ["bonus"] if item.name == "env_kwargs" else [option]  # that environment knows none
        yield case(" ".join(["with", *more])[:60], *more, words=words)
    steps = str(small(name)["total_timesteps"] // 2)
    yield case("with fewer steps", "--total-timesteps", steps, words=["--total-timesteps"])
    yield case("and a policy", "--evaluate", "run", words=["--evaluate"])
    argv = ["--evaluate", "run", "--env-id", of(name, "odd_envs:Stagger-v0")]
    words = [small(name)["env_id"]]
    yield Case(f"{name} --evaluate elsewhere", FILES[name], argv, words, prepare=fill)
    argv = ["--evaluate", "run"]  # the file alone names a module
    words = ["--env-id"]
    yield Case(f"{name} --evaluate of a module", FILES[name], argv, words, prepare=fill)

    def fill_csv(folder: Path) -> None:
        fill(folder)
        (folder / "run" / "metrics.csv").unlink()
        (folder / "run" / "metrics.csv").mkdir()

    argv = ["--resume", "run", "--env-id", small(name)["env_id"], *go_on(name)]
    title = f"{name} --resume with a folder for a table"
    yield Case(title, FILES[name], argv, ["metrics.csv"], prepare=fill_csv)


# ---------------------------------------------------------------------------- datasets
def with_column(key: str, value) -> Callable:
    """A file whose column is another, or is gone."""

    def fill(folder: Path) -> None:
        data = dataset()
        changed = value(data[key]) if callable(value) else value
        if changed is None:
            del data[key]
        else:
            data[key] = changed
        np.savez(folder / "data.npz", **data)

    return fill


def spoilt_at(value: float) -> Callable:
    def function(column: np.ndarray) -> np.ndarray:
        column = column.astype(np.float32)
        column.flat[7] = value
        return column

    return function


def dataset_cases(name: str = "mvp_offline_to_online") -> Iterator[Case]:
    """Every array missing, of another length, width, kind, and with numbers that are none."""
    columns = "observations", "actions", "terminals", "qpos"
    for key in columns:
        changes = {
            "missing": None,
            "shorter": lambda x: x[:-1],
            "longer": lambda x: np.concatenate([x, x[:1]]),
            "empty": lambda x: x[:0],
            "text": lambda x: np.full(x.shape, "a"),
            "objects": lambda x: np.full(x.shape, None, object),
            "complex": lambda x: x + 1j,
            "a number": np.float32(1),
            "three dimensions": lambda x: x.reshape(*x.shape, 1, 1),
            "NaN": spoilt_at(np.nan),
            "infinite": spoilt_at(np.inf),
            "out of range": spoilt_at(1e30),
        }
        if key == "terminals":
            changes |= {
                "no end": lambda x: 0 * x,
                "ends alone": lambda x: x | True,
                "numbers": lambda x: x + 0.5,
                "negative": lambda x: -x.astype(int),
            }
        else:
            changes |= {"wider": lambda x: np.concatenate([x, x], 1), "flat": lambda x: x[:, 0]}
            if key != "qpos":
                changes["narrower"] = lambda x: x[:, :1]
            else:
                del changes["wider"]
        for title, value in changes.items():
            words = ["--dataset", "data.npz"]
            fill = with_column(key, value)
            yield start(name, f"dataset: {key} {title}", words=words, prepare=fill)

    def sized(n):
        return lambda folder: np.savez(folder / "data.npz", **dataset(n, length=max(n, 2)))

    for n in 0, 1, 2:
        yield start(name, f"dataset of {n} rows", words=["--dataset"], prepare=sized(n))
    yield from dataset_file_cases(name)


def dataset_file_cases(name: str) -> Iterator[Case]:
    """Files that are no .npz, and environments that give no rewards."""
    contents = {
        "empty": b"",
        "text": b"observations,actions\n1,2\n",
        "junk after a zip's head": b"PK\x03\x04 and then nothing",
        "a pickle with code": b"cposix\nsystem\n(S'touch owned'\ntR.",
    }
    for title, content in contents.items():

        def fill(folder: Path, content=content) -> None:
            (folder / "data.npz").write_bytes(content)

        yield start(name, f"dataset: {title}", words=["--dataset"], prepare=fill)

    def cut(folder: Path) -> None:
        write_dataset(folder)
        data = (folder / "data.npz").read_bytes()
        (folder / "data.npz").write_bytes(data[: len(data) // 2])

    def flip(folder: Path) -> None:
        write_dataset(folder)
        data = (folder / "data.npz").read_bytes()
        (folder / "data.npz").write_bytes(flipped(data, len(data) // 3))

    def array(folder: Path) -> None:
        with (folder / "data.npz").open("wb") as file:
            np.save(file, dataset()["observations"])

    def a_folder(folder: Path) -> None:
        (folder / "data.npz").unlink()
        (folder / "data.npz").mkdir()

    for title, fill in ("cut", cut), ("a byte flipped", flip), ("one array", array):
        yield start(name, f"dataset: {title}", words=["--dataset"], prepare=fill)
    yield start(name, "dataset: a folder", words=["--dataset"], prepare=a_folder)
    missing = ["--dataset", "no_such.npz"]
    yield start(name, "dataset: no file", *missing, words=["no_such.npz"])
    # OGBench knows no rewards for an environment that is none of its own
    more = ["--env-id", "odd_envs:Sound-v0"]
    yield start(name, "dataset: not for this environment", *more, words=["--dataset"])
    more = ["--env-id", "Hopper-v4"]
    words = ["it has no rewards"]
    yield start(name, "dataset: for no environment of OGBench", *more, words=words)


# ---------------------------------------------------------------------------- benchmark
NEEDS = {  # what a program cannot do without, so that the flag under test is what is wrong
    "collect": ["run", "--output", "out.csv"],
    "plot": ["run", "--output", "out.png"],
    "precision": ["run", "--output", "out.csv"],
    "evaluation_cost": ["run", "--output", "out.csv"],
    "make_dataset": ["pointmaze-medium", "--output", "out.npz"],
    "reference_policies": ["--env-ids", "Pendulum-v1", "--output", "out.csv"],
    "gpu": ["--smoke", "--output", "out"],
    "speed": ["--modes", "eager", "--settings", "2,1", "--output", "out.csv"],
    "latency": ["--modes", "eager", "--output", "out.csv"],
    "export": ["policy.pt", "--output", "policy.onnx"],
    "act": ["policy.onnx"],
    "publish": ["policy.pt", "--name", "mine"],
    "constraint": ["--output", "out"],
    "one_step": ["--output", "out.png"],
    "trajectories": ["--policies", "folder", "--output", "out.png"],
    "launch": ["--name", "try", "--scripts", "mvp_online", "--envs", "Pendulum-v1", "--seeds", "1"],
}
NEEDS["launch"] += ["--output", "out.csv", "--dry-run"]
PROGRAMS_ZERO = {"--threads", "--workers", "--workers-per-gpu", "--max-restarts", "--seed"}
PROGRAMS_ZERO |= {"--at-least", "--noise", "--seeds"}
INT64 = {"--seed", "--seeds", "--threads"}  # other numbers may be as large as one likes to wait
STARTS_JOBS = {"gpu"}  # what it would start is not this test's to stop


def numeric_flags(path: Path) -> dict[str, str]:
    """--flag: int or float, as the program's text and that of its parsers' modules say."""
    used, own = [path], path.read_text()
    if "add_machine_flags" in own:
        used.append(path.with_name("measuring.py"))
    if "read_command_line" in own:
        used.append(path.with_name("campaign.py"))
    found = {}
    for text in used:
        for node in ast.walk(ast.parse(text.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            option = getattr(node.args[0], "value", None)
            kinds = [
                k.value.id for k in node.keywords if k.arg == "type" and hasattr(k.value, "id")
            ]
            if (
                isinstance(option, str)
                and option.startswith("--")
                and kinds[:1] in (["int"], ["float"])
            ):
                found[option] = kinds[0]
    return found


def program_cases(name: str) -> Iterator[Case]:
    """What argparse finds wrong, numbers out of range, outputs that cannot be written."""
    path = PROGRAMS[name]
    needs = NEEDS.get(name, [])

    def fill(folder: Path) -> None:
        (folder / "file").write_text("mine\n")

    def case(title: str, argv: list, words=(), prepare=fill) -> Case:
        return Case(f"{name}.py {title}", path, argv, list(words), prepare=prepare)

    yield case("an unknown flag", [*needs, "--no-such-flag"], ["--no-such-flag"])
    for option, kind in numeric_flags(path).items():
        values = ["many", "", "-1", "1,5", *(["1.5"] if kind == "int" else ["nan", "inf"])]
        values += [NO_INT64] if option in INT64 else []
        values += [] if option in PROGRAMS_ZERO else ["0"]
        if name in STARTS_JOBS:
            values = values[:2]
        for value in values:
            # argparse takes -1 for a flag of its own unless it is joined to its flag
            yield case(f"{option} {value!r}", [*needs, f"{option}={value}"], [option])
        yield case(f"{option} without a value", [*needs, option], [option])
    if "--output" in path.read_text() and name not in STARTS_JOBS:
        without = needs[: needs.index("--output")] if "--output" in needs else needs
        for output in "file/out.csv", "", "file/deeper/out.csv":
            argv = [*without, "--output", output, *needs[len(without) + 2 :]]
            # or of what is read, if that is looked at first
            words = ["--output", "file", "run", "missing"]
            yield case(f"--output {output!r}", argv, words)
    yield from PROGRAM_CASES.get(name, lambda case: iter(()))(case)


def torn_runs(folder: Path) -> None:
    """Run directories as kills leave them."""
    text = {"args.json": "{", "versions.json": "{}", "evaluations.csv": "global_step\n"}
    kinds = {
        "torn_args": text,
        "no_args": {"versions.json": "{}", "evaluations.csv": "global_step\n"},
        "list_args": text | {"args.json": "[]"},
        "empty_args": text | {"args.json": "{}"},
        "foreign": text | {"args.json": '{"exp_name": "ppo", "env_id": "A", "seed": 1, "utd": 1}'},
        "torn_versions": text | {"args.json": '{"exp_name": "sac_online"}', "versions.json": "{"},
        "binary": text | {"args.json": "{}", "evaluations.csv": "\x00\x01"},
        "empty": {},
    }
    for name, files in kinds.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_text(content)
        (folder / name / "metrics.csv").write_text("global_step\n")
    (folder / "empty.csv").write_text("")
    (folder / "foreign.csv").write_text("a,b\n1,2\n")
    names = "algorithm,env_id,flags,seed,python,torch,gymnasium,mujoco,device,threads,commit"
    (folder / "good.csv").write_text(f"{names}\nsac_online,A,,1,3,2,1,3,cpu,1,c\n")
    (folder / "bad_seed.csv").write_text(f"{names}\nsac_online,A,,one,3,2,1,3,cpu,1,c\n")
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    (folder / "file").write_text("mine\n")


TORN = ["torn_args", "no_args", "list_args", "empty_args", "foreign", "torn_versions", "empty"]
TORN += ["no_such", "file", "binary"]


def on_runs(case: Callable) -> Iterator[Case]:
    """Programs that read run directories."""
    yield case("of nothing", ["--output", "out.csv"])
    for run in TORN:
        yield case(f"of {run}", [run, "--output", "out.csv"], [run], torn_runs)


def on_collect(case: Callable) -> Iterator[Case]:
    yield from on_runs(case)
    for file in "empty.csv", "foreign.csv", "binary.csv", "no_such.csv":
        yield case(f"of {file}", [file, "--output", "out.csv"], [file], torn_runs)
    yield case("of a seed that is none", ["bad_seed.csv", "--output=out.csv"], ["seed"], torn_runs)
    twice = ["good.csv", "good.csv", "--output", "out.csv"]
    yield case("of one CSV twice", twice, ["good.csv"], torn_runs)
    for output in "file/out.csv", "", "empty":
        argv = ["good.csv", "--output", output]
        yield case(f"into {output!r}", argv, ["--output", "file", "empty"], torn_runs)
    yield case("without --output", ["run"], ["--output"])


def on_make_dataset(case: Callable) -> Iterator[Case]:
    for name in "humanoid", "cube", "cube-no-such", "pointmaze-", "", "../x":
        yield case(f"of {name!r}", [name, "--output", "out.npz"])
    yield case("without --output", ["cube-single"], ["--output"])


def on_launch(case: Callable) -> Iterator[Case]:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("mine\n")
        texts = {"broken": "seeds", "typo": "seed = [1]", "kind": 'seeds = ["1"]', "empty": ""}
        texts |= {"number": "workers = true", "binary": "\x00", "nan": "workers = nan"}
        for name, text in texts.items():
            (folder / f"{name}.toml").write_text(text)

    needs = NEEDS["launch"]
    for name in "broken", "typo", "kind", "empty", "number", "binary", "nan", "no_such":
        argv = [f"{name}.toml", "--dry-run"]
        yield case(f"of {name}.toml", argv, [name, "needs"], fill)
    yield case("of a folder", [".", "--dry-run"], ["."], fill)
    changes = {
        "--name": ["", "../x", "a/b"],
        "--scripts": ["no_such", "", "fpmd_online.pyc"],
        "--envs": ["NoSuch-v0", "", "odd_envs:ActFixed-v0", "no_such_module:X-v0"],
        "--seeds": ["-1", "1.5", "many", ""],
    }
    for option, values in changes.items():
        for value in values:
            argv = list(needs)
            argv[argv.index(option) + 1] = value
            words = [option, value or option[2:-1]]
            yield case(f"{option} {value!r}", argv, words, fill)
    more = {
        "--engine=slurm": ["slurm"],
        "--ray-address=auto": ["--ray-address"],
        "--flags=--no-such-flag=1": ["no-such-flag"],
        "--flags=--utd=0": ["--utd"],
        "--flags=--gamma nan": ["--gamma"],
        "--flags='": ["quotation"],
        "--flags=--seed=3": ["--seed"],
        "--flags=--resume=x": ["--resume"],
        "--flags=--evaluate=x": ["--evaluate"],
        "--flags=--total-timesteps 1e6": ["--total-timesteps"],
        "--variant=a=--no-such-flag": ["no-such-flag"],
        "--runs-dir=": ["--runs-dir"],
    }
    for option, words in more.items():
        yield case(option, [*needs, option], words, fill)
    # where not even a job's folder can be made, nothing can start
    earnest = [word for word in needs if word != "--dry-run"]
    yield case("--runs-dir file", [*earnest, "--runs-dir", "file"], ["file"], fill)
    yield case("--name of 300 letters", [*earnest, "--name", LONG], ["--name", "long"], fill)


def on_names(case: Callable) -> Iterator[Case]:
    for option in "--policies", "--modes", "--scripts", "--only":
        yield case(
            f"{option} no_such", [option, "no_such", "--output", "out.csv"], ["no_such", option]
        )
    for device in "tpu9", "cuda:7", "meta", "":
        yield case(f"--device {device!r}", ["--device", device, "--output", "out.csv"], ["device"])


def on_speed(case: Callable) -> Iterator[Case]:
    yield from on_names(case)
    for setting in "1", "a,b", "0,1", "1,0", "-1,1", "", "1,2,3":
        argv = ["--modes", "eager", f"--settings={setting}", "--output", "out.csv"]
        yield case(f"--settings {setting!r}", argv, ["--settings"])
    yield case("--steps 10 --end-to-end", ["--end-to-end", "--steps=10"], ["--steps"])


def on_trajectories(case: Callable) -> Iterator[Case]:
    yield case("of nothing", ["--output", "out.png"])
    yield case("both ways", ["--train", "a", "--policies", "b"], ["not allowed"])
    yield case("of no folder", ["--policies", "no_such", "--output", "out.png"])
    argv = ["--policies", "no_such", "--csv", "no_such.csv", "--output", "out.png"]
    yield case("of no table", argv, ["no_such"])
    yield case("under a file", ["--train", "file/x", "--output", "out.png"], ["file"])


def on_reference_policies(case: Callable) -> Iterator[Case]:
    for env_id in "NoSuch-v0", "", "CartPole-v1", "odd_envs:ActFixed-v0":
        argv = ["--env-ids", env_id, "--episodes=1", "--output", "out.csv"]
        yield case(f"of {env_id!r}", argv, [env_id or "env"])


def on_gpu(case: Callable) -> Iterator[Case]:
    argv = ["--smoke", "--output", "out", "--stages", "no_such"]
    yield case("--stages no_such", argv, ["no_such"])
    argv = ["--smoke", "--output", "out", "--only", "no_such"]
    yield case("--only no_such", argv, ["no_such", "--only"])
    yield case(
        "under a file", ["--smoke", "--only", "no_such", "--output", "file/x"], ["file", "--only"]
    )


PROGRAM_CASES = {
    "collect": on_collect,
    "precision": on_runs,
    "evaluation_cost": on_runs,
    "make_dataset": on_make_dataset,
    "launch": on_launch,
    "latency": on_names,
    "speed": on_speed,
    "trajectories": on_trajectories,
    "reference_policies": on_reference_policies,
    "gpu": on_gpu,
}


# ---------------------------------------------------------------------------- all of them
def share(name: str, cases: Iterator[Case]) -> Iterator[Case]:
    """All cases of one script, fewer of the others: most of their plumbing is the same text."""
    if name == "fpmd_online":
        return cases
    every = 3 if name == "mvp_offline_to_online" else 8
    return islice(cases, list(FILES).index(name) % every, None, every)


def cases_without_runs(name: str) -> Iterator[Case]:
    """Those of a script that need no run made before."""
    yield from share(name, flag_cases(name))
    yield from share(name, string_cases(name))
    yield from env_cases(name)
    if name in OFFLINE:
        yield from dataset_cases()


def cases_of_runs(name: str, run_dirs: dict[str, Path]) -> Iterator[Case]:
    """Those about what a run wrote; run_dirs: a complete run of every script."""
    others = {key: folder for key, folder in run_dirs.items() if key != name}
    yield from share(name, file_cases(name, run_dirs[name], others))
    yield from share(name, resume_cases(name, run_dirs[name]))


def numbered(cases: Iterator[Case]) -> list[Case]:
    """Each name once."""
    found = {}
    for case in cases:
        title = case.name
        while title in found:
            title += "'"
        found[title] = replace(case, name=title)
    return list(found.values())
