"""Pipelines and models from their folders, without Accelerate and without pickles."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models.repository import (
    PICKLE_SUFFIXES,
    ModelIndex,
    custom_code_message,
    pipeline_folder,
    read_model_index,
)
from ddinfer.models.signature import pipeline_class

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)

#: Component names under which pipelines keep the network that runs once a step, most usual first.
DENOISER_NAMES = ("transformer", "unet", "prior", "decoder", "dit", "transformer_2", "unet_2")


def find_denoiser(pipe: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    """The network that a pipeline runs once a step: its component name and the module.

    Raises:
        UsageError: none of the pipeline's components is called like one.
    """
    import torch

    for name in DENOISER_NAMES:
        module = pipe.components.get(name)
        if isinstance(module, torch.nn.Module):
            return name, module
    raise UsageError(
        f"{type(pipe).__name__} has no denoiser that ddinfer knows: its components are "
        f"{', '.join(pipe.components)}; expected one of {', '.join(DENOISER_NAMES)}"
    )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """``"bfloat16"``, ``"bf16"``, ``torch.bfloat16`` … → the dtype; ``"auto"`` → ``None``.

    Raises:
        UsageError: no such floating dtype.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    known = {
        "auto": None,
        **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
        **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
        **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    }
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UsageError(f"unknown dtype {dtype!r}; expected one of {', '.join(known)}")
    return known[name]


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    placement: Any = None,
    components: Mapping[str, Any] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """A ready pipeline in eval mode from a local folder or a Hub id.

    Args:
        dtype: of the floating weights. ``"auto"``: float32 on CPU, else the checkpoint's.
        device: where the weights are put (default: ``"cpu"``).
        components: given ones are used as they are; ``None`` leaves one out.
        variant: of the weight files ("fp16").
        trust_remote_code: lets the repository's own Python run.
        allow_pickle: reads pickled weights where there are no safetensors.

    Raises:
        UsageError: the path, the class, the weight files or an argument cannot be right.
    """
    import torch

    folder = pipeline_folder(
        path,
        variant=variant,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    if placement is not None:
        raise UsageError("placement is not there yet")
    index = read_model_index(folder)
    given = dict(components or {})
    if not allow_pickle:
        _refuse_pickles(folder, index, given)
    if not trust_remote_code:
        _refuse_custom_code(path, folder, index)
    target = torch.device("cpu" if device is None else device)
    wanted = parse_dtype(dtype)
    if wanted is None and target.type == "cpu":
        wanted = torch.float32
    found = pipeline_class(folder, trust_remote_code)
    pipe = found.from_pretrained(  # type: ignore[attr-defined]
        folder,
        dtype=wanted,
        variant=variant,
        use_safetensors=None if allow_pickle else True,
        low_cpu_mem_usage=False,
        local_files_only=True,
        **given,
    )
    pipe.to(target)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    log.info("%s from %s on %s in %s", found.__name__, path, target, wanted)
    return pipe


def _refuse_pickles(folder: Path, index: ModelIndex, given: Mapping[str, Any]) -> None:
    for entry in index.entries:
        inside = folder / entry.name
        if entry.name in given or not inside.is_dir():
            continue
        files = sorted(p.name for p in inside.iterdir())
        pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
        if pickles and not any(name.endswith(".safetensors") for name in files):
            raise UsageError(
                f"{inside} has only pickled weights ({', '.join(pickles[:3])}), which can run code "
                "when read; expected .safetensors. Convert them (load with --allow_pickle once and "
                "save_pretrained), or say --allow_pickle if you trust them"
            )


def _refuse_custom_code(path: str | os.PathLike[str], folder: Path, index: ModelIndex) -> None:
    for entry in index.entries:
        file = f"{entry.library}.py"
        if (folder / entry.name / file).is_file():
            raise UsageError(custom_code_message(path, f"{entry.name}/{file}"))
