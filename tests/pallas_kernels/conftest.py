"""Random problems for the operations, and a way to run them in many small pieces."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import BlockIndex, api, num_blocks, reference, xla

STATIC = ("block_q", "block_kv", "group", "order", "scale", "return_lse", "top", "implementation")
OPERATIONS = (
    "block_sparse_attention",
    "block_statistics",
    "block_covariance_norm",
    "block_mass",
    "dense_attention",
)


def compiled(module, level=3):
    """The operations of a module under jit, in functions that share no compilation with others."""

    def one(function):
        options = {"xla_backend_optimization_level": level}
        wrapped = lambda *args, **kw: function(*args, **kw)  # noqa: E731
        return jax.jit(wrapped, static_argnames=STATIC, compiler_options=options)

    return types.SimpleNamespace(**{name: one(getattr(module, name)) for name in OPERATIONS})


@pytest.fixture(scope="session")
def problem():
    """problem(t, s, block_q, block_kv, slots) → q, k, v, BlockIndex with rows of any count."""

    def make(t, s, block_q, block_kv, slots, *, b=2, n=3, h=8, dtype=jnp.float32, seed=0, spread=2):
        rng = np.random.default_rng(seed)  # numpy: no compilation
        q, k, v = (
            jnp.asarray(np.asarray(rng.standard_normal((b, size, n, h)) * spread, dtype))
            for size in (t, s, s)
        )
        rows, columns = num_blocks(t, block_q), num_blocks(s, block_kv)
        ids = np.argsort(rng.random((b, n, rows, columns)), axis=-1)[..., :slots]
        count = rng.integers(0, slots + 1, (b, n, rows))
        return q, k, v, BlockIndex(*(jnp.asarray(x, jnp.int32) for x in (ids, count)))

    return make


@pytest.fixture(scope="session")
def ops():
    """The public operations, compiled once per shape for the whole session."""
    return compiled(api)


@pytest.fixture(scope="session")
def truth():
    """The reference's operations; quick to compile, slow to run."""
    return compiled(reference, level=0)


@pytest.fixture
def pieces(monkeypatch):
    """The public operations, with even small problems cut into several tiles, chunks and steps."""
    for name, size in {
        "TILE_QUERIES": 24,
        "TILE_KEYS": 16,
        "TAIL_COLUMNS": 8,
        "DENSE_QUERIES": 7,
        "DENSE_KEYS": 9,
        "DENSE_SMALL": 0,
        "STATISTICS_BLOCKS": 2,
        "NORM_BLOCKS": 3,
    }.items():
        monkeypatch.setattr(xla, name, size)
    return compiled(api, level=0)


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
