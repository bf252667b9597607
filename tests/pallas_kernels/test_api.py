"""The checks of the public operations, and how an implementation is chosen."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from pasa_jax.pallas_kernels import BlockIndex, BlockStatistics, api

X = jnp.zeros((2, 12, 3, 4))
IDS = jnp.zeros((2, 3, 3, 2), jnp.int32)
COUNT = jnp.zeros((2, 3, 3), jnp.int32)
BLOCKS = BlockIndex(IDS, COUNT)
SIZES = {"block_q": 4, "block_kv": 4}


@pytest.mark.parametrize(
    ("q", "k", "v", "kv_length", "message"),
    [
        (X[0], X, X, None, r"q.shape=\(12, 3, 4\) must be"),
        (X[:, :0], X, X, None, r"q.shape=\(2, 0, 3, 4\) must be"),
        (X, X[:1], X[:1], None, r"k.shape=\(1, 12, 3, 4\) must be"),
        (X, X[..., 0], X, None, r"k.shape=\(2, 12, 3\) must be"),
        (X, X[:, :0], X[:, :0], None, r"k.shape=\(2, 0, 3, 4\) must be"),
        (X, X, X[:, :5], None, r"v.shape=\(2, 5, 3, 4\) must be"),
        (X, X, X.astype(jnp.bfloat16), None, r"v.dtype.name='bfloat16'"),
        (X.astype(int),) * 3 + (None, "must be one of bfloat16"),
        (X, X, X, jnp.zeros(3, jnp.int32), "kv_length=.* must be integers"),
        (X, X, X, jnp.zeros(2), "kv_length=.* must be integers"),
    ],
)
def test_bad_operands(q, k, v, kv_length, message):
    with pytest.raises(ValueError, match=message):
        api.check_qkv(q, k, v, kv_length)


def test_bad_sizes():
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"block_q={size} must be at least 1"):
            api.block_sparse_attention(X, X, X, BlockIndex(IDS, COUNT), block_q=size, block_kv=4)
        with pytest.raises(ValueError, match=f"group={size} must be at least 1"):
            api.block_statistics(X, X, block_kv=4, group=size)
        with pytest.raises(ValueError, match=f"block_kv={size} must be at least 1"):
            api.block_covariance_norm(X, X, block_kv=size, group=1)


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        (IDS[:, :, :2], COUNT, "ids.shape=.* must be"),
        (IDS[..., :0], COUNT, "L ≥ 1"),
        (IDS, COUNT[:, :, :2], "count.shape=.* must be"),
        (IDS, COUNT.astype(jnp.int8), "must be int32"),
        (IDS.astype(jnp.int8), COUNT, "must be int32"),
    ],
)
def test_bad_blocks(ids, count, message):
    with pytest.raises(ValueError, match=message):
        api.block_sparse_attention(X, X, X, BlockIndex(ids, count), block_q=4, block_kv=4)


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([1, 0], 3, r"row \(0, 1, 2\) has count=3, ids=\[1, 0\]: a count must be from 0 to 2"),
        ([1, 0], -1, r"count=-1, ids=\[\]: a count must be from 0 to 2"),
        ([1, 3], 2, r"ids=\[1, 3\]: ids must be from 0 to 2"),
        ([-1, 0], 1, r"ids=\[-1\]: ids must be from 0 to 2"),
        ([2, 2], 2, r"ids=\[2, 2\]: an id must stand only once"),
    ],
)
def test_lists_looked_into(ids, count, message):
    api.check_lists(BlockIndex(IDS, COUNT), 3)  # all counts 0: the ids do not matter
    blocks = BlockIndex(IDS.at[0, 1, 2].set(jnp.asarray(ids)), COUNT.at[0, 1, 2].set(count))
    with pytest.raises(ValueError, match=message):
        api.check_lists(blocks, 3)


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        (IDS.astype(jnp.float32), COUNT, "ids.dtype=.*float32.* must be integers"),
        (IDS, COUNT > 0, "count.dtype=.*bool.* must be integers"),
    ],
)
def test_lists_of_no_integers(ids, count, message, untyped):
    with pytest.raises(ValueError, match=message):
        api.check_lists(BlockIndex(ids, count), 3)


def test_bad_lists_read_nothing_out_of_bounds():
    k = jnp.arange(12.0).reshape(1, 12, 1, 1)
    wild = BlockIndex(jnp.full((1, 1, 3, 2), 99, jnp.int32), jnp.full((1, 1, 3), 7, jnp.int32))
    out = api.block_sparse_attention(k, k, k, wild, block_q=4, block_kv=4)
    assert jnp.isfinite(out).all()


def statistics(blocks=3, groups=1, group=8):
    means = jnp.zeros((2, 3, blocks, 4))
    length = jnp.zeros((2, blocks), jnp.int32)
    return BlockStatistics(means, means, length, jnp.zeros((2, 3, groups, 4, 4)), group)


@pytest.mark.parametrize(
    ("tail", "order", "message"),
    [
        (None, 2, "order=2 must be 0 or 1"),
        (statistics(blocks=4), 1, "block_kv differs"),
        (statistics(groups=2), 1, "tail.covariance.shape=.* must be"),
        (statistics(group=1), 1, "tail.covariance.shape=.* must be"),
    ],
)
def test_bad_tail(tail, order, message):
    with pytest.raises(ValueError, match=message):
        api.block_sparse_attention(
            X, X, X, BlockIndex(IDS, COUNT), block_q=4, block_kv=4, tail=tail, order=order
        )


def test_statistics_of_another_group():
    with pytest.raises(ValueError, match="statistics.group=1 must be group=2"):
        api.block_covariance_norm(
            X, X, block_kv=4, group=2, statistics=statistics(groups=3, group=1)
        )


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='flash' must be one of cudnn, mosaic_gpu"):
        api.dense_attention(X, X, X, implementation="flash")


def refusal(message):
    def implementation(*args, **kwargs):
        raise NotImplementedError(message)

    return implementation


def test_all_reasons_are_reported(monkeypatch):
    table = {"triton": refusal("no Ampere"), "xla": refusal("no luck")}
    monkeypatch.setitem(api.IMPLEMENTATIONS, "dense_attention", table)
    monkeypatch.setitem(api.PREFERENCE, "cpu", ("mosaic_gpu", "triton", "xla"))
    monkeypatch.setattr(api, "CAPABILITIES", {})
    monkeypatch.setattr(api, "PLATFORMS", {})
    with pytest.raises(NotImplementedError, match="triton: no Ampere; xla: no luck"):
        api.dense_attention(X, X, X)


def test_the_next_implementation_runs(monkeypatch):
    table = {"triton": refusal("no Ampere"), "xla": lambda q, k, v, **kw: q + 1}
    monkeypatch.setitem(api.IMPLEMENTATIONS, "dense_attention", table)
    monkeypatch.setitem(api.PREFERENCE, "cpu", ("triton", "xla"))
    monkeypatch.setattr(api, "CAPABILITIES", {})
    monkeypatch.setattr(api, "PLATFORMS", {})
    assert (api.dense_attention(X, X, X) == 1).all()


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("9.0", "mosaic_gpu"), ("8.0", "triton"), ("10.0", "triton"), ("7.5", "xla"), (None, "xla")],
)
def test_the_gpu_s_generation_decides(monkeypatch, caplog, capability, runs):
    def kernel(name):
        return lambda *args, **kw: name

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    table = {name: kernel(name) for name in api.IMPLEMENTATIONS["block_sparse_attention"]}
    monkeypatch.setitem(api.IMPLEMENTATIONS, "block_sparse_attention", table)
    api._log_choice.cache_clear()
    with caplog.at_level("INFO", "pasa_jax"):
        assert api._dispatch("block_sparse_attention", None, X) == runs
        assert api._dispatch("block_sparse_attention", None, X) == runs
    (line,) = caplog.messages  # one a process
    assert line.startswith(f"block_sparse_attention runs on {runs}")
    assert ("mosaic_gpu: needs compute capability 9.0" in line) == (runs != "mosaic_gpu")
    assert ("triton: needs compute capability 8.0" in line) == (runs == "xla")


def test_availability_computes_nothing_and_tells_reasons(monkeypatch):
    def told():
        x = jnp.zeros((1, 1_000_000, 1000, 128))  # 512 GB if it existed
        result.append(api.availability("dense_attention", x, x, x))

    result = []
    jax.eval_shape(lambda: told())
    monkeypatch.setitem(api.PREFERENCE, "cpu", ("cudnn", "xla"))
    jax.eval_shape(lambda: told())
    refused = {"cudnn": "runs on a gpu, the backend is cpu", "xla": None}
    assert result == [{"xla": None}, refused]


def test_cudnn_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(NotImplementedError, match="cudnn: runs on a gpu, the backend is cpu"):
        api.dense_attention(X, X, X, implementation="cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match="log-sum-exp is rounded"):
        api.dense_attention(X, X, X, implementation="cudnn", return_lse=True)
    # Without a GPU jax itself refuses, as it does there for float32.
    with pytest.raises(NotImplementedError, match="cudnn: ."):
        api.dense_attention(X, X, X, implementation="cudnn")


@pytest.mark.parametrize("name", ["triton", "mosaic_gpu", "mosaic_tpu"])
def test_a_forced_kernel_of_another_platform_is_refused(name):
    where = "tpu" if name == "mosaic_tpu" else "gpu"
    with pytest.raises(NotImplementedError, match=f"{name}: runs on a {where}, the backend is cpu"):
        api.block_sparse_attention(X, X, X, BLOCKS, **SIZES, implementation=name)


@pytest.mark.parametrize("length", [-9, 0, 6, 99])
def test_lengths_beyond_the_ends_are_cut(length):
    q = jax.random.normal(jax.random.key(0), (1, 12, 1, 8))
    told, cut = (jnp.asarray([x], jnp.int32) for x in (length, max(0, min(length, 12))))
    for one, other in zip(
        api.dense_attention(q, q, q, kv_length=told, return_lse=True),
        api.dense_attention(q, q, q, kv_length=cut, return_lse=True),
        strict=True,
    ):
        assert (one == other).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_length": [12]}, r"kv_length=\[12\] must be integers in an array"),
        ({"scale": float("nan")}, "scale=nan must be a finite Python number"),
        ({"block_q": 4.0}, "block_q=4.0 must be a whole number"),
    ],
)
def test_more_bad_input_is_one_line(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        api.block_sparse_attention(X, X, X, BLOCKS, **(SIZES | change))


@pytest.mark.parametrize(
    "run",
    [
        lambda scale: api.block_sparse_attention(X, X, X, BLOCKS, **SIZES, scale=scale),
        lambda scale: api.block_mass(X, X, X[..., 0], **SIZES, top=1, scale=scale),
        lambda scale: api.dense_attention(X, X, X, scale=scale),
    ],
    ids=["block_sparse_attention", "block_mass", "dense_attention"],
)
def test_a_traced_scale_is_refused(run, untyped):
    with pytest.raises(ValueError, match="scale=.* must be a finite Python number"):
        jax.jit(run)(0.5)


def test_a_tail_without_groups_is_refused():
    tail = dataclasses.replace(api.block_statistics(X, X, block_kv=4, group=2), group=0)
    with pytest.raises(ValueError, match="tail.group=0 must be at least 1 block"):
        api.block_sparse_attention(X, X, X, BLOCKS, **SIZES, tail=tail)
