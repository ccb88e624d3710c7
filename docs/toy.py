"""FPMD on a problem with one state and one action dimension: docs/toy.md explains it.

python docs/toy.py    # a few seconds; draws docs/figures/toy.png (needs matplotlib)
"""

from pathlib import Path

import torch
from torch import Tensor, nn

LAMBDA = 0.3  # temperature: small values trust Q, large ones keep the old policy


def q(a: Tensor) -> Tensor:
    """The value of an action: two hills, the right one is higher."""
    return (-(((a - 0.6) / 0.3) ** 2)).exp() + 0.8 * (-(((a + 0.6) / 0.3) ** 2)).exp()


def generate(v: nn.Module, z: Tensor, steps: int) -> Tensor:
    """Follow dz/dt = v(z, t) from noise at t = 0 to an action at t = 1 with Euler's method."""
    for k in range(steps):
        t = torch.full_like(z, k / steps)
        z = z + v(torch.cat([z, t], -1)) / steps
    return z


def fit(v: nn.Module, actions: Tensor, w: Tensor, updates: int = 600) -> None:
    """Flow matching: regress v(z_t, t) on a - e, every target counted w times."""
    optimizer = torch.optim.Adam(v.parameters())
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - update / updates)  # settles at the end
        rows = torch.randint(len(actions), (256,))
        a, e, t = actions[rows], torch.randn(256, 1), torch.rand(256, 1)
        z_t = (1 - t) * e + t * a
        loss = (w[rows] * (v(torch.cat([z_t, t], -1)) - (a - e)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def improve(v: nn.Module) -> None:
    """One step of mirror descent: pi_new = pi_old exp(Q / lambda) / normaliser."""
    with torch.no_grad():
        actions = generate(v, torch.randn(5_000, 1), steps=20)
    w = ((q(actions) - q(actions).max()) / LAMBDA).exp()
    fit(v, actions, w / w.mean())


def run(after: tuple[int, ...] = (0, 1, 6)) -> dict[int, tuple[Tensor, Tensor]]:
    """{updates: (actions generated in 20 steps, in 1 step)}, from the same noise."""
    torch.manual_seed(0)
    v = nn.Sequential(nn.Linear(2, 48), nn.Mish(), nn.Linear(48, 48), nn.Mish(), nn.Linear(48, 1))
    fit(v, 0.6 * torch.randn(5_000, 1), torch.ones(5_000, 1))  # the old policy: N(0, 0.6^2)
    found, noise = {}, torch.randn(5_000, 1)
    for update in range(max(after) + 1):
        if update > 0:
            improve(v)
        if update in after:
            with torch.no_grad():
                found[update] = generate(v, noise, 20), generate(v, noise, 1)
    return found


def exact(update: int, a: Tensor) -> Tensor:
    """Density of the policy after so many perfect steps: pi_0 exp(update Q / lambda)."""
    density = (-((a / 0.6) ** 2) / 2 + update * q(a) / LAMBDA).exp()
    return density / (density.sum() * (a[1] - a[0]))


def draw(found: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    a = torch.linspace(-1.5, 1.5, 601)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharex=True)
    for panel, (update, (many, one)) in zip(panels, found.items(), strict=True):
        bins, style = torch.linspace(-1.5, 1.5, 61).numpy(), {"density": True, "zorder": 1}
        panel.hist(many[:, 0].numpy(), bins, color="#0072B2", alpha=0.45, **style)
        panel.hist(one[:, 0].numpy(), bins, color="#D55E00", alpha=0.75, **style)
        panel.plot(a, exact(update, a), color="black", lw=1.2)
        panel.set_title(("before", "after 1 update", f"after {update} updates")[min(update, 2)])
        panel.set_xlabel("action")
        panel.spines[["top", "right"]].set_visible(False)
        limit = 1.15 * max(exact(update, a).max().item(), 1.0)
        panel.set_ylim(0, limit)
    panels[0].plot(a, q(a), color="0.5", ls=":", lw=1.5)
    panels[0].legend(["exact density", "Q", "20 steps", "1 step"], frameon=False, fontsize=8)
    panels[0].set_ylabel("density")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny
    draw(run(), Path(__file__).parent / "figures" / "toy.png")
