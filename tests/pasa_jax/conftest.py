"""A pipeline with random weights, and its checkpoint folder, small enough to compile in seconds.

The imports stand in the fixtures, so that the folder's smaller tests do not wait for them.
"""

import dataclasses
import json

import numpy as np
import pytest


def random_model(config):
    """Weights large enough that prompt, noise and attention all show in the output."""
    import jax.numpy as jnp

    from pasa_jax.convert import checkpoint, rules, wan

    rng = np.random.default_rng(0)
    model = wan.abstract_model(config, jnp.float32)
    values = {
        path: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-1]), jnp.float32)
        for path, leaf in rules.flat_parameters(model).items()
    }
    return checkpoint.with_parameters(model, values)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A checkpoint laid out as tiny's, with random weights."""
    from pasa_jax.convert import export_diffusers
    from pasa_jax.models.tiny import codec, scenes, text
    from pasa_jax.models.wan import WanConfig

    config = WanConfig(
        in_channels=codec.CHANNELS,
        out_channels=codec.CHANNELS,
        patch=(1, 2, 2),
        dim=16,
        num_heads=2,
        num_layers=2,
        ffn_dim=16,
        freq_dim=8,
        text_dim=6,
        text_len=text.MAX_WORDS,
        eps=1e-6,
    )
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(1)
    words = rng.normal(size=(len(scenes.WORDS) + 1, config.text_dim)).astype(np.float32)
    places = rng.normal(size=(text.MAX_WORDS, config.text_dim)).astype(np.float32)
    export_diffusers(random_model(config), folder / "transformer")
    text.save(text.TextEncoder(words, places), folder / "text_encoder")
    codec.save(codec.fit(4), folder / "vae")
    index = {"num_inference_steps": 7, "guidance_scale": 2.5}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 2.0}))
    return folder


@pytest.fixture(scope="session")
def pipeline(tiny_folder):
    """That checkpoint's pipeline; its card asks for 5 steps and 32 tokens."""
    from pasa_jax.pipeline import Pipeline
    from pasa_jax.settings import Settings

    pipe = Pipeline.load(tiny_folder)
    defaults = Settings(5, 3.0, 2.0, "unipc", 8, 32, 32)
    return dataclasses.replace(pipe, card=dataclasses.replace(pipe.card, defaults=defaults))
