"""LoRA without peft: low-rank weights added to a model's layers, in peft's unmerged arithmetic.

A layer returns ``result + up(down(x)) * scale`` for each LoRA of the current set. The low-rank
weights are modules inside the layer, so that they go where the layer goes: to a device, into a
placement, onto the rank that holds it. All LoRAs of a job stay loaded; which of them a call
uses, and how much, is a value of the call (`loras_set`).
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.config import parse_lora
from ddinfer.errors import UsageError, list_some
from ddinfer.models.hub import fetch_file, list_files

if TYPE_CHECKING:
    import torch

#: Parts of tensors' names in files that hold something else, and what it is.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_embedding": "a LoRA of embeddings",
    "norm_q.weight": "a Control LoRA, which replaces norms",
    "query_norm.scale": "a Control LoRA, which replaces norms",
    "lora_controlnet": "a Control LoRA, which replaces norms",
}

#: LoRA → weight, of the call that this thread makes; ``None``: each with its default.
_active: ContextVar[tuple[tuple[str, float], ...] | None] = ContextVar("active_loras", default=None)

#: The argument by which the set goes with a denoiser's call to other ranks.
_ARGUMENT = "ddinfer_loras"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a job.

    Attributes:
        name: by which prompts give it a weight.
        path: a safetensors file.
        component: that its denoiser's weights are for, such as transformer_2 of two denoisers;
            ``None``: as the file says.
        weight: in calls that say nothing.
    """

    name: str
    path: Path
    component: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class LowRank:
    """What a file has for one layer."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    alpha: float
    rank_root: bool = False


def _scale(alpha: float, divisor: float, weight: float) -> float:
    return weight * alpha / divisor


def find_lora(where: str, *, token: str | None = None) -> Path:
    """The file of a LoRA: a path, or a Hub id, ``owner/name`` or ``owner/name/FILE.safetensors``.

    Raises:
        UsageError: no such file, or not one alone.
        HubError: the Hub could not be reached.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        return path / _only_file(where, sorted(p.name for p in path.glob("*.safetensors")))
    if path.is_file() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/[\w./-]+)?", where):
        if not path.is_file():
            raise UsageError(f"--lora {where}: no such file")
        if path.suffix != ".safetensors":
            raise UsageError(
                f"--lora {where}: expected a .safetensors file; others can run code when read"
            )
        return path
    owner, name, *rest = where.split("/")
    repo = f"{owner}/{name}"
    file = "/".join(rest) or _only_file(where, list_files(repo, ".safetensors", token=token))
    return fetch_file(repo, file, token=token)


def find_loras(options: Iterable[str], *, token: str | None = None) -> tuple[LoraFile, ...]:
    """The files of ``--lora`` options, fetched where they are on the Hub.

    Raises:
        UsageError, HubError: see `find_lora`.
    """
    return tuple(
        LoraFile(lora.name, find_lora(lora.where, token=token), lora.component, lora.weight)
        for lora in map(parse_lora, options)
    )


def _only_file(where: str, names: list[str]) -> str:
    standard = "pytorch_lora_weights.safetensors"
    if len(names) != 1 and standard not in names:
        raise UsageError(
            f"--lora {where}: expected one .safetensors file, found {list_some(names) or 'none'}; "
            "name the file"
        )
    return names[0] if len(names) == 1 else standard


def read_lora(
    kind: Any, lora: LoraFile, components: Iterable[str], unet_config: Any = None
) -> dict[str, dict[str, LowRank]]:
    """Component → layer → low-rank weights, converted by the pipeline class's own loader.

    Args:
        kind: the pipeline's class.
        components: of the pipeline.

    Raises:
        UsageError: the class takes no LoRA, or the file has what cannot be applied; names it.
    """
    import safetensors

    what = f"LoRA {lora.name} ({lora.path.name})"
    if not hasattr(kind, "lora_state_dict"):
        raise UsageError(f"{what}: diffusers has no LoRA loader for {kind.__name__}")
    try:
        with safetensors.safe_open(lora.path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = (file.metadata() or {}).get("lora_adapter_metadata")
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f"{what} is not a safetensors file: {error}") from None
    for key in tensors:
        for part, other in _OTHERS.items():
            if part in key:
                raise UsageError(f"{what} is {other} ({key}), which ddinfer does not apply")
    options: dict[str, Any] = {"unet_config": unet_config} if unet_config is not None else {}
    if "return_alphas" in inspect.signature(kind.lora_state_dict).parameters:
        options["return_alphas"] = True
    try:
        converted = kind.lora_state_dict(tensors, **options)
    except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise UsageError(f"{what} is in no format that diffusers reads: {error}") from None
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    known = set(components)
    strange = [key for key in state if key.partition(".")[0] not in known]
    if strange or not state:
        raise UsageError(
            f"{what} is not for a {kind.__name__}: its keys name none of the components "
            f"{', '.join(sorted(known))}: {list_some(strange) or 'it is empty'}"
        )
    found = {}
    for name in sorted({key.partition(".")[0] for key in state}):
        is_text = name.startswith("text_encoder")
        try:
            weights = _peft_names(_inside(state, name), is_text=is_text)
        except ValueError as error:
            raise UsageError(f"{what}: its weights for {name} cannot be read: {error}") from None
        settings = _inside(json.loads(metadata), name) if metadata else {}
        found[name] = _low_ranks(
            what,
            weights,
            _Alphas.of_metadata(settings)
            if settings
            else _Alphas.of(_inside(alphas or {}, name), weights, is_text=is_text),
        )
    if lora.component is not None:
        moved = [name for name in found if not name.startswith("text_encoder")]
        if lora.component not in known or len(moved) != 1:
            raise UsageError(
                f"{what}: its weights are for {', '.join(found)}, which cannot go to "
                f"{lora.component}; the components are {', '.join(sorted(known))}"
            )
        found[lora.component] = found.pop(moved[0])
    return found


def _inside(values: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _peft_names(state: dict[str, Any], *, is_text: bool) -> dict[str, Any]:
    """``layer.lora_A.weight`` and ``layer.lora_B.weight``, by diffusers' own rules.

    Raises:
        ValueError: no rule fits.
    """
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if is_text:
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    if "lora_A" not in next(iter(state)):
        return convert_unet_state_dict_to_peft(state)
    return state


@dataclass(frozen=True)
class _Alphas:
    """The alphas of a component's layers, as diffusers gives them to peft.

    Attributes:
        patterns: regular expressions for the ends of layers' names → alpha.
        default: of all other layers.
    """

    patterns: Mapping[str, float]
    default: float
    rank_root: bool = False

    @classmethod
    def of(cls, alphas: Mapping[str, Any], state: Mapping[str, Any], *, is_text: bool) -> _Alphas:
        """
        Args:
            alphas: key of the file → alpha.
            state: ``layer.lora_A.weight``, … → tensor.
        """
        from diffusers.utils import get_peft_kwargs

        start = "" if is_text else "^"  # as its loaders do
        ranks = {f"{start}{k}": v.shape[1] for k, v in state.items() if k.endswith("lora_B.weight")}
        plain = {key: float(alpha) for key, alpha in alphas.items()}
        found = get_peft_kwargs(ranks, plain, state, is_unet=not is_text)
        return cls(found["alpha_pattern"], found["lora_alpha"])

    @classmethod
    def of_metadata(cls, settings: Mapping[str, Any]) -> _Alphas:
        """By peft's own settings, which its training scripts write into the file."""
        patterns = settings.get("alpha_pattern") or {}
        return cls(patterns, settings["lora_alpha"], bool(settings.get("use_rslora")))

    def of_layer(self, name: str) -> float:
        for pattern, alpha in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return alpha
        return self.default


def _low_ranks(what: str, state: Mapping[str, Any], alphas: _Alphas) -> dict[str, LowRank]:
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in state.items():
        layer, _, rest = key.partition(".lora_")
        if rest not in ("A.weight", "B.weight", "B.bias"):
            raise UsageError(f"{what} has {key}, which is not a low-rank weight that ddinfer knows")
        layers.setdefault(layer, {})[rest] = tensor
    found = {}
    for layer, parts in layers.items():
        if "A.weight" not in parts or "B.weight" not in parts:
            raise UsageError(f"{what} has only {', '.join(parts)} of lora_A and lora_B for {layer}")
        down, up, bias = parts["A.weight"], parts["B.weight"], parts.get("B.bias")
        found[layer] = LowRank(down, up, bias, alphas.of_layer(layer), alphas.rank_root)
    return found


def add_lora(
    model: torch.nn.Module,
    lora: LoraFile,
    layers: Mapping[str, LowRank],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Put a LoRA's weights added to a model's layers, in the layers' types.

    Args:
        dtypes: tensor's name → its type, of a model that is not filled yet.

    Raises:
        UsageError: layers that the model does not have, or of another kind or shape; named.
    """
    import torch

    layers = check_layers(model, lora, layers)
    for name, low in layers.items():
        layer: Any = model.get_submodule(name)
        if "lora" not in layer._modules:
            layer.add_module("lora", torch.nn.ModuleDict())
            layer.register_forward_hook(_add_low_ranks, with_kwargs=True)
        dtype = (dtypes or {}).get(f"{name}.weight", layer.weight.dtype)
        made: Any = _module(layer, low, dtype)
        rank = low.down.shape[0]
        divisor = math.sqrt(rank) if low.rank_root else rank
        made.scale, made.default = functools.partial(_scale, low.alpha, divisor), lora.weight
        layer.lora[lora.name] = made


def check_layers(
    model: torch.nn.Module, lora: LoraFile, layers: Mapping[str, LowRank]
) -> Mapping[str, LowRank]:
    """The same by the model's own names, once it is known that they fit.

    Raises:
        UsageError: see `add_lora`.
    """
    import torch

    modules = dict(model.named_modules())
    if not hasattr(model, "text_model"):  # transformers' CLIP had one more level
        layers = {name.removeprefix("text_model."): low for name, low in layers.items()}
    what = f"LoRA {lora.name} ({lora.path.name}) is not for this {type(model).__name__}"
    missing = [name for name in layers if name not in modules]
    if missing:
        raise UsageError(f"{what}, which lacks the layers (of {len(layers)}) {list_some(missing)}")
    convs = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for name, low in layers.items():
        layer: Any = modules[name]
        if not isinstance(layer, (torch.nn.Linear, *convs)) or getattr(layer, "groups", 1) > 1:
            raise UsageError(f"{what}: {name} is a {type(layer).__name__}; expected Linear or Conv")
        rank, expected = low.down.shape[0], tuple(layer.weight.shape)
        ones = (1,) * (len(expected) - 2)
        shapes = (tuple(low.down.shape), tuple(low.up.shape))
        if shapes != ((rank, *expected[1:]), (expected[0], rank, *ones)):
            raise UsageError(
                f"{what}: its weights for {name} are {shapes[0]} and {shapes[1]}, the layer's "
                f"are {expected}"
            )
    return layers


def _module(layer: Any, low: LowRank, dtype: torch.dtype) -> torch.nn.Module:
    """``down`` and ``up`` as peft makes them for a layer."""
    import torch

    rank = low.down.shape[0]
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    plain: Any = next(k for k in kinds if isinstance(layer, k))
    with torch.device("meta"):
        if plain is torch.nn.Linear:
            down = plain(layer.in_features, rank, bias=False)
            up = plain(rank, layer.out_features, bias=low.bias is not None)
        else:
            shape = (layer.kernel_size, layer.stride, layer.padding)
            down = plain(layer.in_channels, rank, *shape, bias=False)
            ones = (1,) * len(layer.kernel_size)
            up = plain(rank, layer.out_channels, ones, ones, bias=low.bias is not None)
    made = torch.nn.ModuleDict({"down": down, "up": up})
    home = layer.weight.device if layer.weight.device.type != "meta" else "cpu"
    for part, name, tensor in (
        ("down", "weight", low.down),
        ("up", "weight", low.up),
        ("up", "bias", low.bias),
    ):
        if tensor is not None:
            value = tensor.to(home, dtype).contiguous()
            made[part].register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return made.eval()


def _add_low_ranks(layer: Any, args: Any, kwargs: Any, result: torch.Tensor) -> torch.Tensor:
    """A forward hook: peft's unmerged forward, with LoRAs in the order of their names."""
    active, loras = _active.get(), layer.lora
    if active is None:
        active = tuple((name, loras[name].default) for name in sorted(loras))
    x, dtype = args[0] if args else next(iter(kwargs.values())), result.dtype
    for name, weight in active:
        if weight and name in loras:
            low = loras[name]
            x = x.to(low["down"].weight.dtype)
            result = result + low["up"](low["down"](x)) * low.scale(weight)
    return result.to(dtype)


def loras_of(pipe: Any) -> set[str]:
    """Names of the LoRAs that a pipeline's models have from here."""
    import torch

    return {
        name
        for model in pipe.components.values()
        if isinstance(model, torch.nn.Module)
        for module in model.modules()
        if isinstance(found := module._modules.get("lora"), torch.nn.ModuleDict)
        for name in found
    }


@contextmanager
def loras_set(weights: Mapping[str, float] | None) -> Iterator[None]:
    """Inside, calls on this thread use these LoRAs; ``None``: as they would without this."""
    if weights is None:
        yield
        return
    token = _active.set(tuple(sorted(weights.items())))
    try:
        yield
    finally:
        _active.reset(token)


def active_loras() -> tuple[tuple[str, float], ...] | None:
    """The set of this thread's call."""
    return _active.get()


def send_with_calls(model: torch.nn.Module) -> None:
    """Let the set of LoRAs travel with a model's calls as an argument.

    For a denoiser whose calls run on other threads and ranks than the pipeline's.
    """
    forward = model.forward

    @functools.wraps(forward)
    def received(*args: Any, **kwargs: Any) -> Any:
        sent = kwargs.pop(_ARGUMENT, None)
        with loras_set(None if sent is None else dict(sent)):
            return forward(*args, **kwargs)

    def sent(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        active = _active.get()
        return None if active is None else (args, {**kwargs, _ARGUMENT: active})

    model.forward = received
    model.register_forward_pre_hook(sent, with_kwargs=True)
