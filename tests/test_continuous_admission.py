"""Which image enters the pipeline when, with images that need no thread; and what travels."""

from collections import deque

import pytest
import torch

from ddinfer.parallel.continuous.admission import AdmissionQueue, best_limit, count_ticks
from ddinfer.parallel.continuous.pipeline_threads import Call, Task
from ddinfer.parallel.packing import ALIGNMENT, layout_of
from ddinfer.parallel.tensor_tokens import TensorCache, TensorTokens


class Threads:
    """Images that are at their first call at once, and take no time between calls."""

    def __init__(self):
        self.started = []

    def spawn(self, index, job):
        image = Task(index, Call(0, (), {}), num_calls=1)
        image.left = job
        self.started.append(index)
        return image

    def resume(self, image, output=None, error=None):
        image.left -= 1
        image.num_calls += 1
        image.done = image.left == 0 or error is not None
        image.call = None if image.done else Call(0, (), {})


def run(calls, num_stages, limit):
    """Ticks that the queue needs for images with these numbers of calls."""
    queue, way, ticks = AdmissionQueue(Threads(), iter(calls), num_stages, limit), deque(), 0
    ended = []
    while True:
        queue.admit()
        ended += [image.index for image in queue.take_finished()]
        if queue.is_done():
            assert sorted(ended) == list(range(len(calls)))
            return ticks
        way.append(queue.ready.popleft() if queue.ready else None)
        ticks += 1
        if len(way) == num_stages:
            image = way.popleft()
            if image is not None:
                queue.resume(image)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_images", range(1, 12))
def test_the_queue_takes_as_many_ticks_as_were_simulated(num_stages, num_images):
    calls = [6] * num_images
    limit = best_limit([], calls, num_stages, num_stages)
    # The choice is made when the end is in sight, so it may be better than one fixed limit.
    assert run(calls, num_stages, num_stages) <= count_ticks([], calls, num_stages, limit)


def test_five_images_over_three_stages_do_not_leave_the_last_alone():
    assert run([4] * 5, 3, 4) == count_ticks([], [4] * 5, 3, 5) == 22


def test_jobs_are_taken_no_earlier_than_needed():
    taken = []

    def jobs():
        for k in range(100):
            taken.append(k)
            yield 3

    threads = Threads()
    queue = AdmissionQueue(threads, jobs(), 2, 3)
    queue.admit()
    assert len(queue.active) == 3
    assert threads.started == [0, 1, 2, 3], "one is begun ahead"
    assert len(taken) <= 3 + 1 + 2


# --- inputs that stay the same ----------------------------------------------------------------


def test_a_tensor_seen_twice_has_a_token_until_it_is_written_to():
    tokens = TensorTokens(iter(range(1, 100)))
    prompt, latents = torch.ones(3), torch.zeros(3)
    assert tokens.of({"a": prompt}) == {}
    first = tokens.of({"a": prompt})
    assert first.keys() == {"a"}
    assert tokens.of({"a": prompt[:]}) == first, "another view of the same memory"
    assert tokens.of({"a": latents}) == {}
    prompt += 1
    assert tokens.of({"a": prompt}) == {}
    assert tokens.of({"a": prompt}) not in ({}, first)


def call(token, serial=1):
    return 0, serial, {"a": token}


def test_both_ends_forget_alike_and_a_new_image_starts_anew():
    sender, receiver = TensorCache(), TensorCache()
    for token in range(10):
        sender.put(*call(token), {})
        receiver.put(*call(token), {"a": torch.tensor(token)})
    for token in range(10):
        assert ("a" in sender.find(*call(token))) == (token >= 6)
        assert ("a" in receiver.find(*call(token))) == (token >= 6)
    assert int(receiver.find(*call(9))["a"]) == 9
    assert receiver.find(*call(9, serial=2)) == {}


# --- bytes --------------------------------------------------------------------------------------


def test_tensors_keep_values_strides_and_alignment_through_one_buffer():
    values = {
        "plain": torch.randn(2, 3),
        "transposed": torch.randn(4, 5).T,
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "int": torch.arange(7),
    }
    layout = layout_of(values)
    made = layout.unpack(layout.pack(values, torch.device("cpu")))
    for name, value in values.items():
        assert torch.equal(made[name], value), name
        assert made[name].dtype == value.dtype
        assert made[name].data_ptr() % ALIGNMENT == 0 or not value.numel()
    for name in ("plain", "transposed", "channels last"):
        assert made[name].stride() == values[name].stride()
    fewer = layout.only(["scalar", "int"])
    assert fewer.names == ("scalar", "int")
    assert fewer.num_bytes == 2 * ALIGNMENT


def test_another_shape_than_planned_is_an_error():
    layout = layout_of({"a": torch.empty(2, 3)})
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\)"):
        layout.pack({"a": torch.empty(3, 2)}, torch.device("cpu"))
