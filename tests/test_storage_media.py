"""Files of every format: the same bytes in every process, and decoded they are what went in."""

import subprocess
import sys
import wave
import zipfile

import av
import numpy as np
import pytest
from PIL import Image

from ddinfer.errors import InputError
from ddinfer.inputs import read_audio, read_frames
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path, image_text, index_of, read_metadata
from ddinfer.storage.media import ENDINGS, Formats, read_text
from ddinfer.storage.verify import verify
from tests.storage_jobs import describe, make_requests
from tests.storage_jobs import run_job as run_storage_job

TEXT = {"parameters": "a prompt, “quoted”\nSteps: 2", "ddinfer": '{"seed": 3, "prompt": "naïve"}'}
REQUEST = Request(0, "00000000", "a prompt", 3)
RATE = 16_000


def frames(count=12, size=(64, 48), seed=0):
    """A smooth picture that moves, as a model makes them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (2, 3, 3), np.uint8))
    large = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    return [Image.fromarray(np.roll(large, 2 * k, 1)) for k in range(count)]


def sound(seconds=1.0, channels=2):
    time = np.arange(int(RATE * seconds)) / RATE
    tones = [np.sin(2 * np.pi * 220 * (k + 1) * time) for k in range(channels)]
    return 0.5 * np.stack(tones).astype(np.float32)


def video(with_sound=True, **more):
    audio = {"audio": sound(), "sampling_rate": RATE} if with_sound else {}
    return Result(REQUEST, frames=frames(**more), fps=12, **audio)


RESULTS = {
    "jpg": (Formats(image="jpg"), Result(REQUEST, image=frames(1)[0])),
    "webp": (Formats(image="webp"), Result(REQUEST, image=frames(1)[0])),
    "mp4": (Formats(), video()),
    "webm": (Formats(video="webm"), video()),
    "zip": (Formats(video="frames"), video()),
    "png": (Formats(video="apng"), video(with_sound=False)),
    "wav": (Formats(), Result(REQUEST, audio=sound(), sampling_rate=RATE)),
    "flac": (Formats(audio="flac"), Result(REQUEST, audio=sound(), sampling_rate=RATE)),
}


def written(tmp_path, ending):
    formats, result = RESULTS[ending]
    assert formats.ending(result) == ending
    path = tmp_path / f"file.{ending}"
    path.write_bytes(formats.encode(result, TEXT))
    return str(path), result


def test_every_ending_is_tested_here():
    assert set(RESULTS) == set(ENDINGS)


@pytest.mark.parametrize("ending", RESULTS)
def test_text_is_read_back(ending, tmp_path):
    path, _ = written(tmp_path, ending)
    assert read_text(path) == TEXT


@pytest.mark.parametrize("ending", RESULTS)
def test_half_a_file_is_an_error(ending, tmp_path):
    path, _ = written(tmp_path, ending)
    with open(path, "rb+") as file:
        file.truncate(len(file.read()) // 2)
    with pytest.raises(InputError, match=str(path)):
        read_metadata(path)


_PRINT_HASHES = """
import hashlib
from tests.test_storage_media import RESULTS, TEXT
for formats, result in RESULTS.values():
    print(hashlib.sha256(formats.encode(result, TEXT)).hexdigest())
"""


def test_bytes_do_not_depend_on_what_lay_in_memory_before(monkeypatch):
    """x264's macroblock trees read memory that nobody wrote: the C library fills it here."""
    hashes = set()
    for fill in ("1", "99", "200"):
        monkeypatch.setenv("MALLOC_PERTURB_", fill)
        command = [sys.executable, "-c", _PRINT_HASHES]
        hashes.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(hashes) == 1
    assert len(hashes.pop().split()) == len(RESULTS)


@pytest.mark.parametrize(("ending", "most"), [("mp4", 3.0), ("webm", 3.0)])
def test_a_video_shows_its_frames_and_plays_its_sound(ending, most, tmp_path):
    path, result = written(tmp_path, ending)
    shown = list(read_frames(path))
    assert len(shown) == len(result.frames)
    errors = [
        np.abs(np.subtract(a, b, dtype=int)).mean()
        for a, b in zip(shown, result.frames, strict=True)
    ]
    assert max(errors) < most
    # Another frame is further away: the bound is one that wrong frames do not pass.
    assert np.abs(np.subtract(shown[0], result.frames[6], dtype=int)).mean() > 2 * most
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 12
    heard, rate = read_audio(path, RATE)
    assert rate == RATE
    for channel, tone in enumerate((220, 440)):
        spectrum = np.abs(np.fft.rfft(heard[channel, :RATE]))
        assert abs(int(spectrum.argmax()) - tone) <= 1  # a bin is one hertz
    inner = heard[:, RATE // 4 : RATE // 2]
    assert np.abs(np.abs(inner).max(axis=1) - 0.5).max() < 0.05


@pytest.mark.parametrize("ending", ["zip", "png"])
def test_lossless_videos_keep_every_pixel(ending, tmp_path):
    path, result = written(tmp_path, ending)
    for shown, frame in zip(read_frames(path), result.frames, strict=True):
        assert np.array_equal(shown, frame)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_sound_keeps_every_16_bit_sample(ending, tmp_path):
    path, result = written(tmp_path, ending)
    heard, rate = read_audio(path)
    assert rate == RATE
    assert np.array_equal(heard * 32768, np.rint(result.audio * 32767))


def test_python_reads_the_wav(tmp_path):
    path, result = written(tmp_path, "wav")
    with wave.open(path) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, RATE, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert np.array_equal(samples.T, np.rint(result.audio * 32767))


def test_a_zip_has_the_sound_beside_its_frames(tmp_path):
    path, _ = written(tmp_path, "zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [*(f"{k:05d}.png" for k in range(12)), "audio.wav"]


@pytest.mark.parametrize("size", [(63, 47), (33, 2)])
def test_odd_sizes_are_filled_up(size, tmp_path):
    result = video(with_sound=False, count=3, size=size)
    path = tmp_path / "odd.mp4"
    path.write_bytes(Formats().encode(result, {}))
    assert next(read_frames(str(path))).size == (size[0] + size[0] % 2, size[1] + size[1] % 2)


def test_an_animated_png_refuses_sound():
    with pytest.raises(ValueError, match="use --video_format mp4"):
        Formats(video="apng").encode(video(), {})


def test_one_frame_without_sound_is_an_image():
    result = Result(REQUEST, frames=frames(1))
    assert Formats(image="jpg").ending(result) == "jpg"
    assert Formats().ending(video(count=1)) == "mp4"


def test_a_number_of_frames_per_second_for_all_goes_first(tmp_path):
    path = tmp_path / "file.mp4"
    path.write_bytes(Formats(fps=23.976).encode(video(), {}))
    with av.open(str(path)) as container:
        assert abs(float(container.streams.video[0].average_rate) - 23.976) < 1e-3


def test_paths_and_indices_are_inverse():
    for ending in ENDINGS:
        assert index_of(image_path(12_345_678, ending)) == 12_345_678
    for other in ("images/0000/00000001.txt", "images/0001/00000001.png", "00000001.png"):
        assert index_of(other) is None


def test_other_tools_read_parameters_of_a_photograph(tmp_path):
    """A1111 writes them so: UserComment, UTF-16 after the word UNICODE."""
    path, _ = written(tmp_path, "jpg")
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + TEXT["parameters"].encode("utf-16-be")


def test_size_is_left_out_where_there_is_none():
    assert "Size" not in image_text(REQUEST, {}, size=None)["parameters"]
    assert "Size: 2x3" in image_text(REQUEST, {}, size=(2, 3))["parameters"]


def test_a_job_of_videos_is_written_verified_and_overwritten(tmp_path):
    requests = make_requests(3)

    def run(**options):
        formats = {"image_format": "png", "video_format": "webm", "audio_format": "wav"}
        return run_storage_job(
            tmp_path,
            requests,
            job=describe(requests, **formats),
            formats=Formats.of(formats),
            answer=lambda request: {"frames": frames(3, seed=request.seed)},
            **options,
        )

    assert run(stop_after=1).pending == [2]
    assert run().is_complete
    names = [f"images/0000/0000000{k}.webm" for k in range(3)]
    assert all((tmp_path / name).is_file() for name in names)
    assert verify(Files(), str(tmp_path)).is_good
    first = (tmp_path / names[0]).read_bytes()
    (tmp_path / names[1]).unlink()
    (tmp_path / "images/0000/00000001.mp4").write_bytes(first)  # another job's
    report = verify(Files(), str(tmp_path))
    assert (report.missing, report.paths) == ([1], {1: names[1]})
    assert report.extra == ["images/0000/00000001.mp4"]
    run(overwrite=True)
    assert (tmp_path / names[0]).read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "images/0000").iterdir()) == [
        "00000000.webm", "00000001.mp4", "00000001.webm", "00000002.webm",
    ]  # fmt: skip
