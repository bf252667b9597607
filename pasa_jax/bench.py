"""`pasa-jax bench attention`: sparse against dense attention, timed in turns in one run."""

import ctypes
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
from tqdm import tqdm

from pasa_jax.attention import Attention, attend
from pasa_jax.pallas_kernels import api
from pasa_jax.policies import Context, Pasa, Pisa, Policy

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: self-attention of `tokens` tokens, batch 1, on random normal q, k, v."""

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


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what ran.
        seconds: median of the rounds; `fastest` and `slowest` are their ends.
        speedup: median over rounds of dense seconds over this row's; None for a part of a method.
        temporary_mib: what the compiled program allocates besides operands and result.
        resident_mib: growth of the process's resident memory while the call runs, in a process of
            its own, operands excluded; None where the system does not tell.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    speedup: float | None
    temporary_mib: float
    resident_mib: float | None


def _policies(setting: Setting) -> dict[str, Policy]:
    """The methods by row name. PISA is run twice: PASA's grouped term costs what 1/32 more does."""
    shape = dict(block_q=setting.block_q, block_kv=setting.block_kv, dense_layers=())
    more = min(1.0, setting.density + 1 / 32)
    return {
        "pasa": Pasa(density=setting.density, **shape),
        "pisa": Pisa(density=setting.density, **shape),
        "pisa, density + 1/32": Pisa(density=more, **shape),
    }


def _budget(policy: Policy, setting: Setting) -> int:
    """Exact key blocks per query block at a sparse step, on a flat velocity curve."""
    blocks = -(-setting.tokens // setting.block_kv)
    return policy.max_budget(2, blocks)


def _run_policy(policy: Policy, budget: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One sparse self-attention call: statistics, routing, attention."""
    zero, keys = jnp.int32(0), jax.random.split(jax.random.key(0), 1)
    run = Attention(policy, "sparse", zero, jnp.int32(budget), keys, budget)
    return attend(q, k, v, run, layer=zero)[0]


def _plan(policy: Policy, budget: int, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """Statistics and routing alone."""
    zero, keys = jnp.int32(0), jax.random.split(jax.random.key(0), 1)
    plan, _ = policy.plan(q, k, v, Context(zero, zero, jnp.int32(budget), keys, budget), ())
    return plan.blocks, plan.tail


def _methods(setting: Setting) -> dict[str, Callable[..., Any]]:
    """What is compared, dense first; each takes q, k, v."""
    methods = {"dense": lambda q, k, v: api.dense_attention(q, k, v)}
    for name, policy in _policies(setting).items():
        budget = _budget(policy, setting)
        methods[name] = lambda q, k, v, p=policy, budget=budget: _run_policy(p, budget, q, k, v)
    return methods


def _parts(setting: Setting) -> dict[str, Callable[..., Any]]:
    """Parts of PASA, to see what they cost apart."""
    policy = _policies(setting)["pasa"]
    budget = _budget(policy, setting)

    def statistics_of(q, k, v):
        return api.block_statistics(k, v, block_kv=policy.block_kv, group=policy.group)

    return {
        "  pasa's statistics": statistics_of,
        "  pasa's statistics and routing": lambda q, k, v: _plan(policy, budget, q, k, v),
    }


def _operands(setting: Setting) -> list[jax.Array]:
    shape = (1, setting.tokens, setting.heads, setting.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape).astype(setting.dtype) for key in keys]


def _rounds(programs: dict[str, Any], operands: list[jax.Array], repeats: int) -> dict[str, list]:
    """Seconds of every program in every round, after one round that is not counted."""
    seconds = {name: [] for name in programs}
    for turn in tqdm(range(repeats + 1), desc="rounds", unit="round", file=sys.stderr):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _resident(setting: Setting, name: str) -> float | None:
    """MiB that one call of a method adds to a fresh process; None where /proc does not tell."""
    if jax.default_backend() != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    order = json.dumps([dataclasses.asdict(setting), name])
    done = subprocess.run(
        [sys.executable, "-m", "pasa_jax.bench", order],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return float(done.stdout) if done.returncode == 0 else None


def _measure_resident(setting: Setting, name: str) -> float:
    """Peak of resident memory during one call over its value before, in this process, MiB."""
    operands = jax.block_until_ready(_operands(setting))
    program = jax.jit(_methods(setting)[name]).lower(*operands).compile()
    ctypes.CDLL(None).malloc_trim(0)  # give back what compiling left, or the call reuses it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kib("VmRSS")
    jax.block_until_ready(program(*operands))
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _row(name: str, program: Any, seconds: dict[str, list], resident: float | None) -> Row:
    mine = seconds[name]
    ratios = [dense / own for dense, own in zip(seconds["dense"], mine, strict=True)]
    return Row(
        name,
        statistics.median(mine),
        min(mine),
        max(mine),
        None if name.startswith(" ") else statistics.median(ratios),
        program.memory_analysis().temp_size_in_bytes / MIB,
        resident,
    )


def _print_table(rows: list[Row]) -> None:
    print(f"{'':32}{'seconds':>9}{'fastest':>9}{'slowest':>9}{'speedup':>9}{'temp':>9}{'rss':>9}")
    for row in rows:
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        resident = "" if row.resident_mib is None else f"{row.resident_mib:.1f}"
        print(
            f"{row.name:32}{row.seconds:9.3f}{row.fastest:9.3f}{row.slowest:9.3f}"
            f"{speedup:>9}{row.temporary_mib:9.1f}{resident:>9}"
        )
    print("speedup: median over rounds of dense over the row, each round running all in turn;")
    print("temp: MiB the compiled program allocates; rss: MiB one call adds to a fresh process.")


def bench_attention(
    *,
    tokens: int = 16384,
    heads: int = 4,
    head_dim: int = 64,
    density: float = 0.15,
    block_q: int = 64,
    block_kv: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 7,
    resident: bool = True,
    output: str | None = None,
) -> dict[str, Any]:
    """Times PASA and PISA, statistics and routing included, against dense attention.

    Args:
        tokens: query and key tokens.
        heads: attention heads.
        head_dim: channels of a head.
        density: exact share of the key blocks, in (0, 1].
        block_q: tokens of a query block.
        block_kv: tokens of a key block.
        dtype: of q, k and v.
        repeats: timed rounds; each runs every method once, after one round that is not counted.
        resident: also measure resident memory, each method in a process of its own (CPU, Linux).
        output: write the result to this JSON file.

    Returns:
        The result as written: device, versions, setting and rows (see `Row`).

    Raises:
        ValueError: a size below 1, or density outside (0, 1].
    """
    setting = Setting(tokens, heads, head_dim, density, block_q, block_kv, dtype)
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1")
    operands = _operands(setting)
    methods, parts = _methods(setting), _parts(setting)
    programs = {
        name: jax.jit(function).lower(*operands).compile()
        for name, function in tqdm((methods | parts).items(), desc="compiling", file=sys.stderr)
    }
    memory = {name: _resident(setting, name) if resident else None for name in methods}
    seconds = _rounds(programs, operands, repeats)
    rows = [_row(name, programs[name], seconds, memory.get(name)) for name in programs]
    device = jax.devices()[0]
    result = {
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "setting": dataclasses.asdict(setting),
        "repeats": repeats,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    print(", ".join(f"{key}={value}" for key, value in result["setting"].items()))
    print(f"{result['device']}, jax {jax.__version__}, {repeats} rounds")
    _print_table(rows)
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    _fields, _name = json.loads(sys.argv[1])
    print(_measure_resident(Setting(**_fields), _name))
