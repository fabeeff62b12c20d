"""A job as neighbours read it: sample files of lm-evaluation-harness, records of Every Eval Ever.

Both are written into a folder that is not there yet, whole or not at all, the same bytes each time.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.reports.build import build_report
from cluster.reports.model import BenchmarkReport, JobReport, RunReport
from db import jobs, results
from db.errors import Conflict
from db.records import CompletionRow
from db.session import Database
from engine.errors import BadInput
from workers.scoring.metrics import metrics
from workers.scoring.text import em

#: of the schemas that records are written by
EVERY_EVAL_EVER = "0.3.0"
#: metrics that Every Eval Ever has no range for, for a score of these says nothing by itself
_UNBOUNDED = float("inf")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    job: int
    folder: str
    files: int
    completions: int


def export_lm_eval(db: Database, job_id: int, folder: Path) -> Exported:
    """Write `samples_BENCHMARK.jsonl` into a folder for each policy, as the harness logs samples.

    Samples that ended with an error have no line. Raises `BadInput`, `Missing`, `Conflict`.
    """

    def write(partial: Path, report: JobReport, benchmark: BenchmarkReport, run: RunReport) -> int:
        file = partial / _slug(run.policy) / f"samples_{_slug(benchmark.name)}.jsonl"
        return _write_lines(file, (_lm_eval_sample(row) for row in _completions(db, run)))

    return _export(db, job_id, folder, write)


def _lm_eval_sample(row: CompletionRow) -> dict[str, Any]:
    """A line of the harness's own kind: what was asked, what came, its scores and the hashes of all three."""
    sample, text = row.sample, row.outcome.text
    doc = {
        "id": sample.name,
        "prompt": sample.prompt,
        "reference": sample.reference,
        "language": sample.language,
        "source_group": sample.source_group,
    }
    return {
        "doc_id": sample.position,
        "doc": doc,
        "target": sample.reference,
        "arguments": {"gen_args_0": {"arg_0": sample.prompt, "arg_1": {"do_sample": False}}},
        "resps": [[text]],
        "filtered_resps": [text],
        "filter": "none",
        "metrics": list(row.scores),
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(sample.prompt),
        "target_hash": _sha256(sample.reference),
        **row.scores,
    }


def export_every_eval_ever(db: Database, job_id: int, folder: Path) -> Exported:
    """Write `data/BENCHMARK/DEVELOPER/MODEL/UUID.json` and `UUID_samples.jsonl` for each run, by the published schemas.

    A result a metric, with its interval; a record a sample and metric. Samples that ended with an error have none, nor
    have metrics without an upper bound. Raises `BadInput`, `Missing`, `Conflict`.
    """

    def write(partial: Path, report: JobReport, benchmark: BenchmarkReport, run: RunReport) -> int:
        record = _Record(report, benchmark, run)
        samples = partial / record.samples
        count = 0

        def lines() -> Iterator[dict[str, Any]]:
            nonlocal count
            for row in _completions(db, run):
                count += 1
                yield from record.instances(row)

        written = _write_lines(samples, lines())
        digest = hashlib.sha256(samples.read_bytes()).hexdigest()
        text = json.dumps(record.aggregate(written, digest), indent=2, ensure_ascii=False)
        (partial / record.file).write_text(text + "\n", encoding="utf-8")
        return count

    return _export(db, job_id, folder, write)


@dataclass(frozen=True)
class _Record:
    """One run as a record of Every Eval Ever."""

    report: JobReport
    benchmark: BenchmarkReport
    run: RunReport

    @property
    def model(self) -> str:
        """As `developer/model`; of a run that was made elsewhere its name."""
        name = self.run.policy if self.run.is_imported else self.report.model
        return name if re.fullmatch(r"[^/\s]+/[^/\s]+", name) else f"unknown/{_slug(Path(name).name)}"

    @property
    def id(self) -> str:
        """Of the same run the same every time."""
        return f"{self.benchmark.name}/{self.model}/{self.timestamp}-{self.run.run_id}"

    @property
    def timestamp(self) -> str:
        return f"{self.report.finished_at or self.report.created_at:.6f}"

    @property
    def file(self) -> str:
        return f"{self._stem}.json"

    @property
    def samples(self) -> str:
        return f"{self._stem}_samples.jsonl"

    @property
    def _stem(self) -> str:
        digest = bytearray(hashlib.sha256(f"{self.id} {self.run.policy}".encode()).digest()[:16])
        digest[6], digest[8] = digest[6] & 0x0F | 0x40, digest[8] & 0x3F | 0x80  # a UUID of version 4
        hex = digest.hex()
        uuid = "-".join((hex[:8], hex[8:12], hex[12:16], hex[16:20], hex[20:]))
        developer, model = (_slug(part) for part in self.model.split("/"))
        return f"data/{_slug(self.benchmark.name)}/{developer}/{model}/{uuid}"

    @property
    def metrics(self) -> list[str]:
        """Those with a value and a range."""
        return [name for name, one in self.run.summary.metrics.items() if one.value is not None and _highest(name)]

    def aggregate(self, rows: int, checksum: str) -> dict[str, Any]:
        return {
            "schema_version": EVERY_EVAL_EVER,
            "evaluation_id": self.id,
            "evaluation_timestamp": self.timestamp,
            "retrieved_timestamp": self.timestamp,
            "source_metadata": {
                "source_name": "Shortstop",
                "source_type": "evaluation_run",
                "source_organization_name": "unknown",
                "evaluator_relationship": "other",
            },
            "eval_library": {"name": "shortstop", "version": version("shortstop")},
            "model_info": {
                "name": self.model.split("/")[1],
                "id": self.model,
                "developer": self.model.split("/")[0],
                "additional_details": self._details(),
            },
            "evaluation_results": [self._result(name) for name in self.metrics],
            "detailed_evaluation_results": {
                "format": "jsonl",
                "file_path": self.samples,
                "hash_algorithm": "sha256",
                "checksum": checksum,
                "total_rows": rows,
            },
        }

    def _details(self) -> dict[str, str]:
        pinned = self.report.provenance
        told = {"policy": self.run.policy, "policy_options": json.dumps(self.run.options, sort_keys=True)}
        if not self.run.is_imported:
            names = ("weights_hash", "tokenizer_hash", "exits_hash", "dtype", "device_class", "seed")
            told |= {name: str(pinned[name]) for name in names if pinned.get(name) is not None}
        deployed = "unknown" if self.run.is_imported else "self_deployed"
        return {"deployment_type": deployed, "model_availability": "unknown", **told}

    def _result(self, name: str) -> dict[str, Any]:
        estimate, summary = self.run.summary.metric(name), self.run.summary
        score: dict[str, Any] = {"score": estimate.value, "details": {"errors": str(summary.errors)}}
        if estimate.low is not None and estimate.high is not None:
            score["uncertainty"] = {
                "confidence_interval": {
                    "lower": estimate.low,
                    "upper": estimate.high,
                    "confidence_level": 0.95,
                    "method": "percentile bootstrap over source groups",
                },
                "num_samples": summary.samples - summary.errors,
            }
        details = {"benchmark_version": self.benchmark.version, "content_hash": self.benchmark.content_hash}
        result = {
            "evaluation_result_id": self._result_id(name),
            "evaluation_name": self.benchmark.name,
            "source_data": {
                "dataset_name": self.benchmark.name,
                "source_type": "other",
                "additional_details": details,
            },
            "metric_config": {
                "metric_id": f"shortstop.{name}",
                "metric_name": name,
                "evaluation_description": metrics[name].description if name in metrics else name,
                "lower_is_better": False,
                "score_type": "continuous",
                "min_score": 0,
                "max_score": _highest(name),
                "additional_details": {"version": self.report.provenance.get("metrics", {}).get(name, "unknown")},
            },
            "score_details": score,
        }
        room = self.report.provenance.get("max_new_tokens")
        if room is not None and not self.run.is_imported:
            result["generation_config"] = {"generation_args": {"temperature": 0, "max_tokens": room}}
        return result

    def instances(self, row: CompletionRow) -> Iterator[dict[str, Any]]:
        """A record a metric that the completion has."""
        sample, outcome = row.sample, row.outcome
        text = outcome.text or ""
        for name in self.metrics:
            if name not in row.scores:
                continue
            record: dict[str, Any] = {
                "schema_version": EVERY_EVAL_EVER,
                "evaluation_id": self.id,
                "model_id": self.model,
                "evaluation_name": self.benchmark.name,
                "evaluation_result_id": self._result_id(name),
                "sample_id": sample.name,
                "sample_hash": _sha256(sample.prompt + sample.reference),
                "interaction_type": "single_turn",
                "input": {"raw": sample.prompt, "reference": [sample.reference]},
                "output": {"raw": [text]},
                "messages": None,
                "answer_attribution": [
                    {
                        "turn_idx": 0,
                        "source": "output.raw",
                        "extracted_value": text,
                        "extraction_method": "custom",
                        "is_terminal": True,
                    }
                ],
                "evaluation": {"score": row.scores[name], "is_correct": em(text, sample.reference) == 1},
                "metadata": {"language": sample.language, "source_group": sample.source_group, "metric": name},
            }
            if not self.run.is_imported:
                counts = (outcome.prompt_tokens, outcome.n_tokens)
                names = ("input_tokens", "output_tokens", "total_tokens")
                record["token_usage"] = dict(zip(names, (*counts, sum(counts)), strict=True))
            yield record

    def _result_id(self, name: str) -> str:
        return f"{self.id}#{name}"


def _export(
    db: Database, job_id: int, folder: Path, write: Callable[[Path, JobReport, BenchmarkReport, RunReport], int]
) -> Exported:
    """write: one run into the partial folder; gives back how many completions it has."""
    if folder.exists():
        raise BadInput(f"folder {str(folder)!r} is there already; remove it, or name another one.")
    state = jobs.job(db, job_id).state
    if not state.ended:
        raise Conflict(f"job {job_id} is {state}; export it when it has ended, or cancel it first.")
    report = build_report(db, job_id, with_examples=False)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        runs = [(benchmark, run) for benchmark in report.benchmarks for run in benchmark.runs]
        completions = sum(write(partial, report, benchmark, run) for benchmark, run in runs)
        files = sum(file.is_file() for file in partial.rglob("*"))
        partial.rename(folder)
    except OSError as error:
        raise BadInput(f"folder {str(folder)!r} cannot be written ({error.strerror}); name another one.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(job_id, str(folder), files, completions)


def _completions(db: Database, run: RunReport) -> Iterator[CompletionRow]:
    """Without errors, in the benchmark's order."""
    rows = results.completions(db, run_id=run.run_id, with_tokens=False)
    return (row for row in rows if row.outcome.text is not None)


def _write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Returns how many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with file.open("x", encoding="utf-8", newline="\n") as opened:
        for line in lines:
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def _highest(name: str) -> float | None:
    """Of a metric's values; None where there is no bound, or the metric is not known here."""
    highest = metrics[name].highest if name in metrics else _UNBOUNDED
    return None if highest == _UNBOUNDED else highest


def _slug(text: str) -> str:
    """As a file's name; of two texts that look the same then, the hash tells them apart."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.") or "unnamed"
    return plain if plain == text else f"{plain[:80]}-{_sha256(text)[:6]}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
