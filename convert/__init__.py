"""PyTorch checkpoints to Flax parameters: one table of rules a model, one reader, one writer."""

if __name__ != "pasa_jax.convert":
    raise ImportError("import it as pasa_jax.convert, or its types exist twice")

from pasa_jax.convert.checkpoint import (
    Conversion,
    convert_checkpoint,
    export_diffusers,
    load_model,
)
from pasa_jax.convert.pipeline import PipelineConversion, convert_pipeline, find_parts

__all__ = [
    "Conversion",
    "PipelineConversion",
    "convert_checkpoint",
    "convert_pipeline",
    "export_diffusers",
    "find_parts",
    "load_model",
]
