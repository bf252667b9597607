"""What is written can be read back, and what fails leaves nothing."""

import numpy as np
import pytest

from pasa_jax import video


@pytest.fixture
def frames():
    """Five frames, a bright square that moves right on a coloured ground."""
    out = np.zeros((5, 15, 17, 3), np.uint8)
    out[..., 2] = 120
    for i in range(5):
        out[i, 4:10, 2 * i : 2 * i + 6] = (250, 200, 30)
    return out


def read_mp4(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(
            stream.average_rate
        )


@pytest.mark.parametrize("fps", [8.0, 7.5])
def test_mp4_reads_back(tmp_path, frames, fps):
    got, rate = read_mp4(video.write_video(tmp_path / "a.mp4", frames, fps=fps, shortest=60))
    assert got.shape == (5, 60, 68, 3)  # 15 x 17 enlarged four times
    assert rate == fps
    # Lossy: most pixels within a few levels, edges of colour off by more.
    assert np.median(np.abs(got[:, 2::4, 2::4].astype(int) - frames)) <= 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_mp4_pads_odd_sides(tmp_path, frames):
    got, _ = read_mp4(video.write_video(tmp_path / "a.mp4", frames, fps=8.0, shortest=1))
    assert got.shape == (5, 16, 18, 3)


def test_gif_reads_back(tmp_path, frames):
    from PIL import Image, ImageSequence

    with Image.open(video.write_video(tmp_path / "a.GIF", frames, fps=8.0, shortest=1)) as image:
        got = np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])
        assert image.info["duration"] == 120 and image.info["loop"] == 0
    np.testing.assert_array_equal(got, frames)  # few colours: the palette holds them all


def test_strip_shows_first_and_last_frames(tmp_path, frames):
    from PIL import Image

    videos = np.stack([frames, frames[::-1]])
    path = video.write_strip(
        tmp_path / "a.png", videos, stills=2, labels=("one", "two"), shortest=1
    )
    got = np.asarray(Image.open(path))
    assert got.shape == (2 * (16 + 4 + 15), 2 * (4 + 17), 3)
    np.testing.assert_array_equal(got[20:35, 4:21], frames[0])
    np.testing.assert_array_equal(got[20:35, 25:], frames[-1])
    np.testing.assert_array_equal(got[55:70, 25:], frames[0])


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.avi", r"must end in \.mp4, \.gif"),
        ("a", r"must end in \.mp4, \.gif"),
        ("none/a.mp4", "existing folder"),
        ("folder.mp4", "must be a file"),
    ],
)
def test_bad_targets_are_refused(tmp_path, frames, name, words):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=words):
        video.write_video(tmp_path / name, frames, fps=8.0)


def test_bad_frames_fps_and_labels_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="at least one frame"):
        video.write_video(tmp_path / "a.mp4", frames[:0], fps=8.0)
    with pytest.raises(ValueError, match="fps=0.0 must be above 0"):
        video.write_video(tmp_path / "a.mp4", frames, fps=0.0)
    with pytest.raises(ValueError, match="one for each of the 1 videos"):
        video.write_strip(tmp_path / "a.png", frames[None], labels=("a", "b"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), video.atomic(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("stop")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
