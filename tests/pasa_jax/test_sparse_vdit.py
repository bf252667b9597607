"""Sparse-vDiT: its patterns token by token, their file, and the search that chooses them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from pasa_jax import pipeline as module
from pasa_jax import vdit_search as search
from pasa_jax.attention import Attention, attend
from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid
from pasa_jax.policies import AttentionShape, Context, HeadPatterns, SparseVdit
from pasa_jax.policies.sparse_vdit import near_blocks

B, H, BLOCK, WIDTH = 2, 8, 8, 17
GRID = TokenGrid(3, 5, 8, text=11)  # 15 query blocks, and 17 key blocks, the last two text's
RAGGED = TokenGrid(3, 5, 7, text=11)  # the last of 14 query blocks and key block 13 have one token
KEY = CurveKey("tiny", RAGGED, 10, "unipc", 3.0, 4.0)
# Layer 0 has a head of each mode, layer 1 others.
MODES = np.array([[0, 1, 2, 3, 4], [4, 3, 1, 2, 2]], np.int8)


def make_patterns(modes=MODES):
    video = int((~RAGGED.text_blocks(BLOCK)).sum())
    columns = np.random.default_rng(0).random((*modes.shape, video)) < 0.3
    columns &= (modes == 4)[..., None]
    own = (BLOCK, WIDTH, 0.5, 0.5, 2, modes.shape, modes.tobytes(), columns.tobytes())
    return HeadPatterns(KEY, *own)


def make(masks=None, **fields):
    return SparseVdit(masks=masks, **{"block_q": BLOCK, "block_kv": BLOCK, **fields})


def run_of(policy):
    """The policy at a sparse step; it reads no budget."""
    keys = jax.random.split(jax.random.key(0), 1)
    return Attention(policy, "sparse", jnp.int32(5), jnp.int32(1), keys, 1)


def by_block(tokens, rows, columns):
    """bool [I, J], whether any pair of a block's tokens is True."""
    mask = np.zeros((rows, columns), bool)
    i, j = np.nonzero(tokens)
    mask[i // BLOCK, j // BLOCK] = True
    return mask


def defined(mode, stripes, grid, width=WIDTH):
    """bool [T, S] in raster order: what each of the video's queries sees in such a head."""
    video, every = grid.num_tokens, grid.num_tokens + grid.text
    rows, columns = -(-video // BLOCK), grid.num_blocks(BLOCK)
    token = np.arange(video)
    mask = np.zeros((rows, columns), bool)
    if mode == 0:
        mask[:] = True
    if mode in (2, 3):
        near = abs(token[:, None] - token[None]) <= width
        mask = by_block(near, rows, columns)
    if mode == 4:
        mask[:, stripes] = True
    if mode != 1:
        mask |= grid.text_blocks(BLOCK)
    place = np.arange(every)
    if mode == 3:  # where each raster token stands when all frames of a position follow it
        frame, position = token // (grid.rows * grid.columns), token % (grid.rows * grid.columns)
        place[:video] = position * grid.frames + frame
    return mask[place[:video, None] // BLOCK, place[None] // BLOCK], mask


def masked(q, k, v, keep):
    """Softmax in float64 over the keys that keep [B, N, T, S] has; 0 where there are none."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    score = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weight = np.exp(score - score.max(-1, keepdims=True)) * keep
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnh->btnh", weight, v)


@functools.partial(jax.jit, static_argnames=("policy", "grid"))
def attended(policy, q, k, v, layer, grid, kv_length):
    return attend(q, k, v, run_of(policy), layer=layer, grid=grid, kv_length=kv_length)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_the_softmax_over_each_head_s_pattern(layer):
    patterns, grid = make_patterns(), RAGGED
    tokens = grid.num_tokens + grid.text
    length = jnp.asarray([tokens, 110], jnp.int32)  # of prompt 1 the last block is padding
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((B, tokens, 5, H)), jnp.float32) for _ in range(3))
    out, record = attended(make(patterns), q, k, v, jnp.int32(layer), grid, length)
    heads = [
        defined(mode, stripes, grid)
        for mode, stripes in zip(MODES[layer], patterns.stripes[layer], strict=True)
    ]
    sees = np.stack([head[0] for head in heads])
    sees = np.pad(sees, ((0, 0), (0, grid.text), (0, 0)), constant_values=True)
    live = np.arange(tokens) < np.asarray(length)[:, None]
    want = masked(q, k, v, sees[None] & live[:, None, None])
    np.testing.assert_allclose(out, want, atol=1e-5)  # float32 sums of 116 terms
    skipped = np.flatnonzero(MODES[layer] == 1)
    assert (np.asarray(out)[:, : grid.num_tokens, skipped] == 0).all()
    blocks = np.stack([head[1] for head in heads])
    assert (patterns.counts[layer] == blocks.sum(-1)).all()
    padding = 0.5 * 0.8 / blocks.shape[2]  # one block of prompt 1's, in all heads but one
    np.testing.assert_allclose(record.density, blocks.mean() - padding, rtol=1e-6)


def test_multi_diagonal_is_the_diagonal_of_the_transposed_grid():
    grid = dataclasses.replace(GRID, text=0)
    near = by_block(abs(np.subtract.outer(*[np.arange(120)] * 2)) <= WIDTH, 15, 15)
    assert (near_blocks(grid, BLOCK, BLOCK, WIDTH) == near).all()
    seen = defined(3, None, grid)[0].reshape(3, 40, 3, 40).transpose(1, 0, 3, 2)
    assert (seen.reshape(120, 120) == defined(2, None, grid)[0]).all()


@pytest.mark.parametrize("sizes", [(8, 8), (16, 8), (6, 9)])
@pytest.mark.parametrize("width", [0, 1, 20])
def test_a_block_is_in_the_band_if_any_pair_of_tokens_is(sizes, width):
    token = np.arange(RAGGED.num_tokens)
    i, j = np.nonzero(abs(token[:, None] - token[None]) <= width)
    want = np.zeros((-(-len(token) // sizes[0]), RAGGED.num_blocks(sizes[1])), bool)
    want[i // sizes[0], j // sizes[1]] = True
    want |= RAGGED.text_blocks(sizes[1])
    assert (near_blocks(RAGGED, *sizes, width) == want).all()


def test_without_patterns_the_band_is_as_wide_as_the_density_allows():
    k = jnp.zeros((B, GRID.num_tokens + GRID.text, 2, 1))

    def planned(density):
        policy, run = make(density=density), run_of(make())
        where = Context(run.step, jnp.int32(0), run.budget, run.keys, 1, "sparse", GRID)
        plan, _ = policy.plan(k[:, : GRID.num_tokens], k, k, where, ())
        assert plan.head_order is None and plan.blocks.count.shape == (B, 2, 15)
        return np.asarray(plan.blocks.count)[0, 0].sum()

    every = [near_blocks(GRID, BLOCK, BLOCK, width).sum() for width in range(1, 121)]
    for density in (0.4, 0.5, 0.75):
        fitting = [count for count in every if count <= density * 15 * 17]
        assert planned(density) == max(fitting) > every[0]
    assert planned(0.01) == every[0]
    assert planned(1.0) == 15 * 17


def test_budgets_are_the_patterns_mean_and_most():
    policy, counts = make(make_patterns(), dense_prefix=0.2), make_patterns().counts
    assert policy.budgets(10, 15).tolist() == [15] * 2 + [int(np.ceil(counts.mean()))] * 8
    assert policy.max_budget(10, 15) == counts.max() == 15
    assert make_patterns().density == pytest.approx(counts.mean() / 15)
    skipped = make(make_patterns(np.ones((2, 5), np.int8)))
    assert skipped.budgets(3, 15).tolist() == [1] * 3 and skipped.max_budget(3, 15) == 1
    assert make(density=0.3).budgets(3, 100).tolist() == [30] * 3


def test_patterns_are_kept_in_a_file(tmp_path):
    patterns = make_patterns()
    patterns.save(tmp_path / "a.json")
    again = HeadPatterns.load(tmp_path / "a.json")
    assert again == patterns and hash(again) == hash(patterns)
    assert again != make_patterns(MODES[::-1].copy())


def edited(**fields):
    return lambda record: {**record, **fields}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(format=2), "format=2 must be 1"),
        (edited(more=1), "the file must be an object with exactly"),
        (edited(block=0), "block=0 must be at least 1"),
        (edited(width=1.5), "width=1.5 must be a JSON value of type int"),
        (edited(weight="a"), "weight='a' must be a finite number"),
        (edited(modes=[0, 1]), r"modes must be whole numbers \[layers, heads\]"),
        (edited(modes=[[300]]), r"modes must be whole numbers \[layers, heads\]"),
        (edited(modes=[[0.5]]), r"modes must be whole numbers \[layers, heads\]"),
        (edited(columns=[]), "columns must be lists of block numbers below 13"),
        (edited(columns=[[[]] * 5, [[]] * 4]), "columns must be lists of block numbers below 13"),
        (edited(columns=[[[13]] * 5] * 2), "columns must be lists of block numbers below 13"),
        (edited(columns=[[["a"]] * 5] * 2), "columns must be lists of block numbers below 13"),
        (lambda record: [record] * 10**6, "has more than"),
    ],
)
def test_bad_files_are_refused(edit, message, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    make_patterns().save(file)
    if message == "has more than":
        monkeypatch.setattr("pasa_jax.policies.sparse_vdit._MAX_BYTES", 100)
    else:
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f"a.json' does not hold patterns: .*{message}"):
        HeadPatterns.load(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": 0}, "prompts=0 must be at least 1"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"width": -1}, "width=-1 must be at least 0 tokens"),
        ({"shape": (2, 4)}, r"10 modes and 130 columns must be those of \[layers, heads\] = \(2"),
        ({"columns": b""}, "10 modes and 0 columns must be those of"),
        ({"modes": bytes(9) + b"\x05"}, "must be from 0 to 4"),
        ({"modes": bytes(10)}, "columns must be there for striped heads, and for no others"),
        ({"columns": bytes(130)}, "columns must be there for striped heads, and for no others"),
    ],
)
def test_bad_patterns_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_patterns(), **fields)


def test_other_sizes_and_settings_are_refused():
    policy = make(make_patterns())
    policy.check_setting(KEY)
    with pytest.raises(ValueError, match="chosen for .*steps=10.*not for .*steps=9"):
        policy.check_setting(dataclasses.replace(KEY, steps=9))
    assert policy.init_state(AttentionShape(2, B, 5, H, RAGGED)) == ()
    with pytest.raises(ValueError, match=r"= \(2, 5\) must have the model's 2 layers and 4 heads"):
        policy.init_state(AttentionShape(2, B, 4, H, RAGGED))
    with pytest.raises(ValueError, match="patterns for .*columns=7.* must be for .*columns=8"):
        policy.init_state(AttentionShape(2, B, 5, H, GRID))
    with pytest.raises(ValueError, match=r"\(16, 8\) must be those of the patterns, 8"):
        make(make_patterns(), block_q=16)
    with pytest.raises(ValueError, match=r"density=0.0 must be in \(0, 1\]"):
        make(density=0.0)


LOSSES = np.array([[[1.0, 0.3]], [[0.2, 0.4]], [[0.2, 0.5]], [[0.6, 0.9]]])
KEPT = np.array([0.0, 0.4, 0.4, 0.2])


def test_the_least_loss_wins_up_to_the_largest():
    assert search.choose_modes(LOSSES, 1.0).tolist() == [[2, 1]]
    assert search.choose_modes(LOSSES, 0.25).tolist() == [[2, 0]]
    assert search.choose_modes(LOSSES, 0.3).tolist() == [[2, 1]]
    assert (search.choose_modes(LOSSES, -1.0) == 0).all()


@pytest.mark.parametrize(
    ("density", "modes"),
    # Full and full 1, diagonal and full 0.7, diagonal and skip 0.2.
    [(1.0, [[0, 0]]), (0.99, [[2, 0]]), (0.7, [[2, 0]]), (0.69, [[2, 1]]), (0.1, [[2, 1]])],
)
def test_a_density_sets_the_largest_loss(density, modes):
    loss = search.loss_for_density(LOSSES, KEPT, density)
    assert search.choose_modes(LOSSES, loss).tolist() == modes


PROMPTS = ["blue and white waves moving left", "a red circle moving up on a green background"]
CRITERION = search.Criterion(width=0.5, stripes=0.4, at=(0.25, 0.75))


@pytest.fixture(scope="module")
def searched(pipeline):
    """Patterns of two prompts at steps 1 and 3 of 5, and every q, k, v that the layers had."""
    seen, real = [], search._Observer.search

    def spy(self, q, k, v, context, state):
        where = self.measure.func.__name__, context.layer, context.step, q, k, v
        io_callback(lambda *x: seen.append((where[0], *x)), None, *where[1:])
        return real(self, q, k, v, context, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search._Observer, "search", spy)
        denoise, steps = module.denoise, []
        patch.setattr(module, "denoise", lambda *x: steps.append(x[-1]) or denoise(*x))
        options = {"criterion": CRITERION, "block": 4, "progress": False}
        patterns, found = search.search_patterns(pipeline, PROMPTS, **options)
    assert len(steps) == 2 * 2 * 4  # two runs a prompt, and no step behind the last of interest
    return patterns, found, seen


def test_a_search_measures_every_pattern_in_every_head(pipeline, searched):
    patterns, found, seen = searched
    (first, second), grid = ("_column_mass", "_errors"), TokenGrid(2, 4, 4)
    assert patterns.key == pipeline.card.curve_key(pipeline.card.settings())
    assert patterns.key.grid == grid and (patterns.block, patterns.width) == (4, 8)
    for name in (first, second):  # two prompts, two steps, two layers
        steps = [int(x[2]) for x in seen if x[0] == name]
        assert sorted(steps) == [1] * 4 + [3] * 4
    for layer in range(2):
        runs = [
            [np.asarray(x, np.float64) for x in run[3:]]
            for run in seen
            if (run[0], int(run[1])) == (second, layer)
        ]
        mass = np.zeros((2, 8))
        for q, k, _ in runs:
            weight = np.exp(np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5)
            weight /= weight.sum(-1, keepdims=True)
            mass += weight.reshape(2, 2, 32, 8, 4).sum((0, 2, 4))
        for head in range(2):
            stripes = np.isin(np.arange(8), np.argsort(-mass[head])[:3])
            assert (found.patterns.stripes[layer, head] == stripes).all()
            errors = []
            for q, k, v in runs:
                full = masked(q, k, v, np.ones((1, 1, 1, 1)))
                energy = (full**2).mean((1, 2, 3))
                for mode in range(1, 5):
                    sees = width8(mode, stripes, grid)
                    error = ((masked(q, k, v, sees) - full)[:, :, head] ** 2).mean((1, 2))
                    errors.append((error / energy).mean())
            want = np.reshape(errors, (4, 4)).mean(0)
            # Squares of float32 differences, small beside the outputs.
            np.testing.assert_allclose(found.errors[:, layer, head], want, rtol=1e-3, atol=1e-6)
    assert found.errors.min() > 0


def width8(mode, stripes, grid):
    """`defined` with blocks of 4 tokens."""
    token, near = np.arange(32), np.arange(8)
    place = token % 16 * 2 + token // 16 if mode == 3 else token
    blocks = {
        1: np.zeros((8, 8), bool),
        4: np.repeat(stripes[None], 8, 0),
        # A band of 8 tokens reaches the block behind the next.
        2: abs(near[:, None] - near[None]) <= 2,
    }
    return blocks[2 if mode == 3 else mode][place[:, None] // 4, place[None] // 4][None, None]


def test_a_search_chooses_by_loss_weight_and_density(searched):
    patterns, found, _ = searched
    band = near_blocks(TokenGrid(2, 4, 4), 4, 4, 8).mean()
    np.testing.assert_allclose(found.kept, [0, band, band, 3 / 8])
    assert found.choose(CRITERION) == patterns
    losses = found.errors + 0.5 * found.kept[:, None, None]
    assert (patterns.table == search.choose_modes(losses, 0.5)).all()
    free = found.choose(dataclasses.replace(CRITERION, weight=0.0, max_loss=10.0))
    assert (free.table == found.errors.argmin(0) + 1).all()
    assert (free.stripes.any(-1) == (free.table == 4)).all()
    none = found.choose(dataclasses.replace(CRITERION, max_loss=-1.0))
    assert (none.table == 0).all() and none.density == 1
    fewer = found.choose(dataclasses.replace(CRITERION, density=0.8))
    assert 0.4 < fewer.density <= 0.8 and fewer.max_loss != 0.5


def test_patterns_run_and_are_refused_elsewhere(pipeline, searched):
    policy = SparseVdit(masks=searched[0], block_q=4, block_kv=4, dense_prefix=0.4)
    result = pipeline.generate(PROMPTS[:1], policy=policy, progress=False)
    assert np.isfinite(result.latents).all()
    assert (result.densities[:2] == 1).all()
    layers = searched[0].counts.mean((1, 2)) / 8
    np.testing.assert_allclose(result.densities[2:], np.stack([layers] * 3), atol=1e-6)
    with pytest.raises(ValueError, match="chosen for .*steps=5.*not for .*steps=4"):
        pipeline.generate(PROMPTS[:1], policy=policy, steps=4, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": -1.0}, "width=-1.0 must be 0 or more and finite"),
        ({"weight": float("nan")}, "weight=nan must be 0 or more and finite"),
        ({"stripes": 0.0}, r"stripes=0.0 must be in \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
        ({"max_loss": float("inf")}, "max_loss=inf must be finite"),
        ({"at": ()}, r"at=\(\) must hold at least one share of the run"),
        ({"at": (1.5,)}, r"at=1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_criteria_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        search.Criterion(**fields)


def test_seeds_are_one_a_prompt(pipeline):
    with pytest.raises(ValueError, match="must be one for each of the 2 prompts"):
        search.search_patterns(pipeline, PROMPTS, seeds=[1])
