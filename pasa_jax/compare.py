"""Methods side by side: the same prompts and seeds under dense attention and any list of policies.

Every batch of clips runs dense first, then under every policy; metrics are against dense's clips.
"""

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from pasa_jax import metrics
from pasa_jax.attention import Attention, attend
from pasa_jax.caches import SKIP, StepCache
from pasa_jax.calibration import VelocityCurve
from pasa_jax.info import machine
from pasa_jax.pipeline import Pipeline, Result
from pasa_jax.policies import AttentionShape, Context, Dense, Policy
from pasa_jax.settings import Settings
from pasa_jax.video import atomic

DENSE = "dense"
NOT_SPARSE = ("dense", "search", SKIP)  # modes that run no sparse attention
# Metrics of a clip, in the order of tables; those that are None throughout are left out.
METRICS = ("psnr", "ssim", "smoothness", "smoothness_gap", "flicker", "lpips", "latent_error")


@dataclasses.dataclass(frozen=True)
class Clip:
    """What one clip measured; None where a metric does not apply.

    Attributes:
        prompt, seed: of the clip.
        psnr, ssim, lpips: against dense attention's clip; psnr is None where the two are equal.
        smoothness: `metrics.smoothness`; `smoothness_gap` its distance from dense's own.
        flicker: `metrics.flicker` over the pixels that stand still in dense's clip.
        latent_error: relative error of the final latents against dense's.
    """

    prompt: str
    seed: int
    psnr: float | None = None
    ssim: float | None = None
    smoothness: float | None = None
    smoothness_gap: float | None = None
    flicker: float | None = None
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
    densities: list[np.ndarray] = dataclasses.field(default_factory=list)  # [steps, layers]
    seconds: list[np.ndarray] = dataclasses.field(default_factory=list)  # [steps] a batch
    readings: list[Any] = dataclasses.field(default_factory=list)
    cost: dict[str, float] | None = None
    failure: str | None = None


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
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Samples every prompt with every seed under dense attention and under every policy.

    Args:
        pipeline: its model is sampled.
        prompts, seeds: all pairs of the two are clips.
        policies: by label; "dense" is added where it is missing.
        cache: of every policy, dense included, labelled "pasa + every-2"; the reference "dense"
            has none, so speed-ups count what the cache saves. None for none at all.
        batch: clips sampled together.
        shown: clips whose frames are returned.
        states: text states [P, E, D], one a prompt, for models without a text encoder.
        negative_prompt, negative_states: what guidance leads away from.
        curve: velocity curve; given to the policies that read one.
        progress: show a bar for each run.
        settings: fields of `Settings`; those not given are the card's.

    Returns:
        The comparison as JSON holds it: machine, settings, and for each method parameters, clips,
        means with standard deviations, real density by step and layer (0 where the cache skipped
        the step; "sparse" is the mean over those that ran sparse), error by step, seconds,
        speed-up, attention's share and what tiny's check reads. A method that fails is reported
        with its reason and without figures. Then the shown frames by label.

    Raises:
        ValueError: no clip, no policy, or settings that the model refuses.
    """
    if batch < 1 or shown < 0:
        raise ValueError(f"{batch=} must be at least 1 and {shown=} at least 0")
    if not prompts or not seeds or not policies:
        raise ValueError(f"{prompts=}, {seeds=} and {policies=} must each hold at least one")
    chosen = pipeline.card.settings(**settings)
    entries = _entries(pipeline, chosen, policies, cache)
    pairs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    still = _still_pixels(prompts) if pipeline.card.complete else None
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        job = dict(
            seeds=[seed for _, seed in part],
            states=None if states is None else states[[i for i, _ in part]],
            negative_prompt=negative_prompt,
            negative_states=negative_states,
            progress=progress,
            **dataclasses.asdict(chosen),
        )
        _run_batch(pipeline, [prompts[i] for i, _ in part], job, entries, curve, still, shown)
    clips = min(batch, len(pairs))
    for entry in entries.values():
        if entry.failure is None:
            entry.cost = _attention_cost(pipeline, entry, chosen, curve, clips)
    frames = {name: entry.frames for name, entry in entries.items() if entry.frames}
    return _comparison(pipeline, chosen, prompts, entries), frames


def _entries(
    pipeline: Pipeline, settings: Settings, policies: dict[str, Policy], cache: StepCache | None
) -> dict[str, Entry]:
    """The reference and every method, with its cache in the name."""

    def entry(policy, cache):
        return Entry(policy, pipeline.modes(policy, settings, cache), cache)

    policies = {DENSE: Dense(), **policies}
    if cache is None:
        return {name: entry(policy, None) for name, policy in policies.items()}
    cached = {f"{name} + {cache}": entry(policy, cache) for name, policy in policies.items()}
    return {DENSE: entry(policies[DENSE], None), **cached}


def _run_batch(pipeline, prompts, job, entries, curve, still, shown) -> None:
    """One batch of clips under every method that has not failed; dense first."""
    exact, path = None, []
    for name, entry in entries.items():
        if entry.failure is not None:
            continue
        seen = path if name == DENSE else []
        read = curve if entry.policy.reads_curve else None
        try:
            result = pipeline.generate(
                prompts,
                policy=entry.policy,
                cache=entry.cache,
                curve=read,
                observe=lambda i, latents, seen=seen: seen.append(np.asarray(latents)),
                **job,
            )
        except (ValueError, NotImplementedError, RuntimeError) as error:
            if name == DENSE:
                raise
            logging.getLogger("pasa_jax").warning("%s failed: %s", name, error)
            entry.failure = str(error).splitlines()[0]
            continue
        exact = result if exact is None else exact
        _note(entry, result, exact, [seen, path], still, shown)


def _note(entry: Entry, result: Result, exact: Result, paths, still, shown: int) -> None:
    """Adds a batch's clips to the method's entry."""
    errors = [metrics.relative_error(own, dense) for own, dense in zip(*paths, strict=True)]
    entry.errors.append(np.stack(errors))
    entry.densities.append(result.densities)
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
    flicker = metrics.flicker(video, still(clip.prompt, dense)) if still else None
    own = dataclasses.replace(clip, smoothness=smooth, flicker=flicker)
    if is_dense:
        return dataclasses.replace(own, latent_error=None)
    decibel = metrics.psnr(video, dense)
    return dataclasses.replace(
        own,
        psnr=decibel if math.isfinite(decibel) else None,
        ssim=metrics.ssim(video, dense),
        smoothness_gap=abs(smooth - metrics.smoothness(dense)),
        lpips=metrics.lpips(video, dense) if metrics.has_lpips() else None,
    )


def _still_pixels(
    prompts: Sequence[str],
) -> Callable[[str, UInt8[np.ndarray, "F Y X 3"]], Bool[np.ndarray, "Y X"]] | None:
    """Which pixels of dense's clip show the background throughout; None outside tiny's grammar."""
    from pasa_jax.models.tiny import scenes

    try:
        wanted = {prompt: scenes.parse(prompt) for prompt in prompts}
    except ValueError:
        return None

    def still(prompt, dense):
        scene = wanted[prompt]
        if scene.drifting:  # the texture fills the frame and moves
            return np.zeros(dense.shape[1:3], bool)
        ground = np.asarray(scenes.COLOURS[scene.colours[1]], np.float32)
        # As `check.read` tells colours apart: 0.45 is half the distance between the nearest two.
        near = ((dense / np.float32(255) - ground) ** 2).sum(-1) < 0.45**2
        return near.all(0)

    return still


def _attention_cost(
    pipeline: Pipeline, entry: Entry, settings: Settings, curve: VelocityCurve | None, clips: int
) -> dict[str, float]:
    """Seconds of one layer's attention, and of its planning, at a sparse step of a batch of clips.

    On random normal q, k, v of the model's shape; the median of five calls, compiled before.
    """
    mode = "dense" if "sparse" not in entry.modes else "sparse"
    config, grid = pipeline.card.config, pipeline.card.grid(settings)
    rows = clips * (1 if settings.guidance == 1 else 2)
    policy = dataclasses.replace(entry.policy, dense_layers=())
    shape = AttentionShape(1, rows, config.num_heads, config.head_dim, grid)
    blocks = grid.num_blocks(policy.block_kv)
    mean = curve.mean if curve is not None and policy.reads_curve else None
    bound = policy.max_budget(settings.steps, blocks, mean)
    budget = jnp.int32(max(1, round(float(np.mean(_sparse_densities(entry))) * blocks)))
    state = jax.tree.map(lambda x: x[0], policy.init_state(shape))
    keys = jax.random.split(jax.random.key(0), 1)
    draws = jax.random.split(jax.random.key(1), 3)
    sizes = (rows, grid.num_tokens, config.num_heads, config.head_dim)
    qkv = [jax.random.normal(key, sizes, jnp.float32) for key in draws]
    zero = jnp.int32(0)

    def run(mode, state, *qkv):
        attention = Attention(policy, mode, zero, budget, keys, bound)
        return attend(*qkv, attention, layer=zero, state=state, grid=grid)

    def plan(state, *qkv):
        return policy.plan(*qkv, Context(zero, zero, budget, keys, bound, "sparse", grid), state)

    if "search" in entry.modes:
        state = jax.jit(run, static_argnums=0)("search", state, *qkv)[1].state
    cost = {"attention": _seconds(jax.jit(run, static_argnums=0), mode, state, *qkv)}
    if mode == "sparse":
        cost["planning"] = _seconds(jax.jit(plan), state, *qkv)
    return cost


def _sparse_densities(entry: Entry) -> np.ndarray:
    """Densities of the sparse steps [steps, layers], layers that run dense left out."""
    sparse = [mode not in NOT_SPARSE for mode in entry.modes]
    density = np.mean(entry.densities, axis=0)[sparse]
    layers = [i for i in range(density.shape[1]) if i not in entry.policy.dense_layers]
    return density[:, layers] if density.size and layers else np.ones((1, 1))


def _seconds(function: Callable[..., Any], *operands: Any) -> float:
    jax.block_until_ready(function(*operands))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def step_seconds(modes: Sequence[str], runs: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Seconds of every step without compilation, the median over runs.

    The first step of each mode in the first run includes compilation: it is left out, and where no
    other run has that step, the mode's median over the rest stands for it.

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
    dense = step_seconds(exact.modes, exact.seconds)[0].sum()
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
                **(
                    {"failure": entry.failure}
                    if entry.failure is not None
                    else {
                        **_figures(entry, prompts, dense),
                        "attention_share": _attention_share(entry, exact, layers),
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


def _attention_share(entry: Entry, exact: Entry, layers: int) -> float:
    """Share of a sparse step's seconds that its self-attention takes; at most 1."""
    dense_layers = sum(layer < layers for layer in entry.policy.dense_layers)
    seconds = (layers - dense_layers) * entry.cost["attention"]
    seconds += dense_layers * exact.cost["attention"]
    return min(1.0, seconds / _sparse_step(entry))


def _sparse_step(entry: Entry) -> float:
    """Seconds of a sparse step; of any computed one where all are dense."""
    seconds, _ = step_seconds(entry.modes, entry.seconds)
    sparse = [i for i, mode in enumerate(entry.modes) if mode not in NOT_SPARSE]
    computed = [i for i, mode in enumerate(entry.modes) if mode != SKIP]
    return float(np.median(seconds[sparse or computed]))


def _figures(entry: Entry, prompts, dense: float) -> dict[str, Any]:
    """One method's figures."""
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
            "step": _sparse_step(entry),
            "run": float(seconds.sum()),
            "includes_compilation": not clean,
            **{f"{key} of a layer": value for key, value in entry.cost.items()},
        },
        "speedup": float(dense / seconds.sum()),
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
    """Writes comparison.json, and comparison.csv with a row a clip and method."""
    with atomic(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    text = io.StringIO()
    rows = csv.DictWriter(text, ["method", *(field.name for field in dataclasses.fields(Clip))])
    rows.writeheader()
    for name, method in comparison["methods"].items():
        rows.writerows({"method": name, **clip} for clip in method.get("clips", []))
    with atomic(folder / "comparison.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
