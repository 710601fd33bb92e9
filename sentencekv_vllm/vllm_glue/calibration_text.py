# SPDX-License-Identifier: Apache-2.0
"""Which tokens a calibration runs through the model, and at which positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ops.basis_file import USER_TEXT, text_digest

KEY = "sentencekv_calibration"
"""Of `additional_config`: {"text": path, "tokens": number}, for a text of the user's."""
BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "calibration.txt"
TOKENS = 2560  # of the bundled text at most; common tokenizers make some 2400 of it
PIECE = 1280  # tokens of a forward


class CalibrationError(ValueError):
    """It cannot run; the message says why.

    Args:
        is_chosen: by the settings, so that nobody need be warned.
    """

    def __init__(self, reason: str, is_chosen: bool = False) -> None:
        super().__init__(reason)
        self.is_chosen = is_chosen


@dataclass(frozen=True)
class Job:
    """What to run."""

    text: str
    source: str  # names the text in the file
    tokens: int  # at most
    is_forced: bool  # by the user: what a file holds does not count


@dataclass(frozen=True)
class Piece:
    """One forward."""

    ids: Sequence[int]
    offset: int  # position of the first token


def is_forced(additional_config: dict[str, Any] | None) -> bool:
    """Whether the user asked for a calibration now."""
    return KEY in (additional_config or {})


def read_job(additional_config: dict[str, Any] | None) -> Job:
    """The user's text, or the bundled one.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    users = (additional_config or {}).get(KEY)
    text = (BUNDLED if users is None else Path(users["text"])).read_text(encoding="utf-8")
    if users is None:
        return Job(text, f"bundled {text_digest(text)}", TOKENS, is_forced=False)
    return Job(text, USER_TEXT + text_digest(text), int(users["tokens"]), is_forced=True)


def pieces(ids: Sequence[int], longest: int, positions: int) -> list[Piece]:
    """Equal parts of a text, each run twice; positions of all runs spread over the model's.

    RoPE turns keys and queries with their position, so moments of early ones are not those of
    late ones.

    Args:
        longest: tokens of a forward.
        positions: that the model has.
    """
    longest = min(longest, PIECE, positions)
    count = math.ceil(len(ids) / longest)
    size = math.ceil(len(ids) / count)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    runs = [*parts, *parts]
    last = positions - size
    return [Piece(part, last * i // len(runs)) for i, part in enumerate(runs)]
