# SPDX-License-Identifier: Apache-2.0
"""The characters that end a sentence."""

from __future__ import annotations

import re

# End a sentence only before white space: they also occur in numbers, addresses and code.
SOFT = ".!?…"
# End a sentence wherever they are: CJK, Arabic, Urdu, Devanagari, Armenian, Ethiopic, Burmese,
# Khmer and Tibetan full stops, question and exclamation marks; and marks that stand for two.
HARD = "。｡！？؟۔।॥։።။។．፧།‼⁇⁈⁉"
NEWLINES = "\n\r\v\f\x85\u2028\u2029"
# May stand between a mark and the end of its sentence.
CLOSERS = "\"'”’»›)]}」』）】》〉］｝*_`"
# May open the next sentence; those that also close do so only without white space before them.
OPENERS = "([{<\"'“‘„‚«‹¿¡（［｛「『【《〈"

_closing = re.escape(SOFT + HARD + CLOSERS)
CLOSING = re.compile(f"[{_closing}]+")
SOFT_END = re.compile(rf"[{re.escape(SOFT)}]+[{_closing}]*(\s|$)")
HARD_END = re.compile(rf"[{HARD}][{_closing}]*")
LINE_END = re.compile(rf"[{NEWLINES}](?:\s*[{NEWLINES}])?")
ANY = re.compile(rf"[{_closing}{NEWLINES}]")
