"""Prompts to states: cleaning, the checkpoint's own tokenizer, the encoder's life, the cache."""

import dataclasses
import json
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from pasa_jax import spiece, text
from pasa_jax.models.t5 import T5Config, T5Encoder
from pasa_jax.pipeline import TextEncoder

FIXTURES = Path(__file__).parent.parent / "fixtures"
SENTENCES = (
    "a red circle moving right on a green background",
    "blue and white waves moving left under a grey sky",
    "two foxes run through deep snow, then stop and look back",
    "a panda plays a small guitar in a bamboo forest at dawn",
)
VOCAB = 60
CONFIG = T5Config(
    vocab_size=VOCAB + 3,
    dim=16,
    num_heads=2,
    head_dim=4,
    ffn_dim=20,
    num_layers=1,
    buckets=8,
    max_distance=20,
    bias_per_layer=True,
    eps=1e-6,
)
F32 = {"dtype": jnp.float32}
MASKED = text.TextFormat(max_length=12, clean=True, masked=True)
OPEN = text.TextFormat(max_length=12, clean=False, masked=False)
forward = jax.jit(lambda model, *inputs: model(*inputs))


@pytest.fixture(scope="session")
def trained():
    """A unigram tokenizer that ends texts as T5's do."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    return inner


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return text.read_tokenizer(folder, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def model():
    """Random values, which NumPy draws in less time than JAX compiles its own."""
    graph, state = nnx.split(nnx.eval_shape(lambda: T5Encoder(CONFIG, rngs=nnx.Rngs(0), **F32)))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


class Loader:
    """Counts how often the encoder is read."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self):
        self.calls += 1
        return self.model


@pytest.fixture
def make(tokenizer, model):
    """make(format, cache) → a prompt encoder and its loader."""

    def create(format=MASKED, cache=None, identity="one"):
        loader = Loader(model)
        width = CONFIG.dim
        return text.PromptEncoder(tokenizer, format, loader, width, identity, cache), loader

    return create


# Cleaning


CLEAN = {
    "a  red\tcircle\n moving ": "a red circle moving",
    "“two” foxes’ snow": '"two" foxes\' snow',
    "&lt;b&gt; fish &amp;amp; chips &copy; 5": "<b> fish & chips © 5",
    "&ldquo;x&rdquo;": '"x"',
    "“x” < &ldquo;y&rdquo; &amp;amp;": '"x" < “y” &',
    "色调艳丽，过曝，静态。１２３": "色调艳丽,過曝".replace("過", "过") + ",静态。123",
    "ﬁne ﬂow ŉ ǆ": "fine flow 'n dž",
    "e\u0301 \x1b[31mred\x1b[0m\x07 \ufeffx\u2028y\r\nz": "é red xy z".replace("xy", "x y"),
    "\ud83d\ude00 \ud800": "😀 \ufffd",
    "": "",
}


@pytest.mark.parametrize("prompt", CLEAN, ids=range(len(CLEAN)))
def test_cleaning_without_ftfy(prompt, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert text.clean_prompt(prompt) == CLEAN[prompt]


def test_cleaning_without_ftfy_is_that_with_it(transformers, monkeypatch):
    pytest.importorskip("ftfy")
    from diffusers.pipelines.wan import pipeline_wan

    prompts = [*CLEAN, *SENTENCES]
    want = [pipeline_wan.prompt_clean(prompt) for prompt in prompts]
    assert [text.clean_prompt(prompt) for prompt in prompts] == want
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert [text.clean_prompt(prompt) for prompt in prompts] == want


# Tokenizers


def test_ids_are_transformers(tokenizer, folder, transformers):
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    prompts = [*SENTENCES, "", "ﬁfty   Ωs", "a </s> b"]
    want = fast(prompts, padding="max_length", max_length=12, truncation=True).input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = [tokenizer.ids(prompt, 12) for prompt in prompts]
    assert [ids + [tokenizer.pad] * (12 - len(ids)) for ids in got] == want
    assert max(map(len, got)) == 12 and min(map(len, got)) == 1


def test_long_prompts_are_cut_with_a_warning(tokenizer):
    whole = tokenizer.ids(SENTENCES[0], 99)
    with pytest.warns(UserWarning, match=rf"prompt of {len(whole)} tokens is cut to 5: 'a red"):
        assert tokenizer.ids(SENTENCES[0], 5) == [*whole[:4], 1]


def test_settings_of_the_file_neither_cut_nor_pad(trained, tokenizer, tmp_path):
    other = tokenizers.Tokenizer.from_str(trained.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=99)
    other.save(str(tmp_path / "tokenizer.json"))
    read = text.read_tokenizer(tmp_path, CONFIG.vocab_size)
    assert read.ids(SENTENCES[0], 99) == tokenizer.ids(SENTENCES[0], 99)
    assert read.digest != tokenizer.digest


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"prompt 'a\\ud800' must be text"):
        tokenizer.ids("a\ud800", 9)


def test_ids_of_a_sentencepiece_model_are_sentencepieces(tmp_path):
    shutil.copy(FIXTURES / "spiece.model", tmp_path)
    read = text.read_tokenizer(tmp_path, 70)
    stored = json.loads((FIXTURES / "spiece.json").read_text())
    assert {prompt: read.ids(prompt, 99) for prompt in stored} == stored
    assert read.pad == 0


def test_tokenizer_json_comes_before_the_sentencepiece_model(folder, tokenizer):
    shutil.copy(FIXTURES / "spiece.model", folder)
    assert text.read_tokenizer(folder, 70).digest == tokenizer.digest


def test_tokenizer_of_another_encoder_is_refused(folder, trained):
    size = trained.get_vocab_size()
    message = rf"tokenizer.json' has tokens up to {size - 1}, must be below vocab_size={size - 1} "
    with pytest.raises(ValueError, match=message):
        text.read_tokenizer(folder, size - 1)
    text.read_tokenizer(folder, size)


def test_tokenizer_without_an_end_of_texts_is_refused(trained, tmp_path):
    other = tokenizers.Tokenizer.from_str(trained.to_str())
    other.post_processor = processors.TemplateProcessing(single=["$A"], special_tokens=[])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"must pad with <pad> and end texts with </s>"):
        text.read_tokenizer(tmp_path, 99)


def test_damaged_and_missing_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer.json or spiece.model"):
        text.read_tokenizer(tmp_path, 99)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json' is damaged or no tokenizer"):
        text.read_tokenizer(tmp_path, 99)


def varint(value):
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def field(number, value):
    """A field of a protobuf message: bytes, an int or a float."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(pieces=("<pad>", "</s>", "<unk>", "▁a"), trainer=b"", normalizer=b""):
    listed = b"".join(field(1, field(1, piece.encode())) for piece in pieces)
    return listed + field(2, field(40, 2) + trainer) + field(3, normalizer)


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"", "must be a SentencePiece model, or is damaged"),
        (b"hello", "must be a SentencePiece model, or is damaged"),
        (message()[:-3], "must be a SentencePiece model, or is damaged"),
        (message() + b"\x08", "must be a SentencePiece model, or is damaged"),
        (field(1, b"\x0f"), "must be a SentencePiece model, or is damaged"),
        (field(1, field(2, 7)), "must be a SentencePiece model, or is damaged"),
        (message(normalizer=field(2, b"xx")), "must be a SentencePiece model, or is damaged"),
        (message(trainer=field(3, 2)), "must be a unigram model that puts one space before"),
        (message(trainer=field(24, 1)), "must be a unigram model that puts one space before"),
        (message(normalizer=field(3, 0)), "must be a unigram model that puts one space before"),
        (message(("</s>", "<unk>", "▁a")), "must have the pieces <pad>, as T5's"),
    ],
    ids=range(11),
)
def test_damaged_and_other_sentencepiece_models(data, refusal, tmp_path):
    file = tmp_path / "spiece.model"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=refusal):
        spiece.read_spiece(file)


def test_a_sentencepiece_model_of_defaults(tmp_path):
    file = tmp_path / "spiece.model"
    bytes_of_e = ("<0xC3>", "<0xA9>")
    pieces = ("<pad>", "</s>", "<unk>", "▁a", "▁", *bytes_of_e)
    file.write_bytes(message(pieces) + b"\x49" + bytes(8))  # a field that readers may skip
    assert spiece.read_spiece(file).encode("a é").ids == [3, 4, 2, 1]
    file.write_bytes(message(pieces, field(35, 1)))
    assert spiece.read_spiece(file).encode("a é").ids == [3, 4, 5, 6, 1]


def test_scores_of_a_sentencepiece_model_decide(tmp_path):
    file = tmp_path / "spiece.model"
    scores = {"▁a": -1.0, "b": -1.0, "▁ab": -5.0, "c": -1.0, "bc": -1.5}
    scored = b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in scores.items())
    file.write_bytes(message(("<pad>", "</s>", "<unk>")) + scored)
    assert spiece.read_spiece(file).encode("ab abc").tokens == ["▁a", "b", "▁a", "bc", "</s>"]


# Encoding


def test_states_beyond_a_prompts_own_tokens_are_zero(make, tokenizer, model):
    encoder, _ = make()
    prompts = ["a red", "", "blue  waves"]
    states = encoder.encode(prompts)
    assert isinstance(encoder, TextEncoder)
    assert states.shape == (3, 12, CONFIG.dim) and states.dtype == np.float32
    ids = [tokenizer.ids(prompt, 12) for prompt in ("a red", "", "blue waves")]
    lengths = [len(row) for row in ids]
    padded = [row + [9] * (max(lengths) - len(row)) for row in ids]
    want = forward(model, jnp.asarray(padded, jnp.int32), jnp.asarray(lengths, jnp.int32))
    for row, expected, length in zip(states, want, lengths, strict=True):
        # Sums of f32 in another order, of states of size 1.
        np.testing.assert_allclose(row[:length], expected[:length], rtol=0, atol=1e-5)
        assert not row[length:].any()


def test_an_open_format_attends_to_padding(make, tokenizer, model):
    encoder, _ = make(OPEN)
    ids = tokenizer.ids("a red", 12)
    padded = jnp.asarray([ids + [tokenizer.pad] * (12 - len(ids))], jnp.int32)
    states = encoder.encode(["a red"])[0]
    np.testing.assert_allclose(states, forward(model, padded)[0], rtol=0, atol=1e-5)
    masked = make()[0].encode(["a red"])[0]
    assert np.abs(states - masked)[: len(ids)].max() > 1e-2


def test_only_the_clean_format_cleans(make):
    straight = ["a red", "a&#32;red"]
    clean, kept = make()[0].encode(straight), make(OPEN)[0].encode(straight)
    np.testing.assert_array_equal(clean[0], clean[1])
    assert np.abs(kept[0] - kept[1]).max() > 1e-2


def test_states_depend_on_no_neighbour(make):
    encoder, _ = make()
    together = encoder.encode(["a red circle", "blue"])
    np.testing.assert_array_equal(together[1], encoder.encode(["blue"])[0])


def test_masked_texts_are_padded_to_few_lengths(make, monkeypatch):
    lengths = []
    states = lambda graph, params, ids, length: (  # noqa: E731
        lengths.append((ids.shape[1], int(length[0]))) or jnp.zeros((1, ids.shape[1], CONFIG.dim))
    )
    monkeypatch.setattr(text, "_states", states)
    monkeypatch.setattr(text, "STEP", 4)
    prompts = ["", "a", "a a a", "a a a a", "a " * 9, "a " * 11]
    make(dataclasses.replace(MASKED, max_length=11))[0].encode(prompts[:-1])
    assert lengths == [(4, 1), (4, 2), (4, 4), (8, 5), (11, 10)]


def test_the_encoder_is_loaded_late_once_and_dropped(make, tmp_path):
    encoder, loader = make(cache=text.StateCache(tmp_path / "cache"))
    assert loader.calls == 0
    first = encoder.encode(["a red", "blue"])
    encoder.encode(["green"])
    assert loader.calls == 1
    encoder.drop()
    assert encoder._model is None
    np.testing.assert_array_equal(encoder.encode(["a  red", "blue"]), first)  # cleaned alike
    assert loader.calls == 1  # all of it from the cache
    encoder.encode(["grey"])
    assert loader.calls == 2


@pytest.mark.parametrize("max_length", [0, -1])
def test_refused_formats(max_length):
    with pytest.raises(ValueError, match=r"self.max_length=.+ must be at least 1"):
        text.TextFormat(max_length=max_length, clean=True, masked=True)


def test_formats_of_the_families():
    wan, cog = text.TextFormat.wan(), text.TextFormat.cogvideox()
    assert (wan.max_length, wan.clean, wan.masked) == (512, True, True)
    assert (cog.max_length, cog.clean, cog.masked) == (226, False, False)


# The cache


def entry(cache):
    (file,) = cache.folder.iterdir()
    return file


@pytest.fixture
def cache(tmp_path):
    return text.StateCache(tmp_path / "a" / "cache")


@pytest.mark.parametrize(
    "change", [{"identity": "two"}, {"format": dataclasses.replace(MASKED, max_length=13)}]
)
def test_entries_of_other_encoders_are_not_found(change, make, cache):
    make(cache=cache)[0].encode(["a red"])
    encoder, loader = make(cache=cache, **change)
    encoder.encode(["a red"])
    assert loader.calls == 1 and len(list(cache.folder.iterdir())) == 2


def test_entries_of_another_tokenizer_or_masking_are_not_found(make, cache):
    encoder, _ = make(cache=cache)
    keys = {
        encoder._key("a"),
        encoder._key("b"),
        make(dataclasses.replace(MASKED, masked=False))[0]._key("a"),
        dataclasses.replace(
            encoder, tokenizer=dataclasses.replace(encoder.tokenizer, digest="x")
        )._key("a"),
    }
    assert len(keys) == 4
    assert make(cache=None)[0]._key("a") in keys


def flip(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: data[:-9], lambda data: b"", lambda data: data + bytes(2**21)],
    ids=["flipped", "cut", "empty", "longer"],
)
def test_damaged_entries_are_computed_again(damage, make, cache):
    want = make(cache=cache)[0].encode(["a red"])
    file = entry(cache)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    encoder, loader = make(cache=cache)
    np.testing.assert_array_equal(encoder.encode(["a red"]), want)
    assert loader.calls == 1 and entry(cache).read_bytes() == sound


def test_entries_of_another_shape_or_type_or_without_a_digest_are_not_taken(cache):
    states = np.ones((2, 4), np.float32)
    cache.put("key", states)
    np.testing.assert_array_equal(cache.get("key", (2, 4)), states)
    assert cache.get("key", (4, 2)) is None and cache.get("other", (2, 4)) is None
    text.save_file({"states": states}, entry(cache))
    assert cache.get("key", (2, 4)) is None
    text.save_file({"other": states}, entry(cache))
    assert cache.get("key", (2, 4)) is None
    half = states.astype(np.float16)
    text.save_file({"states": half}, entry(cache), metadata={"sha256": text._digest(half)})
    assert cache.get("key", (2, 4)) is None


def test_a_larger_file_is_not_read(cache, monkeypatch):
    cache.put("key", np.ones((2000, 4), np.float32))
    monkeypatch.setattr(text, "safe_open", None)
    assert cache.get("key", (2, 4)) is None


def test_a_cache_that_cannot_be_written_only_warns(make, tmp_path):
    (tmp_path / "file").write_text("")
    encoder, _ = make(cache=text.StateCache(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"prompt states were not kept in .+cache'"):
        states = encoder.encode(["a red"])
    assert states.any()


def test_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text.StateCache.default().folder == tmp_path / "pasa-jax" / "prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text.StateCache.default().folder == tmp_path / ".cache" / "pasa-jax" / "prompts"


def test_identity_follows_config_files_and_dtype(tmp_path):
    folder = tmp_path / "encoder"
    (folder / "params").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "params" / "a.bin").write_bytes(b"12")
    found = [text.checkpoint_identity(folder, "float32")]
    assert text.checkpoint_identity(folder, jnp.float32) == found[0]
    found.append(text.checkpoint_identity(folder, "bfloat16"))
    os.utime(folder / "params" / "a.bin", (5, 5))
    found.append(text.checkpoint_identity(folder, "float32"))
    (folder / "params" / "a.bin").write_bytes(b"123")
    os.utime(folder / "params" / "a.bin", (5, 5))
    found.append(text.checkpoint_identity(folder, "float32"))
    (folder / "params" / "a.bin").rename(folder / "params" / "b.bin")
    found.append(text.checkpoint_identity(folder, "float32"))
    stat = (folder / "config.json").stat()
    (folder / "config.json").write_text("[]")
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found.append(text.checkpoint_identity(folder, "float32"))
    assert len(set(found)) == 6
    folder.rename(tmp_path / "moved")
    assert text.checkpoint_identity(tmp_path / "moved", "float32") == found[-1]
