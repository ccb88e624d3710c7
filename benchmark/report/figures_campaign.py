"""Figures of a campaign: curves, statistics across tasks, one step against best of N."""

from benchmark.report import style
from benchmark.report.campaign import (
    ALGORITHMS,
    ONE_STEP,
    Curves,
    algorithms_of,
    blocks,
    both_modes,
    load,
    runs,
    scores,
    tasks_of,
)
from benchmark.report.formatting import listed, references
from benchmark.report.intervals import (
    bootstrap,
    final,
    interquartile_mean,
    mean_curve,
    performance_profile,
)
from itertools import product
from pathlib import Path

import numpy as np


def draw_curves(path: Path, output: Path, against: str = "steps") -> None:
    """A panel per task: every algorithm's mean over seeds, and thinner each seed."""
    curves, reference = load(path), references()
    env_ids = tasks_of(curves)
    figure, panels = style.grid_of_panels(len(env_ids), 2.5)
    unit, label = 1, "environment steps"
    if against == "seconds":
        longest = max(curve.seconds[-1] for found in curves.values() for curve in found)
        unit, label = (3600, "hours") if longest >= 3600 else (60, "minutes")
    for panel, env_id in zip(panels, env_ids, strict=True):
        labels, seen, ends = [], [], []  # labels: (height, text, colour) beside the right end
        for algorithm in algorithms_of(curves):
            if not (found := runs(curves, env_id, algorithm)):
                continue
            x, values = mean_curve(found, against)
            if not len(x):
                continue
            colour, x, height = style.ALGORITHMS[algorithm], x / unit, values.mean(0)[-1]
            dashes = "-" if algorithm in ONE_STEP else style.DASHES
            style.draw_seeds(panel, x, values, colour, dashes)
            seen += [values.min(), values.max()]
            ends.append((x[-1], height, colour))
            seeds = f" ({len(found)})" if len(found) != most_seeds(curves) else ""
            labels.append((height, ALGORITHMS[algorithm].name + seeds, colour))
        for policy, text in ("random", "random"), ("zero", "zero action"):
            if (env_id, policy) in reference:
                height = reference[env_id, policy]
                panel.axhline(height, color="0.5", ls=":", lw=1, zorder=0)
                labels.append((height, text, "0.4"))
                seen.append(height)
        if not ends:  # nothing to draw yet, or no time that all seeds have reached
            panel.set_title(f"{env_id}: nothing yet")
            continue
        low, high = min(seen), max(seen)
        low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
        end = max(x for x, _, _ in ends)
        panel.set_ylim(low, high)  # of the runs: a band may leave it
        panel.set_xlim(0, end)
        for x, height, colour in ends:
            panel.plot(x, height, "o", color=colour, ms=3, clip_on=False, zorder=4)
            if x < 0.97 * end:  # it stopped earlier: lead the eye to its label
                panel.plot((x, end), (height, height), color=colour, lw=0.5, ls=(0, (1, 3)))
        style.label_ends(panel, labels, 0.085 * (high - low), 1.03)
        panel.set_title(env_id)
        panel.locator_params(axis="x", nbins=4)
        if against == "steps":
            panel.xaxis.set_major_formatter(style.thousands)
        panel.yaxis.set_major_formatter(style.with_commas)
        panel.grid(axis="y")
    figure.supxlabel(label, fontsize="medium")
    figure.supylabel("evaluation return", fontsize="medium")
    style.save(figure, output)


def most_seeds(curves: Curves) -> int:
    return max(map(len, curves.values()))


def draw_across_tasks(path: Path, output: Path) -> None:
    """IQM with intervals on the left, performance profiles in the same colours on the right."""
    curves = load(path)
    found = [block for block in blocks(curves) if len(block[1]) > 1] or blocks(curves)
    if not found:
        print(f"{output.name} left out: no task with a scale that all algorithms have run on")
        return
    env_ids, algorithms = found[0]
    own = scores(curves, algorithms, env_ids)
    figure, (left, right) = style.grid_of_panels(2, 2.9, width_ratios=(1, 1.4))
    everything = np.concatenate([task for scored in own.values() for task in scored])
    low, high = min(0.0, everything.min()), everything.max()
    thresholds = np.linspace(low - 0.02, high + 0.03 * (high - low), 301)
    for i, (name, scored) in enumerate(own.items()):
        colour = style.ALGORITHMS[name]
        value, ends = interquartile_mean(scored), bootstrap(interquartile_mean, scored)
        style.draw_interval(left, None, ends, value, i, colour)
        beside = {"textcoords": "offset points", "ha": "center"}
        left.annotate(f"{value:.2f}", (value, i), (0, 6), color=colour, **beside)
        share = performance_profile(scored, thresholds)
        band = bootstrap(lambda s: performance_profile(s, thresholds), scored, resamples=500)
        dashes = "-" if name in ONE_STEP else style.DASHES
        right.plot(thresholds, share, color=colour, lw=1.5, ls=dashes)
        right.fill_between(thresholds, *band, color=colour, alpha=0.12, lw=0)
    style.name_rows(left, *names_and_colours(own))
    left.set_ylim(len(own) - 0.5, -0.7)
    left.set_xlim(min(0, left.get_xlim()[0]))
    left.set_xlabel("interquartile mean of scores")
    left.grid(axis="x")
    right.set_xlabel("score: 0 random, 1 SAC's published at 1M steps")
    right.set_ylabel("share of runs above it")
    right.set_ylim(0, 1.02)
    right.set_xlim(thresholds[0], thresholds[-1])
    title = f"{len(env_ids)} task{'s' * (len(env_ids) > 1)}"
    if absent := [ALGORITHMS[name].name for name in algorithms_of(curves) if name not in own]:
        title += f", {listed(absent)} not on all of them"
    left.set_title(title)
    style.save(figure, output)


def names_and_colours(algorithms) -> tuple[list[str], list[str]]:
    return (
        [ALGORITHMS[name].name for name in algorithms],
        [style.ALGORITHMS[name] for name in algorithms],
    )


def draw_one_step_against_n(path: Path, output: Path) -> None:
    """A panel per task: one step minus best of N, seed by seed, with Student's interval.

    DPMD is in the table alone: it was not made for one step, and its loss would be the scale.
    """
    curves, pairs = load(path), {}
    for env_id, algorithm in product(tasks_of(curves), ONE_STEP):
        if pair := both_modes(curves, env_id, algorithm):
            one, many, step = pair
            pairs.setdefault(env_id, {})[algorithm] = final(one, step) - final(many, step)
    if not pairs:
        print(f"{output.name} left out: no runs with both policies")
        return
    figure, panels = style.grid_of_panels(len(pairs), 0.7 + 0.27 * max(map(len, pairs.values())))
    for panel, (env_id, own) in zip(panels, pairs.items(), strict=True):
        panel.axvline(0, color="0.6", lw=1, zorder=0)
        style.draw_rows(panel, list(own.values()), *names_and_colours(own))
        panel.set_title(env_id)
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:+,g}" if x else "0")
    figure.supxlabel("return of one step minus best of N", fontsize="medium")
    style.save(figure, output)
