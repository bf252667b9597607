"""A checkpoint's text encoder and video decoder, as a pipeline takes them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pasa_jax.convert import load_model
from pasa_jax.convert.checkpoint import peek
from pasa_jax.models.wan_vae import WanVAE
from pasa_jax.text import (
    PromptEncoder,
    StateCache,
    TextFormat,
    checkpoint_identity,
    read_tokenizer,
)

# Latent cells of a side beyond which a video is decoded in tiles, and the tile's.
WHOLE, TILE = 64, 32


@dataclasses.dataclass(frozen=True)
class VideoDecoder:
    """Normalised latents to video by Wan's autoencoder, a prompt at a time.

    Attributes:
        model: the autoencoder.
    """

    model: WanVAE

    def decode(self, latents: Float[Array, "P F Y X C"]) -> Float[Array, "P frames H W 3"]:
        """Video, RGB in 0..1, f32.

        Frames longer than 64 latent cells on a side are decoded in tiles of 32.
        """
        graph, params = nnx.split(self.model)
        tile = TILE if max(latents.shape[2:4]) > WHOLE else None
        videos = [_decode(graph, tile, params, one[None]) for one in latents]
        return jnp.concatenate(videos)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(graph: nnx.GraphDef, tile: int | None, params: Any, latents: Float[Array, "P F Y X C"]):
    model = nnx.merge(graph, params)
    return (model.decode(model.denormalise(latents), tile) + 1) / 2


def load_decoder(path: Path) -> VideoDecoder:
    """The decoder of a part's folder or file, converted or not; in its stored dtype."""
    return VideoDecoder(load_model(path))


def load_text_encoder(encoder: Path, tokenizer: Path, text_len: int) -> PromptEncoder:
    """Wan's text encoder; its weights are read when the first prompt is not in the cache.

    Args:
        encoder: the part's folder or file, converted or not.
        tokenizer: folder of the tokenizer's files.
        text_len: tokens that the transformer takes.

    Raises:
        ValueError: a tokenizer that does not fit the encoder, or a damaged part.
    """
    config, dtype, _ = peek(encoder)
    return PromptEncoder(
        tokenizer=read_tokenizer(tokenizer, config.vocab_size),
        format=dataclasses.replace(TextFormat.wan(), max_length=text_len),
        load=functools.partial(load_model, encoder),
        width=config.dim,
        identity=checkpoint_identity(encoder, dtype),
        cache=StateCache.default(),
    )
