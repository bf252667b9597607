"""Files on disk: every kind is read, every damaged or hostile one is named in one line."""

import json
import os
import re
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from pasa_jax.convert import reader

DATA = {
    "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "single": jnp.arange(35, dtype=jnp.float32).reshape(5, 7) / 8,
    "sixteen": jnp.arange(3, dtype=jnp.float16),
    "empty": jnp.zeros((0, 4), jnp.float32),
}


@pytest.fixture
def file(tmp_path):
    save_file(DATA, tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path / "diffusion_pytorch_model.safetensors"


def with_header(path, header, data=b"", length=None):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def item(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path, message, error=ValueError):
    """One line that names the file and says what is wrong."""
    with pytest.raises(error, match=re.escape(message)) as failure:
        reader.open_source(path)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def check_values(entries, data):
    assert entries.keys() == data.keys()
    for name, want in data.items():
        got = entries[name].read()
        assert got.dtype == want.dtype and got.nbytes == entries[name].nbytes
        np.testing.assert_array_equal(got, np.asarray(want))


def test_safetensors_values(file):
    check_values(reader.open_source(file.parent).entries, DATA)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
def test_torch_values(suffix, tmp_path, torch, monkeypatch):
    loads, load = [], reader.load_torch
    monkeypatch.setattr(reader, "load_torch", lambda file: loads.append(file) or load(file))
    monkeypatch.setattr(reader, "MAX_MAPPED", 20)  # bytes, fewer than these tensors have
    tensors = {
        name: torch.tensor(np.asarray(value, np.float32)).to(getattr(torch, value.dtype.name))
        for name, value in DATA.items()
    }
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    torch.save(tensors, tmp_path / f"any{suffix}")
    check_values(
        reader.open_source(tmp_path / f"any{suffix}").entries,
        DATA | {"strided": jnp.arange(12.0).reshape(3, 4).T},
    )
    assert len(loads) > 1  # mapped anew, so pages do not pile up


def test_a_pipelines_folder_and_a_file_alone(tmp_path, file):
    inner = tmp_path / "pipeline" / "transformer"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text('{"a": 1}')
    save_file(DATA, inner / "diffusion_pytorch_model.safetensors")
    source = reader.open_source(tmp_path / "pipeline")
    assert source.path == inner and source.config == {"a": 1}
    assert reader.open_source(file).config is None


def test_safetensors_go_before_pickles(file):
    (file.parent / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert reader.open_source(file.parent).files == [file]


def test_truncated_files_say_what_they_lack(file):
    whole = file.read_bytes()
    for keep in (len(whole) - 1, 40, 5):
        file.write_bytes(whole[:keep])
        message = refused(file.parent, "is truncated: expected ")
        assert file.name in message and message.endswith(f"has {keep}")
    file.write_bytes(whole[:-1])
    refused(file.parent, f"expected {len(whole)} bytes, has {len(whole) - 1}")


def test_longer_files_are_refused(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"x")
    refused(file, f"has {size + 1} bytes, its header describes {size}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "has damaged header: "),
        (b"[" * 100_000, "has damaged header: "),
        (b"[]", "has damaged header: it must be an object"),
        (b'{"a": 1, "a": 1}', "has damaged header: a key stands twice"),
        ({"a": 1}, "has a damaged header at tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "has a damaged header at tensor 'a'"),
        ({"a": item(offsets=(0, 8.0))}, "has a damaged header at tensor 'a'"),
        ({"a": item(offsets=(0, 4))}, "at bytes [0, 4], expected [0, 8]"),
        ({"a": item(offsets=(4, 12))}, "at bytes [4, 12], expected [0, 8]"),
        ({"a": item(), "b": item()}, "at bytes [0, 8], expected [8, 16]"),
        ({"a": item(shape=(-2, -1))}, "a damaged header: tensor 'a' of F32 [-2, -1]"),
        ({"a": item(dtype="F4")}, "tensor 'a' of unknown dtype='F4'"),
    ],
)
def test_damaged_headers(header, message, tmp_path):
    refused(with_header(tmp_path / "a.safetensors", header, bytes(8)), message)


def test_a_huge_header_is_not_read(tmp_path):
    file = with_header(tmp_path / "a.safetensors", b"{}", length=2**62)
    refused(file, f"is no safetensors file: a header of {2**62} bytes")


def test_missing_and_foreign_paths(tmp_path):
    refused(tmp_path / "none", "does not exist", FileNotFoundError)
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path / "notes.txt", "must be a folder or end in one of .safetensors")
    refused(tmp_path, "is no checkpoint: it must hold diffusion_pytorch_model.safetensors")


def test_damaged_config(file):
    (file.parent / "config.json").write_text("{")
    refused(file.parent, "config.json' has damaged JSON: ")


def write_index(folder, weight_map):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(weight_map))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..\\a.safetensors", "..", "a.txt"],
)
def test_shards_outside_the_folder(name, tmp_path):
    folder = write_index(tmp_path, {"weight_map": {"a": name}})
    refused(folder, f"names the shard {name!r}, not a file in its folder")


def test_bad_indices(tmp_path, file):
    refused(write_index(tmp_path, {"weight_map": []}), "must map tensors to files")
    refused(
        write_index(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}),
        "names missing shards: one.safetensors, two.safetensors",
        FileNotFoundError,
    )
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text("{}")
    refused(tmp_path, "has 2 indices, it must have one")


def test_a_tensor_in_two_shards(tmp_path, file):
    names = [file.name, "diffusion_pytorch_model-2.safetensors"]
    save_file({"half": DATA["half"]}, tmp_path / names[1])
    folder = write_index(tmp_path, {"weight_map": dict(zip("ab", names, strict=True))})
    refused(folder, "repeats tensors of another file: half")


def test_a_pickle_that_runs_code_does_not(tmp_path, torch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"a": Hostile()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "holds more than tensors, which could run code")
    assert not (tmp_path / "pwned").exists()


def test_torch_files_that_are_no_dictionary(tmp_path, torch):
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "must hold one dictionary of tensors")


def test_damaged_torch_files(tmp_path, torch):
    file = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(2)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(file, f"is truncated, damaged, or of PyTorch before 1.6: it has {len(whole) - 100}")
    file.write_bytes(whole.replace(b"data.pkl", b"dada.pkl"))
    refused(file, "a.pth' is damaged: ")


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("data.pkl", b"")
    refused(tmp_path / "a.pth", "needs PyTorch: pip install 'pasa-jax[torch]'", ImportError)


def test_a_digest_tells_weights_apart_not_names(tmp_path):
    data = np.random.default_rng(0).normal(size=400_000).astype("f4").tobytes()  # 1.6 MB
    first, again, other, longer = (tmp_path / name for name in "abcd")
    first.write_bytes(data)
    again.write_bytes(data)
    changed = bytearray(data)
    for i in range(0, len(changed), 4):  # the last bit of every number
        changed[i] ^= 1
    other.write_bytes(changed)
    longer.write_bytes(data + b"0000")
    digests = [reader.weights_digest([file]) for file in (first, again, other, longer)]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert reader.weights_digest([first, other]) != reader.weights_digest([other, first])
    assert all(len(digest) == 12 for digest in digests)
