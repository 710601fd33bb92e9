# SPDX-License-Identifier: Apache-2.0
"""A model's own chat template, as text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_MARK = "9c1f reply 9c1f"


class Chat:
    """What stands around a user's words; a plain text for a model without a template."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of `transformers`."""
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        bos = tokenizer.bos_token or ""
        first = tokenizer("").input_ids[:1]
        # The engine adds it: a template's own would be a second one.
        self._bos = bos if bos and first == [tokenizer.bos_token_id] else ""

    @property
    def end(self) -> str:
        """How the token is written that ends a reply."""
        return str(self._tokenizer.eos_token or "")

    def count(self, text: str) -> int:
        """Tokens of a text, without the begin-of-text token."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def open(self, user: str) -> str:
        """A conversation up to the first word of the reply."""
        if not self.has_template:
            return f"{user}\nAnswer: "
        return self._render([{"role": "user", "content": user}])

    def go_on(self, user: str) -> str:
        """From the end of a reply to the first word of the next."""
        if not self.has_template:
            return f"\n\n{user}\nAnswer: "
        turns = [("user", "."), ("assistant", _MARK), ("user", user)]
        text = self._render([{"role": role, "content": words} for role, words in turns])
        return text.partition(_MARK)[2]

    def _render(self, messages: list[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(self._bos)


@lru_cache(maxsize=2)
def chat_of(model: str) -> Chat:
    """Of a folder or name that vLLM serves."""
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(model))
