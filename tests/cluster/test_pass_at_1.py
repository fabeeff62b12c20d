"""`pass@1` of a finished job: off unless asked for and allowed, and then what the completions are worth executed."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_world import World
from typer.testing import CliRunner

from cluster import jobs, rescoring
from cluster.cli import app
from cluster.spec import parse_job
from db import results
from db.session import open_database
from engine.errors import BadInput
from workers.execution.sandbox import check_sandbox

try:
    check_sandbox()
except BadInput as reason:
    pytestmark = pytest.mark.skip(reason=str(reason))


@pytest.fixture
def spec(world: World, tmp_path: Path) -> dict[str, Any]:
    """What a model of random weights writes stands in a comment; the test behind it decides."""
    rows = [
        {"id": f"s{place}", "prompt": "x = 1\n# ", "reference": "y", "test": f"assert x == {1 + place % 2}"}
        for place in range(4)
    ]
    file = tmp_path / "tested.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    benchmark = {"jsonl": str(file), "id": "id", "test": "test"}
    return world.fields(benchmarks=[benchmark], policies=["full"], exits=None, metrics=["em"])


def test_pass_at_1_is_computed_only_where_it_is_allowed(spec: dict[str, Any], tmp_path: Path) -> None:
    """Refused in a spec and without --execute; with it a score each, the same when it is computed again."""
    url = f"sqlite:///{tmp_path / 'record.db'}"
    with closing(open_database(url)) as db:
        with pytest.raises(BadInput, match="'pass@1' executes what the model wrote, which no worker does"):
            jobs.submit(db, parse_job(spec | {"metrics": ["em", "pass@1"]}))
        job = jobs.submit(db, parse_job(spec))
        assert jobs.work(db, job, inline=True) is jobs.JobState.DONE
        refused = CliRunner().invoke(app, ["rescore", str(job), "--metric", "pass@1", "--database", url])
        assert refused.exit_code == 2
        assert "allow it with --execute" in refused.stderr
        for _ in range(2):
            arguments = ["rescore", str(job), "--metric", "pass@1", "--execute", "--json", "--database", url]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.stderr
            assert json.loads(done.stdout)["metrics"] == {"pass@1": "pass@1@sandbox-1"}
            scores = {row.sample.name: row.scores["pass@1"] for row in results.completions(db, job_id=job)}
            assert scores == {"s0": 1, "s1": 0, "s2": 1, "s3": 0}
        with pytest.raises(BadInput, match="allow it with --execute"):
            rescoring.rescore(db, job)  # all that the job has
