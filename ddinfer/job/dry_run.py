"""`plan_job`: what a job would do, for ``--dry_run``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ddinfer.config import JobConfig
from ddinfer.distributed.partition import Replica, slice_of_batches
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.storage.disk_space import estimate_disk
from ddinfer.storage.files import Files
from ddinfer.storage.media import Formats

SHOWN_REQUESTS = 3


def plan_job(config: JobConfig, num_ranks: int) -> dict[str, Any]:
    """What each rank would do, JSON-ready, by all checks that need no weight and write nothing."""
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
