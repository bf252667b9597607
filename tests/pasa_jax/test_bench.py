"""The attention benchmark on a size too small to time."""

import json

import pytest

from pasa_jax import bench

TINY = dict(tokens=48, heads=1, head_dim=8, block_q=16, block_kv=16, density=0.5)


def test_rows_and_json(tmp_path, capsys):
    path = tmp_path / "attention.json"
    result = bench.bench_attention(**TINY, repeats=2, resident=False, output=str(path))
    assert json.loads(path.read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[:4] == ["dense", "pasa", "pisa", "pisa, density + 1/32"]
    assert rows["dense"]["speedup"] == 1
    assert all(row["fastest"] <= row["seconds"] <= row["slowest"] for row in rows.values())
    assert all(row["temporary_mib"] > 0 for row in rows.values())
    table = capsys.readouterr().out
    assert all(name in table for name in rows)
    assert "density=0.5" in table


def test_resident_memory_of_one_call():
    setting = bench.Setting(**TINY, dtype="float32")
    if bench._resident(setting, "dense") is None:
        pytest.skip("the system does not tell peak memory")
    assert 0 <= bench._measure_resident(setting, "dense") < 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"block_kv": -1}, "block_kv=-1 must be at least 1"),
        ({"density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        bench.bench_attention(**{**TINY, **change})
