"""How far the jobs are, as a table on a terminal or as lines anywhere else."""

import shutil
import sys
import time
from benchmark.launch.jobs import Job, read_rows
from contextlib import suppress

REPORT_EVERY = 60  # seconds between lines of progress where no terminal shows the table


def look(job: Job) -> dict:
    """How far a job is: steps, seconds per step of learning, its last evaluation."""
    now = {"step": 0, "pace": None, "score": ""}
    for run_dir in job.run_dirs()[-1:]:
        with suppress(KeyError, ValueError):  # no CSV of ours: the job's end will tell
            for row in read_rows(run_dir / "metrics.csv")[1:]:
                now["step"] = int(row["global_step"])
            # steps before learning cost next to nothing
            rows = read_rows(run_dir / "metrics.csv", lambda row: int(row["updates"]) > 0)
            if rows:
                steps = now["step"] - int(rows[0]["global_step"])
                seconds = float(rows[1]["wall_time"]) - float(rows[0]["wall_time"])
                now["pace"] = seconds / steps if steps > 0 else None
            for row in read_rows(run_dir / "evaluations.csv")[1:]:
                now["score"] = f"{row['mode']} {float(row['return_mean']):,.1f}"
                now["step"] = max(now["step"], int(row["global_step"]))
    return now


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class View:
    """A table redrawn in place on a terminal; lines now and then anywhere else."""

    def __init__(self, name: str, jobs: list[Job]):
        self.name, self.jobs, self.drawn, self.shown = name, jobs, 0, time.monotonic()
        self.live, self.next = sys.stdout.isatty(), 0.0

    def say(self, text: str) -> None:
        self.erase()
        print(text, flush=True)
        self.next = 0.0

    def erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
        self.drawn = 0

    def left(self, job: Job) -> float | None:
        """Seconds of work; for a job without a pace of its own, at that of others like it."""
        if job.state in ("done", "failed"):
            return 0.0
        paces = [[job.last.get("pace")]]
        paces += [[j.last.get("pace") for j in self.jobs if j.script == job.script]]
        paces += [[j.last.get("pace") for j in self.jobs]]
        known = [[pace for pace in group if pace] for group in paces]
        group = next((group for group in known if group), None)
        steps = max(0, job.steps - job.last.get("step", 0))
        return steps * sum(group) / len(group) if group else None

    def summary(self) -> str:
        states = [job.state for job in self.jobs]
        counts = [f"{states.count(s)} {s}" for s in ("done", "running", "waiting", "failed")]
        total = sum(job.steps for job in self.jobs)
        steps = sum(min(job.last.get("step", 0), job.steps) for job in self.jobs)
        left = [self.left(job) for job in self.jobs]
        eta = None
        if None not in left:
            eta = max(max(left), sum(left) / max(1, states.count("running")))
        share = f"{100 * steps / total:.1f}% of {total:,} steps"
        return f"{self.name}: {', '.join(counts)}; {share}; about {duration(eta)} left"

    def table(self) -> list[str]:
        rows = [("job", "state", "steps", "last evaluation", "deaths", "left")]
        for job in self.jobs:
            if job.state != "running" and not job.deaths and not job.not_before:
                continue  # those that wait or are done are only counted
            state = "elsewhere" if job.not_before and job.state == "waiting" else job.state
            steps = f"{job.last.get('step', 0):,}/{job.steps:,}"
            left = duration(self.left(job)) if job.state == "running" else ""
            rows.append((str(job), state, steps, job.last.get("score", ""), str(job.deaths), left))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return lines if len(rows) > 1 else []

    def draw(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        for job in self.jobs:
            if job.state != "done" or not job.last:
                job.last = look(job)
        if self.live:
            size = shutil.get_terminal_size()
            lines = [*self.table()[: size.lines - 2], self.summary()]
            self.erase()
            print("\n".join(line[: size.columns - 1] for line in lines), flush=True)
            self.drawn, self.next = len(lines), now + 1
        elif now >= self.shown:
            print(self.summary(), flush=True)
            self.shown = self.next = now + REPORT_EVERY
