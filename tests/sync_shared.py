"""Copy the blocks that scripts share from one script into the others.

    python tests/sync_shared.py fpmd_online.py                  # into all that share its blocks
    python tests/sync_shared.py fpmd_online.py mvp_online.py    # into this one

A block is a function, a class or a constant at the top level of a script; or a method,
Class.method, where a class is shared but for some of its methods. Every script stays a source that
can be read and edited; test_text.py checks that shared blocks are the same text.
"""

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MVP = ["mvp_online", "mvp_offline_to_online"]
FPMD = ["fpmd_online", "fpmd_meanflow_online"]
FPMD_PIXELS = ["fpmd_pixels_online", "fpmd_meanflow_pixels_online"]
SAC_PIXELS = "sac_pixels_online"
PIXELS = [*FPMD_PIXELS, SAC_PIXELS]
MIRROR = [*FPMD, *FPMD_PIXELS, "dpmd_online"]
PLUS = "fpmd_plus_online"  # FPMD-M's flow; critics and learning of its own
OFFLINE = ["mvp_offline_to_online", "meanflowql_offline_to_online"]  # they start from a dataset
GELU = [*MVP, "meanflowql_offline_to_online"]  # an activation that needs no faster formula
MISH = [*MIRROR, "sac_online", SAC_PIXELS, PLUS]
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
    (EVERY, ["refuse_actions", "refuse_observations", "load_simulator"]),
    (EVERY, ["make_env", "make_envs"]),
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
    ([*MIRROR, *GELU, PLUS, SAC_PIXELS], ["FirstLayer"]),
    (MISH, ["linear"]),
    ([*MIRROR, SAC_PIXELS], ["MLP", "QNetwork"]),
    (MIRROR, ["TwinCritic"]),
    ([*MIRROR, PLUS], ["TIME_DIM", "take", "select_action"]),
    (MIRROR, ["critic_loss", "mirror_descent_targets", "update_critic"]),
    (MIRROR, ["update_q_statistics", "policy_lr_at", "prepare_update", "update_alpha"]),
    (MIRROR, ["follow_steps", "act_explore", "update"]),
    ([*MIRROR, *MVP], ["flow_spread"]),
    (FPMD, ["act_one_step", "act_best_of_n"]),
    ([*FPMD, *FPMD_PIXELS, PLUS], ["time_embedding", "MODES", "DEPLOYED"]),
    ([*FPMD, *FPMD_PIXELS], ["propose", "particle_probabilities", "cost_of"]),
    # each pair's flow is the same with pixels as without
    (
        ["fpmd_meanflow_online", "fpmd_meanflow_pixels_online"],
        ["generate", "policy_loss", "update_policy"],
    ),
    (["fpmd_meanflow_online", "fpmd_meanflow_pixels_online", PLUS], ["AverageVelocityField"]),
    (["fpmd_meanflow_online", PLUS], ["OneStepPolicy"]),
    (
        ["fpmd_online", "fpmd_pixels_online"],
        ["VelocityField", "generate", "policy_loss", "update_policy"],
    ),
    # what pixels need is the same in all
    (PIXELS, ["convolution", "Encoder", "Trunk", "TwinCritic", "random_shift"]),
    (FPMD_PIXELS, ["Agent", "act_one_step", "act_best", "act_best_of_n", "act_explore"]),
    (FPMD_PIXELS, ["update_critic", "update"]),
    (PIXELS, ["ReplayBuffer", "train", "SeededEpisodes", "GuardedEnvs", "refuse_frames"]),
    (PIXELS, ["is_mujoco", "choose_camera", "prepare_mujoco", "picture_options", "make_env"]),
    (PIXELS, ["make_envs", "choose_opengl", "Run", "state_of", "restore_buffer", "chunks"]),
    (PIXELS, ["write_frames", "read_frames", "own_rules", "frames_held", "refuse_too_large"]),
    (PIXELS, ["accelerate", "replay", "main", "run_to_the_end"]),
    (MIRROR, ["RISING"]),
    (GELU, ["linear", "MLP", "QNetwork", "take", "select_action"]),
    (MVP, ["MeanVelocityField", "TwinCritic"]),
    (MVP, ["generate", "propose", "act_one_step", "act_best_of_n"]),
    (MVP, ["act_explore", "MODES", "DEPLOYED", "cost_of"]),
    ([*MVP, PLUS], ["prepare_update"]),
    (MVP, ["update_critic"]),
    ([PLUS, "sac_online"], ["BatchNorm", "RewardScale", "project"]),
    (["sac_online", SAC_PIXELS], ["sample", "MODES", "DEPLOYED", "cost_of", "RISING"]),
    (["sac_online", SAC_PIXELS], ["update_alpha", "prepare_update", "follow_steps"]),
]

# blocks that a script legitimately lacks or has otherwise, and why
CHUNKS = "actions come in chunks"
SEEN = "its observations are stacks of frames"
FILE = "frames are not in a checkpoint but in a file of their own"
TRUNKS = "encoder and trunks come first"
RENDERED = "what is rendered has a size, a camera and a need of OpenGL"
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
APART = {
    SEEN: """ReplayBuffer train SeededEpisodes.__doc__ SeededEpisodes.__init__
        SeededEpisodes.flatten GuardedEnvs.__doc__ GuardedEnvs.__init__ GuardedEnvs.picture
        GuardedEnvs.restore refuse_observations refuse_too_large own_rules run_to_the_end
        replay main Run.evaluate_mode""",
    FILE: "Run.state Run.save Run.restore",
    TRUNKS: "TwinCritic accelerate",
    RENDERED: "make_env make_envs choose_opengl",
}
LEARNING = "update_critic", "update", "act_explore"  # SAC's are its own anyway
EXCEPTIONS |= {(name, block): TRUNKS for name in FPMD_PIXELS for block in LEARNING}
EXCEPTIONS |= {
    (name, block): why for name in PIXELS for why, names in APART.items() for block in names.split()
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
            start = first_line(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        found.setdefault(name, []).append((start, node.end_lineno))
    return found


def first_line(node: ast.AST) -> int:
    """Of a function or a class, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def method_ranges(source: str) -> dict[str, list[tuple[int, int]]]:
    """The same of each Class.method; Class.__doc__ is all that comes before the first one."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for method in methods:
                found[f"{node.name}.{method.name}"] = [(first_line(method), method.end_lineno)]
            if methods:
                before = max(
                    part.end_lineno for part in node.body if part.lineno < methods[0].lineno
                )
                found[f"{node.name}.__doc__"] = [(first_line(node), before)]
    return found


def text_of(lines: list[str], parts: list[tuple[int, int]]) -> str:
    return "".join("".join(lines[first - 1 : last]) for first, last in parts)


@cache  # tests ask for the same texts hundreds of times
def blocks(source: str) -> dict[str, str]:
    """The text of each block, in whole lines."""
    lines = source.splitlines(keepends=True)
    return {name: text_of(lines, parts) for name, parts in ranges(source).items()}


@cache
def methods(source: str) -> dict[str, str]:
    """The text of each method."""
    lines = source.splitlines(keepends=True)
    return {name: text_of(lines, parts) for name, parts in method_ranges(source).items()}


def excepted_methods(script: str, block: str) -> list[str]:
    """Methods of this class that the script has otherwise."""
    return [name for s, name in EXCEPTIONS if s == script and name.startswith(f"{block}.")]


def sharing() -> dict[str, list[list[str]]]:
    """Each shared block with the groups of scripts in which it is the same text."""
    found = {}
    for group, names in SHARED:
        for name in names:
            apart = [s for s in group if (s, name) in EXCEPTIONS or excepted_methods(s, name)]
            if apart == group:  # all depart from the others, in the same way
                apart = []
            found.setdefault(name, []).append([s for s in group if s not in apart])
    return found


def sharing_of_methods() -> dict[str, list[str]]:
    """Class.method -> scripts in which it is the same text, where one has part of a class."""
    found = {}
    for group, names in SHARED:
        for name in names:
            partly = [s for s in group if excepted_methods(s, name)]
            whole = [s for s in group if s not in partly and (s, name) not in EXCEPTIONS]
            if not partly or not whole:
                continue
            for method in methods(scripts()[whole[0]].read_text()):
                if method.startswith(f"{name}."):
                    same = [s for s in partly if (s, method) not in EXCEPTIONS]
                    found[method] = [*whole, *same]
    return found


def blocks_for(source: str, target: str) -> list[str]:
    """Names of what two scripts share: whole blocks, and methods where one has part of a class."""
    pair = {source, target}
    names = [name for name, groups in sharing().items() if any(pair <= set(g) for g in groups)]
    for name, group in sharing_of_methods().items():
        if pair <= set(group) and name.partition(".")[0] not in names:
            names.append(name)
    return names


def replace_blocks(source: str, new: dict[str, str]) -> str:
    """The source with these blocks' texts in place of its own, and nothing else changed."""
    lines = source.splitlines(keepends=True)
    for name, parts in (ranges(source) | method_ranges(source)).items():
        if name in new:
            for first, last in parts:
                lines[first - 1 : last] = [""] * (last - first + 1)
            lines[parts[0][0] - 1] = new[name]
    return "".join(lines)


def sync(source: Path, targets: list[Path]) -> list[str]:
    """Copy what source shares with each target; says what was changed or is missing."""
    text = source.read_text()
    ours, said = blocks(text) | methods(text), []
    for target in targets:
        text = target.read_text()
        theirs, new = blocks(text) | methods(text), {}
        for name in blocks_for(source.stem, target.stem):
            if name not in ours or ours[name] == theirs.get(name):
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
