"""From a user's folder to an Orbax checkpoint and back: whole or not at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.flax import load_file

from pasa_jax.convert import (
    Conversion,
    checkpoint,
    convert_checkpoint,
    export_diffusers,
    load_model,
    reader,
    rules,
    wan,
    writer,
)

ROOT = Path(checkpoint.__file__).resolve().parent.parent


def check_equal(got, want, dtype=jnp.float32):
    """Same parameters; `want` is float32, rounded to dtype where the model allows."""
    rounds = rules.flat_parameters(wan.abstract_model(want.config, dtype))
    got, want = rules.flat_parameters(got), rules.flat_parameters(want)
    assert got.keys() == want.keys()
    for path, value in got.items():
        assert isinstance(value, jax.Array) and value.dtype == rounds[path].dtype, path
        np.testing.assert_array_equal(value, want[path].astype(rounds[path].dtype))


def convert(src, dst, **options) -> Conversion:
    return convert_checkpoint(src, dst, progress=False, **options)


def nothing_written(folder, *expected):
    """Only these names are in the folder, hidden ones counted."""
    assert sorted(os.listdir(folder)) == sorted(expected)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("diffusers", "single"),
        ("diffusers", "sharded"),
        ("diffusers", ".bin"),
        ("original", "sharded"),
        ("original", ".pth"),
    ],
)
def test_every_kind_of_source(layout, kind, tmp_path, save, model):
    src = save(tmp_path / "src", layout, kind)
    done = convert(src, tmp_path / "dst")
    assert done.layout == layout and done.dtype == "float32" and done.config == model.config
    assert done.files == (3 if kind == "sharded" else 1) and done.tensors == 15 + 27 * 3
    check_equal(load_model(tmp_path / "dst"), model)
    check_equal(load_model(src), model)
    nothing_written(tmp_path, "src", "dst")


def test_the_configs_come_back(tmp_path, save, model):
    convert(save(tmp_path / "src"), tmp_path / "dst", dtype="bfloat16")
    loaded = load_model(tmp_path / "dst")
    assert loaded.config == model.config
    meta = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert meta["dtype"] == "bfloat16" and meta["config"]["dim"] == model.config.dim


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_rounds_what_may_be_rounded(dtype, tmp_path, save, model):
    src = save(tmp_path / "src")
    done = convert(src, tmp_path / "dst", dtype=dtype)
    assert done.dtype == dtype
    check_equal(load_model(tmp_path / "dst"), model, dtype)
    check_equal(load_model(src, dtype), model, dtype)
    kept = load_model(tmp_path / "dst").blocks.norm_cross.scale
    assert kept.get_value().dtype == jnp.float32


def test_a_stored_dtype_is_kept_and_may_be_changed(tmp_path, save, tensors, model):
    data = {name: value.astype(jnp.bfloat16) for name, value in tensors["diffusers"].items()}
    assert convert(save(tmp_path / "src", data=data), tmp_path / "dst").dtype == "bfloat16"
    loaded = load_model(tmp_path / "dst")
    assert loaded.head.kernel.get_value().dtype == jnp.float32  # kept in float32 by the model
    wider = load_model(tmp_path / "dst", "float32")
    check_equal(loaded, wider, "bfloat16")
    assert wider.patch_embedding.kernel.get_value().dtype == jnp.float32
    assert wider.patch_embedding.dtype == jnp.float32  # and so are the products


def test_mixed_dtypes_lose_nothing(tmp_path, save, tensors):
    data = {name: value.astype(jnp.float16) for name, value in tensors["diffusers"].items()}
    data["patch_embedding.weight"] = data["patch_embedding.weight"].astype(jnp.bfloat16)
    assert convert(save(tmp_path / "src", data=data), tmp_path / "dst").dtype == "float32"


def test_orbax_restores_it_plain_and_sharded(tmp_path, save, model):
    convert(save(tmp_path / "src"), tmp_path / "dst")
    kernel = np.asarray(model.blocks.ffn_up.kernel.get_value())
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(tmp_path / "dst" / "params")
        np.testing.assert_array_equal(plain["blocks"]["ffn_up"]["kernel"], kernel)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
        sharding = jax.NamedSharding(mesh, jax.P(None, None, "model"))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), plain)
        abstract["blocks"]["ffn_up"]["kernel"] = jax.ShapeDtypeStruct(
            kernel.shape, jnp.bfloat16, sharding=sharding
        )
        cast = checkpointer.restore(tmp_path / "dst" / "params", abstract)
    got = cast["blocks"]["ffn_up"]["kernel"]
    assert got.sharding == sharding
    np.testing.assert_array_equal(got, kernel.astype(jnp.bfloat16))


def test_export_is_read_back(tmp_path, model, tensors, configs):
    export_diffusers(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == tensors["diffusers"].keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == configs["diffusers"]
    check_equal(load_model(tmp_path / "out"), model)


def test_dry_run_reads_and_writes_nothing(tmp_path, save, monkeypatch, capsys):
    src = save(tmp_path / "src")
    real = convert(src, tmp_path / "real")

    def touched(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(reader.np, "fromfile", touched)
    plan = convert_checkpoint(src, tmp_path / "dst", dry_run=True)
    nothing_written(tmp_path, "src", "real")
    assert plan.written_bytes == real.written_bytes
    stored = [
        f for f in (tmp_path / "real" / "params").rglob("*") if re.fullmatch(r"[\d.]+", f.name)
    ]
    assert plan.written_bytes == sum(file.stat().st_size for file in stored)
    printed = capsys.readouterr().out
    for part in (str(src), str(tmp_path / "dst"), "dry run", "float32", f"{plan.read_bytes:,}"):
        assert part in printed
    with pytest.raises(AssertionError, match="a tensor was read"):
        convert(src, tmp_path / "dst")
    nothing_written(tmp_path, "src", "real")


def test_progress_counts_every_byte(tmp_path, save, monkeypatch):
    seen = []
    bar = checkpoint.byte_bar

    def spy(*args):
        seen.append(bar(*args))
        return seen[0]

    monkeypatch.setattr(checkpoint, "byte_bar", spy)
    done = convert_checkpoint(save(tmp_path / "src"), tmp_path / "dst")
    assert seen[0].n == seen[0].total == done.read_bytes


def test_a_wrong_checkpoint_leaves_nothing(tmp_path, save, tensors):
    data = dict(tensors["original"])
    data["head.extra"] = data.pop("head.head.bias")
    src = save(tmp_path / "src", "original", data=data)
    with pytest.raises(ValueError, match=r"src': 2 tensors do not fit:\n  missing head.head.bias"):
        convert(src, tmp_path / "a" / "dst")
    with pytest.raises(ValueError, match="2 tensors do not fit"):
        load_model(src)
    nothing_written(tmp_path, "src")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing_and_runs_again(
    error, tmp_path, save, model, monkeypatch
):
    src, slices = save(tmp_path / "src"), []

    def fail(self, entry):
        slices.append(entry)
        if len(slices) > 20:
            raise error("stopped")
        return value(self, entry)

    value = checkpoint.Parameter.value
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Parameter, "value", fail)
        with pytest.raises(error, match="stopped"):
            convert(src, tmp_path / "dst")
    nothing_written(tmp_path, "src")
    convert(src, tmp_path / "dst")
    check_equal(load_model(tmp_path / "dst"), model)


def test_the_target_appears_by_one_rename(tmp_path, save, monkeypatch):
    src = save(tmp_path / "src")

    def replace(partial, target):
        assert (partial / "config.json").is_file() and (partial / "params" / "_METADATA").is_file()
        nothing_written(tmp_path, "src", partial.name)
        raise OSError("full")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="full"):
        convert(src, tmp_path / "dst")
    nothing_written(tmp_path, "src")


KILLED = """
import os, signal, sys
from pasa_jax.convert import convert_checkpoint, rules

# A parent that ignores Ctrl-C, as a shell's background jobs do, would hand that down.
signal.signal(signal.SIGINT, signal.default_int_handler)
value, read = rules.Parameter.value, []

def last(self, entry):
    read.append(entry)
    if len(read) > 20:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return value(self, entry)

rules.Parameter.value = last
convert_checkpoint(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_killed_process_leaves_no_checkpoint(name, tmp_path, save, model):
    src, dst = save(tmp_path / "src"), tmp_path / "dst"
    command = [sys.executable, "-c", KILLED, str(src), str(dst), name]
    died = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert died.returncode == -getattr(signal, name), died.stderr.decode()[-500:]
    left = sorted(set(os.listdir(tmp_path)) - {"src"})
    if name == "SIGINT":  # Ctrl-C lets it clear up
        assert left == []
    else:
        assert len(left) == 1 and left[0].startswith(".dst.partial-")
    convert(src, dst)
    nothing_written(tmp_path, "src", "dst")
    check_equal(load_model(dst), model)


def test_partial_folders_of_running_processes_stay(tmp_path, save, monkeypatch):
    target = tmp_path / "dst"
    prefix = writer.partial_prefix(target)
    for name in (f"{os.getppid()}", "4194305", "no-number", f"{os.getpid()}"):
        (tmp_path / f"{prefix}{name}").mkdir()
    (tmp_path / ".dst.partial-elsewhere-1").mkdir()
    convert(save(tmp_path / "src"), target)
    nothing_written(tmp_path, "src", "dst", f"{prefix}{os.getppid()}", ".dst.partial-elsewhere-1")


def test_processes_of_others_are_running(monkeypatch):
    def forbidden(pid, sig):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert writer.is_running("1")


def test_targets(tmp_path, save, model, monkeypatch):
    src, dst = save(tmp_path / "src"), tmp_path / "dst"
    dst.mkdir()
    convert(src, dst)  # an empty folder is taken
    check_equal(load_model(dst), model)
    with pytest.raises(FileExistsError, match=r"dst' exists, must be absent or an empty folder"):
        convert(src, dst)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"file' exists, must be absent"):
        convert(src, tmp_path / "file")
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, 1,000 are free"):
        convert(src, tmp_path / "deep" / "new", dry_run=True)


def test_sources_that_are_none(tmp_path, save, tensors):
    src = save(tmp_path / "src")
    convert(src, tmp_path / "dst")
    with pytest.raises(ValueError, match="is converted already"):
        convert(tmp_path / "dst", tmp_path / "again")
    shutil.rmtree(tmp_path / "dst" / "params")
    with pytest.raises(ValueError, match="has no params/ and must be converted again"):
        load_model(tmp_path / "dst")
    other = save(tmp_path / "other", data={"conv.weight": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"no tensor of Wan among its 1; .* 'conv.weight'"):
        convert(other, tmp_path / "again")
    with pytest.raises(ValueError, match=r"dtype='int8' must be one of float32, bfloat16"):
        convert(src, tmp_path / "again", dtype="int8")
    with pytest.raises(ValueError, match=r"dtype='half a byte' must be one of"):
        convert(src, tmp_path / "again", dtype="half a byte")


def test_a_config_with_too_many_layers_is_not_listed(tmp_path, save, configs):
    src = save(tmp_path / "src")
    (src / "config.json").write_text(json.dumps(configs["diffusers"] | {"num_layers": 2**30}))
    with pytest.raises(ValueError, match=r"config.num_layers=1073741824 in config.json, but 96"):
        convert(src, tmp_path / "dst")


def test_a_file_without_config(tmp_path, save):
    src = save(tmp_path / "src", "original")
    (src / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json beside it, and not of the size of a"):
        convert(src / "diffusion_pytorch_model.safetensors", tmp_path / "dst")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_heads", 0), ("patch", [0, 1, 1]), ("dim", "128"), ("eps", 2.0), ("more", 1)],
)
def test_a_converted_folder_with_an_impossible_config_is_refused(tmp_path, save, key, value):
    convert(save(tmp_path / "src"), tmp_path / "dst")
    file = tmp_path / "dst" / "config.json"
    meta = json.loads(file.read_text())
    meta["config"][key] = value
    file.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="config.json"):
        load_model(tmp_path / "dst")


def test_a_converted_folder_with_a_part_missing_is_refused(tmp_path, save):
    convert(save(tmp_path / "src"), tmp_path / "dst")
    part = next(path for path in (tmp_path / "dst" / "params").iterdir() if path.is_dir())
    shutil.rmtree(part)
    with pytest.raises(ValueError, match="is damaged, convert it again"):
        load_model(tmp_path / "dst")
