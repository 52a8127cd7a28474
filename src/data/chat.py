"""Rows to token ids: the chat template around the prompt, the answer after it, and which tokens are the answer.

Prompt and answer are tokenised apart, so the boundary between them never falls inside a token, and the tokens of the
answer are those that greedy decoding would have to produce.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from src.data.conversations import Message
from src.data.rows import Row
from src.errors import InputError, one_line

Template = Literal["auto", "chat", "raw"]
SHORTEST = 8
"""Fewest tokens of a prompt and its answer for which there must be room."""
TODAY = datetime(2024, 7, 26)
"""The day that templates with a date are given, the one that Llama 3's falls back on: what was measured yesterday and
what is measured today have the same prompts."""
NO_THOUGHTS = {"enable_thinking": False}
"""What chat templates of models that think are given (Qwen3's and SmolLM3's read it; others pass over it)."""
THOUGHTS = re.compile(r"\s*<think>.*?(?:</think>\s*|\Z)|(?:(?!<think>).)*\n\s*</think>\s*?\n\s*", re.DOTALL)
"""What models that think write in front of their answer: closed, unfinished, or, up to a line of its own, unopened."""
QUESTION = {"role": "user", "content": "QUESTION"}
ANSWER = {"role": "assistant", "content": "ANSWER"}
NOW = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<form>.*?)(?P=quote)\s*\)")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row. ``ids[:answer_start]`` is the prompt, the rest the answer with its end token.

    Of a row with ``answer_tokens`` it is so many tokens of that.
    """

    row: Row
    ids: list[int]
    answer_start: int

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens, template included."""
        return self.ids[: self.answer_start]


def dated(template: str) -> str:
    """A chat template whose today is :data:`TODAY`."""
    return NOW.sub(lambda found: repr(TODAY.strftime(found["form"])), template)


def without_thought(prompt: str) -> str:
    """A rendered prompt; a thought that its template opens all the same is closed, empty."""
    return f"{prompt.rstrip()}\n\n</think>\n\n" if prompt.rstrip().endswith("<think>") else prompt


def text_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text that something follows.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        special: Whether what the tokenizer puts in front of texts is put there; an end token behind it never is.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    if special and ids[-1:] == [tokenizer.eos_token_id]:
        bare: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids if bare[-1:] == ids[-1:] else ids[:-1]
    return ids


class Encoder:
    """Tokenises rows for one model. Templates of models that think are told not to (``enable_thinking``).

    Args:
        tokenizer: A transformers tokenizer.
        template: ``chat`` applies the tokenizer's chat template, ``raw`` puts the bare prompt and a new line,
            ``auto`` is ``chat`` where the tokenizer has a template.
        max_length: Tokens of prompt and answer together; longer rows are cut (the answer at its end, the prompt at
            its beginning) and counted in ``truncated``, and by what was cut in ``cut_prompts`` and ``cut_answers``.
        ends: Further tokens that end an answer, such as those that the model's ``generation_config.json`` names.
    """

    def __init__(
        self, tokenizer: Any, *, template: Template = "auto", max_length: int = 1024, ends: Sequence[int] = ()
    ) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise InputError("template chat: this tokenizer has no chat template; use --data.template raw")
        if max_length < SHORTEST:
            raise InputError(f"max_length {max_length}: expected at least {SHORTEST} tokens")
        self.tokenizer = tokenizer
        self.chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.max_length = max_length
        self.truncated = self.cut_prompts = self.cut_answers = 0
        self._dated = dated(tokenizer.get_chat_template()) if self.chat else None
        if self.chat and QUESTION["content"] not in self._render([QUESTION], generation=True):
            raise InputError(
                f"{tokenizer.name_or_path}: its chat template leaves out what the user says where that is a text (some "
                "take lists of parts); expected one that renders it"
            )
        self.end_id = self._end_of_turn()
        self._ends = {*ends, self.end_id} | ({tokenizer.eos_token_id} - {None})
        self._opening = self._opening_of_answers() if self.chat else ""

    def _render(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=generation,
                **NO_THOUGHTS,
            )
        except TemplateError as error:
            raise InputError(
                f"{self.tokenizer.name_or_path}: its chat template cannot be rendered ({one_line(error)}); expected "
                "one that takes a user's message, and an answer to it"
            ) from None

    def _end_of_turn(self) -> int:
        """The token that closes an answer: what the chat template puts after it, else the tokenizer's end token."""
        if self.chat:
            text = self._render([QUESTION, ANSWER], generation=False)
            _, answer, behind = text.rpartition(ANSWER["content"])
            tail = self.tokenizer(behind, add_special_tokens=False).input_ids if answer else []
            if tail and self._is_special(tail[0]):
                return tail[0]
        if self.tokenizer.eos_token_id is None:
            raise InputError("this tokenizer has neither an end-of-turn nor an end-of-sequence token")
        return self.tokenizer.eos_token_id

    def _opening_of_answers(self) -> str:
        """What the template puts between its opening of the turn and the answer, where a special token is in it.

        The opening of gpt-oss stops in front of the channel, which the model would fill with thoughts.
        """
        opened = without_thought(self._render([QUESTION], generation=True))
        text = self._render([QUESTION, ANSWER], generation=False)
        if not text.startswith(opened):
            return ""
        between = text[len(opened) :].rpartition(ANSWER["content"])[0]
        ids = self.tokenizer(between, add_special_tokens=False).input_ids if between else []
        return between if any(map(self._is_special, ids)) else ""

    def _is_special(self, token: int) -> bool:
        """Whether a token is special: by a name of its own or, as many ends of turns, by the vocabulary alone."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return token in self.tokenizer.all_special_ids or (added is not None and added.special)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops."""
        return sorted(self._ends)

    def prompt_text(self, prompt: str, before: Sequence[Message] = ()) -> str:
        """The text in front of the answer.

        Raises:
            InputError: messages stand before the prompt, and no template says how.
        """
        if not self.chat:
            if before:
                raise InputError(
                    f"{self.tokenizer.name_or_path}: rows with a system's message or earlier turns need a chat template"
                )
            return prompt + "\n"
        messages = [{"role": role, "content": text} for role, text in (*before, ("user", prompt))]
        opened = self._render(messages, generation=True)
        return without_thought(opened) + self._opening

    def encode(self, row: Row, *, with_answer: bool = True) -> Encoded:
        """Token ids of a row; the answer part is empty where the row has no response, or its prompt alone is asked."""
        prompt = text_ids(self.tokenizer, self.prompt_text(row.prompt, row.before), special=not self.chat)
        answer: list[int] = []
        if row.response and with_answer:
            answer = [*self.tokenizer(row.response, add_special_tokens=False).input_ids, self.end_id]
            answer = answer[: row.answer_tokens]
        room = max(self.max_length - len(answer), self.max_length // 2)
        if len(prompt) + len(answer) > self.max_length:
            self.truncated += 1
            self.cut_prompts += len(prompt) > room
            prompt = prompt[-room:]
            self.cut_answers += len(answer) > self.max_length - len(prompt)
            answer = answer[: self.max_length - len(prompt)]
        return Encoded(row, prompt + answer, len(prompt))

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens, without special tokens and without thoughts in front of the answer."""
        text = self._text(ids)
        thoughts = THOUGHTS.match(text)
        return text[thoughts.end() if thoughts else 0 :].strip()

    def continuation(self, prompt_ids: list[int], ids: list[int]) -> str:
        """Text by which generated tokens continue a prompt, white space kept.

        Many tokenizers drop a space at the beginning of what they decode (Llama 2, Mistral): the end of the prompt
        stands there while the tokens are decoded.
        """
        before = prompt_ids[-SHORTEST:]
        return self._text(before + ids)[len(self._text(before)) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
