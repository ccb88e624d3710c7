"""policies/: every file has a row that says where it is from, and earns what the row says."""

import csv
import importlib.util
import math
import re
import subprocess
import sys
from benchmark import RESULTS, ROOT
from benchmark.deploy import publish
from benchmark.files import Refused
from benchmark.report import tables_deploy

import numpy as np
import pytest
import torch
from test_export import policy_file

FILES = sorted((ROOT / "policies").glob("*.pt"))
TABLE = RESULTS / "policies.csv"
ROWS = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []


def test_files_and_rows_belong_together():
    assert [file.stem for file in FILES] == [row["policy"] for row in ROWS]
    for file, row in zip(FILES, ROWS, strict=True):
        saved = torch.load(file, weights_only=True)
        names = "script", "commit", "global_step"
        assert [str(saved[name]) for name in names] == [row[name] for name in names]
        assert saved["args"]["env_id"] == row["env_id"] and re.fullmatch(
            r"[0-9a-f]{40}", row["commit"]
        )
        values = np.array(row["returns"].split(), float)
        assert len(values) == int(row["episodes"]) >= 50
        assert float(row["return_mean"]) == pytest.approx(values.mean(), abs=1e-3)
        assert float(row["return_std"]) == pytest.approx(values.std(ddof=1), abs=1e-3)
        assert saved["args"]["runs_dir"] == "runs" and not saved["args"]["resume"]
    assert sum(file.stat().st_size for file in FILES) <= 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row["policy"] for row in ROWS])
def test_a_policy_earns_what_its_row_says(row, tmp_path):
    """Ten episodes of --evaluate, within 3.3 standard errors of the row's mean.

    And a thousandth of it: another processor rounds in another way.
    """
    module = row["env_id"].partition(":")[0]
    if module != row["env_id"] and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    command = [sys.executable, ROOT / row["script"], "--env-id", row["env_id"]]
    file = ROOT / "policies" / f"{row['policy']}.pt"
    command += ["--evaluate", file, "--eval-episodes", "10", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    returns = [float(x) for x in re.findall(r"episode \d+: return (\S+)", done.stdout)]
    assert len(returns) == 10
    mean, std = float(row["return_mean"]), float(row["return_std"])
    error = math.sqrt(1 / 10 + 1 / int(row["episodes"])) * std
    assert abs(np.mean(returns) - mean) <= 3.3 * error + 1e-3 * abs(mean)


# ---------------------------------------------------------------------------- publish.py
@pytest.fixture
def publish_to(tmp_path, monkeypatch):
    """publish.py with its folder and table here."""
    monkeypatch.setattr(publish, "FOLDER", tmp_path / "policies")
    monkeypatch.setattr(publish, "TABLE", tmp_path / "policies.csv")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, words)])
        publish.main()
        return list(csv.DictReader((tmp_path / "policies.csv").open()))

    return call


def test_publishing_copies_and_writes_a_row(publish_to, tmp_path):
    """All but where it was made, and its episodes; the same name again replaces its row alone."""
    path = policy_file("fpmd_online", tmp_path, env_id="Hopper-v4")
    content = torch.load(path, weights_only=True)
    content["args"] |= {"runs_dir": "/home/me", "wandb_entity": "we", "track": True}
    torch.save(content, path)
    (first,) = publish_to(path, "--name", "b", "--episodes", 3)
    kept = torch.load(tmp_path / "policies/b.pt", weights_only=True)
    assert kept["args"].pop("runs_dir") == "runs" and content["args"].pop("runs_dir") == "/home/me"
    assert kept["args"].pop("wandb_entity") is None and not kept["args"].pop("track")
    assert kept["args"].items() <= content["args"].items() and set(kept) == set(content)
    for name, value in content["policy"].items():
        assert kept["policy"][name].equal(value)
    played = publish.policies.play(publish.policies.read(path), 3)
    returns = np.array(first["returns"].split(), float)
    np.testing.assert_allclose(returns, played.returns, atol=1e-4)
    assert float(first["return_mean"]) == pytest.approx(np.mean(played.returns))
    assert float(first["return_std"]) == pytest.approx(np.std(played.returns, ddof=1))
    assert len(set(played.returns)) == 3 and first["success_rate"] == ""
    assert first["flags"] == "--flow-steps 3 --prior-std 0.7 --hidden-dim 16"
    assert [row["policy"] for row in publish_to(path, "--name", "a", "--episodes", 2)] == ["a", "b"]
    rows = publish_to(path, "--name", "b", "--episodes", 2)
    assert [(row["policy"], row["episodes"]) for row in rows] == [("a", "2"), ("b", "2")]
    table = tables_deploy.policies(tmp_path / "policies.csv")
    command = f"`python fpmd_online.py --env-id Hopper-v4 --seed {first['seed']} --total-timesteps"
    assert command in table and "| 321 |" in table
    publish.write_csv([rows[0] | {"flags": ""}], tmp_path / "policies.csv")
    assert re.search(r"--total-timesteps \d+`", tables_deploy.policies(tmp_path / "policies.csv"))


def test_silence_is_no_success_where_others_succeed(publish_to, tmp_path, monkeypatch):
    """As in --evaluate; where no episode says anything there is no rate."""
    path = policy_file("fpmd_online", tmp_path, env_id="Hopper-v4")
    for successes, rate in ([1, np.nan, 1, np.nan], "0.5"), ([np.nan] * 4, ""):
        played = publish.policies.Episodes([1.0] * 4, successes, obs=None, noise=None)
        monkeypatch.setattr(publish.policies, "play", lambda *_, played=played: played)
        (row,) = publish_to(path, "--name", "b", "--episodes", 4)
        assert row["success_rate"] == rate


def test_what_cannot_be_published_leaves_nothing(publish_to, tmp_path, monkeypatch):
    path = policy_file("fpmd_online", tmp_path)
    for words in (
        [path, "--name", "../b"],
        [path, "--name", "b", "--episodes", 1],
        [path, "--name", "b"],  # would import probe_envs
        [tmp_path / "nothing", "--name", "b"],
    ):
        with pytest.raises((SystemExit, Refused)):
            publish_to(*words)
    assert not (tmp_path / "policies").exists() and not (tmp_path / "policies.csv").exists()
