"""Where jobs run: on this machine, or on a Ray cluster."""

import math
import os
import re
import shutil
import subprocess
import time
from benchmark.cli import say
from benchmark.files import fail
from benchmark.launch import attempt
from benchmark.launch.attempt import ended, environment, spawn
from benchmark.launch.campaign import Campaign
from benchmark.launch.jobs import Job
from pathlib import Path


def cores() -> int:
    """Those of this machine."""
    return os.cpu_count() or 1


class Local:
    """A fixed number of jobs at a time on this machine, the GPUs dealt out in turn."""

    def __init__(self, campaign: Campaign):
        places = [{}] * (campaign.workers or cores() // campaign.threads or 1)
        if campaign.workers_per_gpu:
            gpus = self.visible_gpus()
            if not gpus:
                fail("--workers-per-gpu finds no GPU; --workers-per-gpu 0 does without")
            places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * campaign.workers_per_gpu]
            places = places[: campaign.workers or None]
        self.free = [environment(campaign.threads) | place for place in places]

    def visible_gpus(self) -> list[str]:
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
        if not shutil.which("nvidia-smi"):
            return []
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        return [str(i) for i in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]

    def has_room(self) -> bool:
        return bool(self.free)

    def start(self, job: Job):
        place = self.free.pop(0)
        return spawn(job.dir, job.command, place), place

    def poll(self, handle) -> int | None:
        process, place = handle
        status = ended(process)
        if status is not None:
            self.free.append(place)
        return status

    def stop(self, handle, hard: bool) -> None:
        process, _ = handle
        if hard:
            process.kill()  # ended() finds what it leaves running
        else:
            process.terminate()  # the script saves


class Ray:
    """The same attempts as Ray tasks: one machine or many that share the runs' file system."""

    def __init__(self, campaign: Campaign):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # without --workers-per-gpu a job sees the GPUs, as it does without Ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            fail("--engine ray needs Ray: pip install -r benchmark/requirements.txt")
        self.ray, self.campaign, self.tasks = ray, campaign, 0
        address = campaign.ray_address or os.environ.get("RAY_ADDRESS", "local")
        cpus = (campaign.workers or cores() // campaign.threads or 1) * campaign.threads
        own = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            fail(f"--ray-address {address}: {error}")
        # rounded down, so that as many as asked for fit
        share = math.floor(1e4 / campaign.workers_per_gpu) / 1e4 if campaign.workers_per_gpu else 0
        if not self.places():
            say("the cluster cannot hold a single job so far")
        env = environment(campaign.threads)

        # as its source: the cluster's machines need not find this module
        ray.cloudpickle.register_pickle_by_value(attempt)

        def run_attempt(job_dir: Path, command: list[str]) -> int:
            process = spawn(job_dir, command, env)
            try:
                while (status := ended(process)) is None:
                    time.sleep(0.2)  # in Python, where a cancellation can interrupt it
                return status
            except BaseException:  # ray.cancel: the launcher was told to stop
                process.terminate()
                return process.wait()

        # no retries of Ray's own: the launcher counts deaths, whatever has died
        remote = ray.remote(num_cpus=campaign.threads, num_gpus=share, max_retries=0)
        self.attempt = remote(run_attempt)

    def places(self) -> int:
        """Jobs the machines that are there can hold: they may come and go."""
        there, per_gpu = self.ray.cluster_resources(), self.campaign.workers_per_gpu
        places = int(there.get("CPU", 0)) // self.campaign.threads
        return min(places, int(there.get("GPU", 0) * per_gpu)) if per_gpu else places

    def has_room(self) -> bool:
        return self.tasks < (self.campaign.workers or self.places())

    def start(self, job: Job):
        self.tasks += 1
        return self.attempt.remote(job.dir, job.command)

    def poll(self, handle) -> int | str | None:
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        self.tasks -= 1
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return f"Ray's {type(error).__name__}"

    def stop(self, handle, hard: bool) -> None:
        self.ray.cancel(handle, force=hard)
