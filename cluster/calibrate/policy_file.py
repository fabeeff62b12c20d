"""The file of a calibrated policy: a spec that `shortstop run` takes, with the promise and its evidence in it."""

from pathlib import Path
from typing import Any

import yaml

from cluster.calibrate.found import Calibrated
from cluster.spec import parse_job
from cluster.traced import Trace
from db import jobs
from engine.errors import BadInput


def write_policy_file(made: Calibrated, trace: Trace, path: Path) -> None:
    """Write the spec of what was chosen. Raises `BadInput` where the file cannot be written."""
    text = f"# {sentence(made)}\n" + yaml.safe_dump(spec_of(made, trace), sort_keys=False, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"out: {str(path)!r} cannot be written ({error.strerror}); name another file.") from None


def spec_of(made: Calibrated, trace: Trace) -> dict[str, Any]:
    """The trace's own spec with full depth and the chosen policy in the place of the trace."""
    assert made.chosen is not None
    assert made.promise is not None
    spec = dict(jobs.job(trace.db, trace.run.job_id).spec)
    runs = jobs.runs(trace.db, trace.run.job_id)
    place = list(dict.fromkeys(run.benchmark_id for run in runs)).index(trace.run.benchmark_id)
    spec |= {
        "name": f"calibrated {trace.run.job_id}",
        "trace": None,
        "benchmarks": [spec["benchmarks"][place]],
        "policies": ["full", made.chosen.spec],
        "promise": made.promise.model_dump(mode="json", exclude_none=True),
    }
    asked = parse_job(spec)  # what is written is what `run` reads
    kept = asked.model_dump(mode="json", exclude_defaults=True, exclude={"benchmarks", "policies", "promise"})
    return kept | {name: spec[name] for name in ("benchmarks", "policies", "promise")}


def sentence(made: Calibrated) -> str:
    """The promise in words."""
    bound, sure = f"{100 * made.bound:g} %", f"{100 * made.confidence:g} %"
    if made.kind == "agreement":
        what = f"in another source group at most {bound} of the completions differ from full depth's in any token"
    else:
        metric = "the metric" if made.promise is None else made.promise.metric
        what = f"in another source group {metric} is in the mean at most {made.bound:g} below full depth's"
    return f"With {sure} confidence, {what}; tested on {made.groups:,} groups, {made.samples:,} samples."
