"""The bench of any method, on a size too small to time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import compact_search
from pasa_jax.bench_methods import waves
from pasa_jax.cli import main
from pasa_jax.grid import TokenGrid
from pasa_jax.layer import Layer, attend_layer
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import AdaSpa, Compact, Pasa, SlidingTile

GRID = TokenGrid(2, 4, 8)
BLOCKS = dict(block_q=8, block_kv=8)
SEARCH = dict(criterion=compact_search.Criterion(tile=(1, 2, 2), reuse=9), progress=False)


def test_every_kind_of_call_has_a_row(tmp_path, capsys):
    out = tmp_path / "methods.json"
    words = ["pasa", "adaspa --step-base 1", "sliding_tile --density 0.5"]
    sizes = "--grid 2 4 8 --heads 2 --head-dim 16 --block 8 --repeats 1 --density 0.25".split()
    assert main(["bench", "methods", "--policies", *words, *sizes, "--output", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["grid"] == dict(frames=2, rows=4, columns=8, text=0)
    rows = {(row["method"], row["mode"]): row for row in written["rows"]}
    assert list(rows) == [
        ("dense", "dense"),
        ("pasa", "sparse"),
        ("adaspa --step-base 1", "search"),
        ("adaspa --step-base 1", "sparse"),
        ("adaspa --step-base 1", "refresh"),
        ("sliding_tile --density 0.5", "sparse"),
    ]
    assert rows["pasa", "sparse"]["density"] == 0.25  # two of eight blocks
    assert rows["dense", "dense"]["speedup"] == 1
    for (_, mode), row in rows.items():
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert (row["planning"] is None) == (mode in ("dense", "search"))
    shown = capsys.readouterr().out
    assert all(method in shown for method, _ in rows) and " %" in shown


def test_a_layer_at_density_one_is_dense():
    q, k, v = waves(GRID, 2, 16, "float32")
    layer = Layer.of(Pasa(density=1.0, **BLOCKS), GRID)
    out, record = attend_layer(layer, "sparse", layer.state(q, k, v), q, k, v)
    assert record.density == 1
    np.testing.assert_allclose(out, api.dense_attention(q, k, v), atol=2e-6)  # float32 sums


def test_a_layer_runs_the_average_sparse_step():
    curve = np.linspace(2, 1, 10)
    layer = Layer.of(Pasa(density=0.5, **BLOCKS), GRID, layers=3, steps=10, curve=curve)
    budgets = layer.policy.budgets(10, 8, curve)
    assert len(set(budgets[2:])) > 1  # the curve is read
    context = layer.context("sparse")
    assert context.budget == round(budgets[2:].mean()) and context.max_budget == budgets[2:].max()
    assert (context.step, context.layer) == (2, 1)  # behind the dense prefix and layer 0
    assert Layer.of(Pasa(density=0.25, budget="online", **BLOCKS), GRID).budget == 2


def test_a_layer_of_searched_masks(pipeline):
    """They know how many layers the model has, and refuse others."""
    masks = compact_search.search_masks(pipeline, ["blue and white waves moving left"], **SEARCH)[0]
    grid = masks.key.grid
    layer = Layer.of(Compact(masks=masks, block_q=4, block_kv=4), grid, steps=masks.key.steps)
    q, k, v = waves(grid, 2, 8, "float32")
    assert layer.layers == masks.shape[0] == 2 and layer.state(q, k, v) == ()
    _, record = attend_layer(layer, "sparse", (), q, k, v)
    assert 0 < record.density <= 1


def test_state_comes_from_a_search():
    q, k, v = waves(GRID, 2, 16, "float32")
    layer = Layer.of(AdaSpa(density=0.25, **BLOCKS), GRID)
    _, lse = api.dense_attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(layer.state(q, k, v).lse, lse, atol=1e-5)
    assert Layer.of(SlidingTile(**BLOCKS), GRID).state(q, k, v) == ()


def test_waves_vary_smoothly_over_the_video():
    q, k, _ = (
        x[0, : GRID.num_tokens, 0].reshape(2, 4, 8, -1) for x in waves(GRID, 1, 64, "float32")
    )
    near = jnp.sum(q[:, :, :-1] * k[:, :, 1:], -1).mean()
    far = jnp.sum(q[:, :, :4] * k[:, :, 4:], -1).mean()
    assert near > far + 1
    other = waves(TokenGrid(1, 2, 2, text=3), 1, 16, "bfloat16")
    assert all(x.shape == (1, 7, 1, 16) and x.dtype == jnp.bfloat16 for x in other)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), other)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "sora"], "shape='sora' must be one of wan1.3b-480p"),
        (["--heads", "0"], "heads=0 must be at least 1"),
        (["--head-dim", "0"], "head_dim=0 must be at least 1"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--dtype", "int8"], "dtype='int8' must be float32, bfloat16 or float16"),
        (["--output", "a.txt"], "must end in .json"),
        (["--policies", "pisar"], "nearest is 'pisa'"),
    ],
)
def test_bad_orders_are_told_in_a_line(arguments, message, capsys):
    assert main(["bench", "methods", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_names_of_benches_are_told(capsys):
    assert main(["bench", "method"]) == 2
    assert "attention, methods, recall; nearest is 'methods'" in capsys.readouterr().err
