"""What this package uses of diffusers and transformers that they do not promise to keep.

Each stands here once. Where a library no longer has it, the public way is taken, and logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

log = logging.getLogger(__name__)


def _missing(name: str, instead: str) -> None:
    log.info("%s is not in the installed libraries; %s", name, instead)


def current_class(kind: Any, config: Mapping[str, Any]) -> Any:
    """The class that diffusers makes of an old one's config (Transformer2DModel: DiT, PixArt)."""
    try:
        from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
        from diffusers.models.modeling_utils import LegacyModelMixin
    except ImportError:
        _missing("diffusers' LegacyModelMixin", f"{kind.__name__} is built as it is called")
        return kind
    is_legacy = issubclass(kind, LegacyModelMixin)
    return _fetch_remapped_cls_from_config(config, kind) if is_legacy else kind


def current_names(model: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's table with the names that diffusers gives its tensors today.

    A model whose older checkpoints are named otherwise renames the keys, and itself.
    """
    found = dict(table)
    rename = getattr(model, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(found)  # the values pass through
    return found


def current_transformers_name(name: str) -> str:
    """The present name of a transformers class that older pipelines call differently."""
    try:
        from diffusers.utils.deprecation_utils import _maybe_remap_transformers_class
    except ImportError:
        _missing("diffusers' table of renamed transformers classes", f"{name} is looked up")
        return name
    return _maybe_remap_transformers_class(name) or name


def no_init_weights() -> AbstractContextManager[Any]:
    """Spares transformers from initializing weights that are on meta."""
    try:
        from transformers.initialization import no_init_weights as found
    except ImportError:
        _missing("transformers' no_init_weights", "weights on meta are initialized")
        return nullcontext()
    return found()
