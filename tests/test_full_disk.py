"""Whole jobs that meet a full disk or a limit: 74 with path and cause, and nothing lost.

What every single file operation does then is tested in test_storage_crashes.py.
"""

import resource
import shutil
import subprocess

import pytest

from ddinfer.errors import StorageError
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import STARTS, end, family, is_whole, job, made, undisturbed, wait_until
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import images, run, start

NUM_PROMPTS = 30
PROMPTS = [f"a picture of {k}" for k in range(NUM_PROMPTS)]


def by_night(value):
    return pytest.param(value, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reference(moody, tmp_path_factory):
    """Images of the job that always had room."""
    return undisturbed(moody, tmp_path_factory.mktemp("reference"), PROMPTS, width=8, height=8)


def check_a_whole_part(folder):
    """Every image that a journal speaks of is there; others may lie beside them, unspoken of."""
    report = verify(Files(), str(folder / "out"))
    assert (report.missing, report.torn) == ([], {})


# --- a file system without room ----------------------------------------------------------------

#: Mounts a small disk where nobody else sees it, runs the job, gives it room, runs it again.
SMALL_DISK = """
set -u
disk=$1 size=$2; shift 2
mount -t tmpfs -o size=$size tmpfs "$disk" || exit 99
"$@"; echo "first: $?" >&2
cp -a "$disk/out" "$disk-first"
mount -o remount,size=100m "$disk" || exit 99
"$@"; echo "second: $?" >&2
cp -a "$disk/out" "$disk-second"
"""


def can_mount(folder):
    """Whether an ordinary user may mount in a namespace of his own here."""
    (folder / "try").mkdir()
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", folder / "try"]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("two ranks", "100k"),
        pytest.param("one process", "24k", marks=pytest.mark.nightly),
        pytest.param("one process", "60k", marks=pytest.mark.nightly),
        pytest.param("two ranks", "150k", marks=pytest.mark.nightly),
        pytest.param("torchrun", "120k", marks=pytest.mark.nightly),
    ],
)
def test_a_job_on_a_full_disk_ends_with_74_and_goes_on_once_there_is_room(
    moody, tmp_path, reference, name, size
):
    if not can_mount(tmp_path):
        pytest.skip("a file system of its own cannot be mounted here (unshare -rm mount)")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = job(moody, tmp_path, PROMPTS, "--width=8", "--height=8")
    words[words.index(tmp_path / "out")] = disk / "out"
    script = ["unshare", "-rm", "bash", "-c", SMALL_DISK, "_", disk, size]
    done = run([*script, *STARTS[name], *words])
    assert done.returncode != 99, done.stderr
    first, _, second = done.stderr.partition("first: ")
    assert f"{disk}/out/" in first
    assert "No space left on device (ENOSPC); free some space" in first
    if name != "torchrun":
        assert second.startswith("74\n"), done.stderr
    for when in ("first", "second"):
        (tmp_path / when).mkdir()
        shutil.move(tmp_path / f"disk-{when}", tmp_path / when / "out")
    if (tmp_path / "first/out/job.json").exists():
        check_a_whole_part(tmp_path / "first")
    assert second.rstrip().endswith("second: 0"), done.stderr
    assert is_whole(tmp_path / "second")
    assert images(tmp_path / "second/out") == reference


# --- limits of a process -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most_bytes", "part"),
    [
        ("one process", 2000, "journal/000000-00000.jsonl"),
        pytest.param("two ranks", 2000, "journal/", marks=pytest.mark.nightly),
        pytest.param("two ranks", 600, "images/0000/", marks=pytest.mark.nightly),
        pytest.param("one process", 12000, ".metadata.jsonl.", marks=pytest.mark.nightly),
    ],
)
def test_a_file_that_may_not_grow_ends_the_job_with_74_and_it_goes_on_later(
    moody, tmp_path, name, most_bytes, part
):
    """The limit comes while the first image is made."""
    prompts = [f"a picture of {k}{' and more' * 50}" for k in range(NUM_PROMPTS)]
    prompts[0] = f"wait {tmp_path / 'gate'}"
    command = [*STARTS[name], *job(moody, tmp_path, prompts, "--width=8", "--height=8")]
    process = start(command)
    wait_until(process, (tmp_path / "gate.waiting").exists)
    for pid in family(process.pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    (tmp_path / "gate").touch()
    code, err = end(process)
    assert code == 74, err
    assert f"{tmp_path}/out/{part}" in err
    assert "File too large (EFBIG); raise the limit" in err
    check_a_whole_part(tmp_path)
    assert run(command).returncode == 0
    assert is_whole(tmp_path)
    assert images(tmp_path / "out") == undisturbed(moody, tmp_path, prompts, width=8, height=8)


def test_a_rank_that_may_open_no_more_files_ends_the_job_with_74(moody, tmp_path):
    words = job(moody, tmp_path, ["a", f"wait {tmp_path / 'gate'}", "open", "b", "c", "d"])
    command = [*STARTS["one process"], *words]
    process = start(command)
    wait_until(process, lambda: (tmp_path / "gate.waiting").exists() and made(tmp_path) == [0])
    (tmp_path / "gate.waiting").unlink()
    # What is open stays open; any further file would need a higher number than this.
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, 4096))
    (tmp_path / "gate").touch()
    code, err = end(process)
    assert code == 74, err
    assert "Too many open files (EMFILE); raise the limit" in err
    assert made(tmp_path) == [0]
    report = verify(Files(), str(tmp_path / "out"))
    assert (report.num_good, report.num_failed) == (1, 0), "no prompt is to blame"
    assert run(command).returncode == 0
    assert is_whole(tmp_path)
    assert made(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_disk_that_breaks_inside_the_pipeline_is_no_fault_of_its_prompts(moody, tmp_path):
    prompts = ["a", "unreadable /weights/on/a/bad/disk", "b"]
    with pytest.raises(StorageError, match=r"/weights/on/a/bad/disk: Input/output error \(EIO\)"):
        undisturbed(moody, tmp_path, prompts)
    report = verify(Files(), str(tmp_path / "undisturbed"))
    assert (report.num_good, report.num_failed, report.pending) == (1, 0, [1, 2])


@pytest.mark.parametrize("name", ["one process", by_night("two ranks")])
def test_a_full_disk_of_the_library_s_cache_is_told_the_same_way(moody, tmp_path, name):
    """diffusers copies pipeline code there before the job has a folder."""
    command = [*STARTS[name], *job(moody, tmp_path, ["a"])]
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "_", *command]
    done = run(limited, HF_MODULES_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 74, done.stderr
    assert "File too large" in done.stderr
    assert f"{tmp_path}/cache/" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
