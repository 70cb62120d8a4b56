import dataclasses
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddinfer.cli import dispatch
from ddinfer.errors import InputError
from ddinfer.request import Request
from ddinfer.storage.images import (
    ImageRecord,
    image_path,
    image_text,
    read_metadata,
)
from ddinfer.storage.png import encode_animation, encode_png

#: How the web UI that made this format reads settings back (modules/infotext_utils.py).
A1111_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def noise(mode="RGB", size=(37, 23), seed=0):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    return Image.fromarray(pixels, mode=None)


def decoded(data, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    image = Image.open(path)
    image.load()
    return image


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(37, 23), (1, 1), (1, 9), (9, 1), (64, 64)])
def test_pillow_reads_identical_pixels(mode, size, tmp_path):
    image = noise(mode, size)
    read = decoded(encode_png(image), tmp_path)
    assert read.mode == mode
    assert np.array_equal(np.asarray(read), np.asarray(image))


def test_smooth_pictures_too(tmp_path):
    image = Image.radial_gradient("L").convert("RGB")
    assert np.array_equal(np.asarray(decoded(encode_png(image), tmp_path)), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK"])
def test_other_modes_become_one_that_png_has(mode, tmp_path):
    image = noise().convert(mode)
    read = decoded(encode_png(image), tmp_path)
    assert np.array_equal(np.asarray(read), np.asarray(image.convert(read.mode)))


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (5, 7), np.uint16)
    read = decoded(encode_png(Image.fromarray(pixels)), tmp_path)
    assert np.array_equal(np.asarray(read).astype(np.uint16), pixels)


def test_a_mode_that_png_has_not_is_an_error():
    with pytest.raises(ValueError, match="mode 'F'"):
        encode_png(Image.new("F", (2, 2)))


def test_equal_pictures_have_equal_bytes_and_others_have_not():
    assert encode_png(noise(), {"a": "b"}) == encode_png(noise(), {"a": "b"})
    assert encode_png(noise(), {"a": "b"}) != encode_png(noise(), {"a": "c"})
    assert encode_png(noise()) != encode_png(noise(seed=1))


@pytest.mark.parametrize("text", ["plain", "é 🐶", "two\nlines", "", "x" * 5000])
def test_text_comes_back(text, tmp_path):
    data = encode_png(noise(), {"parameters": text, "ddinfer": "{}"})
    assert decoded(data, tmp_path).text == {"parameters": text, "ddinfer": "{}"}


def test_paths_are_by_index_alone():
    assert image_path(0) == "images/0000/00000000.png"
    assert image_path(9_999) == "images/0000/00009999.png"
    assert image_path(10_000) == "images/0001/00010000.png"
    assert image_path(123_456_789) == "images/12345/123456789.png"


# --- metadata ----------------------------------------------------------------------------------

INFO = {
    "model": "a model, v2",
    "model_hash": "ab",
    "revision": None,
    "variant": None,
    "scheduler": "EulerAncestralDiscreteScheduler",
    "version": "1.2",
    "versions": {"torch": "2"},
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "attention_backend": None,
    "vae_tiling": False,
    "vae_slicing": False,
    "compile": False,
    "call_defaults": {"num_inference_steps": 50, "guidance_scale": 7.5},
}


def parameters(request, info=INFO, size=(512, 768)):
    return image_text(request, info, size=size)["parameters"]


def test_parameters_are_as_a1111_writes_them():
    request = Request(3, "x", "a dog, (red:1.2)\nsitting", 42, "ugly, bad", num_inference_steps=20)
    assert parameters(request) == (
        "a dog, (red:1.2)\nsitting\n"
        "Negative prompt: ugly, bad\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 512x768, "
        'Model: "a model, v2", Version: ddinfer 1.2'
    )


def test_parameters_are_read_back_as_a1111_does():
    request = Request(3, "x", "a dog", 42, guidance_scale=3.0)
    *text, last = parameters(request).split("\n")
    found = dict(A1111_SETTING.findall(last))
    assert text == ["a dog"]
    assert len(found) >= 3  # fewer, and a line counts as part of the prompt
    assert found["CFG scale"] == "3"
    assert found["Seed"] == "42"
    assert found["Model"] == '"a model, v2"'


def test_parameters_without_anything_known_still_count_as_such():
    last = parameters(Request(0, "a", "p", 1), {}).split("\n")[-1]
    assert len(A1111_SETTING.findall(last)) >= 3


def test_the_ddinfer_chunk_has_what_remakes_the_image(tmp_path):
    request = Request(3, "x", "é", 42, width=512, kwargs={"eta": 0.5})
    text = image_text(request, INFO, size=(512, 768), batch=(2, 3), exact=False)
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(noise(), text))
    found = read_metadata(str(path))
    assert Request.from_dict(found.request) == request
    assert found.batch == [2, 3]
    assert found.dtype == "float32"
    assert found.versions == {"torch": "2"}


def test_where_an_input_lies_is_not_in_the_image():
    request = Request(
        0, "a", "p", 1, kwargs={"image": "/somewhere/a.png"}, input_hashes={"image": "ab"}
    )
    text = image_text(request, INFO, size=(1, 1))
    assert "somewhere" not in str(text)
    assert '"input_hashes":{"image":"ab"}' in text["ddinfer"]


def replayed(path, capsys):
    """(exit code, message) of ``ddinfer replay``, which must end before anything is loaded."""
    code = dispatch(["replay", str(path)])
    return code, capsys.readouterr().err


#: What replay needs of the ``ddinfer`` text.
READ = [f.name for f in dataclasses.fields(ImageRecord) if f.default is dataclasses.MISSING]
RECORD = json.loads(image_text(Request(0, "a", "p", 1), INFO, size=(1, 1))["ddinfer"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no", "is none of png, jpg, webp, mp4, webm, zip, wav, flac, or is damaged"),
        (b"", "or is damaged"),
        (encode_png(noise()), "has no ddinfer text"),
        (encode_png(noise(), {"ddinfer": "nonsense"}), "damaged ddinfer text: all of it: Invalid"),
        (encode_png(noise(), {"ddinfer": "[]"}), "damaged ddinfer text: all of it"),
        (encode_png(noise(), {"ddinfer": "{}"}), "damaged ddinfer text: request: Field required"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_named_with_the_reason(data, message, tmp_path, capsys):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    code, err = replayed(path, capsys)
    assert (code, f"{path}: " in err, message in err) == (2, True, True), err


#: Fields that images of older versions lack have a default.
NEEDED = [
    f.name
    for f in dataclasses.fields(ImageRecord)
    if f.default is f.default_factory is dataclasses.MISSING
]
WITHOUT_A_KEY = [(key, {k: v for k, v in RECORD.items() if k != key}) for key in NEEDED]
OF_A_WRONG_TYPE = [(key, {**RECORD, key: 1.5}) for key in READ]
DAMAGED_REQUESTS = [
    ("prompt", {**RECORD, "request": {"index": 0, "id": "a", "seed": 1}}),
    ("colour", {**RECORD, "request": {**RECORD["request"], "colour": 1}}),
    ("index", {**RECORD, "request": {**RECORD["request"], "index": "../../a"}}),
    ("index", {**RECORD, "request": {**RECORD["request"], "index": -1}}),
    ("seed", {**RECORD, "request": {**RECORD["request"], "seed": 2**63}}),
    ("kwargs", {**RECORD, "request": {**RECORD["request"], "kwargs": []}}),
    ("batch", {**RECORD, "batch": [1]}),
    ("threads", {**RECORD, "num_threads": 0}),
]


@pytest.mark.parametrize(("named", "record"), WITHOUT_A_KEY + OF_A_WRONG_TYPE + DAMAGED_REQUESTS)
def test_a_short_or_damaged_record_is_an_error_that_names_file_and_field(
    named, record, tmp_path, capsys
):
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(noise(), {"ddinfer": json.dumps(record)}))
    code, err = replayed(path, capsys)
    assert code == 2, err
    assert f"{path}: has a damaged ddinfer text: " in err
    assert named in err


@pytest.mark.parametrize("length", range(0, 24, 3))
def test_a_short_text_chunk_with_a_right_checksum_is_an_error(length, tmp_path, capsys):
    path = tmp_path / "a.png"
    body = ("ddinfer\0\0\0en\0é\0" + json.dumps(RECORD)).encode()[:length]
    chunk = struct.pack(">I", length) + b"iTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"iTXt" + body))
    data = encode_png(noise())
    path.write_bytes(data[:33] + chunk + data[33:])  # behind the header
    code, err = replayed(path, capsys)
    assert (code, f"{path}: has " in err) == (2, True), err


def test_a_file_that_is_cut_off_or_has_a_flipped_bit_is_an_error_wherever(tmp_path):
    path = tmp_path / "a.png"
    data = encode_png(noise(size=(7, 5)), {"ddinfer": json.dumps(RECORD)})
    path.write_bytes(data)
    read_metadata(str(path))
    for at in range(0, len(data) - len(b"....IEND...."), 7):
        path.write_bytes(data[:at])
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_metadata(str(path))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_metadata(str(path))


# --- videos ------------------------------------------------------------------------------------


def test_frames_come_back_all_and_identical(tmp_path):
    frames = [noise(seed=k) for k in (1, 2, 2, 3)]  # equal neighbours stay two
    text = {"ddinfer": json.dumps(RECORD)}
    data = encode_animation(frames, 8, text)
    image = decoded(data, tmp_path)
    assert image.n_frames == 4
    for k, frame in enumerate(frames):
        image.seek(k)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(frame))
        assert image.info["duration"] == 125
    assert read_metadata(str(tmp_path / "image.png")).model == "a model, v2"
    assert data == encode_animation(frames, 8, text)


def test_one_frame_is_a_picture(tmp_path):
    assert encode_animation([noise()], 8) == encode_png(noise())


def test_fractional_frame_rates(tmp_path):
    image = decoded(encode_animation([noise(), noise(seed=1)], 23.976), tmp_path)
    assert image.info["duration"] == pytest.approx(1000 / 23.976, abs=0.6)


def test_bad_videos():
    with pytest.raises(ValueError, match="without frames"):
        encode_animation([], 8)
    with pytest.raises(ValueError, match="frame 1"):
        encode_animation([noise(), noise(size=(3, 3))], 8)
