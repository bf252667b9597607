"""Methods side by side: the same prompts and seeds under dense attention and any list of policies.

Every batch of clips runs dense first, then under every policy; metrics are against dense's clips.
"""

import collections
import csv
import dataclasses
import io
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pasa_jax import metrics
from pasa_jax.caches import SKIP, StepCache
from pasa_jax.calibration import VelocityCurve
from pasa_jax.info import machine
from pasa_jax.layer import Layer, attend_layer, plan_layer
from pasa_jax.pipeline import Pipeline, Result, seed_keys, start_noise
from pasa_jax.policies import Dense, Policy
from pasa_jax.recall import look
from pasa_jax.recording import record_step
from pasa_jax.settings import Settings
from pasa_jax.video import atomic

DENSE = "dense"
NOT_SPARSE = ("dense", "search", SKIP)  # modes that run no sparse attention
PLAIN = (ValueError, NotImplementedError, RuntimeError)  # failures that need no name before them
# Metrics of a clip, in the order of tables; those that are None throughout are left out.
METRICS = (
    "psnr",
    "ssim",
    "smoothness",
    "smoothness_gap",
    "flicker",
    "flicker_gap",
    "lpips",
    "latent_error",
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """What one clip measured; None where a metric does not apply.

    Attributes:
        prompt, seed: of the clip.
        psnr, ssim, lpips: against dense attention's clip; psnr is None where the two are equal.
        smoothness: `metrics.smoothness`; `smoothness_gap` its distance from dense's own.
        flicker: `metrics.flicker` over the pixels that stay near the background's colour in this
            clip and in dense's; `flicker_gap` its distance from dense's own over the same pixels.
        latent_error: relative error of the final latents against dense's.
    """

    prompt: str
    seed: int
    psnr: float | None = None
    ssim: float | None = None
    smoothness: float | None = None
    smoothness_gap: float | None = None
    flicker: float | None = None
    flicker_gap: float | None = None
    lpips: float | None = None
    latent_error: float | None = None


@dataclasses.dataclass
class Entry:
    """What a method did over all batches; `failure` says why it stopped, if it did."""

    policy: Policy
    modes: tuple[str, ...]
    cache: StepCache | None = None
    clips: list[Clip] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    errors: list[np.ndarray] = dataclasses.field(default_factory=list)  # [steps, P] a batch
    densities: list[np.ndarray] = dataclasses.field(default_factory=list)  # [steps, layers] a clip
    seconds: list[np.ndarray] = dataclasses.field(default_factory=list)  # [steps] a full batch
    readings: list[Any] = dataclasses.field(default_factory=list)
    cost: dict[str, float] | None = None
    failure: str | None = None


class Compared(NamedTuple):
    """What a comparison found.

    Attributes:
        comparison: as JSON holds it: machine, settings, "clips" asked for and done, and for each
            method parameters, every step's mode, clips, means with standard deviations, real
            density by step and layer (0 where the cache skipped the step; "sparse" is the mean over
            those that ran sparse), error by step, seconds, speed-up, attention's share of the steps
            that are not dense and planning's share of that attention, searches among it, and what
            tiny's check reads. Where no run was free of compilation, speed-up, seconds of a step
            and attention's share are None. A method that fails, or ends in latents that are not
            finite, is reported with its reason and without figures. "blocks" tells what the
            methods' blocks hold in two heads of one layer (`recall.Look`); None where nothing could
            be recorded.
        frames: the shown clips by method.
        pictures: of the blocks by head, then by method.
    """

    comparison: dict[str, Any]
    frames: dict[str, list[np.ndarray]]
    pictures: dict[int, dict[str, np.ndarray]]


def compare(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    policies: dict[str, Policy],
    *,
    cache: StepCache | None = None,
    batch: int = 1,
    shown: int = 3,
    states: np.ndarray | None = None,
    negative_prompt: str = "",
    negative_states: np.ndarray | None = None,
    curve: VelocityCurve | None = None,
    progress: bool = True,
    folder: Path | None = None,
    **settings: Any,
) -> Compared:
    """Samples every prompt with every seed under dense attention and under every policy.

    Args:
        pipeline: its model is sampled.
        prompts, seeds: all pairs of the two are clips.
        policies: by label. "dense" is the reference, `Dense()`, whether named here or not.
        cache: of every policy, dense included, labelled "pasa + every-2"; the reference "dense"
            has none, so speed-ups count what the cache saves. None for none at all.
        batch: clips sampled together.
        shown: clips whose frames are returned.
        states: text states [P, E, D], one a prompt, for models without a text encoder.
        negative_prompt, negative_states: what guidance leads away from.
        curve: velocity curve; given to the policies that read one.
        progress: show a bar for each run.
        folder: an existing one, where `write_tables` writes after every batch of clips, so that an
            interrupted run keeps those before; None writes nothing.
        settings: fields of `Settings`; those not given are the card's.

    Raises:
        ValueError: no clip, no policy, a "dense" that is not dense, settings that the model
            refuses, or latents of dense attention that are not finite.
    """
    if batch < 1 or shown < 0:
        raise ValueError(f"{batch=} must be at least 1 and {shown=} at least 0")
    if not prompts or not seeds or not policies:
        raise ValueError(f"{prompts=}, {seeds=} and {policies=} must each hold at least one")
    chosen = pipeline.card.settings(**settings)
    entries = _entries(pipeline, chosen, policies, cache)
    pairs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    still = _still_pixels(prompts) if pipeline.card.scenes else None
    asked = dict(
        negative_prompt=negative_prompt,
        negative_states=negative_states,
        progress=progress,
        **dataclasses.asdict(chosen),
    )
    jobs = [
        {**_clips(pairs[start : start + batch], prompts, states), **asked}
        for start in range(0, len(pairs), batch)
    ]
    done = 0
    for job in jobs:
        path = _run_batch(pipeline, job, entries, curve, still, shown)
        if done == 0:
            _measure_costs(pipeline, entries, chosen, curve, len(job["seeds"]))
            spot = _spot(pipeline, entries, chosen, path, seeds[0])
        done += len(job["seeds"])
        clips = {"asked": len(pairs), "done": done}
        _write(folder, {**_comparison(pipeline, chosen, prompts, entries), "clips": clips})
    _time_again(pipeline, jobs[0], entries, curve)
    comparison = {**_comparison(pipeline, chosen, prompts, entries), "clips": clips}
    clip = (prompts[0], seeds[0], None if states is None else states[:1])
    comparison["blocks"], pictures = _look(pipeline, entries, chosen, curve, clip, spot)
    _write(folder, comparison)
    frames = {name: entry.frames for name, entry in entries.items() if entry.frames}
    return Compared(comparison, frames, pictures)


def _write(folder: Path | None, comparison: dict[str, Any]) -> None:
    if folder is not None:
        write_tables(folder, comparison)


def _clips(pairs: list[tuple[int, int]], prompts, states) -> dict[str, Any]:
    """Prompts, seeds and states of a batch, for `Pipeline.generate`."""
    rows = [i for i, _ in pairs]
    return dict(
        prompts=[prompts[i] for i in rows],
        seeds=[seed for _, seed in pairs],
        states=None if states is None else states[rows],
    )


def _entries(
    pipeline: Pipeline, settings: Settings, policies: dict[str, Policy], cache: StepCache | None
) -> dict[str, Entry]:
    """The reference and every method, with its cache in the name."""

    def entry(policy, cache):
        return Entry(policy, pipeline.modes(policy, settings, cache), cache)

    named = policies.get(DENSE, Dense())
    if set(named.modes(settings.steps)) != {"dense"}:
        raise ValueError(f"policies['dense']={named} must be dense at all steps: it is compared to")
    policies = {DENSE: Dense()} | {name: p for name, p in policies.items() if name != DENSE}
    if cache is None:
        return {name: entry(policy, None) for name, policy in policies.items()}
    cached = {f"{name} + {cache}": entry(policy, cache) for name, policy in policies.items()}
    return {DENSE: entry(policies[DENSE], None), **cached}


def _run_batch(pipeline, job, entries, curve, still, shown) -> list[np.ndarray]:
    """One batch of clips under every method that has not failed; dense first.

    Returns dense's latents behind every step.
    """
    exact, path = None, []
    for name, entry in entries.items():
        if entry.failure is not None:
            continue
        seen = path if name == DENSE else []
        try:
            result = _sample(pipeline, job, entry, curve, seen)
        except Exception as error:
            if name == DENSE:
                raise
            _fail(name, entry, error)
            continue
        exact = result if exact is None else exact
        _note(entry, result, exact, [seen, path], still, shown)
    return path


def _sample(pipeline: Pipeline, job, entry: Entry, curve, path: list[np.ndarray]) -> Result:
    """A batch under one method; adds its latents behind every step to the path."""
    result = pipeline.generate(
        policy=entry.policy,
        cache=entry.cache,
        curve=curve if entry.policy.reads_curve else None,
        observe=lambda i, latents: path.append(np.asarray(latents)),
        **job,
    )
    wrong = sum(not np.isfinite(clip).all() for clip in result.latents)
    if wrong:
        raise ValueError(f"latents must be finite; {wrong} of {len(result.latents)} clips' are not")
    return result


def _time_again(pipeline: Pipeline, job, entries: dict[str, Entry], curve) -> None:
    """Runs a batch once more under the methods none of whose runs is free of compilation."""
    for name, entry in entries.items():
        if entry.failure is None and not step_seconds(entry.modes, entry.seconds)[1]:
            try:
                entry.seconds.append(_sample(pipeline, job, entry, curve, []).seconds)
            except Exception as error:
                logger = logging.getLogger("pasa_jax")
                logger.warning("%s could not be timed again: %s", name, _reason(error))


def _fail(name: str, entry: Entry, error: Exception) -> None:
    entry.failure = _reason(error)
    logging.getLogger("pasa_jax").warning("%s failed: %s", name, entry.failure)


def _reason(error: Exception) -> str:
    """The first line of what it says, behind its name where the words alone would say little."""
    name, told = type(error).__name__, (str(error).splitlines() or [""])[0]
    return (told if isinstance(error, PLAIN) and told else f"{name}: {told}").removesuffix(": ")


def _note(entry: Entry, result: Result, exact: Result, paths, still, shown: int) -> None:
    """Adds a batch's clips to the method's entry."""
    errors = [metrics.relative_error(own, dense) for own, dense in zip(*paths, strict=True)]
    entry.errors.append(np.stack(errors))
    entry.densities += [result.densities] * len(result.prompts)
    if len(result.prompts) == entry.errors[0].shape[1]:  # a smaller last batch compiles anew
        entry.seconds.append(result.seconds)
    for i, (prompt, seed) in enumerate(zip(result.prompts, result.seeds, strict=True)):
        clip = Clip(prompt, seed, latent_error=float(errors[-1][i]))
        if result.frames is not None:
            clip = _measured(clip, result.frames[i], exact.frames[i], still, result is exact)
            if len(entry.frames) < shown:
                entry.frames.append(result.frames[i])
            if still is not None:
                from pasa_jax.models.tiny import check

                entry.readings.append(check.read(result.frames[i] / np.float32(255)))
        entry.clips.append(clip)


def _measured(clip: Clip, video, dense, still, is_dense: bool) -> Clip:
    """The clip with the metrics of its frames."""
    smooth = metrics.smoothness(video)
    pixels = still(clip.prompt, video, dense) if still else np.zeros(video.shape[1:3], bool)
    flicker = metrics.flicker(video, pixels)
    own = dataclasses.replace(clip, smoothness=smooth, flicker=flicker)
    if is_dense:
        return dataclasses.replace(own, latent_error=None)
    decibel = metrics.psnr(video, dense)
    return dataclasses.replace(
        own,
        psnr=decibel if math.isfinite(decibel) else None,
        ssim=metrics.ssim(video, dense),
        smoothness_gap=abs(smooth - metrics.smoothness(dense)),
        flicker_gap=None if flicker is None else abs(flicker - metrics.flicker(dense, pixels)),
        lpips=metrics.lpips(video, dense) if metrics.has_lpips() else None,
    )


def _still_pixels(prompts: Sequence[str]) -> Callable[..., Bool[np.ndarray, "Y X"]] | None:
    """Which pixels show the background throughout all of a prompt's given clips.

    None outside tiny's grammar.
    """
    from pasa_jax.models.tiny import scenes

    try:
        wanted = {prompt: scenes.parse(prompt) for prompt in prompts}
    except ValueError:
        return None

    def still(prompt, *videos):
        scene = wanted[prompt]
        if scene.drifting:  # the texture fills the frame and moves
            return np.zeros(videos[0].shape[1:3], bool)
        ground = np.asarray(scenes.COLOURS[scene.colours[1]], np.float32)
        # As `check.read` tells colours apart: 0.45 is half the distance between the nearest two.
        clips = np.concatenate(videos) / np.float32(255)
        return (((clips - ground) ** 2).sum(-1) < 0.45**2).all(0)

    return still


def _measure_costs(pipeline: Pipeline, entries, settings, curve, clips: int) -> None:
    """`_attention_cost` of every method that has not failed."""
    for name, entry in entries.items():
        if entry.failure is None:
            try:
                dense = entries[DENSE].cost
                entry.cost = _attention_cost(pipeline, entry, settings, curve, clips, dense)
            except Exception as error:
                if name == DENSE:
                    raise
                _fail(name, entry, error)


class _Spot(NamedTuple):
    """A layer and step, and dense's first clip before it, [1, F, Y, X, C]."""

    layer: int
    step: int
    latents: np.ndarray


def _spot(
    pipeline: Pipeline, entries: dict[str, Entry], settings: Settings, path, seed: int
) -> _Spot | None:
    """The middle one of the steps that most methods run sparse, and the middle layer.

    That is the nearest to it of those that fewest methods keep dense. None without a sparse method.
    """
    live = _sparse(entries)
    planned = collections.Counter(
        i for e in live.values() for i, mode in enumerate(e.modes) if mode not in NOT_SPARSE
    )
    if not planned:
        return None
    steps = sorted(i for i, count in planned.items() if count == max(planned.values()))
    step, layers = steps[len(steps) // 2], pipeline.card.config.num_layers
    kept = collections.Counter(i for e in live.values() for i in e.policy.dense_layers)
    layer = min(range(layers), key=lambda i: (kept[i], abs(i - layers // 2)))
    if step > 0:
        return _Spot(layer, step, path[step - 1][:1])
    noise = start_noise(seed_keys([seed])[0], pipeline.card.latent_shape(settings))
    return _Spot(layer, step, np.asarray(noise))


def _sparse(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Methods that have not failed and run sparse steps."""
    return {
        name: entry
        for name, entry in entries.items()
        if entry.failure is None and not set(entry.modes) <= set(NOT_SPARSE)
    }


def _look(
    pipeline: Pipeline, entries: dict[str, Entry], settings: Settings, curve, clip, spot
) -> tuple[dict[str, Any] | None, dict[int, dict[str, np.ndarray]]]:
    """Figures and pictures of the methods' blocks there."""
    live, (prompt, seed, states) = _sparse(entries), clip
    if spot is None or not live:
        return None, {}
    where = dict(layer=spot.layer, step=spot.step)
    try:
        text = pipeline.encode([prompt], "", 1.0, states)
        recording = record_step(pipeline, spot.latents, text, settings, **where)
        found = look(
            recording,
            {name: entry.policy for name, entry in live.items()},
            block=min(entry.policy.block_kv for entry in live.values()),
            steps=settings.steps,
            seed=seed,
            curve=None if curve is None else curve.mean,
            **where,
        )
    except Exception as error:
        logging.getLogger("pasa_jax").warning("no pictures of blocks: %s", _reason(error))
        return None, {}
    about = dict(prompt=prompt, seed=seed, num_blocks=found.num_blocks, **where)
    return {**about, "heads": found.heads}, found.pictures


def _attention_cost(
    pipeline: Pipeline,
    entry: Entry,
    settings: Settings,
    curve: VelocityCurve | None,
    clips: int,
    dense: dict[str, float] | None,
) -> dict[str, float]:
    """Seconds of one layer's attention, and of its planning, mean over `_own_steps`.

    For a batch of clips, on random normal q, k, v of the model's shape, in the first layer that the
    method runs sparse. A search's planning is what it takes beyond dense attention.
    """
    modes = collections.Counter(entry.modes[i] for i in _own_steps(entry.modes))
    config, grid = pipeline.card.config, pipeline.card.grid(settings)
    rows = clips * (1 if settings.guidance == 1 else 2)
    mean = None if curve is None else curve.mean
    layer = Layer.of(entry.policy, grid, layers=config.num_layers, steps=settings.steps, curve=mean)
    draws = jax.random.split(jax.random.key(1), 3)
    sizes = (rows, grid.num_tokens, config.num_heads, config.head_dim)
    qkv = [jax.random.normal(key, sizes, jnp.float32) for key in draws]
    operands = layer.state(*qkv), *qkv
    calls = {("attention", mode): (attend_layer, mode) for mode in modes}
    calls |= {("planning", mode): (plan_layer, mode) for mode in modes if mode not in NOT_SPARSE}
    taken = _seconds({key: (f, layer, mode, *operands) for key, (f, mode) in calls.items()})
    if "search" in modes:
        beyond = taken["attention", "search"] - dense["attention"]
        taken["planning", "search"] = max(0.0, beyond)
    kinds = ("attention",) if set(modes) == {"dense"} else ("attention", "planning")
    return {
        kind: sum(taken[kind, mode] * n for mode, n in modes.items()) / modes.total()
        for kind in kinds
    }


def _own_steps(modes: Sequence[str]) -> list[int]:
    """Steps that are neither dense nor skipped; the computed ones where there is none."""
    own = [i for i, mode in enumerate(modes) if mode not in ("dense", SKIP)]
    return own or [i for i, mode in enumerate(modes) if mode != SKIP]


def _sparse_densities(entry: Entry) -> np.ndarray:
    """Densities of the sparse steps [steps, layers], layers that run dense left out."""
    sparse = [mode not in NOT_SPARSE for mode in entry.modes]
    density = np.mean(entry.densities, axis=0)[sparse]
    layers = [i for i in range(density.shape[1]) if i not in entry.policy.dense_layers]
    return density[:, layers] if density.size and layers else np.ones((1, 1))


def _seconds(calls: dict[Any, tuple[Any, ...]]) -> dict[Any, float]:
    """Median seconds of calls, each a function and its operands, over five interleaved rounds."""
    taken = {key: [] for key in calls}
    for _ in range(6):
        for key, (function, *operands) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            taken[key].append(time.perf_counter() - start)
    return {key: statistics.median(rounds[1:]) for key, rounds in taken.items()}  # first compiles


def step_seconds(modes: Sequence[str], runs: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Seconds of every step without compilation, the median over runs.

    The first step of each mode in the first run is taken to include compilation: it is left out,
    and where no other run has that step, the mode's median over the rest stands for it.

    Args:
        modes: of the steps.
        runs: seconds of the steps, a run each.

    Returns:
        Seconds [steps], and whether all are free of compilation: a mode of one step in one run
        cannot be.
    """
    table = np.stack(runs).astype(np.float64)
    compiled = [modes.index(mode) for mode in dict.fromkeys(modes)]
    known = table.copy()
    known[0, compiled] = np.nan
    clean = True
    for i in compiled:
        if not np.isnan(known[:, i]).all():
            continue
        alike = known[:, [j for j, mode in enumerate(modes) if mode == modes[i]]]
        clean = clean and not np.isnan(alike).all()
        known[0, i] = table[0, i] if np.isnan(alike).all() else np.nanmedian(alike)
    return np.nanmedian(known, axis=0), clean


def _comparison(pipeline, settings, prompts, entries) -> dict[str, Any]:
    """Everything measured, as JSON holds it."""
    exact, layers = entries[DENSE], pipeline.card.config.num_layers
    dense, clean = step_seconds(exact.modes, exact.seconds)
    dense = float(dense.sum()) if clean else None
    grid = pipeline.card.grid(settings)
    return {
        **machine(),
        "model": pipeline.card.name,
        "grid": dataclasses.asdict(grid),
        "settings": dataclasses.asdict(settings),
        "prompts": list(prompts),
        "methods": {
            name: {
                "policy": type(entry.policy).__name__,
                "parameters": _parameters(entry.policy),
                "cache": _cache(entry),
                "modes": list(entry.modes),
                **(
                    {"failure": entry.failure}
                    if entry.failure is not None
                    else {
                        **_figures(entry, prompts, dense),
                        "attention_share": _attention_share(entry, exact, layers),
                        "planning_share": _planning_share(entry.cost),
                    }
                ),
            }
            for name, entry in entries.items()
        },
    }


def _parameters(policy: Policy) -> dict[str, Any]:
    """The policy's fields; of searched masks what they were searched for."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    masks = fields.get("masks")
    return fields if masks is None else {**fields, "masks": dataclasses.asdict(masks.key)}


def _cache(entry: Entry) -> dict[str, Any] | None:
    """The method's cache and how many steps it leaves."""
    if entry.cache is None:
        return None
    computed = sum(mode != SKIP for mode in entry.modes)
    return {"name": str(entry.cache), "computed": computed, **dataclasses.asdict(entry.cache)}


def _attention_share(entry: Entry, exact: Entry, layers: int) -> float | None:
    """Share of the seconds of `_own_steps` that self-attention takes; None with compilation.

    Attention is timed apart, so that the share may pass 1.
    """
    dense_layers = sum(layer < layers for layer in entry.policy.dense_layers)
    attention = (layers - dense_layers) * entry.cost["attention"]
    attention += dense_layers * exact.cost["attention"]
    seconds, clean = step_seconds(entry.modes, entry.seconds)
    return float(attention / seconds[_own_steps(entry.modes)].mean()) if clean else None


def _planning_share(cost: dict[str, float]) -> float | None:
    """Share of that attention's seconds that scores, selection and searches take."""
    return cost["planning"] / cost["attention"] if "planning" in cost else None


def _sparse_step(entry: Entry) -> float:
    """Seconds of a sparse step; of any computed one where all are dense."""
    seconds, _ = step_seconds(entry.modes, entry.seconds)
    sparse = [i for i, mode in enumerate(entry.modes) if mode not in NOT_SPARSE]
    computed = [i for i, mode in enumerate(entry.modes) if mode != SKIP]
    return float(np.median(seconds[sparse or computed]))


def _figures(entry: Entry, prompts, dense: float | None) -> dict[str, Any]:
    """One method's figures; `dense` seconds of the reference's run, None with compilation."""
    seconds, clean = step_seconds(entry.modes, entry.seconds)
    clips = [dataclasses.asdict(clip) for clip in entry.clips]
    return {
        "metrics": {name: _spread([clip[name] for clip in clips]) for name in METRICS},
        "density": {
            "sparse": float(_sparse_densities(entry).mean()),
            "run": float(np.mean(entry.densities)),
            "by_step_and_layer": np.mean(entry.densities, axis=0).round(6).tolist(),
        },
        "error_by_step": np.concatenate(entry.errors, axis=1).mean(1).round(9).tolist(),
        "seconds": {
            "step": _sparse_step(entry) if clean else None,
            "run": float(seconds.sum()),
            "includes_compilation": not clean,
            **{f"{key} of a layer": value for key, value in entry.cost.items()},
        },
        "speedup": float(dense / seconds.sum()) if clean and dense is not None else None,
        "check": _check(entry, prompts),
        "clips": clips,
    }


def _spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, standard deviation and number of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known)), "std": float(np.std(known)), "clips": len(known)}


def _check(entry: Entry, prompts: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Share right of what tiny's check reads, by kind of scene."""
    if not entry.readings:
        return None
    from pasa_jax.models.tiny import check, scenes

    wanted = [scenes.parse(clip.prompt) for clip in entry.clips]
    table: dict[str, dict[str, float]] = {}
    for row in check.tabulate(wanted, entry.readings, "").rows:
        table.setdefault(row.kind, {})[row.attribute] = row.right
    return table


def write_tables(folder: Path, comparison: dict[str, Any]) -> None:
    """Writes comparison.json, and comparison.csv: a row a clip and method, one if it failed."""
    with atomic(folder / "comparison.json") as temporary:
        told = json.dumps(comparison, indent=1, allow_nan=False)
        temporary.write_text(told + "\n", encoding="utf-8")
    text, fields = io.StringIO(), [field.name for field in dataclasses.fields(Clip)]
    rows = csv.DictWriter(text, ["method", *fields, "failure"])
    rows.writeheader()
    for name, method in comparison["methods"].items():
        failed = [{"failure": method["failure"]}] if "failure" in method else []
        rows.writerows({"method": name, **row} for row in method.get("clips", failed))
    with atomic(folder / "comparison.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
