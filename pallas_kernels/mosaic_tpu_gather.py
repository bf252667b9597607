"""Listed key blocks copied from HBM into a ring of two halves, for heads that VMEM cannot hold."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array


class Ring(NamedTuple):
    """Scratch: while the blocks of one loop body are read from a half, the other half fills."""

    keys: Any  # [2, W, H]
    values: Any
    arrived: Any  # [2], counts bytes
    turn: Any  # [1], the half that the next body reads; goes on from one query block to the next


def ring_shapes(tokens: int, h: int, dtype: jnp.dtype) -> Ring:
    """Scratch for loop bodies of `tokens` keys."""
    half = pltpu.VMEM((2, tokens, h), dtype)
    return Ring(half, half, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32))


def append_following(ids: Array, count: Array, slots: int) -> Array:
    """Fills ids [B, N, I, L] from a row's last body of `slots` on with what is read after it.

    That is the first body of the next query block that lists anything, so that a row always finds
    its first body in the ring, and the copies of any body are started by the one before.
    """
    rows = ids.shape[2]
    row = lax.broadcasted_iota(jnp.int32, count.shape, 2)
    listing = jnp.where(count > 0, row, rows - 1)
    following = lax.cummin(listing, axis=2, reverse=True)
    following = jnp.concatenate([following[:, :, 1:], following[:, :, -1:]], axis=2)
    first = jnp.take_along_axis(ids[..., :slots], following[..., None], axis=2)
    own = -(-count // slots) * slots
    reach = ids.shape[3] + slots
    ids = jnp.pad(ids, ((0, 0), (0, 0), (0, 0), (0, slots)))
    slot = lax.broadcasted_iota(jnp.int32, ids.shape, 3)
    return jnp.where(slot < own[..., None], ids, jnp.tile(first, (1, 1, 1, reach // slots)))


def fill(ring: Ring, half: Array, blocks: list[Array], size: int, sources: tuple[Any, Any]) -> None:
    """Starts the copies of blocks of `size` tokens into a half, from one head's keys and values."""
    for source, buffer in zip(sources, (ring.keys, ring.values), strict=True):
        for slot, block in enumerate(blocks):
            pltpu.make_async_copy(
                source.at[pl.ds(pl.multiple_of(block * size, size), size), :],
                buffer.at[half, pl.ds(slot * size, size), :],
                ring.arrived.at[half],
            ).start()


def wait(ring: Ring, half: Array) -> None:
    """Waits until a half is full: one wait for the bytes of all its copies."""
    for buffer in (ring.keys, ring.values):
        pltpu.make_async_copy(buffer.at[half], buffer.at[half], ring.arrived.at[half]).wait()
