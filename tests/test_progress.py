"""One progress display for the whole job, on rank 0."""

import io
import os
import pty
import time

import pytest

from ddinfer.distributed import progress
from ddinfer.distributed.process_group import Group
from ddinfer.distributed.progress import Progress, duration, progress_line
from ddinfer.job.assignment import RankTimes, load_balance
from tests.ranks import run_ranks


def make_images(group, num_images):
    """Each rank makes its share; waits until rank 0 has shown all of them."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_SECONDS", 0.02)
        show(group, num_images, shown)
    return shown.getvalue()


def show(group, num_images, shown):
    with Progress(group, total=20, finished=8, stream=shown) as bar:
        for k in range(num_images):
            bar.made(1, failed=int(k == 0))
        group.wait_for_peers()
        wanted = f"{8 + num_images * group.group_size} of 20 images"
        while group.group_rank == 0 and wanted not in shown.getvalue():
            time.sleep(0.01)


def test_lines_on_rank_zero_count_the_images_of_all_ranks():
    lines, nothing, also_nothing = run_ranks(make_images, 3, 4)
    assert "20 of 20 images" in lines.splitlines()[-1]
    assert "3 failed" in lines.splitlines()[-1]
    assert nothing == also_nothing == ""


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    with (
        os.fdopen(theirs, "w") as terminal,
        Progress(Group.alone(), total=20, finished=8, stream=terminal) as bar,
    ):
        bar.made(5, failed=2)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "8/20" in seen
    assert "13/20" in seen
    assert "2 failed" in seen


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((12, 40, 12, 1, 4.0), "12 of 40 images, 3 images/s, 1 failed, 9.3 s left"),
        ((8, 40, 0, 0, 4.0), "8 of 40 images, 0 images/s"),
        ((20, 40, 10, 0, 5.0), "20 of 40 images, 2 images/s, 10 s left"),
    ],
)
def test_a_line_counts_only_new_images_into_the_rate(arguments, line):
    assert progress_line(*arguments) == line


def test_durations_are_for_people():
    assert [duration(s) for s in (0.25, 59, 61, 3725, 90_000)] == [
        "0.2 s",
        "59 s",
        "1 min 1 s",
        "1 h 2 min",
        "25 h 0 min",
    ]


def test_ranks_that_end_together_are_even():
    def times(*seconds):
        return [RankTimes(k, 5, 1.0, s, 0.9 * s) for k, s in enumerate(seconds)]

    assert load_balance(times(10.0, 10.0)) == 1.0
    assert load_balance(times(10.0, 5.0)) == 0.75
    assert load_balance(times(0.0, 0.0)) == load_balance([]) == 1.0
