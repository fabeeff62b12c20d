"""A JobReport with invented numbers, in which everything that a report may have to show occurs."""

from typing import Any

from cluster.reports.model import (
    BenchmarkReport,
    Estimate,
    Example,
    ExampleCompletion,
    ExampleToken,
    JobReport,
    RunReport,
    RunSummary,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"'&amp;"


def around(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def run(mark: str, policy: str, speed: float, rouge_l: float, **changes: Any) -> RunReport:
    kind = policy.split()[0]
    summary: dict[str, Any] = {
        "samples": 164,
        "tokens": 1234,
        "n_layers": 30,
        "mean_exit_layer": 27.43,
        "layers_skipped": 0.0857,
        "speedup_token": around(speed),
        "speedup_ideal": speed + 0.1,
        "efficiency": 0.91,
        "speedup_request": around(1 + (speed - 1) / 2),
        "metrics": {"rouge_l": around(rouge_l), "em": around(0.311), "es": around(0.722), "accepted": around(0.345)},
        "change": {"rouge_l": around(rouge_l - 0.6), "rouge_l_relative": around(-0.05)} if kind != "full" else {},
        "exit_histogram": {"24": 300, "30": 934} if kind != "full" else {"30": 1234},
        "decisions": {"full": 934, "exit": 300, "stop": 0},
    }
    summary |= changes
    return RunReport(
        run_id=ord(mark), mark=mark, policy=policy, kind=kind, options={}, summary=RunSummary.model_validate(summary)
    )


def token(text: str, exit_layer: int = 30, decision: Any = "full", probability: float = 0.875) -> ExampleToken:
    return ExampleToken(
        text=text, exit_layer=exit_layer, layers_run=exit_layer, decision=decision, probability=probability
    )


def completion(mark: str, policy: str, tokens: list[ExampleToken], **changes: Any) -> ExampleCompletion:
    text = "".join(token.text for token in tokens)
    fields: dict[str, Any] = {"error": None, "finish": "line", "shown": True, "first_divergence": None, "scores": {}}
    fields |= {"text": text, "n_tokens": len(tokens), "tokens": tokens} | changes
    return ExampleCompletion(mark=mark, policy=policy, **fields)


def example(sample: str = "lines/7", text: str = " x") -> Example:
    stopped = [token(" return"), token("", 18, "stop", 0.75)]
    return Example(
        sample=sample,
        source_group="file.py",
        language="python",
        why="A policy stopped.",
        prompt="def f(x):\n   ",
        prompt_cut=False,
        reference=f" return{text}",
        completions=[
            completion("A", "full", [token(" return"), token(text)]),
            completion("B", "confidence threshold=0.95", [token(" return"), token(text, 24, "exit")]),
            completion("C", "sec exit=0.9 stop=0.7", stopped, finish="stop", shown=False, n_tokens=1),
        ],
    )


def benchmark(**changes: Any) -> BenchmarkReport:
    fields: dict[str, Any] = {
        "name": "humaneval-lines",
        "version": "1",
        "content_hash": "c0ffee" * 10,
        "samples": 164,
        "left_out": [],
        "runs": [
            run("A", "full", 1.0, 0.6),
            run("B", "confidence threshold=0.95", 0.87, 0.6),
            run("C", "sec exit=0.9 stop=0.7", 1.23, 0.55, stops=21, stop_histogram={"18": 21}),
        ],
        "examples": [example()],
    }
    return BenchmarkReport(**fields | changes)


def report(**changes: Any) -> JobReport:
    fields: dict[str, Any] = {
        "job_id": 12,
        "name": "nightly",
        "state": "done",
        "error": None,
        "created_at": 1.7e9,
        "started_at": 1.7e9 + 5,
        "finished_at": 1.7e9 + 385,
        "partial": False,
        "batches_done": 21,
        "batches_total": 21,
        "model": "smollm2-135m",
        "exits": "smollm2-135m",
        "provenance": {"weights_hash": "6b54" * 16, "device_class": "cpu avx2", "versions": {"torch": "2.13.0"}},
        "benchmarks": [benchmark()],
    }
    return JobReport(**fields | changes)
