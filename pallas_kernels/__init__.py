"""Block-sparse attention on arrays: the public operations and one implementation a file."""

if __name__ != "pasa_jax.pallas_kernels":
    raise ImportError("import it as pasa_jax.pallas_kernels, or its types exist twice")

from pasa_jax.pallas_kernels.api import (
    block_covariance_norm,
    block_mass,
    block_sparse_attention,
    block_statistics,
    dense_attention,
)
from pasa_jax.pallas_kernels.blocks import (
    BlockIndex,
    BlockMass,
    BlockStatistics,
    block_lengths,
    num_blocks,
)

__all__ = [
    "BlockIndex",
    "BlockMass",
    "BlockStatistics",
    "block_covariance_norm",
    "block_lengths",
    "block_mass",
    "block_sparse_attention",
    "block_statistics",
    "dense_attention",
    "num_blocks",
]
