"""An image of a job, to be generated again: what it was generated with, and the comparison."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.options import open_source
from ddinfer.engines.setup_file import setup_identity
from ddinfer.errors import DdinferError, UsageError
from ddinfer.inputs import read_audio, read_frames
from ddinfer.job.fingerprint import lora_hashes, model_fingerprint
from ddinfer.job.prepare import library_versions
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import ImageRecord
from ddinfer.storage.job_record import read_job
from ddinfer.storage.metadata import read_requests

if TYPE_CHECKING:
    import numpy as np


def batch_of(record: ImageRecord, image: str) -> tuple[list[Request], list[str]]:
    """The Requests that shared the image's call → them, and notes. Others are in the job folder."""
    own = Request.from_dict(record.request)
    out = _folder_of_job(image)
    found: dict[int, Request] = {}
    if os.path.isfile(os.path.join(out, "requests.jsonl.gz")):
        needed = {*record.batch, own.index}
        found = {r.index: r for r in read_requests(Files(), out) if r.index in needed}
    known = found.get(own.index)
    if known is not None and known.content_hash() != own.content_hash():
        found = {}  # the folder belongs to another job than the image
        known = None
    if own.input_hashes:
        if known is None:
            raise UsageError(
                f"{image} was generated from image inputs, and the job folder that records their "
                f"paths is not around it; expected requests.jsonl.gz in {out}"
            )
        own = known
    if all(k in found for k in record.batch):
        return [found[k] for k in record.batch], []
    if len(record.batch) == 1:
        return [own], []
    return [own], [
        f"it was generated in a batch of {len(record.batch)}, whose other requests are not in "
        f"{out}: generated as a batch of one here, which can differ in last bits"
    ]


def _folder_of_job(image: str) -> str:
    """The output folder around an image: ``out/images/0000/00000000.png``."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(image))))


def options_of_job(record: ImageRecord, image: str) -> dict[str, Any]:
    """The options of the job around an image, which name its model; empty without it."""
    job = read_job(Files(), _folder_of_job(image))
    if job is None or job.identity.get("model_hash") != record.model_hash:
        return {}
    return job.config


def generate_again(
    record: ImageRecord, batch: list[Request], model: str, config: JobConfig, device: str
) -> Result:
    import torch

    from ddinfer.distributed.partition import Replica
    from ddinfer.engines.select import load_engine

    named = {name for request in batch for name in request.settings().get("lora", ())}
    if missing := sorted(named - {lora.name for lora in config.loras}):
        raise UsageError(
            f"it was generated with the LoRA {missing[0]}, whose file is not known without the "
            f"job around it; give --lora PATH={missing[0]}"
        )
    if record.setup is not None and config.setup is None:
        raise UsageError(
            f"it was generated with --setup {record.setup['function']}, whose file is only taken "
            "from the command line; give --setup FILE.py:FUNCTION if you trust it"
        )
    torch.set_num_threads(record.num_threads)
    engine = load_engine(model, config, World(device=device), Replica.of_job(0, 1, config))
    wanted = record.request["index"]
    (result,) = (r for r in engine.run([batch]) if r.index == wanted)
    if result.error is not None:
        raise DdinferError(f"the pipeline failed: {result.error}\n{result.error.traceback}")
    return result


def compare(data: bytes, path: str) -> tuple[bool, str]:
    """Compare the bytes of two files; where they differ, how their pixels or samples differ."""
    import numpy as np

    with open(path, "rb") as file:
        if file.read() == data:
            return True, "bit-identical: every byte of the file is the same"
    with tempfile.TemporaryDirectory() as folder:
        new = os.path.join(folder, f"new{os.path.splitext(path)[1]}")
        with open(new, "wb") as file:
            file.write(data)
        before, now = _decoded(path), _decoded(new)
    if [part.shape for part in before] != [part.shape for part in now]:
        return False, (
            f"different: {len(before)} images of shape {before[0].shape} in the file, "
            f"{len(now)} of shape {now[0].shape} now"
        )
    off = np.concatenate([np.abs(a - b).ravel() for a, b in zip(before, now, strict=True)])
    if not off.any():
        return True, "bit-identical: every pixel is the same"
    return False, (
        f"different: the largest difference is {off.max():g} of 255, in {np.count_nonzero(off)} "
        f"of {off.size} values"
    )


def _decoded(path: str) -> list[np.ndarray]:
    """The pixels of a file, from 0 to 255, or the samples of its sound on the same scale."""
    import numpy as np

    ending = os.path.splitext(path)[1]
    if ending in (".wav", ".flac"):
        return [127.5 * read_audio(path)[0]]
    return [np.asarray(frame, dtype=float) for frame in read_frames(path)]


def changes_since(record: ImageRecord, model: str, config: JobConfig, device: str) -> list[str]:
    """What differs from when the image was generated, and could explain another result."""
    lines = []
    now = library_versions()
    for name, version in record.versions.items():
        if now.get(name) != version:
            lines.append(f"{name}: {version} then, {now.get(name)} now")
    if record.sequence_parallel > 1:
        lines.append(f"sequence_parallel: {record.sequence_parallel} ranks then, 1 now")
    kind = device.split(":")[0]
    if kind != record.device:
        lines.append(f"device: {record.device} then, {kind} now")
    folder = open_source(model, config).folder
    now_hash = model_fingerprint(folder, variant=config.variant, allow_pickle=config.allow_pickle)
    hashes = lora_hashes(open_source(model, config).loras)
    lines += [
        f"LoRA {name}: its file is not the one that it was generated with"
        for name, recorded in record.loras.items()
        if hashes.get(name) != recorded
    ]
    if setup_identity(config.setup) != record.setup:
        lines.append("--setup: its file is not the one that it was generated with")
    if now_hash != record.model_hash:
        lines.append(f"model: the files of {model} are not those that it was generated with")
    return lines
