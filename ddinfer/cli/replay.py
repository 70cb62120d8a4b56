"""``ddinfer replay FILE``: generate an image, video or sound again and compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.cli.files import check_can_write
from ddinfer.cli.logging import configure_logging
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.options import open_source
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, DdinferError, UsageError
from ddinfer.job.fingerprint import lora_hashes, model_fingerprint
from ddinfer.job.prepare import library_versions, resolve_model
from ddinfer.job.replay import batch_of, compare, options_of_job
from ddinfer.request import Request, Result
from ddinfer.storage.images import ImageRecord, read_metadata
from ddinfer.storage.media import Formats, read_text


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
    batch, notes = batch_of(record, options.image)
    config = _config_of(record, options)
    configure_logging(0)
    device = World.detect(options.device).device
    model, _, _ = resolve_model(config)
    result = _generate(record, batch, model, config, device)
    data = Formats.of(vars(record)).encode(result, read_text(options.image))
    if options.save is not None:
        with open(options.save, "wb") as file:
            file.write(data)
    same, text = compare(data, options.image)
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
    found = options_of_job(record, options.image)
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
