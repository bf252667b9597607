"""Which model a checkpoint holds, and configurations kept as JSON."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pasa_jax.convert import components, convert_checkpoint, load_model, reader, rules
from pasa_jax.convert.components import COMPONENTS
from pasa_jax.models.t5 import T5Config
from pasa_jax.models.wan import WanConfig
from pasa_jax.models.wan_vae import WanVAEConfig

T5 = T5Config.umt5_xxl()
SMALL_T5 = dataclasses.replace(
    T5, vocab_size=10, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=2
)
PRESETS = {
    "Wan": [WanConfig.t2v_1_3b(), WanConfig.t2v_14b()],
    "WanVAE": [WanVAEConfig.wan_2_1(), WanVAEConfig.wan_2_2()],
    "T5Encoder": [T5Config.t5_v1_1_xxl(), T5],
}


def source(names, config=None):
    """A checkpoint of tensors without values."""
    entries = {name: reader.Entry(shape, "F32", 0, np.zeros) for name, shape in names.items()}
    return reader.Source(Path("src"), [], entries, config)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_checkpoint_is_told_by_its_names(name):
    component = COMPONENTS[name]
    for config in PRESETS[name]:
        shapes = rules.flat_parameters(component.rules.abstract_model(config, jnp.bfloat16))
        sizes = component.rules.transform_sizes(config)
        for table in component.rules.tables(config).values():
            names = rules.expected_tensors(table, shapes, sizes)
            assert components.identify(source(names)) is component
            assert components.architecture(component, source(names)) == config
    assert components.identify(source({"conv.weight": (3,)})) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "Wan"),
        ({"_class_name": "WanModel", "model_type": "i2v"}, "Wan"),
        ({"model_type": "t2v"}, "Wan"),
        ({"_class_name": "AutoencoderKLWan"}, "WanVAE"),
        ({"model_type": "umt5"}, "T5Encoder"),
    ],
)
def test_a_checkpoint_is_told_by_its_config(config, name):
    assert components.identify(source({"any": (1,)}, config)) is COMPONENTS[name]


@pytest.mark.parametrize("name", COMPONENTS)
def test_configs_are_kept_as_json(name):
    for config in PRESETS[name]:
        record = json.loads(json.dumps(components.config_record(config)))
        assert components.read_record(COMPONENTS[name].config, record) == config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("T5Encoder", {"dim": None}, "dim=None, must be a positive integer"),
        ("T5Encoder", {"dim": True}, "dim=True, must be a positive integer"),
        ("T5Encoder", {"bias_per_layer": 1}, "bias_per_layer=1, must be bool"),
        ("T5Encoder", {"eps": 2.0}, r"eps=2.0, must be in \(0, 1\)"),
        ("T5Encoder", {"more": 1}, "config must hold bias_per_layer, buckets"),
        ("Wan", {"patch": [1, 2]}, r"patch=\[1, 2\], must be a list of 3"),
        ("WanVAE", {"multipliers": 4}, "multipliers=4, must be a list"),
        ("WanVAE", {"latents_mean": [float("nan")]}, "latents_mean=nan, must be float"),
    ],
)
def test_records_that_are_none(name, change, message):
    record = json.loads(json.dumps(components.config_record(PRESETS[name][0]))) | change
    with pytest.raises(ValueError, match=message):
        components.read_record(COMPONENTS[name].config, record)


def test_an_encoder_converts_like_a_transformer(tmp_path):
    """config.json as transformers writes it, and the file's name that it gives."""
    component = COMPONENTS["T5Encoder"]
    shapes = rules.flat_parameters(component.rules.abstract_model(SMALL_T5, "float32"))
    rng = np.random.default_rng(0)
    want = {path: rng.normal(size=leaf.shape).astype("f4") for path, leaf in shapes.items()}
    tensors = rules.to_tensors(want, component.rules.tables(SMALL_T5)["transformers"], {})
    src = tmp_path / "text_encoder"
    src.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, src / "model.safetensors")
    sizes = {theirs: getattr(SMALL_T5, ours) for ours, theirs in component.rules.SIZES.items()}
    config = sizes | {"model_type": "umt5", "layer_norm_epsilon": T5.eps}
    (src / "config.json").write_text(json.dumps(config | {"feed_forward_proj": "gated-gelu"}))
    plan = convert_checkpoint(src, tmp_path / "dst", progress=False)
    assert str(plan).startswith(f"{src}: T5Encoder in transformers layout, 2 layers of width 8; ")
    model = load_model(tmp_path / "dst")
    assert isinstance(model, nnx.Module) and model.config == SMALL_T5
    got = rules.flat_parameters(model)
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value)


def test_more_layers_than_tensors_are_refused_before_they_are_listed():
    config = {"_class_name": "AutoencoderKLWan", "num_res_blocks": 2**30}
    with pytest.raises(ValueError, match="config.num_layers=8589934596 in .* but 1 tensors"):
        components.architecture(COMPONENTS["WanVAE"], source({"any": (1,)}, config))
