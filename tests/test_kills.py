"""Real jobs killed with SIGKILL at random moments: nothing is lost, torn or made differently."""

import pytest

from tests.kill_matrix import chain, reference_images
from tests.moody_pipeline import moody_pipeline


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(model, images of a run that nobody killed)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = str(moody_pipeline(folder))
    return model, reference_images(model, folder)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_job_that_is_killed_again_and_again_is_finished_byte_for_byte(
    undisturbed, tmp_path, seed
):
    model, reference = undisturbed
    kills, _ = chain(model, tmp_path, reference, num_kills=4, seed=seed)
    assert kills
