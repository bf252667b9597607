"""Strict switches for the whole suite, and the door to PyTorch for parity tests."""

import importlib
import os
import sys

# Before JAX starts: more threads of its pool wait in the simulation of a GPU than two cores have.
os.environ.setdefault("NPROC", "16")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent promotion of types or ranks
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the suite's time, and nothing in it is timed.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def untyped():
    """Turns the run's type checks off, so that a wrong value meets our own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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


@pytest.fixture(scope="session")
def transformers(torch):
    return need("transformers")
