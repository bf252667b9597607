"""The models that can be converted, and how to tell which one a checkpoint holds.

To add one: a file with the names of `t5.py`, from `describes` to `preset_of`, and a row below.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from pasa_jax.convert import t5, wan, wan_vae
from pasa_jax.convert.reader import Entry, Source
from pasa_jax.convert.rules import known_names
from pasa_jax.convert.wan import check_eps, check_size
from pasa_jax.models.t5 import T5Config
from pasa_jax.models.wan import WanConfig
from pasa_jax.models.wan_vae import WanVAEConfig


@dataclasses.dataclass(frozen=True)
class Component:
    """A kind of model.

    Attributes:
        name: in messages, and in the config.json of a converted folder.
        rules: its file of names and layouts.
        config: its architecture's class.
    """

    name: str
    rules: types.ModuleType
    config: type


COMPONENTS = {
    component.name: component
    for component in (
        Component("Wan", wan, WanConfig),
        Component("WanVAE", wan_vae, WanVAEConfig),
        Component("T5Encoder", t5, T5Config),
    )
}


def identify(source: Source) -> Component | None:
    """The kind of model, by the tensors' names, else by config.json; None if it is none of them.

    Names go first: a file may lie beside another model's config.json.
    """
    known = {name: names_known(one, source.entries) for name, one in COMPONENTS.items()}
    best = max(known, key=lambda name: known[name])
    if known[best]:
        return COMPONENTS[best]
    return next((one for one in COMPONENTS.values() if config_of(one, source)), None)


def config_of(component: Component, source: Source) -> dict[str, Any] | None:
    """The config.json, where it is of this kind of model."""
    described = source.config is not None and component.rules.describes(source.config)
    return source.config if described else None


def names_known(component: Component, entries: Mapping[str, Entry]) -> int:
    """How many of the tensors' names the best of the component's layouts has."""
    preset = component.rules.preset_of(entries) or component.rules.PRESET
    return max(known_names(entries, rules) for rules in component.rules.tables(preset).values())


def architecture(component: Component, source: Source) -> Any:
    """The configuration: from config.json, or a preset if its sizes match.

    Raises:
        ValueError: no configuration, or one that the model does not implement.
    """
    told = config_of(component, source)
    if told is None:
        if preset := component.rules.preset_of(source.entries):
            return preset
        if source.config is not None and source.path.is_dir():
            component.rules.read_config(source.config)  # says what it is instead
        raise ValueError("no config.json beside it, and not of the size of a released model")
    config = component.rules.read_config(told)
    if config.num_layers > len(source.entries):  # before anything is listed by layers
        raise ValueError(f"{config.num_layers=} in config.json, but {len(source.entries)} tensors")
    return config


def config_record(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    return dataclasses.asdict(config)


def read_record(kind: type, record: Any) -> Any:
    """What `config_record` wrote.

    Raises:
        ValueError: other fields, or a value that cannot be.
    """
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(record, dict) or set(record) != set(hints):
        raise ValueError(f"config must hold {', '.join(sorted(hints))}")
    return kind(**{name: read_value(name, hint, record[name]) for name, hint in hints.items()})


def read_value(name: str, hint: Any, value: Any) -> Any:
    """A field's value of the type that its class asks for."""
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        endless = kinds[-1] is Ellipsis
        if not isinstance(value, list) or not (endless or len(value) == len(kinds)):
            number = "a list" if endless else f"a list of {len(kinds)}"
            raise ValueError(f"config.json has {name}={value!r}, must be {number}")
        each = [kinds[0]] * len(value) if endless else kinds
        return tuple(read_value(name, kind, one) for kind, one in zip(each, value, strict=True))
    if hint is int:
        return check_size(name, value)
    if hint is float and name == "eps":
        return check_eps(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"config.json has {name}={value!r}, must be {hint.__name__}")
    return value
