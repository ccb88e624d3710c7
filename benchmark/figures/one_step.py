"""Draw why one Euler step is enough: docs/figures/one_step.png (about a minute on one core).

The training script's own velocity field, loss and sampler learn 2-D toy targets instead of
actions. A spread-out target bends the trajectories, and one step from the noise ends at the
target's mean. A concentrated one leaves them straight, and one step ends where 20 do. The third
panel has the distance between one step and 200 from the same noise, against the standard
deviation of the target. Needs matplotlib (benchmark/requirements.txt).

    python benchmark/figures/one_step.py
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import FIGURES
from benchmark.cli import Parser, output, run, whole
from benchmark.report import style

import torch
from torch import Tensor

from fpmd_online import Args, VelocityField, generate, policy_loss

MODES = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
MODE_STD = 0.05  # of each mode
CENTRE = torch.tensor([[0.35, 0.25]])
STDS = 0.1, 0.2, 0.3, 0.4  # per dimension, of the single Gaussians
LATE_STD = 0.1  # the one of the middle panel
OFFSET = {"textcoords": "offset points"}
PRIOR_STD = Args().prior_std  # the scale of the noise that sampling starts from


def no_state(rows: int) -> Tensor:
    """Observations of the only state there is."""
    return torch.zeros((rows, 1))


def train(centres: Tensor, std: float, steps: int, batch_size: int = 256) -> VelocityField:
    """Flow matching to an even mixture of Gaussians of that std around the centres (K, 2)."""
    torch.manual_seed(0)
    policy = VelocityField(obs_dim=1, act_dim=2, hidden_dim=128)
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        actions = centres[torch.randint(len(centres), (batch_size,))]
        actions = actions + std * torch.randn(actions.shape)
        noise, t = torch.randn(actions.shape), torch.rand((batch_size, 1))
        w = torch.ones(batch_size)
        loss = policy_loss(policy, no_state(batch_size), actions, w, noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


@torch.no_grad()
def sample(policy: VelocityField, z: Tensor, flow_steps: int) -> Tensor:
    return generate(policy, no_state(len(z)), z, flow_steps)


@torch.no_grad()
def trajectories(policy: VelocityField, z: Tensor, flow_steps: int = 20) -> Tensor:
    """All points on the way of generate: (flow_steps + 1, B, 2)."""
    points = [z]
    for k in range(flow_steps):
        t = torch.full((1,), k / flow_steps)
        points.append(points[-1] + policy(no_state(len(z)), points[-1], t) / flow_steps)
    torch.testing.assert_close(points[-1], sample(policy, z, flow_steps))
    return torch.stack(points)


def one_step_error(policy: VelocityField, samples: int = 4000) -> float:
    """Mean distance of one step's end from the end of 200 steps from the same noise."""
    z = PRIOR_STD * torch.randn((samples, 2), generator=torch.Generator().manual_seed(1))
    return (sample(policy, z, 1) - sample(policy, z, 200)).norm(dim=1).mean().item()


def draw_flow(panel, policy: VelocityField, title: str, caption: str) -> None:
    """Trajectories from noise, with the ends of 20 Euler steps and of one."""
    z = PRIOR_STD * torch.randn((50, 2), generator=torch.Generator().manual_seed(45))
    paths, once = trajectories(policy, z), sample(policy, z, 1)
    panel.plot(*paths.unbind(2), color=style.GREY, lw=0.8, zorder=1)
    panel.scatter(*z.T, s=9, color=style.DARK, lw=0, zorder=2, label="noise")
    panel.scatter(
        *paths[-1].T, s=24, color=style.FIRST, lw=0, zorder=3, label="after 20 Euler steps"
    )
    panel.scatter(
        *once.T, s=22, color=style.SECOND, marker="x", lw=1.2, zorder=4, label="after 1 step"
    )
    panel.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    panel.set(title=title, xlabel=caption)
    panel.spines[:].set_visible(False)


def draw_error(panel, errors: dict[float, float], modes_error: float) -> None:
    """One-step error against the target's standard deviation, both dimensions together."""
    stds = [math.sqrt(2) * std for std in errors]
    modes_std = math.sqrt(MODES.square().sum(1).mean() + 2 * MODE_STD**2)
    panel.plot((0, 1), (0, 1), color=style.GREY, lw=1.2, ls="--", zorder=0)
    along = {"rotation": 45, "rotation_mode": "anchor", "color": style.DARK}
    panel.annotate("error = standard deviation", (0.2, 0.2), (-3, 3), **along, **OFFSET)
    panel.plot(stds, errors.values(), "o", color=style.SECOND, ms=5)
    panel.plot(modes_std, modes_error, "s", color=style.SECOND, ms=5)
    panel.annotate("four modes", (modes_std, modes_error), (-8, 4), ha="right", **OFFSET)
    panel.annotate("one Gaussian", (stds[-1], errors[STDS[-1]]), (0, 7), ha="center", **OFFSET)
    panel.set(xlim=(0, 0.8), ylim=(0, 0.8), box_aspect=1, title="Error of one step")
    panel.set_xlabel("standard deviation of the target")
    panel.set_ylabel("distance to the end of 200 steps")
    panel.locator_params(nbins=4)


def main() -> None:
    parser = Parser(__doc__)
    default, text = str(FIGURES / "one_step.png"), "picture to write"
    parser.add_argument("--output", type=output(*style.SUFFIXES), default=default, help=text)
    text = "training steps per target"
    parser.add_argument("--steps", type=whole(1, 10**9), default=4000, help=text)
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    early = train(MODES, MODE_STD, args.steps)
    late = {std: train(CENTRE, std, args.steps) for std in STDS}
    errors = {std: one_step_error(policy) for std, policy in late.items()}

    figure, (left, middle, right) = style.grid_of_panels(3, 3.35)
    draw_flow(
        left,
        early,
        "Spread-out targets",
        "paths bend, and one step\nends at the mean of the targets",
    )
    draw_flow(
        middle,
        late[LATE_STD],
        "Concentrated targets",
        "paths are straight, and\none step is enough",
    )
    draw_error(right, errors, one_step_error(early))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3)
    style.save(figure, args.output)


if __name__ == "__main__":
    run(main)
