"""Strict switches for the whole suite, and the door to PyTorch for parity tests."""

import importlib
import os
import sys

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent promotion of types or ranks
jax.config.update("jax_numpy_rank_promotion", "raise")


def need(name):
    """An optional package; without it a test skips, but fails where CI promises the package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI") and sys.version_info[:2] == (3, 11):
            raise
        pytest.skip(f"{name} is not installed; CI installs it on Python 3.11")


@pytest.fixture(scope="session", autouse=True)
def untuned(tmp_path_factory):
    """Kernels run with their own options, whatever the user has tuned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def torch():
    return need("torch")


@pytest.fixture(scope="session")
def diffusers(torch):
    return need("diffusers")
