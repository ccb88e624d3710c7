"""Trained policies outside of the scripts: README's few lines, and export.py's graphs.

Every script's graph is held against what the script itself does, in an environment whose actions
have bounds of their own each, and whose reward weighs them all differently.
"""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from benchmark.deploy import act, export, policies
from benchmark.files import Refused

import numpy as np
import pytest
import torch
from conftest import OF_NUMBERS, PIXELS, ROOT, SCRIPTS, images_batch, known, randomise, small

CPU = torch.device("cpu")
BOUNDED = "probe_envs:Bounded-v0"
SMALL = {"hidden_dim": 16, "flow_steps": 3, "prior_std": 0.7, "chunk_size": 3, "seed": 5}
lacking = [name for name in export.ONNX_PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not installed")
each_script = pytest.mark.parametrize("name", OF_NUMBERS)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(script, folder, env, agent, args, more):
    """A policy.pt of that agent; returns its path."""
    content = {
        "algorithm": script.ALGORITHM,
        "script": f"{script.__name__}.py",
        "commit": "0123456",
        "policy": agent.acting_policy.state_dict(),
        "args": vars(args),
        "act_dim": env.action_space.shape[0],
        "action_bounds": torch.from_numpy(env.action_bounds),
        "global_step": 321,
    }
    path = folder / "policy.pt"
    torch.save(content | more, path)
    return path


def policy_file(name, folder, env_id=BOUNDED, **changes):
    """A policy.pt as the script writes it, with weights that matter; its content may be changed.

    Actions are sometimes clipped and mostly not.
    """
    script = importlib.import_module(name)
    args = script.Args(env_id=env_id, **known(script, SMALL))
    env = script.make_env(env_id)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    agent = script.Agent(*sizes, args, CPU)
    policy = agent.acting_policy
    randomise(policy, seed=1)
    for key, value in policy.named_parameters():
        if key in ("net.rest.4.weight", "net.rest.6.weight", "net.rest.5.weight"):
            value.data *= 0.3
    for key, value in policy.named_buffers():
        if key.startswith("normalise"):
            value.copy_(torch.tensor([1.5, 0.5]))  # mean and std alike
    return saved(script, folder, env, agent, args, {"obs_dim": sizes[0]} | changes)


def policy_of_frames(name, folder, **changes):
    """The same of a script that sees: the environment's numbers are behind black pictures."""
    script = importlib.import_module(name)
    behind = {"env_id": "pixel_envs:Blind-v0", "env_kwargs": json.dumps({"env_id": BOUNDED})}
    args = script.Args(**known(script, small(script) | {"prior_std": 0.7}), **behind)
    env = script.make_env(args.env_id, 0, args)
    shape = env.observation_space.shape
    agent = script.Agent(shape, 4, args, CPU)
    randomise(agent.encoder, seed=1)
    randomise(agent.acting_policy, seed=2)
    agent.acting_policy.net.rest[-1].weight.data *= 0.3
    own = {"encoder": agent.encoder.state_dict(), "obs_shape": shape}
    return saved(script, folder, env, agent, args, own | changes)


# ---------------------------------------------------------------------------- README
def test_readmes_lines_act_in_the_environments_own_units(tmp_path):
    """Without gradients, and like the script's own act for the same noise."""
    policy_file("fpmd_online", tmp_path, env_id="Humanoid-v4")
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(code, names)  # the README's own words
    trained = policies.read(tmp_path / "policy.pt")
    obs = torch.randn(trained.saved["obs_dim"], generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    action = names["act"](obs)
    expected = policies.reference(trained, obs[None], seed=3)[0]
    assert np.abs(action).max() <= 0.4 and (np.abs(action) < 0.399).any()
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- graphs
def check_clipping(trained, actions):
    """Some actions at their bounds, some between: else much could be wrong unseen."""
    low, high = trained.bounds.double()
    clipped = ((actions - low).abs() < 1e-4) | ((actions - high).abs() < 1e-4)
    if trained.actor.noise_shape:  # SAC's tanh never reaches them
        assert 0.02 < clipped.double().mean() < 0.9


@needs_onnx
@each_script
def test_a_graph_acts_as_its_script(name, tmp_path):
    """Actions, whatever the batch, and returns, from raw observations and standard normal noise."""
    trained = policies.read(policy_file(name, tmp_path))
    script = trained.module
    content = export.serialise(trained, ".onnx")
    policy = act.OnnxPolicy(content)
    chunk = (3,) if name == "mvp_offline_to_online" else ()
    assert [x.name for x in policy.session.get_outputs()] == ["action"]
    assert "noise" not in policy.metadata and policy.metadata["env_id"] == BOUNDED
    assert policy.metadata["script"] == f"{name}.py" and policy.metadata["commit"] == "0123456"
    assert policy.metadata["global_step"] == "321"
    assert (policy.metadata["obs_dim"], policy.metadata["act_dim"]) == ("2", "4")
    assert json.loads(policy.metadata["action_low"]) == [[-2.0, 0.0], [-0.5, 1.0]]
    assert json.loads(policy.metadata["action_high"]) == [[2.0, 3.0], [0.5, 9.0]]
    assert policy.metadata.get("chunk_size") == ("3" if chunk else None)

    # the script's own act, from its own generator, in [-1, 1]; bounds as the environment has them
    obs = 2 * torch.randn((200, 2), generator=torch.Generator().manual_seed(7)) + 1
    own = script.MODES[script.DEPLOYED]
    scaled = own(trained.agent, obs, trained.args, torch.Generator().manual_seed(8)).double()
    space = script.gym.make(BOUNDED).action_space
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    expected = middle + half * scaled.numpy().reshape(200, *chunk, 2, 2)
    noise = trained.actor.draw(200, torch.Generator().manual_seed(8))
    noise = None if noise is None else noise.numpy()
    found = policy.batch(obs.numpy(), noise)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (found >= space.low).all() and (found <= space.high).all()
    check_clipping(trained, torch.from_numpy(found).double())
    one = policy(obs[5].numpy(), None if noise is None else noise[5])
    np.testing.assert_allclose(one, found[5], rtol=1e-5, atol=1e-5)
    error, share = export.difference(trained, policy.batch, obs)
    assert error < 1e-4 and share < 1e-4

    # the same episodes by the graph alone and by the script in its own environments
    played = policies.play(trained, 3)
    plan = export.plan_of(trained, played)
    returns = act.play(policy, policy.noise_shape, BOUNDED, "{}", plan)
    assert len(set(returns)) == 3
    np.testing.assert_allclose(returns, played.returns, rtol=1e-5)


@needs_onnx
@pytest.mark.parametrize("name", PIXELS)
def test_a_graph_of_frames_acts_as_its_script(name, tmp_path):
    """From stacks of bytes, whatever the batch; the encoder is inside, in both formats."""
    trained = policies.read(policy_of_frames(name, tmp_path))
    script = trained.module
    obs = images_batch(200, seed=7)["obs"]
    own = script.MODES[script.DEPLOYED]
    scaled = own(trained.agent, obs, trained.args, torch.Generator().manual_seed(8)).double()
    space = script.gym.make(BOUNDED).action_space
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    expected = middle + half * scaled.numpy().reshape(200, 2, 2)
    check_clipping(trained, torch.from_numpy(expected))
    assert (np.ptp(expected, 0) > 0.1 * half).all()  # the pictures matter
    noise = trained.actor.draw(200, torch.Generator().manual_seed(8))
    inputs = "observation (batch, 3, 24, 24, 3)"
    if noise is not None:
        noise, inputs = noise.numpy(), f"{inputs}, noise (batch, 4)"
    for suffix in ".onnx", ".pt2":
        path = tmp_path / f"policy{suffix}"
        first, *_, wrote = export.export(trained, path, episodes=0)
        assert float(first.split()[-1]) < 1e-4
        assert f"{inputs} -> action (batch, 2, 2)" in wrote
        batch = export.batched(path.read_bytes(), suffix)
        np.testing.assert_allclose(batch(obs.numpy(), noise), expected, rtol=1e-4, atol=1e-4)
    metadata = act.OnnxPolicy(tmp_path / "policy.onnx").metadata
    assert json.loads(metadata["obs_shape"]) == [3, 24, 24, 3] and "obs_dim" not in metadata


@pytest.mark.parametrize("name", ["fpmd_meanflow_online", "mvp_offline_to_online"])
def test_a_program_of_torch_export(name, tmp_path):
    """The second format, which needs no other package: the same checks, metadata inside."""
    trained = policies.read(policy_file(name, tmp_path))
    lines = export.export(trained, tmp_path / "policy.pt2", episodes=2)
    extra = {"metadata.json": ""}
    model = torch.export.load(tmp_path / "policy.pt2", extra_files=extra).module()
    assert json.loads(extra["metadata.json"]) == export.describe(trained)
    obs = torch.randn(7, 2)
    noise = trained.actor.draw(7, torch.Generator().manual_seed(1))
    expected = policies.reference(trained, obs, seed=1)
    np.testing.assert_allclose(model(obs, noise), expected, rtol=1e-4, atol=1e-4)
    values = [re.search(r"episodes (\S+) \+- (\S+)", line).groups() for line in lines[1:3]]
    assert values[0] == values[1] and lines[2].startswith("torch.export: ")


def test_a_suffix_may_be_of_any_case(tmp_path, monkeypatch):
    """The format is the one that the name says."""
    seen = []
    monkeypatch.setattr(export, "serialise", lambda trained, suffix: seen.append(suffix))
    monkeypatch.setattr(export, "batched", lambda content, suffix: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(policies.read(policy_file("mvp_online", tmp_path)), tmp_path / "A.ONNX", 0)
    assert seen == [".onnx"]


def test_an_episode_that_outlasts_torchs_has_noise_all_the_same():
    """A chaotic simulator may keep a graph's episode running beyond the longest of torch."""
    seen = []

    def policy(obs, noise):
        seen.append(noise)
        return np.zeros(1)

    noise = np.zeros((1, 3, 1), np.float32)
    act.play(policy, (1,), "Pendulum-v1", "{}", act.Plan([1], noise, max_steps=5))
    assert [float(x.item()) != 0 for x in seen] == [False] * 3 + [True] * 2


@needs_onnx
def test_the_program_as_it_is_typed(tmp_path):
    """Of a run directory: two returns alike, two latencies, and no torch in the second process."""
    script = importlib.import_module("fpmd_meanflow_online")
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 130, "learning_starts": 100, "num_envs": 1}
    flags |= {"batch_size": 16, "hidden_dim": 16, "eval_every": 0, "compile": False}
    run_dir = script.main(script.Args(**flags, device="cpu", torch_threads=1))
    command = [sys.executable, export.__file__, run_dir, "--output", "policy.onnx"]
    result = subprocess.run([*command, "--episodes", "2"], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    first, *both, wrote = result.stdout.splitlines()
    assert re.fullmatch(r"largest difference to torch over 1,000 observations: \S+", first)
    assert both[0].startswith("torch: ") and both[1].startswith("onnxruntime, without torch: ")
    pattern = r"(\d+\.\d{3}) ms an action, return of 2 episodes (\S+) \+- (\S+)"
    numbers = [re.search(pattern, line).groups() for line in both]
    assert float(numbers[0][1]) == pytest.approx(float(numbers[1][1]), rel=1e-3)
    assert "observation (batch, 3), noise (batch, 1) -> action (batch, 1)" in wrote
    commit = json.loads((run_dir / "versions.json").read_text())["commit"]
    assert act.OnnxPolicy(tmp_path / "policy.onnx").metadata["commit"] == commit
    # the returns are those that --evaluate prints
    played = policies.play(policies.read(run_dir), 2)
    assert f"{np.mean(played.returns):.2f}" == numbers[0][1]


def test_nothing_is_written_where_the_graph_differs(tmp_path, monkeypatch):
    trained = policies.read(policy_file("fpmd_online", tmp_path))
    right = export.batched

    def wrong(content, suffix):
        batch = right(content, suffix)
        return lambda obs, noise: batch(obs, noise) + np.float32(1e-3)

    monkeypatch.setattr(export, "batched", wrong)
    with pytest.raises(RuntimeError, match=r"differ from torch's by up to 0.001"):
        export.export(trained, tmp_path / "policy.pt2", episodes=0)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_without_episodes_no_simulator_is_needed(tmp_path, monkeypatch):
    trained = policies.read(policy_file("mvp_online", tmp_path))
    monkeypatch.setattr(trained.module, "make_envs", None)
    monkeypatch.setattr(act, "make", None)
    _, ours, theirs, wrote = export.export(trained, tmp_path / "policy.pt2", episodes=0)
    assert "return" not in ours + theirs and "noise (batch, 4) -> action (batch, 2, 2)" in wrote


def test_an_environment_with_other_bounds_is_refused(tmp_path):
    bounds = torch.tensor([[[-2.0, 0], [-0.5, 1]], [[2, 3], [0.5, 8]]])
    trained = policies.read(policy_file("fpmd_online", tmp_path, action_bounds=bounds))
    with pytest.raises(Refused, match="has action bounds"):
        policies.play(trained, 1)


@pytest.mark.parametrize("name", [*SCRIPTS, "meanflowql_offline_to_online"])
def test_noise_is_what_the_scripts_act_draws(name, tmp_path):
    """To the bit, with the generator where act leaves it: episodes go on with the same noise."""
    trained = policies.read(policy_file(name, tmp_path))
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    obs = torch.zeros(4, 2)
    noise = trained.actor.draw(4, ours)
    script = trained.module
    expected = script.MODES[script.DEPLOYED](trained.agent, obs, trained.args, theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    inputs = [obs] if noise is None else [obs, noise]
    torch.testing.assert_close(trained.actor(*inputs), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- refusals
def refusal(monkeypatch, program, *words):
    """The line with which a program refuses, having written nothing."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, words)])
    with pytest.raises(Refused) as refused:
        program.main()
    return str(refused.value)


NO_POLICY = {
    "policy.pt without bounds": {"action_bounds": None},
    "bounds that fall": {"action_bounds": -torch.ones(2, 4)},
    "bounds for two": {"action_bounds": torch.tensor([[-1.0, -1], [1, 1]])},
    "no size": {"obs_dim": 0},
    "another size": {"obs_dim": 3},
    "a size of text": {"act_dim": "4"},
    "weights of another script": {"policy": {"w": torch.ones(2)}},
    "a script that is not here": {"script": "mine_online.py"},
}


@pytest.mark.parametrize("title", NO_POLICY)
def test_a_policy_that_does_not_fit_is_refused(title, tmp_path, monkeypatch):
    path = policy_file("fpmd_online", tmp_path, **NO_POLICY[title])
    words = [path, "--output", "x.pt2", "--env-id", BOUNDED]
    line = refusal(monkeypatch, export, *words)
    assert "policy.pt" in line and "\n" not in line and not (tmp_path / "x.pt2").exists()


NO_SIGHT = {
    "no encoder": {"encoder": {}},
    "another encoder": {"encoder": {"w": torch.ones(2)}},
    "numbers": {"obs_shape": 3},
    "no frames": {"obs_shape": (0, 24, 24, 3)},
    "no colours": {"obs_shape": (3, 24, 24)},
}


@pytest.mark.parametrize("title", NO_SIGHT)
def test_a_policy_of_frames_that_does_not_fit_is_refused(title, tmp_path, monkeypatch):
    path = policy_of_frames("fpmd_meanflow_pixels_online", tmp_path, **NO_SIGHT[title])
    line = refusal(monkeypatch, export, path, "--output", "x.pt2", "--episodes", "0")
    assert "policy.pt" in line and "\n" not in line and not (tmp_path / "x.pt2").exists()


def test_no_episodes_are_played_of_frames(tmp_path, monkeypatch):
    path = policy_of_frames("fpmd_meanflow_pixels_online", tmp_path)
    line = refusal(monkeypatch, export, path, "--output", "x.pt2")
    assert "acts on frames" in line and "add --episodes 0" in line
    assert not (tmp_path / "x.pt2").exists()
    if not lacking:
        trained = policies.read(path)
        (tmp_path / "x.onnx").write_bytes(export.serialise(trained, ".onnx"))
        assert "acts on frames" in refusal(monkeypatch, act, "x.onnx")


def test_an_older_policy_is_refused_in_one_line(tmp_path, monkeypatch):
    path = policy_file("fpmd_online", tmp_path)
    content = torch.load(path, weights_only=True)
    for name in "script", "commit", "obs_dim", "act_dim", "action_bounds":
        del content[name]
    torch.save(content | {"critics": {}}, path)
    line = refusal(monkeypatch, export, path, "--output", "x.pt2")
    assert "of a version without action bounds; go on with --resume" in line


def test_flags_that_the_script_does_not_know_are_named(tmp_path, capsys):
    path = policy_file("fpmd_online", tmp_path)
    policies.read(path)
    assert capsys.readouterr().err == ""
    content = torch.load(path, weights_only=True)
    torch.save(content | {"args": content["args"] | {"sharpness": 3.0}}, path)
    policies.read(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line and "['sharpness']" in line


def test_files_and_words_that_cannot_be_used(tmp_path, monkeypatch):
    path = policy_file("fpmd_online", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not a policy\n")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1000])
    torch.save({"model": torch.ones(2)}, tmp_path / "foreign.pt")
    output = ["--output", "x.pt2"]
    assert "none.pt does not exist" in refusal(monkeypatch, export, "none.pt", *output)
    assert "empty/policy.pt does not exist" in refusal(monkeypatch, export, "empty", *output)
    for name in "text.pt", "cut.pt":
        assert "is damaged" in refusal(monkeypatch, export, name, *output)
    assert "is no policy.pt" in refusal(monkeypatch, export, "foreign.pt", *output)
    for name in "x.pth", "x", "empty":
        line = refusal(monkeypatch, export, path, "--output", name)
        assert "must end with .onnx or .pt2" in line
    assert "Not a dir" in refusal(monkeypatch, export, path, "--output", "text.pt/x.pt2")
    assert "--output" in refusal(monkeypatch, export, path)
    assert "--script none.py is no" in refusal(
        monkeypatch, export, path, *output, "--script=none.py"
    )
    assert "would import probe_envs" in refusal(monkeypatch, export, path, *output)
    other = refusal(monkeypatch, export, path, *output, "--env-id", "Ant-v4")
    assert "was trained on probe_envs:Bounded-v0, not on Ant-v4" in other
    assert {p.name for p in tmp_path.iterdir()} == {
        "policy.pt",
        "empty",
        "text.pt",
        "cut.pt",
        "foreign.pt",
    }


def test_missing_packages_are_named_in_one_line(tmp_path, monkeypatch):
    path = policy_file("fpmd_online", tmp_path)
    real = importlib.util.find_spec
    hidden = {"onnxscript", "onnxruntime"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in hidden else real(name)
    )
    line = refusal(monkeypatch, export, path, "--output", "x.onnx", "--env-id", BOUNDED)
    if not lacking:
        assert line.startswith("an .onnx file needs onnxscript and onnxruntime: pip install")
    export.refuse_missing_packages(".pt2")  # needs none


@needs_onnx
def test_act_refuses_what_export_has_not_written(tmp_path, monkeypatch):
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [other])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), "foreign.onnx")
    (tmp_path / "text.onnx").write_text("not a graph\n")
    assert "does not exist" in refusal(monkeypatch, act, "none.onnx")
    assert "is damaged, or no ONNX" in refusal(monkeypatch, act, "text.onnx")
    assert "was not written by export.py" in refusal(monkeypatch, act, "foreign.onnx")
    assert "many" in refusal(monkeypatch, act, "foreign.onnx", "--episodes", "many")
