"""`pasa-jax tune`: a kernel's options timed in turns, and the best written where it finds them."""

import dataclasses
import functools
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from pasa_jax.bench import SHAPES, rounds
from pasa_jax.info import Setting, kernels, machine, running
from pasa_jax.pallas_kernels import BlockIndex, api, num_blocks, tuning
from pasa_jax.video import atomic, check_target

OPERATION = "block_sparse_attention"
GROUP = 32  # key blocks of one first-order matrix, PASA's
# Relative distance of two right results: options change the order of float32 sums, and with it
# one rounding of the output.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}


def candidates(tunable: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """The kernel's own defaults, {}, and every combination of the options' values."""
    values = itertools.product(*tunable.values())
    return [{}, *(dict(zip(tunable, some, strict=True)) for some in values)]


def winner(measured: list[dict[str, Any]]) -> dict[str, int]:
    """The options of the candidate that is faster than the default by most, and by enough.

    Args:
        measured: the default first; each with "options" and, unless "refused", "gain" (how many
            times as fast as the default, median of the rounds) and "gain_spread" (between its
            quartiles).

    Returns:
        Its options; {}, the default, where no gain is larger than its own spread.
    """
    ran = [one for one in measured[1:] if "refused" not in one]
    better = [one for one in ran if one["gain"] - 1 > one["gain_spread"]]
    return max(better, key=lambda one: one["gain"], default=measured[0])["options"]


def _label(options: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items()) or "default"


def _operands(setting: Setting) -> tuple[Any, ...]:
    """Random normal q, k, v, random lists, and the grouped statistics."""
    s = setting
    *keys, last = jax.random.split(jax.random.key(0), 4)
    shape = (1, s.tokens, s.heads, s.head_dim)
    q, k, v = (jax.random.normal(key, shape).astype(s.dtype) for key in keys)
    rows, columns = num_blocks(s.tokens, s.block_q), num_blocks(s.tokens, s.block_kv)
    ids = jax.lax.top_k(jax.random.uniform(last, (1, s.heads, rows, columns)), s.slots)[1]
    count = jnp.full(ids.shape[:3], s.slots, jnp.int32)
    tail = api.block_statistics(k, v, block_kv=s.block_kv, group=GROUP)
    return q, k, v, BlockIndex(ids, count), tail


def _program(implementation: str, setting: Setting, options: dict[str, int]) -> Callable[..., Any]:
    """The kernel with these options, compiled when it first runs."""
    module = importlib.import_module(f"pasa_jax.pallas_kernels.{implementation}")
    run = functools.partial(
        getattr(module, OPERATION),
        block_q=setting.block_q,
        block_kv=setting.block_kv,
        options=options,
    )
    return jax.jit(lambda q, k, v, blocks, tail: run(q, k, v, blocks, tail=tail))


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Norm of a − b over the norm of b."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _refusal(program: Callable[..., Any], operands: Any, want: Any) -> str | None:
    """Runs a program once: None where it agrees with `want`, else what is wrong with it."""
    try:
        distance = float(_distance(program(*operands), want))
    except Exception as reason:  # compilers refuse in many ways; the reason is written down
        return (str(reason) or repr(reason)).strip().split("\n")[0]
    if not distance <= TOLERANCE[want.dtype.name]:
        return f"its result differs from the default's by {distance:.2g}"
    return None


def _measure(implementation: str, setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Every candidate's options with its times, or why it was refused; the default first.

    Raises:
        NotImplementedError: the kernel does not take the setting.
    """
    operands = jax.jit(functools.partial(_operands, setting))()
    everything = candidates(dict(tuning.tunable(implementation)))
    programs = {_label(one): _program(implementation, setting, one) for one in everything}
    want = programs["default"](*operands)
    bar = tqdm(programs.items(), desc="compiling", unit="program", file=sys.stderr)
    refusals = {label: _refusal(program, operands, want) for label, program in bar}
    refusals["default"] = None  # even where its own result is NaN
    good = {label: program for label, program in programs.items() if refusals[label] is None}
    seconds = rounds(good, list(operands), repeats)
    measured = []
    for options in everything:
        label = _label(options)
        told = {"refused": refusals[label]}
        if label in good:
            told = _times(seconds[label], seconds["default"])
        measured.append({"options": options, **told})
    return measured


def _times(seconds: list[float], default: list[float]) -> dict[str, float]:
    """Of one candidate; its gain compares within each round, where all had the same load."""
    gains = [own / mine for own, mine in zip(default, seconds, strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "spread": _between_quartiles(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "gain": statistics.median(gains),
        "gain_spread": _between_quartiles(gains),
    }


def _between_quartiles(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _print_case(measured: list[dict[str, Any]], options: dict[str, int]) -> None:
    """The candidates, fastest first, then the refused ones."""
    ran = [one for one in measured if "refused" not in one]
    for one in sorted(ran, key=lambda one: -one["gain"]):
        ends = f"({one['fastest']:.4g} to {one['slowest']:.4g})"
        gain = f"{one['gain']:.3f}x ± {one['gain_spread'] / 2:.3f}"
        print(f"  {_label(one['options']):40} {gain}, {one['seconds']:.4g} s {ends}")
    for one in measured:
        if "refused" in one:
            print(f"  {_label(one['options']):40} refused: {one['refused']}")
    print(f"  best: {_label(options) if options else 'default, no gain is above its spread'}")


def _is_stale(content: dict[str, Any], implementation: str) -> bool:
    """Whether a file's case holds options that the kernel no longer knows."""
    if content["implementation"] != implementation:
        return False
    try:
        tuning.check_options(implementation, content["options"])
    except ValueError:
        return True
    return False


def _store(target: Path, file: dict[str, Any], case: tuning.Case, entry: dict[str, Any]) -> None:
    """Puts a measured case in the place of an earlier one, and writes the file at once."""
    kept = [
        one
        for one in file["cases"]
        if tuning.case_of(one) != case and not _is_stale(one, case.implementation)
    ]
    file["cases"] = [*kept, entry]
    with atomic(target) as temporary:
        temporary.write_text(json.dumps(file, indent=1) + "\n")
    tuning.clear()


def _implementation(asked: str | None, setting: Setting) -> str:
    """The kernel to tune; NotImplementedError with every reason where none takes the setting."""
    if asked is not None:
        return asked
    reasons = kernels(setting)[OPERATION]
    name = running(reasons)
    if name is None:
        raise NotImplementedError("; ".join(f"{key}: {why}" for key, why in reasons.items()))
    return name


def _target(output: str | None, kind: str) -> Path:
    """The file to write, checked."""
    if output is not None:
        return check_target(Path(output), (".json",))
    path = tuning.user_file(kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{str(path.parent)!r} must be a folder to write: {error.strerror}; or give --output"
        ) from error
    return check_target(path, (".json",))


def _read(target: Path, kind: str) -> dict[str, Any]:
    """What an earlier run left."""
    try:
        return tuning.read(target, kind)
    except FileNotFoundError:
        return {"format": tuning.FORMAT, "kind": kind, "cases": []}


def tune(
    *,
    shape: str | None = None,
    tokens: int = 32760,
    heads: int = 12,
    head_dim: tuple[int, ...] = (128,),
    block_q: tuple[int, ...] = (64, 128, 256),
    block_kv: tuple[int, ...] = (64, 128),
    density: tuple[float, ...] = (0.1, 0.15, 0.3),
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    implementation: str | None = None,
    repeats: int = 9,
    output: str | None = None,
) -> dict[str, Any]:
    """Times a kernel's options on this device and keeps the best of every case.

    What is timed is block_sparse_attention with a grouped tail on random normal q, k, v and random
    lists. The file is written after each case; a later run goes on where a broken one ended, and
    measures a case again when tokens, heads, repeats, versions or commit have changed.

    Args:
        shape: a model's, as wan14b-720p, in place of tokens, heads and head_dim.
        tokens: query and key tokens; the defaults are Wan 2.1 1.3B's at 832x480, 81 frames.
        heads: attention heads.
        head_dim: channels of a head, one or more.
        block_q: tokens of a query block, one or more; sizes that the kernel refuses are skipped.
        block_kv: tokens of a key block, one or more.
        density: exact share of the key blocks, in (0, 1], one or more.
        dtype: of q, k and v.
        implementation: the kernel; otherwise the one that runs here.
        repeats: timed rounds; each runs every candidate once.
        output: JSON file; otherwise the user's for this device, which the kernels read.

    Returns:
        The file's content: format, kind (of device), and cases: what was timed and on what, every
        candidate's times in seconds and gain over the default, each a median with the distance of
        its quartiles, or the reason of its refusal, and the options chosen, {} where no gain is
        larger than its spread.

    Raises:
        ValueError: unknown shape or implementation, a size out of range, or a file that cannot be
            written or holds something else.
    """
    known = tuple(api.IMPLEMENTATIONS[OPERATION])
    if implementation is not None and implementation not in known:
        raise ValueError(f"{implementation=} must be one of {', '.join(known)}")
    if implementation is not None and not tuning.tunable(implementation):
        raise ValueError(f"{implementation=} has nothing to tune")
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"{shape=} must be one of {', '.join(SHAPES)}")
    if repeats < 3:
        raise ValueError(f"{repeats=} must be at least 3: fewer have no spread")
    if shape is not None:
        grid, heads, width = SHAPES[shape]
        tokens, head_dim = grid.length, (width,)
    settings = [
        Setting(tokens, heads, h, float(rho), bq, bkv, dtype)
        for h, bq, bkv, rho in itertools.product(head_dim, block_q, block_kv, density)
    ]
    if not settings:
        raise ValueError("head_dim, block_q, block_kv and density must hold at least one each")
    kind = tuning.device_kind()
    target = _target(output, kind)
    file, here = _read(target, kind), machine()
    print(f"{here['device']}, jax {jax.__version__}, {repeats} rounds, into {target}")
    for number, setting in enumerate(settings, 1):
        asked = dataclasses.asdict(setting)
        print(f"{number}/{len(settings)}: " + " ".join(f"{k}={v}" for k, v in asked.items()))
        try:
            _tune_one(setting, implementation, repeats, here, target, file)
        except NotImplementedError as reason:
            print(f"  skipped: {reason}")
    return file


def _tune_one(
    setting: Setting,
    implementation: str | None,
    repeats: int,
    here: dict[str, Any],
    target: Path,
    file: dict[str, Any],
) -> None:
    """Measures and stores one case, unless the file has it already."""
    name = _implementation(implementation, setting)
    if not tuning.tunable(name):
        raise NotImplementedError(f"{name} has nothing to tune")
    about = {"implementation": name, **dataclasses.asdict(setting), "repeats": repeats}
    about["machine"] = here
    if any(about.items() <= one.items() for one in file["cases"]):
        print("  measured already")
        return
    measured = _measure(name, setting, repeats)
    options = winner(measured)
    _print_case(measured, options)
    _store(target, file, setting.case(name), {**about, "options": options, "candidates": measured})
