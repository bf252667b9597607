"""Step caches: which steps they skip, and what a skipped step does, on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import pipeline as pipelines
from pasa_jax.attention import Attention
from pasa_jax.caches import EveryN, TeaCache, make_cache, relative_changes
from pasa_jax.cli import main
from pasa_jax.compare import Entry, _entries, _sparse_densities, _sparse_step, compare
from pasa_jax.models import wan
from pasa_jax.models.wan import WanConfig
from pasa_jax.pipeline import Budget, seed_keys, start_noise
from pasa_jax.policies import Dense, Pasa, Pisa, SlidingTile
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


def run(pipe, policy, **options):
    return pipe.generate([WAVES], policy=policy, seeds=[3], progress=False, **options)


@pytest.fixture(scope="module")
def watched(pipeline):
    """Runs of every third and every second step: results, states behind each step, traces."""
    states, traces, denoise, attend = [], [], pipelines.denoise, wan.attend

    def stepped(*args):
        out = denoise(*args)
        states.append(np.asarray(out[2].state).tolist())
        return out

    def attended(*args, **options):
        traces.append("attend")
        return attend(*args, **options)

    def spy(name):
        call = getattr(wan.Wan, name)

        def spied(self, *args):
            traces.append(name)
            return call(self, *args)

        return spied

    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "denoise", stepped)
        patch.setattr(wan, "attend", attended)
        for name in ("with_residual", "skip", "embed_time"):
            patch.setattr(wan.Wan, name, spy(name))
        for n in (3, 2):
            # Three prompts: a batch that no other test has compiled.
            options = dict(policy=SPY, steps=7, cache=EveryN(n), progress=False)
            result = pipeline.generate([WAVES] * 3, **options)
            runs.append((result, list(states), list(traces)))
            states.clear(), traces.clear()
    return runs


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


def test_retention_follows_the_modulation_and_plain_the_time_embedding():
    still, moving = np.ones((10, 4)), np.arange(1.0, 61.0).reshape(10, 6) ** 3
    plain, retained = TeaCache(0.1), TeaCache(0.1, retention=True)
    assert told(plain.steps(SPARSE, lambda: (still, moving))) == "##.......#"
    assert told(plain.steps(SPARSE, lambda: (moving, still))) == "#" * 10
    assert told(retained.steps(SPARSE, lambda: (still, moving))) == "#" * 10
    assert told(retained.steps(SPARSE, lambda: (moving, still))) == "#####....."


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


# As ali-vilab/TeaCache prints them for Wan 2.1, highest power first.
TEACACHE = {
    ("teacache", "1.3b"): (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    ("teacache-retention", "1.3b"): (
        *(-52186.2437, 9230.41404, -528.275948),
        *(13.6987616, -0.0499875664),
    ),
    ("teacache", "14b"): (
        *(-5784.54975374, 5449.50911966, -1811.16591783),
        *(256.27178429, -13.02252404),
    ),
    ("teacache-retention", "14b"): (
        *(-303318.725, 49053.7029, -2655.30556),
        *(58.7365115, -0.315583525),
    ),
}


def test_published_coefficients_are_the_models():
    small, large = WanConfig.t2v_1_3b(), WanConfig.t2v_14b()
    for (name, config), table in TEACACHE.items():
        model = small if config == "1.3b" else large
        assert make_cache(name, model).coefficients == table
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


def test_skipped_steps_run_no_attention_and_compile_once(watched):
    (result, _, traces), (_, _, later) = watched
    assert told(result.budgets > 0) == "#..#..#"
    # Dense, skipped, sparse.
    kinds = ["with_residual", "embed_time", "attend", "skip", "embed_time"]
    assert traces == [*kinds, *kinds[:3]]
    assert later == []


def test_budgets_and_state_wait_where_steps_are_skipped(watched):
    result, states, _ = watched[1]
    budgets = np.where([1, 0, 1, 0, 1, 0, 1], SPY.budgets(7, 8), 0)
    np.testing.assert_array_equal(result.budgets, budgets)
    np.testing.assert_allclose(result.densities, np.stack([budgets, budgets], 1) / 8)
    # Two layers; the dense step plans nothing, the skipped ones neither.
    assert states == [[n, n] for n in (0, 0, 1, 1, 2, 2, 3)]


def test_an_online_budget_loses_what_skipped_steps_would_have_had(pipeline):
    policy = Pasa(density=0.4, budget="online", **SIZES)
    sigmas = np.asarray(make_schedule("unipc", 5, 3.0).sigmas)
    one = some = Budget.start(policy, 5, 8, None, sigmas)
    near, far = jnp.full(2, 0.1), jnp.full(2, 9.0)
    for i, mode in enumerate(["dense", "sparse", "skip"]):
        # Velocities of a skipped step say nothing, however far they seem to move.
        some = some.after(far if mode == "skip" else near, mode)
        one = one.after(near, "sparse" if mode == "skip" else mode)
        assert (some.at(i + 1) > 0) and some.online.remaining == one.online.remaining
    assert some.online.seen == one.online.seen - 1
    assert some.online.last_speed < 9 * one.online.last_speed


def test_a_skipped_step_adds_the_last_computed_residual(pipeline):
    """By Euler's rule a step's ends give its velocity; the model's halves give it again."""
    paths, options = [], dict(sampler="euler", steps=4, guidance=1.0, cache=EveryN(3))
    run(pipeline, Dense(), observe=lambda i, x: paths.append(np.asarray(x)), **options)
    schedule = make_schedule("euler", 4, pipeline.card.settings().shift)
    text = jnp.asarray(pipeline.text.encode([WAVES]))
    noise = start_noise(seed_keys([3])[0], (2, 8, 8, 16))

    @jax.jit
    def both(noise, latents, times):
        residual = pipeline.model.with_residual(noise, times[:1], text)[2]
        fresh = pipeline.model(latents, times[2:3], text)[0]
        return pipeline.model.skip(latents, times[2:3], residual), fresh

    velocity, fresh = both(noise, jnp.asarray(paths[1]), schedule.timesteps)
    step = schedule.sigmas[3] - schedule.sigmas[2]
    # f32, values of about 5 in another order of sums
    np.testing.assert_allclose(paths[2], paths[1] + step * velocity, atol=1e-4)
    assert np.abs(np.asarray(velocity - fresh)).max() > 0.01


def test_the_residual_is_in_raster_order_whatever_the_policys(pipeline):
    """A skip at the very place gives the velocity again, though the blocks saw other places."""
    policy = SlidingTile(**SIZES)
    noise = start_noise(seed_keys([3])[0], (2, 8, 8, 16))
    text = jnp.asarray(pipeline.text.encode([WAVES]))
    assert policy.token_order(pipeline.card.grid(pipeline.card.settings())) is not None
    at = (jnp.int32(1), jnp.int32(8), seed_keys([3])[1], 8)
    attention = Attention(policy, "sparse", *at)

    @jax.jit
    def both(noise, time):
        velocity, _, residual = pipeline.model.with_residual(noise, time, text, attention)
        return velocity, pipeline.model.skip(noise, time, residual)

    velocity, again = both(noise, jnp.full(1, 500.0))
    # x + (y − x) is y but for rounding
    np.testing.assert_allclose(again, velocity, atol=1e-4)


@pytest.mark.parametrize("cache", [TeaCache(0.0), EveryN(1)], ids=str)
def test_a_cache_that_skips_nothing_changes_no_bit(pipeline, cache):
    with_cache, without = (run(pipeline, Dense(), cache=c).latents for c in (cache, None))
    np.testing.assert_array_equal(with_cache, without)


def test_compare_gives_every_policy_the_cache_and_the_reference_none(pipeline):
    cache, settings = EveryN(2, prefix=0.4), pipeline.card.settings()
    policies = {"pisa": Pisa(dense_prefix=0.4, **SIZES)}
    entries = _entries(pipeline, settings, policies, cache)
    assert list(entries) == ["dense", "dense + every-2", "pisa + every-2"]
    assert [entry.cache for entry in entries.values()] == [None, cache, cache]
    assert entries["dense"].modes == ("dense",) * 5
    skipped = [[m == "skip" for m in e.modes] for e in list(entries.values())[1:]]
    assert skipped == [[False, False, True, False, True]] * 2
    assert list(_entries(pipeline, settings, policies, None)) == ["dense", "pisa"]


def test_compare_reports_what_the_cache_does(pipeline):
    options = dict(cache=EveryN(2), progress=False)
    comparison, frames, _ = compare(pipeline, [WAVES], [0], {"dense": Dense()}, **options)
    methods = comparison["methods"]
    assert list(methods) == ["dense", "dense + every-2"] == list(frames)
    assert methods["dense"]["cache"] is None and methods["dense"]["density"]["run"] == 1
    cached = methods["dense + every-2"]
    assert cached["cache"] == {"name": "every-2", "computed": 3, "n": 2, "prefix": 0.0}
    rows = np.asarray(cached["density"]["by_step_and_layer"])
    assert rows.mean(1).tolist() == [1, 0, 1, 0, 1]
    assert cached["density"]["run"] == pytest.approx(0.6)
    # Kept residuals let XLA fuse otherwise: rounding at the first step, more at the skipped one.
    assert cached["error_by_step"][0] < 1e-5 < 1e-4 < cached["error_by_step"][1]


def test_densities_of_sparse_steps_leave_skipped_ones_out():
    rows = np.asarray([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.25, 0.25]])
    modes = ("dense", "skip", "sparse", "skip", "sparse")
    entry = Entry(Pisa(**SIZES), modes, EveryN(2), densities=[rows])
    np.testing.assert_array_equal(_sparse_densities(entry), rows[[2, 4]])


def test_seconds_of_a_step_are_those_of_computed_ones():
    for modes, want in ((("dense", "skip") * 3, 2.0), (("dense", "sparse", "skip") * 2, 4.0)):
        seconds = np.asarray([{"dense": 2.0, "sparse": 4.0, "skip": 0.1}[mode] for mode in modes])
        entry = Entry(Dense(), modes, EveryN(2), seconds=[seconds, seconds])
        assert _sparse_step(entry) == want


def test_the_command_takes_a_cache(tiny_folder, tmp_path, capsys):
    order = ["generate", WAVES, "--model", str(tiny_folder), "--out", str(tmp_path / "a.png")]
    order += ["--frames", "8", "--size", "32x32", "--no-progress", "--policy", "dense"]
    assert main([*order, "--steps", "5", "--cache", "every-2"]) == 0
    assert "5 steps, 2 of them skipped, in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cache", "every"], "cache='every' must be teacache, teacache-retention or every-N"),
        (["--cache", "teacache", "--cache-threshold", "-1"], "threshold=-1.0 must be"),
        (["--cache-threshold", "0.1"], "cache_threshold=0.1 must come with --cache"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_the_command_refuses_bad_caches_in_one_line(tiny_folder, capsys, command, more, words):
    assert main([command, WAVES, "--model", str(tiny_folder), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
