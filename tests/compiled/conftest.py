"""Compiles the selected cases of a chip in one process, so that compilers start once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def missing(module):
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # not even the package it lies in
        return True


def require_compilers(chip):
    """Fails without a chip's compilers: who asks for these tests must not see them skipped."""
    if chip.startswith("tpu"):
        found = {"libtpu": not missing("libtpu")}
    else:
        found = {"CUDA plugin": not missing("jax_plugins.xla_cuda13"), "ptxas": find_ptxas()}
    lacking = [name for name, there in found.items() if not there]
    if lacking:
        pytest.fail(f"no {', '.join(lacking)}: pip install -e '.[test,compilers]'", pytrace=False)


def find_ptxas():
    """NVIDIA's assembler from its package, not the machine's."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in Path(folder).glob("*/bin/ptxas"):
            return path
    return None


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
    ptxas = find_ptxas()
    environment = os.environ | {
        "PATH": os.pathsep.join([*([str(ptxas.parent)] if ptxas else []), os.environ["PATH"]]),
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
