"""Wan's autoencoders against the originals' stored outputs, and their own promises."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.convert import checkpoint, reader, rules, wan_vae
from pasa_jax.models.wan_vae import (
    Scale,
    WanVAEConfig,
    check_video,
    in_chunks,
    in_tiles,
    pool,
    spread,
)

ARRAYS = np.load(Path(__file__).parent.parent / "fixtures" / "wan_vae.npz")
SMALL = WanVAEConfig(
    channels=3,
    patch=1,
    latent_channels=3,
    encoder_dim=4,
    decoder_dim=4,
    multipliers=(1, 2, 4, 2),
    temporal=(False, True, True),
    blocks=1,
    residual=False,
    latents_mean=(0.5, -1.0, 2.0),
    latents_std=(0.25, 1.0, 3.0),
)
CONFIGS = {
    "2_1": SMALL,
    "2_2": dataclasses.replace(SMALL, patch=2, decoder_dim=6, residual=True),
}
# The same in diffusers' words.
BOTH = {
    **{"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 4, 2], "num_res_blocks": 1},
    **{"latents_mean": [0.5, -1.0, 2.0], "latents_std": [0.25, 1.0, 3.0]},
}
DIFFUSERS = {
    "2_1": BOTH,
    "2_2": {
        **BOTH,
        **{"is_residual": True, "decoder_base_dim": 6, "scale_factor_spatial": 16},
        **{"patch_size": 2, "in_channels": 12, "out_channels": 12},
    },
}
# Unoptimised: these programs take seconds to compile and nothing to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = jit(lambda model, video: model.encode(video))
decode = jit(lambda model, latents, tile=None: model.decode(latents, tile), static_argnums=2)


def draw(shapes):
    """The weights of make_wan_vae.py."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def fill(config, layout, read, dtype=jnp.float32):
    """A model of the tensors that `read` makes of their names and shapes."""
    abstract = wan_vae.abstract_model(config, dtype)
    shapes, table = rules.flat_parameters(abstract), wan_vae.tables(config)[layout]
    tensors = read(rules.expected_tensors(table, shapes, {}))
    values = {}
    for rule in table:
        value = rule.forward(tensors[rule.name()], {})
        values[rule.path] = jnp.asarray(value.astype(shapes[rule.path].dtype))
    return checkpoint.with_parameters(abstract, values)


def load(version, layout, dtype=jnp.float32):
    """The small model with the weights that the fixture's had."""
    return fill(CONFIGS[version], layout, draw, dtype)


@pytest.fixture(scope="module")
def model():
    return load("2_1", "diffusers")


def inputs(config):
    """Latents and a video of make_wan_vae.py."""
    rng = np.random.default_rng(1)
    stride = config.spatial_stride
    latents = rng.normal(size=(2, 3, 3, 2, 3)).astype(np.float32)
    video = rng.uniform(-1, 1, size=(2, 9, 3 * stride, 2 * stride, 3)).astype(np.float32)
    return jnp.asarray(latents), jnp.asarray(video)


def check(got, want):
    """Parity, of an array or of a name in the fixture."""
    want = ARRAYS[want] if isinstance(want, str) else want
    # 1e-4 relative in f32, the promise; measured 1e-5 and less.
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("version", list(CONFIGS))
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_both_ways_are_the_originals(version, layout):
    model = load(version, layout)
    latents, video = inputs(model.config)
    mean, log_variance = encode(model, video)
    check(mean, f"{version}:{layout}:mean")
    if layout == "diffusers":
        check(log_variance, f"{version}:{layout}:log_variance")
    decoded = decode(model, latents)
    assert decoded.shape == video.shape
    check(decoded[:, :, ::3, ::5], f"{version}:{layout}:video")


@pytest.mark.parametrize("version", list(CONFIGS))
def test_a_folder_saved_by_diffusers(tmp_path, torch, diffusers, version):
    """A still image with zeros behind it, as for image-to-video, and latents back to a video.

    Of the shapes above, so that it compiles nothing.
    """
    torch.manual_seed(0)
    original = diffusers.AutoencoderKLWan(**DIFFUSERS[version]).eval()
    with torch.no_grad():  # norms begin as ones, which hide mistakes
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    original.save_pretrained(tmp_path)
    source = reader.open_source(tmp_path)
    assert wan_vae.read_config(source.config) == CONFIGS[version]
    tensors = {name: entry.read() for name, entry in source.entries.items()}
    model = fill(CONFIGS[version], "diffusers", lambda shapes: tensors)

    latents, video = inputs(model.config)
    video = video.at[:, 1:].set(0)

    def call(function, x):
        with torch.no_grad():
            return function(torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3))

    mean = call(original.encode, video).latent_dist.mode()
    check(encode(model, video)[0], mean.permute(0, 2, 3, 4, 1).numpy())
    decoded = call(original.decode, latents).sample
    check(decode(model, latents), decoded.permute(0, 2, 3, 4, 1).numpy())


def test_tiled_frames_are_diffusers():
    model = load("2_2", "diffusers")
    rng = np.random.default_rng(2)
    latents = jnp.asarray(rng.normal(size=(1, 1, 3, 6, 3)), jnp.float32)
    check(decode(model, latents, 4)[:, :, ::3, ::5], "2_2:diffusers:tiled")


def test_shortcuts_by_index():
    """The published order of a shortcut's pixels: channel, frame, row, column, the last fastest.

    The released widths average or repeat over rows and columns, which hides their order.
    """
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 4, 2, 12)).astype(np.float32)  # F Y X C
    fine = rng.normal(size=(3, 4, 2, 3)).astype(np.float32)
    pooled = np.zeros((2, 2, 1, 12), np.float32)  # 3 frames behind a frame of zeros
    grown = np.zeros((6, 8, 4, 3), np.float32)
    for c, (f, y, x) in itertools.product(range(3), np.ndindex(2, 2, 2)):
        place = ((c * 2 + f) * 2 + y) * 2 + x
        frames = np.concatenate([np.zeros_like(fine[:1]), fine])
        pooled[..., place // 2] += frames[f::2, y::2, x::2, c] / 2
        grown[f::2, y::2, x::2, c] = wide[..., place // 2]
    np.testing.assert_allclose(pool(jnp.asarray(fine)[None], 12, True, True)[0], pooled, rtol=1e-6)
    np.testing.assert_array_equal(spread(jnp.asarray(wide)[None], 3, True, first=False)[0], grown)
    np.testing.assert_array_equal(
        spread(jnp.asarray(wide)[None], 3, True, first=True)[0], grown[1:]
    )


def test_log_variance_is_cut(model):
    bias = jnp.asarray([0.0] * 3 + [-1e3, 0.0, 1e3])
    changed = checkpoint.with_parameters(
        model, {**rules.flat_parameters(model), "quant/bias": bias}
    )
    log_variance = encode(changed, inputs(model.config)[1])[1]
    assert (jnp.min(log_variance), jnp.max(log_variance)) == (-30, 20)
    assert jnp.all((jnp.abs(log_variance) < 20)[..., 1])


def blend(parts, overlap):
    """Tiles of rows of tiles, each blended into the one before it; the one before is blended."""

    def into(before, tile, axis):
        before, tile = np.moveaxis(before, axis, 0), np.moveaxis(tile, axis, 0).copy()
        extent = min(len(before), len(tile), overlap)
        ramp = (np.arange(extent) / extent)[:, None]
        tile[:extent] = before[-extent:] * (1 - ramp) + tile[:extent] * ramp
        return np.moveaxis(tile, 0, axis)

    for i, row in enumerate(parts):
        for j, tile in enumerate(row):
            tile = into(parts[i - 1][j], tile, 0) if i else tile
            row[j] = into(row[j - 1], tile, 1) if j else tile
    return parts


@pytest.mark.parametrize("rows", [5, 13])
def test_tiles_blend_one_after_the_other(rows):
    """Against diffusers' order of blending, written out: above first, then left."""
    scale, tile, stride, columns = Scale(2, 4, 1), 8, 6, 14  # the last tiles are 1 and 2 cells
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 2 * rows, 2 * columns, 1)).astype(np.float32)

    def whole(part):
        part = part * jnp.mean(part, keepdims=True)  # a seam wherever tiles meet
        return jnp.repeat(jnp.repeat(part, 2, axis=2), 2, axis=3)

    def cut(i, j):
        return x[:, :, 2 * i : 2 * (i + tile), 2 * j : 2 * (j + tile)]

    parts = [
        [np.asarray(whole(cut(i, j)))[0, 0, :, :, 0] for j in range(0, columns, stride)]
        for i in range(0, rows, stride)
    ]
    own = 4 * stride
    want = np.block([[part[:own, :own] for part in row] for row in blend(parts, 8)])
    got = jit(lambda x: in_tiles(whole, x, tile, scale))(jnp.asarray(x))[0, 0, :, :, 0]
    # Sums of four products in f32.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_ramps_step_by_patches():
    """A patch's pixels come of one place and have one weight."""
    scale, tile = Scale(1, 4, 2), 5
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 9, 9, 1)), jnp.float32)

    def whole(part):
        return jnp.repeat(jnp.repeat(part * jnp.mean(part), 4, axis=2), 4, axis=3)

    got = in_tiles(whole, x, tile, scale)
    pairs = got.reshape(1, 1, 18, 2, 18, 2, 1)
    np.testing.assert_array_equal(pairs, jnp.broadcast_to(pairs[:, :, :, :1, :, :1], pairs.shape))


def test_a_frame_within_one_tile_is_whole():
    x = jnp.ones((1, 1, 4, 6, 1))
    seen = []
    in_tiles(lambda part: seen.append(part.shape) or part, x, 6, Scale(1, 1, 1))
    assert seen == [x.shape]


def test_chunks_see_the_first_frame_alone():
    """Each chunk once, in order, with what the one before kept."""
    x = jnp.arange(1.0, 8.0).reshape(1, 7, 1, 1, 1)

    def step(chunk, past):
        past = jnp.zeros(()) if past is None else past
        total = past + jnp.sum(chunk)
        return jnp.full((1, 1, 1, 1, 1), 100.0 * chunk.shape[1]) + total, total

    assert in_chunks(step, x, 3, 1).ravel().tolist() == [101.0, 310.0, 328.0]


def test_length_does_not_grow_the_program(model):
    """One program for the first frame, one for all others."""

    def operations(frames):
        latents = jax.ShapeDtypeStruct((1, frames, 2, 2, 3), jnp.float32)
        return str(jax.make_jaxpr(lambda model, x: model.decode(x))(model, latents)).count(" = ")

    assert operations(2) == operations(9)


def test_bfloat16_is_close_to_float32():
    model = load("2_1", "diffusers", jnp.bfloat16)
    latents, _ = inputs(model.config)
    rounded = decode(model, latents[:, :1])
    exact = ARRAYS["2_1:diffusers:video"][:, :1]
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded[:, :, ::3, ::5] - exact) / np.linalg.norm(exact)
    # Each of about 20 layers in a row rounds its operands by up to 2^-9.
    assert 1e-4 < error < 20 * 2**-9


@pytest.mark.parametrize("version", list(CONFIGS))
def test_what_is_kept_between_chunks_is_bfloat16(version):
    model = wan_vae.abstract_model(CONFIGS[version], jnp.bfloat16)
    latents, video = (jax.eval_shape(lambda x=x: x) for x in inputs(model.config))
    past = jax.eval_shape(lambda model, z: model.decoder(z[:, :1], None)[1], model, latents)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(past)} == {"bfloat16"}
    out = jax.eval_shape(
        lambda model, z, v: (model.decode(z), model.encode(v)), model, latents, video
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {"float32"}


def test_only_norms_are_kept_in_float32():
    abstract = wan_vae.abstract_model(SMALL, jnp.bfloat16)
    for path, leaf in rules.flat_parameters(abstract).items():
        assert leaf.dtype == (jnp.float32 if path.endswith("scale") else jnp.bfloat16), path


def test_normalised_latents(model):
    latents = jnp.full((1, 1, 1, 1, 3), 2.0, jnp.bfloat16)
    normal = model.normalise(latents)
    np.testing.assert_array_equal(normal.ravel(), np.array([6, 3, 0], np.float32))
    np.testing.assert_array_equal(model.denormalise(normal), latents.astype(jnp.float32))


@pytest.mark.parametrize(
    ("config", "millions", "strides"),
    [(WanVAEConfig.wan_2_1(), 126.9, (4, 8)), (WanVAEConfig.wan_2_2(), 704.7, (4, 16))],
    ids=["2_1", "2_2"],
)
def test_presets_have_the_published_size(config, millions, strides):
    leaves = rules.flat_parameters(wan_vae.abstract_model(config, jnp.float32)).values()
    assert round(sum(int(np.prod(leaf.shape)) for leaf in leaves) / 1e6, 1) == millions
    assert (config.temporal_stride, config.spatial_stride) == strides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal": (True, True)}, "must be one shorter than"),
        ({"latents_mean": (0.0,)}, "latents_mean has 1 values"),
        ({"latents_std": (1.0, 0.0, 1.0)}, "must be positive"),
        ({"decoder_dim": 3, "multipliers": (1, 1, 1, 1)}, "must be even"),
        ({"residual": True, "multipliers": (1, 2, 2, 3)}, "encoder_dims.*cannot split evenly"),
        ({"residual": True, "multipliers": (1, 1, 8, 1)}, "decoder_dims.*cannot split evenly"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 5, 8, 8, 4), "channels=4"),
        ((1, 4, 8, 8, 3), "frames=4, must be 1 \\+ a multiple of 4"),
        ((1, 5, 8, 12, 3), "columns=12, must be multiples of 8"),
        ((1, 5, 12, 8, 3), "rows=12"),
    ],
)
def test_videos_of_other_sizes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        check_video(SMALL, jnp.zeros(shape))


def test_other_latents_and_tiles_are_refused(model):
    with pytest.raises(ValueError, match="channels=4"):
        model.decode(jnp.zeros((1, 1, 2, 2, 4)))
    with pytest.raises(ValueError, match="tile=3 must be at least 4"):
        model.decode(jnp.zeros((1, 1, 2, 2, 3)), tile=3)
    with pytest.raises(ValueError, match="frames=2"):
        model.encode(jnp.zeros((1, 2, 8, 8, 3)))
