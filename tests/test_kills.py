"""Real jobs killed with SIGKILL at random moments: nothing is lost, torn or made differently."""

import pytest

from tests.kill_matrix import chain, reference_images
from tests.moody_pipeline import moody_pipeline

NUM_KILLS, MOST_CHAINS = 12, 24


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(model, images of a run that nobody killed)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = str(moody_pipeline(folder))
    return model, reference_images(model, folder)


def test_jobs_killed_again_and_again_are_finished_byte_for_byte(undisturbed, tmp_path):
    """A job may end before its next kill, so chains are added until enough were killed."""
    model, reference = undisturbed
    num_kills, seed = 0, 0
    while num_kills < NUM_KILLS:
        assert seed < MOST_CHAINS, f"only {num_kills} kills in {seed} chains"
        folder = tmp_path / str(seed)
        folder.mkdir()
        kills, _ = chain(model, folder, reference, num_kills=4, seed=seed)
        num_kills, seed = num_kills + len(kills), seed + 1
