"""Checkpoint files on disk to named tensors: headers first, values only when asked for."""

import dataclasses
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

STEM = "diffusion_pytorch_model"  # of the published files, in both layouts
ENCODER_STEMS = ("model", "pytorch_model")  # of text encoders' files
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
PIECES, PIECE = 64, 4096  # read of a file to tell it from others, and bytes of each
MAX_MAPPED = 2**30  # bytes read from one mapping of a PyTorch file

# The dtypes a model's weights may have; the others are known by size alone, to check the header.
FLOATS = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32}
ITEM_SIZES = {
    **{name: 1 for name in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2")},
    **{name: 2 for name in ("U16", "I16", "F16", "BF16")},
    **{name: 4 for name in ("U32", "I32", "F32")},
    **{name: 8 for name in ("U64", "I64", "F64", "C64")},
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint; `read` brings its values, `dtype` is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as found: its files, its tensors by name and its config.json, None if absent."""

    path: Path
    files: list[Path]
    entries: dict[str, Entry]
    config: dict[str, Any] | None


def open_source(path: Path) -> Source:
    """Finds a checkpoint's files and reads their headers, no tensor.

    Args:
        path: a folder with config.json and weights, a pipeline's folder with that folder in
            `transformer`, or one file of weights.

    Raises:
        FileNotFoundError: nothing is there, or a shard of the index is not.
        ValueError: no checkpoint, or a file that is truncated, damaged or unsafe.
        ImportError: a PyTorch file without PyTorch.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} must be a folder or end in one of {', '.join(SUFFIXES)}")
    if (path / "transformer" / "config.json").is_file():
        path = path / "transformer"
    folder = path if path.is_dir() else path.parent
    files = weight_files(path) if path.is_dir() else [path]
    config = folder / "config.json"
    return Source(path, files, read_headers(files), read_json(config) if config.is_file() else None)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; safetensors before pickles."""
    for suffix in SUFFIXES:
        indices = sorted(folder.glob(f"{STEM}*{suffix}.index.json"))
        indices += encoder_files(folder, f"{suffix}.index.json")
        if len(indices) > 1:
            raise ValueError(f"{str(folder)!r} has {len(indices)} indices, it must have one")
        if indices:
            return shard_files(indices[0])
        if files := sorted(folder.glob(f"{STEM}*{suffix}")):
            return files
        if files := encoder_files(folder, suffix):
            return files[:1]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    if len(files) == 1:
        return files
    raise ValueError(
        f"{str(folder)!r} is no checkpoint: it must hold {STEM}.safetensors, its shards with an "
        f"index, or one {', '.join(SUFFIXES)} file; it has {len(files)} such files"
    )


def weights_digest(files: list[Path]) -> str:
    """Tells checkpoints apart by 64 pieces of each file, evenly spaced, not by names or times.

    Training or merging changes nearly all bytes of a file, so the pieces are enough, in no time
    whatever the size. Not a protection against forgery.

    Returns:
        Twelve hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for i in range(PIECES):
                stream.seek(max(0, size - PIECE) * i // (PIECES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()[:12]


def encoder_files(folder: Path, suffix: str) -> list[Path]:
    """A text encoder's file of that ending, under the names that transformers gives it."""
    files = [folder / f"{stem}{suffix}" for stem in ENCODER_STEMS]
    return [file for file in files if file.is_file()]


def shard_files(index: Path) -> list[Path]:
    """The files an index names, all of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{str(index)!r} must map tensors to files under 'weight_map'")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(SUFFIXES):
            raise ValueError(f"{str(index)!r} names the shard {name!r}, not a file in its folder")
    files = [index.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{str(index)!r} names missing shards: {', '.join(absent)}")
    return files


def read_headers(files: list[Path]) -> dict[str, Entry]:
    """The tensors of all files together, by name."""
    entries: dict[str, Entry] = {}
    for file in files:
        found = read_torch(file) if file.suffix in TORCH_SUFFIXES else read_safetensors(file)
        if twice := sorted(entries.keys() & found.keys()):
            raise ValueError(f"{str(file)!r} repeats tensors of another file: {', '.join(twice)}")
        entries |= found
    return entries


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    return parse_object(file, file.read_bytes(), "JSON")


def parse_object(file: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys, or a ValueError naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} has damaged {what}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{str(file)!r} has damaged {what}: it must be an object")
    return value


def read_safetensors(file: Path) -> dict[str, Entry]:
    """Entries of a safetensors file: 8 bytes of length, a JSON header, the tensors end to end.

    Parsed here because the library maps files into memory, where every page read counts as ours,
    and cannot say how many bytes a truncated file lacks.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{str(file)!r} is no safetensors file: a header of {length} bytes")
        check_size(file, at_least=8 + length, actual=size)
        header = parse_object(file, stream.read(length), "header")
    header.pop("__metadata__", None)
    entries, end = {}, 8 + length
    for name, item in sorted(header.items(), key=lambda pair: offsets_of(file, *pair)):
        shape, dtype, nbytes = check_item(file, name, item, end - 8 - length)
        entries[name] = safetensors_entry(file, shape, dtype, nbytes, end)
        end += nbytes
    check_size(file, at_least=end, actual=size)
    if size > end:
        raise ValueError(f"{str(file)!r} has {size} bytes, its header describes {end}")
    return entries


def check_size(file: Path, *, at_least: int, actual: int) -> None:
    """Refuses a file shorter than its header says."""
    if actual < at_least:
        raise ValueError(f"{str(file)!r} is truncated: expected {at_least} bytes, has {actual}")


def offsets_of(file: Path, name: str, item: Any) -> tuple[int, int]:
    """Where a header's tensor begins and ends; also the first check of the item's form."""
    try:
        begin, end = item["data_offsets"]
        if all(type(value) is int for value in (begin, end, *item["shape"])):
            return begin, end
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{str(file)!r} has a damaged header at tensor {name!r}")


def check_item(
    file: Path, name: str, item: dict[str, Any], begin: int
) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and bytes of a tensor that must begin where the last one ended."""
    shape, dtype, offsets = tuple(item["shape"]), str(item.get("dtype")), item["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{str(file)!r} has tensor {name!r} of unknown {dtype=}")
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if min(shape, default=0) < 0 or offsets != [begin, begin + nbytes]:
        raise ValueError(
            f"{str(file)!r} has a damaged header: tensor {name!r} of {dtype} {list(shape)} at "
            f"bytes {offsets}, expected {[begin, begin + nbytes]}"
        )
    return shape, dtype, nbytes


def safetensors_entry(
    file: Path, shape: tuple[int, ...], dtype: str, nbytes: int, offset: int
) -> Entry:
    """An entry that reads its own bytes of the file."""

    def read() -> np.ndarray:
        raw = np.fromfile(file, np.uint8, nbytes, offset=offset)
        return raw.view(np.dtype(FLOATS[dtype])).reshape(shape)

    return Entry(shape, dtype, nbytes, read)


def read_torch(file: Path) -> dict[str, Entry]:
    """Entries of a file of `torch.save`: a dictionary of tensors and nothing else."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{str(file)!r} is truncated, damaged, or of PyTorch before 1.6: it has "
            f"{file.stat().st_size} bytes and must be a zip archive as torch.save writes it"
        )
    loaded = load_torch(file)
    if not isinstance(loaded, dict) or not all(hasattr(t, "dtype") for t in loaded.values()):
        raise ValueError(f"{str(file)!r} must hold one dictionary of tensors")
    mapped = MappedFile(file, loaded)
    return {str(name): torch_entry(mapped, name) for name in loaded}


def import_torch(file: Path) -> Any:
    """PyTorch, which only pickled checkpoints need."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"{str(file)!r} needs PyTorch: pip install 'pasa-jax[torch]'") from None
    return torch


def load_torch(file: Path) -> Any:
    """The file's objects, tensors mapped rather than read, no code run."""
    torch = import_torch(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{str(file)!r} holds more than tensors, which could run code") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"{str(file)!r} is damaged: {line}") from None


class MappedFile:
    """Tensors of a mapped file, mapped anew every so often: pages once read count as memory."""

    def __init__(self, file: Path, tensors: dict[str, Any]):
        self.file, self.tensors, self.bytes_read = file, tensors, 0

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor."""
        if self.bytes_read > MAX_MAPPED:
            self.tensors, self.bytes_read = load_torch(self.file), 0
        tensor = self.tensors[name].detach().contiguous()
        self.bytes_read += tensor.nbytes
        bits = tensor.view(-1).view(import_torch(self.file).uint8).numpy().copy()
        return bits.view(np.dtype(FLOATS[torch_dtype(tensor)])).reshape(tensor.shape)


def torch_dtype(tensor: Any) -> str:
    """Safetensors' name of a tensor's dtype, or PyTorch's where a model's weights have none."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(dtype, dtype)


def torch_entry(mapped: MappedFile, name: str) -> Entry:
    """An entry that reads a mapped file."""
    tensor = mapped.tensors[name]
    return Entry(tuple(tensor.shape), torch_dtype(tensor), tensor.nbytes, lambda: mapped.read(name))
