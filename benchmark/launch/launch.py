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

import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import write_csv
from benchmark.launch import attempt, collect
from benchmark.launch.attempt import HELD
from benchmark.launch.campaign import Campaign, read_command_line
from benchmark.launch.engines import Local, Ray
from benchmark.launch.jobs import Job, plan
from benchmark.launch.progress import View, look

ASK_AGAIN = 3  # seconds until the next attempt at it


def gather(jobs: list[Job], output: Path) -> None:
    """All evaluations so far in one CSV; of runs with a checkpoint, as others may be removed.

    A job with several runs is left out: it is refused when it starts.
    """
    run_dirs = [run_dir for job in jobs for run_dir in job.saved() if len(job.saved()) == 1]
    run_dirs = [path for path in run_dirs if (path / "evaluations.csv").exists()]
    if runs := collect.gather(run_dirs):
        write_csv([row for run in runs.values() for row in run], output)


def settle(job: Job, status: int | str, stopping: bool, max_restarts: int, view: View) -> None:
    """Decide what becomes of a job whose attempt has ended."""
    job.handle, job.state = None, "waiting"
    if status == HELD:
        if not job.not_before:
            view.say(f"{job}: held by {(job.dir / 'lock').read_text()}; waiting for it")
        job.not_before = time.monotonic() + ASK_AGAIN
        return
    job.not_before = 0.0
    if status == 0 and job.finish():
        job.state, job.last = "done", look(job)
        view.say(f"{job}: done. {job.last['score']}")
    elif not stopping:
        how = f"exit status {status}" if type(status) is int and status >= 0 else status
        how = signal.Signals(-status).name if type(status) is int and status < 0 else how
        how += " before its last step" if status == 0 else ""
        job.deaths += 1
        if status == 2 or job.deaths > max_restarts:  # 2: it refuses its input, and will again
            job.state = "failed"
        next_step = "given up" if job.state == "failed" else "trying again"
        view.say(f"{job}: died, {how}; {next_step} (death {job.deaths})")


def run(jobs: list[Job], campaign: Campaign) -> int:
    """Keep the engine busy until every job is done or given up; returns the exit status."""
    view, stop, told = View(campaign.name, jobs), [], 0
    for job in jobs:
        job.state = "done" if job.finished() else "waiting"
    if any(job.state == "waiting" for job in jobs):
        engine = {"local": Local, "ray": Ray}[campaign.engine](campaign)
    for job in jobs:
        job.dir.mkdir(parents=True, exist_ok=True)
    for signum in signal.SIGINT, signal.SIGTERM:  # after Ray, which sets a handler of its own
        signal.signal(signum, lambda s, _: stop.append(s))
    while True:
        for job in [job for job in jobs if job.state == "running"]:
            if (status := engine.poll(job.handle)) is not None:
                settle(job, status, bool(stop), campaign.max_restarts, view)
                with suppress(OSError, ValueError, KeyError):  # a script may be writing just now
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
            break
        view.draw()
        time.sleep(0.1)
    gather(jobs, campaign.csv)
    view.next = view.shown = 0.0
    view.draw()
    for job in jobs:
        if job.state == "failed":
            print(f"{job} keeps failing; the end of {job.dir}/log.txt:", file=sys.stderr)
            print(job.log_tail(), file=sys.stderr)
    if stop:
        print("launch.py: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stop[0]
    print(f"evaluations in {campaign.csv}")
    return int("failed" in states)


def main() -> int:
    campaign, dry_run = read_command_line(__doc__)
    jobs = plan(campaign)
    if not dry_run:
        return run(jobs, campaign)
    for job in jobs:
        where = ["--resume", str(job.saved()[0])] if job.saved() else ["--runs-dir", str(job.dir)]
        command = shlex.join(["python", *job.command, *where])
        print(f"# done: {job}" if job.finished() else command)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        attempt.start(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the scripts are asked about their flags
        sys.exit(130)
