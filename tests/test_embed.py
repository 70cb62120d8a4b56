"""`generate` and `stream` inside a program: right images, equal errors, nothing left behind."""

import logging
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ddinfer
from ddinfer.distributed.launch import launch
from ddinfer.errors import InputError, PromptsFailed, RankError, UsageError
from ddinfer.models.loading import load_pipeline
from tests.moody_pipeline import colour, moody_pipeline
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return str(tiny_pipeline("sd", tmp_path_factory.mktemp("model")))


def load(folder):
    return load_pipeline(folder, device="cpu", trust_remote_code=True)


def colours(results):
    return [r.image.getpixel((0, 0)) for r in results]


def pixels(results):
    return [np.asarray(r.image) for r in results]


# Every number of prompts on every number of ranks


def draw_numbers(group, folder, seed):
    """0 … W+1 prompts → (index, colour, rank) of what every rank got, by prompts and gather."""
    pipe, told = load(folder), {}
    for num_prompts in range(group.group_size + 2):
        prompts = [f"x {k}" for k in range(num_prompts)]
        for gather in ("all", "first", "none"):
            results = ddinfer.generate(pipe, prompts, seed=seed, gather=gather)
            assert [r.prompt for r in results] == [prompts[r.index] for r in results]
            told[num_prompts, gather] = [
                (r.index, r.image.getpixel((0, 0)), r.rank) for r in results
            ]
        streamed = [
            (r.index, r.image.getpixel((0, 0)), r.rank)
            for r in ddinfer.stream(pipe, prompts, seed=seed)
        ]
        assert streamed == told[num_prompts, "none"]
    return told


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_number_of_prompts_on_any_number_of_ranks(moody, num_ranks):
    told = run_ranks(draw_numbers, num_ranks, moody, 10)
    for num_prompts in range(num_ranks + 2):
        everything = told[0][num_prompts, "all"]
        assert [(k, c) for k, c, _ in everything] == [
            (k, colour(10 + k)) for k in range(num_prompts)
        ]
        assert [c for _, c, _ in everything] != [
            colour(11 + k) for k in range(num_prompts)
        ] or not num_prompts
        for rank, mine in enumerate(told):
            assert mine[num_prompts, "all"] == everything
            assert mine[num_prompts, "first"] == (everything if rank == 0 else [])
            assert mine[num_prompts, "none"] == [r for r in everything if r[2] == rank]


def draw_pictures(group, folder, seed, batch_size):
    pipe = load(folder)
    prompts = ["a red cat", "a big dog", {"prompt": "two birds", "seed": 99}, "a car", "a tree"]
    return pixels(
        ddinfer.generate(pipe, prompts, seed=seed, batch_size=batch_size, **call_arguments("sd"))
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_are_bit_identical_on_any_number_of_ranks(tiny_sd, batch_size):
    (alone,) = run_ranks(draw_pictures, 1, tiny_sd, 7, batch_size)
    for num_ranks in (2, 4):
        for mine in run_ranks(draw_pictures, num_ranks, tiny_sd, 7, batch_size):
            assert [np.array_equal(a, b) for a, b in zip(mine, alone, strict=True)] == [True] * 5
    perturbed = run_ranks(draw_pictures, 2, tiny_sd, 8, batch_size)[1]
    same = [np.array_equal(a, b) for a, b in zip(perturbed, alone, strict=True)]
    assert same == [False, False, True, False, False]  # the third has a seed of its own


def test_images_are_those_of_plain_diffusers_called_prompt_by_prompt(tiny_sd):
    torch.set_num_threads(1)
    pipe = load(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "a big dog", "two birds"]
    made = pixels(ddinfer.generate(pipe, prompts, seed=3, **call_arguments("sd")))
    for seed, equal in ((3, True), (4, False)):
        for k, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed + k)
            image = pipe(prompt, generator=generator, **call_arguments("sd")).images[0]
            assert np.array_equal(np.asarray(image), made[k]) is equal


def test_strings_dicts_and_requests_mix_and_images_count(moody):
    pipe = load(moody)
    prompts = [
        "x",
        {"prompt": "y", "seed": 50, "num_images": 2, "id": "mine"},
        ddinfer.Request(index=9, id="asked", prompt="z", seed=70, width=4),
        "x",
    ]
    results = ddinfer.generate(pipe, prompts, seed=10, height=6)
    assert [r.index for r in results] == [0, 1, 2, 3, 4]
    assert [r.id for r in results] == ["00000000", "mine-0", "mine-1", "asked", "00000004"]
    assert [r.seed for r in results] == [10, 50, 51, 70, 14]
    assert colours(results) == [colour(s) for s in (10, 50, 51, 70, 14)]
    assert [r.image.size for r in results] == [(8, 6), (8, 6), (8, 6), (4, 6), (8, 6)]


def draw_in_parts(group, folder):
    """Two halves of the world, each with prompts and a numbering of its own."""
    import torch.distributed as dist

    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = halves[group.world.rank % 2]
    if group.world.rank == 0:
        with pytest.raises(UsageError, match="rank 0 is not in the group"):
            ddinfer.generate(load(folder), ["x"], group=halves[1])
    prompts = [f"x {k}" for k in range(3 + group.world.rank % 2)]
    everyone = ddinfer.generate(
        load(folder), prompts, seed=100 * (group.world.rank % 2), group=mine, gather="first"
    )
    return [(r.index, r.image.getpixel((0, 0)), r.rank) for r in everyone]


def test_part_of_the_world_draws_by_itself(moody):
    even, odd, *others = run_ranks(draw_in_parts, 4, moody)
    assert others == [[], []]
    assert even == [(0, colour(0), 0), (1, colour(1), 0), (2, colour(2), 2)]
    assert odd == [(k, colour(100 + k), 1 + 2 * (k > 1)) for k in range(4)]


# Errors


def generate_and_hear(group, folder, prompts_of, options_of):
    """What each rank's call raises, then whether the next call works."""
    pipe = load(folder)
    prompts, options = prompts_of[group.group_rank], options_of[group.group_rank]
    try:
        ddinfer.generate(pipe, prompts, **options)
        heard = None
    except Exception as error:  # noqa: BLE001 - compared over the ranks
        heard = (type(error), str(error))
    assert colours(ddinfer.generate(pipe, ["x", "y"], seed=1)) == [colour(1), colour(2)]
    return heard


def hear(moody, num_ranks, prompts, options=None):
    """The exception that all ranks raise; ``prompts`` and ``options`` are one or one per rank."""
    prompts = prompts if isinstance(prompts, tuple) else (prompts,) * num_ranks
    options = options if isinstance(options, tuple) else (options or {},) * num_ranks
    heard = run_ranks(generate_and_hear, num_ranks, moody, prompts, options)
    assert heard[1:] == heard[:-1], "every rank raises the same"
    return heard[0]


def test_failed_prompts_are_raised_on_every_rank_after_all_have_run(moody):
    kind, text = hear(moody, 3, ["x", "fail one", "y", "z", "fail two"])
    assert kind is PromptsFailed
    assert text.startswith("2 of 5 prompts failed (errors='return' returns the rest):\n")
    assert "1 ('fail one'): ValueError: cannot draw one" in text
    assert "4 ('fail two'): ValueError: cannot draw two" in text


def draw_with_failures(group, folder, gather):
    prompts = ["x", "fail it", "y"]
    results = ddinfer.generate(load(folder), prompts, seed=5, errors="return", gather=gather)
    return [
        (r.index, r.error and str(r.error), r.image and r.image.getpixel((0, 0))) for r in results
    ]


@pytest.mark.parametrize("gather", ["all", "first", "none"])
def test_failed_prompts_are_returned_in_their_places(moody, gather):
    told = run_ranks(draw_with_failures, 2, moody, gather)
    everything = [
        (0, None, colour(5)),
        (1, "ValueError: cannot draw it", None),
        (2, None, colour(7)),
    ]
    expected = {
        "all": [everything, everything],
        "first": [everything, []],
        "none": [everything[:2], everything[2:]],
    }
    assert told == expected[gather]


def test_a_rank_that_fails_as_a_whole_is_raised_on_every_rank(moody):
    kind, text = hear(moody, 3, ["x", "x", "break now", "x"])
    assert kind is RankError
    assert text.startswith("rank 1 failed while running: AcceleratorError: the device is gone")
    assert "moody.py" in text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ((["a", "b"], ["a"]), {}, "rank 0: 2 requests.*; rank 1: 1 requests"),
        ((["a", "b"], ["a", "c"]), {}, "the same prompts and arguments, but they differ: rank 0"),
        (["a"], ({"seed": 1}, {"seed": 2}), "they differ"),
        (["a"], ({"height": 8}, {"height": 9}), "they differ"),
        (["a"], ({"batch_size": 1}, {"batch_size": 2}), "batch_size=1.*batch_size=2"),
        (["a"], ({"gather": "all"}, {"gather": "none"}), "gather=all.*gather=none"),
    ],
)
def test_what_differs_between_ranks_is_an_error_on_all(moody, prompts, options, message):
    kind, text = hear(moody, 2, prompts, options)
    assert kind is UsageError
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a dog", {}, "got str; put the one prompt into a list"),
        ([3], {}, "prompts[0] is a int; expected a string, a dict or a Request"),
        (["x", {"prompt": "x", "heigth": 8}], {}, "unknown field 'heigth'; did you mean height?"),
        (
            ["x", {"prompt": "x", "eta": object}],
            {},
            "prompts[1]: eta: found an object of type type",
        ),
        ([{"prompt": "x", "id": "a"}] * 2, {}, "prompts[1]: id 'a' is already used by prompts[0]"),
        (["x"], {"heigth": 8}, "takes no argument 'heigth'"),
        (["x"], {"generator": 1}, "generator: every image has its own"),
        (["x"], {"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        (["x"], {"seed": "1"}, "seed='1' must be an integer"),
        (["x"], {"gather": "some"}, "gather='some' must be 'all', 'first' or 'none'"),
        (["x"], {"errors": "ignore"}, "errors='ignore' must be 'raise' or 'return'"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_made(moody, prompts, options, message):
    with pytest.raises(UsageError) as caught:
        ddinfer.generate(load(moody), prompts, **options)
    assert message in str(caught.value)


def test_bad_arguments_on_one_rank_or_on_all_end_no_rank_in_waiting(moody):
    kind, text = hear(moody, 2, (["x"], [3]))
    assert kind is RankError
    assert "rank 1 failed while preparing: UsageError: prompts[0] is a int" in text
    kind, text = hear(moody, 2, [{"prompt": 3}])
    assert kind is InputError
    assert text.startswith("prompts[0]: prompt must be text")


class Interrupted:
    """A pipeline during whose work somebody presses Ctrl-C."""

    def __call__(self, prompt, generator=None):
        raise KeyboardInterrupt


def interrupt_one(group, folder):
    pipe = Interrupted() if group.group_rank == 0 else load(folder)
    try:
        ddinfer.generate(pipe, ["x", "y"])
    except BaseException as error:  # noqa: BLE001 - told to the test
        return type(error).__name__, str(error).partition("\n")[0]


def test_ctrl_c_on_one_rank_ends_the_others_waits(moody):
    assert run_ranks(interrupt_one, 2, moody) == [
        ("KeyboardInterrupt", ""),
        ("RankError", "rank 0 failed while running: KeyboardInterrupt: "),
    ]


def die_in_generate(world, model, folder):
    """A program with a group of its own; one of its ranks is gone in the middle."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    prompts = ["x", "exit now"]
    try:
        ddinfer.generate(load(model), prompts)
    except RankError as error:
        Path(folder, f"heard-{world.rank}").write_text(str(error))
        raise


def test_the_death_of_a_rank_is_an_error_on_the_others(moody, tmp_path):
    with pytest.raises(RankError, match="rank 1 exited with status 0"):
        launch(
            die_in_generate, moody, str(tmp_path), nproc_per_node=2, device="cpu", grace_seconds=60
        )
    assert (tmp_path / "heard-0").read_text().startswith("rank 1 failed while running prompt 1")


def generate_alone(world, folder):
    """Started by torchrun, but nobody made a process group."""
    with pytest.raises(UsageError, match=r"this is rank . of 2, but there is no process group"):
        ddinfer.generate(load(folder), ["x"])


def test_ranks_without_a_group_do_not_all_do_the_same_work(moody):
    run_ranks(generate_alone, 2, moody, join=False)


# stream


def test_stream_yields_before_the_next_is_made_and_may_be_left_early(moody):
    pipe = load(moody)
    results = ddinfer.stream(pipe, ["x", "fail it", "break now"], seed=4)
    first, second = next(results), next(results)
    assert (first.index, colours([first])) == (0, [colour(4)])
    assert (second.index, str(second.error)) == (1, "ValueError: cannot draw it")
    with pytest.raises(RankError, match="rank 0 failed while running: AcceleratorError"):
        next(results)
    results = ddinfer.stream(pipe, ["x", "x"])
    next(results)
    results.close()


def stream_and_hear(group, folder):
    def wait_until(key, number):
        while group.add(key, 0) < number:
            time.sleep(0.01)

    made = []
    try:
        for result in ddinfer.stream(load(folder), ["x", "y", "z", "break now"]):
            made.append(result.index)
            group.add("made", 1)
            wait_until("made", 2)
            if group.group_rank == 0:
                wait_until("failed", 1)
    except RankError as error:
        group.add("failed", 1)
        return made, str(error)


def test_a_streaming_rank_hears_at_its_next_batch_that_another_has_failed(moody):
    (mine, heard), (theirs, raised) = run_ranks(stream_and_hear, 2, moody)
    assert (mine, theirs) == ([0], [2])
    assert heard == raised
    assert heard.startswith("rank 1 failed while running: AcceleratorError: the device is gone")


# What the program gets back


def everything_about(pipe):
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        "components": {n: id(getattr(pipe, n)) for n in pipe.components},
        "training": {n: [m.training for m in module.modules()] for n, module in modules.items()},
        "requires_grad": {
            n: [p.requires_grad for p in module.parameters()] for n, module in modules.items()
        },
        "devices": {n: str(module.device) for n, module in modules.items()},
        "scheduler": repr(sorted(vars(pipe.scheduler))) + str(pipe.scheduler.num_inference_steps),
        "config": repr(pipe.config),
        "bar": getattr(pipe, "_progress_bar_config", None),
        "grad": torch.is_grad_enabled(),
        "random": (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()),
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "logging": [
            (logger.level, list(logger.handlers))
            for logger in (logging.getLogger(), logging.getLogger("ddinfer"))
        ],
        "threads": torch.get_num_threads(),
    }


def test_everything_is_as_before_and_between_two_images(tiny_sd):
    pipe = load(tiny_sd)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.vae.requires_grad_(False)
    pipe.scheduler.set_timesteps(7)
    before = everything_about(pipe)
    arguments = call_arguments("sd")
    ddinfer.generate(pipe, ["a cat", "a dog"], **arguments)
    assert everything_about(pipe) == before
    for _ in ddinfer.stream(pipe, ["a cat", "a dog"], **arguments):
        assert everything_about(pipe) == before
    with pytest.raises(PromptsFailed):
        ddinfer.generate(pipe, ["a cat"], **{**arguments, "height": 7})
    assert everything_about(pipe) == before
    pipe.set_progress_bar_config(desc="mine")
    ddinfer.generate(pipe, ["a cat"], **arguments)
    assert pipe._progress_bar_config == {"desc": "mine"}


class Careless:
    """A pipeline that draws from the global generators and leaves gradients on."""

    def __call__(self, prompt, generator=None):
        torch.rand(3)
        raise ValueError(prompt)


def test_random_numbers_that_a_pipeline_draws_globally_are_put_back():
    before = torch.get_rng_state()
    (result,) = ddinfer.generate(Careless(), ["x"], errors="return")
    assert str(result.error) == "ValueError: x"
    assert torch.equal(torch.get_rng_state(), before)


def draw_wrapped(group, folder, how):
    from torch.nn.parallel import DistributedDataParallel

    pipe = load(folder)
    plain = pixels(ddinfer.generate(pipe, ["a cat", "a dog"], **call_arguments("sd")))
    denoiser = pipe.unet
    for word in how.split():
        if word == "ddp":
            denoiser = DistributedDataParallel(denoiser)
        if word == "compile":
            denoiser = torch.compile(denoiser, backend="eager")
    pipe.unet = denoiser
    denoiser.train()
    made = pixels(ddinfer.generate(pipe, ["a cat", "a dog"], **call_arguments("sd")))
    assert pipe.unet is denoiser
    assert all(m.training for m in denoiser.modules())
    perturbed = ddinfer.generate(pipe, ["a cat", "a dog"], seed=1, **call_arguments("sd"))
    return [
        [np.array_equal(a, b) for a, b in zip(plain, others, strict=True)]
        for others in (made, pixels(perturbed))
    ]


@pytest.mark.parametrize("how", ["ddp", "compile", "compile ddp", "ddp compile"])
def test_a_wrapped_denoiser_draws_the_same_and_stays_wrapped(tiny_sd, how):
    assert run_ranks(draw_wrapped, 2, tiny_sd, how) == [[[True, True], [False, False]]] * 2


def train(group, folder, samples, data_seed=0):
    """Five steps of DDP training with dropout, and what they lost."""
    from torch.nn.parallel import DistributedDataParallel

    pipe = load(folder)
    torch.manual_seed(data_seed + group.group_rank)
    denoiser = DistributedDataParallel(pipe.unet)
    pipe.unet = denoiser
    denoiser.train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 32)
        noise = torch.nn.functional.dropout(torch.randn_like(latents))
        predicted = denoiser(latents, torch.tensor([1, 500]), text).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        if samples:  # in the middle of a step: the graph of this forward is still needed
            prompts = ["a cat", "a dog", "a bird"]
            results = ddinfer.generate(pipe, prompts, seed=step, **call_arguments("sd"))
            assert len(results) == 3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_loses_the_same_with_sampling_in_between_as_without(tiny_sd):
    without = run_ranks(train, 2, tiny_sd, False)
    assert run_ranks(train, 2, tiny_sd, True) == without
    assert run_ranks(train, 2, tiny_sd, True, 1) != without


# A denoiser sharded over the ranks


def shard(pipe):
    from torch.distributed.fsdp import fully_shard

    for block in (*pipe.unet.down_blocks, *pipe.unet.up_blocks):
        fully_shard(block)
    fully_shard(pipe.unet)


def draw_sharded(group, folder):
    """Any number of prompts, before and after the denoiser is sharded; then a step of training."""
    pipe, same = load(folder), []
    counts = range(group.group_size + 2)
    prompts = [{"prompt": f"a cat {k}", "height": 32 + 8 * (k == 1)} for k in counts]
    options = {"num_inference_steps": 2, "width": 32}
    whole = pixels(ddinfer.generate(pipe, prompts, **options))
    shard(pipe)
    for num_prompts in counts:
        made = pixels(ddinfer.generate(pipe, prompts[:num_prompts], **options))
        assert len(made) == num_prompts
        same += [np.array_equal(a, b) for a, b in zip(made, whole, strict=False)]
        mine = [r.index for r in ddinfer.stream(pipe, prompts[:num_prompts], **options)]
        assert mine == list(ddinfer.split(range(num_prompts)))
    perturbed = pixels(ddinfer.generate(pipe, prompts, seed=1, **options))
    assert not any(np.array_equal(a, b) for a, b in zip(perturbed, whole, strict=True))
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-3)
    ddinfer.generate(pipe, prompts[:1], **options)
    before = [p.to_local().clone() for p in pipe.unet.parameters()]
    latents, text = torch.ones(2, 4, 16, 16), torch.ones(2, 16, 32)
    pipe.unet(latents, torch.tensor([1, 500]), text).sample.square().mean().backward()
    ddinfer.generate(pipe, prompts[:1], **options)
    optimizer.step()
    after = [p.to_local() for p in pipe.unet.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return same


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_sharded_denoiser_draws_the_same_any_number_of_times(tiny_sd, num_ranks):
    num_images = sum(range(num_ranks + 2))
    assert run_ranks(draw_sharded, num_ranks, tiny_sd) == [[True] * num_images] * num_ranks


def fail_sharded(group, folder):
    import torch.distributed as dist

    pipe, heard = load(folder), []
    shard(pipe)
    options = {"num_inference_steps": 2, "width": 32, "height": 32}
    alone = [dist.new_group([rank]) for rank in range(2)][group.group_rank]
    for prompts, more in (
        (["a cat", {"prompt": "a dog", "num_inference_steps": 3}], {}),
        (["a cat", {"prompt": "a dog", "negative_prompt": "x"}], {}),
        (["a cat"], {"group": alone}),
        (["a cat", {"prompt": "a dog", "height": 7}, "a bird", "a car"], {"errors": "return"}),
        (["a cat", "a dog"], {"callback_on_step_end": stop_early if group.group_rank else go_on}),
    ):
        try:
            ddinfer.generate(pipe, prompts, **options, **more)
        except Exception as error:  # noqa: BLE001 - compared over the ranks
            heard.append((type(error).__name__, str(error)))
    assert len(ddinfer.generate(pipe, ["a cat"], **options)) == 1
    return heard


def go_on(pipe, step, timestep, tensors):
    return tensors


def stop_early(pipe, step, timestep, tensors):
    """What a callback may do, and on one rank alone."""
    pipe._interrupt = True
    return tensors


def test_what_ranks_of_a_sharded_denoiser_cannot_do_is_the_same_error_on_all(tiny_sd):
    first, second = run_ranks(fail_sharded, 2, tiny_sd)
    for k in (0, 1, 3):
        assert first[k] == second[k]
    kinds = [kind for kind, _ in first]
    assert kinds[:4] == ["UsageError", "UsageError", "UsageError", "RankError"]
    assert "must run equally many forwards" in first[0][1]
    assert "prompts 0 and 1 have" in first[1][1]
    assert "unet is sharded over ranks [0, 1], but only ranks [0] are in the group" in first[2][1]
    assert first[3][1].startswith("rank 0 failed while running: PromptsFailed: prompt 1 ('a dog')")
    assert "which cannot go on without one another" in first[3][1]
    assert kinds[4:] == ["RankError"]
    assert "different numbers of forwards" in first[4][1]
