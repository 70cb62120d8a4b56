"""``--setup FILE.py:FUNCTION``, and the examples of docs/recipes.md that use it."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import ddinfer
from ddinfer.cli.options import parse_config
from ddinfer.cli.replay import main as replay
from ddinfer.cli.retry_failed import RetryOptions, config_of
from ddinfer.config import JobConfig
from ddinfer.errors import RankError, UsageError
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from tests.test_cli import ROOT
from tests.test_run import pixels
from tests.test_run import run as run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = {"num_inference_steps": 2, "height": 32, "width": 32}
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def example(name):
    """The Python file of that name on the page."""
    [text] = re.findall(rf"```python\n(# {name}\n.*?)```", PAGE, re.DOTALL)
    return text


def job(folder, tmp_path, setup, prompt="a red cat", **options):
    return JobConfig(
        model=str(folder),
        output=str(tmp_path / "out"),
        prompt=(prompt,),
        device="cpu",
        num_threads=1,
        setup=setup,
        **{**CALL, **options},
    )


def plain(pipe, prompt, **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    return np.asarray(pipe(prompt, generator=generator, **CALL, **arguments).images[0])


@pytest.fixture
def inverted(tmp_path):
    """The page's example and the embedding that it loads → the option."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, 32, generator=generator)
    save_file({"<cat-toy>": embedding}, tmp_path / "cat-toy.safetensors")
    (tmp_path / "textual_inversion.py").write_text(example("textual_inversion.py"))
    return f"{tmp_path / 'textual_inversion.py'}:setup"


@pytest.mark.parametrize("mode", ["plain", "balanced", "continuous"])
def test_textual_inversion_is_that_of_diffusers(tiny, tmp_path, inverted, mode):
    prompt = "a red <cat-toy>"
    if mode == "continuous":
        run_on_ranks(job(tiny("sd"), tmp_path, inverted, prompt, pipeline_parallel=2), 2)
    else:
        placement = None if mode == "plain" else mode
        run_job(job(tiny("sd"), tmp_path, inverted, prompt, placement=placement))
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    without = plain(pipe, prompt)
    pipe.load_textual_inversion(str(tmp_path / "cat-toy.safetensors"), token="<cat-toy>")
    made = pixels(tmp_path / "out")[0]
    assert np.array_equal(made, plain(pipe, prompt))
    assert not np.array_equal(made, without)


def ip_adapter(pipe, folder):
    """A tiny IP-Adapter and its image encoder, as the Hub has them."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, patch_size=112, projection_dim=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "models/image_encoder")
    width = pipe.unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, 16),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(sorted(names, key=list(pipe.unet.attn_processors).index)):
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            weight = torch.randn(layer.inner_dim, width)
            tensors[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = weight
    save_file(tensors, folder / "models/ip-adapter_sd15.safetensors")
    return folder


@pytest.mark.parametrize("mode", ["plain", "balanced"])
def test_ip_adapter_is_that_of_diffusers(tiny, tmp_path, mode):
    pipe = DiffusionPipeline.from_pretrained(tiny("sd"))
    folder = ip_adapter(pipe, tmp_path / "IP-Adapter")
    text = example("ip_adapter.py")
    assert '"h94/IP-Adapter"' in text
    (tmp_path / "ip_adapter.py").write_text(text.replace('"h94/IP-Adapter"', repr(str(folder))))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "style.png")
    arguments = {"ip_adapter_image": str(tmp_path / "style.png")}
    asked = job(
        tiny("sd"),
        tmp_path,
        f"{tmp_path / 'ip_adapter.py'}:setup",
        pipeline_kwargs=arguments,
        placement=None if mode == "plain" else mode,
    )
    run_job(asked)
    pipe.load_ip_adapter(str(folder), subfolder="models", weight_name="ip-adapter_sd15.safetensors")
    pipe.set_ip_adapter_scale(0.6)
    expected = plain(pipe, "a red cat", ip_adapter_image=Image.fromarray(noise))
    assert np.array_equal(pixels(tmp_path / "out")[0], expected)


def test_the_file_is_part_of_the_job_and_only_the_command_line_names_it(
    tiny, tmp_path, inverted, capsys
):
    asked = job(tiny("sd"), tmp_path, inverted, "a red <cat-toy>")
    run_job(asked)
    assert run_job(asked).num_new == 0
    record = json.loads((tmp_path / "out/job.json").read_text())
    assert "setup" not in record["config"]
    assert record["identity"]["setup"]["function"] == "setup"
    without = job(tiny("sd"), tmp_path, None, "a red <cat-toy>")
    with pytest.raises(UsageError, match="nothing now"):
        run_job(without)
    assert config_of(RetryOptions(output=asked.output)).setup is None
    assert config_of(RetryOptions(output=asked.output, setup=inverted)).setup == inverted
    image = str(tmp_path / "out/images/0000/00000000.png")
    with pytest.raises(UsageError, match="only taken from the command line"):
        replay([image])
    assert replay([image, "--setup", inverted]) == 0
    assert "--setup" not in capsys.readouterr().out
    file = tmp_path / "textual_inversion.py"
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(UsageError, match="setup:"):
        run_job(asked)
    assert replay([image, "--setup", inverted]) == 0
    assert "its file is not the one" in capsys.readouterr().out


def test_no_configuration_file_can_name_it(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nsetup: evil.py:setup\n")
    with pytest.raises(UsageError, match=r"setup\. A file cannot switch that on"):
        parse_config(["--config", str(tmp_path / "c.yaml")], {})
    words = ["--config", str(tmp_path / "c.yaml"), "--setup", "mine.py:setup"]
    assert parse_config(words, {}).setup == "mine.py:setup"


WRONG = {
    "": "expected FILE.py:FUNCTION",
    "mine.py": "expected FILE.py:FUNCTION",
    "nowhere.py:setup": "No such file",
    "FILE:other": "has no function other; it has setup, fails",
    "BROKEN:setup": "not Python",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mine.py").write_text(
        "raise_at_import = 0\ndef setup(pipe): pass\ndef fails(pipe): raise ValueError('no')\n"
    )
    (tmp_path / "broken.py").write_text("def setup(:\n")
    return {"FILE": str(tmp_path / "mine.py"), "BROKEN": str(tmp_path / "broken.py")}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_options_are_refused_before_loading(tiny, tmp_path, files, option):
    given = option
    for name, path in files.items():
        given = given.replace(name, path)
    if option == "":
        given = ":"
    with pytest.raises(UsageError, match=WRONG[option]) as error:
        prepare(resolve_config(job(tiny("sd"), tmp_path, given)))
    assert "\n" not in str(error.value)


def test_checking_runs_nothing(tiny, tmp_path):
    (tmp_path / "loud.py").write_text("print(1 / 0)\ndef setup(pipe): pass\n")
    prepare(resolve_config(job(tiny("sd"), tmp_path, f"{tmp_path / 'loud.py'}:setup")))


def test_a_function_that_fails_ends_the_job_by_name(tiny, tmp_path, files):
    with pytest.raises(UsageError, match="fails: ValueError: no"):
        run_job(job(tiny("sd"), tmp_path, f"{files['FILE']}:fails"))


def test_stages_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--setup does not go with --placement staged"):
        JobConfig(model="m", setup="f.py:setup", placement="staged")


CHANGES = {
    "a hook": "pipe.unet.register_forward_hook(lambda *_: None)",
    "a processor": "pipe.unet.set_default_attn_processor()",
    "a weight": "pipe.unet.conv_in.weight.mul_(2)",
    "FreeU": "pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)",
}


@pytest.mark.parametrize("name", ["FreeU"])
def test_a_change_of_a_denoiser_that_others_hold_is_refused(tiny, tmp_path, name):
    (tmp_path / "freeu.py").write_text(f"def setup(pipe):\n    {CHANGES[name]}\n")
    asked = job(tiny("sd"), tmp_path, f"{tmp_path / 'freeu.py'}:setup", pipeline_parallel=2)
    with pytest.raises((UsageError, RankError), match="changed the unet"):
        run_on_ranks(asked, 2)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_denoiser_are_seen(tiny, tmp_path, name):
    from ddinfer.engines.setup_file import set_up_leader

    pipe = ddinfer.load_pipeline(tiny("sd"))
    (tmp_path / "change.py").write_text(
        f"import torch\n@torch.no_grad()\ndef setup(pipe):\n    {CHANGES[name]}\n"
    )
    with pytest.raises(UsageError, match="changed the unet"):
        set_up_leader(pipe, {"unet": pipe.unet}, f"{tmp_path / 'change.py'}:setup")
    (tmp_path / "change.py").write_text("def setup(pipe):\n    pipe.vae.enable_slicing()\n")
    set_up_leader(pipe, {"unet": pipe.unet}, f"{tmp_path / 'change.py'}:setup")
