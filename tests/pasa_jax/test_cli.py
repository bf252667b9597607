"""The command itself: what it writes, and what it refuses in one line before any work."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pasa_jax import pipeline as pipelines
from pasa_jax.cli import COMMANDS, main
from pasa_jax.cli.methods import Methods, named_policies
from pasa_jax.policies import Dense, Pisa

ROOT = Path(__file__).parents[2]
WAVES = "blue and white waves moving left"
SMALL = ["--frames", "8", "--size", "32x32", "--steps", "3", "--no-progress"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    """Makes "tiny" the checkpoint of random weights."""
    monkeypatch.setattr("pasa_jax.models.tiny.WEIGHTS", tiny_folder)


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model fails the test."""
    loads = []
    monkeypatch.setattr(pipelines.Pipeline, "load", lambda *args: loads.append(args))
    yield
    assert not loads


def refused(capsys, argv):
    """The one line on stderr of a refused command."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.count("\n") == 1 and err.startswith("pasa-jax")
    return err


REFUSALS = {
    "density above 1": ([WAVES, "--density", "2"], "density=2.0 must be in (0, 1]"),
    "density 0": ([WAVES, "--density", "0"], "density=0.0 must be in (0, 1]"),
    "density nan": ([WAVES, "--density", "nan"], "density=nan must be in (0, 1]"),
    "density word": ([WAVES, "--density", "low"], "density"),
    "steps negative": ([WAVES, "--steps", "-4"], "steps=-4 must be from 1 to 1000"),
    "steps 0": ([WAVES, "--steps", "0"], "the nearest is 1"),
    "steps word": ([WAVES, "--steps", "many"], "--steps='many' must be of type INT"),
    "no prompt": ([], "must hold at least one prompt"),
    "empty prompt": ([" "], "must hold at least one word"),
    "unknown policy": ([WAVES, "--policy", "pissa"], "nearest is 'pisa'"),
    "option of another policy": ([WAVES, "--policy", "pisa", "--noise", "none"], "--noise"),
    "unknown option": ([WAVES, "--densty", "1"], "--densty, 1; nearest is --density"),
    "noise": ([WAVES, "--noise", "pink"], "'pink'"),
    "noise scale": ([WAVES, "--noise-scale", "-1"], "noise_scale=-1.0 must be 0 or more"),
    "group": ([WAVES, "--group", "0"], "group=0 must be at least 1"),
    "prefix": ([WAVES, "--dense-prefix", "2"], "dense_prefix=2.0 must be in [0, 1]"),
    "block": ([WAVES, "--block-q", "-1"], "block_q=-1 must be at least 1"),
    "block 0": ([WAVES, "--block-kv", "0"], "block_kv=0 must be at least 1"),
    "block of more than all": ([WAVES, "--block-q", "9999"], "at most the video's tokens=1024"),
    "steps without end": ([WAVES, "--steps", "100000000"], "the nearest is 1000"),
    "shift without end": ([WAVES, "--shift", "1e9"], "must be from 0.01 to 100"),
    "no seed": ([WAVES, "--seed"], "must hold at least one seed"),
    "frames": (
        [WAVES, "--frames", "17"],
        "frames=17 must be a positive multiple of 4; nearest is 16",
    ),
    "size": (
        [WAVES, "--size", "130x128"],
        "width=130 must be a positive multiple of 8; nearest is 128",
    ),
    "size form": ([WAVES, "--size", "128"], "size='128' must be WIDTHxHEIGHT"),
    "huge": ([WAVES, "--size", "80000x128"], "must be at most 1024"),
    "guidance": ([WAVES, "--guidance", "-2"], "guidance=-2.0 must be from 0"),
    "shift": ([WAVES, "--shift", "0"], "shift=0.0 must be from 0.01 to 100"),
    "sampler": ([WAVES, "--sampler", "ddim"], "sampler='ddim' must be one of euler, unipc"),
    "seed": ([WAVES, "--seed", "-1"], "seed=-1 must be from 0"),
    "batch": ([WAVES, "--batch", "0"], "batch=0 must be at least 1"),
    "dense layers": ([WAVES, "--dense-layers", "0", "2"], "dense_layers=(0, 2) must be below 2"),
    "empty model": ([WAVES, "--model", ""], "model='' must be 'tiny' or"),
    "no such model": ([WAVES, "--model", "none"], "model='none' must be 'tiny' or"),
    "no checkpoint": ([WAVES, "--model", "."], "must be a checkpoint of Wan"),
    "unknown word": (["blue and white wafes moving left"], "waves"),
    "unknown negative word": ([WAVES, "--negative-prompt", "ugly"], "ugly"),
    "suffix": ([WAVES, "--out", "a.avi"], "out='a.avi' must end in .mp4, .gif, .png"),
    "no folder": ([WAVES, "--out", "no/a.mp4"], "existing folder"),
    "two videos, one file": ([WAVES, "--seed", "0", "1", "--out", "a.mp4"], "an existing folder"),
    "the same video twice": ([WAVES, "--seed", "1", "1"], "prompts and seeds must differ"),
    "no curve": ([WAVES, "--curve", "none.json"], "curve='none.json' could not be read"),
    "no states": ([WAVES, "--prompt-states", "none.npy"], "prompt states 'none.npy' could not"),
    "states of no prompt": (
        [WAVES, WAVES, "--prompt-states", "a.npy"],
        "one file for each of the 2",
    ),
}


@pytest.mark.parametrize("argv, words", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line_and_no_work(here, tiny, no_work, capsys, argv, words):
    assert words in refused(capsys, ["generate", *argv])
    assert not list(here.iterdir())


OTHER_REFUSALS = {
    "command": (["genrate"], "nearest is 'generate'"),
    "calibrate steps": (["calibrate", "--steps", "1"], "steps=1 must be at least 2"),
    "calibrate out": (["calibrate", "--out", "a.txt"], "must end in .json"),
    "check prompts": (["check", "--prompts", "0"], "prompts=0 must be at least 1"),
    "check density": (["check", "--density", "7"], "density=7.0 must be in (0, 1]"),
    "check policy": (["check", "--policies", "dens"], "nearest is 'dense'"),
    "check no policy": (["check", "--policies"], "must name at least one"),
    "check unread states": (["check", "--negative-states", "a.npy"], "must be left out"),
    "check negative word": (["check", "--negative-prompt", "cow"], "cow"),
    "check frames": (["check", "--frames", "4"], "frames=4 must be at least 8"),
    "convert nothing": (["convert", "none", "new"], "none"),
    "info tokens": (["info", "--tokens", "0"], "tokens=0 must be at least 1"),
    "bench what": (["bench"], "'' must be one of attention"),
    "bench methods no policy": (["bench", "methods", "--policies"], "must name at least one"),
    "bench recall no policy": (["bench", "recall", "--policies"], "must name at least one"),
    "bench recall no density": (["bench", "recall", "--density"], "must hold at least one"),
    "compare no policy": (["compare", "--policies"], "policies=() must name at least one"),
    "compare seed twice": (["compare", "--seed", "0", "0"], "seed=(0, 0) must differ"),
    "compare prompt twice": (["compare", WAVES, WAVES], "must differ, to hold clips apart"),
    "compare out": (["compare", "--out", "/dev/null"], "out='/dev/null' must be a folder: File"),
    "compare out in a file": (["compare", "--out", "/dev/null/a"], "must be a folder: Not a"),
    "inspect no policy": (["inspect", "--policies"], "must name at least one"),
    "inspect dense step": (
        ["inspect", "--step", "0"],
        "step=0 must be one that a method runs sparse: 1 to 6",
    ),
    "inspect dense": (["inspect", "--policies", "dense"], "runs sparse: none of 7"),
    "inspect layer": (["inspect", "--layer", "2"], "layer=2 must be from 0 to 1"),
    "inspect words": (["inspect", "--policies", "pisa --a"], "pasa-jax inspect, pisa: "),
    "bench methods words": (
        ["bench", "methods", "--policies", "pisa --a"],
        "pasa-jax bench methods, pisa: ",
    ),
    "bench recall words": (
        ["bench", "recall", "--policies", "pisa --a"],
        "pasa-jax bench recall, pisa: ",
    ),
}


@pytest.mark.parametrize("argv, words", OTHER_REFUSALS.values(), ids=OTHER_REFUSALS)
def test_other_commands_refuse_in_one_line(here, tiny, no_work, capsys, argv, words):
    assert words in refused(capsys, argv)
    assert not list(here.iterdir())


def test_a_curve_of_other_settings_is_refused_naming_both(here, tiny, no_work, capsys):
    from pasa_jax.calibration import VelocityCurve
    from pasa_jax.settings import read_card

    card = read_card("tiny")
    key = card.curve_key(card.settings(steps=4))
    VelocityCurve(key, 1, (1.0,) * 4, (0.0,) * 4, (1.0,) * 4).save("curve.json")
    told = refused(capsys, ["generate", WAVES, "--curve", "curve.json", "--steps", "5"])
    assert "steps=4" in told and "steps=5" in told


@pytest.mark.parametrize("argv", [["--policy", "pisa"], ["--budget", "online"]])
def test_a_curve_that_nobody_reads_is_refused(here, tiny, no_work, capsys, argv):
    from pasa_jax.calibration import VelocityCurve
    from pasa_jax.settings import read_card

    card = read_card("tiny")
    key = card.curve_key(card.settings(steps=4))
    VelocityCurve(key, 1, (1.0,) * 4, (0.0,) * 4, (1.0,) * 4).save("curve.json")
    told = refused(capsys, ["generate", WAVES, "--curve", "curve.json", "--steps", "4", *argv])
    assert "curve must be left out" in told


def test_a_model_without_encoder_says_what_it_needs(here, tiny_folder, no_work, capsys):
    model = ["generate", "a cat", "--model", str(tiny_folder / "transformer")]
    assert "has no text encoder here, so give them" in refused(capsys, model)
    np.save("a.npy", np.ones((3, 6), np.float32))
    model += ["--prompt-states", "a.npy"]
    assert "--negative-states FILE, or --guidance 1" in refused(capsys, model)
    model += ["--guidance", "1"]
    assert "must end in .npz" in refused(capsys, [*model, "--out", "a.mp4"])


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in COMMANDS)


@pytest.mark.parametrize(
    "command, kinds", [("search", ["paro", "anew"]), ("bench", ["attention", "methods", "recall"])]
)
def test_help_lists_a_command_s_kinds(capsys, command, kinds):
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"usage: pasa-jax {command} KIND" in told and all(kind in told for kind in kinds)


SEARCHES = {
    "compact": "compact_search.search_masks",
    "paro": "paro_search.calibrate_paro",
    "sparse_vdit": "vdit_search.search_patterns",
}


@pytest.mark.parametrize(
    "error, words, code",
    [
        (ValueError("late"), "{}: late", 2),
        (OSError("the disk is full"), "{}: the disk is full", 2),
        (KeyboardInterrupt(), ": interrupted", 130),
    ],
)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_search_that_ends_early_is_one_line(
    here, tiny, monkeypatch, capsys, kind, error, words, code
):
    def ends(*args, **options):
        raise error

    monkeypatch.setattr(pipelines.Pipeline, "load", lambda *args: None)
    monkeypatch.setattr(f"pasa_jax.{SEARCHES[kind]}", ends)
    assert main(["search", kind]) == code
    assert capsys.readouterr().err == f"pasa-jax search{words.format(' ' + kind)}\n"


@pytest.mark.parametrize("kind", SEARCHES)
def test_masks_that_cannot_be_written_are_one_line(here, tiny, monkeypatch, capsys, kind):
    def save(path):
        raise OSError("the disk is full")

    masks = types.SimpleNamespace(save=save)
    found = masks if kind == "paro" else (masks, None)
    monkeypatch.setattr(pipelines.Pipeline, "load", lambda *args: None)
    monkeypatch.setattr(f"pasa_jax.{SEARCHES[kind]}", lambda *args, **options: found)
    assert refused(capsys, ["search", kind]) == f"pasa-jax search {kind}: the disk is full\n"


def test_worded_dense_is_dense():
    shared = Methods(policies=("dense", "pisa"), dense_prefix=0.3, dense_layers=(1,))
    policies = named_policies(shared, 16, "compare")
    assert policies["dense"] == Dense()
    assert (policies["pisa"].dense_prefix, policies["pisa"].block_q) == (0.3, 16)


@pytest.mark.parametrize(
    "words, own, density",
    [
        ("pasa", {}, 0.15 + 1 / 32),
        ("pasa --group 8", {}, 0.15 + 1 / 8),
        ("pasa --group 1", {}, 1.0),
        ("pasa --block-q 32 --block-kv 8", dict(block_q=32, block_kv=8), 0.15 + 1 / 32),
        ("pasa --dense-prefix 0.5 --dense-layers 1 2", dict(dense_layers=(1, 2)), 0.15 + 1 / 32),
        ("pasa --dense-layers", dict(dense_layers=()), 0.15 + 1 / 32),
    ],
)
def test_pasa_s_rival_is_alike_but_for_what_its_groups_cost(words, own, density):
    pasa, rival = named_policies(Methods(policies=(words,)), 16, "compare").values()
    assert type(rival) is Pisa and rival.density == pytest.approx(density)
    for name in ("dense_prefix", "dense_layers", "block_q", "block_kv"):
        assert getattr(rival, name) == getattr(pasa, name)
    assert all(getattr(rival, name) == value for name, value in own.items())


@pytest.mark.parametrize("policy, option", [("pasa", "--noise-scale"), ("pisa", "--route-bias")])
def test_help_of_generate_shows_the_policy_s_options(capsys, policy, option):
    assert main(["generate", "--policy", policy, "--help"]) == 0
    told = capsys.readouterr().out
    assert option in told and "--prompt-states" in told
    assert ("--noise-scale" in told) == (policy == "pasa")


def test_generate_writes_a_video_of_every_seed(here, tiny, capsys):
    assert main(["generate", WAVES, "--seed", "1", "2", "--batch", "2", *SMALL]) == 0
    names = [f"blue-and-white-waves-moving-left-{seed}.mp4" for seed in (1, 2)]
    assert sorted(p.name for p in here.iterdir()) == names
    told = capsys.readouterr().out
    assert f"wrote {names[0]}: 8 frames of 32x32" in told
    assert "3 steps in" in told and "s a step" in told and "mean density" in told


def test_policy_options_reach_the_run(here, tiny, monkeypatch, capsys):
    asked, generate = [], pipelines.Pipeline.generate

    def noted(self, prompts, **options):
        asked.append(options)
        return generate(self, prompts, **{**options, "policy": Dense()})

    monkeypatch.setattr(pipelines.Pipeline, "generate", noted)
    options = ["--density", "0.5", "--noise", "none", "--group=2", "--dense-layers", "1"]
    assert main(["generate", WAVES, "--out", "a.gif", "--block-q", "8", *options, *SMALL]) == 0
    policy = asked[0]["policy"]
    assert (policy.density, policy.noise, policy.group) == (0.5, "none", 2)
    assert (policy.dense_layers, policy.block_q, policy.block_kv) == ((1,), 8, 8)
    with Image.open("a.gif") as image:
        assert image.n_frames == 8


def test_calibrate_then_generate_with_the_curve(here, tiny, capsys):
    circle = "a red circle moving up on a green background"
    assert main(["calibrate", WAVES, circle, "--out", "c.json", *SMALL]) == 0
    assert sorted(p.name for p in here.iterdir()) == ["c.json", "c.png"]
    assert "wrote c.json and c.png: 3 steps, 2 prompts" in capsys.readouterr().out
    assert main(["generate", WAVES, "--curve", "c.json", "--out", "a.png", *SMALL]) == 0
    with Image.open("a.png") as image:
        assert image.size == (5 * (4 + 96), 4 + 96)  # five stills of 32 pixels, three times larger


def test_check_prints_a_table_of_every_method(here, tiny, capsys):
    argv = ["check", "--prompts", "4", "--batch", "2", "--policies", "dense", "pisa"]
    assert main([*argv, *SMALL]) == 0
    told = capsys.readouterr().out
    assert "**Dense: 4 prompts, 3 steps**" in told and "**Pisa: 4 prompts, 3 steps**" in told
    assert "| drifting | both colours |" in told and "mean density 1.000" in told


def test_convert_then_generate_latents_from_states(here, tiny_folder, capsys):
    assert main(["convert", str(tiny_folder / "transformer"), "wan", "--no-progress"]) == 0
    np.save("a.npy", np.ones((3, 6), np.float32))
    states = ["--prompt-states", "a.npy", "--guidance", "1", "--policy", "dense"]
    small = ["--frames", "5", "--size", "32x32", "--steps", "2", "--no-progress"]
    assert main(["generate", "a cat", "--model", "wan", *states, *small]) == 0
    with np.load("a-cat-0.npz", allow_pickle=False) as file:
        assert file["latents"].shape == (2, 4, 4, 16) and np.isfinite(file["latents"]).all()
        assert (str(file["prompt"]), int(file["seed"]), int(file["steps"])) == ("a cat", 0, 2)
    assert "its video decoder is not part of this package" in capsys.readouterr().out


def test_info_names_what_runs(capsys):
    assert main(["info", "--head-dim", "96"]) == 0
    told = capsys.readouterr().out
    assert "(cpu)" in told and "head_dim=96" in told
    assert told.count("  xla         runs") == 5


def test_info_shows_reasons(monkeypatch, capsys):
    from pasa_jax.pallas_kernels import api

    monkeypatch.setitem(api.PREFERENCE, "cpu", ("cudnn", "triton", "xla"))
    monkeypatch.setattr(api, "PLATFORMS", {"cudnn": "gpu"})
    monkeypatch.setattr(api, "CAPABILITIES", {})
    assert main(["info", "--block-kv", "7"]) == 0
    told = capsys.readouterr().out
    assert "  cudnn       refused: runs on a gpu, the backend is cpu" in told
    assert "  triton      refused: block_kv=7 must be a multiple of 16" in told


def test_bench_passes_its_options_on(monkeypatch, capsys):
    asked = []

    def bench_attention(*, tokens: int = 16, density: float = 0.15) -> None:
        if density > 1:
            raise ValueError(f"{density=} must be in (0, 1]")
        asked.append((tokens, density))

    module = types.SimpleNamespace(bench_attention=bench_attention)
    monkeypatch.setitem(sys.modules, "pasa_jax.bench", module)
    assert main(["bench", "attention", "--tokens", "32"]) == 0
    assert asked == [(32, 0.15)]
    assert "density=2.0 must be" in refused(capsys, ["bench", "attention", "--density", "2"])
    assert "'x'" in refused(capsys, ["bench", "attention", "--tokens", "x"])


def run(*argv, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_imports_no_jax(here):
    code = "import sys; from pasa_jax.cli import main; main([]); assert 'jax' not in sys.modules"
    assert "usage: pasa-jax" in run("-c", code, cwd=here).stdout


def test_the_process_exits_with_2_and_no_traceback(here):
    done = run("-m", "pasa_jax.cli", "generate", WAVES, "--density", "-1", cwd=here)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "pasa-jax generate: density=-1.0 must be in (0, 1]\n"
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_model_is_one_line(here, tiny_folder, capsys, file, damage):
    shutil.copytree(tiny_folder, here / "model")
    if damage == "missing":
        (here / "model" / file).unlink()
    else:
        os.truncate(here / "model" / file, 11)
    told = refused(capsys, ["generate", WAVES, "--model", "model"])
    assert "model" in told and [path.name for path in here.iterdir()] == ["model"]
