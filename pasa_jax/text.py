"""Prompts to text states: cleaning, tokens, an encoder that can be dropped, a cache on disk."""

import dataclasses
import functools
import hashlib
import html
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pasa_jax.spiece import EOS, read_spiece
from pasa_jax.video import atomic

PAD = "<pad>"
STEP = 64  # tokens; masked texts are padded to a multiple, so that few lengths compile
KEY_FORMAT = "pasa-jax prompt states 1"

QUOTES = {
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}
# Characters that ftfy writes plainly: ligatures, letters and signs of full and half width.
PLAIN = {
    code: unicodedata.normalize("NFKC", chr(code)).translate(QUOTES)
    for first, last in (
        *((0x132, 0x133), (0x149, 0x149), (0x1C4, 0x1CC), (0x1F1, 0x1F3)),
        *((0x3000, 0x3000), (0xFB00, 0xFB06), (0xFF01, 0xFFEF)),
    )
    for code in range(first, last + 1)
} | QUOTES
LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029\x85]")
COLOURS = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How a family of models prepares its prompts.

    Attributes:
        max_length: tokens E of the states; longer prompts are cut, </s> stays the last.
        clean: repair characters and spaces first (`clean_prompt`).
        masked: padding is hidden from the encoder and its states are zero; otherwise the encoder
            attends to it and its states stay as they come.
    """

    max_length: int
    clean: bool
    masked: bool

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"{self.max_length=} must be at least 1: </s> is a token")

    @classmethod
    def wan(cls) -> "TextFormat":
        """Wan 2.1 and 2.2."""
        return cls(max_length=512, clean=True, masked=True)

    @classmethod
    def cogvideox(cls) -> "TextFormat":
        """CogVideoX 2B and 5B."""
        return cls(max_length=226, clean=False, masked=False)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's own tokenizer.

    Attributes:
        inner: of the `tokenizers` library; neither cuts nor pads.
        pad: id of the padding token.
        digest: SHA-256 of the file it was read from, hexadecimal.
    """

    inner: tokenizers.Tokenizer
    pad: int
    digest: str

    def ids(self, text: str, max_length: int) -> list[int]:
        """Token ids that end in </s>, at most `max_length`; warns where the text is cut.

        Raises:
            ValueError: text with half a surrogate pair, which stands for no character.
        """
        try:
            ids = self.inner.encode(text.encode().decode()).ids
        except UnicodeEncodeError:
            raise ValueError(f"prompt {text!r} must be text, it has half a character") from None
        if len(ids) > max_length:
            message = f"prompt of {len(ids)} tokens is cut to {max_length}: {text!r}"
            warnings.warn(message, stacklevel=2)
            return [*ids[: max_length - 1], ids[-1]]
        return ids


def read_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """Reads a checkpoint's tokenizer.

    Args:
        folder: with tokenizer.json, or with the SentencePiece model `spiece.model` of a T5.
        vocab_size: tokens that the encoder knows.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a damaged file, or a tokenizer of another encoder.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        inner = _read_json_tokenizer(file)
    elif (file := folder / "spiece.model").is_file():
        inner = read_spiece(file)
    else:
        raise FileNotFoundError(f"{str(folder)!r} must hold tokenizer.json or spiece.model")
    inner.no_truncation()
    inner.no_padding()
    highest = max(inner.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise ValueError(
            f"{str(file)!r} has tokens up to {highest}, must be below {vocab_size=} of the text "
            "encoder: it belongs to another one"
        )
    pad, end = inner.token_to_id(PAD), inner.token_to_id(EOS)
    if pad is None or end is None or inner.encode("").ids != [end]:
        raise ValueError(f"{str(file)!r} must pad with {PAD} and end texts with {EOS}, as T5's")
    return Tokenizer(inner, pad, hashlib.sha256(file.read_bytes()).hexdigest())


def _read_json_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{str(file)!r} is damaged or no tokenizer: {error}") from None


def clean_prompt(text: str) -> str:
    """A prompt as Wan's encoder expects it: repaired, HTML unescaped, one space between words.

    With `ftfy` installed it repairs the characters, as in Wan's own code. Without, the same is
    done but for text decoded in a wrong encoding, which stays as it is.
    """
    try:
        import ftfy
    except ImportError:
        text = repair(text)
    else:
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def repair(text: str) -> str:
    """What ftfy makes of text in a sound encoding: straight quotes, plain widths, no controls."""
    lines = text.split("\n")
    text = "\n".join(line if "<" in line else html.unescape(line) for line in lines)
    text = LINE_BREAK.sub("\n", text.translate(PLAIN))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", CONTROL.sub("", COLOURS.sub("", text)))


@dataclasses.dataclass(frozen=True)
class StateCache:
    """Text states on disk, one file an entry, named by what they were computed from.

    Attributes:
        folder: made when the first entry is written.
    """

    folder: Path

    @classmethod
    def default(cls) -> "StateCache":
        """In the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
        cache = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"))
        return cls(root / "pasa-jax" / "prompts")

    def get(self, key: str, shape: tuple[int, int]) -> Float[np.ndarray, "E D"] | None:
        """The states, or None where there are none of this shape or the file is damaged."""
        file = self._file(key)
        try:
            if file.stat().st_size > 4 * shape[0] * shape[1] + 1024:  # the header takes 200
                return None
            with safe_open(file, "numpy") as entry:
                states, digest = entry.get_tensor("states"), (entry.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        sound = states.shape == shape and states.dtype == np.float32 and digest == _digest(states)
        return states if sound else None

    def put(self, key: str, states: Float[np.ndarray, "E D"]) -> None:
        """Writes an entry; only warns where that fails, as the states are there anyway."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self._file(key)) as temporary:
                save_file({"states": states}, temporary, metadata={"sha256": _digest(states)})
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"prompt states were not kept in {str(self.folder)!r}: {error}", stacklevel=2
            )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _digest(states: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(states)).hexdigest()


def checkpoint_identity(folder: str | Path, dtype: Any) -> str:
    """What an encoder's states depend on besides the prompt, without reading its weights.

    Args:
        folder: of the encoder, or its one file: config.json is read, of the other files, those in
            folders too, name, size and time of change.
        dtype: that it runs in.

    Returns:
        SHA-256, hexadecimal.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) or [folder]
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    config = folder / "config.json"
    known = {
        "config": config.read_text() if config.is_file() else None,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "dtype": jnp.dtype(dtype).name,
    }
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@dataclasses.dataclass
class PromptEncoder:
    """A pipeline's text encoder, whose weights are in memory only between `encode` and `drop`.

    Attributes:
        tokenizer, format: of the family.
        load: reads the encoder, called when the first prompt is not in the cache: ids int32 [B, T]
            and lengths int32 [B], or None, to states [B, T, D], as `models.t5.T5Encoder`.
        width: D of its states.
        identity: of the encoder, from `checkpoint_identity`; entries of others are not found.
        cache: None computes always.
    """

    tokenizer: Tokenizer
    format: TextFormat
    load: Callable[[], nnx.Module]
    width: int
    identity: str
    cache: StateCache | None = None
    _model: nnx.Module | None = dataclasses.field(default=None, init=False, repr=False)

    def encode(self, prompts: list[str]) -> Float[np.ndarray, "P E D"]:
        """States of each prompt, f32, E = `format.max_length`; they depend on no other prompt.

        Raises:
            ValueError: a prompt that is no text.
        """
        texts = [clean_prompt(prompt) if self.format.clean else prompt for prompt in prompts]
        out = np.zeros((len(texts), self.format.max_length, self.width), np.float32)
        for row, text in zip(out, texts, strict=True):
            states = self._one(text)
            row[: len(states)] = states
        return out

    def drop(self) -> None:
        """Frees the encoder's memory; the next prompt that is not in the cache loads it again."""
        self._model = None

    def _one(self, text: str) -> Float[np.ndarray, "E D"]:
        """The rows of a prompt that are not zero by format."""
        ids = self.tokenizer.ids(text, self.format.max_length)
        rows = len(ids) if self.format.masked else self.format.max_length
        key = self._key(text)
        found = None if self.cache is None else self.cache.get(key, (rows, self.width))
        if found is not None:
            return found
        if self._model is None:
            self._model = self.load()
        states = self._compute(ids)[:rows]
        if self.cache is not None:
            self.cache.put(key, states)
        return states

    def _key(self, text: str) -> str:
        f = self.format
        known = [KEY_FORMAT, text, self.tokenizer.digest, self.identity, f.max_length, f.masked]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _compute(self, ids: list[int]) -> Float[np.ndarray, "T D"]:
        """One prompt at a time: padding to a neighbour's length would change the last bits."""
        longest = self.format.max_length
        padded = min(-(-len(ids) // STEP) * STEP, longest) if self.format.masked else longest
        row = np.full((1, padded), self.tokenizer.pad, np.int32)
        row[0, : len(ids)] = ids
        length = jnp.asarray([len(ids)], jnp.int32) if self.format.masked else None
        return np.array(_states(*nnx.split(self._model), jnp.asarray(row), length)[0], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _states(
    graph: nnx.GraphDef, params: Any, ids: Int[Array, "B T"], length: Int[Array, " B"] | None
):
    return nnx.merge(graph, params)(ids, length)
