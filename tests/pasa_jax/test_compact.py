"""Compact Attention: windows, masks and their file, lists, and what attention comes of them."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.attention import Attention, attend
from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid, tile_order
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import AttentionShape, Compact, CompactMasks, Context
from pasa_jax.policies import compact as module

B, N, H, TEXT = 2, 3, 8, 7
GRID = TokenGrid(3, 6, 8)
TILE, TILES, BLOCK = (1, 2, 2), (3, 3, 4), 4
LAYERS, STEPS, FIRST, REUSE = 2, 10, 3, 4  # buckets of steps 3-6 and 7-9
KEY = CurveKey("tiny", GRID, STEPS, "unipc", 3.0, 4.0)


def random_window(rng, near):
    """A canonical window; a crossing pair, a rectangle, or none where that may be."""
    _, rows, columns = TILES
    a, b = int(rng.integers(columns)), int(rng.integers(rows))
    kind = rng.integers(3)
    if kind == 0 and not near:
        return (-1, -1, -1, -1)
    if kind == 1 and a and b:
        return (a, b, int(rng.integers(a)), int(rng.integers(b)))
    return (a, b, a, b)


def make_masks(signed=False, key=KEY, seed=0, **fields):
    rng = np.random.default_rng(seed)
    groups, near = (5, 2) if signed else (3, 0)
    table = [[random_window(rng, g == near) for g in range(groups)] for _ in range(LAYERS * 2 * N)]
    shape = (LAYERS, 2, N, groups, 4)
    windows = np.array(table, np.int8).tobytes()
    rest = (0.9, 0.01, 2, shape, windows)
    masks = CompactMasks(key, TILE, FIRST, REUSE, signed, *rest)
    return dataclasses.replace(masks, **fields)


def make_policy(masks, **fields):
    return Compact(masks=masks, block_q=BLOCK, block_kv=BLOCK, **fields)


def seen(windows, signed, grid=GRID):
    """bool [T, T], by the definition, token by token of the raster order."""
    place = np.stack(np.unravel_index(np.arange(grid.num_tokens), grid.sizes), -1) // TILE
    delta = place[None] - place[:, None]  # key less query
    (dt, dy, dx), keep = np.moveaxis(delta, -1, 0), np.zeros(delta.shape[:2], bool)
    for group, (a, b, c, d) in enumerate(windows.tolist()):
        inside = ((abs(dx) <= a) & (abs(dy) <= d)) | ((abs(dx) <= c) & (abs(dy) <= b))
        mine = dt == group - (TILES[0] - 1) if signed else abs(dt) == group
        keep |= mine & inside & (a >= 0)
    return keep


def qkv(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, tokens, N, H)), jnp.float32) for _ in range(3)]


@functools.partial(jax.jit, static_argnames=("policy", "grid"))
def attended(policy, q, k, v, step, layer, grid, kv_length=None):
    """Attention of raster tokens under the policy, in raster order again."""
    order = np.arange(q.shape[1])
    order[: grid.num_tokens] = policy.token_order(grid)
    run = Attention(policy, "sparse", step, jnp.int32(1), jax.random.key(0)[None], 1)
    q, k, v = (x[:, order] for x in (q, k, v))
    out, record = attend(q, k, v, run, layer=layer, grid=grid, kv_length=kv_length)
    return out[:, np.argsort(order)], record.density


def masked(q, k, v, keep):
    """Dense softmax in float64 with hidden keys at -inf; keep [N, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    score = np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    score = np.where(keep, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("signed", [False, True])
def test_a_tile_mask_is_the_definition_token_by_token(signed):
    masks = make_masks(signed)
    windows = masks.table.reshape(-1, *masks.shape[3:])
    to_mask = jax.jit(lambda reach: module.tile_mask(reach, TILES, signed))
    order, symmetric = tile_order(GRID, TILE), 0
    for table in windows:
        reach = module.window_reach(table, TILES[2])
        tiles = np.asarray(to_mask(jnp.asarray(reach)))
        tokens = seen(table, signed)[order][:, order]
        assert (np.kron(tiles, np.ones((BLOCK, BLOCK), bool)) == tokens).all()
        symmetric += (tiles == tiles.T).all()
        counts = module.visible_tiles(reach, TILES, signed)
        assert (counts.reshape(-1) == tiles.sum(1)).all()
    assert symmetric < len(windows) if signed else symmetric == len(windows)


@pytest.mark.parametrize("signed", [False, True])
def test_attention_is_the_softmax_over_the_windows(signed):
    masks = make_masks(signed)
    policy, (q, k, v) = make_policy(masks), qkv(GRID.num_tokens)
    # Step 6 is the last of bucket 0, step 7 the first of bucket 1; before step 3 bucket 0 serves.
    for step, layer, bucket in ((6, 0, 0), (7, 1, 1), (0, 1, 0)):
        out, density = attended(policy, q, k, v, jnp.int32(step), jnp.int32(layer), GRID)
        keep = np.stack([seen(windows, signed) for windows in masks.table[layer, bucket]])
        # float32 sums of 144 products
        np.testing.assert_allclose(out, masked(q, k, v, keep), atol=2e-6)
        assert density == pytest.approx(keep.mean(), abs=1e-6)


def exact_masks():
    """Every group a staircase of three steps, which no two windows are."""
    table = np.array([[2, 1, 0, 0], [1, 0, -1, -1], [-1] * 4], np.int8)
    table = np.broadcast_to(table, (LAYERS, 2, N, *table.shape)).copy()
    table[1, 1, :, 1] = [2, 2, 1, -1]
    return make_masks(windows=table.tobytes(), shape=table.shape, exact=True)


def test_exact_masks_are_any_staircase():
    masks, (q, k, v) = exact_masks(), qkv(GRID.num_tokens)
    policy = make_policy(masks)
    out, density = attended(policy, q, k, v, jnp.int32(7), jnp.int32(1), GRID)
    place = np.stack(np.unravel_index(np.arange(GRID.num_tokens), GRID.sizes), -1) // TILE
    dt, dy, dx = np.moveaxis(abs(place[None] - place[:, None]), -1, 0)
    keep = dy <= masks.table[1, 1, 0][dt, dx]
    np.testing.assert_allclose(out, masked(q, k, v, keep), atol=2e-6)
    assert density == pytest.approx(keep.mean(), abs=1e-6)
    assert masks.counts[1, 1].mean() / math.prod(TILES) == pytest.approx(keep.mean())


def test_steps_and_layers_are_data():
    policy, (q, k, v) = make_policy(make_masks()), qkv(GRID.num_tokens)
    before = attended._cache_size()
    for step in range(3, 10):
        attended(policy, q, k, v, jnp.int32(step), jnp.int32(step % 2), GRID)
    twin = make_policy(make_masks())
    attended(twin, q, k, v, jnp.int32(3), jnp.int32(0), GRID)
    assert attended._cache_size() - before <= 1  # another test may have compiled it before


def test_hidden_keys_and_values_do_not_reach_the_output():
    masks, first = make_masks(), slice(0, 2)  # two tokens of one tile
    q, k, v = qkv(GRID.num_tokens)
    seen_by = [seen(windows, False)[first].any(0) for windows in masks.table[0, 0]]
    hidden = ~np.stack(seen_by, -1)
    assert hidden.any(0).all()
    bad = jnp.where(jnp.asarray(hidden)[None, :, :, None], jnp.nan, 0)
    args = jnp.int32(3), jnp.int32(0), GRID
    clean, _ = attended(make_policy(masks), q, k, v, *args)
    dirty, _ = attended(make_policy(masks), q, k + bad, v + bad, *args)
    np.testing.assert_array_equal(clean[:, first], dirty[:, first])


def test_full_windows_are_dense_attention_and_so_is_density_one():
    full = np.tile(np.array([3, 2, 3, 2], np.int8), (LAYERS, 2, N, 3, 1)).tobytes()
    q, k, v = qkv(GRID.num_tokens)
    for policy in (make_policy(make_masks(windows=full)), make_policy(None, density=1.0)):
        out, density = attended(policy, q, k, v, jnp.int32(3), jnp.int32(0), GRID)
        np.testing.assert_allclose(out, api.dense_attention(q, k, v), atol=1e-5)
        assert density == pytest.approx(1, abs=1e-6)


def test_text_is_seen_by_all_and_its_queries_are_dense():
    grid = dataclasses.replace(GRID, text=TEXT)
    masks = make_masks(key=dataclasses.replace(KEY, grid=grid))
    q, k, v = qkv(grid.num_tokens + TEXT)
    length = jnp.array([grid.num_tokens + TEXT, grid.num_tokens + 2], jnp.int32)
    policy = make_policy(masks)
    out, density = attended(policy, q, k, v, jnp.int32(3), jnp.int32(1), grid, length)
    dense = api.dense_attention(q, k, v, kv_length=length)
    # other shapes of the same products round otherwise
    np.testing.assert_allclose(out[:, -TEXT:], dense[:, -TEXT:], atol=1e-6)
    share = []
    for b, end in enumerate(np.asarray(length)):
        keep = np.stack([seen(windows, False) for windows in masks.table[1, 0]])
        words = np.arange(grid.num_tokens, grid.num_tokens + TEXT) < end
        keep = np.concatenate([keep, np.tile(words, (N, grid.num_tokens, 1))], -1)
        want = masked(q[b : b + 1, :-TEXT], k[b : b + 1], v[b : b + 1], keep)
        np.testing.assert_allclose(out[b : b + 1, :-TEXT], want, atol=2e-6)
        # A block of padding alone is not counted: 2 blocks of text, then 1.
        tiles = masks.counts[1, 0].mean() + -(-int(words.sum()) // BLOCK)
        share.append(tiles / grid.num_blocks(BLOCK))
    assert density == pytest.approx(np.mean(share), abs=1e-6)


def test_the_paper_s_schedule():
    assert Compact().modes(50) == ("dense",) * 15 + ("sparse",) * 35
    shape = (1, 7, 1, 3, 4)
    key = dataclasses.replace(KEY, steps=50)
    table = np.zeros(shape, np.int8)
    table[0, :, 0, 0, 0] = table[0, :, 0, 0, 2] = [0, 1, 3, 2, 0, 1, 3]  # tells buckets apart
    masks = CompactMasks(key, TILE, 15, 5, False, 0.9, 0.01, 4, shape, table.tobytes())
    budgets = make_policy(masks).budgets(50, math.prod(TILES))
    assert (budgets[:15] == 36).all()
    runs = budgets[15:].reshape(7, 5)
    assert (runs == runs[:, :1]).all() and (np.diff(runs[:3, 0]) > 0).all()
    assert runs.max() <= make_policy(masks).max_budget(50, math.prod(TILES))
    grid = dataclasses.replace(GRID, text=TEXT)
    worded = dataclasses.replace(masks, key=dataclasses.replace(key, grid=grid))
    # Two blocks of text are visible whatever the windows.
    assert (make_policy(worded).budgets(50, 38)[15:] == budgets[15:] + 2).all()


def test_density_counts_every_sparse_step_once():
    masks = make_masks()
    each = np.array(
        [[seen(w, False).mean() for layer in masks.table for w in layer[b]] for b in range(2)]
    )
    # Bucket 0 serves four steps, bucket 1 three.
    assert masks.density == pytest.approx((4 * each[0].mean() + 3 * each[1].mean()) / 7)


RAGGED = TokenGrid(5, 6, 7, text=11)  # 3 × 2 × 2 tiles of 2 × 4 × 4 tokens, 36 to 2


def ragged_masks(signed):
    rng, groups = np.random.default_rng(3), 5 if signed else 3
    window = [[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1], [-1] * 4]
    table = np.array(window, np.int8)[rng.integers(6, size=(LAYERS, 2, N, groups))]
    table[..., module.near_group(3, signed), :] = 0  # so that no query sees all
    key = dataclasses.replace(KEY, grid=RAGGED)
    rest = FIRST, REUSE, signed, 0.9, 0.01, 2, table.shape, table.tobytes()
    return CompactMasks(key, (2, 4, 4), *rest)


def ragged_pairs(windows, signed, order):
    """bool [T, S], which key a query may see, in the order of tiles, by the definition."""
    place = np.stack(np.unravel_index(order, RAGGED.sizes), -1) // (2, 4, 4)
    dt, dy, dx = np.moveaxis(place[None] - place[:, None], -1, 0)
    a, b, c, d = np.moveaxis(windows[dt + 2 if signed else abs(dt)].astype(int), -1, 0)
    keep = ((abs(dx) <= a) & (abs(dy) <= d)) | ((abs(dx) <= c) & (abs(dy) <= b))
    return np.pad(keep, ((0, 0), (0, RAGGED.text)), constant_values=True)


@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (6, 35)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_block_sees_what_any_of_its_tokens_sees(blocks, signed):
    masks = ragged_masks(signed)
    policy = Compact(masks=masks, block_q=blocks[0], block_kv=blocks[1], dense_layers=())
    order = policy.token_order(RAGGED)
    assert np.array_equal(np.sort(order), np.arange(RAGGED.num_tokens))
    k = jnp.zeros((B, RAGGED.num_tokens + RAGGED.text, N, 1))
    bound = policy.max_budget(STEPS, RAGGED.num_blocks(blocks[1]))
    means = policy.budgets(STEPS, RAGGED.num_blocks(blocks[1]))[FIRST:]
    found = np.zeros((LAYERS, 2))
    planned = jax.jit(lambda where: policy.plan(k[:, : len(order)], k, k, where, ())[0].blocks)
    for layer, bucket in np.ndindex(LAYERS, 2):
        step = jnp.int32(FIRST + REUSE * bucket)
        keys = jax.random.key(0)[None]
        where = Context(step, jnp.int32(layer), jnp.int32(1), keys, bound, "sparse", RAGGED)
        result = planned(where)
        api.check_lists(result, RAGGED.num_blocks(blocks[1]))
        ids, count = map(np.asarray, result)
        assert ids.shape[-1] == bound
        found[layer, bucket] = count.mean()
        for head in range(N):
            # The oracle: all pairs of tokens, then whether there is one in a pair of blocks.
            want = ragged_pairs(masks.table[layer, bucket, head], signed, order)
            for axis, block in enumerate(blocks):
                starts = range(0, want.shape[axis], block)
                want = np.logical_or.reduceat(want, starts, axis)
            assert not want.all()
            for row, blocks_seen in enumerate(want):
                own = ids[1, head, row, : count[1, head, row]]
                assert own.tolist() == np.flatnonzero(blocks_seen).tolist()
    assert (means == np.ceil(found.mean(0))[[0] * REUSE + [1] * 3]).all()
    assert policy._counts().max() == bound and means.max() <= bound


def test_wan_s_own_videos_have_tiles_of_192():
    for sizes in ((21, 30, 52), (21, 45, 80)):
        key = dataclasses.replace(KEY, grid=TokenGrid(*sizes))
        policy = Compact()
        policy.check_setting(key)
        order = policy.token_order(key.grid)
        assert np.array_equal(order, tile_order(key.grid, (3, 8, 8)))
        assert np.array_equal(np.sort(order), np.arange(key.grid.num_tokens))
        mask = module._local_lists(policy, key.grid).count / key.grid.num_blocks(64)
        assert 0.38 <= mask.mean() < 0.4  # a strip of one group at a time
    # The tile asked for, and of few tokens the block's.
    assert Compact(tile=(1, 2, 3))._tile(key.grid) == (1, 2, 3)
    assert Compact(block_kv=16)._tile(TokenGrid(4, 16, 16)) == (2, 2, 4)


@pytest.mark.parametrize("tiles", [(7, 6, 10), (2, 8, 4), (1, 1, 5)])
def test_local_windows_grow_to_the_density(tiles):
    grid, sizes = TokenGrid(*tiles), []
    tables = module.local_windows(tiles)
    assert (np.diff(tables, axis=0) >= 0).all()
    reaches = [module.window_reach(table, tiles[2]) for table in tables]
    counts = [module.visible_tiles(reach, tiles, False).mean() for reach in reaches]
    for density in (0.001, 0.15, 0.38, 0.7, 1.0):
        policy = Compact(density=density, tile=(1, 1, 1), block_q=1, block_kv=1)
        kept = module._local_lists(policy, grid).count.mean()
        # The first that reaches the density.
        assert kept == pytest.approx(next(c for c in counts if c >= density * math.prod(tiles)))
        sizes.append(kept)
    assert sizes[0] == 1 and sizes[-1] == math.prod(tiles)
    if tiles == (7, 6, 10):
        assert sizes[2] == pytest.approx(0.38 * 420, rel=0.03)  # a strip of one group at a time


def test_masks_come_back_from_their_file(tmp_path):
    path = tmp_path / "masks.json"
    for masks in (make_masks(), exact_masks(), make_masks(True)):
        masks.save(path)
        again = CompactMasks.load(path)
        assert again == masks and hash(again) == hash(masks)
        assert make_policy(again) == make_policy(masks)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.json"]
    assert "windows" not in repr(masks)


def test_a_kill_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.json"
    make_masks().save(path)
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_masks(seed=1).save(path)
    assert CompactMasks.load(path) == make_masks() and len(list(tmp_path.iterdir())) == 1


def test_masks_of_another_setting_are_refused_naming_both():
    other = dataclasses.replace(KEY, steps=9)
    with pytest.raises(ValueError, match=r"searched for .*steps=10.*not for .*steps=9"):
        make_policy(make_masks()).check_setting(other)
    make_policy(make_masks()).check_setting(KEY)


def test_masks_of_another_model_or_grid_are_refused_by_the_state():
    policy = make_policy(make_masks())
    assert policy.init_state(AttentionShape(LAYERS, B, N, H, GRID)) == ()
    with pytest.raises(
        ValueError, match="layers=2 and heads=3 must have the model's 2 layers and 4"
    ):
        policy.init_state(AttentionShape(LAYERS, B, 4, H, GRID))
    with pytest.raises(ValueError, match="rows=6.* must be for .*rows=8"):
        policy.init_state(AttentionShape(LAYERS, B, N, H, TokenGrid(3, 8, 8)))


def test_a_grid_is_needed():
    q, k, v = qkv(8)
    where = Context(jnp.int32(0), jnp.int32(0), jnp.int32(1), jax.random.key(0)[None], 1)
    with pytest.raises(ValueError, match="grid=None must be a TokenGrid: Compact works"):
        make_policy(None).plan(q, k, v, where, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"tile": (0, 8, 8)}, r"tile=\(0, 8, 8\) must be three numbers of tokens, 1 or more"),
        ({"dense_prefix": 2.0}, r"dense_prefix=2.0 must be in \[0, 1\]"),
    ],
)
def test_bad_fields_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Compact(**{"block_q": 4, "block_kv": 4, **fields})


def with_window(*window, place=(0, 0, 0, 1)):
    table = make_masks().table.copy()
    table[place] = window
    return {"windows": table.tobytes()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reuse": 0}, "reuse=0 must be at least 1"),
        ({"prompts": 0}, "prompts=0 must be at least 1"),
        ({"first": 10}, "first=10 must be from 0 to 9"),
        ({"reuse": 3}, r"must be \[layers, buckets, heads, groups, 4\] = \(2, 3, 3, 3, 4\)"),
        ({"signed": True}, r"= \(2, 2, 3, 5, 4\)"),
        ({"exact": True, "key": dataclasses.replace(KEY, grid=TokenGrid(3, 6, 9))}, "groups, 5"),
        ({"windows": b"12"}, "2 bytes, must be"),
        ({"tile": (2, 2, 2)}, r"= \(2, 2, 3, 2, 4\)"),
        ({"tile": (0, 4, 1)}, r"tile=\(0, 4, 1\) must be three numbers of tokens, 1 or more"),
        (with_window(4, 1, 4, 1), r"window \(4, 1, 4, 1\) of .* \(0, 0, 0, 1\) must be .* a < 4"),
        (with_window(1, 3, 1, 3), r"window \(1, 3, 1, 3\) .* d < b < 3"),
        (with_window(2, 1, 2, 0), r"window \(2, 1, 2, 0\) .* must be"),
        (with_window(2, 1, 0, 1), r"window \(2, 1, 0, 1\) .* must be"),
        (with_window(-1, 1, -1, 1), r"window \(-1, 1, -1, 1\) .* must be"),
        (with_window(-1, -1, -1, -1, place=(1, 0, 2, 0)), r"\(1, 0, 2, 0\) must be"),
    ],
)
def test_bad_masks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_masks(), **fields)


def test_an_axis_of_too_many_tiles_is_refused():
    key = dataclasses.replace(KEY, grid=TokenGrid(1, 1, 257))
    with pytest.raises(ValueError, match=r"makes tiles=\(1, 1, 129\), must be at most 128"):
        dataclasses.replace(make_masks(), key=key)


@pytest.mark.parametrize(
    ("place", "union"),
    [
        ((0, 0, 0, 1), (3, 0, 0, 0)),
        ((0, 0, 0, 1), (0, 0, -2, -2)),
        ((1, 0, 2, 1), (0, 1, 0, 0)),
        ((1, 1, 0, 0), (-1, -1, -1, -1)),
    ],
)
def test_bad_unions_are_refused(place, union):
    table = exact_masks().table.copy()
    table[place] = union
    told = re.escape(f"union {list(union)} of layer, bucket, head, group {place} must fall from")
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(exact_masks(), windows=table.tobytes())


def change(record, **fields):
    return {**record, **fields}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: [], "the file must be an object with exactly"),
        (lambda r: {**r, "more": 1}, "the file must be an object with exactly"),
        (lambda r: change(r, format=1), "format=1 must be 2"),
        (lambda r: change(r, tile=[1, 2]), r"tile=\(1, 2\) must be three numbers"),
        (lambda r: change(r, tile=[1, 2, 2.0]), "tile=2.0 must be a JSON value of type int"),
        (lambda r: change(r, windows=[1]), "windows must be whole numbers"),
        (lambda r: change(r, windows=[[[[[0.5]]]]]), "windows must be whole numbers"),
        (lambda r: change(r, windows=[[[[[300]]]]]), "windows must be whole numbers"),
        (lambda r: change(r, windows=[[1], [[2]]]), "inhomogeneous"),
        (lambda r: change(r, windows=[[[[[0, 0, 0, 0]]]]]), "must be .layers, buckets"),
        (lambda r: change(r, exact=1), "exact=1 must be a JSON value of type bool"),
        (lambda r: change(r, signed=0), "signed=0 must be a JSON value of type bool"),
        (lambda r: change(r, max_cost="x"), "max_cost='x' must be a finite number"),
        (lambda r: change(r, key={}), "key must be an object with exactly"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, edit, message):
    path = tmp_path / "masks.json"
    make_masks().save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"masks.json' does not hold masks: .*{message}"):
        CompactMasks.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "does not hold masks: Expecting"), ("[" * 100000, "does not hold masks")],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CompactMasks.load(tmp_path / "masks.json")


def test_a_file_without_end_is_refused(tmp_path, monkeypatch):
    make_masks().save(tmp_path / "masks.json")
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    with pytest.raises(ValueError, match="it has more than 100 bytes"):
        CompactMasks.load(tmp_path / "masks.json")
