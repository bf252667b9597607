"""The search of Compact Attention's windows: contraction, merging, recording, whole runs."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import compact_search as search
from pasa_jax.attention import Attention, attend
from pasa_jax.cli import main
from pasa_jax.compact_search import Criterion
from pasa_jax.grid import TokenGrid, tile_order
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import AttentionShape, Compact, CompactMasks, compact
from pasa_jax.policies.compact import group_index, near_group, window_reach

WAN = (7, 6, 10)  # tiles of the published grid
EXACT = Criterion(min_recall=0.999, max_cost=1e-9)
EMPTY = (-1, -1, -1, -1)


def visible_tiles(windows, tiles, signed):
    return compact.visible_tiles(window_reach(windows, tiles[2]), tiles, signed)


def tile_mask(windows, tiles, signed):
    return compact.tile_mask(window_reach(windows, tiles[2]), tiles, signed)


def offsets(tiles):
    """dt, dy, dx of every offset between tiles."""
    return np.meshgrid(*(np.arange(1 - n, n) for n in tiles), indexing="ij")


def tables(weight, tiles, signed=False):
    """Mass and size by group of attention that is `weight` at each offset, even over tiles."""
    counts = search.offset_counts(tiles)
    mass = weight * counts
    sizes = counts / math.prod(tiles)
    return search.grouped(mass / mass.sum(), signed), search.grouped(sizes, signed)


def contract(weight, criterion, tiles=WAN):
    """Windows, recall and density."""
    mass, size = tables(weight, tiles, criterion.signed)
    cost = criterion.cost_per_tile(math.prod(tiles))
    windows, recall = search.contract(mass, size, tiles[0], criterion, cost)
    counts = visible_tiles(np.array(windows, np.int8), tiles, criterion.signed)
    return windows, recall, counts.mean() / math.prod(tiles)


dt, dy, dx = (abs(x) for x in offsets(WAN))
PLANTS = {
    "local": ((dx <= 1) & (dy <= 1), [(1, 1, 1, 1)] * 7, 0.8756),
    "cross": ((dx == 0) | (dy == 0), [(9, 5, 0, 0)] * 7, 0.7500),
    "near frames": (dt <= 1, [(9, 5, 9, 5)] * 2 + [EMPTY] * 5, 0.6122),
    "two windows": (
        ((dx <= 7) & (dy <= 1)) | ((dx <= 2) & (dy <= 4)),
        [(7, 4, 2, 1)] * 7,
        0.3622,
    ),
}


@pytest.mark.parametrize(("plant", "windows", "sparsity"), PLANTS.values(), ids=PLANTS)
def test_planted_windows_are_found(plant, windows, sparsity):
    found, recall, density = contract(plant.astype(float), EXACT)
    assert found == windows
    # The figures of the specification's prototype, to their four places.
    assert 1 - density == pytest.approx(sparsity, abs=5e-5)
    assert recall == pytest.approx(1)


def test_a_cross_is_out_of_reach_of_one_rectangle():
    plant = PLANTS["cross"][0]
    mass, _ = tables(plant.astype(float), WAN)
    box = search.window_offsets(np.array([9, 5, 9, 5]), 6, 10)
    for a, b in itertools.product(range(10), range(6)):
        smaller = search.window_offsets(np.array([a, b, a, b]), 6, 10)
        assert (mass[:, ~smaller].sum() < 1e-3) == (smaller == box).all()


def test_groups_by_distance_beat_one_window_for_all():
    plant = (dt <= 1) & (dx <= 1) | (dx == 0) & (dy == 0)
    _, _, density = contract(plant.astype(float), EXACT)
    mass, size = (x.sum(0, keepdims=True) for x in tables(plant.astype(float), WAN))
    ((window,), _) = search.contract(mass, size, 1, EXACT, 1e-9)
    shared = visible_tiles(np.array([window] * 7, np.int8), WAN, False).mean() / 420
    assert density < 0.6 * shared


def test_even_attention_is_the_paper_s_tenth():
    windows, recall, density = contract(np.ones_like(dt, float), Criterion(max_cost=0.011))
    assert 1 - density == pytest.approx(0.1, abs=0.005)
    assert 0.9 <= recall <= 0.905
    assert recall == pytest.approx(density)  # even mass: what is kept is what is recalled


def test_units_of_the_cost():
    # The paper's value on the paper's grid; elsewhere as many times an even tile's share.
    assert Criterion().cost_per_tile(420) == pytest.approx(0.011)
    assert Criterion().cost_per_tile(60) == pytest.approx(0.077)
    assert Criterion(max_cost=0.02).cost_per_tile(60) == 0.02
    assert Criterion(max_cost=0.02, cost_unit="share").cost_per_tile(60) == 0.02 / 60
    # Under the other reading of 0.011 nothing even is dropped.
    assert contract(np.ones_like(dt, float), Criterion(cost_unit="share"))[2] == 1


def test_recall_of_each_group_keeps_far_frames():
    weight = np.exp(-2.0 * dt - 0.3 * (dx + dy))
    windows, _, _ = contract(weight, Criterion(max_cost=1.0))
    assert EMPTY in windows
    each, _, _ = contract(weight, Criterion(max_cost=1.0, recall_scope="group"))
    mass, _ = tables(weight, WAN)
    inside = search.window_offsets(np.array(each), 6, 10)
    recall = (mass * inside).sum((1, 2)) / mass.sum((1, 2))
    assert (recall >= 0.9 - 1e-12).all() and recall.max() < 0.95


def test_signed_groups_tell_past_from_future():
    (dt, _, dx), signed = offsets(WAN), Criterion(min_recall=0.999, max_cost=1e-9, signed=True)
    plant = ((dt == 0) | (dt == 1)) & (abs(dx) <= 2)
    windows, _, _ = contract(plant.astype(float), signed)
    assert windows == [EMPTY] * 6 + [(2, 5, 2, 5)] * 2 + [EMPTY] * 5
    assert contract(plant.astype(float), EXACT)[0][1] == (2, 5, 2, 5)


SMALL = (3, 4, 5)


def random_weight(seed):
    rng = np.random.default_rng(seed)
    shape = [2 * n - 1 for n in SMALL]
    return rng.exponential(size=shape) ** 3 * np.exp(-sum(abs(x) for x in offsets(SMALL)) / 2)


def by_the_paper(mass, size, frames, tau, lam):
    """Section 4 of the specification, in sets of offsets; also the cost of every move taken."""
    groups, height, width = mass.shape
    y, x = (abs(i) for i in np.indices((height, width)) - [[[height // 2]], [[width // 2]]])

    def cells(p):
        a, b, c, d = p
        return ((x <= a) & (y <= d)) | ((x <= c) & (y <= b))

    def rectangle(a, b):
        return (a, b, a, b)

    def move(p, m):
        a, b, c, d = p
        if (c, d) == (a, b):
            if (a, b) == (0, 0) and m in "ab":
                return EMPTY
            if m == "a":
                return rectangle(a - 1, b) if a > 0 else None
            if m == "b":
                return rectangle(a, b - 1) if b > 0 else None
            return (a, b, a - 1, b - 1) if a > 0 and b > 0 else None
        if m == "a":
            return (a - 1, b, c, d) if a - 1 > c else rectangle(c, b)
        if m == "b":
            return (a, b - 1, c, d) if b - 1 > d else rectangle(a, d)
        if m == "c":
            return (a, b, c - 1, d) if c > 0 else None
        return (a, b, c, d - 1) if d > 0 else None

    p = [rectangle(width // 2, height // 2)] * groups
    flags, recall, costs = [set("abcd") for _ in p], 1.0, []
    while any(flags):
        for g in reversed(range(groups)):
            best = None
            for m in sorted(flags[g]):
                new = None if p[g] == EMPTY else move(p[g], m)
                if new is None or (g == 0 and new == EMPTY):
                    flags[g].discard(m)
                    continue
                gone = cells(p[g]) & ~cells(new)
                loss, gain = mass[g][gone].sum(), size[g][gone].sum()
                if best is None or loss / gain < best[0]:
                    best = loss / gain, loss, m, new
            if best is None:
                continue
            cost, loss, m, new = best
            if recall - loss >= tau and cost <= lam:
                p[g], recall = new, recall - loss
                costs.append(cost)
            else:
                flags[g].discard(m)
    return p, costs


@pytest.mark.parametrize("seed", range(12))
def test_the_search_is_the_published_loop(seed):
    mass, size = tables(random_weight(seed), SMALL)
    tau, lam = [(0.9, 1.0), (0.6, 0.005), (0.95, 0.02), (0.3, 0.02)][seed % 4]
    criterion = Criterion(min_recall=tau, max_cost=lam)
    windows, recall = search.contract(mass, size, 3, criterion, lam)
    again, costs = by_the_paper(mass, size, 3, tau, lam)
    assert windows == again and costs and max(costs) <= lam
    assert recall >= tau - 1e-12
    assert (windows, recall) == search.contract(mass, size, 3, criterion, lam)
    counts = visible_tiles(np.array(windows, np.int8), SMALL, False)
    assert counts.min() >= 1
    for a, b, c, d in windows:
        assert (c < a and d < b) or (c == a and d == b)
    kept = search.window_offsets(np.array(windows), 4, 5)
    assert recall + mass[~kept].sum() == pytest.approx(1)


def test_the_two_ends():
    weight = random_weight(0) + 0.01
    assert contract(weight, Criterion(min_recall=1.0, max_cost=1e9), SMALL)[2] == 1
    weight[:, [0, -1]] = 0  # no mass at the largest |dy|
    windows, recall, density = contract(weight, Criterion(min_recall=0.0, max_cost=0.0), SMALL)
    assert windows == [(4, 2, 4, 2)] * 3 and recall == pytest.approx(1) and density < 1
    # Everything may go but the query's own tile.
    windows, _, _ = contract(weight, Criterion(min_recall=0.0, max_cost=1e9), SMALL)
    assert windows == [(0, 0, 0, 0), EMPTY, EMPTY]
    weight[2, 3, 4] = 0  # not even without mass
    assert contract(weight, Criterion(min_recall=0.0, max_cost=1e9), SMALL)[0][0] != EMPTY
    weight[2] = 0
    assert contract(weight, Criterion(min_recall=0.5, max_cost=0.0), SMALL)[0][0] == (0, 0, 0, 0)


def random_tables(seed, number):
    found = []
    for i in range(number):
        mass, size = tables(random_weight(100 * seed + i), SMALL)
        criterion = Criterion(min_recall=0.7)
        found.append(np.array(search.contract(mass, size, 3, criterion, 0.1)[0], np.int8))
    return found


def test_merging_keeps_every_window_and_no_smaller_one_does():
    for seed in range(4):
        inputs = random_tables(seed, 3)
        merged = search.merge(inputs, SMALL, False)
        union = np.any([search.window_offsets(table, 4, 5) for table in inputs], axis=0)
        inside = search.window_offsets(merged, 4, 5)
        assert (inside >= union).all() and merged.dtype == np.int8
        counts = search.grouped(search.offset_counts(SMALL), False)
        for g, (a, b, c, d) in enumerate(merged.tolist()):
            assert (c < a and d < b) or (c == a and d == b)
            for p in itertools.product(range(5), range(4), range(5), range(4)):
                other = search.window_offsets(np.array(p), 4, 5)
                if (other >= union[g]).all():
                    assert counts[g][other].sum() >= counts[g][inside[g]].sum()
        reach = search.union(inputs, 5)
        y, x = (abs(i) for i in np.indices((7, 9)) - [[[3]], [[4]]])
        assert ((y <= reach[:, x]) == union).all()
        assert ((reach != window_reach(merged, 5)).any()) == (inside != union).any()
        for table in inputs:
            assert (search.merge([table, table], SMALL, False) == table).all()
            assert (
                visible_tiles(table, SMALL, False).mean()
                <= visible_tiles(merged, SMALL, False).mean()
            )


@pytest.mark.parametrize("signed", [False, True])
def test_similarity_is_the_masks_intersection_over_their_union(signed):
    rng, near = np.random.default_rng(0), 2 if signed else 0
    choices = np.array([EMPTY, (0, 0, 0, 0), (3, 2, 1, 0), (2, 3, 2, 3), (4, 1, 4, 1)], np.int8)
    one, other = choices[rng.integers(5, size=(2, 6, 5 if signed else 3))]
    one[:, near] = other[:, near] = 0
    found = search.similarity(one, other, SMALL, signed)
    for head in range(6):
        a, b = (tile_mask(table[head], SMALL, signed) for table in (one, other))
        assert found[head] == pytest.approx((a & b).sum() / (a | b).sum())
    assert (found == search.similarity(other, one, SMALL, signed)).all()
    assert (search.similarity(one, one, SMALL, signed) == 1).all()
    assert 0 <= found.min() < found.max() <= 1
    alone = np.array([[(0, 0, 0, 0), EMPTY, EMPTY]], np.int8)
    full = np.array([[(4, 3, 4, 3)] * 3], np.int8)
    assert search.similarity(alone, full, SMALL, False) == pytest.approx(1 / math.prod(SMALL))


def test_merging_two_arms_gives_a_cross_and_nothing_gives_nothing():
    tall, wide = (np.array([[a, b, a, b]] * 7, np.int8) for a, b in ((1, 5), (9, 0)))
    assert (search.merge([tall, wide], WAN, False) == [9, 5, 1, 0]).all()
    tall[3] = wide[3] = tall[4] = -1
    merged = search.merge([tall, wide], WAN, False)
    assert (merged[3] == -1).all() and (merged[4] == [9, 0, 9, 0]).all()
    assert (search.merge([np.stack([tall, wide])] * 2, WAN, False)[0] == tall).all()


GRID, TILE = TokenGrid(2, 4, 6), (1, 2, 2)
TILES = (2, 2, 3)


def exact_map(q, k):
    """A [B, N, I, J] in float64: what a tile's queries give a tile's keys, in tile order."""
    score = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (q, k)))
    weight = np.exp(score * q.shape[-1] ** -0.5)
    weight /= weight.sum(-1, keepdims=True)
    b, n, t, _ = weight.shape
    return weight.reshape(b, n, t // 4, 4, t // 4, 4).sum(-1).mean(3)


def test_the_recorder_sums_the_exact_map_by_offset():
    rng, text = np.random.default_rng(0), 5
    grid = dataclasses.replace(GRID, text=text)
    shape = (2, 48 + text, 2, 8)
    q, k, v = (jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for _ in range(3))
    length = jnp.array([48 + text, 48 + text - text // 2], jnp.int32)
    recorder = search.Recorder(tile=TILE, block_q=4, block_kv=4)
    assert (recorder.token_order(grid) == tile_order(grid, TILE)).all()
    state = recorder.init_state(AttentionShape(3, 2, 2, 8, grid))
    assert state.shape == (3, 2, 2, 3, 3, 5)
    run = Attention(recorder, "search", jnp.int32(0), jnp.int32(1), jax.random.key(0)[None], 1)

    @jax.jit
    def one(q, k, v):
        args = {"layer": jnp.int32(0), "state": state[0], "grid": grid, "kv_length": length}
        return attend(q, k, v, run, **args)

    out, record = one(q, k, v)
    want = api.dense_attention(q, k, v, kv_length=length)
    np.testing.assert_allclose(out, want, atol=2e-6)  # fused otherwise inside jit
    mass = np.asarray(record.state, np.float64)
    tiles = exact_map(q[:, :48], k[:, :48])
    place = np.stack(np.unravel_index(np.arange(12), TILES), -1)
    expected, counts = np.zeros_like(mass), np.zeros(mass.shape[2:], int)
    for i, j in itertools.product(range(12), range(12)):
        at = tuple(place[j] - place[i] + [1, 1, 2])
        expected[(..., *at)] += tiles[:, :, i, j] / 12
        counts[at] += 1
    np.testing.assert_allclose(mass, expected, atol=1e-6)  # float32 sums of 48 weights
    np.testing.assert_allclose(mass.sum((2, 3, 4)), 1, atol=1e-6)
    assert (counts == search.offset_counts(TILES)).all() and counts.sum() == 12 * 12
    # Recall and size from the tables are those of the whole map.
    windows = np.array([[1, 1, 0, 0], [0, 1, 0, 1]], np.int8)
    keep = tile_mask(windows, TILES, False)
    inside = search.window_offsets(windows, 2, 3)
    recall = (search.grouped(mass, False) * inside).sum((-3, -2, -1))
    np.testing.assert_allclose(recall, (tiles * keep).sum((2, 3)) / 12, atol=1e-6)
    assert (search.grouped(counts, False) * inside).sum() == keep.sum()


@pytest.mark.parametrize("block", [1, 8])
def test_the_recorder_shares_a_block_among_its_tiles_by_tokens(block):
    grid, tile, tiles = TokenGrid(3, 4, 5, text=3), (2, 3, 4), (2, 2, 2)  # tiles of 24 to 1 tokens
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(2 * rng.standard_normal((1, 63, 2, 8)), jnp.float32) for _ in range(2))
    recorder = search.Recorder(tile=tile, block_q=block, block_kv=block)
    run = Attention(recorder, "search", jnp.int32(0), jnp.int32(1), jax.random.key(0)[None], 1)
    state = recorder.init_state(AttentionShape(1, 1, 2, 8, grid))[0]
    _, record = jax.jit(
        lambda q, k: attend(q, k, k, run, layer=jnp.int32(0), state=state, grid=grid)
    )(q, k)
    # The oracle: all pairs of tokens, each the mean of its pair of blocks.
    score = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64)[:, :60] for x in (q, k)))
    weight = np.exp(score[0] * 8**-0.5)
    weight /= weight.sum(-1, keepdims=True)
    number = np.arange(60) // block
    same = (number[:, None] == number[None, :]).astype(float)
    same /= same.sum(1, keepdims=True)
    weight = same @ weight @ same
    place = np.stack(np.unravel_index(tile_order(grid, tile), grid.sizes), -1) // tile
    expected = np.zeros((2, 3, 3, 3))
    for i, j in itertools.product(range(60), range(60)):
        expected[(..., *(place[j] - place[i] + 1))] += weight[:, i, j] / 60
    # float32 sums of 3600 weights
    np.testing.assert_allclose(record.state[0], expected, atol=2e-6)
    assert record.state.shape[2:] == search.offset_counts(tiles).shape


@pytest.mark.parametrize(
    ("starts", "group"),
    [((0, 1), [0, 0, 1, 2, 2]), ((0, 2, 9), [0, 1, 1, 1, 2]), ((0, 1, 2), [0, 1, 2, 3, 4])],
)
def test_coarse_groups_share_a_window(pipeline, starts, group):
    table = np.stack([random_weight(i) * search.offset_counts(SMALL) for i in range(2)])
    table /= table.sum((1, 2, 3), keepdims=True)
    size = search.offset_counts(SMALL) / math.prod(SMALL)
    for signed in (False, True):
        own = Criterion(min_recall=0.7, max_cost=0.1, frame_groups=starts, signed=signed)
        number = group if signed else [g - group[2] for g in group[2:]]
        assert own.groups(3).tolist() == number
        plan = search.Search.start(pipeline.card, pipeline.card.settings(), own)
        found = dataclasses.replace(plan, tiles=SMALL).contract(table[:, None, None])
        assert found.windows.shape == (1, 2, 1, len(number), 4)
        for head, windows in enumerate(found.windows[0, :, 0]):
            inside = search.window_offsets(windows, 4, 5)
            kept = (search.grouped(table[head], signed) * inside).sum()
            assert found.recall[0, head, 0] == pytest.approx(kept) and kept >= 0.7
            rows = np.asarray(number)
            sums = [
                np.array([search.grouped(x, signed)[rows == g].sum(0) for g in np.unique(rows)])
                for x in (table[head], size)
            ]
            want, _ = search.contract(*sums, number[-1] // (1 + signed) + 1, own, 0.1)
            if not signed:
                assert want == by_the_paper(*sums, number[-1] + 1, 0.7, 0.1)[0]
            assert (windows == np.array(want)[rows]).all()


def test_near_group_is_the_query_s_own_frame():
    for signed in (False, True):
        assert (np.diag(group_index(4, signed)) == near_group(4, signed)).all()


PROMPTS = ["blue and white waves moving left", "a red circle moving up on a green background"]
# Of 2 × 4 × 4 tokens: tiles of 6 to 2, which no block divides.
FINE = Criterion(tile=(1, 3, 2), reuse=2, dense_prefix=0.4, min_recall=0.8)


@pytest.fixture(scope="module")
def searched(pipeline):
    """Masks of two prompts: steps 2 and 4 of 5 are searched."""
    return search.search_masks(pipeline, PROMPTS, criterion=FINE, progress=False)


def test_a_search_covers_its_prompts_and_branches(pipeline, searched):
    masks, recall = searched
    assert masks.key == pipeline.card.curve_key(pipeline.card.settings())
    assert (masks.shape, masks.first, masks.prompts) == ((2, 2, 2, 2, 4), 2, 2)
    assert recall.shape == (2, 2, 2, 2, 2) and 0.8 <= recall.min() < recall.max() <= 1
    assert 0.2 < masks.density < 1
    # By hand: the masks keep of every prompt, branch, layer, bucket and head what they must.
    plan = search.Search.start(pipeline.card, pipeline.card.settings(), FINE)
    inside = search.window_offsets(masks.table, 2, 2)
    for i, prompt in enumerate(PROMPTS):
        text = pipeline.encode([prompt], "", 2.0)
        found = [m for m in plan.sample(pipeline, text, i) if m is not None]
        assert len(found) == 2
        for bucket, mass in enumerate(found):
            mass = np.asarray(mass, np.float64)
            np.testing.assert_allclose(mass.sum((-3, -2, -1)), 1, atol=1e-6)
            kept = search.grouped(mass, False).swapaxes(0, 1) * inside[:, bucket]
            assert (kept.sum((-3, -2, -1)) >= recall[i, :, :, bucket] - 1e-6).all()


def test_windows_of_all_prompts_and_branches_are_merged(pipeline, monkeypatch, capsys):
    windows = [[(1, 0, 1, 0), EMPTY], [(0, 1, 0, 1), EMPTY]], [[(0, 0, 0, 0)] * 2, [(0,) * 4] * 2]

    def prompt(self, pipeline, text, seed, tick):
        shape = self.shape(len(text))
        each = np.array(windows[seed], np.int8)[:, None, None, None]
        return search.Found(np.broadcast_to(each, shape), np.ones(shape[:-2]))

    monkeypatch.setattr(search.Search, "prompt", prompt)
    masks, _ = search.search_masks(pipeline, PROMPTS, criterion=FINE)
    assert (masks.table == [(1, 1, 0, 0), (0, 0, 0, 0)]).all() and not masks.exact
    # 8 pairs of tiles of 24 lie in both prompts' windows.
    assert "2 of 2 prompts, 33% as the first" in capsys.readouterr().err
    whole = dataclasses.replace(FINE, exact_union=True)
    exact, _ = search.search_masks(pipeline, PROMPTS, criterion=whole, progress=False)
    assert exact.exact and (exact.table == [(1, 0), (0, -1)]).all()
    assert exact.density == masks.density


def test_searched_steps_leave_the_dense_run_as_it_is(pipeline):
    text = pipeline.encode(PROMPTS[:1], "", 2.0)
    late = dataclasses.replace(FINE, dense_prefix=0.8)
    found = []
    for criterion in (FINE, late):
        plan = search.Search.start(pipeline.card, pipeline.card.settings(), criterion)
        *_, last = plan.sample(pipeline, text, 7)
        found.append(last)
    # Step 4, with step 2 searched in tile order before it, or not; other runs differ by 1e-2.
    np.testing.assert_allclose(*found, atol=1e-5)


def test_masks_run_and_are_refused_elsewhere(pipeline, searched):
    masks, _ = searched
    policy = Compact(masks=masks, block_q=4, block_kv=4, dense_prefix=0.4)
    result = pipeline.generate(PROMPTS[:1], policy=policy, progress=False)
    assert np.isfinite(result.latents).all()
    assert (result.densities[:2] == 1).all()
    bucket = policy._counts().mean((2, 3)) / 8  # [layers, buckets]
    assert (policy.budgets(5, 8)[2:] == np.ceil(8 * bucket.mean(0)[[0, 0, 1]])).all()
    np.testing.assert_allclose(result.densities[2:], bucket.T[[0, 0, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="searched for .*steps=5.*not for .*steps=4"):
        pipeline.generate(PROMPTS[:1], policy=policy, steps=4, progress=False)


def test_wan_s_masses_are_recorded_by_small_blocks(pipeline):
    small = {"width": 40, "height": 24}
    for frames, tile, block in ((8, (1, 3, 5), 15), (12, (2, 3, 5), 16)):
        settings = pipeline.card.settings(frames=frames, **small)
        plan = search.Search.start(pipeline.card, settings, dataclasses.replace(FINE, tile=tile))
        assert plan.block == block  # the tile's where it divides the grid
    settings = pipeline.card.settings(frames=84, width=52 * 8, height=30 * 8)
    plan = search.Search.start(pipeline.card, settings, Criterion())
    assert (plan.tile, plan.tiles, plan.block) == ((3, 8, 8), (7, 4, 7), 32)


def test_an_interrupted_search_goes_on(pipeline, searched, tmp_path, monkeypatch):
    folder, options = tmp_path / "masks.parts", {"criterion": FINE, "progress": False}
    real, calls = search.Search.prompt, []

    def prompt(self, pipeline, text, seed, tick):
        calls.append(seed)
        if seed == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, pipeline, text, seed, tick)

    monkeypatch.setattr(search.Search, "prompt", prompt)
    with pytest.raises(KeyboardInterrupt):
        search.search_masks(pipeline, PROMPTS, parts=search.Parts(folder), **options)
    assert len(list(folder.iterdir())) == 1
    parts = search.Parts(folder)
    masks, recall = search.search_masks(pipeline, PROMPTS, parts=parts, **options)
    assert calls == [0, 1, 1] and masks == searched[0] and (recall == searched[1]).all()
    # Other seeds, settings or criteria are other results.
    search.search_masks(pipeline, PROMPTS[:1], parts=search.Parts(folder), **options)
    assert calls == [0, 1, 1]
    search.search_masks(pipeline, PROMPTS[:1], seeds=[5], parts=search.Parts(folder), **options)
    assert calls == [0, 1, 1, 5]
    parts.clear()
    assert len(list(folder.iterdir())) == 1  # seed 5 was another search's
    monkeypatch.undo()


def test_damaged_parts_are_searched_again(tmp_path):
    parts = search.Parts(tmp_path / "parts")
    shape = (1, 2, 2, 2, 2, 4)
    assert parts.read("a", shape) is None
    found = search.Found(np.zeros(shape, np.int8), np.ones(shape[:-2]))
    parts.write("a", found)
    assert (parts.read("a", shape).recall == 1).all()
    assert parts.read("a", (2, *shape[1:])) is None
    file = next(parts.folder.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert parts.read("a", shape) is None
    parts.clear()
    assert not parts.folder.exists()


def refused(capsys, argv):
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_the_command_searches_and_generate_uses_it(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pasa_jax.models.tiny.WEIGHTS", tiny_folder)
    monkeypatch.chdir(tmp_path)
    small = ["--frames", "8", "--size", "32x32", "--steps", "5", "--no-progress"]
    fine = ["--tile", "1", "2", "2", "--min-recall", "0.7", "--signed"]
    fine += ["--frame-groups", "0", "--exact-union"]
    assert main(["search", "compact", PROMPTS[0], "--out", "m.json", *fine, *small]) == 0
    assert "wrote m.json: 1 prompts, density 0." in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
    masks = CompactMasks.load("m.json")
    assert (masks.tile, masks.signed, masks.min_recall) == ((1, 2, 2), True, 0.7)
    # One group, so that frames do not differ; unions of windows in place of two of them.
    assert masks.exact and (masks.table == masks.table[..., :1, :]).all()
    asked = []
    monkeypatch.setattr("pasa_jax.pipeline.Pipeline.generate", lambda *_, **o: asked.append(o))
    monkeypatch.setattr("pasa_jax.cli.generate._write", lambda *_: None)
    run = ["generate", PROMPTS[1], "--policy", "compact", "--masks", "m.json", "--out", "a.png"]
    assert main([*run, *small]) == 0
    assert asked[0]["policy"].masks == masks
    other = [*run, *small, "--guidance", "1"]
    assert "guidance=2.5" in (told := refused(capsys, other)) and "guidance=1.0" in told


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["search"], "'' must be one of compact, paro"),
        (["search", "svg"], "'svg' must be one of compact, paro"),
        (["search", "compact", "--min-recall", "2"], "min_recall=2.0 must be in [0, 1]"),
        (["search", "compact", "--dense-prefix", "1"], "must leave one of the 7 steps"),
        (["search", "compact", "--tile", "0", "2", "2"], "tile=(0, 2, 2) must be three numbers"),
        (["search", "compact", "--out", "a.txt"], "must end in .json"),
        (["generate", PROMPTS[0], "--policy", "compact", "--masks", "none.json"], "none.json"),
    ],
)
def test_commands_refuse_in_one_line(tiny_folder, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.setattr("pasa_jax.models.tiny.WEIGHTS", tiny_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pasa_jax.pipeline.Pipeline.load", lambda *args: 1 / 0)
    assert words in refused(capsys, argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_recall": 1.1}, r"min_recall=1.1 must be in \[0, 1\]"),
        ({"dense_prefix": -0.1}, r"dense_prefix=-0.1 must be in \[0, 1\]"),
        ({"max_cost": -1.0}, "max_cost=-1.0 must be 0 or more and finite"),
        ({"max_cost": float("nan")}, "max_cost=nan must be 0 or more and finite"),
        ({"cost_unit": "flop"}, r"cost_unit='flop' must be one of \('tile', 'share'\)"),
        ({"recall_scope": "all"}, r"recall_scope='all' must be one of \('head', 'group'\)"),
        ({"frame_groups": (1, 2)}, r"frame_groups=\(1, 2\) must rise from 0"),
        ({"frame_groups": (0, 2, 2)}, r"frame_groups=\(0, 2, 2\) must rise from 0"),
        ({"reuse": 0}, "reuse=0 must be at least 1 step"),
        ({"tile": (1, 2)}, r"tile=\(1, 2\) must be three numbers of tokens, 1 or more"),
    ],
)
def test_bad_criteria_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Criterion(**fields)


def test_seeds_are_one_a_prompt(pipeline):
    with pytest.raises(ValueError, match="must be one for each of the 2 prompts"):
        search.search_masks(pipeline, PROMPTS, seeds=[1])
