"""Which tables and figures there are, and from which CSV each is made."""

from benchmark import FIGURES, ROOT
from benchmark.report import tables_campaign as campaign
from benchmark.report import tables_speed as speed
from benchmark.report import tables_training as training
from benchmark.report.figures_campaign import (
    draw_across_tasks,
    draw_curves,
    draw_one_step_against_n,
)
from benchmark.report.figures_latency import draw_latency
from benchmark.report.figures_training import (
    draw_beside_sac,
    draw_climb,
    draw_from_pixels,
    draw_learning_curves,
    draw_success_rates,
    draw_two_doors,
    draw_variants,
)
from benchmark.report.tables_deploy import policies
from benchmark.report.tables_latency import latency
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

TRAINING = {
    "results-cpu": (training.results, "fpmd_online_cpu.csv"),
    "meanflow-cpu": (training.results, "fpmd_meanflow_online_cpu.csv"),
    "meanflow-200k": (training.results, "fpmd_meanflow_online_200k_cpu.csv"),
    "meanflow-seeds": (training.last_evaluations, "fpmd_meanflow_online_cpu.csv"),
    "weight-modes": (training.ablation, "weight_modes_cpu.csv"),
    "weight-modes-utd1": (training.ablation, "weight_modes_utd1_cpu.csv"),
    "mvp-cpu": (training.results, "mvp_online_cpu.csv"),
    "offline-to-online": (training.success_rates, "offline_to_online_cpu.csv"),
    "constraint": (training.constraint, "constraint.csv"),
    "reformulations": (training.reformulations, "reformulations.csv"),
    "recipe-screen": (training.screen, "recipe_screen.csv"),
    "policy-screen": (training.screen, "policy_screen.csv"),
    "plus-ingredients": (partial(training.ablation, average=1), "plus_ingredients_cpu.csv"),
    "plus-climb": (training.steps_of_a_climb, "plus_climb_cpu.csv"),
    "plus-100k": (training.at_100k, "plus_100k_cpu.csv"),
    "plus-100k-overview": (
        partial(training.at_100k, methods=training.OVERVIEW),
        "plus_100k_cpu.csv",
    ),
    "plus-beside-sac": (training.beside_same_critic, "plus_100k_cpu.csv"),
    "two-doors": (
        partial(training.screen, modes=("one_step", "best_of_n", "sampled")),
        "two_doors_cpu.csv",
    ),
    "two-doors-soft": (training.screen, "two_doors_soft_cpu.csv"),
    "pixels-cpu": (training.from_pixels, "pixels_cpu.csv"),
    "pixels-screen": (partial(training.screen, step="agent step"), "pixels_screen_cpu.csv"),
    "compile-cpu": (training.ablation, "compile_cpu.csv"),
    "short-runs": (training.ablation, "short_runs_cpu.csv"),
    "reference-policies": (training.reference_policies, "reference_policies.csv"),
    "published": (training.published, "published_results.csv"),
}
SPEED = {
    "precision": (speed.precision, "precision.csv"),
    "authors-cpu": (speed.against_authors, "authors_cpu.csv"),
    "speed-cpu": (speed.speed, "speed_cpu.csv"),
    "speed-acting-cpu": (speed.speed_of_acting, "speed_cpu.csv"),
    "speed-variants-cpu": (speed.speed_of_variants, "speed_cpu.csv"),
    "end-to-end-cpu": (speed.end_to_end, "end_to_end_cpu.csv"),
    "evaluation-cost-cpu": (speed.evaluation_cost, "evaluation_cost_cpu.csv"),
    "speed-cuda": (speed.speed, "speed_cuda.csv"),
    "prove-cuda": (speed.proofs, "prove_cuda.csv"),
    "rates-cuda": (speed.whole_runs, "rates_cuda.csv"),
}
CURVES = {
    "fpmd_online_cpu.png": (draw_learning_curves, "fpmd_online_cpu.csv"),
    "fpmd_meanflow_online_cpu.png": (draw_learning_curves, "fpmd_meanflow_online_cpu.csv"),
    "fpmd_meanflow_online_200k_cpu.png": (
        draw_learning_curves,
        "fpmd_meanflow_online_200k_cpu.csv",
    ),
    "plus_100k_cpu.png": (draw_beside_sac, "plus_100k_cpu.csv"),
    "plus_ingredients_cpu.png": (draw_variants, "plus_ingredients_cpu.csv"),
    "plus_climb_cpu.png": (draw_climb, "plus_climb_cpu.csv"),
    "two_doors_soft_cpu.png": (draw_two_doors, "two_doors_soft_cpu.csv"),
    "pixels_cpu.png": (draw_from_pixels, "pixels_cpu.csv"),
    "mvp_online_cpu.png": (draw_learning_curves, "mvp_online_cpu.csv"),
    "offline_to_online_cpu.png": (draw_success_rates, "offline_to_online_cpu.csv"),
    "compile_cpu.png": (draw_learning_curves, "compile_cpu.csv"),
}


class Registry(NamedTuple):
    tables: dict[str, tuple[Callable, str]]  # name in the markers: what writes it, from which CSV
    figures: dict[str, tuple[Callable, str]]  # file: what draws it, from which CSV


def registry() -> Registry:
    found = Registry(dict(TRAINING | SPEED), dict(CURVES))
    for name, tasks in ("cpu", 3), ("pendulum", 1), ("cartpole", 1), ("cuda", 6):
        add_campaign(found, name, several_tasks=tasks > 1)
    add_meanflowql(found)
    found.tables["policies"] = or_not_yet(policies, "None yet."), "policies.csv"
    add_latency(found, "cpu", "a CPU")
    add_latency(found, "cuda", "a GPU")
    add_latency(found, "core", "one CPU core")
    return found


def add_campaign(found: Registry, name: str, several_tasks: bool) -> None:
    """Tables and figures of results/campaign_<name>.csv; a figure is shown by a "table", too."""
    source = f"campaign_{name}.csv"
    tables = {
        "overview": campaign.overview,
        "protocol": campaign.protocol,
        "tasks": campaign.per_task,
        "one-step": campaign.one_step_against_n,
        "standing": campaign.standing,
        "differences": campaign.differences,
    }
    figures = {
        "steps": (draw_curves, "Return against steps"),
        "time": (partial(draw_curves, against="seconds"), "Return against wall time"),
    }
    if several_tasks:
        tables |= {"across": campaign.across_tasks, "improvement": campaign.improvement}
        figures["one_step"] = draw_one_step_against_n, "One step minus best of N"
        figures["across"] = draw_across_tasks, "IQM, performance profiles"
    for key, (draw, alt) in figures.items():
        file = f"campaign_{name}_{key}.png"
        found.figures[file] = draw, source
        tables["figure-" + key.replace("_", "-")] = image(alt, file)
    for key, build in tables.items():
        found.tables[f"campaign-{name}-{key}"] = or_not_yet(build, "No runs yet."), source


def add_meanflowql(found: Registry) -> None:
    """MeanFlowQL's offline runs for every alpha, and both phases of the chosen one, by task."""
    for task in "cube", "maze":
        source, online = f"meanflowql_{task}_cpu.csv", f"meanflowql_{task}_online_cpu.csv"
        file = f"meanflowql_{task}_online_cpu.png"
        found.figures[file] = draw_success_rates, online
        for name, build, csv in (
            ("alphas", training.offline, source),
            ("offline", training.offline, online),
            ("online", training.success_rates, online),
            ("figure", image("Success rates of MeanFlowQL", file), online),
        ):
            found.tables[f"meanflowql-{task}-{name}"] = or_not_yet(build, "Not run yet."), csv
    for name in "meanflowql", "mvp":
        found.tables[f"{name}-cube-cuda"] = training.cut_off, f"{name}_cube_cuda.csv"
    found.tables["meanflowql-alphas"] = training.alphas, "meanflowql_alphas.csv"


def add_latency(found: Registry, where: str, machine: str) -> None:
    """The table and the figure of results/latency_<where>.csv."""
    file, source, missing = f"latency_{where}.png", f"latency_{where}.csv", "Not measured yet."
    link = image(f"Milliseconds per action on {machine}", file)
    found.tables[f"latency-{where}"] = or_not_yet(latency, missing), source
    found.tables[f"figure-latency-{where}"] = or_not_yet(link, missing), source
    found.figures[file] = draw_latency, source


def or_not_yet(build: Callable[[Path], str], text: str) -> Callable[[Path], str]:
    """The same, but that text while the CSV is missing."""
    return lambda path: build(path) if path.exists() else text


def image(alt: str, name: str) -> Callable[[Path], str]:
    """A link from the repository's root; report.py makes it one from the document."""
    link = f"![{alt}]({(FIGURES / name).relative_to(ROOT)})"
    return lambda path: link
