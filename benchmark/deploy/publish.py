"""Put a trained policy into policies/, with a row that says where it is from and how it acts.

Its episodes are those of --evaluate and more of the same: one candidate, one step, no critic.
The rows are benchmark/results/policies.csv; report.py makes the table of docs/deploy.md from them.

    python benchmark/deploy/publish.py runs/<run> --name halfcheetah
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark import RESULTS, ROOT, scripts
from benchmark.cli import Parser, run, text, whole
from benchmark.deploy import policies
from benchmark.files import exists, fail, read_table, whole_file, write_csv
from benchmark.runs import flags

import numpy as np
import torch

FOLDER, TABLE = ROOT / "policies", RESULTS / "policies.csv"
MOST_BYTES = 1_000_000
PRIVATE = "runs_dir", "resume", "evaluate", "track", "wandb_project_name", "wandb_entity"


def measure(trained: policies.Trained, name: str, episodes: int) -> dict:
    """A row of the table: where the policy is from, and the returns of so many episodes."""
    args, saved = trained.args, trained.saved
    played = policies.play(trained, episodes)
    successes = np.array(played.successes)
    script = scripts()[Path(saved["script"]).stem]
    as_written = json.loads(json.dumps(saved["args"]))  # tuples become lists, as in args.json
    return {
        "policy": name,
        "script": saved["script"],
        "env_id": args.env_id,
        "seed": args.seed,
        "total_timesteps": args.total_timesteps,
        "global_step": saved["global_step"],
        "flags": flags(as_written, script),
        "commit": saved["commit"],
        "episodes": episodes,
        "return_mean": np.mean(played.returns),
        "return_std": np.std(played.returns, ddof=1),
        # an episode that does not say so has not succeeded, where others do say it
        "success_rate": np.nan_to_num(successes).mean() if np.isfinite(successes).any() else "",
        "returns": " ".join(f"{value:.4f}" for value in played.returns),
    }


def without_private(trained: policies.Trained) -> dict:
    """The content of policy.pt, in which nothing says on whose machine it was made."""
    defaults = trained.module.Args()
    public = {name: getattr(defaults, name) for name in PRIVATE}
    return trained.saved | {"args": trained.saved["args"] | public}


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("policy", type=text, help="a run directory or its policy.pt")
    parser.add_argument("--name", type=text, required=True, help="of the file in policies/")
    words = "to play, all side by side"
    parser.add_argument("--episodes", type=whole(2, 1_000), default=50, help=words)
    words = "must be typed where it is module:Id, since a file must not decide what is imported"
    parser.add_argument("--env-id", type=text, help=words)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not options.name.replace("_", "").isalnum():
        fail(f"--name {options.name} is no name of letters, digits and _")
    source = policies.find_policy(Path(options.policy))
    if source.stat().st_size > MOST_BYTES:
        fail(f"{source} has {source.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
    torch.set_num_threads(1)
    trained = policies.read(source)
    policies.refuse_other_env(trained, options.env_id, plays=True)
    row = measure(trained, options.name, options.episodes)
    rows = read_table(TABLE, ["policy"]) if exists(TABLE) else []
    others = [other for other in rows if other["policy"] != options.name]
    FOLDER.mkdir(exist_ok=True)
    with whole_file(FOLDER / f"{options.name}.pt", "wb") as file:
        torch.save(without_private(trained), file)
    write_csv(sorted([*others, row], key=lambda row: row["policy"]), TABLE)
    print(f"policies/{options.name}.pt: return {row['return_mean']:.2f} +- {row['return_std']:.2f}")


if __name__ == "__main__":
    run(main)
