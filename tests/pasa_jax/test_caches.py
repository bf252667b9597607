"""Step caches: which steps they skip, and what a skipped step does, on a model of random weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pasa_jax.caches import EveryN, TeaCache, make_cache, relative_changes
from pasa_jax.models.wan import Wan, WanConfig
from pasa_jax.policies import Dense, Pisa
from pasa_jax.policies.base import dense_prefix_steps
from pasa_jax.sampling import make_schedule

WAVES = "blue and white waves moving left"
SPARSE = ("dense",) * 2 + ("sparse",) * 8
SIZES = dict(block_q=4, block_kv=4, dense_layers=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Pisa):
    """PISA whose state counts its plans in every layer."""

    def init_state(self, shape):
        return jnp.zeros(shape.layers, jnp.int32)

    def plan(self, q, k, v, context, state):
        plan, _ = super().plan(q, k, v, context, ())
        return plan, state + 1


SPY = Counting(density=0.4, dense_prefix=0.2, **SIZES)


def told(computed):
    return "".join("#" if step else "." for step in computed)


def run(pipe, policy=SPY, **options):
    return pipe.generate([WAVES], policy=policy, seeds=[3], progress=False, **options)


@pytest.fixture
def traces(monkeypatch):
    """The kind of every pass that is traced from here on, and the attention calls in it."""
    from pasa_jax.models import wan

    jax.clear_caches()
    seen = []
    for name in ("with_residual", "skip", "embed_time"):
        call = getattr(Wan, name)

        def spied(self, *args, name=name, call=call):
            seen.append(name)
            return call(self, *args)

        monkeypatch.setattr(Wan, name, spied)
    attend = wan.attend

    def attended(*args, **options):
        seen.append("attend")
        return attend(*args, **options)

    monkeypatch.setattr(wan, "attend", attended)
    return seen


def embeddings(seed=0, steps=10):
    """Embeddings whose changes differ from step to step, and between the two."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, 4)), rng.normal(size=(steps, 6, 4))


@pytest.mark.parametrize("retention", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 2.0, 3.5, 50.0])
def test_teacache_skips_as_a_plain_loop(threshold, retention):
    modes, both = ("sparse",) * 10, embeddings()
    coefficients = (0.25, -0.5, 1.0)
    values = both[1] if retention else both[0]
    want, total = [], 0.0
    for i in range(10):
        must = i < 5 if retention else i in (0, 9)
        if not must:
            x = np.abs(values[i] - values[i - 1]).mean() / np.abs(values[i - 1]).mean()
            total += 0.25 * x**2 - 0.5 * x + 1.0
        want.append(must or total >= threshold)
        total = 0.0 if want[-1] else total
    cache = TeaCache(threshold, coefficients, retention)
    assert told(cache.steps(modes, lambda: both)) == told(want)
    assert threshold < 1 or not all(want)


@pytest.mark.parametrize(
    ("cache", "modes", "want"),
    [
        (TeaCache(1e9), SPARSE, "##.......#"),
        (TeaCache(1e9, prefix=0.5), SPARSE, "#####....#"),
        (TeaCache(1e9, retention=True), SPARSE, "#####....."),
        (TeaCache(1e9), ("dense",) * 10, "#........#"),  # all dense: no prefix to keep
        (TeaCache(1e9), ("dense", "search", "sparse", "sparse", "refresh", "dense"), "##..##"),
        (TeaCache(0.0), SPARSE, "##########"),
        (TeaCache(0.0, (-1.0,)), SPARSE, "##########"),  # whatever the polynomial's sign
        (EveryN(1), SPARSE, "##########"),
        (EveryN(2), SPARSE, "##.#.#.#.#"),
        (EveryN(3), SPARSE, "##..#..#.."),
        (EveryN(3), ("dense",) * 10, "#..#..#..#"),
        (EveryN(2, prefix=0.5), ("dense",) * 10, "#####.#.#."),
        (EveryN(2), ("sparse", "sparse", "search", "sparse", "sparse"), "#.#.#"),
    ],
    ids=str,
)
def test_steps_that_must_run_are_computed(cache, modes, want):
    assert told(cache.steps(modes, lambda: embeddings(steps=len(modes)))) == want


def test_changes_are_relative_to_the_step_before():
    values = np.asarray([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(relative_changes(values), [np.nan, 1.0, 1.0, np.nan])


def test_published_coefficients_are_the_models():
    small, large = WanConfig.t2v_1_3b(), WanConfig.t2v_14b()
    for retention in (False, True):
        tables = [TeaCache.for_model(c, retention=retention).coefficients for c in (small, large)]
        assert [len(table) for table in tables] == [5, 5]
    assert make_cache("teacache", small).coefficients[-1] == 1.37887774e-01
    assert make_cache("teacache-retention", large).coefficients[-1] == -3.15583525e-01
    assert make_cache("teacache", large).threshold == 0.14
    assert make_cache("teacache", large, 0.2).threshold == 0.2
    other = make_cache("teacache", dataclasses.replace(small, num_layers=2))
    assert other == TeaCache(0.1, (1.0, 0.0))
    assert make_cache("every-3", small) == EveryN(3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TeaCache(-0.1), "threshold=-0.1 must be a finite number"),
        (lambda: TeaCache(float("nan")), "threshold=nan must be"),
        (lambda: TeaCache(0.1, ()), r"coefficients=\(\) must be"),
        (lambda: TeaCache(0.1, (float("inf"),)), "must be a tuple of numbers"),
        (lambda: TeaCache(0.1, prefix=1.5), "prefix=1.5 must be in"),
        (lambda: EveryN(0), "n=0 must be a whole number"),
        (lambda: EveryN(2, prefix=-1.0), "prefix=-1.0 must be in"),
        (lambda: make_cache("every-0", WanConfig.t2v_14b()), "n=0 must be"),
        (lambda: make_cache("tea", WanConfig.t2v_14b()), "cache='tea' must be teacache"),
        (lambda: make_cache("every-2", WanConfig.t2v_14b(), 0.1), "threshold=0.1 must be left out"),
    ],
)
def test_bad_caches_are_refused(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_the_schedule_follows_the_models_own_embedding(pipeline):
    settings = pipeline.card.settings(steps=9)
    timesteps = make_schedule("unipc", 9, settings.shift).timesteps
    both = [np.asarray(x) for x in pipeline.model.embed_time(timesteps)]
    for retention in (False, True):
        sums = np.cumsum(relative_changes(both[int(retention)])[1:])
        cache = TeaCache(float(sums[-1]) / 4, retention=retention)
        modes = pipeline.modes(SPY, settings, cache)
        want = cache.steps(SPY.modes(9), lambda: both)
        assert [mode != "skip" for mode in modes] == list(want) and not all(want)
        assert all(mode in ("skip", own) for mode, own in zip(modes, SPY.modes(9), strict=True))


def test_skipped_steps_run_no_attention_and_compile_once(pipeline, traces):
    result = run(pipeline, steps=7, cache=EveryN(3))
    # Steps 0 dense, 1 skipped, 2 skipped, 3 sparse ...: each kind of step is traced once.
    kinds = ["with_residual", "embed_time", "attend", "skip", "embed_time"]
    assert traces == [*kinds, *kinds[:3]]
    assert (result.budgets > 0).tolist() == [True, False, False, True, False, False, True]
    traces.clear()
    run(pipeline, steps=7, cache=EveryN(2))
    assert not traces


def test_budgets_keep_their_steps_and_skipped_ones_spend_none(pipeline):
    every, some = run(pipeline, steps=7), run(pipeline, steps=7, cache=EveryN(2))
    computed = np.asarray([1, 0, 1, 0, 1, 0, 1], bool)
    np.testing.assert_array_equal(some.budgets, np.where(computed, every.budgets, 0))
    np.testing.assert_array_equal(some.densities, np.where(computed[:, None], every.densities, 0))
    # XLA may fuse the step that keeps its residual in another way.
    np.testing.assert_allclose(some.distances[2:3] > 0, True)
