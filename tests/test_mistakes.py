"""What people who come from diffusers scripts get wrong most: one line each, before loading."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddinfer.config import JobConfig
from ddinfer.errors import InputError, UsageError
from ddinfer.job.prepare import prepare, resolve_config

I2I, INPAINT = {"pipeline": "img2img"}, {"pipeline": "inpaint"}
IMAGE = {"image": "a.png"}

#: What was done → the pipeline, what a row says beside its prompt, options, the answer.
MISTAKES = {
    "a misspelt argument": ("sd", {"guidance_scal": 3}, {}, "did you mean guidance_scale?"),
    "another tool's name": ("sd", {"cfg_scale": 3}, {}, "did you mean guidance_scale?"),
    "another pipeline's argument": ("sd", {"true_cfg_scale": 4}, {}, "unknown field"),
    "an image for a text pipeline": ("sd", IMAGE, {}, "--pipeline img2img or inpaint"),
    "no image for img2img": ("sd", {}, I2I, "needs the path of an image in every prompt"),
    "no mask for inpaint": ("sd", IMAGE, INPAINT, "no mask_image"),
    "a missing file": ("sd", {"image": "nowhere.png"}, I2I, "No such file"),
    "an address": ("sd", {"image": "https://x/y.png"}, I2I, "download it and give its path"),
    "a height that does not divide": ("sd", {"height": 513, "width": 512}, {}, "divisible by 8"),
    "a video's height": ("wan", {"height": 33, "width": 32}, {}, "divisible by 16"),
    "a strength beyond 1": ("sd", {**IMAGE, "strength": 1.5}, I2I, "strength"),
    "more text than fits": ("flux", {"max_sequence_length": 600}, {}, "cannot be greater than 512"),
    "no steps": ("sd", {"num_inference_steps": 0}, {}, "must be a positive integer"),
    "a number as text": ("sd", {"guidance_scale": "7.5"}, {}, "must be a finite number"),
    "a generator": ("sd", {"generator": 3}, {}, "every image has its own generator; use seed"),
    "embeddings": ("sd", {"prompt_embeds": [1]}, {}, "a prompt file cannot hold"),
    "num_images_per_prompt": ("sd", {"num_images_per_prompt": 2}, {}, "use num_images"),
    "output_type": ("sd", {"output_type": "latent"}, {}, "ddinfer decides how images come back"),
    "a callback": ("sd", {"callback_on_step_end": "f"}, {}, "cannot hold a function"),
    "a seed that is none": ("sd", {"seed": 1.5}, {}, "seed must be an integer"),
    "a sampler's other name": ("sd", {}, {"scheduler": "DPM++ 2M"}, "not a scheduler of diffusers"),
    "a scheduler without the method": ("flux", {}, {"scheduler": "DDIMScheduler"}, "DDIMScheduler"),
    "a LoRA of another model": ("sd", {}, {"lora": ("LORA",)}, "is not for a StableDiffusion"),
    "fp16 as diffusers' variant": ("sd", {}, {"dtype": "fp16"}, "none of auto, float32, float16"),
    "a single file": ("FILE", {}, {}, "from_single_file"),
    "no such model": ("./nowhere", {}, {}, "no such folder"),
    "a controlnet that is not there": (
        "sd", IMAGE, {"pipeline": "StableDiffusionControlNetPipeline"}, "has no controlnet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_common_mistake_has_one_line_for_an_answer(tiny, tmp_path, monkeypatch, mistake):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    kind, row, options, answer = MISTAKES[mistake]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    lora = tmp_path / "flux.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{key}.lora_{ab}.weight": torch.ones(2, 2) for ab in "AB"}, lora)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a red cat", **row}) + "\n")
    model = str(lora) if kind == "FILE" else kind if "/" in kind else str(tiny(kind))
    if "lora" in options:
        options = {"lora": (str(lora),)}
    with pytest.raises((UsageError, InputError), match=answer.replace("+", r"\+")) as error:
        prepare(
            resolve_config(
                JobConfig(
                    model=model,
                    prompts=str(file),
                    output=str(tmp_path / "out"),
                    device="cpu",
                    **options,
                )
            )
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
