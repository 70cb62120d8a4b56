"""The wheel: built, installed beside nothing of the checkout, and drawn with."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ddinfer.report.page import SCRIPTS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    source = folder / "source"  # a copy, so that the build leaves nothing in the checkout
    for name in listed:
        if name.startswith(("ddinfer/", "setup.", "README", "LICENSE")) and (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(folder), str(source)], check=True, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert "ddinfer" in tops
    assert all(top == "ddinfer" or top.endswith(".dist-info") for top in tops)
    assert "ddinfer/py.typed" in names
    for pipeline in ("shapes-sd", "shapes-flux"):
        assert f"ddinfer/tiny/weights/{pipeline}/model_index.json" in names
    for name in ("page.html", "style.css", *SCRIPTS):
        assert f"ddinfer/report/page/{name}" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pyc"))]
    assert wheel.stat().st_size < 20e6


def test_the_installed_wheel_draws(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    environ = {**os.environ, "PYTHONPATH": str(site)}
    words = ["--output", "out", "--limit", "1", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ddinfer", *words],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_made"] == 1
    assert (tmp_path / "out/images/0000/00000000.png").is_file()
    where = "import ddinfer; print(ddinfer.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert shown.stdout.startswith(str(site))
