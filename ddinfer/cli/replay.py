"""``ddinfer replay FILE``: generate an image, video or sound again and compare."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddinfer.cli.files import check_can_write
from ddinfer.cli.logging import configure_logging
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.options import open_source
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, DdinferError, UsageError
from ddinfer.inputs import read_audio, read_frames
from ddinfer.job.fingerprint import lora_hashes, model_fingerprint
from ddinfer.job.prepare import library_versions, resolve_model
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import ImageRecord, read_metadata
from ddinfer.storage.job_folder import read_job
from ddinfer.storage.media import Formats, read_text
from ddinfer.storage.metadata import read_requests

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ReplayOptions:
    """Generate an image again, in the batch that it was generated in, and compare the two."""

    image: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGE")]
    """An image, video or sound that ddinfer has written."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", aliases=("-m",))] = None
    """Where the model is now. Default: where the job found it, else the name in the image."""
    pipeline: Annotated[str | None, tyro.conf.arg(metavar="img2img|inpaint|text2img|CLASS")] = None
    """The pipeline class. Default: as in the job around the image."""
    component: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=FOLDER_OR_ID")
    ] = ()
    """Where components from elsewhere are. Default: where the job found them."""
    lora: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="PATH_OR_ID[=NAME][@COMPONENT]"),
    ] = ()
    """Where its LoRAs are. Default: where the job found them."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """Hub token; better set HF_TOKEN."""
    trust_remote_code: bool = False
    """Run pipeline code that the model's repository brings."""
    allow_pickle: bool = False
    """Load .bin weights, which can run code. Default: safetensors only."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda")] = "auto"
    """Device to generate on. Another kind of device rounds differently."""
    save: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the new image to this file, which must have the same ending."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(ReplayOptions, prog="ddinfer replay", args=list(argv), use_underscores=True)
    if not os.path.isfile(options.image):
        raise UsageError(f"no such image: {options.image}")
    if options.save is not None:
        check_can_write("--save", options.save, os.path.splitext(options.image)[1])
    record = read_metadata(options.image)
    batch, notes = _batch_of(record, options.image)
    config = _config_of(record, options)
    configure_logging(0)
    device = World.detect(options.device).device
    model, _, _ = resolve_model(config)
    result = _generate(record, batch, model, config, device)
    data = Formats.of(vars(record)).encode(result, read_text(options.image))
    if options.save is not None:
        with open(options.save, "wb") as file:
            file.write(data)
    same, text = _compare(data, options.image)
    print(text)
    for line in [*notes, *_changes(record, model, config, device)]:
        print(f"  {line}")
    sys.stdout.flush()
    return EXIT_OK if same else EXIT_FAILED_PROMPTS


def _config_of(record: ImageRecord, options: ReplayOptions) -> JobConfig:
    """How the model was loaded, by the record; what of it may run, by the options alone."""
    names = (
        "variant",
        "revision",
        "attention_backend",
        "vae_tiling",
        "vae_slicing",
        "compile",
        "cfg_parallel",
    )  # one rank makes its calls one after another; tokens stay whole
    found = _found_by_job(record, options.image)
    return JobConfig(
        model=options.model or found.get("model") or record.model,
        pipeline=options.pipeline or found.get("pipeline"),
        component=options.component or found.get("component", ()),
        lora=options.lora or found.get("lora", ()),
        dtype=record.dtype.replace("checkpoint", "auto"),
        token=options.token,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        **{name: getattr(record, name) for name in names},
    )


def _batch_of(record: ImageRecord, image: str) -> tuple[list[Request], list[str]]:
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
        f"{out}: generated alone here, which can differ in last bits"
    ]


def _folder_of_job(image: str) -> str:
    """The output folder around an image: ``out/images/0000/00000000.png``."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(image))))


def _found_by_job(record: ImageRecord, image: str) -> dict[str, Any]:
    """The options of the job around an image, which say where its model is; empty without it."""
    job = read_job(Files(), _folder_of_job(image))
    if job is None or job.identity.get("model_hash") != record.model_hash:
        return {}
    return job.config


def _generate(
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
    torch.set_num_threads(record.num_threads)
    engine = load_engine(model, config, World(device=device), Replica.of_job(0, 1, config))
    wanted = record.request["index"]
    (result,) = (r for r in engine.run([batch]) if r.index == wanted)
    if result.error is not None:
        raise DdinferError(f"the pipeline failed: {result.error}\n{result.error.traceback}")
    return result


def _compare(data: bytes, path: str) -> tuple[bool, str]:
    """Compare the bytes of two files; where they differ, what they show or let hear."""
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
    """What a file shows and lets hear: pictures in 0 to 255, and sound on the same scale."""
    import numpy as np

    ending = os.path.splitext(path)[1]
    if ending in (".wav", ".flac"):
        return [127.5 * read_audio(path)[0]]
    return [np.asarray(frame, dtype=float) for frame in read_frames(path)]


def _changes(record: ImageRecord, model: str, config: JobConfig, device: str) -> list[str]:
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
        for name, said in record.loras.items()
        if hashes.get(name) != said
    ]
    if now_hash != record.model_hash:
        lines.append(f"model: the files of {model} are not those that it was generated with")
    return lines
