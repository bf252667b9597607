"""Recordings of a run, planted heads, and what policies' blocks hold of their attention."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import recall, recording
from pasa_jax.cli import main
from pasa_jax.grid import TokenGrid
from pasa_jax.models.wan import Wan
from pasa_jax.policies import AdaSpa, Dense, Pasa, Pisa
from pasa_jax.recording import planted, record

BLOCK = dict(block_q=8, block_kv=8)
GRID = TokenGrid(2, 6, 8)  # 12 blocks


@pytest.fixture(scope="module")
def heads():
    return planted(GRID, head_dim=32)


def weights(recording, head):
    """Softmax weights [T, T] of batch row 0, float64."""
    q, k = (np.asarray(x, np.float64)[0, :, head] for x in recording[:2])
    logits = q @ k.T / np.sqrt(q.shape[1])
    logits = np.exp(logits - logits.max(1, keepdims=True))
    return logits / logits.sum(1, keepdims=True)


def test_planted_heads_have_their_shapes(heads):
    frames, rows, columns = (x.reshape(-1) for x in np.indices(GRID.sizes))
    local, cross, whole = (weights(heads, head) for head in range(3))
    distance = (
        (frames[:, None] - frames) ** 2
        + (rows[:, None] - rows) ** 2
        + (columns[:, None] - columns) ** 2
    )
    assert local[distance <= 9].sum() > 0.8 * len(local)  # a third of the keys at most
    aligned = (rows[:, None] == rows) | (columns[:, None] == columns)
    # e^4 times for each of row and column: 0.99 of the mass beside even logits, a quarter of the
    # keys; the Wan's own logits, whose deviation is about 1, cost a little of it.
    assert cross[aligned].sum() > 0.85 * len(cross)
    assert (whole.argmax(1) % 50 == 0).mean() > 0.6


def test_planted_heads_stand_in_a_wan_of_random_weights(heads, monkeypatch):
    seen, real = [], recording.record_step

    def spy(pipeline, *args, **where):
        seen.append((pipeline.model, where["layer"], real(pipeline, *args, **where)))
        return seen[-1][2]

    monkeypatch.setattr(recording, "record_step", spy)
    again = planted(GRID, head_dim=32)
    assert all((a == b).all() for a, b in zip(heads[:3], again[:3], strict=True))
    ((model, layer, own),) = seen
    assert isinstance(model, Wan) and layer == 1 and own.grid == GRID
    np.testing.assert_array_equal(again.v, own.v)
    for planted_on, of_the_wan in zip(again[:2], own[:2], strict=True):
        np.testing.assert_array_equal(planted_on[:, :, 2, 1:], of_the_wan[:, :, 2, 1:] / 2)
        # Cross-shaped: channels behind those of rows and columns.
        np.testing.assert_array_equal(planted_on[:, :, 1, 14:], of_the_wan[:, :, 1, 14:] / 2)


def test_planted_heads_must_fit():
    with pytest.raises(ValueError, match="head_dim=16 must be at least 16 and twice the 14"):
        planted(GRID, head_dim=16)


def test_a_recording_is_what_the_layer_attends_with(pipeline, monkeypatch):
    from pasa_jax.models import wan

    seen = []
    attend = wan.attend

    def spy(q, k, v, attention, **where):
        import jax

        jax.debug.callback(lambda *x: seen.append(x), where["layer"], attention.step, q, k, v)
        return attend(q, k, v, attention, **where)

    monkeypatch.setattr(wan, "attend", spy)
    options = dict(steps=3, progress=False)
    recording = record(pipeline, "red and blue waves moving up", layer=1, step=1, **options)
    (own,) = [x for x in seen if (int(x[0]), int(x[1])) == (1, 1)]
    for kept, real in zip(recording[:3], own[2:], strict=True):
        np.testing.assert_array_equal(kept, real)
    assert recording.grid.num_tokens == recording.q.shape[1]
    assert max(int(x[1]) for x in seen) == 1  # the run ends behind the step


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (dict(layer=2, step=0), "layer=2 must be from 0 to 1"),
        (dict(layer=0, step=5), "step=5 must be from 0 to 4"),
        (dict(layer=0, step=-1), "step=-1 must be from 0 to 4"),
    ],
)
def test_no_such_layer_or_step(pipeline, where, message):
    with pytest.raises(ValueError, match=message):
        record(pipeline, "red and blue waves moving up", **where)


def test_recall_is_the_mass_in_exact_blocks(heads):
    judged = recall.judge(Pisa(density=0.3, **BLOCK), heads, steps=5)
    assert judged.density == pytest.approx(3 / 12)
    for head in range(3):
        mass = weights(heads, head).reshape(12, 8, 12, 8).sum((1, 3)) / 8
        np.testing.assert_allclose(judged.mass[head], mass, atol=1e-5)  # float32 sums of 96
        held = (mass * judged.mask[head]).sum() / 12
        assert judged.recall[head] == pytest.approx(held, abs=1e-5)
    assert (judged.mask.sum(-1) == 3).all()
    # More blocks hold more and err less.
    more = recall.judge(Pisa(density=0.8, **BLOCK), heads, steps=5)
    assert (more.recall > judged.recall).all() and (more.error < judged.error).all()


def test_all_blocks_hold_all_mass(heads):
    judged = recall.judge(Pasa(density=1.0, group=4, **BLOCK), heads, steps=5)
    np.testing.assert_allclose(judged.recall, 1, atol=1e-6)
    assert judged.density == 1 and judged.error.max() < 1e-5  # float32 in another order


def test_a_policy_that_never_plans_is_refused(heads):
    with pytest.raises(ValueError, match="runs dense at all of steps=5"):
        recall.judge(Dense(**BLOCK), heads, steps=5)
    with pytest.raises(ValueError, match="step=0 must be one that is not dense: 1 to 4"):
        recall.judge(Pisa(**BLOCK), heads, steps=5, step=0)


class Broken(Pisa):
    """Its own code is wrong."""

    def plan(self, q, k, v, context, state):
        raise TypeError


def test_curves_have_a_row_a_density_and_report_failures(heads, tmp_path):
    families = {
        "broken": [Broken(**BLOCK)] * 2,
        "pisa": [Pisa(density=d, **BLOCK) for d in (0.2, 0.5)],
        "dense": [Dense(**BLOCK)] * 2,
    }
    rows = recall.recall_curves([heads], families, steps=5)
    assert [row["method"] for row in rows] == ["broken", "pisa", "pisa", "dense"]
    assert rows[0]["failure"] == "TypeError" and "nothing to judge" in rows[3]["failure"]
    assert rows[1]["density"] < rows[2]["density"] and not rows[1]["oracle"]
    recall.plot_recall(tmp_path / "recall.png", rows)
    assert (tmp_path / "recall.png").stat().st_size > 5000


def test_the_picture_shows_mass_beside_the_mask():
    mass = np.asarray([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    mask = mass > 0.9
    shown = recall.picture(recall.Judged(0.5, np.ones(1), np.zeros(1), mass, mask), 0)
    assert shown.shape == (2, 10)
    assert shown[1, 3] == 0 and shown[0, 2] == 255  # most mass black, none white
    assert shown[:, 6:].tolist() == [[255] * 4, [255, 255, 255, 0]]


def test_a_large_picture_is_drawn_in_means():
    mass = np.zeros((1, 4, 6))
    mass[0, 0, 0], mass[0, 3, 4] = 0.5, 1.0
    mask = mass > 0
    shown = recall.picture(recall.Judged(0.5, np.ones(1), np.zeros(1), mass, mask), 0, most=2)
    # 2 x 3 blocks a pixel: half the most mass, by its root, and one exact block of six.
    want = [[255 * (1 - 0.5**0.5), 255, 255, 255, 255 * 5 / 6, 255], [255, 0, 255, 255, 255, 212.5]]
    np.testing.assert_allclose(shown, want, atol=1)  # whole numbers
    uneven = recall.picture(recall.Judged(1.0, np.ones(1), np.zeros(1), mass, mass >= 0), 0, most=3)
    assert uneven.shape == (3, 8) and (uneven[:, 5:] == 0).all()


class Stacked(Pisa):
    """Its state, by layer, is its budget."""

    def init_state(self, shape):
        return 1 + jnp.arange(shape.layers)

    def plan(self, q, k, v, context, state):
        return super().plan(q, k, v, dataclasses.replace(context, budget=state), state)


def test_a_state_is_its_layers_own(heads):
    judged = recall.judge(Stacked(density=0.3, **BLOCK), heads._replace(layers=4), layer=2, steps=5)
    assert judged.density == pytest.approx(3 / 12)


def test_width_counts_the_blocks_that_attention_falls_on(heads):
    even = np.zeros((1, 96, 2, 4), np.float32)
    one = even.copy()
    one[0, :8, 1, 0] = 200.0  # of the second head all mass lies in the first block
    queries = even.copy()
    queries[..., 0] = 2.0
    found = recall.width(heads._replace(q=queries, k=one, v=even), 8)
    np.testing.assert_allclose(found, [12, 1], rtol=1e-4)  # float32 sums


def test_look_shows_the_narrowest_and_the_widest_head(heads, caplog):
    policies = {
        "adaspa": AdaSpa(density=0.3, dense_prefix=0.4, **BLOCK),
        "dense": Dense(**BLOCK),
        "broken": Broken(**BLOCK),
    }
    # It searches at step 2.
    where = dict(steps=4, step=3, layer=1, seed=0)
    found = recall.look(heads, policies, block=8, most=12, **where)
    widths = recall.width(heads, 8)
    narrow, wide = found.heads
    assert (narrow["head"], wide["head"]) == (widths.argmin(), widths.argmax())
    assert wide["width"] == pytest.approx(widths.max(), abs=1e-3) and found.num_blocks == 12
    judged = recall.judge(policies["adaspa"], heads, **where)
    for head in found.heads:
        i, told = head["head"], head["methods"]["adaspa"]
        assert told["density"] == pytest.approx(judged.mask[i].mean(), abs=1e-6)
        assert told["recall"] == pytest.approx(judged.recall[i], abs=1e-6)
        assert told["error"] == pytest.approx(judged.error[i], abs=1e-6)
        np.testing.assert_array_equal(found.pictures[i]["adaspa"], recall.picture(judged, i))
        assert "nothing to judge" in head["methods"]["dense"]["failure"]
        assert head["methods"]["broken"] == {"failure": "TypeError"}
        assert set(found.pictures[i]) == {"adaspa"}
    assert "no blocks of dense" in caplog.text


def test_a_search_on_what_is_judged_is_told():
    assert recall.is_oracle(AdaSpa(dense_prefix=0.4), 4)
    assert not recall.is_oracle(Pisa(), 4) and not recall.is_oracle(AdaSpa(dense_prefix=1.0), 4)
    judged = recall.Judged(0.5, np.ones(1), np.zeros(1), np.ones((1, 2, 4)), np.ones((1, 2, 4)) > 0)
    told = [recall.Shown.of(p, judged, 5, None) for p in (AdaSpa(), Pisa())]
    assert recall.head_told(told[0], 0).endswith("(searched on these very q and k)")
    assert recall.head_told(told[1], 0) == "density 1.000, recall 1.000, error 0.000"


def test_gamma_is_the_curve_over_its_mean_behind_the_prefix():
    judged = recall.Judged(0.5, np.ones(1), np.zeros(1), np.ones((1, 2, 4)), np.ones((1, 2, 4)) > 0)
    curve = (9.0, 9.0, 1.0, 2.0, 3.0)
    policy = Pasa(density=0.5, dense_prefix=0.4)
    shown = recall.Shown.of(policy, judged, 5, curve)
    np.testing.assert_allclose(shown.gamma, [np.nan, np.nan, 0.5, 1, 1.5])
    np.testing.assert_allclose(shown.budgets, [1, 1, 0.25, 0.5, 0.75])
    flat = recall.Shown.of(policy, judged, 5, (9.0, 9.0, 0.0, 0.0, 0.0))
    np.testing.assert_array_equal(flat.gamma[2:], 1)
    assert recall.Shown.of(policy, judged, 5, None).gamma is None
    assert recall.Shown.of(Pisa(), judged, 5, curve).gamma is None


def test_the_drawing_tells_one_heads_density_and_the_measured_beside_the_asked(
    heads, tmp_path, monkeypatch
):
    figures = []

    def savefig(figure, path, **_):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    mask = np.asarray([[[True, False]], [[True, True]]])
    judged = recall.Judged(0.75, np.asarray([0.5, 1]), np.zeros(2), np.full((2, 1, 2), 0.5), mask)
    shown = {"a": recall.Shown(judged, np.asarray([1, 0.2]), np.asarray([np.nan, 1.5]), False)}
    where = dict(head=0, step=1, failures={"b": "no"})
    recall.write_inspection(tmp_path / "look.png", heads, shown, **where)
    picture, budgets, gamma = figures[0].axes
    assert picture.get_title() == "a: density 0.500, recall 0.500, error 0.000"
    asked, measured = (line.get_xydata().tolist() for line in budgets.lines)
    assert asked == [[0, 1], [1, 0.2]] and measured == [[1, 0.75]]
    np.testing.assert_array_equal(gamma.lines[0].get_ydata(), [np.nan, 1.5])
    told = json.loads((tmp_path / "look.json").read_text())["policies"]
    assert told["a"]["density"] == [0.5, 1] and told["a"]["density of all heads"] == 0.75
    assert told["a"]["gamma"] == [None, 1.5] and told["b"] == {"failure": "no"}


def test_inspect_writes_picture_and_figures(tiny_folder, tmp_path, capsys):
    out = tmp_path / "look.png"
    order = ["inspect", "--model", str(tiny_folder), "--steps", "3", "--size", "32x32"]
    order += ["--frames", "8", "--policies", "dense", "pisa", "--block", "4", "--out", str(out)]
    assert main([*order, "--no-progress"]) == 0
    told = json.loads(out.with_suffix(".json").read_text())
    assert list(told["policies"]) == ["pisa", "dense"] and told["grid"] == [2, 4, 4]
    assert told["policies"]["pisa"]["budgets"] == [1.0, 0.125, 0.125]
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert "nothing to judge" in told["policies"]["dense"]["failure"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dense: failed: Dense(")
    assert lines[1].startswith("pisa: density 0.125, recall")


def test_inspect_needs_a_method_that_can_be_judged(
    heads, tiny_folder, tmp_path, monkeypatch, capsys
):
    def judge(*args, **where):
        raise IndexError("out of bounds")

    monkeypatch.setattr(recall, "judge", judge)
    monkeypatch.setattr(recording, "record", lambda *args, **where: heads)
    order = ["inspect", "--model", str(tiny_folder), "--policies", "pisa"]
    assert main([*order, "--out", str(tmp_path / "a.png")]) == 2
    assert "could be judged: {'pisa': 'out of bounds'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["inspect", "--head", "9"], "head=9 must be from 0 to 3"),
        (["inspect", "--layer", "9"], "layer=9 must be from 0 to 3"),
        (["inspect", "--out", "x.jpg"], "must end in .png"),
        (["bench", "recall", "--out", "x.txt"], "must end in .json"),
        (
            ["bench", "recall", "--density", "2"],
            r"density=2.0 must be in \(0, 1]".replace("\\", ""),
        ),
        (["bench", "speed"], "'speed' must be"),
    ],
)
def test_commands_refuse_in_one_line(order, message, capsys):
    assert main(order) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
