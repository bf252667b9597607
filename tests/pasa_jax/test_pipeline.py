"""Prompts become frames: guidance, seeds, budgets, compilations, on a model of random weights."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pasa_jax import pipeline as pipelines
from pasa_jax.calibration import VelocityCurve
from pasa_jax.convert import convert_checkpoint
from pasa_jax.models.wan import Wan, WanConfig
from pasa_jax.pipeline import Pipeline, calibrate
from pasa_jax.policies import AdaSpa, Dense, Pasa
from pasa_jax.sampling import make_schedule
from pasa_jax.settings import Card, Settings, read_card, read_states

WAVES, CIRCLE = "blue and white waves moving left", "a red circle moving up on a green background"
# Neither dense layers nor covariance scores: the sparse step compiles in a third of the time.
PASA = Pasa(
    density=0.4, dense_layers=(), block_q=4, block_kv=4, group=4, route_bias="none", noise_scale=0.5
)


def latents(pipe, prompts=(WAVES, CIRCLE), policy=PASA, seeds=(3, 4), **options):
    options = {"progress": False} | options
    return pipe.generate(list(prompts), policy=policy, seeds=list(seeds), **options).latents


@pytest.fixture
def traces(monkeypatch):
    """The batch size and the mode of every trace of the model from here on."""
    seen, call = [], Wan.__call__

    def counted(self, latents, timestep, text_states, attention=None):
        seen.append((len(latents), attention.mode))
        return call(self, latents, timestep, text_states, attention)

    monkeypatch.setattr(Wan, "__call__", counted)
    return seen


def test_a_run_gives_frames_and_what_each_step_cost(pipeline):
    result = pipeline.generate([WAVES, CIRCLE], policy=PASA, seeds=[3, 4], progress=False)
    assert result.frames.shape == (2, 8, 32, 32, 3) and result.frames.dtype == np.uint8
    assert result.latents.shape == (2, 2, 8, 8, 16) and np.isfinite(result.latents).all()
    # 32 tokens in 8 blocks; one dense step, then 0.4 · 8 · 4 = 12.8 blocks over four.
    assert result.budgets.tolist() == [8, 4, 3, 3, 3]
    share = np.broadcast_to(result.budgets[:, None] / 8, (5, 2))  # two layers
    np.testing.assert_allclose(result.densities, share)
    assert (result.seconds > 0).all()
    assert np.isnan(result.distances[0]).all() and (result.distances[1:] > 0).all()
    assert (result.prompts, result.seeds) == ((WAVES, CIRCLE), (3, 4))
    video = pipeline.codec.decode(jnp.asarray(result.latents))
    np.testing.assert_array_equal(result.frames, np.round(np.asarray(video) * 255))


def test_no_step_budget_seed_or_guidance_is_traced_again(pipeline, traces):
    latents(pipeline)
    traces.clear()
    latents(pipeline, seeds=(5, 6), guidance=3.0, negative_prompt=WAVES)
    assert not traces


def test_online_budget_spends_the_total_in_one_trace(pipeline, traces):
    latents(pipeline, policy=Dense())  # dense steps are compiled, whoever asks for them
    traces.clear()
    policy = dataclasses.replace(PASA, budget="online")
    result = pipeline.generate([WAVES, CIRCLE], policy=policy, seeds=[3, 4], progress=False)
    assert traces == [(4, "sparse")]
    assert result.budgets[0] == 8 and result.budgets[1:].sum() == round(0.4 * 8 * 4)


def test_guidance_leads_from_the_negative_to_the_asked_prompt(pipeline, traces):
    """One Euler step is linear in the velocity, so its ends can be combined like velocities."""
    options = {"policy": Dense(), "seeds": [7], "sampler": "euler", "steps": 1}
    asked = latents(pipeline, [WAVES], **options, guidance=1.0)
    away = latents(pipeline, [CIRCLE], **options, guidance=1.0)
    guided = latents(pipeline, [WAVES], **options, guidance=3.0, negative_prompt=CIRCLE)
    assert np.abs(asked - away).max() > 0.01
    # f32, values of about 5, a difference times 3
    np.testing.assert_allclose(guided, away + 3 * (asked - away), atol=1e-4)
    assert traces == [(1, "dense"), (2, "dense")]  # guidance 1 runs one branch


def test_distances_are_those_of_velocities_after_guidance(pipeline):
    """Both velocities of two Euler steps follow from where one step and two steps end."""
    options = {"policy": Dense(), "seeds": [7], "sampler": "euler", "shift": 100.0}
    noise = np.asarray(pipelines.start_noise(pipelines.seed_keys([7])[0], (2, 8, 8, 16)))
    first = noise - latents(pipeline, [WAVES], **options, steps=1)
    two = pipeline.generate([WAVES], **options, steps=2, progress=False)
    start, middle, _ = np.asarray(make_schedule("euler", 2, 100.0).sigmas)
    second = (noise + (middle - start) * first - two.latents) / middle
    np.testing.assert_allclose(two.distances[1, 0], np.abs(second - first).mean(), rtol=1e-4)


def test_a_video_depends_on_its_seed_not_on_its_place(pipeline):
    both = latents(pipeline)
    np.testing.assert_array_equal(both, latents(pipeline))
    swapped = latents(pipeline, (CIRCLE, WAVES), seeds=(4, 3))
    # Rounding may differ by the place in a matrix product; other noise would differ by about 1.
    np.testing.assert_allclose(swapped[::-1], both, atol=1e-3)
    other = latents(pipeline, seeds=(3, 5))
    np.testing.assert_allclose(other[0], both[0], atol=1e-3)
    assert np.abs(other[1] - both[1]).max() > 0.5


def test_seed_changes_both_the_noise_and_the_policy_keys():
    noise, policy = pipelines.seed_keys([0, 1])
    data = [jax.random.key_data(keys) for keys in (noise, policy)]
    assert len(np.unique(np.concatenate(data), axis=0)) == 4


def test_all_steps_dense_is_the_dense_policy(pipeline):
    policy = dataclasses.replace(PASA, dense_prefix=1.0)
    np.testing.assert_array_equal(
        latents(pipeline, policy=policy), latents(pipeline, policy=Dense())
    )


@pytest.fixture(scope="module")
def curve(pipeline):
    return calibrate(pipeline, [WAVES, CIRCLE], progress=False)


def test_calibration_averages_the_distances_of_dense_runs(pipeline, curve):
    runs = [
        pipeline.generate([p], policy=Dense(), seeds=[i], progress=False).distances[:, 0]
        for i, p in enumerate((WAVES, CIRCLE))
    ]
    np.testing.assert_array_equal(curve.mean[1:], np.mean(runs, 0, dtype=np.float64)[1:])
    assert curve.key == pipeline.card.curve_key(pipeline.card.settings())
    sigmas = np.asarray(make_schedule("unipc", 5, 3.0).sigmas, np.float64)
    np.testing.assert_allclose(curve.speed[2], curve.mean[2] / (sigmas[1] - sigmas[2]), rtol=1e-6)


def test_a_curve_shapes_the_budget(pipeline, curve):
    steep = VelocityCurve.from_distances(
        curve.key,
        np.asarray([[0.0, 1.0, 1.0, 1.0, 3.0]]),
        np.asarray(make_schedule("unipc", 5, 3.0).sigmas),
    )
    result = pipeline.generate(
        [WAVES, CIRCLE], policy=PASA, seeds=[3, 4], curve=steep, progress=False
    )
    assert result.budgets.tolist() == [8, 2, 2, 2, 7]  # 13 blocks in proportion 1:1:1:3


def test_a_curve_of_other_settings_is_refused_naming_both(pipeline, curve):
    with pytest.raises(ValueError, match=r"steps=5.*not for.*steps=6"):
        latents(pipeline, curve=curve, steps=6)


def test_calibration_of_one_step_is_refused(pipeline):
    with pytest.raises(ValueError, match="steps=1 must be at least 2"):
        calibrate(pipeline, [WAVES], steps=1)


def test_states_stand_for_prompts(pipeline):
    states = pipeline.text.encode([WAVES, CIRCLE])
    want = latents(pipeline)
    blind = dataclasses.replace(pipeline, text=None, codec=None)
    short = pipeline.text.encode([""])[0][:1]  # padded again, with the zeros it was cut of
    result = blind.generate(
        ["x", "y"], policy=PASA, seeds=[3, 4], states=states, negative_states=short, progress=False
    )
    assert result.frames is None
    np.testing.assert_array_equal(result.latents, want)


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "at least one prompt"),
        ([WAVES, " "], {}, "prompt=' ' must hold at least one word"),
        ([WAVES], {"seeds": [1, 2]}, "one for each of the 1 prompts"),
        ([WAVES], {"seeds": [-1]}, "seed=-1 must be from 0 to 4294967295"),
        ([WAVES], {"steps": 0}, "steps=0 must be from 1 to 1000"),
        ([WAVES], {"frames": 9}, "frames=9 must be a positive multiple of 4; nearest is 8"),
        ([WAVES], {"states": np.zeros((2, 3, 6), np.float32)}, "one for each of the 1 prompts"),
        (["blue waves"], {}, "waves"),
    ],
)
def test_bad_requests_are_refused(pipeline, traces, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        pipeline.generate(prompts, **options)
    assert not traces


def test_missing_states_are_refused(pipeline):
    blind = dataclasses.replace(pipeline, text=None)
    with pytest.raises(ValueError, match="states=None must be given"):
        blind.generate([WAVES])
    states = np.zeros((1, 3, 6), np.float32)
    with pytest.raises(ValueError, match="negative_states=None must be given"):
        blind.generate([WAVES], states=states)


WAN = Card(
    name="wan",
    folder=Path(),
    config=WanConfig.t2v_1_3b(),
    weights="none",
    cell=(4, 8, 8),
    causal=True,
    scenes=False,
    has_text=False,
    has_video=False,
    fps=16.0,
    defaults=Settings(50, 8.0, 6.0, "unipc", 81, 832, 480),
)


def test_wan_card_holds_wan_grids():
    settings = WAN.settings()
    assert WAN.latent_shape(settings) == (21, 60, 104, 16)
    assert WAN.grid(settings).num_tokens == 32_760
    assert WAN.block(settings) == 64
    assert WAN.block(WAN.settings(frames=1, width=256, height=256)) == 16


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"guidance": -1.0}, "guidance=-1.0 must be from 0"),
        ({"guidance": 1e39}, "guidance=1e[+]39 must be from 0 to 1000"),
        ({"frames": 80}, "frames=80 must be .* nearest is 81"),
        ({"frames": 0}, "nearest is 1"),
        ({"width": 840}, "width=840 must be .* nearest is 8"),
        ({"height": -16}, "height=-16 must be .* nearest is 16"),
        ({"frames": 4 * 1024 + 1}, "frames=1025 tokens must be at most 1024"),
    ],
)
def test_settings_out_of_range_are_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        WAN.settings(**asked)


def test_cards_tell_tiny_from_wan(tiny_folder):
    card = read_card(tiny_folder)
    assert card.scenes and card.has_text and card.has_video and card.cell == (4, 4, 4)
    told = (card.defaults.steps, card.defaults.shift, card.defaults.guidance)
    assert told == (7, 2.0, 2.5), "the folder's own files say how it samples"
    wan = read_card(tiny_folder / "transformer")
    assert not (wan.has_text or wan.has_video)
    assert wan.defaults.frames == 81 and wan.config == card.config


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be 'tiny' or an existing folder"):
        read_card(tmp_path / "none")
    with pytest.raises(ValueError, match="must be a checkpoint of Wan"):
        read_card(tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_states_are_read_from_files(tmp_path, suffix, pipeline):
    path, states = tmp_path / f"a{suffix}", np.ones((3, 6), np.float16)
    {
        ".npy": lambda: np.save(path, states),
        ".npz": lambda: np.savez(path, x=states),
        ".safetensors": lambda: save_file({"x": states}, path),
    }[suffix]()
    got = read_states(path, pipeline.card.config)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, states)


class Hostile:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_states_files_run_no_code(tmp_path, pipeline):
    np.save(tmp_path / "a.npy", np.asarray([Hostile(tmp_path / "ran")]), allow_pickle=True)
    with pytest.raises(ValueError, match="could not be read: .*Python objects"):
        read_states(tmp_path / "a.npy", pipeline.card.config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, arrays, words",
    [
        ("a.npy", None, "could not be read"),
        ("a.txt", None, r"must end in .npy, .npz or .safetensors"),
        ("cut.npz", b"PK\x03\x04", "could not be read"),
        ("cut.npy", b"\x93NUMPY", "could not be read"),
        ("cut.safetensors", b"12345678", "could not be read"),
        ("a.npz", {"x": np.zeros((3, 6)), "y": np.zeros((3, 6))}, "hold 2 arrays, must be one"),
        ("a.npz", {"x": np.zeros((17, 6))}, r"shape \(17, 6\), must be at most 16 tokens"),
        ("a.npz", {"x": np.zeros((0, 6))}, r"shape \(0, 6\), must be"),
        ("a.npz", {"x": np.zeros((3, 7))}, "must be at most 16 tokens of width 6"),
        ("a.npz", {"x": np.zeros((1, 3, 6))}, "must be at most 16 tokens"),
        ("a.npz", {"x": np.full((3, 6), np.nan)}, "must be finite"),
        ("a.npz", {"x": np.zeros((3, 6), np.int32)}, "must be finite floating-point"),
    ],
)
def test_bad_states_files_are_refused(tmp_path, pipeline, name, arrays, words):
    path = tmp_path / name
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words):
        read_states(path, pipeline.card.config)


def test_load_of_a_pipeline_without_encoder(tiny_folder):
    pipe = Pipeline.load(tiny_folder / "transformer")
    assert pipe.text is None and pipe.codec is None


def test_a_step_gives_the_memory_of_the_policys_state_to_the_next(pipeline, monkeypatch):
    given, denoise = [], pipelines.denoise

    def stepped(*args):
        out = denoise(*args)
        given.append([leaf.is_deleted() for leaf in jax.tree.leaves(args[6].state)])
        return out

    monkeypatch.setattr(pipelines, "denoise", stepped)
    policy = AdaSpa(step_base=1, dense_prefix=0.4, density=0.5, block_q=4, block_kv=4)
    pipeline.generate([WAVES], policy=policy, progress=False)
    assert len(given) == 5 and all(all(leaves) and leaves for leaves in given)


def test_records_belong_to_weights_not_to_names(tiny_folder, tmp_path):
    """Another training under the same name is another model, a moved folder is not."""
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    settings = read_card(tiny_folder).settings()
    key = read_card(tiny_folder).curve_key(settings)
    assert key.model.startswith("tiny@") and read_card(moved).curve_key(settings) == key
    file = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: value + np.float32(1e-3) for name, value in tensors.items()}, file)
    other = read_card(moved)
    assert other.curve_key(settings) != key
    curve = VelocityCurve(key, 1, *[(1.0,) * key.steps] * 3)
    with pytest.raises(ValueError, match=f"{key.model}.*{other.weights}"):
        curve.check(other.curve_key(settings))


def test_a_converted_folder_keeps_its_weights_digest(tiny_folder, tmp_path):
    source = tiny_folder / "transformer"
    convert_checkpoint(source, tmp_path / "converted", progress=False)
    cards = [read_card(folder) for folder in (source, tmp_path / "converted")]
    assert cards[0].weights == cards[1].weights
    config = tmp_path / "converted" / "config.json"
    config.write_text(config.read_text().replace("digest", "other"))
    with pytest.raises(ValueError, match="digest=None, must be text: convert again"):
        read_card(tmp_path / "converted")
