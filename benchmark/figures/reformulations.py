"""Which rewritings of MeanFlow give a one-step policy: c - u for seven c, learnt and exact.

A network may learn g = c - u instead of MeanFlow's average velocity u and return the action
e - c + g. Four modes of the plane are learnt by the loss of meanflowql_offline_to_online.py with
each c. Beside them stands what the loss would end at with a perfect network: g(e, 1) is the
integral of E[d(t c)/dt | z_t] - v along the flow, whose velocity v these modes have in closed form.
Errors go to benchmark/results/reformulations.csv, the picture to docs/figures/reformulations.png.
About ten minutes on one core; needs matplotlib (benchmark/requirements.txt).

    python benchmark/figures/reformulations.py
    python benchmark/figures/reformulations.py --redraw  # errors from the CSV
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import ROOT
from benchmark.cli import Parser, folder, run, whole
from benchmark.files import check_output, fail, read_table, write_csv
from benchmark.report import style

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from meanflowql_offline_to_online import SMALL_ERROR, Args, ResidualPolicy, policy_lr_at

MODES = torch.tensor([[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])
MODE_STD = 0.05
SEEDS = range(3)
BATCH_SIZE, UPDATES, LEARNING_RATES = 128, 2500, (2e-3, 2e-4)
COLOURS = {"te - u": style.THIRD, "e - u": style.SECOND}  # the forms that cannot work
SAMPLES, MATCHED = 4000, 800  # of the errors; of the transport distance, which is slow


class Form(NamedTuple):
    """g = c + sign u; all that training needs of c is how t c grows along the path."""

    growth: Callable  # d(t c)/dt = c + t dc/dt, from z, t, e, v
    end: Callable  # c at t = 1, where z is the noise e
    sign: int = -1

    def action(self, g: Tensor, e: Tensor) -> Tensor:
        """e - u(e, 0, 1), with u = sign (g - c)."""
        return e - self.sign * (g - self.end(e))


FORMS = {
    "z - u": Form(lambda z, t, e, v: z + t * v, lambda e: e),
    "u": Form(lambda z, t, e, v: 0 * z, lambda e: 0 * e, sign=1),
    "t - u": Form(lambda z, t, e, v: 2 * t + 0 * z, lambda e: 1 + 0 * e),
    "2z - u": Form(lambda z, t, e, v: 2 * z + 2 * t * v, lambda e: 2 * e),
    "2 - u": Form(lambda z, t, e, v: 2 + 0 * z, lambda e: 2 + 0 * e),
    "te - u": Form(lambda z, t, e, v: 2 * t * e, lambda e: e),
    "e - u": Form(lambda z, t, e, v: e, lambda e: e),
}


# ---------------------------------------------------------------------------- what is exact


def draw_modes(n: int) -> Tensor:
    return MODES[torch.randint(4, (n,))] + MODE_STD * torch.randn(n, 2)


def conditional_means(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """E[a | z_t] and E[e | z_t]: within a mode Gaussian regression, between them Bayes."""
    variance = ((1 - t) * MODE_STD) ** 2 + t**2
    rest = z[:, None] - (1 - t) * MODES.to(z)  # (n, 4, 2)
    w = (-rest.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    actions = MODES.to(z) + (1 - t) * MODE_STD**2 / variance * rest
    return (w * actions).sum(1), (w * t / variance * rest).sum(1)


def fixed_point(form: Form, noise: Tensor, steps: int = 1000) -> Tensor:
    """The actions that a perfect network learns: g(e, 1) is an integral along the flow (Heun)."""

    def slopes(z: Tensor, t: float) -> Tensor:
        a, e = conditional_means(z, t)
        return torch.stack([e - a, form.growth(z, t, e, e - a) + form.sign * (e - a)])

    z, g, h = noise.double(), torch.zeros_like(noise, dtype=torch.float64), 1 / steps
    for k in range(steps, 0, -1):
        first = slopes(z, k * h)
        second = slopes(z - h * first[0], (k - 1) * h)
        dz, dg = h * (first + second) / 2
        z, g = z - dz, g + dg
    return form.action(g, noise.double()).float()


# ---------------------------------------------------------------------------- what is learnt


def loss(form: Form, policy: nn.Module, obs, actions, noise, t, args: Args) -> Tensor:
    """policy_loss of the script with another c: for z - u it is the script's."""
    z_t, v = (1 - t) * actions + t * noise, noise - actions
    g, dg_dt = torch.func.jvp(partial(policy, obs), (z_t, t), (v, torch.ones_like(t)))
    target = form.growth(z_t, t, noise, v) + form.sign * v - t * dg_dt
    target = target.clamp(-args.target_clip, args.target_clip)
    error = (g - target.detach()).square().mean(1)
    return ((error + SMALL_ERROR).pow(-args.adaptive_power).detach() * error).mean()


def train(form: Form, seed: int, updates: int) -> ResidualPolicy:
    torch.manual_seed(seed)
    policy, obs = ResidualPolicy(1, 2, 128, 3), torch.zeros(BATCH_SIZE, 1)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    args = Args(offline_steps=updates, policy_lr=LEARNING_RATES)
    for update in range(updates):
        actions, noise = draw_modes(BATCH_SIZE), torch.randn(BATCH_SIZE, 2)
        t = torch.rand(BATCH_SIZE, 1)
        optimizer.param_groups[0]["lr"] = policy_lr_at(args, update)
        optimizer.zero_grad()
        loss(form, policy, obs, actions, noise, t, args).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
    return policy


@torch.no_grad()
def one_step(form: Form, policy: ResidualPolicy, noise: Tensor) -> Tensor:
    return form.action(policy(torch.zeros(len(noise), 1), noise, torch.ones(1)), noise)


def errors(actions: Tensor) -> dict[str, float]:
    """Distance to the nearest mode, share within three std of one, transport to fresh data."""
    distances = torch.cdist(actions, MODES).amin(1)
    rng = torch.random.get_rng_state()
    torch.manual_seed(7)
    cost = torch.cdist(actions[:MATCHED], draw_modes(MATCHED)).numpy()
    torch.random.set_rng_state(rng)
    return {
        "distance": distances.mean().item(),
        "within": (distances < 3 * MODE_STD).float().mean().item(),
        "transport": float(cost[linear_sum_assignment(cost)].mean()),
    }


# ---------------------------------------------------------------------------- the picture


def draw(rows: list[dict], learnt: dict[str, Tensor], exact: dict[str, Tensor], picture: Path):
    figure, panels = style.grid_of_panels(8, 2.1, columns=4, sharex=True, sharey=True)
    for panel, (name, samples) in zip(panels, learnt.items(), strict=False):
        panel.scatter(*samples[:1000].T, s=1.5, color=COLOURS.get(name, style.FIRST), lw=0)
        mean = statistics.fmean(distances(rows, name, "learnt"))
        panel.set_title(f"${name}$: {mean:.2f}")
    for name in "z - u", "te - u", "e - u":  # the other forms end where z - u does
        panels[7].scatter(*exact[name][:600].T, s=1.5, color=COLOURS.get(name, style.FIRST), lw=0)
    panels[7].set_title("exact: $z - u$, $te - u$, $e - u$")
    for panel in panels:
        panel.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color=style.GREY, lw=0.6, zorder=0)
        panel.plot(*MODES.T, "+", color=style.DARK, ms=7, mew=1, zorder=3)
        panel.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    style.save(figure, picture)


def distances(rows: list[dict], form: str, what: str) -> list[float]:
    return [float(r["distance"]) for r in rows if r["form"] == form and r["what"] == what]


def read_errors(path: Path) -> list[dict]:
    """What an earlier run has measured, of every form that was learnt."""
    rows = read_table(path, needed=["form", "what"], numbers=["distance"])
    for name in FORMS:
        if not distances(rows, name, "learnt"):
            fail(f"{path} has no errors of {name}")
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--redraw", action="store_true", help="take the errors from the CSV")
    parser.add_argument("--updates", type=whole(1, 10**9), default=UPDATES, help="per policy")
    text = "folder of benchmark/ and docs/"
    parser.add_argument("--output", type=folder, default=str(ROOT), help=text)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = args.output / "benchmark" / "results" / "reformulations.csv"
    picture = args.output / "docs" / "figures" / "reformulations.png"
    check_output(picture)
    stored = read_errors(results) if args.redraw else []
    if not args.redraw:
        check_output(results)
    noise = torch.randn((SAMPLES, 2), generator=torch.Generator().manual_seed(9))
    rows, learnt, exact = [], {}, {}
    for name, form in FORMS.items():
        exact[name] = fixed_point(form, noise)
        found = [("exact", "", exact[name])]
        for seed in list(SEEDS)[:1] if args.redraw else SEEDS:
            actions = one_step(form, train(form, seed, args.updates), noise)
            learnt.setdefault(name, actions)
            found.append(("learnt", seed, actions))
        for what, seed, actions in found:
            row = {"form": name, "what": what, "seed": seed, "updates": args.updates}
            numbers = {key: round(value, 4) for key, value in errors(actions).items()}
            rows.append(row | numbers)
            print(rows[-1], flush=True)
    if args.redraw:
        rows = stored
    else:
        write_csv(rows, results)
        print(f"wrote {results}")
    draw(rows, learnt, exact, picture)


if __name__ == "__main__":
    run(main)
