"""Whole training runs for speed.py --end-to-end: steps per second, and memory."""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import resource
import sys
import tempfile
from benchmark.measure.measuring import load_script
from benchmark.measure.speed_cases import ENV_ID, MODES, refuse_without_compiler
from benchmark.measure.speed_clock import peak_megabytes, row_of
from benchmark.runs import has_learned, read_metrics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

END_TO_END = {  # flags of the training runs of --end-to-end
    "env_id": ENV_ID,
    "num_candidates": 8,
    "flow_steps": 1,
    "utd": 0.2,
    "learning_starts": 1_000,
    "log_every": 500,
    "eval_every": 0,
    "checkpoint_every": 0,
}


def step_times(run_dir: Path) -> list[float]:
    """Seconds per environment step between the rows of metrics.csv.

    The first row with losses comes after hundreds of updates, so compiling is over by then.
    """
    rows = [row for row in read_metrics(run_dir) if has_learned(row)]
    rows = [(int(row["global_step"]), float(row["wall_time"])) for row in rows]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(rows)]


def full_buffer(module: ModuleType) -> type:
    """A replay buffer that is full of random transitions from the start."""

    class FullBuffer(module.ReplayBuffer):
        def __init__(self, capacity: int, *sizes):
            super().__init__(capacity, *sizes)
            rng, rows = np.random.default_rng(0), max(1, capacity // 100)
            while self.size < capacity:
                shapes = {name: (rows, *shape) for name, shape in self.shapes.items()}
                draw = rng.standard_normal
                self.add(**{name: draw(shape, np.float32) for name, shape in shapes.items()})

    return FullBuffer


def train(script: str, mode: str, options: argparse.Namespace, full: bool) -> tuple:
    """Run the script's main: its step times, and the process's peak memory in megabytes.

    With a full buffer only for a few updates, but with the checkpoint at the end, which copies the
    buffer. The memory is what this process had resident, so it wants one of its own; compilers
    that it started are not in it. On a GPU, which holds the buffer, it is what torch allocated.
    """
    module, (kind, precision) = load_script(script), MODES[mode]
    if full:
        module.ReplayBuffer = full_buffer(module)
    steps = END_TO_END["learning_starts"] + 100 if full else options.steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = END_TO_END | {"total_timesteps": steps, "runs_dir": folder, "exp_name": script}
        flags |= {"compile": kind == "compiled", "precision": precision}
        flags |= {"device": options.device, "torch_threads": options.threads}
        times = step_times(module.main(module.Args(**flags)))
    if options.device.startswith("cuda"):
        return times, torch.cuda.max_memory_allocated(torch.device(options.device)) / 1e6
    return times, peak_megabytes(resource.getrusage(resource.RUSAGE_SELF))


def end_to_end(options: argparse.Namespace) -> list[dict]:
    """Steps per second of whole training runs, modes in turn, and their memory.

    Every run has a process of its own. Step times are differences between the rows of a run's
    metrics.csv, all of them after compilation; medians and quartiles are over all runs' rows.
    """
    cases = list(itertools.product(options.scripts, options.modes))
    if any(MODES[mode][0] == "compiled" for mode in options.modes):
        refuse_without_compiler(torch.device(options.device))
    times, peaks, full_peaks = ({case: [] for case in cases} for _ in range(3))
    for repetition in range(options.repetitions + 1):
        full = repetition == options.repetitions  # one run more, for its memory
        for case in cases:
            what = "with a full buffer" if full else f"run {repetition + 1}"
            print(f"training {' '.join(case)}, {what}", file=sys.stderr)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds_per_step, peak = pool.submit(train, *case, options, full).result()
            times[case] += [] if full else seconds_per_step
            (full_peaks if full else peaks)[case].append(peak)
    rows, setting = [], (END_TO_END["num_candidates"], END_TO_END["flow_steps"])
    for script, mode in cases:
        low, median, high = 1000 * np.percentile(times[script, mode], (25, 50, 75))
        row = row_of(script, setting, *MODES[mode], "environment step while training")
        row |= {"env_id": ENV_ID, "utd": END_TO_END["utd"], "milliseconds": f"{median:.4f}"}
        row |= {"quartile_1": f"{low:.4f}", "quartile_3": f"{high:.4f}"}
        row["steps_per_second"] = f"{1000 / median:.2f}"
        row["peak_megabytes"] = f"{np.median(peaks[script, mode]):.1f}"
        row["full_buffer_megabytes"] = f"{full_peaks[script, mode][0]:.1f}"
        row |= {"batch_size": 256, "total_timesteps": options.steps}
        rows.append(row | {"repetitions": options.repetitions})
    return rows
