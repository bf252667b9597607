"""The package as it is installed: one name, one copy, nothing done at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(*args, cwd, **environment):
    """Runs this interpreter elsewhere, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the built wheel unpacked into it, away from the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--outdir", str(work), str(ROOT), cwd=work)
    wheel = next(work.glob("*.whl"))
    site = work / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=work)
    return site


def test_wheel_holds_every_folder_and_runs(installed, tmp_path):
    where = "import pasa_jax, pasa_jax.models.wan as w; print(pasa_jax.__file__, w.__file__)"
    for file in python("-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).split():
        assert Path(file).is_relative_to(installed)
    main = "import sys; from pasa_jax.cli import main; sys.exit(main(['--help']))"
    assert "generate" in python("-c", main, cwd=tmp_path, PYTHONPATH=str(installed))
    assert (installed / "pasa_jax/models/tiny/weights/model_index.json").exists()


@pytest.mark.parametrize("folder", ["pallas_kernels", "models", "convert"])
def test_no_second_copy_from_the_checkout(folder):
    code = f"import {folder}"
    with pytest.raises(AssertionError, match=f"import it as pasa_jax.{folder}"):
        python("-c", code, cwd=ROOT)


def test_import_does_no_work():
    code = "import sys, pasa_jax; assert 'jax' not in sys.modules, 'importing pasa_jax imports jax'"
    python("-c", code, cwd=ROOT)
