"""The Hopper kernel: interpreted against the closed form, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pasa_jax.pallas_kernels import BlockIndex, BlockStatistics, compat, mosaic_gpu, num_blocks

# The output's rounding, of values up to some units, and that of the weights before P·V.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}
# Block means and q times a group's weight are rounded, too, and a rounded mean moves a score.
TAIL_TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-9}


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.fixture
def interpreted():
    """The kernel on a CPU; where JAX can tell, two uses of a byte of memory in no order raise."""
    options = {"detect_races": True} if compat.FINDS_RACES else {}
    simulation = compat.interpret_gpu(**options)

    def run(*args, **kw):
        return mosaic_gpu.block_sparse_attention(*args, interpret=simulation, **kw)

    yield run
    compat.reset_interpreter()  # a failure leaves it broken for the next test


def poisoned(x, blocks, block):
    """x [1, S, 1, H] with NaN in every block that the one query block does not list."""
    listed = np.asarray(blocks.ids)[0, 0, 0, : int(blocks.count[0, 0, 0])]
    keep = np.isin(np.arange(x.shape[1]) // block, listed)
    return jnp.where(jnp.asarray(keep)[None, :, None, None], x, jnp.asarray(jnp.nan, x.dtype))


STEP = {"stages": 4, "step": 2}


@pytest.mark.parametrize(
    ("form", "tokens", "h", "dtype", "length", "slots", "options"),
    [
        pytest.param(
            (64, 64), (67, 199), 64, "bfloat16", (199, 70), 3, {"stages": 2}, id="blocks64x64"
        ),
        pytest.param((128, 64), (200, 333), 64, "bfloat16", None, 5, STEP, id="blocks128x64-step2"),
        pytest.param((128, 128), (131, 384), 128, "float16", None, 3, None, id="blocks128x128"),
    ],
)
def test_equals_closed_form(
    truth, problem, interpreted, form, tokens, h, dtype, length, slots, options
):
    (block_q, block_kv), (t, s) = form, tokens
    b = 1 if length is None else len(length)
    kw = dict(b=b, n=1, h=h, dtype=dtype, spread=1)
    q, k, v, blocks = problem(t, s, block_q, block_kv, slots, **kw)
    count = blocks.count.at[0, 0, 0].set(0).at[0, 0, 1].set(slots)  # fewer, and more than stages
    last = num_blocks(s, block_kv) - slots + jnp.arange(slots, dtype=jnp.int32)
    blocks = BlockIndex(blocks.ids.at[0, 0, 1].set(last), count)  # the ragged block comes late
    kw = dict(block_q=block_q, block_kv=block_kv, return_lse=True)
    kw["kv_length"] = None if length is None else jnp.asarray(length, jnp.int32)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    if length is not None:  # what padding holds must not matter
        padding = (jnp.arange(s)[None, :] >= kw["kv_length"][:, None])[:, :, None, None]
        k, v = (jnp.where(padding, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    out, lse = interpreted(q, k, v, blocks, options=options, **kw)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[dtype]
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = ~np.isneginf(want_lse)
    # float32 sums in another order.
    assert distance(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < 3e-6
    assert np.all(np.asarray(out)[0, :block_q] == 0)


def test_nan_in_dropped_blocks_stays_out(truth, problem, interpreted):
    """Also where the last step takes one block more than the list has."""
    q, k, v, blocks = problem(64, 384, 64, 64, 5, b=1, n=1, h=64, dtype="bfloat16", spread=1)
    # The last two slots, a dropped block and one out of range, are not valid: never followed.
    blocks = BlockIndex(blocks.ids.at[..., 4].set(10**6), jnp.full_like(blocks.count, 3))
    want = truth.block_sparse_attention(q, k, v, blocks, block_q=64, block_kv=64)
    k, v = (poisoned(x, blocks, 64) for x in (k, v))
    out = interpreted(q, k, v, blocks, block_q=64, block_kv=64, options=STEP)
    assert distance(out, want) < TOLERANCE["bfloat16"]


@pytest.mark.skipif(not compat.FINDS_RACES, reason="this JAX looks for no races")
def test_races_are_found(problem, interpreted, monkeypatch):
    """What tells a slot's last reads from the next copy into it, left out: the others may trust."""
    monkeypatch.setattr(mosaic_gpu.plgpu, "commit_smem", lambda: None)
    q, k, v, blocks = problem(64, 192, 64, 64, 3, b=1, n=1, h=64, dtype="bfloat16")
    blocks = blocks._replace(count=jnp.full_like(blocks.count, 3))
    with pytest.raises(Exception, match="RACE"):
        interpreted(q, k, v, blocks, block_q=64, block_kv=64, options={"stages": 2})


def worst_first(q, k, block_q, block_kv, slots):
    """The key blocks that each query block's mean likes least, in whole blocks."""
    b, t, n, h = q.shape
    q = q.astype(jnp.float32).reshape(b, t // block_q, block_q, n, h).mean(axis=2)
    k = k.astype(jnp.float32).reshape(b, -1, block_kv, n, h).mean(axis=2)
    ids = jnp.argsort(jnp.einsum("binh,bjnh->bnij", q, k), axis=-1)[..., :slots]
    return BlockIndex(ids.astype(jnp.int32), jnp.full(ids.shape[:3], slots, jnp.int32))


@pytest.mark.parametrize(
    ("s", "block_q", "block_kv", "h", "group", "order", "dtype", "options"),
    [
        pytest.param(64 * 34, 128, 64, 64, 32, 1, "bfloat16", None, id="groups_of_32"),
        pytest.param(64 * 66, 64, 64, 64, 99, 1, "bfloat16", None, id="one_group-two_tiles"),
        pytest.param(64 * 6, 64, 64, 64, 32, 0, "float16", {"stages": 2}, id="order0-float16"),
        pytest.param(128 * 6, 128, 128, 128, 32, 1, "float16", None, id="blocks128x128-H128"),
    ],
)
def test_tail_after_the_worst_blocks(
    truth, problem, interpreted, s, block_q, block_kv, h, group, order, dtype, options
):
    """Keys in clusters and the least liked blocks listed: the running maximum rises in the tail."""
    t = 256 if block_q == 128 and block_kv == 64 else block_q  # programs that take turns, beside
    q, k, v, _ = problem(t, s, block_q, block_kv, 1, b=1, n=1, h=h, dtype=dtype, spread=1)
    q = q[:, :1] + q / 2
    k = jnp.repeat(k[:, ::block_kv], block_kv, axis=1) + k
    if group > 64:  # the maximum rises from the first tile to the second, too
        k = k.at[:, -2 * block_kv :].add(q[:, :1] / 4)
    v = v + k / 2  # values that follow their keys: the first order counts
    blocks = worst_first(q, k, block_q, block_kv, 3)
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, return_lse=True)
    kw["kv_length"] = jnp.asarray([s - block_kv - 7], jnp.int32)  # an empty block, and a ragged
    kw["tail"] = truth.block_statistics(
        k, v, block_kv=block_kv, group=group, kv_length=kw["kv_length"]
    )
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, **kw)
    other = truth.block_sparse_attention(q, k, v, blocks, **(kw | dict(order=1 - order)))[0]
    assert distance(other, want) > 8 * TAIL_TOLERANCE[dtype]
    out, lse = interpreted(q, k, v, blocks, options=options, **kw)
    assert distance(out, want) < TAIL_TOLERANCE[dtype]
    assert np.max(np.abs(lse - want_lse)) < TAIL_TOLERANCE[dtype]


def test_bits_of_the_skipped(problem):
    _, _, _, blocks = problem(130, 64 * 70, 64, 64, 9, b=2)
    length = jnp.full((2, 70), 64, jnp.int32).at[1, 68:].set(0)
    dead = np.arange(9) >= np.asarray(blocks.count)[..., None]
    blocks = blocks._replace(ids=jnp.where(dead, 10**6, blocks.ids))
    tail = mosaic_gpu._plan_tail(32, 70, 1)
    config = dataclasses.replace(small_config(), tail=tail, slots=9, key_blocks=70)
    words = np.asarray(mosaic_gpu._skipped_words(blocks, length, config))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    want = np.ones((2, 3, 3, tail.words * 32), np.uint8)
    want[..., :70] = np.asarray(length)[:, None, None] == 0
    for row in np.ndindex(2, 3, 3):
        want[(*row, np.asarray(blocks.ids)[row][: int(blocks.count[row])])] = 1
    assert np.array_equal(bits, want)


def lower(h, block_q, block_kv, dtype, group, tokens=512, options=None):
    """The kernel's module for an H200 that need not be there, with a tail in groups or in none."""
    t, s, n, slots = tokens, tokens, 2, 3

    def run(q, k, v, ids, count, length, *statistics):
        return mosaic_gpu.block_sparse_attention(
            q,
            k,
            v,
            BlockIndex(ids, count),
            block_q=block_q,
            block_kv=block_kv,
            tail=BlockStatistics(*statistics, group) if statistics else None,
            kv_length=length,
            return_lse=True,
            options=options,
        )

    rows = num_blocks(t, block_q)
    shapes = [((1, t, n, h), dtype), ((1, s, n, h), dtype), ((1, s, n, h), dtype)]
    shapes += [((1, n, rows, slots), "int32"), ((1, n, rows), "int32"), ((1,), "int32")]
    if group:
        columns = num_blocks(s, block_kv)
        shapes += [((1, n, columns, h), "float32")] * 2 + [((1, columns), "int32")]
        shapes.append(((1, n, num_blocks(columns, group), h, h), "float32"))
    specs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(run).trace(*specs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("group", [None, 32, 999], ids=["no_tail", "groups", "one_group"])
@pytest.mark.parametrize(("block_q", "block_kv"), mosaic_gpu.BLOCK_SIZES)
def test_lowers_for_cuda(block_q, block_kv, group):
    h, dtype = (64, "float16") if block_kv == block_q == 64 else (128, "bfloat16")
    assert "mosaic_gpu" in lower(h, block_q, block_kv, dtype, group)


@pytest.mark.parametrize("options", [{"take_turns": 0}, {"step": 2}], ids=str)
def test_options_lower_for_cuda(options):
    assert "mosaic_gpu" in lower(128, 128, 64, "bfloat16", 32, options=options)


@pytest.mark.parametrize(("tokens", "copied"), [(520, False), (521, True)])
def test_ragged_ends_cost_no_copy(tokens, copied):
    """q, k and v are padded only where their tokens are no multiple of 8."""
    module = lower(128, 128, 64, "bfloat16", None, tokens)
    assert ("stablehlo.pad" in module) == copied


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float32"), "q.dtype.name"),
        (dict(h=96), "head size"),
        (dict(block_q=32), "block_q, block_kv"),
        (dict(scale=0.0), "must be positive"),
    ],
    ids=["dtype", "head_size", "block_sizes", "scale"],
)
def test_refuses(problem, change, reason):
    sizes = dict(block_q=64, dtype="bfloat16", h=64, scale=None) | change
    q, k, v, blocks = problem(
        64, 64, sizes["block_q"], 64, 1, b=1, n=1, h=sizes["h"], dtype=sizes["dtype"]
    )
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.block_sparse_attention(
            q, k, v, blocks, block_q=sizes["block_q"], block_kv=64, scale=sizes["scale"]
        )


@pytest.mark.parametrize(
    ("group", "blocks", "reason"),
    [(48, 99, "multiple of 64"), (32, mosaic_gpu.MOST_BLOCKS + 1, "at most 8192")],
    ids=["group", "blocks"],
)
def test_refuses_a_tail(group, blocks, reason):
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu._plan_tail(group, blocks, 1)


@pytest.mark.parametrize(
    ("form", "h", "options", "reason"),
    [
        ((128, 128), 128, {"stages": 4}, "stages=4 must be from 2"),
        ((128, 64), 128, {"stages": 3, "step": 2}, "stages=3 must be from 4"),
        ((128, 128), 64, {"stages": 4, "step": 2}, "step=2 must be 1"),
        ((64, 64), 64, {"take_turns": 1}, "take_turns=1 must be 0"),
    ],
    ids=str,
)
def test_refuses_options(problem, form, h, options, reason):
    q, k, v, blocks = problem(128, 128, *form, 1, b=1, n=1, h=h, dtype="bfloat16")
    kw = dict(block_q=form[0], block_kv=form[1], options=options)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.block_sparse_attention(q, k, v, blocks, **kw)


def test_unknown_option():
    with pytest.raises(ValueError, match="warps"):
        mosaic_gpu._with_options(small_config(), {"warps": 4})


def test_options_known_best_are_cut_to_what_fits(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "tuned", lambda *_, **__: {"stages": 5, "step": 2})
    config = mosaic_gpu._with_options(small_config(), None)
    assert (config.stages, config.step, config.take_turns) == (2, 1, 1)


def small_config():
    """Of a kernel with blocks of 128, two slots of which fit into shared memory."""
    sizes = dict(block_q=128, block_kv=128, head_dim=128, key_blocks=9, slots=3)
    options = dict(stages=2, step=1, take_turns=0)
    rest = dict(dtype=jnp.bfloat16, scale=1.0, ragged=False, tail=None, simulated=False)
    return mosaic_gpu._Config(**sizes, **options, **rest)
