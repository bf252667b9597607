"""Policies: fields, modes, budgets, plans, and the table of names."""

import ast
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pasa_jax
from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import (
    POLICIES,
    AttentionShape,
    Context,
    Dense,
    Pasa,
    Pisa,
    make_policy,
)

B, T, N, H, BLOCK = 2, 90, 3, 8, 8  # 12 blocks, the last of 2 tokens


def qkv(seed=0, dtype=jnp.float32):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal((B, T, N, H)), dtype) for _ in range(3)]


def context(budget=4, step=3, layer=1, max_budget=6):
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    return Context(jnp.int32(step), jnp.int32(layer), jnp.int32(budget), keys, max_budget)


compiled = jax.jit(
    lambda policy, q, k, v, where: policy.plan(q, k, v, where, ())[0], static_argnums=0
)


def plan(policy, *, dtype=jnp.float32, **where):
    assert policy.init_state(AttentionShape(4, B, N, H, TokenGrid(1, 1, T))) == ()
    return compiled(policy, *qkv(dtype=dtype), context(**where))


def small(policy_type, **fields):
    return policy_type(block_q=BLOCK, block_kv=BLOCK, **fields)


GRID = TokenGrid(4, 4, 8)  # 16 blocks of 8 tokens, and every tile of 8 divides it


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name):
    policy = make_policy(name, block_q=BLOCK, block_kv=BLOCK)
    twin = dataclasses.replace(policy)
    assert policy == twin and hash(policy) == hash(twin)
    modes, budgets = policy.modes(10), policy.budgets(10, 16)
    bound = policy.max_budget(10, 16)
    assert len(modes) == 10 and budgets.dtype == np.int32 and budgets.shape == (10,)
    for mode, budget in zip(modes, budgets, strict=True):
        assert budget == 16 if mode == "dense" else 1 <= budget <= bound
    order = policy.token_order(GRID)
    assert order is None or np.array_equal(np.sort(order), np.arange(128))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_its_modes_and_lists_distinct_blocks(name):
    policy = make_policy(name, block_q=BLOCK, block_kv=BLOCK, dense_layers=())
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, 128, N, H)), jnp.float32) for _ in range(3))
    shape = AttentionShape(1, B, N, H, GRID)
    state = jax.tree.map(lambda x: x[0], policy.init_state(shape))
    budgets, bound = policy.budgets(10, 16), policy.max_budget(10, 16)
    keys = jax.random.split(jax.random.key(0), 1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(mode, step, budget, state):
        where = Context(step, jnp.int32(1), budget, keys, bound, mode, GRID)
        if mode == "search":
            return policy.search(q, k, v, where, state)
        plan, state = policy.plan(q, k, v, where, state)
        return plan.blocks, state

    for step, mode in enumerate(policy.modes(10)):
        if mode == "dense":
            continue
        result, new = run(mode, jnp.int32(step), jnp.int32(budgets[step]), state)
        # One compilation a mode: the state keeps its shape.
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new
        if mode == "search":
            # Not bit for bit: with what a search keeps, XLA fuses the same float32 sums otherwise.
            np.testing.assert_allclose(result, api.dense_attention(q, k, v), atol=2e-6)
            continue
        assert result.ids.dtype == result.count.dtype == jnp.int32
        assert result.ids.shape[:3] == result.count.shape == (B, N, 16)
        api.check_lists(result, 16)
        assert int(result.count.min()) >= 1


@pytest.mark.parametrize(
    ("prefix", "steps", "dense"),
    [(0.2, 50, 10), (0.2, 2, 1), (0.2, 1, 1), (0.0, 5, 0), (1.0, 5, 5), (0.3, 50, 15)],
)
def test_dense_prefix_rounds_to_at_least_one_step(prefix, steps, dense):
    for policy in (Pisa(dense_prefix=prefix), Pasa(dense_prefix=prefix)):
        assert policy.modes(steps) == ("dense",) * dense + ("sparse",) * (steps - dense)
        assert (policy.budgets(steps, 1182)[:dense] == 1182).all()
        assert (policy.budgets(steps, 1182)[dense:] < 1182).all()


@pytest.mark.parametrize(
    ("density", "blocks", "kept"),
    # The papers' shapes, a product that floating point puts below 29, and at least one block.
    [
        (0.125, 1182, 147),
        (0.15, 512, 76),
        (0.15, 1861, 279),
        (0.29, 100, 29),
        (0.01, 9, 1),
        (1.0, 9, 9),
    ],
)
def test_pisa_keeps_the_floor_of_density_times_blocks(density, blocks, kept):
    policy = Pisa(density=density)
    assert policy.budgets(5, blocks).tolist() == [blocks] + [kept] * 4
    assert policy.max_budget(5, blocks) == kept
    assert policy.online_budget(blocks, np.linspace(1, 0, 6)) is None


def test_pasa_follows_the_curve_and_spends_the_total():
    curve = np.linspace(1, 2, 50)
    budgets = Pasa().budgets(50, 1182, curve)
    assert budgets[10:].sum() == 7092
    assert (np.diff(budgets[10:]) >= 0).all() and budgets[-1] > 1.3 * budgets[10]
    assert Pasa().max_budget(50, 1182, curve) == budgets[10:].max()
    assert (Pasa().budgets(50, 1182, curve.tolist()) == budgets).all()
    assert set(Pasa().budgets(50, 1182)[10:].tolist()) == {177, 178}


def test_pasa_bounds_reach_the_budget():
    policy = Pasa(density=0.5, min_density=0.4, max_density=0.6)
    budgets = policy.budgets(10, 100, np.arange(10.0))[2:]
    assert budgets.min() == 40 and budgets.max() == 60 and budgets.sum() == 400


def test_pasa_online_spends_the_same_total():
    policy = Pasa(budget="online")
    state = policy.online_budget(1182, np.linspace(1, 0, 51))
    assert int(state.remaining) == 7092
    assert policy.max_budget(50, 1182) == int(state.high) == int(3 * 0.15 * 1182)
    assert int(state.blocks()) == 1182  # the first step is dense
    assert Pasa().online_budget(1182, np.linspace(1, 0, 51)) is None
    assert Dense().online_budget(1182, np.linspace(1, 0, 51)) is None


def test_all_steps_dense_has_a_bound():
    for policy in (Pasa(dense_prefix=1.0), Pasa(dense_prefix=1.0, budget="online")):
        assert policy.max_budget(5, 77) == 77
        assert policy.modes(5) == ("dense",) * 5


@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_pasa_in_one_group_without_noise_is_pisa(noise):
    plain = {"route_bias": "none", "noise": noise, "noise_scale": 0.0}
    theirs, ours = plan(small(Pisa)), plan(small(Pasa, group=12, **plain))
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    for one, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()


def test_one_matrix_for_pisa_and_one_a_group_for_pasa():
    assert plan(small(Pisa)).tail.covariance.shape == (B, N, 1, H, H)
    tail = plan(small(Pasa, group=5, noise="none")).tail
    assert tail.group == 5 and tail.covariance.shape == (B, N, 3, H, H)


def covariances(k, v):
    """H_j [B, N, J, H, H] block by block in float64."""
    out = []
    for start in range(0, T, BLOCK):
        keys, values = (np.asarray(x, np.float64)[:, start : start + BLOCK] for x in (k, v))
        out.append(np.einsum("bsnh,bsnd->bnhd", keys - keys.mean(1, keepdims=True), values))
    return np.stack(out, 2)


@pytest.mark.parametrize(("policy", "span"), [("pisa", 12), ("pasa", 12), ("pasa", 4)])
def test_covariance_routing_is_the_logit_plus_the_log_norm(policy, span):
    q, k, v = qkv()
    fields = {"noise": "none", "group": 4} if policy == "pasa" else {}
    bias = "group" if span == 4 else "global"
    blocks = plan(small(POLICIES[policy], route_bias=bias, **fields)).blocks
    matrix = covariances(k, v)
    length = np.minimum(BLOCK, T - BLOCK * np.arange(12))
    for start in range(0, 12, span):
        group = slice(start, start + span)
        share = length[group] / length[group].sum()
        total = matrix[:, :, group].sum(2, keepdims=True)
        matrix[:, :, group] -= share[:, None, None] * total
    norm = np.sqrt((matrix**2).sum((-1, -2)))
    mean_q, mean_k = (
        np.stack(
            [np.asarray(x, np.float64)[:, a : a + BLOCK].mean(1) for a in range(0, T, BLOCK)], 2
        )
        for x in (q, k)
    )
    score = np.einsum("bnih,bnjh->bnij", mean_q, mean_k) * H**-0.5
    score += np.log(norm + 1e-5)[:, :, None]
    want = np.argsort(-score, axis=-1, kind="stable")[..., :6]
    # One near tie in float32 may turn; a wrong term changes most rows.
    assert (np.asarray(blocks.ids) == want).all(-1).mean() > 0.97


@pytest.mark.parametrize(("sink", "block"), [("first", 0), ("last", 11)])
def test_sink_is_always_exact_and_counts(sink, block):
    blocks = plan(small(Pisa, sink=sink)).blocks
    assert (np.asarray(blocks.ids)[..., 0] == block).all()
    assert (np.asarray(blocks.count) == 4).all()
    if sink == "last":
        blocks = plan(small(Pasa, sink=sink, noise_scale=20.0)).blocks
        assert (np.asarray(blocks.ids)[..., 0] == block).all()


def test_noise_reaches_the_plan_by_step_and_layer():
    policy = small(Pasa)
    first = plan(policy).blocks.ids
    assert (plan(policy).blocks.ids == first).all()
    assert (plan(policy, step=4).blocks.ids != first).any()
    assert (plan(policy, layer=2).blocks.ids != first).any()
    # B = 2 branches of one prompt: on equal input they select alike.
    q, k, v = (x.at[1].set(x[0]) for x in qkv())
    ids = compiled(policy, q, k, v, context()).blocks.ids
    assert (ids[0] == ids[1]).all()


def test_bfloat16_is_routed_by_float32_means():
    blocks = plan(small(Pisa), dtype=jnp.bfloat16)
    assert blocks.tail.key_mean.dtype == jnp.float32


def test_five_lines_in_a_pipeline():
    (q, k, v), num_steps, num_blocks, step, layer = qkv(), 10, 12, 4, jnp.int32(2)
    curve, keys = np.linspace(1, 2, 10), jax.vmap(jax.random.key)(jnp.arange(1))

    policy = Pasa(density=0.3, block_q=BLOCK, block_kv=BLOCK)
    budgets = jnp.asarray(policy.budgets(num_steps, num_blocks, curve))
    bound = policy.max_budget(num_steps, num_blocks, curve)
    run = Attention(policy, "sparse", jnp.int32(step), budgets[step], keys, bound)
    out, _ = attend(q, k, v, run, layer=layer)

    assert out.shape == q.shape and bool(jnp.isfinite(out).all())


def test_make_policy_sets_parameters():
    assert make_policy("pasa", density=0.3, noise="none") == Pasa(density=0.3, noise="none")


NAMES = ", ".join(POLICIES)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pissa", {}, f"policy='pissa' must be one of {NAMES}; nearest is 'pisa'"),
        ("PASA", {}, f"policy='PASA' must be one of {NAMES}; nearest is 'pasa'"),
        ("zzz", {}, f"policy='zzz' must be one of {NAMES}$"),
        ("pisa", {"densty": 0.1}, "pisa parameter 'densty' must be one of .*nearest is 'density'"),
    ],
)
def test_make_policy_refuses(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name, **parameters)


SHARED = [
    ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
    ({"density": 1.01}, r"density=1.01 must be in \(0, 1\]"),
    ({"density": float("nan")}, r"density=nan must be in \(0, 1\]"),
    ({"dense_prefix": -0.1}, r"dense_prefix=-0.1 must be in \[0, 1\]"),
    ({"dense_prefix": 1.5}, r"dense_prefix=1.5 must be in \[0, 1\]"),
    ({"dense_layers": (-1,)}, r"dense_layers=\(-1,\) must be a tuple of layer indices"),
    ({"dense_layers": [0]}, r"dense_layers=\[0\] must be a tuple of layer indices"),
    ({"block_q": 0}, "block_q=0 must be at least 1 token"),
    ({"block_kv": -8}, "block_kv=-8 must be at least 1 token"),
    ({"order": 2}, r"order=2 must be one of \(0, 1\)"),
    ({"route_bias": "both"}, r"route_bias='both' must be one of \('none', 'global'"),
    ({"sink": "text"}, r"sink='text' must be one of \(None, 'first', 'last'\)"),
    ({"epsilon": 0.0}, "epsilon=0.0 must be positive and finite"),
]
PASA_ONLY = [
    ({"group": 0}, "group=0 must be at least 1 block"),
    ({"noise": "pink"}, "noise='pink' must be one of"),
    ({"noise_scale": -1.0}, "noise_scale=-1.0 must be 0 or more and finite"),
    ({"budget": "fixed"}, r"budget='fixed' must be one of \('curve', 'online'\)"),
    ({"max_density": 0.0}, r"max_density=0.0 must be in \(0, 1\]"),
    ({"min_density": -0.1}, "min_density=-0.1 must be from 0 to max_density=1.0"),
    ({"min_density": 0.5, "max_density": 0.4}, "min_density=0.5 must be from 0 to max_density=0.4"),
]


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [("pisa", *case) for case in SHARED] + [("pasa", *case) for case in SHARED + PASA_ONLY],
)
def test_bad_fields_are_refused(policy, fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        make_policy(policy, **fields)


def test_pisa_has_no_group_to_centre_by(untyped):
    with pytest.raises(ValueError, match="route_bias='group' must be one of"):
        Pisa(route_bias="group")


@pytest.mark.parametrize("curve", [np.ones(4), np.full(5, np.nan), -np.ones(5)])
def test_bad_curves_are_refused(curve):
    with pytest.raises(ValueError, match="curve=.* must be num_steps=5 finite numbers, 0 or more"):
        Pasa().budgets(5, 10, curve)


def test_online_has_no_budgets_ahead_of_the_run():
    with pytest.raises(ValueError, match="budget='online' is known step by step only"):
        Pasa(budget="online").budgets(5, 10)


@pytest.mark.parametrize("policy", [Dense(), Pisa(), Pasa()])
def test_no_steps_are_refused(policy):
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        policy.modes(0)


def test_every_field_is_read():
    read = set()
    for path in Path(pasa_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    fields = {field.name for policy in POLICIES.values() for field in dataclasses.fields(policy)}
    # block_q, block_kv and dense_layers are also looked up by name.
    assert fields <= read
