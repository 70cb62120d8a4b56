"""All formats of what a job makes: how a `Result` becomes a file, and how its text is read back.

The same Result is the same bytes in every run: encoders have one thread, and no file says when it
was written. A new format goes into `ENDINGS`, `_ENCODERS` and `read_text`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ddinfer.request import Result
from ddinfer.storage.png import encode_animation, encode_png

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

#: Of all files that a job can make. Journals count on their order: add at the end.
ENDINGS = ("png", "jpg", "webp", "mp4", "webm", "zip", "wav", "flac")

DEFAULT_FPS = 8

#: Formats whose files have another ending: an animated PNG, and a zip of numbered PNGs.
_ENDING_OF = {"apng": "png", "frames": "zip"}

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
_WEBP = {"format": "WEBP", "quality": 95, "method": 4}
#: EXIF tags: the directory, and in it the text for other tools and our own.
_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C

_INFO_NAMES = {"parameters": b"ICMT", "ddinfer": b"IDDI"}


@dataclass(frozen=True)
class Formats:
    """What a job's images, videos and sound are saved as.

    Attributes:
        image, video, audio: as ``--image_format``, ``--video_format`` and ``--audio_format``.
        fps: frames per second of all videos; default: what each Result says.
    """

    image: str = "png"
    video: str = "mp4"
    audio: str = "wav"
    fps: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Formats:
        """The formats in a job's identity. Jobs from before there was a choice have PNG alone."""
        return cls(
            values.get("image_format", "png"),
            values.get("video_format", "apng"),
            values.get("audio_format", "wav"),
            values.get("fps"),
        )

    @property
    def endings(self) -> list[str]:
        """Of all files that a job with these formats may write."""
        return [_ENDING_OF.get(name, name) for name in (self.image, self.video, self.audio)]

    def ending(self, result: Result) -> str:
        """Of the file of a Result. A video of one frame without sound is an image."""
        image, video, audio = self.endings
        if result.frames is not None and (len(result.frames) > 1 or result.audio is not None):
            return video
        return audio if result.image is None and result.frames is None else image

    def encode(self, result: Result, text: Mapping[str, str]) -> bytes:
        """The file of a Result.

        Args:
            text: keyword → text, for the file's metadata.

        Raises:
            ValueError: pictures or sound that the format cannot hold.
        """
        fps = self.fps or result.fps or DEFAULT_FPS
        return _ENCODERS[self.ending(result)](result, fps, text)


def read_text(path: str) -> dict[str, str]:
    """The texts in a file that ddinfer has written, which is read to its end.

    Raises:
        OSError, ValueError, SyntaxError: no such file, damaged, or none that ddinfer writes.
    """
    ending = path.rpartition(".")[2].lower()
    if ending in ("mp4", "webm", "flac"):
        return _text_of_container(path)
    if ending == "wav":
        return _text_of_wav(path)
    if ending == "zip":
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it is damaged")
            with archive.open(archive.namelist()[0]) as first:
                return _text_of_picture(first)
    with open(path, "rb") as file:
        return _text_of_picture(file)


def _pictures(result: Result) -> Sequence[Image]:
    return [result.image] if result.image is not None else list(result.frames or ())


# --- images -----------------------------------------------------------------------------------


def _encode_png(result: Result, fps: float, text: Mapping[str, str]) -> bytes:
    if result.audio is not None:
        raise ValueError("an animated PNG holds no sound; use --video_format mp4, webm or frames")
    pictures = _pictures(result)
    return (
        encode_png(pictures[0], text)
        if len(pictures) == 1
        else encode_animation(pictures, fps, text)
    )


def _encode_with_pillow(options: Mapping[str, Any]) -> Callable[..., bytes]:
    def encode(result: Result, fps: float, text: Mapping[str, str]) -> bytes:
        from PIL import Image

        image = _pictures(result)[0]
        if image.mode.startswith("I;16"):
            import numpy as np

            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        has_alpha = image.mode in ("LA", "RGBA", "PA") and options["format"] == "WEBP"
        kept = ("L", "RGB", "RGBA" if has_alpha else "RGB")
        exif = Image.Exif()
        exif.get_ifd(_EXIF).update(
            {
                _USER_COMMENT: b"UNICODE\0" + text.get("parameters", "").encode("utf-16-be"),
                _MAKER_NOTE: text.get("ddinfer", "").encode(),
            }
        )
        out = io.BytesIO()
        picture = image if image.mode in kept else image.convert(kept[-1])
        picture.save(out, exif=exif, **options)
        return out.getvalue()

    return encode


def _text_of_picture(file: Any) -> dict[str, str]:
    from PIL import Image

    data = file.read()
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
        image.verify()
    with Image.open(io.BytesIO(data)) as image:  # verify() leaves the other unusable
        if image.format == "PNG":
            return dict(getattr(image, "text", {}))
        image.load()
        exif = image.getexif().get_ifd(_EXIF)
    found = {"ddinfer": exif.get(_MAKER_NOTE, b""), "parameters": exif.get(_USER_COMMENT, b"")}
    parameters = found["parameters"].removeprefix(b"UNICODE\0").decode("utf-16-be")
    ours = {"parameters": parameters, "ddinfer": found["ddinfer"].decode()}
    return {name: value for name, value in ours.items() if value}


# --- videos -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Container:
    """A container, its codecs, and their options. One thread each, or bytes may differ."""

    name: str
    video: str
    video_options: dict[str, str]
    audio: str
    sampling_rate: int | None = None  # the only one that the audio codec is given
    options: dict[str, str] | None = None

    def encode(self, result: Result, fps: float, text: Mapping[str, str]) -> bytes:
        import av

        out = io.BytesIO()
        options = {"fflags": "+bitexact", **(self.options or {})}
        with av.open(out, "w", format=self.name, options=options) as container:
            container.metadata.update(text)
            frames = [_even_pixels(frame) for frame in result.frames or ()]
            rate = Fraction(fps).limit_denominator(1001)
            video: Any = container.add_stream(self.video, rate=rate, options=self.video_options)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = "yuv420p"
            _make_exact(video)
            colours = video.codec_context
            colours.color_range = colours.colorspace = 1  # limited range, BT.709
            colours.color_primaries = colours.color_trc = 1
            audio = None
            if result.audio is not None:
                audio = _audio_stream(container, self.audio, result, self.sampling_rate)
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(video.encode(frame))
            container.mux(video.encode())
            if audio is not None:
                _encode_audio(container, audio, result)
        return out.getvalue()


#: Without macroblock trees, in which x264 reads memory that it has not written: the same frames
#: would be other bytes in other runs.
_MP4 = _Container(
    "mp4",
    "libx264",
    {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"},
    "aac",
    options={"movflags": "+use_metadata_tags"},
)
_WEBM = _Container(
    "webm",
    "libvpx-vp9",
    {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"},
    "libopus",
    sampling_rate=48_000,
)


def _make_exact(stream: Any) -> None:
    from av.codec.context import Flags

    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= Flags.bitexact


def _even_pixels(frame: Image) -> np.ndarray:
    """RGB of shape ``(height, width, 3)``, an odd last row or column repeated: codecs need it."""
    import numpy as np

    pixels = np.asarray(frame.convert("RGB"))
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")


def _encode_frames(result: Result, fps: float, text: Mapping[str, str]) -> bytes:
    """A zip of numbered PNGs and, with sound, ``audio.wav``; the first PNG has the text."""
    names = {f"{k:05d}.png": frame for k, frame in enumerate(_pictures(result))}
    files = {
        name: encode_png(frame, text if k == 0 else None)
        for k, (name, frame) in enumerate(names.items())
    }
    if result.audio is not None:
        files["audio.wav"] = _encode_wav(result, fps, {})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def _text_of_container(path: str) -> dict[str, str]:
    import av

    with av.open(path) as container:
        for _ in container.demux():
            pass
        found = {name.lower(): value for name, value in container.metadata.items()}
    return {name: found[name] for name in _INFO_NAMES if name in found}


# --- sound ------------------------------------------------------------------------------------


def _encode_wav(result: Result, fps: float, text: Mapping[str, str]) -> bytes:
    samples, rate = _samples(result), result.sampling_rate
    num_channels = samples.shape[1]
    each = 2 * num_channels
    assert rate is not None
    head = struct.pack("<HHIIHH", 1, num_channels, rate, rate * each, each, 16)
    info = [
        _riff(_INFO_NAMES[name], value.encode() + b"\0")
        for name, value in text.items()
        if name in _INFO_NAMES
    ]
    parts = [b"WAVE", _riff(b"fmt ", head), _riff(b"data", samples.tobytes())]
    if info:
        parts.append(_riff(b"LIST", b"".join((b"INFO", *info))))
    return _riff(b"RIFF", b"".join(parts))


def _riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _text_of_wav(path: str) -> dict[str, str]:
    with open(path, "rb") as file:
        data = file.read()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("is not a WAV file")
    (size,) = struct.unpack("<I", data[4:8])
    if size + 8 > len(data):
        raise ValueError(f"{len(data)} bytes, {size + 8} were written")
    names = {kind: name for name, kind in _INFO_NAMES.items()}
    info = next((body for kind, body in _riff_chunks(data[12:]) if kind == b"LIST"), b"INFO")
    return {
        names[kind]: body.rstrip(b"\0").decode()
        for kind, body in _riff_chunks(info[4:])
        if kind in names
    }


def _riff_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 0
    while at + 8 <= len(data):
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return chunks


def _encode_flac(result: Result, fps: float, text: Mapping[str, str]) -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        container.metadata.update(text)
        stream = _audio_stream(container, "flac", result)
        _encode_audio(container, stream, result)
    return out.getvalue()


def _samples(result: Result) -> np.ndarray:
    """16 bits, of shape ``(samples, channels)``, as ``soundfile`` rounds them."""
    import numpy as np

    assert result.audio is not None
    return np.rint(np.clip(np.nan_to_num(result.audio), -1, 1) * 32767).astype("<i2").T


def _audio_stream(container: Any, codec: str, result: Result, rate: int | None = None) -> Any:
    assert result.audio is not None
    layouts = {1: "mono", 2: "stereo"}
    num_channels = len(result.audio)
    if num_channels not in layouts:
        raise ValueError(f"sound of {num_channels} channels; expected 1 or 2, or use wav")
    stream = container.add_stream(
        codec, rate=rate or result.sampling_rate, layout=layouts[num_channels]
    )
    _make_exact(stream)
    return stream


def _encode_audio(container: Any, stream: Any, result: Result) -> None:
    import av
    import numpy as np

    assert result.sampling_rate is not None
    context = stream.codec_context
    samples = np.ascontiguousarray(_samples(result)).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=context.layout.name)
    frame.sample_rate, frame.pts = result.sampling_rate, 0
    resampler = av.AudioResampler(
        format=context.format, layout=context.layout, rate=context.sample_rate
    )
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(part))
    container.mux(stream.encode())


_ENCODERS: dict[str, Callable[[Result, float, Mapping[str, str]], bytes]] = {
    "png": _encode_png,
    "jpg": _encode_with_pillow(_JPEG),
    "webp": _encode_with_pillow(_WEBP),
    "mp4": _MP4.encode,
    "webm": _WEBM.encode,
    "zip": _encode_frames,
    "wav": _encode_wav,
    "flac": _encode_flac,
}
