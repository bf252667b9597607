"""tiny's text encoder: a table of words plus a table of places, in place of a language model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from pasa_jax.models.tiny import scenes

MAX_WORDS = 16  # text tokens, zero beyond the prompt as Wan pads its own
NULL, PAD = len(scenes.WORDS), -1


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """State of word w at place i: words[w] + places[i]; the last row of `words` is "no prompt".

    Attributes:
        words: f32 [len(WORDS) + 1, D].
        places: f32 [MAX_WORDS, D].
    """

    words: Float[np.ndarray, "W D"]
    places: Float[np.ndarray, "E D"]

    def encode(self, prompts: list[str]) -> Float[np.ndarray, "B E D"]:
        """Prompts to text states, zero-padded to MAX_WORDS; "" is the empty prompt of guidance.

        Raises:
            ValueError: a prompt outside tiny's words and grammar.
        """
        ids = np.stack([word_ids(prompt) for prompt in prompts])
        states = self.words[ids] + self.places
        return np.where((ids == PAD)[..., None], np.float32(0), states)


def word_ids(prompt: str) -> Int[np.ndarray, " E"]:
    """int32 [MAX_WORDS]: rows of the table of words, PAD beyond the prompt; "" is one NULL.

    Raises:
        ValueError: a prompt outside tiny's words and grammar.
    """
    ids = np.full(MAX_WORDS, PAD, np.int32)
    if not prompt.strip():
        ids[0] = NULL
        return ids
    words = scenes.parse(prompt).prompt.split()
    ids[: len(words)] = [scenes.WORDS.index(word) for word in words]
    return ids


def save(encoder: TextEncoder, folder: Path) -> None:
    """Writes config.json (with the words) and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in vars(encoder).items()}, folder / "model.safetensors"
    )
    config = {
        "_class_name": "TinyTextEncoder",
        "max_words": MAX_WORDS,
        "hidden_size": encoder.words.shape[1],
        "words": list(scenes.WORDS),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> TextEncoder:
    """Reads what `save` wrote.

    Raises:
        ValueError: the folder's words are not this version's.
    """
    words = tuple(json.loads((folder / "config.json").read_text())["words"])
    if words != scenes.WORDS:
        raise ValueError(f"{words=} of {str(folder)!r} must be {scenes.WORDS}")
    return TextEncoder(**load_file(folder / "model.safetensors"))
