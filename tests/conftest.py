"""Strict switches for the whole suite, and the door to PyTorch for parity tests."""

import os
import sys

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent promotion of types or ranks
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def diffusers():
    """The diffusers package; without it a parity test skips, but fails where CI promises it."""
    try:
        import diffusers
        import torch  # noqa: F401
    except ImportError:
        if os.environ.get("CI") and sys.version_info[:2] == (3, 11):
            raise
        pytest.skip("needs torch and diffusers, which CI installs on Python 3.11")
    return diffusers
