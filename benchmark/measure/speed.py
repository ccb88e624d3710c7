"""What an update, an action and an environment step cost, and how far that is from the floor.

Everything is timed in one process on Ant-v4's sizes, with the repetitions of all measurements
interleaved, so that a drift of the machine hits them alike; medians and quartiles are written.
Every script runs eager, compiled (its own accelerate), and compiled with bfloat16 generation; on
CUDA also with TF32 products, and recorded as CUDA graphs, plain (graph) and compiled (captured):

    update          a whole update, mean over policy_delay of them; its parts one by one:
    generation      proposing N candidates per state
    ranking         choosing the best by two critics
    learning        the rest: losses, gradients, optimizers, slow copies
    acting          actions for 5 environments while training, from array to array
    one-step        an action of one network evaluation for one state, from array to array, as in
                    training's evaluations and deployed (the script's OneStepPolicy)
    sac             the same of a SAC actor of the same width: a sample, and the mean
    environments    one step of 5 Ant-v4
    first-update    the very first update, once, with empty compile caches

Floors: see speed_clock.Part. --variants adds techniques that were looked at and not kept.
--end-to-end trains instead (speed_end_to_end.py) and writes another file. Where only a part is
measured, the committed results are left alone.

    python benchmark/measure/speed.py --variants
    python benchmark/measure/speed.py --only update generation --modes eager compiled --settings 8,1
    python benchmark/measure/speed.py --device cuda
    python benchmark/measure/speed.py --end-to-end --threads 1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, as_argument, output, run, whole
from benchmark.files import fail, write_csv
from benchmark.measure.measuring import (
    add_machine_flags,
    default_output,
    provenance,
    use_machine,
)
from benchmark.measure.speed_cases import (
    CUDA_MODES,
    FLOWS,
    MODES,
    PER_CASE,
    SETTINGS,
    count,
    first_update,
    functions,
    make_case,
    parts,
)
from benchmark.measure.speed_clock import Measurement, row_of, time_all, to_rows
from benchmark.measure.speed_comparisons import environment_step, machine, sac_actions, variants
from benchmark.measure.speed_end_to_end import END_TO_END, end_to_end

import torch

MEASUREMENTS = *PER_CASE, "one-step", "sac", "environments", "first-update"


def collect(options: argparse.Namespace, device: torch.device) -> list[Measurement]:
    """Everything to be timed; first updates are timed at once, while nothing is compiled yet."""
    timed, rows, only = [], set(), options.only
    for script in options.scripts:
        for setting in options.settings or SETTINGS[script]:
            sizes = script, setting
            case = make_case(*sizes, "eager", options.batch_size, device)
            counted = {name: count(*entry) for name, entry in functions(case).items()}
            rows.add(getattr(case.args, "num_candidates", 1) * options.batch_size)
            for mode in options.modes:
                if mode.endswith("bfloat16") and script not in FLOWS:
                    continue
                case = make_case(*sizes, mode, options.batch_size, device)
                if "first-update" in only:
                    print(f"first update of {script} {setting} {mode}", file=sys.stderr)
                    timed.append(first_update(case))
                floors = parts(case, counted)
                for name, entry in functions(case).items():
                    if name in only and name in PER_CASE:
                        extra = counted[name], floors.get(name, ())
                        timed.append(Measurement(case.row(name), *entry, *extra))
                if options.variants and script == "fpmd_online":
                    timed += variants(case, mode)
        case = make_case(script, SETTINGS[script][-1], "eager", options.batch_size, device)
        if "one-step" in only and script in FLOWS:
            for name in "one-step", "one-step deployed":
                entry = functions(case)[name]
                timed.append(Measurement(row_of(script, measurement=name), *entry, count(*entry)))
    if "sac" in only:
        case = make_case("fpmd_online", (1, 1), "eager", options.batch_size, device)  # its width
        for name, function in sac_actions(case).items():
            what = row_of("sac", measurement=name)
            timed.append(Measurement(what, function, 1, count(function, 1)))
    if "environments" in only:
        what = row_of(measurement="environments")
        timed.append(Measurement(what, environment_step(case.module)))
    return machine(rows, device) + timed


def parse_setting(text: str) -> tuple[int, int]:
    """N,T as two numbers."""
    parts = text.split(",")
    if len(parts) != 2:
        fail(f"{text[:60]!r} is not N,T")
    num_candidates, flow_steps = map(whole(1, 4096), parts)
    return num_candidates, flow_steps


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    several = {"nargs": "+", "metavar": "NAME"}
    add_machine_flags(parser)
    scripts = list(SETTINGS)
    parser.add_argument("--scripts", **several, choices=scripts, default=FLOWS, help="which")
    text = "N,T of every script; unset: those of SETTINGS"
    setting = as_argument(parse_setting)
    parser.add_argument("--settings", nargs="+", type=setting, metavar="N,T", help=text)
    text = f"of {', '.join(MODES)}, on CUDA also {', '.join(CUDA_MODES)}"
    modes = MODES | CUDA_MODES
    parser.add_argument("--modes", **several, choices=modes, default=list(MODES), help=text)
    text = f"of {', '.join(MEASUREMENTS)}"
    parser.add_argument("--only", **several, choices=MEASUREMENTS, default=MEASUREMENTS, help=text)
    parser.add_argument("--variants", action="store_true", help="generation in other ways, too")
    text = "transitions per update"
    parser.add_argument("--batch-size", type=whole(1, 2**16), default=256, help=text)
    text = "of every measurement (15), of every training run (3)"
    parser.add_argument("--repetitions", type=whole(1, 10**6), help=text)
    text = "once warm, say so and wait for a line on stdin: others may time alone meanwhile"
    parser.add_argument("--hold", action="store_true", help=text)
    parser.add_argument("--end-to-end", action="store_true", help="time training runs instead")
    least = END_TO_END["learning_starts"] + 2 * END_TO_END["log_every"]
    text = f"of a training run, {END_TO_END['learning_starts']} of them random"
    parser.add_argument("--steps", type=whole(least, 10**9), default=4_000, help=text)
    text = (
        "CSV to write, as a whole; unset: benchmark/results/<speed or end_to_end>_<device>.csv, "
        "but a temporary file if only a part is measured"
    )
    parser.add_argument("--output", type=output(), help=text)
    options = parser.parse_args()
    if options.output is None:
        partly = ["scripts", "settings", "modes", "only", "batch_size", "repetitions", "steps"]
        kind = "end_to_end" if options.end_to_end else "speed"
        options.output = default_output(parser, options, kind, partly)
    options.repetitions = options.repetitions or (3 if options.end_to_end else 15)
    return options


def main() -> None:
    options = parse()
    device = use_machine(options)
    if options.end_to_end:
        rows = end_to_end(options)
    else:
        timed = collect(options, device)
        time_all(timed, options.repetitions, device, options.hold)
        rows = to_rows(timed, options.batch_size, device)
    rows = [row | provenance(device) for row in rows]
    write_csv(rows, options.output)
    print(f"wrote {options.output}; benchmark/report/report.py makes the tables")


if __name__ == "__main__":
    run(main)
