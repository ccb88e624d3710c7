"""Evidence: tables rebuilt from CSV alone, and training runs gathered in one CSV."""

import csv
import json
import shutil
import subprocess
import sys
from benchmark.report import formatting, style, tables_training
from benchmark.report.figures_training import (
    draw_beside_sac,
    draw_climb,
    draw_from_pixels,
    draw_two_doors,
    draw_variants,
    reached_by_all,
)
from benchmark.runs import defaults
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3.17.0"}
VERSIONS |= {"numpy": "2.4.6", "commit": "0123456789abcdef", "device": "a CPU", "threads": 2}
HEAD = "global_step,updates,wall_time,mode,nfe,num_candidates,return_mean,return_std,success_rate,"
HEAD += "episodes_cut,"


RUN = {"algorithm": "fpmd_plus_online", "env_id": "a-task", "seed": 1, "global_step": 1000}
RUN |= {"updates": 1000, "wall_time": 60, "mode": "one_step", "nfe": 1, "num_candidates": 8}
RUN |= {"return_mean": 0, "returns": "1 2", "flags": "", "utd": 1.0, "total_timesteps": 100_000}
RUN |= {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0" * 40}


def program(root, name, *arguments):
    command = [sys.executable, str(root / "benchmark" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def copy(tmp_path):
    """The committed CSVs and the programs that handle them, free to be changed."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "benchmark", root / "benchmark")
    shutil.copy(ROOT / "fpmd_online.py", root)
    (root / "docs").mkdir()
    return root


def write_run(root, env_id, seed, one_step, best_of_n, **changed):
    """A run directory with an evaluation every 1000 steps."""
    run_dir = root / f"{env_id}__fpmd_online__{seed}__now"
    run_dir.mkdir(parents=True)
    args = defaults(ROOT / "fpmd_online.py") | {
        "env_id": env_id,
        "seed": seed,
        "exp_name": "fpmd_online",
    }
    args |= {"total_timesteps": 1000 * len(one_step), "eval_every": 1000} | changed
    (run_dir / "args.json").write_text(json.dumps(args))
    (run_dir / "versions.json").write_text(json.dumps(VERSIONS))
    text = HEAD + "returns\n"
    for i, (single, best) in enumerate(zip(one_step, best_of_n, strict=True), 1):
        for mode, nfe, n, value in ("one_step", 1, 1, single), ("best_of_n", 4, 8, best):
            text += f"{1000 * i},{200 * i},{1800.0 * i},{mode},{nfe},{n},{value},1.0,,0,"
            text += f"{value - 1:.4f} {value + 1:.4f}\n"
    (run_dir / "evaluations.csv").write_text(text)
    return run_dir


# ---------------------------------------------------------------------------- report.py


def test_every_table_in_the_documents_follows_from_its_csv():
    documents = [path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.exists()]
    if not any("<!-- table:" in path.read_text() for path in documents):
        pytest.skip("no document has a table yet")
    result = program(ROOT, "report/report.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name, source", [
    ("reference-policies", "reference_policies.csv"),
    ("published", "published_results.csv"),
])  # fmt: skip
def test_a_changed_number_is_noticed_and_rewritten(copy, name, source):
    page, results = copy / "docs" / "page.md", copy / "benchmark" / "results" / source
    page.write_text(f"before\n<!-- table:{name} -->\n<!-- /table -->\nafter\n")
    assert program(copy, "report/report.py", "--check").returncode == 1
    assert program(copy, "report/report.py", "--tables").returncode == 0
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert program(copy, "report/report.py", "--check").returncode == 0
    write(results, [read(results)[0] | {"return_mean": "123456"}, *read(results)[1:]])
    result = program(copy, "report/report.py", "--check")
    assert result.returncode == 1 and f"page.md: {name}" in result.stdout
    assert "123,456" not in page.read_text()  # --check writes nothing
    program(copy, "report/report.py", "--tables")
    assert "123,456" in page.read_text()


def test_unknown_and_unclosed_tables_are_refused(copy):
    page = copy / "docs" / "page.md"
    page.write_text("<!-- table:nonsense -->\n<!-- /table -->\n")
    assert "nonsense" in program(copy, "report/report.py", "--tables").stderr
    page.write_text("<!-- table:published -->\nno end\n")
    assert "no <!-- /table -->" in program(copy, "report/report.py", "--tables").stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("env_id,policy\n", "holds no rows"),
        ("env_id,policy\nAnt-v4,random\n", "cannot make reference-policies: KeyError"),
        ("env_id,policy\nAnt-v4\n", "not as many cells as columns"),
        ("env_id,env_id\na,b\n", "has the column env_id twice"),
        (None, "No such file"),
    ],
)
def test_a_table_without_its_numbers_is_one_line(copy, text, said):
    """Status 2, the CSV named, the page as it was."""
    page, source = copy / "docs" / "page.md", copy / "benchmark/results/reference_policies.csv"
    page.write_text("<!-- table:reference-policies -->\n<!-- /table -->\n")
    source.unlink() if text is None else source.write_text(text)
    result = program(copy, "report/report.py", "--tables")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "reference_policies.csv" in result.stderr and said in result.stderr
    assert page.read_text() == "<!-- table:reference-policies -->\n<!-- /table -->\n"


@pytest.mark.parametrize("folder, prefix", [("docs", ""), ("docs/campaigns", "../")])
def test_links_to_figures_start_from_the_document(copy, folder, prefix):
    page = copy / folder / "page.md"
    page.parent.mkdir(exist_ok=True)
    name = "campaign-cpu-figure-steps"
    page.write_text(f"<!-- table:{name} -->\n<!-- /table -->\n")
    assert program(copy, "report/report.py", "--tables").returncode == 0
    assert f"]({prefix}figures/campaign_cpu_steps.png)" in page.read_text()


def test_code_beside_an_equation_is_the_scripts_own(copy):
    """A function that changes is noticed, and its new text replaces the old one."""
    page, script = copy / "docs" / "page.md", copy / "fpmd_online.py"
    page.write_text("before\n<!-- code:fpmd_online.critic_loss -->\n<!-- /code -->\nafter\n")
    assert program(copy, "report/report.py", "--check").returncode == 1
    assert program(copy, "report/report.py", "--tables").returncode == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "```python\ndef critic_loss(" in text and text.count("\ndef ") == 1
    assert program(copy, "report/report.py", "--check").returncode == 0
    script.write_text(script.read_text().replace("def critic_loss(", "def critic_loss(new_name, "))
    result = program(copy, "report/report.py", "--check")
    assert result.returncode == 1 and "page.md: fpmd_online.critic_loss" in result.stdout
    assert page.read_text() == text  # --check writes nothing
    program(copy, "report/report.py", "--tables")
    assert "def critic_loss(new_name, " in page.read_text()


def test_a_link_leads_to_the_line_of_its_function(copy):
    page, script = copy / "docs" / "page.md", copy / "fpmd_online.py"
    page.write_text("see [`generate`](../fpmd_online.py#L1) and [`main`](../fpmd_online.py)\n")
    assert program(copy, "report/report.py", "--check").returncode == 1
    program(copy, "report/report.py", "--tables")
    line = 1 + script.read_text().splitlines().index(
        "def generate(policy: nn.Module, obs: Tensor, z: Tensor, flow_steps: int) -> Tensor:"
    )
    expected = f"see [`generate`](../fpmd_online.py#L{line}) and [`main`](../fpmd_online.py)\n"
    assert page.read_text() == expected
    script.write_text("# one line more\n" + script.read_text())
    result = program(copy, "report/report.py", "--check")
    assert result.returncode == 1 and "line of fpmd_online.generate" in result.stdout


@pytest.mark.parametrize("name", ["fpmd_online.nonsense", "nonsense.critic_loss"])
def test_code_that_is_not_there_is_refused(copy, name):
    page = copy / "docs" / "page.md"
    page.write_text(f"<!-- code:{name} -->\n<!-- /code -->\n")
    result = program(copy, "report/report.py", "--tables")
    script, function = name.split(".")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"no function {function} in {script}.py" in result.stderr
    page.write_text(f"<!-- code:{name} -->\nno end\n")
    assert "no <!-- /code -->" in program(copy, "report/report.py", "--tables").stderr


def test_results_table_says_what_the_runs_did(copy):
    """Last five evaluations, best so far, and Student's t over two seeds: 12.706 sd / sqrt 2."""
    runs = copy / "runs"
    write_run(runs, "Ant-v4", 1, [900, *[100] * 5], [2000, *[1000] * 5], num_candidates=8)
    write_run(runs, "Ant-v4", 2, [700, *[200] * 5], [2000, *[1000] * 5], num_candidates=8)
    write_run(runs, "Other-v0", 1, [10], [20], total_timesteps=5000)
    output = copy / "benchmark" / "results" / "fpmd_online_cpu.csv"
    program(copy, "launch/collect.py", *runs.iterdir(), "--output", output)
    known = {"env_id": "Ant-v4", "episodes": 2, "return_std": 1, "mujoco": 3, "gymnasium": 1}
    rows = [known | {"policy": "random", "return_mean": "-29.26"}]
    rows.append(known | {"policy": "zero", "return_mean": "1000.8"})
    write(copy / "benchmark" / "results" / "reference_policies.csv", rows)
    (copy / "docs" / "page.md").write_text("<!-- table:results-cpu -->\n<!-- /table -->\n")
    result = program(copy, "report/report.py", "--tables")
    assert result.returncode == 0, result.stderr
    lines = (copy / "docs" / "page.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    head, _, ant, other = table
    ant, other = dict(zip(head, ant, strict=True)), dict(zip(head, other, strict=True))
    assert ant["N, T, UTD"] == "8, 4, 0.2" and ant["seeds"] == "2" and ant["hours"] == "3.0"
    assert ant["one step"] == "150 ± 635" and ant["one step, best"] == "800 ± 1,271"
    assert ant["best of N"] == "1,000 ± 0.0" and ant["best of N, best"] == "2,000 ± 0.0"
    assert ant["random"] == "-29.3" and ant["zero action"] == "1,001"
    assert ant["hardware"] == "a CPU, 2 threads" and ant["commit"] == "`0123456`"
    assert other["one step"] == "10.0" and other["seeds"] == "1"  # one seed: no interval
    assert other["steps"] == "1,000 of 5,000" and other["random"] == "?"
    assert "Ant-v4 `--total-timesteps 6000 --num-candidates 8`" in "\n".join(lines)


def test_results_are_read_where_all_seeds_have_been(tmp_path):
    """The longer run counts up to where the shorter one ends, as the steps of the row say."""
    rows = []
    for seed, end in (1, 100_000), (2, 40_000):
        for step in range(10_000, end + 1, 10_000):
            for mode in "one_step", "best_of_n":
                row = RUN | {"seed": seed, "global_step": step, "mode": mode, "updates": step}
                rows.append(row | {"return_mean": 1000 * seed + (step > 40_000) * 9_000})
    write(tmp_path / "runs.csv", rows)
    row = tables_training.results(tmp_path / "runs.csv").splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:6] == ["40,000 of 100,000", "40,000", "2"] and cells[7] == "1,500 ± 6,353"


def test_ablation_pairs_the_seeds(copy):
    """Differences seed by seed over the last three evaluations: 4.303 sd / sqrt 3, two variants."""
    runs, offsets = copy / "runs", {1: 0, 2: 500, 3: 1000}  # seeds differ more than variants
    for seed, offset in offsets.items():
        value = [offset + 10 * seed] * 3
        write_run(runs / "a", "Ant-v4", seed, [7000, *value], [offset] * 4, utd=1.0)
        better = [7000, *[v + 100 + seed for v in value]]
        noisy = [offset + (seed - 2) * 300 + 100] * 4
        write_run(runs / "b", "Ant-v4", seed, better, noisy, utd=1.0, weight_mode="none")
    output = copy / "benchmark" / "results" / "weight_modes_cpu.csv"
    program(copy, "launch/collect.py", *runs.glob("*/*"), "--output", output)
    (copy / "docs" / "page.md").write_text("<!-- table:weight-modes -->\n<!-- /table -->\n")
    result = program(copy, "report/report.py", "--tables")
    assert result.returncode == 0, result.stderr
    lines = (copy / "docs" / "page.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    head, _, *rows = table
    default, none = (dict(zip(head, row, strict=True)) for row in rows)
    assert default["variant"] == "the default" and default["one step, minus default"] == ""
    assert none["variant"] == "`--weight-mode none`" and none["seeds"] == "3"
    assert default["one step"] == "520 ± 1,267"  # 10, 520, 1030
    assert none["one step, minus default"] == "**102 ± 2.5**"  # 101, 102, 103
    assert none["best of N, minus default"] == "100 ± 745"  # -200, 100, 400
    assert "flags of all: `--utd 1.0`" in "\n".join(lines)


def test_ablation_of_several_scripts(copy):
    """Each against its own default, where the shorter of the two ends; SAC has no candidates."""
    runs, output = copy / "runs", copy / "benchmark" / "results" / "short_runs_cpu.csv"
    write_run(runs / "a", "Ant-v4", 1, [1, 2, 3, 4, 900], [10] * 5, total_timesteps=5000)
    write_run(runs / "b", "Ant-v4", 1, [5] * 4, [30] * 4, tau=0.02, total_timesteps=4000)
    program(copy, "launch/collect.py", *runs.glob("*/*"), "--output", output)
    rows = read(output)
    other = [row for row in rows if row["mode"] == "one_step" and not row["flags"]]
    other = [row | {"algorithm": "sac_online", "flags": "--gamma 0.9"} for row in other]
    write(output, rows + other)
    (copy / "docs" / "page.md").write_text("<!-- table:short-runs -->\n<!-- /table -->\n")
    result = program(copy, "report/report.py", "--tables")
    assert result.returncode == 0, result.stderr
    lines = (copy / "docs" / "page.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert [row[0] for row in table[2:]] == ["`fpmd_online`", "`fpmd_online`", "`sac_online`"]
    assert [row[2:] for row in table[2:]] == [
        ["the default", "1", "3.0", "", "10.0", ""],
        ["`--tau 0.02`", "1", "5.0", "2.0", "30.0", "20.0"],
        ["the default", "1", "302", "", "-", "-"],
    ]
    alone = tables_training.ablation(output, average=1).splitlines()
    assert [line.split("|")[5].strip() for line in alone[2:5]] == ["4.0", "5.0", "900"]
    assert "Returns are the last evaluation of 2 episodes" in alone[-1]


# ---------------------------------------------------------------------------- success rates
MACHINE = {"torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3", "python": "3", "device": "a CPU"}
MACHINE |= {"threads": 1, "commit": "0123456789abcdef"}


def success_rows(flags, seed, rates):
    """Evaluations of a run: {step: (one step's success rate, best of N's)}."""
    for step, pair in rates.items():
        for mode, rate in zip(("one_step", "best_of_n"), pair, strict=True):
            row = {"algorithm": "meanflowql_offline_to_online", "env_id": "ogbench:cube-v0"}
            row |= {"seed": seed, "global_step": step, "updates": step, "mode": mode, "nfe": 1}
            row |= {"num_candidates": 5, "return_mean": -1, "success_rate": rate}
            yield row | {"returns": "-1.0 -1.0 -1.0", "flags": flags, "utd": 1.0} | MACHINE


def tabled(copy, name, csv_name, rows):
    """The table of that name after the CSV was written: rows as dicts, and the whole text."""
    write(copy / "benchmark/results" / csv_name, rows)
    (copy / "docs/page.md").write_text(f"<!-- table:{name} -->\n<!-- /table -->\n")
    result = program(copy, "report/report.py", "--tables")
    assert result.returncode == 0, result.stderr
    text = (copy / "docs/page.md").read_text()
    lines = [line for line in text.splitlines() if line[:1] == "|"]
    head, _, *table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in table], text


def test_success_offline_is_told_without_what_came_online(copy):
    """Last, mean of the last three and best of the offline evaluations; alphas by their size."""
    flags = "--offline-steps 400 --alpha "
    before = {100: (0.0, 0.9), 200: (0.1, 0.4), 300: (0.2, 0.5), 400: (0.6, 0.6)}
    rows = [*success_rows(f"{flags}10.0", 1, before | {500: (1.0, 1.0)})]
    rows += success_rows(f"{flags}10.0", 2, dict.fromkeys(before, (0.3, 0.3)))
    rows += success_rows(f"{flags}3.0", 1, dict.fromkeys(before, (0.0, 0.0)))
    table, text = tabled(copy, "meanflowql-cube-alphas", "meanflowql_cube_cpu.csv", rows)
    assert [row["variant"] for row in table] == ["`--alpha 3.0`", "`--alpha 10.0`"]
    ten = table[1]
    assert ten["seeds"] == "2" and ten["one step: last"] == "45.0 ± 191"  # 60, 30
    assert ten["one step: last three"] == "30.0 ± 0.0"  # (10 + 20 + 60) / 3, 30
    assert ten["best of N: best"] == "60.0 ± 381"  # 90, 30
    assert table[0]["one step: best"] == "0.0"  # one seed: no interval
    assert "after 400 offline updates" in text and "of 3 episodes" in text
    assert "Flags of all: `--offline-steps 400`" in text


def test_success_rates_say_what_the_online_phase_added(copy):
    """The rise is taken seed by seed from the end of the offline phase to that of the run."""
    flags = "--offline-steps 200"
    rows = [*success_rows(flags, 1, {200: (0.1, 0.2), 300: (0.2, 0.3), 400: (0.5, 0.7)})]
    rows += success_rows(flags, 2, {200: (0.3, 0.4), 300: (0.3, 0.5), 400: (0.7, 0.9)})
    (row,), text = tabled(copy, "meanflowql-cube-online", "meanflowql_cube_online_cpu.csv", rows)
    assert row["best of N, after offline"] == "30.0 ± 127" and row["rise"] == "50.0 ± 0.0"
    assert row["mean while online"] == "60.0 ± 127"  # 50, 70
    assert row["one step, after offline"] == "20.0 ± 127"  # 10, 30
    assert row["one step, at the end"] == "60.0 ± 127"  # 50, 70
    assert "400 steps in all" in text


def test_runs_that_were_cut_off_show_every_evaluation(copy):
    """With the updates that they had, not those that they were to have."""
    rows = [*success_rows("--alpha 30.0", 1, {50_000: (0.05, 0.35), 100_000: (0.1, 0.4)})]
    rows += success_rows("--alpha 100.0", 1, {50_000: (0.2, 0.25)})
    table, _ = tabled(copy, "meanflowql-cube-cuda", "meanflowql_cube_cuda.csv", rows)
    told = [[row[key] for key in ("variant", "updates", "one step", "best of N")] for row in table]
    assert told == [
        ["`--alpha 30.0`", "50,000", "5", "35"],
        ["`--alpha 30.0`", "100,000", "10", "40"],
        ["`--alpha 100.0`", "50,000", "20", "25"],
    ]


def test_reformulations_are_means_over_seeds(copy):
    """What was learnt, and beside it what a perfect network would."""
    rows = [
        {"form": "z - u", "what": "learnt", "seed": seed, "updates": 10, "distance": distance}
        | {"within": within, "transport": 0.5}
        for seed, distance, within in ((0, 0.1, 0.8), (1, 0.3, 0.9))
    ]
    exact = {"form": "z - u", "what": "exact", "seed": "", "updates": 10, "distance": 0.06}
    rows.append(exact | {"within": 0.99, "transport": 0.04})
    (row,), text = tabled(copy, "reformulations", "reformulations.csv", rows)
    assert row["learnt: distance"] == "0.200" and row["learnt: within 3 std"] == "85%"
    assert row["exact: distance"] == "0.060" and row["exact: within 3 std"] == "99%"
    assert row["exact: transport"] == "0.040" and "Means of 2 seeds after 10 updates" in text


def test_alphas_are_told_on_one_scale(copy):
    """Of normalised Q, alpha counts times mean |Q|."""
    row = {"env_id": "ogbench:cube", "seed": 1, "updates": 10, "mse_to_data": 0.254}
    row |= {"outside_box": 0.125, "candidate_spread": 0.1, "commit": "0" * 40}
    rows = [row | {"alpha": 30.0, "normalize_q": False, "q_value": -20.0}]
    rows += [row | {"alpha": 0.3, "normalize_q": True, "q_value": -20.0}]
    table, text = tabled(copy, "meanflowql-alphas", "meanflowql_alphas.csv", rows)
    assert [line["flags"] for line in table] == ["`--alpha 30`", "`--normalize-q --alpha 0.3`"]
    assert [line["alpha against Q itself"] for line in table] == ["30.0", "6.0"]
    assert table[0]["mean Q"] == "-20.0" and table[0]["distance to the data"] == "0.25"
    assert table[0]["beyond the bounds"] == "12 %" and "Commit `0000000`" in text


def test_a_screen_shows_runs_as_they_went(copy):
    """A run that ended early has no later cells; the same setting of another commit is another."""
    known = {"env_id": "Ant-v4", "device": "a CPU", "threads": 1, "torch": "2.13.0"}
    rows = [
        known
        | {"seed": 1, "setting": setting, "commit": commit * 40, "mode": mode}
        | {"global_step": step, "return_mean": value, "returns": "1 2 3"}
        for setting, commit, step, value in (
            ("default", "0", 5000, 10.04),
            ("default", "0", 10_000, 1234.4),
            ("default", "1", 5000, 20.0),
            ("means", "0", 5000, -3.0),
        )
        for mode in ("one_step", "best_of_n")
    ]
    table, text = tabled(copy, "recipe-screen", "recipe_screen.csv", rows)
    assert [(line["setting"], line["5k"], line["10k"], line["commit"]) for line in table] == [
        ("default", "10.0", "1,234", "`0000000`"),
        ("default", "20.0", "-", "`1111111`"),
        ("means", "-3.0", "-", "`0000000`"),
    ]
    assert "in 3 episodes" in text


def test_returns_at_the_published_number_of_steps(copy):
    """Ours by their critics, only what is finished; below them what others published."""
    known = {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0" * 40}
    known |= {"total_timesteps": 100_000, "env_id": "HalfCheetah-v4", "mode": "one_step"}
    sac = {"algorithm": "sac_online", "flags": "--utd 1.0"}
    same = sac | {"flags": "--critic-batch-norm --adam-beta1 0.5 --utd 1.0"}
    slow = sac | {"flags": "--critic-batch-norm --utd 1.0"}
    fast = sac | {"flags": "--adam-beta1 0.5 --utd 1.0"}
    plus = {"algorithm": "fpmd_plus_online", "flags": ""}
    slow_plus = plus | {"flags": "--policy-lr 0.0003 --adam-beta1 0.9"}
    noisy_plus = plus | {"flags": "--noise-scale 0.4"}
    runs = (plus, 1, 7000), (plus, 2, 8000), (slow_plus, 1, 4000), (noisy_plus, 1, 4200)
    runs += (same, 1, 6000), (slow, 1, 3000), (fast, 1, 4500), (sac, 1, 5000)
    rows = [
        known | own | {"seed": seed, "global_step": step, "return_mean": value - 100_000 + step}
        for own, seed, value in runs
        for step in (90_000, 100_000)
    ]
    rows += [known | sac | {"seed": 2, "global_step": 90_000, "return_mean": 1}]
    rows += [row | {"mode": "best_of_n", "return_mean": 0} for row in rows]
    of_sac = [row for row in rows if row["algorithm"] == "sac_online"]
    write(copy / "benchmark/results/sac_100k_cpu.csv", of_sac)
    ours = [row for row in rows if row not in of_sac]
    table, text = tabled(copy, "plus-100k", "plus_100k_cpu.csv", ours)
    told = {line["method"]: line["HalfCheetah-v4"] for line in table}
    methods = [
        "FPMD+",
        "FPMD+, slow policy",
        "FPMD+, noise 0.4",
        "SAC, same critic",
        "SAC, same critic, slow policy",
        "SAC, fast policy",
        "SAC",
    ]
    assert [*told][:7] == [f"**{method}**" for method in methods]
    assert told["**FPMD+, slow policy**"] == "4,000 (1)"
    assert told["**FPMD+, noise 0.4**"] == "4,200 (1)"
    assert told["**SAC, same critic, slow policy**"] == "3,000 (1)"
    half = 12.706 * 500  # t of one degree of freedom, times s / sqrt(2)
    assert told["**FPMD+**"] == f"7,500 ± {half:,.0f} (2)"
    assert told["**SAC, same critic**"] == "6,000 (1)" and told["**SAC**"] == "5,000 (1)"
    assert told["**SAC, fast policy**"] == "4,500 (1)"
    assert told["SAC"] == "6,156 ± 528 (10)"  # 2.262 * 738 / sqrt(10)
    assert table[0]["Walker2d-v4"] == "-" and "at 100,000 steps" in text
    short, text = tabled(copy, "plus-100k-overview", "plus_100k_cpu.csv", ours)
    compared = ["**FPMD+**", "**SAC, same critic**", "SAC", "CrossQ"]
    assert [line["method"] for line in short[:4]] == compared and len(short) == 8
    assert [*short[0]] == ["method", "HalfCheetah-v4"] and "the others are published" in text


def test_whole_runs_are_compared_with_those_of_the_same_critic(copy):
    """Only finished runs of the two, of six evaluations; a task that one lacks is left out."""
    known = {"total_timesteps": 600, "mode": "one_step"}
    sac = {"algorithm": "sac_online", "flags": "--critic-batch-norm --adam-beta1 0.5"}
    plus = {"algorithm": "fpmd_plus_online", "flags": ""}
    runs = (plus, "A-v4", 1, 40), (plus, "A-v4", 2, 42), (plus, "B-v4", 1, 7), (plus, "C-v4", 1, 3)
    runs += (sac, "A-v4", 1, 10), (sac, "A-v4", 2, 14), (sac, "B-v4", 1, 9)
    rows = [
        known | own | {"env_id": task, "seed": seed, "global_step": step, "return_mean": end + more}
        for own, task, seed, end in runs
        for step, more in zip(range(100, 700, 100), (-30, -5, 0, 0, 0, 5), strict=True)
    ]
    for row in rows:  # in 300 seconds SAC ends, and FPMD+ has 300 or 600 steps
        seconds = row["global_step"] / (2 if row["algorithm"] == "sac_online" else row["seed"])
        row["wall_time"] = seconds
    rows += [known | sac | {"env_id": "B-v4", "seed": 2, "global_step": 100, "return_mean": 0}]
    rows += [row | {"flags": "--adam-beta1 0.9", "return_mean": 99} for row in rows[:12]]
    of_sac = [row for row in rows if row["algorithm"] == "sac_online"]
    write(copy / "benchmark/results/sac_100k_cpu.csv", of_sac)
    ours = [row for row in rows if row not in of_sac]
    table, _ = tabled(copy, "plus-beside-sac", "plus_100k_cpu.csv", ours)
    # Welch by hand: variances of the means 1 and 4, so (1 + 4)^2 / (1^2 + 4^2) degrees of freedom
    half = stats.t.ppf(0.975, 25 / 17) * 5**0.5
    assert [(line["task"], line["mean of"]) for line in table] == [
        (task, measure)
        for task in ("A-v4", "B-v4")
        for measure in ("all evaluations", "the last 5", "the last when SAC ends")
    ]
    assert table[2]["FPMD+"].startswith("43.5 ± ") and table[2]["SAC, same critic"].startswith("17")
    assert table[0]["FPMD+"].startswith("36.0 ± ") and table[1]["FPMD+"].startswith("41.0 ± ")
    assert table[1]["difference"] == f"**29.0 ± {half:.1f}**"
    assert table[4]["FPMD+"] == "7.0 (1)" and table[4]["SAC, same critic"] == "9.0 (1)"
    assert table[4]["difference"] == "-2.0"


def test_the_figure_beside_sac_ends_where_runs_do(tmp_path, monkeypatch):
    """A curve per method, the mean of its seeds as far as all have come; lines for others."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    known = {"env_id": "HalfCheetah-v4", "mode": "one_step"}
    sac = {"algorithm": "sac_online", "flags": "--critic-batch-norm --adam-beta1 0.5"}
    plus = {"algorithm": "fpmd_plus_online", "flags": ""}
    slow = plus | {"flags": "--adam-beta1 0.9"}
    noisy = plus | {"flags": "--noise-scale 0.4"}
    ends = (plus, 1, 100), (plus, 2, 100), (plus, 2, 200), (slow, 1, 300), (noisy, 1, 400)
    ends += ((sac, 1, 200),)
    rows = [
        known | own | {"seed": seed, "global_step": step, "return_mean": 10 * step + seed}
        for own, seed, step in ends
    ]
    write(tmp_path / "plus.csv", rows[:-1])
    write(tmp_path / "sac_100k_cpu.csv", rows[-1:])
    labels = []
    monkeypatch.setattr(style, "label_ends", lambda panel, found, gap: labels.extend(found))
    draw_beside_sac(tmp_path / "plus.csv", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000
    told = {text: height for height, text, _ in labels}
    assert told == {
        "FPMD+ (2)": 1001.5,
        "FPMD+, slow policy (1)": 3001,
        "FPMD+, noise 0.4 (1)": 4001,
        "SAC, same critic (1)": 2001,
        "SAC, published": 6156,
        "CrossQ, published": 8112,
    }


def pixel_rows():
    """Two seeds of a task and one behind black pictures: four evaluations each, in both modes."""
    known = {"algorithm": "fpmd_meanflow_pixels_online", "flags": "", "returns": "1 2 3"}
    known |= {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0" * 40}
    known |= {"total_timesteps": 400, "num_candidates": 8}
    returns = {1: (1, 10, 20, 60), 2: (1, 40, 50, 60), 3: (9, 8, 7, 6)}
    return [
        known
        | {"env_id": "pixel_envs:Blind-v0" if seed == 3 else "a-task", "seed": seed}
        | {"global_step": 100 * (i + 1), "updates": 50 * i, "wall_time": 600 * (i + 1)}
        | {"mode": mode, "return_mean": value + 100 * (mode == "best_of_n")}
        for seed, own in returns.items()
        for i, value in enumerate(own)
        for mode in ("one_step", "best_of_n")
    ]


def test_what_is_seen_stands_above_what_is_not(copy):
    """A row per run: the mean of its last three evaluations, and the last."""
    rows = sorted(pixel_rows(), key=lambda row: -row["seed"])  # the blind one first
    table, text = tabled(copy, "pixels-cpu", "pixels_cpu.csv", rows)
    told = [(row["pictures"], row["seed"], row["one step, last three"]) for row in table]
    assert told == [
        ("of the task", "1", "30.0"),
        ("of the task", "2", "50.0"),
        ("black", "3", "7.0"),
    ]
    assert [row["one step, last"] for row in table] == ["60.0", "60.0", "6.0"]
    assert [row["best of N, last three"] for row in table] == ["130", "150", "107"]
    assert table[0]["best of N, last"] == "160"
    assert table[0]["agent steps"] == "400" and table[0]["minutes"] == "40"
    assert "of 3 episodes" in text


def test_the_figure_from_pixels_has_a_line_for_the_blind(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    write(tmp_path / "pixels.csv", pixel_rows())
    labels = []
    monkeypatch.setattr(style, "label_ends", lambda panel, found, gap: labels.extend(found))
    draw_from_pixels(tmp_path / "pixels.csv", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000
    told = {text: height for height, text, _ in labels}
    assert told == {"one step": 60, "best of 8": 160, "one step, black pictures": 6}


def test_the_figure_of_two_doors_is_of_one_step(tmp_path, monkeypatch):
    """A line per setting, the mean of its seeds, between a Gaussian's bound and two modes'."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    ends = {("particles", 1): 0.4, ("particles", 2): 0.6, ("without density", 1): 0.9}
    rows = [
        RUN | {"setting": setting, "seed": seed, "mode": mode, "return_mean": value}
        for (setting, seed), end in ends.items()
        for mode, value in (("one_step", end), ("best_of_n", 0))
    ]
    write(tmp_path / "doors.csv", rows)
    labels = []
    monkeypatch.setattr(style, "label_ends", lambda panel, found, gap: labels.extend(found))
    draw_two_doors(tmp_path / "doors.csv", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000
    told = {text: height for height, text, _ in labels}
    settings = {"particles (2)": 0.5, "without density (1)": 0.9}
    assert told == settings | {"best Gaussian": 0.534, "two even modes": 0.9375}


@pytest.fixture
def rows_drawn(monkeypatch):
    """What style.draw_rows draws and names, in two lists, in place of a picture."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    drawn, named = [], []
    monkeypatch.setattr(style, "draw_interval", lambda _, *what: drawn.append(what))
    monkeypatch.setattr(style, "name_rows", lambda _, names, colours: named.extend(names))
    monkeypatch.setattr(style, "save", lambda figure, output: None)
    return drawn, named


def test_the_figure_of_variants_has_a_row_each(tmp_path, rows_drawn):
    """The best on top, each up to the step that all have reached, seeds and interval."""
    runs = {("", 1): (0, 40, 900), ("", 2): (0, 50, 900)}
    runs |= {("--v-max 2", 1): (0, 60), ("--v-max 2", 2): (0, 80), ("--v-max 3", 1): (0, 10)}
    rows = [
        RUN
        | {"flags": f"--tau 1 {own}".strip(), "seed": seed}
        | {"global_step": 100 * i, "return_mean": value}
        for (own, seed), values in runs.items()
        for i, value in enumerate(values)
    ]
    write(tmp_path / "variants.csv", rows)
    draw_variants(tmp_path / "variants.csv", tmp_path / "x.png")
    drawn, named = rows_drawn
    assert named == ["--v-max 2", "the default", "--v-max 3"]
    assert [list(what[0]) for what in drawn] == [[60, 80], [40, 50], [10]]
    assert [what[2:4] for what in drawn] == [(70, 0), (45, 1), (10, 2)]
    assert drawn[1][1] == pytest.approx((45 - 63.53, 45 + 63.53), abs=0.01)  # 12.706 * 5


ALL_FLAGS = "--td-action best --num-atoms 1 --no-normalize-rewards --critic-lr 0.0003"


def climb_rows():
    """From the most flags to none, in no order; one run is longer, one variant lacks a seed."""
    runs = {("--critic-lr 0.0003", 1): 50, ("--critic-lr 0.0003", 3): 70}
    runs |= {("", seed): 200 + 100 * seed for seed in (1, 2, 3)}
    runs |= {(ALL_FLAGS, seed): 10 + seed for seed in (1, 2, 3)}
    rows = [
        RUN | {"flags": flags, "seed": seed, "global_step": step, "return_mean": value}
        for (flags, seed), end in runs.items()
        for step, value in ((100, 0), (200, end), (300, 9_000))
        if step < 300 or not flags
    ]
    return [row | {"updates": row["global_step"] - 50} for row in rows]


def test_a_climb_compares_each_variant_with_the_one_above(copy):
    table, text = tabled(copy, "plus-climb", "plus_climb_cpu.csv", climb_rows())
    assert [tuple(row.values()) for row in table] == [
        ("FPMD-M's learning", "3", "12.0 ± 2.5", ""),
        # seed 1: 50 - 11, seed 3: 70 - 13; 12.706 * sd / sqrt 2
        ("+ a sampled TD action, C51, normalised rewards", "2", "60.0 ± 127", "48.0 ± 114"),
        # seed 1: 300 - 50, seed 3: 500 - 70
        ("+ critics' step size 1e-3", "3", "400 ± 248", "340 ± 1,144"),
    ]
    assert "a-task, the last evaluation of 2 episodes" in text and "200 steps, 150 updates" in text


def test_the_figure_of_a_climb_keeps_its_order(tmp_path, rows_drawn):
    write(tmp_path / "climb.csv", climb_rows())
    draw_climb(tmp_path / "climb.csv", tmp_path / "x.png")
    drawn, named = rows_drawn
    assert [what[2] for what in drawn] == [12, 60, 400]
    assert [sorted(what[0]) for what in drawn] == [[11, 12, 13], [50, 70], [300, 400, 500]]
    assert named[0] == "FPMD-M's learning" and named[-1] == "+ critics' step size 1e-3"


def test_a_difference_is_bold_where_its_interval_excludes_zero():
    assert formatting.difference([101, 102, 103]) == "**102 ± 2.5**"
    assert formatting.difference([1, 2, 3]) == "2.0 ± 2.5"
    assert formatting.difference([102]) == "102"


def test_flags_that_have_a_column_elsewhere_tell_variants_apart(tmp_path):
    """In an ablation --utd and N have none: two rows called the default would be one too many."""
    values = {"": 100, "--num-atoms 1": 90, "--utd 0.5": 10, "--num-candidates 4": 50}
    rows = [
        RUN | {"flags": flags, "seed": seed, "mode": mode, "return_mean": value}
        for flags, value in values.items()
        for seed in (1, 2)
        for mode in ("one_step", "best_of_n")
    ]
    write(tmp_path / "runs.csv", rows)
    table = tables_training.ablation(tmp_path / "runs.csv", average=1).splitlines()[2:-2]
    cells = [[cell.strip() for cell in line.split("|")[2:6]] for line in table]
    assert cells == [
        ["the default", "2", "100 ± 0.0", ""],
        ["`--num-atoms 1`", "2", "90.0 ± 0.0", "**-10.0 ± 0.0**"],
        ["`--num-candidates 4`", "2", "50.0 ± 0.0", "**-50.0 ± 0.0**"],
        ["`--utd 0.5`", "2", "10.0 ± 0.0", "**-90.0 ± 0.0**"],
    ]


def test_seeds_are_drawn_where_they_were_evaluated_alike():
    """One evaluated every 25k steps and one every 10k: they meet at 50k and 100k alone."""
    every = {1: 25_000, 2: 10_000}
    runs = [
        [
            {"mode": "one_step", "global_step": step, "return_mean": step / 1000}
            for step in range(gap, 100_001, gap)
        ]
        for gap in every.values()
    ]
    steps, values = reached_by_all(runs, "one_step")
    assert steps == [50_000, 100_000] and values.tolist() == [[50, 100]] * 2


def test_a_screen_of_several_modes_says_who_acts(tmp_path):
    known = {"env_id": "a-task", "setting": "fast", "seed": 1, "returns": "1 2"}
    known |= {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0" * 40}
    rows = [
        known | {"mode": mode, "global_step": 1000 * step, "return_mean": value + step}
        for mode, value in (("one_step", 0), ("best_of_n", 10), ("sampled", 20))
        for step in (1, 2)
    ]
    write(tmp_path / "screen.csv", rows)
    alone = tables_training.screen(tmp_path / "screen.csv").splitlines()
    assert alone[2:-2] == ["| a-task | fast | 1 | 1.0 | 2.0 | `0000000` |"]
    assert alone[-1].startswith("Mean return of one step in 2 episodes, by environment step.")
    modes = ("one_step", "best_of_n")
    both = tables_training.screen(tmp_path / "screen.csv", "agent step", modes).splitlines()
    assert [line.split("|")[4:7] for line in both[2:-2]] == [
        [" one step ", " 1.0 ", " 2.0 "],
        [" best of n ", " 11.0 ", " 12.0 "],
    ]
    assert both[-1].startswith("Mean return in 2 episodes, by agent step.")


def test_rates_of_success_have_two_decimals(tmp_path):
    known = {"env_id": "a-task", "setting": "fast", "seed": 1, "returns": "0 1", "mode": "one_step"}
    known |= {"device": "a CPU", "threads": 1, "torch": "2.13.0", "commit": "0" * 40}
    returns = {1000: 0, 2000: 0.534, 3000: 1}
    rows = [known | {"global_step": step, "return_mean": returns[step]} for step in returns]
    write(tmp_path / "screen.csv", rows)
    table = tables_training.screen(tmp_path / "screen.csv").splitlines()
    assert table[2] == "| a-task | fast | 1 | 0.00 | 0.53 | 1.00 | `0000000` |"
    write(tmp_path / "screen.csv", [*rows, known | {"global_step": 4000, "return_mean": -2}])
    table = tables_training.screen(tmp_path / "screen.csv").splitlines()
    assert table[2] == "| a-task | fast | 1 | 0.0 | 0.5 | 1.0 | -2.0 | `0000000` |"


# ---------------------------------------------------------------------------- collect.py


def test_runs_become_tidy_rows(tmp_path):
    changed = {"num_candidates": 8, "compile": False, "policy_lr": [1e-4, 1e-5], "device": "cpu"}
    changed["exp_name"] = "fpmd_online_variant"  # of fpmd_online.py, or of a changed copy
    changed["env_kwargs"] = '{"exclude": true}'
    first = write_run(tmp_path, "Walker2d-v4", 2, [1, 2], [3, 4], **changed)
    second = write_run(tmp_path, "Ant-v4", 10, [5], [6], runs_dir="elsewhere", torch_threads=2)
    unfinished = write_run(tmp_path, "Ant-v4", 9, [7], [8])
    with (unfinished / "evaluations.csv").open("a") as file:
        file.write("2000,400,36")  # a row being written
    empty = tmp_path / "new run"
    empty.mkdir()
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    result = program(ROOT, "launch/collect.py", first, second, unfinished, empty, "--output", a)
    assert result.returncode == 0 and "new run" in result.stderr
    program(ROOT, "launch/collect.py", empty, unfinished, second, first, "--output", b)
    assert a.read_bytes() == b.read_bytes()

    rows = read(a)
    keys = [(r["env_id"], r["seed"], r["global_step"], r["mode"]) for r in rows]
    assert keys == [
        ("Ant-v4", "9", "1000", "one_step"),
        ("Ant-v4", "9", "1000", "best_of_n"),
        ("Ant-v4", "10", "1000", "one_step"),
        ("Ant-v4", "10", "1000", "best_of_n"),
        ("Walker2d-v4", "2", "1000", "one_step"),
        ("Walker2d-v4", "2", "1000", "best_of_n"),
        ("Walker2d-v4", "2", "2000", "one_step"),
        ("Walker2d-v4", "2", "2000", "best_of_n"),
    ]
    assert {row["flags"] for row in rows[:4]} == {""}
    # as a shell takes it
    words = """--env-kwargs '{"exclude": true}' --num-candidates 8 --policy-lr 0.0001 1e-05"""
    assert rows[4]["flags"] == f"--exp-name fpmd_online_variant {words} --no-compile"
    assert rows[7] == {
        "algorithm": "fpmd_online", "env_id": "Walker2d-v4", "seed": "2",
        "global_step": "2000", "updates": "400", "wall_time": "3600.0",
        "mode": "best_of_n", "nfe": "4", "num_candidates": "8",
        "return_mean": "4", "return_std": "1.0", "success_rate": "", "episodes_cut": "0",
        "returns": "3.0000 5.0000",
        "flags": rows[4]["flags"], "utd": "0.2", "total_timesteps": "2000",
        "python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3.17.0",
        "device": "a CPU", "threads": "2", "commit": "0123456789abcdef",
    }  # fmt: skip


def test_the_same_experiment_twice_is_refused(tmp_path):
    runs = [write_run(tmp_path / name, "Ant-v4", 1, [1], [2]) for name in ("first", "second")]
    result = program(ROOT, "launch/collect.py", *runs, "--output", tmp_path / "out.csv")
    assert result.returncode == 2 and "repeats" in result.stderr


def test_csvs_of_several_machines_become_one(tmp_path):
    """As if all runs had been on one; seed 10 comes after 9, also where the seeds are text."""
    runs = [write_run(tmp_path, "Ant-v4", seed, [1, seed], [2, 3]) for seed in (9, 10, 11)]
    here, there, whole, merged = (tmp_path / f"{name}.csv" for name in "abcd")
    program(ROOT, "launch/collect.py", *runs, "--output", whole)
    program(ROOT, "launch/collect.py", runs[1], "--output", here)
    program(ROOT, "launch/collect.py", runs[2], "--output", there)
    result = program(ROOT, "launch/collect.py", there, here, runs[0], "--output", merged)
    assert result.returncode == 0 and "3 runs" in result.stdout
    assert merged.read_bytes() == whole.read_bytes()
    # into one of its own sources
    result = program(ROOT, "launch/collect.py", here, there, runs[0], "--output", here)
    assert result.returncode == 0 and here.read_bytes() == whole.read_bytes()

    result = program(ROOT, "launch/collect.py", here, there, "--output", merged)
    assert result.returncode == 2 and "repeats" in result.stderr
    (tmp_path / "other.csv").write_text("global_step,updates\n1,2\n")
    for wrong in "other.csv", "none.csv":
        result = program(ROOT, "launch/collect.py", tmp_path / wrong, here, "--output", merged)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert wrong in result.stderr and merged.read_bytes() == whole.read_bytes()
