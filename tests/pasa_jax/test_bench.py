"""The attention benchmark on a size too small to time."""

import json

import pytest

from pasa_jax import bench

SIZES = dict(heads=1, head_dim=8, block_q=16, block_kv=16)
TINY = SIZES | dict(tokens=(48,), density=(0.5,))


def test_rows_and_json(tmp_path, capsys):
    path = tmp_path / "attention.json"
    result = bench.bench_attention(**TINY, repeats=2, resident=False, output=str(path))
    assert json.loads(path.read_text()) == result
    assert (tmp_path / "attention.png").stat().st_size > 1000
    (run,) = result["runs"]
    assert run["kernel"] == {"implementation": "xla", "options": {}, "from": None}
    rows = {row["name"]: row for row in run["rows"]}
    methods = ["dense", "pasa", "pisa", "pisa, density + 1/32", "sparse kernel alone"]
    assert list(rows)[:5] == methods
    # One of three blocks of 16 is kept at density 0.5.
    assert rows["pisa"]["tflops"] * rows["pisa"]["seconds"] * 1e12 == pytest.approx(4 * 8 * 48 * 16)
    assert rows["dense"]["tflops"] * rows["dense"]["seconds"] * 1e12 == pytest.approx(
        4 * 8 * 48 * 48
    )
    assert result["break_even"] == []
    assert rows["dense"]["speedup"] == 1
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in rows.values())
    assert all(row["temporary_mib"] > 0 for row in rows.values())
    table = capsys.readouterr().out
    assert all(name in table for name in rows)
    assert "density=0.5" in table


def test_resident_memory_of_one_call():
    setting = bench.Setting(**SIZES, tokens=48, density=0.5, dtype="float32")
    if bench._resident(setting, "dense") is None:
        pytest.skip("the system does not tell peak memory")
    assert 0 <= bench._measure_resident(setting, "dense") < 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (0,)}, "tokens=0 must be at least 1"),
        ({"block_kv": -1}, "block_kv=-1 must be at least 1"),
        ({"density": (1.5,)}, r"density=1.5 must be in \(0, 1\]"),
        ({"tokens": ()}, r"tokens=\(\) and density=.* must hold at least one number each"),
        ({"shape": "sora"}, "shape='sora' must be one of wan1.3b-480p"),
        ({"output": "a.txt"}, "must end in .json"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        bench.bench_attention(**{**TINY, **change})


def test_a_model_s_shape_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "_measure", lambda setting, *rest: asked.append(setting) or [])
    monkeypatch.setattr(bench, "_print_table", lambda rows: None)
    monkeypatch.setattr(bench, "_break_evens", lambda runs: [])
    bench.bench_attention(shape="wan14b-720p", density=(0.1, 0.2))
    assert [(s.tokens, s.heads, s.head_dim, s.density) for s in asked] == [
        (75600, 40, 128, 0.1),
        (75600, 40, 128, 0.2),
    ]


def test_break_even_density():
    assert bench.break_even([0.1, 0.3], [2.0, 4.0], 9.0) == pytest.approx(0.8)
    assert bench.break_even([0.1, 0.1], [2.0, 4.0], 9.0) is None
    # Beyond the ends there is no such density.
    assert bench.break_even([0.1, 0.3], [2.0, 4.0], 0.5) == 0
    assert bench.break_even([0.1, 0.3], [2.0, 4.0], 99.0) == 1
    told = [bench._break_even_told(x) for x in (0.0, 0.4, 1.0)]
    assert [x.split(" than")[0] for x in told] == ["slower", "as slow as dense at 0.40", "faster"]
    assert bench.break_even([0.1, 0.3], [4.0, 2.0], 9.0) is None
