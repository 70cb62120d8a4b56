"""The clock of the pipeline: pure arithmetic, without any process."""

import pytest

from ddinfer.parallel.continuous.admission import best_limit, count_ticks


@pytest.mark.parametrize("num_stages", range(1, 6))
@pytest.mark.parametrize("extra", range(4))
@pytest.mark.parametrize("calls", [1, 2, 7, 28])
def test_as_many_images_as_fit_take_m_t_plus_s_minus_1_ticks(num_stages, extra, calls):
    images = num_stages + extra
    ticks = count_ticks([], [calls] * images, num_stages, images)
    assert ticks == images * calls + num_stages - 1


def test_a_single_image_leaves_the_other_stages_idle():
    assert count_ticks([], [10], 4, 4) == 40


def test_the_last_images_are_admitted_early():
    # Three stages, four slots, five images: the fifth alone would leave two stages idle.
    late = count_ticks([], [4] * 5, 3, 4)
    early = count_ticks([], [4] * 5, 3, best_limit([], [4] * 5, 3, 4))
    assert (late, early) == (28, 22)
    assert best_limit([], [4] * 5, 3, 4) == 5


def test_no_more_images_than_needed_are_admitted():
    assert best_limit([], [4] * 4, 3, 4) == 4
    assert best_limit([3, 3, 3], [], 3, 3) == 3
    assert best_limit([], [4] * 8, 2, 4) == 4


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_images", range(1, 13))
def test_never_fewer_than_all_stages_busy_while_images_allow_it(num_stages, num_images):
    calls = [6] * num_images
    limit = best_limit([], calls, num_stages, num_stages)
    assert num_stages <= limit <= 2 * num_stages - 1
    ticks = count_ticks([], calls, num_stages, limit)
    if num_images >= num_stages and num_images % num_stages == 0:
        assert ticks == 6 * num_images + num_stages - 1
    assert ticks >= max(6 * num_images + num_stages - 1, 6 * num_stages)


def test_images_of_different_length_all_end():
    assert count_ticks([3, 1], [5, 2, 9], 2, 2) >= 3 + 1 + 5 + 2 + 9 + 1
    assert count_ticks([], [], 3, 3) == 0
