"""gpu.py's third stage: as many runs at the published budget as will finish."""

import contextlib
import os
import signal
import subprocess
import time
from benchmark import scripts
from benchmark.files import read_json, write_csv
from benchmark.launch import collect
from benchmark.measure.gpu_job import Failed, Job, Mps, stop
from benchmark.measure.gpu_rates import ASYNC, NAMES, RATES

TRAIN = [  # (script, environment, seed), most telling first
    *[("fpmd_meanflow_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("sac_online", "Ant-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_meanflow_online", "HalfCheetah-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_meanflow_online", "Humanoid-v4", seed) for seed in (1, 2, 3)],
    *[("fpmd_online", "HalfCheetah-v4", seed) for seed in (1, 2, 3)],
    *[
        ("fpmd_meanflow_online", env_id, seed)
        for env_id in ("Walker2d-v4", "Hopper-v4", "Swimmer-v4")
        for seed in (1, 2, 3)
    ],
]
OWN_FLAGS = {"sac_online": ["--reward-scale=1", "--alpha-init=1", "--alpha-lr=1e-3"]}
TOGETHER = "six, MPS", "three FPMD-M, MPS", "three FPMD-M", "FPMD-M"  # of RATES, to train
EVALUATING, COMPILING = 50, 40  # seconds of a run's evaluations, until it is up to speed


def plan(job: Job, steps: int) -> tuple[list[tuple], bool]:
    """The first group of TOGETHER that finishes at its measured speed, and whether with MPS.

    Its members are the next ones of TRAIN with the group's scripts. If none finishes and there is
    an --at-least, it is the group of that size or more that comes furthest.
    """
    measured = read_json(job.output / "rates.json", ["found"])["found"]
    slowest = {}
    for group in TOGETHER:
        rates = [rate for key, rate in measured.items() if key.startswith(f"{group}: ")]
        if rates:
            slowest[group] = min(rates)
    finishing = [
        group
        for group, rate in slowest.items()
        if 1.05 * steps / rate + EVALUATING + COMPILING <= job.left
    ]
    enough = [group for group in slowest if len(RATES[group]) >= job.at_least > 0]
    if not finishing and not enough:
        return [], False
    group = finishing[0] if finishing else max(enough, key=slowest.get)
    runs = list(TRAIN)
    for script, _ in RATES[group]:
        runs.append(runs.pop(next(i for i, run in enumerate(runs) if run[0] == script)))
    return runs[-len(RATES[group]) :], "MPS" in group


def train(job: Job) -> dict:
    """Whole runs side by side; their evaluations in campaign_cuda.csv."""
    steps = 1_000 if job.smoke else job.steps
    chosen, mps = (TRAIN[:2], False) if job.smoke else plan(job, steps)
    if not chosen:
        raise Failed(f"no run of {steps:,} steps can finish in {job.left:.0f} s: none was started")
    names = [f"{NAMES[script]} {env_id} seed {seed}" for script, env_id, seed in chosen]
    sharing = ", with MPS" if mps else ""
    print(f"    in {job.left:.0f} s {steps:,} steps each{sharing}: {names}", flush=True)
    with contextlib.ExitStack() as stack:
        env = {}
        if mps:
            with contextlib.suppress(OSError, subprocess.SubprocessError):  # or they take turns
                env = stack.enter_context(Mps(job)).env
        return train_together(job, chosen, steps, env)


def train_together(job: Job, chosen: list[tuple], steps: int, env: dict) -> dict:
    """Side by side until all are done or the time is."""
    directory, processes = (job.output / "runs").resolve(), {}
    for script, env_id, seed in chosen:
        flags = [f"--env-id={env_id}", f"--seed={seed}", f"--total-timesteps={steps}"]
        flags += ["--eval-every=100000", "--checkpoint-every=0", *ASYNC]
        flags += [f"--runs-dir={directory}", f"--device={job.device}"]
        if job.smoke:
            flags = [flag for flag in flags if "tf32" not in flag]
            flags += ["--no-compile", "--num-candidates=2", "--batch-size=16", "--eval-episodes=1"]
            flags += ["--learning-starts=500", "--eval-every=500"]
        flags += OWN_FLAGS.get(script, [])
        name = f"train-{script}-{env_id}-{seed}"
        processes[name] = job.start(name, [scripts()[script], *flags], env=env)

    def running() -> list[str]:
        return [name for name, process in processes.items() if process.poll() is None]

    unfinished = []
    for margin, signum in (25, signal.SIGTERM), (8, signal.SIGKILL):  # save, or at least collect
        while running() and job.left > margin:
            time.sleep(0.5)
        unfinished = unfinished or running()
        for name in running():
            os.kill(processes[name].pid, signum)
    for name in running():
        stop(processes[name], signal.SIGKILL)
        processes[name].wait()
    failed = [
        f"{name}: exit status {process.returncode}\n{job.tail(name, 6)}"
        for name, process in processes.items()
        if process.returncode and name not in unfinished
    ]
    runs = sorted(directory.glob("*"))
    if found := collect.gather(runs):
        rows = [row for run in found.values() for row in run]
        write_csv(rows, job.output / f"campaign_{job.device}.csv")
        for run in found.values():
            row = run[-1]
            curve = [f"{float(r['return_mean']):.0f}" for r in run if r["mode"] == "one_step"]
            what = f"{row['algorithm']:22s} {row['env_id']:15s} seed {row['seed']}"
            print(f"    {what} {row['global_step']:>8s} steps {row['wall_time']:>8s} s  {curve}")
    if failed or unfinished:
        raise Failed("\n".join([*failed, *(f"{name} was stopped" for name in unfinished)]))
    return {"runs": len(chosen)}
