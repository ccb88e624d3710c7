"""The jobs of a campaign: one run of one script each, in a folder of its own."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmark import ROOT, scripts
from benchmark.launch import collect
from benchmark.launch.campaign import Campaign, fail

# what a script lets change on --resume, so that it is no part of what tells one job from another
MAY_CHANGE = {"total_timesteps", "log_every", "capture_video", "torch_threads", "track"}
MAY_CHANGE |= {"wandb_project_name", "wandb_entity"}
OURS = {"env_id", "seed", "exp_name", "runs_dir", "resume", "evaluate"}  # not for --flags
# What a script makes of its flags, found without training: a line of JSON per command line.
CHECK = """
import dataclasses, importlib, json, sys
asked = json.load(sys.stdin)
script = importlib.import_module(asked["script"])
for argv in asked["command_lines"]:
    args = script.parse_args(argv)
    script.check_args(dataclasses.replace(args, **asked["instead"]))
    print(json.dumps([dataclasses.asdict(args), dataclasses.asdict(script.Args())]))
for env_id in asked["envs"]:
    script.make_env(env_id).close()
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
    state: str = "waiting"  # then running, and done or failed in the end
    deaths: int = 0
    handle: Any = None  # what the engine knows it by while it runs
    not_before: float = 0.0
    last: dict = field(default_factory=dict)  # the progress that the table shows

    def __str__(self) -> str:
        return " ".join([self.script.stem, self.env_id, f"seed {self.seed}", self.variant]).strip()

    def run_dirs(self) -> list[Path]:
        return run_dirs(self.dir, self.script)

    def saved(self) -> list[Path]:
        """The run that can go on: one, or none yet."""
        return [path for path in self.run_dirs() if (path / "checkpoint.pt").exists()]

    def finished(self) -> bool:
        """done.json says so, for as many steps as asked for, and what it speaks of is there."""
        with suppress(OSError, ValueError, KeyError):
            done = json.loads((self.dir / "done.json").read_text())
            reached = done["total_timesteps"] >= self.args["total_timesteps"]
            return reached and (self.dir / done["run_dir"] / "checkpoint.pt").exists()
        return False

    def finish(self) -> bool:
        """After exit status 0: write done.json if the log of the run agrees that all is done."""
        for run_dir in self.saved():
            rows = read_rows(run_dir / "metrics.csv")
            step = int(rows[-1]["global_step"]) if rows else 0
            if step + self.args["num_envs"] <= self.args["total_timesteps"]:
                return False
            done = {"run_dir": run_dir.name, "total_timesteps": self.args["total_timesteps"]}
            (self.dir / "done.tmp").write_text(json.dumps(done | {"global_step": step}) + "\n")
            (self.dir / "done.tmp").replace(self.dir / "done.json")
            return True
        return False

    def log_tail(self, lines: int = 12) -> str:
        path = self.dir / "log.txt"
        log = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(f"    {line}" for line in log[-lines:])


def run_dirs(job_dir: Path, script: Path) -> list[Path]:
    return sorted(path for path in job_dir.glob(f"*__{script.stem}__*") if path.is_dir())


def read_rows(path: Path) -> list[dict]:
    """First and last complete row of a growing CSV, of which the ends alone are read."""
    with suppress(OSError), path.open("rb") as file:
        head, sep, rest = file.read(1 << 14).partition(b"\n")
        first = rest.partition(b"\n")[0] if b"\n" in rest else b""
        file.seek(max(len(head) + len(sep), file.seek(0, os.SEEK_END) - (1 << 14)))
        tail = file.read().split(b"\n")[:-1]  # what follows the last newline is half a row
        names = head.decode().split(",")
        rows = [dict(zip(names, row.decode().split(","), strict=False)) for row in [first, *tail]]
        return [rows[0], rows[-1]] if tail else []
    return []


def understood(script: Path, command_lines: list[list[str]], envs: list[str], engine: str) -> list:
    """Ask the script itself what it makes of each: its arguments and its defaults."""
    asked = {"script": script.stem, "command_lines": command_lines, "envs": envs}
    # this machine may lack the device that a cluster's have
    asked["instead"] = {"device": "cpu"} if engine == "ray" else {}
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
    lines = [line for line in answer.stdout.splitlines() if line.startswith("[{")]
    return [json.loads(line) for line in lines]


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
        answers = understood(script, lines, [] if cases else envs, campaign.engine)
        cases += [(*pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
    jobs = [make_job(campaign, seed, *case) for seed, case in product(seeds, cases)]
    first = {}
    for job in jobs:
        refuse_other_run(job)
        key = job.script, job.env_id, job.seed, collect.flags(job.args, job.script)
        other = first.setdefault(key, job)
        if other is not job:  # the CSV could not tell them apart
            fail(f"variant {job.variant!r} repeats {other.variant!r} for {job.script.stem}")
    return jobs


def make_job(
    campaign: Campaign, seed: int, setting: Setting, env_id: str, answer: list[dict]
) -> Job:
    """The folder's name tells every setting from any other, and says what it can of it."""
    args, default = answer
    args, script = args | {"seed": seed}, setting.script
    own = {k: v for k, v in args.items() if k not in MAY_CHANGE | OURS and v != default[k]}
    slug = re.sub(r"[^\w.]+", "-", collect.flags(args, script)).strip("-")[:60] or "defaults"
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", f"{script.stem}__{env_id}__{seed}__{slug}-{digest}")
    folder = Path(campaign.runs_dir, campaign.name, name).absolute()
    command = [str(script), "--env-id", env_id, "--seed", str(seed), *setting.flags]
    return Job(script, env_id, seed, setting.variant, command, args, folder)


def refuse_other_run(job: Job) -> None:
    """A stored run must be this job's beginning: other defaults, say, would mix two settings."""
    for run_dir in job.saved():
        stored = {}
        with suppress(OSError, ValueError):  # torn by a kill; the checkpoint still knows
            stored = json.loads((run_dir / "args.json").read_text())
        for key, value in job.args.items():
            before = stored.get(key, value)
            if before != value and key not in MAY_CHANGE | OURS:
                flag = key.replace("_", "-")
                fail(f"{run_dir} was run with --{flag} {before}, not {value}; use another --name")
        if stored.get("total_timesteps", 0) > job.args["total_timesteps"]:
            steps = stored["total_timesteps"]
            fail(f"{run_dir} was started with --total-timesteps {steps}, which may only grow")
