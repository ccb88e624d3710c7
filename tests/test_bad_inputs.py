"""Every refusal is one line on stderr with status 2 and leaves nothing behind: bad_inputs.py's
hundreds of cases, each run as a user would, in processes that a warm one forks."""

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bad_inputs import (
    PROGRAMS,
    Case,
    cases_of_runs,
    cases_without_runs,
    numbered,
    program_cases,
    small,
    write_dataset,
)
from conftest import FILES, OF_NUMBERS, as_flags
from fork_server import ForkServer, Result

pytestmark = pytest.mark.slow
NUMBERS = itertools.count()
AT_ONCE = 2  # programs that run side by side


@pytest.fixture(scope="session")
def run_dirs(server, tmp_path_factory):
    """A complete run of every script."""
    found = {}
    for name in OF_NUMBERS:
        folder = tmp_path_factory.mktemp(name)
        write_dataset(folder)
        result = server.run(FILES[name], as_flags(small(name)), folder)
        assert result.status == 0, result.err
        (found[name],) = folder.glob("runs/*")
    return found


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, to the byte."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def lines_of(case: Case, err: str) -> list[str]:
    """What is not empty; argparse's usage, which the benchmark's programs print first, aside."""
    if case.program in PROGRAMS.values():
        err = re.sub(r"\Ausage: .*\n(?:[ \t]+.*\n)*", "", err)
    return [line for line in err.splitlines() if line.strip()]


def faults(case: Case, result: Result, before: dict, after: dict) -> list[str]:
    """What is wrong with the answer; nothing, if it is one line, status 2 and no file."""
    found = []
    if result.status is None:
        found.append("hangs")
    elif result.status not in case.statuses:
        found.append(f"status {result.status}")
    if result.traceback:
        found.append("traceback")
    lines = lines_of(case, result.err)
    if len(lines) != 1 and not result.traceback:
        found.append(f"{len(lines)} lines")
    line = lines[-1] if lines else ""
    if len(lines) == 1 and not line.startswith(tuple(case.prefixes)):
        found.append("no prefix")
    if len(line) > 1_000:
        found.append(f"{len(line)} characters")
    if lines and case.words and not any(word in result.err for word in case.words):
        found.append(f"without {' or '.join(map(repr, case.words[:2]))}")
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key, 0) != after.get(key, 0)
    )
    if changed:
        found.append(
            f"changed {changed[0]}" + (f" and {len(changed) - 1} more" if changed[1:] else "")
        )
    return found


def try_case(case: Case, server: ForkServer, root: Path) -> tuple[str, str, str] | None:
    """None if the answer is right, else a row of the table."""
    folder = root / str(next(NUMBERS))
    folder.mkdir()
    if case.prepare:
        case.prepare(folder)
    before = listing(folder)
    result = server.run(case.program, case.argv, folder, case.env, **case.options)
    found = faults(case, result, before, listing(folder))
    shutil.rmtree(folder)
    last = result.err.strip().splitlines()[-1:] or [""]
    return (case.name, ", ".join(found), last[0]) if found else None


def assert_refused(cases, server: ForkServer, root: Path) -> None:
    cases = numbered(cases)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda case: try_case(case, server, root), cases))
    wrong = [row for row in rows if row]
    table = "\n".join(
        f"{name[:58]:58s} | {what[:60]:60s} | {last[:90]}" for name, what, last in wrong
    )
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(cases)} answers are wrong\n{table}", pytrace=False)


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_flags_and_environments_are_refused_in_one_line(name, server, tmp_path):
    assert_refused(cases_without_runs(name), server, tmp_path)


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_files_of_runs_are_refused_in_one_line(name, server, run_dirs, tmp_path):
    """Damaged, foreign, inconsistent ones, and command lines that do not fit them."""
    assert_refused(cases_of_runs(name, run_dirs), server, tmp_path)


@pytest.mark.parametrize("name", PROGRAMS)
def test_benchmark_programs_refuse_in_one_line(name, server, tmp_path):
    assert_refused(program_cases(name), server, tmp_path)


def test_hundreds_of_cases_over_all_programs(run_dirs):
    """And no two that are the same."""
    cases = [case for name in OF_NUMBERS for case in cases_without_runs(name)]
    cases += [case for name in OF_NUMBERS for case in cases_of_runs(name, run_dirs)]
    cases += [case for name in PROGRAMS for case in program_cases(name)]
    assert len(cases) >= 400 and {case.program.stem for case in cases} == {*OF_NUMBERS, *PROGRAMS}


def test_a_wrong_answer_is_seen():
    """The judge of all others: each kind of fault, and none in a refusal as it should be."""
    case = Case("x", FILES["fpmd_online"], [], ["--gamma"])
    line = "fpmd_online.py: error: --gamma is wrong\n"
    trace = "Traceback (most recent call last):\n  File\nValueError: --gamma\n"
    assert faults(case, Result(2, "", line), {}, {}) == []
    answers = [Result(1, "", line), Result(None, "", line), Result(2, "", ""), Result(2, "", trace)]
    answers += [Result(2, "", line * 2), Result(2, "", line.replace("gamma", "tau"))]
    answers += [Result(2, "", f"usage: no\n{line}"), Result(2, "", line[10:])]
    assert all(len(faults(case, answer, {}, {})) == 1 for answer in answers)
    for before, after in ({}, {"a": b""}), ({"a": b""}, {}), ({"a": b"1"}, {"a": b"2"}):
        assert faults(case, Result(2, "", line), before, after) == ["changed a"]
