"""`pasa-jax tune` on a size too small to time: what it writes, resumes, refuses and chooses."""

import json

import jax
import pytest

from pasa_jax import bench, tune
from pasa_jax.cli import main
from pasa_jax.info import Setting, _tuning_line, info, machine
from pasa_jax.pallas_kernels import api, tuning, xla

SETTING = Setting(160, 2, 8, 0.3, 32, 16, "float32")
TINY = dict(tokens=160, heads=2, head_dim=(8,), block_q=(32,), block_kv=(16,), density=(0.3,))
TINY |= dict(dtype="float32", repeats=3)
ASK = dict(head_dim=8, block_q=32, block_kv=16, density=0.3, dtype="float32")

KEPT = [{"options": {}, **tune._times([1.0] * 3, [1.0] * 3)}]


@pytest.fixture(scope="module")
def operands():
    return jax.jit(lambda: tune._operands(SETTING))()


@pytest.fixture
def small(tmp_path, monkeypatch, operands):
    """One candidate, times that make it the best, and a user's folder of its own."""
    here = machine()
    monkeypatch.setattr(tune, "machine", lambda: here)
    monkeypatch.setattr(tune, "_operands", {SETTING: operands}.__getitem__)  # compiled once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(xla, "TUNABLE", {"tile_keys": (64,)})
    seconds = {"default": [2.0, 2.1, 2.2], "tile_keys=64": [1.0] * 3}
    real, asked = bench.rounds, []

    def rounds(programs, operands, repeats):
        ran = real(programs, operands, repeats)
        assert {name: len(times) for name, times in ran.items()} == dict.fromkeys(seconds, repeats)
        asked.append(repeats)
        return seconds

    monkeypatch.setattr(tune, "rounds", rounds)
    tuning.clear()
    yield asked
    tuning.clear()


def one(gain, spread, **options):
    return {"options": options, "gain": gain, "gain_spread": spread}


@pytest.mark.parametrize(
    "others, options",
    [
        ([], {}),
        ([one(1.2, 0.1, a=1)], {"a": 1}),
        ([one(1.2, 0.3, a=1)], {}),
        ([one(0.8, 0.0, a=1)], {}),
        ([one(1.4, 0.5, a=1), one(1.2, 0.0, a=2), one(1.3, 0.1, a=3)], {"a": 3}),
        ([{"options": {"a": 1}, "refused": "too wide"}], {}),
    ],
    ids=["alone", "better", "within its spread", "worse", "several", "refused"],
)
def test_a_winner_beats_the_default_by_more_than_the_spread(others, options):
    assert tune.winner([one(1.0, 0.0), *others]) == options


def test_candidates_are_the_default_and_the_product():
    assert tune.candidates({"a": (1, 2), "b": (3,)}) == [{}, {"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_times():
    times = tune._times([1.0, 9.0, 2.0, 3.0, 4.0], [2.0, 18.0, 4.0, 12.0, 4.0])
    seconds = {"seconds": 3.0, "spread": 2.0, "fastest": 1.0, "slowest": 9.0}
    # By rounds 2, 2, 2, 4 and 1 times as fast.
    assert times == seconds | {"gain": 2.0, "gain_spread": 0.0}


def test_writes_what_the_kernel_then_reads_and_info_and_bench_tell(small, capsys):
    assert tuning.tuned("xla", **ASK) == {}
    file = tune.tune(**TINY)
    path = tuning.user_file("cpu")
    assert json.loads(path.read_text()) == file and [*path.parent.iterdir()] == [path]
    (case,) = file["cases"]
    assert case.items() >= {"implementation": "xla", "tokens": 160, "heads": 2, **ASK}.items()
    assert {"device", "driver", "versions", "commit"} == case["machine"].keys()
    assert case["options"] == {"tile_keys": 64} == tuning.tuned("xla", **ASK)
    assert [c["options"].get("tile_keys") for c in case["candidates"]] == [None, 64]
    assert [c["seconds"] for c in case["candidates"]] == [2.1, 1.0]
    assert [c["gain"] for c in case["candidates"]] == [1.0, 2.1]
    assert "best: tile_keys=64\n" in capsys.readouterr().out

    info(tokens=160, heads=2, **ASK)
    assert f"options: tile_keys=64 (from {path})" in capsys.readouterr().out
    kernel = {"implementation": "xla", "options": {"tile_keys": 64}, "from": "user"}
    assert bench.sparse_kernel(SETTING) == kernel

    again = tune.tune(**TINY)
    assert again == file and small == [3]
    assert "measured already" in capsys.readouterr().out


def test_info_tells_where_the_options_come_from(small, monkeypatch):
    case = SETTING.case("xla")
    assert _tuning_line(case) == "options: xla's own (nothing tuned here)"
    monkeypatch.setattr(tune, "_measure", lambda *args: KEPT)
    tune.tune(**TINY)
    path = tuning.user_file("cpu")
    assert _tuning_line(case) == f"options: the defaults, measured best (from {path})"
    path.unlink()
    tuning.clear()
    monkeypatch.delattr(xla, "TUNABLE")
    assert _tuning_line(case) == "options: xla's own (it has no others)"


def test_measures_anew_on_another_commit(small, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_measure", lambda *args: KEPT)
    path = tmp_path / "out.json"
    tune.tune(**TINY, output=str(path))
    file = json.loads(path.read_text())
    file["cases"][0]["machine"]["commit"] = "another"
    file["cases"][0]["options"] = {"tile_keys": 64}
    path.write_text(json.dumps(file))
    (case,) = tune.tune(**TINY, output=str(path))["cases"]
    assert case["options"] == {} and case["machine"]["commit"] != "another"


def test_a_broken_run_leaves_whole_cases_and_resumes(small, monkeypatch, tmp_path):
    path = tmp_path / "out.json"

    def measure(name, setting, repeats):
        if setting.density == 0.2:
            raise KeyboardInterrupt
        return KEPT

    monkeypatch.setattr(tune, "_measure", measure)
    three = TINY | dict(density=(0.1, 0.2, 0.3), output=str(path))
    with pytest.raises(KeyboardInterrupt):
        tune.tune(**three)
    assert [c["density"] for c in json.loads(path.read_text())["cases"]] == [0.1]
    asked = []
    monkeypatch.setattr(tune, "_measure", lambda *args: asked.append(args[1].density) or KEPT)
    done = tune.tune(**three)
    assert asked == [0.2, 0.3] and len(done["cases"]) == 3
    assert json.loads(path.read_text()) == done and [*tmp_path.iterdir()] == [path]


def test_cases_with_options_the_kernel_no_longer_knows_are_dropped(small, monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    monkeypatch.setattr(tune, "_measure", lambda *args: KEPT)
    case = {"implementation": "xla", **ASK, "density": 0.9, "options": {"tile_keys": 7}}
    other = case | {"implementation": "triton"}
    path.write_text(json.dumps({"format": 1, "kind": "cpu", "cases": [case, other]}))
    file = tune.tune(**TINY, output=str(path))
    assert [(c["implementation"], c["density"]) for c in file["cases"]] == [
        ("triton", 0.9),
        ("xla", 0.3),
    ]


def test_a_candidate_that_fails_or_differs_is_refused(operands):
    want = operands[0] + 1

    def fails(*args):
        raise RuntimeError("no shared memory\nat all")

    assert tune._refusal(fails, operands, want) == "no shared memory"
    told = tune._refusal(lambda *args: want * float("nan"), operands, want)
    assert told == "its result differs from the default's by nan"
    assert "differs" in tune._refusal(lambda *args: want * 1.01, operands, want)
    assert tune._refusal(lambda *args: want * 1.0001, operands, want) is None


def test_operands_list_distinct_blocks_at_the_density(operands):
    blocks = operands[3]
    assert blocks.ids.shape == (1, 2, 5, 3) and (blocks.count == 3).all()
    api.check_lists(blocks, 10)
    assert [x.shape for x in operands[:3]] == [(1, 160, 2, 8)] * 3
    assert operands[4].group == 32


def test_refused_sizes_are_skipped_with_the_reason(small, monkeypatch, capsys):
    def refuse(*args, block_q, **options):
        raise NotImplementedError(f"{block_q=} must be 64")

    monkeypatch.setattr(xla, "block_sparse_attention", refuse)
    assert tune.tune(**TINY, implementation="xla")["cases"] == []
    assert "skipped: block_q=32 must be 64" in capsys.readouterr().out
    monkeypatch.setitem(api.IMPLEMENTATIONS["block_sparse_attention"], "xla", refuse)
    assert tune.tune(**TINY)["cases"] == []
    assert "skipped: xla: block_q=32 must be 64" in capsys.readouterr().out
    assert not tuning.user_file("cpu").exists()


def test_a_kernel_with_nothing_to_tune(small, monkeypatch, capsys):
    monkeypatch.delattr(xla, "TUNABLE")
    assert tune.tune(**TINY)["cases"] == []
    assert "skipped: xla has nothing to tune" in capsys.readouterr().out
    with pytest.raises(ValueError, match="implementation='xla' has nothing to tune"):
        tune.tune(**TINY, implementation="xla")


REFUSALS = {
    "shape": (["--shape", "sora"], "shape='sora' must be one of wan1.3b-480p"),
    "kernel": (["--implementation", "cuda"], "implementation='cuda' must be one of mosaic_gpu"),
    "repeats": (["--repeats", "2"], "repeats=2 must be at least 3"),
    "density": (["--density", "0"], "density=0.0 must be in (0, 1]"),
    "tokens": (["--tokens", "0"], "tokens=0 must be at least 1"),
    "none": (["--block-q"], "must hold at least one"),
    "suffix": (["--output", "a.txt"], "must end in .json"),
    "foreign": (["--output", "mine.json"], "'mine.json': it must be an object with a list of"),
}


@pytest.mark.parametrize("argv, words", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text("[1]")
    assert main(["tune", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert (tmp_path / "mine.json").read_text() == "[1]"


def test_a_users_folder_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "pasa-jax").write_text("")
    with pytest.raises(ValueError, match="must be a folder to write: .*; or give --output"):
        tune.tune(**TINY)
