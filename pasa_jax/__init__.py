"""Training-free sparse attention for video diffusion transformers, in JAX.

Axes, everywhere: B batch, T query tokens, S key tokens, N heads, H head size, D model width;
I query blocks, J key blocks, L kept key blocks, G groups of key blocks; F Y X the latent grid
(frames, rows, columns; T = F·Y·X), C latent channels; E text tokens.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the folders pallas_kernels, models and convert lie beside this package; the wheel
# holds them inside it. Either way they are imported as pasa_jax.<folder>.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))
