"""The world `tiny` knows: its words, its grammar, and the videos they stand for.

Two kinds of scene, in a fixed order of words:
    drifting   blue and white waves moving left
    shapes     a red circle moving right on a green background

Motion is 2 px a frame, that is one token (8 px) per latent frame (4 frames), so that one latent
frame is the frame before it moved by one token; only the phase of a texture, and the place of a
shape, are random. Count is always one.
"""

import dataclasses
import difflib
import math
import zlib

import numpy as np
from jaxtyping import Float

COLOURS = {
    "black": (0.05, 0.05, 0.05),
    "white": (0.95, 0.95, 0.95),
    "red": (0.95, 0.05, 0.05),
    "green": (0.05, 0.95, 0.05),
    "blue": (0.05, 0.05, 0.95),
    "yellow": (0.95, 0.95, 0.05),
    "cyan": (0.05, 0.95, 0.95),
    "magenta": (0.95, 0.05, 0.95),
}
TEXTURES = ("waves", "stripes", "clouds")
SHAPES = ("circle", "square", "triangle")
# Unit steps in (rows, columns); rows grow downwards.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
WORDS = (("a", "and", "moving", "on", "background") + tuple(COLOURS) + TEXTURES + SHAPES) + tuple(
    DIRECTIONS
)

SPEED = 2.0  # px per frame
WAVELENGTH = {"waves": 32.0, "stripes": 24.0, "clouds": 32.0}  # px
RADIUS = 16.0  # px, of the circle; square and triangle have its area
SOFTNESS = 2.0  # px over which an edge fades
_GRAMMAR = (
    "'COLOUR and COLOUR waves|stripes|clouds moving DIRECTION' or "
    "'a COLOUR circle|square|triangle moving DIRECTION on a COLOUR background'"
)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a prompt asks for.

    Attributes:
        motif: one of TEXTURES or SHAPES.
        colours: names of two different colours; (shape, background) for shapes, in any order for
            textures.
        direction: one of DIRECTIONS.
    """

    motif: str
    colours: tuple[str, str]
    direction: str

    @property
    def drifting(self) -> bool:
        """Whether a texture fills the frame; otherwise one shape moves on a still background."""
        return self.motif in TEXTURES

    @property
    def prompt(self) -> str:
        """The scene in words; `parse` reads it back."""
        first, second = self.colours
        if self.drifting:
            return f"{first} and {second} {self.motif} moving {self.direction}"
        return f"a {first} {self.motif} moving {self.direction} on a {second} background"

    @property
    def held_out(self) -> bool:
        """Whether this combination (about one in ten) is kept out of training."""
        colours = sorted(self.colours) if self.drifting else self.colours
        key = "-".join((self.motif, *colours, self.direction))
        return zlib.crc32(key.encode()) % 10 == 0


def tokenize(prompt: str) -> list[str]:
    """The prompt's words, lower case, commas and full stops dropped.

    Raises:
        ValueError: a word is not one of WORDS; the message names the nearest.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    for word in words:
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{word=} of {prompt=} must be one of tiny's words; nearest: {near!r}")
    return words


def parse(prompt: str) -> Scene:
    """Reads a prompt.

    Raises:
        ValueError: an unknown word, an order of words outside the grammar, or equal colours.
    """
    match tokenize(prompt):
        case [first, "and", second, motif, "moving", direction] if motif in TEXTURES:
            pass
        case ["a", first, motif, "moving", direction, "on", "a", second, "background"] if (
            motif in SHAPES
        ):
            pass
        case _:
            raise ValueError(f"{prompt=} must read {_GRAMMAR}")
    if first not in COLOURS or second not in COLOURS or direction not in DIRECTIONS:
        raise ValueError(f"{prompt=} must read {_GRAMMAR}")
    if first == second:
        raise ValueError(f"{prompt=} must name two different colours")
    return Scene(motif, (first, second), direction)


def random_scene(rng: np.random.Generator, *, held_out: bool | None = False) -> Scene:
    """Draws a scene; textures and shapes are equally likely.

    Args:
        rng: the source of chance.
        held_out: False draws only combinations used in training, True only the others, None both.
    """
    while True:
        motif = str(rng.choice(TEXTURES + SHAPES))
        first, second = rng.choice(list(COLOURS), 2, replace=False)
        scene = Scene(motif, (str(first), str(second)), str(rng.choice(list(DIRECTIONS))))
        if held_out is None or scene.held_out == held_out:
            return scene


def render(
    scene: Scene, frames: int, height: int, width: int, seed: int
) -> Float[np.ndarray, "frames height width 3"]:
    """The video a scene stands for, one of many: `seed` draws its phase or its place.

    Args:
        scene: what to show.
        frames, height, width: the video's size, in frames and pixels.
        seed: same seed, same video.

    Returns:
        float32 RGB in 0..1.

    Raises:
        ValueError: a shape and its path do not fit into the frame.
    """
    rng = np.random.default_rng(seed)
    if scene.drifting:
        mix = _texture(scene, frames, height, width, rng)
    else:
        mix = _moving_shape(scene, frames, height, width, rng)
    first, second = (np.array(COLOURS[name], np.float32) for name in scene.colours)
    return second + mix[..., None] * (first - second)


def _texture(scene, frames, height, width, rng):
    """Share of the first colour, float32 [frames, height, width], of a drifting texture."""
    step_y, step_x = DIRECTIONS[scene.direction]
    frame = np.arange(frames, dtype=np.float32)[:, None, None]
    # Coordinates that move with the texture.
    y = np.arange(height, dtype=np.float32)[:, None] - SPEED * step_y * frame
    x = np.arange(width, dtype=np.float32) - SPEED * step_x * frame
    turn = np.float32(2 * math.pi / WAVELENGTH[scene.motif])
    phases = rng.uniform(0, 2 * math.pi, 3).astype(np.float32)
    if scene.motif == "clouds":
        # Two waves across each other move the pattern as a whole; the diagonal one varies its form.
        form = np.sin(turn * y + phases[0]) + np.sin(turn * x + phases[1])
        form = form + np.sin(turn * (x + y) + phases[2])
        return 0.5 + 0.5 * np.tanh(form)
    along = (y if step_y else x) * turn + phases[0]
    wave = np.sin(along)
    if scene.motif == "stripes":
        wave = np.tanh(2.5 * wave)
    return np.broadcast_to(0.5 + 0.5 * wave, (frames, height, width))


def half_extent(shape: str) -> tuple[float, float, float]:
    """Pixels a shape reaches up, down and to each side of its centre (of mass)."""
    if shape == "circle":
        return RADIUS, RADIUS, RADIUS
    if shape == "square":
        side = RADIUS * math.sqrt(math.pi) / 2
        return side, side, side
    corner = RADIUS * math.sqrt(4 * math.pi / math.sqrt(27))  # centre to corner
    return corner, corner / 2, corner * math.sqrt(3) / 2


def coverage(
    shape: str, y: Float[np.ndarray, "*grid"], x: Float[np.ndarray, "*grid"]
) -> Float[np.ndarray, "*grid"]:
    """Share of a pixel the shape covers, at offsets (y, x) px from its centre."""
    up, down, side = half_extent(shape)
    if shape == "circle":
        outside = np.hypot(y, x) - up
    elif shape == "square":
        outside = np.maximum(np.abs(y), np.abs(x)) - side
    else:
        slanted = (np.abs(x) * math.sqrt(3) - y) / 2 - down
        outside = np.maximum(y - down, slanted)
    return np.clip(0.5 - outside / SOFTNESS, 0.0, 1.0)


def _moving_shape(scene, frames, height, width, rng):
    """Share of the shape's colour, float32 [frames, height, width]; the path stays inside."""
    step_y, step_x = DIRECTIONS[scene.direction]
    up, down, side = half_extent(scene.motif)
    path = SPEED * (frames - 1)
    start_y = _start(height, up, down, path * step_y, rng)
    start_x = _start(width, side, side, path * step_x, rng)
    frame = np.arange(frames)[:, None, None]
    y = np.arange(height)[:, None] - start_y - SPEED * step_y * frame
    x = np.arange(width) - start_x - SPEED * step_x * frame
    y, x = np.broadcast_arrays(y, x)
    return coverage(scene.motif, y, x).astype(np.float32)


def _start(size, before, after, path, rng):
    """Draws a start coordinate such that the whole path stays inside `size` pixels."""
    low = before + max(0.0, -path)
    high = size - 1 - after - max(0.0, path)
    if high < low:
        raise ValueError(f"{size=} px must be at least {math.ceil(size + low - high)} to hold it")
    return rng.uniform(low, high)
