"""The offline calibration of PAROAttention (arXiv:2506.16054): dense runs → orders and masks."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import num_blocks
from pasa_jax.pipeline import Pipeline, recorded_steps
from pasa_jax.policies import AttentionShape, Context, Policy
from pasa_jax.policies.base import check_density, check_share
from pasa_jax.policies.paro import ParoMasks, order_table
from pasa_jax.settings import Card, Settings, check_prompts, check_seeds


@dataclasses.dataclass(frozen=True)
class Criterion:
    """Which order a head takes, how much its masks keep, and how many steps share one.

    Attributes:
        density: share of the key blocks that the masks keep, text included.
        alpha: weight of empty blocks against even ones, in [0, 1]; the paper does not give its own.
        small: attention weights below it count as none, ε.
        share: a block with at least this share of such weights is empty, σ.
        reuse: consecutive steps of the run's first half that share a mask; its second half has one.
        block: tokens of a block; None is the model's own.

    Raises:
        ValueError: a field is out of range.
    """

    density: float = 0.5
    alpha: float = 0.5
    small: float = 1e-3
    share: float = 0.9
    reuse: int = 1
    block: int | None = None

    def __post_init__(self):
        check_density("density", self.density)
        for name in ("alpha", "small", "share"):
            check_share(name, getattr(self, name))
        if self.reuse < 1:
            raise ValueError(f"reuse={self.reuse} must be at least 1 step")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1 token")

    def starts(self, steps: int) -> tuple[int, ...]:
        """First step of each mask, which is the one that is recorded for it."""
        return (*range(0, steps // 2, self.reuse), steps // 2)


class Weights(NamedTuple):
    """What one head's attention weights look like block by block.

    Attributes:
        mass: f32 [B, I, J], weight that a query of a query block gives the keys of a key block,
            mean over its queries.
        empty: f32 [B], share of the blocks that are empty.
        uneven: f32 [B], mean over blocks of their largest weight over their mean weight.
    """

    mass: Float[Array, "B I J"]
    empty: Float[Array, " B"]
    uneven: Float[Array, " B"]


def block_weights(
    q: Float[Array, "B T H"],
    k: Float[Array, "B T H"],
    lse: Float[Array, "B T"],
    *,
    block: int,
    small: float,
    share: float,
) -> Weights:
    """Weights exp(q·k/√H − lse) of one head, one row of blocks at a time, in float32.

    Args:
        q, k: in the order of tokens that is looked at.
        lse: of q over all keys, text included, natural log.
        block: tokens of a block; the last one may be ragged.
        small, share: see `Criterion`.
    """
    tokens = q.shape[1]
    blocks = num_blocks(tokens, block)
    spare = ((0, 0), (0, blocks * block - tokens))
    q, k = (jnp.pad(x.astype(jnp.float32), (*spare, (0, 0))) for x in (q, k))
    live = (np.arange(blocks * block) < tokens).reshape(blocks, block)
    live_keys = live.sum(1).astype(np.float32)

    def row(operands):
        query, lse, valid = operands
        logit = jnp.einsum("bth,bsh->bts", query, k) * q.shape[-1] ** -0.5
        weight = einops.rearrange(jnp.exp(logit - lse[..., None]), "b t (j s) -> b t j s", s=block)
        both = valid[None, :, None, None] & live[None, None]
        weight = jnp.where(both, weight, 0.0)
        mass, peak = weight.sum((1, 3)), weight.max((1, 3))  # [B, J]
        number = valid.sum().astype(jnp.float32) * live_keys[None]
        few = ((weight < small) & both).sum((1, 3)).astype(jnp.float32)
        # Weights that are all 0 in float32 are even.
        uneven = jnp.where(mass > 0, peak * number / jnp.where(mass > 0, mass, 1.0), 1.0)
        return mass / valid.sum().astype(jnp.float32), few >= share * number, uneven

    rows = (
        einops.rearrange(q, "b (i t) h -> i b t h", t=block),
        einops.rearrange(jnp.pad(lse, spare), "b (i t) -> i b t", t=block),
        jnp.asarray(live),
    )
    mass, empty, uneven = (jnp.moveaxis(x, 1, 0) for x in jax.lax.map(row, rows))
    return Weights(mass, empty.astype(jnp.float32).mean((1, 2)), uneven.mean((1, 2)))


def choose_orders(
    empty: Float[np.ndarray, "*M orders"], uneven: Float[np.ndarray, "*M orders"], alpha: float
) -> Int[np.ndarray, "*M"]:
    """The order of least α · (1 − empty) + (1 − α) · uneven, of equals the first.

    Both are stretched to 0..1 over the six orders; the paper says normalised, not how, and its
    printed sign of the first term would prefer full blocks.
    """

    def stretched(x):
        low, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
        return (x - low) / np.where(span > 0, span, 1)

    return (alpha * (1 - stretched(empty)) + (1 - alpha) * stretched(uneven)).argmin(-1)


def heaviest_blocks(
    mass: Float[np.ndarray, "*M I J"], density: float, text: Bool[np.ndarray, " K"]
) -> Bool[np.ndarray, "*M I K"]:
    """Of every map the heaviest blocks, as many as the density says; K has text behind video's J.

    A row's heaviest block and all text are kept first, and count.
    """
    rows, columns = mass.shape[-2], len(text)
    weight = np.zeros((*mass.shape[:-1], columns))
    weight[..., : mass.shape[-1]] = mass
    best = weight.argmax(-1)[..., None]
    np.put_along_axis(weight, best, np.inf, axis=-1)
    weight[..., text] = np.inf
    flat = weight.reshape(*mass.shape[:-2], rows * columns)
    always = np.isinf(flat).sum(-1, keepdims=True)
    kept = np.maximum(always, int(density * rows * columns + 1e-6))
    rank = np.argsort(np.argsort(-flat, axis=-1, kind="stable"), axis=-1)
    return (rank < kept).reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """Dense attention that leaves in its state what the calibration needs, mean over the batch.

    Without orders the state is f32 [layers, N, 6, 2], `empty` and `uneven` of `Weights` under
    every order; with them f32 [layers, N, I, J], `mass` under the layer's and head's own.

    Attributes:
        orders: numbers in `paro.AXES` by layer and head.
        small, share: see `Criterion`.
    """

    small: float
    share: float
    orders: tuple[tuple[int, ...], ...] | None = None
    dense_layers: tuple[int, ...] = ()

    def init_state(self, shape: AttentionShape) -> Float[Array, "layers N _ _"]:
        """Zeros."""
        blocks = num_blocks(shape.grid.num_tokens, self.block_q)
        sizes = (6, 2) if self.orders is None else (blocks, blocks)
        return jnp.zeros((shape.layers, shape.heads, *sizes), jnp.float32)

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: Any,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Dense output, and this step's figures in place of the state."""
        grid = context.need_grid(self)
        out, lse = api.dense_attention(q, k, v, kv_length=context.kv_length, return_lse=True)
        table = jnp.asarray(order_table(grid))

        def figures(order, q, k, lse):
            ordered = (x[:, order] for x in (q, k, lse))
            sizes = {"block": self.block_q, "small": self.small, "share": self.share}
            return block_weights(*ordered, **sizes)

        def score(operands):
            def one(order):
                found = figures(order, *operands)
                return jnp.stack([found.empty.mean(), found.uneven.mean()])

            return jax.lax.map(one, table)

        def mass(operands):
            number, *operands = operands
            return figures(table[number], *operands).mass.mean(0)

        # One head at a time, as the map of all blocks by all blocks is large.
        by_head = tuple(jnp.moveaxis(x, 2, 0) for x in (q, k[:, : grid.num_tokens], lse))
        if self.orders is None:
            return out, jax.lax.map(score, by_head)
        numbers = jnp.asarray(self.orders, jnp.int32)[context.layer]
        return out, jax.lax.map(mass, (numbers, *by_head))


@dataclasses.dataclass(frozen=True)
class Search:
    """A checked calibration: what is the same for all prompts.

    Attributes:
        card: of the model.
        settings: of the dense runs.
        criterion: what is asked for.
        block: tokens of a block.
        starts: recorded steps, one a bucket.
    """

    card: Card
    settings: Settings
    criterion: Criterion
    block: int
    starts: tuple[int, ...]

    @classmethod
    def start(cls, card: Card, settings: Settings, criterion: Criterion) -> "Search":
        """Raises ValueError if a block has more tokens than the video."""
        block = card.block(settings) if criterion.block is None else criterion.block
        tokens = card.grid(settings).num_tokens
        if block > tokens:
            raise ValueError(f"{block=} must be at most the video's {tokens=}")
        return cls(card, settings, criterion, block, criterion.starts(settings.steps))

    def recorder(self, orders: tuple[tuple[int, ...], ...] | None) -> Recorder:
        """What records scores of all orders, or masses under the given ones."""
        criterion = self.criterion
        return Recorder(
            small=criterion.small,
            share=criterion.share,
            orders=orders,
            block_q=self.block,
            block_kv=self.block,
        )

    def sample(
        self, pipeline: Pipeline, text: Float[Array, "B E D"], seed: int, recorder: Recorder
    ) -> Iterator[Any]:
        """Step by step a dense run: the recorder's state at a recorded step, else None."""
        run = (self.settings, text, seed, recorder, self.starts, self.starts[-1])
        return recorded_steps(pipeline, *run)


def calibrate_paro(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    criterion: Criterion = Criterion(),
    seeds: list[int] | None = None,
    negative_prompt: str = "",
    states: list[np.ndarray] | None = None,
    negative_states: Float[np.ndarray, "U D"] | None = None,
    progress: bool = True,
    **settings,
) -> ParoMasks:
    """Orders and masks of every layer and head, from dense sampling.

    Every prompt is sampled twice, to half of the steps: once to score the six orders, once to sum
    the attention weights of blocks in the chosen ones.

    Args:
        pipeline: its model is sampled.
        prompts: other ones than those to be made; the paper takes one or two.
        criterion: which order, how dense, how often anew.
        seeds: one a prompt; None counts from 0.
        negative_prompt, negative_states, progress, settings: as in `Pipeline.generate`.
        states: one array [E, D] a prompt, in place of encoded prompts.

    Returns:
        The masks. An order's scores are means over prompts, guidance branches and recorded steps,
        a mask's weights means over prompts and branches at the bucket's first step.

    Raises:
        ValueError: as `Pipeline.generate`, or a block has more tokens than the video.

    Source: PAROAttention (arXiv:2506.16054): blocks with at least σ of their weights below ε, and
    max/mean of a block's weights, choose the order; the heaviest blocks of the recorded map are the
    mask, one a step in the first half of the run and one for the second half (here recorded at its
    first step: the paper leaves open from which).
    """
    check_prompts(prompts)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_seeds(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{seeds=} must be one for each of the {len(prompts)} prompts")
    search = Search.start(pipeline.card, pipeline.card.settings(**settings), criterion)
    guidance = search.settings.guidance
    texts = [
        pipeline.encode(
            [prompt],
            negative_prompt,
            guidance,
            None if states is None else states[i][None],
            negative_states,
        )
        for i, prompt in enumerate(prompts)
    ]
    passes = 2 * len(prompts) * (search.starts[-1] + 1)
    with tqdm(total=passes, disable=not progress, unit="step") as bar:

        def mean(recorder: Recorder) -> list[np.ndarray]:
            """By bucket [layers, ...], over the prompts; float32, as maps are large."""
            total = {}
            for text, seed in zip(texts, seeds, strict=True):
                for i, state in enumerate(search.sample(pipeline, text, seed, recorder)):
                    if state is not None:
                        state = np.asarray(state)
                        total[i] = total[i] + state if i in total else state
                    bar.update()
            return [state / np.float32(len(prompts)) for state in total.values()]

        scores = np.mean(mean(search.recorder(None)), axis=0, dtype=np.float64)
        orders = choose_orders(scores[..., 0], scores[..., 1], criterion.alpha)
        orders = tuple(map(tuple, orders.tolist()))
        mass = mean(search.recorder(orders))
    return _masks(search, orders, mass, len(prompts))


def _masks(
    search: Search, orders: tuple[tuple[int, ...], ...], mass: list[np.ndarray], prompts: int
) -> ParoMasks:
    """The heaviest blocks of every bucket's maps [layers, N, I, J], and the rest of the record."""
    criterion = search.criterion
    text = search.card.grid(search.settings).text_blocks(search.block)
    bits = [
        [np.packbits(heaviest_blocks(layer, criterion.density, text), axis=-1) for layer in bucket]
        for bucket in mass
    ]
    return ParoMasks(
        key=search.card.curve_key(search.settings),
        block=search.block,
        starts=search.starts,
        density=criterion.density,
        alpha=criterion.alpha,
        small=criterion.small,
        share=criterion.share,
        prompts=prompts,
        orders=orders,
        bits=np.asarray(bits).swapaxes(0, 1).tobytes(),
    )
