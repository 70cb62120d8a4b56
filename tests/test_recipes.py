"""docs/recipes.md: every command is checked with stand-ins in place of the Hub's models."""

import json
import re
import shlex
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import ddinfer
from ddinfer.cli.options import parse_config
from ddinfer.job.dry_run import plan_job
from tests.test_cli import ROOT
from tests.test_docs import FENCE
from tests.tiny_pipelines import tiny_pipeline

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")

#: The Hub's names on the page → the kind of pipeline that stands in for them.
MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "black-forest-labs/FLUX.1-dev": "flux",
    "Qwen/Qwen-Image-Edit-2509": "qwen",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan",
    "Lightricks/LTX-2": "ltx2",
}

LTX2 = {
    "_class_name": "LTX2Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKLLTX2Video"],
    "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"],
    "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "connectors": ["ltx2", "LTX2TextConnectors"],
    "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
    "vocoder": ["ltx2", "LTX2Vocoder"],
}


def commands():
    """(name of its output, words) of every command on the page."""
    found = []
    for block in FENCE.findall(PAGE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["ddinfer"]:
                found.append((words[words.index("--output") + 1], words[1:]))
    return found


def lines_after(output):
    """The prompts that are shown under a command."""
    text = PAGE.split(f"--output {output}\n```", 1)[1].split("```", 1)[0]
    return [json.loads(line) for line in re.findall(r"^    (\{.*\})$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The Hub's names → paths here."""
    root = tmp_path_factory.mktemp("hub")
    folders = {kind: tiny_pipeline(kind, root) for kind in ("sd", "sdxl", "flux", "wan", "qwen")}
    shutil.copytree(folders["wan"] / "transformer", folders["wan"] / "transformer_2")
    change_index(
        folders["wan"],
        transformer_2=["diffusers", "WanTransformer3DModel"],
        boundary_ratio=0.875,
    )
    change_index(
        folders["qwen"],
        _class_name="QwenImageEditPlusPipeline",
        processor=["transformers", "Qwen2VLProcessor"],
    )
    folders["ltx2"] = root / "ltx2"
    folders["ltx2"].mkdir()
    (folders["ltx2"] / "model_index.json").write_text(json.dumps(LTX2))
    found = {name: str(folders[kind]) for name, kind in MODELS.items()}
    sdxl = DiffusionPipeline.from_pretrained(folders["sdxl"])
    net = ControlNetModel.from_unet(sdxl.unet, conditioning_embedding_out_channels=(8, 8))
    net.save_pretrained(root / "net")
    AutoencoderKL.from_config(sdxl.vae.config).save_pretrained(root / "vae")
    found["diffusers/controlnet-canny-sdxl-1.0"] = str(root / "net")
    found["madebyollin/sdxl-vae-fp16-fix"] = str(root / "vae")
    for kind, component, ending in (
        ("sdxl", "unet", "attn1.to_q"),
        ("flux", "transformer", "attn.to_q"),
        ("wan", "transformer", "attn1.to_q"),
    ):
        pipe = ddinfer.load_pipeline(folders[kind])
        tensors = {}
        for name, layer in getattr(pipe, component).named_modules():
            if name.endswith(ending):
                down, up = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
                tensors[f"{component}.{name}.lora_A.weight"] = down
                tensors[f"{component}.{name}.lora_B.weight"] = up
        save_file(tensors, root / f"{kind}.safetensors")
    loras = {"lightning": "sdxl", "koda": "flux", "real": "flux", "high": "wan", "low": "wan"}
    return found, {name: str(root / f"{kind}.safetensors") for name, kind in loras.items()}


def change_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


def replaced(words, stand_ins, folder):
    """A command's words with what is here."""
    hub, loras = stand_ins
    out = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--model":
            word = hub[word]
        elif before == "--component":
            name, _, where = word.partition("=")
            word = f"{name}={hub[where]}"
        elif before == "--lora":
            where, _, rest = word.partition("=")
            assert where.count("/") >= 1
            word = f"{loras[re.split('[@:]', rest)[0]]}={rest}"
        elif before in ("--prompts", "--output"):
            word = str(folder / word)
        elif before == "--setup":
            name = word.partition(":")[0]
            (folder / name).write_text(re.findall(rf"```python\n(# {name}.*?)```", PAGE, re.S)[0])
            word = str(folder / word)
        out.append(word)
    variant = out.index("--variant") if "--variant" in out else None
    return out if variant is None else out[:variant] + out[variant + 2 :]


@pytest.mark.parametrize(("output", "words"), commands(), ids=[name for name, _ in commands()])
def test_the_command_is_one_that_would_run(stand_ins, tmp_path, monkeypatch, output, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    prompts = lines_after(output) or [{"prompt": "a red cat"}]
    pictures = [
        path
        for row in prompts
        for value in row.values()
        for path in (value if isinstance(value, list) else [value])
        if str(path).endswith((".png", ".jpg"))
    ]
    for path in pictures:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / path)
    text = "".join(f"{json.dumps(row)}\n" for row in prompts)
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    for name in re.findall(r"[\w-]+\.jsonl", " ".join(words)):
        (tmp_path / name).write_text(text)
    config = parse_config([*replaced(words, stand_ins, tmp_path), "--device", "cpu"], {})
    assert plan_job(config, 1)["images"] == len(prompts)


def test_every_family_has_a_recipe():
    used = " ".join(word for _, words in commands() for word in words)
    assert all(name in used for name in MODELS)
    assert len(commands()) > 10
