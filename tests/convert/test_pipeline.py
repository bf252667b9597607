"""Whole pipelines: a folder of diffusers', or of the makers' own layout, makes its video."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from pasa_jax import pipeline as pipelines
from pasa_jax.convert import (
    convert_pipeline,
    find_parts,
    load_model,
    rules,
    t5,
    wan,
    wan_vae,
)
from pasa_jax.convert import pipeline as convert
from pasa_jax.pipeline import Pipeline
from pasa_jax.policies import Dense
from pasa_jax.settings import read_card

PROMPT, NEGATIVE = "a red fox in deep snow", "grey"
SIZES = dict(frames=5, width=48, height=32, steps=3, guidance=3.0)
CHANNELS, WIDTH = 4, 8  # of latents, of text states


@pytest.fixture(scope="session")
def tokenizer():
    """A unigram tokenizer of letters, which ends texts as T5's do."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0)]
    pieces += [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    return inner


@pytest.fixture(scope="session")
def original(torch, diffusers, transformers, tokenizer):
    """A pipeline of random weights, norms and biases included."""
    torch.manual_seed(0)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    encoder = transformers.UMT5Config(
        vocab_size=30, d_model=WIDTH, d_kv=4, d_ff=12, num_layers=2, num_heads=2
    )
    parts = dict(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=24,
            num_layers=2,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        text_encoder=transformers.UMT5EncoderModel(encoder),
    )
    with torch.no_grad():
        for part in parts.values():
            for parameter in part.eval().parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(tokenizer=fast, scheduler=scheduler, **parts)


@pytest.fixture(scope="session")
def source(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "diffusers"
    original.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def makers(source, tokenizer):
    """The same weights laid out as the makers' own folder, which has no config of VAE and T5."""
    folder = source.parent / "makers"
    names = {
        "transformer": (wan, "diffusion_pytorch_model.safetensors"),
        "vae": (wan_vae, "Wan2.1_VAE.safetensors"),
        "text_encoder": (t5, "models_t5_umt5-xxl-enc-bf16.safetensors"),
    }
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    configs = {}
    for part, (names_of, file) in names.items():
        model = load_model(source / part)
        configs[part] = config = model.config
        table, sizes = names_of.tables(config)["original"], names_of.transform_sizes(config)
        tensors = rules.to_tensors(rules.flat_parameters(model), table, sizes)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / file)
    sizes = {
        theirs: getattr(configs["transformer"], ours) for ours, theirs in wan.ORIGINAL_SIZES.items()
    }
    config = {**sizes, "model_type": "t2v", "_class_name": "WanModel", "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, configs


def run(folder, latents, monkeypatch):
    """Our latents and video, begun from given noise [1, F, Y, X, C]."""
    monkeypatch.setattr(pipelines, "start_noise", lambda keys, shape: jnp.asarray(latents))
    pipeline = Pipeline.load(read_card(folder))
    result = pipeline.generate(
        [PROMPT], policy=Dense(), negative_prompt=NEGATIVE, progress=False, shift=3.0, **SIZES
    )
    video = np.asarray(pipeline.codec.decode(jnp.asarray(result.latents)))
    assert np.abs(result.frames / np.float32(255) - video).max() <= 0.5 / 255 + 1e-6
    return video


@pytest.fixture(scope="session")
def wanted(torch, original):
    """Noise, and the video that diffusers makes of it."""
    latents = np.random.default_rng(0).normal(size=(1, 2, 4, 6, CHANNELS)).astype(np.float32)
    frames = original(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=torch.tensor(latents.transpose(0, 4, 1, 2, 3)),
        num_frames=SIZES["frames"],
        num_inference_steps=SIZES["steps"],
        guidance_scale=SIZES["guidance"],
        **{name: SIZES[name] for name in ("width", "height")},
        output_type="np",
    ).frames
    assert frames.std() > 0.05  # a picture, not one grey
    return latents, frames


def test_a_folder_of_diffusers_makes_its_video(source, wanted, tmp_path, monkeypatch, capsys):
    latents, frames = wanted
    plan = convert_pipeline(source, tmp_path / "dst", progress=True)
    told = capsys.readouterr().out
    assert "Wan pipeline in diffusers layout" in told and "T5Encoder in transformers" in told
    assert plan.parts.missing == () and plan.parts.shift == 3.0
    assert read_card(tmp_path / "dst").defaults.shift == 3.0
    written = {path.name for path in (tmp_path / "dst").iterdir()}
    assert written == {"pipeline.json", "tokenizer", "transformer", "vae", "text_encoder"}
    got = run(tmp_path / "dst", latents, monkeypatch)
    # The whole chain in float32: text encoder, three steps with guidance, decoder.
    np.testing.assert_allclose(got, frames, atol=2e-3)
    assert np.abs(got - frames).mean() < 1e-4


def test_the_makers_folder_makes_the_same_video(makers, wanted, tmp_path, monkeypatch):
    folder, configs = makers
    for module, part in ((wan_vae, "vae"), (t5, "text_encoder")):
        monkeypatch.setattr(module, "preset_of", lambda entries, part=part: configs[part])
    latents, frames = wanted
    plan = convert_pipeline(folder, tmp_path / "dst", progress=False)
    assert plan.parts.layout == "original" and plan.parts.missing == ()
    assert {model.layout for model in plan.models.values()} == {"original"}
    np.testing.assert_allclose(run(tmp_path / "dst", latents, monkeypatch), frames, atol=2e-3)


def test_a_part_missing_is_told_and_the_rest_runs(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "src")
    shutil.rmtree(tmp_path / "src" / "vae")
    shutil.rmtree(tmp_path / "src" / "tokenizer")
    plan = convert_pipeline(tmp_path / "src", tmp_path / "dst", progress=True)
    told = capsys.readouterr().out
    assert "no vae: runs end in latents" in told
    assert "no tokenizer: prompts must come as states" in told
    assert plan.parts.missing == ("vae", "tokenizer")
    card = read_card(tmp_path / "dst")
    assert not card.has_text and not card.has_video
    pipeline = Pipeline.load(card)
    assert pipeline.codec is None and pipeline.text is None
    with pytest.raises(ValueError, match="has no text encoder here"):
        pipeline.generate([PROMPT], progress=False)


def test_an_unconverted_folder_runs_as_it_is(source, wanted, monkeypatch):
    latents, frames = wanted
    np.testing.assert_allclose(run(source, latents, monkeypatch), frames, atol=2e-3)


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    plan = convert_pipeline(source, tmp_path / "dst", dry_run=True)
    assert not (tmp_path / "dst").exists() and plan.written_bytes > 1000
    assert "dry run: nothing written" in capsys.readouterr().out


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    real = convert.write_conversion

    def stop(target, plan, on_read):
        if plan.component.name == "T5Encoder":
            raise KeyboardInterrupt
        real(target, plan, on_read)

    monkeypatch.setattr(convert, "write_conversion", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_pipeline(source, tmp_path / "dst", progress=False)
    assert list(tmp_path.iterdir()) == []


def change(file, **fields):
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f / "model_index.json", _class_name="FluxPipeline"), "'FluxPipeline'"),
        (lambda f: shutil.rmtree(f / "transformer"), "has no transformer/ with weights"),
        (lambda f: shutil.copytree(f / "vae", f / "transformer_2"), "has a transformer_2"),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", flow_shift=-1),
            "flow_shift=-1, must be a number above 0",
        ),
        (
            lambda f: (shutil.rmtree(f / "vae"), shutil.copytree(f / "text_encoder", f / "vae")),
            "has T5Encoder as its vae, must be WanVAE",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(source, tmp_path, spoil, message):
    shutil.copytree(source, tmp_path / "src")
    spoil(tmp_path / "src")
    with pytest.raises(ValueError, match=message):
        convert_pipeline(tmp_path / "src", tmp_path / "dst", progress=False)
    assert not (tmp_path / "dst").exists()


def test_what_is_no_pipeline(source, tmp_path):
    assert find_parts(source / "transformer") is None
    with pytest.raises(ValueError, match="must be a pipeline's folder of PyTorch"):
        convert_pipeline(source / "transformer", tmp_path / "dst")
    convert_pipeline(source, tmp_path / "dst", progress=False)
    with pytest.raises(ValueError, match="must be a pipeline's folder of PyTorch"):
        convert_pipeline(tmp_path / "dst", tmp_path / "again")
    change(tmp_path / "dst" / "pipeline.json", shift="high")
    with pytest.raises(ValueError, match="shift='high', must be a number above 0"):
        find_parts(tmp_path / "dst")
    change(tmp_path / "dst" / "pipeline.json", format="other")
    with pytest.raises(ValueError, match="must hold format="):
        find_parts(tmp_path / "dst")


def test_jax_has_no_leftover_of_the_encoder(source, tmp_path, monkeypatch):
    """The text encoder's weights are gone before sampling starts."""
    pipeline = Pipeline.load(read_card(source))
    states = []
    real = pipelines.denoise

    def stepped(*args):
        states.append(pipeline.text._model)
        return real(*args)

    monkeypatch.setattr(pipelines, "denoise", stepped)
    text = pipeline.encode([PROMPT], NEGATIVE, 1.0)
    assert text.shape == (1, 512, WIDTH) and jax.tree.leaves(text)
    pipeline.generate([PROMPT], policy=Dense(), progress=False, **SIZES | dict(steps=1))
    assert states == [None]
