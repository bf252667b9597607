"""The door: dense steps and layers bit for bit, budgets as data, and what the plans compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Context, Dense, Pasa, Pisa, Policy, Rectification

B, T, N, H, BLOCK = 2, 90, 3, 8, 8  # 12 blocks, the last of 2 tokens
BLOCKS = -(-T // BLOCK)
PISA = Pisa(block_q=BLOCK, block_kv=BLOCK, dense_layers=(0, 2))
PASA = Pasa(block_q=BLOCK, block_kv=BLOCK, group=4, dense_layers=())
QUIET = dataclasses.replace(PASA, noise="none")


def qkv(tokens=T, seed=0):
    generator = np.random.default_rng(seed)
    return [
        jnp.asarray(generator.standard_normal((B, tokens, N, H)), jnp.float32) for _ in range(3)
    ]


def run(policy, *, mode="sparse", step=3, budget=4, max_budget=BLOCKS, seed=0):
    keys = jax.vmap(jax.random.key)(jnp.arange(seed, seed + 1))
    return Attention(policy, mode, jnp.int32(step), jnp.int32(budget), keys, max_budget)


@jax.jit
def attended(q, k, v, attention, layer):
    return attend(q, k, v, attention, layer=layer)[0]


dense = jax.jit(api.dense_attention)


@pytest.mark.parametrize("attention", [None, run(PASA, mode="dense"), run(Dense(), mode="dense")])
def test_dense_steps_are_dense_attention_bit_for_bit(attention):
    q, k, v = qkv()
    assert (attended(q, k, v, attention, jnp.int32(5)) == dense(q, k, v)).all()


def test_dense_layers_are_dense_attention_bit_for_bit_in_a_scan():
    q, k, v = qkv()

    @jax.jit
    def layers(q, k, v, attention):
        def layer(carry, index):
            return carry, attend(q, k, v, attention, layer=index)[0]

        return jax.lax.scan(layer, 0, jnp.arange(4, dtype=jnp.int32))[1]

    out = layers(q, k, v, run(PISA))
    exact = np.asarray(dense(q, k, v))
    for index in (0, 2):
        assert (np.asarray(out[index]) == exact).all()
    for index in (1, 3):
        assert np.abs(np.asarray(out[index]) - exact).max() > 1e-3
    # A fixed selection does not depend on the layer, and the scan changes nothing.
    assert (out[1] == out[3]).all()


def test_dense_attention_has_gradients():
    q, k, v = qkv()

    def loss(q, attention):
        return (attend(q, k, v, attention, layer=jnp.int32(1))[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    ours, plain = gradient(q, run(PASA, mode="dense")), gradient(q, None)
    assert (ours == plain).all() and float(jnp.abs(plain).max()) > 0


def test_budget_step_layer_and_seed_are_data():
    q, k, v = qkv()
    traces = []

    @jax.jit
    def traced(attention, layer):
        traces.append(None)
        return attend(q, k, v, attention, layer=layer)[0]

    outputs = [
        traced(run(PASA, step=step, budget=budget, seed=seed), jnp.int32(layer))
        for step, budget, seed, layer in [
            (3, 4, 0, 1),
            (4, 4, 0, 1),
            (3, 5, 0, 1),
            (3, 4, 1, 1),
            (3, 4, 0, 2),
        ]
    ]
    assert len(traces) == 1
    for index, one in enumerate(outputs):
        assert all((one != other).any() for other in outputs[index + 1 :])
    assert (traced(run(PASA), jnp.int32(1)) == outputs[0]).all()


@pytest.mark.parametrize("budget", [1, 5])
def test_lists_longer_than_the_budget_change_nothing(budget):
    q, k, v = qkv()
    long = attended(q, k, v, run(QUIET, budget=budget), jnp.int32(1))
    short = attended(q, k, v, run(QUIET, budget=budget, max_budget=budget), jnp.int32(1))
    # The same blocks in the same order; a longer list may sum in other chunks.
    np.testing.assert_allclose(long, short, atol=2e-6)


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [
        (PISA, 23),
        (PISA, T),
        (QUIET, 5),
        (QUIET, T),
        (PASA, T),
        (Dense(block_q=BLOCK, block_kv=BLOCK), T),
    ],
)
def test_all_blocks_selected_is_dense_attention(policy, tokens):
    q, k, v = qkv(tokens)
    blocks = -(-tokens // BLOCK)
    out = attended(q, k, v, run(policy, budget=blocks, max_budget=blocks), jnp.int32(1))
    # float32 sums of 90 terms in another order.
    np.testing.assert_allclose(out, dense(q, k, v), atol=2e-6)


@pytest.mark.parametrize("order", [0, 1])
def test_constant_values_give_that_constant(order):
    q, k, _ = qkv()
    policy = dataclasses.replace(QUIET, order=order)
    out = attended(q, k, jnp.full_like(q, 1.5), run(policy, budget=2), jnp.int32(1))
    np.testing.assert_allclose(out, 1.5, atol=1e-5)  # float32: weights of 90 keys sum to one


@pytest.mark.parametrize("policy", [PISA, PASA])
def test_keys_constant_in_blocks_are_exact_for_any_selection(policy):
    q, k, v = qkv()
    k = jnp.repeat(k[:, ::BLOCK], BLOCK, axis=1)[:, :T]
    out = attended(q, k, v, run(policy, budget=2), jnp.int32(1))
    np.testing.assert_allclose(out, dense(q, k, v), atol=1e-5)  # float32, H_j rounds to 1e-7


def test_more_blocks_and_higher_orders_come_nearer_to_dense():
    q, k, v = qkv()
    exact = dense(q, k, v)

    def error(budget, **fields):
        policy = dataclasses.replace(QUIET, **fields)
        return float(
            jnp.linalg.norm(attended(q, k, v, run(policy, budget=budget), jnp.int32(1)) - exact)
        )

    errors = [error(budget) for budget in (1, 4, 8, 11)]
    assert errors == sorted(errors, reverse=True)
    assert error(4, group=1) < error(4, order=0)


def test_nan_in_a_query_reaches_its_own_row_only():
    q, k, v = qkv()
    bad = q.at[1, 37, 2, 3].set(jnp.nan)
    for policy in (PISA, PASA):
        clean, out = (np.asarray(attended(x, k, v, run(policy), jnp.int32(1))) for x in (q, bad))
        broken = np.isnan(out)
        assert broken[1, 37, 2].all() and broken.sum() == H
        same = np.ones_like(broken)
        same[1, 32:40, 2] = False  # its block is routed anew
        assert (out[same] == clean[same]).all()


def test_nan_in_another_prompt_or_head_does_not_spread():
    q, k, v = qkv()
    clean = np.asarray(attended(q, k, v, run(PASA), jnp.int32(1)))
    for bad in ((q, k.at[1, 20, 2].set(jnp.nan), v), (q, k, v.at[1, 20, 2].set(jnp.nan))):
        out = np.asarray(attended(*bad, run(PASA), jnp.int32(1)))
        keep = np.ones(out.shape, bool)
        keep[1, :, 2] = False
        assert (out[keep] == clean[keep]).all()


def test_state_passes_through():
    q, k, v = qkv()
    state = {"count": jnp.int32(7)}
    for attention in (None, run(PISA), run(PASA, mode="dense")):
        assert attend(q, k, v, attention, layer=jnp.int32(1), state=state)[1].state == state


@pytest.mark.parametrize(
    "keys", [jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)]
)
def test_keys_of_another_kind_are_refused(keys):
    q, k, v = qkv()
    attention = dataclasses.replace(run(PASA), keys=keys)
    with pytest.raises(ValueError, match="keys=.* must be typed random keys"):
        attend(q, k, v, attention, layer=jnp.int32(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(Policy):
    """Lists every block, and adds what a test asks for to the plan."""

    extra: str = ""

    def plan(self, q, k, v, context, state):
        plan, state = Dense(block_q=BLOCK, block_kv=BLOCK).plan(q, k, v, context, state)
        b, t, n, h = q.shape
        if self.extra == "rectified":
            share = jnp.arange(b * n * BLOCKS, dtype=jnp.float32).reshape(b, n, BLOCKS)
            plan = plan._replace(rectification=Rectification(share, jnp.ones((b, n, BLOCKS, h))))
        if self.extra == "half":  # the first six blocks, in an order that puts odd tokens first
            count = jnp.full_like(plan.blocks.count, 6)
            plan = plan._replace(blocks=plan.blocks._replace(count=count))
            plan = plan._replace(head_order=jnp.broadcast_to(ODD_FIRST[None, None], (1, n, t)))
        if self.extra == "length":
            assert context.kv_length is not None and q.shape[1] == context.grid.num_tokens
        return plan, state


ODD_FIRST = jnp.concatenate([jnp.arange(1, T, 2), jnp.arange(0, T, 2)]).astype(jnp.int32)


def planned(extra):
    return run(Planned(extra=extra, block_q=BLOCK, block_kv=BLOCK, dense_layers=()))


def test_a_rectification_scales_and_shifts_whole_query_blocks():
    q, k, v = qkv()
    out, _ = attend(q, k, v, planned("rectified"), layer=jnp.int32(1))
    share = np.arange(B * N * BLOCKS).reshape(B, N, BLOCKS)[..., np.arange(T) // BLOCK]
    want = np.asarray(dense(q, k, v)) * np.moveaxis(share, 1, 2)[..., None] + 1
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)  # shares up to 71


def test_a_head_order_decides_which_tokens_make_a_block():
    q, k, v = qkv()
    out, record = attend(q, k, v, planned("half"), layer=jnp.int32(1))
    # Six blocks of eight hold the 45 odd tokens and tokens 0, 2, 4.
    seen = np.concatenate([np.arange(1, T, 2), [0, 2, 4]])
    np.testing.assert_allclose(out, dense(q, k[:, seen], v[:, seen]), atol=2e-6)
    assert float(record.density) == 0.5


def test_text_queries_are_dense_and_the_plan_sees_the_video_alone():
    q, k, v = qkv()
    grid, length = TokenGrid(2, 5, 8, text=10), jnp.asarray([87, T], jnp.int32)
    where = dict(layer=jnp.int32(1), grid=grid, kv_length=length)
    out, _ = attend(q, k, v, planned("length"), **where)
    exact = api.dense_attention(q, k, v, kv_length=length)
    np.testing.assert_allclose(out, exact, atol=2e-6)
    sparse, _ = attend(q, k, v, run(QUIET, budget=3), **where)
    np.testing.assert_allclose(sparse[:, 80:], exact[:, 80:], atol=2e-6)
    assert float(jnp.abs(sparse[:, :80] - exact[:, :80]).max()) > 1e-2


def test_text_keys_are_always_exact():
    q, k, v = qkv()
    grid = TokenGrid(2, 5, 8, text=10)  # blocks 10 and 11 hold text
    policy = dataclasses.replace(QUIET, order=0)
    where = Context(jnp.int32(3), jnp.int32(1), jnp.int32(3), run(QUIET).keys, 5, grid=grid)
    plan, _ = policy.plan(q[:, :80], k, v, where, ())
    first = np.sort(np.asarray(plan.blocks.ids)[..., :3])
    assert ((first == 10) | (first == 11)).sum(-1).min() == 2


def test_the_record_tells_the_real_density():
    q, k, v = qkv()
    assert float(attend(q, k, v, None, layer=jnp.int32(0))[1].density) == 1
    sparse = attend(q, k, v, run(PISA, budget=3), layer=jnp.int32(1))[1]
    assert float(sparse.density) == 3 / BLOCKS
    assert float(attend(q, k, v, run(PISA, budget=3), layer=jnp.int32(0))[1].density) == 1


def test_a_grid_of_other_tokens_is_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="grid=.* must have the 90 tokens of q"):
        attend(q, k, v, None, layer=jnp.int32(0), grid=TokenGrid(1, 9, 9))


def test_a_policy_that_needs_the_grid_says_so():
    where = Context(jnp.int32(0), jnp.int32(0), jnp.int32(1), run(PISA).keys, 1)
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: Pisa works on"):
        where.need_grid(PISA)


def test_a_policy_without_plan_or_search_says_so():
    where = Context(jnp.int32(0), jnp.int32(0), jnp.int32(1), run(PISA).keys, 1)
    for method in ("plan", "search"):
        with pytest.raises(NotImplementedError, match=f"Policy has no {method}"):
            getattr(Policy(), method)(*qkv(), where, ())
