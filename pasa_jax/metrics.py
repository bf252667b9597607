"""How near a video is to dense attention's, and how much it flickers."""

import importlib.util

import numpy as np
from jaxtyping import Bool, Float, UInt8

PEAK = 255  # of a byte


def psnr(video: UInt8[np.ndarray, "F Y X 3"], other: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over the whole clip.

    Equal clips give infinity. The mean over frames of a frame's PSNR, which some papers report, is
    never below it.
    """
    from skimage.metrics import mean_squared_error

    error = mean_squared_error(video, other)
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(video: UInt8[np.ndarray, "F Y X 3"], other: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """Structural similarity, mean over frames; windows of 7 pixels, channels averaged.

    Raises:
        ValueError: frames smaller than the window.
    """
    from skimage.metrics import structural_similarity

    if min(video.shape[1:3]) < 7:
        raise ValueError(f"{video.shape=} must have frames of at least 7x7 pixels")
    pairs = zip(video, other, strict=True)
    return float(np.mean([structural_similarity(*pair, channel_axis=-1) for pair in pairs]))


def smoothness(video: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """VBench's temporal flickering score: 1 − mean |frame_t − frame_{t+1}| / 255, 1 stands still.

    Motion lowers it as flicker does, so clips compare only with clips of the same content: by the
    distance from dense attention's own score.

    Raises:
        ValueError: fewer than two frames.

    Source: VBench (arXiv:2311.17982), dimension "temporal flickering".
    """
    if len(video) < 2:
        raise ValueError(f"{video.shape=} must have at least two frames")
    steps = np.abs(np.diff(video.astype(np.float32), axis=0))
    return float(1 - steps.mean() / PEAK)


def flicker(video: UInt8[np.ndarray, "F Y X 3"], still: Bool[np.ndarray, "Y X"]) -> float | None:
    """Temporal variance of pixels that are known to stand still, mean over them, RGB in 0..1.

    Args:
        video: the clip.
        still: which pixels should never change.

    Returns:
        The variance; None where no pixel is known to be still.
    """
    if not still.any():
        return None
    return float((video[:, still].astype(np.float32) / PEAK).var(axis=0).mean())


def has_lpips() -> bool:
    """Whether the extra `lpips` is installed."""
    return importlib.util.find_spec("lpips") is not None


def lpips(video: UInt8[np.ndarray, "F Y X 3"], other: UInt8[np.ndarray, "F Y X 3"]) -> float:
    """Learned perceptual distance (AlexNet, v0.1), mean over frames; needs the extra `lpips`.

    The package fetches its network's weights on first use.

    Source: LPIPS (arXiv:1801.03924).
    """
    import lpips as package
    import torch

    network = package.LPIPS(net="alex", verbose=False)
    with torch.inference_mode():
        first, second = (_to_torch(torch, x) for x in (video, other))
        return float(network(first, second).mean())


def _to_torch(torch, video: UInt8[np.ndarray, "F Y X 3"]):
    """RGB in −1..1, channels first."""
    return torch.from_numpy(video.astype(np.float32).transpose(0, 3, 1, 2) / (PEAK / 2) - 1)


def relative_error(
    value: Float[np.ndarray, "P ..."], exact: Float[np.ndarray, "P ..."]
) -> Float[np.ndarray, " P"]:
    """‖value − exact‖ / ‖exact‖ of every entry of the first axis, in float64."""
    axes = tuple(range(1, exact.ndim))
    value, exact = (np.asarray(x, np.float64) for x in (value, exact))
    norm = np.sqrt((exact**2).sum(axes))
    return np.sqrt(((value - exact) ** 2).sum(axes)) / np.maximum(norm, np.finfo(np.float64).tiny)
