# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file or of a tokenizer.json: encoding by `tokenizers`, decoding byte by byte."""

import codecs
import json
import re
from pathlib import Path

import numpy as np

from cupyattn.models.gguf import ModelError, field

# What splits the text before BPE, by GGUF's name of it: are digits single tokens?
_DIGITS_ALONE = {"smollm": True, "gpt-2": False, "default": False}
_CONTROL, _USER_DEFINED = 3, 4  # token types written as they are, never split


def _byte_of_character():
    """GPT-2's map of 256 printable characters to bytes: printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update({chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)})
    return table


_BYTES = _byte_of_character()


def _byte_level(token):
    # a character that stands for no byte is itself: such tokens fill up some vocabularies
    return b"".join(_BYTES.get(character) or character.encode() for character in token)


def _sentence_piece(token):
    """Bytes of a token as SentencePiece writes it: <0x0A> is a byte, U+2581 a space."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _decoder(decoder):
    """What turns a token into bytes, by the decoder of a tokenizer.json."""
    decoder = decoder or {}
    kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
    if "ByteLevel" in kinds:
        return _byte_level
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _sentence_piece
    raise ModelError("tokenizer.json must have a decoder of type ByteLevel, ByteFallback or Metaspace, got "
                     f"{', '.join(map(str, kinds))}")


def _ends(folder):
    """Ids that end a text, of generation_config.json and config.json."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids += found if isinstance(found, list) else [found]
    return frozenset(id for id in ids if id is not None)


def read_tokenizer(folder):
    """The `tokenizers.Tokenizer` of a folder's tokenizer.json, without padding and truncation; or ModelError."""
    from tokenizers import Tokenizer as Backend

    if not (folder / "tokenizer.json").is_file():
        raise ModelError("tokenizer.json is missing")
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the class tokenizers raises
        raise ModelError(f"tokenizer.json cannot be read: {str(error).splitlines()[0]}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


class Tokenizer:
    """Text to token ids and back, from the vocabulary and merges in GGUF metadata; or see `from_folder`.

    Parameters
    ----------
    metadata : dict
        ``GGUF.metadata``.

    Attributes
    ----------
    bos_id : int or None
        Put before every prompt when the file asks for it (``add_bos_token``), else None. A tokenizer.json has rules of
        its own for what it puts there; None then.
    eos_ids : frozenset of int
        Tokens that end a text.

    Raises
    ------
    ModelError
        No vocabulary in the file, one that contradicts itself, or a tokenizer other than byte-level BPE.

    Notes
    -----
    Special tokens are recognised in the text (``<|im_start|>``). A byte the vocabulary lacks is dropped.
    """

    def __init__(self, metadata):
        from tokenizers import AddedToken, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        def value(name, kind, default=None):
            return field(metadata, "tokenizer.ggml." + name, kind, default)

        kind, pre = value("model", str, "none"), value("pre", str, "default")
        if kind != "gpt2" or pre not in _DIGITS_ALONE:
            raise ModelError(f"tokenizer must be byte-level BPE (gpt2) with pre-tokenizer {', '.join(_DIGITS_ALONE)}, "
                             f"got {kind} with {pre}")
        tokens, merges = value("tokens", list), value("merges", list)
        types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32)))
        if types.shape != (len(tokens),):
            raise ModelError(f"metadata tokenizer.ggml.token_type must hold one number for each of the {len(tokens)} "
                             f"tokens, got {list(types.shape)}")
        special = np.flatnonzero((types == _CONTROL) | (types == _USER_DEFINED))

        vocabulary = {token: id for id, token in enumerate(tokens)}
        try:
            self._backend = Backend(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
        except Exception as error:  # the class tokenizers raises, for a merge of unknown tokens or of no two tokens
            raise ModelError(f"metadata tokenizer.ggml.merges do not fit the tokens: "
                             f"{str(error).splitlines()[0]}") from None
        split = [pre_tokenizers.ByteLevel(add_prefix_space=value("add_space_prefix", bool, False))]
        if _DIGITS_ALONE[pre]:
            split.insert(0, pre_tokenizers.Digits(individual_digits=True))
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(split)
        self._backend.add_special_tokens([AddedToken(tokens[id], normalized=False) for id in special])

        self._tokens, self._piece = dict(enumerate(tokens)), _byte_level
        self._control = frozenset(np.flatnonzero(types == _CONTROL).tolist())
        self._user_defined = frozenset(np.flatnonzero(types == _USER_DEFINED).tolist())
        ids = {name: value(name, int) for name in ("bos_token_id", "eos_token_id", "eot_token_id")
               if metadata.get("tokenizer.ggml." + name) is not None}
        for name, id in ids.items():
            if not 0 <= id < len(tokens):
                raise ModelError(f"metadata tokenizer.ggml.{name} must be from 0 to {len(tokens) - 1}, got {id}")
        self.bos_id = ids.pop("bos_token_id", None)
        if not value("add_bos_token", bool, False):
            self.bos_id = None
        self.eos_ids = frozenset(ids.values())

    @classmethod
    def from_folder(cls, path):
        """The tokenizer of a Hugging Face model: its tokenizer.json, and the ends of text its configurations name.

        Parameters
        ----------
        path : str or Path
            A folder with tokenizer.json, and perhaps generation_config.json and config.json.

        Raises
        ------
        ModelError
            No tokenizer.json, a damaged one, or one that neither is byte-level nor falls back to bytes.
        """
        path = Path(path)
        backend = read_tokenizer(path)
        self = cls.__new__(cls)
        self._backend, self.bos_id = backend, None
        self._piece = _decoder(json.loads((path / "tokenizer.json").read_text(encoding="utf-8")).get("decoder"))
        self._tokens = {id: token for token, id in backend.get_vocab(with_added_tokens=True).items()}
        added = backend.get_added_tokens_decoder()
        self._control = frozenset(id for id, token in added.items() if token.special)
        self._user_defined = frozenset(added) - self._control
        self.eos_ids = _ends(path)
        return self

    def encode(self, text):
        """Token ids of `text`, a list of int; begins with ``bos_id`` if there is one.

        Raises
        ------
        ModelError
            A lone surrogate in `text`: what Python makes of bytes on the command line that are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ModelError("a prompt must be valid UTF-8, got "
                             f"{text[error.start]!a} as character {error.start + 1}") from None
        ids = self._backend.encode(text).ids
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def token_bytes(self, id):
        """The bytes `id` stands for; control tokens (end of text and the like) stand for none."""
        if id in self._control:
            return b""
        token = self._tokens.get(id, "")   # a vocabulary may end before the embedding does
        return token.encode() if id in self._user_defined else self._piece(token)

    def decode(self, ids):
        """Text of the token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


class TextStream:
    """Turns a stream of tokens into text, holding back the bytes of a character that is not complete.

    The pieces put together, `finish` included, are ``tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id):
        """Text that became complete with token `id`."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self):
        """What is left: U+FFFD for an incomplete character, else nothing."""
        return self._decoder.decode(b"", final=True)
