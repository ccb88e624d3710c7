"""What a measurement of speed.py is: repeated work, how long it took, and its floor."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

LONG_ENOUGH = 0.02  # seconds that a repetition takes at least


@dataclass
class Part:
    """Work whose shortest time on this machine is max(2 m / R, b / W).

    m: its multiply-adds as torch counts them in what the script executes eagerly (FPMD-M's JVP then
    multiplies by zero tangents of weights, too: a twentieth of learning, which compiling drops).
    R: the best rate of a plain product in its precision, 8192 or as many rows as there are
    candidates, by 256 x 256. b: the bytes that cannot but move, all float32, as if nothing stayed
    in a cache from call to call: every weight once, inputs, outputs, and for learning each
    parameter with its Adam moments and EMA, in and out; no activations. W: bytes read and
    written per second by a large copy. The floor of an update is the sum of its parts' floors,
    since they run one after another.
    """

    multiply_adds: float
    megabytes: float
    precision: str

    def floor(self, rates: dict[str, float], bandwidth: float) -> float:
        """Seconds, from {precision: multiply-adds per second} and megabytes per second."""
        return max(self.multiply_adds / rates[self.precision], self.megabytes / bandwidth)


@dataclass
class Measurement:
    """One row of the CSV: what is called, how often a call does it, and what came out."""

    what: dict  # script, num_candidates, flow_steps, mode, precision, measurement
    function: Callable | None  # None: nothing to repeat
    does: int = 1
    multiply_adds: float = math.nan
    parts: tuple[Part, ...] = ()
    megabytes: float = math.nan  # the most a call allocates on a GPU
    calls: int = 1
    seconds: list[float] = field(default_factory=list)  # of doing it once, per repetition

    def set_precision(self) -> None:
        """The one that this measurement's products are to have, while others have their own."""
        tf32 = self.what["precision"] == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    def repeat(self, device: torch.device) -> None:
        self.set_precision()
        self.seconds.append(seconds(self.function, self.calls, device) / self.does)

    def warm_up(self, device: torch.device) -> None:
        """Compile, fill caches, and see how many calls make a repetition long enough."""
        self.set_precision()
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            seconds(self.function, 2, device)
            torch.cuda.reset_peak_memory_stats(device)
            seconds(self.function, 1, device)
            self.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        seconds(self.function, 2, device)
        self.calls = math.ceil(LONG_ENOUGH / seconds(self.function, 1, device))


def seconds(function: Callable, calls: int, device: torch.device) -> float:
    """Mean time of a call; a GPU works asynchronously, so its queue is emptied on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def time_all(
    timed: list[Measurement], repetitions: int, device: torch.device, hold: bool = False
) -> None:
    """Warm everything up (hold: and wait for a line on stdin), then repeat everything in turn."""
    repeated = [measurement for measurement in timed if measurement.function]
    for i, measurement in enumerate(repeated):
        print(f"\rwarming up {i + 1} of {len(repeated)}", end="", file=sys.stderr)
        measurement.warm_up(device)
    print(file=sys.stderr)
    if hold:
        print("warm", flush=True)
        sys.stdin.readline()
    for repetition in range(repetitions):
        for measurement in repeated:
            measurement.repeat(device)
        print(f"\rrepetition {repetition + 1} of {repetitions}", end="", file=sys.stderr)
    print(file=sys.stderr)


def to_rows(timed: list[Measurement], batch_size: int, device: torch.device) -> list[dict]:
    """The CSV. peak_megabytes: on a GPU what a call allocates, on a CPU the process at its peak."""
    median = {id(m): float(np.median(m.seconds)) for m in timed}
    rates, rows = {}, []
    peak = peak_megabytes(resource.getrusage(resource.RUSAGE_SELF))
    for m in timed:
        if m.what["measurement"].startswith("matmul"):
            rate = m.multiply_adds / median[id(m)]
            rates[m.what["precision"]] = max(rate, rates.get(m.what["precision"], 0))
        if m.what["measurement"].startswith("copy"):
            bandwidth = m.parts[0].megabytes / median[id(m)]
    for m in timed:
        quartiles = 1000 * np.percentile(m.seconds, (25, 75))
        floor = sum(part.floor(rates, bandwidth) for part in m.parts)
        row = m.what | {"milliseconds": f"{1000 * median[id(m)]:.4f}"}
        row |= {"quartile_1": f"{quartiles[0]:.4f}", "quartile_3": f"{quartiles[1]:.4f}"}
        row["multiply_adds"] = "" if math.isnan(m.multiply_adds) else round(m.multiply_adds)
        megabytes = sum(part.megabytes for part in m.parts)
        row["compulsory_megabytes"] = f"{megabytes:.3f}" if m.parts else ""
        row["floor_ms"] = f"{1000 * floor:.4f}" if m.parts else ""
        row["ratio_to_floor"] = f"{median[id(m)] / floor:.3f}" if m.parts else ""
        megabytes = peak if device.type != "cuda" else m.megabytes
        row["peak_megabytes"] = "" if math.isnan(megabytes) else f"{megabytes:.1f}"
        rows.append(row | {"batch_size": batch_size, "repetitions": len(m.seconds)})
    return rows


def row_of(script="", setting=("", ""), mode="eager", precision="float32", measurement="") -> dict:
    row = {"script": script, "num_candidates": setting[0], "flow_steps": setting[1]}
    return row | {"mode": mode, "precision": precision, "measurement": measurement}


def peak_megabytes(usage: resource.struct_rusage) -> float:
    """The most memory a process has had resident; Linux counts kilobytes, macOS bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
