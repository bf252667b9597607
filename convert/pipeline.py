"""Whole pipelines: which parts a folder has, and all of them converted in one call."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from pasa_jax.convert.checkpoint import (
    Conversion,
    byte_bar,
    check_target,
    is_converted,
    plan_conversion,
    write_conversion,
)
from pasa_jax.convert.reader import STEM, SUFFIXES, read_json
from pasa_jax.convert.writer import partial_folder

INDEX = "pipeline.json"
FORMAT = "pasa-jax pipeline 1"
DIFFUSERS_INDEX = "model_index.json"
FAMILIES = {"WanPipeline": "Wan"}  # by diffusers' name
MODELS = ("transformer", "vae", "text_encoder")
PARTS = (*MODELS, "tokenizer")
# What a pipeline without the part still does.
WITHOUT = {
    "vae": "runs end in latents",
    "text_encoder": "prompts must come as states",
    "tokenizer": "prompts must come as states",
}
# Of the makers' folder, the first that is there.
ORIGINAL_FILES = {
    "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"),
    "text_encoder": (
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ),
    "tokenizer": ("google/umt5-xxl",),
}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A pipeline's folder as found.

    Attributes:
        family: "Wan".
        layout: "diffusers", "original", or "pasa-jax" of a converted one.
        paths: folder or file of each part of `PARTS` that is there.
        shift: the timestep shift that the folder's sampler asks for; None where none says.
    """

    family: str
    layout: str
    paths: dict[str, Path]
    shift: float | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that are not there."""
        return tuple(name for name in PARTS if name not in self.paths)

    def lacks(self) -> list[str]:
        """A line for each missing part: what does without it."""
        return [f"no {name}: {WITHOUT[name]}" for name in self.missing]


@dataclasses.dataclass(frozen=True)
class PipelineConversion:
    """What a conversion of a pipeline does, known from the headers alone.

    Attributes:
        source: the pipeline's folder.
        parts: what is there.
        models: the conversion of each of its models.
    """

    source: Path
    parts: Parts
    models: dict[str, Conversion]

    @property
    def read_bytes(self) -> int:
        return sum(plan.read_bytes for plan in self.models.values())

    @property
    def written_bytes(self) -> int:
        return sum(plan.written_bytes for plan in self.models.values())

    def __str__(self) -> str:
        head = f"{self.source}: {self.parts.family} pipeline in {self.parts.layout} layout"
        return "\n".join([head, *map(str, self.models.values()), *self.parts.lacks()])


def find_parts(folder: Path) -> Parts | None:
    """The parts of a pipeline's folder; None where the folder is no pipeline.

    Raises:
        ValueError: a pipeline of another kind, or one without a transformer.
    """
    if (folder / INDEX).is_file():
        return converted_parts(folder)
    if (folder / DIFFUSERS_INDEX).is_file():
        return diffusers_parts(folder)
    paths = {
        name: next((folder / file for file in files if (folder / file).exists()), None)
        for name, files in ORIGINAL_FILES.items()
    }
    paths = {name: path for name, path in paths.items() if path is not None}
    if not paths or not any(folder.glob(f"{STEM}*")):
        return None
    return Parts("Wan", "original", {"transformer": folder, **paths})


def converted_parts(folder: Path) -> Parts:
    """The parts of a folder that `convert_pipeline` wrote."""
    index = read_json(folder / INDEX)
    shift = index.get("shift")
    if index.get("format") != FORMAT or index.get("family") not in FAMILIES.values():
        raise ValueError(f"{str(folder / INDEX)!r} must hold format={FORMAT!r} and a known family")
    if shift is not None and not (type(shift) is float and 0 < shift < 1e6):
        raise ValueError(f"{str(folder / INDEX)!r} has {shift=}, must be a number above 0")
    return Parts(index["family"], "pasa-jax", present(folder), shift)


def diffusers_parts(folder: Path) -> Parts:
    """The parts of diffusers' folder."""
    name = read_json(folder / DIFFUSERS_INDEX).get("_class_name")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{str(folder)!r} is a pipeline {name!r}, must be one of {known}")
    if (folder / "transformer_2").is_dir():
        raise ValueError(f"{str(folder)!r} has a transformer_2: Wan 2.2's two experts are not here")
    file = folder / "scheduler" / "scheduler_config.json"
    shift = read_shift(file) if file.is_file() else None
    return Parts(FAMILIES[name], "diffusers", present(folder), shift)


def read_shift(file: Path) -> float:
    """The timestep shift of a scheduler's file."""
    scheduler = read_json(file)
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if type(shift) not in (int, float) or not 0 < shift < 1e6:
        raise ValueError(f"{str(file)!r} has flow_shift={shift!r}, must be a number above 0")
    return float(shift)


def present(folder: Path) -> dict[str, Path]:
    """The parts that a folder has in folders of their names."""
    paths = {name: folder / name for name in PARTS if has_files(folder / name)}
    if "transformer" not in paths:
        raise ValueError(f"{str(folder)!r} has no transformer/ with weights: nothing can run")
    return paths


def has_files(folder: Path) -> bool:
    """Whether a part's folder has what it is for: weights, or a tokenizer's file."""
    if not folder.is_dir():
        return False
    if is_converted(folder) or any((folder / file).is_file() for file in TOKENIZER_FILES):
        return True
    return any(file.suffix in SUFFIXES for file in folder.iterdir())


def convert_pipeline(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Any = None,
    dry_run: bool = False,
    progress: bool = True,
) -> PipelineConversion:
    """Converts a whole pipeline of PyTorch: transformer, autoencoder, text encoder, tokenizer.

    Args:
        src: a folder in diffusers layout, or in the makers' own.
        dst: the folder to write, absent or empty.
        dtype: of transformer and text encoder, as for `convert_checkpoint`; the autoencoder keeps
            its own, which the originals run in float32.
        dry_run: only say what would happen, from the headers.
        progress: print what happens, and a bar of bytes read and seconds.

    Returns:
        What was or would be done; parts that are missing are told and left out.

    Raises:
        As `convert_checkpoint`; ValueError also for a folder that is no pipeline.
    """
    source, target = Path(src).expanduser(), Path(dst).expanduser().resolve()
    parts = find_parts(source)
    if parts is None or parts.layout == "pasa-jax":
        raise ValueError(f"{str(source)!r} must be a pipeline's folder of PyTorch")
    models = {
        name: plan_conversion(parts.paths[name], None if name == "vae" else dtype)
        for name in MODELS
        if name in parts.paths
    }
    check_kinds(source, models)
    plan = PipelineConversion(source, parts, models)
    check_target(target, plan.written_bytes)
    if progress:
        print(plan, f"\n→ {target}" + (" (dry run: nothing written)" if dry_run else ""), sep="")
    if not dry_run:
        with byte_bar(plan.read_bytes, "converting", progress) as bar:
            write_pipeline(target, plan, bar.update)
    return plan


def check_kinds(source: Path, models: dict[str, Conversion]) -> None:
    """Refuses a part that holds another kind of model, or one that does not fit the transformer."""
    for name, kind in (("transformer", "Wan"), ("vae", "WanVAE"), ("text_encoder", "T5Encoder")):
        if name in models and models[name].component.name != kind:
            found = models[name].component.name
            raise ValueError(f"{str(source)!r} has {found} as its {name}, must be {kind}")
    transformer = models["transformer"].config
    if "vae" in models and models["vae"].config.latent_channels != transformer.in_channels:
        raise ValueError(
            f"{str(source)!r} has a vae of {models['vae'].config.latent_channels} latent channels, "
            f"must be the transformer's {transformer.in_channels}"
        )
    if "text_encoder" in models and models["text_encoder"].config.dim != transformer.text_dim:
        raise ValueError(
            f"{str(source)!r} has a text_encoder of width {models['text_encoder'].config.dim}, "
            f"must be the transformer's {transformer.text_dim}"
        )


def write_pipeline(target: Path, plan: PipelineConversion, on_read: Any) -> None:
    """Writes all parts and the index; on any failure there is nothing."""
    index = {"format": FORMAT, "family": plan.parts.family, "layout": plan.parts.layout}
    with partial_folder(target) as partial:
        for name, model in plan.models.items():
            write_conversion(partial / name, model, on_read)
        if "tokenizer" in plan.parts.paths:
            (partial / "tokenizer").mkdir()
            for file in TOKENIZER_FILES:
                if (plan.parts.paths["tokenizer"] / file).is_file():
                    shutil.copyfile(
                        plan.parts.paths["tokenizer"] / file, partial / "tokenizer" / file
                    )
        text = json.dumps(index | {"shift": plan.parts.shift}, indent=2)
        (partial / INDEX).write_text(text + "\n")
