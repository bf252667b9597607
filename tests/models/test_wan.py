"""The Wan transformer against the PyTorch originals' stored outputs, and its own promises."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pasa_jax.convert import load_model
from pasa_jax.models import wan
from pasa_jax.models.wan import Wan, WanConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
SMALL = WanConfig(
    in_channels=3,
    out_channels=3,
    patch=(1, 2, 2),
    dim=40,
    num_heads=2,
    num_layers=2,
    ffn_dim=32,
    freq_dim=16,
    text_dim=10,
    text_len=9,
    eps=1e-6,
)
CONFIGS = {
    "diffusers": {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 20,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 10,
        "text_len": 9,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "eps": 1e-6,
    },
    "original": {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": 40,
        "num_heads": 2,
        "in_dim": 3,
        "out_dim": 3,
        "text_dim": 10,
        "text_len": 9,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "eps": 1e-6,
    },
}
forward = jax.jit(lambda model, *inputs: model(*inputs)[0])


@pytest.fixture(scope="module", params=list(CONFIGS))
def original(request, tmp_path_factory):
    """The converted model in f32, and the arrays of its PyTorch original."""
    arrays = dict(np.load(FIXTURES / f"wan_{request.param}.npz"))
    folder = tmp_path_factory.mktemp(request.param)
    weights = {
        name.removeprefix("weight:"): value.astype(np.float32)
        for name, value in arrays.items()
        if name.startswith("weight:")
    }
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return load_model(folder, "float32"), arrays


@pytest.mark.parametrize("case", ["odd", "single"])
def test_velocity_is_the_originals(original, case):
    model, arrays = original
    names = ("latents", "timestep", "text")
    velocity = forward(model, *(jnp.asarray(arrays[f"{case}:{name}"]) for name in names))
    truth = arrays[f"{case}:velocity"]
    # 1e-4 relative in f32, the promise of the README; measured 5e-6.
    assert np.abs(velocity - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_types(dtype):
    model = nnx.eval_shape(lambda: Wan(SMALL, dtype=dtype, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        kept = any(part in name for part in ("time", "modulation", "norm", "head"))
        assert variable.get_value().dtype == (jnp.float32 if kept else dtype), name


def test_bfloat16_is_close_to_float32(original):
    model, arrays = original
    inputs = [jnp.asarray(arrays[f"odd:{name}"]) for name in ("latents", "timestep", "text")]
    exact = forward(model, *inputs)
    graph, params = nnx.split(nnx.eval_shape(lambda: Wan(SMALL, rngs=nnx.Rngs(0))))
    values = jax.tree.map(lambda p, like: p.astype(like.dtype), nnx.state(model), params)
    rounded = forward(nnx.merge(graph, values), *inputs)
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    # Each of about 20 products in a row rounds its operands by up to 2^-9.
    assert 1e-4 < error < 20 * 2**-9


def test_short_text_is_padded_with_zeros(original):
    model, arrays = original
    latents, timestep = (jnp.asarray(arrays[f"odd:{n}"]) for n in ("latents", "timestep"))
    text = jnp.asarray(arrays["odd:text"])
    padded = jnp.pad(text, ((0, 0), (0, 2), (0, 0)))
    np.testing.assert_array_equal(
        forward(model, latents, timestep, text), forward(model, latents, timestep, padded)
    )


def test_depth_does_not_grow_the_program():
    """The scanned program of 2 layers and of 7 has equally many operations."""

    def operations(layers):
        config = dataclasses.replace(SMALL, num_layers=layers)
        model = nnx.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 4, 4, 3), (1,), (1, 9, 10)))
        return str(jax.make_jaxpr(lambda m, *a: m(*a)[0])(model, *shapes)).count(" = ")

    assert operations(2) == operations(7)


@pytest.mark.parametrize(
    ("config", "billions"), [(WanConfig.t2v_1_3b(), 1.42), (WanConfig.t2v_14b(), 14.29)]
)
def test_presets_have_the_published_size(config, billions):
    model = nnx.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 3, "must be a multiple of"),
        ("dim", 42, "head_dim=21 must be even"),
        ("freq_dim", 15, "must be even"),
    ],
)
def test_impossible_configs_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        ((1, 1, 4, 4, 5), (1, 9, 10), "channels=5"),
        ((1, 1, 5, 4, 3), (1, 9, 10), "axis Y has size=5, it must be a multiple of 2"),
        ((1, 1, 4, 4000, 3), (1, 9, 10), "axis X has size=4000, at most 2048"),
        ((1, 1, 4, 4, 3), (1, 10, 10), "tokens=10, at most"),
        ((1, 1, 4, 4, 3), (1, 9, 11), "width=11"),
    ],
)
def test_inputs_of_another_model_are_refused(latents, text, message):
    with pytest.raises(ValueError, match=message):
        wan.check_inputs(SMALL, jnp.zeros(latents), jnp.zeros(text))
