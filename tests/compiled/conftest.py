"""Compiles the selected cases of a chip in one process, so that compilers start once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GPU_COMPILERS = ("jax_plugins.xla_cuda13", "nvidia")
TPU_COMPILERS = ("libtpu",)


def missing(module):
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # not even the package it lies in
        return True


def require_compilers(chip):
    """Fails without a chip's compilers: who asks for these tests must not see them skipped."""
    needed = TPU_COMPILERS if chip.startswith("tpu") else GPU_COMPILERS
    lacking = [name for name in needed if missing(name)]
    if lacking:
        pytest.fail(f"no {', '.join(lacking)}: pip install -e '.[test,compilers]'", pytrace=False)


def selected(session):
    """The cases that the selected tests want compiled, by chip and name."""
    cases = {}
    for item in session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in params:
            cases.setdefault(params["chip"], {})[params["case"]["name"]] = params["case"]
    return cases


def compile_for(chip, cases, folder):
    """What `compile_for.py` told of the cases, by name, and how it ended."""
    (dumps := folder / "dumps").mkdir()
    reports = folder / "reports.jsonl"
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),  # what the tests import
        "JAX_PLATFORMS": "cpu",  # start no device: there is none
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor lock out another process
        "XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_emitter_re=ptx",
        "MOSAIC_GPU_DUMP_TO": str(dumps),
    }
    command = [sys.executable, HERE / "compile_for.py", chip, folder / "cases.json", reports, dumps]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = reports.read_text().splitlines() if reports.exists() else []
    told = {report["name"]: report for report in map(json.loads, lines)}
    return told, f"exit status {run.returncode}: {run.stderr[-2000:]}"


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """compiled(chip, case) → the case's report."""
    cases, done = selected(request.session), {}

    def report(chip, case):
        if chip not in done:
            require_compilers(chip)
            folder = tmp_path_factory.mktemp(chip)
            done[chip] = compile_for(chip, list(cases[chip].values()), folder)
        told, end = done[chip]
        if case["name"] not in told:
            pytest.fail(end)
        return told[case["name"]]

    return report
