"""Block-sparse attention on arrays: the public operations and one implementation a file."""

if __name__ != "pasa_jax.pallas_kernels":
    raise ImportError("import pasa_jax.pallas_kernels: a second copy of its modules would not share their types")
