"""What a reader must know beside the numbers, as sentences."""

from dataclasses import dataclass
from typing import Literal

from cluster.reports.formats import count, percent, signed, signed_interval, times, times_interval
from cluster.reports.model import BenchmarkReport, Estimate, JobReport, RunReport

PROXY = (
    "Accepted is an offline proxy: the share of completions whose first line equals the reference's. Nobody was asked."
)
PROXY_AND_JUDGES = (
    "Accepted is an offline proxy: the share of completions whose first line equals the reference's. The acceptance "
    "rate beside it is what judges said."
)

TEXTS_WITHHELD = (
    "The record keeps no text of this benchmark: prompts, references and completions are hashes, tokens have no ids."
)


@dataclass(frozen=True)
class Note:
    """One sentence. A caution changes how the numbers are to be read; a remark does not."""

    weight: Literal["caution", "remark"]
    text: str
    details: tuple[str, ...] = ()


def job_notes(report: JobReport) -> list[Note]:
    """About the job as a whole."""
    notes = []
    if report.partial:
        notes.append(Note("caution", _partial(report)))
    if report.error:
        notes.append(Note("caution", f"The job is {report.state}: {report.error}"))
    return notes


def benchmark_notes(benchmark: BenchmarkReport) -> list[Note]:
    """About one benchmark: slowdowns, and what is missing from its numbers."""
    cautions = [
        _slowdowns(benchmark),
        _missing(benchmark),
        _errors(benchmark),
        _isolated(benchmark),
        _untimed(benchmark),
    ]
    cautions.append(_overlap(benchmark))
    proxy = PROXY if benchmark.judges is None else PROXY_AND_JUDGES
    remarks = [
        _imported(benchmark),
        _references(benchmark),
        _added(benchmark),
        _cut_prompts(benchmark),
        _hidden(benchmark),
        _texts(benchmark),
        proxy,
        _judges(benchmark),
    ]
    notes = [Note("caution", text) for text in cautions if text] + [Note("remark", text) for text in remarks if text]
    return [*notes, *_left_out(benchmark)]


def headline(benchmark: BenchmarkReport) -> str:
    """The answer in one sentence: the fastest policy, and what it costs."""
    timed = [run for run in benchmark.challengers if run.summary.speedup_token.value is not None]
    if not timed:
        return "There is no timed policy to hold against full depth."
    best = max(timed, key=lambda run: run.summary.speedup_token.value or 0)
    speedup = best.summary.speedup_token
    if (speedup.value or 0) <= 1:
        return f"No policy is faster than full depth per token; {best.policy} comes closest at {_speed(best)}."
    loss = best.summary.changed("rouge_l")
    found = f"{best.policy} is the fastest per token: {_speed(best)}"
    if loss.value is not None:
        found += f", ROUGE-L {signed(loss.value)}{_brackets(signed_interval(loss))} against full depth"
    is_doubtful = speedup.low is not None and speedup.low <= 1
    return f"{found}. The interval reaches 1: it may be no faster at all." if is_doubtful else f"{found}."


def _speed(run: RunReport) -> str:
    speedup = run.summary.speedup_token
    return f"{times(speedup.value)}{_brackets(times_interval(speedup))}"


def _brackets(interval: str) -> str:
    return f" ({interval})" if interval else ""


def _partial(report: JobReport) -> str:
    done = f"{count(report.batches_done)} of {count(report.batches_total)} batches are done"
    shown = "Runs that have not ended show their sums so far, without intervals."
    return f"This report is partial: the job is {report.state}, {done}. {shown}"


def _slowdowns(benchmark: BenchmarkReport) -> str | None:
    slower = [run for run in benchmark.challengers if run.is_slower]
    if not slower:
        return None
    names = _listed([f"{run.policy} ({times(run.summary.speedup_token.value)})" for run in slower])
    return f"{names} {'is a slowdown' if len(slower) == 1 else 'are slowdowns'} per token."


def _missing(benchmark: BenchmarkReport) -> str | None:
    lacking = [run for run in benchmark.runs if run.summary.samples < benchmark.samples]
    if not lacking:
        return None
    if len(lacking) < len(benchmark.runs):
        shares = [f"{run.policy} ({count(run.summary.samples)} of {count(benchmark.samples)})" for run in lacking]
        return f"Policies under which not all samples have ended: {_listed(shares)}."
    least = min(run.summary.samples for run in lacking)
    return f"{count(least)} of {count(benchmark.samples)} samples have ended; the numbers are those of these alone."


def _errors(benchmark: BenchmarkReport) -> str | None:
    failed = [run for run in benchmark.runs if run.summary.errors]
    if not failed:
        return None
    shares = [f"{run.policy} ({count(run.summary.errors)} of {count(run.summary.samples)})" for run in failed]
    return f"Samples that ended with an error: {_listed(shares)}. They have no scores."


def _isolated(benchmark: BenchmarkReport) -> str | None:
    most = max((run.summary.isolated for run in benchmark.runs), default=0)
    if not most:
        return None
    done = _plural(most, "sample was", "samples were")
    return f"{done} done alone or in a batch halved for memory; another run may complete them differently."


def _untimed(benchmark: BenchmarkReport) -> str | None:
    most = max((run.summary.untimed_batches for run in benchmark.runs), default=0)
    if not most:
        return None
    return f"{_plural(most, 'batch was', 'batches were')} not timed under a policy and left out of its speedups."


def _references(benchmark: BenchmarkReport) -> str | None:
    """What tuning cost or gained, where the exits tune the model."""
    if benchmark.original is None or benchmark.baseline is None:
        return None
    change = benchmark.baseline.summary.changed_from_original("rouge_l_relative")
    by = ""
    if change.value is not None:
        by = f", whose ROUGE-L is {percent(change.value)} away from it{_brackets(_percents(change))}"
    return (
        f"The exits tune the model, so there are two references: {benchmark.original.policy} is the model as it came, "
        f"{benchmark.baseline.policy} the tuned one at full depth{by}. Speedups are against the tuned one."
    )


def _percents(change: Estimate) -> str:
    return "" if change.low is None else f"{percent(change.low)} to {percent(change.high)}"


def _imported(benchmark: BenchmarkReport) -> str | None:
    imported = [run.policy for run in benchmark.runs if run.is_imported]
    if not imported:
        return None
    was = "was made elsewhere and imported: it has" if len(imported) == 1 else "were made elsewhere: they have"
    return f"{_listed(imported)} {was} scores, and neither tokens nor times."


def _added(benchmark: BenchmarkReport) -> str | None:
    added = [run.policy for run in benchmark.runs if run.summary.full_timed_again]
    if not added:
        return None
    was = "was added later and is" if len(added) == 1 else "were added later and are"
    return f"{_listed(added)} {was} held against full depth's time beside it, not against the row of the first batches."


def _cut_prompts(benchmark: BenchmarkReport) -> str | None:
    most = max((run.summary.cut_prompts for run in benchmark.runs), default=0)
    if not most:
        return None
    return f"{_plural(most, 'prompt was', 'prompts were')} cut from the left to fit the model's context."


def _overlap(benchmark: BenchmarkReport) -> str | None:
    found = benchmark.overlap
    if found is None:
        return None
    where = _listed(found.corpora)
    if not found.flagged:
        return f"None of its samples stands in {where}, by runs of twelve tokens."
    share = f"{count(found.flagged)} of {count(benchmark.samples)} samples"
    return f"{share} stand in {where} in part, by runs of twelve tokens; their scores are shown apart."


def _texts(benchmark: BenchmarkReport) -> str | None:
    return None if benchmark.texts_kept else TEXTS_WITHHELD


def _left_out(benchmark: BenchmarkReport) -> list[Note]:
    if not benchmark.left_out:
        return []
    pieces = _plural(len(benchmark.left_out), "piece of input was", "pieces of input were")
    return [Note("remark", f"{pieces} left out of the benchmark.", tuple(benchmark.left_out))]


def _hidden(benchmark: BenchmarkReport) -> str | None:
    hiding = [run for run in benchmark.runs if run.summary.shown is not None and run.summary.shown < 1]
    if not hiding:
        return None
    shares = [f"{run.policy} ({percent(run.summary.shown)})" for run in hiding]
    return f"Policies that offered only a share of their completions: {_listed(shares)}."


def _judges(benchmark: BenchmarkReport) -> str | None:
    judges = benchmark.judges
    if judges is None:
        return None
    who = _plural(len(judges.names), "judge", "judges")
    said = f"{who} judged {_plural(judges.texts, 'text', 'texts')}, not knowing which policy wrote it"
    if not judges.shared:
        return f"{said}; none was judged twice, so nothing is known of how much judges agree."
    alpha = "which leaves no room to disagree" if judges.alpha is None else f"Krippendorff's alpha {judges.alpha:.2f}"
    return f"{said}; {count(judges.shared)} by more than one, {alpha}."


def _plural(number: int, one: str, many: str) -> str:
    return f"{count(number)} {one if number == 1 else many}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
