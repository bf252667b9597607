"""Comparisons on a pipeline of random weights: figures, failures, tables, and the page."""

import csv
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from pasa_jax import metrics
from pasa_jax.cli import main
from pasa_jax.cli.compare import Compare
from pasa_jax.cli.methods import named_policies
from pasa_jax.compare import METRICS, compare, step_seconds, write_tables
from pasa_jax.policies import Pasa, Pisa, Policy
from pasa_jax.report import density_told, write_page

PROMPTS = ["blue and white waves moving left", "a red circle moving up on a green background"]
SIZES = dict(block_q=4, block_kv=4, dense_layers=(), dense_prefix=0.4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Policy):
    """Fails when it plans."""

    def plan(self, q, k, v, context, state):
        raise NotImplementedError("no kernel for this\nand more of it")


@pytest.fixture(scope="module")
def compared(pipeline):
    policies = {
        "pasa": Pasa(density=0.4, group=4, **SIZES),
        "whole": Pisa(density=1.0, **SIZES),
        "broken": Broken(**SIZES),
    }
    return compare(pipeline, PROMPTS, [0, 1], policies, batch=2, shown=1, progress=False)


def test_every_prompt_runs_with_every_seed(compared):
    comparison, frames = compared
    for name in ("dense", "pasa", "whole"):
        clips = comparison["methods"][name]["clips"]
        told = [(clip["prompt"], clip["seed"]) for clip in clips]
        assert told == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
        assert len(frames[name]) == 1 and frames[name][0].shape == (8, 32, 32, 3)
    assert set(frames) == {"dense", "pasa", "whole"}


def test_a_failing_method_is_reported_and_the_others_finish(compared):
    methods = compared[0]["methods"]
    assert methods["broken"]["failure"] == "no kernel for this"
    assert "metrics" not in methods["broken"] and len(methods["pasa"]["clips"]) == 4


def test_figures_are_those_of_the_clips(compared):
    pasa = compared[0]["methods"]["pasa"]
    pair = compared[1]["pasa"][0], compared[1]["dense"][0]
    assert pasa["clips"][0]["psnr"] == metrics.psnr(*pair)
    assert pasa["clips"][0]["ssim"] == metrics.ssim(*pair)
    values = [clip["psnr"] for clip in pasa["clips"]]
    assert pasa["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(values))
    assert pasa["metrics"]["psnr"]["clips"] == 4
    # 8 blocks, 5 steps of which 2 are dense: the budget of 0.4 in the other three.
    density = np.asarray(pasa["density"]["by_step_and_layer"])
    assert density.shape == (5, 2) and (density[:2] == 1).all()
    assert pasa["density"]["sparse"] == pytest.approx(density[2:].mean(), abs=1e-6)
    assert density[2:].sum(0) * 8 == pytest.approx(round(0.4 * 8 * 3), abs=1e-4)
    assert pasa["error_by_step"][0] == pasa["error_by_step"][1] == 0 < pasa["error_by_step"][4]
    whole = compared[0]["methods"]["whole"]["clips"][3]["latent_error"]
    assert pasa["clips"][3]["latent_error"] > 100 * whole  # whole is rounding alone
    assert 0 < pasa["attention_share"] <= 1 and pasa["speedup"] > 0
    assert pasa["seconds"]["planning of a layer"] > 0


def test_all_blocks_exact_is_dense(compared):
    methods = compared[0]["methods"]
    assert methods["whole"]["clips"][0]["latent_error"] < 1e-4  # float32 in another order
    assert methods["dense"]["metrics"]["latent_error"] is None


def test_check_and_flicker_read_tinys_scenes(compared):
    dense = compared[0]["methods"]["dense"]
    assert set(dense["check"]) == {"drifting", "shapes"}
    assert all(0 <= share <= 1 for share in dense["check"]["shapes"].values())
    assert dense["clips"][0]["flicker"] is None  # a texture moves everywhere
    assert set(METRICS) == set(dense["metrics"])


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


def test_tables_hold_every_clip(compared, tmp_path):
    write_tables(tmp_path, compared[0])
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written == json.loads(json.dumps(compared[0]))  # tuples become lists
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["method"] for row in rows] == ["dense"] * 4 + ["pasa"] * 4 + ["whole"] * 4
    assert float(rows[4]["psnr"]) == compared[0]["methods"]["pasa"]["clips"][0]["psnr"]


def test_bad_orders_are_refused(pipeline):
    with pytest.raises(ValueError, match="must each hold at least one"):
        compare(pipeline, [], [0], {"pisa": Pisa()})
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        compare(pipeline, PROMPTS, [0], {"pisa": Pisa()}, batch=0)


def test_the_command_writes_the_folder(tiny_folder, tmp_path, capsys):
    out = tmp_path / "new"
    order = ["compare", PROMPTS[0], "--model", str(tiny_folder), "--out", str(out)]
    order += ["--policies", "pisa --order 0", "--steps", "2", "--size", "32x32"]
    assert main([*order, "--frames", "8", "--block", "4", "--no-progress"]) == 0
    told = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"index.html", "comparison.json", "comparison.csv"}
    methods = json.loads((out / "comparison.json").read_text())["methods"]
    assert list(methods) == ["dense", "pisa --order 0"]
    assert methods["pisa --order 0"]["parameters"]["order"] == 0
    assert "pisa --order 0: density" in told and f"wrote {out / 'index.html'}" in told


def test_pasa_brings_pisa_at_what_its_groups_cost():
    options = Compare(policies=("pasa --noise none", "pisa"), density=0.2, dense_layers=(1,))
    policies = named_policies(options, 16)
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
    ("asked", "told"), [(0.15, "0.160"), (0.1, "0.160, not 0.1"), (None, "0.160")]
)
def test_a_density_far_from_the_one_asked_for_is_told(asked, told):
    method = {
        "density": {"sparse": 0.16},
        "parameters": {} if asked is None else {"density": asked},
    }
    assert density_told(method) == told


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
    comparison, frames = compared
    masks = {"a <mask>": np.zeros((4, 6, 3), np.uint8)}
    page = write_page(tmp_path / "index.html", comparison, frames, fps=8.0, masks=masks)
    asked = []
    browser.on("request", lambda request: asked.append(request.url))
    browser.goto(page.as_uri())
    browser.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0)"
    )
    assert browser.locator("video").count() == 3  # one clip, three methods that ran
    rows = browser.locator("table").first.locator("tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["method", "dense", "pasa", "whole", "broken"]
    assert "failed: no kernel for this" in rows[4]
    assert browser.locator("figure img").evaluate("image => image.naturalWidth") == 6
    assert browser.locator("svg").bounding_box()["height"] > 100
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    # Something is drawn: a blank picture compresses to almost nothing.
    assert len(browser.screenshot(full_page=True)) > 20_000
