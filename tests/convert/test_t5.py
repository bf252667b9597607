"""T5's tables of rules: complete and two-sided; live against transformers where it is there."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.convert import checkpoint, reader, rules, t5
from pasa_jax.models.t5 import T5Config, bucket

SMALL = T5Config(
    vocab_size=53,
    dim=24,
    num_heads=3,
    head_dim=5,
    ffn_dim=36,
    num_layers=3,
    buckets=8,
    max_distance=20,
    bias_per_layer=False,
    eps=1e-6,
)
CONFIGS = {"t5": SMALL, "umt5": dataclasses.replace(SMALL, bias_per_layer=True)}
LAYOUTS = ["transformers", "original"]
JSON = {  # of the released umt5-xxl, by the keys that say something about the encoder
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": 256384,
    "d_model": 4096,
    "num_heads": 64,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
}


def entries_of(tensors):
    """Entries as a reader would make them."""
    return {
        name: reader.Entry(value.shape, "F32", value.nbytes, lambda value=value: value)
        for name, value in tensors.items()
    }


def assign(entries, config, layout="transformers", dtype="float32"):
    shapes = rules.flat_parameters(t5.abstract_model(config, dtype))
    table, sizes = t5.tables(config)[layout], t5.transform_sizes(config)
    return rules.assign(entries, table, t5.IGNORED, shapes, sizes)


def load(entries, config):
    """The f32 model of a checkpoint."""
    values = {
        path: jnp.asarray(parameter.array(lambda _: None))
        for path, parameter in assign(entries, config).items()
    }
    return checkpoint.with_parameters(t5.abstract_model(config, "float32"), values)


@pytest.fixture
def random_values():
    """Parameters by path, no value twice the same."""

    def draw(config):
        random = np.random.default_rng(0)
        shapes = rules.flat_parameters(t5.abstract_model(config, "float32"))
        return {
            path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()
        }

    return draw


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_matches_its_own_names_alone(kind, layout):
    table = t5.tables(CONFIGS[kind])[layout]
    for rule in table:
        for layer in (0, 23):
            name = rule.name(layer)
            assert [other for other in table if re.fullmatch(other.pattern, name)] == [rule]
            assert not any(re.fullmatch(pattern, name) for pattern in t5.IGNORED)
        assert rules.match(table, name + "x") is None and rules.match(table, "x" + name) is None


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse_then_table_gives_the_parameters(kind, layout, random_values):
    config, want = CONFIGS[kind], random_values(CONFIGS[kind])
    table = t5.tables(config)[layout]
    tensors = rules.to_tensors(want, table, t5.transform_sizes(config))
    filled = assign(entries_of(tensors), config, layout)
    assert filled.keys() == want.keys()
    for path, parameter in filled.items():
        np.testing.assert_array_equal(parameter.array(lambda _: None), want[path])
    assert rules.best_table(entries_of(tensors), t5.tables(config))[0] == layout


def test_only_the_encoder_of_a_whole_t5_is_read(random_values):
    want = random_values(SMALL)
    tensors = rules.to_tensors(want, t5.tables(SMALL)["transformers"], {})
    extra = {
        "encoder.embed_tokens.weight": tensors["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((2, 2), np.float32),
        "lm_head.weight": np.zeros((2, 2), np.float32),
    }
    assert assign(entries_of(tensors | extra), SMALL).keys() == want.keys()
    with pytest.raises(ValueError, match=r"unexpected encoder.block.0.layer.0.SelfAttention.q.b"):
        odd = {"encoder.block.0.layer.0.SelfAttention.q.bias": np.zeros(2, np.float32)}
        assign(entries_of(tensors | odd), SMALL)


def test_float16_parameters_run_in_float32():
    model = t5.abstract_model(CONFIGS["umt5"], "float16")
    kernel = model.blocks.ffn_down.kernel.get_value()
    assert (kernel.dtype, model.blocks.ffn_down.dtype) == (jnp.float16, jnp.float32)
    assert model.token_embedding.dtype == jnp.float32
    assert model.blocks.norm_ffn.scale.get_value().dtype == jnp.float32


def test_released_configs_are_the_presets():
    assert t5.read_config(JSON) == T5Config.umt5_xxl()
    older = {**JSON, "model_type": "t5", "vocab_size": 32128}
    del older["relative_attention_max_distance"]
    assert t5.read_config(older) == T5Config.t5_v1_1_xxl()


@pytest.mark.parametrize("preset", [T5Config.t5_v1_1_xxl(), T5Config.umt5_xxl()], ids=CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_presets_are_known_by_their_table_of_tokens(preset, layout):
    name = {"transformers": "shared.weight", "original": "token_embedding.weight"}[layout]
    entry = reader.Entry((preset.vocab_size, 4096), "BF16", 0, np.zeros)
    assert t5.preset_of({name: entry}) == preset
    assert t5.preset_of({"x": entry}) is None
    assert t5.preset_of({name: dataclasses.replace(entry, shape=(53, 4096))}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "config.json describes 'bert', must be one of t5, umt5"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu', must be 'gated-gelu'"),
        ({"d_kv": 0}, "d_kv=0, must be a positive integer"),
        ({"layer_norm_epsilon": 2.0}, "eps=2.0, must be in (0, 1)"),
    ],
)
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        t5.read_config(JSON | change)


def test_missing_config_keys_are_named_together():
    config = {k: v for k, v in JSON.items() if k not in ("d_ff", "layer_norm_epsilon")}
    with pytest.raises(ValueError, match=r"config.json lacks d_ff, layer_norm_epsilon"):
        t5.read_config(config)
    del config["model_type"]
    with pytest.raises(ValueError, match=r"config.json describes None"):
        t5.read_config(config)


def test_config_without_the_kind_of_feed_forward_is_the_first_t5():
    config = {k: v for k, v in JSON.items() if k != "feed_forward_proj"} | {"model_type": "t5"}
    with pytest.raises(ValueError, match=r"feed_forward_proj='relu'"):
        t5.read_config(config)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_folder_saved_by_transformers(kind, transformers, torch, tmp_path):
    names = {"t5": "T5", "umt5": "UMT5"}
    make_config, make = (
        getattr(transformers, names[kind] + part) for part in ("Config", "EncoderModel")
    )
    torch.manual_seed(0)
    sizes = {theirs: getattr(SMALL, ours) for ours, theirs in t5.SIZES.items()}
    original = make(make_config(**sizes, feed_forward_proj="gated-gelu")).eval()
    with torch.no_grad():  # norms begin as ones, which hides mistakes
        for parameter in original.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    original.save_pretrained(tmp_path, max_shard_size="20kB")
    files = reader.shard_files(tmp_path / "model.safetensors.index.json")
    assert len(files) > 1
    config = t5.read_config(json.loads((tmp_path / "config.json").read_text()))
    assert config == CONFIGS[kind]
    model = load(reader.read_headers(files), config)

    random = np.random.default_rng(1)
    lengths = np.array([29, 4])
    ids, own = random.integers(0, 53, (2, 29)), np.arange(29)[None] < lengths[:, None]
    with torch.no_grad():
        want = original(torch.tensor(ids), torch.tensor(own).long()).last_hidden_state.numpy()
    got = jax.jit(lambda *inputs: model(*inputs))(
        jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)
    )
    # Sums of f32 in another order; a wrong matrix or bucket is an error of order one.
    assert np.abs((np.asarray(got) - want) * own[..., None]).max() < 2e-5 * np.abs(want).max()


def test_buckets_are_transformers(transformers, torch):
    layer = (
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=3, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2
            )
        )
        .encoder.block[0]
        .layer[0]
        .SelfAttention
    )
    for buckets, longest in ((32, 128), (8, 20), (64, 100)):
        layer.relative_attention_num_buckets = buckets
        layer.relative_attention_max_distance = longest
        distances = np.arange(-600, 601)
        want = layer._relative_position_bucket(torch.tensor(distances)).numpy()
        np.testing.assert_array_equal(bucket(distances, buckets, longest), want)
