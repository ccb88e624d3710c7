"""Write a small offline dataset for an OGBench task, without a download, in OGBench's .npz format.

A scripted, noisy expert plays in the task's real environment. Nobody tells it the task that will
be learnt: it moves a cube to random places, or walks to random cells, again and again. Which of
its steps succeed at a task is found out later, when the dataset is loaded for that task.

    cube-*        OGBench's own planner for picking up and placing a cube, with noise on its plan
    scene         the same, and its planners for a drawer, a window and two buttons
    puzzle-*      its planner for pressing buttons
    pointmaze-*   along the shortest way through the cells, with noise on every action

    python benchmark/measure/make_dataset.py cube-single --output data/cube-single-play-v0.npz
    python benchmark/measure/make_dataset.py pointmaze-medium \\
        --output data/pointmaze-medium-navigate-v0.npz

The official datasets have 1,000,000 steps, episodes of 1,000; these are meant for tests and for
runs on a CPU. The same seed gives the same file.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark.cli import Parser, number, output, run, whole
from benchmark.files import fail, whole_file

import gymnasium as gym
import numpy as np

COLUMNS = "observations", "actions", "terminals", "qpos", "qvel"


def arm_episode(env: gym.Env, noise: float, seed: int):
    """Yield (observation, action, info) of one episode: one target's plan, then another's."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    fist = "puzzle" in env.spec.id  # the gripper stays closed where there is nothing to grasp
    planners = {
        "cube": CubePlanOracle(env=env, noise=noise),
        "button": ButtonPlanOracle(env=env, noise=noise, gripper_always_closed=fist),
        "drawer": DrawerPlanOracle(env=env, noise=noise),
        "window": WindowPlanOracle(env=env, noise=noise),
    }
    obs, info = env.reset(seed=seed)
    planner = planners[info["privileged/target_task"]]
    planner.reset(obs, info)
    over = False
    while not over:
        action = np.clip(planner.select_action(obs, info), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        yield obs, action, info
        obs, over = next_obs, terminated or truncated
        if planner.done:
            obs, info = env.unwrapped.set_new_target(return_info=True)
            planner = planners[info["privileged/target_task"]]
            planner.reset(obs, info)


def maze_episode(env: gym.Env, noise: float, seed: int):
    """Yield (observation, action, info) of one episode: to a random cell, then to another."""
    rng, maze = np.random.default_rng(seed), env.unwrapped
    free = np.argwhere(maze.maze_map == 0)
    start, goal = (tuple(cell) for cell in rng.choice(free, 2, replace=False))
    obs, _ = env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
    over = False
    while not over:
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        direction = subgoal - maze.get_xy()
        action = direction / (np.linalg.norm(direction) + 1e-6) + noise * rng.standard_normal(2)
        next_obs, _, terminated, truncated, info = env.step(np.clip(action, -1, 1))
        yield obs, np.clip(action, -1, 1), info
        obs, over = next_obs, terminated or truncated
        if info["success"]:
            maze.set_goal(goal_ij=tuple(rng.choice(free)))


def generate(name: str, steps: int, length: int, noise: float | None, seed: int) -> dict:
    """Columns of a dataset of `steps` transitions in episodes of `length`.

    As in OGBench's files an episode has one row more than transitions: its last row, the one with
    terminals = 1, holds the last observation and an action that led nowhere.
    """
    family = name.split("-")[0] if re.fullmatch("[a-z0-9-]+", name) else ""
    if family in ("cube", "scene", "puzzle"):
        options, episode, usual_noise = {"mode": "data_collection"}, arm_episode, 0.1
    elif family == "pointmaze":
        options, episode, usual_noise = {}, maze_episode, 0.5
    else:
        fail(f"{name!r} is none of cube-*, scene, puzzle-*, pointmaze-*")
    options |= {"terminate_at_goal": False, "max_episode_steps": length + 1}
    noise = usual_noise if noise is None else noise
    try:
        env = gym.make(f"ogbench:{name}-v0", **options)
    except ImportError:
        fail("OGBench is missing: pip install ogbench==1.2.2")
    except gym.error.Error as error:
        fail(f"{name!r} is no task of OGBench: {error}")
    names = [*COLUMNS, "button_states"] if family in ("scene", "puzzle") else COLUMNS
    columns = {key: [] for key in names}
    for index in range(-(-steps // length)):
        np.random.seed([seed, index])  # noqa: NPY002  what OGBench's planner and mazes draw from
        for obs, action, info in episode(env, noise, 1000 * seed + index):
            row = obs, action, False, info["prev_qpos"], info["prev_qvel"]
            row = dict(zip(COLUMNS, row, strict=True))
            row["button_states"] = info.get("prev_button_states")
            for key in names:
                columns[key].append(row[key])
        columns["terminals"][-1] = True
    dtype = dict.fromkeys(names, np.float32) | {"terminals": bool, "button_states": np.int64}
    return {key: np.array(values, dtype[key]) for key, values in columns.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help="environment without version: cube-single, pointmaze-medium")
    parser.add_argument("--output", type=output(".npz"), required=True, help="the .npz to write")
    text = "transitions (default 100,000), rounded up to whole episodes"
    parser.add_argument("--steps", type=whole(1, 10**8), default=100_000, help=text)
    text = "transitions per episode (default 1,000)"
    parser.add_argument("--episode-length", type=whole(1, 10**5), default=1000, help=text)
    text = "the expert's noise (pointmaze 0.5, others 0.1)"
    parser.add_argument("--noise", type=number(0, 1000), help=text)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="numpy's (default 0)")
    args = parser.parse_args()
    data = generate(args.name, args.steps, args.episode_length, args.noise, args.seed)
    with whole_file(args.output, "wb") as file:
        np.savez_compressed(file, **data)
    episodes = int(data["terminals"].sum())
    print(f"{args.output}: {len(data['actions']) - episodes:,} transitions in {episodes} episodes")


if __name__ == "__main__":
    run(main)
