"""The command `pasa-jax`: arguments → the functions of the package."""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import json
import math
import re
import shlex
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

# jax and the models are imported inside the commands: --help answers at once.

COMMANDS = {
    "generate": "make videos from prompts",
    "calibrate": "record the velocity curve that shares PASA's budget over the steps",
    "search": "search compact, paro or sparse_vdit: find what a model's heads need, for --masks",
    "convert": "turn a PyTorch checkpoint of Wan into one of Flax",
    "compare": "set methods side by side: videos, figures and curves on one page",
    "inspect": "draw where one layer's attention lies, and which blocks methods take",
    "check": "count what tiny's videos get right, under dense attention, PISA and PASA",
    "bench": "bench attention: time sparse against dense; bench recall: what methods' blocks hold",
    "tune": "measure which options of a kernel are best on this machine, and keep them",
    "info": "say which kernels run on this machine, and why others do not",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, or 2 after one line on stderr when the input was refused.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        with _refusing(" ".join(["pasa-jax", *argv[:1]])):
            run = _command(argv[0])
        run(argv[1:])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    head = "usage: pasa-jax COMMAND [OPTIONS]\n\nVideos from prompts by sparse attention, in JAX.\n"
    tail = "\nOptions of a command: pasa-jax COMMAND --help"
    return "\n".join([head, *lines, tail])


def _command(name: str) -> Callable[[list[str]], None]:
    functions = (generate, calibrate, search, convert, compare, inspect, check, bench, tune, info)
    table = dict(zip(COMMANDS, functions, strict=True))
    if name not in table:
        raise ValueError(f"command={name!r} must be one of {_choices(name, list(table))}")
    return table[name]


def _choices(value: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(value, valid, 1)
    return ", ".join(valid) + (f"; nearest is {near[0]!r}" if near else "")


@contextlib.contextmanager
def _refusing(who: str, *more: type[Exception]) -> Iterator[None]:
    """Turns a refused input into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, *more) as error:
        print(f"{who}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _parse(options: Any, name: str, argv: list[str], about: str, default: Any = None) -> Any:
    """The options filled from arguments; what tyro refuses is said in one line."""
    told, more = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(options, prog=f"pasa-jax {name}", description=about, args=argv, **more)
    except SystemExit as end:
        if end.code:
            print(f"pasa-jax {name}: {_one_line(told.getvalue())}", file=sys.stderr)
        raise


def _one_line(box: str) -> str:
    """The first paragraph of tyro's boxed message, and its proposal where it has one."""
    # Frames and rules are drawn with what the terminal has; the first line is a title.
    lines = [line.strip(" │|╭╮╰╯+") for line in box.splitlines()][1:]
    paragraphs = itertools.groupby(lines, key=lambda line: bool(line.strip("─- ")))
    first = " ".join(next(words for some, words in paragraphs if some))
    kind = re.match(
        r"Error parsing (\S+): no type matching \{None\}\|(\w+) .* from \['(.*)'\]", first
    )
    if kind:
        return f"{kind[1]}={kind[3]!r} must be of type {kind[2]}"
    meant = re.search(r"Perhaps you meant:\n\s*(--[\w-]+)", "\n".join(lines))
    return first + (f"; nearest is {meant[1]}" if meant else "")


Prompts = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint=""),
]


def _of(metavar: str, hint: str = "") -> Any:
    """How an option whose default is None shows in --help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


CARD = "(default: the model's)"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What all commands that sample share.

    Attributes:
        model: "tiny", which comes with the package, or a checkpoint's folder.
        steps: denoising steps.
        shift: timestep shift; larger spends more steps in the noise.
        guidance: weight of classifier-free guidance; 1 is none.
        sampler: unipc or euler.
        frames: video frames.
        size: width x height in pixels, as 832x480.
        negative_prompt: what guidance leads away from.
        negative_states: its text states from a file, as --prompt-states.
        progress: show a bar with seconds and density of each step.
    """

    model: str = "tiny"
    steps: Annotated[int | None, _of("INT", CARD)] = None
    shift: Annotated[float | None, _of("FLOAT", CARD)] = None
    guidance: Annotated[float | None, _of("FLOAT", CARD)] = None
    sampler: Annotated[str | None, _of("NAME", CARD)] = None
    frames: Annotated[int | None, _of("INT", CARD)] = None
    size: Annotated[str | None, _of("WxH", CARD)] = None
    negative_prompt: Annotated[str, _of("TEXT")] = ""
    negative_states: Annotated[Path | None, _of("FILE")] = None
    progress: bool = True

    def settings(self, card):
        """The checked `settings.Settings`."""
        width, height = _parse_size(self.size)
        return card.settings(
            steps=self.steps,
            shift=self.shift,
            guidance=self.guidance,
            sampler=self.sampler,
            frames=self.frames,
            width=width,
            height=height,
        )


@dataclasses.dataclass(frozen=True)
class Caching:
    """What all commands that may skip steps share.

    Attributes:
        cache: skip steps: teacache, teacache-retention, or every-N, as every-2; works with any
            method.
        cache_threshold: of teacache, a larger one skips more.
    """

    cache: Annotated[str | None, _of("NAME", "(default: none)")] = None
    cache_threshold: Annotated[
        float | None, _of("FLOAT", "(default: Wan's lowest published, 0.1 for others)")
    ] = None

    def step_cache(self, card, prefix: float = 0.0):
        """The checked cache, or None."""
        from pasa_jax.caches import make_cache

        if self.cache is not None:
            cache = make_cache(self.cache, card.config, self.cache_threshold)
            return dataclasses.replace(cache, prefix=prefix)
        if self.cache_threshold is not None:
            raise ValueError(f"cache_threshold={self.cache_threshold} must come with --cache")
        return None


@dataclasses.dataclass(frozen=True)
class Generate(Caching, Sampling):
    """Options of `pasa-jax generate`.

    Attributes:
        prompts: what to show, each in quotes.
        prompt_states: text states of the prompts, a file each (.npy, .npz or .safetensors with one
            array [tokens, width]), for models whose text encoder is not part of this package.
        seed: of noise and policy; several make a video each.
        out: .mp4, .gif, .png (a strip of stills), or a folder; .npz for models that end in
            latents. Otherwise PROMPT-SEED.mp4 in the current folder. An existing file is replaced.
        batch: videos sampled together.
        curve: velocity curve of `pasa-jax calibrate`.
        policy: attention method; its own options follow below.
        block_q: tokens of a block of queries.
        block_kv: tokens of a block of keys.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    out: Annotated[Path | None, _of("PATH")] = None
    batch: int = 1
    curve: Annotated[Path | None, _of("FILE")] = None
    policy: str = "pasa"
    block_q: Annotated[int | None, _of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None
    block_kv: Annotated[int | None, _of("INT", "(default: as block-q)")] = None


def generate(argv: list[str]) -> None:
    """pasa-jax generate: videos from prompts, one for every prompt and seed."""
    began = time.perf_counter()
    about = "Makes a video of every prompt with every seed."
    with _refusing("pasa-jax generate"):
        options_class, policy_class = _with_policy(Generate, argv)
    options = _parse(options_class, "generate", argv, about)
    with _refusing("pasa-jax generate"):
        job = _job(options, policy_class)
    pipeline = _load("generate", job.card)
    for start in range(0, len(job.prompts), options.batch):
        part = slice(start, start + options.batch)
        result = pipeline.generate(
            job.prompts[part],
            policy=job.policy,
            cache=job.cache,
            seeds=job.seeds[part],
            negative_prompt=options.negative_prompt,
            states=None if job.states is None else job.states[part],
            negative_states=job.negative,
            curve=job.curve,
            progress=options.progress,
            **dataclasses.asdict(job.settings),
        )
        with _refusing("pasa-jax generate", OSError):
            _write(result, job.targets[part], job.card.fps)
    print(f"{time.perf_counter() - began:.1f} s in all")


def _load(command: str, card: Any) -> Any:
    """The card's pipeline; a damaged checkpoint is refused in one line."""
    from safetensors import SafetensorError

    from pasa_jax.pipeline import Pipeline

    with _refusing(f"pasa-jax {command}"):
        try:
            return Pipeline.load(card)
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"model={str(card.folder)!r} is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked order: what to sample and where to."""

    card: Any
    settings: Any
    policy: Any
    prompts: list[str]
    seeds: list[int]
    targets: list[Path]
    states: np.ndarray | None
    negative: np.ndarray | None
    curve: Any
    cache: Any


def _job(options: Any, policy_class: type) -> Job:
    """Checks everything that can be checked before the model is loaded."""
    from pasa_jax.settings import check_policy, check_seeds, read_card

    policy_options = getattr(options, policy_class.__name__.lower())
    block_q, block_kv = options.block_q, options.block_kv
    parameters, own = _with_masks(policy_class, vars(policy_options))
    block_q = own if block_q is None else block_q
    # Before the card: a bad density is told even where there is no such model.
    policy_class(**{**parameters, "masks": None} if "masks" in parameters else parameters)
    card = read_card(options.model)
    settings = options.settings(card)
    block_q = card.block(settings) if block_q is None else block_q
    block_kv = block_q if block_kv is None else block_kv
    policy = policy_class(**parameters, block_q=block_q, block_kv=block_kv)
    tokens = card.grid(settings).num_tokens
    if max(block_q, block_kv) > tokens:
        raise ValueError(f"{block_q=} and {block_kv=} must be at most the video's {tokens=}")
    if options.batch < 1:
        raise ValueError(f"batch={options.batch} must be at least 1")
    check_seeds(list(options.seed))
    states, negative = _texts(options, card, settings)
    pairs = list(itertools.product(range(len(options.prompts)), options.seed))
    prompts, seeds = [options.prompts[i] for i, _ in pairs], [seed for _, seed in pairs]
    targets = _targets(options.out, prompts, seeds, ".mp4" if card.complete else ".npz")
    states = None if states is None else states[[i for i, _ in pairs]]
    curve = None if options.curve is None else _curve(options.curve)
    check_policy(policy, card, settings, curve)
    cache = options.step_cache(card)
    return Job(card, settings, policy, prompts, seeds, targets, states, negative, curve, cache)


def _with_policy(base: type, argv: list[str]) -> tuple[type, type]:
    """The options with those of the policy that the arguments name, and the policy's class."""
    from pasa_jax.policies import make_policy

    named = re.search(r"(?:^|\0)--policy[=\0]([^\0]*)", "\0".join(argv))
    policy = type(make_policy(named[1] if named else base.policy))
    # The blocks' default is the card's.
    own = _policy_options(policy, without=("block_q", "block_kv"))
    return _nested(base, policy.__name__.lower(), own), policy


def _policy_options(policy: type, without: tuple[str, ...] = ()) -> type:
    """The policy's fields as options; searched masks come from a file."""
    types = {"masks": Annotated[Path | None, _of("FILE")]}
    fields = [
        (field.name, types.get(field.name, field.type), dataclasses.field(default=field.default))
        for field in dataclasses.fields(policy)
        if field.name not in without
    ]
    doc = {"__doc__": policy.__doc__}
    return dataclasses.make_dataclass(policy.__name__, fields, namespace=doc, frozen=True)


def _nested(base: type, name: str, own: type) -> type:
    """Options with those of another dataclass, which stand in the field `name`."""
    field = (name, tyro.conf.OmitArgPrefixes[own], dataclasses.field(default_factory=own))
    doc = {"__doc__": base.__doc__}
    return dataclasses.make_dataclass("Options", [field], bases=(base,), namespace=doc, frozen=True)


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if not match:
        raise ValueError(f"{size=} must be WIDTHxHEIGHT in pixels, as 832x480")
    return int(match[1]), int(match[2])


def _texts(options: Any, card: Any, settings: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Checks the prompts; text states from files, [P, E, D] and the negative one [E, D]."""
    from pasa_jax.settings import check_prompts, read_states

    check_prompts(list(options.prompts))
    files, negative = options.prompt_states, options.negative_states
    missing = f"{card.name} has no text encoder here, so give"
    if card.complete:
        from pasa_jax.models.tiny.text import word_ids

        word_ids(options.negative_prompt)
    if card.complete and not files:
        for prompt in options.prompts:
            word_ids(prompt)
    elif len(files) != len(options.prompts):
        raise ValueError(
            f"prompt_states={[str(f) for f in files]} must be one file for each of the "
            f"{len(options.prompts)} prompts" + ("" if card.complete else f": {missing} them")
        )
    if not card.complete and settings.guidance != 1 and negative is None:
        raise ValueError(
            f"guidance={settings.guidance} needs the negative prompt's states: {missing} "
            "--negative-states FILE, or --guidance 1"
        )
    states = [read_states(file, card.config) for file in files]
    longest = max((len(s) for s in states), default=0)
    states = [np.pad(s, ((0, longest - len(s)), (0, 0))) for s in states]
    negative = None if negative is None else read_states(negative, card.config)
    return (np.stack(states) if states else None), negative


def _targets(out: Path | None, prompts: list[str], seeds: list[int], suffix: str) -> list[Path]:
    """The file of every video, checked."""
    from pasa_jax.video import STILL_SUFFIXES, VIDEO_SUFFIXES, check_target

    if out is None or out.is_dir():
        names = [f"{_slug(p)}-{s}{suffix}" for p, s in zip(prompts, seeds, strict=True)]
        targets = [(out or Path()) / name for name in names]
    else:
        targets = [out] * len(prompts)
    if len(set(targets)) < len(targets):
        hint = (
            f"out={str(out)!r} must be an existing folder"
            if targets[0] == out
            else "prompts and seeds must differ"
        )
        raise ValueError(f"{hint}, to hold {len(targets)} videos apart")
    for target in targets:
        shown = VIDEO_SUFFIXES + STILL_SUFFIXES
        check_target(target, shown if suffix in shown else (suffix,))
    return targets


def _slug(prompt: str) -> str:
    """A file name of the prompt's letters and digits, at most 60 of them."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"


def _curve(path: Path) -> Any:
    from pasa_jax.calibration import VelocityCurve

    return _read("curve", VelocityCurve, path)


def _with_masks(policy: type, parameters: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The policy's parameters with masks read from their file, and the masks' tokens a block."""
    if parameters.get("masks") is None:
        return parameters, None
    types = {field.name: field.type for field in dataclasses.fields(policy)}
    masks = _read("masks", typing.get_args(types["masks"])[0], parameters["masks"])
    block = math.prod(masks.tile) if hasattr(masks, "tile") else masks.block
    return {**parameters, "masks": masks}, block


def _read(name: str, kind: Any, path: Path) -> Any:
    """What `kind.save` wrote; a file that cannot be read is told in one line."""
    try:
        return kind.load(path)
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r} could not be read: {error.strerror}") from error


def _write(result: Any, targets: list[Path], fps: float) -> None:
    """Writes the run's videos or latents, and says where they are and how fast they came."""
    from pasa_jax.video import STILL_SUFFIXES, atomic, write_strip, write_video

    s = result.settings
    for i, target in enumerate(targets):
        if result.frames is not None:
            if target.suffix.lower() in STILL_SUFFIXES:
                write_strip(target, result.frames[i : i + 1])
            else:
                write_video(target, result.frames[i], fps=fps)
            what = f"{s.frames} frames of {s.width}x{s.height}"
        else:
            with atomic(target) as temporary:
                about = {"prompt": result.prompts[i], "seed": result.seeds[i]}
                np.savez(temporary, latents=result.latents[i], **about, **dataclasses.asdict(s))
            shape = "x".join(map(str, result.latents[i].shape))
            what = f"latents {shape} (its video decoder is not part of this package)"
        print(f"wrote {target}: {what}")
    ran = result.budgets > 0
    skipped = "" if ran.all() else f", {(~ran).sum()} of them skipped,"
    seconds, densities = result.seconds[ran], result.densities[ran]
    print(
        f"{s.steps} steps{skipped} in {result.seconds.sum():.1f} s with compilation, "
        f"{np.median(seconds):.3f} s a {'computed ' if skipped else ''}step without; mean density "
        f"{densities.mean():.3f}, {densities.min():.3f} to {densities.max():.3f}"
    )


@dataclasses.dataclass(frozen=True)
class Calibrate(Sampling):
    """Options of `pasa-jax calibrate`.

    Attributes:
        prompts: to average over; tiny has ten of its own.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        out: JSON file; a plot is written beside it as .png.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    out: Path = Path("curve.json")


def calibrate(argv: list[str]) -> None:
    """pasa-jax calibrate: a velocity curve from dense sampling."""
    options = _parse(Calibrate, "calibrate", argv, "Records a velocity curve by dense sampling.")
    with _refusing("pasa-jax calibrate"):
        card, settings, options, states, negative = _recording(options, 10)
        if settings.steps < 2:
            raise ValueError(f"steps={settings.steps} must be at least 2: one has no distance")
        plot = options.out.with_suffix(".png")
    from pasa_jax import pipeline
    from pasa_jax.video import atomic

    curve = pipeline.calibrate(
        _load("calibrate", card),
        list(options.prompts),
        negative_prompt=options.negative_prompt,
        states=None if states is None else list(states),
        negative_states=negative,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
    curve.save(options.out)
    with atomic(plot) as temporary:
        curve.plot(temporary)
    print(f"wrote {options.out} and {plot}: {settings.steps} steps, {curve.prompts} prompts")


@dataclasses.dataclass(frozen=True)
class Search(Sampling):
    """Options of `pasa-jax search compact`.

    Attributes:
        prompts: to cover, others than those to be made, four or more; tiny has four of its own.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        out: JSON file. What is found stays in a folder beside it, ending in .parts, until the
            search is complete: the same command goes on after an interruption.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    out: Path = Path("masks.json")


@dataclasses.dataclass(frozen=True)
class SearchParo(Sampling):
    """Options of `pasa-jax search paro`.

    Attributes:
        prompts: others than those to be made, one or two; tiny has two of its own.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        out: JSON file.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    out: Path = Path("masks.json")


@dataclasses.dataclass(frozen=True)
class SearchPatterns(SearchParo):
    """Options of `pasa-jax search sparse_vdit`.

    Attributes:
        block: tokens of a block.
    """

    out: Path = Path("patterns.json")
    block: Annotated[int | None, _of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None


def search(argv: list[str]) -> None:
    """pasa-jax search: masks from dense sampling, for the policies that need them."""
    kinds = {"compact": _search_compact, "paro": _search_paro, "sparse_vdit": _search_patterns}
    with _refusing("pasa-jax search"):
        what = argv[0] if argv else ""
        if what not in kinds:
            raise ValueError(f"{what!r} must be one of {_choices(what, list(kinds))}")
    kinds[what](argv[1:])


def _search_patterns(argv: list[str]) -> None:
    """Sparse-vDiT's pattern of each head."""
    from pasa_jax import vdit_search

    about = "Chooses each head's pattern, by dense sampling."
    options_class = _nested(SearchPatterns, "criterion", vdit_search.Criterion)
    options = _parse(options_class, "search sparse_vdit", argv, about)
    with _refusing("pasa-jax search sparse_vdit"):
        card, settings, options, states, negative = _recording(options, 2)
        patterns, _ = vdit_search.search_patterns(
            _load("search sparse_vdit", card),
            list(options.prompts),
            criterion=options.criterion,
            block=options.block,
            negative_prompt=options.negative_prompt,
            states=None if states is None else list(states),
            negative_states=negative,
            progress=options.progress,
            **dataclasses.asdict(settings),
        )
    patterns.save(options.out)
    print(f"wrote {options.out}: {patterns.prompts} prompts, density {patterns.density:.3f}")


def _search_paro(argv: list[str]) -> None:
    """PAROAttention's orders and masks."""
    from pasa_jax import paro_search

    about = "Chooses each head's order of tokens and its blocks, by dense sampling."
    options_class = _nested(SearchParo, "criterion", paro_search.Criterion)
    options = _parse(options_class, "search paro", argv, about)
    with _refusing("pasa-jax search paro"):
        card, settings, options, states, negative = _recording(options, 2)
        paro_search.Search.start(card, settings, options.criterion)
    masks = paro_search.calibrate_paro(
        _load("search paro", card),
        list(options.prompts),
        criterion=options.criterion,
        negative_prompt=options.negative_prompt,
        states=None if states is None else list(states),
        negative_states=negative,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
    masks.save(options.out)
    heads, buckets = sum(map(len, masks.orders)), len(masks.starts)
    print(
        f"wrote {options.out}: {masks.prompts} prompts, density "
        f"{masks.counts.mean() / masks.shape[-1]:.3f}, {buckets} masks for each of {heads} heads"
    )


def _search_compact(argv: list[str]) -> None:
    """Compact Attention's masks."""
    from pasa_jax import compact_search

    about = "Searches the windows that each head needs, by dense sampling."
    options_class = _nested(Search, "criterion", compact_search.Criterion)
    options = _parse(options_class, "search compact", argv, about)
    with _refusing("pasa-jax search compact"):
        card, settings, options, states, negative = _recording(options, 4)
        compact_search.Search.start(card, settings, options.criterion)
    parts = compact_search.Parts(options.out.with_suffix(".parts"))
    masks, recall = compact_search.search_masks(
        _load("search compact", card),
        list(options.prompts),
        criterion=options.criterion,
        parts=parts,
        negative_prompt=options.negative_prompt,
        states=None if states is None else list(states),
        negative_states=negative,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )
    masks.save(options.out)
    parts.clear()
    print(
        f"wrote {options.out}: {masks.prompts} prompts, density {masks.density:.3f} in sparse "
        f"steps, recall of a prompt's own windows {recall.mean():.3f}, at least {recall.min():.3f}"
    )


def _recording(options: Any, number: int) -> tuple[Any, Any, Any, Any, Any]:
    """Card, settings, options with prompts, and texts of a command that records dense runs."""
    from pasa_jax.settings import read_card
    from pasa_jax.video import check_target

    card = read_card(options.model)
    settings = options.settings(card)
    if card.complete and not options.prompts:
        from pasa_jax.models.tiny.check import prompts

        # Others than those of seed 0, which `compare` and `check` make.
        options = dataclasses.replace(options, prompts=tuple(prompts(number, seed=1)))
    check_target(options.out, (".json",))
    return card, settings, options, *_texts(options, card, settings)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Options of `pasa-jax convert`.

    Attributes:
        src: a folder in diffusers or original layout, or one file of weights.
        dst: the folder to write, absent or empty.
        dtype: float32, bfloat16 or float16, of the parameters that may be rounded.
        dry_run: say what would happen; nothing is written.
        progress: show a bar of bytes and seconds.
    """

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    dtype: Annotated[str | None, _of("NAME", "(default: the source's)")] = None
    dry_run: bool = False
    progress: bool = True


def convert(argv: list[str]) -> None:
    """pasa-jax convert: PyTorch to Flax."""
    about = "Converts a PyTorch checkpoint of Wan 2.1 to an Orbax checkpoint."
    options = _parse(Convert, "convert", argv, about)
    with _refusing("pasa-jax convert", OSError, ImportError):
        from pasa_jax.convert import convert_checkpoint

        convert_checkpoint(
            options.src,
            options.dst,
            dtype=options.dtype,
            dry_run=options.dry_run,
            progress=options.progress,
        )


@dataclasses.dataclass(frozen=True)
class Methods:
    """What all commands that set methods side by side share.

    Attributes:
        policies: methods, each in quotes with options of its own, as "pasa --noise none". PASA
            brings PISA at 1/32 more density, what its groups cost.
        density: exact share of the key blocks, where a method's own options do not say.
        dense_prefix: share of the steps that run dense first, likewise.
        dense_layers: layers that always run dense, likewise.
        block: tokens of a block.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("pasa", "pisa")
    density: float = 0.15
    dense_prefix: float = 0.2
    dense_layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    block: Annotated[int | None, _of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None


@dataclasses.dataclass(frozen=True)
class Compare(Methods, Caching, Sampling):
    """Options of `pasa-jax compare`.

    Attributes:
        prompts: what to show, each in quotes; tiny makes `count` of its own where none is given.
        prompt_states: text states of the prompts, as in `pasa-jax generate`.
        count: prompts made from tiny's words.
        seed: every prompt is sampled with each of these.
        curve: velocity curve of `pasa-jax calibrate`, for PASA.
        batch: clips sampled together.
        shown: clips on the page.
        out: folder, made where it is missing: index.html, comparison.json, comparison.csv.
    """

    prompts: Prompts = ()
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    count: int = 4
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    curve: Annotated[Path | None, _of("FILE")] = None
    batch: int = 4
    shown: int = 3
    out: Path = Path("comparison")


def compare(argv: list[str]) -> None:
    """pasa-jax compare: methods side by side over the same clips."""
    about = "Samples the same clips under dense attention and other methods, and measures them."
    options = _parse(Compare, "compare", argv, about)
    with _refusing("pasa-jax compare", OSError):
        job = _comparison_job(options)
        options.out.mkdir(parents=True, exist_ok=True)
    from pasa_jax.compare import compare as measure
    from pasa_jax.compare import write_tables
    from pasa_jax.report import write_page

    pipeline = _load("compare", job.pop("card"))
    with _refusing("pasa-jax compare", OSError):
        comparison, frames = measure(pipeline, **job)
        write_tables(options.out, comparison)
        page = write_page(options.out / "index.html", comparison, frames, fps=pipeline.card.fps)
    for name, method in comparison["methods"].items():
        print(f"{name}: {_summary(method)}")
    print(f"wrote {page}")


def _summary(method: dict[str, Any]) -> str:
    """A method's main figures in a line."""
    if "failure" in method:
        return f"failed: {method['failure']}"
    from pasa_jax.report import density_told

    told = [f"density {density_told(method)}", f"{method['speedup']:.2f}x as fast"]
    if method["cache"] is not None:
        told.append(f"{method['cache']['computed']} steps computed")
    for name, unit in (("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.3f}")):
        value = method["metrics"][name]
        told += [] if value is None else [unit.format(value["mean"])]
    return ", ".join(told)


def _comparison_job(options: Compare) -> dict[str, Any]:
    """The checked arguments of `compare.compare`, and the card."""
    from pasa_jax.settings import check_policy, check_seeds, read_card

    card = read_card(options.model)
    settings = options.settings(card)
    check_seeds(list(options.seed))
    for name in ("batch", "count"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    if card.complete and not options.prompts:
        from pasa_jax.models.tiny import check as tiny_check

        options = dataclasses.replace(options, prompts=tuple(tiny_check.prompts(options.count)))
    states, negative = _texts(options, card, settings)
    curve = None if options.curve is None else _curve(options.curve)
    policies = _named_policies(options, card.block(settings))
    for policy in policies.values():
        check_policy(policy, card, settings, curve if policy.reads_curve else None)
    return dict(
        card=card,
        prompts=list(options.prompts),
        seeds=list(options.seed),
        policies=policies,
        # With one prefix, methods and dense skip the same steps.
        cache=options.step_cache(card, options.dense_prefix),
        batch=options.batch,
        shown=options.shown,
        states=states,
        negative_states=negative,
        negative_prompt=options.negative_prompt,
        curve=curve,
        progress=options.progress,
        **dataclasses.asdict(settings),
    )


def _named_policies(options: Methods, block: int) -> dict[str, Any]:
    """The policies by the words that name them, and PISA at PASA's cost."""
    policies = {}
    for words in options.policies:
        policies[words] = _worded_policy(words, options, block)
    for words, policy in list(policies.items()):
        if words.split()[0] == "pasa":
            density = min(1.0, policy.density + 1 / 32)
            rival = f"pisa --density {density:.5g}"
            policies.setdefault(rival, _worded_policy(rival, options, block))
    return policies


def _worded_policy(words: str, options: Methods, block: int) -> Any:
    """The policy of "name --option value ...", the command's own options as defaults."""
    from pasa_jax.policies import make_policy

    name, *asked = shlex.split(words) or [""]
    policy = type(make_policy(name))
    own = _policy_options(policy)
    known = {field.name for field in dataclasses.fields(own)}
    shared = {
        "density": options.density,
        "dense_prefix": options.dense_prefix,
        "dense_layers": options.dense_layers,
    }
    size = block if options.block is None else options.block
    shared |= {"block_q": size, "block_kv": size}
    default = own(**{key: value for key, value in shared.items() if key in known})
    read = _parse(own, f"compare, {name}", asked, policy.__doc__ or "", default)
    parameters, size = _with_masks(policy, vars(read))
    if size is not None and options.block is None:
        parameters |= {"block_q": size, "block_kv": size}
    return policy(**parameters)


@dataclasses.dataclass(frozen=True)
class Inspect(Methods, Sampling):
    """Options of `pasa-jax inspect`.

    Attributes:
        prompts: one, what to show.
        prompt_states: its text states, as in `pasa-jax generate`.
        seed: of the run.
        layer: whose attention is drawn.
        head: which of its heads.
        step: denoising step whose attention is drawn; the middle one by default.
        curve: velocity curve of `pasa-jax calibrate`, for PASA.
        out: .png; figures are written beside it as .json.
    """

    prompts: Prompts = ("blue and white waves moving left",)
    prompt_states: Annotated[tuple[Path, ...], _of("FILE ...")] = ()
    seed: int = 0
    layer: int = 1
    head: int = 0
    step: Annotated[int | None, _of("INT", "(default: the middle one)")] = None
    curve: Annotated[Path | None, _of("FILE")] = None
    out: Path = Path("inspection.png")


def inspect(argv: list[str]) -> None:
    """pasa-jax inspect: attention mass and exact blocks of one layer, head and step."""
    about = "Draws one head's attention by blocks beside the blocks that each method takes."
    options = _parse(Inspect, "inspect", argv, about)
    with _refusing("pasa-jax inspect"):
        card, policies, curve, options_of_run = _inspection_job(options)
    from pasa_jax.recall import judge, write_inspection
    from pasa_jax.recording import record

    pipeline = _load("inspect", card)
    steps, mean = options_of_run["steps"], None if curve is None else curve.mean
    step = steps // 2 if options.step is None else options.step
    where = dict(layer=options.layer, step=step, seed=options.seed)
    with _refusing("pasa-jax inspect", OSError):
        recording = record(pipeline, options.prompts[0], **where, **options_of_run)
        judged = {
            name: judge(policy, recording, steps=steps, **where, curve=mean)
            for name, policy in policies.items()
        }
        budgets = {name: _densities(p, recording, steps, mean) for name, p in policies.items()}
        write_inspection(options.out, recording, judged, head=options.head, budgets=budgets)
    for name, one in judged.items():
        told = f"recall {one.recall[options.head]:.3f}, error {one.error[options.head]:.3f}"
        print(f"{name}: density {one.density:.3f}, {told}")
    print(f"wrote {options.out}")


def _inspection_job(options: Inspect) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """Card, policies, curve, and the options of the run that is recorded."""
    from pasa_jax.settings import check_policy, check_seeds, read_card
    from pasa_jax.video import STILL_SUFFIXES, check_target

    if len(options.prompts) != 1:
        raise ValueError(f"prompts={options.prompts} must be one")
    card = read_card(options.model)
    settings = options.settings(card)
    check_seeds([options.seed])
    check_target(options.out, STILL_SUFFIXES)
    if not 0 <= options.head < card.config.num_heads:
        raise ValueError(f"head={options.head} must be from 0 to {card.config.num_heads - 1}")
    states, negative = _texts(options, card, settings)
    curve = None if options.curve is None else _curve(options.curve)
    policies = _named_policies(options, card.block(settings))
    for policy in policies.values():
        check_policy(policy, card, settings, curve if policy.reads_curve else None)
    run = dict(states=states, negative_states=negative, progress=options.progress)
    run |= dict(negative_prompt=options.negative_prompt, **dataclasses.asdict(settings))
    return card, policies, curve, run


def _densities(policy: Any, recording: Any, steps: int, curve: Any) -> list[float]:
    """The budget of every step as a density."""
    blocks = recording.grid.num_blocks(policy.block_kv)
    budgets = policy.budgets(steps, blocks, curve if policy.reads_curve else None)
    return [float(budget) / blocks for budget in budgets]


@dataclasses.dataclass(frozen=True)
class Check(Sampling):
    """Options of `pasa-jax check`.

    Attributes:
        prompts: how many; made from tiny's words, the same ones for every method.
        policies: methods to compare.
        density: exact share of the key blocks, for PISA and PASA.
        dense_prefix: share of the steps that run dense first, for PISA and PASA.
        batch: videos sampled together.
        seed: of the prompts, and of the first video; the others count on.
    """

    prompts: int = 160
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "dense",
        "pisa",
        "pasa",
    )
    density: float = 0.15
    dense_prefix: float = 0.2
    batch: int = 8
    seed: int = 0


def check(argv: list[str]) -> None:
    """pasa-jax check: tables of what tiny's videos get right."""
    about = "Samples videos of random prompts and counts what they get right, by method."
    options = _parse(Check, "check", argv, about)
    with _refusing("pasa-jax check"):
        card, settings, policies = _check_job(options)
    from pasa_jax.models.tiny import check as tiny_check

    pipeline, asked = _load("check", card), tiny_check.prompts(options.prompts, options.seed)
    for policy in policies:
        seeds = itertools.count(options.seed)
        results = []

        def videos(prompts, policy=policy, seeds=seeds, results=results):
            result = pipeline.generate(
                prompts,
                policy=policy,
                seeds=list(itertools.islice(seeds, len(prompts))),
                negative_prompt=options.negative_prompt,
                progress=options.progress,
                **dataclasses.asdict(settings),
            )
            results.append(result)
            return result.frames / np.float32(255)

        title = f"{type(policy).__name__}: {len(asked)} prompts, {settings.steps} steps"
        print(tiny_check.check(videos, asked, batch=options.batch, title=title))
        seconds = np.median(np.concatenate([r.seconds / len(r.prompts) for r in results]))
        density = results[0].densities.mean()
        print(f"\nmean density {density:.3f}, {seconds:.3f} s a step and video\n")


def _check_job(options: Check) -> tuple[Any, Any, list[Any]]:
    """Card, settings and policies of a check."""
    from pasa_jax.models.tiny.text import word_ids
    from pasa_jax.policies import make_policy
    from pasa_jax.settings import check_seeds, read_card

    for name in ("prompts", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    check_seeds([options.seed])
    if not options.policies:
        raise ValueError(f"policies={options.policies} must name at least one")
    if options.negative_states is not None:
        raise ValueError("negative_states must be left out: the check writes prompts in words")
    card = read_card(options.model)
    settings = options.settings(card)
    if not card.complete:
        raise ValueError(f"model={options.model!r} must be tiny: the check reads tiny's scenes")
    word_ids(options.negative_prompt)
    if settings.frames < 8:
        raise ValueError(f"frames={settings.frames} must be at least 8 to tell motion")
    block = card.block(settings)
    sparse = {"density": options.density, "dense_prefix": options.dense_prefix}
    policies = [
        make_policy(name, block_q=block, block_kv=block, **({} if name == "dense" else sparse))
        for name in options.policies
    ]
    return card, settings, policies


def bench(argv: list[str]) -> None:
    """pasa-jax bench attention: seconds; pasa-jax bench recall: what methods' blocks hold."""
    benches = {"attention": _bench_attention, "recall": _bench_recall}
    with _refusing("pasa-jax bench"):
        what = argv[0] if argv else ""
        if what not in benches:
            raise ValueError(f"{what!r} must be {' or '.join(benches)}: pasa-jax bench attention")
    benches[what](argv[1:])


def _bench_attention(argv: list[str]) -> None:
    from pasa_jax.bench import bench_attention

    _call(bench_attention, "bench attention", argv, "Times sparse against dense attention.")


@dataclasses.dataclass(frozen=True)
class Recall:
    """Options of `pasa-jax bench recall`.

    Attributes:
        policies: methods, each in quotes with options of its own.
        density: exact shares of the key blocks.
        block: tokens of a block.
        out: JSON file; a plot is written beside it as .png.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("pasa", "pisa")
    density: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...")] = (0.1, 0.2, 0.4)
    block: int = 16
    out: Path = Path("recall.json")


def _bench_recall(argv: list[str]) -> None:
    """Recall and error against density, on attention of tiny and on planted heads."""
    about = "Measures recall and error of methods on recorded and planted attention."
    options = _parse(Recall, "bench recall", argv, about)
    with _refusing("pasa-jax bench recall"):
        target = _recall_target(options)
        families = {}
        for words in options.policies:
            each = [Methods(density=density, block=options.block) for density in options.density]
            families[words] = [_worded_policy(words, one, options.block) for one in each]
    from pasa_jax.grid import TokenGrid
    from pasa_jax.info import machine
    from pasa_jax.recall import plot_recall, recall_curves
    from pasa_jax.recording import planted, record
    from pasa_jax.settings import read_card
    from pasa_jax.video import atomic

    pipeline = _load("bench recall", read_card("tiny"))
    prompt = "a red circle moving right on a green background"
    places = [(1, 5), (2, 10), (3, 15)]
    recordings = [record(pipeline, prompt, layer=n, step=i, progress=False) for n, i in places]
    recordings.append(planted(TokenGrid(4, 16, 16)))
    rows = recall_curves(recordings, families)
    with atomic(target) as temporary:
        content = {**machine(), "prompt": prompt, "rows": rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_recall(target.with_suffix(".png"), rows)
    for row in rows:
        told = row.get("failure") or (
            f"density {row['density']:.3f}, recall {np.mean(row['recall']):.3f}, "
            f"error {np.mean(row['error']):.3f}"
        )
        print(f"{row['recording']}, {row['method']}: {told}")
    print(f"wrote {target}")


def _recall_target(options: Recall) -> Path:
    from pasa_jax.video import check_target

    if not options.policies or not options.density:
        raise ValueError(f"policies={options.policies} and density={options.density} must not lack")
    return check_target(options.out, (".json",))


def tune(argv: list[str]) -> None:
    """pasa-jax tune: a kernel's options timed on this machine."""
    from pasa_jax.tune import tune as measure

    _call(measure, "tune", argv, "Times a kernel's options on this device and keeps the best.")


def info(argv: list[str]) -> None:
    """pasa-jax info: which kernels run here."""
    from pasa_jax.info import info as told

    _call(told, "info", argv, "Says which implementation of each operation runs here, and why.")


def _call(function: Callable[..., Any], name: str, argv: list[str], about: str) -> None:
    """Runs a function whose parameters are the command's options."""

    @functools.wraps(function)
    def order(*args, **options):
        return functools.partial(function, *args, **options)

    run = _parse(order, name, argv, about)
    with _refusing(f"pasa-jax {name}"):
        run()


if __name__ == "__main__":
    sys.exit(main())
