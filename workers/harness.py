"""The model `shortstop` of lm-evaluation-harness: its tasks run on this engine, under any policy.

Importing this module makes the name known to the harness, which must be installed (the extra `lm-eval`).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engine.engine import Engine
from engine.errors import BadInput
from engine.spec import parse_policy

#: rows of a batch where the harness leaves it open, and new tokens where a task does
_BATCH_SIZE = 8
_NEW_TOKENS = 256


@register_model("shortstop")
class ShortstopLM(TemplateLM):
    """An `Engine` and a policy. What it writes under `full` is what the model writes greedily elsewhere.

    pretrained and exits: as `Engine` takes them. policy: a name, a mapping, or YAML of one. batch_size: `auto` is 8.
    Other arguments are refused, as is a task that samples: raises `BadInput`.
    """

    def __init__(
        self,
        pretrained: str = "",
        exits: str | None = None,
        policy: str | dict[str, Any] = "full",
        batch_size: int | str = _BATCH_SIZE,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        threads: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or not pretrained:
            wrong = f"has no {sorted(unknown)[0]!r}" if unknown else "lacks pretrained"
            raise BadInput(
                f"model_args: model shortstop {wrong}; give pretrained (a name, a folder or a hub id), exits, policy, "
                "dtype and threads."
            )
        self.policy = parse_policy(yaml.safe_load(policy) if isinstance(policy, str) else policy)
        self.rows = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 0 else _BATCH_SIZE
        self.engine = Engine(pretrained, exits, device=_device(device), dtype=dtype, threads=threads)
        self.engine.check(self.policy)
        self.tokenizer = self.engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.engine.tokenizer.eos_token_id or 0)

    @property
    def tokenizer_name(self) -> str:
        return self.engine.facts.tokenizer_hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.engine.tokenizer(string, **options)["input_ids"])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy completions, each up to the first of its task's ends."""
        groups: defaultdict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[_asked(request.args[1])].append(place)
        found: dict[int, str] = {}
        for (room, until), places in groups.items():
            for first in range(0, len(places), self.rows):
                batch = places[first : first + self.rows]
                texts = self._complete([requests[place].args[0] for place in batch], room, until)
                for place, text in zip(batch, texts, strict=True):
                    found[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return [found[place] for place in range(len(requests))]

    def _complete(self, prompts: list[str], room: int, until: tuple[str, ...]) -> list[str]:
        # not healed: the tokens are those that the model writes behind the prompt as it is
        prefilled = self.engine.prefill(self.engine.encode(prompts, room), room)
        decoded = self.engine.decode(prefilled, self.policy, max_new_tokens=room, ends_with_line="\n" in until)
        return [_before(completion.text, until) for completion in decoded.completions]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        told = self.engine.likelihoods(pairs, self.policy, batch_size=self.rows)
        answers = [(float(one.log_probabilities.sum()), bool(one.greedy.all())) for one in told]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's context; token by token, as the policy would decode them."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.engine.max_context - 1, 1
            )
            told = self.engine.likelihoods(
                [make_disjoint_window(window) for window in windows], self.policy, batch_size=self.rows
            )
            totals.append(sum(float(one.log_probabilities.sum()) for one in told))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals


def _device(asked: str | None) -> str:
    """The harness says `cuda` where nobody has said anything, whether there is a GPU or not."""
    return "auto" if asked is None or asked.startswith("cuda") else asked


def _asked(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """New tokens, and what ends a text. Raises `BadInput` for a task that samples."""
    if options.get("do_sample") and options.get("temperature", 1.0) != 0:
        raise BadInput("task: it asks for samples (do_sample); this engine writes greedily, so set do_sample: false.")
    until = options.get("until") or []
    return int(options.get("max_gen_toks", _NEW_TOKENS)), tuple([until] if isinstance(until, str) else until)


def _before(text: str, until: Sequence[str]) -> str:
    """Up to the first of these."""
    places = [place for end in until if end and (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text
