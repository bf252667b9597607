"""`pasa-jax info`: the device, and which implementation of each operation runs on it and why."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib

from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import BlockIndex, num_blocks


def info(
    *,
    tokens: int = 32760,
    heads: int = 12,
    head_dim: int = 128,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    block_q: int = 64,
    block_kv: int = 64,
) -> dict[str, dict[str, str | None]]:
    """Prints device, versions, and per operation what runs and what is refused.

    Args:
        tokens: query and key tokens; the defaults are Wan 2.1 1.3B's at 832x480, 81 frames.
        heads: attention heads.
        head_dim: channels of a head.
        dtype: of q, k and v.
        block_q: tokens of a query block.
        block_kv: tokens of a key block.

    Returns:
        Per operation the answer of `api.availability`.

    Raises:
        ValueError: a size below 1.
    """
    sizes = dict(tokens=tokens, heads=heads, head_dim=head_dim)
    api.check_positive(**sizes, block_q=block_q, block_kv=block_kv)
    told = {}

    def probe():  # traced, so that none of the operands exists
        for name, args, kwargs in _calls(tokens, heads, head_dim, dtype, block_q, block_kv):
            told[name] = api.availability(name, *args, **kwargs)

    jax.eval_shape(probe)
    device = jax.devices()[0]
    kind = f"{device.device_kind} ({device.platform})"
    print(f"{len(jax.devices())} x {kind}, jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    print(f"{tokens=} {heads=} {head_dim=} {dtype=} {block_q=} {block_kv=}")
    for operation, reasons in told.items():
        print(f"\n{operation}")
        for line in _lines(reasons):
            print(f"  {line}")
    return told


def _calls(
    tokens: int, heads: int, head_dim: int, dtype: str, block_q: int, block_kv: int
) -> list[tuple[str, tuple, dict[str, Any]]]:
    """Operation, operands and options of PASA's calls."""
    rows, columns = num_blocks(tokens, block_q), num_blocks(tokens, block_kv)
    qkv = (jnp.zeros((1, tokens, heads, head_dim), dtype),) * 3
    ids = jnp.zeros((1, heads, rows, max(1, columns // 4)), jnp.int32)
    blocks = BlockIndex(ids, jnp.zeros((1, heads, rows), jnp.int32))
    grouped = {"block_kv": block_kv, "group": 32}
    tail = api.block_statistics(*qkv[1:], **grouped)
    sizes = {"block_q": block_q, "block_kv": block_kv}
    return [
        ("dense_attention", qkv, {}),
        ("block_sparse_attention", (*qkv, blocks), {**sizes, "tail": tail}),
        ("block_statistics", qkv[1:], grouped),
        ("block_covariance_norm", qkv[1:], grouped),
    ]


def _lines(reasons: dict[str, str | None]) -> list[str]:
    """One line an implementation, best first."""
    runs = next((name for name, reason in reasons.items() if reason is None), None)
    words = {None: "possible"}
    return [
        f"{name:11} {'runs' if name == runs else words.get(reason, f'refused: {reason}')}"
        for name, reason in reasons.items()
    ]
