"""Block-sparse attention on arrays: the public operations and one implementation a file."""

if __name__ != "pasa_jax.pallas_kernels":
    raise ImportError("import it as pasa_jax.pallas_kernels, or its types exist twice")
        "import it as pasa_jax.pallas_kernels: a second copy would have types of its own"
    )
