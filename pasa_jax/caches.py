"""Step caches: denoising steps that reuse the transformer's last residual instead of its blocks.

A skipped step runs the patch embedding and the head alone; between them the last computed step's
residual, the blocks' output minus their input, is added. So caches work with any policy: no
attention runs in a skipped step, the policy's state waits, and the budget k_t of the step, which
the true step indexes, is not spent and not shared out among the others.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pasa_jax.models.wan import WanConfig
from pasa_jax.policies.base import check_share, dense_prefix_steps

SKIP = "skip"  # the mode of a skipped step
# A policy's other modes make what later steps reuse, and must run.
SKIPPABLE = ("dense", "sparse")
RETAINED = 5  # steps that TeaCache's retention variant computes first

# Time embedding [steps, D] and the blocks' modulation [steps, 6, D] of a run's timesteps.
Embeddings = tuple[Float[np.ndarray, "steps D"], Float[np.ndarray, "steps 6 D"]]


@dataclasses.dataclass(frozen=True)
class TeaCache:
    """Skips steps while the timestep's embedding has moved little since the last computed one.

    The relative L1 change of the embedding from step to step, |e_t − e_{t−1}|₁ / |e_{t−1}|₁, goes
    through a polynomial fitted to the change of the model's output; while the sum of these values
    since the last computed step is below the threshold, steps are skipped. In Wan the embedding
    depends on the timestep alone, not on the latents, so the skipped steps are known before the
    run, and both guidance branches skip the same ones, each with its own residual.

    Attributes:
        threshold: of the sum; 0 computes every step. Published for text to video: 0.05 to 0.08 for
            1.3B (to 0.1 with retention), 0.14 to 0.2 for 14B (from 0.1 with retention).
        coefficients: of the polynomial, highest power first; by default the identity.
        retention: False follows the time embedding, and computes the first and the last step; True
            follows the blocks' modulation made from it, and computes the first five. The
            coefficients belong to one of the two.
        prefix: share of the steps computed first, in [0, 1], as a policy's dense prefix. A policy's
            own dense steps before its other ones are computed in any case; those of a run that is
            dense throughout may be skipped, as in the original.

    Raises:
        ValueError: a field is out of range.

    Source: TeaCache (arXiv:2411.19108) as in ali-vilab/TeaCache at 7c10efc, TeaCache4Wan2.1:
    `use_ret_steps` is retention, `ret_steps` and `cutoff_steps` (calls, two a step) the steps that
    must run. Its sum may fall, as the polynomials are negative in places; so may this one.
    """

    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    retention: bool = False
    prefix: float = 0.0

    def __post_init__(self):
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold!r} must be a finite number, 0 or more")
        known = isinstance(self.coefficients, tuple) and self.coefficients
        if not known or not all(math.isfinite(c) for c in self.coefficients):
            raise ValueError(f"coefficients={self.coefficients!r} must be a tuple of numbers")
        check_share("prefix", self.prefix)

    @classmethod
    def for_model(
        cls, config: WanConfig, *, threshold: float | None = None, retention: bool = False
    ) -> "TeaCache":
        """With the coefficients published for a model, at any resolution.

        Args:
            config: Wan 2.1's text-to-video models have published ones; for others the identity.
            threshold: None takes the lowest published; 0.1 where there is none.
            retention: which variant.
        """
        lowest, coefficients = _PUBLISHED.get((config, retention), (0.1, (1.0, 0.0)))
        return cls(lowest if threshold is None else threshold, coefficients, retention)

    def steps(
        self, modes: Sequence[str], embed: Callable[[], Embeddings] | None
    ) -> tuple[bool, ...]:
        """Which steps are computed.

        Args:
            modes: the policy's, one a step.
            embed: gives the time embedding and the modulation of the run's timesteps.
        """
        may_skip = _may_skip(modes, self.prefix, RETAINED if self.retention else 1)
        if not self.retention:
            may_skip[-1] = False
        changes = relative_changes(embed()[int(self.retention)])
        total, computed = 0.0, []
        for free, change in zip(may_skip, np.polyval(self.coefficients, changes), strict=True):
            total += change
            computed.append(not (free and self.threshold > 0 and total < self.threshold))
            total = 0.0 if computed[-1] else total
        return tuple(computed)

    def __str__(self) -> str:
        return f"teacache{'-retention' * self.retention} {self.threshold:g}"


@dataclasses.dataclass(frozen=True)
class EveryN:
    """Computes the n-th, 2n-th, ... step behind the last one that must run, and skips the others.

    Behind a policy's dense prefix that is every n-th step of its sparse phase. The count starts
    anew behind a step that must run; 1 computes every step.

    Attributes:
        n: at most n − 1 steps in a row are skipped.
        prefix: as TeaCache's.

    Raises:
        ValueError: a field is out of range.
    """

    n: int
    prefix: float = 0.0

    def __post_init__(self):
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n={self.n!r} must be a whole number of steps, at least 1")
        check_share("prefix", self.prefix)

    def steps(
        self, modes: Sequence[str], embed: Callable[[], Embeddings] | None
    ) -> tuple[bool, ...]:
        """Which steps are computed; reads no embedding."""
        skipped, computed = 0, []
        for free in _may_skip(modes, self.prefix, 1):
            computed.append(not free or skipped == self.n - 1)
            skipped = 0 if computed[-1] else skipped + 1
        return tuple(computed)

    def __str__(self) -> str:
        return f"every-{self.n}"


StepCache = TeaCache | EveryN


def make_cache(name: str, config: WanConfig, threshold: float | None = None) -> StepCache:
    """The cache of a name, for a model.

    Args:
        name: "teacache", "teacache-retention", or "every-2" with any number.
        config: the model's, see `TeaCache.for_model`.
        threshold: of TeaCache; None takes the model's.

    Raises:
        ValueError: another name, a threshold where none is read, or one out of range.
    """
    every = re.fullmatch(r"every-(\d{1,4})", name)
    if every is None and name not in ("teacache", "teacache-retention"):
        raise ValueError(f"cache={name!r} must be teacache, teacache-retention or every-N")
    if every is None:
        return TeaCache.for_model(config, threshold=threshold, retention=name != "teacache")
    if threshold is not None:
        raise ValueError(f"{threshold=} must be left out: {name} reads none")
    return EveryN(int(every[1]))


def relative_changes(
    values: Float[np.ndarray, "steps ..."],
) -> Float[np.ndarray, " steps"]:
    """|x_t − x_{t−1}|₁ / |x_{t−1}|₁ of each step, float64; NaN at step 0, and behind zeros."""
    values = values.reshape(len(values), -1).astype(np.float64)
    size = np.abs(values[:-1]).sum(1)
    moved = np.abs(np.diff(values, axis=0)).sum(1)
    return np.append(np.nan, np.divide(moved, size, out=np.full_like(size, np.nan), where=size > 0))


def _may_skip(modes: Sequence[str], prefix: float, first: int) -> list[bool]:
    """Steps that nothing forces to run; the first ones, which leave a residual, always run."""
    leading = next((i for i, mode in enumerate(modes) if mode != "dense"), 0)
    first = max(first, leading, dense_prefix_steps(prefix, len(modes)))
    return [i >= first and mode in SKIPPABLE for i, mode in enumerate(modes)]


# By model and variant (retention or not): the lowest threshold and the coefficients, as published
# with the code that `TeaCache` names.
_PUBLISHED = {
    (WanConfig.t2v_1_3b(), False): (
        0.05,
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    ),
    (WanConfig.t2v_1_3b(), True): (
        0.05,
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    ),
    (WanConfig.t2v_14b(), False): (
        0.14,
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ),
    (WanConfig.t2v_14b(), True): (
        0.10,
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    ),
}
