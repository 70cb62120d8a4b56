"""The whole engine against plain diffusers, and what it does when a call fails."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from ddinfer.engines.pipeline_call import check_call
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.loading import load_pipeline
from ddinfer.request import Prompt, resolve_requests
from tests.tiny_pipelines import call_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    loaded = {}

    def load(kind):
        if kind not in loaded:
            loaded[kind] = load_pipeline(tiny_pipeline(kind, folder))
            loaded[kind].set_progress_bar_config(disable=True)
        return loaded[kind]

    return load


def requests_for(kind, count, **fields):
    rows = [
        Prompt({"prompt": f"a red cat {k}", **call_arguments(kind), **fields}) for k in range(count)
    ]
    return resolve_requests(rows, base_seed=100)


def plain_diffusers(pipe, request):
    generator = torch.Generator("cpu").manual_seed(request.seed)
    extra = {"negative_prompt": request.negative_prompt} if request.negative_prompt else {}
    return pipe(prompt=request.prompt, generator=generator, **extra, **request.parameters())


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", ["sd", "flux", "sd3", "pixart"])
def test_images_are_those_of_plain_diffusers_and_change_with_the_seed(pipelines, kind):
    pipe = pipelines(kind)
    requests = requests_for(kind, 2)
    made = list(WholeEngine(pipe).run([[r] for r in requests]))
    for request, result in zip(requests, made, strict=True):
        expected = plain_diffusers(pipe, request).images[0]
        assert same(result.image, expected)
        assert result.exact
        assert result.batch == (request.index,)
    assert not same(made[0].image, made[1].image)


def test_video_frames_are_those_of_plain_diffusers(pipelines):
    pipe = pipelines("wan")
    (request,) = requests_for("wan", 1)
    (result,) = WholeEngine(pipe).run([[request]])
    assert result.error is None, result.error
    expected = pipe(
        prompt=request.prompt,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pil",
        **request.parameters(),
    ).frames[0]
    assert result.image is None
    assert len(result.frames) == len(expected) == 5
    assert all(same(a, b) for a, b in zip(result.frames, expected, strict=True))


def test_a_batch_is_one_call_with_a_generator_for_each_image(pipelines):
    pipe = pipelines("sd")
    requests = requests_for("sd", 3, negative_prompt="blue")
    made = list(WholeEngine(pipe).run([requests]))
    expected = pipe(
        prompt=[r.prompt for r in requests],
        negative_prompt=["blue"] * 3,
        generator=[torch.Generator("cpu").manual_seed(r.seed) for r in requests],
        **requests[0].parameters(),
    ).images
    assert all(same(r.image, e) for r, e in zip(made, expected, strict=True))
    assert {r.batch for r in made} == {(0, 1, 2)}


class Flaky:
    """A pipeline with real pictures, and the troubles a test asks for."""

    image_processor = None

    def __init__(self, *, bad=(), largest_batch=99, error=torch.OutOfMemoryError):
        self.bad, self.largest_batch, self.error, self.calls = bad, largest_batch, error, []

    def __call__(self, prompt, generator=None, output_type="pil"):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.calls.append(len(prompts))
        if len(prompts) > self.largest_batch:
            raise self.error("no room")
        for p in prompts:
            if p in self.bad:
                raise ValueError(f"cannot draw {p}")
        generators = generator if isinstance(generator, list) else [generator]
        colours = [torch.randint(1, 255, (3,), generator=g).tolist() for g in generators]
        output = type("Output", (), {})()
        output.images = [Image.new("RGB", (4, 4), tuple(c)) for c in colours]
        return output


def letters(count):
    return resolve_requests([Prompt({"prompt": chr(97 + k)}) for k in range(count)])


def test_one_bad_prompt_of_a_batch_fails_alone():
    results = list(WholeEngine(Flaky(bad=("b",))).run([letters(3)]))
    assert [r.error is None for r in results] == [True, False, True]
    assert results[1].error.message == "cannot draw b"
    assert "cannot draw b" in results[1].error.traceback
    assert [r.exact for r in results] == [False, False, False]
    assert [r.batch for r in results] == [(0,), (1,), (2,)]


def test_out_of_memory_halves_the_batch_and_the_ceiling_is_remembered():
    pipe = Flaky(largest_batch=2)
    requests = letters(10)
    results = list(WholeEngine(pipe).run([requests[:5], requests[5:]]))
    assert all(r.error is None for r in results)
    assert [r.index for r in results] == list(range(10))
    assert pipe.calls == [5, 2, 2, 1, 2, 2, 1]
    assert not any(r.exact for r in results)


@pytest.mark.parametrize(
    "error", [MemoryError, lambda text: RuntimeError(f"DefaultCPUAllocator: {text}")]
)
def test_host_memory_counts_too(error):
    pipe = Flaky(largest_batch=1, error=error)
    results = list(WholeEngine(pipe).run([letters(2)]))
    assert pipe.calls == [2, 1, 1]
    assert all(r.image is not None for r in results)


def test_a_single_image_that_does_not_fit_is_recorded():
    (result,) = WholeEngine(Flaky(largest_batch=0)).run([letters(1)])
    assert result.error.type == "OutOfMemoryError"
    assert result.image is None


def test_a_sticky_device_error_ends_the_process_and_is_no_failed_prompt():
    pipe = Flaky(largest_batch=0, error=torch.AcceleratorError)
    with pytest.raises(torch.AcceleratorError):
        list(WholeEngine(pipe).run([letters(1)]))


def test_nan_and_black_and_unsafe_images_are_flagged(pipelines):
    pipe = pipelines("sd")
    (request,) = requests_for("sd", 1)
    broken = pipe.vae.decoder.conv_out.bias
    kept = broken.data.clone()
    try:
        broken.data.fill_(float("nan"))
        (result,) = WholeEngine(pipe).run([[request]])
        assert result.flags == ("nan", "black")
        broken.data.fill_(-1e6)
        (result,) = WholeEngine(pipe).run([[request]])
        assert result.flags == ("black",)
    finally:
        broken.data.copy_(kept)
    (result,) = WholeEngine(pipe).run([[request]])
    assert result.flags == ()


def test_flags_of_the_safety_checker_are_kept():
    class Careful(Flaky):
        def __call__(self, prompt, generator=None):
            output = super().__call__(prompt, generator)
            output.nsfw_content_detected = [p == "b" for p in prompt]
            return output

    results = list(WholeEngine(Careful()).run([letters(2)]))
    assert [r.flags for r in results] == [(), ("nsfw",)]


def test_a_call_that_cannot_work_is_refused_before_loading():
    parameters = inspect.signature(Flaky.__call__).parameters
    check_call("Flaky", parameters, [], batch_size=4)
    with pytest.raises(UsageError, match=r"takes no argument 'eta'; it takes: prompt, generator"):
        check_call("Flaky", parameters, ["eta"], batch_size=1)

    def unconditional(self, batch_size: int = 1, generator: "torch.Generator | None" = None): ...

    parameters = inspect.signature(unconditional).parameters
    check_call("DDPM", parameters, [], batch_size=1)
    with pytest.raises(UsageError, match=r"takes no prompts, .* use --batch_size 1"):
        check_call("DDPM", parameters, [], batch_size=2)

    def no_generator(self, prompt: str): ...

    with pytest.raises(UsageError, match="takes no 'generator'"):
        check_call("None", inspect.signature(no_generator).parameters, [], batch_size=1)

    def one_generator(self, prompt: str, generator: "torch.Generator | None" = None): ...

    check_call("One", inspect.signature(one_generator).parameters, [], batch_size=1)
    with pytest.raises(UsageError, match="--batch_size 1"):
        check_call("One", inspect.signature(one_generator).parameters, [], batch_size=2)
