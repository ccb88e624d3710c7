"""The fast path computes what the plain one does, and steps aside where it cannot work."""

from types import SimpleNamespace

import pytest
import torch
from conftest import (
    COMPILER,
    MIRROR,
    SMALL,
    FakeGraph,
    flows_only,
    known,
    load,
    one_update,
    randomise,
    recordable,
    rng,
)
from test_resume import differences

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DISTRIBUTIONAL = "fpmd_plus_online", "sac_online"
DEVICES = [pytest.param("cpu", marks=COMPILER), pytest.param("cuda", marks=CUDA)]


def agent_after(script, updates, fast, device="cpu", **changes):
    """The agent after that many updates on random batches, and the metrics of the last."""
    args = script.Args(**known(script, SMALL | changes))
    device = torch.device(device)
    torch.manual_seed(0)
    agent, generator = script.Agent(3, 2, args, device), torch.Generator(device).manual_seed(0)
    improve = script.update
    if fast:
        _, improve = script.accelerate(agent, script.act_explore, improve)
    for i in range(updates):
        draw = rng(i)
        batch = {"obs": torch.randn((16, 3), generator=draw), "rewards": torch.ones(16)}
        batch |= {"actions": torch.rand((16, 2), generator=draw), "terminations": torch.zeros(16)}
        batch["next_obs"] = torch.randn((16, 3), generator=draw)
        batch = {key: value.to(device) for key, value in batch.items()}
        metrics = one_update(script, agent, batch, args, generator, improve)
    if fast:
        or_eager = improve.function if device.type == "cuda" else improve
        assert or_eager.function is not or_eager.plain, "went on without compiling"
    return agent, metrics


@pytest.mark.parametrize("device", DEVICES)
def test_fast_updates_equal_plain_ones(script, device):
    """Parameters, targets, statistics, metrics, optimizers' state after 20 updates, to rounding."""
    torch._dynamo.reset()
    both = [agent_after(script, 20, fast, device, num_candidates=50) for fast in (False, True)]
    (plain, plain_metrics), (fast, fast_metrics) = both
    assert plain.state_dict().keys() == fast.state_dict().keys()  # no _orig_mod.
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_metrics, plain_metrics, rtol=1e-3, atol=1e-5)
    for key, optimizer in plain.optimizers.items():
        states = [agent.optimizers[key].state_dict()["state"] for agent in (fast, plain)]
        assert optimizer.state_dict()["param_groups"][0]["lr"] > 0
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_main_compiles_what_an_update_runs(script, run, monkeypatch):
    """--compile: the losses worth it, and the networks that generate, rank and make targets."""
    compiled = []

    def compile(function, **how):
        compiled.append(getattr(function, "__self__", None) or function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    for flag in False, True:
        assert compiled == []
        run(env_id="probe_envs:Constant-v0", total_timesteps=110, utd=0.1, compile=flag)
    targets = script.__name__ != "fpmd_plus_online"  # its critics are their own targets
    networks, losses = compiled[: 2 + targets], compiled[2 + targets :]
    policy = script.Agent(1, 1, script.Args(hidden_dim=1), torch.device("cpu")).policy
    critics = [script.critic_loss] if script.__name__ in DISTRIBUTIONAL else []
    assert losses == [*critics, script.policy_loss]
    assert [type(network) for network in networks] == [
        type(policy),
        *[script.TwinCritic] * (1 + targets),
    ]


@pytest.mark.parametrize("what", ["everything", "critic_loss", "policy_loss"])
def test_without_a_compiler_one_line_and_on(script, run, monkeypatch, capsys, what):
    """From the first action on, or only in an update: the run is a plain one all the same."""
    if what == "critic_loss" and script.__name__ not in DISTRIBUTIONAL:
        pytest.skip("its critics' loss is not compiled")
    plain = run(env_id="probe_envs:Constant-v0", total_timesteps=150, utd=0.1)
    stances, failed = [], []

    def compile(function, **how):
        def compiled(*args, **options):
            works = what not in ("everything", getattr(function, "__name__", ""))
            if works or stances:  # as torch.compile does once it has been told
                return function(*args, **options)
            failed.append(function)
            raise RuntimeError("no compiler here\nand more about it")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    run_dir = run(env_id="probe_envs:Constant-v0", total_timesteps=150, utd=0.1, compile=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    start = f"{script.__name__}.py: warning: going on without --compile, which needs g++"
    assert line.startswith(start)
    assert line.endswith(": no compiler here")
    assert stances == ["force_eager"] and len(failed) == 1
    assert differences(load(plain), load(run_dir)) == ["/args/compile"]


@flows_only
def test_the_one_step_policy_is_the_same_policy(script):
    """For a few states and for candidates of them; the policy it is made from stays as it was."""
    policy = script.Agent(3, 2, script.Args(hidden_dim=8), torch.device("cpu")).acting_policy
    randomise(policy, 0)
    for p in policy.net.rest[-1].parameters():
        p.data *= 0.1  # many actions inside the box
    before = [p.clone() for p in policy.parameters()]
    deployed, obs = script.OneStepPolicy(policy), torch.randn(200, 3, generator=rng())
    for shape in (200, 2), (4, 200, 2):
        z = torch.randn(shape, generator=rng(1))
        unclipped = script.generate(policy, obs, z, *known(script, {"flow_steps": 1}).values())
        assert 0.1 < (unclipped.abs() > 1).float().mean() < 0.9
        torch.testing.assert_close(deployed(obs, z), unclipped.clamp(-1, 1))
    assert all(map(torch.equal, before, policy.parameters()))
    assert not any(p.requires_grad for p in deployed.parameters())


def test_an_update_reads_nothing_that_a_graph_would_freeze(script):
    """A captured update sees tensors change, but no counter and no learning rate of Python's."""
    args, generator = script.Args(**known(script, SMALL)), rng()
    agent = script.Agent(3, 2, args, torch.device("cpu"))
    for counter in [name for name, value in vars(agent).items() if type(value) is int]:
        delattr(agent, counter)
    batch = {key: torch.rand(16, 3) for key in ("obs", "next_obs")} | {"actions": torch.rand(16, 2)}
    batch |= {key: torch.rand(16) for key in ("rewards", "terminations")}
    for improve_policy in (True, False) if script.__name__ in MIRROR else (True,):
        metrics = script.update(agent, batch, args, generator, improve_policy)
        assert all(isinstance(value, torch.Tensor) for value in metrics.values())
    rates = {name: o.param_groups[0]["lr"] for name, o in agent.optimizers.items()}
    if script.__name__ in MIRROR:  # the policy's learning rate decays, so it is a tensor
        before = [p.clone() for p in agent.policy.parameters()]
        rates["policy"].zero_()
        script.update(agent, batch, args, generator, True)
        assert all(map(torch.equal, before, agent.policy.parameters()))
        rates["policy"].fill_(1e-3)
        script.update(agent, batch, args, generator, True)
        assert not any(map(torch.equal, before, agent.policy.parameters()))
        del rates["policy"]
    assert rates == {name: getattr(args, f"{name}_lr") for name in rates}  # never another


def test_captured_calls_copy_in_replay_and_keep_their_addresses(script, monkeypatch):
    """Three plain calls per key, one recording, then replays that read what was copied in."""
    calls, generator = [], rng()

    def function(agent, inputs, args, rng, *key):
        calls.append(key)
        x = inputs["x"] if isinstance(inputs, dict) else inputs
        return {"y": x * sum(key, 1), "noise": torch.rand(1, generator=rng)}

    fake = SimpleNamespace(CUDAGraph=FakeGraph, graph=FakeGraph.record, current_stream=lambda: None)
    monkeypatch.setattr(script.torch, "cuda", fake)
    agent = torch.nn.Module()
    agent.optimizers = {}
    for inputs in {"x": torch.zeros(2)}, torch.zeros(2):
        captured = script.Captured(recordable(function))
        results = {(): [], (True,): [], (False, 2): []}
        calls.clear()
        for i in range(6):
            for key in results:
                new = torch.full((2,), float(i))
                new = {"x": new} if isinstance(inputs, dict) else new
                outputs = captured(agent, new, None, generator, *key)
                assert outputs["y"].tolist() == [i * sum(key, 1)] * 2
                results[key].append(outputs["y"])
        for key in results:
            assert calls.count(key) == 3 + 1 + 3  # plain, recording, replays
        for key, (graph, static, _) in captured.graphs.items():
            assert graph.generator is generator and static is not new
            assert results[key][3] is results[key][4] is results[key][5]
            assert len({id(y) for y in results[key][:4]}) == 4


def test_a_fallback_leaves_everything_where_it_was(script, monkeypatch):
    """Values and addresses, since a graph of the other function may hold these."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: None)
    args, generator = script.Args(**known(script, SMALL)), rng()
    agent, _ = agent_after(script, 3, False, torch.device("cpu"))

    def tensors():
        states = [optimizer.state for optimizer in agent.optimizers.values()]
        moments = [x for state in states for part in state.values() for x in part.values()]
        return [*moments, *agent.state_dict().values()]

    before, addresses = [x.clone() for x in tensors()], [x.data_ptr() for x in tensors()]
    draws = generator.get_state()

    def fast(*_):
        for x in tensors():
            x.add_(1)
        torch.rand(1, generator=generator)
        raise RuntimeError("no compiler")

    improve = script.OrEager(fast, lambda *_: "plain")
    assert [improve(agent, None, args, generator, False) for _ in range(5)] == ["plain"] * 5
    assert [x.data_ptr() for x in tensors()] == addresses
    assert all(map(torch.equal, tensors(), before)) and generator.get_state().equal(draws)


def test_on_a_gpu_what_falls_back_is_recorded_all_the_same(script, monkeypatch):
    """A recording that fails is no compiler's fault: the run ends, and says why."""
    agent = script.Agent(3, 2, script.Args(**known(script, SMALL)), torch.device("cpu"))
    agent.device = SimpleNamespace(type="cuda")
    fake = SimpleNamespace(CUDAGraph=FakeGraph, graph=FakeGraph.record, Stream=lambda _: "side")
    fake.synchronize, fake.current_stream, streams = lambda _: None, lambda: streams[-1], []
    fake.set_stream = streams.append
    monkeypatch.setattr(script.torch, "cuda", fake)
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)

    def act(agent, obs, args, rng):
        if not stances:
            raise RuntimeError("no compiler")
        return obs + 1

    def act_by_a_number(agent, obs, args, rng):
        if FakeGraph.recording:
            raise RuntimeError("not while recording")
        return obs + 1

    with torch.compiler.config.patch(force_cudagraph_gc=False):
        explore, improve = script.accelerate(agent, recordable(act), script.update)
        wrong, _ = script.accelerate(agent, act_by_a_number, script.update)
        assert streams == ["side"] * 2 and torch.compiler.config.force_cudagraph_gc
    assert isinstance(improve, script.Captured)
    for i in range(6):
        obs = torch.full((2,), float(i))
        assert explore(agent, obs, None, rng()).tolist() == [i + 1] * 2
        if i < 3:
            assert wrong(agent, obs, None, rng()).tolist() == [i + 1] * 2
    assert stances == ["force_eager"] and len(explore.graphs) == 1
    with pytest.raises(RuntimeError, match="while recording"):
        wrong(agent, obs, None, rng())
    assert stances == ["force_eager"]
