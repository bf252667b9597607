"""The TPU kernel: interpreted against the closed form, refusals, and lowering for a TPU."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pasa_jax.pallas_kernels import BlockIndex, mosaic_tpu, num_blocks
from pasa_jax.pallas_kernels.blocks import BlockStatistics, group_count

# float32: sums of some hundred terms in another order than the reference's, and exp2 for exp.
# bfloat16: scaled q, weights and statistics round to 2^-9; scores near 8 turn that into some 2^-6.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}

CASES = [
    # t, s, block_q, block_kv, slots, group, order, dtype, h; group None: no tail
    pytest.param(150, 450, 64, 64, 5, None, 1, "float32", 64, id="T150-S450-no_tail"),
    pytest.param(130, 449, 128, 128, 3, 99, 1, "float32", 128, id="T130-S449-one_group"),
    pytest.param(70, 2877, 128, 64, 35, 32, 1, "bfloat16", 64, id="T70-S2877-group32-bfloat16"),
    pytest.param(70, 8517, 64, 64, 9, 32, 1, "float32", 64, id="T70-S8517-two_tiles-group32"),
    pytest.param(5, 2877, 256, 64, 12, 8, 1, "float32", 96, id="T5-S2877-group8-H96"),
    pytest.param(70, 2877, 256, 64, 7, 32, 0, "float32", 256, id="T70-S2877-order0-H256"),
]
STATIC = ("block_q", "block_kv", "group", "order", "scale", "return_lse")


@pytest.fixture
def form(monkeypatch):
    """form(gather, interpret) → the kernel, with short chunks: few slots, many bodies to run."""

    def make(gather, interpret=True):
        call = functools.partial(mosaic_tpu._call, interpret=interpret)
        choice = lambda config, k, tail: dataclasses.replace(config, gather=gather)  # noqa: E731
        monkeypatch.setattr(mosaic_tpu, "CHUNK_KEYS", 128)
        monkeypatch.setattr(mosaic_tpu, "TAIL_TILES", 1)
        monkeypatch.setattr(mosaic_tpu, "_call", call)
        monkeypatch.setattr(mosaic_tpu, "_fit_vmem", choice)
        # A new function: jit would otherwise find what another test compiled from other constants.
        call = lambda *args, **kw: mosaic_tpu.block_sparse_attention(*args, **kw)  # noqa: E731
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(call, static_argnames=STATIC, compiler_options=options)

    return make


@pytest.fixture
def kernel(form):
    """The kernel with a head in VMEM."""
    return form(gather=False)


def distance(a, b):
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def compare(kernel, truth, q, k, v, blocks, **kw):
    """Output and log-sum-exp against the closed form; returns the kernel's."""
    out, lse = kernel(q, k, v, blocks, return_lse=True, **kw)
    want, want_lse = truth.block_sparse_attention(q, k, v, blocks, return_lse=True, **kw)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert distance(out, want) < TOLERANCE[q.dtype.name]
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = ~np.isneginf(want_lse)
    assert distance(np.where(seen, lse, 0), np.where(seen, want_lse, 0)) < TOLERANCE[q.dtype.name]
    return out, lse


@pytest.mark.parametrize(
    ("t", "s", "block_q", "block_kv", "slots", "group", "order", "dtype", "h"), CASES
)
def test_equals_closed_form(
    kernel, truth, problem, t, s, block_q, block_kv, slots, group, order, dtype, h
):
    q, k, v, blocks = problem(t, s, block_q, block_kv, slots, n=2, h=h, dtype=dtype, spread=1)
    q = q * jnp.asarray(2, q.dtype)
    kv_length = jnp.asarray([s, s // 2 + 1], jnp.int32)
    kw = dict(block_q=block_q, block_kv=block_kv, order=order, kv_length=kv_length)
    if group is not None:
        kw["tail"] = truth.block_statistics(
            k, v, block_kv=block_kv, group=group, kv_length=kv_length
        )
    out, lse = compare(kernel, truth, q, k, v, blocks, **kw)
    again, lse_again = kernel(q, k, v, blocks, return_lse=True, **kw)
    assert np.array_equal(out, again) and np.array_equal(lse, lse_again)


@pytest.mark.parametrize("gather", [False, True])
def test_nan_stays_in_dropped_blocks_and_in_padding(form, truth, problem, gather):
    kernel = form(gather)
    q, k, v, blocks = problem(130, 450, 64, 64, 5, n=1, h=64)
    count = jnp.asarray([[[3, 1, 0]], [[2, 5, 3]]], jnp.int32)
    listed = np.asarray(blocks.ids)
    slot = np.arange(5)
    dead = slot >= np.asarray(count)[..., None]
    wild = jnp.asarray(np.where(dead, [[[[-1, 99, 7, 2**30, -(2**31)]]]], listed), jnp.int32)
    kv_length = jnp.asarray([450, 300], jnp.int32)
    kw = dict(block_q=64, block_kv=64, kv_length=kv_length, scale=0.1)
    want = truth.block_sparse_attention(q, k, v, BlockIndex(blocks.ids, count), **kw)
    used = np.zeros((2, 512), bool)
    for b in range(2):
        for block in np.unique(listed[b][~dead[b]]):
            used[b, 64 * block : 64 * block + 64] = True
    used = (used & (np.arange(512)[None] < np.asarray(kv_length)[:, None]))[:, :450]
    assert not used.all(axis=1).any(), "both rows have tokens to poison"
    k, v = (jnp.where(jnp.asarray(used)[:, :, None, None], x, jnp.nan) for x in (k, v))
    out = kernel(q, k, v, BlockIndex(wild, count), **kw)
    assert distance(out, want) < TOLERANCE["float32"]


@pytest.mark.parametrize(("order", "options"), [(0, {}), (1, {"tail_tiles": 2})])
def test_maximum_rises_in_the_tail(kernel, truth, problem, monkeypatch, order, options):
    monkeypatch.setattr(mosaic_tpu, "tuned", lambda *args, **kw: options)
    q, k, v, blocks = problem(64, 8517, 64, 64, 2, b=1, n=1, h=64)
    # Block j scores about 0.025·j: lists hold the lowest, the second tile of means the highest.
    q = jnp.abs(q)
    rise = jnp.arange(8517, dtype=jnp.float32) // 64 * 0.002
    k = 0.1 * k + rise[None, :, None, None]
    blocks = BlockIndex(jnp.zeros_like(blocks.ids).at[..., 1].set(1), blocks.count * 0 + 2)
    tail = truth.block_statistics(k, v, block_kv=64, group=32)
    compare(kernel, truth, q, k, v, blocks, block_q=64, block_kv=64, tail=tail, order=order)


@pytest.mark.parametrize(
    ("group", "dtype"),
    [(None, "float32"), (32, "bfloat16")],
    ids=["no_tail", "group32-bfloat16"],
)
def test_gathered_equals_closed_form(form, truth, problem, group, dtype):
    q, k, v, blocks = problem(6 * 64 - 3, 1090, 64, 64, 7, n=1, h=64, dtype=dtype, spread=1)
    kv_length = jnp.asarray([1090, 700], jnp.int32)
    kw = dict(block_q=64, block_kv=64, kv_length=kv_length)
    if group is not None:
        kw["tail"] = truth.block_statistics(k, v, block_kv=64, group=group, kv_length=kv_length)
    kernel = form(gather=True)
    # Rows without a list stand first, between, and last: the ring keeps what comes after them.
    for counts in ([0, 5, 0, 0, 1, 7], [7, 2, 3, 4, 6, 0], [0, 0, 0, 0, 0, 0]):
        count = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), (2, 1, 6))
        if group is None and not any(counts):
            out, lse = kernel(q, k, v, blocks._replace(count=count), return_lse=True, **kw)
            assert np.all(np.asarray(out) == 0) and np.all(np.isneginf(lse))
        else:
            compare(kernel, truth, q, k, v, blocks._replace(count=count), **kw)


@pytest.mark.parametrize("gather", [False, True])
def test_copies_do_not_race(form, truth, problem, capfd, gather):
    q, k, v, blocks = problem(190, 450, 64, 64, 5, b=1, n=2, h=64)
    blocks = BlockIndex(blocks.ids, jnp.asarray([[[5, 0, 3], [1, 4, 0]]], jnp.int32))
    tail = truth.block_statistics(k, v, block_kv=64, group=32)
    # Eager: a copy counts when it starts, so that one never waited for is left over at the end.
    machine = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    kernel = form(gather, interpret=machine)
    compare(kernel, truth, q, k, v, blocks, block_q=64, block_kv=64, tail=tail)
    jax.effects_barrier()
    assert interpret_pallas_call.races.races_found is False
    told = capfd.readouterr()
    assert "non-zero count" not in told.out + told.err, "every copy is waited for"


def test_no_key_gives_zero(kernel, truth, problem):
    q, k, v, blocks = problem(64, 128, 64, 64, 2, n=1, h=64)
    blocks = BlockIndex(blocks.ids, blocks.count * 0 + 2)
    kv_length = jnp.asarray([0, 1], jnp.int32)
    tail = truth.block_statistics(k, v, block_kv=64, group=32, kv_length=kv_length)
    for statistics in (None, tail):
        kw = dict(block_q=64, block_kv=64, kv_length=kv_length, tail=statistics)
        out, lse = kernel(q, k, v, blocks, return_lse=True, **kw)
        assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(lse[0]))
        # One key: its value, whatever the query.
        assert distance(out[1], jnp.broadcast_to(v[1, :1], out[1].shape)) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("dtype", "h", "block_q", "block_kv", "group", "word"),
    [
        ("float16", 64, 64, 64, None, "dtype"),
        ("float32", 80, 64, 64, None, "head size 80"),
        ("float32", 64, 32, 64, None, "block_q 32"),
        ("float32", 64, 64, 32, None, "block_kv 32"),
        ("float32", 64, 64, 64, 12, "group=12"),
    ],
)
def test_refuses(problem, dtype, h, block_q, block_kv, group, word):
    q, k, v, blocks = problem(64, 64 * 14, block_q, block_kv, 1, h=h, dtype=dtype)
    tail = None if group is None else statistics(2, 3, 14, h, group)
    with pytest.raises(NotImplementedError, match=word):
        mosaic_tpu.block_sparse_attention(
            q, k, v, blocks, block_q=block_q, block_kv=block_kv, tail=tail
        )


def statistics(b, n, blocks, h, group):
    return BlockStatistics(
        jnp.zeros((b, n, blocks, h), jnp.float32),
        jnp.zeros((b, n, blocks, h), jnp.float32),
        jnp.zeros((b, blocks), jnp.int32),
        jnp.zeros((b, n, group_count(blocks, group), h, h), jnp.float32),
        group,
    )


def lower(t, s, n, block_q, block_kv, slots, group, dtype, h=128, options=None):
    """The function of a shape, traced and lowered for a TPU."""
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, t, n, h), dtype), shape((1, s, n, h), dtype)
    rows = num_blocks(t, block_q)
    blocks = BlockIndex(shape((1, n, rows, slots), jnp.int32), shape((1, n, rows), jnp.int32))

    def run(q, k, v, blocks):
        tail = group and statistics(1, n, num_blocks(s, block_kv), h, group)
        sizes = dict(block_q=block_q, block_kv=block_kv, return_lse=True, options=options)
        return mosaic_tpu.block_sparse_attention(q, k, v, blocks, tail=tail, **sizes)

    return jax.jit(run).trace(q, k, k, blocks).lower(lowering_platforms=("tpu",)).as_text()


@contextlib.contextmanager
def compiled_for(kind):
    """Programs traced inside are for a TPU that is not here."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.parametrize(
    ("kind", "s", "n", "block_q", "block_kv", "slots", "group", "dtype"),
    [
        pytest.param("TPU v5e", 75600, 40, 128, 64, 177, 32, "bfloat16", id="wan14b-720p-pasa"),
        pytest.param("TPU v4", 75600, 40, 128, 128, 88, 32, "bfloat16", id="wan14b-720p-pasa-v4"),
        pytest.param("TPU v6e", 119056, 24, 256, 128, 96, 2000, "bfloat16", id="one_group"),
        pytest.param("TPU v5p", 1000, 2, 64, 64, 5, None, "float32", id="float32-no_tail"),
    ],
)
def test_lowers_for_tpu(kind, s, n, block_q, block_kv, slots, group, dtype):
    with compiled_for(kind):
        assert "tpu_custom_call" in lower(s, s, n, block_q, block_kv, slots, group, dtype)


class Chosen(Exception):
    """Carries a configuration out of a trace that needs to go no further."""


@pytest.fixture
def configure(monkeypatch):
    """configure(...), as lower: the configuration chosen."""

    def choose(*args, **kw):
        def stop(config, *args, **kw):
            raise Chosen(config)

        with monkeypatch.context() as patch:
            patch.setattr(mosaic_tpu, "_call", stop)
            with pytest.raises(Chosen) as chosen:
                lower(*args, **kw)
        return chosen.value.args[0]

    return choose


@pytest.mark.parametrize(
    ("kind", "tokens", "gather"),
    [
        ("TPU v4", 16384, False),
        ("TPU v4", 32760, True),
        ("TPU v4", 119056, True),
        ("TPU v5p", 119056, False),
        ("TPU v5p", 150000, True),
        ("TPU v6 lite", 200000, False),
    ],
)
def test_vmem_decides_the_form(configure, kind, tokens, gather):
    with compiled_for(kind):
        config = configure(128, tokens, 2, 128, 128, 96, 32, "bfloat16")
    assert config.gather == gather


def test_gathered_chunks_shrink_to_fit_vmem(configure):
    with compiled_for("TPU v4"):
        slots = [
            configure(128, 32760, 1, 128, 64, 256, 32, "float32", h=h).slots for h in (64, 256)
        ]
    assert slots == [32, 8]


def test_refuses_what_does_not_fit_vmem():
    with compiled_for("TPU v4"), pytest.raises(NotImplementedError, match="900032 .*at most 16.0"):
        lower(64, 900000, 1, 64, 64, 5, 32, "bfloat16")


def test_options_reach_the_kernel(configure):
    shape = (64, 32760, 1, 64, 64, 96, 32, "bfloat16")
    usual = configure(*shape, options={})
    assert (usual.slots, usual.tail_tiles) == (24, 4)
    assert configure(*shape, options={"chunk_keys": 512}).slots == 8
    assert configure(*shape, options={"tail_tiles": 2}).tail_tiles == 2


def test_refuses_unknown_options(problem):
    q, k, v, blocks = problem(64, 64, 64, 64, 1, h=64)
    with pytest.raises(ValueError, match="warps"):
        mosaic_tpu.block_sparse_attention(
            q, k, v, blocks, block_q=64, block_kv=64, options={"warps": 4}
        )
