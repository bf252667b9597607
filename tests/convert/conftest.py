"""Small Wan models and checkpoints of every kind a user may bring."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from pasa_jax.convert import checkpoint, rules, wan
from pasa_jax.models.wan import WanConfig


@pytest.fixture(scope="session")
def config():
    """Sizes distinct where the architecture allows, so that swapped axes cannot pass."""
    return WanConfig(
        in_channels=3,
        out_channels=5,
        patch=(1, 2, 2),
        dim=24,
        num_heads=2,
        num_layers=3,
        ffn_dim=40,
        freq_dim=14,
        text_dim=11,
        text_len=7,
        eps=1e-6,
    )


@pytest.fixture(scope="session")
def model(config):
    """A float32 model with no value twice the same."""
    rng = np.random.default_rng(0)
    abstract = wan.abstract_model(config, jnp.float32)
    values = {
        path: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in rules.flat_parameters(abstract).items()
    }
    return checkpoint.with_parameters(abstract, values)


@pytest.fixture(scope="session")
def tensors(model, config):
    """The model's checkpoint by layout: the table's inverse."""
    parameters = rules.flat_parameters(model)
    sizes = wan.transform_sizes(config)
    return {
        layout: rules.to_tensors(parameters, table, sizes) for layout, table in wan.TABLES.items()
    }


@pytest.fixture(scope="session")
def configs(config):
    """config.json by layout."""
    original = {theirs: getattr(config, ours) for ours, theirs in wan.ORIGINAL_SIZES.items()}
    return {
        "diffusers": wan.diffusers_config(config),
        "original": {**original, "model_type": "t2v", "eps": config.eps},
    }


@pytest.fixture
def save(configs, tensors, request):
    """Writes a checkpoint: save(folder, layout, kind, tensors) → folder."""

    def write(folder, layout="diffusers", kind="single", data=None):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(configs[layout]))
        data = tensors[layout] if data is None else data
        stem = folder / "diffusion_pytorch_model"
        if kind == "single":
            save_file(data, f"{stem}.safetensors")
        elif kind == "sharded":
            write_shards(folder, data)
        else:
            write_torch(request.getfixturevalue("torch"), f"{stem}{kind}", data)
        return folder

    return write


def write_shards(folder, data):
    """Three shards with tensors dealt round, and their index."""
    weight_map = {}
    for shard in range(3):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-00003.safetensors"
        part = {key: data[key] for key in sorted(data)[shard::3]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_torch(torch, path, data):
    """A file of torch.save; bfloat16 goes through float32, which holds it exactly."""
    torch.save(
        {
            name: torch.tensor(np.asarray(value, np.float32)).to(getattr(torch, value.dtype.name))
            for name, value in data.items()
        },
        path,
    )
