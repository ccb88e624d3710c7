"""All that a lent GPU can tell, in minutes: is it right, how fast is it, what does it learn?

    prove   versions, the card; tests/test_cuda.py: eager, graph, compiled and captured updates
            agree, a resumed run is an uninterrupted one, every script trains
    time    measure/speed.py for every script; whole runs alone and side by side, with simulators
            in the process and in processes of their own; measure/latency.py
    train   runs at the published budget side by side, the next ones of TRAIN, as many as will
            finish at the speeds that were measured

Each piece runs in processes of its own within a time limit of its own. What it finds is on disk at
once; what fails is recorded with the end of its output, and the next piece begins. Started again
with the same --output, only what is missing or failed is done.

    python benchmark/gpu.py --minutes 9 --output gpu
    python benchmark/gpu.py --minutes 2 --output gpu --stages prove
    python benchmark/gpu.py --output smoke --smoke   # all of it at toy size, without a GPU

Or campaigns of launch.py and nothing else, their runs side by side with NVIDIA's MPS:

    python benchmark/gpu.py --minutes 8 --output gpu --campaigns \\
        benchmark/launch/campaigns/plus_ingredients.toml

In --output: <piece>.json (status, seconds, what it found), logs/, runs/, and of the pieces
prove_cuda.csv, speed_cuda.csv, rates_cuda.csv, latency_cuda.csv, campaign_cuda.csv and
<campaign>_cuda.csv.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from benchmark.cli import Parser, folder, number, run, whole
from benchmark.files import Refused, fail, read_json, write_text
from benchmark.launch.campaign import read_campaign
from benchmark.measure.gpu_campaigns import campaigns
from benchmark.measure.gpu_job import Failed, Job
from benchmark.measure.gpu_proofs import machine, tests
from benchmark.measure.gpu_rates import latency, rates, speed
from benchmark.measure.gpu_training import train

STAGES = "prove", "time", "train"
PIECES: list[tuple[str, str, Callable]] = [
    ("prove", "machine", machine),
    ("prove", "tests", tests),
    ("time", "speed", speed),
    ("time", "rates", rates),
    ("time", "latency", latency),
    ("train", "train", train),
]


def run_piece(job: Job, name: str, function: Callable) -> dict:
    """Its JSON, which is on disk when this returns."""
    path, start = job.output / f"{name}.json", time.monotonic()
    with suppress(Refused):  # missing, or torn when the machine was taken away
        before = read_json(path)
        if before.get("status") == "ok":
            return before | {"seconds": 0, "note": "done before"}
    print(f"{name}: {job.left:.0f} s left", flush=True)
    result = {"status": "ok"}
    try:
        result["found"] = function(job)
    except Failed as error:
        result |= {"status": "failed", "why": str(error)}
    except Exception as error:  # whatever it is, the next piece has its turn
        result |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    finally:  # Ctrl-C does not reach what has a session of its own
        job.end_all()
    result["seconds"] = round(time.monotonic() - start, 1)
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"  {name}: {result['status']} after {result['seconds']} s", flush=True)
    if "why" in result:
        print("\n".join(f"    {line}" for line in result["why"].splitlines()), flush=True)
    return result


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    text = "for everything together"
    parser.add_argument("--minutes", type=number(0.01, 10**6), default=9, help=text)
    parser.add_argument("--output", type=folder, required=True, help="folder, made if missing")
    several = {"nargs": "+", "choices": STAGES, "metavar": "STAGE"}
    text = f"of {', '.join(STAGES)}"
    parser.add_argument("--stages", **several, default=list(STAGES), help=text)
    several = {"nargs": "+", "choices": [name for _, name, _ in PIECES], "metavar": "PIECE"}
    text = f"of {', '.join(several['choices'])}"
    parser.add_argument("--only", **several, default=several["choices"], help=text)
    text = "of a training run"
    parser.add_argument("--steps", type=whole(1, 10**12), default=1_000_000, help=text)
    text = "train so many even if they should not finish"
    limits = whole(0, 1000)
    parser.add_argument("--at-least", type=limits, default=0, metavar="RUNS", help=text)
    text = "of launch.py, instead of the stages"
    several = {"nargs": "+", "type": Path, "metavar": "FILE"}
    parser.add_argument("--campaigns", **several, default=[], help=text)
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    return parser.parse_args()


def check_campaigns(paths: list[Path]) -> None:
    """Refuse what launch.py would, before the time runs."""
    for path in paths:
        read_campaign(path)
    if len({path.stem for path in paths}) < len(paths):
        fail("two of --campaigns have the same name, and so would their CSVs")


def chosen(options: argparse.Namespace) -> list[tuple[str, str, Callable]]:
    """The pieces that were asked for; other campaigns are another piece of the same --output."""
    if options.campaigns:
        check_campaigns(options.campaigns)
        name = "-".join(["campaigns", *(path.stem for path in options.campaigns)])
        return [("campaigns", name, campaigns)]
    pieces = [piece for piece in PIECES if piece[0] in options.stages and piece[1] in options.only]
    if not pieces:
        fail("none of --only is a piece of --stages")
    return pieces


def main() -> int:
    options = parse()
    pieces = chosen(options)
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    limits = options.steps, options.at_least
    job = Job(options.output, deadline, options.smoke, *limits, options.campaigns)
    results = {}
    for _, name, function in pieces:
        results[name] = run_piece(job, name, function)
    width = max(10, *map(len, results))
    print(f"\n{'piece':{width}s} status    seconds")
    for name, result in results.items():
        print(f"{name:{width}s} {result['status']:9s} {result['seconds']:>7}")
    return int(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    run(main)
