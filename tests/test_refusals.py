"""Every program of benchmark/: bad input is one line and status 2, and nothing half written."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from benchmark import cli

import pytest
from conftest import ROOT
from fork_server import PATIENCE

TABLE = "algorithm,env_id,seed,global_step,updates,wall_time,mode,return_mean,success_rate,flags,"
TABLE += "utd,total_timesteps,python,torch,gymnasium,mujoco,device,threads,commit\n"
ROW = "mvp_online,Ant-v4,1,1000,200,60.0,one_step,5.0,,,1.0,1000,3,2,1,3,a CPU,1,0123456\n"
RUN = "global_step,updates,wall_time,mode,nfe,num_candidates,return_mean,return_std,success_rate,"
RUN += "returns\n1000,200,60.0,one_step,1,1,5.0,1.0,,4.0 6.0\n"
METRICS = "global_step,updates,wall_time,losses/critic_loss\n1000,0,60.0,\n2000,200,70.0,0.5\n"
ARGS = {"env_id": "Ant-v4", "exp_name": "mvp_online", "seed": 1, "total_timesteps": 1000}
ARGS |= {"utd": 1.0, "eval_every": 1000, "log_every": 1000, "eval_episodes": 2}


def make_run(path, args=None, evaluations=RUN, metrics=METRICS):
    path.mkdir(parents=True)
    text = json.dumps(ARGS) if args is None else args
    (path / "args.json").write_text(text)
    versions = dict.fromkeys(("python", "torch", "gymnasium", "mujoco", "device", "commit"), "x")
    (path / "versions.json").write_text(json.dumps(versions | {"threads": 1}))
    (path / "evaluations.csv").write_text(evaluations)
    (path / "metrics.csv").write_text(metrics)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs of every kind of wrong, among good ones."""
    here = tmp_path_factory.mktemp("inputs")
    (here / "empty").mkdir()
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_bytes(b"\xff\xd8\x00")
    (here / "file").write_text("")
    (here / "binary.csv").write_bytes(bytes(range(256)))
    (here / "empty.csv").write_text("")
    (here / "head.csv").write_text(TABLE)
    (here / "lacks.csv").write_text("global_step,return_mean\n1,2\n")
    (here / "nan.csv").write_text(TABLE + ROW.replace("5.0", "nan"))
    (here / "words.csv").write_text(TABLE + ROW.replace(",1000,", ",many,", 1))
    (here / "short.csv").write_text(TABLE + ROW[:40] + "\n")
    (here / "twice.csv").write_text(TABLE + ROW + ROW)
    (here / "good.csv").write_text(TABLE + ROW)
    (here / "folder.csv").mkdir()
    os.mkfifo(here / "pipe")
    (here / "torn.toml").write_text("seeds = [1")
    make_run(here / "good")
    make_run(here / "again")
    make_run(here / "torn", json.dumps(ARGS)[:30])
    make_run(here / "list", "[1]")
    make_run(here / "lacking", json.dumps({"seed": 1}))
    make_run(here / "kinds", json.dumps(ARGS | {"seed": "one"}))
    make_run(here / "foreign", json.dumps(ARGS | {"exp_name": "nobody"}))
    make_run(here / "doubled", evaluations=RUN + RUN.splitlines()[1] + "\n")
    make_run(here / "garbled", evaluations=RUN.replace("5.0", "five"))
    make_run(here / "headless", evaluations="a,b\n1,2\n", metrics="a,b\n1,2\n")
    make_run(here / "short", json.dumps(ARGS | {"eval_every": 0}))
    make_run(here / "sac", json.dumps(ARGS | {"exp_name": "sac_online"}))
    return here


def call(program, *arguments, cwd=None, env=None, **how):
    command = [sys.executable, ROOT / "benchmark" / program, *arguments]
    how = {"capture_output": True, "text": True, "timeout": PATIENCE} | how
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    return subprocess.run(command, cwd=cwd, env=environ, **how)


def inside(program, words, folder):
    """What call returns, from within this process: a start of Python takes a second."""
    module = importlib.import_module(f"benchmark.{program.removesuffix('.py').replace('/', '.')}")
    said, handlers = io.StringIO(), [(s, signal.getsignal(s)) for s in (15, 1)]
    argv, sys.argv = sys.argv, [program, *words]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stderr(said):
            cli.run(module.main)
    except SystemExit as end:
        return subprocess.CompletedProcess(program, end.code, "", said.getvalue())
    finally:
        sys.argv = argv
        for signum, handler in handlers:
            signal.signal(signum, handler)


def refused(program, words, folder, how=inside):
    """One line on stderr that names the program, status 2, and no file more than before."""
    before = sorted(folder.rglob("*"))
    result = how(program, words, folder)
    name = program.split("/")[-1]
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"{name}: error: ") and len(result.stderr) < 700
    assert sorted(folder.rglob("*")) == before
    return result.stderr


PROGRAMS = {
    "launch/collect.py": ["torn", "--output", "out.csv"],
    "launch/launch.py": ["torn.toml"],
    "report/plot.py": ["torn", "--output", "out.png"],
    "report/report.py": ["--nonsense"],
    "measure/evaluation_cost.py": ["torn", "--output", "out.csv"],
    "measure/make_dataset.py": ["pointmaze-medium", "--output", "out.npz", "--steps", "0"],
    "gpu.py": ["--output", "file"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_refusal_from_outside(folder, program):
    """As a user meets it; most tests below call the programs from within this process."""
    refused(program, PROGRAMS[program], folder, lambda p, words, cwd: call(p, *words, cwd=cwd))


GOOD_OUTPUT = ["--output", "out.csv"]
COLLECT = [
    (["none"], "none does not exist"),
    (["none.csv"], "none.csv: No such file"),
    (["photos"], "photos is no run directory"),
    (["file"], "neither a run directory nor a CSV"),
    (["empty"], ""),
    (["folder.csv"], ""),
    (["binary.csv"], "binary.csv is no text"),
    (["empty.csv"], "empty.csv is empty"),
    (["head.csv"], "holds no rows"),
    (["lacks.csv"], "lacks.csv has no column"),
    (["nan.csv"], "row 2: return_mean is 'nan'"),
    (["words.csv"], "row 2: global_step is 'many'"),
    (["short.csv"], "row 2: not as many cells"),
    (["twice.csv"], "twice"),
    (["torn"], "torn/args.json is torn or no JSON"),
    (["list"], "holds no JSON object"),
    (["lacking"], "args.json has no env_id"),
    (["kinds"], "has seed 'one'"),
    (["foreign"], "nobody begins with the name of no script"),
    (["doubled"], "one_step at step 1000 twice"),
    (["garbled"], "return_mean is 'five'"),
    (["headless"], "has no column"),
    (["good", "again"], "name only one of the two"),
    (["good", "good"], "name only one of the two"),
    (["good.csv", "good"], "name only one of the two"),
    ([""], ""),
]


@pytest.mark.parametrize(("words", "said"), COLLECT, ids=lambda x: " ".join(x)[:30])
def test_collect_refuses(folder, words, said):
    if words in (["empty"], ["folder.csv"]):  # a run that is being made
        said = "nothing to write"
    assert said in refused("launch/collect.py", [*words, *GOOD_OUTPUT], folder)


OUTPUTS = [
    ([], "required: --output"),
    (["--output", ""], "is empty"),
    (["--output", "good"], "good is a folder"),
    (["--output", "file/x.png"], "Not a directory"),
    (["--output", "pipe"], "pipe is no ordinary file"),
    (["--output", "/proc/x.png"], "/proc"),
    (["--output", "x" * 300 + ".png"], "File name too long"),
    (["--output"], "expected one argument"),
    (["--outptu", "x"], "--output"),
]


@pytest.mark.parametrize(("words", "said"), OUTPUTS, ids=lambda x: " ".join(x)[:30])
@pytest.mark.parametrize("program", ["launch/collect.py", "report/plot.py"])
def test_places_where_nothing_can_be_written(folder, program, words, said):
    """Before the work, not after it; what is no file, /dev/null say, must not become one."""
    said = said if program != "report/plot.py" or said in ("required: --output",) else ""
    assert said in refused(program, ["good", *words], folder)
    assert stat.S_ISFIFO(os.stat(folder / "pipe").st_mode)


PLOT = [
    (["none"], "none does not exist"),
    (["none.csv"], "none.csv: No such file"),
    (["photos"], "photos is no run directory"),
    (["empty.csv"], "empty.csv is empty"),
    (["binary.csv"], "is no text"),
    (["lacks.csv"], "has no column algorithm"),
    (["nan.csv"], "no finite number"),
    (["torn"], "torn or no JSON"),
    (["doubled"], "twice"),
    (["garbled"], "'five'"),
    (["good", "again"], "name only one of the two"),
    (["good", "good"], "good is named twice"),
    (["twice.csv"], "twice in one run"),
    (["good", "--mode", "best"], "--mode best: these runs were evaluated as one_step"),
    (["good", "--mode", ""], "is empty"),
    (["good", "--success"], "report no successes"),
    (["good", "--metric", "losses/critic_los"], "but losses/critic_loss"),
    (["good", "--metric", ""], "is empty"),
    (["good.csv", "--metric", "x"], "needs run directories"),
    (["good", "--x", "episodes"], "invalid choice: 'episodes'"),
    (["good", "--success", "--metric", "x"], "not allowed with"),
    (["good", "--output", "x.jpg"], "must end with .png or .pdf or .svg"),
    (["head.csv"], "nothing to draw"),
    ([""], "is empty"),
]


@pytest.mark.parametrize(("words", "said"), PLOT, ids=lambda x: " ".join(x)[:30])
def test_plot_refuses(folder, words, said):
    where = [] if "--output" in words else ["--output", "out.png"]
    assert said in refused("report/plot.py", [*words, *where], folder)


NUMBERS = ["nan", "inf", "-1", "", "many", "1e400", "9" * 5000]
DATASET = [["--steps", x] for x in ["0", "1.5", "10" * 9, *NUMBERS]]
DATASET += [["--noise", x] for x in NUMBERS if x != "1"]
DATASET += [["--episode-length", x] for x in ("0", "-5")] + [
    ["--seed", x] for x in ("-1", "1" * 12)
]


@pytest.mark.parametrize("words", DATASET, ids=lambda x: " ".join(x)[:30])
def test_make_dataset_refuses_numbers(folder, words):
    words = ["pointmaze-medium", "--output", "x.npz", *words]
    said = refused("measure/make_dataset.py", words, folder)
    assert f"argument {words[-2]}: " in said


@pytest.mark.parametrize("name", ["ant", "", "cube-nonsense", "pointmaze", "cube-single:x"])
def test_make_dataset_refuses_names(folder, name):
    pytest.importorskip("ogbench")
    words = [name, "--output", "x.npz", "--steps", "10"]
    assert repr(name) in refused("measure/make_dataset.py", words, folder)


def test_make_dataset_wants_its_suffix(folder):
    """numpy would add it in silence, and the dataset would not be found under the name given."""
    words = ["cube-single", "--output", "data"]
    assert "must end with .npz" in refused("measure/make_dataset.py", words, folder)


EVALUATION_COST = [["none"], ["file"], ["torn"], ["lacking"], ["foreign"], ["headless"], ["photos"]]


@pytest.mark.parametrize("words", EVALUATION_COST, ids=" ".join)
def test_evaluation_cost_refuses(folder, words):
    refused("measure/evaluation_cost.py", [*words, *GOOD_OUTPUT], folder)


GPU = [
    ["--minutes", "0"],
    ["--minutes", "nan"],
    ["--minutes", "inf"],
    ["--steps", "0"],
    ["--at-least", "-1"],
    ["--stages", "prove", "dance"],
    ["--only", "nonsense"],
    ["--stages", "prove", "--only", "train"],
    ["--output", "file"],
    ["--output", ""],
]


@pytest.mark.parametrize("words", GPU, ids=" ".join)
def test_gpu_refuses(folder, words):
    refused("gpu.py", ["--output", "gpu", *words], folder)


WITH_TORCH = [
    ("measure/latency.py", ["--calls", "0"]),
    ("measure/latency.py", ["--batches", "0"]),
    ("measure/latency.py", ["--batches", "10000000000"]),
    ("measure/latency.py", ["--threads", "-1"]),
    ("measure/latency.py", ["--device", "toaster"]),
    ("measure/latency.py", ["--device", "meta"]),
    ("measure/latency.py", ["--device", "cuda:99"]),
    ("measure/latency.py", ["--policies", "PPO"]),
    ("measure/latency.py", ["--output", "good"]),
    ("measure/speed.py", ["--settings", "0,1"]),
    ("measure/speed.py", ["--settings", "8"]),
    ("measure/speed.py", ["--settings", "8,x"]),
    ("measure/speed.py", ["--batch-size", "0"]),
    ("measure/speed.py", ["--repetitions", "0"]),
    ("measure/speed.py", ["--steps", "1999"]),
    ("measure/speed.py", ["--modes", "fast"]),
    ("measure/precision.py", ["none"]),
    ("measure/precision.py", ["torn"]),
    ("measure/precision.py", ["foreign"]),
    ("measure/precision.py", ["sac"]),
    ("measure/reference_policies.py", ["--episodes", "0"]),
    ("measure/reference_policies.py", ["--seed", "-1"]),
    ("measure/reference_policies.py", ["--env-ids", ""]),
    ("figures/one_step.py", ["--steps", "0"]),
    ("figures/one_step.py", ["--output", "x.jpg"]),
    ("figures/constraint.py", ["--updates", "-1"]),
    ("figures/constraint.py", ["--redraw", "--output", "empty"]),
    ("figures/trajectories.py", []),
    ("figures/trajectories.py", ["--policies", "none"]),
    ("figures/trajectories.py", ["--policies", "empty", "--csv", "good"]),
]


@pytest.mark.parametrize(("program", "words"), WITH_TORCH, ids=lambda x: str(x)[:40])
def test_programs_that_compute_refuse(folder, program, words):
    outputs = {"one_step", "constraint", "trajectories"}
    more = [] if "--output" in words else ["--output", "out.csv"]
    if any(name in program for name in outputs):
        more = []
    refused(program, [*words, *more], folder)


# ---------------------------------------------------------------------------- good, but odd
def test_collect_takes_what_editors_and_windows_make_of_a_csv(folder, tmp_path):
    """A byte order mark, CRLF, no newline at the end."""
    (tmp_path / "odd.csv").write_bytes(("\ufeff" + TABLE + ROW).replace("\n", "\r\n").encode()[:-2])
    result = call("launch/collect.py", "odd.csv", "--output", "out.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("mvp_online,Ant-v4,1,1000,")


def test_runs_with_and_without_episodes_cut(folder, tmp_path):
    """A column that older runs lack stays empty for them."""
    new = RUN.replace("success_rate,", "success_rate,episodes_cut,").replace(",,4.0", ",,2,4.0")
    make_run(tmp_path / "new", json.dumps(ARGS | {"seed": 2}), new)
    result = call("launch/collect.py", folder / "good", "new", *GOOD_OUTPUT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    head, old_row, new_row = (tmp_path / "out.csv").read_text().splitlines()
    place = head.split(",").index("episodes_cut")
    assert head.split(",")[place + 1] == "returns"
    assert (old_row.split(",")[place], new_row.split(",")[place]) == ("", "2")


# ---------------------------------------------------------------------------- half-written files
def test_a_file_appears_whole_or_not_at_all(tmp_path):
    from benchmark.files import whole_file

    path = tmp_path / "new" / "x.csv"
    for error in ValueError, KeyboardInterrupt:
        with pytest.raises(error), whole_file(path) as file:
            file.write("half")
            raise error
        assert list(path.parent.iterdir()) == []
    with whole_file(path) as file:
        file.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]
    link = tmp_path / "link.csv"
    link.symlink_to(path)
    with whole_file(link) as file:
        file.write("through the link")
    assert link.is_symlink() and path.read_text() == "through the link"


@pytest.mark.skipif(shutil.which("bash") is None, reason="limits the size of files by bash")
def test_a_full_disk_leaves_the_old_file(folder, tmp_path):
    """A limit on the size of files stands for it: status 1, one line, no temporary file."""
    (tmp_path / "out.csv").write_text("old\n")
    rows = "".join(ROW.replace(",1000,", f",{step},", 1) for step in range(1000, 4000))
    (tmp_path / "many.csv").write_text(TABLE + rows)
    command = f"ulimit -f 20; trap '' XFSZ; {sys.executable} {ROOT}/benchmark/launch/collect.py "
    command += "many.csv --output out.csv"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("collect.py: error: ")
    assert (tmp_path / "out.csv").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.csv", "out.csv"]


# ---------------------------------------------------------------------------- pipes and signals
@pytest.mark.parametrize("words", [["--help"], ["good", "--output", "{}/x.csv"]])
def test_nobody_reads_on(folder, tmp_path, words):
    """| head -1, which closes the pipe: no traceback."""
    program = ROOT / "benchmark" / "launch" / "collect.py"
    words = [word.format(tmp_path) for word in words]
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, program, *words], cwd=folder, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert process.stderr == b"" and process.returncode in (0, 128 + signal.SIGPIPE)


STOPS = [pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("signum", [signal.SIGINT, *STOPS])
def test_a_signal_is_one_line(folder, tmp_path, signum):
    """A dataset takes minutes; stopped, it leaves nothing."""
    pytest.importorskip("ogbench")
    command = [sys.executable, ROOT / "benchmark" / "measure" / "make_dataset.py"]
    command += ["pointmaze-medium", "--output", tmp_path / "x.npz", "--steps", "1000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(6)
    process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signum
    assert said.splitlines()[-1] == f"make_dataset.py: stopped by {signum.name}"
    assert "Traceback" not in said and list(tmp_path.iterdir()) == []


def test_ctrl_c_while_it_imports(tmp_path):
    """torch takes seconds to load; a slow stand-in takes longer."""
    (tmp_path / "torch.py").write_text("import time\nprint('on it', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, ROOT / "benchmark" / "figures" / "one_step.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, env=env, **pipes)
    assert process.stdout.readline() == "on it\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert said == "one_step.py: stopped by SIGINT\n"
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


def test_a_missing_package_is_named(folder, tmp_path):
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError(\"No module named 'scipy'\")\n")
    env = {"PYTHONPATH": str(tmp_path)}
    result = call("report/plot.py", "good", "--output", tmp_path / "x.png", cwd=folder, env=env)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "No module named 'scipy': pip install -r benchmark/requirements.txt" in result.stderr


def test_nothing_calls_a_shell():
    for path in (ROOT / "benchmark").rglob("*.py"):
        assert "shell=True" not in path.read_text() and "os.system" not in path.read_text(), path
