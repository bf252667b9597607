"""Lists of policies in words: "name --option value"."""

import dataclasses
import shlex
from typing import Annotated, Any

import tyro

from pasa_jax.cli.options import policy_options, with_masks
from pasa_jax.cli.parsing import of, parse


@dataclasses.dataclass(frozen=True)
class Methods:
    """What all commands that set methods side by side share.

    Attributes:
        policies: methods, each in quotes with options of its own, as "pasa --noise none". PASA
            brings PISA at the density that its groups cost more, 1/32 at groups of 32.
        density: exact share of the key blocks, where a method's own options do not say.
        dense_prefix: share of the steps that run dense first, likewise.
        dense_layers: layers that always run dense, likewise.
        block: tokens of a block.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("pasa", "pisa")
    density: float = 0.15
    dense_prefix: float = 0.2
    dense_layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    block: Annotated[int | None, of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None


def named_policies(options: Methods, block: int, command: str) -> dict[str, Any]:
    """The policies by the words that name them, and PISA at PASA's cost."""
    policies = worded_policies(options, block, command)
    for words, policy in list(policies.items()):
        if words.split()[0] == "pasa":
            rival = _rival(policy, worded_policy("pisa", options, block, command))
            policies.setdefault(rival, worded_policy(rival, options, block, command))
    return policies


def _rival(pasa: Any, pisa: Any) -> str:
    """In words, PISA at the density that PASA costs, else alike; `pisa` is it without words."""
    words = ["pisa", "--density", f"{min(1.0, pasa.density + 1 / pasa.group):.5g}"]
    for name in ("dense_prefix", "dense_layers", "block_q", "block_kv"):
        value = getattr(pasa, name)
        if value != getattr(pisa, name):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return " ".join(words)


def worded_policies(options: Methods, block: int, command: str) -> dict[str, Any]:
    """The policies by the words that name them."""
    if not options.policies:
        raise ValueError(f"policies={options.policies} must name at least one")
    return {words: worded_policy(words, options, block, command) for words in options.policies}


def worded_policy(words: str, options: Methods, block: int, command: str) -> Any:
    """The policy of "name --option value ...", the command's own options as defaults."""
    from pasa_jax.policies import Dense, make_policy

    name, *asked = shlex.split(words) or [""]
    policy = type(make_policy(name))
    own = policy_options(policy)
    known = {field.name for field in dataclasses.fields(own)}
    shared = {
        "density": options.density,
        "dense_prefix": options.dense_prefix,
        "dense_layers": options.dense_layers,
    }
    size = block if options.block is None else options.block
    # Dense attention shares nothing: with another's prefix it would run sparse steps.
    shared = {} if policy is Dense else {**shared, "block_q": size, "block_kv": size}
    default = own(**{key: value for key, value in shared.items() if key in known})
    read = parse(own, f"{command}, {name}", asked, policy.__doc__ or "", default)
    parameters, size = with_masks(policy, vars(read))
    if size is not None and options.block is None:
        parameters |= {"block_q": size, "block_kv": size}
    return policy(**parameters)
