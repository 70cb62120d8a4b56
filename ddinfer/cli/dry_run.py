"""``--dry_run``: the plan of a job, without a weight read or a file written."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ddinfer.cli.command import print_report
from ddinfer.config import JobConfig
from ddinfer.distributed.partition import Replica, slice_of_batches
from ddinfer.errors import EXIT_OK
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.storage.disk_space import estimate_disk
from ddinfer.storage.files import Files
from ddinfer.storage.media import Formats

SHOWN_REQUESTS = 3


def print_plan(config: JobConfig, num_ranks: int) -> int:
    """Check all input and print what each rank would do."""
    plan = plan_of(config, num_ranks)
    print_report(plan, plan_lines(plan), as_json=config.json)
    return EXIT_OK


def plan_of(config: JobConfig, num_ranks: int) -> dict[str, Any]:
    job = prepare(resolve_config(config))
    images = job.images()
    requests = job.requests[images.start : images.stop]
    all_batches = [batch for batch in job.batches() if batch.start in images]
    replica = Replica.of_job(0, num_ranks, config)
    num_replicas, size = replica.num_replicas, len(replica.ranks)
    slices = []
    for part in range(num_replicas):
        batches = slice_of_batches(all_batches, num_replicas, part)
        first, last = (batches[0].start, batches[-1].stop - 1) if batches else (None, None)
        slices.append(
            {
                "ranks": list(range(part * size, (part + 1) * size)),
                "images": sum(map(len, batches)),
                "batches": len(batches),
                "first_image": first,
                "last_image": last,
            }
        )
    disk = estimate_disk(
        Files(),
        config.output,
        requests,
        call_defaults=job.call_defaults("width", "height", "num_frames"),
        formats=Formats.of(vars(job.config)),
    )
    return {
        "model": job.model_name,
        "pipeline": job.pipeline,
        "output": config.output,
        "shard": config.shard,
        "images": len(requests),
        "batches": len(all_batches),
        "slices": slices,
        "stages": {name: [asdict(s) for s in stages] for name, stages in job.stages.items()},
        "disk": str(disk),
        "disk_bytes": disk.needed_bytes,
        "free_bytes": disk.free_bytes,
        "first_requests": [r.to_dict() for r in requests[:SHOWN_REQUESTS]],
        "notes": list(job.notes),
    }


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
