"""The T5 and UMT5 encoders against the PyTorch originals' stored states, and their promises."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pasa_jax.convert import rules, t5
from pasa_jax.models.t5 import T5Config, T5Encoder, bucket

FIXTURES = Path(__file__).parent.parent / "fixtures"
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
LENGTHS, TOKENS = np.array([37, 5], np.int32), 37
OWN = np.arange(TOKENS)[None, :, None] < LENGTHS[:, None, None]
forward = jax.jit(lambda model, *inputs: model(*inputs))


def encode(model, ids, lengths):
    """States as NumPy's, which mixes types."""
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    return np.asarray(forward(model, jnp.asarray(ids), lengths))


def filled(config, layout="transformers"):
    """The f32 model whose parameters make_t5.py drew: in order of the layout's names."""
    model = t5.abstract_model(config, jnp.float32)
    shapes = rules.flat_parameters(model)
    table, sizes = t5.tables(config)[layout], t5.transform_sizes(config)
    random = np.random.RandomState(0)
    names = sorted(rules.expected_tensors(table, shapes, sizes).items())
    tensors = {n: (random.normal(size=s) * 0.3).astype(np.float32) for n, s in names}
    values = {}
    for rule in table:
        found = [
            rule.forward(tensors[name], sizes)
            for name in rules.names(rule, shapes[rule.path].shape)
        ]
        values[rule.path] = jnp.asarray(np.stack(found) if rule.stacked else found[0])
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    parts = [(path, leaf.replace(values["/".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(parts))


@pytest.fixture(scope="module")
def models():
    return {kind: filled(config) for kind, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def ids():
    """As make_t5.py drew them."""
    return np.random.RandomState(1).randint(0, 53, (2, TOKENS)).astype(np.int32)


@pytest.fixture(scope="module")
def stored():
    return np.load(FIXTURES / "t5.npz")


@pytest.mark.parametrize("case", ["t5:masked", "t5:open", "umt5:masked", "umt5:original"])
def test_states_are_the_originals(case, models, ids, stored):
    kind, how = case.split(":")
    model = filled(CONFIGS[kind], "original") if how == "original" else models[kind]
    lengths, own = (None, True) if how == "open" else (LENGTHS, OWN)
    got, want = encode(model, ids, lengths), stored[case]
    # Sums of f32 in another order; measured 1e-6.
    assert np.abs((got - want) * own).max() < 2e-5 * np.abs(want).max()


def test_original_layout_has_the_originals_names(stored):
    config = CONFIGS["umt5"]
    shapes = rules.flat_parameters(t5.abstract_model(config, jnp.float32))
    names = rules.expected_tensors(t5.tables(config)["original"], shapes, {})
    assert sorted(names) == stored["names:original"].tolist()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_padding_does_not_reach_a_texts_own_tokens(kind, models, ids):
    model = models[kind]
    other = np.where(OWN[..., 0], ids, 52 - ids)
    first, second = (encode(model, x, LENGTHS) for x in (ids, other))
    np.testing.assert_array_equal(first * OWN, second * OWN)
    seen = encode(model, other, [TOKENS, TOKENS])
    assert np.abs((seen - first) * OWN)[1].max() > 1e-3  # where it is no padding it does


def test_a_longer_padding_gives_the_same_states(models, ids):
    short = encode(models["umt5"], ids[1:, :7], [5])
    long = encode(models["umt5"], ids, LENGTHS)
    # Sums of f32 in another order, of states of size 1.
    np.testing.assert_allclose(short[0, :5], long[1, :5], rtol=0, atol=1e-5)


def test_bfloat16_is_close_to_float32(models, ids):
    exact = encode(models["umt5"], ids, LENGTHS) * OWN
    config = CONFIGS["umt5"]
    graph, params = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    values = jax.tree.map(lambda p, like: p.astype(like.dtype), nnx.state(models["umt5"]), params)
    rounded = encode(nnx.merge(graph, values), ids, LENGTHS) * OWN
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # About 20 products in a row, whose operands are rounded by up to 2^-9 each.
    assert 1e-4 < error < 20 * 2**-9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_keep_their_types(dtype):
    model = nnx.eval_shape(lambda: T5Encoder(CONFIGS["umt5"], dtype=dtype, rngs=nnx.Rngs(0)))
    for path, leaf in rules.flat_parameters(model).items():
        kept = "norm" in path or "bias" in path
        assert leaf.dtype == (jnp.float32 if kept else dtype), path


@pytest.mark.parametrize(
    ("preset", "parameters", "bias"),
    [
        # model.safetensors.index.json of CogVideoX: 9,524,621,312 bytes of bfloat16.
        (T5Config.t5_v1_1_xxl(), 4_762_310_656, {"position_bias": (32, 64)}),
        # "5.68B" of Wan's models_t5_umt5-xxl-enc-bf16.pth, 11,361,920,418 bytes.
        (T5Config.umt5_xxl(), 5_680_910_336, {"blocks/position_bias": (24, 32, 64)}),
    ],
    ids=["t5", "umt5"],
)
def test_released_sizes(preset, parameters, bias):
    flat = rules.flat_parameters(nnx.eval_shape(lambda: T5Encoder(preset, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in flat.values()) == parameters
    assert {path: leaf.shape for path, leaf in flat.items() if "bias" in path} == bias


def test_program_does_not_grow_with_depth(ids):
    def lines(depth):
        config = dataclasses.replace(CONFIGS["umt5"], num_layers=depth)
        graph, params = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
        program = jax.make_jaxpr(lambda params: nnx.merge(graph, params)(jnp.asarray(ids)))(params)
        return str(program).count("\n")

    assert lines(2) == lines(7)


def test_first_values_are_drawn_as_the_originals():
    config = dataclasses.replace(SMALL, num_layers=1)
    create = jax.jit(lambda: nnx.state(T5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    with jax.default_prng_impl("rbg"):  # compiles in a fraction of the default's time
        flat = nnx.to_flat_state(create())
    std = {"/".join(map(str, path)): np.std(leaf.get_value()) for path, leaf in flat}
    want = {
        "token_embedding/embedding": 1,
        "position_bias": 24**-0.5,
        "blocks/attn/q/kernel": (24 * 5) ** -0.5,
        "blocks/attn/k/kernel": 24**-0.5,
        "blocks/attn/v/kernel": 24**-0.5,
        "blocks/attn/o/kernel": 15**-0.5,
        "blocks/ffn_gate/kernel": 24**-0.5,
        "blocks/ffn_up/kernel": 24**-0.5,
        "blocks/ffn_down/kernel": 36**-0.5,
        **dict.fromkeys(("blocks/norm_attn/scale", "blocks/norm_ffn/scale", "norm/scale"), 0),
    }
    assert std.keys() == want.keys()
    for path, value in want.items():  # 24 to 1272 draws: up to three standard errors
        assert abs(std[path] - value) <= 0.45 * value, path


def test_buckets_of_t5():
    distances = np.array([0, -1, -7, -8, -11, -12, -16, -64, -127, -128, -500, 1, 7, 8, 128])
    want = [0, 1, 7, 8, 8, 9, 10, 14, 15, 15, 15, 17, 23, 24, 31]
    assert bucket(distances, 32, 128).tolist() == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": 10}, r"self.buckets=10 must be a multiple of 4"),
        ({"max_distance": 2}, r"self.max_distance=2 must be above a quarter of self.buckets=8"),
    ],
)
def test_refused_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"dtype=dtype\('float16'\) must be float32 or bfloat16"):
        T5Encoder(SMALL, dtype=jnp.float16, rngs=nnx.Rngs(0))
