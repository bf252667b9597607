"""The machinery of the tables: names and layouts of a checkpoint to parameters, and back."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import nnx

from pasa_jax.convert.reader import FLOATS, Entry

LAYER = r"(\d+)"  # the one group a pattern may have


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""How one kind of tensor becomes one parameter.

    Attributes:
        pattern: of the checkpoint's names; literal but for `\.` and one group for the layer.
        path: the parameter's place in the model, as "blocks/ffn_up/kernel".
        transform: an einops pattern, checkpoint's axes to the parameter's, layers aside.
            It only moves values, so the same string read backwards is the inverse.
    """

    pattern: str
    path: str
    transform: str

    @property
    def stacked(self) -> bool:
        return LAYER in self.pattern

    def name(self, layer: int | None = None) -> str:
        """The tensor's name in the checkpoint."""
        return self.pattern.replace(LAYER, str(layer)).replace(r"\.", ".")

    def forward(self, tensor: Any, sizes: Mapping[str, int]) -> Any:
        """A checkpoint's tensor as the model keeps it (one layer of it)."""
        return move(tensor, self.transform, sizes)

    def inverse(self, value: Any, sizes: Mapping[str, int]) -> Any:
        """A parameter (one layer of it) as the checkpoint keeps it."""
        source, target = self.transform.split(" -> ")
        return move(value, f"{target} -> {source}", sizes)


def move(array: Any, pattern: str, sizes: Mapping[str, int]) -> Any:
    """Einops' rearrange with those of the sizes that the pattern names."""
    axes = set(re.findall(r"\w+", pattern))
    return rearrange(array, pattern, **{k: v for k, v in sizes.items() if k in axes})


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter still to be read: its tensors in order of layers, all of one rule.

    Every tensor is read, moved and cast when its turn comes, so one at a time is in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    entries: tuple[Entry, ...]
    rule: Rule
    sizes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def slices(self) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
        """Index within the parameter, values, and bytes read for them, one by one."""
        for layer, entry in enumerate(self.entries):
            yield (layer,) if self.rule.stacked else (), self.value(entry), entry.nbytes

    def value(self, entry: Entry) -> np.ndarray:
        """One tensor in the parameter's layout and dtype."""
        tensor = entry.read()
        # As unsigned integers: NumPy copies bfloat16, which it does not know, element by element.
        bits = self.rule.forward(tensor.view(f"u{tensor.itemsize}"), self.sizes)
        return np.ascontiguousarray(bits).view(tensor.dtype).astype(self.dtype, copy=False)

    def array(self, on_read: Callable[[int], Any]) -> np.ndarray:
        """The whole parameter in memory; `on_read` is told the bytes of each tensor."""
        out = np.empty(self.shape, self.dtype)
        for index, value, nbytes in self.slices():
            out[index] = value
            on_read(nbytes)
        return out


def flat_parameters(model: nnx.Module) -> dict[str, Any]:
    """The model's parameters, or their shapes, by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in state}


def best_table(
    entries: Mapping[str, Entry], tables: Mapping[str, tuple[Rule, ...]]
) -> tuple[str, tuple[Rule, ...]]:
    """The table that knows most of the names, with its own name."""
    layout = max(tables, key=lambda layout: known_names(entries, tables[layout]))
    return layout, tables[layout]


def known_names(entries: Mapping[str, Entry], rules: tuple[Rule, ...]) -> int:
    """How many of the tensors' names a table has."""
    return sum(match(rules, name) is not None for name in entries)


def match(rules: tuple[Rule, ...], name: str) -> tuple[Rule, int | None] | None:
    """The rule for a checkpoint's name and the layer in it."""
    for rule in rules:
        if found := re.fullmatch(rule.pattern, name):
            return rule, int(found[1]) if rule.stacked else None
    return None


def assign(
    entries: Mapping[str, Entry],
    rules: tuple[Rule, ...],
    ignored: tuple[str, ...],
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    sizes: Mapping[str, int],
) -> dict[str, Parameter]:
    """Finds the tensors of every parameter and a use for every tensor.

    Args:
        entries: the checkpoint's tensors by name.
        rules: the table; exactly one rule for each parameter.
        ignored: patterns of names that need no place in the model.
        parameters: shape and dtype by path, from `eval_shape`.
        sizes: lengths of the axes that the transforms name.

    Returns:
        The parameters by path, ready to be read.

    Raises:
        ValueError: one message with every tensor that is missing, unexpected, misshapen or of a
            dtype that is not f32, f16 or bf16.
    """
    expected = expected_tensors(rules, parameters, sizes)
    failures = [
        f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in entries
    ]
    for name, entry in entries.items():
        if name not in expected:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                failures.append(f"unexpected {name} {list(entry.shape)}")
        elif entry.shape != expected[name]:
            want = list(expected[name])
            failures.append(f"misshapen {name} {list(entry.shape)}, must be {want}")
        elif entry.dtype not in FLOATS:
            failures.append(f"{name} of dtype {entry.dtype}, must be one of {', '.join(FLOATS)}")
    if failures:
        raise ValueError("\n  ".join([f"{len(failures)} tensors do not fit:", *failures]))
    return {
        rule.path: Parameter(
            tuple(parameters[rule.path].shape),
            np.dtype(parameters[rule.path].dtype),
            tuple(entries[name] for name in names(rule, parameters[rule.path].shape)),
            rule,
            sizes,
        )
        for rule in rules
    }


def expected_tensors(
    rules: tuple[Rule, ...],
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    sizes: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that would fill the parameters exactly."""
    assert sorted(rule.path for rule in rules) == sorted(parameters), "one rule a parameter"
    expected = {}
    for rule in rules:
        whole = parameters[rule.path]
        one = jax.ShapeDtypeStruct(whole.shape[1:] if rule.stacked else whole.shape, whole.dtype)
        shape = tuple(jax.eval_shape(lambda x, rule=rule: rule.inverse(x, sizes), one).shape)
        expected |= {name: shape for name in names(rule, whole.shape)}
    return expected


def names(rule: Rule, shape: tuple[int, ...]) -> list[str]:
    """The names of a parameter's tensors in order of layers."""
    return [rule.name(layer) for layer in range(shape[0])] if rule.stacked else [rule.name()]


def to_tensors(
    parameters: Mapping[str, Any], rules: tuple[Rule, ...], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """The checkpoint that the table turns into these parameters: the table's inverse."""
    tensors = {}
    for rule in rules:
        value = parameters[rule.path]
        layers = value if rule.stacked else [value]
        for name, layer in zip(names(rule, value.shape), layers, strict=True):
            tensors[name] = rule.inverse(layer, sizes)
    return tensors
