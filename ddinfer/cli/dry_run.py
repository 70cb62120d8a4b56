"""``--dry_run``: the plan of a job, without a weight read or a file written."""

from __future__ import annotations

import json
from typing import Any

from ddinfer.config import JobConfig
from ddinfer.distributed.partition import contiguous_slice
from ddinfer.engines.select import check_placement
from ddinfer.engines.whole import check_call
from ddinfer.errors import EXIT_OK
from ddinfer.job import prepare_job, resolve_model
from ddinfer.models.signature import call_parameters, pipeline_class
from ddinfer.storage.files import Files
from ddinfer.storage.verify import estimate_disk

SHOWN_REQUESTS = 3


def print_plan(config: JobConfig, num_ranks: int) -> int:
    """Check all input and print what each rank would do."""
    plan = plan_of(config, num_ranks)
    print(json.dumps(plan) if config.json else "\n".join(plan_lines(plan)))
    return EXIT_OK


def plan_of(config: JobConfig, num_ranks: int) -> dict[str, Any]:
    model, name, _ = resolve_model(config)
    hub = {"revision": config.revision, "token": config.token}
    parameters = call_parameters(model, config.trust_remote_code, **hub)
    job = prepare_job(config, parameters=parameters)
    pipeline = pipeline_class(model, config.trust_remote_code, **hub).__name__
    check_call(pipeline, parameters, job.call_arguments(), config.batch_size)
    check_placement(config)
    all_batches = job.batches()
    parts = [contiguous_slice(len(all_batches), num_ranks, rank) for rank in range(num_ranks)]
    slices = []
    for part in parts:
        batches = [all_batches[k] for k in part]
        first, last = (batches[0].start, batches[-1].stop - 1) if batches else (None, None)
        slices.append(
            {
                "images": sum(map(len, batches)),
                "batches": len(batches),
                "first_image": first,
                "last_image": last,
            }
        )
    disk = estimate_disk(Files(), config.output, job.requests)
    return {
        "model": name,
        "pipeline": pipeline,
        "output": config.output,
        "images": len(job.requests),
        "batches": len(all_batches),
        "ranks": slices,
        "disk": str(disk),
        "disk_bytes": disk.needed_bytes,
        "free_bytes": disk.free_bytes,
        "first_requests": [r.to_dict() for r in job.requests[:SHOWN_REQUESTS]],
        "notes": list(job.notes),
    }


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for reading."""
    lines = [
        f"{plan['images']} images in {plan['batches']} batches, by {plan['pipeline']} "
        f"({plan['model']}), into {plan['output']}"
    ]
    for rank, part in enumerate(plan["ranks"]):
        if part["images"]:
            which = f"images {part['first_image']} to {part['last_image']}"
            lines.append(f"  rank {rank}: {part['batches']} batches, {which}")
        else:
            lines.append(f"  rank {rank}: nothing")
    lines.append(f"disk: {plan['disk']}")
    lines.append("first requests:")
    lines += [f"  {json.dumps(r, ensure_ascii=False)}" for r in plan["first_requests"]]
    return lines + [f"note: {note}" for note in plan["notes"]]
