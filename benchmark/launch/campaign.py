"""What a campaign is: a file of campaigns/ under what is typed on the command line."""

import argparse
import difflib
import re
import tomllib
from benchmark import RESULTS
from benchmark.cli import Parser, text
from benchmark.files import check_folder, check_output, fail, read_text
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

LIMITS = {  # least and most; the scripts draw seeds from twice theirs, in 64 bits
    "seeds": (0, 2**63 - 1),
    "workers": (0, 10**9),
    "threads": (1, 1024),
    "workers_per_gpu": (0, 1024),
    "max_restarts": (0, 10**9),
}


@dataclass
class Campaign:
    """What is to run. A campaign file has the same keys, with hyphens, but for typed_flags."""

    name: str = ""
    scripts: dict[str, str] = field(default_factory=dict)  # with the flags of each alone
    envs: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=lambda: {"": ""})  # with the flags of each
    flags: str = ""  # of every job
    typed_flags: str = ""  # the same from the command line, which count more than a script's own
    engine: str = "local"
    ray_address: str = ""
    workers: int = 0
    threads: int = 1
    workers_per_gpu: int = 0
    max_restarts: int = 3
    runs_dir: str = "runs"
    output: str = ""

    @property
    def csv(self) -> Path:
        """Where all evaluations go."""
        return Path(self.output or RESULTS / f"campaign_{self.name}.csv")

    def check(self) -> None:
        """Refuse what no job could be made of, and places where nothing can be written."""
        for key in "name", "scripts", "envs", "seeds", "variants":
            if not getattr(self, key):
                fail(f"a campaign needs {key}: give --{key} or a campaign file that has it")
        if not re.fullmatch(r"\w[\w.-]{,99}", self.name):
            fail(f"--name {self.name[:200]} must be a plain file name of at most 100 characters")
        for name in *self.scripts, *self.envs:
            if not name.strip():
                fail("--scripts and --envs take no empty names")
        for key, (low, high) in LIMITS.items():
            value = getattr(self, key)
            for number in value if isinstance(value, list) else [value]:
                if not low <= number <= high:
                    limit = f"{low} or more" if number < low else f"at most {high}"
                    fail(f"--{key.replace('_', '-')} {number} must be {limit}")
        if self.engine not in ("local", "ray"):
            fail(f"engine {self.engine!r} is neither local nor ray")
        if self.ray_address and self.engine != "ray":
            fail("--ray-address wants --engine ray")
        if not self.runs_dir.strip():
            fail("--runs-dir is empty")
        check_output(self.csv)
        check_folder(Path(self.runs_dir, self.name))


def fits(value: Any, kind: type) -> bool:
    """Whether a value of a campaign file is of a field's type; True is no number here."""
    container = get_origin(kind)
    if container is None:
        return type(value) is kind
    if not isinstance(value, container):
        return False
    items = value.values() if container is dict else value
    return all(fits(item, get_args(kind)[-1]) for item in items)


def read_campaign(path: Path) -> dict[str, Any]:
    """A campaign file as {field of Campaign: value}, each of the right kind."""
    if not path.exists():
        fail(f"there is no campaign file {path}")
    try:
        content = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, too long a number too
        fail(f"{path}: {error}")
    kinds = {f.name.replace("_", "-"): f for f in fields(Campaign) if f.name != "typed_flags"}
    found = {"name": path.stem}
    for key, value in content.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1) or [", ".join(sorted(kinds))]
            fail(f"{path} has the unknown key {key!r}; known is {near[0]}")
        if key == "scripts" and fits(value, list[str]):  # none has flags of its own
            value = dict.fromkeys(value, "")
        if not fits(value, kinds[key].type):
            fail(f"{path}: {key} = {value!r} is not of the kind that docs/launcher.md describes")
        found[kinds[key].name] = value
    return found


def read_variants(typed: list[str]) -> dict[str, str]:
    """NAME=FLAGS as {name: flags}."""
    found = {}
    for word in typed:
        name, sign, flags = word.partition("=")
        if not sign or not re.fullmatch(r"\w[\w.-]*", name):
            fail(f"--variant {word!r} is not NAME=FLAGS")
        if name in found:
            fail(f"--variant {name} is given twice")
        found[name] = flags
    return found


def read_command_line(description: str, argv: list[str] | None = None) -> tuple[Campaign, bool]:
    """The command line on top of the campaign file on top of the defaults; and --dry-run."""
    # only what is typed overrides the file
    parser = Parser(description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("campaign", nargs="?", type=text, default=None, help="a file of benchmark/launch/campaigns")
    add("--name", help="of the job folders' parent and of the CSV (default: the file's name)")
    add("--scripts", nargs="+", metavar="SCRIPT", help="mvp_online, baselines/sac_online, ...")
    add("--envs", nargs="+", metavar="ENV_ID")
    add("--seeds", nargs="+", type=int, metavar="SEED")
    add("--flags", help="for every job, after those of the file: --flags='--utd 0.2'")
    add("--variant", action="append", metavar="NAME=FLAGS", help="one more setting to compare")
    add("--engine", choices=["local", "ray"], help="this machine (default) or a Ray cluster")
    add("--ray-address", help="of a cluster that runs already (default: one of our own)")
    add("--workers", type=int, help="jobs at a time (default: what cores, GPUs or cluster hold)")
    add("--threads", type=int, help="CPU threads per job (default: 1)")
    add("--workers-per-gpu", type=int, help="jobs that share a GPU (default: 0, no assignment)")
    add("--max-restarts", type=int, help="times a job may die before it is given up (default: 3)")
    add("--runs-dir", help="where the job folders are (default: runs)")
    add("--output", help="CSV of all evaluations (default: benchmark/results/campaign_<name>.csv)")
    add("--dry-run", action="store_true", default=False, help="print the commands, run nothing")
    typed = vars(parser.parse_args(argv))
    path, dry_run = typed.pop("campaign"), typed.pop("dry_run")
    for key, value in typed.items():
        if value == "" and key != "flags":  # an unset variable of the shell
            fail(f"--{key.replace('_', '-')} is empty")
    file = read_campaign(Path(path)) if path else {}
    if "flags" in typed:
        typed["typed_flags"] = typed.pop("flags")
    if "variant" in typed:
        typed["variants"] = read_variants(typed.pop("variant"))
    flags = file.get("scripts", {})
    names = [name.removesuffix(".py") for name in typed.get("scripts", flags)]
    typed["scripts"] = {name: flags.get(name, "") for name in names}
    campaign = Campaign(**(file | typed))
    campaign.check()
    return campaign, dry_run
