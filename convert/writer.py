"""Parameters to an Orbax checkpoint, tensor by tensor, complete or not there at all."""

import contextlib
import glob
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from pasa_jax.convert.rules import Parameter

PARAMS = "params"  # Orbax's folder within ours
CONFIG = "config.json"


class StreamHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax save a `Parameter` that is never whole in memory.

    On disk it is an ordinary array of Orbax's, one chunk a layer, so Orbax restores it as any
    other, cast or sharded. Weights hardly compress: chunks are stored as they are.
    """

    def __init__(self, on_slice: Callable[[int], Any]):
        super().__init__()
        self.on_slice = on_slice

    async def serialize(self, values, infos, args=None):
        for parameter, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            one = 1 if parameter.rule.stacked else parameter.shape[0]
            store = await tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": f"{info.path}/"},
                    "dtype": parameter.dtype.name,
                    "metadata": {
                        "shape": parameter.shape,
                        "chunks": (one, *parameter.shape[1:]),
                        "compressor": None,
                    },
                    "create": True,
                }
            )
            for index, value, nbytes in parameter.slices():
                await store[index].write(value, can_reference_source_data_indefinitely=True)
                self.on_slice(nbytes)
        return []  # nothing left to wait for


def write_checkpoint(
    target: Path,
    parameters: Mapping[str, Parameter],
    config: Mapping[str, Any],
    on_slice: Callable[[int], Any],
) -> None:
    """Writes `target` with params/ and config.json in it; on any failure there is nothing.

    Args:
        target: absolute path of a folder that is absent or empty.
        on_slice: told the bytes read for each slice once it is written.
    """
    tree = traverse_util.unflatten_dict(dict(parameters), sep="/")
    with partial_folder(target) as partial:
        with quiet_orbax(), ocp.Checkpointer(streaming_handler(on_slice)) as checkpointer:
            checkpointer.save(partial / PARAMS, args=ocp.args.PyTreeSave(tree))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def streaming_handler(on_slice: Callable[[int], Any]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees whose leaves are `Parameter`s."""
    registry = ocp.type_handlers.create_type_handler_registry((Parameter, StreamHandler(on_slice)))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or goes if there is an error."""
    remove_stale(target)
    partial = target.parent / f"{partial_prefix(target)}{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)  # takes an empty folder's place, never a full one's
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_prefix(target: Path) -> str:
    """Of this machine's partial folders; the process follows."""
    return f".{target.name}.partial-{socket.gethostname()}-"


def remove_stale(target: Path) -> None:
    """Removes what interrupted runs on this machine left, not what running ones write."""
    for folder in target.parent.glob(f"{glob.escape(partial_prefix(target))}*"):
        if not is_running(folder.name.rpartition("-")[2]):
            shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: str) -> bool:
    """Whether another process of this number exists, whoever owns it."""
    if pid == str(os.getpid()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Holds back Orbax's warnings about handlers and formats that we leave out on purpose."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
