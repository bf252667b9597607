"""PAROAttention: six orders, what chooses among them, masks, a whole calibration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import paro_search as search
from pasa_jax.attention import Attention, attend
from pasa_jax.calibration import CurveKey
from pasa_jax.cli import main
from pasa_jax.grid import TokenGrid
from pasa_jax.pallas_kernels import api
from pasa_jax.paro_search import Criterion
from pasa_jax.policies import AttentionShape, Paro, ParoMasks
from pasa_jax.policies.paro import AXES, order_table

B, N, H, BLOCK = 2, 3, 8, 8
GRID = TokenGrid(3, 4, 7, text=10)  # 84 tokens: block 10 holds video and text, 11 text alone
KEY = CurveKey("tiny", GRID, 10, "unipc", 1.0, 1.0)
ORDERS = ((0, 3, 5), (4, 1, 2))


def random_masks(seed=0, *, full=False, **fields):
    """Masks of 2 layers, 2 buckets, 3 heads on GRID, and the bools [2, 2, 3, 11, 12] they hold."""
    mask = np.random.default_rng(seed).random((2, 2, N, 11, 12)) < (2.0 if full else 0.4)
    mask[..., 10:] = True
    record = {
        "key": KEY,
        "block": BLOCK,
        "starts": (0, 5),
        **{"density": 0.5, "alpha": 0.5, "small": 1e-3, "share": 0.9, "prompts": 1},
        "orders": ORDERS,
        "bits": np.packbits(mask, axis=-1).tobytes(),
    }
    return ParoMasks(**{**record, **fields}), mask


def small(**fields):
    return Paro(block_q=BLOCK, block_kv=BLOCK, **fields)


def random_qkv(seed=0):
    shape = (3, B, 94, N, H)
    return [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(seed).standard_normal(shape)]


@functools.partial(jax.jit, static_argnums=0)
def attended(policy, q, k, v, step, layer, length):
    keys = jax.random.split(jax.random.key(0), 1)
    run = Attention(policy, "sparse", step, jnp.int32(6), keys, 6)
    return attend(q, k, v, run, layer=layer, grid=GRID, kv_length=length)


def test_the_orders_are_six_and_complete():
    table = order_table(GRID)
    assert len(set(AXES)) == len({tuple(order) for order in table.tolist()}) == 6
    assert (np.sort(table, axis=1) == np.arange(84)).all()
    places = np.indices(GRID.sizes).reshape(3, -1)
    for axes, order in zip(AXES, table, strict=True):
        # From slowest to fastest the axes' numbers rise as those of a counter do.
        assert (np.lexsort([places[axis] for axis in axes[::-1]]) == order).all()


@pytest.mark.parametrize("full", [False, True])
def test_attention_is_the_masked_softmax_in_each_heads_order(full):
    masks, mask = random_masks(full=full)
    policy, length = small(masks=masks), np.array([94, 88])  # of row 1 the last block holds none
    q, k, v = random_qkv()
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    weight = np.exp(np.einsum("btnh,bsnh->bnts", q64, k64) * H**-0.5)
    table, valid = order_table(GRID), jnp.asarray(length, jnp.int32)
    for step, bucket, layer in [(4, 0, 1), (5, 1, 0), (9, 1, 1)]:
        out, record = attended(policy, q, k, v, jnp.int32(step), jnp.int32(layer), valid)
        sees = np.ones((B, N, 94, 94), bool)
        for head in range(N):
            place = np.argsort(table[ORDERS[layer][head]])
            column = np.concatenate([place, np.arange(84, 94)]) // BLOCK
            sees[:, head, :84] = mask[layer, bucket, head][place // BLOCK][:, column]
        sees &= (np.arange(94) < length[:, None])[:, None, None]
        part = weight * sees
        want = np.einsum("bnts,bsnh->btnh", part / part.sum(-1, keepdims=True), v64)
        np.testing.assert_allclose(out, want, atol=1e-5)  # float32 sums of 94 terms
        kept = (mask[layer, bucket].sum() - 0.5 * N * 11) / (N * 11 * 12)
        np.testing.assert_allclose(record.density, kept, rtol=1e-6)
        assert (record.density > 0.95) == full


def test_budgets_are_the_masks_own():
    masks, mask = random_masks()
    counts = mask.sum(-1)
    policy = small(masks=masks, dense_prefix=0.2)
    assert (masks.counts == counts).all() and policy.max_budget(10, 12) == counts.max()
    each = np.ceil(counts.mean((0, 2, 3))).tolist()
    assert policy.budgets(10, 12).tolist() == [12, 12] + each[:1] * 3 + each[1:] * 5
    assert Paro().budgets(10, 275).tolist() == [137] * 10


def test_masks_are_saved_and_loaded(tmp_path):
    masks, _ = random_masks()
    masks.save(tmp_path / "paro.json")
    again = ParoMasks.load(tmp_path / "paro.json")
    assert again == masks and hash(again) == hash(masks)


DAMAGES = [
    ('"format":1', '"format":2', "format=2 must be 1"),
    ('"block":8', '"block":8.5', "block=8.5 must be a JSON value of type int"),
    ('"starts":[0,5]', '"starts":[0,true]', "starts=True must be a JSON value of type int"),
    ('"bits":"', '"bits":"*', "does not hold PARO masks"),
    ('"prompts":1,', "", "the file must be an object with exactly"),
]


@pytest.mark.parametrize(("old", "new", "message"), DAMAGES)
def test_damaged_files_are_refused(tmp_path, old, new, message):
    path = tmp_path / "paro.json"
    random_masks()[0].save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        ParoMasks.load(path)


def test_endless_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pasa_jax.policies.paro._MAX_BYTES", 10)
    (tmp_path / "long.json").write_text(" " * 11)
    with pytest.raises(ValueError, match="it has more than 10 bytes"):
        ParoMasks.load(tmp_path / "long.json")


NO_TEXT = np.packbits(np.arange(12) < 11).tobytes() * (2 * 2 * N * 11)
RECORDS = [
    ({"block": 0}, "block=0 must be at least 1"),
    ({"prompts": 0}, "prompts=0 must be at least 1"),
    ({"density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
    ({"alpha": -0.5}, r"alpha=-0.5 must be in \[0, 1\]"),
    ({"starts": ()}, r"starts=\(\) must rise from 0 and be below 10 steps"),
    ({"starts": (1, 5)}, r"starts=\(1, 5\) must rise"),
    ({"starts": (0, 10)}, r"starts=\(0, 10\) must rise"),
    ({"starts": (0, 0)}, r"starts=\(0, 0\) must rise"),
    ({"orders": ((0, 1, 6), (0, 1, 2))}, "orders must be numbers from 0 to 5"),
    ({"orders": ((0, 1), (0, 1, 2))}, "orders must be numbers from 0 to 5"),
    ({"bits": b"123"}, r"len\(self.bits\)=3 must be 264"),
    ({"bits": NO_TEXT}, "bits must keep all text"),
]


@pytest.mark.parametrize(("fields", "message"), RECORDS)
def test_bad_masks_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        random_masks(**fields)


def test_an_empty_row_is_refused():
    key = dataclasses.replace(KEY, grid=TokenGrid(3, 4, 7))
    bits = np.zeros((2, 2, N, 11, 2), np.uint8).tobytes()
    with pytest.raises(ValueError, match="and a key block for every query block"):
        random_masks(key=key, bits=bits)


def test_masks_are_refused_elsewhere(untyped):
    masks, _ = random_masks()
    policy = small(masks=masks)
    policy.check_setting(KEY)
    with pytest.raises(ValueError, match=r"calibrated for .*steps=10.*not for .*steps=9"):
        policy.check_setting(dataclasses.replace(KEY, steps=9))
    with pytest.raises(ValueError, match="masks of layers=2 and heads=3 must have the model's 4"):
        policy.init_state(AttentionShape(4, B, N, H, GRID))
    with pytest.raises(ValueError, match="masks for .* must be for"):
        policy.init_state(AttentionShape(2, B, N, H, TokenGrid(3, 4, 7)))
    with pytest.raises(ValueError, match=r"block_q, block_kv=\(8, 16\) must be those of the masks"):
        Paro(masks=masks, block_q=8, block_kv=16)
    with pytest.raises(ValueError, match=r"density=0.0 must be in \(0, 1\]"):
        Paro(density=0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"small": 2.0}, r"small=2.0 must be in \[0, 1\]"),
        ({"reuse": 0}, "reuse=0 must be at least 1 step"),
        ({"block": 0}, "block=0 must be at least 1 token"),
    ],
)
def test_bad_criteria_are_refused(fields, message, untyped):
    with pytest.raises(ValueError, match=message):
        Criterion(**fields)


def test_half_of_the_run_has_masks_of_its_own():
    assert Criterion().starts(6) == (0, 1, 2, 3)
    assert Criterion(reuse=2).starts(10) == (0, 2, 4, 5)
    assert Criterion(reuse=9).starts(10) == (0, 5)
    assert Criterion().starts(1) == (0,)


def exact_weights(q, k, tokens):
    """Post-softmax weights [B, N, T, T] over the video's keys, in float64."""
    score = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (q, k)))
    weight = np.exp(score * q.shape[-1] ** -0.5)
    return (weight / weight.sum(-1, keepdims=True))[:, :, :tokens, :tokens]


def by_the_paper(weight, small, share):
    """Mass [I, J], M_sparse and M_quant of one map [T, T], block by block."""
    blocks = -(-len(weight) // BLOCK)
    mass, empty, uneven = (np.zeros((blocks, blocks)) for _ in range(3))
    for i, j in np.ndindex(blocks, blocks):
        part = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        mass[i, j] = part.sum() / len(part)
        empty[i, j] = (part < small).mean() >= share
        uneven[i, j] = part.max() / part.mean()
    return mass, empty.mean(), uneven.mean()


recorded = jax.jit(
    lambda recorder, q, k, v, layer, grid: attend(
        q,
        k,
        v,
        Attention(recorder, "search", jnp.int32(0), jnp.int32(1), jax.random.key(0)[None], 1),
        layer=layer,
        state=jnp.zeros((2, N, 1, 1))[0],
        grid=grid,
    ),
    static_argnums=(0, 5),
)


@pytest.mark.parametrize("orders", [None, ORDERS])
def test_the_recorder_keeps_the_figures_of_the_exact_map(orders):
    # Of 64 weights of a full block, 48 are to be below the limit, of which a third is.
    small_weight, share = 0.006, 0.75
    recorder = search.Recorder(
        small=small_weight, share=share, orders=orders, block_q=BLOCK, block_kv=BLOCK
    )
    q, k, v = random_qkv()
    out, record = recorded(recorder, q, 2 * k, v, jnp.int32(1), GRID)
    np.testing.assert_allclose(out, api.dense_attention(q, 2 * k, v), atol=2e-6)
    assert record.state.shape == recorder.init_state(AttentionShape(2, B, N, H, GRID)).shape[1:]
    weight = exact_weights(q, 2 * k, 84)
    for head in range(N):
        numbers = range(6) if orders is None else [orders[1][head]]
        for number in numbers:
            order = order_table(GRID)[number]
            maps = [by_the_paper(w[head][order][:, order], small_weight, share) for w in weight]
            mass, empty, uneven = (np.mean(x, axis=0) for x in zip(*maps, strict=True))
            if orders is None:
                assert 0.1 < empty < 0.9
                # float32 sums of 64 weights; a weight near the limit moves one block of 121.
                np.testing.assert_allclose(record.state[head, number, 0], empty, atol=0.009)
                np.testing.assert_allclose(record.state[head, number, 1], uneven, rtol=1e-5)
            else:
                np.testing.assert_allclose(record.state[head], mass, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_head_of_equal_columns_puts_columns_slowest(alpha):
    """Also heads of equal rows, and of equal frames: each its own axis slowest."""
    grid = TokenGrid(4, 4, 4)  # 16 tokens of each column: two blocks
    code = np.indices(grid.sizes).reshape(3, -1)[[2, 1, 0]]  # [N, T]
    rng = np.random.default_rng(0)
    one_hot = np.eye(H)[code.T][None].repeat(B, 0)
    q = jnp.asarray(30 * one_hot + 0.01 * rng.standard_normal(one_hot.shape), jnp.float32)
    recorder = search.Recorder(small=1e-3, share=0.9, block_q=BLOCK, block_kv=BLOCK)
    _, record = recorded(recorder, q, jnp.asarray(one_hot, jnp.float32), q, jnp.int32(0), grid)
    figures = np.asarray(record.state, np.float64)
    chosen = search.choose_orders(figures[..., 0], figures[..., 1], alpha)
    assert [AXES[order][0] for order in chosen] == [2, 1, 0]


def test_orders_weigh_both_figures():
    empty, uneven = (np.array([x]) for x in ([0.1, 0.5, 0.3, 0.1, 0.1], [1.0, 5.0, 2.0, 9.0, 9.0]))
    # Stretched: 1 − empty is 1, 0, ½ and uneven 0, ½, ⅛ for the first three.
    chosen = [search.choose_orders(empty, uneven, alpha).tolist() for alpha in (0.0, 0.3, 0.5, 1.0)]
    assert chosen == [[0], [2], [1], [1]]
    assert (
        search.choose_orders(np.ones((2, 3, 6)), np.ones((2, 3, 6)), 0.5).tolist() == [[0] * 3] * 2
    )


@pytest.mark.parametrize(("density", "kept"), [(0.1, 15), (0.5, 17), (0.7, 24), (1.0, 35)])
def test_masks_keep_the_heaviest_blocks(density, kept):
    rng, text = np.random.default_rng(0), np.arange(7) >= 5  # one block beside video, one alone
    mass = rng.random((2, 5, 6))
    mass[..., 5] *= 0.1
    mass[0, 3] *= 0.1  # whose heaviest block would not be among the heaviest
    mask = search.heaviest_blocks(mass, density, text)
    assert mask.shape == (2, 5, 7) and mask[..., text].all()
    assert (mask.sum((1, 2)) == kept).all()
    for one, other in zip(mask[..., :5], mass[..., :5], strict=True):
        best = other == other.max(1, keepdims=True)
        assert one[best].all()
        taken, left = other[one & ~best], other[~one]
        assert taken.min(initial=2) > left.max(initial=-1)


PROMPTS = ["blue and white waves moving left", "a red circle moving up on a green background"]
FINE = Criterion(block=4, reuse=2, density=0.4, small=0.01)


@pytest.fixture(scope="module")
def calibrated(pipeline):
    """Of two prompts: steps 0 and 2 of 5 are recorded."""
    return search.calibrate_paro(pipeline, PROMPTS, criterion=FINE, progress=False)


def test_a_calibration_is_the_mean_of_its_prompts(pipeline, calibrated):
    settings = pipeline.card.settings()
    grid = pipeline.card.grid(settings)
    assert calibrated.key == pipeline.card.curve_key(settings)
    assert (calibrated.starts, calibrated.prompts, calibrated.block) == ((0, 2), 2, 4)
    plan = search.Search.start(pipeline.card, settings, FINE)

    def mean(recorder):
        found = []
        for seed, prompt in enumerate(PROMPTS):
            text = pipeline.encode([prompt], "", 2.0)
            states = list(plan.sample(pipeline, text, seed, recorder))
            assert [state is not None for state in states] == [True, False, True]
            found.append([state for state in states if state is not None])
        return (np.stack(found[0]) + np.stack(found[1])) / np.float32(2)

    scores = mean(plan.recorder(None)).mean(0, dtype=np.float64)
    orders = search.choose_orders(scores[..., 0], scores[..., 1], 0.5)
    assert np.asarray(calibrated.orders).tolist() == orders.tolist()
    mass = mean(plan.recorder(calibrated.orders)).swapaxes(0, 1)
    rows = mass.shape[-1]
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-6)
    want = search.heaviest_blocks(mass, 0.4, grid.text_blocks(4))
    assert (np.unpackbits(calibrated.table, axis=-1, count=rows).astype(bool) == want).all()
    assert (calibrated.counts.sum(-1) == int(0.4 * rows**2)).all()


def test_calibrated_masks_run_and_are_refused_elsewhere(pipeline, calibrated):
    policy = Paro(masks=calibrated, block_q=4, block_kv=4)
    result = pipeline.generate(PROMPTS[:1], policy=policy, progress=False)
    assert np.isfinite(result.latents).all()
    share = calibrated.counts.mean((2, 3)) / calibrated.shape[-1]  # [layers, buckets]
    np.testing.assert_allclose(result.densities, share.T[[0, 0, 1, 1, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="calibrated for .*steps=5.*not for .*steps=4"):
        pipeline.generate(PROMPTS[:1], policy=policy, steps=4, progress=False)


def test_a_calibration_is_checked_first(pipeline):
    with pytest.raises(ValueError, match=r"seeds=\[1\] must be one for each of the 2 prompts"):
        search.calibrate_paro(pipeline, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="block=999 must be at most the video's tokens="):
        search.calibrate_paro(pipeline, PROMPTS, criterion=Criterion(block=999))


def refused(capsys, argv):
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.fixture
def at_tiny(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pasa_jax.models.tiny.WEIGHTS", tiny_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_calibrates_and_generate_uses_it(at_tiny, calibrated, monkeypatch, capsys):
    calls, asked = [], []

    def calibrate(pipeline, prompts, **options):
        calls.append((prompts, options))
        names = [field.name for field in dataclasses.fields(pipeline.card.defaults)]
        settings = pipeline.card.settings(**{name: options[name] for name in names})
        return dataclasses.replace(calibrated, key=pipeline.card.curve_key(settings))

    monkeypatch.setattr(search, "calibrate_paro", calibrate)
    small = ["--frames", "8", "--size", "32x32", "--steps", "5", "--no-progress"]
    fine = ["--block", "4", "--alpha", "0.2", "--reuse", "2"]
    assert main(["search", "paro", PROMPTS[0], "--out", "m.json", *fine, *small]) == 0
    assert (
        "1 masks for" not in (told := capsys.readouterr().out) and "2 masks for each of 4" in told
    )
    assert [path.name for path in at_tiny.iterdir()] == ["m.json"]
    ((prompts, options),) = calls
    assert prompts == PROMPTS[:1] and options["steps"] == 5
    assert options["criterion"] == Criterion(block=4, alpha=0.2, reuse=2)
    monkeypatch.setattr("pasa_jax.pipeline.Pipeline.generate", lambda *_, **o: asked.append(o))
    monkeypatch.setattr("pasa_jax.cli.generate._write", lambda *_: None)
    run = ["generate", PROMPTS[1], "--policy", "paro", "--masks", "m.json", "--out", "a.png"]
    assert main([*run, *small]) == 0
    masks = ParoMasks.load("m.json")
    assert asked[0]["policy"] == Paro(masks=masks, block_q=4, block_kv=4)
    assert "calibrated for" in refused(capsys, [*run, *small, "--guidance", "1"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["search", "paro", "--alpha", "2"], "alpha=2.0 must be in [0, 1]"),
        (["search", "paro", "--block", "5000"], "block=5000 must be at most the video's tokens="),
        (["search", "paro", "--out", "a.txt"], "must end in .json"),
        (["generate", PROMPTS[0], "--policy", "paro", "--masks", "none.json"], "none.json"),
    ],
)
def test_commands_refuse_in_one_line(at_tiny, monkeypatch, capsys, argv, words):
    monkeypatch.setattr("pasa_jax.pipeline.Pipeline.load", lambda *args: 1 / 0)
    assert words in refused(capsys, argv)
    assert not list(at_tiny.iterdir())
