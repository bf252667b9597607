"""`pasa-jax bench methods`: one layer's call of any policy beside dense attention, in one run."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from pasa_jax.attention import policy_order
from pasa_jax.bench import MIB, rounds
from pasa_jax.grid import TokenGrid
from pasa_jax.info import machine
from pasa_jax.layer import DENSE_MODES, Layer, attend_layer, plan_layer
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Policy
from pasa_jax.video import atomic

WAVES = 4  # half-waves along each axis, from 1 on


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind of call of one method costs.

    Attributes:
        method: its label; "dense" first.
        mode: the policy's name for this kind of call, "search" and "refresh" beside "sparse".
        seconds: median of the rounds; `fastest` and `slowest` are their ends.
        speedup: median over rounds of dense seconds over this row's.
        density: share of the key blocks that were exact.
        planning: median seconds of choosing blocks, statistics included; None for dense calls.
        temporary_mib: what the compiled call allocates besides operands and result.
    """

    method: str
    mode: str
    seconds: float
    fastest: float
    slowest: float
    speedup: float
    density: float
    planning: float | None
    temporary_mib: float

    @property
    def planning_share(self) -> float | None:
        """Planning over the whole call."""
        return None if self.planning is None else self.planning / self.seconds


def waves(grid: TokenGrid, heads: int, head_dim: int, dtype: Any) -> list[Array]:
    """q, k [1, T, N, H] that vary smoothly over the video, each head in its own way; v random.

    Sums of a few waves along frames, rows and columns, alike in q and k, with as much noise: nearby
    tokens attend to each other, so that methods which look at tokens find what they look for. Text
    is noise.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    axes = [x.reshape(-1) / n for x, n in zip(np.indices(grid.sizes), grid.sizes, strict=True)]
    phases = np.stack([np.pi * f * x for x in axes for f in range(1, WAVES + 1)], 1)
    smooth = np.pad(np.concatenate([np.cos(phases), np.sin(phases)], 1), ((0, grid.text), (0, 0)))
    mix = jax.random.normal(keys[0], (heads, smooth.shape[1], head_dim))
    shared = jnp.einsum("tw,nwh->tnh", jnp.asarray(smooth, jnp.float32), mix) * WAVES**-0.5
    noise = (jax.random.normal(key, (1, *shared.shape)) for key in keys[1:])
    q, k, v = next(noise) + shared[None], next(noise) + shared[None], next(noise)
    return [x.astype(dtype) for x in (q, k, v)]


def bench_methods(
    policies: dict[str, Policy],
    grid: TokenGrid,
    *,
    heads: int,
    head_dim: int,
    dtype: str,
    repeats: int,
) -> list[Row]:
    """Times every kind of call of every policy in turns with dense attention.

    Args:
        policies: by label.
        grid: the sequence's tokens; each policy gets them in its own order.
        heads, head_dim: N and H.
        dtype: of q, k and v.
        repeats: timed rounds, each of which runs everything once.

    Returns:
        Dense attention's row, then each policy's rows.

    Raises:
        ValueError: a policy that cannot run on this grid.
    """
    qkv = waves(grid, heads, head_dim, dtype)
    calls = {("dense", "dense"): jax.jit(api.dense_attention).lower(*qkv).compile()}
    operands, plans, density = {("dense", "dense"): qkv}, {}, {("dense", "dense"): 1.0}
    for name, policy in tqdm(policies.items(), desc="compiling", file=sys.stderr):
        layer = Layer.of(policy, grid)
        order = policy_order(policy, grid)
        own = qkv if order is None else [x[:, order] for x in qkv]
        state = layer.state(*own)
        for mode in layer.modes:
            key = name, mode
            operands[key] = [state, *own]
            calls[key] = attend_layer.lower(layer, mode, *operands[key]).compile()
            density[key] = float(calls[key](*operands[key])[1].density)
            if mode not in DENSE_MODES:
                plans[key] = plan_layer.lower(layer, mode, *operands[key]).compile()
    planning = _rounds(plans, operands, repeats)
    seconds = _rounds(calls, operands, repeats)
    dense = seconds["dense", "dense"]
    return [
        Row(
            *key,
            statistics.median(mine),
            min(mine),
            max(mine),
            statistics.median(d / own for d, own in zip(dense, mine, strict=True)),
            density[key],
            statistics.median(planning[key]) if key in planning else None,
            calls[key].memory_analysis().temp_size_in_bytes / MIB,
        )
        for key, mine in seconds.items()
    ]


def _rounds(programs: dict[Any, Any], operands: dict[Any, list[Any]], repeats: int) -> dict:
    """`bench.rounds` of programs with operands of their own."""
    bound = {key: lambda key=key: programs[key](*operands[key]) for key in programs}
    return rounds(bound, [], repeats)


def write_rows(target: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Machine, what was asked for, and the rows, as JSON."""
    with atomic(target) as temporary:
        content = {**machine(), **about, "rows": [dataclasses.asdict(row) for row in rows]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[Row]) -> str:
    """The rows in columns."""
    width = max(len(row.method) for row in rows) + 2
    heads = ("seconds", "fastest", "slowest", "speedup", "density", "planning", "temp MiB")
    lines = [f"{'':{width}}{'':9}" + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        share = "" if row.planning_share is None else f"{100 * row.planning_share:.1f} %"
        lines.append(
            f"{row.method:{width}}{row.mode:9}{row.seconds:10.3g}{row.fastest:10.3g}"
            f"{row.slowest:10.3g}{row.speedup:9.2f}x{row.density:10.3f}{share:>10}"
            f"{row.temporary_mib:10.1f}"
        )
    return "\n".join(lines)
