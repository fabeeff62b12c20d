"""What the OpenAPI document shows of bodies that are read by hand."""

from typing import Any

JOB = {
    "name": "nightly-smollm2",
    "model": "smollm2-135m",
    "exits": "smollm2-135m",
    "generation": {"max_new_tokens": 10, "batch_size": 8},
    "benchmarks": ["humaneval-lines"],
    "policies": ["full", {"confidence": {"threshold": 0.95}}],
}
SCHEDULE = {
    "name": "nightly",
    "cron": "0 2 * * *",
    "zone": "Europe/Berlin",
    "job": JOB,
    "gate": {"rules": [{"metric": "rouge_l", "max_loss": 0.02}]},
    "baseline": "last-passed",
    "webhooks": ["https://hooks.example.org/shortstop"],
}
POLICY = {"confidence": {"threshold": 0.9}}
QUESTION = {"sql": "select policy, decision, count(*) as n from token group by 1, 2", "limit": 100}
GATE = {"gate": {"rules": [{"metric": "rouge_l", "max_loss": 0.02}]}, "a": "12", "b": "13"}
LABELS = {"judge": "anna", "labels": [{"id": "1.17.0123456789abcdef", "accepted": True}]}
LOGIN = {"key": "shortstop_0123456789ab_…"}


def body(model: str | None, example: object) -> dict[str, Any]:
    """The JSON body of an operation: a model among the document's schemas, or any JSON."""
    schema = {"type": ["string", "object"]} if model is None else {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}
