"""A folder saved by diffusers itself, converted, gives the same velocity."""

import jax
import jax.numpy as jnp
import numpy as np

from pasa_jax.convert import convert_checkpoint, load_model


def test_a_folder_saved_by_diffusers(tmp_path, torch, diffusers):
    torch.manual_seed(0)
    original = diffusers.WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=20,  # 10 rotary pairs: 4 for frames, 3 for rows and columns each
        in_channels=4,
        out_channels=4,
        text_dim=11,
        freq_dim=32,
        ffn_dim=70,
        num_layers=2,
    ).eval()
    with torch.no_grad():  # norms and biases begin as ones and zeros, which hide mistakes
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    original.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="300kB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1

    done = convert_checkpoint(tmp_path / "pipeline", tmp_path / "dst", progress=False)
    assert done.config.text_len == 512
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 3, 4, 6, 4)).astype(np.float32)  # B F Y X C
    text = np.zeros((2, 512, 11), np.float32)
    text[:, :5] = rng.normal(size=(2, 5, 11))
    timestep = np.array([3.0, 977.0], np.float32)
    with torch.no_grad():
        want = original(
            torch.tensor(latents.transpose(0, 4, 1, 2, 3)),
            torch.tensor(timestep),
            torch.tensor(text),
        ).sample.numpy()

    model = load_model(tmp_path / "dst")
    got, _ = jax.jit(lambda *inputs: model(*inputs))(
        *map(jnp.asarray, (latents, timestep, text[:, :5]))
    )
    got = np.asarray(got).transpose(0, 4, 1, 2, 3)
    # float32 sums in another order; a wrong column or table is an error of order one.
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
