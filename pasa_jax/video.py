"""Frames into files: mp4, GIF and a strip of stills, each complete or not there at all."""

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

VIDEO_SUFFIXES = (".mp4", ".gif")
STILL_SUFFIXES = (".png",)


def check_target(path: str | Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> Path:
    """Refuses a file that could not be written, before the work that fills it.

    Args:
        path: the file to be.
        suffixes: those allowed, with the dot, lower case.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, no such folder, or a folder or file that may not be written.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"out={str(path)!r} must end in {', '.join(suffixes)}")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"out={str(path)!r} must lie in an existing folder; {folder} is none")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"out={str(path)!r} must be a file in a folder that may be written")
    return path


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside the target, renamed on success and removed on failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_video(
    path: str | Path, frames: UInt8[np.ndarray, "F Y X 3"], *, fps: float, shortest: int = 256
) -> Path:
    """Writes an mp4 (H.264) or a GIF that loops.

    Args:
        path: target; its suffix decides the format.
        frames: RGB.
        fps: frames a second. A GIF's frame time is rounded to hundredths of a second.
        shortest: pixels; frames with a shorter side are enlarged by the whole factor that reaches
            it, each pixel a square, so that small videos can be seen.

    Returns:
        The path.

    Raises:
        ValueError: a target that cannot be written, no frames, or fps not above 0.
    """
    path = check_target(path)
    if not len(frames):
        raise ValueError(f"{frames.shape=} must hold at least one frame")
    if not fps > 0:
        raise ValueError(f"{fps=} must be above 0")
    frames = _enlarge(frames, -(-shortest // min(frames.shape[1:3])))
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    with atomic(path) as temporary:
        write(temporary, frames, fps)
    return path


def write_strip(
    path: str | Path,
    videos: UInt8[np.ndarray, "V F Y X 3"],
    *,
    stills: int = 5,
    labels: tuple[str, ...] = (),
    shortest: int = 96,
) -> Path:
    """Writes one PNG: a row a video, its columns frames evenly spread from the first to the last.

    Args:
        path: target, ending in .png.
        videos: RGB.
        stills: frames shown of each video, at most F.
        labels: written above the rows, one a video; none when empty.
        shortest: pixels, as in `write_video`.

    Returns:
        The path.

    Raises:
        ValueError: a target that cannot be written, or as many labels as videos are not given.
    """
    from PIL import Image, ImageDraw

    path = check_target(path, STILL_SUFFIXES)
    if labels and len(labels) != len(videos):
        raise ValueError(f"{labels=} must be one for each of the {len(videos)} videos")
    shown = np.linspace(0, videos.shape[1] - 1, min(stills, videos.shape[1])).round().astype(int)
    gap, head = 4, 16 if labels else 0
    rows = [_row(_enlarge(v[shown], -(-shortest // min(v.shape[1:3]))), gap, head) for v in videos]
    image = Image.fromarray(np.concatenate(rows))
    draw = ImageDraw.Draw(image)
    for i, label in enumerate(labels):
        draw.text((gap, i * rows[0].shape[0] + 2), label, fill="black")
    with atomic(path) as temporary:
        image.save(temporary)
    return path


def _row(stills, gap, head):
    """Stills side by side on white, with space around them and for a label above."""
    edges = ((0, 0), (head + gap, 0), (gap, 0), (0, 0))
    return np.concatenate(list(np.pad(stills, edges, constant_values=255)), axis=1)


def _enlarge(frames, factor):
    return frames.repeat(max(1, factor), axis=1).repeat(max(1, factor), axis=2)


def _write_gif(path, frames, fps):
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    milliseconds = 10 * max(1, round(100 / fps))
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _write_mp4(path, frames, fps):
    import av

    _, y, x, _ = frames.shape
    # Colour is stored at half resolution, so both sides must be even: repeat the last row.
    frames = np.pad(frames, ((0, 0), (0, y % 2), (0, x % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
