"""SentencePiece's model files to tokenizers, for T5's kind, without SentencePiece or protobuf."""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

# Field numbers of sentencepiece_model.proto: of a model, of one piece, and of the two specs.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE = 1, 2
MODEL_TYPE, BYTE_FALLBACK, UNK_ID = 3, 35, 40
SUFFIX_SPACE, CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES = 24, 2, 3, 4
UNIGRAM = 1
EOS = "</s>"
SPECIAL = ("<pad>", EOS, "<unk>")


@dataclasses.dataclass(frozen=True)
class Spiece:
    """What a tokenizer needs of a model file.

    Attributes:
        pieces: with their log-probabilities, in order of ids.
        trainer, normalizer: the fields of the two specs by number, defaults left out.
    """

    pieces: list[tuple[str, float]]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]


def read_spiece(file: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model, which ends every text with </s> as T5 does.

    T5's sentinel tokens, which are not in the file and in no prompt, are left out.

    Args:
        file: as `spiece.model`.

    Raises:
        ValueError: a damaged file, or a kind of model that is not T5's.
    """
    damaged = ValueError(f"{str(file)!r} must be a SentencePiece model, or is damaged")
    try:
        found = parse(file.read_bytes())
    except (LookupError, ValueError, TypeError, AttributeError, struct.error):
        raise damaged from None
    trainer, normalizer = found.trainer, found.normalizer
    spaces = normalizer.get(DUMMY_PREFIX, 1) and normalizer.get(REMOVE_SPACES, 1)
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM or trainer.get(SUFFIX_SPACE, 0) or not spaces:
        raise ValueError(
            f"{str(file)!r} must be a unigram model that puts one space before each word, as T5's; "
            "make a tokenizer.json of it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    names = [piece for piece, _ in found.pieces]
    if missing := [name for name in SPECIAL if name not in names]:
        raise ValueError(f"{str(file)!r} must have the pieces {', '.join(missing)}, as T5's")
    try:
        return _tokenizer(found)
    except Exception:  # the library raises no narrower class
        raise damaged from None


def _tokenizer(found: Spiece) -> Tokenizer:
    """The parts that SentencePiece runs in one, as the library has them."""
    unk_id, fallback = found.trainer.get(UNK_ID, 0), bool(found.trainer.get(BYTE_FALLBACK, 0))
    tokenizer = Tokenizer(models.Unigram(found.pieces, unk_id, fallback))
    if charsmap := found.normalizer.get(CHARSMAP):
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", EOS], special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return tokenizer


def parse(data: bytes) -> Spiece:
    """The fields of a model file; raises LookupError, ValueError and the like where damaged."""
    pieces, specs = [], {TRAINER: {}, NORMALIZER: {}}
    for number, value in fields(data):
        if number == PIECES:
            piece = dict(fields(value))
            pieces.append((piece[PIECE].decode(), piece.get(SCORE, 0.0)))
        elif number in specs:
            specs[number] = dict(fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return Spiece(pieces, specs[TRAINER], specs[NORMALIZER])


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: int, float or bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = divmod(tag, 8)
        if kind == 0:
            value, at = varint(data, at)
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        elif kind == 1:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        elif kind == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"{kind=} of a field")
        if at > len(data):
            raise ValueError("the file ends within a field")
        yield number, value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
