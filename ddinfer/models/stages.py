"""A pipeline in three stages, of which one has its weights in memory: encode, denoise, decode.

In each stage the pipeline is whole: the components of the other stages are there as stand-ins
that know their shapes, types and settings, and whose blocks are read from disk should the
pipeline use one after all. So the pipeline's own code runs unchanged in every stage.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ddinfer.errors import UsageError
from ddinfer.models.checkpoint import weight_files
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.devices import CPU, DISK, PlacementError, trim_heap
from ddinfer.models.meta_model import OpenModel
from ddinfer.models.offload import dispatch_pipeline
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.placement import Placement
from ddinfer.models.planner import HEADROOM, plan
from ddinfer.models.tree import Node, tree_of

if TYPE_CHECKING:
    import torch

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

#: What runs beside a denoiser, step by step.
_RUNS_EVERY_STEP = ("controlnet", "motion_adapter", "adapter", "unconditional_transformer")
_ENCODERS = ("image_encoder", "mllm", "vision_language_encoder")
_DECODERS = ("vae", "safety_checker")
_ALTERNATIVE = "use --placement balanced, which holds the whole pipeline at once"


def components_by_stage(source: PipelineSource) -> dict[Stage, tuple[str, ...]]:
    """The components with weights that each stage needs.

    Raises:
        UsageError: a pipeline that cannot be run in stages, as far as its class can tell.
    """
    kind = source.kind
    name = kind.__name__
    parameters = inspect.signature(kind.__call__).parameters
    found: dict[Stage, list[str]] = {stage: [] for stage in STAGES}
    for component in source.model_names():
        if source.is_model(component):
            stage = _stage_of(component)
            if stage is None:
                raise UsageError(
                    f"{name} cannot run in stages: ddinfer does not know when it needs its "
                    f"{component}; {_ALTERNATIVE}"
                )
            found[stage].append(component)
    wanted = {
        "encode_prompt method": hasattr(kind, "encode_prompt"),
        "output_type argument": "output_type" in parameters,
        "text encoder": bool(found["encode"]),
        f"denoiser ({', '.join(DENOISER_NAMES[:2])}, …)": bool(
            set(found["denoise"]) & set(DENOISER_NAMES)
        ),
        "vae": "vae" in found["decode"],
    }
    missing = [what for what, there in wanted.items() if not there]
    if missing:
        raise UsageError(f"{name} cannot run in stages: it has no {missing[0]}; {_ALTERNATIVE}")
    if "decode_chunk_size" in parameters:
        raise UsageError(
            f"{name} cannot run in stages: it decodes a video in several pieces; {_ALTERNATIVE}"
        )
    return {stage: tuple(names) for stage, names in found.items()}


def _stage_of(component: str) -> Stage | None:
    if component.startswith("text_encoder") or component in _ENCODERS:
        return "encode"
    if component in DENOISER_NAMES or component.startswith(_RUNS_EVERY_STEP):
        return "denoise"
    return "decode" if component in _DECODERS else None


def plan_stages(
    root: Node,
    components: Mapping[Stage, tuple[str, ...]],
    budgets: Mapping[str, int],
) -> dict[Stage, Placement]:
    """Where the weights of each stage lie while it is its turn: on the first GPU where they fit
    there, else evenly over all.

    Args:
        root: the whole pipeline's sizes.

    Raises:
        PlacementError: a stage does not fit; it is named.
    """
    placements: dict[Stage, Placement] = {}
    first = budgets.get(next((d for d in budgets if d not in (CPU, DISK)), CPU), 0)
    for stage, names in components.items():
        parts = tuple(child for child in root.children if child.name in names)
        tree = Node("", (), parts, pipeline=True)
        fits = tree.num_bytes() <= first - int(first * HEADROOM)
        try:
            placements[stage] = plan(tree, budgets, "auto" if fits else "balanced")
        except PlacementError as error:
            raise PlacementError(f"the {stage} stage ({', '.join(names)}): {error}") from error
    return placements


class StagedPipeline:
    """Loads a pipeline anew for each stage; at most one stage's weights are in memory.

    Args:
        budgets: device → bytes, as `ddinfer.models.devices.memory_budgets` gives them.
        on_progress: called with every tensor that was read, so that others see it move.

    Raises:
        UsageError: the pipeline cannot run in stages, or a stage does not fit the budgets.
    """

    def __init__(
        self,
        source: PipelineSource,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype],
        budgets: Mapping[str, int],
        *,
        on_progress: Callable[[], None] | None = None,
    ):
        import torch

        self.source, self.on_progress = source, on_progress
        self.components = components_by_stage(source)
        is_gpu = any(device not in (CPU, DISK) for device in budgets)
        root = tree_of(source, dtype=dtype, gpu=is_gpu)
        self.placements = plan_stages(root, self.components, budgets)
        main = next((device for device in budgets if device not in (CPU, DISK)), CPU)
        self.dtypes = source.dtypes(dtype, torch.device(main))

    @cached_property
    def _rest(self) -> dict[str, Any]:
        """Tokenizers, schedulers and the like; the stages share them."""
        import torch

        return {
            entry.name: self.source.load(entry.name, None, torch.device(CPU))
            for entry in self.source.index.entries
            if not self.source.is_model(entry.name)
        }

    def load(self, stage: Stage) -> Any:
        """The pipeline with the weights of ``stage``; `release` it before the next is loaded."""
        present = self.components[stage]
        opened = {
            name: self._open(name, is_present=name in present)
            for names in self.components.values()
            for name in names
        }
        models = {name: part.model for name, part in opened.items()}
        pipe: Any = self.source.assemble({**self._rest, **models})
        pipe.set_progress_bar_config(disable=True)
        away = {name: DISK for name in opened if name not in present}
        here = self.placements[stage]
        prefetch = here.prefetch and self._fetches(stage)
        placement = Placement({**here.devices, **away}, here.main, prefetch)
        pipe.ddinfer_dispatched = dispatch_pipeline(pipe, placement, opened=opened)
        return pipe

    def _open(self, name: str, *, is_present: bool) -> OpenModel:
        opened = self.source.open(name, self.dtypes[name], read=is_present)
        if self.on_progress is not None:
            self.on_progress()
        return replace(opened, on_progress=self.on_progress)

    def _fetches(self, stage: Stage) -> bool:
        """Whether blocks of this stage's own components come and go."""
        here = self.placements[stage]
        return any(d in (CPU, DISK) and d != here.main for d in here.devices.values())

    def weight_files(self, stage: Stage) -> list[Path]:
        """The files that loading ``stage`` will read."""
        source = self.source
        return [
            file
            for name in self.components[stage]
            for file in weight_files(
                source.folder / name, variant=source.variant, allow_pickle=source.allow_pickle
            )
        ]


def release(pipe: Any) -> None:
    """Frees the weights of a stage, whoever may still hold the pipeline. It is useless after."""
    import torch

    from ddinfer.models.stand_ins import is_stand_in

    pipe.ddinfer_dispatched.discard()
    for model in pipe.components.values():
        if not isinstance(model, torch.nn.Module):
            continue
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_stand_in(tensor) and not tensor.is_meta:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
