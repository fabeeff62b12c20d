"""Between text and tokens: how a prompt is cut and healed, what ends a completion, and what it says.

A prompt that ends in white space ends in the middle of a token: tokenizers glue white space to the word that follows,
and a model that sees a lone newline token writes what follows lone newline tokens, which is no code. **Token healing**
(after Lundberg's guidance, 2023) takes the last token back and lets the completion's first token be any that begins
with it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from engine.errors import BadInput
from engine.record import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model will see it."""

    token_ids: list[int]
    cut_tokens: int = 0  #: tokens cut from its left so that prompt and completion fit the context
    healed: int | None = None  #: the token that was taken back, with which the completion's first token begins

    @property
    def key(self) -> int:
        """A number for the prompt, the same wherever it is decoded."""
        return prompt_key(self.token_ids)


def prompt_key(token_ids: list[int]) -> int:
    """CRC-32 of a prompt's token ids."""
    return crc32(np.array(token_ids, np.int64).tobytes())


class Text:
    """One model's tokenizer, and what its tokens mean to a completion."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_tokens: tuple[int, ...], max_context: int) -> None:
        self.tokenizer, self.max_context = tokenizer, max_context
        self.sequence_ends: dict[int, Finish] = dict.fromkeys(end_tokens, Finish.EOS)
        self.beginning_with = lru_cache(maxsize=256)(self._beginning_with)

    @cached_property
    def tokens(self) -> list[str]:
        """The text of every id of the vocabulary."""
        ids = [[i] for i in range(len(self.tokenizer))]
        return list(self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False))

    @cached_property
    def line_ends(self) -> dict[int, Finish]:
        """The ids that end a completion where the task ends with the line."""
        return {i: Finish.LINE for i, text in enumerate(self.tokens) if "\n" in text} | self.sequence_ends

    def encode(self, prompts: list[str], room: int, heal: bool) -> list[Prompt]:
        """Tokenise, cut from the left what does not fit beside `room` new tokens, heal. Raises `BadInput`."""
        space = self.max_context - room
        if space < 1:
            raise BadInput(f"max_new_tokens is {room}, but the model's context has {self.max_context} positions.")
        encoded = self.tokenizer(prompts)["input_ids"] if prompts else []
        return [self._prompt(ids, space, heal) for ids in encoded]

    def _prompt(self, ids: list[int], space: int, heal: bool) -> Prompt:
        healed = None
        if heal and len(ids) > 1 and self.tokens[ids[-1]].isspace():
            *ids, healed = ids
        # An empty prompt still needs a token to start from.
        start = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0
        return Prompt(ids[-space:] or [start], max(0, len(ids) - space), healed)

    def targets(self, texts: list[str], prompts: list[Prompt], references: list[str], most: int) -> list[list[int]]:
        """What each model would have to write behind its prompt for the reference to stand there: `most` ids at most.

        texts: of the prompts, as `encode` read them. Tokens as they come out of the whole text, unless a token of its
        own reaches over the place where the prompt ends; then the reference is read by itself.
        """
        wholes = self.tokenizer([a + b for a, b in zip(texts, references, strict=True)])["input_ids"] if texts else []
        return [
            self._target(prompt, whole, reference)[:most]
            for prompt, whole, reference in zip(prompts, wholes, references, strict=True)
        ]

    def _target(self, prompt: Prompt, whole: list[int], reference: str) -> list[int]:
        n = prompt.cut_tokens + len(prompt.token_ids)
        if whole[prompt.cut_tokens : n] == prompt.token_ids:
            return whole[n:]
        begun = "" if prompt.healed is None else self.tokens[prompt.healed]
        return list(self.tokenizer(begun + reference, add_special_tokens=False)["input_ids"])

    def _beginning_with(self, token: int) -> list[int]:
        """Ids of all tokens whose text begins with a token's text, itself among them."""
        begin = self.tokens[token]
        return [i for i, text in enumerate(self.tokens) if text.startswith(begin)]

    def ends(self, prompt: Prompt, first: int, ends_with_line: bool) -> Finish | None:
        """What the first token of a completion ends, if anything: what was healed belongs to the prompt."""
        if prompt.healed is None or not ends_with_line:
            return (self.line_ends if ends_with_line else self.sequence_ends).get(first)
        written = self.tokens[first][len(self.tokens[prompt.healed]) :]
        return Finish.LINE if "\n" in written else self.sequence_ends.get(first)

    def read(self, prompt: Prompt, ids: list[int], finish: Finish) -> str:
        """The text of a completion; up to its line's end where that ended it."""
        text = self._behind(prompt.token_ids[-1:], ids)
        if prompt.healed is not None:
            text = text[len(self.tokens[prompt.healed]) :]
        return text.split("\n", 1)[0] if finish is Finish.LINE else text

    def _behind(self, before: list[int], ids: list[int]) -> str:
        # Decoded behind the prompt's last token: some tokenizers drop the space in front of a text's first word.
        head, whole = self._decode(before), self._decode(before + ids)
        # Otherwise the prompt ends inside a character, which the completion finishes.
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
