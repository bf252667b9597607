"""`pasa-jax bench attention`: sparse against dense attention, timed in turns in one run."""

import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pasa_jax.attention import Attention, attend
from pasa_jax.grid import TokenGrid
from pasa_jax.info import Setting, machine, sparse_kernel
from pasa_jax.pallas_kernels import BlockIndex, api
from pasa_jax.policies import Context, Pasa, Pisa, Policy
from pasa_jax.video import atomic, check_target

MIB = 2**20
# Tokens, heads and head size of the models' self-attention, by --shape.
SHAPES = {
    "wan1.3b-480p": (TokenGrid(21, 30, 52), 12, 128),
    "wan14b-480p": (TokenGrid(21, 30, 52), 40, 128),
    "wan14b-720p": (TokenGrid(21, 45, 80), 40, 128),
    "hunyuan-720p": (TokenGrid(33, 45, 80, text=256), 24, 128),
}


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
        tflops: 10^12 floating-point operations a second on the kept blocks, 4·H for each query and
            key; the tail's, the statistics' and the routing's work counts as time only.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    speedup: float | None
    temporary_mib: float
    resident_mib: float | None
    tflops: float | None


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
    """What is compared, dense first; each takes q, k, v and the lists of `_lists`."""
    methods = {"dense": lambda q, k, v, lists: api.dense_attention(q, k, v)}
    for name, policy in _policies(setting).items():
        budget = _budget(policy, setting)
        methods[name] = lambda q, k, v, lists, p=policy, b=budget: _run_policy(p, b, q, k, v)
    sizes = {"block_q": setting.block_q, "block_kv": setting.block_kv}
    methods["sparse kernel alone"] = lambda q, k, v, lists: api.block_sparse_attention(
        q, k, v, lists, **sizes
    )
    return methods


def _lists(setting: Setting, q: jax.Array, k: jax.Array, v: jax.Array) -> BlockIndex:
    """The blocks that PASA chooses, for the kernel alone."""
    policy = _policies(setting)["pasa"]
    budget = _budget(policy, setting)
    return jax.jit(lambda q, k, v: _plan(policy, budget, q, k, v)[0])(q, k, v)


def _kept_flop(setting: Setting, name: str) -> int | None:
    """Floating-point operations of a method's exact blocks; None for a part of a method."""
    policies = _policies(setting)
    each = 4 * setting.heads * setting.head_dim * setting.tokens
    if name == "dense":
        return each * setting.tokens
    if name.startswith(" "):
        return None
    policy = policies.get(name, policies["pasa"])
    return each * min(setting.tokens, _budget(policy, setting) * setting.block_kv)


def _parts(setting: Setting) -> dict[str, Callable[..., Any]]:
    """Parts of PASA, to see what they cost apart."""
    policy = _policies(setting)["pasa"]
    budget = _budget(policy, setting)

    def statistics_of(q, k, v, lists):
        return api.block_statistics(k, v, block_kv=policy.block_kv, group=policy.group)

    return {
        "  pasa's statistics": statistics_of,
        "  pasa's statistics and routing": lambda q, k, v, lists: _plan(policy, budget, q, k, v),
    }


def _operands(setting: Setting) -> list[Any]:
    """Random normal q, k, v, and lists."""
    shape = (1, setting.tokens, setting.heads, setting.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, shape).astype(setting.dtype) for key in keys]
    return [*qkv, _lists(setting, *qkv)]


def rounds(programs: dict[Any, Any], operands: list[Any], repeats: int) -> dict[Any, list]:
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


def _row(
    setting: Setting, name: str, program: Any, seconds: dict[str, list], resident: float | None
) -> Row:
    mine, flop = seconds[name], _kept_flop(setting, name)
    ratios = [dense / own for dense, own in zip(seconds["dense"], mine, strict=True)]
    return Row(
        name,
        statistics.median(mine),
        min(mine),
        max(mine),
        None if name.startswith(" ") else statistics.median(ratios),
        program.memory_analysis().temp_size_in_bytes / MIB,
        resident,
        None if flop is None else flop / statistics.median(mine) / 1e12,
    )


def _print_table(rows: list[Row]) -> None:
    """The rows; columns that would be empty throughout are left out."""
    heads = ["seconds", "fastest", "slowest", "speedup", "TFLOP/s", "of dense", "temp", "rss"]
    print(" " * 32 + "".join(f"{head:>9}" for head in heads))
    for row in rows:
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        rate = "" if row.tflops is None else f"{row.tflops:.3g}"
        share = "" if row.tflops is None else f"{100 * row.tflops / rows[0].tflops:.0f} %"
        resident = "" if row.resident_mib is None else f"{row.resident_mib:.1f}"
        print(
            f"{row.name:32}{row.seconds:9.3g}{row.fastest:9.3g}{row.slowest:9.3g}"
            f"{speedup:>9}{rate:>9}{share:>9}{row.temporary_mib:9.1f}{resident:>9}"
        )


LEGEND = """\
speedup: median over rounds of dense over the row, each round running all in turn;
TFLOP/s: on kept blocks; of dense: its share of dense attention's rate;
temp: MiB the compiled program allocates; rss: MiB one call adds to a fresh process."""


def _measure(setting: Setting, repeats: int, resident: bool) -> list[Row]:
    """Compiles and times all methods of one setting."""
    operands = jax.block_until_ready(_operands(setting))
    methods, parts = _methods(setting), _parts(setting)
    programs = {
        name: jax.jit(function).lower(*operands).compile()
        for name, function in tqdm((methods | parts).items(), desc="compiling", file=sys.stderr)
    }
    memory = {name: _resident(setting, name) if resident else None for name in methods}
    seconds = rounds(programs, operands, repeats)
    return [_row(setting, name, programs[name], seconds, memory.get(name)) for name in programs]


def break_even(densities: list[float], seconds: list[float], dense: float) -> float | None:
    """The density at which a line through the measured ones takes as long as dense attention.

    Args:
        densities: measured ones; fewer than two draw no line.
        seconds: of each.
        dense: seconds of dense attention.

    Returns:
        The density; 0 where sparse attention is slower at every density, 1 where it is faster at
        every one. None where there is no line, or one that does not rise.
    """
    if len(set(densities)) < 2:
        return None
    slope, start = np.polyfit(densities, seconds, 1)
    return float(np.clip((dense - start) / slope, 0, 1)) if slope > 0 else None


def _break_evens(runs: list[tuple[Setting, list[Row]]]) -> list[dict[str, Any]]:
    """By number of tokens, for every sparse method at the setting's own density."""
    found = []
    for tokens in sorted({setting.tokens for setting, _ in runs}):
        some = [(setting.density, rows) for setting, rows in runs if setting.tokens == tokens]
        for name in ("pasa", "pisa", "sparse kernel alone"):
            times = [next(row.seconds for row in rows if row.name == name) for _, rows in some]
            dense = statistics.median(rows[0].seconds for _, rows in some)
            density = break_even([density for density, _ in some], times, dense)
            if density is not None:
                found.append({"tokens": tokens, "method": name, "density": density})
    return found


def _break_even_told(density: float) -> str:
    if density in (0, 1):
        return f"{'faster' if density else 'slower'} than dense at every density"
    return f"as slow as dense at {density:.2f}"


def _write(target: Path, result: dict[str, Any]) -> None:
    """The result, and its plot beside it."""
    with atomic(target) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    with atomic(target.with_suffix(".png")) as temporary:
        _plot(temporary, result)


def _plot(target: Path, result: dict[str, Any]) -> None:
    """Speed-up against density, a line for every method and number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in result["runs"]:
        for row in run["rows"][1:]:
            if row["speedup"] is not None:
                label = f"{row['name']}, {run['setting']['tokens']:,} tokens"
                lines.setdefault(label, []).append((run["setting"]["density"], row["speedup"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="density", ylabel="times faster than dense", title=result["device"])
    axes.legend()
    figure.savefig(target)


def bench_attention(
    *,
    shape: str | None = None,
    tokens: tuple[int, ...] = (16384,),
    heads: int = 4,
    head_dim: int = 64,
    density: tuple[float, ...] = (0.15,),
    block_q: int = 64,
    block_kv: int = 64,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    repeats: int = 7,
    resident: bool = True,
    output: str | None = None,
) -> dict[str, Any]:
    """Times PASA and PISA, statistics and routing included, against dense attention.

    Args:
        shape: a model's, as wan14b-720p, in place of tokens, heads and head_dim.
        tokens: query and key tokens; several are timed one after another.
        heads: attention heads.
        head_dim: channels of a head.
        density: exact share of the key blocks, in (0, 1]; several tell where dense is as fast.
        block_q: tokens of a query block.
        block_kv: tokens of a key block.
        dtype: of q, k and v.
        repeats: timed rounds; each runs every method once, after one round that is not counted.
        resident: also measure resident memory, each method in a process of its own (CPU, Linux).
        output: write the result to this JSON file, and a plot beside it as .png.

    Returns:
        The result as written: device, driver, versions, commit, runs (setting, the sparse kernel
        with its options, and rows, see `Row`) and break-even densities.

    Raises:
        ValueError: unknown shape, no tokens or density, a size below 1, density outside (0, 1], or
            an output whose name does not end in .json.
    """
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"{shape=} must be one of {', '.join(SHAPES)}")
    if shape is not None:
        grid, heads, head_dim = SHAPES[shape]
        tokens = (grid.length,)
    if not tokens or not density:
        raise ValueError(f"{tokens=} and {density=} must hold at least one number each")
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1")
    target = None if output is None else check_target(Path(output), (".json",))
    settings = [
        Setting(t, heads, head_dim, rho, block_q, block_kv, dtype)
        for t in tokens
        for rho in density
    ]
    result = {**machine(), "repeats": repeats, "runs": []}
    print(f"{result['device']}, jax {jax.__version__}, {repeats} rounds")
    runs = []
    for setting in settings:
        rows = _measure(setting, repeats, resident)
        runs.append((setting, rows))
        print(", ".join(f"{key}={value}" for key, value in dataclasses.asdict(setting).items()))
        _print_table(rows)
        run = {"setting": dataclasses.asdict(setting), "kernel": sparse_kernel(setting)}
        run["rows"] = [*map(dataclasses.asdict, rows)]
        result["runs"].append(run)
        result["break_even"] = _break_evens(runs)
        if target is not None:  # after every setting: an interruption loses none that is done
            _write(target, result)
    print(LEGEND)
    for at in result["break_even"]:
        print(f"{at['method']} at {at['tokens']} tokens: {_break_even_told(at['density'])}")
    return result


if __name__ == "__main__":
    _fields, _name = json.loads(sys.argv[1])
    print(_measure_resident(Setting(**_fields), _name))
