"""Run a campaign, environments x scripts x seeds x flags, on this machine or on a Ray cluster.

    python benchmark/launch/launch.py benchmark/launch/campaigns/cpu.toml
    python benchmark/launch/launch.py --name first-try --scripts mvp_online --envs Hopper-v4 \\
        --seeds 1 2 --flags="--total-timesteps 20000"

The same command again goes on where the last one ended, however that was: finished jobs are
skipped, the others resume from their checkpoints. A job is one run of one script. It has a folder
of its own, <runs-dir>/<name>/<job>/, with the script's run directory, log.txt, lock and, once it
has finished, done.json. The evaluations of all jobs become benchmark/results/campaign_<name>.csv.

Exit status: 0 all finished, 1 a job keeps failing, 2 bad input, 130 or 143 stopped by a signal.
"""

import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import cli
from benchmark.files import Refused, write_csv
from benchmark.launch import attempt, collect
from benchmark.launch.attempt import HELD
from benchmark.launch.campaign import Campaign, read_command_line
from benchmark.launch.engines import Local, Ray
from benchmark.launch.jobs import Job, plan
from benchmark.launch.progress import View, look

ASK_AGAIN = 3  # seconds until the next attempt at it


def gather(jobs: list[Job], output: Path) -> list[str]:
    """All evaluations so far in one CSV; returns what is wrong with runs that are left out.

    It takes runs with a checkpoint, as others may be removed. A job with several runs is left
    out: it is refused when it starts.
    """
    rows, wrong = [], []
    for job in jobs:
        saved = job.saved()
        if len(saved) != 1 or not (saved[0] / "evaluations.csv").exists():
            continue
        try:
            rows += [(key, own) for key, own in collect.gather(saved).items()]
        except Refused as error:
            wrong.append(str(error))
    if rows:
        write_csv([row for _, own in sorted(rows, key=lambda run: run[0]) for row in own], output)
    return wrong


def settle(job: Job, status: int | str, stopping: bool, max_restarts: int, view: View) -> None:
    """Decide what becomes of a job whose attempt has ended."""
    job.handle, job.state = None, "waiting"
    if status == HELD:
        if not job.not_before:
            holder = (job.dir / "lock").read_text(errors="replace")
            view.say(f"{job}: held by {holder}; waiting for it")
        job.not_before = time.monotonic() + ASK_AGAIN
        return
    job.not_before = 0.0
    missing = job.finish() if status == 0 else ""
    if status == 0 and not missing:
        job.state, job.last = "done", look(job)
        view.say(f"{job}: done. {job.last['score']}")
    elif not stopping:
        job.deaths += 1
        if status == 2 or job.deaths > max_restarts:  # 2: it refuses its input, and will again
            job.state = "failed"
        next_step = "given up" if job.state == "failed" else "trying again"
        how = death(job, status, missing)
        view.say(f"{job}: died, {how}; {next_step} (death {job.deaths})")


def death(job: Job, status: int | str, missing: str) -> str:
    """What ended an attempt: a signal, Ray, an exit status, and what the script said of that."""
    if isinstance(status, str):
        return status
    if status < 0:
        return signal.Signals(-status).name
    if status == 0:
        return f"exit status 0 before {missing}"
    if status == 2:
        return f"exit status 2, {job.log_tail(1).strip()}"
    return f"exit status {status}"


def run(jobs: list[Job], campaign: Campaign) -> int:
    """Keep the engine busy until every job is done or given up; returns the exit status."""
    view, stop = View(campaign.name, jobs), []
    for job in jobs:
        job.state = "done" if job.finished() else "waiting"
    # more places than jobs are none; a billion of them would fill the memory
    campaign = replace(campaign, workers=min(campaign.workers, len(jobs)))
    engine = None
    if any(job.state == "waiting" for job in jobs):
        engine = {"local": Local, "ray": Ray}[campaign.engine](campaign)
    for job in jobs:
        job.dir.mkdir(parents=True, exist_ok=True)
        job.link_dataset()
    for signum in signal.SIGINT, signal.SIGTERM:  # after Ray, which sets a handler of its own
        signal.signal(signum, lambda s, _: stop.append(s))
    try:
        work_off(jobs, campaign, engine, view, stop)
    except BaseException:  # a full disk, a closed pipe: the jobs save all the same
        for job in jobs:
            if job.state == "running":
                engine.stop(job.handle, False)
        raise
    return conclude(jobs, campaign, view, stop)


def work_off(jobs: list[Job], campaign: Campaign, engine, view: View, stop: list[int]) -> None:
    """Start, watch and settle jobs until none is left, or after a stop none runs."""
    told = 0
    while True:
        for job in [job for job in jobs if job.state == "running"]:
            if (status := engine.poll(job.handle)) is not None:
                settle(job, status, bool(stop), campaign.max_restarts, view)
                with suppress(OSError):  # the last one is what counts
                    gather(jobs, campaign.csv)
        if len(stop) > told:
            told = len(stop)
            view.say("stopping; the jobs save first" if told == 1 else "stopping at once")
            for job in jobs:
                if job.state == "running":
                    engine.stop(job.handle, told > 1)
        now = time.monotonic()
        for job in [job for job in jobs if job.state == "waiting" and job.not_before <= now]:
            if job.not_before and job.finished():  # elsewhere
                job.state = "done"
            elif not stop and engine.has_room():
                job.handle, job.state = engine.start(job), "running"
        states = {job.state for job in jobs}
        if "running" not in states and (stop or "waiting" not in states):
            return
        view.draw()
        time.sleep(0.1)


def conclude(jobs: list[Job], campaign: Campaign, view: View, stop: list[int]) -> int:
    """Write the CSV, say what has failed and where the rest is; returns the exit status."""
    wrong = gather(jobs, campaign.csv)
    view.next = view.shown = 0.0
    view.draw()
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"{job} keeps failing; the end of {job.dir}/log.txt:", file=sys.stderr)
        print(job.log_tail(), file=sys.stderr)
    for problem in wrong:
        cli.say(f"not in the CSV: {problem}")
    if stop:
        cli.say("stopped; the same command goes on from here")
        return 128 + stop[0]
    if campaign.csv.exists():
        path = shlex.quote(str(campaign.csv))
        picture = shlex.quote(str(campaign.csv.with_suffix(".png").name))
        print(f"evaluations in {path}; to see them:")
        print(f"python benchmark/report/plot.py {path} --output {picture}")
    else:
        print("no evaluations")
    return int(bool(failed or wrong))


def make_search_path_absolute(campaign: Campaign) -> None:
    """Jobs run in folders of their own: what is found from here must be found there.

    That is PYTHONPATH=tests, and a module of one's own in this folder, as a script alone finds it.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(":" in env_id for env_id in campaign.envs):
        entries.append(os.getcwd())
    if found := [os.path.abspath(entry) for entry in entries if entry]:
        os.environ["PYTHONPATH"] = os.pathsep.join(found)


def main() -> int:
    if sys.argv[1:2] == ["--start"] and "".join(sys.argv[2:3]).isdecimal():  # by attempt.spawn
        attempt.start(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    campaign, dry_run = read_command_line(__doc__)
    make_search_path_absolute(campaign)
    jobs = plan(campaign)
    if not dry_run:
        return run(jobs, campaign)
    for job in jobs:
        where = ["--resume", str(job.saved()[0])] if job.saved() else ["--runs-dir", str(job.dir)]
        command = shlex.join(["python", *job.command, *where])
        print(f"# done: {job}" if job.finished() else command)
    return 0


if __name__ == "__main__":
    cli.run(main)
