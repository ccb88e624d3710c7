"""The table of policies/, from publish.py's rows."""

from benchmark.report import formatting as fmt
from benchmark.report.formatting import table_with_note
from pathlib import Path


def policies(path: Path) -> str:
    """A row per policy: its task, what it earns in one step, and the command that trained it."""
    rows, table = fmt.read(path), []
    for row in rows:
        mean, std = float(row["return_mean"]), float(row["return_std"])
        rate = row["success_rate"]
        command = f"python {row['script']} --env-id {row['env_id']} --seed {row['seed']} "
        command += f"--total-timesteps {row['total_timesteps']} {row['flags']}".strip()
        table.append(
            {
                "file": f"[`{row['policy']}.pt`](../policies/{row['policy']}.pt)",
                "task": row["env_id"].partition(":")[2] or row["env_id"],
                "return of one step": f"{fmt.number(mean)} ± {fmt.number(std)}",
                "success": f"{100 * float(rate):.0f} %" if rate else "-",
                "steps": f"{int(row['global_step']):,}",
                "command": f"`{command}`",
                "commit": fmt.commits([row]),
            }
        )
    episodes = {int(row["episodes"]) for row in rows}
    note = (
        f"Mean and standard deviation over {fmt.joined_numbers(episodes)} episodes of one run. "
        "Steps are the environment's, and updates on a dataset before them. "
        "A command is for the script at its row's commit."
    )
    return table_with_note(table, note)
