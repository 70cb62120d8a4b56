"""Pipelines and models from their folders: lazily, without Accelerate and without pickles.

Modules are built with their parameters on meta; each tensor then goes from the mapped file
straight to the device where it will live. On CPU it stays a view into the file, so that all the
ranks of a machine share one copy in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models.adapters import find_loras
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.composed import compose
from ddinfer.models.devices import CPU, DISK, MaxMemory
from ddinfer.models.meta_model import OpenModel, open_model, parse_dtype
from ddinfer.models.pipeline_folder import PipelineSource, pipeline_folder
from ddinfer.models.placement import Placement
from ddinfer.models.planner import Strategy, check_strategy
from ddinfer.models.tree import Node

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def denoisers(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The networks that a pipeline runs step by step, by component name; Wan 2.2 has two.

    Raises:
        UsageError: none of the pipeline's components is called like one.
    """
    import torch

    found = {
        name: pipe.components[name]
        for name in DENOISER_NAMES
        if isinstance(pipe.components.get(name), torch.nn.Module)
    }
    if not found:
        raise UsageError(
            f"{type(pipe).__name__} has no denoiser that ddinfer knows: its components are "
            f"{', '.join(pipe.components)}; expected one of {', '.join(DENOISER_NAMES)}"
        )
    return found


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> torch.nn.Module:
    """One diffusers or transformers model from its folder, in eval mode.

    Args:
        folder: holds config.json and the weights, as ``save_pretrained`` writes them.
        dtype: of the floating weights; ``None``: as stored; ``"auto"``: float32 on CPU, else
            as stored.
        device: where the weights are put (default: ``"cpu"``).
        trust_remote_code: lets a class run that is defined in the folder itself.

    Raises:
        UsageError: no model there, or a class that the installed libraries do not have.
        CheckpointError: tensors missing or of another shape; they are named.
    """
    target = _device(device)
    opened = open_model(
        Path(folder),
        dtype=_model_dtype(dtype, target),
        variant=variant,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    if not opened.stored:
        return opened.model.to(target)
    return opened.fill(lambda name: target)


def _device(device: str | torch.device | None) -> torch.device:
    """
    Raises:
        UsageError: no device is called so, or it is not there.
    """
    import torch

    try:
        found = torch.device(CPU if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {device}: {error}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        number = torch.cuda.device_count()
        raise UsageError(f"device {found} is not there: this process sees {number} GPUs")
    return found


def _model_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    import torch

    if dtype == "auto" and device.type == "cpu":
        return torch.float32
    return None if dtype is None else parse_dtype(dtype)


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    device: str | torch.device | None = None,
    placement: Strategy | str | Mapping[str, str] | Placement | None = None,
    max_memory: MaxMemory | str | None = None,
    gpus: Sequence[int] | None = None,
    pipeline: str | None = None,
    components: Mapping[str, Any] | None = None,
    lora: Sequence[str] = (),
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """A ready pipeline in eval mode from a local folder, a Hub id or an embedded model's name.

    Args:
        dtype: of the floating weights, for all components or by name (``"default"`` for others).
            ``"auto"``: float32 on CPU, else the type in which the denoiser is stored.
        device: where the weights are put (default: ``"cpu"``).
        placement: where each part goes instead; a strategy's name (see `plan_placement`), a dict
            or a `Placement`. ``pipe.ddinfer_dispatched.undo()`` brings all of it to the host.
        max_memory: for a strategy's name: device → bytes or a text such as ``"16GB"``.
        gpus: for a placement, the GPUs this process drives; device numbers count through them.
        pipeline: another class over the same checkpoint: ``"img2img"``, ``"inpaint"``,
            ``"text2img"``, or the name of a class in diffusers.
        components: given ones are used as they are, a path or a Hub id (or a list of them, as for
            several ControlNets) is loaded; ``None`` leaves one out.
        lora: ``PATH_OR_ID[=NAME][:WEIGHT]``, as ``--lora`` takes it; added to the layers.
        variant: of the weight files ("fp16"); components without it use their plain files.
        trust_remote_code: lets the repository's own Python run.
        allow_pickle: reads pickled weights where there are no safetensors.

    Raises:
        UsageError: the path, the class, the weight files or an argument cannot be right.
        PlacementError: the model does not fit, or the placement does not cover it.
    """
    folder = pipeline_folder(
        path,
        variant=variant,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    given = dict(components or {})
    places = {name: _places(value) for name, value in given.items() if _places(value)}
    given = {name: value for name, value in given.items() if name not in places}
    trust = {"trust_remote_code": trust_remote_code}
    folder = compose(folder, pipeline, places, variant=variant, token=token, **trust)
    loras = find_loras(lora, token=token)
    pipe = load_source(
        PipelineSource(folder, variant, trust_remote_code, allow_pickle, loras=loras),
        dtype=dtype,
        device=device,
        placement=placement,
        max_memory=max_memory,
        gpus=gpus,
        components=given,
    )
    pipe.register_to_config(_name_or_path=os.fspath(path))
    return pipe


def load_source(
    source: PipelineSource,
    *,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] = "auto",
    device: str | torch.device | None = None,
    placement: Strategy | str | Mapping[str, str] | Placement | None = None,
    max_memory: MaxMemory | str | None = None,
    gpus: Sequence[int] | None = None,
    components: Mapping[str, Any] | None = None,
    setup: Callable[[Any], None] | None = None,
) -> DiffusionPipeline:
    """A pipeline from its opened folder; arguments as `load_pipeline`'s.

    Args:
        setup: called with the pipeline once its weights are real, before it is placed.
    """
    if placement is None and gpus is not None:
        raise UsageError(f"gpus={gpus} is for a placement; without one give device")
    if placement is not None and device is not None:
        raise UsageError("give device or placement, not both: a placement names devices")
    if max_memory is not None and not isinstance(placement, str):
        raise UsageError(
            f"max_memory={max_memory!r} is for placement='balanced' or 'auto', which choose by it"
        )
    target = _device(device)
    given = dict(components or {})
    unknown = sorted(set(given) - set(source.names()))
    if unknown:
        raise UsageError(
            f"{source.kind.__name__} has no component {', '.join(unknown)}; "
            f"it has {', '.join(source.names())}"
        )
    if placement is None:
        types = source.dtypes(dtype, target)
        for entry in source.index.entries:
            if entry.name not in given:
                given[entry.name] = source.load(entry.name, types[entry.name], target)
        pipe = source.assemble(given)
        if setup is not None:
            setup(pipe)
        return pipe
    return _load_placed(source, placement, max_memory, gpus, dtype, given, setup)


def _places(component: Any) -> list[str]:
    """Where a component is to be loaded from; nothing where it is one."""
    several = component if isinstance(component, (list, tuple)) else [component]
    return [os.fspath(c) for c in several if isinstance(c, (str, os.PathLike))]


def _load_placed(
    source: PipelineSource,
    placement: str | Mapping[str, str] | Placement,
    max_memory: MaxMemory | str | None,
    gpus: Sequence[int] | None,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype],
    given: dict[str, Any],
    setup: Callable[[Any], None] | None = None,
) -> DiffusionPipeline:
    """A pipeline whose weights go straight to where the placement says (or stay on disk)."""
    import torch

    from ddinfer.models.devices import memory_budgets
    from ddinfer.models.offload import dispatch_pipeline
    from ddinfer.models.planner import plan
    from ddinfer.models.tree import tree_of_model

    budgets: dict[str, int] = {}
    if isinstance(placement, str):
        placement = check_strategy(placement)
        budgets = memory_budgets(max_memory, gpus)
        devices = set(budgets)
        main = next((device for device in budgets if device not in (CPU, DISK)), CPU)
    else:
        placement = placement if isinstance(placement, Placement) else Placement(placement)
        placement = placement if gpus is None else placement.on_gpus(gpus)
        devices, main = set(placement.devices.values()), placement.main
    for device in sorted({*devices, main} - {DISK}):
        _device(device)
    types = source.dtypes(dtype, torch.device(main))
    opened: dict[str, OpenModel] = {}
    for entry in source.index.entries:
        if entry.name in given:
            continue
        if source.is_model(entry.name) and setup is None:
            opened[entry.name] = source.open(entry.name, types[entry.name])
            given[entry.name] = opened[entry.name].model
        else:
            given[entry.name] = source.load(entry.name, types[entry.name], torch.device(CPU))
    pipe = source.assemble(given)
    if setup is not None:  # it may change what there is to place
        setup(pipe)
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    trees = [
        tree_of_model(model, name, dtypes=opened[name].dtypes if name in opened else None)
        for name, model in models.items()
    ]
    root = Node("", (), tuple(trees), pipeline=True)
    if isinstance(placement, str):
        placement = plan(root, budgets, placement)
    else:  # a stage loads a few components of a placement that names all
        absent = {n for n in source.names() if pipe.components.get(n) is None}
        named = {name.partition(".")[0] for name in placement.devices}
        placement = placement.only(named - absent)
    pipe.ddinfer_dispatched = dispatch_pipeline(pipe, placement, root=root, opened=opened)
    return pipe
