"""Copy the blocks that scripts share from one script into the others.

    python tests/sync_shared.py fpmd_online.py                  # into all that share its blocks
    python tests/sync_shared.py fpmd_online.py mvp_online.py    # into this one

A block is a function, a class or a constant at the top level of a script. Every script stays a
source that can be read and edited; test_text.py checks that shared blocks are the same text.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MVP = ["mvp_online", "mvp_offline_to_online"]
FPMD = ["fpmd_online", "fpmd_meanflow_online"]
MIRROR = [*FPMD, "dpmd_online"]
PLUS = "fpmd_plus_online"  # FPMD-M's flow; critics and learning of its own
OFFLINE = ["mvp_offline_to_online", "meanflowql_offline_to_online"]  # they start from a dataset
GELU = [*MVP, "meanflowql_offline_to_online"]  # an activation that needs no faster formula
MISH = [*MIRROR, "sac_online", PLUS]
ONLINE = [*MISH, "mvp_online"]
EVERY = [*ONLINE, *OFFLINE]

# who shares what; of the constants that differ (MODES, MAY_BE_ZERO, ...) only the use is shared
SHARED = [
    # training
    (EVERY, ["ReplayBuffer", "evaluate"]),
    (ONLINE, ["updates_due", "train"]),
    (OFFLINE, ["updates_due"]),
    # plumbing
    (EVERY, ["fail", "reason", "warn", "say", "EnvironmentFailure", "GuardedEnvs"]),
    (EVERY, ["refuse_actions", "refuse_observations", "load_simulator", "make_env", "make_envs"]),
    (EVERY, ["try_out", "choose_opengl", "write_video", "versions", "describe_machine"]),
    (EVERY, ["make_run_dir", "lock", "write_whole", "write_text", "write_json"]),
    (
        EVERY,
        ["rows_on_record", "as_text", "Run", "load_optimizer", "layout", "refuse_unlike", "load"],
    ),
    (EVERY, ["ALGORITHM", "MAY_CHANGE", "flag", "check_args", "refuse_changes", "choose_device"]),
    (EVERY, ["memory_of", "refuse_too_large", "grouped", "read_flags", "parse_args"]),
    (EVERY, ["STOPPING", "ignored", "StopSignal"]),
    (ONLINE, ["SeededEpisodes", "steps_of", "phases", "own_rules"]),
    (OFFLINE, ["SeededEpisodes", "steps_of", "phases", "own_rules"]),
    (OFFLINE, ["load_dataset", "check_numbers", "check_dataset"]),
    # speed, and what holds it together
    (EVERY, ["Captured", "go_eager", "OrEager", "run_to_the_end", "leave", "cli", "replay"]),
    (ONLINE, ["main"]),
    (MISH, ["FastMish", "accelerate"]),
    (GELU, ["accelerate"]),
    # method
    (EVERY, ["move_towards"]),
    ([*MIRROR, *GELU, PLUS], ["FirstLayer"]),
    (MISH, ["linear"]),
    (MIRROR, ["MLP", "QNetwork", "TwinCritic"]),
    ([*MIRROR, PLUS], ["TIME_DIM", "take", "select_action"]),
    (MIRROR, ["critic_loss", "mirror_descent_targets", "update_critic"]),
    (MIRROR, ["update_q_statistics", "policy_lr_at", "prepare_update", "update_alpha"]),
    (MIRROR, ["follow_steps", "act_explore", "update"]),
    ([*FPMD, PLUS], ["time_embedding", "MODES", "DEPLOYED"]),
    (FPMD, ["propose", "act_one_step", "act_best_of_n", "particle_probabilities", "cost_of"]),
    (["fpmd_meanflow_online", PLUS], ["AverageVelocityField", "OneStepPolicy"]),
    (MIRROR, ["RISING"]),
    (GELU, ["linear", "MLP", "QNetwork", "take", "select_action"]),
    (MVP, ["MeanVelocityField", "TwinCritic"]),
    (MVP, ["generate", "propose", "act_one_step", "act_best_of_n"]),
    (MVP, ["act_explore", "MODES", "DEPLOYED", "cost_of"]),
    ([*MVP, PLUS], ["prepare_update"]),
    (MVP, ["update_critic"]),
    ([PLUS, "sac_online"], ["RewardScale", "project"]),
]

# blocks that a script legitimately lacks or has otherwise, and why
CHUNKS = "actions come in chunks"
EXCEPTIONS = {
    ("mvp_offline_to_online", "ReplayBuffer"): CHUNKS,
    ("mvp_offline_to_online", "evaluate"): CHUNKS,
    ("mvp_offline_to_online", "replay"): CHUNKS,
    (PLUS, "train"): "its rewards' scale sees every step; nothing else follows steps",
    (PLUS, "own_rules"): "its flags depend on each other",
    (PLUS, "refuse_too_large"): "its critics have atoms and a depth of their own",
    (PLUS, "accelerate"): "it compiles the critics' loss too",
    ("sac_online", "train"): "its rewards' scale sees every step",
    ("sac_online", "accelerate"): "it compiles the critics' loss too",
    ("sac_online", "own_rules"): "its critics may have atoms",
    ("dpmd_online", "mirror_descent_targets"): "it has no particles",
    ("dpmd_online", "update_q_statistics"): "it has no particles",
    ("dpmd_online", "update"): "it has no particles and no bfloat16",
}


def scripts() -> dict[str, Path]:
    """Every script by its name."""
    paths = [*ROOT.glob("*_online.py"), *ROOT.glob("baselines/*_online.py")]
    return {path.stem: path for path in sorted(paths)}


def ranges(source: str) -> dict[str, list[tuple[int, int]]]:
    """First and last line of each block, counted from one; a constant may have several statements.

    A constant's statements are NAME = ... and NAME |= ..., comments behind them included.
    """
    found = {}
    for node in ast.parse(source).body:
        start = node.lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            start = min([start, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        found.setdefault(name, []).append((start, node.end_lineno))
    return found


def blocks(source: str) -> dict[str, str]:
    """The text of each block, in whole lines."""
    lines = source.splitlines(keepends=True)
    return {
        name: "".join("".join(lines[first - 1 : last]) for first, last in parts)
        for name, parts in ranges(source).items()
    }


def sharing() -> dict[str, list[list[str]]]:
    """Each shared block with the groups of scripts in which it is the same text."""
    found = {}
    for group, names in SHARED:
        for name in names:
            found.setdefault(name, []).append([s for s in group if (s, name) not in EXCEPTIONS])
    return found


def replace_blocks(source: str, new: dict[str, str]) -> str:
    """The source with these blocks' texts in place of its own, and nothing else changed."""
    lines = source.splitlines(keepends=True)
    for name, parts in ranges(source).items():
        if name in new:
            for first, last in parts:
                lines[first - 1 : last] = [""] * (last - first + 1)
            lines[parts[0][0] - 1] = new[name]
    return "".join(lines)


def sync(source: Path, targets: list[Path]) -> list[str]:
    """Copy what source shares with each target; says what was changed or is missing."""
    ours, said = blocks(source.read_text()), []
    for target in targets:
        text = target.read_text()
        theirs, new = blocks(text), {}
        for name, groups in sharing().items():
            together = any({source.stem, target.stem} <= set(group) for group in groups)
            if not together or name not in ours or ours[name] == theirs.get(name):
                continue
            if name in theirs:
                new[name] = ours[name]
                said.append(f"{target.name}: {name} copied from {source.name}")
            else:
                said.append(f"{target.name}: {name} is missing; paste it where it belongs")
        if new:
            target.write_text(replace_blocks(text, new))
    return said


def main(argv: list[str]) -> None:
    if not argv:
        raise SystemExit(__doc__)
    source, *targets = map(Path, argv)
    targets = targets or [path for name, path in scripts().items() if name != source.stem]
    for line in sync(source, targets) or ["nothing to change"]:
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
