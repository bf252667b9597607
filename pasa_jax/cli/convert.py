"""pasa-jax convert."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from pasa_jax.cli.parsing import of, parse, refusing


@dataclasses.dataclass(frozen=True)
class Convert:
    """Options of `pasa-jax convert`.

    Attributes:
        src: a folder in diffusers or original layout, or one file of weights.
        dst: the folder to write, absent or empty.
        dtype: float32, bfloat16 or float16, of the parameters that may be rounded.
        dry_run: say what would happen; nothing is written.
        progress: show a bar of bytes and seconds.
    """

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    dtype: Annotated[str | None, of("NAME", "(default: the source's)")] = None
    dry_run: bool = False
    progress: bool = True


def convert(argv: list[str]) -> None:
    """pasa-jax convert: PyTorch to Flax."""
    about = "Converts a PyTorch checkpoint of Wan 2.1 to an Orbax checkpoint."
    options = parse(Convert, "convert", argv, about)
    with refusing("pasa-jax convert", OSError, ImportError):
        from pasa_jax.convert import convert_checkpoint, convert_pipeline, find_parts

        whole = options.src.is_dir() and find_parts(options.src) is not None
        (convert_pipeline if whole else convert_checkpoint)(
            options.src,
            options.dst,
            dtype=options.dtype,
            dry_run=options.dry_run,
            progress=options.progress,
        )
