"""What can be asked of a checkpoint: its card, read without its weights, and checked settings."""

import dataclasses
import json
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pasa_jax.calibration import CurveKey
from pasa_jax.grid import TokenGrid
from pasa_jax.models.wan import ROPE_POSITIONS, WanConfig
from pasa_jax.policies import Policy
from pasa_jax.sampling import check_schedule


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run samples.

    Attributes:
        steps: denoising steps.
        shift: timestep shift, see `sampling.make_schedule`.
        guidance: weight of classifier-free guidance, 0 to 1000; 1 runs without the second branch.
        sampler: "unipc" or "euler".
        frames: video frames.
        width, height: of the video, pixels.
    """

    steps: int
    shift: float
    guidance: float
    sampler: str
    frames: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Card:
    """A checkpoint's facts, without its weights.

    Attributes:
        name: in messages.
        folder: the converted checkpoint; for `tiny` the shipped one.
        config: the transformer's architecture.
        weights: digest of the transformer's files, which tells apart models of one name.
        cell: frames, rows and columns of the video that one latent cell holds.
        causal: the first frame has a latent frame of its own, as in Wan's VAE.
        scenes: the model is tiny, whose prompts have a grammar and whose videos can be checked.
        has_text: a text encoder is there; otherwise prompts come as states.
        has_video: a decoder is there; otherwise a run ends in latents.
        fps: frames a second of the written video.
        defaults: settings where none are asked for.
    """

    name: str
    folder: Path
    config: WanConfig
    weights: str
    cell: tuple[int, int, int]
    causal: bool
    scenes: bool
    has_text: bool
    has_video: bool
    fps: float
    defaults: Settings

    def settings(self, **asked) -> Settings:
        """The defaults with what was asked for in their place.

        Args:
            asked: fields of `Settings`; None keeps the default.

        Raises:
            ValueError: a value out of range, or a size or frame count that no grid of latents
                holds; the message names the nearest that one does.
        """
        asked = {key: value for key, value in asked.items() if value is not None}
        settings = dataclasses.replace(self.defaults, **asked)
        check_schedule(settings.sampler, settings.steps, settings.shift)
        if not 0 <= settings.guidance <= 1000:
            raise ValueError(
                f"guidance={settings.guidance} must be from 0 to 1000; 1 means no guidance"
            )
        self.grid(settings)
        return settings

    def grid(self, settings: Settings) -> TokenGrid:
        """The transformer's tokens.

        Raises:
            ValueError: a size that no grid holds; the message names the nearest that one does.
        """
        grid = TokenGrid.for_video(
            settings.frames,
            settings.height,
            settings.width,
            strides=self.cell,
            patch=self.config.patch,
            first_frame_alone=self.causal,
        )
        for name, count in zip(("frames", "rows", "columns"), grid.sizes, strict=True):
            if count > ROPE_POSITIONS:
                raise ValueError(
                    f"{name}={count} tokens must be at most {ROPE_POSITIONS}: ask for a smaller "
                    f"video than {settings.width}x{settings.height}, {settings.frames} frames"
                )
        return grid

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """F, Y, X, C of one video's latents."""
        tokens = self.grid(settings).sizes
        sizes = (n * p for n, p in zip(tokens, self.config.patch, strict=True))
        return *sizes, self.config.in_channels

    def curve_key(self, settings: Settings) -> CurveKey:
        """What a velocity curve must have been recorded for."""
        s = settings
        model = f"{'tiny' if self.scenes else 'wan'}@{self.weights}"
        return CurveKey(model, self.grid(s), s.steps, s.sampler, s.shift, s.guidance)

    def block(self, settings: Settings) -> int:
        """Tokens a block where none is asked for: 64 as published, 16 below 4,096 tokens."""
        tokens = self.grid(settings).num_tokens
        return 64 if tokens >= 4096 else min(16, tokens)


def check_policy(policy: Policy, card: Card, settings: Settings, curve: Any) -> None:
    """Raises ValueError for layers the model lacks, or records of other settings or not read.

    Args:
        policy: attention method.
        card: of the model.
        settings: of the run.
        curve: `VelocityCurve`, or None.
    """
    depth = card.config.num_layers
    if any(layer >= depth for layer in policy.dense_layers):
        raise ValueError(
            f"dense_layers={policy.dense_layers} must be below {depth}, the layers of {card.name}"
        )
    policy.check_setting(card.curve_key(settings))
    if curve is None:
        return
    if not policy.reads_curve:
        raise ValueError(f"curve must be left out: {policy} does not read one")
    curve.check(card.curve_key(settings))


def check_prompts(prompts: list[str]) -> None:
    """Raises ValueError for no prompts at all or an empty one."""
    if not prompts:
        raise ValueError(f"{prompts=} must hold at least one prompt")
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"{prompt=} must hold at least one word")


def check_seeds(seeds: list[int]) -> None:
    """Raises ValueError for no seed at all, or one that is no unsigned 32-bit number."""
    if not seeds:
        raise ValueError(f"{seeds=} must hold at least one seed")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{seed=} must be from 0 to {2**32 - 1}")


def read_card(model: str | Path) -> Card:
    """The card of "tiny", or of a folder with a checkpoint; reads no weights.

    Args:
        model: "tiny", a folder that `pasa-jax convert` wrote, or anything it takes as its source.

    Raises:
        ValueError: none of these; the message says what is wrong.
    """
    from pasa_jax.models import tiny

    folder = tiny.WEIGHTS if str(model) == "tiny" else Path(model)
    if not str(model) or not folder.exists():
        raise ValueError(f"model={str(model)!r} must be 'tiny' or an existing folder")
    codec = folder / "vae" / "config.json"
    if codec.is_file() and "TinyCodec" in codec.read_text():
        return _tiny_card(folder)
    return _wan_card(folder)


def _tiny_card(folder: Path) -> Card:
    config, weights = _read_config(folder / "transformer")
    steps = _read_number(folder / "model_index.json", "num_inference_steps", int)
    guidance = _read_number(folder / "model_index.json", "guidance_scale", float)
    shift = _read_number(folder / "scheduler" / "scheduler_config.json", "flow_shift", float)
    defaults = Settings(steps, shift, guidance, "unipc", 16, 128, 128)
    return Card(
        name="tiny",
        folder=folder,
        config=config,
        weights=weights,
        cell=(4, 4, 4),
        causal=False,
        scenes=True,
        has_text=True,
        has_video=True,
        fps=8.0,
        defaults=defaults,
    )


def _read_number(file: Path, key: str, kind: type) -> Any:
    """A number from a JSON file of tiny's folder."""
    try:
        value = json.loads(file.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} must be JSON with a number {key!r}: {error}") from error
    if type(value) is not kind:
        raise ValueError(f"{str(file)!r} has {key}={value!r}, must be of type {kind.__name__}")
    return value


def _wan_card(folder: Path) -> Card:
    """Defaults are those the published code recommends for the two sizes; the folder's shift."""
    from pasa_jax.convert import find_parts

    try:
        parts = find_parts(folder) if folder.is_dir() else None
    except ValueError as error:
        raise ValueError(f"model={str(folder)!r}: {error}") from error
    config, weights = _read_config(folder if parts is None else parts.paths["transformer"])
    if config.dim <= WanConfig.t2v_1_3b().dim:
        defaults = Settings(50, 8.0, 6.0, "unipc", 81, 832, 480)
    else:
        defaults = Settings(50, 5.0, 5.0, "unipc", 81, 1280, 720)
    if parts is not None and parts.shift is not None:
        defaults = dataclasses.replace(defaults, shift=parts.shift)
    missing = ("text_encoder", "tokenizer", "vae") if parts is None else parts.missing
    return Card(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        weights=weights,
        cell=(4, 8, 8),
        causal=True,
        scenes=False,
        has_text=not {"text_encoder", "tokenizer"} & set(missing),
        has_video="vae" not in missing,
        fps=16.0,
        defaults=defaults,
    )


def _read_config(folder: Path) -> tuple[WanConfig, str]:
    """Architecture, and digest of the weights."""
    from pasa_jax.convert.checkpoint import peek

    try:
        found = peek(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model={str(folder)!r} must be a checkpoint of Wan: {error}") from error
    if not isinstance(found.config, WanConfig):
        raise ValueError(f"model={str(folder)!r} holds no transformer of Wan: {found.config}")
    return found.config, found.digest


# What damaged or hostile array files make numpy raise.
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_states(path: str | Path, config: WanConfig) -> Float[np.ndarray, "E D"]:
    """A prompt's text states from .npy, .npz or .safetensors holding one array.

    Args:
        path: the file; nothing in it is executed.
        config: its width and number of text tokens are checked.

    Returns:
        f32 states.

    Raises:
        ValueError: no such file, another kind of file, not one array of finite numbers [E, D].
    """
    path = Path(path)
    try:
        arrays = _read_arrays(path)
    except READ_ERRORS as error:
        raise ValueError(f"prompt states {str(path)!r} could not be read: {error}") from error
    if len(arrays) != 1 or not isinstance(arrays[0], np.ndarray):
        raise ValueError(f"prompt states {str(path)!r} hold {len(arrays)} arrays, must be one")
    (states,) = arrays
    rule = f"at most {config.text_len} tokens of width {config.text_dim}"
    fits = states.ndim == 2 and 0 < states.shape[0] <= config.text_len
    if not fits or states.shape[1] != config.text_dim:
        raise ValueError(f"prompt states {str(path)!r} have shape {states.shape}, must be {rule}")
    if states.dtype.kind not in "fV" or not np.isfinite(states.astype(np.float32)).all():
        raise ValueError(f"prompt states {str(path)!r} must be finite floating-point numbers")
    return states.astype(np.float32)


def _read_arrays(path: Path) -> list[np.ndarray]:
    if path.suffix == ".npy":
        # Mapped, so that a header cannot ask for more memory than the file has bytes.
        return [np.load(path, mmap_mode="r", allow_pickle=False)]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in file.files]
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return list(load_file(path).values())
        except SafetensorError as error:
            raise ValueError(error) from error
    raise ValueError("it must end in .npy, .npz or .safetensors")
