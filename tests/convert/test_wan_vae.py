"""Wan's autoencoders: both tables, diffusers' config, and the true sizes."""

import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.convert import checkpoint, reader, rules, wan_vae
from pasa_jax.models.wan_vae import WanVAEConfig

LAYOUTS = ["diffusers", "original"]
PRESETS = {"2_1": WanVAEConfig.wan_2_1(), "2_2": WanVAEConfig.wan_2_2()}
SMALL = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 2], "num_res_blocks": 2}
SMALL |= {"temperal_downsample": [True, True], "scale_factor_spatial": 4}
SMALL |= {"latents_mean": [0.5, -1.0, 0.0], "latents_std": [2.0, 1.0, 0.25]}
RESIDUAL = {**SMALL, "is_residual": True, "decoder_base_dim": 6, "scale_factor_spatial": 8}
RESIDUAL |= {"patch_size": 2, "in_channels": 12, "out_channels": 12}
# The keys of the released config.json files that are not the default.
RELEASED = {
    "2_1": {},
    "2_2": {
        **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True},
        **{"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
        "latents_mean": list(PRESETS["2_2"].latents_mean),
        "latents_std": list(PRESETS["2_2"].latents_std),
    },
}
NAME = {"_class_name": "AutoencoderKLWan"}


def entries_of(tensors):
    """Entries as a reader would make them."""
    return {
        name: reader.Entry(value.shape, "F32", value.nbytes, lambda value=value: value)
        for name, value in tensors.items()
    }


@functools.cache
def abstract(config):
    """The f32 model's shapes."""
    return wan_vae.abstract_model(config, jnp.float32)


def expected(config, layout):
    """Names and shapes of a checkpoint."""
    shapes = rules.flat_parameters(abstract(config))
    return rules.expected_tensors(wan_vae.tables(config)[layout], shapes, {})


def fill(config, entries, layout):
    """The model of a checkpoint's entries, f32."""
    shapes, sizes = rules.flat_parameters(abstract(config)), wan_vae.transform_sizes(config)
    table = wan_vae.tables(config)[layout]
    filled = rules.assign(entries, table, wan_vae.IGNORED, shapes, sizes)
    values = {path: jnp.asarray(p.array(lambda _: None)) for path, p in filled.items()}
    return checkpoint.with_parameters(abstract(config), values)


@pytest.mark.parametrize("config", [SMALL, RESIDUAL], ids=["2_1", "2_2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse_then_table_gives_the_parameters(config, layout):
    config = wan_vae.read_config(NAME | config)
    rng = np.random.default_rng(0)
    shapes = rules.flat_parameters(abstract(config))
    values = {k: rng.normal(size=leaf.shape).astype(np.float32) for k, leaf in shapes.items()}
    tensors = rules.to_tensors(values, wan_vae.tables(config)[layout], {})
    back = rules.flat_parameters(fill(config, entries_of(tensors), layout))
    assert back.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(back[path], value)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_presets_are_known_by_their_tensors(preset, layout):
    config = PRESETS[preset]
    tensors = expected(config, layout)
    assert len(tensors) == {"2_1": 194, "2_2": 196}[preset]  # as the published files
    entries = {name: reader.Entry(shape, "F32", 0, np.zeros) for name, shape in tensors.items()}
    assert wan_vae.preset_of(entries) == config
    assert rules.best_table(entries, wan_vae.tables(config))[0] == layout
    assert wan_vae.preset_of({}) is None


def test_released_configs_are_the_presets():
    for name, config in RELEASED.items():
        text = json.dumps(NAME | config | {"attn_scales": [], "clip_output": False})
        assert wan_vae.read_config(json.loads(text)) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes 'AutoencoderKL', must be"),
        ({"attn_scales": [1.0]}, "attn_scales=[1.0], must be empty"),
        ({"z_dim": 0}, "z_dim=0, must be a positive integer"),
        ({"dim_mult": [1, "2"]}, "dim_mult=[1, '2'], must be a list of int"),
        ({"dim_mult": 2}, "dim_mult=2, must be a list of int"),
        ({"latents_mean": [float("nan")]}, "latents_mean=[nan], must be a list of float"),
        ({"is_residual": 1}, "is_residual=[1], must be a list of bool"),
        ({"out_channels": 12}, "in_channels=3, out_channels=12, must be equal"),
        ({"patch_size": 2}, "must be equal and a multiple of 4"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16, must be 8"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8, must be 4"),
        ({"latents_std": [1.0]}, "latents_std has 1 values"),
    ],
)
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wan_vae.read_config(NAME | change)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_true_sizes_are_diffusers(torch, diffusers, preset):
    """Names and shapes of every tensor, without values."""
    with torch.device("meta"):
        original = diffusers.AutoencoderKLWan(**RELEASED[preset])
    config = wan_vae.read_config(NAME | dict(original.config))
    assert config == PRESETS[preset]
    assert expected(config, "diffusers") == {
        k: tuple(v.shape) for k, v in original.state_dict().items()
    }
