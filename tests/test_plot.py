"""benchmark/report/plot.py: one's own runs, finished or not, become the picture that they are."""

import csv
import json
import subprocess
import sys
from benchmark.report import intervals, own_runs, plot, style
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib", reason="figures need matplotlib")
HEAD = "global_step,updates,wall_time,mode,nfe,num_candidates,return_mean,return_std,success_rate,"
STEPS = 1000, 2000, 3000


def make_run(root, exp_name, env_id, seed, returns, successes=None, columns="returns", **changed):
    """A run directory with an evaluation in two modes every 1,000 steps and 10 minutes."""
    run_dir = root / f"{env_id.replace('/', '-')}__{exp_name}__{seed}__{len(list(root.glob('*')))}"
    run_dir.mkdir(parents=True)
    args = {"exp_name": exp_name, "env_id": env_id, "seed": seed, "total_timesteps": 3000}
    (run_dir / "args.json").write_text(json.dumps(args | changed))
    (run_dir / ".lock").touch()
    text = HEAD + columns + "\n"
    for i, value in enumerate(returns):
        step = f"{1000 * (i + 1)},{200 * (i + 1)},{600.0 * (i + 1)}"
        success = successes[i] if successes else ""
        for mode, more in ("one_step", 0), ("best_of_n", 50):
            cells = "3,4.0 6.0" if "episodes_cut" in columns else "4.0 6.0"
            text += f"{step},{mode},1,1,{value + more},1.0,{success},{cells}\n"
    (run_dir / "evaluations.csv").write_text(text)
    lines = ["global_step,updates,wall_time,losses/critic_loss,charts/SPS"]
    lines += [f"500,0,1.0,,{seed}"] + [f"{step},{step},2.0,{seed * step},9" for step in STEPS]
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    return run_dir


def options(**changed):
    default = {"x": "steps", "mode": [], "success": False, "metric": None}
    return SimpleNamespace(**(default | changed))


def series(sources, **changed):
    asked = options(**changed)
    return own_runs.read_series(list(sources), asked, plot.AXES[asked.x])


def program(*words, cwd):
    command = [sys.executable, ROOT / "benchmark" / "report" / "plot.py", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


# ---------------------------------------------------------------------------- what is read
def test_seeds_of_a_setting_are_one_series(tmp_path):
    """The deployed mode, which scripts evaluate first; torn last lines and locks do no harm."""
    make_run(tmp_path, "mvp_online", "Ant-v4", 1, [1, 2, 3])
    young = make_run(tmp_path, "mvp_online", "Ant-v4", 2, [3, 4], columns="episodes_cut,returns")
    with (young / "evaluations.csv").open("a") as file:
        file.write("3000,600,1800.0,one_st")
    make_run(tmp_path, "sac_online", "Hopper-v4", 1, [7, 8, 9])
    mvp, sac = series(tmp_path.iterdir())
    assert (mvp.name, mvp.env_id, mvp.mode) == ("mvp_online", "Ant-v4", "one_step")
    lengths = sorted(len(x) for x, _ in mvp.curves)
    assert lengths == [2, 3] and len(sac.curves) == 1
    grid, values = plot.mean_over_seeds(mvp)
    assert grid.tolist() == [1000, 2000]  # as far as both have come
    assert sorted(values.mean(1)) == [1.5, 3.5]


@pytest.mark.parametrize(
    ("changed", "x", "y"),
    [
        ({"x": "updates"}, [200, 400], [1, 2]),
        ({"x": "wall_time"}, [600, 1200], [1, 2]),
        ({"mode": ["best_of_n"]}, [1000, 2000], [51, 52]),
        ({"success": True}, [1000, 2000], [0, 50]),
        ({"metric": "losses/critic_loss"}, [1000, 2000, 3000], [4000, 8000, 12000]),
        ({"metric": "charts/SPS"}, [500, 1000, 2000, 3000], [4, 9, 9, 9]),
    ],
    ids=str,
)
def test_what_can_be_drawn_of_a_run(tmp_path, changed, x, y):
    """Losses are empty before learning starts: no point is drawn there."""
    run_dir = make_run(tmp_path, "mvp_online", "Ant-v4", 4, [1, 2], ["0.0", "0.5"])
    (found,) = series([run_dir], **changed)
    assert [column.tolist() for column in found.curves[0]] == [x, y]


def test_a_campaign_is_drawn_as_its_runs_are(tmp_path):
    runs = [make_run(tmp_path / "runs", "mvp_online", "Ant-v4", seed, [1, 2]) for seed in (1, 2)]
    for run_dir in runs:
        (run_dir / "versions.json").write_text("{}")
    collect = [sys.executable, ROOT / "benchmark" / "launch" / "collect.py", *runs]
    subprocess.run([*collect, "--output", tmp_path / "all.csv"], check=True, capture_output=True)
    pair = series(runs), series([tmp_path / "all.csv"])
    for own in zip(*pair, strict=True):
        assert own[0].setting == own[1].setting
        for one, other in zip(*(s.curves for s in own), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_folder_of_runs_stands_for_all_in_it(tmp_path):
    """As --runs-dir, and as the launcher nests its jobs."""
    for job in "runs/try/a", "runs/try/b":
        (tmp_path / job).mkdir(parents=True)
        (tmp_path / job / "log.txt").touch()
        make_run(tmp_path / job, "mvp_online", "Ant-v4", len(list(tmp_path.rglob("a/*"))), [1])
    for folder in "runs", "runs/try":
        (found,) = series([tmp_path / folder])
        assert len(found.curves) == 2
    make_run(tmp_path / "runs/of/a/friend/deeper", "mvp_online", "Ant-v4", 3, [1])
    (found,) = series([tmp_path / "runs"])
    assert len(found.curves) == 3, "a run deeper than others was left out without a word"


def test_what_tells_settings_apart_is_in_the_legend(tmp_path):
    """Flags that all share are not; a name of one's own is, with or without a script's prefix."""
    shared = {"tau": 0.02}
    make_run(tmp_path, "mvp_online", "Ant-v4", 1, [1], **shared)
    make_run(tmp_path, "mvp_online", "Ant-v4", 2, [1], **shared)
    make_run(tmp_path, "mvp_online", "Ant-v4", 1, [1], utd=0.5, **shared)
    make_run(tmp_path, "sac_online", "Ant-v4", 1, [1])
    make_run(tmp_path, "_mine$", "Ant-v4", 1, [1])
    found = series(tmp_path.iterdir())
    assert sorted(own_runs.label_series(found).values()) == [
        "MVP --utd 0.5, one step (1 seed)",
        "MVP, one step (2 seeds)",
        "SAC, mean action (1 seed)",
        "_mine$, one step (1 seed)",
    ]
    colours = plot.colours_of(found)
    assert colours["sac_online", ""] == style.ALGORITHMS["sac_online"]
    assert style.ALGORITHMS["mvp_online"] in colours.values()
    assert len(set(colours.values())) == 4


# ---------------------------------------------------------------------------- what is drawn
def lines_and_bands(found, **changed):
    figure = plot.draw_all(found, options(**changed))
    (panel, *_) = figure.axes
    return panel, panel.lines, panel.collections


@pytest.mark.parametrize("seeds", [1, 2, 5, 6])
def test_few_seeds_are_lines_many_are_a_band(tmp_path, seeds):
    """The mean; each of at most five seeds; Student's interval from two on."""
    for seed in range(seeds):
        make_run(tmp_path, "mvp_online", "Ant-v4", seed, [0, seed, 2 * seed])
    panel, lines, bands = lines_and_bands(series(tmp_path.iterdir()))
    thin = [line for line in lines if line.get_linewidth() < 1]
    (mean,) = [line for line in lines if line.get_linewidth() > 1]
    assert len(thin) == (seeds if 1 < seeds <= style.FEW else 0)
    middle = (seeds - 1) / 2
    np.testing.assert_allclose(mean.get_ydata(), [0, middle, 2 * middle])
    assert mean.get_color() == style.ALGORITHMS["mvp_online"]
    assert len(bands) == (seeds > 1)
    if seeds > 1:
        half = intervals.interval(2 * np.arange(seeds))
        corners = bands[0].get_paths()[0].vertices
        assert corners[:, 1].max() == pytest.approx(2 * middle + half)
    assert panel.get_title(loc="left") == "Ant-v4" and panel.get_xlim() == (0, 3000)


def test_a_panel_per_environment_and_dashes_per_mode(tmp_path):
    for env_id in "Ant-v4", "dm_control/cheetah-run-v0":
        make_run(tmp_path, "mvp_online", env_id, 1, [1, 2])
    modes = ["one_step", "best_of_n"]
    figure = plot.draw_all(series(tmp_path.iterdir(), mode=modes), options(mode=modes))
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles == ["Ant-v4", "dm_control/cheetah-run-v0"]
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2  # once for all panels


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_is_whole(tmp_path, suffix):
    """Odd names included; in the folder nothing but the picture is new."""
    make_run(tmp_path / "runs", "_mine$ and $yours", "Ant-v4", 1, [1, 2, 3])
    make_run(tmp_path / "runs", "mvp_online", "Ant-v4", 1, [5])
    runs = sorted((tmp_path / "runs").iterdir())
    picture = tmp_path / "new" / f"x.{suffix}"
    plot.style.save(plot.draw_all(series(runs), options()), picture)
    assert list(picture.parent.iterdir()) == [picture]
    beginning = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xm"}[suffix]
    assert picture.read_bytes().startswith(beginning) and picture.stat().st_size > 5_000


def test_the_program_draws(tmp_path):
    """Runs that are too young are left out with a line each; a run's own log is not in the way."""
    for seed in 1, 2, 3:
        make_run(tmp_path / "runs", "mvp_online", "Ant-v4", seed, [1, seed])
    (tmp_path / "runs" / "just made").mkdir()
    result = program(*(tmp_path / "runs").iterdir(), "--output", "curves.png", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "drew curves.png\n", result.stderr
    assert result.stderr.splitlines() == [
        f"plot.py: {tmp_path}/runs/just made is left out: no evaluations yet"
    ]
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_runs_without_an_evaluation_yet(tmp_path):
    for seed in 1, 2:
        make_run(tmp_path / "runs", "mvp_online", "Ant-v4", seed, [])
    result = program(*(tmp_path / "runs").iterdir(), "--output", "curves.png", cwd=tmp_path)
    assert result.returncode == 2 and not (tmp_path / "curves.png").exists()
    *left_out, last = result.stderr.splitlines()
    assert len(left_out) == 2
    assert last == ("plot.py: error: nothing to draw: none of 2 runs has a complete evaluation yet")


def test_every_campaign_of_the_repository_can_be_drawn(tmp_path):
    for path in sorted((ROOT / "benchmark" / "results").glob("campaign_*.csv")):
        with path.open(newline="") as file:
            runs = {tuple(row[key] for key in own_runs.KEY) for row in csv.DictReader(file)}
        found = series([path])
        assert 0 < sum(len(own.curves) for own in found) <= len(runs)
        style.save(plot.draw_all(found, options()), tmp_path / f"{path.stem}.png")
