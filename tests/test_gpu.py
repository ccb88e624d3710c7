"""benchmark/gpu.py: what it records, what it skips, what it starts, and all of it at toy size."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from benchmark import gpu, scripts
from benchmark.files import Refused
from benchmark.measure import gpu_campaigns, gpu_rates, gpu_training
from types import SimpleNamespace

import pytest
from conftest import ROOT, wait_for
from fork_server import PATIENCE


@pytest.fixture
def job(tmp_path):
    (tmp_path / "logs").mkdir()
    return gpu.Job(tmp_path, time.monotonic() + PATIENCE, smoke=True)


def test_a_piece_that_fails_is_recorded_and_done_again(job, capsys):
    """What worked is not repeated; what failed is, and its JSON says why."""
    calls = []

    def fails(job):
        calls.append("fails")
        raise RuntimeError("no capture here")

    def works(job):
        calls.append("works")
        return {"rows": 3}

    for _ in range(2):
        gpu.run_piece(job, "bad", fails)
        gpu.run_piece(job, "good", works)
    assert calls == ["fails", "works", "fails"]
    bad, good = (json.loads((job.output / f"{name}.json").read_text()) for name in ("bad", "good"))
    assert bad["status"] == "failed" and bad["why"] == "RuntimeError: no capture here"
    assert good["status"] == "ok" and good["found"] == {"rows": 3}
    assert "no capture here" in capsys.readouterr().out


def test_what_a_piece_leaves_running_ends_with_it(job):
    """Halted processes too, also after Ctrl-C: they have sessions of their own."""
    started = []

    def piece(job):
        started.append(job.start("left", ["-c", "import time; time.sleep(60)"]))
        started[-1].send_signal(signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run_piece(job, "piece", piece)
    assert started[0].poll() == -signal.SIGKILL


def test_a_torn_record_is_no_success(job):
    for text in "", '{"status": "o', "[]", '{"found": 1}':
        (job.output / "good.json").write_text(text)
        assert gpu.run_piece(job, "good", lambda job: 3)["found"] == 3
    assert json.loads((job.output / "good.json").read_text())["status"] == "ok"


def test_a_process_that_outlasts_its_limit_is_ended_with_its_children(job):
    code = "import subprocess, sys, time\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += "print('child', child.pid, flush=True)\ntime.sleep(60)"
    process = job.start("long", ["-c", code])
    with pytest.raises(gpu.Failed, match=r"not ready after its time limit\nchild \d+"):
        job.wait("long", process, 2)
    child = int(job.tail("long").split()[-1])
    time.sleep(0.2)
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True)
    assert status.stdout.strip()[:1] in ("", "Z")


def test_an_exit_status_comes_with_the_end_of_the_output(job):
    process = job.start("wrong", ["-c", "print('almost'); raise SystemExit(3)"])
    with pytest.raises(gpu.Failed, match=r"wrong: exit status 3\nalmost"):
        job.wait("wrong", process, PATIENCE)


MEASURED = {"six, MPS: FPMD-M": 3000, "six, MPS: SAC": 2000, "three FPMD-M, MPS: FPMD-M": 4000}
MEASURED |= {"three FPMD-M: FPMD-M": 1500, "FPMD-M: FPMD-M": 5000}
ANT = [("fpmd_meanflow_online", "Ant-v4", seed) for seed in (1, 2, 3)]
SAC = [("sac_online", "Ant-v4", seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("seconds", "at_least", "runs", "mps"),
    [
        (1000, 0, ANT + SAC, True),  # the slowest of the six takes 525 s and what comes on top
        (500, 0, ANT, True),
        (310, 0, ANT[:1], False),
        (200, 0, [], False),
        (200, 3, ANT, True),  # nothing finishes, these come furthest
    ],
)
def test_only_what_can_finish_is_started(seconds, at_least, runs, mps, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({"found": MEASURED}))
    job = SimpleNamespace(output=tmp_path, left=seconds, at_least=at_least)
    assert gpu_training.plan(job, 1_000_000) == (runs, mps)


def test_without_rates_nothing_is_started(tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({"found": {}}))
    job = SimpleNamespace(output=tmp_path, left=1000, at_least=3)
    assert gpu_training.plan(job, 1_000_000) == ([], False)


def test_every_run_has_a_script_and_its_group_a_name():
    assert {script for script, _, _ in gpu_training.TRAIN} <= set(scripts())
    assert set(gpu_training.TOGETHER) <= set(gpu_rates.RATES)
    assert {script for members in gpu_rates.RATES.values() for script, _ in members} == set(
        gpu_rates.NAMES
    )


def test_outcomes_of_tests_are_on_disk_at_once(tmp_path):
    """Each with what it recorded, a failure with the end of its traceback."""
    text = "import json\ndef test_a(record_property):\n    record_property('error', 3)\n"
    text += "def test_b():\n    assert len(open('report').readlines()) == 2  # not yet this one's\n"
    (tmp_path / "test_x.py").write_text(text)
    env = os.environ | {"GPU_REPORT": "report", "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_XDIST_WORKER", None)  # this test's own
    plugin = "benchmark.measure.gpu_proofs"
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "test_x.py"]
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [(row["test"], row["outcome"]) for row in rows] == [
        ("test_a", "passed"),
        ("test_b", "failed"),
    ]
    assert rows[0]["properties"] == {"error": 3} and "assert 1 == 2" in rows[1]["why"]


@pytest.mark.slow
def test_all_of_it_at_toy_size(tmp_path):
    """What a GPU will be given runs on a CPU in a minute; started again it does nothing."""
    command = [sys.executable, ROOT / "benchmark" / "gpu.py", "--smoke", "--output", tmp_path]
    first = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert first.returncode == 0, first.stdout + first.stderr
    for name in "prove_cpu", "speed_cuda", "rates_cpu", "latency_cpu", "campaign_cpu":
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert list(csv.DictReader(file)), name
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0 and "s left" not in again.stdout


def test_campaigns_that_outlast_the_time_may_save(job, monkeypatch):
    """They are asked, asked again, and killed before the time is over."""
    ask = signal.SIGTERM
    ends = [(PATIENCE - 4, ask), (PATIENCE - 6, ask), (PATIENCE - 8, signal.SIGKILL)]
    monkeypatch.setattr(gpu_campaigns, "STOPPING", ends)
    code = """if True:
        import signal, sys, time
        asked = []
        def note(*_):
            asked.append(1)
            if len(asked) == {limit}:
                sys.exit(100 + len(asked))
        signal.signal(signal.SIGTERM, note)
        print("ready", flush=True)
        time.sleep({seconds})
    """
    patience = {"quick": (1, 0), "saves": (1, 1000), "is slow": (2, 1000), "is deaf": (9, 1000)}
    processes = {
        name: job.start(name, ["-c", code.format(limit=limit, seconds=seconds)])
        for name, (limit, seconds) in patience.items()
    }
    wait_for(lambda: all(job.tail(name) == "ready" for name in processes))
    gpu_campaigns.wait(job, list(processes.values()))
    ends = {name: process.returncode for name, process in processes.items()}
    assert ends == {"quick": 0, "saves": 101, "is slow": 102, "is deaf": -signal.SIGKILL}
    assert job.left > 0


@pytest.mark.slow
def test_campaigns_side_by_side_at_toy_size(tmp_path):
    """Each ends in a CSV of its own; one that fails is named, and the other one's CSV is there."""
    files = []
    for name, flag in ("good", "--num-candidates 4"), ("bad", "--num-candidates 0"):
        files.append(tmp_path / f"{name}.toml")
        text = "scripts = ['fpmd_plus_online']\nenvs = ['Ant-v4']\nseeds = [1, 2]\n"
        files[-1].write_text(f"{text}flags = '{flag}'\n")
    program = [sys.executable, ROOT / "benchmark" / "gpu.py", "--smoke", "--minutes", "4"]
    command = [*program, "--output", tmp_path, "--campaigns", *files]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1 and "bad: exit status 2" in ended.stdout, ended.stdout
    with (tmp_path / "good_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["seed"], row["global_step"]) for row in rows} == {("1", "200"), ("1", "400")}
    assert not (tmp_path / "bad_cpu.csv").exists()


def test_what_no_campaign_can_be_made_of_is_refused(tmp_path):
    for name in "a/x.toml", "b/x.toml":
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("seeds = [1]")
    paths = [tmp_path / "a/x.toml", tmp_path / "b/x.toml"]
    for given, message in (paths, "same name"), ([paths[0], tmp_path / "c"], "no campaign file"):
        with pytest.raises(Refused, match=message):
            gpu.check_campaigns(given)


def test_other_campaigns_are_not_done_before(tmp_path):
    """In the same --output each choice has a record of its own, apart from the stages'."""
    names = set()
    for stems in ["train"], ["mine"], ["train", "mine"]:
        paths = [tmp_path / f"{stem}.toml" for stem in stems]
        for path in paths:
            path.write_text("seeds = [1]")
        [(_, name, function)] = gpu.chosen(SimpleNamespace(campaigns=paths))
        assert function is gpu_campaigns.campaigns
        names.add(name)
    assert len(names) == 3 and not names & {name for _, name, _ in gpu.PIECES}
