"""benchmark/launch: whatever is killed, and whenever, the same command completes the campaign.

Most tests launch fake_online.py, a script in miniature; two launch a real one.
"""

import contextlib
import csv
import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from argparse import Namespace
from benchmark.files import Refused
from benchmark.launch.engines import Local, Ray
from benchmark.launch.jobs import Job, read_rows
from benchmark.launch.progress import View, look

import pytest
from conftest import ROOT, SMALL, as_flags, known, no_opengl, wait_for
from fork_server import PATIENCE

SCRIPTS = 'scripts = ["fake_online"]\n'
SLOW = "--step-seconds 0.02"  # 100 steps in two seconds, a checkpoint every 10
FIELDS = "algorithm env_id seed global_step updates wall_time mode return_mean flags utd "
FIELDS += "total_timesteps python torch gymnasium mujoco device threads commit"


@pytest.fixture
def root(tmp_path):
    """A checkout with the launcher and scripts that take no time."""
    programs = tmp_path / "benchmark"
    shutil.copytree(ROOT / "benchmark" / "launch", programs / "launch")
    for path in (ROOT / "benchmark").glob("*.py"):
        shutil.copy(path, programs)
    (tmp_path / "baselines").mkdir()
    shutil.copy(ROOT / "tests" / "fake_online.py", tmp_path)
    shutil.copy(ROOT / "tests" / "fake_online.py", tmp_path / "baselines" / "other_online.py")
    return tmp_path


@pytest.fixture
def launch(root):
    """launch("--seeds", 1, ...) runs the campaign "try" with the fake script, to its end or not."""
    processes = []

    def launch(*flags, wait=True, env=None, script="fake_online"):
        command = [sys.executable, root / "benchmark" / "launch" / "launch.py", *map(str, flags)]
        if not {"--scripts", "--name"} & set(flags) and not str(flags[:1]).endswith("toml',)"):
            command += ["--name", "try", "--scripts", script, "--envs", "Ant-v4"]
        if "--seeds" not in flags and "--name" in command:
            command += ["--seeds", "1"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environ = os.environ | (env or {})
        streams |= {"cwd": root, "env": environ, "start_new_session": True}
        processes.append(subprocess.Popen(command, **streams))
        return finish(processes[-1]) if wait else processes[-1]

    yield launch
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return Namespace(status=process.returncode, out=out, err=err)


def only(paths):
    (path,) = paths
    return path


def jobs(root):
    return sorted(path for path in root.glob("runs/try/*") if path.is_dir())


def run_dir(job):
    return only(path for path in job.glob("*_online__*") if path.is_dir())


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results(root):
    """The campaign's CSV without its clock."""
    rows = read(root / "benchmark" / "results" / "campaign_try.csv")
    return [{key: value for key, value in row.items() if key != "wall_time"} for row in rows]


def attempts(job):
    """The lines of the log that an attempt begins with."""
    return [line for line in (job / "log.txt").read_text().splitlines() if "--env-id" in line]


def expected(seed=1, steps=100):
    """What an undisturbed run of fake_online.py evaluates to: (step, mode, return)."""
    rows, value = [], seed
    for step in range(1, steps + 1):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
        if step % 5 == 0:
            rows += [(step, mode, value % 1000) for mode in ("one_step", "best_of_n")]
    return rows


def evaluations(rows):
    return [(int(r["global_step"]), r["mode"], int(r["return_mean"])) for r in rows]


def running(job):
    """The process that trains: the one that the lock file names."""
    lock = job / "lock"
    found = re.match(r"process (\d+) ", lock.read_text()) if lock.exists() else None
    return int(found[1]) if found else None


def step(job):
    """The last row of the growing metrics.csv."""
    steps = [0]
    for path in job.glob("*_online__*/metrics.csv"):
        lines = path.read_text().splitlines(keepends=True)[1:]
        steps += [int(line.split(",")[0]) for line in lines if line.endswith("\n")]
    return steps[-1]


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") if sys.platform == "linux" else open(os.devnull) as stat:
            return " Z " not in stat.read()
    return False


# ---------------------------------------------------------------------------- without trouble


def test_a_campaign_and_its_table(root, launch):
    """Scripts x envs x seeds x variants; one tidy CSV; a second time nothing is left to do."""
    command = "--name", "try", "--scripts", "fake_online", "baselines/other_online"
    command += "--envs", "Ant-v4", "dm_control/cheetah-run-v0", "--seeds", "1", "2"
    command += "--variant", "plain=", "--variant", "low=--utd 0.5", "--workers", "4"
    first = launch(*command)
    assert first.status == 0, first.err
    assert "16 done, 0 running, 0 waiting, 0 failed; 100.0% of 1,600 steps" in first.out
    rows = results(root)
    assert len(rows) == 16 * 40
    assert list(read(root / "benchmark/results/campaign_try.csv")[0]) == FIELDS.split()
    found = {(r["algorithm"], r["env_id"], r["seed"], r["flags"], r["utd"]) for r in rows}
    assert len(found) == 16 and ("other_online", "Ant-v4", "2", "--utd 0.5", "0.5") in found
    for seed in 1, 2:
        of_seed = [r for r in rows if r["seed"] == str(seed)]
        assert evaluations(of_seed) == 8 * expected(seed)
    text = (root / "benchmark/results/campaign_try.csv").read_bytes()
    again = launch(*command)
    assert again.status == 0 and "done." not in again.out
    assert (root / "benchmark/results/campaign_try.csv").read_bytes() == text
    assert [len(attempts(job)) for job in jobs(root)] == [1] * 16
    assert not list(root.glob("benchmark/results/*.tmp"))


def test_dry_run_prints_the_commands_and_writes_nothing(root, launch):
    before = sorted(root.rglob("*"))
    flags = "--dry-run", "--seeds", "1", "2", "--flags=--utd 0.5", "--threads", "3"
    result = launch(*flags)
    first, second = result.out.splitlines()
    assert first.startswith(f"python {root}/fake_online.py --env-id Ant-v4 --seed 1 --utd 0.5 ")
    assert "--torch-threads 3 --runs-dir " in first and "--seed 2" in second
    assert sorted(path for path in root.rglob("*") if "__pycache__" not in str(path)) == before
    assert launch(*flags[1:]).status == 0
    assert launch(*flags).out.splitlines()[0] == "# done: fake_online Ant-v4 seed 1"


def test_the_printed_command_is_the_one_that_runs(root, launch):
    printed = launch("--dry-run").out.strip()
    assert launch().status == 0
    assert attempts(jobs(root)[0])[0].split(" ", 2)[2] == printed.removeprefix("python ")


def test_a_campaign_file_and_what_overrides_it(root, launch):
    """Flags add up, the later ones count: the file's, its script's, typed ones, the variant's."""
    (root / "mine.toml").write_text(
        """
        envs = ["Ant-v4"]
        seeds = [1, 2]
        flags = "--utd 0.1 --total-timesteps 50"
        workers-per-gpu = 0
        runs-dir = "elsewhere"
        [scripts]
        fake_online = "--utd 0.2"
        "baselines/other_online" = ""
        [variants]
        plain = ""
        more = "--utd 0.4"
        """
    )
    lines = launch("mine.toml", "--dry-run").out.splitlines()
    assert len(lines) == 8 and all("/elsewhere/mine/" in line for line in lines)
    assert "--utd 0.1 --total-timesteps 50 --utd 0.2 --utd 0.4 --torch-threads 1" in lines[1]
    changed = launch("mine.toml", "--dry-run", "--scripts", "fake_online", "--seeds", "7")
    assert [re.search(r"--seed (\d+)", line)[1] for line in changed.out.splitlines()] == ["7", "7"]
    assert "utd-0.2" in changed.out and "utd-0.4" in changed.out
    changed = launch("mine.toml", "--flags=--utd 0.3 --num-envs 2", "--variant", "x=", "--dry-run")
    assert "50 --utd 0.2 --utd 0.3 --num-envs 2 --torch" in changed.out.splitlines()[0]


def test_environments_are_tried_with_their_arguments(launch):
    """Of every variant, as its jobs will make them."""
    sized = """--variant=a=--env-kwargs '{"size": 3}'"""
    command = "--name", "try", "--scripts", "fake_online", "--envs", "Sized-v0", "--dry-run", sized
    assert "Sized-v0 needs a size" in launch(*command[:-1]).err
    assert len(launch(*command).out.splitlines()) == 1
    assert "Sized-v0 needs a size" in launch(*command, "--variant=b=--utd 2").err


def test_environments_with_pictures_are_tried_with_their_arguments():
    """No OpenGL is needed for those that draw; without its size this one is refused."""
    flags = "--image-size 48 --action-repeat 2"
    given = """ --env-kwargs '{"env_id": "Pendulum-v1", "size": 48}'"""
    for more, status in (given, 0), ("", 2):
        command = [sys.executable, ROOT / "benchmark/launch/launch.py", "--dry-run"]
        command += ["--name", "blind", "--scripts", "fpmd_pixels_online", "--seeds", "1"]
        command += ["--envs", "pixel_envs:Blind-v0", f"--flags={flags}{more}"]
        env = os.environ | {"PYTHONPATH": "tests"}  # of the folder in which it was typed
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert ended.returncode == status, ended.stderr


@pytest.mark.slow
def test_a_module_is_found_where_the_command_is_typed(tmp_path):
    """As a script alone finds it; jobs and the check before them run in other folders."""
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gym.register('Mine-v0', PendulumEnv, max_episode_steps=20)\n"
    )
    command = [sys.executable, ROOT / "benchmark/launch/launch.py", "--name", "mine"]
    command += ["--scripts", "fpmd_online", "--envs", "mine:Mine-v0", "--seeds", "1"]
    command += ["--output", tmp_path / "mine.csv"]
    command += ["--flags=--total-timesteps 30 --learning-starts 20 --batch-size 20 --no-compile"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "mine:Mine-v0" in (tmp_path / "mine.csv").read_text()


CAMPAIGNS = sorted((ROOT / "benchmark/launch/campaigns").glob("*.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CAMPAIGNS, ids=[path.stem for path in CAMPAIGNS])
def test_campaigns_of_the_repository(path, tmp_path):
    """Every script takes its flags, and nothing is missing from the grid."""
    campaign = tomllib.loads(path.read_text())
    if "pixels" in path.stem and (why_not := no_opengl()):
        pytest.skip(f"no OpenGL here: {why_not}")
    command = [sys.executable, ROOT / "benchmark/launch/launch.py", path, "--dry-run"]
    env = os.environ | {"MUJOCO_GL": "egl"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    size = len(campaign["scripts"]) * len(campaign["envs"]) * len(campaign["seeds"])
    size *= len(campaign.get("variants", {"": ""}))
    assert len(result.stdout.splitlines()) == size


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("missing.toml", "there is no campaign file missing.toml"),
        ("broken.toml", "broken.toml: Expected '='"),
        ("typo.toml", "unknown key 'seed'; known is seeds"),
        ("kind.toml", "seeds = ['1'] is not of the kind"),
        ("number.toml", "workers = True is not of the kind"),
        ("empty.toml", "needs scripts"),
        ("--scripts fake_online --envs Ant-v4 --seeds 1", "needs name"),
        ("--name a/b --scripts fake_online --envs Ant-v4 --seeds 1", "plain file name"),
        ("--name a --scripts sac --envs Ant-v4 --seeds 1", "there is no script sac; there are ba"),
        ("--seeds -1", "--seeds -1 must be 0 or more"),
        ("--seeds one", "invalid int value: 'one'"),
        ("--workers -1", "--workers -1 must be 0 or more"),
        ("--threads 0", "--threads 0 must be 1 or more"),
        ("--engine slurm", "invalid choice: 'slurm'"),
        ("--ray-address auto", "wants --engine ray"),
        ("--flags=--uttd=1", "fake_online refuses its flags: "),
        ("--flags=--utd=0", "--utd 0.0 must be above 0"),
        ("--flags='", "flags of fake_online: No closing quotation"),
        ("--flags=--seed=3", "--seed=3 is not for flags"),
        ("--flags=--runs_dir=x", "--runs_dir=x is not for flags"),
        ("--variant a= --variant b=--utd=1", "variant 'b' repeats 'a' for fake_online"),
        ("--envs NoSuch-v4 --name try --scripts fake_online", "cannot make 'NoSuch-v4'"),
        ("--workers-per-gpu 1", "finds no GPU"),
        ("--seeds 9223372036854775808", "must be at most 9223372036854775807"),
        ("--seeds 1.5", "invalid int value: '1.5'"),
        ("--seeds nan", "invalid int value: 'nan'"),
        ("--threads 1000000000", "--threads 1000000000 must be at most 1024"),
        ("--workers-per-gpu -1", "must be 0 or more"),
        ("--max-restarts -1", "must be 0 or more"),
        ("--variant a", "--variant 'a' is not NAME=FLAGS"),
        ("--variant =--utd=1", "is not NAME=FLAGS"),
        ("--variant a= --variant a=--utd=2", "--variant a is given twice"),
        ("--runs-dir @", "--runs-dir is empty"),
        ("--output @", "--output is empty"),
        ("--output baselines", "baselines is a folder"),
        ("--output typo.toml/x.csv", "typo.toml: Not a directory"),
        ("--output pipe", "pipe is no ordinary file"),
        ("--runs-dir typo.toml", "typo.toml: Not a directory"),
        ("--runs-dir /proc/x", "/proc"),
        ("--name @", "--name is empty"),
        ("--name ../x --scripts fake_online --envs Ant-v4 --seeds 1", "must be a plain file name"),
        ("--name try --scripts fake_online --envs @", "take no empty names"),
        ("--name try --scripts @ --envs Ant-v4", "take no empty names"),
        ("@", "argument campaign: is empty"),
        ("--start", "unrecognized arguments: --start"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("bytes.toml", "bytes.toml is no text"),
        ("folder.toml", "folder.toml: Is a directory"),
        ("deep.toml", "deep.toml: "),
        ("null.toml", "embedded null"),
    ],
    ids=lambda text: text[:40],
)
def test_bad_input_is_refused_before_anything_starts(root, launch, flags, message):
    """Exit status 2, one line, no job folder."""
    (root / "broken.toml").write_text("seeds")
    (root / "typo.toml").write_text("seed = [1]")
    (root / "kind.toml").write_text('seeds = ["1"]')
    (root / "number.toml").write_text("workers = true")
    (root / "empty.toml").write_text("")
    if "needs name" in message:
        flags += " --output x.csv"
    (root / "bytes.toml").write_bytes(b"seeds = [1]\xff")
    (root / "null.toml").write_text(
        'output = "a\\u0000b"\nenvs = ["Ant-v4"]\nseeds = [1]\n' + SCRIPTS
    )
    (root / "deep.toml").write_text("seeds = " + "[" * 5000)
    (root / "folder.toml").mkdir()
    os.mkfifo(root / "pipe")
    words = [word.replace("@", "") for word in flags.split()]  # @ alone: an empty word
    result = launch(*words, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.status == 2 and message in result.err
    assert result.err.count("\n") == 1 and result.err.startswith("launch.py: error: ")
    assert not (root / "runs").exists() and not result.out


def test_another_setting_is_another_job(root, launch):
    """Flags that could change a result give a folder of their own, others do not."""
    assert launch().status == 0
    assert launch("--threads", "2").status == 0 and len(jobs(root)) == 1
    assert launch("--flags=--checkpoint-every 20").status == 0 and len(jobs(root)) == 2
    assert launch("--flags=--utd 0.5").status == 0 and len(jobs(root)) == 3


def test_a_run_with_other_defaults_is_not_mixed_in(root, launch):
    """The script was changed since: what was run is not what is asked for now."""
    assert launch().status == 0
    script = root / "fake_online.py"
    script.write_text(script.read_text().replace("utd: float = 1.0", "utd: float = 2.0"))
    result = launch()
    assert result.status == 2 and "was run with --utd 1.0, not 2.0" in result.err


def test_more_steps_go_on_and_fewer_are_refused(root, launch):
    assert launch().status == 0
    assert launch("--flags=--total-timesteps 150").status == 0
    assert evaluations(results(root)) == expected(steps=150)
    assert {row["total_timesteps"] for row in results(root)} == {"150"}
    first, second = attempts(only(jobs(root)))
    assert "--resume" not in first and "--resume" in second
    result = launch()
    assert result.status == 2 and "--total-timesteps 150, which may only grow" in result.err


# ---------------------------------------------------------------------------- deaths


def test_a_job_that_dies_goes_on_from_its_checkpoint(root, launch):
    """Killed at step 35, after rows that its checkpoint at 30 does not know."""
    result = launch("--flags=--misbehave='once at 35'", "--max-restarts", "1")
    assert result.status == 0 and "died, SIGKILL; trying again (death 1)" in result.out
    assert evaluations(results(root)) == expected()
    assert "--resume" in attempts(only(jobs(root)))[1]


def test_before_its_first_checkpoint_a_job_starts_afresh(root, launch):
    result = launch("--flags=--misbehave='once at 7'")
    assert result.status == 0 and evaluations(results(root)) == expected()
    job = only(jobs(root))
    assert run_dir(job) and "--resume" not in attempts(job)[1]


def test_a_job_that_keeps_failing_is_named(root, launch):
    """Exit status 1, the log's last lines; the other jobs are completed all the same."""
    bad = "--variant", "good=", "--variant", "bad=--misbehave='always at 15'"
    result = launch(*bad, "--max-restarts", "2", "--seeds", "1", "2")
    assert result.status == 1
    assert "2 done, 0 running, 0 waiting, 2 failed" in result.out
    assert "fake_online Ant-v4 seed 1 bad keeps failing" in result.err
    assert "    the end is near\n    ValueError: no good" in result.err
    counts = {"misbehave" in job.name: len(attempts(job)) for job in jobs(root)}
    assert counts == {True: 3, False: 1}


def test_refused_input_is_not_tried_again(root, launch):
    """A script's exit status 2 means that it would refuse again."""
    assert launch("--flags=--total-timesteps 20").status == 0
    (run_dir(only(jobs(root))) / "checkpoint.pt").write_text("{}")
    script = root / "fake_online.py"
    text = script.read_text().replace(
        "    if args.resume:\n", "    if args.resume:\n        fail('no')\n"
    )
    script.write_text(text.replace('Args(**json.loads(saved)["args"])', "default"))
    result = launch("--flags=--total-timesteps 40")
    assert (
        result.status == 1
        and "exit status 2, fake_online.py: error: no; given up (death 1)" in result.out
    )
    assert "fake_online.py: error: no" in result.err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_preempted_job_goes_on(root, launch, signum):
    """Somebody else's signal is a death like any other."""
    process = launch(f"--flags={SLOW}", wait=False)
    job = wait_for(lambda: only(jobs(root)) if jobs(root) else None)
    wait_for(lambda: step(job) >= 25)
    os.kill(running(job), signum)
    result = finish(process)
    how = "exit status 143" if signum == signal.SIGTERM else "SIGKILL"
    assert result.status == 0 and f"died, {how}; trying again" in result.out
    assert evaluations(results(root)) == expected()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_launcher_saves_the_jobs(root, launch, signum):
    """They save where they are, between two checkpoints; the same command goes on from there."""
    flags = f"--flags={SLOW} --checkpoint-every 1000", "--seeds", "1", "2", "3", "--workers", "2"
    process = launch(*flags, wait=False)
    wait_for(lambda: len(jobs(root)) == 3 and min(map(step, jobs(root)[:2])) >= 15)
    if signum == signal.SIGINT:  # as a terminal does: to all that it sees, not to the jobs
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    result = finish(process)
    assert result.status == 128 + signum
    assert result.err == "launch.py: stopped; the same command goes on from here\n"
    saved = [json.loads((run_dir(job) / "checkpoint.pt").read_text()) for job in jobs(root)[:2]]
    assert all(15 <= state["step"] < 100 for state in saved) and not attempts_of(jobs(root)[2])
    assert launch(*flags).status == 0
    assert evaluations(results(root)) == expected(1) + expected(2) + expected(3)


def test_a_second_signal_waits_for_no_job(tmp_path):
    """Not even for one that ignores the first, as scripts do within the same second."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    command = [sys.executable, "-c", f"{deaf}; print('ready', flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    Local.stop(None, (process, {}), hard=False)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    Local.stop(None, (process, {}), hard=True)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    process.stdout.close()


def test_a_dataset_outside_of_the_jobs_folder_is_refused(tmp_path):
    """A link to it would lie outside as well, where somebody's file may be."""
    (tmp_path / "x.npz").write_text("mine")
    args = {"offline_steps": 200, "total_timesteps": 100, "dataset": "../x.npz"}
    job = Job(ROOT / "mvp_offline_to_online.py", "Ant-v4", 1, "", [], args, tmp_path / "job")
    with pytest.raises(Refused, match="give an absolute path"):
        job.link_dataset()
    assert (tmp_path / "x.npz").read_text() == "mine" and not job.dir.exists()


def attempts_of(job):
    return attempts(job) if (job / "log.txt").exists() else []


def test_killing_the_launcher_ends_its_jobs_and_the_next_one_goes_on(root, launch):
    """SIGKILL: the jobs are told by the kernel (Linux) and save; their lock ends with them."""
    flags = f"--flags={SLOW} --checkpoint-every 1000", "--seeds", "1", "2", "--workers", "2"
    process = launch(*flags, wait=False)
    wait_for(lambda: len(jobs(root)) == 2 and min(map(step, jobs(root))) >= 15)
    pids = [running(job) for job in jobs(root)]
    process.kill()
    process.wait()
    if sys.platform == "linux":
        wait_for(lambda: not any(map(alive, pids)))
        saved = [json.loads((run_dir(job) / "checkpoint.pt").read_text()) for job in jobs(root)]
        assert all(15 <= state["step"] < 100 for state in saved)
    result = launch(*flags)
    assert result.status == 0, result.err
    assert evaluations(results(root)) == expected(1) + expected(2)
    assert all("--resume" in attempts(job)[1] for job in jobs(root)) or sys.platform != "linux"


def test_a_script_that_outlives_its_launcher_is_waited_for(root, launch):
    """As on systems that cannot tell it: the script itself holds the lock, so none starts twice."""
    attempt = root / "benchmark" / "launch" / "attempt.py"
    attempt.write_text(attempt.read_text().replace('sys.platform == "linux"', "False"))
    process = launch(f"--flags={SLOW}", wait=False)
    job = wait_for(lambda: only(jobs(root)) if jobs(root) else None)
    wait_for(lambda: step(job) >= 15)
    process.kill()
    process.wait()
    pid = running(job)
    assert alive(pid)
    result = launch(f"--flags={SLOW}")
    assert result.status == 0 and f"held by process {pid} on " in result.out
    assert "died" not in result.out and evaluations(results(root)) == expected()


def test_two_launchers_share_the_jobs(root, launch):
    """Each job runs once, whoever gets it; both wait for all and write the same CSV."""
    flags = f"--flags={SLOW}", "--seeds", "1", "2", "3", "--workers", "2"
    both = [launch(*flags, wait=False) for _ in range(2)]
    for process in both:
        result = finish(process)
        assert result.status == 0 and "died" not in result.out, result.err
    assert evaluations(results(root)) == expected(1) + expected(2) + expected(3)
    resumed = ["--resume" in line for job in jobs(root) for line in attempts(job)[1:]]
    assert all(resumed)  # who was too late saw a finished run at most


def test_a_lost_or_torn_done_file(root, launch):
    """Without it the run is resumed and found complete; nothing is done twice."""
    assert launch().status == 0
    text = (root / "benchmark/results/campaign_try.csv").read_bytes()
    done = only(jobs(root)) / "done.json"
    for content in "", '{"run_dir": "gone", "total_timesteps": 100}':
        done.write_text(content)
        assert launch().status == 0
        assert (root / "benchmark/results/campaign_try.csv").read_bytes() == text
        assert json.loads(done.read_text())["global_step"] == 100
    assert len(attempts(only(jobs(root)))) == 3


def test_two_runs_in_one_job_are_not_chosen_between(root, launch):
    """That job fails, the others and the CSV do not."""
    assert launch("--seeds", "1", "2").status == 0
    first = run_dir(jobs(root)[0])
    shutil.copytree(first, first.with_name(f"{first.name}-copy"))
    result = launch("--seeds", "1", "2", "--flags=--total-timesteps 120")
    assert result.status == 1 and "has several runs" in result.err
    assert evaluations(results(root)) == expected(2, steps=120)


def test_exit_status_0_is_not_believed_blindly(root, launch):
    script = root / "fake_online.py"
    script.write_text(
        script.read_text().replace("while step < args.total", "while step < 50 < args.total")
    )
    result = launch("--max-restarts", "0")
    assert result.status == 1 and "exit status 0 before its last step; given up" in result.out


# ---------------------------------------------------------------------------- evaluations


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(root, launch):
    """The last step is done and saved, one of its two modes is not on record."""
    result = launch("--flags=--misbehave='stopped evaluating 100'")
    assert result.status == 0, result.err
    assert "exit status 0 before its last evaluation, best_of_n; trying again" in result.out
    assert evaluations(results(root)) == expected()
    assert "--resume" in attempts(only(jobs(root)))[1]


def test_done_is_not_believed_without_the_last_evaluation(root, launch):
    """As an older launcher has left it."""
    assert launch().status == 0
    path = run_dir(only(jobs(root))) / "evaluations.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert launch("--dry-run").out.startswith("python ")
    assert launch().status == 0
    assert evaluations(results(root)) == expected()


def test_a_script_that_never_evaluates_its_last_step_is_given_up(root, launch):
    script = root / "fake_online.py"
    text = script.read_text().replace("MODES = {", 'MODES = {"third": 0, ')
    script.write_text(text.replace("for mode in MODES", "for mode in list(MODES)[1:]"))
    result = launch("--max-restarts", "1")
    assert result.status == 1 and result.out.count("before its last evaluation, third") == 2
    assert evaluations(results(root)) == expected()


def test_without_evaluations_the_last_step_is_enough(root, launch):
    result = launch("--flags=--eval-every 0")
    assert result.status == 0 and result.out.splitlines()[-1] == "no evaluations"


def test_the_last_line_says_how_to_draw(root, launch):
    result = launch()
    path = root / "benchmark" / "results" / "campaign_try.csv"
    last = f"python benchmark/report/plot.py {path} --output campaign_try.png"
    assert result.out.splitlines()[-1] == last


def test_a_torn_run_is_left_out_with_a_line(root, launch):
    """The other jobs' evaluations are in the CSV; the status says that not all are."""
    assert launch("--seeds", "1", "2").status == 0
    (run_dir(jobs(root)[0]) / "args.json").write_text('{"seed"')
    result = launch("--seeds", "1", "2")
    assert result.status == 1 and evaluations(results(root)) == expected(2)
    assert result.err.count("\n") == 1 and "args.json is torn or no JSON" in result.err


def test_a_closed_pipe_saves_the_jobs(root, launch):
    """launch.py | head -1: no traceback, and nothing is lost."""
    process = launch(f"--flags={SLOW} --checkpoint-every 1000", wait=False)
    job = wait_for(lambda: only(jobs(root)) if jobs(root) else None)
    wait_for(lambda: step(job) >= 15)
    process.stdout.close()
    os.kill(running(job), signal.SIGKILL)  # which the launcher wants to tell
    assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stdout = process.stderr = None  # what the fixture reads
    assert launch(f"--flags={SLOW}").status == 0
    assert evaluations(results(root)) == expected()


def test_what_may_change_is_the_scripts_own_word(root, launch):
    assert launch("--flags=--utd 0.5").status == 0 and len(jobs(root)) == 1
    script = root / "fake_online.py"
    script.write_text(script.read_text().replace('MAY_CHANGE = {"resume",', 'MAY_CHANGE = {"utd",'))
    assert launch().status == 0 and len(jobs(root)) == 2
    assert launch("--flags=--utd 0.7").status == 0 and len(jobs(root)) == 2


def test_more_workers_than_jobs_are_none(root, launch):
    """A billion places would fill the memory."""
    assert launch("--workers", "1000000000", "--seeds", "1", "1").status == 0
    assert len(jobs(root)) == 1


# ---------------------------------------------------------------------------- where jobs run


def test_gpus_are_dealt_out_in_turn(root, launch):
    """Two jobs on each of two GPUs, no fifth at the same time."""
    flags = f"--flags={SLOW}", "--seeds", *"12345", "--workers-per-gpu", "2"
    assert launch(*flags, env={"CUDA_VISIBLE_DEVICES": "3,5"}).status == 0
    logs = [(job / "log.txt").read_text() for job in jobs(root)]
    gpus = [re.search(r"gpus (\d)", log)[1] for log in logs]
    assert gpus[:4] == ["3", "5", "3", "5"]
    begun = sorted(re.match(r"\S+ \S+", log)[0] for log in logs)
    assert begun[4] > begun[3]  # the fifth waits for a place, two seconds later


def test_killed_jobs_leave_no_processes(root, launch):
    """A simulator's process ends with its script, and does not hold on to the lock."""
    script = root / "fake_online.py"
    sleeper = """
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    print("child", child, flush=True)
    while step <"""
    script.write_text(script.read_text().replace("\n    while step <", sleeper))
    result = launch(f"--flags={SLOW} --misbehave='once at 35'")
    assert result.status == 0 and "held by" not in result.out
    assert evaluations(results(root)) == expected()
    children = re.findall(r"child (\d+)", (only(jobs(root)) / "log.txt").read_text())
    assert len(children) == 2
    wait_for(lambda: not any(alive(int(child)) for child in children), 10)


# ---------------------------------------------------------------------------- the live table


def test_the_table_on_a_terminal(root):
    """Redrawn in place: one line per running job, then the summary with the time that is left."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "benchmark/launch/launch.py", "--name", "try"]
    command += ["--scripts", "fake_online", "--envs", "Ant-v4", "--seeds", "1", "2"]
    command += [f"--flags={SLOW}", "--workers", "1"]
    environ = os.environ | {"COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(command, cwd=root, stdout=terminal, env=environ)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while chunk := os.read(controller, 1 << 16):
            text += chunk
    os.close(controller)
    assert process.wait() == 0
    screens = text.decode().split("\x1b[3F\x1b[J")
    assert len(screens) > 3
    found = [s for s in screens if re.search(r"seed 1 +running +[2-8]\d/100 +best_of_n \d", s)]
    assert found and "try: 0 done, 1 running, 1 waiting, 0 failed; " in found[0]
    assert "% of 200 steps; about 0 min left" in found[0]


def test_time_left(tmp_path):
    """Work left at each job's pace, or that of its like, over the jobs at a time."""
    job = [
        Job(ROOT / f"{name}.py", "Ant-v4", i, "", [], {"total_timesteps": 1000}, tmp_path)
        for i, name in enumerate(["a", "a", "b", "a"])
    ]
    for i, (state, step, pace) in enumerate(
        [("running", 500, 2.0), ("running", 900, 4.0), ("waiting", 0, None), ("done", 1000, 6.0)]
    ):
        job[i].state, job[i].last = state, {"step": step, "pace": pace, "score": ""}
    view = View("x", job)
    assert [view.left(j) for j in job] == [1000.0, 400.0, 4000.0, 0.0]
    assert "60.0% of 4,000 steps; about 1 h 7 min left" in view.summary()
    job[2].last["pace"] = 0.1
    assert "about 17 min left" in view.summary()  # no shorter than the longest job


def test_the_pace_is_that_of_learning(tmp_path):
    """1,000 steps take 1 s before learning starts and 10 s after; losses are empty before."""
    run_dir = tmp_path / "Ant-v4__a__0__now"
    run_dir.mkdir()
    lines = ["global_step,updates,wall_time,losses/critic_loss"]
    lines += [f"{1000 * i},0,{i}," for i in range(1, 6)]
    lines += [f"{1000 * i},{i},{5 + 10 * (i - 5)},0.5" for i in range(6, 9)]
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    job = Job(ROOT / "a.py", "Ant-v4", 0, "", [], {"total_timesteps": 10_000}, tmp_path)
    assert look(job) == {"step": 8000, "pace": 0.01, "score": ""}
    (run_dir / "metrics.csv").write_text("\n".join(lines[:4]) + "\n")
    assert look(job) == {"step": 3000, "pace": None, "score": ""}
    (run_dir / "metrics.csv").write_text("not,ours\n1,2\n")
    assert look(job)["step"] == 0


def test_a_job_on_a_dataset(tmp_path, monkeypatch):
    """Its steps are those of both phases; a relative path holds in its folder, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.npz").write_text("arrays")
    args = {"offline_steps": 200, "total_timesteps": 100, "dataset": "data/own.npz"}
    job = Job(ROOT / "mvp_offline_to_online.py", "Ant-v4", 1, "", [], args, tmp_path / "job")
    assert job.steps == 300
    for _ in range(2):  # a second launcher finds the first one's link
        job.link_dataset()
        assert (job.dir / "data" / "own.npz").read_text() == "arrays"
    run_dir = job.dir / "Ant-v4__mvp_offline_to_online__1__now"
    run_dir.mkdir()
    (run_dir / "checkpoint.pt").touch()
    for step, done in (299, False), (300, True):
        (run_dir / "metrics.csv").write_text(f"global_step\n100\n{step}\n")
        assert (not job.finish()) == done == job.finished()
    job.args |= {"dataset": "cube-double-play-singletask-task2-v0"}  # to download: nothing to link
    job.link_dataset()
    assert {path.name for path in job.dir.iterdir()} == {"data", "done.json", run_dir.name}


def test_rows_of_a_growing_file(tmp_path):
    """The first and the last complete row, of a file larger than what is read of it."""
    path = tmp_path / "metrics.csv"
    for text in "", "a,b", "a,b\n", "a,b\n1,":
        path.write_text(text)
        assert read_rows(path) == []
    path.write_text("a,b\n1,2\n3")
    assert read_rows(path) == [{"a": "1", "b": "2"}] * 2
    path.write_text("a,b\n" + "".join(f"{i},x\n" for i in range(9000)) + "9000,")
    assert read_rows(path) == [{"a": "0", "b": "x"}, {"a": "8999", "b": "x"}]


# ---------------------------------------------------------------------------- a real script


@pytest.mark.slow
def test_a_real_run_equals_an_undisturbed_one(tmp_path, monkeypatch):
    """The job is killed, then the launcher, each past a checkpoint; evaluations, bit for bit."""
    script = importlib.import_module("fpmd_meanflow_online")
    settings = {"total_timesteps": 2000, "eval_every": 300, "eval_episodes": 2}
    settings = known(script, SMALL) | settings | {"checkpoint_every": 400}
    monkeypatch.chdir(tmp_path)
    name = {"env_id": "Hopper-v4", "runs_dir": "straight"}
    straight = script.main(script.Args(**(settings | name)))
    del settings["torch_threads"]
    command = [sys.executable, ROOT / "benchmark" / "launch" / "launch.py", "--name", "try"]
    command += ["--seeds", "1", "--scripts", script.__name__, "--envs", "Hopper-v4"]
    command += [f"--flags={' '.join(as_flags(settings))}", "--output", "try.csv"]
    launcher = subprocess.Popen(command)
    job = wait_for(lambda: only(jobs(tmp_path)) if jobs(tmp_path) else None)
    wait_for(lambda: step(job) >= 500)
    os.kill(running(job), signal.SIGKILL)
    wait_for(lambda: len(attempts(job)) == 2 and step(job) >= 1000)
    launcher.kill()
    launcher.wait()
    before = step(job)
    assert before < 2000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert ["--resume" in line for line in attempts(job)] == [False, True, True]
    clock = {"wall_time", "charts/SPS"}
    for name in "evaluations", "metrics":
        runs = [read(path / f"{name}.csv") for path in (straight, run_dir(job))]
        rows = [[{k: v for k, v in row.items() if k not in clock} for row in run] for run in runs]
        assert rows[0] == rows[1] and len(rows[0]) >= 14
    keys = [(row["global_step"], row["mode"]) for row in read(tmp_path / "try.csv")]
    assert len(keys) == len(set(keys)) == 14


# ---------------------------------------------------------------------------- Ray


@pytest.fixture
def ray():
    return pytest.importorskip("ray", reason="Ray is not installed (benchmark/requirements.txt)")


def parent(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's worker through /proc")
def test_ray_survives_the_same_kills(root, launch, ray):
    """The script, Ray's worker process and the launcher, one after the other."""
    flags = f"--flags={SLOW} --total-timesteps 400", "--engine", "ray", "--workers", "1"
    process = launch(*flags, wait=False)
    job = wait_for(lambda: only(jobs(root)) if jobs(root) else None)
    wait_for(lambda: step(job) >= 25)
    os.kill(running(job), signal.SIGKILL)
    wait_for(lambda: len(attempts(job)) == 2 and step(job) >= 55)
    os.kill(parent(running(job)), signal.SIGKILL)
    wait_for(lambda: len(attempts(job)) == 3 and step(job) >= 95)
    script = running(job)
    process.kill()
    out, _ = process.communicate()
    assert "died, SIGKILL; trying again (death 1)" in out
    assert "died, Ray's WorkerCrashedError; trying again (death 2)" in out
    wait_for(lambda: not alive(script), 20)
    result = launch(*flags)
    assert result.status == 0, result.err
    assert all("--resume" in line for line in attempts(job)[1:])
    assert evaluations(results(root)) == expected(steps=400)


def test_stopping_the_launcher_stops_ray_jobs(root, launch, ray):
    """SIGTERM reaches the script, which saves between two checkpoints."""
    flags = f"--flags={SLOW} --checkpoint-every 1000", "--engine", "ray", "--workers", "1"
    process = launch(*flags, wait=False)
    job = wait_for(lambda: only(jobs(root)) if jobs(root) else None)
    wait_for(lambda: step(job) >= 15)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 143 and "the same command goes on from here" in result.err
    assert 15 <= json.loads((run_dir(job) / "checkpoint.pt").read_text())["step"] < 100


def test_ray_has_room_for_as_many_jobs_as_asked_for(ray):
    """A cluster of our own has workers x threads CPUs, of which a task takes its threads."""
    options = Namespace(threads=2, workers=3, workers_per_gpu=0, ray_address="")
    try:
        engine = Ray(options)
        assert engine.places() == 3 and ray.cluster_resources()["CPU"] == 6
        assert engine.attempt._default_options["num_cpus"] == 2
        for options.workers, room in (2, 2), (0, 3):  # 0: as many as fit
            engine.tasks = room - 1
            assert engine.has_room()
            engine.tasks = room
            assert not engine.has_room()
    finally:
        ray.shutdown()
