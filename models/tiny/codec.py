"""tiny's video codec: 4 frames × 4 × 4 pixels of RGB to one latent cell of 16 channels.

A fixed linear map in place of a VAE: the leading principal components of patches of the scenes,
each divided by the square root of its spread. `fit` makes it, weights/vae/ holds it.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save_file

from pasa_jax.models.tiny import scenes

FRAMES, SIDE = 4, 4  # of a patch
CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class Codec:
    """The map: latent = (patch − mean) @ encoder, patch = latent @ decoder + mean.

    Attributes:
        mean: f32 [192], over (frame, row, column, colour).
        encoder: f32 [192, 16].
        decoder: f32 [16, 192]; decoder @ encoder is the identity.
    """

    mean: Float[np.ndarray, " P"]
    encoder: Float[np.ndarray, "P C"]
    decoder: Float[np.ndarray, "C P"]

    def encode(
        self, video: Float[Array | np.ndarray, "B frames height width 3"]
    ) -> Float[Array, "B F Y X C"]:
        """Video, RGB in 0..1, to latents of about unit spread.

        Raises:
            ValueError: frames, height or width is not a multiple of 4.
        """
        mean = jnp.asarray(self.mean)[None, None, None, None]
        return (_to_patches(jnp.asarray(video)) - mean) @ self.encoder

    def decode(
        self, latents: Float[Array | np.ndarray, "B F Y X C"]
    ) -> Float[Array, "B frames height width 3"]:
        """Latents to video, RGB clipped to 0..1."""
        mean = jnp.asarray(self.mean)[None, None, None, None]
        video = rearrange(
            jnp.asarray(latents) @ self.decoder + mean,
            "b f y x (df dy dx c) -> b (f df) (y dy) (x dx) c",
            df=FRAMES,
            dy=SIDE,
            dx=SIDE,
        )
        return jnp.clip(video, 0.0, 1.0)


def _to_patches(video):
    """[B, frames, height, width, 3] → [B, F, Y, X, 192]."""
    frames, height, width = video.shape[1:4]
    if frames % FRAMES or height % SIDE or width % SIDE:
        raise ValueError(f"{frames=}, {height=} and {width=} must be multiples of {FRAMES}")
    return rearrange(
        video,
        "b (f df) (y dy) (x dx) c -> b f y x (df dy dx c)",
        df=FRAMES,
        dy=SIDE,
        dx=SIDE,
    )


def fit(samples: int = 768, seed: int = 0, power: float = 0.5) -> Codec:
    """Principal components of the scenes' patches.

    Args:
        samples: videos of 8 frames × 64 × 64 looked at.
        seed: of the scenes.
        power: a component of spread s is divided by s**power: 1 makes all equally loud, 0 keeps
            their own loudness. The whole is then scaled to unit mean square.
    """
    rng = np.random.default_rng(seed)
    covariance, mean = np.zeros((192, 192)), np.zeros(192)
    for i in range(samples):
        video = scenes.render(scenes.random_scene(rng), 8, 64, 64, seed=i)
        patches = np.asarray(_to_patches(video[None]), np.float64).reshape(-1, 192)
        mean += patches.mean(0) / samples
        covariance += patches.T @ patches / len(patches) / samples
    covariance -= np.outer(mean, mean)
    variance, vectors = np.linalg.eigh(covariance)
    variance, vectors = variance[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
    # A sign of its own choosing would differ from one linear-algebra library to the next.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(CHANNELS)])
    scale = variance ** (power / 2)
    scale *= np.sqrt(np.mean(variance / scale**2))
    to32 = np.float32
    return Codec(
        mean.astype(to32), (vectors / scale).astype(to32), (vectors * scale).T.astype(to32)
    )


def save(codec: Codec, folder: Path) -> None:
    """Writes the codec as a diffusers pipeline keeps its VAE: config.json and safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in vars(codec).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "TinyCodec",
        "patch_size": [FRAMES, SIDE, SIDE],
        "latent_channels": CHANNELS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> Codec:
    """Reads what `save` wrote."""
    return Codec(**load_file(folder / "diffusion_pytorch_model.safetensors"))
