"""pasa-jax generate."""

import dataclasses
import itertools
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pasa_jax.cli.options import (
    Caching,
    Prompts,
    Sampling,
    load,
    policy_options,
    read_curve,
    texts,
    with_masks,
)
from pasa_jax.cli.parsing import nested, of, parse, refusing


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
    prompt_states: Annotated[tuple[Path, ...], of("FILE ...")] = ()
    seed: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0,)
    out: Annotated[Path | None, of("PATH")] = None
    batch: int = 1
    curve: Annotated[Path | None, of("FILE")] = None
    policy: str = "pasa"
    block_q: Annotated[int | None, of("INT", "(default: 16 below 4,096 tokens, else 64)")] = None
    block_kv: Annotated[int | None, of("INT", "(default: as block-q)")] = None


def generate(argv: list[str]) -> None:
    """pasa-jax generate: videos from prompts, one for every prompt and seed."""
    began = time.perf_counter()
    about = "Makes a video of every prompt with every seed."
    with refusing("pasa-jax generate"):
        options_class, policy_class = _with_policy(Generate, argv)
    options = parse(options_class, "generate", argv, about)
    with refusing("pasa-jax generate"):
        job = _job(options, policy_class)
    pipeline = load("generate", job.card)
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
        with refusing("pasa-jax generate", OSError):
            _write(result, job.targets[part], job.card.fps)
    print(f"{time.perf_counter() - began:.1f} s in all")


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
    parameters, own = with_masks(policy_class, vars(policy_options))
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
    states, negative = texts(options, card, settings)
    pairs = list(itertools.product(range(len(options.prompts)), options.seed))
    prompts, seeds = [options.prompts[i] for i, _ in pairs], [seed for _, seed in pairs]
    targets = _targets(options.out, prompts, seeds, ".mp4" if card.has_video else ".npz")
    states = None if states is None else states[[i for i, _ in pairs]]
    curve = None if options.curve is None else read_curve(options.curve)
    check_policy(policy, card, settings, curve)
    cache = options.step_cache(card)
    return Job(card, settings, policy, prompts, seeds, targets, states, negative, curve, cache)


def _with_policy(base: type, argv: list[str]) -> tuple[type, type]:
    """The options with those of the policy that the arguments name, and the policy's class."""
    from pasa_jax.policies import make_policy

    named = re.search(r"(?:^|\0)--policy[=\0]([^\0]*)", "\0".join(argv))
    policy = type(make_policy(named[1] if named else base.policy))
    # The blocks' default is the card's.
    own = policy_options(policy, without=("block_q", "block_kv"))
    return nested(base, policy.__name__.lower(), own), policy


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
