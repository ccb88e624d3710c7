"""Draw how trained policies turn noise into actions: docs/figures/trajectories.png.

Both scripts learn Reacher-v4, whose actions are 2-D, and their policies are put aside on the way.
Top: from 20 noises to actions at one state, the same in all panels: where the late FPMD-R policy
is after 10 steps of its own episode (reset seed 0, one Euler step per action). Bottom left: the
distance between what T steps reach and what 200 Euler steps reach from the same noise. Bottom
right: the same for T = 1 during training, next to the spread of the actions. FPMD-M's Euler steps
follow its instantaneous velocity u(s, z, t, t). Needs matplotlib (benchmark/requirements.txt).

    python benchmark/figures/trajectories.py --train runs/trajectories     # all: about an hour
    python benchmark/figures/trajectories.py --policies runs/trajectories  # draws it again

The first trains what the folder lacks (stopped and started again, it goes on from the last policy),
measures all of them into benchmark/results/one_step_error.csv and draws; the second only draws.
A policy of an intermediate step is what a run with that --total-timesteps ends with; then
--resume RUN with the next larger --total-timesteps goes on, which changes nothing about the run:

    python fpmd_online.py --env-id Reacher-v4 [...] --runs-dir FOLDER --total-timesteps 2000
    cp RUN/policy.pt FOLDER/fpmd_online_2000.pt
    python fpmd_online.py --resume RUN --total-timesteps 3000
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import FIGURES, RESULTS
from benchmark.cli import Parser, folder, output, run
from benchmark.files import fail, read_json, read_table, whole_file, write_csv
from benchmark.report import style
from benchmark.runs import read_evaluations

import torch
from torch import Generator, Tensor, nn

import fpmd_meanflow_online
import fpmd_online

ENV_ID, SEED = "Reacher-v4", 1
STEPS = 2_000, 3_000, 5_000, 8_000, 13_000, 20_000, 40_000  # when policies are put aside
EARLY, LATE = 3_000, 40_000  # the two that are drawn
FLAGS = f"--env-id {ENV_ID} --seed {SEED} --learning-starts 1000 --utd 0.5 --num-candidates 8 "
FLAGS += "--hidden-dim 128 --alpha-interval 50 --eval-every 1000 --compile --torch-threads 1"
SCRIPTS = {fpmd_online: "--flow-steps 10", fpmd_meanflow_online: ""}  # and flags of one alone
NAMES = {fpmd_online: "FPMD-R", fpmd_meanflow_online: "FPMD-M"}

EPISODES, EPISODE_STEPS, RESET_SEED = 4, 50, 0  # 200 observations; no run of SEED has these
NOISES, FLOW_STEPS, FINE = 50, (1, 2, 3, 5, 10, 20, 50), 200
DRAWN_STEP, DRAWN_NOISES = 10, 20  # of the first episode; per panel
CSV = RESULTS / "one_step_error.csv"


# ---------------------------------------------------------------------------- training
def policy_file(folder: Path, script: ModuleType, step: int) -> Path:
    return folder / f"{script.__name__}_{step}.pt"


def find_run(folder: Path, script: ModuleType) -> Path | None:
    """The script's run directory in folder, if it came as far as a checkpoint."""
    found = sorted(folder.glob(f"{ENV_ID}__{script.__name__}__{SEED}__*/checkpoint.pt"))
    if len(found) > 1:
        fail(f"{found[0].parent} is not the only run of its kind there: leave one")
    return found[0].parent if found else None


def train(folder: Path) -> None:
    """Run the scripts from step to step until folder holds every policy."""
    folder.mkdir(parents=True, exist_ok=True)
    for (script, own_flags), step in product(SCRIPTS.items(), STEPS):
        file = policy_file(folder, script, step)
        if file.exists():
            continue
        run = find_run(folder, script)
        flags = ["--resume", run] if run else [*FLAGS.split(), *own_flags.split()]
        flags += [] if run else ["--runs-dir", folder]
        command = [sys.executable, script.__file__, *flags, "--total-timesteps", step]
        command = [str(word) for word in command]
        print(" ".join(command), flush=True)
        if code := subprocess.run(command).returncode:
            raise RuntimeError(f"{script.__name__} ended with status {code}")
        source = find_run(folder, script) / "policy.pt"
        if (got := load(source)["global_step"]) != step:
            fail(f"{source} is of step {got}, too late for {file}: remove the run directory")
        with source.open("rb") as policy, whole_file(file, "wb") as copy:
            shutil.copyfileobj(policy, copy)


# ---------------------------------------------------------------------------- policies
def load(file: Path) -> dict:
    """What a script has saved as policy.pt."""
    try:
        saved = torch.load(file, weights_only=True)
        needed = {"policy", "args", "global_step"}
        if needed <= set(saved):
            return saved
    except Exception:  # torch raises many kinds for a damaged file
        pass
    fail(f"{file} is missing, damaged or no policy.pt")


def load_policy(folder: Path, script: ModuleType, step: int) -> tuple[nn.Module, float]:
    """A policy that train has put aside, and the scale of the noise it starts from."""
    file = policy_file(folder, script, step)
    if not file.exists():
        fail(f"{file} is missing; --train {folder} makes it")
    saved, env = load(file), script.make_env(ENV_ID)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = script.Agent(obs_dim, act_dim, script.Args(**saved["args"]), torch.device("cpu"))
    agent.acting_policy.load_state_dict(saved["policy"])
    return agent.acting_policy, saved["args"]["prior_std"]


def follow(script: ModuleType, policy: nn.Module, obs: Tensor, z: Tensor, steps: int) -> Tensor:
    """Euler's method along the velocity, for FPMD-M u(s, z, t, t): points (steps + 1, ..., 2)."""
    points = [z]
    for k in range(steps):
        t = torch.full((1,), k / steps)  # of the way from noise to action
        if script is fpmd_online:
            velocity = policy(obs, points[-1], t)
        else:  # noise is at time 1
            velocity = -policy(obs, points[-1], 1 - t, 1 - t)
        points.append(points[-1] + velocity / steps)
    return torch.stack(points)


def samplers(script: ModuleType) -> dict[str, Callable]:
    """Ways from noise to action, (policy, obs, z, T) -> actions; the first is the script's own."""
    if script is fpmd_online:
        return {"euler": script.generate}
    return {"jumps": script.generate, "euler": lambda *args: follow(script, *args)[-1]}


def visited(script: ModuleType, policy: nn.Module, prior_std: float) -> Tensor:
    """Observations (steps, episodes, obs_dim) of the policy as deployed: one evaluation."""
    envs = script.make_envs(ENV_ID, EPISODES)
    rng, rows = Generator().manual_seed(RESET_SEED), []
    obs, _ = envs.reset(seed=[RESET_SEED] * EPISODES)
    for _ in range(EPISODE_STEPS):
        rows.append(torch.as_tensor(obs))
        z = prior_std * torch.randn((EPISODES, policy.act_dim), generator=rng)
        obs, *_ = envs.step(script.generate(policy, rows[-1], z, 1).clamp(-1, 1).numpy())
    envs.close()
    return torch.stack(rows)


# ---------------------------------------------------------------------------- measuring
def rms(x: Tensor) -> float:
    """Root mean square length of vectors (..., act_dim)."""
    return x.square().sum(-1).mean().sqrt().item()


def measure(folder: Path, script: ModuleType, step: int) -> list[dict]:
    """Rows of one_step_error.csv: actions (unclipped) of T steps against those of FINE steps."""
    policy, prior_std = load_policy(folder, script, step)
    obs = visited(script, policy, prior_std).flatten(0, 1)
    shape = NOISES, len(obs), policy.act_dim
    z = prior_std * torch.randn(shape, generator=Generator().manual_seed(RESET_SEED))
    run = {"algorithm": script.__name__, "env_id": ENV_ID, "seed": SEED, "global_step": step}
    versions = read_json(find_run(folder, script) / "versions.json", ["commit"])
    ways, rows = samplers(script), []
    references = {name: way(policy, obs, z, FINE) for name, way in ways.items()}
    for (sampler, way), flow_steps in product(ways.items(), FLOW_STEPS):
        actions = way(policy, obs, z, flow_steps)
        for reference, ends in references.items():
            if reference not in ("euler", sampler):  # Euler steps against jumps say nothing
                continue
            row = run | {"sampler": sampler, "flow_steps": flow_steps}
            row |= {"reference": f"{reference} {FINE}", "error": rms(actions - ends)}
            row |= {"spread": rms(ends - ends.mean(0))}  # over the noises of each state
            row |= {"observations": len(obs), "noises": NOISES, "commit": versions["commit"]}
            rows.append(row)
    return rows


def write(rows: list[dict], path: Path) -> None:
    digits = [{key: f"{row[key]:.6g}" for key in ("error", "spread")} for row in rows]
    write_csv([row | short for row, short in zip(rows, digits, strict=True)], path)
    print(f"{len(rows)} rows in {path}")


def read(path: Path) -> list[dict]:
    """What write wrote, numbers as numbers."""
    if not path.exists():
        fail(f"{path} is missing; --train FOLDER makes it")
    needed = "algorithm", "sampler", "reference"
    rows = read_table(path, needed, ["global_step", "flow_steps", "error", "spread"])
    for row in rows:
        row |= {key: int(row[key]) for key in ("global_step", "flow_steps")}
        row |= {key: float(row[key]) for key in ("error", "spread")}
    return rows


def one_step_return(folder: Path, script: ModuleType, step: int) -> float:
    """Mean over the 10 episodes that the script evaluated at that step."""
    run_dir = find_run(folder, script)
    if run_dir is None:
        fail(f"{folder} has no run of {script.__name__}")
    for row in read_evaluations(run_dir):
        if row["mode"] == "one_step" and int(row["global_step"]) == step:
            return float(row["return_mean"])
    fail(f"{run_dir} has no evaluation of step {step}")


# ---------------------------------------------------------------------------- drawing
def draw_paths(panel, folder: Path, script: ModuleType, step: int, obs: Tensor) -> None:
    """From noises to actions at one state (1, obs_dim): finely, and in one evaluation."""
    policy, prior_std = load_policy(folder, script, step)
    rng = Generator().manual_seed(RESET_SEED)
    z = prior_std * torch.randn((DRAWN_NOISES, policy.act_dim), generator=rng)
    paths, once = follow(script, policy, obs, z, FINE), script.generate(policy, obs, z, 1)
    if script is fpmd_online:
        torch.testing.assert_close(paths[-1], script.generate(policy, obs, z, FINE))
    panel.add_patch(
        style.pyplot().Rectangle((-1, -1), 2, 2, fill=False, color="0.85", lw=0.8, zorder=0)
    )
    panel.plot(*paths.unbind(2), color=style.GREY, lw=1.6, zorder=1)
    panel.plot(*torch.stack([z, once]).unbind(2), color=style.SECOND, lw=0.5, zorder=2)
    panel.scatter(*z.T, s=8, color=style.DARK, lw=0, zorder=3, label="noise")
    fine, one = (
        f"after {FINE} Euler steps along the velocity (grey)",
        "after one network evaluation",
    )
    panel.scatter(*paths[-1].T, s=20, color=style.FIRST, lw=0, zorder=4, label=fine)
    panel.scatter(*once.T, s=18, color=style.SECOND, marker="x", lw=1.0, zorder=5, label=one)
    panel.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
    panel.set_title(label(script, step))
    panel.spines[:].set_visible(False)
    panel.set_xlabel(f"{step:,} steps, return {one_step_return(folder, script, step):.1f}")


def label(script: ModuleType, step: int) -> str:
    return f"{NAMES[script]} {'early' if step == EARLY else 'late'}"


def select(rows: list[dict], script: ModuleType, **key: int) -> list[dict]:
    """The rows of the script's own sampler, against Euler's method."""
    key |= {"algorithm": script.__name__, "sampler": next(iter(samplers(script)))}
    key["reference"] = f"euler {FINE}"
    return [row for row in rows if key.items() <= row.items()]


def draw_curve(panel, x: tuple, y: list[float], text: str, script: ModuleType, line: str) -> None:
    """A line with its name before the first point."""
    colour = style.ALGORITHMS[script.__name__]
    panel.plot(x, y, line, color=colour, ms=4, lw=1.2)
    place = {"textcoords": "offset points", "ha": "right", "va": "center", "color": colour}
    panel.annotate(text, (x[0], y[0]), (-7, 0), **place)


def draw_steps(panel, rows: list[dict]) -> None:
    """Error against the number of steps, early and late."""
    for script, step in product(SCRIPTS, (EARLY, LATE)):
        errors = [row["error"] for row in select(rows, script, global_step=step)]
        line = "o--" if step == EARLY else "o-"
        draw_curve(panel, FLOW_STEPS, errors, label(script, step), script, line)
    panel.set(xscale="log", yscale="log", xlim=(0.17, 60))
    panel.set_xticks(FLOW_STEPS, FLOW_STEPS)
    panel.set_xticks([], minor=True)
    panel.set(title="Error of T steps", xlabel="T, steps from noise to action")
    panel.set_ylabel(f"RMS distance to {FINE} Euler steps")


def draw_training(panel, rows: list[dict]) -> None:
    """One-step error, and the spread of the actions, against environment steps."""
    for script, (name, line) in product(SCRIPTS, {"error": "o-", "spread": ":"}.items()):
        values = [row[name] for row in select(rows, script, flow_steps=1)]
        draw_curve(panel, STEPS, values, f"{NAMES[script]} {name}", script, line)
    panel.set(xscale="log", yscale="log", xlim=(STEPS[0] / 5, STEPS[-1] * 1.2))
    panel.set_xticks(STEPS, [f"{step // 1000}k" for step in STEPS])
    ticks = 0.02, 0.05, 0.1, 0.2, 0.5
    panel.set_yticks(ticks, ticks)
    for axis in panel.xaxis, panel.yaxis:
        axis.set_ticks([], minor=True)
    panel.set(title="One step: error, and spread of the actions", xlabel="environment steps")
    panel.set_ylabel("RMS distance")


def draw(folder: Path, rows: list[dict], output: Path) -> None:
    """Four panels of paths above the two of errors."""
    policy, prior_std = load_policy(folder, fpmd_online, LATE)
    obs = visited(fpmd_online, policy, prior_std)[DRAWN_STEP, :1]
    figure = style.pyplot().figure(figsize=(style.WIDTH, 5.3))
    *paths, steps, training = figure.subplot_mosaic("abcd;eeff", height_ratios=(1, 1.15)).values()
    for panel, (script, step) in zip(paths, product(SCRIPTS, (EARLY, LATE)), strict=True):
        draw_paths(panel, folder, script, step, obs)
    handles, labels = paths[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    draw_steps(steps, rows)
    draw_training(training, rows)
    style.save(figure, output)


@torch.no_grad()
def main() -> None:
    parser = Parser(__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--train", type=folder, metavar="FOLDER", help="train, measure and draw")
    where.add_argument("--policies", type=Path, metavar="FOLDER", help="draw, from --csv")
    default, text = str(FIGURES / "trajectories.png"), "picture to write"
    parser.add_argument("--output", type=output(*style.SUFFIXES), default=default, help=text)
    parser.add_argument("--csv", type=output(), default=str(CSV), help="the measurements")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train:
        train(args.train)
        measured = [measure(args.train, *which) for which in product(SCRIPTS, STEPS)]
        write([row for rows in measured for row in rows], args.csv)
    draw(args.train or args.policies, read(args.csv), args.output)


if __name__ == "__main__":
    run(main)
