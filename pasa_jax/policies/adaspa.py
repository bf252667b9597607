"""AdaSpa (arXiv:2502.21079): blocks by their exact attention mass, searched at a few steps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import BlockIndex, BlockMass, block_lengths, num_blocks
from pasa_jax.policies.base import (
    AttentionShape,
    Context,
    Plan,
    Policy,
    check_choice,
    check_density,
    check_share,
    dense_prefix_steps,
)


class AdaSpaState(NamedTuple):
    """What a layer keeps between steps; `init_state` stacks it over the layers.

    Attributes:
        lse: f32 [B, T, N], log-sum-exp of the video's queries at the last dense search.
        ids: int16 (int32 from 32,768 key blocks on) [B, N, I, L], text blocks, then the video's by
            falling mass: the lists of all tiers are prefixes of it.
        count: int32 [B, N, I], blocks in each list's use: its head's tier, text's among them.
    """

    lse: Float[Array, "*layers B T N"]
    ids: Int[Array, "*layers B N I L"]
    count: Int[Array, "*layers B N I"]


class _Sizes(NamedTuple):
    """Key blocks: the video's, with text, kept of the video's by each tier, and in one list."""

    video: int
    text: int
    kept: tuple[int, int, int]
    slots: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaSpa(Policy):
    """Dense warm-up, one dense step that measures every block's mass, cheap refreshes of the lists.

    The first step after the dense prefix is the fused search: its output is dense as well, so that
    the defaults give 11 dense outputs of 50. A later search measures with the log-sum-exp of that
    step, and attends by the lists it has just made. At each search the heads whose lists hold more
    than `recall_threshold` of their mass, at most half of them, fall to half the density, and as
    many heads of the lowest recall rise to one and a half times. No layer is left dense.

    The lists and the log-sum-exp of a layer of Wan 14B at 720p with guidance take 87 MiB.

    Left open by the paper, and here: the search steps, given for 50 ({10, 30}), are shares of the
    run; a density d above 2/3 caps the upper tier at 1 and gives the lower tier 2d − 1, so that the
    mean stays d; blocks with both video and text count as text; the video's queries beside text
    follow lists like all others; recall is over the video's queries; recall, order of heads and
    log-sum-exp are those of each batch row, guidance branches apart; the number of blocks is
    rounded half up. `budgets` does not know of text, whose blocks come on top: the recorded
    densities do.

    Attributes:
        density: share of the video's key blocks kept in sparse steps, in (0, 1], mean over heads.
        searches: later searches, as shares of the steps; those before the first one fall away.
        step_base: number of the first step as the search steps count; 1 makes the prefix's last
            step the first search, all searches one step earlier.
        head_adaptive: whether heads move between the three tiers.
        lse_cache: whether later searches reuse the first one's log-sum-exp; False repeats the
            dense search.
        recall_threshold: share of a head's mass above which it can do with less, in [0, 1].
        top_k: among which blocks a head's heaviest are taken: "row", as many in every query block;
            "global", as many in all, the paper's first form, given up as it leaves regions unseen.
            Every query block keeps its heaviest one then, and lists hold all blocks: an ablation.
        text_in_budget: whether text's blocks use up the density.
        text_in_recall: whether mass on text counts as kept mass.

    Raises:
        ValueError: a field is out of range.
    """

    dense_layers: tuple[int, ...] = ()
    density: float = 0.2
    searches: tuple[float, ...] = (0.6,)
    step_base: Literal[0, 1] = 0
    head_adaptive: bool = True
    lse_cache: bool = True
    recall_threshold: float = 0.8
    top_k: Literal["row", "global"] = "row"
    text_in_budget: bool = False
    text_in_recall: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_density("density", self.density)
        check_choice("step_base", self.step_base, (0, 1))
        check_share("recall_threshold", self.recall_threshold)
        check_choice("top_k", self.top_k, ("row", "global"))
        shares = self.searches
        if not isinstance(shares, tuple) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"searches={shares!r} must be a tuple of shares in [0, 1]")

    def modes(self, num_steps: int) -> tuple[str, ...]:
        """The prefix "dense", one "search", then "sparse" but for the later searches.

        Those are "refresh", or "search" again without `lse_cache`.
        """
        dense = dense_prefix_steps(self.dense_prefix, num_steps)
        if dense >= num_steps:
            return ("dense",) * num_steps
        first = max(0, dense - self.step_base)
        again = {round(share * num_steps) - self.step_base for share in self.searches}
        later = "refresh" if self.lse_cache else "search"
        rest = (later if step in again else "sparse" for step in range(first + 1, num_steps))
        return ("dense",) * first + ("search",) + tuple(rest)

    def budgets(
        self, num_steps: int, num_blocks: int, curve: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [num_steps]: num_blocks in dense steps and dense searches, else the middle tier's.

        `plan` does not read them: the lists' length lies in the state.
        """
        kept = self._kept(num_blocks, 0)[1]
        dense = ("dense", "search")
        budgets = [num_blocks if mode in dense else kept for mode in self.modes(num_steps)]
        return np.asarray(budgets, np.int32)

    def init_state(self, shape: AttentionShape) -> AdaSpaState:
        """Empty lists: no step attends by them before a search."""
        blocks = shape.grid.num_blocks(self.block_kv)
        sizes = self._sizes(blocks, shape.grid)
        heads = (shape.layers, shape.batch, shape.heads)
        rows = num_blocks(shape.grid.num_tokens, self.block_q)
        ids = jnp.int16 if blocks < 2**15 else jnp.int32
        return AdaSpaState(
            jnp.zeros((shape.layers, shape.batch, shape.grid.num_tokens, shape.heads), jnp.float32),
            jnp.zeros((*heads, rows, sizes.text + sizes.slots), ids),
            jnp.zeros((*heads, rows), jnp.int32),
        )

    def search(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: AdaSpaState,
    ) -> tuple[Float[Array, "B T N H"], AdaSpaState]:
        """Dense attention; keeps its log-sum-exp, and lists by the mass it gives every block."""
        out, lse = api.dense_attention(q, k, v, kv_length=context.kv_length, return_lse=True)
        lse = jax.lax.stop_gradient(lse.astype(jnp.float32))
        return out, self._with_lists(q, k, context, state._replace(lse=lse))

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S N H"],
        v: Float[Array, "B S N H"],
        context: Context,
        state: AdaSpaState,
    ) -> tuple[Plan, AdaSpaState]:
        """The lists of the last search; in mode "refresh" new ones, by the kept log-sum-exp."""
        if context.mode == "refresh":
            state = self._with_lists(q, k, context, state)
        return Plan(BlockIndex(state.ids.astype(jnp.int32), state.count)), state

    def _with_lists(
        self, q: jax.Array, k: jax.Array, context: Context, state: AdaSpaState
    ) -> AdaSpaState:
        """The state with lists made from these queries and keys and the state's log-sum-exp."""
        sizes = self._sizes(num_blocks(k.shape[1], self.block_kv), context.grid)
        live = block_lengths(k.shape[1], self.block_kv, context.kv_length, q.shape[0]) > 0
        video, text = (x.sum(1, dtype=jnp.int32) for x in jnp.split(live, [sizes.video], axis=1))
        ids, lengths, recall = self._measure(q, k, state.lse, video, context.kv_length, sizes)
        tier = head_tiers(recall, self.recall_threshold)[..., None, None]
        kept = jnp.take_along_axis(lengths, tier, axis=-1)[..., 0]
        text = text[:, None, None]
        if sizes.text and context.kv_length is not None:
            # Text blocks stand last first: those without a valid key are skipped.
            place = jnp.arange(ids.shape[-1], dtype=jnp.int32)[None, None, None]
            place = place + (sizes.text - text)[..., None]
            ids = jnp.take_along_axis(ids, jnp.minimum(place, ids.shape[-1] - 1), axis=-1)
        return state._replace(ids=ids.astype(state.ids.dtype), count=kept + text)

    def _measure(
        self,
        q: jax.Array,
        k: jax.Array,
        lse: jax.Array,
        live: Int[Array, " B"],
        kv_length: jax.Array | None,
        sizes: _Sizes,
    ) -> tuple[Int[Array, "B N I L"], Int[Array, "B N I 3"], Float[Array, "B N"]]:
        """The longest lists, video blocks that each tier uses, each head's recall in the middle."""
        q, k, lse = jax.lax.stop_gradient((q, k, lse))
        text = jnp.arange(sizes.video + sizes.text, dtype=jnp.int32)[: sizes.video - 1 : -1]

        def one_head(head: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            operands = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (q, k, lse))
            video, on_text = self._mass(*operands, kv_length, sizes)
            ids, mass = video.ids[:, 0], video.mass[:, 0]
            lengths = self._lengths(mass, live, sizes.kept)
            place = jnp.arange(sizes.slots, dtype=jnp.int32)[None, None]
            kept = jnp.where(place < lengths[..., 1:2], mass, 0).sum((1, 2)) + on_text
            every = video.total.sum((1, 2)) + on_text
            first = jnp.broadcast_to(text[None, None], (*ids.shape[:2], text.size))
            return jnp.concatenate([first, ids], axis=-1), lengths, kept / every

        # One head at a time, as lists with their masses are large in float32 and int32.
        found = jax.lax.map(one_head, jnp.arange(q.shape[2], dtype=jnp.int32))
        return tuple(jnp.moveaxis(x, 0, 1) for x in found)

    def _mass(
        self,
        q: jax.Array,
        k: jax.Array,
        lse: jax.Array,
        kv_length: jax.Array | None,
        sizes: _Sizes,
    ) -> tuple[BlockMass, Float[Array, " B"]]:
        """The video's heaviest blocks, and the mass on text."""
        end = sizes.video * self.block_kv
        blocks = {"block_q": self.block_q, "block_kv": self.block_kv}
        top = sizes.slots
        video = api.block_mass(q, k[:, :end], lse, top=top, kv_length=kv_length, **blocks)
        if not sizes.text or not self.text_in_recall:
            return video, jnp.zeros(q.shape[:1], video.total.dtype)
        length = None if kv_length is None else jnp.maximum(kv_length - end, 0)
        text = api.block_mass(q, k[:, end:], lse, top=1, kv_length=length, **blocks)
        return video, text.total.sum((1, 2))

    def _lengths(
        self, mass: Float[Array, "B I L"], live: Int[Array, " B"], kept: tuple[int, int, int]
    ) -> Int[Array, "B I 3"]:
        """How many of its video blocks, the heaviest first, each query block uses in each tier."""
        b, rows, slots = mass.shape
        each = jnp.minimum(jnp.asarray(kept, jnp.int32)[None], live[:, None])[:, None]  # [B, 1, 3]
        if self.top_k == "row":
            return jnp.broadcast_to(each, (b, rows, 3))
        place = jnp.arange(slots, dtype=jnp.int32)[None, None]
        # The heaviest of each row first, as no softmax is over nothing; blocks of padding last.
        mass = jnp.where(place < live[:, None, None], mass, -1)
        mass = jnp.where(place == 0, jnp.inf, mass).reshape(b, rows * slots)
        rank = jnp.argsort(jnp.argsort(-mass, axis=1), axis=1).reshape(b, rows, slots)
        within = rank[..., None] < (rows * each)[:, None]
        return within.sum(2, dtype=jnp.int32)

    def _sizes(self, blocks: int, grid: TokenGrid | None) -> _Sizes:
        """How the key blocks divide; a lone block is the video's, as it is kept anyway."""
        text = 0 if grid is None else int(grid.text_blocks(self.block_kv).sum())
        video = max(1, blocks - text)
        kept = self._kept(video, blocks - video)
        slots = kept[-1] if self.top_k == "row" else video
        return _Sizes(video, blocks - video, kept, slots)

    def _kept(self, video: int, text: int) -> tuple[int, int, int]:
        """Video blocks kept by the sparser, the middle and the denser tier."""
        denser = min(1.0, 1.5 * self.density)
        shares = (2 * self.density - denser, self.density, denser)
        if not self.head_adaptive:
            shares = (self.density,) * 3
        spent = text if self.text_in_budget else 0
        counts = (_nearest(share * (video + spent)) - spent for share in shares)
        return tuple(min(video, max(1, count)) for count in counts)


def _nearest(value: float) -> int:
    """The nearest whole number, halves up."""
    # Rounded first: 0.3 · 355 and the like fall short of their half in floating point.
    return math.floor(round(value, 6) + 0.5)


def head_tiers(recall: Float[Array, "B N"], threshold: float) -> Int[Array, "B N"]:
    """Which heads can do with less: 0 the sparser tier, 1 the middle one, 2 the denser.

    Args:
        recall: share of each head's attention mass that its middle tier keeps.
        threshold: n heads lie above it; n is at most half of the heads, as the two outer tiers,
            the n of highest and the n of lowest recall, would overlap otherwise.

    Returns:
        int32 tiers; of equal recalls the lower head counts as the higher.

    Source: AdaSpa (arXiv:2502.21079), head-adaptive sparsity.
    """
    heads = recall.shape[1]
    outer = (recall > threshold).sum(1, dtype=jnp.int32)[:, None]
    outer = jnp.minimum(outer, heads // 2)
    order = jnp.argsort(-recall, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    sparser, denser = rank < outer, rank >= heads - outer
    return 1 - sparser.astype(jnp.int32) + denser.astype(jnp.int32)
