"""`pasa-jax info`: the device, and which implementation of each operation runs on it and why."""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib

from pasa_jax.pallas_kernels import api, tuning
from pasa_jax.pallas_kernels.blocks import BlockIndex, num_blocks


def machine() -> dict[str, Any]:
    """Device, driver, versions and the product's commit; None where one cannot be told."""
    device = jax.devices()[0]
    root = Path(__file__).resolve().parent.parent
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return {
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores",
        "driver": _told(query) if device.platform == "gpu" else None,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        # Installed, the package may lie inside another project's repository.
        "commit": _told(commit) if (root / ".git").exists() else None,
    }


def _told(command: list[str]) -> str | None:
    """The first line a program prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split("\n")[0] if done.returncode == 0 else None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked about: self-attention of `tokens` tokens, batch 1.

    Attributes:
        tokens: query and key tokens.
        heads: attention heads.
        head_dim: channels of a head.
        density: exact share of the key blocks, in (0, 1].
        block_q: tokens of a query block.
        block_kv: tokens of a key block.
        dtype: of q, k and v, by name.
    """

    tokens: int
    heads: int
    head_dim: int
    density: float
    block_q: int
    block_kv: int
    dtype: str

    def __post_init__(self):
        for name in ("tokens", "heads", "head_dim", "block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be in (0, 1]")

    @property
    def slots(self) -> int:
        """Key blocks listed of each query block."""
        return max(1, round(self.density * num_blocks(self.tokens, self.block_kv)))

    def case(self, implementation: str) -> tuning.Case:
        """What a kernel's options are looked up by."""
        sizes = (self.head_dim, self.block_q, self.block_kv)
        return tuning.Case(implementation, *sizes, self.density, self.dtype)


def kernels(setting: Setting) -> dict[str, dict[str, str | None]]:
    """Per operation of PASA the answer of `api.availability`: what runs here, or why not."""
    told = {}

    def probe():  # traced, so that none of the operands exists
        for name, args, kwargs in _calls(setting):
            told[name] = api.availability(name, *args, **kwargs)

    jax.eval_shape(probe)
    return told


def running(reasons: dict[str, str | None]) -> str | None:
    """The implementation that runs, by the answer of `api.availability`; None where none does."""
    return next((name for name, reason in reasons.items() if reason is None), None)


def sparse_kernel(setting: Setting) -> dict[str, Any]:
    """The kernel that runs block_sparse_attention here, its options, and whose they are."""
    name = running(kernels(setting)["block_sparse_attention"])
    found = tuning.Tuned({}, None) if name is None else tuning.find(setting.case(name))
    return {"implementation": name, "options": found.options, "from": found.origin}


def info(
    *,
    tokens: int = 32760,
    heads: int = 12,
    head_dim: int = 128,
    density: float = 0.15,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    block_q: int = 64,
    block_kv: int = 64,
) -> dict[str, dict[str, str | None]]:
    """Prints device, versions, and per operation what runs, how tuned, and what is refused.

    Args:
        tokens: query and key tokens; the defaults are Wan 2.1 1.3B's at 832x480, 81 frames.
        heads: attention heads.
        head_dim: channels of a head.
        density: exact share of the key blocks, in (0, 1].
        dtype: of q, k and v.
        block_q: tokens of a query block.
        block_kv: tokens of a key block.

    Returns:
        Per operation the answer of `api.availability`.

    Raises:
        ValueError: a size below 1, or density outside (0, 1].
    """
    setting = Setting(tokens, heads, head_dim, density, block_q, block_kv, dtype)
    told = kernels(setting)
    here = machine()
    driver = "" if here["driver"] is None else f", driver {here['driver']}"
    versions = "".join(f", {name} {version}" for name, version in here["versions"].items())
    print(f"{len(jax.devices())} x {here['device']}{driver}{versions}")
    print(f"{tokens=} {heads=} {head_dim=} {density=} {dtype=} {block_q=} {block_kv=}")
    for operation, reasons in told.items():
        print(f"\n{operation}")
        for line in _lines(reasons):
            print(f"  {line}")
        name = running(reasons)
        if operation == "block_sparse_attention" and name is not None:
            print(f"  {_tuning_line(setting.case(name))}")
    return told


def _tuning_line(case: tuning.Case) -> str:
    """The options in use, and where they come from."""
    found = tuning.find(case)
    if found.source is None:
        known = "nothing tuned here" if tuning.tunable(case.implementation) else "it has no others"
        return f"options: {case.implementation}'s own ({known})"
    told = " ".join(f"{name}={value}" for name, value in found.options.items())
    return f"options: {told or 'the defaults, measured best'} (from {found.source})"


def _calls(setting: Setting) -> list[tuple[str, tuple, dict[str, Any]]]:
    """Operation, operands and options of PASA's calls."""
    s = setting
    rows = num_blocks(s.tokens, s.block_q)
    qkv = (jnp.zeros((1, s.tokens, s.heads, s.head_dim), s.dtype),) * 3
    ids = jnp.zeros((1, s.heads, rows, s.slots), jnp.int32)
    blocks = BlockIndex(ids, jnp.zeros((1, s.heads, rows), jnp.int32))
    grouped = {"block_kv": s.block_kv, "group": 32}
    tail = api.block_statistics(*qkv[1:], **grouped)
    sizes = {"block_q": s.block_q, "block_kv": s.block_kv}
    lse = jnp.zeros(qkv[0].shape[:3], jnp.float32)
    return [
        ("dense_attention", qkv, {}),
        ("block_sparse_attention", (*qkv, blocks), {**sizes, "tail": tail}),
        ("block_statistics", qkv[1:], grouped),
        ("block_covariance_norm", qkv[1:], grouped),
        ("block_mass", (*qkv[:2], lse), {**sizes, "top": s.slots}),
    ]


def _lines(reasons: dict[str, str | None]) -> list[str]:
    """One line an implementation, best first."""
    runs = running(reasons)
    words = {None: "possible"}
    return [
        f"{name:11} {'runs' if name == runs else words.get(reason, f'refused: {reason}')}"
        for name, reason in reasons.items()
    ]
