"""The completions that a report shows: samples in which the policies differ most."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from cluster.reports.model import DecisionName, Example, ExampleCompletion, ExampleToken, RunReport
from db import results
from db.records import CompletionRow, TokenArrays
from db.session import Database

#: token ids -> the text of each
Decode = Callable[[list[int]], list[str]]

#: completions of a benchmark, under all policies, that examples are picked from, so that a report opens as quickly
#: whatever the number of policies; but samples enough to choose from, from the benchmark's start
COMPLETIONS_READ, FEWEST_SAMPLES = 800, 40

#: of a prompt only its end is shown
PROMPT_LINES, PROMPT_CHARACTERS = 8, 800

DECISIONS: tuple[DecisionName, ...] = ("full", "exit", "stop")


class _Why(Enum):
    """What a sample shows. Those of the first three kinds are picked in turn."""

    STOPPED = "A policy stopped."
    CHANGED = "Early exits changed the text."
    KEPT = "Early exits kept the text of full depth."
    SAME = "No policy left early."


@dataclass(frozen=True)
class _Candidate:
    """One sample that has ended under every policy."""

    rows: list[CompletionRow]  #: in the order of the runs
    why: _Why
    interest: float  #: the more policies differ and the more layers they left out, the higher

    @property
    def group(self) -> str:
        return self.rows[0].sample.source_group


def pick_examples(db: Database, runs: list[RunReport], room: int, decode: Decode | None) -> list[Example]:
    """At most `room` samples of one benchmark, of each kind in turn, from as many source groups as there are."""
    full = next((place for place, run in enumerate(runs) if run.kind == "full"), None)
    if full is None:
        return []
    limit = max(FEWEST_SAMPLES, COMPLETIONS_READ // len(runs))
    columns = [list(results.completions(db, run_id=run.run_id, limit=limit)) for run in runs]
    ours = [place for place, run in enumerate(runs) if not run.is_imported]
    candidates = [_candidate(rows, full, ours) for rows in _aligned(columns) if rows[full].outcome.tokens is not None]
    return [_example(candidate, runs, full, decode) for candidate in _pick(candidates, room)]


def _aligned(columns: list[list[CompletionRow]]) -> list[list[CompletionRow]]:
    """The rows of every sample that has an outcome under all policies, in the benchmark's order."""
    by_sample = [{row.sample.position: row for row in column} for column in columns]
    shared = sorted(set.intersection(*(set(rows) for rows in by_sample)))
    return [[rows[position] for rows in by_sample] for position in shared]


def _candidate(rows: list[CompletionRow], full: int, ours: list[int]) -> _Candidate:
    """ours: places of the runs that were not made elsewhere."""
    others = [rows[place] for place in ours if place != full and rows[place].outcome.tokens is not None]
    stopped = [row for row in others if row.outcome.finish == "stop"]
    changed = [row for row in others if row not in stopped and row.outcome.text != rows[full].outcome.text]
    depth = _mean_exit_layer(rows[full])
    saved = sum(depth - _mean_exit_layer(row) for row in others) / depth if depth else 0.0
    why = _Why.STOPPED if stopped else _Why.CHANGED if changed else _Why.KEPT if saved > 0 else _Why.SAME
    return _Candidate(rows, why, len(stopped) + len(changed) + saved)


def _mean_exit_layer(row: CompletionRow) -> float:
    tokens = row.outcome.tokens
    return float(tokens.exit_layers.mean()) if tokens is not None and len(tokens) else 0.0


def _pick(candidates: list[_Candidate], room: int) -> list[_Candidate]:
    telling = (_Why.STOPPED, _Why.CHANGED, _Why.KEPT)
    pools = [[c for c in candidates if c.why is why] for why in telling]
    if not any(pools):
        pools = [list(candidates)]
    picked: list[_Candidate] = []
    while len(picked) < room and any(pools):
        for pool in pools:
            if pool and len(picked) < room:
                seen = {candidate.group for candidate in picked}
                best = min(pool, key=lambda c: (c.group in seen, -c.interest))
                pool.remove(best)
                picked.append(best)
    return picked


def _example(candidate: _Candidate, runs: list[RunReport], full: int, decode: Decode | None) -> Example:
    sample = candidate.rows[0].sample
    prompt = _end_of(sample.prompt)
    baseline = token_ids_of(candidate.rows[full].outcome.tokens)
    return Example(
        sample=sample.name,
        source_group=sample.source_group,
        language=sample.language,
        why=candidate.why.value,
        prompt=prompt,
        prompt_cut=len(prompt) < len(sample.prompt),
        reference=sample.reference,
        completions=[completion_of(row, run, baseline, decode) for row, run in zip(candidate.rows, runs, strict=True)],
    )


def completion_of(row: CompletionRow, run: RunReport, baseline: list[int], decode: Decode | None) -> ExampleCompletion:
    """An outcome as reports show it. baseline: the token ids of full depth."""
    outcome = row.outcome
    return ExampleCompletion(
        mark=run.mark,
        policy=run.policy,
        text=outcome.text,
        error=outcome.error,
        finish=outcome.finish,
        shown=outcome.shown,
        n_tokens=outcome.n_tokens,
        tokens=_tokens(outcome.tokens, decode) if outcome.tokens is not None and decode is not None else [],
        first_divergence=first_divergence(token_ids_of(outcome.tokens), baseline),
        scores=row.scores,
    )


def first_divergence(token_ids: list[int], baseline: list[int]) -> int | None:
    """Index of the first token that full depth did not write there; None where the tokens are a prefix of its own."""
    return next((i for i, token in enumerate(token_ids) if i >= len(baseline) or token != baseline[i]), None)


def _tokens(tokens: TokenArrays, decode: Decode) -> list[ExampleToken]:
    ids = token_ids_of(tokens)
    texts = [*decode(ids), ""]  # the last is a stop's
    return [
        ExampleToken(
            text=texts[min(place, len(ids))],
            exit_layer=int(tokens.exit_layers[place]),
            layers_run=int(tokens.layers_run[place]),
            decision=DECISIONS[tokens.decisions[place]],
            probability=float(tokens.confidences[place]) if np.isfinite(tokens.confidences[place]) else None,
            draft_layer=abs(draft) or None,
            draft_kept=draft > 0 if draft else None,
        )
        for place, draft in enumerate(tokens.drafts.tolist())
    ]


def token_ids_of(tokens: TokenArrays | None) -> list[int]:
    """Without the stop's place."""
    return [] if tokens is None else [token for token in tokens.token_ids.tolist() if token >= 0]


def _end_of(prompt: str) -> str:
    """The last lines of a prompt, whole ones unless a single one is too long."""
    lines = prompt.splitlines(keepends=True)[-PROMPT_LINES:]
    while len(lines) > 1 and sum(map(len, lines)) > PROMPT_CHARACTERS:
        lines.pop(0)
    return "".join(lines)[-PROMPT_CHARACTERS:]
