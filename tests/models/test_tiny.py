"""tiny: grammar, scenes, codec, text table, the check's controls, and the training command."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest

from pasa_jax.convert import load_model
from pasa_jax.models import tiny
from pasa_jax.models.tiny import check, codec, scenes, text, train
from pasa_jax.models.wan import rope_table, rotate

PROMPT_DRIFT = "blue and white waves moving left"
PROMPT_SHAPE = "a red circle moving right on a green background"


@pytest.fixture(scope="module")
def shipped_codec():
    return codec.load(tiny.WEIGHTS / "vae")


def test_grammar_reads_both_kinds():
    assert scenes.parse(PROMPT_DRIFT) == scenes.Scene("waves", ("blue", "white"), "left")
    assert scenes.parse("A red circle, moving right on a green background.") == scenes.Scene(
        "circle", ("red", "green"), "right"
    )


def test_every_scene_is_read_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.random_scene(rng, held_out=None)
        assert scenes.parse(scene.prompt) == scene


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("bleu and white waves moving left", "'bleu'.*nearest: 'blue'"),
        ("blue waves moving left", "must read"),
        ("moving and white waves moving left", "must read"),
        ("a red circle moving waves on a green background", "must read"),
        ("", "must read"),
        ("red and red waves moving up", "two different colours"),
    ],
)
def test_bad_prompts_get_one_line(prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        scenes.parse(prompt)
    assert "\n" not in str(error.value)


def test_held_out_scenes_are_a_tenth_and_ignore_the_order_of_a_texture():
    rng = np.random.default_rng(0)
    share = np.mean([scenes.random_scene(rng, held_out=None).held_out for _ in range(2000)])
    assert 0.07 < share < 0.14  # a tenth, 2000 draws: four standard errors are 0.027
    assert not any(scenes.random_scene(rng).held_out for _ in range(200))
    for motif in scenes.TEXTURES:
        one = scenes.Scene(motif, ("red", "cyan"), "up")
        other = scenes.Scene(motif, ("cyan", "red"), "up")
        assert one.held_out == other.held_out


@pytest.mark.parametrize("motif", scenes.TEXTURES + scenes.SHAPES)
@pytest.mark.parametrize("direction", scenes.DIRECTIONS)
def test_a_latent_frame_is_the_one_before_moved_by_a_token(motif, direction):
    video = scenes.render(scenes.Scene(motif, ("red", "cyan"), direction), 8, 80, 96, seed=3)
    assert video.shape == (8, 80, 96, 3)
    assert video.min() >= 0 and video.max() <= 1
    step_y, step_x = scenes.DIRECTIONS[direction]
    moved = np.roll(video[:4], (8 * step_y, 8 * step_x), axis=(1, 2))[:, 8:-8, 8:-8]
    # f32 phases of up to 2π·96/24 radians: 1e-5 is their rounding.
    np.testing.assert_allclose(moved, video[4:, 8:-8, 8:-8], atol=1e-4)


def test_render_is_reproducible_and_refuses_what_does_not_fit():
    scene = scenes.parse(PROMPT_SHAPE)
    same = [scenes.render(scene, 4, 64, 64, seed=5) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert np.abs(scenes.render(scene, 4, 64, 64, seed=6) - same[0]).max() > 0.5
    with pytest.raises(ValueError, match="size=64 px must be at least 127"):
        scenes.render(scene, 48, 64, 64, seed=0)


def test_shapes_have_one_area():
    y, x = np.mgrid[-40:41, -40:41].astype(float)
    areas = [scenes.coverage(shape, y, x).sum() for shape in scenes.SHAPES]
    # Soft edges round the triangle's corners off; a wrong size would be off by tens of percent.
    np.testing.assert_allclose(areas, np.pi * scenes.RADIUS**2, rtol=0.03)


def test_codec_compresses_twelvefold_and_keeps_the_picture(shipped_codec):
    rng = np.random.default_rng(1)
    scene_list = [scenes.random_scene(rng, held_out=None) for _ in range(24)]
    videos = np.stack([scenes.render(s, 8, 64, 64, seed=i) for i, s in enumerate(scene_list)])
    latents = shipped_codec.encode(videos)
    assert latents.shape == (24, 2, 16, 16, 16)
    # Fitted to unit mean square; 24 videos of few colours leave it within a half.
    assert 0.5 < float((latents**2).mean()) < 1.5
    error = float(((shipped_codec.decode(latents) - videos) ** 2).mean())
    assert error < 10 ** (-27 / 10)  # 27 dB; the weakest texture measured 26, all together 29


def test_codec_reads_back_what_it_wrote(shipped_codec):
    latents = 0.1 * np.random.default_rng(0).standard_normal((1, 1, 4, 4, 16)).astype(np.float32)
    # Small latents stay inside 0..1, where nothing is clipped; f32 sums of 192 terms.
    again = shipped_codec.encode(shipped_codec.decode(latents))
    np.testing.assert_allclose(again, latents, atol=1e-4)


def test_codec_refuses_odd_sizes(shipped_codec):
    with pytest.raises(ValueError, match="height=30"):
        shipped_codec.encode(np.zeros((1, 4, 30, 32, 3), np.float32))


def test_text_states_differ_by_word_and_place_and_pad_with_zeros():
    encoder = text.load(tiny.WEIGHTS / "text_encoder")
    states = encoder.encode([PROMPT_DRIFT, "white and blue waves moving left", PROMPT_SHAPE, ""])
    assert states.shape == (4, text.MAX_WORDS, encoder.words.shape[1])
    assert not states[0, 6:].any() and not states[2, 9:].any() and not states[3, 1:].any()
    assert all(states[i, 0].any() for i in range(4))
    assert np.abs(states[0, 0] - states[1, 0]).max() > 0.1  # another word
    assert np.abs(states[0, 0] - states[1, 2]).max() > 0.1  # the same word elsewhere


def test_text_refuses_other_words(tmp_path):
    encoder = text.load(tiny.WEIGHTS / "text_encoder")
    with pytest.raises(ValueError, match="'purple'"):
        encoder.encode(["purple and white waves moving left"])
    text.save(encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "words": ["a"]}))
    with pytest.raises(ValueError, match="words="):
        text.load(tmp_path)


def renderer(change=lambda video: video):
    """A generator that renders the truth, changed."""
    counter = iter(range(10**6))

    def generate(prompts):
        videos = [scenes.render(scenes.parse(p), 8, 64, 64, next(counter)) for p in prompts]
        return np.stack([change(video) for video in videos])

    return generate


ASKED = check.prompts(60)
ALL = {"drifting": "colours and direction", "shapes": "colour, direction and shape"}


def test_check_scores_truth_one(shipped_codec):
    # Through the codec, so that its blur is covered; 128 px as generated, for a few.
    def coded(video):
        return np.asarray(shipped_codec.decode(shipped_codec.encode(video[None])))[0]

    for change in (lambda video: video, coded):
        table = check.check(renderer(change), ASKED)
        assert {row.right for row in table.rows} == {1.0}, str(table)


def test_check_reads_full_size_truth():
    for i, prompt in enumerate(ASKED[:12]):
        scene = scenes.parse(prompt)
        reading = check.read(scenes.render(scene, 16, 128, 128, seed=i))
        assert set(reading.colours) == set(scene.colours)
        assert (reading.motif, reading.direction) == (scene.motif, scene.direction)


def test_check_reads_nothing_into_noise():
    rng = np.random.default_rng(0)
    table = check.check(renderer(lambda video: rng.random(video.shape)), ASKED)
    # Whether frames agree can always be told: here they do not.
    told = {row.attribute for row in table.rows if row.readable}
    assert told == {"frames agree"}, str(table)
    assert {row.right for row in table.rows} == {0.0}, str(table)


def test_check_on_reversed_and_still_videos():
    reverse = check.check(renderer(lambda video: video[::-1]), ASKED)
    still = check.check(renderer(lambda video: np.repeat(video[:1], 8, 0)), ASKED)
    for kind in ALL:
        assert reverse.right(kind, "axis") == 1.0
        assert reverse.right(kind, "sign on the right axis") == 0.0
        assert still.right(kind, "direction") == 0.0
    assert still.right("drifting", "both colours") == 1.0
    assert still.right("shapes", "shape") == 1.0


def test_check_on_shuffled_prompts_is_near_chance():
    scene_list = [scenes.parse(prompt) for prompt in ASKED]
    readings = [check.read(scenes.render(s, 8, 64, 64, seed=i)) for i, s in enumerate(scene_list)]
    table = check.tabulate(scene_list[2:] + scene_list[:2], readings, "shuffled")
    for row in table.rows:
        if row.attribute == "frames agree":  # does not depend on the prompt
            assert row.right == 1.0
            continue
        # 30 of a kind: four standard errors of a share are at most 0.37.
        assert abs(row.right_of_readable - row.chance) < 0.37, str(table)
    assert all(table.right(*item) < 0.15 for item in ALL.items())


def test_check_sees_frames_that_do_not_agree():
    rng = np.random.default_rng(0)

    def shuffled(video):
        """Right motion within each latent frame, none between them."""
        shift = rng.integers(6, 26, 2)
        return np.concatenate([video[:4], np.roll(video[4:], shift, (1, 2))])

    drifting = [prompt for prompt in ASKED if "waves" in prompt or "clouds" in prompt]
    table = check.check(renderer(shuffled), drifting)
    assert table.right("drifting", "frames agree") < 0.7
    assert table.right("drifting", "direction") <= table.right("drifting", "frames agree")


def test_check_looks_at_all_pairs_of_frames():
    scene = scenes.parse(PROMPT_DRIFT)
    video = scenes.render(scene, 8, 64, 64, seed=0)
    video[0] = video[2]  # the first two frames go back, the other six pairs go on
    assert check.read(video).towards == "left"


def test_check_names_no_shape_for_a_ring():
    y, x = np.mgrid[:64, :64] - 32.0
    ring = (np.abs(np.hypot(y, x) - 16) < 4)[None, ..., None]
    video = np.where(ring, scenes.COLOURS["red"], scenes.COLOURS["white"]) * np.ones((8, 1, 1, 1))
    reading = check.read(video)
    assert (reading.colours, reading.motif) == (("red", "white"), None)


def test_check_refuses_no_prompts():
    with pytest.raises(ValueError, match="at least one prompt"):
        check.check(renderer(), [])


def test_table_prints_and_saves(tmp_path):
    table = check.check(renderer(), ASKED[:2], title="truth")
    assert "| drifting | direction | 1.00 | 1.00 ± 0.00 | 1.00 | 0.25 | 1 |" in str(table)
    table.save(tmp_path / "table.json")
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["title"] == "truth" and len(saved["rows"]) == len(table.rows)


@pytest.fixture
def small_run(monkeypatch):
    """A schedule of four steps on a small model, and a clock that allows two steps a run."""
    config = dataclasses.replace(
        train.architecture(), dim=64, num_heads=2, num_layers=1, ffn_dim=64, freq_dim=32
    )
    monkeypatch.setattr(train, "architecture", lambda: config)
    stages = (train.Stage(3, ((1, 7, 7),), 98), train.Stage(1, ((1, 7, 7),), 98))
    monkeypatch.setattr(train, "SCHEDULE", stages)
    fitted = codec.load(tiny.WEIGHTS / "vae")
    monkeypatch.setattr(codec, "fit", lambda: fitted)
    # Compiled once for all runs: the graph and the optimizer are the same ones.
    make_step, made = train.make_step, []

    def make_once(*parts):
        made.append(made[0] if made else make_step(*parts))
        return made[0]

    monkeypatch.setattr(train, "make_step", make_once)
    monkeypatch.setattr(train, "LOG_STEPS", 1)

    def run(out, steps):
        ticks = itertools.count()
        clock = types.SimpleNamespace(monotonic=lambda: next(ticks))
        # One tick to begin, then two a step: the time check and the log.
        monkeypatch.setattr(train, "time", clock)
        # optax itself mixes types and ranks.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            train.train(train.TrainConfig(out, minutes=2 * steps / 60))

    return run


def test_training_goes_on_where_it_stopped_and_exports(small_run, tmp_path, capsys):
    small_run(tmp_path / "pieces", 2)
    assert "stopped at step 2 of 4; the same command goes on" in capsys.readouterr().out
    small_run(tmp_path / "pieces", 9)
    small_run(tmp_path / "whole", 9)
    assert "all 4 steps done" in capsys.readouterr().out
    histories = [
        json.loads((tmp_path / n / "history.json").read_text()) for n in ("pieces", "whole")
    ]
    assert [stage["steps"] for stage in histories[0]["stages"]] == [3, 1]
    assert [stage["videos"] for stage in histories[0]["stages"]] == [6, 2]
    assert histories[0]["curve"]["steps"] == [1, 2, 3, 4]
    # The same steps from the same seeds, whether in one piece or two.
    assert histories[0]["curve"]["losses"] == histories[1]["curve"]["losses"]

    folder = tmp_path / "weights"
    train.main(train.TrainConfig(tmp_path / "pieces", export=folder))
    index = json.loads((folder / "model_index.json").read_text())
    assert all((folder / part).is_dir() for part in index if isinstance(index[part], list))
    assert (folder / "loss.png").stat().st_size > 0
    assert text.load(folder / "text_encoder").encode([PROMPT_DRIFT]).shape == (1, 16, 64)
    # Four steps away from the start, where the head is the identity.
    head = load_model(folder / "transformer").head.kernel.get_value()
    assert 1e-5 < np.abs(np.asarray(head) - np.eye(64)).max() < 0.1


def test_export_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        train.main(train.TrainConfig(tmp_path, export=tmp_path / "weights"))


def test_batches_repeat_and_keep_out_what_is_held_out(shipped_codec, monkeypatch):
    seen, blank = [], np.zeros((4, 64, 64, 3), np.float32)
    monkeypatch.setattr(train.scenes, "render", lambda scene, *size: seen.append(scene) or blank)
    batches = [train.make_batch(shipped_codec.encode, (1, 8, 8), 40, (0, 7)) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert not any(scene.held_out for scene in seen)
    latents, ids, noise, even = batches[0]
    assert latents.shape == noise.shape == (40, 1, 16, 16, 16) and ids.shape == (40, 16)
    # One noise level in each of forty equal parts.
    np.testing.assert_array_equal(np.sort((even * 40).astype(int)), np.arange(40))
    dropped = int((ids[:, 0] == text.NULL).sum())
    assert 0 < dropped < 12  # a tenth of 40, four standard errors above is 11.6


def test_only_the_layers_matrices_go_to_muon():
    _, params = train.init_params(train.architecture(), 0)
    axes = jax.tree.leaves(
        train.matrices(params), is_leaf=lambda leaf: leaf is None or isinstance(leaf, tuple)
    )
    assert sum(axis is not None for axis in axes) == 10  # 8 projections, 2 feed-forward


def test_heads_start_by_looking_near():
    config = train.architecture()
    _, params = train.init_params(config, 0)
    cos, sin = rope_table([1, 1, 8], config.head_dim)
    query, key = (
        params["wan"]["blocks"]["self_attn"][name]["bias"][0].reshape(1, 1, config.num_heads, -1)
        for name in ("q", "k")
    )
    tokens = [np.broadcast_to(x, (1, 8, *x.shape[2:])) for x in (query, key)]
    q, k = (np.asarray(rotate(jax.numpy.asarray(x), (cos, sin))) for x in tokens)
    scores = np.einsum("tnh,snh->nts", q[0], k[0])
    assert (scores[0].argmax(-1) == np.arange(8)).all()  # near in columns
    assert np.ptp(scores[1]) < 1e-3  # anywhere in columns: f32 sums of 16 squares


def test_shipped_folder_is_whole_and_small():
    for part in ("transformer", "text_encoder", "vae", "scheduler"):
        assert list((tiny.WEIGHTS / part).glob("*.json"))
    files = [path for path in tiny.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert load_model(tiny.WEIGHTS / "transformer").config == train.architecture()
    shipped, fitted = codec.load(tiny.WEIGHTS / "vae"), codec.fit()
    # The same fit on another machine's linear algebra, f32.
    np.testing.assert_allclose(shipped.encoder, fitted.encoder, atol=1e-3)


def test_training_can_start_from_shipped_weights():
    params = train.read_params(tiny.WEIGHTS)
    _, fresh = train.init_params(train.architecture(), 0)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(fresh), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    shipped = text.load(tiny.WEIGHTS / "text_encoder")
    np.testing.assert_array_equal(params["text"]["words"], shipped.words)


def test_scale_stretches_the_schedule(tmp_path):
    stages = train.TrainConfig(tmp_path, scale=2.0).schedule
    assert [s.steps for s in stages] == [2 * s.steps for s in train.SCHEDULE]
    assert train.stage_at(stages, stages[0].steps) == (1, stages[1])
    with pytest.raises(ValueError, match="scale=0.0 must be positive"):
        train.TrainConfig(tmp_path, scale=0.0)
