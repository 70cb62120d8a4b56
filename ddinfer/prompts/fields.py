"""The fields of a prompt: names, types, and help with misspelt names."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ddinfer.errors import InputError
from ddinfer.inputs import MEDIA_INPUTS, check_media_file, is_plain, join_hashes, load_input
from ddinfer.request import (
    CALL_FIELDS,
    GIVEN_BY_DDINFER,
    MAX_SEED,
    PIPELINE_SETTINGS,
    Prompt,
)

#: Fields that every prompt may have, whatever the pipeline.
STANDARD_FIELDS = (
    *("prompt", "id", "negative_prompt", "seed", "num_images"),
    *CALL_FIELDS,
    *PIPELINE_SETTINGS,
)

#: Call arguments of diffusers' pipelines that a file can hold: accepted where the pipeline is not
#: known (`read_requests`). In a job the pipeline's own signature decides.
COMMON_CALL_ARGUMENTS = (
    *("prompt_2", "prompt_3", "prompt_4", "negative_prompt_2", "negative_prompt_3"),
    *("negative_prompt_4", "adapter_conditioning_factor", "adapter_conditioning_scale"),
    *("aesthetic_score", "attention_kwargs", "caption_upsample_temperature", "cfg_normalization"),
    *("cfg_trunc_ratio", "cfg_truncation", "clean_caption", "clip_skip"),
    *("complex_human_instruction", "control_guidance_end", "control_guidance_start"),
    *("control_mode", "controlnet_conditioning_scale", "crops_coords_top_left"),
    *("cross_attention_kwargs", "decode_chunk_size", "decode_noise_scale", "decode_timestep"),
    *("decoder_guidance_scale", "decoder_num_inference_steps", "denoising_end"),
    *("denoising_start", "distilled_guidance_scale", "edit_guidance_scale", "editing_prompt"),
    *("enable_safety_check", "eta", "fps", "frame_rate", "guess_mode", "guidance_rescale"),
    *("guidance_scale_2", "image_guidance_scale", "joint_attention_kwargs"),
    *("max_guidance_scale", "max_sequence_length", "min_guidance_scale", "motion_bucket_id"),
    *("mu", "negative_aesthetic_score", "negative_crops_coords_top_left"),
    *("negative_original_size", "negative_target_size", "noise_aug_strength", "noise_level"),
    *("num_frames", "original_size", "padding_mask_crop", "pag_adaptive_scale", "pag_scale"),
    *("prior_guidance_scale", "prior_num_inference_steps", "prompt_strength", "sag_scale"),
    *("shift", "sigmas", "skip_guidance_layers", "skip_layer_guidance_scale"),
    *("skip_layer_guidance_start", "skip_layer_guidance_stop", "strength", "system_prompt"),
    *("target_size", "timesteps", "true_cfg_scale", "use_dynamic_cfg", "use_resolution_binning"),
)

#: What ddinfer gives the pipeline itself, so that no prompt may give it.
RESERVED_FIELDS = {
    **GIVEN_BY_DDINFER,
    "callback": "a prompt file cannot hold a function",
    "callback_on_step_end": "a prompt file cannot hold a function",
}

#: What other tools call our fields.
FOREIGN_NAMES = {
    "steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "scale": "guidance_scale",
    "negative": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "uncond": "negative_prompt",
    "prompts": "prompt",
    "n": "num_images",
    "num_images_per_prompt": "num_images",
    "w": "width",
    "h": "height",
    "size": "width and height",
}

_TENSOR_ENDINGS = ("_embeds", "latents", "_embeddings", "attention_mask", "_hidden_states")


def text_problem(text: str) -> str | None:
    """Why ``text`` cannot be a prompt or an id, or ``None``."""
    if "\0" in text:
        return "contains a NUL character"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            return f"contains a lone surrogate (U+{code:04X}), which is not a character"
    return None


def is_text_field(name: str) -> bool:
    """Whether a csv cell of this column is text as it stands, never a number or JSON."""
    return name in ("id", "scheduler") or name.rstrip("_234").endswith("prompt")


class FieldChecker:
    """Checks rows of one prompt file, one after the other.

    Args:
        source: the file's name for messages.
        folder: what image paths are relative to.
        call_parameters: names that the pipeline's ``__call__`` takes; without "prompt" among
            them, rows have none. ``None`` where it is not known: then `COMMON_CALL_ARGUMENTS`
            and `MEDIA_INPUTS` are accepted.
        in_program: the row comes from a program rather than a file: values may be objects, and
            without ``call_parameters`` any argument's name is taken.
    """

    def __init__(
        self,
        source: str,
        folder: str,
        call_parameters: Collection[str] | None = None,
        *,
        in_program: bool = False,
    ):
        self.source, self.folder, self.in_program = source, folder, in_program
        self.call_parameters = None if call_parameters is None else frozenset(call_parameters)
        self.nulls: Counter[str] = Counter()  # field → rows where it is null
        self.counts_items = False  # rows are items of a JSON list rather than lines
        self._ids: dict[str, int | None] = {}
        self._file_hashes: dict[str, str] = {}
        self.takes_prompt = call_parameters is None or "prompt" in call_parameters
        own = ("id", "seed", "num_images", *PIPELINE_SETTINGS)
        if self.call_parameters is None:
            known = {*STANDARD_FIELDS, *COMMON_CALL_ARGUMENTS, *MEDIA_INPUTS}
        else:
            known = {*own, *(n for n in self.call_parameters if self._holdable(n))}
        self.known = frozenset(known) - set(RESERVED_FIELDS)

    def error(self, message: str, line: int | None) -> InputError:
        if self.counts_items and line is not None:
            return InputError(f"item {line}: {message}", file=self.source)
        return InputError(message, file=self.source, line=line)

    def place(self, line: int | None) -> str:
        """Where a row is, for messages that name another one."""
        if line is None:
            return self.source
        return f"{self.source}: item {line}" if self.counts_items else f"{self.source}:{line}"

    def suggestion(self, name: str) -> str | None:
        """The field that ``name`` was probably meant to be."""
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        if plain in self.known:
            return plain
        foreign = FOREIGN_NAMES.get(plain)
        if foreign is not None and (foreign in self.known or " " in foreign):
            return foreign
        is_short = len(plain) < 6  # one letter of few weighs more
        close = difflib.get_close_matches(plain, self.known, cutoff=0.75 if is_short else 0.8)
        most = 1 if is_short else 2  # prompt_id is not prompt
        return next((name for name in close if abs(len(name) - len(plain)) <= most), None)

    def is_refused(self, name: str) -> bool:
        """Whether ``name`` is known well, and this pipeline does not take it."""
        return name not in self.known and name in (*STANDARD_FIELDS, *MEDIA_INPUTS)

    def unknown(self, name: str) -> str:
        """Message about a field that is not known."""
        if name in RESERVED_FIELDS:
            return f"{name!r} cannot be set in a prompt: {RESERVED_FIELDS[name]}"
        if not self._holdable(name):
            return f"{name!r} takes a tensor, which a prompt file cannot hold"
        if self.is_refused(name):
            hint = "; --pipeline img2img or inpaint runs one that does" if "image" in name else ""
            return f"this pipeline takes no {name}{hint}"
        meant = self.suggestion(name)
        if meant is not None:
            return f"unknown field {name!r}; did you mean {meant}?"
        if self.call_parameters is None:
            return (
                f"unknown field {name!r}; known are {', '.join(STANDARD_FIELDS)} and the usual "
                "arguments of diffusers pipelines"
            )
        standard = [n for n in STANDARD_FIELDS if n in self.known]
        rest = sorted(self.known.difference(standard))
        return f"unknown field {name!r}; this pipeline takes {', '.join([*standard, *rest])}"

    def check(self, row: Mapping[str, Any], line: int | None) -> Prompt:
        """One row, every field of a known name and a right type.

        ``None`` means the default: the job's, else the pipeline's own. `nulls` counts them. Image
        inputs become absolute paths, with their hashes in ``input_hashes``.
        """
        out: dict[str, Any] = {}
        for name, value in row.items():
            if name not in self.known and not self._open_to(name):
                raise self.error(self.unknown(name), line)
            if value is None and name != "prompt":
                self.nulls[name] += 1
                continue
            checker = _CHECKS.get(name)
            if checker is not None:
                try:
                    out[name] = checker(value)
                except _WrongType as error:
                    raise self.error(f"{name} {error}, got {_shown(value)}", line) from None
            elif name in MEDIA_INPUTS or (self.in_program and not is_plain(value)):
                self._add_input(out, name, value, line)
            else:
                if is_text_field(name) and not isinstance(value, str):
                    raise self.error(f"{name} must be text, got {_shown(value)}", line)
                out[name] = value
        if "prompt" not in out:
            if self.takes_prompt:
                raise self.error("no 'prompt'; every row needs one", line)
            out["prompt"] = ""
        if "id" in out:
            name = out["id"]
            if name in self._ids:
                raise self.error(
                    f"id {name!r} is already used by {self.place(self._ids[name])}; ids must be "
                    "unique",
                    line,
                )
            self._ids[name] = line
        return Prompt(out, self.place(line))

    def check_defaults(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for all prompts: those that are null left out, image inputs as in `check`.

        Names are not looked at.
        """
        out: dict[str, Any] = {}
        for name, value in arguments.items():
            if value is None:
                self.nulls[name] += 1
            elif name in MEDIA_INPUTS:
                self._add_input(out, name, value, None)
            else:
                out[name] = value
        return out

    def note_nulls(self) -> str | None:
        """A note for the user about fields that are null."""
        if not self.nulls:
            return None
        names = ", ".join(f"{name} ({count})" for name, count in sorted(self.nulls.items()))
        return f"{self.source}: no value, so the default is used: {names}"

    def _open_to(self, name: str) -> bool:
        return self.in_program and self.call_parameters is None and name not in RESERVED_FIELDS

    def _holdable(self, name: str) -> bool:
        return self.in_program or name in MEDIA_INPUTS or not name.endswith(_TENSOR_ENDINGS)

    def _add_input(self, out: dict[str, Any], name: str, value: Any, line: int | None) -> None:
        """Add an image or an object, and the hash of its content to ``input_hashes``."""
        try:
            out[name], digest = self._input(name, value)
        except (InputError, TypeError) as error:
            raise self.error(str(error), line) from None
        out.setdefault("input_hashes", {})[name] = digest

    def _input(self, name: str, value: Any) -> tuple[Any, str]:
        """→ (the value with absolute paths, the hash of its content)."""
        if name in MEDIA_INPUTS:
            if isinstance(value, (list, tuple)) and value:
                found = [self._input(name, item) for item in value]
                return [item for item, _ in found], join_hashes(digest for _, digest in found)
            if isinstance(value, str):
                return self._media_file(name, value)
            if not self.in_program or is_plain(value):
                raise InputError(
                    f"{name} must be a file's path or a list of paths, got {_shown(value)}"
                )
        return value, load_input(name, value)[1]

    def _media_file(self, name: str, path: str) -> tuple[str, str]:
        if path.startswith(("http://", "https://")):
            raise InputError(f"{name}: {path!r} is an address; download it and give its path")
        where = os.path.abspath(os.path.join(self.folder, path))
        if where not in self._file_hashes:
            self._file_hashes[where] = check_media_file(name, where)
        return where, self._file_hashes[where]


class _WrongType(Exception):
    """Says what a value must be."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongType("must be text")
    return value


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise _WrongType("must be non-empty text or an integer")
    return str(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise _WrongType("must be an integer within 0 … 2**63 - 1")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _WrongType("must be a positive integer")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _WrongType("must be a finite number")


def _weights(value: Any) -> dict[str, float]:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _finite(weight) for name, weight in sorted(value.items())}
    raise _WrongType('must be weights by name, such as {"pixel": 0.8}')


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "scheduler": _text,
    "lora": _weights,
    "prompt": _text,
    "negative_prompt": _text,
    "id": _id,
    "seed": _seed,
    "num_images": _positive,
    "width": _positive,
    "height": _positive,
    "num_inference_steps": _positive,
    "num_frames": _positive,
    "guidance_scale": _finite,
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
