"""Runs that are stopped or killed at random instants and go on: in the end nothing is lost, nothing
is doubled, and all files are those of a run that was left alone."""

import itertools
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bad_inputs import OFFLINE, small, write_dataset
from conftest import FILES, MODES_OF, as_flags, load, wait_for
from fork_server import ForkServer, Process, Result
from test_bad_inputs import listing
from test_resume import differences, rows

pytestmark = pytest.mark.slow
NUMBERS = itertools.count()
AT_ONCE = 4
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
# evaluations, log rows and checkpoints in plenty and out of step with each other
SETTINGS = {"env_id": "odd_envs:RareStagger-v0", "total_timesteps": 300, "log_every": 20}
SETTINGS |= {"eval_every": 50, "eval_episodes": 2, "checkpoint_every": 30}
OFFLINE_SETTINGS = {"env_id": "odd_mazes:RareStagger-v0", "eval_every": 25, "checkpoint_every": 15}
OFFLINE_SETTINGS |= {"offline_steps": 80, "total_timesteps": 120}
KINDS = [  # script, in processes, how many of ten
    ("fpmd_online", False, 4),
    ("fpmd_online", True, 3),
    ("mvp_offline_to_online", False, 2),
    ("sac_online", False, 1),
]


@dataclass
class Instant:
    """When and how one run is stopped."""

    script: str
    in_processes: bool
    signum: int
    group: bool
    share: float  # of the time that an uninterrupted run takes
    seed: int

    def __str__(self) -> str:
        whom = "group" if self.group else "process"
        where = "async" if self.in_processes else "sync"
        name = signal.Signals(self.signum).name
        return f"{self.seed:2d} {self.script} {where} {name} to the {whom} at {self.share:.2f}"


def instants(signals, count: int, seed: int) -> list[Instant]:
    draw = random.Random(seed)
    kinds = [kind for *kind, share in KINDS for _ in range(share)]
    return [
        Instant(
            *kinds[number % len(kinds)],
            signum=draw.choice(signals),
            group=draw.random() < 0.5,
            share=draw.uniform(0.05, 1.05),
            seed=number,
        )
        for number in range(count)
    ]


def settings_of(name: str, in_processes: bool = False) -> dict:
    changes = OFFLINE_SETTINGS if name in OFFLINE else SETTINGS
    return small(name) | changes | ({"async_envs": True} if in_processes else {})


@dataclass
class Runner:
    """Starts and resumes runs of one kind, each in a folder of its own."""

    server: ForkServer
    root: Path
    name: str
    in_processes: bool = False
    changes: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)

    def folder(self) -> Path:
        folder = self.root / f"{self.name}-{next(NUMBERS)}"
        folder.mkdir()
        write_dataset(folder)
        return folder

    def flags(self) -> list[str]:
        return as_flags(settings_of(self.name, self.in_processes) | self.changes)

    def start(self, folder: Path) -> Process:
        return self.server.start(FILES[self.name], self.flags(), folder, self.env)

    def resume(self, folder: Path, *more: str) -> Process:
        """From the command line that a user types; TensorBoard's files are named by the second."""
        time.sleep(1.01 - time.time() % 1)
        run_dir = only(folder)
        # the file alone does not decide what is imported
        env_id = (settings_of(self.name) | self.changes)["env_id"]
        flags = ["--resume", run_dir.relative_to(folder), "--env-id", env_id, *more]
        return self.server.start(FILES[self.name], flags, folder, self.env)

    def whole(self) -> tuple[Path, float]:
        """A run that is left alone: its directory and its seconds."""
        folder = self.folder()
        process, begun = self.start(folder), time.monotonic()
        result = process.wait()
        assert result.status == 0, result.err
        return only(folder), time.monotonic() - begun


def only(folder: Path) -> Path:
    (run_dir,) = folder.glob("runs/*")
    return run_dir


def scalars(run_dir: Path) -> set[tuple]:
    """(tag, step, value) as TensorBoard shows them, without the clock's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    found = [(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]
    assert len(set(found)) == len(found) or any(x[2] != x[2] for x in found), "doubled scalars"
    return {(tag, step, repr(value)) for tag, step, value in found}


def unequal(straight: Path, resumed: Path) -> list[str]:
    """Where the files of two runs differ."""
    found = []
    for name in "metrics", "evaluations":
        if not (resumed / f"{name}.csv").exists():
            found.append(f"no {name}.csv")
            continue
        a, b = rows(straight, name), rows(resumed, name)
        if a != b:
            missing = [row[:4] for row in a if row not in b]
            more = [row[:4] for row in b if row not in a]
            found.append(f"{name}.csv lacks {missing[:2]}, has {more[:2]}")
    a, b = scalars(straight), scalars(resumed)
    if a != b:
        found.append(f"TensorBoard lacks {sorted(a - b)[:2]}, has {sorted(b - a)[:2]}")
    for name in "checkpoint.pt", "policy.pt":
        if paths := differences(load(straight, name), load(resumed, name)):
            found.append(f"{name}: {paths[:3]}")
    if left := [path.name for path in resumed.rglob("*.tmp")]:
        found.append(f"left behind: {left}")
    return found


def saved_run(folder: Path) -> bool:
    """Whether there is anything to go on from."""
    return any(folder.glob("runs/*/checkpoint.pt"))


def wrong_answer(instant: Instant, result: Result, folder: Path) -> list[str]:
    """What is wrong with how a run that was asked to stop ended."""
    status, signum = result.status, instant.signum
    if result.traceback:
        return [f"traceback: {result.err.strip().splitlines()[-1][:80]}"]
    if status is None:
        return ["hangs"]
    if status == 0:  # it had been done already; what is missing will be seen
        return []
    if not any(folder.glob("runs/*/metrics.csv")) and status in (128 + signum, -signum):
        return []  # before training began
    found = [] if status == 128 + signum else [f"status {status}"]
    said = re.findall(r"^stopped; go on with --resume (\S+)", result.err, re.MULTILINE)
    if len(said) != 1:
        found.append(f"said {result.err.strip()[-80:]!r}")
    if not saved_run(folder):
        found.append("nothing saved")
    return found


def go_through(instant: Instant, runner: Runner, whole: tuple[Path, float], log: list) -> str:
    """Stop a run at its instant, resume it to the end; what is wrong, empty if nothing.

    log gets what was interrupted after its first checkpoint and before its end.
    """
    straight, seconds = whole
    folder = runner.folder()
    process = runner.start(folder)
    time.sleep(instant.share * seconds)
    process.send(instant.signum, instant.group)
    result = process.wait()
    found = []
    if instant.signum != signal.SIGKILL:
        found += wrong_answer(instant, result, folder)
    if saved_run(folder):
        if result.status != 0:
            log.append(instant)
        result = runner.resume(folder).wait()
        if result.status != 0:
            last = result.err.strip().splitlines()[-1:]
            found.append(f"resumed: status {result.status}, {last}")
        else:
            found += unequal(straight, only(folder))
    shutil.rmtree(folder)
    return f"{instant}: {'; '.join(found)}" if found else ""


def assert_nothing_is_lost(cases: list[Instant], server: ForkServer, root: Path) -> None:
    runners = {
        key: Runner(server, root, *key) for key in {(c.script, c.in_processes) for c in cases}
    }
    wholes = {key: runner.whole() for key, runner in runners.items()}
    # some run side by side, on two cores maybe
    wholes = {key: (path, 1.3 * seconds) for key, (path, seconds) in wholes.items()}
    interrupted = []

    def one(case: Instant) -> str:
        key = case.script, case.in_processes
        return go_through(case, runners[key], wholes[key], interrupted)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [text for text in pool.map(one, cases) if text]
    if wrong:
        table = "\n".join(text[:400] for text in wrong)
        pytest.fail(f"{len(wrong)} of {len(cases)} runs went wrong\n{table}", pytrace=False)
    # or the clock was off, and nothing has been tried
    assert len(interrupted) > len(cases) / 3


def test_fifty_stops_at_random_instants(server, tmp_path):
    assert_nothing_is_lost(instants(SIGNALS, 50, seed=1), server, tmp_path)


def test_fifty_kills_at_random_instants(server, tmp_path):
    assert_nothing_is_lost(instants([signal.SIGKILL], 50, seed=2), server, tmp_path)


# ---------------------------------------------------------------------------- at known instants
def signalling(server, root, name, at: int, signum: int, group=False, in_processes=False) -> Runner:
    """A run whose environment sends the signal at its step number `at`, evaluations included."""
    env = {"ODD_STEP": str(at), "ODD_SIGNAL": str(int(signum)), "ODD_WHERE": str(root / "sent")}
    env |= {"ODD_GROUP": "yes"} if group else {}
    (root / "sent").unlink(missing_ok=True)
    module = "odd_mazes" if name in OFFLINE else "odd_envs"
    changes = {"env_id": f"{module}:Signalling-v0"}
    return Runner(server, root, name, in_processes, changes, env)


@pytest.mark.parametrize(
    ("name", "signum"),
    [
        *[("fpmd_online", signum) for signum in SIGNALS],
        ("mvp_offline_to_online", signal.SIGTERM),
        ("dpmd_online", signal.SIGHUP),
    ],
)
def test_a_stop_in_any_mode_of_the_last_evaluation(server, tmp_path, name, signum):
    """All steps are done, but not all evaluations: they are made up for."""
    offline = name in OFFLINE
    steps = settings_of(name)["total_timesteps"]
    modes = MODES_OF.get(name, ["one_step", "best_of_n"])
    quiet = {"eval_every": 10**6, "checkpoint_every": 0}
    straight = signalling(server, tmp_path, name, at=0, signum=signum)
    straight.changes |= quiet
    whole, _ = straight.whole()
    before = 2 * 20 * len(modes) if offline else 0  # offline, one at the end of that phase
    for number in range(len(modes)):
        at = steps + before + 40 * number + 20  # amid the episodes of this mode
        # one environment's trial at the start may add a few steps
        runner = signalling(server, tmp_path, name, at, signum)
        runner.changes |= quiet
        folder = runner.folder()
        result = runner.start(folder).wait()
        assert result.status == 128 + signum and not result.traceback, result.err
        assert (tmp_path / "sent").exists() and saved_run(folder)
        assert runner.resume(folder).wait().status == 0
        assert unequal(whole, only(folder)) == []


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("name", ["fpmd_online", "sac_online"])
def test_the_workers_outlive_a_signal_to_their_group(server, tmp_path, name, signum):
    """`timeout`, Slurm and a closed terminal signal all processes; the checkpoint needs them."""
    runner = signalling(server, tmp_path, name, 40, signum, group=True, in_processes=True)
    folder = runner.folder()
    result = runner.start(folder).wait()
    assert result.status == 128 + signum and not result.traceback, result.err
    assert load(only(folder))["global_step"] > 0
    assert runner.resume(folder).wait().status == 0
    plain = Runner(server, tmp_path, name, True, {"env_id": "odd_envs:Signalling-v0"})
    assert unequal(plain.whole()[0], only(folder)) == []


def test_a_stop_right_after_the_start_is_no_traceback(server, tmp_path):
    """While packages are imported and environments made."""
    endless = {"total_timesteps": 10**7, "eval_every": 0}
    runner = Runner(server, tmp_path, "fpmd_online", True, endless)
    for number in range(12):
        folder = runner.folder()
        process = runner.start(folder)
        time.sleep(0.02 * number)
        signum = SIGNALS[number % 3]
        process.send(signum, group=number % 2 == 0)
        result = process.wait()
        assert result.status in (128 + signum, -signum) and not result.traceback, result.err


def test_many_stops_of_one_run(server, tmp_path):
    """Stopped again and again, at random, until it is done."""
    runner = Runner(server, tmp_path, "fpmd_online")
    whole, seconds = runner.whole()
    folder, draw, process, stops = runner.folder(), random.Random(3), None, 0
    process = runner.start(folder)
    for _ in range(12):
        time.sleep(seconds * draw.uniform(0.2, 0.5))
        process.send(draw.choice([*SIGNALS, signal.SIGKILL]))
        status = process.wait().status
        if status == 0:
            break
        stops += 1
        if saved_run(folder):
            process = runner.resume(folder)
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)
            process = runner.start(folder)
    assert process.wait().status == 0 and stops > 1
    assert unequal(whole, only(folder)) == []


# ---------------------------------------------------------------------------- one directory
@pytest.mark.parametrize("in_processes", [False, True])
def test_a_second_process_on_a_directory_is_refused(server, tmp_path, in_processes):
    """Of a run that still trains, and of one that is being resumed; the first never notices."""
    endless = {"total_timesteps": 10**7, "eval_every": 0, "env_id": "odd_envs:Sound-v0"}
    runner = Runner(server, tmp_path, "fpmd_online", in_processes, endless)
    folder = runner.folder()
    first = runner.start(folder)
    for going_on in False, True:
        wait_for(lambda: saved_run(folder))
        # until the first has written down that it goes on
        mark = '"resume": "' if going_on else '"resume": null'
        wait_for(lambda mark=mark: mark in (only(folder) / "args.json").read_text())
        time.sleep(0.2)
        before = (only(folder) / "args.json").read_bytes()
        second = runner.resume(folder).wait()
        lines = second.err.strip().splitlines()
        assert second.status == 2 and len(lines) == 1, second.err
        assert lines[0].startswith("fpmd_online.py: error: ") and only(folder).name in lines[0]
        assert (only(folder) / "args.json").read_bytes() == before and first.poll() is None
        first.send(signal.SIGTERM)
        assert first.wait().status == 128 + signal.SIGTERM
        table = [int(row[0]) for row in rows(only(folder))[1:]]
        assert table == sorted(set(table))
        first = runner.resume(folder)
    first.send(signal.SIGKILL)
    first.wait()


def test_a_killed_run_with_processes_can_be_resumed_at_once(server, tmp_path):
    """Its workers may still be there for a while, but they hold no lock."""
    endless = {"total_timesteps": 10**7, "eval_every": 0, "env_id": "odd_envs:Sound-v0"}
    runner = Runner(server, tmp_path, "fpmd_online", True, endless)
    folder = runner.folder()
    first = runner.start(folder)
    wait_for(lambda: saved_run(folder))
    first.send(signal.SIGKILL)
    first.wait(sweep=False)
    second = runner.resume(folder)
    time.sleep(3)
    alive = second.poll() is None
    second.send(signal.SIGKILL)
    assert alive, second.wait().err
    first.wait()
    second.wait()


@pytest.mark.parametrize("in_processes", [False, True])
def test_a_simulator_that_hangs_does_not_keep_a_second_signal(server, tmp_path, in_processes):
    """The first waits for its step, as always."""
    hangs = tmp_path / "hangs"
    changes = {"env_id": "odd_envs:Hangs-v0", "eval_every": 0, "checkpoint_every": 10}
    env = {"ODD_HANGS": str(hangs)}
    runner = Runner(server, tmp_path, "fpmd_online", in_processes, changes, env)
    folder = runner.folder()
    process = runner.start(folder)
    wait_for(hangs.exists)
    process.send(signal.SIGINT)
    time.sleep(1.5)  # within a second it would count as the same wish
    assert process.poll() is None
    process.send(signal.SIGINT)
    result = process.wait()
    assert result.status is not None and not result.traceback
    assert saved_run(folder)


@pytest.mark.parametrize("name", ["fpmd_online", *OFFLINE])
def test_the_users_own_files_are_not_cut(server, tmp_path, name):
    """Tables and notes of one's own, even if they look like the run's."""
    runner = Runner(server, tmp_path, name)
    whole, _ = runner.whole()
    folder = whole.parent.parent
    mine = {"notes.csv": "day,what\nmonday,began\n", "my_metrics.csv": "global_step\n999999\n"}
    mine |= {"empty.csv": "", "torn.csv": "1,2\n3", "old.tmp": "x", "traceback.txt.old": "y"}
    for file, text in mine.items():
        (whole / file).write_text(text)
    steps = 2 * settings_of(name)["total_timesteps"]
    result = runner.resume(folder, f"--total-timesteps={steps}").wait()
    assert result.status == 0, result.err
    assert {file: (whole / file).read_text() for file in mine} == mine


@pytest.mark.parametrize("name", ["fpmd_online", *OFFLINE])
def test_resuming_a_complete_run_changes_nothing(server, tmp_path, name):
    runner = Runner(server, tmp_path, name)
    whole, _ = runner.whole()
    before = listing(whole)
    result = runner.resume(whole.parent.parent).wait()
    assert result.status == 0 and not result.traceback
    assert len((result.out + result.err).strip().splitlines()) >= 1
    assert listing(whole) == before
