"""The velocity curve: statistics, the file, hostile files, the setting it belongs to."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax.calibration import CurveKey, VelocityCurve, velocity_distance
from pasa_jax.grid import TokenGrid

KEY = CurveKey("tiny", TokenGrid(4, 8, 8), 4, "unipc", 3.0, 5.0)
SIGMAS = np.array([1.0, 0.9, 0.7, 0.4, 0.0])
DISTANCES = np.array([[np.nan, 1.0, 2.0, 3.0], [np.nan, 3.0, 2.0, 6.0]])


@pytest.fixture
def curve():
    return VelocityCurve.from_distances(KEY, DISTANCES, SIGMAS)


def test_distance_is_the_mean_absolute_difference_in_float32():
    one = jnp.asarray([[1.0, 2.0], [3.0, 258.0]], jnp.bfloat16)
    assert velocity_distance(one, jnp.zeros_like(one)) == 66.0
    # In bfloat16 a sum of 4096 ones stops at 256.
    ones = jnp.ones((64, 64), jnp.bfloat16)
    distance = velocity_distance(ones, jnp.zeros_like(ones))
    assert distance == 1.0 and distance.dtype == jnp.float32


def test_statistics_and_the_missing_first_step(curve):
    assert curve.prompts == 2
    assert curve.mean == (2.0, 2.0, 2.0, 4.5)
    assert curve.std == (1.0, 1.0, 0.0, 1.5)
    assert curve.speed == pytest.approx((20.0, 20.0, 10.0, 15.0))


def test_file_round_trip_leaves_no_partial_file(curve, tmp_path):
    path = tmp_path / "curve.json"
    path.write_text("old")
    curve.save(path)
    assert VelocityCurve.load(path) == curve
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.json"]


def test_failed_save_keeps_the_old_file(curve, tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        curve.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.json"]
    assert path.read_text() == "old"


def test_plot_writes_a_picture(curve, tmp_path):
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "t2v_1_3b"},
        {"grid": TokenGrid(4, 8, 9)},
        {"steps": 5},
        {"sampler": "euler"},
        {"shift": 5.0},
        {"guidance": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_refused_by_name(curve, change):
    curve.check(KEY)
    other = dataclasses.replace(KEY, **change)
    with pytest.raises(ValueError) as caught:
        curve.check(other)
    assert repr(KEY) in str(caught.value) and repr(other) in str(caught.value)


def altered(path, value):
    """The valid record with one entry replaced; `path` is a list of keys."""

    def change(record):
        inner = record
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return json.dumps(record)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "", "Expecting value"),
        (lambda _: "[" * 100_000, "recursion"),
        (lambda _: "\xff", "can't decode"),
        (lambda _: " " * (1 << 20) + "{}", "more than 1048576 bytes"),
        (lambda _: "[]", "the file must be an object with exactly"),
        (altered(["extra"], 1), "the file must be an object with exactly"),
        (altered(["format"], 2), "format=2 must be 1"),
        (altered(["key"], 7), "key must be an object with exactly"),
        (altered(["key", "grid"], [1, 2, 3]), "grid must be an object with exactly"),
        (altered(["key", "grid", "rows"], 0), "rows=0 must be at least 1"),
        (altered(["key", "grid", "rows"], 2.5), "rows=2.5 must be a JSON value of type int"),
        (altered(["key", "steps"], True), "steps=True must be a JSON value of type int"),
        (altered(["key", "steps"], 10**9), "steps=1000000000 must be from 1 to 10000"),
        (altered(["key", "shift"], "3"), "shift='3' must be a finite number"),
        (altered(["key", "shift"], 10**400), "shift=1000.* must be a finite number"),
        (altered(["prompts"], 0), "prompts=0 must be at least 1"),
        (altered(["mean"], None), "mean=None must be a JSON value of type list"),
        (altered(["mean"], [1.0]), "mean has 1 entries, must have 4"),
        (altered(["mean", 1], float("nan")), "mean=nan must be a finite number"),
        (altered(["std", 1], float("inf")), "std=inf must be a finite number"),
        (altered(["speed", 1], -1.0), "speed=.* must be finite and not negative"),
    ],
)
def test_hostile_files_are_refused(curve, tmp_path, change, message):
    record = {"format": 1, **dataclasses.asdict(curve)}
    record = json.loads(json.dumps(record))
    path = tmp_path / "curve.json"
    path.write_bytes(change(record).encode("latin-1"))
    with pytest.raises(ValueError, match=f"curve.json' is not a velocity curve: .*{message}"):
        VelocityCurve.load(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        VelocityCurve.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("distances", "sigmas", "message"),
    [
        (DISTANCES[:, 1:], SIGMAS, r"distances.shape=\(2, 3\) must be \(prompts, 4\)"),
        (DISTANCES, SIGMAS[1:], r"len\(sigmas\)=4 must be 5"),
        (DISTANCES * np.nan, SIGMAS, "mean=.* must be finite"),
    ],
)
def test_from_distances_refuses(distances, sigmas, message):
    with pytest.raises(ValueError, match=message):
        VelocityCurve.from_distances(KEY, distances, sigmas)
