"""A comparison as one self-contained HTML page: videos side by side, curves, table, masks."""

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pasa_jax.compare import DENSE, METRICS
from pasa_jax.video import atomic, write_video

# Column heads of the table, by metric: name and unit, and what is better.
HEADS = {
    "psnr": "PSNR, dB ↑",
    "ssim": "SSIM ↑",
    "smoothness": "smoothness ↑",
    "smoothness_gap": "its distance from dense ↓",
    "flicker": "variance of still pixels ↓",
    "lpips": "LPIPS ↓",
    "latent_error": "latents' error ↓",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: right }
td { white-space: nowrap }
th { border-bottom: 2px solid #999; font-weight: 600 } td { border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: 0 .8em .8em 0 } figcaption { font-size: .9em }
video, figure img { width: 200px; image-rendering: pixelated; display: block }
.failed { color: #a00 } .scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
"""
SCRIPT = """
const videos = [...document.querySelectorAll("video")];
const together = () => videos.forEach(v => { v.currentTime = 0; v.play(); });
document.getElementById("together").onclick = together;
window.addEventListener("load", together);
"""


def write_page(
    path: Path,
    comparison: dict[str, Any],
    frames: dict[str, Sequence[UInt8[np.ndarray, "F Y X 3"]]],
    *,
    fps: float,
    masks: dict[str, UInt8[np.ndarray, "I J 3"]] | None = None,
) -> Path:
    """Writes the page; it needs no other file and no network.

    Args:
        path: target, ending in .html.
        comparison, frames: of `compare.compare`.
        fps: frames a second of the videos.
        masks: pictures by caption, a pixel a block; None leaves their section out.

    Returns:
        The path.
    """
    sections = [
        _head(comparison),
        _videos(comparison, frames, fps),
        "<h2>Figures</h2>" + _table(comparison),
        "<h2>What tiny's check reads</h2>" + _checks(comparison) if _has_check(comparison) else "",
        "<h2>Curves</h2>" + _curves(comparison),
        _masks(masks or {}),
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
    clips = len(comparison["methods"][DENSE]["clips"])
    told = (
        f"{comparison['model']}, {clips} clips of {s['frames']} frames of {s['width']}x"
        f"{s['height']}, {s['steps']} steps, {s['sampler']}, guidance {s['guidance']}; "
        f"{comparison['device']}; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    return f"<h1>Methods against dense attention</h1><p>{html.escape(told)}</p>"


def _videos(comparison: dict[str, Any], frames: dict[str, Any], fps: float) -> str:
    """A row of videos a clip, a column a method."""
    if not frames:
        return ""
    rows = []
    for i, clip in enumerate(comparison["methods"][DENSE]["clips"][: len(frames[DENSE])]):
        row = [
            f'<figure><video src="{_data_url(videos[i], fps)}" loop muted playsinline></video>'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, videos in frames.items()
            if i < len(videos)
        ]
        told = html.escape(f"{clip['prompt']}, seed {clip['seed']}")
        rows.append(f"<p>{told}</p><div>{''.join(row)}</div>")
    button = '<button id="together">Play together from the start</button>'
    return f"<h2>Videos</h2>{button}{''.join(rows)}"


def _data_url(video: UInt8[np.ndarray, "F Y X 3"], fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = write_video(Path(folder) / "clip.mp4", video, fps=fps)
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def _table(comparison: dict[str, Any]) -> str:
    """A row a method: mean ± standard deviation over clips."""
    methods = comparison["methods"]
    kept = [
        name for name in METRICS if any(m.get("metrics", {}).get(name) for m in methods.values())
    ]
    heads = ["method", *(HEADS[name] for name in kept)]
    heads += ["density", "s a step", "s a run", "speed-up", "attention's share", "planning"]
    rows = "".join(_row(name, method, kept, len(heads)) for name, method in methods.items())
    told = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    note = (
        "Mean ± standard deviation over clips. Density: exact share of the key blocks in sparse "
        "steps. Seconds: without compilation. Planning: scores and selection, as a share of the "
        "method's attention."
    )
    return f'<div class="scroll"><table><tr>{told}</tr>{rows}</table></div><p>{note}</p>'


def _row(name: str, method: dict[str, Any], kept: list[str], width: int) -> str:
    first = f"<td>{html.escape(name)}</td>"
    if "failure" in method:
        reason = html.escape(method["failure"])
        return f'<tr>{first}<td class="failed" colspan="{width - 1}">failed: {reason}</td></tr>'
    cells = [_spread(method["metrics"][metric]) for metric in kept]
    seconds = method["seconds"]
    cells += [
        density_told(method),
        f"{seconds['step']:.3f}",
        f"{seconds['run']:.2f}" + (" with compilation" if seconds["includes_compilation"] else ""),
        f"{method['speedup']:.2f}x",
        f"{100 * method['attention_share']:.0f} %",
        _planning(seconds),
    ]
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def density_told(method: dict[str, Any]) -> str:
    """The density of sparse steps, and the one asked for where that is off by over a tenth."""
    real, asked = method["density"]["sparse"], method["parameters"].get("density")
    if asked is None or abs(real - asked) <= 0.1 * asked:
        return f"{real:.3f}"
    return f"{real:.3f}, not {asked:g}"


def _planning(seconds: dict[str, Any]) -> str:
    plan = seconds.get("planning of a layer")
    return "" if plan is None else f"{100 * plan / seconds['attention of a layer']:.0f} %"


def _spread(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.4g} ± {value['std']:.2g}"


def _has_check(comparison: dict[str, Any]) -> bool:
    return any(method.get("check") for method in comparison["methods"].values())


def _checks(comparison: dict[str, Any]) -> str:
    """Share of clips that show what was asked for."""
    methods = {n: m["check"] for n, m in comparison["methods"].items() if m.get("check")}
    heads = [(kind, name) for kind, table in methods[DENSE].items() for name in table]
    told = "".join(f"<th>{html.escape(f'{kind}: {name}')}</th>" for kind, name in heads)
    rows = ""
    for method, table in methods.items():
        cells = "".join(f"<td>{table[kind][name]:.2f}</td>" for kind, name in heads)
        rows += f"<tr><td>{html.escape(method)}</td>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th>method</th>{told}</tr>{rows}</table></div>'


def _curves(comparison: dict[str, Any]) -> str:
    """Density and error of the latents by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, method in comparison["methods"].items():
        if "failure" in method or name == DENSE:
            continue
        left.plot(np.mean(method["density"]["by_step_and_layer"], axis=1), label=name)
        right.plot(method["error_by_step"], label=name)
    left.set(xlabel="step", ylabel="density, mean over layers", ylim=(0, 1.05))
    right.set(xlabel="step", ylabel="relative error of the latents")
    if right.lines:
        right.legend(fontsize="small")
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _masks(masks: dict[str, UInt8[np.ndarray, "I J 3"]]) -> str:
    if not masks:
        return ""
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="{_png_url(picture)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in masks.items()
    )
    told = "Rows are query blocks, columns key blocks; dark is attention mass, or exact."
    return f"<h2>Blocks</h2><p>{told}</p>{figures}"


def _png_url(picture: UInt8[np.ndarray, "I J 3"]) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
