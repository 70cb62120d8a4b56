"""Blocks measured with the first prompt, to balance stages by time."""

import logging

import pytest
import torch

from ddinfer.engines.block_times import measure_blocks
from ddinfer.models.loading import denoisers
from ddinfer.request import Prompt, resolve_requests
from tests.tiny_pipelines import call_arguments, wan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def experts():
    """Two denoisers that take turns; the second is for the later steps."""
    torch.manual_seed(0)
    pipe = wan()
    pipe.register_modules(transformer_2=wan().transformer)
    pipe.register_to_config(boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(prompt="a cat", **more):
    call = {"num_inference_steps": 4, **more}
    return resolve_requests([Prompt({"prompt": prompt, **call_arguments("wan"), **call})])[0]


def test_every_block_of_both_denoisers_is_measured_without_weights(experts):
    models = denoisers(experts)
    forwards = {name: model.forward for name, model in models.items()}
    for model in models.values():
        for block in model.blocks:
            block.to("meta")
    found = measure_blocks(experts, models, request(), {}, torch.device("cpu"))
    assert {name: len(seconds) for name, seconds in found.items()} == {
        name: len(model.blocks) for name, model in models.items()
    }
    assert all(second > 0 for seconds in found.values() for second in seconds)
    assert forwards == {name: model.forward for name, model in models.items()}
    assert all(p.is_meta for model in models.values() for p in model.blocks.parameters())


def test_a_prompt_that_fails_leaves_the_balance_by_bytes(experts, caplog):
    with caplog.at_level(logging.WARNING):
        wrong = request(height=17)
        assert measure_blocks(experts, denoisers(experts), wrong, {}, torch.device("cpu")) == {}
    assert "--balance time: prompt 0 failed before all blocks were measured" in caplog.text
