"""LoRA without peft: its results bit for bit, in jobs of every kind, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import ddinfer
from ddinfer.cli.replay import main as replay
from ddinfer.cli.retry_failed import RetryOptions, config_of
from ddinfer.config import JobConfig, parse_lora
from ddinfer.errors import InputError, UsageError
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from ddinfer.models.adapters import loras_set
from tests.data.record_peft import SETS, TARGET, adapter_name, figures, picture
from tests.local_hub import local_hub
from tests.loras import LORAS, make_lora
from tests.ranks import run_ranks
from tests.test_cli import ROOT
from tests.test_run import file_bytes, lines, pixels
from tests.test_run import run as run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """→ a function: name and seed of a LoRA → its file."""
    folder, made = tmp_path_factory.mktemp("loras"), {}

    def file(name, seed=0):
        if (name, seed) not in made:
            pipe = ddinfer.load_pipeline(tiny(LORAS[name][0]))
            made[name, seed] = str(make_lora(name, pipe, folder, seed=seed))
        return made[name, seed]

    return file


def computed(tiny, loras, name):
    """What → figures of the same picture as the recorder's."""
    kind = LORAS[name][0]
    files = [f"{loras(name, seed)}={adapter_name((name, seed))}" for seed in (0, 1)]
    pipe = ddinfer.load_pipeline(tiny(kind), lora=files)
    found = {}
    for what, weights in SETS[name].items():
        with loras_set({adapter_name(lora): weight for lora, weight in weights.items()}):
            found[f"{name} {what}"] = figures(picture(pipe, kind))
    return found


@pytest.mark.parametrize("name", LORAS)
def test_results_are_those_that_peft_gave(tiny, loras, name):
    recorded = json.loads(TARGET.read_text())["cases"]
    found = computed(tiny, loras, name)
    base = f"{name} none"
    is_same_machine = found[base]["sha256"] == recorded[base]["sha256"]
    for case, made in found.items():
        assert np.allclose(made["values"], recorded[case]["values"], atol=1e-5), case
        # Another processor rounds the picture without a LoRA differently, too.
        assert not is_same_machine or made["sha256"] == recorded[case]["sha256"], case
    assert len({made["sha256"] for made in found.values()}) == len(found)


@pytest.mark.nightly
def test_peft_in_an_environment_of_its_own_gives_the_same_today(tiny, loras, tmp_path):
    """Needs a package index; a failure to install is a failure."""
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    packages = [f"{p}=={ddinfer_version(p)}" for p in ("torch", "diffusers", "transformers")]
    install = [python, "-m", "pip", "install", "-q", *packages, "peft", "accelerate", "pillow"]
    subprocess.run(install, check=True)
    target = tmp_path / "figures.json"
    subprocess.run([python, "-m", "tests.data.record_peft", target], check=True, cwd=ROOT)
    recorded = json.loads(target.read_text())["cases"]
    for name in LORAS:
        for case, made in computed(tiny, loras, name).items():
            assert made["sha256"] == recorded[case]["sha256"], case


def ddinfer_version(package):
    import importlib.metadata

    return importlib.metadata.version(package).partition("+")[0]


# --- jobs --------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "a red cat", "lora": {"a": 0.8}},
    {"prompt": "a blue dog"},
    {"prompt": "a green bird", "lora": {}},
    {"prompt": "a red car", "lora": {"b": -0.5, "a": 1}},
]


def job(folder, tmp_path, lora, rows=ROWS, **options):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JobConfig(
        model=str(folder),
        prompts=str(file),
        output=str(tmp_path / options.pop("out", "out")),
        device="cpu",
        num_threads=1,
        lora=lora,
        **{**CALL, **options},
    )


def two(loras, name):
    return (f"{loras(name)}=a:0.3", f"{loras(name, 1)}=b")


def options_of(kind):
    return {"pipeline_kwargs": {"max_sequence_length": 16}} if kind == "flux" else {}


@pytest.fixture(scope="module")
def expected(tiny, loras, tmp_path_factory):
    """→ a function: kind → the pictures of `ROWS`, made one by one from Python."""
    made = {}

    def pictures(kind):
        if kind not in made:
            name = f"{kind}-peft"
            pipe = ddinfer.load_pipeline(tiny(kind), lora=two(loras, name))
            pipe.set_progress_bar_config(disable=True)
            more = options_of(kind).get("pipeline_kwargs", {})
            made[kind] = []
            for seed, row in enumerate(ROWS):
                generator = torch.Generator("cpu").manual_seed(seed)
                with loras_set(row.get("lora")):
                    [image] = pipe(row["prompt"], generator=generator, **CALL, **more).images
                made[kind].append(np.asarray(image))
        return made[kind]

    return pictures


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("sd", "plain"),
        ("sd", "staged"),
        ("sd", "balanced"),
        ("sd", "continuous"),
        ("flux", "continuous"),
        pytest.param("flux", "staged", marks=pytest.mark.nightly),
        pytest.param("flux", "balanced", marks=pytest.mark.nightly),
        pytest.param("sd", "two ranks", marks=pytest.mark.nightly),
    ],
)
def test_rows_with_loras_in_jobs_of_every_kind(tiny, loras, expected, tmp_path, kind, mode):
    asked = job(tiny(kind), tmp_path, two(loras, f"{kind}-peft"), **options_of(kind))
    if mode == "continuous":
        run_on_ranks(dataclasses.replace(asked, pipeline_parallel=2), 2)
    elif mode == "two ranks":
        run_on_ranks(dataclasses.replace(asked, schedule="dynamic"), 2)
    else:
        run_job(dataclasses.replace(asked, placement=None if mode == "plain" else mode))
    for made, image in zip(pixels(tmp_path / "out").values(), expected(kind), strict=True):
        assert np.array_equal(made, image)


def test_the_teams_of_ranks_that_make_one_image_know_its_set(tiny, loras, expected, tmp_path):
    asked = job(tiny("sd"), tmp_path, two(loras, "sd-peft"), cfg_parallel=2)
    run_job(asked)
    run_on_ranks(dataclasses.replace(asked, output=str(tmp_path / "teams")), 2)
    assert file_bytes(tmp_path / "teams") == file_bytes(tmp_path / "out")
    for made, image in zip(pixels(tmp_path / "teams").values(), expected("sd"), strict=True):
        assert np.allclose(made.astype(int), image, atol=1)  # other batches round otherwise


def test_blocks_that_come_and_go_bring_their_low_rank_weights(tiny, loras, expected, tmp_path):
    devices = {"text_encoder": "cpu", "unet": "disk", "vae": "cpu"}
    placement = ddinfer.Placement(devices, main="cpu")
    pipe = ddinfer.load_pipeline(tiny("sd"), lora=two(loras, "sd-peft"), placement=placement)
    results = ddinfer.generate(pipe, ROWS, **CALL)
    for result, image in zip(results, expected("sd"), strict=True):
        assert np.array_equal(np.asarray(result.image), image)


def test_a_job_says_what_it_used_and_is_resumed_and_replayed(tiny, loras, tmp_path, capsys):
    asked = job(tiny("sd"), tmp_path, two(loras, "sd-peft"))
    run_job(asked)
    before = file_bytes(tmp_path / "out")
    images = sorted((tmp_path / "out/images").glob("*/*.png"))
    images[1].unlink()
    assert run_job(asked).num_new == 1
    assert file_bytes(tmp_path / "out") == before
    rows = lines(tmp_path / "out/metadata.jsonl")
    assert [json.loads(row["lora"]) for row in rows] == [
        {"a": 0.8}, {"a": 0.3, "b": 1.0}, {}, {"a": 1.0, "b": -0.5},
    ]  # fmt: skip
    text = Image.open(images[3]).text["ddinfer"]
    assert set(json.loads(text)["loras"]) == {"a", "b"}
    assert str(tmp_path) not in text
    assert replay([str(images[3])]) == 0
    alone = tmp_path / "alone.png"
    alone.write_bytes(images[3].read_bytes())
    words = [str(alone), "--model", str(tiny("sd"))]
    with pytest.raises(UsageError, match="give --lora PATH=a"):
        replay(words)
    given = [
        w for seed, n in ((0, "a"), (1, "b")) for w in ("--lora", f"{loras('sd-peft', seed)}={n}")
    ]
    assert replay([*words, *given]) == 0
    assert "LoRA" not in capsys.readouterr().out
    swapped = [
        w for seed, n in ((1, "a"), (0, "b")) for w in ("--lora", f"{loras('sd-peft', seed)}={n}")
    ]
    assert replay([*words, *swapped]) != 0
    assert "LoRA a: its file is not the one" in capsys.readouterr().out


def test_another_file_under_the_same_name_is_another_job(tiny, loras, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(Path(loras("sd-peft")).read_bytes())
    asked = job(tiny("sd"), tmp_path, (f"{file}=a",), ROWS[:1])
    run_job(asked)
    assert run_job(asked).num_new == 0
    file.write_bytes(Path(loras("sd-peft", 1)).read_bytes())
    with pytest.raises(UsageError, match="loras:"):
        run_job(asked)
    assert config_of(RetryOptions(output=str(tmp_path / "out"))).lora == (f"{file}=a:1.0",)


def test_which_rows_share_a_batch_depends_on_their_sets_alone(tiny, loras, tmp_path):
    rows = [{"prompt": "a cat", "lora": {"a": w}} for w in (1, 1.0, 0.5)]
    rows += [{"prompt": "a dog", "lora": {"a": 0.5}}, {"prompt": "a cat"}]
    asked = job(tiny("sd"), tmp_path, two(loras, "sd-peft"), rows, batch_size=4)
    batches = prepare(resolve_config(asked)).batches()
    assert [(batch.start, batch.stop) for batch in batches] == [(0, 2), (2, 4), (4, 5)]


def test_a_set_costs_its_own_bytes(tiny, loras):
    plain = ddinfer.load_pipeline(tiny("sd"))
    pipe = ddinfer.load_pipeline(tiny("sd"), lora=two(loras, "sd-peft"), dtype="float32")
    file = sum(t.nbytes for t in load_file(loras("sd-peft")).values())

    def size(pipe):
        models = (pipe.unet, pipe.text_encoder)
        return sum(p.nbytes for model in models for p in model.parameters())

    assert size(pipe) == size(plain) + 2 * file


def test_bfloat16_layers_have_bfloat16_low_rank_weights(tiny, loras):
    pipe = ddinfer.load_pipeline(tiny("sd"), lora=[loras("sd-peft")], dtype="bfloat16")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_generate_takes_weights_for_all_prompts(tiny, loras, expected):
    pipe = ddinfer.load_pipeline(tiny("sd"), lora=two(loras, "sd-peft"))
    [result] = ddinfer.generate(pipe, ["a red cat"], lora={"a": 0.8}, **CALL)
    assert np.array_equal(np.asarray(result.image), expected("sd")[0])
    with pytest.raises(UsageError, match="no LoRA is called 'c'; loaded are a, b"):
        ddinfer.generate(pipe, [{"prompt": "a cat", "lora": {"c": 1}}], **CALL)
    plain = ddinfer.load_pipeline(tiny("sd"))
    with pytest.raises(UsageError, match="loaded are none"):
        ddinfer.generate(plain, ["a red cat"], lora={"a": 0.8}, **CALL)


def generate_in_teams(group, folder, lora):
    pipe = ddinfer.load_pipeline(folder, lora=lora)
    made = [
        ddinfer.generate(pipe, ["a red cat"], lora={"a": weight}, cfg_parallel=2, **CALL)
        for weight in (0.8, 0.0)
    ]
    return [np.asarray(result.image) for (result,) in made]


def test_generate_in_teams_takes_weights_on_every_rank(tiny, loras, expected):
    with_lora, without = run_ranks(generate_in_teams, 2, str(tiny("sd")), two(loras, "sd-peft"))[0]
    assert np.allclose(with_lora.astype(int), expected("sd")[0], atol=1)
    assert np.abs(with_lora.astype(int) - without).max() > 1


def test_a_lora_for_the_second_of_two_denoisers(tiny, loras):
    kept = ddinfer.load_pipeline(
        tiny("wan"),
        components={"transformer_2": tiny("wan") / "transformer"},
        lora=[f"{loras('wan-peft')}=fast@transformer_2"],
    )
    low_rank = [n for n, _ in kept.transformer_2.named_modules() if n.endswith("lora.fast")]
    assert low_rank
    assert not [n for n, _ in kept.transformer.named_modules() if ".lora" in n]


def test_a_lora_of_the_hub(tiny, loras, tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    data = Path(loras("sd-peft")).read_bytes()
    (repo / "pytorch_lora_weights.safetensors").write_bytes(data)
    (repo / "other.safetensors").write_bytes(data)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with local_hub("somebody/pixel", {"main": repo}) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        for where in ("somebody/pixel", "somebody/pixel/other.safetensors"):
            asked = job(tiny("sd"), tmp_path, (f"{where}=a",), ROWS[:1])
            prepare(resolve_config(asked))


# --- what is refused ---------------------------------------------------------------------------


def rewritten(loras, tmp_path, change):
    """A LoRA whose tensors ``change`` has changed."""
    tensors = load_file(loras("sd-peft"))
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return str(tmp_path / "bad.safetensors")


FIRST = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CHANGES = {
    "dora": (lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(1)}), "is DoRA"),
    "dora of peft": (lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(1)}),
                     "is DoRA"),
    "loha": (lambda t: t.update({f"{FIRST}.hada_w1_a": torch.ones(1)}), "is LoHa"),
    "lokr": (lambda t: t.update({f"{FIRST}.lokr_w1": torch.ones(1)}), "is LoKr"),
    "a difference": (lambda t: t.update({f"{FIRST}.diff": torch.ones(1)}),
                     "diff, which is not a low-rank weight"),
    "half": (lambda t: t.pop(f"{FIRST}.lora_A.weight"), r"has only B.weight"),
    "another layer": (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.ones(2, 2),
                                          "unet.nowhere.lora_B.weight": torch.ones(2, 2)}),
                      r"lacks the layers \(of \d+\) nowhere"),
    "another shape": (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 7)}),
                      r"are \(2, 7\)"),
    "a norm": (lambda t: t.update({"unet.conv_norm_out.lora_A.weight": torch.ones(2, 2),
                                   "unet.conv_norm_out.lora_B.weight": torch.ones(2, 2)}),
               "is a GroupNorm; expected Linear or Conv"),
    "no component": (lambda t: t.update({"refiner.x.lora_A.weight": torch.ones(1)}),
                     "name none of the components"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_applied_is_refused_by_name_before_loading(tiny, loras, tmp_path, name):
    change, message = CHANGES[name]
    asked = job(tiny("sd"), tmp_path, (rewritten(loras, tmp_path, change),), ROWS[1:2])
    with pytest.raises(UsageError, match=message) as error:
        prepare(resolve_config(asked))
    assert "\n" not in str(error.value)


def test_a_lora_of_another_model_is_refused_by_its_layers(tiny, loras, tmp_path):
    asked = job(tiny("sd"), tmp_path, (loras("flux-peft"),), ROWS[1:2])
    with pytest.raises(UsageError, match="is not for a StableDiffusionPipeline"):
        prepare(resolve_config(asked))
    asked = job(tiny("sd"), tmp_path, (loras("sdxl-peft"),), ROWS[1:2])
    with pytest.raises(UsageError, match="is not for"):
        prepare(resolve_config(asked))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("nowhere.safetensors", "no such file"),
        ("FILE=a b", "may have letters"),
        ("FILE=", "may have letters"),
        ("FILE=a:--2", "expected PATH_OR_ID"),
        ("FILE=a@nothing", "cannot go to nothing"),
        ("PICKLE", "expected a .safetensors file"),
        ("TEXT", "is not a safetensors file"),
    ],
)
def test_wrong_options_are_one_line_errors(tiny, loras, tmp_path, option, message):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, place in (
        ("FILE", loras("sd-peft")),
        ("PICKLE", str(tmp_path / "weights.bin")),
        ("TEXT", str(tmp_path / "text.safetensors")),
    ):
        option = option.replace(name, place)
    with pytest.raises(UsageError, match=message) as error:
        prepare(resolve_config(job(tiny("sd"), tmp_path, (option,), ROWS[1:2])))
    assert "\n" not in str(error.value)


def test_two_of_one_name_and_compile_are_refused(loras):
    with pytest.raises(UsageError, match="is given twice"):
        JobConfig(model="m", lora=("x/a.safetensors", "y/a.safetensors"))
    with pytest.raises(UsageError, match="--compile does not go with --lora"):
        JobConfig(model="m", lora=("x/a.safetensors",), compile=True)


def test_how_the_option_is_read():
    assert parse_lora("a/b") == ("a/b", "b", None, 1.0)
    assert parse_lora("dir/my lora.safetensors:0.5") == (
        "dir/my lora.safetensors", "my_lora", None, 0.5,
    )  # fmt: skip
    assert parse_lora("a/b/c.safetensors=x@transformer_2:-1e-1") == (
        "a/b/c.safetensors", "x", "transformer_2", -0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"c": 1}, "no LoRA is called 'c'"),
        ("pixel", "lora must be weights by name"),
        ({"a": "much"}, "must be a finite number"),
        ({"a": float("nan")}, "must be a finite number|NaN"),
    ],
)
def test_rows_with_wrong_weights_are_named(tiny, loras, tmp_path, lora, message):
    rows = [{"prompt": "a cat", "lora": lora}]
    with pytest.raises((InputError, UsageError), match=message):
        prepare(resolve_config(job(tiny("sd"), tmp_path, two(loras, "sd-peft"), rows)))


def test_a_scale_that_only_peft_obeys_is_refused(tiny, loras, tmp_path):
    rows = [{"prompt": "a cat", "cross_attention_kwargs": {"scale": 0.5}}]
    with pytest.raises(UsageError, match='give the weight as "lora"'):
        prepare(resolve_config(job(tiny("sd"), tmp_path, two(loras, "sd-peft"), rows)))


def test_diffusers_itself_draws_the_same_without_a_lora(tiny, loras):
    plain = DiffusionPipeline.from_pretrained(tiny("sd"))
    plain.set_progress_bar_config(disable=True)
    pipe = ddinfer.load_pipeline(tiny("sd"), lora=two(loras, "sd-peft"))
    with loras_set({}):
        made = picture(pipe, "sd")
    assert np.array_equal(made, picture(plain, "sd"))
