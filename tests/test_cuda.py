"""On a GPU: eager, compiled and captured updates agree, runs resume, and every script trains.

Without a GPU they skip. GPU_SMOKE=1 runs them on a CPU at toy size, with a stand-in for CUDA's
graphs and nothing compiled, so that they are known to run before a GPU is there.
"""

import csv
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    FILES,
    FPMD,
    OFFLINE,
    PIXELS,
    SEEN,
    FakeGraph,
    known,
    load,
    obs_of,
    one_update,
    recordable,
)
from test_offline_to_online import made_up_dataset
from test_resume import differences, rows

SMOKE = os.environ.get("GPU_SMOKE") == "1"
DEVICE = torch.device("cpu" if SMOKE else "cuda")
REASON = "no CUDA device"
SKIP = pytest.mark.skipif(not (SMOKE or torch.cuda.is_available()), reason=REASON)
pytestmark = [pytest.mark.cuda, SKIP]
OBS_DIM, ACT_DIM = 27, 8  # Ant-v4's
UPDATES = 20


@pytest.fixture(params=FILES)
def script(request):
    return __import__(request.param)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """In a smoke test: what stands in for CUDA's graphs."""
    torch._dynamo.reset()
    if SMOKE:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", FakeGraph.record)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


def published(script, **changes):
    """The script's own sizes, or toy sizes in a smoke test."""
    small = {"batch_size": 16, "num_candidates": 2, "hidden_dim": 16, "buffer_size": 2_000}
    small |= {"flow_steps": 2, "hidden_layers": 2, "target_kl": 0.3}
    sizes = small if SMOKE else {"buffer_size": 20_000}
    if script.__name__ in PIXELS:
        sizes |= SEEN  # small pictures, which numpy draws
    return script.Args(**known(script, sizes | {"device": DEVICE.type} | changes))


def random_obs(script, draw, n):
    """Numbers, or stacks of frames, for n environments."""
    if script.__name__ in PIXELS:
        return draw.integers(0, 256, (n, *obs_of(script)), np.uint8)
    return draw.standard_normal((n, OBS_DIM)).astype(np.float32)


def full_buffer(script, args):
    """A replay buffer with random transitions in it."""
    draw, n = np.random.default_rng(0), 1_000
    if script.__name__ in PIXELS:
        buffer = script.ReplayBuffer(args, obs_of(script), ACT_DIM, DEVICE)
        for _ in range(n // args.num_envs):
            obs, next_obs = (random_obs(script, draw, args.num_envs) for _ in range(2))
            actions = draw.uniform(-1, 1, (args.num_envs, ACT_DIM))
            ends = draw.random((3, args.num_envs)) < 0.1
            buffer.add(obs, actions, draw.random(args.num_envs), next_obs, *ends[:2])
        return buffer
    if script.__name__ in OFFLINE:
        size = args if hasattr(args, "chunk_size") else args.buffer_size
        buffer = script.ReplayBuffer(size, OBS_DIM, ACT_DIM, DEVICE)
        buffer.add(**made_up_dataset(OBS_DIM, ACT_DIM, n))
        return buffer
    buffer = script.ReplayBuffer(args.buffer_size, OBS_DIM, ACT_DIM, DEVICE)
    sizes = (n, OBS_DIM), (n, ACT_DIM), (n,), (n, OBS_DIM)
    names = "obs", "actions", "rewards", "next_obs"
    columns = {name: draw.uniform(-1, 1, size) for name, size in zip(names, sizes, strict=True)}
    buffer.add(**columns, terminations=draw.random(n) < 0.1)
    return buffer


def train(script, path, **changes):
    """UPDATES times act, sample, update, as the training loop does it: all that has changed.

    path: eager; graph, which records the plain functions; compiled; captured, which records the
    compiled ones, as accelerate does on a GPU.
    """
    args = published(script, **changes)
    torch.backends.cudnn.deterministic = True  # as main sets it
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    agent = script.Agent(obs_of(script, OBS_DIM), ACT_DIM, args, DEVICE)
    start = torch.cat([p.detach().flatten().clone() for p in agent.parameters()])
    rng, draw = torch.Generator(DEVICE).manual_seed(0), np.random.default_rng(1)
    buffer, actions = full_buffer(script, args), []
    explore, improve = script.act_explore, script.update
    if path in ("compiled", "captured") and not SMOKE:
        explore, improve = script.accelerate(agent, explore, improve)
        assert isinstance(improve, script.Captured), "nothing was compiled or captured"
        for captured in explore, improve:  # what fails to compile, fails the test
            captured.function = captured.function.function
        if path == "compiled":  # what would have been recorded
            explore, improve = explore.function, improve.function
    elif path in ("graph", "captured"):
        explore, improve = (script.Captured(recordable(f)) for f in (explore, improve))
    if path == "graph" and not SMOKE:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
    for _ in range(UPDATES):
        obs = torch.from_numpy(random_obs(script, draw, 5)).to(DEVICE)
        actions.append(explore(agent, obs, args, rng).clone())
        batch = buffer.sample(args.batch_size, rng)
        metrics = one_update(script, agent, batch, args, rng, improve)
    if isinstance(improve, script.Captured):
        assert explore.graphs and improve.graphs, "nothing was recorded"
    end = torch.cat([p.detach().flatten() for p in agent.parameters()])
    optimizers = {key: opt.state_dict()["state"] for key, opt in agent.optimizers.items()}
    return SimpleNamespace(
        everything={
            "agent": {key: value.clone() for key, value in agent.state_dict().items()},
            "optimizers": optimizers,
            "metrics": {key: value.clone() for key, value in metrics.items()},
            "actions": actions,
            "rng": rng.get_state(),
        },
        metrics=metrics,
        moved=end - start,
    )


def test_a_graph_is_its_function_to_the_bit(script):
    """Parameters, targets, statistics, optimizers, metrics, actions, generator: no difference."""
    assert differences(train(script, "eager").everything, train(script, "graph").everything) == []


@pytest.mark.skipif(SMOKE, reason="nothing is compiled in a smoke test")
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_compiled_and_captured_are_the_eager_update(script, precision, record_property):
    """Captured is compiled to the bit; both move the parameters as eager does, but for rounding."""
    if precision == "tf32" and script.__name__ not in FPMD:
        pytest.skip("FPMD's will do")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    eager, compiled, captured = (train(script, path) for path in ("eager", "compiled", "captured"))
    torch.set_float32_matmul_precision("highest")
    error = (compiled.moved - eager.moved).norm() / eager.moved.norm()
    record_property("relative error of the movement", f"{error.item():.2e}")
    different = differences(compiled.everything, captured.everything)
    record_property("captured is not compiled", len(different))
    assert error < 0.05  # a step left out or taken twice moves by a twentieth and more
    assert different == []


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(...) trains on Ant-v4 in an empty folder; returns the run directory."""
    monkeypatch.chdir(tmp_path)

    def train(**changes):
        settings = {"env_id": "Ant-v4", "learning_starts": 400, "eval_every": 0, "log_every": 100}
        settings |= {"utd": 0.2, "num_envs": 2, "total_timesteps": 800, "torch_threads": 1}
        settings |= {"compile": not SMOKE}
        if script.__name__ in PIXELS:
            settings["env_id"] = "pixel_envs:SeededFrames-v0"
        if script.__name__ in OFFLINE:
            settings |= {"offline_steps": 100, "utd": 0.5}
            data = made_up_dataset(OBS_DIM, ACT_DIM, 1_000)
            monkeypatch.setattr(script, "load_dataset", lambda args: data)
        return script.main(published(script, **(settings | changes)))

    return train


def test_a_resumed_run_is_an_uninterrupted_one(script, run):
    """Bit for bit, as on a CPU: a run of 800 steps, and one of 600 that goes on."""
    decay = known(script, {"policy_lr_decay": (10, 30)})  # a recorded update reads the rate
    straight, resumed = run(**decay), run(total_timesteps=600, **decay)
    saved = load(resumed)
    args = script.Args(**(saved["args"] | {"resume": str(resumed), "total_timesteps": 800}))
    script.main(args)
    assert differences(load(straight), load(resumed)) == []
    assert rows(straight) == rows(resumed)


@pytest.mark.parametrize("path", ["eager", "captured", "tf32", "bfloat16"])
def test_main_trains(script, run, path, capfd, record_property):
    """A short run, evaluations included: it writes finite numbers and falls back on nothing."""
    if path in ("tf32", "bfloat16") and script.__name__ not in FPMD:
        pytest.skip("FPMD's will do")
    if SMOKE and path in ("captured", "tf32"):
        pytest.skip("wants a GPU")
    changes = {"precision": path} if path in ("tf32", "bfloat16") else {"compile": path != "eager"}
    changes["compile"] = path != "eager" and not SMOKE
    run_dir = run(eval_every=800, eval_episodes=2, **changes)
    err = capfd.readouterr().err
    assert "going on without" not in err and "warning" not in err.lower(), err
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if int(row["updates"])]
    losses = [name for name in script.METRICS if name.startswith("losses/")]
    assert losses and len(table) >= 4
    assert all(np.isfinite(float(row[name])) for row in table for name in losses)
    assert (run_dir / "evaluations.csv").read_text().count("\n") >= 3
    seconds = float(table[-1]["wall_time"])
    record_property("seconds", f"{seconds:.1f}")
