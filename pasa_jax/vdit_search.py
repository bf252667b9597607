"""The offline choice of Sparse-vDiT's patterns (arXiv:2506.03065), one a head, by dense runs."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int

from pasa_jax.attention import Attention, attend
from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import num_blocks, pad_axis
from pasa_jax.pipeline import Pipeline
from pasa_jax.policies import Context, HeadPatterns, Policy, SparseVdit
from pasa_jax.policies.base import check_density, check_share, density_blocks
from pasa_jax.policies.sparse_vdit import FULL, SKIP, STRIPES
from pasa_jax.settings import check_prompts, check_seeds


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What patterns there are, and what a head's loss may be.

    The loss of a pattern is the squared error that it makes in a head, as a share of the mean
    square of all heads' dense outputs in the layer, plus `weight` times the share of the key blocks
    that it keeps. The least loss wins. A share of the layer's mean and not of the head's own, as
    skipping would otherwise cost the same everywhere; the paper does not normalise, so that its
    bound of 1 belongs to its models' activations.

    Attributes:
        width: half of the band, in frames of tokens.
        stripes: share of the video's key blocks that stripes keep, in (0, 1].
        weight: λ.
        max_loss: ε; a head whose least loss is larger stays full. Half is what a full head costs
            with the default weight.
        density: share of the key blocks, in (0, 1]: the heads of least loss get their patterns,
            until the mean over all heads does not pass it or none is full; max_loss is not read
            then.
        at: shares of the run at which losses are taken; their mean counts, over prompts too.

    Raises:
        ValueError: a field is out of range.
    """

    width: float = 1.0
    stripes: float = 0.2
    weight: float = 0.5
    max_loss: float = 0.5
    density: float | None = None
    at: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self):
        for name in ("width", "weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more and finite")
        check_density("stripes", self.stripes)
        if self.density is not None:
            check_density("density", self.density)
        if not math.isfinite(self.max_loss):
            raise ValueError(f"max_loss={self.max_loss!r} must be finite")
        if not self.at:
            raise ValueError(f"at={self.at} must hold at least one share of the run")
        for share in self.at:
            check_share("at", share)


def choose_modes(
    losses: Float[np.ndarray, "4 layers heads"], max_loss: float
) -> Int[np.ndarray, "layers heads"]:
    """The pattern of least loss, of equals the first; full where that is above `max_loss`.

    Args:
        losses: of skip, diagonal, multi-diagonal and stripes.
        max_loss: ε.

    Returns:
        int8 numbers of `HeadPatterns`.
    """
    best = losses.argmin(0) + SKIP
    return np.where(losses.min(0) > max_loss, FULL, best).astype(np.int8)


def loss_for_density(
    losses: Float[np.ndarray, "4 layers heads"], kept: Float[np.ndarray, " 4"], density: float
) -> float:
    """The least ε with which the mean density of all heads does not pass one, or none is full.

    Args:
        losses: see `choose_modes`.
        kept: share of the key blocks that each of the four patterns keeps.
        density: to stay below.
    """
    best = losses.min(0).reshape(-1)
    order = np.argsort(best, kind="stable")
    saved = np.cumsum(1 - kept[losses.argmin(0).reshape(-1)[order]]) / len(best)
    fitting = np.flatnonzero(1 - np.insert(saved, 0, 0) <= density + 1e-9)
    heads = fitting[0] if len(fitting) else len(best)
    return float(best[order[heads - 1]]) if heads else float(best.min()) - 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Observer(Policy):
    """Dense attention that hands the host what `measure` makes of each layer's operands.

    Compared by identity: each one's program calls back into its own sums.

    Attributes:
        steps: where it measures.
        measure: (q, k, v, out, lse, context) → f32 [N, M], mean over the batch.
        sums: of them, by layer.
    """

    steps: tuple[int, ...]
    measure: Callable[..., jax.Array]
    sums: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    dense_layers: tuple[int, ...] = ()

    __eq__, __hash__ = object.__eq__, object.__hash__  # not those of `Policy`

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """ "search" at the steps, "dense" at all others."""
        return tuple("search" if i in self.steps else "dense" for i in range(num_steps))

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Dense output; adds to the layer's sum."""
        out, lse = api.dense_attention(q, k, v, kv_length=context.kv_length, return_lse=True)

        def add(layer, value):
            own = np.asarray(value, np.float64)
            self.sums[int(layer)] = self.sums.get(int(layer), 0.0) + own

        io_callback(add, None, context.layer, self.measure(q, k, v, out, lse, context))
        return out, state


def _column_mass(block: int, q, k, v, out, lse, context: Context) -> Float[Array, "N J"]:
    """The attention mass of every key block, mean over the video's queries and the batch."""
    blocks = num_blocks(k.shape[1], block)

    def head(number):
        own = (jax.lax.dynamic_slice_in_dim(x, number, 1, axis=2) for x in (q, k, lse))
        sizes = {"block_q": block, "block_kv": block, "top": blocks}
        ids, mass, _ = api.block_mass(*own, kv_length=context.kv_length, **sizes)
        total = jnp.zeros(blocks, jnp.float32).at[ids.reshape(-1)].add(mass.reshape(-1))
        return total / jnp.float32(q.shape[0] * q.shape[1])

    # One head at a time, as the map of all blocks by all blocks is large.
    return jax.lax.map(head, jnp.arange(q.shape[2], dtype=jnp.int32))


def _errors(
    patterns: tuple[HeadPatterns, ...], q, k, v, out, lse, context: Context
) -> Float[Array, "N M"]:
    """Squared errors of skip and of the patterns, over the mean square of the layer's output."""
    tokens, exact = q.shape[1], out.astype(jnp.float32)
    square = jnp.square(exact).mean((1, 3))  # [B, N]
    errors = [square]
    q = pad_axis(q, 1, k.shape[1])  # text's queries run dense, and nobody looks
    for masks in patterns:
        policy = SparseVdit(masks=masks, block_q=masks.block, block_kv=masks.block)
        run = Attention(policy, "sparse", context.step, context.budget, context.keys, 1)
        where = {"layer": context.layer, "grid": context.grid, "kv_length": context.kv_length}
        sparse, _ = attend(q, k, v, run, **where)
        errors.append(jnp.square(sparse[:, :tokens].astype(jnp.float32) - exact).mean((1, 3)))
    every = square.mean(1).reshape(-1, 1, 1)
    return (jnp.stack(errors, -1) / every).mean(0)


class _Enough(Exception):
    """Ends a run whose rest nobody needs."""


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Dense runs, one a prompt, up to the last step that is measured."""

    pipeline: Pipeline
    prompts: list[str]
    seeds: list[int]
    states: list[np.ndarray] | None
    steps: tuple[int, ...]
    options: dict[str, Any]

    def measured(self, measure: Callable[..., jax.Array]) -> Float[np.ndarray, "layers N M"]:
        """Mean over prompts and steps."""
        observer = _Observer(steps=self.steps, measure=measure)

        def stop(i, latents):
            if i == self.steps[-1]:
                raise _Enough

        for i, prompt in enumerate(self.prompts):
            text = None if self.states is None else self.states[i][None]
            where = {"policy": observer, "seeds": [self.seeds[i]], "states": text, "observe": stop}
            with contextlib.suppress(_Enough):
                self.pipeline.generate([prompt], **where, **self.options)
        jax.effects_barrier()
        total = np.stack([observer.sums[layer] for layer in sorted(observer.sums)])
        return total / (len(self.prompts) * len(self.steps))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search measured, for choosing again without it.

    Attributes:
        errors: f64 [4, layers, heads], of skip, diagonal, multi-diagonal and stripes: squared error
            of the head over the layer's mean square.
        kept: f64 [4], share of the key blocks that each of them keeps.
        patterns: all heads striped, with the setting and the stripes.
    """

    errors: Float[np.ndarray, "4 layers heads"]
    kept: Float[np.ndarray, " 4"]
    patterns: HeadPatterns

    def choose(self, criterion: Criterion) -> HeadPatterns:
        """The patterns of a weight, and of a largest loss or a density; these fields are read."""
        losses = self.errors + criterion.weight * self.kept[:, None, None]
        max_loss = criterion.max_loss
        if criterion.density is not None:
            max_loss = loss_for_density(losses, self.kept, criterion.density)
        modes = choose_modes(losses, max_loss)
        own = {"weight": criterion.weight, "max_loss": max_loss}
        return dataclasses.replace(_with_modes(self.patterns, modes), **own)


def _with_modes(striped: HeadPatterns, modes: Int[np.ndarray, "layers heads"]) -> HeadPatterns:
    """Other modes with the same stripes, where they are used."""
    video = len(striped.columns) // modes.size
    columns = np.frombuffer(striped.columns, bool).reshape(*modes.shape, video)
    columns = columns & (modes == STRIPES)[..., None]
    return dataclasses.replace(striped, modes=modes.tobytes(), columns=columns.tobytes())


def search_patterns(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    criterion: Criterion = Criterion(),
    block: int | None = None,
    seeds: list[int] | None = None,
    negative_prompt: str = "",
    states: list[np.ndarray] | None = None,
    negative_states: Float[np.ndarray, "U D"] | None = None,
    progress: bool = True,
    **settings,
) -> tuple[HeadPatterns, Found]:
    """Chooses every head's pattern on dense sampling; each prompt is sampled twice.

    The first runs find the stripes, the key blocks of most attention mass; the second ones let
    every pattern attend beside dense attention.

    Args:
        pipeline: its model is sampled.
        prompts: a few, other ones than those to be made.
        criterion: the patterns and what they may cost.
        block: tokens of a query block and of a key block; None is the model's.
        seeds: one a prompt; None counts from 0.
        negative_prompt, negative_states, progress, settings: as in `Pipeline.generate`.
        states: one array [E, D] a prompt, in place of encoded prompts.

    Returns:
        The patterns, and what they were chosen by.

    Raises:
        ValueError: as `Pipeline.generate`, or seeds that are not one a prompt.

    Source: Sparse-vDiT (arXiv:2506.03065), the offline search; widths, stripes, samples and the
    scale of errors, which it leaves open, are `Criterion`'s.
    """
    check_prompts(prompts)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_seeds(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{seeds=} must be one for each of the {len(prompts)} prompts")
    chosen = pipeline.card.settings(**settings)
    block = pipeline.card.block(chosen) if block is None else block
    shares = (round(share * (chosen.steps - 1)) for share in criterion.at)
    options = {"negative_prompt": negative_prompt, "negative_states": negative_states}
    options |= {"progress": progress, **dataclasses.asdict(chosen)}
    runs = _Runs(pipeline, prompts, seeds, states, tuple(sorted(set(shares))), options)
    grid = pipeline.card.grid(chosen)
    mass = runs.measured(functools.partial(_column_mass, block))
    columns = _heaviest(mass, grid.text_blocks(block), criterion.stripes)
    shape = columns.shape[:2]
    striped = HeadPatterns(
        key=pipeline.card.curve_key(chosen),
        block=block,
        width=round(criterion.width * grid.rows * grid.columns),
        weight=criterion.weight,
        max_loss=criterion.max_loss,
        prompts=len(prompts),
        shape=shape,
        modes=np.full(shape, STRIPES, np.int8).tobytes(),
        columns=columns.tobytes(),
    )
    every = [_with_modes(striped, np.full(shape, mode, np.int8)) for mode in range(1, 5)]
    errors = runs.measured(functools.partial(_errors, tuple(every[1:])))
    kept = np.array([heads.density for heads in every])
    found = Found(np.moveaxis(errors, -1, 0), kept, striped)
    return found.choose(criterion), found


def _heaviest(
    mass: Float[np.ndarray, "layers heads J"], text: Bool[np.ndarray, " J"], share: float
) -> Bool[np.ndarray, "layers heads V"]:
    """The share of the video's key blocks that holds most mass, by head."""
    mass = mass[..., ~text]
    order = np.argsort(-mass, axis=-1, kind="stable")[..., : density_blocks(share, mass.shape[-1])]
    columns = np.zeros(mass.shape, bool)
    np.put_along_axis(columns, order, True, axis=-1)
    return columns
