import os

import pytest

from ddinfer.errors import StorageError
from ddinfer.storage.files import Files, atomic_stream
from tests.fake_disk import FakeDisk, Fault, Platter


def atomic_write(files, path, data):
    with atomic_stream(files, path) as write:
        write(data)


def test_the_operating_systems_errors_name_path_cause_and_way_out(tmp_path):
    files = Files()
    with pytest.raises(StorageError, match=r"cannot open .*/none: No such file .*\(ENOENT\)") as e:
        files.read(str(tmp_path / "none"))
    assert e.value.exit_code == 74
    full = Files(FakeDisk(Platter(), Fault(1, "ENOSPC")))
    with pytest.raises(StorageError, match=r"cannot write /\.a\..*ENOSPC.*free some space"):
        atomic_write(full, "/a", b"data")


def test_atomic_write_replaces_the_whole_and_leaves_nothing_else(tmp_path):
    files, path = Files(), str(tmp_path / "a")
    atomic_write(files, path, b"one")
    atomic_write(files, path, b"two")
    assert files.read(path) == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_stream_leaves_the_old_content_and_nothing_else(tmp_path):
    files, path = Files(), str(tmp_path / "a")
    atomic_write(files, path, b"old")
    with pytest.raises(TypeError), atomic_stream(files, path) as write:
        write("no bytes")
    assert files.read(path) == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_writes_go_on_after_a_short_one():
    platter = Platter()
    atomic_write(Files(FakeDisk(platter, Fault(1, "short"))), "/a", b"0123456789")
    assert platter.read("/a") == b"0123456789"


def test_reading_what_may_not_be_there(tmp_path):
    files = Files()
    assert files.read_or_none(str(tmp_path / "none")) is None
    assert files.list(str(tmp_path / "none")) == []
    assert files.size(str(tmp_path / "none")) is None
    files.remove(str(tmp_path / "none"))
    files.remove_empty_folder(str(tmp_path / "none"))


def test_a_folder_that_is_not_empty_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    Files().remove_empty_folder(str(tmp_path / "a"))
    assert (tmp_path / "a" / "b").exists()


def test_the_fake_disk_forgets_what_was_not_synced():
    platter = Platter()
    files = Files(FakeDisk(platter))
    fd = files.create("/a")
    files.write(fd, b"1")
    files.sync(fd)
    files.write(fd, b"2")
    platter_without = dict(platter.durable_entries)
    assert "/a" not in platter_without
    files.sync_folder("/")
    platter.power_fails()
    assert platter.read("/a") == b"1"


def test_the_fake_disk_and_the_real_one_agree(tmp_path):
    """The same calls on both: the tests that crash lean on the fake one."""
    platter = Platter()
    for files, root in ((Files(), str(tmp_path)), (Files(FakeDisk(platter)), "")):
        files.make_folder(f"{root}/f")
        files.make_folder(f"{root}/f")
        fd = files.create(f"{root}/f/a")
        files.write(fd, b"abc")
        files.sync(fd)
        assert files.lock(fd, exclusive=True)
        files.close(fd)
        with pytest.raises(StorageError, match="EEXIST"):
            files.create(f"{root}/f/a")
        with pytest.raises(StorageError, match="ENOENT"):
            files.create(f"{root}/none/a")
        files.replace(f"{root}/f/a", f"{root}/f/b")
        assert files.list(f"{root}/f") == ["b"]
        assert files.size(f"{root}/f/b") == 3
        assert files.read(f"{root}/f/b") == b"abc"
        first = files.open_lock(f"{root}/lock")
        second = files.open_lock(f"{root}/lock")
        assert files.lock(first, exclusive=True)
        assert not files.lock(second, exclusive=False)
        assert files.lock(first, exclusive=False)
        assert files.lock(second, exclusive=False)
        assert not files.lock(first, exclusive=True)
        files.write_at_start(first, b"xyz")
        assert files.read(f"{root}/lock") == b"xyz"
        files.close(first)
        assert files.lock(second, exclusive=True)
        files.close(second)
        files.remove(f"{root}/f/b")
        files.remove_empty_folder(f"{root}/f")
        assert not files.exists(f"{root}/f")
        assert files.free_bytes(root or "/") > 0
