"""What a job's text encoders have answered once is given again: the same bits, and bounded."""

import inspect

import numpy as np
import pytest
import torch

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.whole import WholeEngine, load_whole_engine
from ddinfer.models.loading import load_pipeline
from ddinfer.request import Prompt, resolve_requests
from tests.tiny_pipelines import call_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def requests_for(kind, texts, base_seed=7, **fields):
    rows = [Prompt({"prompt": text, **call_arguments(kind), **fields}) for text in texts]
    return resolve_requests(rows, base_seed=base_seed)


def pictures(engine, requests):
    engine.pipe.set_progress_bar_config(disable=True)
    results = list(engine.run([[request] for request in requests]))
    assert not any(result.error for result in results)
    return [np.asarray(result.image) for result in results]


def count_forwards(module):
    """A list that grows with every real forward of the encoder."""
    seen = []
    *_, inner = module.children()
    inner.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize(
    ("kind", "fields", "num_answers"),
    [
        ("sd", {"negative_prompt": "a dog"}, {"text_encoder": 3}),
        ("sdxl", {}, {"text_encoder": 2, "text_encoder_2": 2}),  # the empty one is not encoded
        ("flux", {}, {"text_encoder": 2, "text_encoder_2": 2}),
        ("sana", {"negative_prompt": "a dog"}, {"text_encoder": 3}),  # it answers with a cache
    ],
)
def test_a_job_encodes_each_text_once_and_draws_the_same(folder, kind, fields, num_answers):
    model = str(tiny_pipeline(kind, folder))
    requests = requests_for(kind, ["a red cat", "a blue dog", "a red cat"], **fields)
    engine = load_whole_engine(model, JobConfig(model=model, device="cpu"), world=World())
    counts = {name: count_forwards(engine.pipe.components[name]) for name in num_answers}
    made = pictures(engine, requests)
    assert {name: len(seen) for name, seen in counts.items()} == num_answers
    assert engine.encodings.num_hits == engine.encodings.num_calls - sum(num_answers.values()) > 0

    plain = pictures(WholeEngine(load_pipeline(model)), requests)
    assert all(np.array_equal(a, b) for a, b in zip(made, plain, strict=True))
    others = requests_for(kind, ["a red cat"], base_seed=8, **fields)
    assert not np.array_equal(pictures(engine, others)[0], plain[0])


class Encoder(torch.nn.Module):
    """Its answer holds the number of times it was really asked."""

    def __init__(self):
        super().__init__()
        self.num_forwards = 0

    def forward(self, input_ids, attention_mask=None, scale=1.0, keep=None):
        self.num_forwards += 1
        hidden = input_ids.float().unsqueeze(-1).repeat(1, 1, 1000) * scale
        return (hidden, {"past": object()}) if keep else (hidden, hidden[:, 0])


class Pipe:
    def __init__(self):
        self.encoder = Encoder().eval()
        self.components = {"text_encoder": self.encoder, "vae": torch.nn.Linear(1, 1)}


@torch.no_grad()
def test_only_the_very_same_call_is_answered_from_before():
    pipe = Pipe()
    cache = EncodingCache(pipe)
    ids = torch.tensor([[1, 2, 3]])
    first = pipe.encoder(ids)
    again = pipe.encoder(ids.clone())
    assert again[0] is first[0]
    assert again[1] is first[1]
    assert pipe.encoder.num_forwards == 1
    different = [
        ((torch.tensor([[1, 2, 4]]),), {}),
        ((torch.tensor([[1], [2], [3]]),), {}),
        ((ids.int(),), {}),
        ((ids,), {"attention_mask": torch.ones_like(ids)}),
        ((ids,), {"attention_mask": torch.ones_like(ids).bool()}),
        ((ids,), {"scale": 2.0}),
        ((ids,), {"scale": 2}),
        ((ids,), {"scale": 0.0}),
        ((ids,), {"scale": -0.0}),
    ]
    for args, kwargs in different:
        pipe.encoder(*args, **kwargs)
    assert pipe.encoder.num_forwards == 1 + len(different)
    assert cache.num_hits == 1


@torch.no_grad()
def test_an_answer_that_was_written_into_is_made_again():
    pipe = Pipe()
    cache = EncodingCache(pipe)
    ids = torch.tensor([[1, 2, 3]])
    pipe.encoder(ids)[0][:, 1].mul_(0)  # through a view
    assert torch.equal(pipe.encoder(ids)[0], Encoder()(ids)[0])
    assert pipe.encoder(ids)[0][0, 1, 0] == 2
    assert (pipe.encoder.num_forwards, cache.num_hits) == (2, 1)


def test_training_autograd_and_what_cannot_be_compared_or_repeated_pass_through():
    pipe = Pipe()
    cache = EncodingCache(pipe)
    ids = torch.tensor([[1, 2, 3]])
    calls = [lambda: pipe.encoder(ids)] * 2  # autograd is on
    with torch.no_grad():
        calls += [lambda: pipe.encoder(ids, keep=True)] * 2  # its answer cannot be given twice
        calls += [lambda: pipe.encoder(ids, scale=np.float32(2))] * 2  # of a type not known here
        calls += [lambda: pipe.encoder(torch.ones(1, 200_000))] * 2  # no token ids
    for call in calls[:2]:
        call()
    with torch.no_grad():
        for call in calls[2:]:
            call()
        pipe.encoder.train()
        pipe.encoder(ids)
        pipe.encoder(ids)
    with torch.inference_mode():
        pipe.encoder.eval()
        pipe.encoder(ids)
        pipe.encoder(ids)
    assert (pipe.encoder.num_forwards, cache.num_hits) == (12, 0)


@torch.no_grad()
def test_the_least_used_answers_make_room():
    pipe = Pipe()
    cache = EncodingCache(pipe, max_bytes=30_000)  # three answers of 8,000 bytes and their rest
    texts = [torch.tensor([[k, k + 1]]) for k in range(5)]
    for text in texts[1:]:
        pipe.encoder(texts[0])
        pipe.encoder(text)
    assert pipe.encoder.num_forwards == 5, "the first text was used in between and stayed"
    pipe.encoder(texts[1])
    assert pipe.encoder.num_forwards == 6
    assert cache._num_bytes <= 30_000
    cache.clear()
    pipe.encoder(texts[0])
    assert pipe.encoder.num_forwards == 7
    EncodingCache(pipe, max_bytes=10)  # too small for anything: around the first one
    pipe.encoder(texts[0])
    assert pipe.encoder.num_forwards == 7


@torch.no_grad()
def test_encoders_are_left_as_they_were():
    pipe = Pipe()
    signature = inspect.signature(pipe.encoder.forward)
    cache = EncodingCache(pipe)
    assert inspect.signature(pipe.encoder.forward) == signature
    assert "forward" not in vars(pipe.components["vae"])
    cache.undo()
    assert "forward" not in vars(pipe.encoder)
    pipe.encoder(torch.tensor([[1]]))
    assert cache.num_calls == 0
