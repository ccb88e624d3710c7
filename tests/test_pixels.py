"""Learning from pixels: frames, the encoder, what trains what, and a resume with its frames.

Most of it needs no OpenGL: pixel_envs draws with numpy. What does need it is skipped, with the
reason, where there is none.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pixel_envs
import pytest
import torch
from conftest import (
    FILES,
    FPMD_PIXELS,
    PIXELS,
    SEEN,
    as_flags,
    count,
    equal,
    images_batch,
    known,
    load,
    no_opengl,
    one_update,
    rng,
    spy,
    values,
)
from fork_server import PATIENCE
from test_contract import commands
from test_resume import differences, go_on, rows

# the sizes of all tests, but for what is FPMD-R's method; a script takes what it knows
SMALL = conftest.SMALL | SEEN | {"utd": 0.1}
del SMALL["flow_steps"]
SAC = "sac_pixels_online"
SHAPE = (3, 24, 24, 3)  # of an observation: frames, height, width, colours
CPU = torch.device("cpu")


@pytest.fixture(params=PIXELS)
def script(request):
    """Each script that learns from pixels, imported as a module."""
    return __import__(request.param)


fpmd_only = pytest.mark.parametrize("script", FPMD_PIXELS, indirect=True)
sac_only = pytest.mark.parametrize("script", [SAC], indirect=True)


def small_args(script, **changes):
    return script.Args(**(known(script, SMALL) | changes))


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(env_id=..., ...) trains at SMALL size in an empty folder; returns the run directory."""
    monkeypatch.chdir(tmp_path)
    return lambda **changes: script.main(small_args(script, **changes))


def make_agent(script, act_dim=2, **changes):
    torch.manual_seed(0)
    args = small_args(script, **changes)
    return script.Agent((args.frame_stack, *SHAPE[1:]), act_dim, args, CPU), args


# ------------------------------------------------------------------ frames and their buffer


class Happened:
    """CodedFrames in a vector env, played at random into a buffer; what happened, in order."""

    def __init__(self, script, steps, num_envs=3, **changes):
        env_id = "pixel_envs:CodedFrames-v0"
        args = small_args(script, **({"num_envs": num_envs, "env_id": env_id} | changes))
        pixel_envs.CodedFrames.made = 0
        envs = script.make_envs(args, num_envs)
        pixel_envs.CodedFrames.log.clear()
        self.buffer = script.ReplayBuffer(args, SHAPE, 1, CPU)
        draw = np.random.default_rng(0)
        obs, _ = envs.reset(seed=[0] * num_envs)
        self.first_obs = obs
        self.resets = num_envs
        for _ in range(steps):
            actions = draw.uniform(-1, 1, (num_envs, 1)).astype(np.float32)
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            ends = terminations | truncations
            self.buffer.add(obs, actions, rewards, infos["last_obs"], terminations, ends)
            obs = next_obs
            self.resets += ends.sum()
        self.obs = obs
        self.log = list(pixel_envs.CodedFrames.log)

    def stored(self):
        """All that sampling can give, the oldest first."""
        size = self.buffer.size

        class EveryOne:
            """Stands in for a generator: each age once."""

        with pytest.MonkeyPatch.context() as patch:
            ages = torch.arange(size - 1, -1, -1)
            patch.setattr(torch, "randint", lambda *_, **__: ages)
            EveryOne.device = CPU
            return self.buffer.sample(size, EveryOne)


def assert_equal_to_log(stored, log):
    assert len(stored["rewards"]) == len(log) > 0
    _, before, actions, rewards, after, terminated = zip(*log, strict=True)
    assert np.array_equal(stored["obs"].numpy(), np.stack(before))
    assert np.array_equal(stored["next_obs"].numpy(), np.stack(after))
    assert np.array_equal(stored["actions"].numpy()[:, 0], np.array(actions, np.float32))
    assert np.array_equal(stored["rewards"].numpy(), np.array(rewards, np.float32))
    assert np.array_equal(stored["terminations"].numpy(), np.array(terminated, np.float32))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_buffer_holds_what_happened(script, num_envs):
    """Against a list of stacks: episodes of length 1 to 5, staggered, ended in both ways."""
    happened = Happened(script, 60, num_envs)
    assert_equal_to_log(happened.stored(), happened.log)
    ends = {(row[5], row[3] % 10) for row in happened.log}
    assert {(True, 1), (False, 1)} <= ends  # an episode of length 1 that terminates


@pytest.mark.parametrize("buffer_size", [9, 30, 31, 32])
def test_buffer_goes_round(script, buffer_size):
    """Many times: what is left is the end of what happened, whole, and not much less of it."""
    happened = Happened(script, 200, 3, buffer_size=buffer_size, total_timesteps=100)
    size = happened.buffer.size
    assert_equal_to_log(happened.stored(), happened.log[-size:])
    assert happened.buffer.written > 5 * len(happened.buffer.frames)
    # short episodes bring up to twice as many frames as steps, and frames decide
    assert buffer_size // 3 * 3 >= size >= buffer_size // 3


def test_a_run_shorter_than_its_buffer_keeps_all_of_it(script):
    """Even where each episode brings two frames for one step."""
    happened = Happened(script, 100, 3, total_timesteps=300)
    assert happened.buffer.size == 300
    assert len(happened.buffer.frames) < 10_000
    assert_equal_to_log(happened.stored(), happened.log)


def test_the_smallest_buffer_holds_the_newest_step(script):
    """A step's oldest frame dates from three steps before it, whatever the other envs brought."""
    happened = Happened(script, 60, 3, buffer_size=3)
    assert happened.buffer.size == 3
    assert_equal_to_log(happened.stored(), happened.log[-3:])


def test_each_frame_is_stored_once(script):
    """One frame per step and one per episode; the rest of a transition is small."""
    happened = Happened(script, 100, 3)
    buffer = happened.buffer
    assert buffer.written == 300 + len({(r[0], r[3] // 10) for r in happened.log if r[3] % 10 == 1})
    frame = 24 * 24 * 3
    assert buffer.frames[0].nbytes == frame
    assert buffer.rows[0].nbytes + buffer.numbers[0].nbytes <= 4 * (1 + 2) + 4 * 4


def test_a_stack_begins_with_copies_of_the_first_frame(script):
    happened = Happened(script, 1, 3)
    assert (happened.first_obs == happened.first_obs[:, :1]).all()
    f0 = happened.first_obs[:, 0]
    stored = happened.stored()["next_obs"].numpy()
    assert np.array_equal(stored[:, 0], f0) and np.array_equal(stored[:, 1], f0)
    assert (stored[:, 2] != f0).any()


def test_sampling_is_uniform_over_what_is_there(script):
    happened = Happened(script, 200, 3, buffer_size=30, total_timesteps=100)
    batch = happened.buffer.sample(20_000, rng())
    found, counts = np.unique(batch["rewards"].numpy(), return_counts=True)
    assert set(found) == {float(row[3]) for row in happened.log[-happened.buffer.size :]}
    expected = 20_000 / happened.buffer.size
    assert np.abs(counts - expected).max() < 6 * expected**0.5


def test_a_run_stores_what_happened(script, run):
    """Through the training loop, and read as another program would: numbers, and frames.bin."""
    pixel_envs.CodedFrames.made = 0
    pixel_envs.CodedFrames.log.clear()
    settings = {"num_envs": 3, "eval_episodes": 1, "total_timesteps": 150}
    run_dir = run(env_id="pixel_envs:CodedFrames-v0", learning_starts=120, **settings)
    log = pixel_envs.CodedFrames.log[1:]  # but for the step that evaluation's env is tried with
    saved = load(run_dir)["buffer"]
    frames = torch.from_numpy(np.fromfile(run_dir / "frames.bin", np.uint8)).view(-1, *SHAPE[1:])
    stacks = frames[saved["numbers"].long()]
    actions, rewards, terminations = saved["rows"].T
    stored = {"obs": stacks[:, :-1], "next_obs": stacks[:, 1:], "actions": actions[:, None]}
    assert_equal_to_log(stored | {"rewards": rewards, "terminations": terminations}, log)
    assert saved["written"] == len(frames)


# ------------------------------------------------------------------ the random shift


def padded_and_cropped(images, pad, offsets):
    """As DrQ-v2 does it: repeat the edges, then crop at whole pixels; offsets (2, B) from 0."""
    size = images.shape[2]
    channels = images.permute(0, 1, 4, 2, 3).flatten(1, 2).float()
    padded = torch.nn.functional.pad(channels, (pad,) * 4, mode="replicate")
    return torch.stack(
        [
            image[:, y : y + size, x : x + size]
            for image, y, x in zip(padded, *offsets.tolist(), strict=True)
        ]
    )


def with_offsets(script, images, pad, offsets):
    """random_shift with these offsets (2, B) in place of drawn ones."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = torch.as_tensor(offsets)[:, :, None]
        patch.setattr(torch, "randint", lambda *_, **__: drawn)
        return script.random_shift(images, pad, rng())


def test_shift_is_a_crop_after_padding(script):
    images = images_batch(81)["obs"]
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    shifted = with_offsets(script, images, 4, offsets - 4)
    assert shifted.shape == images.shape and shifted.dtype == torch.uint8
    channels = shifted.permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert torch.equal(channels.float(), padded_and_cropped(images, 4, offsets))
    assert torch.equal(shifted[40], images[40])  # no offset


def test_shift_moves_what_is_seen(script):
    """Where the picture moves by (2, -1), so does what it shows, inside the margin."""
    images = images_batch(1)["obs"]
    (shifted,) = with_offsets(script, images, 4, [[2], [-1]])
    assert torch.equal(shifted[:, 4:-4, 4:-4], images[0, :, 6:-2, 3:-5])


def test_no_shift_and_one_colour_stay(script):
    images = images_batch()["obs"]
    assert torch.equal(script.random_shift(images, 0, rng()), images)
    plain = torch.full_like(images, 77)
    assert torch.equal(script.random_shift(plain, 4, rng()), plain)


def ramp(batch_size, frame_stack=3, size=24):
    """Pictures from which a shift can be read off: red is the row and green the column."""
    images = torch.zeros((batch_size, frame_stack, size, size, 3), dtype=torch.uint8)
    images[..., 0] = torch.arange(size)[:, None]
    images[..., 1] = torch.arange(size)
    return images


def offsets_of(shifted):
    """(B, K, 2) from ramp's middle pixel."""
    return shifted[:, :, 12, 12, :2].int() - 12


def test_shifts_are_uniform_and_from_the_generator_alone(script):
    """Each of 81 offsets equally often (chi-square), the same for a stack's frames."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    offsets = offsets_of(script.random_shift(ramp(8_100), 4, rng()))
    assert torch.equal(torch.get_rng_state(), before)
    assert (offsets == offsets[:, :1]).all()
    cells = 9 * (offsets[:, 0, 0] + 4) + offsets[:, 0, 1] + 4
    counts = torch.bincount(cells, minlength=81)
    assert len(counts) == 81
    assert ((counts - 100) ** 2 / 100).sum() < 125  # 80 degrees of freedom: 124.8 is 0.1 %
    again = offsets_of(script.random_shift(ramp(8_100), 4, rng()))
    assert torch.equal(again, offsets)


def test_obs_and_next_obs_are_shifted_apart(script, monkeypatch):
    agent, args = make_agent(script, random_shift=4, batch_size=64)
    seen = spied(monkeypatch, agent.encoder)
    batch = images_batch(64) | {"obs": ramp(64), "next_obs": ramp(64)}
    script.update(agent, batch, args, rng(), True)
    first, second = (offsets_of(images)[:, 0] for images in seen)
    assert (first != second).any(1).float().mean() > 0.9
    assert len(first.unique(dim=0)) > 30 and len(second.unique(dim=0)) > 30


# ------------------------------------------------------------------ networks and update


def spied(monkeypatch, module):
    """What a module is called with, call by call."""
    inputs = []
    forward = module.forward

    def kept(x):
        inputs.append(x.clone())
        return forward(x)

    monkeypatch.setattr(module, "forward", kept)
    return inputs


def test_parameter_counts(script):
    """Those of the authors' networks on walker: 84 pixels, three frames, six actions."""
    agent = script.Agent((3, 84, 84, 3), 6, script.Args(), CPU)
    assert count(agent.encoder) == 30_368
    assert agent.encoder.out_dim == 39_200
    assert count(agent.critic) == 2 * 2_106_583
    sizes = {"fpmd_meanflow_pixels_online": 2_118_204, "fpmd_pixels_online": 2_113_036}
    sizes |= {SAC: 2_107_874}
    assert count(agent.policy) == sizes[script.__name__]


@pytest.mark.parametrize("size", [15, 24, 47, 48, 64, 84])
def test_encoder_knows_its_width(script, size):
    encoder = script.Encoder((2, size, size, 3), 4)
    images = torch.zeros((1, 2, size, size, 3), dtype=torch.uint8)
    assert encoder(images).shape == (1, encoder.out_dim)


def test_encoder_against_float64(script):
    """(x / 255 - 0.5), frames' colours as channels with the oldest first, four convolutions."""
    encoder = script.Encoder(SHAPE, 4)
    images = images_batch(3)["obs"]
    x = np.concatenate(list(images.double().numpy().transpose(1, 0, 4, 2, 3)), 1) / 255 - 0.5
    for layer in (module for module in encoder.layers if hasattr(module, "weight")):
        weight = layer.weight.detach().double().numpy()
        bias = layer.bias.detach().double().numpy()
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        windows = windows[:, :, :: layer.stride[0], :: layer.stride[0]]
        x = np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
        x = np.maximum(x, 0)
    assert encoder(images).detach().numpy() == pytest.approx(x.reshape(3, -1), abs=1e-5)


def test_trunk_against_float64(script):
    trunk = script.Trunk(40, 8)
    h = torch.randn((5, 40), generator=rng())
    linear, norm, _ = trunk
    x = h.double() @ linear.weight.double().T + linear.bias.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    assert trunk(h).detach().numpy() == pytest.approx(x.tanh().detach().numpy(), abs=1e-5)


def test_each_q_has_its_trunk(script):
    agent, _ = make_agent(script)
    h = torch.randn((5, agent.encoder.out_dim), generator=rng())
    states = agent.critic.states(h)
    assert states.shape == (2, 5, 8) and not torch.equal(states[0], states[1])
    actions = torch.zeros((5, 2))
    q = agent.critic(states, actions)
    assert torch.equal(q[0], agent.critic.q1(states[0], actions))
    assert torch.equal(q[1], agent.critic.q2(states[1], actions))


def test_who_trains_whom(script, monkeypatch):
    """The critics' loss reaches encoder, trunks and Qs; the policy's reaches policy and trunk."""
    agent, args = make_agent(script)
    reached = {}
    networks = {"encoder": agent.encoder, "critic": agent.critic, "policy": agent.policy}
    backward = torch.Tensor.backward

    def noted(loss, **options):
        for network in networks.values():
            network.zero_grad()
        backward(loss, **options)
        reached[len(reached)] = {
            f"{name}.{parameter}"
            for name, network in networks.items()
            for parameter, p in network.named_parameters()
            if p.grad is not None and p.grad.any()
        }

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    script.update(agent, images_batch(), args, rng(), True)
    of_critics, of_policy = reached.values()
    named = {f"{n}.{p}" for n, network in networks.items() for p, _ in network.named_parameters()}
    assert {name for name in named if not name.startswith("policy.")} == of_critics
    # the last bias of a time embedding cannot be told from that of the first layer: all are there
    assert {name for name in named if name.startswith("policy.")} == of_policy


@fpmd_only
def test_the_target_carries_no_gradient(script):
    agent, args = make_agent(script)
    batch = images_batch()
    with torch.no_grad():
        h = agent.encoder(batch["next_obs"])
    script.update_critic(agent, batch, h, batch["actions"], args)
    assert all(p.grad is None for p in agent.target_critic.parameters())
    assert all(p.grad is None for p in agent.policy.parameters())


def test_each_network_has_one_optimizer(script):
    rates = {"encoder_lr": 1e-3, "critic_lr": 2e-3, "alpha_lr": 4e-3}
    rates["policy_lr"] = 3e-3 if script.__name__ == SAC else (3e-3, 3e-4)
    agent, _ = make_agent(script, **rates)
    owners = {}
    for name, optimizer in agent.optimizers.items():
        for group in optimizer.param_groups:
            for p in group["params"]:
                owners.setdefault(p, []).append(name)
    expected = {"encoder": agent.encoder, "critic": agent.critic, "policy": agent.policy}
    for name, network in expected.items():
        assert all(owners.pop(p) == [name] for p in network.parameters())
    assert list(owners.values()) == [["alpha"]]
    rates = {name: float(o.param_groups[0]["lr"]) for name, o in agent.optimizers.items()}
    expected = {"encoder": 1e-3, "critic": 2e-3, "policy": 3e-3, "alpha": 4e-3}
    assert rates == pytest.approx(expected)


def test_slow_copies_hold_trunks_and_there_is_no_slow_encoder(script):
    agent, args = make_agent(script, tau=0.5)
    assert all(equal(values(agent.acting_policy), values(agent.policy)))
    assert hasattr(agent.acting_policy, "trunk")
    before = values(agent.target_critic)
    script.update(agent, images_batch(), args, rng(), True)
    pairs = zip(before, values(agent.critic), values(agent.target_critic), strict=True)
    assert all(torch.allclose(slow, (old + new) / 2) for old, new, slow in pairs)
    names = {name.split(".")[0] for name, _ in agent.named_parameters()}
    slow = {"target_critic"} | ({"acting_policy"} if script.__name__ != SAC else set())
    assert names == {"encoder", "policy", "critic", "log_alpha"} | slow


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_encoder_steps_once_while_critics_step_twice(script, critic_steps):
    """Adam's first step moves a parameter by its rate, the second on one gradient by as much."""
    agent, args = make_agent(script, critic_steps=critic_steps)
    before = values(agent.encoder), values(agent.critic)
    script.update(agent, images_batch(), args, rng(), True)
    moved = [
        max((new - old).abs().max() for old, new in zip(olds, values(network), strict=True))
        for olds, network in zip(before, (agent.encoder, agent.critic), strict=True)
    ]
    assert moved[0].item() == pytest.approx(3e-4, rel=0.01)
    assert moved[1].item() == pytest.approx(critic_steps * 3e-4, rel=0.01)


def test_next_features_are_of_before_the_encoders_step(script, monkeypatch):
    """One look at each picture; the policy is trained on what it has made actions from.

    SAC's is also trained on new ones at s, of the encoder before its step as well.
    """
    agent, args = make_agent(script, random_shift=0)
    batch = images_batch()
    seen = spied(monkeypatch, agent.encoder)
    trunk = spied(monkeypatch, agent.policy.trunk)
    with torch.no_grad():
        expected = agent.encoder.layers(
            batch["next_obs"].permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 255 - 0.5
        )
    script.update(agent, batch, args, rng(), True)
    assert torch.equal(seen[0], batch["next_obs"]) and torch.equal(seen[1], batch["obs"])
    assert len(seen) == 2 and len(trunk) == (2 if script.__name__ == SAC else 1)
    assert torch.allclose(trunk[0], expected.flatten(1), atol=1e-6)


@sac_only
def test_sac_has_fpmds_defaults(script):
    """But for what is the policy's own."""
    fpmd = vars(__import__("fpmd_pixels_online").Args())
    differ = {key for key, value in vars(script.Args()).items() if fpmd.get(key, value) != value}
    assert differ == {"exp_name", "policy_lr", "alpha_init", "alpha_lr", "target_entropy_scale"}


@fpmd_only
def test_flow_spread_is_of_candidates_without_their_noise(script, monkeypatch):
    agent, args = make_agent(script, num_candidates=32, noise_scale=0.1)
    calls = spy(monkeypatch, script, "propose")
    metrics = script.update(agent, images_batch(64), args, rng(), True)
    ((arguments, candidates),) = calls
    assert arguments[2].item() == pytest.approx(0.5)  # alpha begins at 5
    spread = metrics["policy/flow_spread"].item()
    assert spread == pytest.approx(script.flow_spread(candidates, 0.5).item(), rel=1e-5)
    assert 0 < spread < metrics["policy/candidate_spread"].item()


@fpmd_only
@pytest.mark.parametrize("num_candidates", [1, 32])
def test_trunks_are_computed_once_whatever_n_is(script, monkeypatch, num_candidates):
    agent, args = make_agent(script, num_candidates=num_candidates)
    networks = {"policy": [agent.policy.trunk], "critic": agent.critic.trunks}
    networks["target_critic"] = agent.target_critic.trunks
    networks["acting_policy"] = [agent.acting_policy.trunk]
    calls = {
        name: [spied(monkeypatch, trunk) for trunk in trunks] for name, trunks in networks.items()
    }
    batch = images_batch()
    script.update(agent, batch, args, rng(), True)
    counts = {name: [len(x) for x in inputs] for name, inputs in calls.items()}
    # the critics look at s' to rank and at s to learn
    expected = {"policy": [1], "critic": [2, 2], "target_critic": [1, 1], "acting_policy": [0]}
    assert counts == expected
    script.act_explore(agent, batch["obs"], args, rng())
    counts = {name: [len(x) for x in inputs] for name, inputs in calls.items()}
    assert counts == expected | {"critic": [3, 3], "acting_policy": [1]}


@fpmd_only
def test_acting_looks_through_the_online_encoder_and_the_slow_policy(script):
    agent, args = make_agent(script)
    obs = images_batch()["obs"]
    modes = [*script.MODES.values(), script.act_explore]
    before = [act(agent, obs, args, rng()) for act in modes]
    for p in agent.policy.parameters():
        p.data.zero_()
    for act, actions in zip(modes, before, strict=True):
        assert actions.shape == (16, 2) and actions.abs().max() <= 1
        assert torch.equal(act(agent, obs, args, rng()), actions)
    for p in agent.encoder.parameters():
        p.data.zero_()
    assert not torch.equal(modes[0](agent, obs, args, rng()), before[0])


@fpmd_only
def test_the_deployed_policy_is_the_one_step_mode(script):
    agent, args = make_agent(script)
    obs = images_batch()["obs"]
    noise = args.prior_std * torch.randn((16, 2), generator=rng())
    policy = script.OneStepPolicy(agent.encoder, agent.acting_policy)
    expected = script.act_one_step(agent, obs, args, rng())
    assert torch.allclose(policy(obs, noise), expected, atol=1e-6)
    assert not any(p.requires_grad for p in policy.parameters())
    assert policy(obs, noise.expand(3, 16, 2)).shape == (3, 16, 2)


@sac_only
def test_sac_acts_by_its_mean_or_by_a_sample(script):
    """one_step is tanh of the mean and draws nothing; sampled and explore draw from the policy."""
    agent, args = make_agent(script)
    obs = images_batch(1)["obs"].expand(20_000, *SHAPE)
    pictures = images_batch()["obs"]
    mean, log_std = agent.policy(agent.encoder(pictures))
    e = torch.randn((16, 2), generator=rng())
    seen = script.act_one_step(agent, pictures, args, rng()), mean.tanh()
    drawn = script.act_explore(agent, pictures, args, rng()), (mean + log_std.exp() * e).tanh()
    for actions, expected in seen, drawn:
        torch.testing.assert_close(actions, expected.detach())
    # and many of one picture, which is looked at once
    mean, log_std = mean[:1].detach(), log_std[:1].detach()
    agent.encoder.forward = lambda obs: torch.zeros((len(obs), 1))
    agent.acting_policy.forward = lambda h: (mean.expand(len(h), 2), log_std.expand(len(h), 2))
    generator = rng()
    before = generator.get_state()
    action = script.act_one_step(agent, obs, args, generator)
    assert torch.allclose(action, mean.tanh()) and generator.get_state().equal(before)
    for act in script.MODES["sampled"], script.act_explore:
        u = act(agent, obs, args, generator).double().atanh()
        assert u.mean(0) == pytest.approx(mean[0].double(), abs=0.05)  # one std of it: 0.01
        assert u.std(0) == pytest.approx(log_std[0].double().exp(), rel=0.03)


@sac_only
def test_sac_losses_against_their_formulas(script):
    """The density of tanh(u) by torch.distributions, y with the entropy's bonus, the least Q."""
    agent, args = make_agent(script, gamma=0.9, reward_scale=0.7, log_std_range=(-0.2, 0.1))
    batch = images_batch() | {"terminations": (torch.arange(16) % 3 == 0).float()}
    h = torch.randn((16, agent.encoder.out_dim), generator=rng())
    states, next_states = agent.critic.states(h).detach(), agent.target_critic.states(-h)
    actions, bonus = batch["actions"].flip(0), torch.randn(16, generator=rng(1))
    seen = batch | {"obs": states, "next_obs": next_states}
    loss, q = script.critic_loss(agent.critic, agent.target_critic, seen, actions, bonus, args)
    least = agent.target_critic(next_states, actions).min(0).values
    y = 0.7 * batch["rewards"] + 0.9 * (1 - batch["terminations"]) * (least + bonus)
    assert torch.equal(q, agent.critic(states, batch["actions"])) and not q.requires_grad
    assert loss.item() == pytest.approx((q - y).square().mean(1).sum().item())
    e = torch.randn((16, 2), generator=rng(2))
    given = h, states, e, torch.tensor(0.3), True
    loss, entropy = script.policy_loss(agent.policy, agent.critic, *given)
    mean, log_std = agent.policy(h)
    raw = agent.policy.net(agent.policy.trunk(h))
    assert mean.equal(raw[:, :2]) and log_std.equal(raw[:, 2:].clip(-0.2, 0.1))
    assert not log_std.equal(raw[:, 2:])
    normal = torch.distributions.Normal(mean, log_std.exp())
    squash = torch.distributions.TanhTransform()
    a = (mean + log_std.exp() * e).tanh()
    log_prob = torch.distributions.TransformedDistribution(normal, squash).log_prob(a).sum(-1)
    assert entropy.item() == pytest.approx(-log_prob.mean().item(), rel=1e-4)
    expected = (0.3 * log_prob - agent.critic(states, a).min(0).values).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    gradients = (torch.autograd.grad(x, list(agent.policy.parameters())) for x in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@sac_only
def test_a_sac_update_hands_over_the_right_numbers(script, monkeypatch):
    """Policy and encoder as before their steps, critics and their trunks as after theirs."""
    agent, args = make_agent(script, random_shift=0, alpha_init=0.7, tau=0.5)
    for p in agent.target_critic.parameters():  # which begins as a copy
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng(3)))
    batch, before, old = images_batch(), copy.deepcopy(agent), values(agent.target_critic)
    of_critics = spy(monkeypatch, script, "critic_loss")
    of_policy = spy(monkeypatch, script, "policy_loss")
    metrics = script.update(agent, batch, args, rng())
    draws = rng()
    for name in "obs", "next_obs":  # shifts by nothing are drawn as well
        script.random_shift(batch[name], 0, draws)
    e, next_e = torch.randn((2, 16, 2), generator=draws)
    with torch.no_grad():
        h, next_h = before.encoder(batch["obs"]), before.encoder(batch["next_obs"])
        actions, log_probs = script.sample(before.policy, next_h, next_e, True)
        states = before.critic.states(h), before.target_critic.states(next_h)
        after = agent.critic.states(h)
    (_, _, seen, next_actions, bonus, _), _ = of_critics[0]
    (_, critic, *given), (_, entropy) = of_policy[0]
    for x, expected in zip((seen["obs"], seen["next_obs"]), states, strict=True):
        torch.testing.assert_close(x, expected)
    torch.testing.assert_close(next_actions, actions)
    torch.testing.assert_close(bonus, -0.7 * log_probs)
    assert critic is agent.critic and not torch.equal(after, states[0])
    *given, correction = given
    for x, expected in zip(given, (h, after, e, torch.tensor(0.7)), strict=True):
        torch.testing.assert_close(x, expected)
        assert not x.requires_grad
    assert correction is True
    assert metrics["policy/entropy"].equal(entropy)
    assert agent.log_alpha.grad.item() == pytest.approx(entropy.item() + 2)  # target: -act_dim
    # the critics' gradients are those of their own loss, the targets have none
    seen = seen | {"obs": before.critic.states(before.encoder(batch["obs"]))}
    critics = before.critic, before.target_critic
    loss, _ = script.critic_loss(*critics, seen, next_actions, bonus, args)
    own = [*before.encoder.parameters(), *before.critic.parameters()]
    trained = [*agent.encoder.parameters(), *agent.critic.parameters()]
    for p, gradient in zip(trained, torch.autograd.grad(loss, own), strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert all(p.grad is None for p in agent.target_critic.parameters())
    slow = zip(old, values(agent.critic), values(agent.target_critic), strict=True)
    assert all(torch.allclose(x, (a + b) / 2) for a, b, x in slow)
    steps = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in agent.optimizers.items()
    }
    assert steps == {"encoder": {1}, "critic": {2}, "policy": {1}, "alpha": {1}}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_moves_all_and_stays_finite(script, precision):
    agent, args = make_agent(script, precision=precision)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    generator = rng()
    for seed in range(3):
        one_update(script, agent, images_batch(seed=seed), args, generator)
    for name, p in agent.named_parameters():
        assert p.isfinite().all() and p.dtype == torch.float32
        assert name == "log_alpha" or not torch.equal(p, before[name]), name


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_convolutions_have_the_precision_that_was_asked_for(script, run, monkeypatch, precision):
    """cuDNN has switches of its own: TF32 is on by default, and its choices vary between runs."""
    cudnn = torch.backends.cudnn
    for name in "allow_tf32", "deterministic", "benchmark":
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # as it was, after this test
    monkeypatch.setattr(script, "choose_device", lambda _: CPU)  # else TF32 is refused on a CPU
    seen = []
    monkeypatch.setattr(
        script, "train", lambda *_: seen.append((cudnn.allow_tf32, cudnn.deterministic))
    )
    run(env_id="pixel_envs:MovingSquare-v0", precision=precision)
    assert seen == [(precision == "tf32", True)] and not cudnn.benchmark


@pytest.mark.parametrize("frame_stack", [1, 4])
def test_other_stacks(script, run, frame_stack):
    run_dir = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=150, frame_stack=frame_stack)
    assert load(run_dir)["buffer"]["numbers"].shape == (150, frame_stack + 1)


# ------------------------------------------------------------------ resume


def frames_of(run_dir):
    return np.fromfile(run_dir / "frames.bin", np.uint8)


def test_a_stack_holds_its_frames_where_all_are_drawn_into_one_array(script):
    stacks = []
    for name in "SeededFrames", "OneArray":
        args = script.Args(env_id=f"pixel_envs:{name}-v0", **SEEN)
        envs = script.make_envs(args, 2)
        envs.reset(seed=[1, 2])
        steps = [envs.step(np.full((2, 1), 0.3, np.float32)) for _ in range(4)]
        stacks.append(np.stack([step[0] for step in steps]))
        envs.close()
    assert np.array_equal(*stacks)
    assert not np.array_equal(stacks[0][-1, 0, -1], stacks[0][-1, 0, 0])


def test_a_run_that_failed_at_once_goes_on(script, run, monkeypatch, tmp_path):
    """Its checkpoint of step 0 has no transitions."""
    straight = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=200)

    def fails(*_, **__):
        raise RuntimeError("at once")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script.ReplayBuffer, "add", fails)
        run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=200)
    (run_dir,) = {*tmp_path.glob("runs/*")} - {straight, tmp_path / straight}
    assert load(run_dir)["global_step"] == 0
    go_on(script, run_dir, 200)
    assert differences(load(straight), load(run_dir)) == []


def test_resumed_equals_uninterrupted(script, run):
    """To the bit: networks, optimizers, buffer, frames, generators, episodes, tables."""
    straight = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=300)
    resumed = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=200)
    before = load(resumed)
    assert any(len(e["actions"]) for e in before["envs"]["episodes"]), "not in mid-episode"
    assert go_on(script, resumed, 300) == resumed
    assert differences(load(straight), load(resumed)) == []
    assert differences(load(straight, "policy.pt"), load(resumed, "policy.pt")) == []
    assert rows(straight) == rows(resumed)
    assert np.array_equal(frames_of(straight), frames_of(resumed))
    written = [load(resumed)["buffer"]["written"], before["buffer"]["written"]]
    assert load(resumed)["buffer"]["pieces"][:, :2].tolist() == [[0, written[1]], written[::-1]]
    assert load(resumed)["global_step"] == 300 and differences(before, load(resumed)) != []


def test_resumed_equals_uninterrupted_when_frames_were_overwritten(script, run):
    """The ring has gone round before the stop and goes round again after it."""
    settings = {"env_id": "pixel_envs:SeededFrames-v0", "buffer_size": 61}
    straight = run(total_timesteps=400, **settings)
    resumed = run(total_timesteps=250, **settings)
    go_on(script, resumed, 400)
    assert differences(load(straight), load(resumed)) == []
    frames = frames_of(resumed)
    (size,) = {frames_of(straight).size, frames.size}
    saved = load(resumed)["buffer"]
    assert size == saved["written"] * 24 * 24 * 3
    # what nobody needs may be missing, but not what a transition names
    lowest = saved["numbers"].min() * 24 * 24 * 3
    assert np.array_equal(frames_of(straight)[lowest:], frames[lowest:])


def test_asynchronous_envs_are_the_same_run(script, run):
    """One process per env, in training and evaluation, through a fork server."""
    settings = {"env_id": "pixel_envs:SeededFrames-v0", "eval_every": 100, "eval_episodes": 2}
    here = run(total_timesteps=200, **settings)
    there = run(total_timesteps=110, async_envs=True, **settings)
    go_on(script, there, 200)
    assert differences(load(here), load(there)) == ["/args/async_envs"]
    resumed_at = "110"
    table = [row for row in rows(there, "evaluations") if row[0] != resumed_at]
    assert rows(here, "evaluations") == table


def test_a_kill_between_frames_and_checkpoint_loses_nothing(script, run, monkeypatch):
    """frames.bin is ahead of checkpoint.pt then, and what is too much is cut off."""
    settings = {"env_id": "pixel_envs:SeededFrames-v0", "checkpoint_every": 100}
    straight = run(total_timesteps=300, **settings)
    killed = run(total_timesteps=200, **settings)
    size = frames_of(killed).size
    write_whole = script.write_whole

    def dies(path, write):
        if path.suffix == ".pt":
            raise KeyboardInterrupt  # as a kill: nothing is tidied up
        write_whole(path, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "write_whole", dies)
        go_on(script, killed, 300)
    assert frames_of(killed).size > size and load(killed)["global_step"] == 200
    go_on(script, killed, 300)
    assert differences(load(straight), load(killed)) == []
    assert np.array_equal(frames_of(straight), frames_of(killed))


@pytest.mark.parametrize("damage", ["missing", "shorter", "foreign", "swapped"])
def test_frames_that_do_not_fit_are_refused(script, run, capsys, damage):
    run_dir = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=200)
    path = run_dir / "frames.bin"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(content[:-1])
    elif damage == "foreign":
        path.write_bytes(bytes(len(content)))
    else:
        path.write_bytes(content[24:] + content[:24])
    before = {file: file.stat().st_mtime_ns for file in run_dir.iterdir() if file.name != ".lock"}
    with pytest.raises(SystemExit) as stopped:
        go_on(script, run_dir, 300)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 2 and "frames.bin" in stderr
    assert stderr.splitlines()[-1].startswith(f"{script.__name__}.py: error: ")
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def spoilt(run_dir, change):
    """Write the checkpoint anew with its buffer changed."""
    saved = load(run_dir)
    change(saved["buffer"])
    torch.save(saved, run_dir / "checkpoint.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(numbers=b["numbers"] + 10_000),
        lambda b: b.update(numbers=b["numbers"][:-1]),
        lambda b: b.update(rows=b["rows"][:-1], numbers=b["numbers"][:-1]),
        lambda b: b.update(stacks=b["stacks"] + 10_000),
        lambda b: b.update(stacks=b["stacks"][:1]),
        lambda b: b.update(stacks=b["stacks"][:, :2]),
        lambda b: b.update(written=b["written"] + 1),
        lambda b: b.update(written=-1),
        lambda b: b.update(pieces=b["pieces"][:0]),
        lambda b: b.update(pieces=b["pieces"] * torch.tensor([1, 1, 0])),
        lambda b: b.pop("begins"),
        lambda b: b.update(begins=b["begins"].float()),
        lambda b: b.update(rows=b["rows"] * torch.nan),
        lambda b: b.update(numbers=b["numbers"].double()),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(script, run, capsys, change):
    run_dir = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=120)
    spoilt(run_dir, change)
    with pytest.raises(SystemExit) as stopped:
        go_on(script, run_dir, 140)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "checkpoint.pt is not of this version or task" in line


def test_what_moved_has_a_stack_of_its_own(script, run, monkeypatch, capsys):
    """An episode that does not play back goes on with the frames that are seen, not remembered."""
    run_dir = run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=120)
    monkeypatch.setattr(pixel_envs.SeededFrames, "draw", lambda self: 255 - self.picture)
    go_on(script, run_dir, 122)
    assert "did not play back as recorded" in capsys.readouterr().err
    saved = load(run_dir)["buffer"]
    frames = frames_of(run_dir).reshape(-1, 24, 24, 3)
    before = load(run_dir)["envs"]["obs"]
    for i in range(2):
        newest = frames[saved["numbers"][-2 + i].long()]
        assert np.array_equal(newest[1:], before[i].numpy()) or saved["begins"][i]
    # none of the two newest transitions names a frame of before
    assert saved["numbers"][-2:].min() >= saved["pieces"][0, 1]


# ------------------------------------------------------------------ environments


def test_actions_keep_to_their_bounds(script):
    behind = json.dumps({"env_id": "odd_envs:StrictActions-v0"})
    args = small_args(script, env_id="pixel_envs:Blind-v0", env_kwargs=behind)
    env = script.make_env(args.env_id, 0, args)
    env.reset(seed=0)
    for end in -1, 0.3, 1:
        env.step(np.full(2, end, np.float32))


def test_repeated_steps_are_rendered_once_and_their_rewards_summed(script, monkeypatch):
    args = small_args(script, action_repeat=4)
    env = script.make_env("pixel_envs:MovingSquare-v0", 0, args)
    steps = []
    inner = env.unwrapped
    step = inner.step

    def counted(action):
        steps.append(step(action))
        return steps[-1]

    monkeypatch.setattr(inner, "step", counted)
    env.reset()
    pixel_envs.MovingSquare.rendered = 0
    total, length, truncated = 0.0, 0, False
    while not truncated:
        obs, reward, _, truncated, _ = env.step(np.zeros(1, np.float32))
        total += reward
        length += 1
    assert length == 13 and len(steps) == 50  # the last one is cut short
    assert pixel_envs.MovingSquare.rendered == length
    assert total == pytest.approx(sum(transition[1] for transition in steps))
    assert np.array_equal(obs[-1], inner.draw())


def test_episodes_of_a_run_and_of_its_evaluation_differ(script):
    """Each env its own first picture; the same seed the same pixels; evaluation has others."""
    args = small_args(script, env_id="pixel_envs:SeededFrames-v0")
    envs = script.make_envs(args, 3)
    training, _ = envs.reset(seed=[2] * 3)
    again, _ = envs.reset(seed=[2] * 3)
    evaluation, _ = envs.reset(seed=[3] * 3)
    assert np.array_equal(training, again)
    pictures = {obs[-1].tobytes() for obs in (*training, *evaluation)}
    assert len(pictures) == 6


def test_a_picture_is_the_newest_frame(script):
    envs = script.make_envs(small_args(script, env_id="pixel_envs:MovingSquare-v0"), 2)
    envs.reset(seed=[0, 0])
    for _ in range(5):
        envs.step(np.zeros((2, 1), np.float32))
    assert np.array_equal(envs.picture(), envs.env.envs[0].unwrapped.draw())


def test_a_film_is_made_of_what_the_agent_saw(script, run, monkeypatch):
    films = []
    monkeypatch.setattr(script, "write_video", lambda *film: films.append(film))
    settings = {"eval_every": 200, "eval_episodes": 2, "total_timesteps": 200}
    run(env_id="pixel_envs:MovingSquare-v0", capture_video=True, action_repeat=2, **settings)
    ((frames, envs, path),) = films
    assert len(frames) == 25 and frames[0].shape == (24, 24, 3)
    assert len({frame.tobytes() for frame in frames}) > 10
    assert envs.metadata["render_fps"] == 5 and path.name == "200"


REFUSED = {
    "pixel_envs:Wide-v0": "renders uint8 (24, 32, 3); only square RGB",
    "pixel_envs:Grey-v0": "renders uint8 (24, 24); only square RGB",
    "pixel_envs:Deep-v0": "renders uint16 (24, 24, 3); only square RGB",
    "pixel_envs:Fractions-v0": "renders float64 (24, 24, 3); only square RGB",
    "pixel_envs:Unseen-v0": "render_mode",
    "probe_envs:Constant-v0": "with pictures",
    "Nothing-v7": "Nothing",
    "dm_control/walker-wolk-v0": "walker-walk",
}


@pytest.mark.parametrize("env_id", REFUSED)
def test_what_cannot_be_seen_is_refused_in_one_line(
    script, run, capsys, tmp_path, env_id, monkeypatch
):
    # another test of this process may have imported mujoco without OpenGL
    monkeypatch.setattr(script, "choose_opengl", lambda env_id: None)
    with pytest.raises(SystemExit) as stopped:
        run(env_id=env_id)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and REFUSED[env_id] in err
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 14}, "--image-size must be at least 15"),
        ({"image_size": 32}, "--image-size is 32, but pixel_envs:SeededFrames-v0 renders 24"),
        ({"frame_stack": 0}, "--frame-stack 0 must be above 0"),
        ({"action_repeat": 0}, "--action-repeat 0 must be above 0"),
        ({"random_shift": -1}, "--random-shift -1 must be 0 or more"),
        ({"encoder_lr": 0.0}, "--encoder-lr 0.0 must be above 0"),
        ({"feature_dim": 0}, "--feature-dim 0 must be above 0"),
        ({"camera": -1}, "--camera -1 must be 0 or more"),
        ({"num_envs": 3, "buffer_size": 2}, "--num-envs must be at most --buffer-size"),
        ({"buffer_size": 10**9, "total_timesteps": 10**9}, "--buffer-size 1000000000 needs about"),
        ({"batch_size": 10**8, "learning_starts": 10**8, "total_timesteps": 2 * 10**8}, "GB"),
        ({"feature_dim": 10**9}, "--feature-dim 1000000000 needs about"),
    ],
)
def test_settings_that_cannot_work_are_refused(script, run, capsys, tmp_path, changes, message):
    with pytest.raises(SystemExit) as stopped:
        run(env_id="pixel_envs:SeededFrames-v0", **changes)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_size_of_the_frames_is_said(script, run, capsys):
    run(env_id="pixel_envs:SeededFrames-v0", total_timesteps=110, action_repeat=3)
    out = capsys.readouterr().out
    assert "110 agent steps of 3: 330 frames" in out
    assert "3 x 24 x 24 x 3 observations, 1 actions, up to 0.00 GB of frames on cpu" in out


def test_a_replay_is_the_last_evaluation(script, run, capsys):
    run_dir = run(env_id="pixel_envs:SeededFrames-v0", eval_every=400, eval_episodes=3)
    row = (run_dir / "evaluations.csv").read_text().splitlines()[1]
    capsys.readouterr()
    script.main(script.parse_args(["--evaluate", str(run_dir)]))
    out = capsys.readouterr().out
    returns = [line.split()[-1] for line in out.splitlines() if line.startswith("episode ")]
    assert returns == row.split(",")[-1].split() and "ms/action" in out


def test_a_policy_is_what_acts_and_knows_sizes_and_bounds(script, run, capsys):
    """No critics, and bounds in the environment's own units, from another process too."""
    behind = {"env_id": "pixel_envs:Blind-v0", "env_kwargs": '{"env_id": "probe_envs:Bounded-v0"}'}
    run_dir = run(**behind, total_timesteps=110, async_envs=True)
    saved = load(run_dir, "policy.pt")
    learnt = {"algorithm", "script", "commit", "encoder", "policy", "args", "global_step"}
    assert set(saved) == learnt | {"obs_shape", "act_dim", "action_bounds"}
    assert saved["script"] == f"{script.__name__}.py" and saved["global_step"] == 110
    assert saved["obs_shape"] == SHAPE and saved["act_dim"] == 4
    assert saved["action_bounds"].tolist() == [[[-2, 0], [-0.5, 1]], [[2, 3], [0.5, 9]]]
    torch.save(saved | {"action_bounds": saved["action_bounds"] / 2}, run_dir / "policy.pt")
    with pytest.raises(SystemExit):
        script.main(script.parse_args(["--evaluate", str(run_dir)]))
    assert "its actions had other bounds" in capsys.readouterr().err


@pytest.mark.parametrize("command", commands(PIXELS))
def test_documented_commands_parse(command):
    script = __import__(Path(command[1]).stem)
    script.check_args(script.parse_args([] if "--evaluate" in command else command[2:]))


# ------------------------------------------------------------------ what it costs


def in_a_process_of_its_own(code, tmp_path, **changes):
    """Run code with `script`, `args` and `resident` at hand; what it prints, as JSON."""
    names = (
        "import json, sys, time, resource, torch, numpy as np\n"
        "torch.set_num_threads(1)\n"
        f"import {FPMD_PIXELS[0]} as script\n"
        f"args = script.Args(**{changes!r})\n"
        "def resident():\n"
        "    line = [x for x in open('/proc/self/status') if x.startswith('VmRSS')][0]\n"
        "    return 1024 * int(line.split()[1])\n"
    )
    path = tmp_path / "measure.py"
    path.write_text(names + code)
    env = {"PYTHONPATH": str(FILES[FPMD_PIXELS[0]].parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


FILL = """
buffer = script.ReplayBuffer(args, (3, 84, 84, 3), 6, torch.device("cpu"))
obs = np.zeros((args.num_envs, 3, 84, 84, 3), np.uint8)
actions = np.zeros((args.num_envs, 6), np.float32)
ends = np.full(args.num_envs, False)
for step in range(STEPS):
    obs = np.roll(obs, -1, 1)
    obs[:, -1] = step % 256
    rewards = np.zeros(args.num_envs)
    buffer.add(obs, actions, rewards, obs, ends, np.full(args.num_envs, step % 500 == 499))
"""


def test_a_batch_is_sampled_and_shifted_in_time(tmp_path):
    """256 transitions of 84 x 84: less than 150 ms of one core, a twentieth of an update."""
    code = (
        FILL.replace("STEPS", "1_000")
        + """
rng = torch.Generator().manual_seed(0)
best = 1e9
for _ in range(7):
    start = time.process_time()
    batch = buffer.sample(256, rng)
    for name in "obs", "next_obs":
        script.random_shift(batch[name], 4, rng)
    best = min(best, time.process_time() - start)
print(json.dumps(1000 * best))
"""
    )
    assert in_a_process_of_its_own(code, tmp_path, total_timesteps=10_000, device="cpu") < 150


@pytest.mark.slow
def test_a_hundred_thousand_frames_take_two_gigabytes(tmp_path):
    """Resident, beside what the process had before; nothing holds a second copy."""
    code = (
        "before = resident()\n"
        + FILL.replace("STEPS", "20_000")
        + "batch = buffer.sample(256, torch.Generator())\n"
        + "print(json.dumps([resident() - before, buffer.size]))\n"
    )
    settings = {"total_timesteps": 100_000, "buffer_size": 100_000, "device": "cpu"}
    taken, size = in_a_process_of_its_own(code, tmp_path, **settings)
    assert size > 99_000 and 2.0e9 < taken < 2.3e9


# ------------------------------------------------------------------ it learns from what it sees

SQUARE = {
    "env_id": "pixel_envs:MovingSquare-v0",
    "num_envs": 1,
    "total_timesteps": 600,
    "learning_starts": 200,
    "utd": 1.0,
    "gamma": 0.5,
    "tau": 0.05,
    "batch_size": 64,
    "num_candidates": 8,
    "hidden_dim": 256,
    "encoder_channels": 16,
    "feature_dim": 50,
    "random_shift": 1,
    "encoder_lr": 1e-3,
    "critic_lr": 1e-3,
    "policy_lr": (1e-3, 1e-3),
    "policy_delay": 1,
    "weight_mode": "particles",
    "critic_layer_norm": True,
    "q_stats_rate": 0.01,
    "alpha_interval": 3,
    "eval_every": 600,
    "eval_episodes": 20,
}


def returns_of(script, run, **changes):
    """Mean return of each mode at the end."""
    settings = known(script, SQUARE)
    if script.__name__ == SAC:  # a constant rate
        settings["policy_lr"] = 1e-3
    settings |= changes
    table = rows(run(**settings), "evaluations")
    found = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    return {row["mode"]: float(row["return_mean"]) for row in found}


@pytest.mark.parametrize("script", ["fpmd_meanflow_pixels_online", SAC], indirect=True)
def test_a_moving_square_is_followed(script, run):
    """In 50 steps 33 for the best constant action, about 45 with the velocity of a step before.

    SAC takes twice the updates, as a Gaussian climbs its critics' slope. FPMD-R's flow is the
    same text as without pixels, and all else that of FPMD-M.
    """
    steps = 600 if script.__name__ == "fpmd_meanflow_pixels_online" else 1_000
    assert returns_of(script, run, total_timesteps=steps, eval_every=steps)["one_step"] >= 39


@pytest.mark.slow
def test_a_single_frame_does_not_show_velocity(script, run):
    """The wrong variant must fail, or the one above proves nothing."""
    assert max(returns_of(script, run, frame_stack=1).values()) <= 37


# ------------------------------------------------------------------ with OpenGL


@pytest.fixture(scope="session")
def opengl():
    """Skip where there is none; else what a program with pictures is started with."""
    why_not = no_opengl()
    if why_not:
        pytest.skip(f"no OpenGL here: {why_not}")
    return {"MUJOCO_GL": "egl", "PYTHONPATH": str(FILES[FPMD_PIXELS[0]].parent)}


def started(script, opengl, folder, **changes):
    """The script as a user starts it, in that folder."""
    settings = {"env_id": "dm_control/cartpole-swingup-v0"} | changes
    flags = as_flags(known(script, SMALL) | settings)
    return subprocess.run(
        [sys.executable, str(FILES[script.__name__]), *flags],
        cwd=folder,
        env=opengl | {"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_a_rendered_run_resumes_to_the_bit(script, opengl, tmp_path):
    """dm_control in processes of a fork server: they start, render and end."""
    settings = {"action_repeat": 8, "shadow_size": 512, "async_envs": True, "utd": 0.05}
    settings |= {"eval_episodes": 1, "total_timesteps": 160}
    for folder, steps in ("straight", 160), ("resumed", 120):
        (tmp_path / folder).mkdir()
        changes = settings | {"total_timesteps": steps}
        result = started(script, opengl, tmp_path / folder, **changes)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    (straight,), (resumed,) = (tmp_path.glob(f"{x}/runs/*") for x in ("straight", "resumed"))
    flags = ["--resume", str(resumed), "--total-timesteps", "160"]
    command = [sys.executable, str(FILES[script.__name__]), *flags]
    result = subprocess.run(command, cwd=tmp_path, env=opengl, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "did not play back" not in result.stderr
    assert differences(load(straight), load(resumed)) == []
    assert np.array_equal(frames_of(straight), frames_of(resumed))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["Hopper-v5", "dm_control/walker-walk-v0"])
def test_pictures_have_the_size_and_the_camera_asked_for(script, opengl, tmp_path, env_id):
    code = f"""
env = script.make_env({env_id!r}, 0, args)
obs, _ = env.reset()
obs = env.step(env.action_space.sample())[0]
print(json.dumps([list(obs.shape), float(obs.std()), env.metadata["render_fps"]]))
env.close()
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", with_env(subprocess.run, opengl))
        settings = {"image_size": 32, "action_repeat": 2, "frame_stack": 2}
        shape, contrast, fps = in_a_process_of_its_own(code, tmp_path, **settings)
    assert shape == [2, 32, 32, 3] and contrast > 10
    assert fps == pytest.approx(62.5 if env_id == "Hopper-v5" else 20)


def with_env(function, more):
    return lambda *command, env, **rest: function(*command, env=env | more, **rest)


@pytest.mark.slow
def test_a_camera_that_is_not_there_is_refused(script, opengl, tmp_path):
    result = started(script, opengl, tmp_path, camera=9)
    assert result.returncode == 2 and "--camera 9 is not there: it has 2" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_without_opengl_it_says_what_to_install(script, tmp_path):
    env = {"MUJOCO_GL": "disable", "PATH": "/usr/bin:/bin"}
    result = started(script, env, tmp_path)
    assert result.returncode == 2
    assert "need OpenGL: apt-get install libegl1" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
