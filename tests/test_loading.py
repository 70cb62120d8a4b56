"""Models and pipelines come back from their folders as they were saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddinfer import tiny as embedded
from ddinfer.errors import UsageError
from ddinfer.job.fingerprint import model_fingerprint
from ddinfer.models.checkpoint import CheckpointError, read_checkpoint, read_header
from ddinfer.models.index import call_parameters, pipeline_class
from ddinfer.models.loading import denoisers, load_model, load_pipeline
from ddinfer.models.meta_model import open_model, parameters_on_meta
from ddinfer.models.pipeline_folder import PipelineSource
from tests.local_hub import local_hub
from tests.mapped import mapped_file
from tests.tiny_pipelines import FROM_TEXT, KINDS, call_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = DATA["configs"]


def every_tensor(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, all buffers, and tensors that modules keep as plain attributes."""
    found = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    return found


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert type(one) is type(other)
    first, second = every_tensor(one), every_tensor(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].device == tensor.device, name
        assert second[name].dtype == tensor.dtype, name
        if tensor.grad_fn is not None:
            continue  # weight_norm's product, computed anew before each forward
        assert torch.equal(torch.nan_to_num(second[name]), torch.nan_to_num(tensor)), name


def check_class(name: str, folder: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    built = getattr(diffusers, name)(**CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # some are built as zeros, which would prove nothing
            parameter.copy_(torch.randn_like(parameter))
    built.save_pretrained(folder)
    loaded = load_model(folder)
    assert_same_model(built, loaded)
    assert not loaded.training
    own = [key for key in built.config if not key.startswith("_")]
    assert own
    assert all(plain(loaded.config[key]) == plain(built.config[key]) for key in own)


def plain(value: Any) -> Any:
    """Tuples become lists in config.json."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_class_comes_back_as_saved(name, tmp_path):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    check_class(name, tmp_path)


def test_every_exported_model_class_has_a_configuration_or_a_reason():
    exported = {
        name
        for name in dir(diffusers)
        if isinstance(getattr(diffusers, name), type)
        and issubclass(getattr(diffusers, name), diffusers.ModelMixin)
    } - {"ModelMixin"}
    assert len(CONFIGS) >= 120
    if DATA["source"].startswith(f"the defaults of diffusers {diffusers.__version__}"):
        assert exported == set(CONFIGS) | set(DATA["left_out"])
    assert all(DATA["left_out"].values())


@pytest.mark.parametrize("kind", FROM_TEXT)
def test_a_pipeline_draws_what_the_one_it_was_saved_from_draws(kind, tmp_path):
    torch.manual_seed(0)
    original = KINDS[kind]()
    original.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    for name, component in original.components.items():
        if isinstance(component, torch.nn.Module):
            assert_same_model(component.eval(), loaded.components[name])

    def draw(pipe: Any, seed: int) -> Any:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        made = pipe("a red cat", generator=generator, output_type="np", **call_arguments(kind))
        return torch.from_numpy(made.frames if hasattr(made, "frames") else made.images)

    # Weights viewed in a mapped file may lie less aligned than allocated ones: last bits differ.
    torch.testing.assert_close(draw(loaded, 1), draw(original, 1), rtol=0, atol=1e-5)
    assert not torch.allclose(draw(loaded, 2), draw(original, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_pipeline_draws_bit_for_bit_what_from_pretrained_draws(kind, tiny):
    import diffusers

    plain = diffusers.DiffusionPipeline.from_pretrained(tiny(kind), low_cpu_mem_usage=False)
    loaded = load_pipeline(tiny(kind))
    made = []
    for pipe in (plain, loaded):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        made.append(pipe("a dog", generator=generator, output_type="np", **call_arguments(kind)))
    assert (made[0].images == made[1].images).all()


def test_tied_weights_are_one_parameter_again(tiny):
    encoder = load_model(tiny("flux") / "text_encoder_2")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert not encoder.shared.weight.is_meta


def test_buffers_that_no_checkpoint_holds_are_built_for_real(tiny):
    encoder = load_model(tiny("sd") / "text_encoder")
    ids = dict(encoder.named_buffers())["embeddings.position_ids"]
    assert ids.device.type == "cpu"
    assert ids.flatten().tolist() == list(range(16))


def test_sharded_checkpoints_are_read_whole(tiny, tmp_path):
    whole = load_model(tiny("flux") / "transformer")
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(whole, load_model(tmp_path))
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"1 are missing: .*-00002-of-"):
        load_model(tmp_path)


def test_a_variant_is_taken_where_a_component_has_it(tiny, tmp_path):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny("sd"), dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = load_pipeline(tmp_path, variant="fp16", dtype="float16")
    assert_same_model(pipe.unet.eval(), loaded.unet)
    with pytest.raises(CheckpointError, match="pass --variant"):
        load_pipeline(tmp_path)
    with pytest.raises(UsageError, match="no weights of variant 'bf16'"):
        load_pipeline(tmp_path, variant="bf16")


def test_each_tensor_is_converted_and_float32_modules_stay_so(tiny):
    model = load_model(tiny("wan") / "transformer", dtype="bfloat16")
    kept = model._keep_in_fp32_modules
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    stay = {n for n in kinds if any(k in n.split(".") for k in kept)}
    assert stay
    assert {kinds[n] for n in stay} == {torch.float32}
    assert {kinds[n] for n in set(kinds) - stay} == {torch.bfloat16}


def test_an_old_text_encoder_with_position_ids_in_its_file_loads(tiny, tmp_path):
    shutil.copytree(tiny("sd") / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights = {k.replace("text_model.", ""): v.clone() for k, v in weights.items()}
    prefixed = {f"text_model.{k}": v for k, v in weights.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(prefixed, file, metadata={"format": "pt"})
    assert_same_model(
        load_model(tiny("sd") / "text_encoder"), load_model(tmp_path / "text_encoder")
    )


def test_a_component_whose_package_is_missing_is_named(tiny, tmp_path):
    shutil.copytree(tiny("sd"), tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps(data | {"tokenizer": ["transformers", "NoSuchTokenizer"]}))
    with pytest.raises(UsageError, match="NoSuchTokenizer, which is not in transformers"):
        load_pipeline(tmp_path / "sd")
    index.write_text(json.dumps(data | {"tokenizer": ["os", "system"]}))
    with pytest.raises(UsageError, match="tokenizer is a system of os; expected diffusers"):
        load_pipeline(tmp_path / "sd")


def test_missing_surplus_and_misshapen_tensors_are_named(tiny, tmp_path):
    shutil.copytree(tiny("flux") / "transformer", tmp_path / "t")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weihgt"] = weights.pop("proj_out.weight").clone()
    weights["x_embedder.bias"] = torch.zeros(7)
    save_file(weights, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "t")
    text = str(caught.value)
    assert "missing from the files (1): proj_out.weight" in text
    assert "not in the model (1): proj_out.weihgt" in text
    assert "x_embedder.bias is [7], expected [32]" in text


def test_surplus_tensors_are_told_and_not_used(tiny, tmp_path, caplog):
    for part, name in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        shutil.copytree(tiny("flux") / part, tmp_path / part)
        file = tmp_path / part / f"{name}.safetensors"
        save_file(load_file(file) | {"ema.decay": torch.zeros(7)}, file, {"format": "pt"})
        assert_same_model(load_model(tmp_path / part), load_model(tiny("flux") / part))
        assert f"{tmp_path / part}: 1 tensors that" in caplog.text
        assert "not used: ema.decay" in caplog.text


def test_a_surplus_component_is_told_and_not_loaded(tiny, tmp_path, caplog):
    shutil.copytree(tiny("sd"), tmp_path / "sd")
    file = tmp_path / "sd" / "model_index.json"
    data = json.loads(file.read_text()) | {"watermarker": ["diffusers", "UNet2DModel"]}
    file.write_text(json.dumps(data))
    pipe = load_pipeline(tmp_path / "sd")
    assert "watermarker" not in pipe.components
    assert "StableDiffusionPipeline takes no watermarker" in caplog.text


def test_how_generate_samples_is_read(tmp_path):
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1))
    model.generation_config = GenerationConfig(max_new_tokens=77, do_sample=True, top_p=0.33)
    model.save_pretrained(tmp_path)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path).generation_config
    found = load_model(tmp_path).generation_config
    assert (found.max_new_tokens, found.do_sample, found.top_p) == (77, True, 0.33)
    assert found.to_dict() == plain.to_dict()


def test_weights_in_eight_bits_need_a_type_to_compute_in(tiny, tmp_path):
    shutil.copytree(tiny("flux"), tmp_path / "flux")
    file = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}
    save_file(stored, file)
    for attempt in (
        lambda: load_model(tmp_path / "flux" / "transformer"),
        lambda: PipelineSource(tmp_path / "flux").dtypes("auto", torch.device("cuda")),
    ):
        with pytest.raises(CheckpointError, match=r"stored in float8_e4m3fn, .* give --dtype"):
            attempt()
    weight = load_pipeline(tmp_path / "flux").transformer.proj_out.weight
    assert torch.equal(weight, stored["proj_out.weight"].float())


def test_a_file_cut_short_is_an_error_before_anything_is_built(tiny, tmp_path):
    shutil.copytree(tiny("flux") / "transformer", tmp_path / "t")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(tmp_path / "t")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_model(tmp_path / "t")


def test_headers_tell_the_truth_without_torch(tiny):
    file = tiny("flux") / "transformer" / "diffusion_pytorch_model.safetensors"
    header = read_header(file)
    weights = load_file(file)
    assert {n: t.shape for n, t in header.items()} == {
        n: tuple(w.shape) for n, w in weights.items()
    }
    assert {n: t.num_bytes for n, t in header.items()} == {n: w.nbytes for n, w in weights.items()}
    code = (
        "import sys; from pathlib import Path; import ddinfer.models.checkpoint as c; "
        f"c.read_header(Path({str(file)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_pickles_are_refused_unless_allowed(tiny, tmp_path):
    shutil.copytree(tiny("sd"), tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UsageError, match=r"only pickled weights .*--allow_pickle"):
        load_pipeline(tmp_path / "sd")
    loaded = load_pipeline(tmp_path / "sd", allow_pickle=True)
    assert_same_model(load_model(tiny("sd") / "unet"), loaded.unet)


def test_old_pickles_are_read_and_broken_files_are_told(tiny, tmp_path):
    shutil.copytree(tiny("sd") / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = file.with_suffix(".bin")
    torch.save(load_file(file), pickled, _use_new_zipfile_serialization=False)
    file.unlink()
    assert_same_model(
        load_model(tiny("sd") / "unet"), load_model(tmp_path / "unet", allow_pickle=True)
    )
    pickled.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"\.bin cannot be read as pickled weights"):
        load_model(tmp_path / "unet", allow_pickle=True)
    index = file.with_name(f"{file.name}.index.json")
    for text in ("{}", "[]", '{"weight_map": 3}', "{"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is not an index of shards"):
            load_model(tmp_path / "unet")


def test_an_embedded_pipeline_is_known_by_its_name(monkeypatch, tmp_path):
    (tmp_path / "shapes-sd").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in embedded.PIPELINES:
        pipe = load_pipeline(name)
        assert type(pipe) is pipeline_class(embedded.path(name))
        assert_same_model(load_model(embedded.path(name) / "vae", dtype="float32"), pipe.vae)
    with pytest.raises(UsageError, match="is not a diffusers pipeline"):
        load_pipeline("./shapes-sd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device gpu: Expected one of cpu, cuda"),
        ({"device": "cuda:99"}, "device cuda:99 is not there: this process sees"),
        ({"placement": {"": "cuda:99"}}, "device cuda:99 is not there"),
        ({"placement": "balanced", "max_memory": {99: "1GB"}}, "device cuda:99 is not there"),
        ({"placement": {"": "cpu"}, "device": "cpu"}, "not both"),
        ({"placement": {"": "cpu"}, "max_memory": "cpu=1GB"}, "is for placement='balanced'"),
        ({"max_memory": "cpu=1GB"}, "is for placement='balanced'"),
        ({"gpus": [0]}, "is for a placement"),
    ],
)
def test_where_a_pipeline_cannot_go_and_what_would_be_ignored_is_told(arguments, message):
    with pytest.raises(UsageError, match=message):
        load_pipeline("shapes-sd", **arguments)


def test_what_is_no_pipeline_is_said_so(tiny, tmp_path):
    cases = {
        tmp_path / "nothing-here": "no such folder",
        tmp_path: "is not a diffusers pipeline",
        tiny("sd") / "unet": "holds one model",
        tiny("sd") / "unet" / "diffusion_pytorch_model.safetensors": "single file",
    }
    for path, message in cases.items():
        with pytest.raises(UsageError, match=message):
            load_pipeline(path)
        with pytest.raises(UsageError, match=message):
            call_parameters(path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(UsageError, match="NoSuchPipeline, which diffusers"):
        pipeline_class(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(UsageError, match="is not JSON"):
        pipeline_class(tmp_path)


def test_a_hub_id_offline_is_an_error_that_says_so(tmp_path):
    code = (
        "from ddinfer.models.loading import load_pipeline\n"
        "from ddinfer.errors import UsageError\n"
        "try: load_pipeline('nobody/nothing')\n"
        "except UsageError as e: print(e)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "HF_HUB_OFFLINE=1 is set" in done.stdout, done.stderr


def test_a_hub_id_in_the_cache_loads_offline(tiny, tmp_path):
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(tiny("sd"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from ddinfer.models.loading import load_pipeline\n"
        "from ddinfer.models.index import call_parameters\n"
        "assert 'prompt' in call_parameters('somebody/tiny')\n"
        "print(type(load_pipeline('somebody/tiny')).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PATH": "",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "StableDiffusionPipeline" in done.stdout, done.stderr


def in_hub_cache(folder, home):
    """The folder as the Hub's cache has the repository somebody/tiny."""
    repo = home / "hub" / "models--somebody--tiny"
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


def run_offline(home, *command):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PATH": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_cached_hub_model_is_planned_offline(tiny, tmp_path):
    folder = in_hub_cache(tiny("sd"), tmp_path)
    code = (
        "import torch\n"
        "from ddinfer.models.pipeline_folder import PipelineSource\n"
        "source = PipelineSource.for_planning('somebody/tiny')\n"
        "print(source.dtypes('auto', torch.device('cuda'))['unet'])"
    )
    done = run_offline(tmp_path, "-c", code)
    assert done.stdout.strip() == "torch.float32", done.stderr
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "nor complete in the Hub cache" in run_offline(tmp_path, "-c", code).stderr


def test_a_variant_is_planned_by_its_own_shards(tiny, tmp_path):
    """Of a repository with two sharded variants, as SDXL's own."""
    unet = load_pipeline(tiny("sd")).unet
    shutil.copytree(tiny("sd"), tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(tmp_path / "sd" / "unet", max_shard_size="40KB")
    unet.half().save_pretrained(tmp_path / "sd" / "unet", max_shard_size="40KB", variant="fp16")
    assert len(list((tmp_path / "sd" / "unet").glob("*.index*.json"))) == 2
    code = (
        "import sys, torch\n"
        "from ddinfer.models.pipeline_folder import PipelineSource\n"
        "for variant in ('fp16', None):\n"
        "    source = PipelineSource.for_planning('somebody/tiny', variant=variant)\n"
        "    assert source.weights_at == 'somebody/tiny'\n"
        "    print(source.dtypes('auto', torch.device('cuda'))['unet'])"
    )
    with local_hub("somebody/tiny", {"main": tmp_path / "sd"}) as address:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
            timeout=120, cwd=Path(__file__).parents[1],
        )  # fmt: skip
    assert done.stdout.split() == ["torch.float16", "torch.float32"], done.stderr


def test_a_quantised_hub_model_is_refused_by_its_configs(tiny, tmp_path):
    folder = in_hub_cache(tiny("sd"), tmp_path)
    for file in folder.rglob("*.safetensors"):
        file.unlink()  # nothing but configs is there
    config = folder / "vae" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantised))
    code = (
        "from ddinfer.models.pipeline_folder import pipeline_folder; "
        "pipeline_folder('somebody/tiny')"
    )
    done = run_offline(tmp_path, "-c", code)
    assert "vae is quantised (bitsandbytes)" in done.stderr


def test_what_decides_no_image_is_not_in_a_models_fingerprint(tiny, tmp_path):
    folder = tmp_path / "sd"
    shutil.copytree(tiny("sd"), folder)
    before = model_fingerprint(folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (folder / "README.md").write_text("about this model")
    (folder / "unet" / "README.md").write_text("about this UNet")
    (folder / "examples").mkdir()
    (folder / "examples" / "one.png").write_bytes(b"png")
    shutil.copy(unet, unet.with_suffix(".fp16.safetensors"))
    unet.with_suffix(".bin").write_bytes(b"pickled")
    shutil.copy(unet, folder / "single-file.safetensors")
    assert model_fingerprint(folder) == before
    assert model_fingerprint(folder, variant="fp16") != before
    deciding = ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")
    for file in ("model_index.json", *deciding):
        path = folder / file
        original = path.read_text()
        path.write_text(original + " ")
        assert model_fingerprint(folder) != before
        path.write_text(original)
    save_file(load_file(unet) | {"more": torch.zeros(1)}, unet)
    assert model_fingerprint(folder) != before


CUSTOM = """
from diffusers import StableDiffusionPipeline
class Mine(StableDiffusionPipeline):
    def __call__(self, prompt, sparkle=1): return "mine"
"""


def test_code_in_a_repository_runs_only_when_trusted(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny("sd"), tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps(data | {"_class_name": ["mine", "Mine"]}))
    (tmp_path / "sd" / "mine.py").write_text(CUSTOM)
    with pytest.raises(UsageError, match=r"mine\.py.*--trust_remote_code"):
        load_pipeline(tmp_path / "sd")
    assert "sparkle" in call_parameters(tmp_path / "sd", trust_remote_code=True)
    pipe = load_pipeline(tmp_path / "sd", trust_remote_code=True)
    assert pipe("a cat") == "mine"


def test_a_models_classes_are_imported_ahead_and_nobody_elses(tmp_path):
    (tmp_path / "intruder.py").write_text("print('I ran')")
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "tokenizer": ["transformers", "NoSuchTokenizer"],
        "text_encoder": ["intruder", "Encoder"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    program = (
        "import sys\nfrom ddinfer.models.preimport import import_classes\n"
        "import_classes(sys.argv[1])\nimport_classes('nobody/has-this')\n"
        "import_classes('/no/such/folder')\n"
        "print(*(name in sys.modules for name in sys.argv[2:]))\n"
    )
    modules = [
        "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma",
        "diffusers.models.transformers.pixart_transformer_2d",
        "diffusers.pipelines.flux.pipeline_flux",
        "intruder",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *modules],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True True False False\n"


#: Prints transformers.models as imported here, how often its typical file was read, and whether
#: transformers' functions are its own again. With an argument, after `import_classes` of it.
def test_components_can_be_given_or_left_out(tiny):
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = load_pipeline(tiny("sd"), components={"vae": None, "scheduler": scheduler})
    assert pipe.vae is None
    assert pipe.scheduler is scheduler
    with pytest.raises(UsageError, match="no component sceduler"):
        load_pipeline(tiny("sd"), components={"sceduler": scheduler})


def test_the_denoiser_is_found_or_its_absence_named(tiny):
    assert list(denoisers(load_pipeline(tiny("sd")))) == ["unet"]
    assert list(denoisers(load_pipeline(tiny("wan")))) == ["transformer"]
    with pytest.raises(UsageError, match="no denoiser that ddinfer knows"):
        denoisers(load_pipeline(tiny("sd"), components={"unet": None}))


def test_dtypes_are_checked_and_may_be_given_per_component(tiny):
    pipe = load_pipeline(tiny("sd"), dtype={"default": "bf16", "vae": torch.float32})
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        load_pipeline(tiny("sd"), dtype="int8")
    with pytest.raises(UsageError, match="dtype names vea"):
        load_pipeline(tiny("sd"), dtype={"vea": "bf16"})


def test_a_bfloat16_checkpoint_is_float32_on_cpu_unless_told_otherwise(tiny, tmp_path):
    import diffusers

    diffusers.DiffusionPipeline.from_pretrained(tiny("flux"), dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    assert load_pipeline(tmp_path).dtype == torch.float32
    assert load_model(tmp_path / "transformer").dtype == torch.bfloat16
    assert load_model(tmp_path / "transformer", dtype="auto").dtype == torch.float32


def test_opening_a_model_reads_no_weight(tiny):
    opened = open_model(tiny("wan") / "transformer")
    assert all(p.is_meta for p in opened.model.parameters())
    assert not any(b.is_meta for b in opened.model.buffers())
    assert set(opened.stored) == set(opened.model.state_dict())


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_weights_on_cpu_are_views_into_the_file(part, tiny):
    """Private copies would cost every rank its own model."""
    folder = tiny("flux") / part
    (file,) = folder.glob("*.safetensors")
    model = load_model(folder)
    assert {mapped_file(p) for p in model.parameters()} == {file}
    converted = load_model(folder, dtype="bfloat16")
    assert {mapped_file(p) for p in converted.parameters() if p.numel() > 1} == {None}


def test_a_model_with_its_own_code_is_loaded_once_it_is_trusted(tmp_path):
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    saved = BertModel(BertConfig(vocab_size=16, intermediate_size=8, **small))
    saved.save_pretrained(tmp_path)
    code = "from transformers import BertModel\n\n\nclass Own(BertModel):\n    is_own = True\n"
    (tmp_path / "modeling_own.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_own.Own"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"its own code \(modeling_own.py\).*trust_remote_code"):
        load_model(tmp_path)
    loaded = load_model(tmp_path, trust_remote_code=True)
    assert loaded.is_own
    assert torch.equal(loaded.pooler.dense.weight, saved.pooler.dense.weight)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_changing_loaded_weights_does_not_change_the_file(part, tiny):
    model = load_model(tiny("flux") / part)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    again = load_model(tiny("flux") / part)
    before = dict(model.named_parameters())
    assert all(torch.equal(before[n], 2 * p) for n, p in again.named_parameters())


def test_building_leaves_torch_as_it_was():
    register, normal = torch.nn.Module.register_parameter, torch.nn.init.normal_
    buffer = torch.zeros(3)
    with parameters_on_meta():
        linear = torch.nn.Linear(2, 3)
        assert linear.weight.is_meta
        assert torch.nn.init.normal_(linear.weight) is linear.weight
        assert torch.nn.init.ones_(buffer).sum() == 3, "buffers are built for real"
    with pytest.raises(TypeError), parameters_on_meta():
        torch.nn.Linear()
    assert torch.nn.Module.register_parameter is register
    assert torch.nn.init.normal_ is normal
    assert not torch.nn.Linear(2, 3).weight.is_meta


def test_a_checkpoint_covers_all_of_a_pipelines_models(tiny):
    table = read_checkpoint(tiny("sdxl") / "text_encoder_2")
    assert sum(t.num_bytes for t in table.values()) > 10_000


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_loading_to_a_gpu_needs_little_more_than_the_weights(tmp_path):
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=16,
        axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model(tmp_path, device="cuda:0")
    weights = sum(p.nbytes for p in loaded.parameters())
    largest = max(p.nbytes for p in loaded.parameters())
    assert torch.cuda.max_memory_allocated() - before <= weights + largest + 300e6
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert all(tensor.device == torch.device("cuda:0") for tensor in tensors)
