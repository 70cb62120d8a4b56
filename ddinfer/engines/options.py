"""What a job's options mean to every engine alike: what is read, and how a pipeline computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.errors import UsageError
from ddinfer.models.adapters import find_loras
from ddinfer.models.composed import compose
from ddinfer.models.index import configs_folder
from ddinfer.models.pipeline_folder import PipelineSource, pipeline_folder


def open_source(model: str, config: JobConfig) -> PipelineSource:
    """The files of a job's pipeline, fetched where ``model`` is a hub id.

    Raises:
        UsageError: they are not there, or not what the options allow to be read.
    """
    folder = pipeline_folder(
        model,
        variant=config.variant,
        revision=config.revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    folder = _composed(folder, config)
    return PipelineSource(
        folder,
        config.variant,
        config.trust_remote_code,
        config.allow_pickle,
        loras=find_loras(config.lora, token=config.token),
    )


def gpu_numbers(world: World) -> list[int]:
    """The GPUs that a rank drives; none on the CPU."""
    return [int(device.partition(":")[2]) for device in world.devices if device != "cpu"]


def configs_path(model: str, config: JobConfig) -> str:
    """Where the configs of a job's pipeline are: ``model``, or what it is composed of.

    Raises:
        UsageError: ``--pipeline`` or ``--component`` does not go with the model.
    """
    if config.pipeline is None and not config.components:
        return model
    folder = configs_folder(model, revision=config.revision, token=config.token)
    return str(_composed(folder, config, configs_only=True))


def _composed(folder: Path, config: JobConfig, *, configs_only: bool = False) -> Path:
    return compose(
        folder,
        config.pipeline,
        config.components,
        variant=config.variant,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        configs_only=configs_only,
    )


def apply_to_pipeline(pipe: Any, config: JobConfig) -> None:
    """What holds for the pipeline but its denoiser.

    Raises:
        UsageError: its VAE lacks what an option asks for.
    """
    pipe.set_progress_bar_config(disable=True)  # the job has one bar of its own
    if config.vae_tiling:
        _vae_method(pipe, "enable_tiling", "--vae_tiling")()
    if config.vae_slicing:
        _vae_method(pipe, "enable_slicing", "--vae_slicing")()


def quantize(pipe: Any, config: JobConfig) -> None:
    """Keep the weights of components in float8, cast for each layer's forward by diffusers.

    Raises:
        UsageError: no such component, or none of diffusers' models.
    """
    import torch

    for text in config.quantize:
        name = text.partition("=")[0]
        model = pipe.components.get(name)
        if not hasattr(model, "enable_layerwise_casting"):
            able = [n for n, c in pipe.components.items() if hasattr(c, "enable_layerwise_casting")]
            raise UsageError(
                f"--quantize {text}: {type(pipe).__name__} has no such model of diffusers; it has "
                f"{', '.join(able)}"
            )
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)


def apply_to_denoiser(name: str, denoiser: Any, config: JobConfig) -> None:
    """What holds for a denoiser, or for this rank's stage of one.

    Args:
        name: of the component, for messages.

    Raises:
        UsageError: there is no such attention backend here.
    """
    if config.attention_backend is not None:
        _set_attention_backend(name, denoiser, config.attention_backend)
    if config.compile:
        _compile(denoiser)


def _compile(denoiser: Any) -> None:
    """Its repeated blocks where it names them: one compilation serves them all."""
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks()
    else:
        denoiser.compile()


def _vae_method(pipe: Any, method: str, option: str) -> Any:
    found = getattr(getattr(pipe, "vae", None), method, None)
    if found is None:
        raise UsageError(f"{option}: the VAE of {type(pipe).__name__} has no {method}()")
    return found


def _set_attention_backend(name: str, denoiser: Any, backend: str) -> None:
    # diffusers passes over attention of the older kind, such as all of a UNet's.
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    can_choose = any(hasattr(processor, "_attention_backend") for processor in processors)
    if not can_choose or not hasattr(denoiser, "set_attention_backend"):
        raise UsageError(
            f"--attention_backend: {type(denoiser).__name__} ({name}) cannot choose a backend; "
            "leave the option out"
        )
    try:
        denoiser.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"--attention_backend {backend}: {error}") from error
