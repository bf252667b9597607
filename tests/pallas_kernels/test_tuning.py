"""Which options a kernel gets, and what becomes of files that are not a tuning's."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.pallas_kernels import tuning, xla
from pasa_jax.pallas_kernels.tuning import tuned

CASE = dict(implementation="xla", head_dim=8, block_q=16, block_kv=16, dtype="float32")
ASK = dict(head_dim=8, block_q=16, block_kv=16, density=0.2, dtype=jnp.float32)


def case(keys, density=0.2, **change):
    return {**CASE, "density": density, "options": {"tile_keys": keys}, **change}


def content(*cases, **change):
    return {"format": 1, "kind": "cpu", "cases": list(cases), **change}


@pytest.fixture
def save(tmp_path, monkeypatch):
    """save(content, shipped=False, name=...) writes a tuning file, and forgets what was read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")

    def write(what, shipped=False, name="cpu.json"):
        path = (tmp_path / "shipped" if shipped else tuning.user_file("cpu").parent) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what if isinstance(what, bytes) else json.dumps(what).encode())
        tuning.clear()
        return path

    tuning.clear()
    yield write
    tuning.clear()


def test_nothing_known(save):
    assert tuned("xla", **ASK) == {}
    assert tuning.find(tuning.Case(**CASE, density=0.2)) == ({}, None)


@pytest.mark.parametrize("density, keys", [(0.01, 256), (0.19, 256), (0.21, 1024), (1.5, 512)])
def test_nearest_density(save, density, keys):
    save(content(case(1024, 0.3), case(256, 0.1), case(512, 0.9)))
    assert tuned("xla", **ASK | {"density": density}) == {"tile_keys": keys}


@pytest.mark.parametrize(
    "change",
    [{"head_dim": 16}, {"block_q": 32}, {"block_kv": 32}, {"dtype": "bfloat16"}],
    ids=lambda change: next(iter(change)),
)
def test_only_the_density_may_differ(save, change):
    save(content(case(256)))
    assert tuned("xla", **ASK | change) == {}
    assert tuned("triton", **ASK) == {}
    assert tuned("xla", **ASK) == {"tile_keys": 256}


def test_the_users_file_goes_before_the_shipped_one(save):
    shipped = save(content(case(256), case(256, head_dim=16)), shipped=True)
    mine = save(content(case(512, 0.9)))
    found = tuning.find(tuning.Case(**CASE, density=0.2))
    assert found == ({"tile_keys": 512}, mine) and found.origin == "user"
    found = tuning.find(tuning.Case(**CASE | {"head_dim": 16}, density=0.2))
    assert found == ({"tile_keys": 256}, shipped) and found.origin == "shipped"


def test_the_device_is_the_programs(save):
    save(content(case(1024), kind="NVIDIA H200"), name="nvidia-h200.json")
    assert tuned("xla", **ASK) == {}
    chip = jax.sharding.AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        assert tuned("xla", **ASK) == {"tile_keys": 1024}


def test_read_once_until_cleared(save):
    path = save(content(case(256)))
    assert tuned("xla", **ASK) == {"tile_keys": 256}
    tuned("xla", **ASK)["tile_keys"] = 0  # the caller's own
    path.write_text(json.dumps(content(case(512))))
    assert tuned("xla", **ASK) == {"tile_keys": 256}
    tuning.clear()
    assert tuned("xla", **ASK) == {"tile_keys": 512}


def test_users_folder_without_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/x")
    path = "/home/x/.cache/pasa-jax/tuning/tpu-v6-lite.json"
    assert str(tuning.user_file("TPU v6 lite")) == path
    assert tuning.user_file("../../etc/x").name == "etc-x.json"


BAD = {
    "no JSON": (b"tile_keys: 1", "Expecting value"),
    "no text": (b"\xff\xfe\x00", "codec can't decode"),
    "deep": (b"[" * 100_000, "recursion"),
    "list": ([], "must be an object with a list of cases"),
    "no cases": ({"format": 1, "kind": "cpu"}, "must be an object with a list of cases"),
    "format": (content(format=2), "format=2 must be 1"),
    "device": (content(kind="NVIDIA H200"), "kind='NVIDIA H200' must be 'cpu', this device"),
    "case": (content(3), "a case must be an object with options"),
    "options": (content(case(256, options=3)), "a case must be an object with options"),
    "fields": (content({"options": {}}), "a case's implementation=None must be of type str"),
    "head size": (content(case(256, head_dim=True)), "head_dim=True must be of type int"),
    "block": (content(case(256, block_q=0)), "block_q=0 must be at least 1"),
    "density": (content(case(256, float("nan"))), r"density=nan must be in \(0, 1\]"),
    "density word": (content(case(256, "0.2")), "density='0.2' must be of type float"),
    "dtype": (content(case(256, dtype=[])), r"dtype=\[\] must be of type str"),
    "option": (
        content(case(256, options={"stages\nx": 1})),
        r"option 'stages\\nx' must be one of xla's",
    ),
    "long": (content(case(256, options={"x" * 10**6: 1})), "tuning file"),
    "value": (content(case(10**9)), "xla's tile_keys=1000000000 must be one of"),
    "value type": (content(case(256.0)), "xla's tile_keys=256.0 must be one of"),
    "size": (b" " * (tuning.MOST_BYTES + 1), "must be a file of at most"),
}


@pytest.mark.parametrize("what, rule", BAD.values(), ids=BAD)
def test_a_bad_file_is_told_in_one_line_and_left_out(save, caplog, what, rule):
    path = save(what)
    save(content(case(256)), shipped=True)
    with caplog.at_level(logging.WARNING, "pasa_jax"):
        assert tuned("xla", **ASK) == {"tile_keys": 256}
        assert tuned("xla", **ASK | {"head_dim": 16}) == {}
    (record,) = caplog.records  # once a process, not once a call
    told = record.getMessage()
    assert str(path) in told and "\n" not in told and len(told) < 1100
    with pytest.raises(ValueError, match=rule):
        raise ValueError(told)


def test_a_folder_in_the_files_place(save):
    path = save(content())
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="must be a file"):
        tuning.read(path, "cpu")
    assert tuned("xla", **ASK) == {}


def test_a_file_in_the_folders_place(save):
    path = save(content())
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")
    with pytest.raises(ValueError, match="Not a directory"):
        tuning.read(path, "cpu")
    assert tuned("xla", **ASK) == {}


def test_another_kernels_bad_option_is_not_xlas(save):
    save(content(case(256), case(256, implementation="triton", options={"no such": 1})))
    assert tuned("xla", **ASK) == {"tile_keys": 256}


def test_shipped_files_are_good():
    for path in tuning.SHIPPED.glob("*.json"):
        kind = json.loads(path.read_text())["kind"]
        assert path.name == tuning.user_file(kind).name
        for one in tuning.read(path, kind)["cases"]:
            tuning.check_options(one["implementation"], one["options"])


def test_xla_runs_with_what_was_tuned(save, monkeypatch, problem):
    monkeypatch.setattr(xla, "TUNABLE", {"tile_keys": (16,), "tile_queries": (32,)})
    q, k, v, blocks = problem(96, 96, 16, 16, 3, b=1, n=1)
    sizes = dict(block_q=16, block_kv=16)

    def text(**options):
        run = lambda *args: xla.block_sparse_attention(*args, **sizes, **options)  # noqa: E731
        lowered = jax.jit(run).lower(q, k, v, blocks)
        return lowered.as_text(), lowered

    with pytest.raises(ValueError, match="option 'stages' must be one of xla's"):
        text(options={"stages": 2})
    own, program = text()
    assert own == text(options={})[0]
    save(content(case(16, 0.5), case(0, 0.9, options={"tile_queries": 32})))
    short, _ = text()
    assert short != own and short == text(options={"tile_keys": 16})[0] == text()[0]
    save(content(case(0, 0.5, options={"tile_queries": 32})))
    narrow, other = text()
    assert narrow not in (own, short) and narrow == text(options={"tile_queries": 32})[0]
    # Sums of some 50 terms in another order.
    quick = {"xla_backend_optimization_level": 0}
    out, want = (one.compile(compiler_options=quick)(q, k, v, blocks) for one in (other, program))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
