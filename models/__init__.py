"""Flax NNX video transformers, one architecture a file."""

if __name__ != "pasa_jax.models":
    raise ImportError("import it as pasa_jax.models, or its types exist twice")
