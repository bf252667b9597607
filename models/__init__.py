"""Flax NNX video transformers, one architecture a file."""

if __name__ != "pasa_jax.models":
    raise ImportError("import pasa_jax.models: a second copy of its modules would not share their types")
