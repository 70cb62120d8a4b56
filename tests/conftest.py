"""Fixtures that several files of tests share."""

import pytest

from tests.tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def one_thread():
    """Kernels round by the number of threads; here it is one, as in the tests' ranks."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """→ a function: kind of pipeline → the folder of a tiny one with random weights."""
    folder = tmp_path_factory.mktemp("pipelines")
    return lambda kind: tiny_pipeline(kind, folder)
