# SPDX-License-Identifier: Apache-2.0
"""The text of every token id, so that places in a prompt's text are places in its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import TokenIds

SPECIAL_PIECE = b"\n"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The bytes that each token id adds to the text, all in one array.

    The pieces of a prompt joined are its text, up to the leading space that SentencePiece
    decoders strip. Special tokens (begin, end, roles of a chat template) stand as one newline:
    they are no text, and they separate what is before them from what is after. Ids without a
    token have an empty piece.

    Attributes:
        blob: [bytes] uint8, the pieces one after the other.
        offsets: [V + 2] int64; the piece of id t is blob[offsets[t]:offsets[t + 1]]. Id V
            stands for every id beyond the vocabulary.
    """

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.blob = blob
        self.offsets = offsets
        self._widths = np.diff(offsets)

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> Vocabulary:
        widths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        offsets = np.zeros(len(pieces) + 2, np.int64)
        np.cumsum(widths, out=offsets[1:-1])
        offsets[-1] = offsets[-2]
        return cls(np.frombuffer(b"".join(pieces), np.uint8), offsets)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read the pieces of a Hugging Face tokenizer (`transformers` or `tokenizers`), or of
        Mistral's own (`mistral_common`, which vLLM wraps).

        Byte-level and SentencePiece vocabularies are read directly; the pieces of any other
        are what `decode` makes of them behind a first token, some 10 us a token.
        """
        mistral = getattr(tokenizer, "tokenizer", tokenizer)
        if hasattr(mistral, "is_special") and hasattr(mistral, "id_to_piece"):
            return cls.from_pieces(_mistral_pieces(mistral))
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        tokens: dict[str, int] = tokenizer.get_vocab()
        reader = _reader(backend)
        added_tokens = _added_tokens(tokenizer, backend)
        # A token added late may lie beyond the vocabulary that the tokenizer tells of.
        pieces = [b""] * (max((*tokens.values(), *added_tokens), default=-1) + 1)
        if reader is None:
            for token_id, piece in _decoded(tokenizer, sorted(tokens.values())):
                pieces[token_id] = piece
        else:
            for token, token_id in tokens.items():
                pieces[token_id] = reader(token)
        for token_id, added in added_tokens.items():
            pieces[token_id] = SPECIAL_PIECE if added.special else added.content.encode()
        return cls.from_pieces(pieces)

    @property
    def num_tokens(self) -> int:
        return len(self.offsets) - 2

    def piece(self, token_id: int) -> bytes:
        return self.blob[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    def pieces(self) -> list[bytes]:
        """Return the pieces of all ids, the empty one of id V included."""
        blob, offsets = self.blob.tobytes(), self.offsets.tolist()
        return [blob[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]

    def text(self, token_ids: TokenIds) -> bytes:
        """Return the text of a prompt: UTF-8, which may begin or end within a character."""
        widths = self.widths(token_ids)
        starts = self.offsets.take(np.minimum(token_ids, self.num_tokens), mode="clip")
        ends = np.cumsum(widths)
        total = int(ends[-1]) if ends.size else 0
        source = np.repeat(starts - (ends - widths), widths) + np.arange(total)
        text: bytes = self.blob[source].tobytes()
        return text

    def widths(self, token_ids: TokenIds) -> NDArray[np.int64]:
        """Return the bytes in each token's piece: [n]."""
        return self._widths.take(token_ids, mode="clip")

    def byte_ends(self, token_ids: TokenIds) -> NDArray[np.int64]:
        """Return the place in the text, in bytes, where each token ends: [n], non-decreasing."""
        ends: NDArray[np.int64] = np.cumsum(self.widths(token_ids))
        return ends


def _mistral_pieces(tokenizer: Any) -> list[bytes]:
    """Pieces of a `Tekkenizer`, whose pieces are bytes that may be parts of a character, or of a
    `SentencePieceTokenizer`. Decoding them one by one loses the parts."""
    special = {i for i in range(tokenizer.n_words) if tokenizer.is_special(i)} | {tokenizer.unk_id}
    read = getattr(tokenizer, "id_to_byte_piece", None)
    if read is None:

        def read(token_id: int) -> bytes:
            return _metaspace_byte_reader(tokenizer.id_to_piece(token_id))

    return [SPECIAL_PIECE if i in special else read(i) for i in range(tokenizer.n_words)]


def _reader(backend: Any) -> Callable[[str], bytes] | None:
    """Return what turns a token into its bytes, or None if only decoding can tell."""
    state = getattr(getattr(backend, "decoder", None), "__getstate__", lambda: None)()
    if not isinstance(state, bytes):
        return None
    decoder = json.loads(state)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level_reader()
    # Strip drops the space before the first word of a text, Fuse changes no text.
    if kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
        if replaced == [("▁", " ")]:
            return _metaspace_byte_reader if "ByteFallback" in kinds else _metaspace_reader
    return None


def _byte_level_reader() -> Callable[[str], bytes]:
    """Undo the byte-level alphabet: printable bytes are themselves, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = dict(zip(printable, printable, strict=True))
    table |= {0x100 + n: byte for n, byte in enumerate(others)}

    def read(token: str) -> bytes:
        try:
            return token.translate(table).encode("latin-1")
        except UnicodeEncodeError:  # a token added as plain text
            return token.encode()

    return read


def _metaspace_reader(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _metaspace_byte_reader(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _metaspace_reader(token)


def _decoded(tokenizer: Any, token_ids: list[int]) -> Iterable[tuple[int, bytes]]:
    """Decode each id behind a fixed first one, which keeps the space that starts a word."""
    first = token_ids[0] if token_ids else 0
    # `transformers` decodes batches with batch_decode, `tokenizers` with decode_batch.
    decode = getattr(tokenizer, "batch_decode", None) or tokenizer.decode_batch
    pairs = [[first, first], *([first, token_id] for token_id in token_ids)]
    (lead,) = decode([[first]], skip_special_tokens=False)
    texts = decode(pairs, skip_special_tokens=False)[1:]
    for token_id, text in zip(token_ids, texts, strict=True):
        yield token_id, text.removeprefix(lead).encode()


def _added_tokens(tokenizer: Any, backend: Any) -> dict[int, Any]:
    if hasattr(backend, "get_added_tokens_decoder"):
        return dict(backend.get_added_tokens_decoder())
    return getattr(tokenizer, "added_tokens_decoder", {})
