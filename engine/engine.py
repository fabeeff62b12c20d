"""The engine: a model with its exits, ready to complete prompts under any policy."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from engine import matrices
from engine.architectures import build_stack, check_family
from engine.cost import Cost, Machine, Work, cost
from engine.decode import Decoding, Ends, Prefill, prefill
from engine.deltas import merge_deltas, read_deltas
from engine.device import describe_device_class, find_device
from engine.errors import BadInput, NumericalError, OutOfMemory
from engine.exits import check_policy, check_weights, exits_hash, find_exits, read_manifest
from engine.forced import Likelihood, likelihoods
from engine.heads import Heads
from engine.loading import load_model, load_tokenizer, resolve_model
from engine.machine import measure_machine
from engine.matrices import Matrix
from engine.memory import memory_errors
from engine.plans import remembered_plan
from engine.policies import build_rule
from engine.record import Completion, Decoded, Finish, TokenRecords
from engine.spec import Compile, DType, PolicySpec, parse_policy
from engine.stack import LayerStack
from engine.stopwatch import Stopwatch
from engine.text import Prompt, Text
from engine.trace import TracedBatch, Tracing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prefilled:
    """A batch of prompts that has been prefilled once; every policy completes it from a copy."""

    prompts: list[Prompt]
    start: Prefill
    prefill_ns: int  #: wall time, device synchronised
    untuned: bool = False  #: by the model as it came, where the exits tune it


class Engine:
    """A model with its exits on one device.

    `model` is a catalogue name, a folder or a hub id; `exits` the name or folder of an exit bundle, `tied` (the model's
    own norm and unembedding after every layer), or None. `threads`: as torch has them when absent. Raises `BadInput`
    where model or exits cannot be found or do not belong together.
    """

    def __init__(
        self,
        model: str,
        exits: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
        compile: str = "auto",
    ) -> None:
        self.device = find_device(device)
        if dtype not in get_args(DType):
            raise BadInput(f"dtype is {dtype!r}; give one of {', '.join(get_args(DType))}.")
        if compile not in get_args(Compile):
            raise BadInput(f"compile is {compile!r}; give one of {', '.join(get_args(Compile))}.")
        if threads is not None:
            if threads < 1:
                raise BadInput(f"threads is {threads}; give at least 1, or leave it out.")
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.facts = resolve_model(model)
        self.name, self.weights_hash = self.facts.name, self.facts.weights_hash
        self.dtype = dtype
        folder = None if exits is None else find_exits(exits, self.facts)
        self.manifest = None if folder is None else read_manifest(folder)
        self.exits_hash = None if folder is None else exits_hash(folder)
        if self.manifest is not None:
            check_weights(self.manifest, self.facts)
        check_family(self.facts.family)
        with torch.inference_mode():
            self.stack = self._load(None if self.manifest is None or not self.manifest.tunes else folder)
            self.heads = Heads(self.stack, "tied", (), {}) if folder is None else Heads.load(self.stack, folder)
        #: whether layers are compiled. `auto` does not: on the CPU it did not pay, and no GPU has measured it yet
        self.compiled = compile == "on"
        self.compile_ns = 0  #: what that took, in `warm_up`: no part of any other time
        if self.compiled:
            self.stack.compile()
        self._warm: set[PolicySpec] = set()
        self._kernels: dict[str, list[str]] | None = None
        self.text = Text(load_tokenizer(model), self.facts.end_tokens, self.stack.max_context)

    def _load(self, tuning: Path | None) -> LayerStack:
        """The model's layers, changed by the deltas of a bundle where one is given. Raises `BadInput`."""
        model = load_model(self.facts, self.dtype)
        if tuning is not None:
            merge_deltas(model, read_deltas(tuning))
        return build_stack(model.to(self.device))

    @property
    def tunes(self) -> bool:
        """Whether the exits change the model itself: then `original` is a second reference."""
        return self.manifest is not None and self.manifest.tunes

    @cached_property
    def original(self) -> LayerStack:
        """The model as it came. Where the exits tune it a second set of weights, loaded when it is first asked for."""
        if not self.tunes:
            return self.stack
        with torch.inference_mode():
            stack = self._load(None)
            matrices.use_plans(stack.all_matrices(), self.kernels)
        if self.compiled:
            stack.compile()
        return stack

    @property
    def tuned_weights_hash(self) -> str | None:
        """Of the model as its exits tune it; None where they do not."""
        return self.manifest.tuned_weights_hash if self.manifest else None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.text.tokenizer

    @property
    def n_layers(self) -> int:
        return self.stack.n_layers

    @property
    def exit_points(self) -> tuple[int, ...]:
        return self.manifest.exit_points if self.manifest else ()

    @property
    def head_kind(self) -> str | None:
        return self.manifest.head if self.manifest else None

    @property
    def max_context(self) -> int:
        return self.stack.max_context

    @cached_property
    def device_class(self) -> str:
        """Processor or GPU, threads, type and torch version: figures are compared within one class only."""
        return describe_device_class(self.device, self.dtype, self.threads)

    @cached_property
    def machine(self) -> Machine:
        """What this device reaches, measured once; a worker may set what others measured before it."""
        self._take_threads()
        with torch.inference_mode():
            return measure_machine(self.device, getattr(torch, self.dtype))

    @property
    def matrices(self) -> list[Matrix]:
        return self.stack.all_matrices() + self.heads.all_matrices()

    @property
    def matrix_shapes(self) -> list[str]:
        """Names of the shapes of matrices that this model multiplies with: what `kernels` has a plan for."""
        return matrices.names(self.matrices)

    @torch.inference_mode()
    def measure_kernels(self, shapes: Iterable[str]) -> dict[str, list[str]]:
        """The fastest kernels for matrices of these shapes on this device, one for each of `kernels.COUNTS`."""
        self._take_threads()
        return matrices.measure_plans(self.matrices, shapes)

    @property
    def kernels(self) -> dict[str, list[str]]:
        """The plan in use: kernels by shape. Read from the user's cache, or measured, when nobody has set it."""
        if self._kernels is None:
            self.kernels = remembered_plan(self.device_class, self.matrix_shapes, self.measure_kernels)
        assert self._kernels is not None
        return self._kernels

    @kernels.setter
    def kernels(self, plan: dict[str, list[str]]) -> None:
        with torch.inference_mode():
            matrices.use_plans(self.matrices, plan)
            if "original" in vars(self) and self.tunes:
                matrices.use_plans(self.original.all_matrices(), plan)
        self._kernels = plan

    def _take_threads(self) -> None:
        """Threads belong to the process: another engine, or the caller, may have set them since."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)

    def check(self, policy: PolicySpec) -> None:
        """Whether this model and its exits can run a policy. Raises `BadInput`."""
        check_policy(policy, self.manifest, self.n_layers)

    def encode(self, prompts: list[str], room: int, *, heal: bool = False) -> list[Prompt]:
        """Prompts as the model sees them, with room for so many new tokens: see `engine.text`. Raises `BadInput`."""
        return self.text.encode(prompts, room, heal)

    @memory_errors
    @torch.inference_mode()
    def prefill(self, prompts: list[Prompt], room: int, *, untuned: bool = False) -> Prefilled:
        """Run the prompts once, leaving room for `room` new tokens each. Raises `OutOfMemory`.

        untuned: for policies that run the model as it came, whose keys and values are others than a tuned model's.
        """
        self._take_threads()
        allowed = self._allowed(prompts)
        _ = self.kernels  # chosen before the clock starts
        stack = self.original if untuned else self.stack
        with Stopwatch(self.device) as watch:
            start = prefill(stack, [prompt.token_ids for prompt in prompts], room, allowed)
        return Prefilled(prompts, start, watch.ns, untuned)

    @memory_errors
    @torch.inference_mode()
    def decode(self, prefilled: Prefilled, policy: PolicySpec, *, max_new_tokens: int, ends_with_line: bool) -> Decoded:
        """Complete a prefilled batch under one policy, timed from the end of prefill.

        Raises `NumericalError`, `OutOfMemory`.
        """
        self._take_threads()
        if policy.untuned != prefilled.untuned:
            raise BadInput(f"policy {policy.kind!r} completes what its own weights have prefilled; see `prefill`.")
        stack = self.original if policy.untuned else self.stack
        rule = build_rule(policy, self.exit_points, self.n_layers)
        longest, space = max(prefilled.start.prompts), prefilled.start.cache.n_positions
        if longest + max_new_tokens > space:
            raise BadInput(f"max_new_tokens is {max_new_tokens}, but prefill left room for {space - longest}.")
        start = prefilled.start.copy()
        first = zip(prefilled.prompts, start.first.tokens.tolist(), strict=True)
        ends = Ends(
            max_new_tokens,
            self.text.line_ends if ends_with_line else self.text.sequence_ends,
            [self.text.ends(prompt, token, ends_with_line) for prompt, token in first],
        )
        with Stopwatch(self.device) as watch:
            decoding = Decoding(stack, self.heads, rule, policy, start, ends)
            decoding.run()
        completions = [
            self._completion(prompt, record, finish)
            for prompt, record, finish in zip(prefilled.prompts, decoding.records, decoding.finishes, strict=True)
        ]
        price = self.price(decoding.work)
        written = sum(completion.n_tokens - 1 for completion in completions)
        return Decoded(
            completions,
            watch.ns,
            written,
            price.flops,
            price.ideal_ns,
            drafted=decoding.drafted,
            drafts_kept=decoding.drafts_kept,
        )

    @memory_errors
    @torch.inference_mode()
    def trace(self, prompts: list[Prompt], targets: list[list[int]]) -> TracedBatch:
        """What every exit point, and full depth behind them, predicts for each token of the targets, teacher-forced.

        targets: token ids, one at least for each prompt. Raises `NumericalError`, `OutOfMemory`.
        """
        self._take_threads()
        _ = self.kernels  # chosen before the clock starts
        ids = [prompt.token_ids for prompt in prompts]
        return Tracing(self.stack, self.heads, ids, targets, self._allowed(prompts)).run()

    def price(self, work: Work) -> Cost:
        """What some work costs on this device at best."""
        return cost(work, self.stack.shape, self.machine)

    def complete(
        self,
        prompts: list[str],
        policy: str | dict[str, Any] | PolicySpec = "full",
        *,
        max_new_tokens: int = 10,
        batch_size: int = 8,
        ends_with_line: bool = False,
    ) -> list[Completion]:
        """Complete prompts under a policy, in batches of so many. Raises `BadInput`."""
        spec = parse_policy(policy)
        self.check(spec)
        if min(max_new_tokens, batch_size) < 1:
            raise BadInput(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be at least 1.")
        if isinstance(prompts, str):
            raise BadInput("prompts is one string; give a list of strings.")
        encoded = self.encode(prompts, max_new_tokens, heal=ends_with_line)
        done: list[Completion] = []
        for first in range(0, len(encoded), batch_size):
            batch = self.prefill(encoded[first : first + batch_size], max_new_tokens, untuned=spec.untuned)
            decoded = self.decode(batch, spec, max_new_tokens=max_new_tokens, ends_with_line=ends_with_line)
            done.extend(decoded.completions)
        return done

    @memory_errors
    @torch.inference_mode()
    def likelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        policy: str | dict[str, Any] | PolicySpec = "full",
        *,
        batch_size: int = 8,
    ) -> list[Likelihood]:
        """How likely continuations are under a policy: see `engine.forced`.

        pairs: token ids of context and continuation, each at least one; a context is cut from the left to fit. Only
        continuations of one length share a batch, so that no likelihood depends on its neighbours. Raises `BadInput`,
        `NumericalError`, `OutOfMemory`.
        """
        spec = parse_policy(policy)
        self.check(spec)
        if spec.verify:  # drafts that full depth checks change no token
            spec = parse_policy("full")
        self._take_threads()
        _ = self.kernels
        found: dict[int, Likelihood] = {}
        for places in _batches([len(continuation) for _, continuation in pairs], batch_size):
            continuations = [list(pairs[place][1]) for place in places]
            space = self.max_context - len(continuations[0])
            contexts = [list(pairs[place][0])[-space:] for place in places] if space > 0 else []
            if not contexts or not all(contexts) or not continuations[0]:
                raise BadInput(
                    f"a continuation of {len(continuations[0])} tokens: it and its context need one at least, and "
                    f"together {self.max_context} at most; shorten it."
                )
            rule = build_rule(spec, self.exit_points, self.n_layers)
            told = likelihoods(self.stack, self.heads, rule, spec, contexts, continuations)
            found |= dict(zip(places, told, strict=True))
        return [found[place] for place in range(len(pairs))]

    def warm_up(self, policies: Sequence[PolicySpec] = ()) -> None:
        """Touch every weight and kernel that these policies use once, so that the first timing is like the next."""
        cold = {parse_policy("full"), *policies} - self._warm
        if not cold:
            return
        prompts = [Prompt(list(range(1, 17))), Prompt(list(range(1, 9)))]
        _ = self.kernels, self.machine  # measured outside the clock
        with Stopwatch(self.device) as watch:
            for batch in (prompts, prompts[:1]):
                # What fails on these tokens may do on others; what fails on all is told where a sample ends.
                for untuned in sorted({policy.untuned for policy in cold}):
                    with suppress(NumericalError, OutOfMemory):
                        prefilled = self.prefill(batch, 4, untuned=untuned)
                        for policy in (policy for policy in cold if policy.untuned == untuned):
                            with suppress(NumericalError, OutOfMemory):
                                self.decode(prefilled, policy, max_new_tokens=4, ends_with_line=True)
        if self.compiled:
            self.compile_ns += watch.ns
        self._warm |= cold

    def _completion(self, prompt: Prompt, records: TokenRecords, finish: Finish) -> Completion:
        n_tokens = len(records) - (finish is Finish.STOP)
        text = self.text.read(prompt, records.token_ids[:n_tokens].tolist(), finish)
        return Completion(text, records, finish, len(prompt.token_ids), prompt.cut_tokens)

    def _allowed(self, prompts: list[Prompt]) -> list[Tensor | None]:
        """What each row's first token may be: anything, or what begins with the token that was taken back."""
        return [
            None if prompt.healed is None else torch.tensor(self.text.beginning_with(prompt.healed), device=self.device)
            for prompt in prompts
        ]


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of equal lengths, so many at a time."""
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_length.setdefault(length, []).append(place)
    return [places[first : first + size] for places in by_length.values() for first in range(0, len(places), size)]
