"""Options of the kernels measured best for a device; the shipped JSON files lie beside this one."""

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SHIPPED = Path(__file__).resolve().parent
FORMAT = 1  # of the files
MOST_BYTES = 16 * 2**20
LONGEST_LINE = 1000  # what a file says of itself may be of any length


@dataclasses.dataclass(frozen=True)
class Case:
    """What options are measured for and looked up by.

    Attributes:
        implementation: a kernel's module.
        head_dim: channels of a head.
        block_q: tokens of a query block.
        block_kv: tokens of a key block.
        density: listed key blocks of all, in (0, 1]; a look-up takes the nearest.
        dtype: of q, k and v, by name.
    """

    implementation: str
    head_dim: int
    block_q: int
    block_kv: int
    density: float
    dtype: str

    def __post_init__(self):
        for name in ("head_dim", "block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be in (0, 1]")


class Tuned(NamedTuple):
    """Options of a kernel and the file they come from; {} and None where nothing is known."""

    options: dict[str, int]
    source: Path | None

    @property
    def origin(self) -> str | None:
        """Whose file it is, "user" or "shipped"."""
        shipped = self.source is not None and self.source.parent == SHIPPED
        return "shipped" if shipped else None if self.source is None else "user"


def device_kind() -> str:
    """The device that programs are made for: the abstract mesh's where one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def user_file(kind: str) -> Path:
    """Where `pasa-jax tune` writes what it finds for a device, and `tuned` looks first."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"))
    return root / "pasa-jax" / "tuning" / _file_name(kind)


def _file_name(kind: str) -> str:
    return re.sub(r"\W+", "-", kind.lower()).strip("-") + ".json"


def tunable(implementation: str) -> Mapping[str, tuple[int, ...]]:
    """Option names of a kernel and the values worth trying; {} where it has nothing to tune."""
    module = importlib.import_module(f"pasa_jax.pallas_kernels.{implementation}")
    return getattr(module, "TUNABLE", {})


def read(path: Path, kind: str) -> dict[str, Any]:
    """A tuning file's content, checked but for the options' names and values.

    Args:
        path: a JSON file as `pasa-jax tune` writes.
        kind: the device it must have been measured on.

    Returns:
        The content: "format", "kind" and "cases", each with the fields of `Case` and its "options".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read or is no such file; one line that names file and rule.
    """
    with _naming(path):
        size = path.stat().st_size
        if size > MOST_BYTES or not path.is_file():
            raise ValueError(f"it must be a file of at most {MOST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_content(content, kind)
    return content


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes what is wrong with a file one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        rule = error.strerror if isinstance(error, OSError) else error
        told = f"tuning file {str(path)!r}: {rule}"
        raise ValueError(textwrap.shorten(told, LONGEST_LINE)) from error


def _check_content(content: Any, kind: str) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("cases"), list):
        raise ValueError("it must be an object with a list of cases")
    if content.get("format") != FORMAT:
        raise ValueError(f"format={content.get('format')!r} must be {FORMAT}")
    if content.get("kind") != kind:
        raise ValueError(f"kind={content.get('kind')!r} must be {kind!r}, this device")
    for case in content["cases"]:
        if not isinstance(case, dict) or not isinstance(case.get("options"), dict):
            raise ValueError("a case must be an object with options")
        case_of(case)


def case_of(content: Mapping[str, Any]) -> Case:
    """The `Case` among the fields of a file's case; ValueError where it has none."""
    fields = {field.name: field.type for field in dataclasses.fields(Case)}
    for name, kind in fields.items():
        value = content.get(name)
        if type(value) is not kind:
            raise ValueError(f"a case's {name}={value!r} must be of type {kind.__name__}")
    return Case(**{name: content[name] for name in fields})


def check_options(implementation: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError unless every option is one of the kernel's, with a value it may take."""
    known = tunable(implementation)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"option {name!r} must be one of {implementation}'s: {[*known]}")
        if type(value) is not int or value not in known[name]:
            raise ValueError(f"{implementation}'s {name}={value!r} must be one of {known[name]}")


@functools.cache
def _table(path: Path, kind: str, implementation: str) -> dict[Case, dict[str, int]]:
    """A file's options of one kernel; a bad file is told once and holds none."""
    try:
        cases = [
            one for one in read(path, kind)["cases"] if one["implementation"] == implementation
        ]
        with _naming(path):
            for one in cases:
                check_options(implementation, one["options"])
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logging.getLogger("pasa_jax").warning("%s; kernels run without it", error)
        return {}
    return {case_of(one): one["options"] for one in cases}


@functools.cache
def _nearest(kind: str, case: Case) -> Tuned:
    for path in (user_file(kind), SHIPPED / _file_name(kind)):
        table = _table(path, kind, case.implementation)
        fit = [one for one in table if dataclasses.replace(one, density=case.density) == case]
        if fit:
            best = min(fit, key=lambda one: (abs(one.density - case.density), one.density))
            return Tuned(table[best], path)
    return Tuned({}, None)


def clear() -> None:
    """Forgets what was read, so that programs traced from now on see the files anew."""
    _table.cache_clear()
    _nearest.cache_clear()


def find(case: Case) -> Tuned:
    """As `tuned`, with the file that the options come from."""
    return _nearest(device_kind(), case)


def tuned(
    implementation: str, *, head_dim: int, block_q: int, block_kv: int, density: float, dtype: Any
) -> dict[str, int]:
    """Options of `block_sparse_attention` measured best for this device.

    Called while a program is traced. The files are read once a process: the same arguments get the
    same options until `clear`.

    Args:
        implementation: the kernel's module, as "triton".
        head_dim: channels of a head.
        block_q, block_kv: tokens of a query and of a key block.
        density: slots over key blocks, L / J; of the densities measured the nearest counts.
        dtype: of q, k and v.

    Returns:
        Options by name, from the user's file (see `user_file`) or else the shipped one; {} where
        neither has the case: the kernel's own defaults hold. A file that is not for this device,
        or holds an option that the kernel does not know, is told in one log line and left out.
    """
    name = jnp.dtype(dtype).name
    # Lists may have more slots than there are key blocks.
    case = Case(implementation, head_dim, block_q, block_kv, min(1.0, density), name)
    return dict(find(case).options)
