"""What a user calls: convert a checkpoint, load a model, export a model."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from tqdm import tqdm

from pasa_jax.convert import wan
from pasa_jax.convert.components import (
    COMPONENTS,
    Component,
    architecture,
    config_record,
    identify,
    names_known,
    read_record,
)
from pasa_jax.convert.reader import FLOATS, STEM, open_source, read_json, weights_digest
from pasa_jax.convert.rules import Parameter, assign, best_table, flat_parameters, to_tensors
from pasa_jax.convert.writer import CONFIG, PARAMS, write_checkpoint
from pasa_jax.models.wan import Wan

FORMAT = "pasa-jax checkpoint 1"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion does, known from the headers alone.

    Attributes:
        source: the checkpoint's folder or file.
        component: what it holds.
        layout: "diffusers", "transformers" or "original", by the tensors' names.
        config: the architecture.
        dtype: of the parameters that may be rounded; time embedding, norms, modulation and head
            are float32 always, as the original computes them.
        digest: of the source's files, see `reader.weights_digest`.
        files, tensors, read_bytes: of the source.
        parameters: what to write, by path.
    """

    source: Path
    component: Component
    layout: str
    config: Any
    dtype: str
    digest: str
    files: int
    tensors: int
    read_bytes: int
    parameters: Mapping[str, Parameter] = dataclasses.field(repr=False)

    @property
    def written_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters.values())

    def __str__(self) -> str:
        kept = sum(p.nbytes for p in self.parameters.values() if p.dtype.name != self.dtype)
        return (
            f"{self.source}: {self.component.name} in {self.layout} layout{self._size()}; "
            f"{self.files} file(s), {self.tensors} tensors, {self.read_bytes:,} bytes\n"
            f"→ {len(self.parameters)} parameters in {self.dtype}, {self.written_bytes:,} bytes"
            + (f", {kept:,} of them kept in float32" if kept else "")
        )

    def _size(self) -> str:
        """Depth and width, where the model has one width."""
        if not hasattr(self.config, "dim"):
            return ""
        return f", {self.config.num_layers} layers of width {self.config.dim}"


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Any = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Conversion:
    """Converts one model of PyTorch to an Orbax checkpoint, a tensor at a time.

    Args:
        src: a folder in diffusers layout (the transformer's or the pipeline's), a folder in the
            original layout, or one file of weights; safetensors, or `.pth` and `.bin` with
            PyTorch installed.
        dst: the folder to write, absent or empty: config.json and params/, which Orbax restores.
        dtype: of the parameters that may be rounded: "float32", "bfloat16" or "float16"; None
            keeps the source's.
        dry_run: only say what would happen, from the headers; nothing is written.
        progress: print what happens, and a bar of bytes read and seconds.

    Returns:
        What was or would be done.

    Raises:
        FileNotFoundError: `src` or one of its shards does not exist.
        FileExistsError: `dst` exists and is not an empty folder.
        ValueError: `src` is no checkpoint of Wan, is damaged, or does not fit its config.json; one
            message names all tensors that are missing, unexpected or misshapen.
        OSError: less room on the disk than the result takes.
        ImportError: a PyTorch file without PyTorch.
    """
    target = Path(dst).expanduser().resolve()
    plan = plan_conversion(Path(src).expanduser(), dtype)
    check_target(target, plan.written_bytes)
    if progress:
        print(plan, f"\n→ {target}" + (" (dry run: nothing written)" if dry_run else ""), sep="")
    if not dry_run:
        with byte_bar(plan.read_bytes, "converting", progress) as bar:
            write_conversion(target, plan, bar.update)
    return plan


def write_conversion(target: Path, plan: Conversion, on_read: Callable[[int], Any]) -> None:
    """Writes what was planned; `on_read` is told the bytes of each tensor."""
    meta = {"format": FORMAT, "model": plan.component.name, "dtype": plan.dtype}
    meta |= {"layout": plan.layout, "config": config_record(plan.config), "digest": plan.digest}
    write_checkpoint(target, plan.parameters, meta, on_read)


def load_model(path: str | Path, dtype: Any = None) -> nnx.Module:
    """Loads a model with its parameters on the default device.

    Args:
        path: a converted folder, or anything `convert_checkpoint` takes as its source; that is
            converted in memory.
        dtype: of the matrix products and of the parameters that may be rounded; None keeps the
            stored one.

    Returns:
        The Flax module.

    Raises:
        As `convert_checkpoint`, but for the target.
    """
    path = Path(path).expanduser()
    if is_converted(path):
        return load_converted(path, dtype)
    plan = plan_conversion(path, dtype)
    values = {
        name: jnp.asarray(parameter.array(lambda nbytes: None))
        for name, parameter in plan.parameters.items()
    }
    return with_parameters(plan.component.rules.abstract_model(plan.config, plan.dtype), values)


def export_diffusers(model: Wan, folder: str | Path) -> None:
    """Writes a model in diffusers layout: config.json and one safetensors file.

    Args:
        model: its parameters are written in the dtypes they have.
        folder: made if absent; the two files in it are replaced.
    """
    from safetensors.flax import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(
        flat_parameters(model), wan.TABLES["diffusers"], wan.transform_sizes(model.config)
    )
    save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    config = wan.diffusers_config(model.config)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def plan_conversion(src: Path, dtype: Any) -> Conversion:
    """Reads the headers, finds table and config, and assigns every tensor its place."""
    target_dtype = None if dtype is None else check_dtype(dtype)
    if is_converted(src):
        raise ValueError(f"{str(src)!r} is converted already, must be a PyTorch checkpoint")
    source = open_source(src)
    component = identify(source)
    first = next(iter(source.entries), "none")
    among = f"among its {len(source.entries)}; the first is {first!r}"
    if component is None or not names_known(component, source.entries):
        sought = ", ".join(COMPONENTS) if component is None else component.name
        raise ValueError(f"{str(src)!r} has no tensor of {sought} {among}")
    convert = component.rules
    try:
        config = architecture(component, source)
        layout, rules = best_table(source.entries, convert.tables(config))
        shapes = flat_parameters(convert.abstract_model(config, jnp.bfloat16))
        sizes = convert.transform_sizes(config)
        parameters = assign(source.entries, rules, convert.IGNORED, shapes, sizes)
    except ValueError as error:
        raise ValueError(f"{str(src)!r}: {error}") from None
    name = target_dtype or stored_dtype(parameters)
    return Conversion(
        source=source.path,
        component=component,
        layout=layout,
        config=config,
        dtype=name,
        digest=weights_digest(source.files),
        files=len(source.files),
        tensors=len(source.entries),
        read_bytes=sum(e.nbytes for p in parameters.values() for e in p.entries),
        parameters={path: rounded(p, name) for path, p in parameters.items()},
    )


def check_dtype(dtype: Any) -> str:
    """The name of a dtype that weights may be stored in."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"{dtype=} must be one of {', '.join(DTYPES)}")
    return name


def may_round(parameter: Parameter) -> bool:
    """Whether the model lets this parameter be other than f32, as planned for bf16."""
    return parameter.dtype == jnp.bfloat16


def rounded(parameter: Parameter, dtype: str) -> Parameter:
    """The parameter in the chosen dtype if it may be rounded."""
    if not may_round(parameter):
        return parameter
    return dataclasses.replace(parameter, dtype=np.dtype(jnp.dtype(dtype)))


def stored_dtype(parameters: Mapping[str, Parameter]) -> str:
    """The dtype that loses nothing of the parameters that may be rounded."""
    found = {
        FLOATS[entry.dtype] for p in parameters.values() if may_round(p) for entry in p.entries
    }
    return jnp.dtype(found.pop()).name if len(found) == 1 else "float32"


def check_target(target: Path, nbytes: int) -> None:
    """Refuses a target that holds something, or a disk that cannot hold the result."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} exists, must be absent or an empty folder")
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OSError(f"{str(target)!r} needs {nbytes:,} bytes, {free:,} are free")


def byte_bar(total: int, title: str, show: bool) -> tqdm:
    """A bar of bytes and seconds."""
    return tqdm(
        total=total, desc=title, unit="B", unit_scale=True, disable=not show, mininterval=0.5
    )


def is_converted(path: Path) -> bool:
    """Whether a folder is what `convert_checkpoint` writes."""
    config = path / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def read_converted_config(path: Path) -> tuple[Component, Any, str]:
    """Kind, architecture and stored dtype of a converted folder.

    Raises:
        ValueError: its config.json is not what `convert_checkpoint` writes.
    """
    meta = read_json(path / CONFIG)
    if meta.get("model") not in COMPONENTS or "dtype" not in meta:
        known = ", ".join(COMPONENTS)
        raise ValueError(f"{str(path / CONFIG)!r} must hold a dtype and a model, one of {known}")
    component = COMPONENTS[meta["model"]]
    try:
        return (
            component,
            read_record(component.config, meta.get("config")),
            check_dtype(meta["dtype"]),
        )
    except ValueError as error:
        raise ValueError(f"{str(path / CONFIG)!r}: {error}") from None


class Peeked(NamedTuple):
    """Architecture, dtype, and digest of the weights (`reader.weights_digest`)."""

    config: Any
    dtype: str
    digest: str


def peek(path: Path) -> Peeked:
    """What is told by a folder or file that `load_model` takes, without reading the weights."""
    if is_converted(path):
        _, config, dtype = read_converted_config(path)
        digest = read_json(path / CONFIG).get("digest")
        if not isinstance(digest, str):
            raise ValueError(f"{str(path / CONFIG)!r} has {digest=}, must be text: convert again")
        return Peeked(config, dtype, digest)
    plan = plan_conversion(path, None)
    return Peeked(plan.config, plan.dtype, plan.digest)


def load_converted(path: Path, dtype: Any) -> nnx.Module:
    """Restores a converted folder through Orbax, cast on the way."""
    component, config, stored = read_converted_config(path)
    if not (path / PARAMS).is_dir():
        raise ValueError(f"{str(path)!r} has no {PARAMS}/ and must be converted again")
    dtype = check_dtype(stored if dtype is None else dtype)
    model = component.rules.abstract_model(config, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for key, leaf in flat_parameters(model).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            restored = checkpointer.restore(
                (path / PARAMS).resolve(), traverse_util.unflatten_dict(target, sep="/")
            )
        except Exception as error:  # Orbax and TensorStore have no common class for damage
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{str(path)!r} is damaged, convert it again: {first}") from error
    return with_parameters(model, traverse_util.flatten_dict(restored, sep="/"))


def with_parameters(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """The abstract model with these parameters in it."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(values["/".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))
