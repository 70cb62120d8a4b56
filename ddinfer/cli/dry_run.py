"""``--dry_run``: the plan of a job, without a weight read or a file written."""

from __future__ import annotations

import json
from typing import Any

from ddinfer.cli.command import print_report
from ddinfer.config import JobConfig
from ddinfer.errors import EXIT_OK
from ddinfer.job.dry_run import plan_job


def print_plan(config: JobConfig, num_ranks: int) -> int:
    """Check all input and print what each rank would do."""
    plan = plan_job(config, num_ranks)
    print_report(plan, plan_lines(plan), as_json=config.json)
    return EXIT_OK


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan as text."""
    lines = [
        f"{plan['images']} images in {plan['batches']} batches, by {plan['pipeline']} "
        f"({plan['model']}), into {plan['output']}"
    ]
    if plan["shard"] is not None:
        lines[0] += f": part {plan['shard']} of the job"
    for part in plan["slices"]:
        ranks = part["ranks"]
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        if part["images"]:
            which = f"images {part['first_image']} to {part['last_image']}"
            lines.append(f"  {who}: {part['batches']} batches, {which}")
        else:
            lines.append(f"  {who}: no batches")
    for name, stages in plan["stages"].items():
        for number, stage in enumerate(stages):
            lines.append(
                f"stage {number} of the {name}: {stage['first']} to {stage['last']}, "
                f"{stage['share']:.0%} of its weights"
            )
    lines.append(f"disk: {plan['disk']}")
    lines.append("first requests:")
    lines += [f"  {json.dumps(r, ensure_ascii=False)}" for r in plan["first_requests"]]
    return lines + [f"note: {note}" for note in plan["notes"]]
