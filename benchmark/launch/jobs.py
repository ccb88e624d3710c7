"""The jobs of a campaign: one run of one script each, in a folder of its own."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from benchmark import ROOT, scripts
from benchmark.files import Refused, fail, read_json, write_text
from benchmark.launch.campaign import Campaign
from benchmark.runs import flags as flags_of
from benchmark.runs import read_evaluations
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

OURS = {"env_id", "seed", "exp_name", "runs_dir", "resume", "evaluate"}  # not for --flags
WINDOW = 1 << 14  # bytes at each end of a growing CSV that are read
# What a script makes of its flags, found without training: a line of JSON per command line.
CHECK = """
import dataclasses, importlib, inspect, json, sys
asked = json.load(sys.stdin)
script = importlib.import_module(asked["script"])
settings = {}  # the last with each --env-kwargs
for argv in asked["command_lines"]:
    args = script.parse_args(argv)
    settings[args.env_kwargs] = args
    for seed in asked["seeds"]:
        script.check_args(dataclasses.replace(args, seed=seed, **asked["instead"]))
    answer = {"args": dataclasses.asdict(args), "defaults": dataclasses.asdict(script.Args())}
    answer |= {"modes": list(script.MODES), "may_change": sorted(script.MAY_CHANGE)}
    print("answer", json.dumps(answer))
# from pixels an environment depends on more of the flags
sees = "args" in inspect.signature(script.make_env).parameters
for env_id in asked["envs"]:
    for env_kwargs, args in settings.items():
        options = {"args": args} if sees else {"env_kwargs": env_kwargs}
        script.make_env(env_id, **options).close()
"""


@dataclass
class Job:
    script: Path
    env_id: str
    seed: int
    variant: str  # what the campaign calls these flags
    command: list[str]  # all but where the run is to be
    args: dict  # the same as the script understands it
    dir: Path
    modes: list[str] = field(default_factory=list)  # of evaluation
    may_change: set[str] = field(default_factory=set)  # on --resume, so not part of the setting
    state: str = "waiting"  # then running, and done or failed in the end
    deaths: int = 0
    handle: Any = None  # what the engine knows it by while it runs
    not_before: float = 0.0
    last: dict = field(default_factory=dict)  # the progress that the table shows

    def __str__(self) -> str:
        return " ".join([self.script.stem, self.env_id, f"seed {self.seed}", self.variant]).strip()

    @property
    def steps(self) -> int:
        """Of the whole run: those on a dataset, if there are any, and those in environments."""
        return self.args.get("offline_steps", 0) + self.args["total_timesteps"]

    def link_dataset(self) -> None:
        """A relative path to a dataset holds in the job's folder, too, where the script runs."""
        path = Path(self.args.get("dataset", ""))
        if path.suffix == ".npz" and not path.is_absolute():
            if ".." in path.parts:  # the link would lie outside, perhaps where a file is
                fail(f"--dataset {path} leads out of a job's folder: give an absolute path")
            link = self.dir / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())

    def run_dirs(self) -> list[Path]:
        return run_dirs(self.dir, self.script)

    def saved(self) -> list[Path]:
        """The run that can go on: one, or none yet."""
        return [path for path in self.run_dirs() if (path / "checkpoint.pt").exists()]

    def finished(self) -> bool:
        """done.json says so, for as many steps as asked for, and what it speaks of is there."""
        with suppress(Refused):
            needed = "run_dir", "total_timesteps"
            done = read_json(self.dir / "done.json", needed)
            reached = done["total_timesteps"] >= self.args["total_timesteps"]
            run_dir = self.dir / done["run_dir"]
            saved = (run_dir / "checkpoint.pt").exists()
            return reached and saved and not self.missing(run_dir)
        return False

    def finish(self) -> str:
        """After exit status 0: write done.json if all is done, else say what is missing."""
        for run_dir in self.saved():
            missing = self.missing(run_dir)
            if not missing:
                done = {"run_dir": run_dir.name, "total_timesteps": self.args["total_timesteps"]}
                done["global_step"] = int(read_rows(run_dir / "metrics.csv")[-1]["global_step"])
                write_text(self.dir / "done.json", json.dumps(done) + "\n")
            return missing
        return "its first checkpoint"

    def missing(self, run_dir: Path) -> str:
        """What of the run is not on record: its last step, or an evaluation due there."""
        rows = read_rows(run_dir / "metrics.csv")
        if not rows or not self.is_last(rows[-1]):
            return "its last step"
        if not self.args.get("eval_every"):
            return ""
        try:
            found = {row["mode"] for row in read_evaluations(run_dir) if self.is_last(row)}
        except Refused as error:
            return f"a whole evaluations.csv: {error}"
        absent = [mode for mode in self.modes if mode not in found]
        return f"its last evaluation, {' and '.join(absent)}" if absent else ""

    def is_last(self, row: dict) -> bool:
        """Whether a row is of the last step, after which no other fits in."""
        with suppress(KeyError, ValueError):
            return int(row["global_step"]) + self.args.get("num_envs", 1) > self.steps
        return False

    def log_tail(self, lines: int = 12) -> str:
        path = self.dir / "log.txt"
        log = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(f"    {line}" for line in log[-lines:])


def run_dirs(job_dir: Path, script: Path) -> list[Path]:
    return sorted(path for path in job_dir.glob(f"*__{script.stem}__*") if path.is_dir())


def read_rows(path: Path, counts: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """First and last complete row of a growing CSV, of which the ends alone are read.

    counts: what a row must be to be the first one.
    """
    with suppress(OSError), path.open("rb") as file:
        head = file.read(WINDOW).split(b"\n")
        names = head[0].decode(errors="replace").strip().split(",")
        start = max(len(head[0]) + 1, file.seek(0, os.SEEK_END) - WINDOW)
        file.seek(start)
        tail = file.read().split(b"\n")
        if start > len(head[0]) + 1:  # in the middle of a row
            tail = tail[1:]
        lines = head[1:-1] + tail[:-1]  # what follows the last newline is half a row
        cells = [line.decode(errors="replace").strip().split(",") for line in lines]
        rows = [dict(zip(names, own, strict=True)) for own in cells if len(own) == len(names)]
        first = next(filter(counts, rows), None)
        return [first, rows[-1]] if first else []
    return []


def understood(
    script: Path, command_lines: list[list[str]], envs: list[str], campaign: Campaign
) -> list[dict]:
    """Ask the script itself what it makes of each, and what all its runs have in common."""
    asked = {"script": script.stem, "command_lines": command_lines, "envs": envs}
    asked["seeds"] = campaign.seeds
    # this machine may lack the device that a cluster's have
    asked["instead"] = {"device": "cpu"} if campaign.engine == "ray" else {}
    path = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:  # jobs do not run in the current one either
        answer = subprocess.run(
            [sys.executable, "-P", "-c", CHECK],
            input=json.dumps(asked),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    if answer.returncode:
        words = re.sub(r"[─│╭╮╰╯]", " ", answer.stderr).split()  # a parser may draw a box
        fail(f"{script.stem} refuses its flags: {' '.join(words)[-600:]}")
    lines = [line for line in answer.stdout.splitlines() if line.startswith("answer {")]
    return [json.loads(line.removeprefix("answer ")) for line in lines]


@dataclass
class Setting:
    """A script with the flags of one variant of the campaign."""

    script: Path
    variant: str
    flags: list[str]


def settings(campaign: Campaign) -> list[Setting]:
    """Scripts x variants; of a flag given twice the later counts."""
    known = scripts().values()
    found = []
    for (name, own), (variant, more) in product(
        campaign.scripts.items(), campaign.variants.items()
    ):
        if (script := ROOT / f"{name}.py") not in known:
            names = ", ".join(sorted(str(path.relative_to(ROOT).with_suffix("")) for path in known))
            fail(f"there is no script {name}; there are {names}")
        try:
            flags = shlex.split(f"{campaign.flags} {own} {campaign.typed_flags} {more}")
        except ValueError as error:
            fail(f"flags of {name}: {error}")
        for flag in flags:
            key = flag.lstrip("-").partition("=")[0].replace("-", "_")
            if flag.startswith("--") and key in OURS | {"torch_threads"}:
                fail(f"{flag} is not for flags: the launcher gives each job its own (--threads)")
        threads = ["--torch-threads", str(campaign.threads)]
        found.append(Setting(script, variant, [*flags, *threads]))
    return found


def plan(campaign: Campaign) -> list[Job]:
    """All jobs, seeds outermost: a campaign that ends early has whole seeds. Nothing is written."""
    envs, seeds = list(dict.fromkeys(campaign.envs)), list(dict.fromkeys(campaign.seeds))
    cases = []  # (setting, environment, (what the script makes of the flags, its defaults))
    for script, own in groupby(settings(campaign), key=lambda setting: setting.script):
        pairs = list(product(own, envs))
        lines = [["--env-id", env_id, *setting.flags] for setting, env_id in pairs]
        # one script's look at the environments is enough: all make them alike
        answers = understood(script, lines, [] if cases else envs, campaign)
        cases += [(*pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
    jobs = [make_job(campaign, seed, *case) for seed, case in product(seeds, cases)]
    first = {}
    for job in jobs:
        refuse_other_run(job)
        key = job.script, job.env_id, job.seed, flags_of(job.args, job.script)
        other = first.setdefault(key, job)
        if other is not job:  # the CSV could not tell them apart
            fail(f"variant {job.variant!r} repeats {other.variant!r} for {job.script.stem}")
    return jobs


def make_job(campaign: Campaign, seed: int, setting: Setting, env_id: str, answer: dict) -> Job:
    """The folder's name tells every setting from any other, and says what it can of it."""
    args, default = answer["args"] | {"seed": seed}, answer["defaults"]
    script, may_change = setting.script, set(answer["may_change"])
    own = {k: v for k, v in args.items() if k not in may_change | OURS and v != default[k]}
    slug = re.sub(r"[^\w.]+", "-", flags_of(own, script)).strip("-")[:60] or "defaults"
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", f"{script.stem}__{env_id}__{seed}__{slug}-{digest}")
    folder = Path(campaign.runs_dir, campaign.name, name).absolute()
    command = [str(script), "--env-id", env_id, "--seed", str(seed), *setting.flags]
    known = args, folder, answer["modes"], may_change
    return Job(script, env_id, seed, setting.variant, command, *known)


def refuse_other_run(job: Job) -> None:
    """A stored run must be this job's beginning: other defaults, say, would mix two settings."""
    for run_dir in job.saved():
        stored = {}
        with suppress(Refused):  # torn by a kill; the checkpoint still knows
            stored = read_json(run_dir / "args.json")
        for key, value in job.args.items():
            before = stored.get(key, value)
            if before != value and key not in job.may_change | OURS:
                flag = key.replace("_", "-")
                fail(f"{run_dir} was run with --{flag} {before}, not {value}; use another --name")
        steps = stored.get("total_timesteps", 0)
        if steps > job.args["total_timesteps"]:
            fail(f"{run_dir} was started with --total-timesteps {steps}, which may only grow")
