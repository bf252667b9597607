"""Routing: scores, ties, forced and empty blocks, the noise and its randomness, NaN."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import routing
from pasa_jax.routing import Noise

B, N, I, J, H, L = 2, 3, 7, 29, 8, 6
GUMBEL = Noise("gumbel", 0.2)
LOUD = Noise("gaussian", 50.0)


def means(seed=0, batch=B, heads=N, rows=I, columns=J):
    generator = np.random.default_rng(seed)
    query = generator.standard_normal((batch, heads, rows, H))
    key = generator.standard_normal((batch, heads, columns, H))
    return jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)


def full(batch=B, columns=J):
    return jnp.full((batch, columns), 64, jnp.int32)


def keys(prompts=B, step=3, layer=1, seed=0):
    base = jax.vmap(jax.random.key)(jnp.arange(seed, seed + prompts))
    return routing.call_keys(base, jnp.int32(step), jnp.int32(layer))


compiled = jax.jit(routing.select_blocks, static_argnames=("max_budget", "noise", "scale"))


def select(query, key, length=None, *, bias=None, forced=None, budget=L, max_budget=L, **options):
    """`select_blocks`, with operands of one structure, so that it compiles seldom."""
    batch, heads, columns, _ = key.shape
    length = full(batch, columns) if length is None else length
    bias = jnp.zeros((batch, heads, columns)) if bias is None else bias
    forced = jnp.zeros((batch, columns), bool) if forced is None else forced
    operands = {"bias": bias, "forced": forced, "budget": jnp.int32(budget)}
    return compiled(query, key, length, max_budget=max_budget, **operands, **options)


def chosen(blocks, columns=J):
    """The selected blocks as bool [B, N, I, J]; asserts that none is listed twice."""
    live = np.arange(blocks.ids.shape[-1]) < np.asarray(blocks.count)[..., None]
    hot = (np.asarray(blocks.ids)[..., None] == np.arange(columns)) & live[..., None]
    assert hot.sum(-2).max() <= 1
    return hot.any(-2)


def test_block_mean_divides_by_the_true_length():
    x = np.random.default_rng(0).standard_normal((2, 11, 3, 5)).astype(np.float32)
    out = routing.block_mean(jnp.asarray(x), 4)
    want = np.stack([x[:, a : a + 4].mean(1) for a in (0, 4, 8)], 2)
    assert out.shape == (2, 3, 3, 5)
    np.testing.assert_allclose(out, want, atol=1e-6)  # float32 sums of 4


def test_block_mean_of_bfloat16_sums_in_float32():
    x = jnp.full((1, 512, 1, 1), 1.0, jnp.bfloat16).at[0, 0, 0, 0].set(256.0)
    out = routing.block_mean(x, 512)
    assert out.dtype == jnp.float32 and out.item() == 767 / 512  # bfloat16 would stop at 256


@pytest.mark.parametrize("with_bias", [False, True])
def test_selection_is_the_stable_sort_of_the_scores(with_bias):
    query, key = means()
    bias = jnp.asarray(np.random.default_rng(5).standard_normal((B, N, J)), jnp.float32)
    blocks = select(query, key, bias=bias if with_bias else None)
    score = np.einsum("bnih,bnjh->bnij", *(np.asarray(x, np.float64) for x in (query, key)))
    score = score * H**-0.5 + with_bias * np.asarray(bias, np.float64)[:, :, None]
    want = np.argsort(-score, axis=-1, kind="stable")[..., :L]
    assert (np.asarray(blocks.ids) == want).all()
    assert (np.asarray(blocks.count) == L).all()


def test_scale_weighs_the_logit_against_the_bias():
    query, key = jnp.ones((1, 1, 1, H)), jnp.zeros((1, 1, 2, H)).at[0, 0, 0].set(1.0)
    bias = jnp.asarray([[[0.0, 1.0]]])
    for scale, first in ((1.0, 0), (0.01, 1)):
        blocks = select(query, key, bias=bias, scale=scale, budget=1)
        assert blocks.ids[0, 0, 0, 0] == first


def test_ties_go_to_the_lower_block():
    _, key = means()
    blocks = select(jnp.zeros((B, N, I, H)), key)
    assert (np.asarray(blocks.ids) == np.arange(L)).all()
    pairs = jnp.repeat(jnp.arange(15.0), 2)[:J].reshape(1, 1, J)
    blocks = select(jnp.zeros((1, 1, 1, H)), key[:1, :1], bias=pairs)
    assert blocks.ids[0, 0, 0].tolist() == [28, 26, 27, 24, 25, 22]


def test_budget_step_and_layer_are_data():
    select(*means(), noise=GUMBEL, keys=keys())
    before = compiled._cache_size()
    for budget in range(1, L + 1):
        noisy = {"noise": GUMBEL, "keys": keys(step=budget, layer=7)}
        blocks = select(*means(), budget=budget, **noisy)
        assert (np.asarray(blocks.count) == budget).all()
    assert compiled._cache_size() == before
    # The last budget is L. With lists of 2 only, the sets are the same as with lists of L.
    short = select(*means(), budget=2, max_budget=2, **noisy)
    assert (chosen(short) == chosen(select(*means(), budget=2, **noisy))).all()


@pytest.mark.parametrize("kind", ["gumbel", "gaussian", "uniform"])
def test_noise_of_scale_zero_changes_nothing(kind):
    plain = select(*means())
    assert (select(*means(), noise=Noise(kind, 0.0), keys=keys()).ids == plain.ids).all()
    assert (select(*means(), noise=Noise("none", 1.0)).ids == plain.ids).all()


@pytest.mark.parametrize("kind", ["gumbel", "gaussian", "uniform"])
def test_noise_is_keyed_by_seed_step_and_layer(kind):
    noise = Noise(kind, 0.2)
    first = select(*means(), noise=noise, keys=keys())
    assert (select(*means(), noise=noise, keys=keys()).ids == first.ids).all()
    for other in (keys(step=4), keys(layer=2), keys(seed=7)):
        blocks = select(*means(), noise=noise, keys=other)
        assert (chosen(blocks) != chosen(first)).any()
        assert (chosen(blocks).sum(-1) == L).all()
    # Step and layer are not interchangeable.
    swapped = select(*means(), noise=noise, keys=keys(step=1, layer=3))
    assert (chosen(swapped) != chosen(first)).any()


def test_heads_rows_and_prompts_draw_apart():
    flat = jnp.zeros((B, N, I, H))
    bias = jnp.broadcast_to(jnp.linspace(0, 1, J), (B, N, J))
    hot = chosen(select(flat, means()[1], bias=bias, noise=LOUD, keys=keys()))
    rows = hot.reshape(-1, J)
    assert len(np.unique(rows, axis=0)) > 0.9 * len(rows)


def test_guidance_branches_share_a_draw_and_prompts_do_not():
    query, key = means(batch=2)
    both = [jnp.concatenate([x, x]) for x in (query, key)]  # branch-major: prompts, then prompts
    ids = select(*both, noise=GUMBEL, keys=keys(2)).ids
    assert (ids[:2] == ids[2:]).all()
    same = [jnp.concatenate([x[:1], x[:1]]) for x in (query, key)]  # one prompt twice: two seeds
    ids = select(*same, noise=GUMBEL, keys=keys(2)).ids
    assert (ids[0] != ids[1]).any()


def test_a_prompt_does_not_depend_on_its_batch():
    query, key = means()
    alone = select(query[1:], key[1:], noise=GUMBEL, keys=keys(1, seed=1))
    assert (select(query, key, noise=GUMBEL, keys=keys(2)).ids[1:] == alone.ids).all()


@pytest.mark.parametrize("kind", ["gumbel", "gaussian", "uniform"])
def test_draws_have_unit_variance(kind):
    draw = routing._draw(kind, keys(1), jnp.int32(0), (200, 500))
    # 1e5 draws: the variance of a unit-variance law of kurtosis ≤ 5.4 is off by 0.007 (1 sigma).
    assert abs(float(draw.var()) - 1) < 0.03


def test_noise_is_relative_to_the_spread_of_the_row():
    query, key = means()
    first = select(query, key, noise=GUMBEL, keys=keys())
    # Doubling is exact in floating point, and so doubles the noise with the scores.
    assert (select(query * 2, key, noise=GUMBEL, keys=keys()).ids == first.ids).all()


def test_forced_and_empty_blocks_do_not_enter_the_spread():
    query, key = means()
    length = full().at[:, 20:].set(0)
    forced = routing.forced_blocks(length, "first")
    first = select(query, key, length, forced=forced, noise=GUMBEL, keys=keys())
    louder = key.at[:, :, 0].mul(1e4).at[:, :, 20:].mul(1e4)
    again = select(query, louder, length, forced=forced, noise=GUMBEL, keys=keys())
    assert (again.ids == first.ids).all()


def test_churn_at_the_default_noise():
    # 32 rows of 1182 normal logits; the specification's simulation gives 17 ± 3 % between steps.
    columns, budget = 1182, 177
    bias = np.random.default_rng(1).standard_normal((1, 4, columns))
    sets = [
        chosen(
            select(
                jnp.zeros((1, 4, 8, H)),
                jnp.zeros((1, 4, columns, H)),
                budget=budget,
                max_budget=budget,
                bias=jnp.asarray(bias, jnp.float32),
                noise=GUMBEL,
                keys=keys(1, step=step),
            ),
            columns,
        )
        for step in (1, 2)
    ]
    changed = 1 - (sets[0] & sets[1]).sum() / sets[0].sum()
    assert abs(changed - 0.17) < 0.03


def test_gumbel_noise_of_temperature_one_samples_by_softmax():
    rows, logits = 20_000, np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    scale = np.pi / (6**0.5 * logits.std())
    blocks = select(
        jnp.zeros((1, 1, rows, H)),
        jnp.zeros((1, 1, 6, H)),
        budget=1,
        max_budget=1,
        bias=jnp.asarray(logits, jnp.float32).reshape(1, 1, 6),
        noise=Noise("gumbel", float(scale)),
        keys=keys(1),
    )
    seen = np.bincount(np.asarray(blocks.ids).ravel(), minlength=6)
    want = rows * np.exp(logits) / np.exp(logits).sum()
    # Chi-square with 5 degrees of freedom: above 20.5 once in a thousand; the seed is fixed.
    assert ((seen - want) ** 2 / want).sum() < 20.5


@pytest.mark.parametrize(("sink", "index"), [("first", 0), ("last", 16)])
def test_forced_blocks_survive_any_noise_and_use_up_budget(sink, index):
    length = full().at[:, 17:].set(0)
    forced = routing.forced_blocks(length, sink)
    hot = chosen(select(*means(), length, forced=forced, noise=LOUD, keys=keys()))
    assert hot[..., index].all()
    assert (hot.sum(-1) == L).all()
    assert routing.forced_blocks(length, None).sum() == 0


def test_forced_blocks_alone_when_the_budget_is_one():
    query, key = means()
    blocks = select(query, key, forced=routing.forced_blocks(full(), "last"), budget=1)
    assert (np.asarray(blocks.ids)[..., 0] == J - 1).all()


def test_empty_blocks_are_never_selected():
    length = jnp.asarray([[64] * 3 + [5] + [0] * (J - 4), [64] * J], jnp.int32)
    query, key = means()
    blocks = select(query, key.at[0, :, 4:].set(1e6), length, noise=GUMBEL, keys=keys())
    assert (np.asarray(blocks.count)[0] == 4).all() and (np.asarray(blocks.count)[1] == L).all()
    assert chosen(blocks)[0, ..., :4].all()
    assert (np.asarray(select(query, key, length * 0).count) == 0).all()


def test_lists_are_no_longer_than_the_blocks():
    blocks = select(*means(), budget=100, max_budget=100)
    assert blocks.ids.shape[-1] == J and (np.asarray(blocks.count) == J).all()


def test_one_head_at_a_time_gives_the_same(monkeypatch):
    at_once = select(*means(), noise=GUMBEL, keys=keys())
    monkeypatch.setattr(routing, "_MAX_SCORES", 0)
    mapped = routing.select_blocks(
        *means(), full(), budget=jnp.int32(L), max_budget=L, noise=GUMBEL, keys=keys()
    )
    assert (mapped.ids == at_once.ids).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_query_block_gets_the_first_live_blocks_and_spoils_no_other(bad):
    query, key = means()
    length = full().at[:, 0].set(0)
    clean = select(query, key, length, noise=GUMBEL, keys=keys())
    blocks = select(query.at[1, 2, 3].set(bad), key, length, noise=GUMBEL, keys=keys())
    rest = np.ones((B, N, I), bool)
    rest[1, 2, 3] = False
    assert (np.asarray(blocks.ids)[rest] == np.asarray(clean.ids)[rest]).all()
    assert blocks.ids[1, 2, 3].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_bad_key_block_ranks_last_and_spoils_no_other():
    query, key = means()
    length = full().at[:, 10].set(0)
    clean = select(query, key, length, max_budget=J, budget=J)
    blocks = select(query, key.at[0, 1, 5].set(np.nan), length, max_budget=J, budget=J)
    rows = np.asarray(clean.ids)[0, 1]
    kept = np.stack([row[(row != 5) & (row != 10)] for row in rows])
    assert (np.asarray(blocks.ids)[0, 1, :, : J - 2] == kept).all()
    assert (np.asarray(blocks.ids)[0, 1, :, J - 2] == 5).all()  # after the live, before the empty
    assert (np.asarray(blocks.ids)[1] == np.asarray(clean.ids)[1]).all()
    assert (np.asarray(blocks.ids)[0, [0, 2]] == np.asarray(clean.ids)[0, [0, 2]]).all()
    noisy = select(query, key.at[0, 1, 5].set(np.nan), length, noise=GUMBEL, keys=keys())
    clean = select(query, key.at[0, 1, 5].set(0), length.at[:, 5].set(0), noise=GUMBEL, keys=keys())
    assert (noisy.ids[0, 1] == clean.ids[0, 1]).all()  # the spread does not see it either


def test_a_bad_bias_counts_as_none():
    query, key = means()
    bias = jnp.zeros((B, N, J)).at[0, 0, 3].set(np.nan)
    assert (select(query, key, bias=bias).ids == select(query, key).ids).all()


def test_draws_do_not_depend_on_the_mesh():
    assert jax.config.jax_threefry_partitionable
    code = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from pasa_jax import routing
assert len(jax.devices()) == 8
query = jax.random.normal(jax.random.key(0), (1, 8, 16, 8))
key = jax.random.normal(jax.random.key(1), (1, 8, 24, 8))
def run(query, key):
    return routing.select_blocks(
        query, key, jnp.full((1, 24), 64), budget=jnp.int32(6), max_budget=6,
        noise=routing.Noise("gumbel", 0.5), keys=jax.vmap(jax.random.key)(jnp.arange(1)))
one = jax.jit(run)(query, key)
mesh = Mesh(np.array(jax.devices()), ("heads",))
for spec in (P(None, "heads"), P(None, None, "heads")):
    sharding = NamedSharding(mesh, spec)
    eight = jax.jit(run, in_shardings=sharding)(query, key)
    assert (np.asarray(one.ids) == np.asarray(eight.ids)).all(), spec
"""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_budget": 0}, "max_budget=0 must be at least 1"),
        ({"noise": GUMBEL}, "noise='gumbel' needs keys"),
        ({"noise": GUMBEL, "keys": keys(3)}, "batch=2 must be a multiple of the prompts, 3"),
    ],
)
def test_select_blocks_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        select(*means(), **options)


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        ("pink", 0.2, r"noise='pink' must be one of \('none', 'gumbel'"),
        ("gumbel", -0.1, "noise_scale=-0.1 must be 0 or more and finite"),
        ("gumbel", float("nan"), "noise_scale=nan must be 0 or more and finite"),
        ("gumbel", float("inf"), "noise_scale=inf must be 0 or more and finite"),
    ],
)
def test_noise_refuses(kind, scale, message, untyped):
    with pytest.raises(ValueError, match=message):
        Noise(kind, scale)


def test_masks_become_lists_in_rising_order():
    mask = np.random.default_rng(0).random((2, 3, 5, 9)) < 0.4
    blocks = routing.listed_blocks(jnp.asarray(mask), 9)
    count = mask.sum(-1)
    assert (np.asarray(blocks.count) == count).all() and count.max() > 4
    for at in np.ndindex(count.shape):
        assert blocks.ids[at][: count[at]].tolist() == np.flatnonzero(mask[at]).tolist()
    short = routing.listed_blocks(jnp.asarray(mask), 3)
    assert short.ids.shape[-1] == 3 and (np.asarray(short.count) == np.minimum(count, 3)).all()
