"""Figures of training runs of one algorithm: returns and success rates against steps."""

import textwrap
from benchmark.report import style
from benchmark.report.formatting import read, references
from benchmark.report.training_runs import (
    PUBLISHED_100K,
    SETTING,
    beside_sac,
    climb,
    curve,
    cut,
    experiments,
    is_blind,
    last,
    method_of,
    names,
    offline_steps,
    successes,
)
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np


def finish(panel, labels: list[tuple], last_step: int) -> None:
    """Returns against steps: names beside the right end, and the axes."""
    low, high = panel.get_ylim()
    style.label_ends(panel, labels, 0.075 * (high - low))
    panel.set(xlim=(0, last_step), ylim=(low, high))
    panel.locator_params(axis="x", nbins=4)
    panel.xaxis.set_major_formatter(style.thousands)
    panel.yaxis.set_major_formatter(style.with_commas)
    panel.grid(axis="y")


def draw_level(panel, height: float, text: str) -> tuple[float, str, str]:
    """A dotted line to compare curves with, and its label for finish."""
    panel.axhline(height, color="0.5", ls=":", lw=1, zorder=0)
    return height, text, "0.5"


def reached_by_all(runs: Iterable[list[dict]], mode: str) -> tuple[list[int], np.ndarray]:
    """The steps at which every run was evaluated in a mode, and their returns (seeds, steps)."""
    curves = [dict(zip(*curve(run, mode), strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, np.array([[returns[step] for step in steps] for returns in curves])


def draw_learning_curves(path: Path, output: Path) -> None:
    """A panel per experiment: both evaluation modes against environment steps."""
    found, reference = experiments(path), references()
    own_names = names(found, SETTING)
    figure, panels = style.grid_of_panels(len(found), 2.6, columns=2)
    for panel, (key, seeds) in zip(panels, found.items(), strict=True):
        (algorithm, env_id, _), own = key, own_names[key][1]
        end = last(next(iter(seeds.values())))
        labels = []  # (height, text, colour), beside the right end
        for mode, text, colour, dashes in (
            ("best_of_n", f"best of {end['num_candidates']}", style.DARK, style.DASHES),
            ("one_step", "one step", style.ALGORITHMS[algorithm], "-"),
        ):
            steps, values = reached_by_all(seeds.values(), mode)
            style.draw_seeds(panel, steps, values, colour, dashes)
            labels.append((values.mean(0)[-1], text, colour))
        for policy, text in ("zero", "zero action"), ("random", "random"):
            if (env_id, policy) in reference:
                height = reference[env_id, policy]
                labels.append(draw_level(panel, height, text))
        finish(panel, labels, steps[-1])
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        setting = f"N = {end['num_candidates']}, T = {end['nfe']}, {count}"
        own = f"UTD {end['utd']} {own}" if own else ""  # what tells this panel from another
        own = textwrap.wrap(own, 50, break_on_hyphens=False)
        panel.set_title("\n".join([f"{env_id}  ({setting})", *own]))
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("evaluation return", fontsize="medium")
    style.save(figure, output)


def draw_beside_sac(path: Path, output: Path) -> None:
    """A panel per task: FPMD+ and SAC at as many updates, and where published ones end."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in beside_sac(path):
        runs[row["env_id"]][method_of(row), row["seed"]].append(row)
    ours, sac = style.ALGORITHMS["fpmd_plus_online"], style.ALGORITHMS["sac_online"]
    lines = {"FPMD+": (ours, "-"), "FPMD+, slow policy": (ours, style.DASHES)}
    lines |= {"FPMD+, noise 0.4": (ours, style.DOTS)}
    lines |= {"SAC, same critic": (sac, "-"), "SAC, same critic, slow policy": (sac, style.DASHES)}
    lines |= {"SAC, fast policy": (style.GREY, "-"), "SAC": (style.GREY, style.DASHES)}
    figure, panels = style.grid_of_panels(len(runs), 2.6, columns=2)
    for panel, (env_id, own) in zip(panels, runs.items(), strict=True):
        labels = []
        for method, (colour, dashes) in lines.items():
            seeds = [rows for key, rows in own.items() if key[0] == method]
            if not seeds:
                continue
            steps, values = reached_by_all(seeds, "one_step")
            style.draw_seeds(panel, steps, values, colour, dashes)
            labels.append((values.mean(0)[-1], f"{method} ({len(seeds)})", colour))
        published = {row["method"]: row for row in read(PUBLISHED_100K) if row["env"] == env_id}
        modern = "CrossQ" if "CrossQ" in published else "SimbaV2 (UTD 2)"
        for method in ("SAC", modern):
            if method in published:
                height = float(published[method]["return_mean"])
                labels.append(draw_level(panel, height, f"{method}, published"))
        finish(panel, labels, 100_000)
        panel.set_title(env_id)
    figure.supxlabel("environment steps, an update each", fontsize="medium")
    figure.supylabel("evaluation return", fontsize="medium")
    style.save(figure, output)


def at_last(seeds: dict) -> np.ndarray:
    """What one step of each seed's run earns in its last evaluation."""
    return np.array([curve(run, "one_step")[1][-1] for run in seeds.values()])


def draw_variants(path: Path, output: Path) -> None:
    """A panel per task: what each variant's one step earns at last, the best on top."""
    found = cut(experiments(path))
    labels, tasks = names(found), defaultdict(dict)
    for key, seeds in found.items():
        env_id, own = labels[key]
        tasks[env_id][own or "the default"] = at_last(seeds)
    most = max(map(len, tasks.values()))
    figure, panels = style.grid_of_panels(len(tasks), 0.4 + 0.3 * most, columns=1)
    for panel, (env_id, variants) in zip(panels, tasks.items(), strict=True):
        order = sorted(variants, key=lambda name: -variants[name].mean())
        colours = [style.DARK] * len(order)
        colours[order.index("the default")] = style.ALGORITHMS["fpmd_plus_online"]
        rows = [variants[name] for name in order]
        style.draw_rows(panel, rows, [textwrap.fill(name, 60) for name in order], colours)
        panel.axvline(variants["the default"].mean(), color="0.5", ls=":", lw=1, zorder=0)
        panel.xaxis.set_major_formatter(style.with_commas)
        panel.grid(axis="x")
        panel.set_title(env_id)
    figure.supxlabel("return of one step", fontsize="medium")
    style.save(figure, output)


def draw_climb(path: Path, output: Path) -> None:
    """What one step earns at last as one ingredient after another is added, from the top."""
    rungs = climb(cut(experiments(path)))
    rows = [at_last(seeds) for seeds in rungs.values()]
    colours = [style.DARK] * len(rows)
    colours[-1] = style.ALGORITHMS["fpmd_plus_online"]
    figure, (panel,) = style.grid_of_panels(1, 0.4 + 0.3 * len(rows))
    style.draw_rows(panel, rows, list(rungs), colours)
    low, high = min(map(min, rows)), max(map(max, rows))
    margin = 0.1 * (high - low)
    panel.set_xlim(low - margin, high + margin)  # of the seeds: an interval may leave it
    panel.xaxis.set_major_formatter(style.with_commas)
    panel.grid(axis="x")
    panel.set_xlabel("return of one step")
    style.save(figure, output)


def draw_two_doors(path: Path, output: Path) -> None:
    """Success of one step against steps, a line per setting; bounds as in tests/test_doors.py."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        runs[row["setting"]][row["seed"]].append(row)
    figure, (panel,) = style.grid_of_panels(1, 2.6)
    labels = []
    colours = style.DARK, style.ALGORITHMS["fpmd_meanflow_online"]
    for (setting, seeds), colour in zip(runs.items(), colours, strict=True):
        steps, values = reached_by_all(seeds.values(), "one_step")
        style.draw_seeds(panel, steps, values, colour)
        labels.append((values.mean(0)[-1], f"{setting} ({len(seeds)})", colour))
    for height, text in (0.534, "best Gaussian"), (0.9375, "two even modes"):
        labels.append(draw_level(panel, height, text))
    panel.set_ylim(0, 1)
    finish(panel, labels, steps[-1])
    panel.set(xlabel="environment steps, an update each", ylabel="success rate")
    panel.yaxis.set_major_formatter("{x:.1f}")
    style.save(figure, output)


def draw_from_pixels(path: Path, output: Path) -> None:
    """Returns against agent steps: seen, one step and best of N, and one step blind."""
    colour = style.ALGORITHMS["fpmd_meanflow_online"]
    figure, (panel,) = style.grid_of_panels(1, 2.8)
    labels = []
    for key, seeds in experiments(path).items():
        (_, env_id, _), end = key, last(next(iter(seeds.values())))
        lines = [("one_step", "one step", colour, "-")]
        lines += [("best_of_n", f"best of {end['num_candidates']}", style.DARK, style.DASHES)]
        if is_blind(key):
            lines = [("one_step", "one step, black pictures", style.GREY, "-")]
        else:
            panel.set_title(f"{env_id}, {len(seeds)} seeds")
        for mode, text, shade, dashes in lines:
            steps, values = reached_by_all(seeds.values(), mode)
            style.draw_seeds(panel, steps, values, shade, dashes)
            labels.append((values.mean(0)[-1], text, shade))
    panel.set_ylim(bottom=0)
    finish(panel, labels, int(end["total_timesteps"]))
    figure.supxlabel("agent steps", fontsize="medium")
    figure.supylabel("evaluation return", fontsize="medium")
    style.save(figure, output)


def draw_success_rates(path: Path, output: Path) -> None:
    """Success against steps, one step beside best of N, a line per variant; online is shaded."""
    found = experiments(path)
    figure, panels = style.grid_of_panels(2, 3, columns=2, sharey=True)
    for panel, mode in zip(panels, ("one_step", "best_of_n"), strict=True):
        draw_success_rate(panel, found, mode)
        panel.set(ylim=(0, 102), xlabel="steps, offline then online")
        panel.set_title(mode.replace("_", " ").replace(" n", " N"))
    panels[0].set_ylabel("success rate, %")
    style.save(figure, output)


def draw_success_rate(panel, found: dict, mode: str) -> None:
    """One mode of evaluation: seeds thin, their mean thick; names at the ends if there are two."""
    variants = names(found)
    ends = []
    colours = style.FIRST, style.SECOND, style.THIRD, style.FOURTH
    for key, colour in zip(sorted(found, key=lambda k: variants[k][1]), cycle(colours)):
        runs = [successes(run, mode) for run in found[key].values()]
        steps = sorted(set.intersection(*map(set, runs)))
        values = np.array([[run[step] for step in steps] for run in runs])
        style.draw_seeds(panel, steps, values, colour)
        ends.append((values.mean(0)[-1], variants[key][1] or "the default", colour))
        panel.axvspan(offline_steps(key), steps[-1], color="0.95", lw=0, zorder=0)
    if len(ends) > 1:
        style.label_ends(panel, ends, 7)
    beside = {"textcoords": "offset points", "va": "top", "color": style.DARK}
    panel.annotate("online", (offline_steps(key), 97), (4, 0), **beside)
    panel.set_xlim(0, steps[-1])
    panel.xaxis.set_major_formatter(style.thousands)
    panel.grid(axis="y")
