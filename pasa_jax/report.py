"""A comparison as one self-contained HTML page: videos side by side, table, curves, blocks."""

import base64
import html
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from pasa_jax.caches import SKIP
from pasa_jax.compare import DENSE, METRICS
from pasa_jax.video import atomic, write_video


class Head(NamedTuple):
    """How a metric stands in the table: column head, factor, decimals, and what it is."""

    text: str
    factor: float
    digits: int
    meaning: str


HEADS = {
    "psnr": Head("PSNR dB ↑", 1, 2, "PSNR and SSIM: against dense's clip, PSNR without equal ones"),
    "ssim": Head("SSIM ↑", 1, 3, ""),
    "smoothness": Head("smooth ↑", 1, 4, "smooth: VBench's temporal flickering score"),
    "smoothness_gap": Head("off dense ↓", 1, 4, "off dense: distance from dense's own"),
    "flicker": Head(
        "flicker ×10⁻³ ↓",
        1000,
        2,
        "flicker: variance over time of the pixels that stay near the background's colour in the "
        "clip and in dense's, over which dense's own counts too",
    ),
    "flicker_gap": Head("off dense ×10⁻³ ↓", 1000, 2, ""),
    "lpips": Head("LPIPS ↓", 1, 3, "LPIPS: perceived distance from dense's clip"),
    "latent_error": Head(
        "latents ↓", 1, 3, "latents: relative error of the final latents against dense's"
    ),
}
# Okabe and Ito's colours, told apart by the colour-blind too, without yellow; then other dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.5em;
  color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } h3 { font-size: 1em }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; line-height: 1.3 }
td, th { padding: .3em .5em; text-align: right; vertical-align: top }
td { white-space: nowrap; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #999; font-weight: 600; vertical-align: bottom }
th:empty { border: none } th.kind { border-bottom: 1px solid #ddd; text-align: center }
td:first-child, th:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 8em; max-width: 15em; position: sticky; left: 0; background: #fff }
small { display: block; color: #666 }
figure { margin: 0 } figcaption { font-size: .85em; line-height: 1.3; overflow-wrap: anywhere }
video, figure img { width: 100%; height: auto; image-rendering: pixelated; display: block }
figure img { border: 1px solid #bbb; box-sizing: border-box }
.grid { display: grid; gap: .8em; grid-template-columns: repeat(auto-fill, 160px) }
.clip { display: flex; gap: .8em; align-items: flex-start; padding: .5em 0 }
.clip > figure { width: 160px; flex: none; position: sticky; top: 0 } .clip > .grid { flex: 1 }
.wide { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)) }
td.failed { color: #a00; text-align: left; white-space: normal }
.scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
summary { cursor: pointer } dd { margin: 0 0 .5em 1em; font: 12px/1.4 monospace }
"""
# Videos have no `loop`: the first to end starts all again, so that they stay together. Those of
# closed clips rest, and load once they are opened.
SCRIPT = """
const playing = () => [...document.querySelectorAll("details[open] video")];
const together = () => playing().forEach(v => { v.currentTime = 0; v.play(); });
document.querySelectorAll("video").forEach(v => v.addEventListener("ended", together));
document.querySelectorAll("details.videos").forEach(clip => clip.addEventListener("toggle", () => {
  clip.querySelectorAll("video").forEach(v => v.pause());
  together();
}));
document.getElementById("together")?.addEventListener("click", together);
window.addEventListener("load", together);
"""
OPEN = 3  # clips that play at once; browsers do not hold hundreds of videos


def write_page(
    path: Path,
    comparison: dict[str, Any],
    frames: dict[str, list[np.ndarray]],
    pictures: dict[int, dict[str, np.ndarray]] | None = None,
    *,
    fps: float,
) -> Path:
    """Writes the page; it needs no other file and no network.

    Args:
        path: target, ending in .html.
        comparison, frames, pictures: of `compare.compare`; without pictures the page has no section
            of blocks.
        fps: frames a second of the videos.

    Returns:
        The path.
    """
    sections = [
        _head(comparison),
        _videos(comparison, frames, fps),
        "<h2>Figures</h2>" + _table(comparison),
        "<h2>What tiny's check reads</h2>" + _checks(comparison) if _has_check(comparison) else "",
        "<h2>Curves</h2>" + _curves(comparison),
        _blocks(comparison, pictures) if pictures else "",
        "<h2>Parameters</h2>" + _parameters(comparison),
    ]
    title = "pasa-jax compare"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _head(comparison: dict[str, Any]) -> str:
    """What was run, on what."""
    s, versions = comparison["settings"], comparison["versions"]
    count = len(comparison["methods"][DENSE]["clips"])
    clips = f"{count} clip" if count == 1 else f"{count} clips"
    told = (
        f"{comparison['model']}, {clips} of {s['frames']} frames of {s['width']}x"
        f"{s['height']}, {s['steps']} steps, {s['sampler']}, guidance {s['guidance']}; "
        f"{comparison['device']}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    return f"<h1>Methods against dense attention</h1><p>{html.escape(told)}</p>"


def _videos(comparison: dict[str, Any], frames: dict[str, Any], fps: float) -> str:
    """The clips: dense at the left, the methods wrapping beside it."""
    if not frames:
        return ""
    clips, size = [], "width={2} height={1}".format(*frames[DENSE][0].shape)
    for i, clip in enumerate(comparison["methods"][DENSE]["clips"][: len(frames[DENSE])]):
        first, *rest = (
            f'<figure><video src="{_video_url(videos[i], fps)}" {size} muted playsinline '
            f'preload="none"></video><figcaption>{html.escape(name)}</figcaption></figure>'
            for name, videos in frames.items()
            if i < len(videos)
        )
        told = html.escape(f"{clip['prompt']}, seed {clip['seed']}")
        clips.append(
            f'<details class="videos"{" open" if i < OPEN else ""}><summary>{told}</summary>'
            f'<div class="clip">{first}<div class="grid">{"".join(rest)}</div></div></details>'
        )
    button = '<p><button id="together">Play together from the start</button></p>'
    return f"<h2>Videos</h2>{button}{''.join(clips)}"


def _video_url(video: UInt8[np.ndarray, "F Y X 3"], fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = write_video(Path(folder) / "clip.mp4", video, fps=fps)
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def _table(comparison: dict[str, Any]) -> str:
    """A row a method: mean, and standard deviation over clips below it."""
    methods = comparison["methods"]
    kept = [
        name for name in METRICS if any(m.get("metrics", {}).get(name) for m in methods.values())
    ]
    heads = ["method", "steps", "density", *(HEADS[name].text for name in kept)]
    heads += ["s a step", "s a run", "speed-up", "attention", "planning"]
    rows = "".join(_row(name, method, kept, len(heads)) for name, method in methods.items())
    meanings = [HEADS[name].meaning for name in kept if HEADS[name].meaning]
    note = "; ".join(
        [
            "Mean and standard deviation over clips",
            "steps: computed ones, and those that a cache skipped",
            "density: exact share of the key blocks in sparse steps",
            *meanings,
            "seconds: without compilation, for a batch of clips; what depends on them is left out "
            "where no run was free of it",
            "attention: its share of the steps that are not dense, timed apart",
            "planning: scores, selection and searches, as a share of that attention",
        ]
    )
    return _tabulate([_cells("th", heads)], rows) + f"<p>{html.escape(note)}.</p>"


def _tabulate(heads: Iterable[str], rows: str) -> str:
    told = "".join(f"<tr>{head}</tr>" for head in heads)
    return f'<div class="scroll"><table>{told}{rows}</table></div>'


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _row(name: str, method: dict[str, Any], kept: list[str], width: int) -> str:
    first = f"<td>{html.escape(name)}</td>"
    if "failure" in method:
        reason = html.escape(method["failure"])
        return f'<tr>{first}<td class="failed" colspan="{width - 1}">failed: {reason}</td></tr>'
    seconds, skipped = method["seconds"], method["modes"].count(SKIP)
    asked, total = _asked(method), len(method["clips"])
    cells = [
        _two(str(len(method["modes"]) - skipped), f"+ {skipped} cached" if skipped else ""),
        _two(f"{method['density']['sparse']:.3f}", "" if asked is None else f"not {asked:g}"),
        *(_spread(method["metrics"][metric], HEADS[metric], total) for metric in kept),
        _known("{:.3f}", seconds["step"]),
        _two(
            f"{seconds['run']:.2f}",
            "with compilation" if seconds["includes_compilation"] else "",
        ),
        _known("{:.2f}x", method["speedup"]),
        _percent(method["attention_share"]),
        _percent(method["planning_share"]),
    ]
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _known(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _two(main: str, *below: str) -> str:
    return main + "".join(f"<small>{text}</small>" for text in below if text)


def density_told(method: dict[str, Any]) -> str:
    """The density of sparse steps, and the one asked for where that is off by over a tenth."""
    asked, told = _asked(method), f"{method['density']['sparse']:.3f}"
    return told if asked is None else f"{told}, not {asked:g}"


def _asked(method: dict[str, Any]) -> float | None:
    """The density asked for, where the real one is off by over a tenth; searched masks ask none."""
    real, parameters = method["density"]["sparse"], method["parameters"]
    asked = parameters.get("density") if parameters.get("masks") is None else None
    return None if asked is None or abs(real - asked) <= 0.1 * asked else asked


def _spread(value: dict[str, float] | None, head: Head, total: int) -> str:
    """Mean, deviation, and the number of clips that have a value unless all have."""
    if value is None:
        return ""
    mean, std = (f"{head.factor * value[key]:.{head.digits}f}" for key in ("mean", "std"))
    count = value["clips"]
    partial = "" if count == total else f"{count} of {total}"
    return _two(mean, f"± {std}" if count > 1 else "", partial)


def _has_check(comparison: dict[str, Any]) -> bool:
    return any(method.get("check") for method in comparison["methods"].values())


def _checks(comparison: dict[str, Any]) -> str:
    """Share of clips that show what was asked for."""
    methods = {n: m["check"] for n, m in comparison["methods"].items() if m.get("check")}
    kinds = methods[DENSE]
    above = "".join(
        f'<th class="kind" colspan="{len(table)}">{html.escape(kind)}</th>'
        for kind, table in kinds.items()
    )
    heads = _cells("th", ["method", *(name for table in kinds.values() for name in table)])
    rows = ""
    for method, found in methods.items():
        shares = (f"{found[kind][name]:.2f}" for kind in kinds for name in kinds[kind])
        rows += f"<tr>{_cells('td', [method, *shares])}</tr>"
    return _tabulate(["<th></th>" + above, heads], rows)


def _curves(comparison: dict[str, Any]) -> str:
    """Density and error of the latents by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    methods = {
        name: method
        for name, method in comparison["methods"].items()
        if "failure" not in method and name != DENSE
    }
    figure = Figure(figsize=(13, 4.5 + 0.2 * len(methods) / 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, method) in enumerate(methods.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        look = dict(color=colour, linestyle=dash, marker=".", markersize=4, linewidth=1.3)
        steps, density = _sparse_density(method)
        left.plot(steps, density, label=name, **look)
        right.plot(method["error_by_step"], **look)
    left.set(xlabel="step", title="density of computed steps", yscale="log")
    left.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    left.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "235" else "")
    right.set(xlabel="step", title="relative error of the latents against dense's")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#eee")
    if methods:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    note = "Density: mean over the layers that are not kept dense."
    return text.getvalue()[text.getvalue().index("<svg") :] + f"<p>{note}</p>"


def _sparse_density(method: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Steps that were computed, and their density."""
    density = np.asarray(method["density"]["by_step_and_layer"])
    layers = [i for i in range(density.shape[1]) if i not in method["parameters"]["dense_layers"]]
    steps = [i for i, mode in enumerate(method["modes"]) if mode != SKIP]
    return steps, density[steps][:, layers or slice(None)].mean(1)


def _blocks(comparison: dict[str, Any], pictures: dict[int, dict[str, np.ndarray]]) -> str:
    """Attention mass beside each method's exact blocks, in the heads that were looked at."""
    about = comparison["blocks"]
    told = (
        f"Layer {about['layer']} at step {about['step']} of the dense run of "
        f"“{about['prompt']}”, seed {about['seed']}, in the heads whose attention is narrowest and "
        "widest. Rows are query blocks, columns key blocks, in the order of tokens that the method "
        "works in; left the attention mass, dark is much (its square root is drawn), right the "
        "blocks that the method computes exactly. Recall: share of the mass in these; error: of "
        "the head's output. A method that searches during the run has searched on this very step."
    )
    sections = [f"<h2>Blocks</h2><p>{html.escape(told)}</p>"]
    for name, head in zip(("narrowest", "widest"), about["heads"], strict=False):
        figures = "".join(
            _picture(method, picture, head["methods"][method])
            for method, picture in pictures[head["head"]].items()
        )
        spread = f"its mass spreads like {head['width']:.1f} of {about['num_blocks']} key blocks"
        sections.append(
            f"<h3>Head {head['head']}, the {name}: {spread}</h3>"
            f'<div class="grid wide">{figures}</div>'
        )
    return "".join(sections)


def _picture(method: str, picture: np.ndarray, figures: dict[str, float]) -> str:
    name = html.escape(method)
    told = "density {density:.3f}, recall {recall:.3f}, error {error:.2g}".format(**figures)
    return (
        f'<figure><img alt="blocks of {name}" src="{_png_url(picture)}">'
        f"<figcaption>{name}<small>{told}</small></figcaption></figure>"
    )


def _png_url(picture: UInt8[np.ndarray, "I W"]) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _parameters(comparison: dict[str, Any]) -> str:
    """Every method's parameters, folded away."""
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(json.dumps(method['parameters']))}</dd>"
        for name, method in comparison["methods"].items()
    )
    return f"<details><summary>of every method</summary><dl>{rows}</dl></details>"
