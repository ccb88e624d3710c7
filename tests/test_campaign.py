"""A campaign's statistics against brute force, its report with runs missing, and latency.py."""

import csv
import itertools
import math
import shutil
import subprocess
import sys
from benchmark.measure import latency
from benchmark.report import campaign, figures_campaign, intervals, tables_latency
from benchmark.report.registry import registry

import numpy as np
import pytest
from conftest import ROOT

TABLES = ["overview", "protocol", "tasks", "one-step", "standing", "differences", "across"]
TABLES += ["improvement"]
MODES = {
    "fpmd_online": ("one_step", "best_of_n"),
    "fpmd_meanflow_online": ("one_step", "best_of_n"),
    "mvp_online": ("one_step", "best_of_n"),
    "sac_online": ("one_step", "sampled"),
    "dpmd_online": ("one_candidate", "one_step", "best_of_n"),
}


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run_rows(algorithm, env_id, seed, returns, hours=1.0, planned=None, flags="--utd 1.0"):
    """A run's rows: every 10,000 steps and every so many hours an evaluation in all its modes."""
    every = planned or 10_000 * len(returns)
    rows = []
    for i, (value, mode) in enumerate(itertools.product(returns, MODES[algorithm])):
        k = i // len(MODES[algorithm]) + 1
        several = mode == "best_of_n"
        rows.append({
            "algorithm": algorithm, "env_id": env_id, "seed": str(seed),
            "global_step": str(10_000 * k), "updates": str(2_000 * k),
            "wall_time": str(3600 * hours * k), "mode": mode,
            "nfe": "20" if several else "1", "num_candidates": "8" if several else "1",
            "return_mean": str(value + 10 * several), "return_std": "1.0", "success_rate": "",
            "returns": "1.0 2.0", "flags": flags, "utd": "1.0", "total_timesteps": str(every),
            "python": "3", "torch": "2", "gymnasium": "1", "mujoco": "3", "device": "a CPU",
            "threads": "1", "commit": "0123456789",
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- over seeds
def test_student_t_against_closed_forms():
    level = 0.95
    assert intervals.student_t(1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-6)
    assert intervals.student_t(2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-6)
    assert intervals.student_t(9) == pytest.approx(2.262157, rel=1e-6)
    assert intervals.student_t(1e5) == pytest.approx(1.959988, rel=1e-5)
    assert intervals.student_t(2) > intervals.student_t(2.5) > intervals.student_t(3)
    assert intervals.interval([1, 2, 3]) == pytest.approx(intervals.student_t(2) / math.sqrt(3))
    assert math.isnan(intervals.interval([5])) and intervals.interval([5, 5]) == 0


def test_welch_by_hand():
    """Variances 1 and 4 of three: 5/3 of the difference, 50/17 degrees of freedom."""
    difference, half = intervals.welch([11, 12, 13], [2, 4, 6])
    assert difference == 8
    assert half == pytest.approx(intervals.student_t(50 / 17) * math.sqrt(5 / 3))
    assert intervals.welch([2, 4, 6], [11, 12, 13]) == (-8, half)
    assert intervals.welch([1, 1], [3, 3]) == (-2, 0)
    assert math.isnan(intervals.welch([1], [3, 4])[1])


def test_welch_intervals_hold_the_truth():
    """Three against three with unequal spread, as RL has it; slightly more than 95 % is known."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1500):
        difference, half = intervals.welch(rng.normal(1, 1, 3), rng.normal(0, 3, 3))
        hits += abs(difference - 1) <= half
    assert 0.935 < hits / 1500 < 0.985


@pytest.mark.parametrize("difference, half, word", [
    (5, 4, "better"),
    (-5, 4, "worse"),
    (4, 5, "not distinguishable"),
    (-4, 5, "not distinguishable"),
    (0, 0, "not distinguishable"),
    (-2, 0, "worse"),
    (5, math.nan, "one seed"),
    (math.nan, math.nan, "not evaluated"),
])  # fmt: skip
def test_verdicts(difference, half, word):
    assert intervals.verdict(difference, half) == word


# ---------------------------------------------------------------------------- across tasks
@pytest.mark.parametrize("sizes", [(4,), (3, 3, 3, 3, 3), (1,), (2, 3), (5, 1, 3), (7, 7)])
def test_interquartile_mean_is_the_mean_of_the_middle_half(sizes):
    """Brute force: enough copies of every run for equal tasks and whole quarters, then cut."""
    rng = np.random.default_rng(sum(sizes))
    scores = [rng.normal(0, 1, n) for n in sizes]
    copies = 4 * math.lcm(*sizes)
    everything = np.sort(np.concatenate([x.repeat(copies // len(x)) for x in scores]))
    quarter = len(everything) // 4
    middle = everything[quarter : len(everything) - quarter]
    assert intervals.interquartile_mean(scores) == pytest.approx(middle.mean())


def test_interquartile_mean_ignores_outliers_where_the_mean_does_not():
    assert intervals.interquartile_mean([np.array([-1e9, 1, 3, 1e6])]) == 2


def test_probability_of_improvement_counts_pairs_and_ties():
    first = [np.array([1, 2, 3]), np.array([0, 0])]
    second = [np.array([2, 2]), np.array([0, 1, 5])]
    pairs = [[(x > y) + (x == y) / 2 for x in a for y in b]
             for a, b in zip(first, second, strict=True)]  # fmt: skip
    expected = np.mean([np.mean(task) for task in pairs])  # 1/2 and 1/6
    assert intervals.probability_of_improvement(first, second) == pytest.approx(expected)
    assert expected == pytest.approx(1 / 3)
    assert intervals.probability_of_improvement(first, first) == pytest.approx(0.5)
    assert intervals.probability_of_improvement(second, first) == pytest.approx(1 - expected)


def test_performance_profile_falls_from_all_to_none():
    scores = [np.array([0.1, 0.5]), np.array([0.3, 0.3, 0.9])]
    profile = intervals.performance_profile(scores, np.array([0.0, 0.1, 0.3, 0.4, 0.5, 0.9]))
    expected = [1, (1 / 2 + 1) / 2, (1 / 2 + 1 / 3) / 2, (1 / 2 + 1 / 3) / 2, 1 / 6, 0]
    assert profile == pytest.approx(expected)  # a run at a threshold is not above it
    assert (np.diff(profile) <= 0).all()


def test_bootstrap_is_reproducible_and_stays_within_tasks():
    rng = np.random.default_rng(3)
    scores = [rng.normal(0, 1, 8), rng.normal(0, 1, 9)]  # of three runs quantiles often coincide
    ends = intervals.bootstrap(intervals.interquartile_mean, scores)
    assert (ends == intervals.bootstrap(intervals.interquartile_mean, scores)).all()
    assert ends[0] < intervals.interquartile_mean(scores) < ends[1]
    tasks_differ = [np.array([0.0, 0.0]), np.array([100.0, 100.0])]  # runs of a task do not
    assert intervals.bootstrap(lambda s: np.mean([x.mean(-1) for x in s], 0), tasks_differ) == (
        pytest.approx([50, 50])
    )
    profile = intervals.bootstrap(
        lambda s: intervals.performance_profile(s, np.linspace(-1, 1, 5)), scores
    )
    assert profile.shape == (2, 5)


@pytest.mark.parametrize("seeds, low, high", [(12, 0.91, 0.975), (3, 0.83, 0.92)])
def test_bootstrap_intervals_hold_the_truth(seeds, low, high):
    """About 95 % of the time with a dozen seeds, and as docs/results.md says with three."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        scores = [rng.normal(task, 1, seeds) for task in range(5)]  # symmetric about 2
        below, above = intervals.bootstrap(intervals.interquartile_mean, scores, resamples=300)
        hits += below <= 2 <= above
    assert low < hits / 400 < high


# ---------------------------------------------------------------------------- curves
def test_unfinished_runs_count_only_without_finished_ones():
    done = [run_rows("sac_online", "Ant-v4", seed, [1, 2, 3]) for seed in (1, 2)]
    young = run_rows("sac_online", "Ant-v4", 3, [9], planned=30_000)
    curves = intervals.read_curves([*done[0], *young, *done[1]])
    assert [c.seed for c in curves["Ant-v4", "sac_online", "one_step"]] == ["1", "2"]
    older = run_rows("sac_online", "Ant-v4", 4, [5, 7], planned=30_000)
    both = intervals.read_curves(young + older)["Ant-v4", "sac_online", "one_step"]
    assert intervals.common_step(both) == 10_000
    assert intervals.final(both).tolist() == [9, 5] == intervals.best(both).tolist()


def test_two_settings_of_an_algorithm_are_not_averaged():
    rows = run_rows("sac_online", "Ant-v4", 1, [1])
    rows += run_rows("sac_online", "Ant-v4", 2, [1], flags="--utd 0.2")
    with pytest.raises(ValueError, match="two settings"):
        intervals.read_curves(rows)


def test_final_is_the_mean_of_five_and_best_the_maximum():
    rows = run_rows("sac_online", "Ant-v4", 1, [0, 50, 1, 2, 3, 4, 5])
    (curves,) = (intervals.read_curves(rows)["Ant-v4", "sac_online", mode] for mode in ["sampled"])
    assert intervals.final(curves).tolist() == [3] and intervals.best(curves).tolist() == [50]
    assert intervals.final(curves, 60_000).tolist() == [12]  # 50, 1, 2, 3, 4
    assert np.isnan(intervals.final(curves, 5_000)).all()


def test_equal_steps_and_equal_wall_time_differ():
    """The same learning at half the speed: even at equal steps, behind at equal time.

    Of a straight curve the mean over the last fifth of T is its value at 0.9 T.
    """
    rows = []
    for seed, offset in enumerate((-1, 0, 1)):
        line = [100 * k + offset for k in range(1, 11)]
        rows += run_rows("sac_online", "Ant-v4", seed, line, hours=0.1)
        rows += run_rows("mvp_online", "Ant-v4", seed, line, hours=0.2)
    curves = intervals.read_curves(rows)
    fast, slow = (curves["Ant-v4", name, "one_step"] for name in ("sac_online", "mvp_online"))
    result = intervals.compare(slow, fast)
    assert result.step == 100_000 and result.at_step[0] == 0
    assert intervals.verdict(*result.at_step) == "not distinguishable"
    assert result.seconds == pytest.approx(3600)
    assert intervals.at_time(fast, 3600) == pytest.approx([899, 900, 901])
    assert result.at_time[0] == pytest.approx(-450)
    assert intervals.verdict(*result.at_time) == "worse"
    assert np.isnan(intervals.at_time(slow, 500)).all()  # its first evaluation came at 720 s
    grid, values = intervals.mean_curve(slow + fast, "seconds")
    assert grid[0] == 720 and grid[-1] == 3600 and values.shape == (6, len(grid))


# ---------------------------------------------------------------------------- the report
@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("campaign_*.csv", "latency_*.csv", "__pycache__")
    shutil.copytree(ROOT / "benchmark", root / "benchmark", ignore=ignored)
    (root / "docs").mkdir()
    blocks = [f"<!-- table:campaign-cpu-{name} -->\n<!-- /table -->\n" for name in TABLES]
    (root / "docs" / "page.md").write_text("\n".join(blocks))
    return root


def report(root, *rows, flag="--tables"):
    """The page after report.py --tables with these rows as the campaign."""
    if rows:
        path = root / "benchmark" / "results" / "campaign_cpu.csv"
        write(path, [row for run in rows for row in run])
    command = [sys.executable, root / "benchmark" / "report" / "report.py", flag]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return (root / "docs" / "page.md").read_text()


def rows_of(page, name):
    """The table's rows as dictionaries."""
    block = page.split(f"<!-- table:campaign-cpu-{name} -->")[1].split("<!-- /table -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def full(algorithm, level, env_ids=("Ant-v4", "Hopper-v4"), seeds=(1, 2, 3), hours=0.1):
    """Runs whose ten evaluations are all at that level, give or take one for the seed."""
    return [
        run_rows(algorithm, env_id, seed, [level + seed] * 10, hours)
        for env_id, seed in itertools.product(env_ids, seeds)
    ]


def test_no_campaign_is_said_so(copy):
    assert report(copy).count("No runs yet.") == len(TABLES)
    report(copy, flag="--check")


def test_young_campaigns_have_fewer_rows_and_no_interval(copy):
    page = report(copy, *full("mvp_online", 100, seeds=(1,)))
    ant, hopper = rows_of(page, "tasks")
    assert ant["seeds"] == "1" and ant["last five"] == "101"
    assert ant["published"] == "5,150" and ant["its protocol"].startswith(
        "MVP: not stated, ? steps"
    )
    assert hopper["published"] == "-"  # MVP's is not known there
    assert "No runs of a one-step policy and a baseline on the same task yet." in page
    assert rows_of(page, "one-step")[0]["one step is"] == "one seed"
    assert rows_of(page, "across")[0]["runs"] == "2"
    # a second algorithm on one of the tasks and one that a scale is missing for, one run growing
    young = run_rows("sac_online", "Ant-v4", 1, [50, 60], planned=100_000)
    others = [run_rows(name, "Reacher-v4", 1, [1] * 10) for name in ("mvp_online", "sac_online")]
    page = report(copy, *full("mvp_online", 100, seeds=(1,)), young, *others)
    steps = [r["steps"] for r in rows_of(page, "tasks") if r["algorithm"] == "SAC"]
    assert steps == ["20,000 of 100,000"] * 2 + ["100,000"] * 2  # its mean, its samples
    pair, equal = rows_of(page, "differences")
    assert pair["environment"] == "Ant-v4" and pair["steps"] == "20,000"
    assert pair["at equal steps"] == "+46.0" and pair["at equal steps it is"] == "one seed"
    assert equal["environment"] == "Reacher-v4" and equal["at equal steps"] == "0.0"
    assert "from one seed, on Ant-v4 (+46.0, 20,000) and Reacher-v4 (0.0, 100,000)" in page
    assert "with probability 0.75 [0.75, 0.75] over 2 tasks" in page  # a win and a tie
    blocks = [(r["tasks"], r["algorithm"]) for r in rows_of(page, "across")]
    assert blocks == [("2", "MVP"), ("1", "MVP"), ("1", "SAC")]
    assert "Without a published SAC return, so not counted: Reacher-v4" in page
    mvp, sac = rows_of(page, "overview")
    assert [sac[env_id] for env_id in ("Ant-v4", "Hopper-v4", "Reacher-v4")] == ["55.0", "-", "1.0"]
    assert mvp["Hopper-v4"] == "101" and "up to step 20,000 or 100,000, 1 seed, ±" in page


def test_words_and_numbers_of_a_finished_campaign(copy):
    """A policy that beats SAC and loses to DPMD at equal steps, and the other way round in time."""
    runs = [*full("fpmd_online", 1000, hours=0.2), *full("sac_online", 500, hours=0.1)]
    for env_id, seed in itertools.product(("Ant-v4", "Hopper-v4"), (1, 2, 3)):
        slow = [100 * k + seed for k in range(11, 21)]  # 1100 to 2000
        runs.append(run_rows("dpmd_online", env_id, seed, slow, hours=2.0))
    page = report(copy, *runs)
    table = {(r["environment"], r["against"]): r for r in rows_of(page, "differences")}
    ant = table["Ant-v4", "SAC"]
    # both seeds 1, 2, 3: variance 1, four degrees of freedom, 2.776 sqrt(2 / 3)
    assert ant["at equal steps"] == "+500 ± 2.3" and ant["at equal steps it is"] == "better"
    assert ant["seeds"] == "3 and 3" and ant["steps"] == "100,000" and ant["wall time"] == "60 min"
    dpmd = table["Ant-v4", "DPMD"]
    assert dpmd["at equal steps"] == "-810 ± 2.3"  # 1800 of its last five and 10 of best of N
    assert dpmd["at equal wall time"] == "-" and dpmd["at equal wall time it is"] == "not evaluated"
    assert (
        "**FPMD-R against SAC.** At equal steps (100,000): better on Ant-v4 (+500 ± 2.3) and "
        "Hopper-v4 (+500 ± 2.3). At equal wall time (60 min): better on Ant-v4" in page
    )
    assert "**FPMD-R against DPMD.** At equal steps (100,000): **worse** on Ant-v4" in page
    assert "At equal wall time (2.0 h): not evaluated by then on Ant-v4 and Hopper-v4" in page
    improvement = {r["P(row beats column)"]: r for r in rows_of(page, "improvement")}["FPMD-R"]
    assert improvement["SAC"] == "1.00 [1.00, 1.00], 2"
    assert improvement["DPMD"] == "0.00 [0.00, 0.00], 2"
    (one, *_) = rows_of(page, "one-step")
    assert one["one step - best of N"] == "-10.0 ± 0.0" and one["one step is"] == "worse"
    published = rows_of(page, "tasks")[0]
    assert published["published"] == "5,756" and "best over training" in published["its protocol"]
    # between random, -46.87, and SAC's published 5733.8; 16.20 and 2787.1
    score = ((1002 + 46.8728) / 5780.6728 + (1002 - 16.1979) / 2770.9021) / 2
    assert rows_of(page, "across")[0]["mean"] == f"{score:.2f}"
    fpmd, sac, dpmd = rows_of(page, "overview")
    assert list(fpmd.values()) == ["FPMD-R", "one step", "1", "1,002 ± 2.5", "1,002 ± 2.5", "120"]
    assert (sac["policy"], sac["minutes a run"], sac["evaluations an action"]) == (
        "mean action",
        "60",
        "1",
    )
    assert (dpmd["evaluations an action"], dpmd["Ant-v4"]) == ("160", "1,812 ± 2.5")
    # and a number that changes is noticed
    path = copy / "benchmark" / "results" / "campaign_cpu.csv"
    path.write_text(path.read_text().replace("1001,1.0", "2001,1.0"))
    command = [sys.executable, copy / "benchmark" / "report" / "report.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    changed = {line.split()[1] for line in result.stdout.splitlines()}
    assert changed == {f"campaign-cpu-{name}" for name in set(TABLES) - {"protocol"}}


def test_budgets_that_differ_are_compared_at_equal_steps(copy):
    """After 50,000 steps SAC leads; MVP's further 50,000 count nowhere that SAC stands beside."""
    long = run_rows("mvp_online", "Ant-v4", 1, range(100, 1100, 100))
    page = report(copy, long, run_rows("sac_online", "Ant-v4", 1, range(150, 900, 150)))
    mvp, sac = rows_of(page, "across")
    assert [row["steps"] for row in (mvp, sac)] == ["50,000"] * 2
    scores = [f"{(level + 46.8728) / 5780.6728:.2f}" for level in (300, 450)]  # of five each
    assert [row["mean"] for row in (mvp, sac)] == scores
    assert rows_of(page, "improvement")[0]["SAC"] == "0.00 [0.00, 0.00], 1"
    assert rows_of(page, "tasks")[0]["last five"] == "800"


def test_scores_run_from_random_to_published_sac():
    levels = [-46.8728, 5733.8, (5733.8 - 46.8728) / 2]
    runs = [run_rows("sac_online", "Ant-v4", seed, [x]) for seed, x in enumerate(levels)]
    curves = intervals.read_curves([row for run in runs for row in run])
    (scores,) = campaign.scores(curves, ["sac_online"], ["Ant-v4"])["sac_online"]
    assert scores == pytest.approx([0, 1, 0.5])
    assert campaign.scale("Reacher-v4") is None


def test_figures_of_young_and_finished_campaigns(copy):
    pytest.importorskip("matplotlib")
    csv_path, picture = copy / "campaign.csv", copy / "figure.png"
    young = [run_rows("sac_online", "Ant-v4", 1, [5], planned=50_000)]
    rich = [*full("mvp_online", 100), *full("sac_online", 50, ["Ant-v4"]), *full("dpmd_online", 9)]
    for runs in young, rich:
        write(csv_path, [row for run in runs for row in run])
        campaign.load.cache_clear()
        for name, (draw, source) in registry().figures.items():
            if source != "campaign_cpu.csv" or (runs is young and "one_step" in name):
                continue
            draw(csv_path, picture)
            assert picture.stat().st_size > 5_000
            picture.unlink()


def test_a_panel_without_a_common_time_stays_empty(tmp_path):
    """Two seeds with one evaluation each, at different seconds: nothing to draw, and no failure."""
    pytest.importorskip("matplotlib")
    runs = [run_rows("sac_online", "Ant-v4", seed, [5], hours=seed) for seed in (1, 2)]
    write(tmp_path / "young.csv", [row for run in runs for row in run])
    figures_campaign.draw_curves(tmp_path / "young.csv", tmp_path / "x.png", "seconds")
    assert (tmp_path / "x.png").stat().st_size > 1_000


# ---------------------------------------------------------------------------- latency.py
def test_a_small_latency_measurement(tmp_path):
    output = tmp_path / "latency.csv"
    flags = "--policies FPMD-R MVP --modes eager --batches 1 3 --calls 20 --threads 1"
    command = [sys.executable, ROOT / "benchmark" / "measure" / "latency.py", *flags.split()]
    result = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = "policy steps batch mode device threads mean_ms median_ms p99_ms calls torch hardware"
    assert list(rows[0]) == [*names.split(), "commit"]
    found = [(row["policy"], row["steps"], row["batch"]) for row in rows]
    cases = [("FPMD-R", "1"), ("MVP", "1"), ("FPMD-R", "5"), ("FPMD-R", "20")]
    assert found == [(*case, batch) for case in cases for batch in "13"]
    for row in rows:
        assert row["calls"] == "20" and row["device"] == "cpu" and row["threads"] == "1"
        assert 0 < float(row["median_ms"]) <= float(row["p99_ms"])
    median = {(r["policy"], r["steps"]): float(r["median_ms"]) for r in rows if r["batch"] == "1"}
    assert median["FPMD-R", "1"] < median["FPMD-R", "20"]
    assert "against SAC" in tables_latency.latency(output)


def test_policies_that_are_not_there_are_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(latency, "POLICIES", {("X", 1): ("no_such_online", "one_step")})
    options = latency.argparse.Namespace(policies=["X"], batches=[1, 2], modes=["eager"])
    assert latency.cases(options, "cpu") == []
    assert capsys.readouterr().err.splitlines() == ["left out: X, there is no no_such_online.py"]


def test_what_is_timed_is_the_deployed_action():
    """One step: OneStepPolicy, which is act_one_step; T steps: generate from the same noise."""
    import torch

    device = torch.device("cpu")
    for script in "fpmd_online", "fpmd_meanflow_online", "mvp_online":
        module = latency.load_script(script)
        call = latency.action(module, "one_step", 1, 2, "eager", device)
        once = call()
        args, rng = module.Args(), torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        agent = module.Agent(27, 8, args, device)
        obs = torch.randn((2, 27), generator=rng)
        expected = module.act_one_step(agent, obs, args, rng)
        torch.testing.assert_close(once, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes 1 steps"):
        latency.action(latency.load_script("mvp_online"), "one_step", 20, 1, "eager", device)
