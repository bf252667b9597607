"""Attention methods, one a file.

To add one: copy `pisa.py` to `policies/<name>.py`, make it a frozen dataclass of the method's
parameters with the methods of `base.Policy` (its `plan` says which key blocks are exact and what
stands for the rest), add it to `POLICIES` below, and its name works in `make_policy`, in
`tests/pasa_jax/test_policies.py` (which checks every entry) and on the command line. How blocks are
chosen from scores is `pasa_jax.routing`; how a budget is shared over steps is `pasa_jax.budget`.
"""

import dataclasses
import difflib
from typing import Any

from pasa_jax.policies.adaspa import AdaSpa
from pasa_jax.policies.base import AttentionShape, Context, Plan, Policy, Rectification
from pasa_jax.policies.compact import Compact, CompactMasks
from pasa_jax.policies.dense import Dense
from pasa_jax.policies.paro import Paro, ParoMasks
from pasa_jax.policies.pasa import Pasa
from pasa_jax.policies.pisa import Pisa
from pasa_jax.policies.radial import Radial
from pasa_jax.policies.rectified import Rectified
from pasa_jax.policies.sliding_tile import SlidingTile
from pasa_jax.policies.sparge import Sparge
from pasa_jax.policies.sparse_vdit import HeadPatterns, SparseVdit
from pasa_jax.policies.svg import Svg

POLICIES: dict[str, type] = {
    "dense": Dense,
    "pisa": Pisa,
    "pasa": Pasa,
    "adaspa": AdaSpa,
    "compact": Compact,
    "rectified": Rectified,
    "sliding_tile": SlidingTile,
    "radial": Radial,
    "sparge": Sparge,
    "sparse_vdit": SparseVdit,
    "svg": Svg,
    "paro": Paro,
}

__all__ = [
    "POLICIES",
    "AdaSpa",
    "AttentionShape",
    "Compact",
    "CompactMasks",
    "Context",
    "Dense",
    "HeadPatterns",
    "Paro",
    "ParoMasks",
    "Pasa",
    "Pisa",
    "Plan",
    "Policy",
    "Radial",
    "Rectification",
    "Rectified",
    "SlidingTile",
    "Sparge",
    "SparseVdit",
    "Svg",
    "make_policy",
]


def make_policy(name: str, **parameters: Any) -> Policy:
    """The policy of that name.

    Args:
        name: a key of `POLICIES`.
        parameters: fields of its class; the others keep their defaults.

    Raises:
        ValueError: unknown name or parameter (with the nearest valid one), or a bad value.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} must be one of {_choices(name, list(POLICIES))}")
    fields = [field.name for field in dataclasses.fields(POLICIES[name])]
    for parameter in parameters:
        if parameter not in fields:
            raise ValueError(
                f"{name} parameter {parameter!r} must be one of {_choices(parameter, fields)}"
            )
    return POLICIES[name](**parameters)


def _choices(value: str, valid: list[str]) -> str:
    """The valid names, and the nearest to `value` where one is near."""
    near = difflib.get_close_matches(value.lower(), valid, 1)
    return ", ".join(valid) + (f"; nearest is {near[0]!r}" if near else "")
