"""PyTorch checkpoints to Flax parameters: one table of rules a model, one reader, one writer."""

if __name__ != "pasa_jax.convert":
    raise ImportError("import pasa_jax.convert: a second copy of its modules would not share their types")
