"""Metrics on clips whose answer is known."""

import numpy as np
import pytest

from pasa_jax import metrics


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 200, (5, 16, 12, 3)).astype(np.uint8)


def test_psnr_of_a_constant_error(clip):
    # 10 levels everywhere: 20·log10(255 / 10).
    assert metrics.psnr(clip + np.uint8(10), clip) == pytest.approx(28.1308, abs=1e-3)
    assert metrics.psnr(clip, clip) == float("inf")


def test_psnr_takes_the_error_of_the_whole_clip(clip):
    other = clip.copy()
    other[0] += 20  # one frame of five: the mean squared error is 400 / 5
    assert metrics.psnr(other, clip) == pytest.approx(10 * np.log10(255**2 / 80), abs=1e-6)


def test_ssim_falls_with_noise(clip):
    rng = np.random.default_rng(1)
    noisy = [np.clip(clip + rng.normal(0, s, clip.shape), 0, 255).astype(np.uint8) for s in (9, 60)]
    one, few, many = (metrics.ssim(x, clip) for x in (clip, *noisy))
    assert one == pytest.approx(1) and one > few > many > 0


def test_smoothness_is_the_mean_step_between_frames():
    still = np.full((4, 3, 3, 3), 77, np.uint8)
    assert metrics.smoothness(still) == 1
    blink = still.copy()
    blink[1::2] += 51  # a fifth of the range at each of three steps
    assert metrics.smoothness(blink) == pytest.approx(0.8)


def test_flicker_reads_still_pixels_alone():
    video = np.zeros((4, 2, 2, 3), np.uint8)
    video[::2, 0, 0] = 255  # variance 1/4 there, 0 elsewhere
    still = np.zeros((2, 2), bool)
    assert metrics.flicker(video, still) is None
    still[0] = True
    assert metrics.flicker(video, still) == pytest.approx(0.125)
    still[0, 0] = False
    assert metrics.flicker(video, still) == 0


def test_relative_error_is_one_a_clip():
    exact = np.ones((2, 3, 4), np.float32)
    value = exact * np.asarray([1.5, 1.0], np.float32)[:, None, None]
    np.testing.assert_allclose(metrics.relative_error(value, exact), [0.5, 0.0])


def test_short_and_small_clips_are_refused(clip):
    with pytest.raises(ValueError, match="must have at least two frames"):
        metrics.smoothness(clip[:1])
    with pytest.raises(ValueError, match="must have frames of at least 7x7 pixels"):
        metrics.ssim(clip[:, :6], clip[:, :6])


def test_lpips_is_told_by_its_package(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert not metrics.has_lpips()
