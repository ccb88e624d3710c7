"""What the instantaneous velocity constraint does, where the mean velocity is known exactly.

A 1-D flow carries N(0, 1) to two modes. In one dimension a flow keeps the order of its points, so
z_r = F_r^-1(F_t(z_t)) with the distribution functions F of the mixture, and u = (z_r - z_t) /
(r - t). The script's network and loss learn it with lambda = 0, 0.5 and 1; their errors go to
benchmark/results/constraint.csv, the picture to docs/figures/constraint.png. About ten minutes
on one core; needs matplotlib (benchmark/requirements.txt).

    python benchmark/figures/constraint.py
    python benchmark/figures/constraint.py --redraw  # errors from the CSV
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import ROOT
from benchmark.cli import Parser, folder, run, whole
from benchmark.files import check_output, fail, read_table, write_csv
from benchmark.report import style

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mvp_online import MeanVelocityField, generate, policy_loss

BLUE, ORANGE = style.FIRST, style.SECOND
MODE, MODE_STD = 0.7, 0.15  # modes at +-MODE
LAMBDAS = 0.0, 0.5, 1.0
SEEDS = range(5)
BATCH_SIZE, UPDATES, LEARNING_RATE = 256, 3000, 1e-3
ERRORS = {"boundary_error": "at the boundary, u(z, t, t)", "jump_error": "of the jump, u(e, 0, 1)"}


# ---------------------------------------------------------------------------- the exact flow


def distribution(z: Tensor, t: Tensor) -> Tensor:
    """F_t(z) of z_t = (1 - t) e + t a, an even mixture of two Gaussians around +-t MODE."""
    std = ((1 - t).square() + (t * MODE_STD).square()).sqrt()
    return sum((1 + torch.erf((z - t * a) / std / math.sqrt(2))) / 4 for a in (MODE, -MODE))


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """v(z, t) = E[a - e | z_t = z]: within a mode Gaussian regression, between them Bayes."""
    variance = (1 - t).square() + (t * MODE_STD).square()
    logits, means = [], []
    for mode in MODE, -MODE:
        logits.append(-(z - t * mode).square() / (2 * variance))
        means.append(mode + (t * MODE_STD**2 - (1 - t)) / variance * (z - t * mode))
    return (torch.stack(logits).softmax(0) * torch.stack(means)).sum(0)


def flow(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Where the flow carries z from time t to time r: F_r^-1(F_t(z)), by bisection."""
    p, low, high = distribution(z, t), torch.full_like(z, -8), torch.full_like(z, 8)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle, r) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


# ---------------------------------------------------------------------------- learning it


def train(ivc_coef: float, seed: int, updates: int) -> MeanVelocityField:
    """The script's loss on batches of the two modes; the learning rate falls to 0."""
    torch.manual_seed(seed)
    policy = MeanVelocityField(1, 1, hidden_dim=128, hidden_layers=3)
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE, fused=True)
    obs = torch.zeros(BATCH_SIZE, 1)
    for update in range(updates):
        signs = 2 * torch.randint(2, (BATCH_SIZE, 1)) - 1
        actions = MODE * signs + MODE_STD * torch.randn(BATCH_SIZE, 1)
        t, r = torch.rand(2, BATCH_SIZE, 1).sort(0).values
        noise = torch.randn(BATCH_SIZE, 1)
        meanflow, constraint = policy_loss(policy, obs, actions, noise, t, r)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        optimizer.zero_grad()
        (meanflow + ivc_coef * constraint).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def errors(policy: MeanVelocityField, samples: int = 4000) -> dict[str, float]:
    """Root mean square errors of u on points of the flow: at t = r, and for the pair (0, 1)."""
    rng = torch.Generator().manual_seed(9)
    draw = {"generator": rng, "dtype": torch.float64}
    noise, t = torch.randn((samples, 1), **draw), torch.rand((samples, 1), **draw)
    start, end, obs = torch.zeros_like(t), torch.ones_like(t), torch.zeros(samples, 1)
    z = flow(noise, start, t)
    boundary = policy(obs, z.float(), t.float(), t.float()) - velocity(z, t)
    jump = generate(policy, obs, noise.float(), 1) - flow(noise, start, end)
    found = {"boundary_error": boundary, "jump_error": jump}
    return {key: value.square().mean().sqrt().item() for key, value in found.items()}


# ---------------------------------------------------------------------------- the picture


def draw_flow(panel) -> None:
    """The exact flow's trajectories, and the jumps that the mean velocity makes of them."""
    noise = torch.from_numpy(stats.norm.ppf(np.linspace(0.03, 0.97, 16)))[:, None]
    times = torch.linspace(0, 1, 60, dtype=torch.float64)
    paths = torch.cat([flow(noise, torch.zeros_like(noise), t.expand_as(noise)) for t in times], 1)
    panel.plot(times, paths.T, color=style.GREY, lw=1)
    for path in paths[::3]:
        panel.annotate(
            "", (1, path[-1]), (0, path[0]), arrowprops={"arrowstyle": "->", "color": BLUE}
        )
    panel.set(title="Flow and jumps", xlabel="t: noise to action", ylabel="z")


def draw_boundary(panel, policies: dict[float, MeanVelocityField], time: float = 0.6) -> None:
    """u(z, t, t) against the velocity it should be, at one time."""
    z = torch.linspace(-1.4, 1.4, 200)[:, None]
    t, obs = torch.full_like(z, time), torch.zeros_like(z)
    panel.plot(z, velocity(z, t), color=style.DARK, lw=3, alpha=0.35)
    panel.annotate("exact v", (z[0], velocity(z, t)[0]), (10, -3), textcoords="offset points",
                   color=style.DARK)  # fmt: skip
    for (ivc_coef, policy), colour in zip(policies.items(), (ORANGE, BLUE), strict=True):
        with torch.no_grad():
            panel.plot(z, policy(obs, z, t, t), color=colour, lw=1.2, label=f"λ = {ivc_coef:g}")
    panel.legend(loc="upper right")
    panel.set(title=f"u(z, t, t) at t = {time:g}", xlabel="z")


def draw_errors(panel, rows: list[dict]) -> None:
    sides = (ORANGE, -17), (BLUE, 9)  # a line that falls has room below, one that rises above
    for (key, label), (colour, points) in zip(ERRORS.items(), sides, strict=True):
        for row in rows:
            panel.plot(float(row["ivc_coef"]), float(row[key]), "o", ms=3, color=colour, alpha=0.5)
        means = [statistics.fmean(values_of(rows, key, ivc_coef)) for ivc_coef in LAMBDAS]
        panel.plot(LAMBDAS, means, color=colour)
        panel.annotate(label, (0.5, means[1]), (0, points), ha="center", color=colour,
                       textcoords="offset points")  # fmt: skip
    panel.set(title="RMS error after training", xlabel="λ", xticks=LAMBDAS)
    panel.set_ylim(bottom=0)


def values_of(rows: list[dict], key: str, ivc_coef: float) -> list[float]:
    return [float(row[key]) for row in rows if float(row["ivc_coef"]) == ivc_coef]


def read_errors(path: Path) -> list[dict]:
    """What an earlier run has measured, of every lambda."""
    rows = read_table(path, numbers=["ivc_coef", *ERRORS])
    for ivc_coef in LAMBDAS:
        if not values_of(rows, next(iter(ERRORS)), ivc_coef):
            fail(f"{path} has no errors for lambda {ivc_coef:g}")
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--redraw", action="store_true", help="take the errors from the CSV")
    parser.add_argument("--updates", type=whole(1, 10**9), default=UPDATES, help="per policy")
    text = "folder of benchmark/ and docs/"
    parser.add_argument("--output", type=folder, default=str(ROOT), help=text)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = args.output / "benchmark" / "results" / "constraint.csv"
    picture = args.output / "docs" / "figures" / "constraint.png"
    check_output(picture)
    stored = read_errors(results) if args.redraw else []
    if not args.redraw:
        check_output(results)
    policies, rows = {}, []
    for ivc_coef in LAMBDAS:
        for seed in list(SEEDS)[:1] if args.redraw else SEEDS:
            policy = train(ivc_coef, seed, args.updates)
            policies.setdefault(ivc_coef, policy)
            row = {"ivc_coef": ivc_coef, "seed": seed, "updates": args.updates} | errors(policy)
            rows.append({key: round(value, 5) for key, value in row.items()})
            print(rows[-1], flush=True)
    if args.redraw:
        rows = stored
    else:
        write_csv(rows, results)
        print(f"wrote {results}")
    figure, (left, middle, right) = style.grid_of_panels(3, 2.9)
    draw_flow(left)
    draw_boundary(middle, {key: policies[key] for key in (0.0, 1.0)})
    draw_errors(right, rows)
    style.save(figure, picture)


if __name__ == "__main__":
    run(main)
