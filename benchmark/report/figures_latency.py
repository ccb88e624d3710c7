"""The figure of latency.py."""

import math
from benchmark.report import style
from benchmark.report.campaign import ALGORITHMS
from benchmark.report.formatting import digits, read
from pathlib import Path


def draw_latency(path: Path, output: Path) -> None:
    """Bars of the median, a panel per batch size, the 99th percentile as a tick."""
    rows = read(path)
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    cases = list(dict.fromkeys((row["policy"], row["steps"]) for row in rows))
    known = "eager", "compiled", "onnxruntime", "captured"
    modes = [mode for mode in known if any(row["mode"] == mode for row in rows)]
    figure, panels = style.grid_of_panels(len(batches), 0.8 + 0.44 * len(cases), sharey=True)
    colours = {a.name: style.ALGORITHMS[key] for key, a in ALGORITHMS.items()}
    for panel, batch in zip(panels, batches, strict=True):
        own = [row for row in rows if row["batch"] == batch]
        low = min(float(row["median_ms"]) for row in own)
        high = max(float(row["p99_ms"]) for row in own)
        left = 10 ** math.floor(math.log10(low / 1.5))
        unnamed = set(modes) if len(modes) > 1 else set()  # each mode is named once, at the top
        for row in sorted(own, key=lambda row: cases.index((row["policy"], row["steps"]))):
            place = cases.index((row["policy"], row["steps"]))
            y = place + 0.8 / len(modes) * (modes.index(row["mode"]) - (len(modes) - 1) / 2)
            ms, slow = float(row["median_ms"]), float(row["p99_ms"])
            colour = colours.get(row["policy"].split(",")[0], style.DARK)  # plain products
            alpha = 1.0 if row["mode"] == modes[-1] else 0.45
            thick = 0.72 / len(modes)
            panel.barh(y, ms - left, left=left, color=colour, alpha=alpha, height=thick, lw=0)
            panel.plot(slow, y, "|", color=style.DARK, ms=7)
            words = f" {row['mode']}" if row["mode"] in unnamed else ""
            unnamed.discard(row["mode"])
            beside = {"textcoords": "offset points", "va": "center"}
            panel.annotate(f"{digits(ms)} ms{words}", (max(slow, ms), y), (5, -0.5), **beside)
        panel.set_xscale("log")
        panel.set_xlim(left, high * (high / left) ** 0.45)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.set_xlabel("milliseconds, logarithmic")
        panel.set_title("one action" if batch == "1" else f"{batch} actions at once")
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    labels = [p + (f", {steps} steps" if steps != "1" else "") for p, steps in cases]
    panels[0].set_yticks(range(len(cases)), labels)
    panels[0].invert_yaxis()
    style.save(figure, output)
