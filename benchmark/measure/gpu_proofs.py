"""gpu.py's first stage: the card, and the tests that need one."""

import json
import os
import shutil
import subprocess
import sys
from benchmark import ROOT
from benchmark.files import write_csv
from benchmark.measure.gpu_job import Failed, Job, origin


def machine(job: Job) -> dict:
    """Versions and the card."""
    code = (
        "import json, platform, os, torch, gymnasium, mujoco, numpy\n"
        "p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, "
        "'gymnasium': gymnasium.__version__, 'mujoco': mujoco.__version__, "
        "'numpy': numpy.__version__, 'cores': os.cpu_count(), 'card': p and p.name, "
        "'memory_gib': p and round(p.total_memory / 2**30, 1), "
        "'multiprocessors': p and p.multi_processor_count}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Failed(done.stderr[-2000:])
    found = json.loads(done.stdout)
    if smi := shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        done = subprocess.run([smi, query, "--format=csv"], capture_output=True, text=True)
        found["nvidia_smi"] = done.stdout.strip()
    return found


def pytest_runtest_logreport(report) -> None:
    """Pytest, with this as a plugin, writes each outcome to $GPU_REPORT as soon as it has it."""
    path = os.environ.get("GPU_REPORT")
    if not path or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid.split("::")[-1], "outcome": report.outcome}
        row |= {"seconds": round(report.duration, 1), "properties": dict(report.user_properties)}
        if report.failed:
            row["why"] = report.longreprtext[-1500:]
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def tests(job: Job) -> dict:
    """tests/test_cuda.py, every outcome on disk at once."""
    report = (job.output / "tests.jsonl").resolve()
    report.unlink(missing_ok=True)
    env = {"GPU_REPORT": str(report), "PYTHONPATH": str(ROOT)}
    env["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    workers = "2" if job.smoke else "10"
    command = ["-m", "pytest", "-p", "benchmark.measure.gpu_proofs", "-n", workers]
    command += ["-q", "--tb=short", "-m", "cuda", "tests/test_cuda.py"]
    if job.smoke:
        command += ["-k", "test_a_graph or (test_main_trains and eager and mvp)"]
    process = job.start("tests", command, env=env)
    failed = None
    try:
        job.wait("tests", process, 240)
    except Failed as error:
        failed = error
    rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    for row in rows:
        row["properties"] = "; ".join(f"{k}: {v}" for k, v in row["properties"].items())
        print(
            f"    {row['outcome']:8s} {row['seconds']:6.1f} s  {row['test']}  {row['properties']}"
        )
        if row["outcome"] == "failed":
            print("\n".join(f"        {line}" for line in row["why"].splitlines()[-6:]))
        row["why"] = row.get("why", "")
    if rows:
        write_csv([row | origin(job) for row in rows], job.output / f"prove_{job.device}.csv")
    if failed:
        raise failed
    return {
        outcome: sum(row["outcome"] == outcome for row in rows)
        for outcome in {row["outcome"] for row in rows}
    }
