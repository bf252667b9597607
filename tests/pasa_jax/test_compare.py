"""Comparisons on a pipeline of random weights: figures, failures, tables, and the page."""

import collections
import csv
import dataclasses
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from pasa_jax import metrics
from pasa_jax.caches import make_cache
from pasa_jax.cli import main
from pasa_jax.cli.compare import Compare
from pasa_jax.cli.methods import named_policies
from pasa_jax.compare import (
    METRICS,
    Clip,
    Entry,
    _attention_cost,
    _measured,
    _still_pixels,
    compare,
    step_seconds,
    write_tables,
)
from pasa_jax.pipeline import Pipeline, Result
from pasa_jax.policies import AdaSpa, Dense, Pisa, Policy
from pasa_jax.report import density_told, write_page

PROMPTS = ["blue and white waves moving left", "a red circle moving up on a green background"]
SIZES = dict(block_q=4, block_kv=4, dense_layers=(), dense_prefix=0.4)
QUIET = dict(steps=3, progress=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Policy):
    """Fails when it plans."""

    def plan(self, q, k, v, context, state):
        raise NotImplementedError("no kernel for this\nand more of it")


@pytest.fixture(scope="module")
def compared(pipeline):
    def of_the_whole_stack(self, shape):
        """As policies with searched masks, which are a layer's each, insist."""
        assert shape.layers == 2 and shape.heads == 2
        return ()

    policies = {"pisa": Pisa(density=0.4, **SIZES), "broken": Broken(**SIZES)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pisa, "init_state", of_the_whole_stack)
        return compare(pipeline, PROMPTS, [0, 1], policies, batch=2, shown=1, **QUIET)


def test_every_prompt_runs_with_every_seed(compared):
    comparison, frames, _ = compared
    for name in ("dense", "pisa"):
        clips = comparison["methods"][name]["clips"]
        told = [(clip["prompt"], clip["seed"]) for clip in clips]
        assert told == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
        assert len(frames[name]) == 1 and frames[name][0].shape == (8, 32, 32, 3)
    assert set(frames) == {"dense", "pisa"}
    assert comparison["clips"] == {"asked": 4, "done": 4}


def test_a_failing_method_is_reported_and_the_others_finish(compared):
    methods = compared.comparison["methods"]
    assert methods["broken"]["failure"] == "no kernel for this"
    assert "metrics" not in methods["broken"] and len(methods["pisa"]["clips"]) == 4


def test_figures_are_those_of_the_clips(compared):
    pisa = compared.comparison["methods"]["pisa"]
    pair = compared.frames["pisa"][0], compared.frames["dense"][0]
    assert pisa["clips"][0]["psnr"] == metrics.psnr(*pair)
    assert pisa["clips"][0]["ssim"] == metrics.ssim(*pair)
    values = [clip["psnr"] for clip in pisa["clips"]]
    assert pisa["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(values))
    assert pisa["metrics"]["psnr"]["clips"] == 4
    # 8 blocks, 3 steps of which 1 is dense: the budget of 0.4 in the other two.
    density = np.asarray(pisa["density"]["by_step_and_layer"])
    assert density.shape == (3, 2) and (density[:1] == 1).all()
    assert density[1:] * 8 == pytest.approx(round(0.4 * 8), abs=1e-4)
    assert pisa["density"]["sparse"] == pytest.approx(density[1:].mean(), abs=1e-6)
    assert pisa["error_by_step"][0] == 0 < pisa["error_by_step"][1] < pisa["error_by_step"][2]
    assert pisa["modes"] == ["dense", "sparse", "sparse"]
    assert pisa["attention_share"] > 0 and pisa["speedup"] > 0
    assert compared.comparison["methods"]["dense"]["metrics"]["latent_error"] is None


def test_planning_is_told_as_a_share_of_attention(compared):
    methods = compared.comparison["methods"]
    seconds, share = (methods["pisa"][key] for key in ("seconds", "planning_share"))
    assert share == seconds["planning of a layer"] / seconds["attention of a layer"] > 0
    assert methods["dense"]["planning_share"] is None


def test_check_and_flicker_read_tinys_scenes(compared):
    dense = compared.comparison["methods"]["dense"]
    assert set(dense["check"]) == {"drifting", "shapes"}
    assert all(0 <= share <= 1 for share in dense["check"]["shapes"].values())
    assert dense["clips"][0]["flicker"] is None  # a texture moves everywhere
    assert set(METRICS) == set(dense["metrics"])


def test_two_heads_show_attention_beside_blocks(compared):
    told, pictures = compared.comparison["blocks"], compared.pictures
    # Of two sparse steps and two sparse layers, the later ones are the middle.
    assert {k: told[k] for k in ("layer", "step", "prompt", "seed", "num_blocks")} == {
        "layer": 1,
        "step": 2,
        "prompt": PROMPTS[0],
        "seed": 0,
        "num_blocks": 8,
    }
    narrow, wide = told["heads"]
    assert 1 <= narrow["width"] <= wide["width"] <= 8
    for head in (narrow, wide):
        assert set(head["methods"]) == {"pisa"}  # neither dense nor the one that failed
        assert head["methods"]["pisa"]["density"] == 3 / 8
        assert pictures[head["head"]]["pisa"].shape == (8, 18)


def test_a_model_without_decoder_has_its_page_too(compared, pipeline, tmp_path):
    # Shapes and policy are those of `compared`, whose compiled steps run again.
    states = np.asarray(pipeline.encode(PROMPTS, "", 1.0))
    card = dataclasses.replace(pipeline.card, scenes=False, has_text=False, has_video=False)
    bare = dataclasses.replace(pipeline, card=card, codec=None, text=None)
    order = (bare, PROMPTS, [0], {"pisa": Pisa(density=0.4, **SIZES)})
    found = compare(*order, batch=2, states=states, negative_states=states[0], **QUIET)
    assert found.frames == {} and all(len(own) == 1 for own in found.pictures.values())
    assert found.comparison["methods"]["pisa"]["metrics"]["psnr"] is None
    page = write_page(tmp_path / "index.html", *found, fps=8.0).read_text()
    assert "<h2>Videos</h2>" not in page and page.count("<img") == len(found.pictures)


class Canned:
    """Stands for `Pipeline.generate`: finished runs without a model; the fourth batch never ends.

    A step takes a second, with a smaller batch a hundred, and compilation fifty. `wrong` holds what
    a policy's run of a number, counted from 1, raises, or NaN for what its last clip is made of.
    """

    def __init__(self):
        self.runs = collections.Counter()
        self.wrong = {}

    def __call__(self, pipeline, prompts, *, policy, cache, observe, seeds, curve, **asked):
        name = type(policy).__name__
        self.runs[name, cache] += 1
        if self.runs["Dense", None] == 4:
            raise KeyboardInterrupt
        wrong = self.wrong.get((name, self.runs[name, cache]))
        if isinstance(wrong, Exception):
            raise wrong
        settings = pipeline.card.settings(steps=asked["steps"])
        modes = pipeline.modes(policy, settings, cache)
        latents = np.ones((len(prompts), *pipeline.card.latent_shape(settings)), np.float32)
        for i in range(len(modes)):
            observe(i, latents)
        latents[-1:] *= 1 if wrong is None else wrong
        sparse = 0.25 if len(prompts) == 2 else 1.0
        density = [[{"dense": 1.0, "skip": 0.0}.get(mode, sparse)] * 2 for mode in modes]
        seconds = np.full(len(modes), 1.0 if len(prompts) == 2 else 100.0)
        seconds[[modes.index(mode) for mode in set(modes)]] += 49 * (self.runs[name, cache] == 1)
        return Result(
            frames=np.zeros((len(prompts), 8, 32, 32, 3), np.uint8),
            latents=latents,
            prompts=tuple(prompts),
            seeds=tuple(seeds),
            settings=settings,
            policy=policy,
            cache=cache,
            budgets=np.ones(len(modes), np.int32),
            densities=np.asarray(density, np.float32),
            seconds=seconds,
            distances=np.ones((len(modes), len(prompts)), np.float32),
        )


@pytest.fixture
def canned(monkeypatch):
    """Runs without a model; what measures on one is replaced, or fails."""

    def fail(*_, **__):
        raise TypeError("out of memory")

    run = Canned()
    monkeypatch.setattr(Pipeline, "generate", lambda *args, **asked: run(*args, **asked))
    cost = {"attention": 0.75, "planning": 0.01}
    monkeypatch.setattr("pasa_jax.compare._attention_cost", lambda *_: cost)
    monkeypatch.setattr("pasa_jax.compare.record_step", fail)
    return run


def test_an_interrupted_run_keeps_its_batches(canned, pipeline, tmp_path):
    order = (pipeline, PROMPTS[:1], range(8), {"pisa": Pisa(**SIZES)})
    with pytest.raises(KeyboardInterrupt):
        compare(*order, batch=2, folder=tmp_path, **QUIET)
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["clips"] == {"asked": 8, "done": 6}
    assert [len(method["clips"]) for method in kept["methods"].values()] == [6, 6]
    assert len(list(csv.DictReader((tmp_path / "comparison.csv").open()))) == 12


def test_a_smaller_last_batch_is_not_timed(canned, pipeline, caplog):
    order = (pipeline, PROMPTS[:1], range(3), {"pisa": Pisa(**SIZES)})
    comparison, _, pictures = compare(*order, batch=2, **QUIET)
    assert comparison["methods"]["pisa"]["seconds"]["step"] == 1
    assert comparison["methods"]["dense"]["seconds"]["run"] == 3
    assert len(comparison["methods"]["pisa"]["clips"]) == 3
    # What draws the blocks has failed: the rest stands.
    assert comparison["blocks"] is None and pictures == {}
    assert "no pictures of blocks: TypeError: out of memory" in caplog.text


def test_a_smaller_last_batch_counts_by_its_clips(canned, pipeline):
    order = (pipeline, PROMPTS[:1], range(3), {"pisa": Pisa(**SIZES)})
    pisa = compare(*order, batch=2, **QUIET).comparison["methods"]["pisa"]
    assert pisa["density"]["sparse"] == pytest.approx((2 * 0.25 + 1) / 3)
    assert pisa["density"]["by_step_and_layer"][1] == [0.5, 0.5]


def test_a_run_that_cannot_leave_compilation_out_is_timed_again(canned, pipeline):
    order = (pipeline, PROMPTS, [0], {"adaspa": AdaSpa(**SIZES)})
    told = compare(*order, batch=2, **QUIET).comparison["methods"]["adaspa"]
    assert told["modes"] == ["dense", "search", "refresh"]  # one step each
    assert canned.runs == {("Dense", None): 1, ("AdaSpa", None): 2}
    assert told["seconds"]["step"] == told["speedup"] == 1 and told["seconds"]["run"] == 3
    assert not told["seconds"]["includes_compilation"] and len(told["clips"]) == 2
    assert told["attention_share"] == 1.5  # two layers: a share that timing tells is not clipped


def test_figures_with_compilation_are_left_out(canned, pipeline, tmp_path, caplog):
    canned.wrong["AdaSpa", 2] = RuntimeError("no time left")
    order = (pipeline, PROMPTS, [0], {"adaspa": AdaSpa(**SIZES)})
    comparison = compare(*order, batch=2, **QUIET).comparison
    told = comparison["methods"]["adaspa"]
    assert told["speedup"] is told["attention_share"] is told["seconds"]["step"] is None
    assert told["seconds"]["includes_compilation"] and len(told["clips"]) == 2
    assert "adaspa could not be timed again: no time left" in caplog.text
    page = write_page(tmp_path / "index.html", comparison, {}, fps=8.0).read_text()
    assert "<td>150.00<small>with compilation</small></td><td></td><td></td>" in page


@pytest.mark.parametrize(
    ("wrong", "failure"),
    [
        (KeyError("lost"), "KeyError: 'lost'"),
        (MemoryError(), "MemoryError"),
        (np.nan, "latents must be finite; 1 of 2 clips' are not"),
    ],
)
def test_whatever_stops_a_method_the_others_go_on(canned, pipeline, wrong, failure):
    canned.wrong["Pisa", 1] = wrong
    policies = {"pisa": Pisa(**SIZES), "adaspa": AdaSpa(**SIZES)}
    methods = compare(pipeline, PROMPTS, [0], policies, batch=2, **QUIET).comparison["methods"]
    assert methods["pisa"]["failure"] == failure and len(methods["adaspa"]["clips"]) == 2


def test_a_method_whose_timing_fails_has_failed(canned, pipeline, monkeypatch):
    def cost(pipeline, entry, *_):
        return [{"attention": 0.5}][isinstance(entry.policy, Pisa)]

    monkeypatch.setattr("pasa_jax.compare._attention_cost", cost)
    found = compare(pipeline, PROMPTS, [0], {"pisa": Pisa(**SIZES)}, batch=2, **QUIET)
    assert found.comparison["methods"]["pisa"]["failure"].startswith("IndexError: list index")


def test_dense_is_the_reference(canned, pipeline):
    named = {"dense": Dense(block_q=4), "pisa": Pisa(**SIZES)}
    methods = compare(pipeline, PROMPTS, [0], named, batch=2, **QUIET).comparison["methods"]
    assert methods["dense"]["parameters"] == dataclasses.asdict(Dense())
    with pytest.raises(ValueError, match="must be dense at all steps"):
        compare(pipeline, PROMPTS, [0], {"dense": Pisa(**SIZES)}, **QUIET)
    canned.wrong["Dense", 2] = np.nan
    with pytest.raises(ValueError, match="latents must be finite"):
        compare(pipeline, PROMPTS, [0], named, batch=2, **QUIET)


def test_a_cache_goes_with_dense_too_and_its_steps_are_told(canned, pipeline):
    cache = make_cache("every-2", pipeline.card.config)
    order = (pipeline, PROMPTS, [0], {"pisa": Pisa(**SIZES)})
    methods = compare(*order, cache=cache, batch=2, **{**QUIET, "steps": 5}).comparison["methods"]
    assert list(methods) == ["dense", "dense + every-2", "pisa + every-2"]
    pisa = methods["pisa + every-2"]
    assert pisa["modes"] == ["dense", "dense", "skip", "sparse", "skip"]
    assert pisa["cache"]["computed"] == 3 and pisa["density"]["sparse"] == 0.25
    assert methods["dense"]["cache"] is None


@pytest.mark.parametrize(
    ("runs", "want", "clean"),
    [
        # The first steps of "dense" and "sparse" compile: their modes' medians stand for them.
        ([[9.0, 1.0, 9.0, 2.0]], [1.0, 1.0, 2.0, 2.0], True),
        ([[9.0, 1.0, 9.0, 2.0], [3.0, 1.0, 4.0, 2.0]], [3.0, 1.0, 4.0, 2.0], True),
    ],
)
def test_seconds_leave_compilation_out(runs, want, clean):
    modes = ("dense", "dense", "sparse", "sparse")
    seconds, told = step_seconds(modes, [np.asarray(run) for run in runs])
    np.testing.assert_allclose(seconds, want)
    assert told == clean


def test_a_mode_of_one_step_cannot_leave_it_out():
    seconds, clean = step_seconds(("dense", "dense", "search"), [np.asarray([9.0, 1.0, 5.0])])
    np.testing.assert_allclose(seconds, [1.0, 1.0, 5.0])
    assert not clean


@pytest.mark.parametrize(
    ("options", "steps", "attention", "planning"),
    [
        # A search plans for what it takes beyond the 2 seconds of dense attention.
        (dict(dense_prefix=0.4), 10, (3 + 2 + 4 * 1) / 6, (1 + 1.5 + 4 * 0.25) / 6),
        (dict(dense_prefix=0.0, searches=(0.5,)), 2, (3 + 2) / 2, (1 + 1.5) / 2),
    ],
)
def test_a_layer_costs_what_its_steps_do(
    pipeline, monkeypatch, options, steps, attention, planning
):
    known = {
        ("attention", "search"): 3.0,
        ("attention", "refresh"): 2.0,
        ("attention", "sparse"): 1.0,
        ("planning", "refresh"): 1.5,
        ("planning", "sparse"): 0.25,
    }

    def seconds(calls):
        for function, layer, mode, *operands in calls.values():
            jax.eval_shape(functools.partial(function, layer, mode), *operands)
        return {key: known[key] for key in calls}

    monkeypatch.setattr("pasa_jax.compare._seconds", seconds)
    policy = AdaSpa(block_q=4, block_kv=4, **options)
    settings = pipeline.card.settings(steps=steps)
    entry = Entry(policy, policy.modes(steps))
    cost = _attention_cost(pipeline, entry, settings, None, 1, {"attention": 2.0})
    assert cost == pytest.approx({"attention": attention, "planning": planning})


def test_an_object_elsewhere_is_no_flicker():
    dense = np.full((4, 8, 8, 3), (13, 242, 13), np.uint8)
    dense[::2, 7, 7, 0] += 20
    clip, prompt = dense.copy(), PROMPTS[1]
    clip[:, 7, 7, 0] = 13
    clip[1, :4] = (242, 13, 13)  # the circle, where dense's has none
    still = _still_pixels([prompt])
    told = _measured(Clip(prompt, 0), clip, dense, still, False)
    assert told.flicker == pytest.approx(0, abs=1e-12)
    # One of the 32 pixels below the circle and one of three channels varies by 10 about its mean.
    assert told.flicker_gap == pytest.approx((10 / 255) ** 2 / 96)
    assert _measured(Clip(prompt, 0), dense, dense, still, True).flicker_gap is None


def test_tables_hold_every_clip(compared, tmp_path):
    write_tables(tmp_path, compared.comparison)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written == json.loads(json.dumps(compared.comparison))  # tuples become lists
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["method"] for row in rows] == ["dense"] * 4 + ["pisa"] * 4 + ["broken"]
    assert rows[-1]["failure"] == "no kernel for this" and not rows[-1]["psnr"]
    assert float(rows[4]["psnr"]) == compared.comparison["methods"]["pisa"]["clips"][0]["psnr"]


def test_json_is_never_bare_nan(compared, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tables(tmp_path, {**compared.comparison, "model": np.nan})
    assert not list(tmp_path.iterdir())


def test_the_page_tells_what_it_averages(compared, tmp_path):
    pisa = compared.comparison["methods"]["pisa"]
    fewer = {"psnr": {"mean": 20.0, "std": 1.0, "clips": 3}}  # the fourth equals dense's
    methods = {"dense": compared.comparison["methods"]["dense"]}
    methods["pisa"] = {**pisa, "metrics": {**pisa["metrics"], **fewer}}
    comparison = {**compared.comparison, "methods": methods}
    page = write_page(tmp_path / "index.html", comparison, {}, fps=8.0).read_text()
    assert "<td>20.00<small>± 1.00</small><small>3 of 4</small></td>" in page
    assert page.count(" of 4</small>") == 1
    assert "VBench&#x27;s temporal flickering score" in page


def test_bad_orders_are_refused(pipeline):
    with pytest.raises(ValueError, match="must each hold at least one"):
        compare(pipeline, [], [0], {"pisa": Pisa()})
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        compare(pipeline, PROMPTS, [0], {"pisa": Pisa()}, batch=0)


def test_the_command_writes_the_folder(compared, tiny_folder, tmp_path, capsys):
    # Sizes and policy are those of `compared`, whose compiled steps run again.
    out = tmp_path / "new"
    words = "pisa --density 0.4 --dense-prefix 0.4"
    order = ["compare", *PROMPTS, "--model", str(tiny_folder), "--out", str(out)]
    order += ["--policies", words, "--steps", "3", "--size", "32x32", "--guidance", "2"]
    order += ["--frames", "8", "--block", "4", "--batch", "2", "--shift", "3", "--dense-layers"]
    assert main([*order, "--no-progress"]) == 0
    told = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"index.html", "comparison.json", "comparison.csv"}
    assert "<h2>Blocks</h2>" in (out / "index.html").read_text()
    methods = json.loads((out / "comparison.json").read_text())["methods"]
    assert list(methods) == ["dense", words]
    assert methods[words]["parameters"]["density"] == 0.4
    assert f"{words}: density" in told and f"wrote {out / 'index.html'}" in told


def test_pasa_brings_pisa_at_what_its_groups_cost():
    options = Compare(policies=("pasa --noise none", "pisa"), density=0.2, dense_layers=(1,))
    policies = named_policies(options, 16, "compare")
    assert list(policies) == ["pasa --noise none", "pisa", "pisa --density 0.23125"]
    pasa, pisa, rival = policies.values()
    assert (pasa.noise, pasa.density, pisa.density, rival.density) == ("none", 0.2, 0.2, 0.23125)
    assert all(p.block_q == p.block_kv == 16 and p.dense_layers == (1,) for p in policies.values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policies", "pissa"], "policy='pissa' must be one of"),
        (["--policies", "pisa --densty 1"], "nearest is --density"),
        (["--count", "0"], "count=0 must be at least 1"),
        (["--batch", "0"], "batch=0 must be at least 1"),
        (["a purple cow"], "purple"),
    ],
)
def test_the_command_refuses_in_one_line(more, message, capsys):
    assert main(["compare", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"density": 0.15}, "0.160"),
        ({"density": 0.1}, "0.160, not 0.1"),
        ({"density": 0.1, "masks": None}, "0.160, not 0.1"),
        ({"density": 0.1, "masks": {"model": "tiny"}}, "0.160"),  # the masks' own density
        ({}, "0.160"),
    ],
)
def test_a_density_far_from_the_one_asked_for_is_told(parameters, told):
    assert density_told({"density": {"sparse": 0.16}, "parameters": parameters}) == told


@pytest.fixture
def browser():
    """A page of the real browser; without one the test is skipped, in CI it fails."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here")
    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        window = play.chromium.launch(executable_path=found, args=options)
        yield window.new_page(viewport={"width": 1300, "height": 900})
        window.close()


def test_the_page_plays_in_a_browser(compared, tmp_path, browser):
    comparison, frames, pictures = compared
    page = write_page(tmp_path / "index.html", comparison, frames, pictures, fps=8.0)
    asked = []
    browser.on("request", lambda request: asked.append(request.url))
    browser.goto(page.as_uri())
    browser.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0)"
    )
    assert browser.locator("video").count() == 2  # one clip, two methods that ran
    rows = browser.locator("table").first.locator("tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["method", "dense", "pisa", "broken"]
    assert "failed: no kernel for this" in rows[3]
    share = comparison["methods"]["pisa"]["planning_share"]
    assert rows[2].endswith(f"{100 * share:.0f} %")
    widths = "[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)"
    assert browser.evaluate(widths) == [18, 18]  # a pixel a block
    assert "density 0.375, recall" in browser.locator("figcaption").last.inner_text()
    assert browser.locator("svg").bounding_box()["height"] > 100
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    # Something is drawn: a blank picture compresses to almost nothing.
    assert len(browser.screenshot(full_page=True)) > 20_000


def test_videos_start_again_together(compared, tmp_path, browser):
    write_page(tmp_path / "index.html", compared.comparison, compared.frames, fps=8.0)  # a second
    browser.goto((tmp_path / "index.html").as_uri())
    times = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
    browser.wait_for_function(f"{times}.every(t => t > 0.8)")
    browser.wait_for_function(f"{times}.every(t => 0 < t && t < 0.6)")
    first, second = browser.evaluate(times)
    assert abs(first - second) < 0.2
    browser.locator("summary").first.click()
    browser.wait_for_function("[...document.querySelectorAll('video')].every(v => v.paused)")


def test_fourteen_methods_fit_a_window(compared, tmp_path, browser):
    """Long names, all columns, a step cache: nothing but the table's own box may scroll."""
    comparison, frames, pictures = compared
    dense, pisa = (comparison["methods"][name] for name in ("dense", "pisa"))
    known = {"mean": 0.1234567, "std": 0.0123456, "clips": 4}
    pisa = {**pisa, "metrics": dict.fromkeys(METRICS, known), "modes": ["dense", "sparse", "skip"]}
    names = [f"rectified --an-option-with-a-long-name {i} + every-2" for i in range(14)]
    methods = {"dense": dense, **dict.fromkeys(names, pisa)}
    frames = {name: 3 * frames["dense"] for name in methods}
    many = {**comparison, "methods": methods}
    page = write_page(tmp_path / "index.html", many, frames, fps=8.0)
    browser.set_viewport_size({"width": 1280, "height": 900})
    browser.goto(page.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") <= 1280
    box = browser.locator(".scroll").first
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert "2\n+ 1 cached" in browser.locator("table").first.locator("tr").last.inner_text()
    rights = "[...document.querySelectorAll('video')].map(v => v.getBoundingClientRect().right)"
    assert browser.locator("video").count() == 45 and max(browser.evaluate(rights)) < 1280
    # In a narrow window the box scrolls, and the names stay.
    browser.set_viewport_size({"width": 700, "height": 900})
    assert browser.evaluate("document.documentElement.scrollWidth") <= 700
    box.evaluate("box => box.scrollLeft = 300")
    name = box.locator("td").first.bounding_box()
    assert name["x"] == pytest.approx(box.bounding_box()["x"], abs=1)
    strokes = "[...document.querySelectorAll('svg path')].map(p => p.getAttribute('style'))"
    lines = [style for style in browser.evaluate(strokes) if style and "stroke-width: 1.3" in style]
    assert len(set(lines)) == 14  # every method has a colour and dash of its own
