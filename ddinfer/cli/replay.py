"""``ddinfer replay FILE``: generate an image, video or sound again and compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.cli.command import ModelOptions, parse
from ddinfer.cli.files import check_can_write
from ddinfer.cli.logging import configure_logging
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, UsageError
from ddinfer.job.prepare import resolve_model
from ddinfer.job.replay import batch_of, changes_since, compare, generate_again, options_of_job
from ddinfer.storage.images import ImageRecord, read_metadata
from ddinfer.storage.media import Formats, read_text


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(ModelOptions):
    """Generate an image again, in the batch that it was generated in, and compare the two."""

    image: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGE")]
    """An image, video or sound that ddinfer has written."""
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
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda")] = "auto"
    """Device to generate on. Another kind of device rounds differently."""
    save: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the new image to this file, which must have the same ending."""


def main(argv: Sequence[str]) -> int:
    options = parse(ReplayOptions, "replay", argv)
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
    result = generate_again(record, batch, model, config, device)
    data = Formats.of(vars(record)).encode(result, read_text(options.image))
    if options.save is not None:
        with open(options.save, "wb") as file:
            file.write(data)
    same, text = compare(data, options.image)
    print(text)
    for line in [*notes, *changes_since(record, model, config, device)]:
        print(f"  {line}")
    return EXIT_OK if same else EXIT_FAILED_PROMPTS


def _config_of(record: ImageRecord, options: ReplayOptions) -> JobConfig:
    """How the model was loaded, by the record; whether its code may run, only by the options."""
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
        quantize=tuple(record.quantize),
        dtype=record.dtype.replace("checkpoint", "auto"),
        token=options.token,
        setup=options.setup,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        **{name: getattr(record, name) for name in names},
    )
