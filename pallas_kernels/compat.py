"""What differs between the JAX versions that the Hopper kernel and its tests run on."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_NEW = jax.__version_info__ >= (0, 11)
# Simulated copies fill with zeros beyond an array's end, and store nothing there, as the chip's do.
SIMULATES_ENDS = _NEW
# `detect_races` does something: it raises.
FINDS_RACES = _NEW


def load(ref: Any, layout: Any) -> Any:
    """`plgpu.load` of a whole reference."""
    index = () if _NEW else ((),)
    return plgpu.load(ref, *index, layout=layout)


def interpret_gpu(**options: Any) -> Any:
    """What a Mosaic GPU kernel takes as `interpret` to run on a CPU."""
    if _NEW:
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)


def reset_interpreter() -> None:
    """Makes the simulation usable again after a kernel raised in it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()
