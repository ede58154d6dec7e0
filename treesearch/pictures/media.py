"""One sample as a file of its kind.

    image   PNG through Pillow, with text beside the pixels
    video   mp4 where imageio-ffmpeg is installed, else an animated PNG, which loses nothing
    audio   wav, 16 bit
    text    no file: a line of an index holds it
    data    npz, one array named `sample`

Shapes: image (1 or 3, h, w), video (frames, 1 or 3, h, w), both in [0, 1] or uint8; audio (samples,) or
(channels, samples) in [-1, 1], which is data unless its rate is told.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch.runs.files import replacing
from treesearch.text import plain

FPS = 8  # frames a second of a video
LONGEST_TEXT = 4_000  # characters of metadata


def kind_of(sample: Any, rate: int | None = None) -> str:
    """What a sample is, by its type and shape: image, video, audio, text or data.

    Args:
        rate: samples a second, of a model whose one- or two-axis arrays are audio; None where they are not.
    """
    if hasattr(sample, "getbands"):  # Pillow's
        return "image"
    array = as_array(sample)
    if array.dtype.kind not in "biufc":
        return "text"
    if rate is not None and array.ndim in (1, 2):
        return "audio"
    drawable = array.ndim in (3, 4) and array.shape[-3] in (1, 3) and array.dtype.kind != "c" and array.size > 0
    return ("image" if array.ndim == 3 else "video") if drawable else "data"


def as_array(sample: Any) -> NDArray[Any]:
    """A sample as numpy has it; floats of fewer bytes, not all of which numpy knows, as float32."""
    if isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu()
        return (sample.float() if sample.is_floating_point() and sample.itemsize < 4 else sample).numpy()
    return np.asarray(sample)


def image_of(sample: Any) -> Any:
    """A Pillow image of a sample, of a video its middle frame."""
    from PIL import Image

    if hasattr(sample, "getbands"):
        return sample.convert("RGB")
    if sample.ndim == 4:
        sample = sample[len(sample) // 2]
    array = as_array(sample)
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def write_image(sample: Any, path: Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG; `about` becomes its text, readable as `Image.open(path).text`."""
    with replacing(path) as scratch:
        image_of(sample).save(scratch, format="PNG", pnginfo=_text(about or {}))
    return path


def write(sample: Any, stem: Path, kind: str, about: Mapping[str, Any], *, fps: int = FPS, rate: int | None) -> Path:
    """Write a sample as a file; `stem` lacks the suffix that its kind has. Text has none: it is not written here."""
    if kind == "image":
        return write_image(sample, stem.with_name(stem.name + ".png"), about)
    if kind == "video":
        return _write_video(sample, stem, about, fps)
    return _write_audio(sample, stem, rate) if rate is not None and kind == "audio" else _write_data(sample, stem)


def _text(about: Mapping[str, Any]) -> Any:
    """Metadata of a PNG: a line each, printable, in Unicode where it needs that."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in about.items():
        if value is not None:
            info.add_text(key, _brief(value))
    return info


def _brief(value: Any) -> str:
    text = plain(value)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _write_video(sample: Any, stem: Path, about: Mapping[str, Any], fps: int) -> Path:
    if _has_ffmpeg():
        return _write_mp4(sample, stem.with_name(stem.name + ".mp4"), about, fps)
    return _write_frames(sample, stem.with_name(stem.name + ".png"), about, fps)


def _has_ffmpeg() -> bool:
    """Whether the library is there, with a program for this machine."""
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

        return bool(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return False


def _write_frames(sample: Any, path: Path, about: Mapping[str, Any], fps: int) -> Path:
    first, *rest = map(image_of, sample)
    with replacing(path) as scratch:
        shown = {"save_all": True, "append_images": rest, "duration": 1000 // fps, "loop": 0}
        first.save(scratch, format="PNG", pnginfo=_text(about), **shown)
    return path


def _write_mp4(sample: Any, path: Path, about: Mapping[str, Any], fps: int) -> Path:
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]

    told = "; ".join(f"{key}: {_brief(value)}" for key, value in about.items())
    with replacing(path) as scratch:
        size = image_of(sample[0]).size
        words = {"fps": fps, "macro_block_size": 2, "output_params": ["-metadata", f"comment={told}"]}
        writer = imageio_ffmpeg.write_frames(str(scratch.resolve()), size, **words)
        writer.send(None)
        for frame in sample:
            writer.send(image_of(frame).convert("RGB").tobytes())
        writer.close()
    return path


def _write_audio(sample: Any, stem: Path, rate: int) -> Path:
    channels = np.atleast_2d(as_array(sample))
    path = stem.with_name(stem.name + ".wav")
    with replacing(path) as scratch, open(scratch, "wb") as file, wave.open(file) as out:
        out.setnchannels(len(channels))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.nan_to_num(channels).clip(-1, 1) * 32767).round().astype("<i2").T.tobytes())
    return path


def _write_data(sample: Any, stem: Path) -> Path:
    path = stem.with_name(stem.name + ".npz")
    with replacing(path) as scratch, open(scratch, "wb") as file:
        np.savez_compressed(file, sample=as_array(sample))
    return path
