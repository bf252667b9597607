"""The table of rules: complete, two-sided, and in the model's order of rotary pairs."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.convert import reader, rules, wan
from pasa_jax.models.wan import WanConfig

LAYOUTS = ["diffusers", "original"]


def entries_of(tensors):
    """Entries as a reader would make them."""
    names = {"float32": "F32", "bfloat16": "BF16"}
    return {
        name: reader.Entry(
            tuple(value.shape),
            names[value.dtype.name],
            value.nbytes,
            lambda value=value: np.asarray(value),
        )
        for name, value in tensors.items()
    }


@pytest.fixture
def assign(config):
    def call(entries, layout="diffusers"):
        shapes = rules.flat_parameters(wan.abstract_model(config, jnp.float32))
        sizes = wan.transform_sizes(config)
        return rules.assign(entries, wan.TABLES[layout], wan.IGNORED, shapes, sizes)

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_matches_its_own_names_alone(layout):
    table = wan.TABLES[layout]
    for rule in table:
        for layer in (0, 39):
            name = rule.name(layer)
            matching = [other for other in table if re.fullmatch(other.pattern, name)]
            assert matching == [rule]
        assert rules.match(table, name + "x") is None
        assert rules.match(table, "x" + name) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse_then_table_gives_the_parameters(layout, model, tensors, assign):
    filled = assign(entries_of(tensors[layout]), layout)
    want = rules.flat_parameters(model)
    assert filled.keys() == want.keys()
    read = []
    for path, parameter in filled.items():
        np.testing.assert_array_equal(parameter.array(read.append), np.asarray(want[path]))
    assert sum(read) == sum(value.nbytes for value in want.values())


def test_rotary_columns_go_from_pairs_to_halves(config, tensors, assign):
    """Written out by index, against the einops string."""
    size = config.head_dim
    order = [
        head * size + column
        for head in range(config.num_heads)
        for column in (*range(0, size, 2), *range(1, size, 2))
    ]
    filled = assign(entries_of(tensors["diffusers"]))
    for name in ("q", "k"):
        source = {
            key: np.asarray(tensors["diffusers"][f"blocks.1.attn1.{key}"])
            for key in (f"to_{name}.weight", f"to_{name}.bias", f"norm_{name}.weight")
        }
        weight, bias, norm = source.values()
        path = f"blocks/self_attn/{name}"
        got = {key: value.array(lambda _: None)[1] for key, value in filled.items() if path in key}
        np.testing.assert_array_equal(got[f"{path}/kernel"], weight[order].T)
        np.testing.assert_array_equal(got[f"{path}/bias"], bias[order])
        scale = filled[f"blocks/self_attn/norm_{name}/scale"].array(lambda _: None)[1]
        np.testing.assert_array_equal(scale, norm[order])


def test_only_self_attention_is_permuted():
    rotary = {rule.path for rule in wan.TABLES["diffusers"] if "pair" in rule.transform}
    assert rotary == {
        f"blocks/self_attn/{name}"
        for name in (
            *("q/kernel", "q/bias", "k/kernel", "k/bias"),
            *("norm_q/scale", "norm_k/scale"),
        )
    }


def test_patch_kernel_follows_the_order_of_a_tokens_values(config, tensors, assign):
    """Token values are ordered frame, row, column, channel; a convolution's are channel first."""
    weight = np.asarray(tensors["diffusers"]["patch_embedding.weight"])
    kernel = assign(entries_of(tensors["diffusers"]))["patch_embedding/kernel"]
    kernel = kernel.array(lambda _: None)
    for row, column, channel in np.ndindex(2, 2, config.in_channels):
        place = (row * 2 + column) * config.in_channels + channel
        np.testing.assert_array_equal(kernel[place], weight[:, channel, 0, row, column])


def test_one_message_lists_every_failure(tensors, assign):
    bad = dict(tensors["diffusers"])
    del bad["blocks.2.attn2.to_v.bias"], bad["proj_out.weight"]
    bad["blocks.3.ffn.net.2.bias"] = bad["blocks.2.ffn.net.2.bias"]  # a layer too many
    bad["lora.up"] = jnp.zeros((2, 3))
    bad["blocks.0.attn1.to_q.weight"] = jnp.zeros((24, 23))
    entries = entries_of(bad)
    entries["proj_out.bias"] = dataclasses.replace(entries["proj_out.bias"], dtype="F8_E4M3")
    with pytest.raises(ValueError) as failure:
        assign(entries)
    lines = [line.strip() for line in str(failure.value).splitlines()]
    assert lines[0] == "6 tensors do not fit:"
    assert sorted(lines[1:]) == [
        "misshapen blocks.0.attn1.to_q.weight [24, 23], must be [24, 24]",
        "missing blocks.2.attn2.to_v.bias [24]",
        "missing proj_out.weight [20, 24]",
        "proj_out.bias of dtype F8_E4M3, must be one of BF16, F16, F32",
        "unexpected blocks.3.ffn.net.2.bias [24]",
        "unexpected lora.up [2, 3]",
    ]


def test_rotary_tables_are_ignored_by_name(tensors, assign):
    extra = {"rope.freqs_cos": jnp.zeros((4, 2)), "freqs": jnp.zeros((1,))}
    assign(entries_of(tensors["diffusers"] | extra))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_of_both_dialects(layout, config, configs):
    assert wan.read_config(configs[layout]) == config


def test_released_configs_are_the_presets():
    """The keys that the released config.json files have, no more."""
    original = {"model_type": "t2v", "dim": 5120, "num_heads": 40, "num_layers": 40}
    original |= {"ffn_dim": 13824, "freq_dim": 256, "in_dim": 16, "out_dim": 16, "text_len": 512}
    assert wan.read_config({**original, "eps": 1e-6}) == WanConfig.t2v_14b()
    diffusers = {"_class_name": "WanTransformer3DModel", "attention_head_dim": 128}
    diffusers |= {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "freq_dim": 256}
    diffusers |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "image_dim": None}
    diffusers |= {"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "eps": 1e-6}
    assert wan.read_config(diffusers) == WanConfig.t2v_1_3b()


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("diffusers", {"_class_name": "UNet"}, "describes 'UNet', must be a Wan"),
        ("diffusers", {"image_dim": 1280}, "image_dim=1280, must be None"),
        ("original", {"model_type": "i2v"}, "model_type='i2v', must be 't2v'"),
        ("original", {"num_heads": 0}, "num_heads=0, must be a positive integer"),
        ("original", {"dim": True}, "dim=True, must be a positive integer"),
        ("diffusers", {"attention_head_dim": None}, "attention_head_dim=None, must be a positive"),
        ("diffusers", {"patch_size": 2}, "patch_size=2, must be three integers"),
        ("diffusers", {"eps": 2}, "eps=2, must be in"),
    ],
)
def test_refused_configs(layout, change, message, configs):
    with pytest.raises(ValueError, match=re.escape(message)):
        wan.read_config(configs[layout] | change)


def test_missing_config_keys_are_named_together(configs):
    config = dict(configs["original"])
    del config["dim"], config["eps"]
    with pytest.raises(ValueError, match=r"config.json lacks dim, eps"):
        wan.read_config(config)


@pytest.mark.parametrize("preset", [WanConfig.t2v_1_3b(), WanConfig.t2v_14b()], ids=["1_3b", "14b"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_presets_are_known_by_their_tensors(preset, layout):
    shapes = rules.flat_parameters(wan.abstract_model(preset, jnp.bfloat16))
    table, sizes = wan.TABLES[layout], wan.transform_sizes(preset)
    expected = rules.expected_tensors(table, shapes, sizes)
    entries = {name: reader.Entry(shape, "BF16", 0, np.zeros) for name, shape in expected.items()}
    assert wan.preset_of(entries) == preset
    assert len(expected) == 15 + 27 * preset.num_layers
    del entries["patch_embedding.bias"]
    assert wan.preset_of(entries) is None
