"""``ddinfer replay IMAGE.png``: make an image again from its own metadata and compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddinfer.cli.files import check_can_write
from ddinfer.cli.logging import configure_logging
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, DdinferError, UsageError
from ddinfer.job.prepare import library_versions, resolve_model
from ddinfer.models.fingerprint import model_fingerprint
from ddinfer.models.repository import pipeline_folder
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.images import read_metadata
from ddinfer.storage.job_folder import read_job
from ddinfer.storage.metadata import read_requests

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ReplayOptions:
    """Make an image again, with the batch that it was made in, and say whether it is the same."""

    image: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGE")]
    """A PNG that ddinfer has written."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", aliases=("-m",))] = None
    """Where the model is now, if not where it was."""
    trust_remote_code: bool = False
    """Run pipeline code that the model's repository brings."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to make it. Another kind of device rounds differently."""
    save: Annotated[str | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Write the image made now to this file."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(ReplayOptions, prog="ddinfer replay", args=list(argv), use_underscores=True)
    if not os.path.isfile(options.image):
        raise UsageError(f"no such image: {options.image}")
    if options.save is not None:
        check_can_write("--save", options.save, ".png")
    record = read_metadata(options.image)
    batch, missing = _batch_of(record, options.image)
    configure_logging(0)
    device = World.detect(options.device).device
    model, _, _ = resolve_model(JobConfig(model=options.model or _model_of(record, options.image)))
    made = _make(record, batch, model, device, options.trust_remote_code)
    if options.save is not None:
        made[0].save(options.save, save_all=len(made) > 1, append_images=made[1:])
    same, text = _compare(made, options.image)
    print(text)
    for line in [*missing, *_changes(record, model, device)]:
        print(f"  {line}")
    sys.stdout.flush()
    return EXIT_OK if same else EXIT_FAILED_PROMPTS


def _batch_of(record: Mapping[str, Any], image: str) -> tuple[list[Request], list[str]]:
    """The Requests that shared the image's call; those beside it are in the job folder."""
    own = Request.from_dict(record["request"])
    indices = record["batch"]
    out = _folder_of_job(image)
    at_hand: dict[int, Request] = {}
    if os.path.isfile(os.path.join(out, "requests.jsonl.gz")):
        needed = {*indices, own.index}
        at_hand = {r.index: r for r in read_requests(Files(), out) if r.index in needed}
    known = at_hand.get(own.index)
    if known is not None and known.content_hash() != own.content_hash():
        at_hand = {}  # the image has come here from another job
        known = None
    if own.input_hashes:
        if known is None:
            raise UsageError(
                f"{image} was made from image inputs, and the job folder that says where they "
                f"are is not around it; expected requests.jsonl.gz in {out}"
            )
        own = known
    if all(k in at_hand for k in indices):
        return [at_hand[k] for k in indices], []
    if len(indices) == 1:
        return [own], []
    return [own], [
        f"it was made in a batch of {len(indices)}, whose other requests are not around it: "
        "made alone here, which can differ in last bits"
    ]


def _folder_of_job(image: str) -> str:
    """The output folder around an image: ``out/images/0000/00000000.png``."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(image))))


def _model_of(record: Mapping[str, Any], image: str) -> str:
    """Where the job found its model; an image knows only its name."""
    job = read_job(Files(), _folder_of_job(image))
    if job is not None and job.identity["model_hash"] == record["model_hash"]:
        return job.config["model"] or record["model"]
    return record["model"]


def _make(
    record: Mapping[str, Any], batch: list[Request], model: str, device: str, trusted: bool
) -> list[Image.Image]:
    """The image, or the frames of the video."""
    import torch

    from ddinfer.engines.whole import load_whole_engine

    torch.set_num_threads(record["num_threads"])
    names = ("variant", "revision", "attention_backend", "vae_tiling", "vae_slicing", "compile")
    config = JobConfig(
        dtype="auto" if record["dtype"] == "checkpoint" else record["dtype"],
        trust_remote_code=trusted,
        **{name: record[name] for name in names},
    )
    engine = load_whole_engine(model, config, world=World(device=device))
    wanted = record["request"]["index"]
    (result,) = (r for r in engine.run([batch]) if r.index == wanted)
    if result.error is not None:
        raise DdinferError(f"the pipeline failed: {result.error}\n{result.error.traceback}")
    if result.image is not None:
        return [result.image]
    return list(result.frames or ())


def _compare(made: Sequence[Image.Image], path: str) -> tuple[bool, str]:
    import numpy as np
    from PIL import Image, ImageSequence

    with Image.open(path) as file:
        before = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    now = [np.asarray(frame.convert("RGB")) for frame in made]
    if [f.shape for f in before] != [f.shape for f in now]:
        return False, (
            f"different: {len(before)} pictures of shape {before[0].shape} in the file, "
            f"{len(now)} of shape {now[0].shape} made now"
        )
    off = np.abs(np.stack(before).astype(int) - np.stack(now).astype(int))
    if not off.any():
        return True, "bit-identical: every pixel is the same"
    return False, (
        f"different: the largest difference is {off.max()} of 255, in {np.count_nonzero(off)} of "
        f"{off.size} values"
    )


def _changes(record: Mapping[str, Any], model: str, device: str) -> list[str]:
    """What is not as it was when the image was made, and could explain a difference."""
    lines = []
    now = library_versions()
    for name, version in record["versions"].items():
        if now.get(name) != version:
            lines.append(f"{name}: {version} then, {now.get(name)} now")
    kind = device.split(":")[0]
    if kind != record["device"]:
        lines.append(f"device: {record['device']} then, {kind} now")
    if model_fingerprint(pipeline_folder(model, trust_remote_code=True)) != record["model_hash"]:
        lines.append(f"model: the files of {model} are not those that it was made with")
    return lines
