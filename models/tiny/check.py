"""Does the video show what the prompt asked for? Measured on frames, blind to the prompt.

`read` looks at a video and says which scene it shows, or that it cannot tell; `check` does so for
many prompts and counts, with chance levels and spread. Truth scores 1, noise is unreadable.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pasa_jax.models.tiny import scenes

LAG = 4  # frames in a latent frame: frames this far apart come from different tokens
MIN_SPEED = 0.5  # px per frame; the scenes move at 2
MIN_AGREEMENT = 0.5  # correlation of two frames after the measured motion
MAX_COLOUR_ERROR = 0.08  # mean squared distance to the two colours' segment
MAX_SHAPE_ERROR = 0.35  # share of the shape's area by which its form differs


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a video shows; None where it cannot be told.

    Attributes:
        drifting: whether a texture fills the frame; otherwise a shape on a background.
        colours: two names; (shape, background) for shapes.
        motif: the texture or shape.
        velocity: (rows, columns) px per frame.
        smoothness: correlation of consecutive frames after the measured motion.
        agreement: the same of frames one latent frame apart.
    """

    drifting: bool
    colours: tuple[str, str] | None
    motif: str | None
    velocity: tuple[float, float]
    smoothness: float
    agreement: float

    @property
    def steady(self) -> bool:
        """Whether frames of different latent frames show one moving picture."""
        return self.agreement >= MIN_AGREEMENT

    @property
    def axis(self) -> int | None:
        """0 for up and down, 1 for left and right; None when slow, slanted or not a motion."""
        speeds = np.abs(self.velocity)
        clear = speeds.max() >= MIN_SPEED and speeds.min() <= 0.5 * speeds.max()
        clear = clear and self.smoothness >= MIN_AGREEMENT
        return int(speeds.argmax()) if clear else None

    @property
    def towards(self) -> str | None:
        """The direction of the motion, steady or not; None where `axis` is."""
        if self.axis is None:
            return None
        sign = 1 if self.velocity[self.axis] > 0 else -1
        step = (sign, 0) if self.axis == 0 else (0, sign)
        return next(name for name, value in scenes.DIRECTIONS.items() if value == step)

    @property
    def direction(self) -> str | None:
        """The direction of motion, where it can be told and the frames agree."""
        return self.towards if self.steady else None


def read(video: Float[np.ndarray, "frames height width 3"]) -> Reading:
    """Reads the scene off a video, RGB in 0..1.

    A video in which most pixels have one palette colour, and many places keep it throughout, shows
    a shape on a background; any other is a texture.
    """
    video = np.asarray(video, np.float32)
    names, palette = list(scenes.COLOURS), np.array(list(scenes.COLOURS.values()), np.float32)
    # 0.45 is half the distance between the nearest two colours.
    member = ((video[..., None, :] - palette) ** 2).sum(-1) < 0.45**2
    background = int(member.mean((0, 1, 2)).argmax())
    here = member[..., background]
    if here.mean() > 0.65 and np.mean(here.mean(0) > 0.9) > 0.4:
        return _read_shape(video, names[background])
    return _read_texture(video)


def _read_texture(video) -> Reading:
    """Reading of a texture: the pair of colours whose segment explains the pixels best."""
    pixels = video.reshape(-1, 3)[:: video.size // 3 // 8192 | 1]  # odd: no column twice
    errors = {}
    for pair in itertools.combinations(scenes.COLOURS, 2):
        share, residual = _along(pixels, pair)
        low, high = np.quantile(share, (0.05, 0.95))
        length = np.sum(np.subtract(*(scenes.COLOURS[name] for name in pair)) ** 2)
        errors[pair] = residual.mean() + length * (low**2 + (1 - high) ** 2)
    pair = min(errors, key=errors.get)
    mix = _along(video, pair)[0]
    velocity = _drift(mix)
    known = errors[pair] < MAX_COLOUR_ERROR
    motif = _texture_name(mix) if known else None
    colours = pair if known else None
    return Reading(True, colours, motif, velocity, *_agreements(mix, velocity))


def _along(pixels, pair):
    """Share of the first colour, and squared distance to the segment between the two colours."""
    first, second = (np.array(scenes.COLOURS[name], np.float32) for name in pair)
    step = first - second
    share = (pixels - second) @ step / (step @ step)
    nearest = second + np.clip(share, 0, 1)[..., None] * step
    return share, ((pixels - nearest) ** 2).sum(-1)


def _texture_name(mix):
    """Clouds vary along both axes, waves and stripes along one, each with its own wavelength."""
    profiles = [mix.mean(axis) for axis in (2, 1)]  # along rows, along columns
    profiles = [profile - profile.mean(1, keepdims=True) for profile in profiles]
    rows, columns = (np.mean(profile**2) for profile in profiles)
    if min(rows, columns) > 0.25 * max(rows, columns):
        return "clouds"
    profile = profiles[int(columns > rows)]
    explained = {name: _power_at(profile, scenes.WAVELENGTH[name]) for name in ("waves", "stripes")}
    best = max(explained, key=explained.get)
    return best if explained[best] > 0.5 else None


def _power_at(profile, wavelength) -> float:
    """Share of the variance that a sine of this wavelength explains, frame by frame."""
    turns = 2 * np.pi * np.arange(profile.shape[1]) / wavelength
    basis = np.stack([np.sin(turns), np.cos(turns), np.ones_like(turns)], 1)
    left = profile.T - basis @ np.linalg.lstsq(basis, profile.T, rcond=None)[0]
    return 1 - float((left**2).sum() / ((profile**2).sum() + 1e-12))


def _drift(mix) -> tuple[float, float]:
    """Motion in px per frame by the phase of the cross-spectrum of consecutive frames.

    The cross-spectra of all pairs are summed first, so frames that do not agree cancel out.
    """
    _, height, width = mix.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    spectra = np.fft.fft2((mix - mix.mean((1, 2), keepdims=True)) * window)
    cross = np.sum(spectra[1:] * spectra[:-1].conj(), 0)
    waves = np.stack(np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"), -1)
    # Only wavelengths of 12 px and more: shorter ones turn by more than half between frames.
    weight = np.abs(cross) * (np.linalg.norm(waves, axis=-1) < 1 / 12)
    phase = -np.angle(cross) / (2 * np.pi)  # moving by d turns wave k by −2π k·d
    normal = np.einsum("yx,yxi,yxj->ij", weight, waves, waves)
    target = np.einsum("yx,yx,yxi->i", weight, phase, waves)
    # The small ridge answers 0 along an axis on which the texture is constant.
    ridge = 0.05 * np.trace(normal) * np.eye(2) + 1e-12 * np.eye(2)
    return tuple(float(v) for v in np.linalg.solve(normal + ridge, target))


def _agreements(mix, velocity) -> tuple[float, float]:
    """Mean correlation of frames 1 and LAG apart, the earlier one moved by the velocity."""
    return _agreement(mix, velocity, 1), _agreement(mix, velocity, LAG)


def _agreement(mix, velocity, lag) -> float:
    """One of `_agreements`."""
    steps = [round(lag * v) for v in velocity]
    moved = np.roll(mix[:-lag], steps, axis=(1, 2))
    # The texture need not wrap round: leave out what rolled in.
    inner = tuple(
        slice(max(s, 0), n + min(s, 0)) for s, n in zip(steps, mix.shape[1:], strict=True)
    )
    pairs = zip(moved[(slice(None), *inner)], mix[lag:][(slice(None), *inner)], strict=True)
    return float(np.mean([_correlation(a, b) for a, b in pairs]))


def _correlation(a, b) -> float:
    """Correlation of two images, 0 when one is flat or nothing is left."""
    if a.size == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 1e-6 else 0.0


def _read_shape(video, background) -> Reading:
    """Reading of a shape on a background: its colour, form and centroid's path."""
    ground = np.array(scenes.COLOURS[background], np.float32)
    away = np.linalg.norm(video - ground, axis=-1)
    inside = away > 0.6
    if inside.mean() < 0.005:
        return Reading(False, None, None, (0.0, 0.0), 0.0, 0.0)
    mean_colour = np.median(video[inside], 0)
    distance = {
        name: float(((mean_colour - value) ** 2).sum())
        for name, value in scenes.COLOURS.items()
        if name != background
    }
    colour = min(distance, key=distance.get)
    known = distance[colour] < 0.25
    mix = np.clip(_along(video, (colour, background))[0], 0, 1)
    mix = np.where(mix > 0.15, mix, 0)
    mass = mix.sum((1, 2))
    if mass.min() < 0.3 * np.median(mass) or mass.min() < 1:
        return Reading(False, (colour, background) if known else None, None, (0.0, 0.0), 0.0, 0.0)
    centres = np.stack([_centroid(frame) for frame in mix])
    velocity = tuple(float(v) for v in np.polyfit(np.arange(len(mix)), centres, 1)[0])
    colours = (colour, background) if known else None
    motif = _shape_name(mix, centres)
    return Reading(False, colours, motif, velocity, *_agreements(mix, velocity))


def _centroid(frame):
    """(row, column) of the mass."""
    y, x = np.indices(frame.shape)
    return (frame * y).sum() / frame.sum(), (frame * x).sum() / frame.sum()


def _shape_name(mix, centres):
    """The shape whose coverage, at equal area, differs least; None when all differ much."""
    errors = dict.fromkeys(scenes.SHAPES, 0.0)
    y, x = np.indices(mix.shape[1:]).astype(np.float64)
    for frame, (row, column) in zip(mix, centres, strict=True):
        scale = math.sqrt(math.pi * scenes.RADIUS**2 / frame.sum())
        for shape in scenes.SHAPES:
            ideal = scenes.coverage(shape, (y - row) * scale, (x - column) * scale)
            errors[shape] += float(np.abs(ideal - frame).sum() / frame.sum()) / len(mix)
    best = min(errors, key=errors.get)
    return best if errors[best] < MAX_SHAPE_ERROR else None


@dataclasses.dataclass(frozen=True)
class Row:
    """One attribute over one kind of scene.

    Attributes:
        kind: "drifting" or "shapes".
        attribute: what was measured.
        readable: share of videos in which it could be told.
        right: share right of all videos.
        error: standard error of `right`.
        right_of_readable: share right of the readable ones; nan when there are none.
        chance: `right` of a guess on readable videos.
        videos: how many.
    """

    kind: str
    attribute: str
    readable: float
    right: float
    error: float
    right_of_readable: float
    chance: float
    videos: int


@dataclasses.dataclass(frozen=True)
class Table:
    """Result of `check`: `rows`, and how it was made in `title`; prints as markdown."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            "| scene | measured | readable | right | right of readable | chance | videos |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            lines.append(
                f"| {row.kind} | {row.attribute} | {row.readable:.2f} | {row.right:.2f} ± "
                f"{row.error:.2f} | {row.right_of_readable:.2f} | {row.chance:.2f} | {row.videos} |"
            )
        return "\n".join(lines)

    def right(self, kind: str, attribute: str) -> float:
        """Share right of one row."""
        return next(r.right for r in self.rows if (r.kind, r.attribute) == (kind, attribute))

    def save(self, path: Path) -> None:
        """Writes the table as JSON."""
        rows = [
            {k: None if v != v else v for k, v in dataclasses.asdict(row).items()}
            for row in self.rows
        ]
        text = json.dumps({"title": self.title, "rows": rows}, indent=1)
        path.write_text(text + "\n")


def prompts(count: int = 160, seed: int = 0, *, held_out: bool | None = None) -> list[str]:
    """Prompts to check on: textures and shapes in turn; held_out as in `random_scene`."""
    rng = np.random.default_rng([seed, 2])
    chosen = []
    while len(chosen) < count:
        scene = scenes.random_scene(rng, held_out=held_out)
        if scene.drifting == (len(chosen) % 2 == 0):
            chosen.append(scene.prompt)
    return chosen


def check(
    generate: Callable[[list[str]], Float[np.ndarray, "B frames height width 3"]],
    asked: list[str],
    *,
    batch: int = 8,
    title: str = "check",
) -> Table:
    """Generates a video for every prompt and counts what is right.

    Args:
        generate: prompts → videos, RGB in 0..1; called with at most `batch` prompts at a time.
        asked: prompts of tiny's grammar; see `prompts`.
        batch: prompts a call.
        title: heads the table.

    Returns:
        The table.

    Raises:
        ValueError: no prompt, or one outside the grammar.
    """
    if not asked:
        raise ValueError(f"{asked=} must hold at least one prompt")
    wanted = [scenes.parse(prompt) for prompt in asked]
    readings = []
    for start in range(0, len(asked), batch):
        videos = np.asarray(generate(asked[start : start + batch]))
        readings += [read(video) for video in videos]
    return tabulate(wanted, readings, title)


def tabulate(wanted: list[scenes.Scene], readings: list[Reading], title: str) -> Table:
    """Counts readings against the scenes they should show."""
    rows = []
    for kind in ("drifting", "shapes"):
        pairs = [
            (scene, reading)
            for scene, reading in zip(wanted, readings, strict=True)
            if scene.drifting == (kind == "drifting")
        ]
        for attribute, chance in _CHANCE[kind].items():
            verdicts = [_ATTRIBUTES[attribute](scene, reading) for scene, reading in pairs]
            if verdicts:
                rows.append(_row(kind, attribute, verdicts, chance))
    return Table(title, tuple(rows))


def _row(kind, attribute, verdicts, chance) -> Row:
    """Counts verdicts: True right, False wrong, None unreadable."""
    n = len(verdicts)
    readable, right = sum(v is not None for v in verdicts), sum(v is True for v in verdicts)
    share = right / n
    error = math.sqrt(share * (1 - share) / n)
    of_readable = right / readable if readable else math.nan
    return Row(kind, attribute, readable / n, share, error, of_readable, chance, n)


def _both_colours(scene, reading):
    if reading.colours is None or reading.drifting != scene.drifting:
        return None
    if scene.drifting:
        return set(reading.colours) == set(scene.colours)
    return reading.colours == scene.colours


def _one_colour(place):
    def verdict(scene, reading):
        known = reading.colours is not None and not reading.drifting
        return reading.colours[place] == scene.colours[place] if known else None

    return verdict


def _motif(scene, reading):
    known = reading.motif is not None and reading.drifting == scene.drifting
    return reading.motif == scene.motif if known else None


def _axis(scene, reading):
    wanted = int(scene.direction in ("left", "right"))
    return None if reading.axis is None else reading.axis == wanted


def _sign(scene, reading):
    """Sign of the motion where the axis is right; otherwise unreadable."""
    return reading.towards == scene.direction if _axis(scene, reading) else None


def _steady(scene, reading):
    return reading.steady


def _direction(scene, reading):
    return None if reading.direction is None else reading.direction == scene.direction


def _together(*verdicts):
    """Right when all are; unreadable when one is."""

    def verdict(scene, reading):
        found = [v(scene, reading) for v in verdicts]
        return None if None in found else all(found)

    return verdict


_ATTRIBUTES = {
    "both colours": _both_colours,
    "shape's colour": _one_colour(0),
    "background": _one_colour(1),
    "texture": _motif,
    "shape": _motif,
    "axis": _axis,
    "sign on the right axis": _sign,
    "frames agree": _steady,
    "direction": _direction,
    "colours and direction": _together(_both_colours, _direction),
    "colour, direction and shape": _together(_both_colours, _direction, _motif),
}
_CHANCE = {
    "drifting": {
        "both colours": 1 / 28,
        "texture": 1 / 3,
        "axis": 1 / 2,
        "sign on the right axis": 1 / 2,
        "frames agree": 0.0,
        "direction": 1 / 4,
        "colours and direction": 1 / 112,
    },
    "shapes": {
        "shape's colour": 1 / 8,
        "background": 1 / 8,
        "shape": 1 / 3,
        "axis": 1 / 2,
        "sign on the right axis": 1 / 2,
        "frames agree": 0.0,
        "direction": 1 / 4,
        "colour, direction and shape": 1 / 672,
    },
}
