"""How much attention mass a method's blocks hold, and how wrong its output is.

Everything is measured on given q, k, v, so that a change in a method shows at once: `pasa-jax
inspect` draws one layer, `pasa-jax bench recall` a curve over densities. A method that searches in
the run, as AdaSpa does, searches here on the very q and k that it is then judged on: what it gets
is the best it can, not what steps after a search keep of it.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from pasa_jax.attention import Attention, attend, policy_order
from pasa_jax.pallas_kernels import api
from pasa_jax.pallas_kernels.blocks import num_blocks
from pasa_jax.policies import AttentionShape, Context, Plan, Policy
from pasa_jax.policies.base import dense_prefix_steps
from pasa_jax.recording import Recording
from pasa_jax.video import atomic

ORACLE = "searched on these very q and k"


class Judged(NamedTuple):
    """What a policy does to one recording.

    Attributes:
        density: exact share of the key blocks, of all heads.
        recall: share of the attention mass that lies in exact blocks, by head, mean over the rest.
        error: ‖output − dense‖ / ‖dense‖ by head.
        mass: attention mass of key blocks by query blocks [N, I, J] of batch row 0, in the order
            of tokens that the policy works in; a row sums to 1.
        mask: which of these blocks are exact.
    """

    density: float
    recall: Float[np.ndarray, " N"]
    error: Float[np.ndarray, " N"]
    mass: Float[np.ndarray, "N I J"]
    mask: Bool[np.ndarray, "N I J"]


def judge(
    policy: Policy,
    recording: Recording,
    *,
    steps: int = 50,
    step: int | None = None,
    layer: int = 1,
    seed: int = 0,
    curve: Sequence[float] | None = None,
    heads: Sequence[int] | None = None,
) -> Judged:
    """Runs a policy's plan on a recording, its search before it where it has one (`is_oracle`).

    Args:
        policy: its dense layers are not looked at.
        recording: q, k, v.
        steps: denoising steps of the run that the policy believes to be in.
        step: which of them; None takes the middle one of those that run its plan.
        layer: which layer it believes to be in.
        seed: of its random numbers.
        curve: velocity distances [steps] that its budget may follow.
        heads: which ones are looked at, N in what is returned; None all. The policy sees all.

    Returns:
        Density, recall and error, and the maps of batch row 0.

    Raises:
        ValueError: a policy that never plans, or a step at which it does not.
    """
    grid, modes, planned = recording.grid, policy.modes(steps), planned_steps(policy, steps)
    if not planned:
        raise ValueError(f"{policy} runs dense at all of {steps=}: nothing to judge")
    step = planned[len(planned) // 2] if step is None else step
    if step not in planned:
        raise ValueError(f"{step=} must be one that is not dense: {planned[0]} to {planned[-1]}")
    order = policy_order(policy, grid)
    q, k, v = (
        jnp.asarray(x if order is None else x[:, order])
        for x in (recording.q, recording.k, recording.v)
    )
    blocks = grid.num_blocks(policy.block_kv)
    budgets = policy.budgets(steps, blocks, curve if policy.reads_curve else None)
    bound = policy.max_budget(steps, blocks, curve if policy.reads_curve else None)
    shape = AttentionShape(recording.layers, *(q.shape[i] for i in (0, 2, 3)), grid)
    own = min(layer, recording.layers - 1)
    state = jax.tree.map(lambda x: x[own], policy.init_state(shape))
    run = _Run(dataclasses.replace(policy, dense_layers=()), grid, bound)
    keys = jax.random.split(jax.random.key(seed), 1)
    first = modes.index("search") if "search" in modes else None
    if first is not None:
        where = (jnp.int32(first), jnp.int32(layer), jnp.int32(blocks), keys)
        state = _attend(run, "search", where, state, q, k, v)[1].state
    where = (jnp.int32(step), jnp.int32(layer), jnp.int32(budgets[step]), keys)
    out, record, plan = _attend(run, modes[step], where, state, q, k, v)
    heads = range(q.shape[2]) if heads is None else heads
    mass, recall = _masses(plan, policy, q, k, heads)
    error = _error(out, q, k, v, jnp.asarray(heads))
    mask = _mask(plan, mass.shape[2])[np.asarray(heads)]
    return Judged(float(record.density), recall, np.asarray(error), mass, mask)


def planned_steps(policy: Policy, steps: int) -> list[int]:
    """The steps of a run that are neither dense nor a search."""
    return [i for i, mode in enumerate(policy.modes(steps)) if mode not in ("dense", "search")]


def is_oracle(policy: Policy, steps: int) -> bool:
    """Whether `judge` shows its search the very q and k that it is judged on."""
    return "search" in policy.modes(steps)


def judge_each(
    policies: dict[str, Policy], recording: Recording, **where: Any
) -> tuple[dict[str, Judged], dict[str, str]]:
    """Judges policies, and goes on where one fails.

    Args:
        policies: by label.
        recording: q, k, v.
        where: further arguments of `judge`.

    Returns:
        What could be judged, and why the others could not, by label.
    """
    judged, failures = {}, {}
    for name, policy in policies.items():
        try:
            judged[name] = judge(policy, recording, **where)
        except Exception as error:  # a method's own code: it may fail in any way
            failures[name] = _reason(error)
    return judged, failures


def _reason(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@jax.jit
def _error(out, q, k, v, heads) -> jax.Array:
    """Relative error by head, mean over the batch."""
    out, q, k, v = (jnp.take(x, heads, axis=2) for x in (out, q, k, v))
    exact = api.dense_attention(q, k, v)
    norms = [jnp.linalg.norm(x, axis=(1, 3)) for x in (out - exact, exact)]
    return (norms[0] / norms[1]).mean(0)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is static about a judged policy."""

    policy: Policy
    grid: Any
    bound: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(run: _Run, mode: str, where, state, q, k, v):
    """The layer's output and record, and behind a plan its blocks and order of tokens."""
    step, layer, budget, keys = where
    attention = Attention(run.policy, mode, step, budget, keys, run.bound)
    out, record = attend(q, k, v, attention, layer=layer, state=state, grid=run.grid)
    if mode == "search":
        return out, record, None
    context = Context(*where, run.bound, mode, run.grid)
    plan, _ = run.policy.plan(q[:, : run.grid.num_tokens], k, v, context, state)
    return out, record, Plan(plan.blocks, head_order=plan.head_order)


def _masses(
    plan: Plan, policy: Policy, q, k, heads: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mass map [N, I, J] of batch row 0, and recall of each head over all rows; head by head."""
    maps, recalls = [], []
    for head in heads:
        own = [x[:, :, head : head + 1] for x in (q, k)]
        if plan.head_order is not None:
            index = jnp.moveaxis(plan.head_order[:, head : head + 1], 1, 2)[..., None]
            own = [jnp.take_along_axis(x, index, axis=1) for x in own]
        ids, count = (np.asarray(x)[:, head : head + 1] for x in plan.blocks)
        mass = _mass(*own, policy.block_q, policy.block_kv)
        held = np.take_along_axis(mass, ids, axis=-1)
        live = np.arange(ids.shape[-1]) < count[..., None]
        recalls.append((held * live).sum() / mass.sum())
        maps.append(mass[0, 0] / mass[0, 0].sum(-1, keepdims=True))
    return np.stack(maps), np.asarray(recalls)


def _mass(q, k, block_q: int, block_kv: int) -> np.ndarray:
    """Attention mass of every key block by query block [B, N, I, J]."""
    ids, mass = (np.asarray(x) for x in _mass_lists(q, k, block_q, block_kv))
    full = np.zeros_like(mass)
    np.put_along_axis(full, ids, mass, axis=-1)
    return full


@functools.partial(jax.jit, static_argnums=(2, 3))
def _mass_lists(q, k, block_q: int, block_kv: int) -> tuple[jax.Array, jax.Array]:
    _, lse = api.dense_attention(q, k, k, return_lse=True)
    top = num_blocks(k.shape[1], block_kv)
    found = api.block_mass(q, k, lse, block_q=block_q, block_kv=block_kv, top=top)
    return found.ids, found.mass


def _mask(plan: Plan, columns: int) -> np.ndarray:
    """bool [N, I, J] of batch row 0."""
    ids, count = (np.asarray(x[0]) for x in plan.blocks)
    mask = np.zeros((*count.shape, columns + 1), bool)
    live = np.arange(ids.shape[-1]) < count[..., None]
    np.put_along_axis(mask, np.where(live, ids, columns), True, axis=-1)
    return mask[..., :columns]


def picture(judged: Judged, head: int, most: int | None = None) -> UInt8[np.ndarray, "I W"]:
    """The head's mass map beside its exact blocks, in grey with two white columns between.

    Args:
        judged: of the head.
        head: index into what was judged.
        most: query and key blocks of the picture, each pixel a mean of blocks where there are more;
            None draws all.

    Returns:
        Dark is much mass, by its square root, which shows faint mass; and exact.
    """
    mass, mask = judged.mass[head], judged.mask[head].astype(np.float64)
    if most is not None:
        mass, mask = (_shrunk(x, most) for x in (mass, mask))
    gap = np.ones((len(mass), 2))
    both = np.concatenate([1 - np.sqrt(mass / mass.max()), gap, 1 - mask], axis=1)
    return (255 * both).astype(np.uint8)


def _shrunk(x: np.ndarray, most: int) -> np.ndarray:
    """Means over about equal parts, at most so many an axis."""
    for axis in (0, 1):
        size = x.shape[axis]
        if size > most:
            starts = np.arange(most) * size // most
            lengths = np.diff(np.append(starts, size)).reshape(-1, *[1] * (1 - axis))
            x = np.add.reduceat(x, starts, axis=axis) / lengths
    return x


class Look(NamedTuple):
    """Methods' blocks in two heads of one recording.

    Attributes:
        heads: figures as JSON holds them: "head", its `width`, and by method density, recall and
            error in this head, or the "failure".
        pictures: by head, then by method.
        num_blocks: that a head's width could reach.
    """

    heads: list[dict[str, Any]]
    pictures: dict[int, dict[str, UInt8[np.ndarray, "I W"]]]
    num_blocks: int


def look(
    recording: Recording, policies: dict[str, Policy], *, block: int, most: int = 128, **where: Any
) -> Look:
    """Judges policies in the heads whose attention is narrowest and widest.

    Args:
        recording: its heads are chosen from.
        policies: by label. One that cannot be judged is left out of the pictures.
        block: tokens of the blocks over which attention's width counts.
        most: blocks a side of a picture.
        where: further arguments of `judge`.
    """
    widths = width(recording, block)
    chosen = list(dict.fromkeys(int(i) for i in (widths.argmin(), widths.argmax())))
    heads = [{"head": i, "width": round(float(widths[i]), 3), "methods": {}} for i in chosen]
    pictures = {i: {} for i in chosen}
    found, failures = judge_each(policies, recording, heads=chosen, **where)
    for name, reason in failures.items():
        logging.getLogger("pasa_jax").warning("no blocks of %s: %s", name, reason)
        for head in heads:
            head["methods"][name] = {"failure": reason}
    for name, judged in found.items():
        for i, head in enumerate(heads):
            figures = (judged.mask[i].mean(), judged.recall[i], judged.error[i])
            told = (round(float(x), 6) for x in figures)
            head["methods"][name] = dict(zip(("density", "recall", "error"), told, strict=True))
            pictures[head["head"]][name] = picture(judged, i, most)
    return Look(heads, pictures, recording.grid.num_blocks(block))


def width(recording: Recording, block: int) -> Float[np.ndarray, " N"]:
    """How many key blocks a head's attention falls on: exp of its mass's entropy in raster order.

    Between 1, all in one block, and J, the same in all; mean over query blocks and batch.
    """
    widths = []
    for head in range(recording.q.shape[2]):
        q, k = (jnp.asarray(x[:, :, head : head + 1]) for x in (recording.q, recording.k))
        mass = _mass(q, k, block, block)
        mass = mass / mass.sum(-1, keepdims=True)
        entropy = -(mass * np.log(np.maximum(mass, 1e-30))).sum(-1)
        widths.append(np.exp(entropy).mean())
    return np.asarray(widths)


class Shown(NamedTuple):
    """What an inspection shows of one policy.

    Attributes:
        judged: its blocks.
        budgets: density asked for, by step.
        gamma: the curve's γ_t = ℓ_t / mean ℓ over the steps behind the dense prefix, which shape
            the budget, by step, NaN before; None where the budget follows no curve.
        oracle: `is_oracle`.
    """

    judged: Judged
    budgets: Float[np.ndarray, " steps"]
    gamma: Float[np.ndarray, " steps"] | None
    oracle: bool

    @classmethod
    def of(
        cls, policy: Policy, judged: Judged, steps: int, curve: Sequence[float] | None
    ) -> "Shown":
        """With the budgets of a run of so many steps, which may follow the curve."""
        blocks, gamma = judged.mask.shape[2], None
        curve = curve if policy.reads_curve else None
        budgets = np.asarray(policy.budgets(steps, blocks, curve)) / blocks
        if curve is not None:
            dense = dense_prefix_steps(policy.dense_prefix, steps)
            gamma, sparse = np.full(steps, np.nan), np.asarray(curve[dense:], np.float64)
            # As `step_budgets`: a curve of zeros leaves all steps alike.
            gamma[dense:] = sparse / sparse.mean() if sparse.any() else 1
        return cls(judged, budgets, gamma, is_oracle(policy, steps))


def write_inspection(
    path: Path,
    recording: Recording,
    shown: dict[str, Shown],
    *,
    head: int,
    step: int,
    failures: dict[str, str],
) -> Path:
    """Draws the mass map beside each policy's mask, and the budgets over the steps; JSON beside it.

    Args:
        path: target, ending in .png; figures, by head, go to the same name with .json.
        recording: what was judged.
        shown: by label, at least one.
        head: which one is drawn.
        step: which one was judged.
        failures: by label, why others were not.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4 * len(shown) + 3), layout="constrained")
    rows = figure.subplots(len(shown) + 1, 1, height_ratios=[3] * len(shown) + [2])
    for axes, (name, one) in zip(rows, shown.items(), strict=False):
        axes.imshow(
            picture(one.judged, head), interpolation="nearest", cmap="gray", vmin=0, vmax=255
        )
        axes.set(xticks=[], yticks=[], xlabel="key blocks: attention mass, then exact blocks")
        axes.set_title(f"{name}: {head_told(one, head)}", fontsize="small")
    _plot_budgets(rows[-1], shown, step)
    figure.suptitle(f"{recording.name}, head {head}")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    told = {name: _inspected(one) for name, one in shown.items()}
    told |= {name: {"failure": reason} for name, reason in failures.items()}
    content = {"recording": recording.name, "grid": recording.grid.sizes, "policies": told}
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def head_told(one: Shown, head: int) -> str:
    """One head's figures in words."""
    judged = one.judged
    told = f"density {judged.mask[head].mean():.3f}, recall {judged.recall[head]:.3f}"
    told += f", error {judged.error[head]:.3f}"
    return told + (f" ({ORACLE})" if one.oracle else "")


def _plot_budgets(axes: Any, shown: dict[str, Shown], step: int) -> None:
    """Density asked for by step, the measured one at the step, and γ on an axis of its own."""
    for name, one in shown.items():
        (line,) = axes.plot(one.budgets, label=name)
        axes.plot([step], [one.judged.density], "o", color=line.get_color())
    axes.set(xlabel="step", ylabel="density", ylim=(0, 1.05))
    axes.set_title("lines: density asked for; points: measured over all heads", fontsize="small")
    curves = {name: one.gamma for name, one in shown.items() if one.gamma is not None}
    if curves:
        right = axes.twinx()
        right.set(ylabel="γ of the curve, dotted")
        for gamma in curves.values():
            right.plot(gamma, "k:")
    axes.legend(fontsize="small")


def _inspected(one: Shown) -> dict[str, Any]:
    """As JSON holds it."""
    told = {
        "density": one.judged.mask.mean((1, 2)).round(6).tolist(),
        "recall": one.judged.recall.round(6).tolist(),
        "error": one.judged.error.round(6).tolist(),
        "oracle": one.oracle,
        "density of all heads": one.judged.density,
        "budgets": one.budgets.tolist(),
    }
    if one.gamma is not None:
        told["gamma"] = [None if np.isnan(x) else round(float(x), 6) for x in one.gamma]
    return told


def recall_curves(
    recordings: Sequence[Recording],
    policies: dict[str, Sequence[Policy]],
    *,
    steps: int = 10,
) -> list[dict[str, Any]]:
    """Recall and error of methods at several densities, on every recording.

    Args:
        recordings: what to judge on.
        policies: by label, the method at rising densities.
        steps: denoising steps of the runs that the policies believe to be in.

    Returns:
        A row a recording, method and density: real density, recall and error by head, and
        `is_oracle`. A method that fails has a row with its reason.
    """
    rows = []
    for recording in recordings:
        for name, family in policies.items():
            for policy in family:
                row = {"recording": recording.name, "method": name}
                found, failures = judge_each({name: policy}, recording, steps=steps)
                if failures:
                    rows.append({**row, "failure": failures[name]})
                    break
                rows.append(
                    {
                        **row,
                        "oracle": is_oracle(policy, steps),
                        "density": found[name].density,
                        "recall": found[name].recall.round(6).tolist(),
                        "error": found[name].error.round(6).tolist(),
                    }
                )
    return rows


def plot_recall(path: Path, rows: list[dict[str, Any]]) -> None:
    """Recall and error against density, mean over heads: a row of two plots a recording."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["recording"] for row in rows))
    figure = Figure(figsize=(10, 3.6 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False)
    for axes, name in zip(grid, names, strict=True):
        own = [row for row in rows if row["recording"] == name and "failure" not in row]
        for method in dict.fromkeys(row["method"] for row in own):
            points = [row for row in own if row["method"] == method]
            density = [row["density"] for row in points]
            label = method + (f" ({ORACLE})" if points[0]["oracle"] else "")
            for plot, key in zip(axes, ("recall", "error"), strict=True):
                plot.plot(density, [np.mean(row[key]) for row in points], "o-", label=label)
        axes[0].set(xlabel="density", ylabel="recall of attention mass", title=name)
        axes[1].set(xlabel="density", ylabel="relative error of the output", yscale="log")
        if own:
            axes[1].legend(fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
