"""Labels through a server and into reports: the same as from the database, beside the proxy that they judge."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lines_record import COUNT
from rich.console import Console
from served import Site
from typer.testing import CliRunner

from cluster.cli import app
from cluster.client import Client
from cluster.errors import NotAllowed
from cluster.labels import Judgement, items
from cluster.reports.build import build_report
from cluster.reports.model import JobReport
from cluster.reports.page import render_page
from cluster.reports.terminal import print_report
from db import results
from db.errors import BadInput, Missing
from db.labels import ratings
from db.session import open_database


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.served.url, site.keys["submit"]) as opened:
        yield opened


def test_a_server_gives_and_takes_what_the_database_does(site: Site, client: Client) -> None:
    """Export as lines, CSV and through the client; import twice; what is wrong is told with its line."""
    found = list(items(site.db, site.done, samples=5, seed=3))
    with Client(site.served.url, site.keys["read"]) as reader:
        assert list(reader.labels(site.done, samples=5, seed=3)) == found
        with pytest.raises(NotAllowed):
            reader.import_labels(site.done, "anna", [Judgement(found[0].id, True)])
    path = f"/v1/jobs/{site.done}/labels"
    answer = site.ask("GET", path, "read", params={"format": "csv", "samples": 5, "seed": 3})
    assert [row["id"] for row in csv.DictReader(io.StringIO(answer.text))] == [item.id for item in found]
    judgements = [Judgement(item.id, at % 2 == 0, at + 2) for at, item in enumerate(found)]
    done = client.import_labels(site.done, "anna", judgements)
    assert (done.new, done.changed, done.unchanged) == (len(found), 0, 0)
    again = client.import_labels(site.done, "anna", judgements)
    assert (again.new, again.changed, again.unchanged) == (0, 0, len(found))
    kept = ratings(site.db, site.done)
    assert {rating.judge for rating in kept} == {"anna"}
    with pytest.raises(BadInput, match=r"line 9: id '.*' is not of job"):
        client.import_labels(site.done, "anna", [Judgement(f"{found[0].id[:-4]}0000", True, 9)])
    with pytest.raises(Missing):
        client.import_labels(2**31, "anna", judgements[:1])
    assert ratings(site.db, site.done) == kept


def test_what_a_body_must_be(site: Site) -> None:
    path = f"/v1/jobs/{site.done}/labels"
    item = next(items(site.db, site.done)).id
    for body, sentence in (
        ({"judge": "ben", "labels": []}, "labels"),
        ({"judge": "ben", "labels": [{"id": item, "accepted": "yes"}]}, "accepted"),
        ({"judge": "ben", "labels": [{"id": item, "accepted": True, "why": 1}]}, "why"),
        ({"judge": "  ", "labels": [{"id": item, "accepted": True}]}, "is no name"),
        ({"labels": [{"id": item, "accepted": True}]}, "judge"),
    ):
        answer = site.ask("POST", path, "submit", json=body)
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:shortstop:problem:bad-input"), body
        assert sentence in answer.json()["detail"]
    assert site.ask("GET", f"/v1/jobs/{site.waiting}/labels").status_code == 409
    assert site.ask("GET", "/v1/jobs/999999/labels").status_code == 404
    assert (
        site.ask(
            "POST",
            f"/v1/jobs/{site.waiting}/labels",
            "submit",
            json={"judge": "b", "labels": [{"id": item, "accepted": True}]},
        ).status_code
        == 403
    )
    assert "ben" not in {rating.judge for rating in ratings(site.db, site.done)}


def test_a_judge_may_say_more_than_a_spec(site: Site) -> None:
    """Two megabytes go through; nothing of them is written where one id is wrong."""
    labels = [{"id": f"{site.done}.1.{at:016x}", "accepted": True, "line": at + 1} for at in range(30_000)]
    answer = site.ask("POST", f"/v1/jobs/{site.done}/labels", "submit", json={"judge": "cleo", "labels": labels})
    assert answer.status_code == 422
    assert "labels, line 1: id" in answer.json()["detail"]


def test_the_command_line_asks_a_server(site: Site, tmp_path: Path) -> None:
    server = {"SHORTSTOP_SERVER": site.served.url}
    reading, writing = (server | {"SHORTSTOP_KEY": site.keys[scope]} for scope in ("read", "submit"))
    exported = CliRunner().invoke(app, ["label", "export", str(site.done), "-"], env=reading)
    assert exported.exit_code == 0, exported.stderr
    lines = [json.loads(line) for line in exported.stdout.splitlines()]
    assert [line["id"] for line in lines] == [item.id for item in items(site.db, site.done)]
    judged = "".join(json.dumps(line | {"accepted": 1}) + "\n" for line in lines)
    done = CliRunner().invoke(app, ["label", "import", "-", "--judge", "dora"], input=judged, env=writing)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"job {site.done}: labels of dora: {len(lines)} new, 0 changed, 0 as before\n"


# --- reports ------------------------------------------------------------------------------------------------------


def printed(report: JobReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file))
    return file.getvalue()


def test_a_report_has_judges_beside_the_proxy(url: str, tmp_path: Path) -> None:
    """Counted by hand from what was judged; without labels nothing of it is there."""
    file = tmp_path / "theirs.jsonl"
    rows = ({"id": f"s{i}", "completion": f" x + {i}" if i < 4 else " None"} for i in range(COUNT))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["import-completions", str(file), "--name", "theirs", "--job", "1", "--database", url]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with closing(open_database(url)) as db:
        before = build_report(db, 1)
        assert before.benchmarks[0].judges is None
        assert "Acceptance rate" not in render_page(before)
        assert "Nobody was asked." in " ".join(printed(before).split())
        theirs = {f" x + {i}" for i in range(4)} | {" None"}
        found = list(items(db, 1))
        # anna accepts what equals the reference, but for one, and one that does not; of ours nothing
        yes = {" x + 0", " x + 1", " x + 2"}
        nones = [item for item in found if item.completion == " None"]
        said = {item.id: item.completion in yes or item is nones[0] for item in found}
        from cluster.labels import import_labels

        import_labels(db, 1, "anna", [Judgement(id, accepted) for id, accepted in said.items()])
        report = build_report(db, 1)
        [benchmark] = report.benchmarks
        run = next(run for run in benchmark.runs if run.policy == "theirs")
        assert run.labels is not None
        assert run.labels.judged == COUNT
        assert run.labels.acceptance_rate.value == 4 / 8
        assert run.labels.acceptance_rate.low is not None
        assert run.labels.proxy.value == 4 / 8
        assert run.labels.precision.value == 3 / 4
        assert run.labels.recall.value == 3 / 4
        assert run.labels.agreement.value == 6 / 8
        full = benchmark.baseline
        assert full is not None
        assert full.labels is not None
        shown = [row for row in results.completions(db, run_id=full.run_id) if row.outcome.text is not None]
        accepted = [said[id] for row in shown for id in said if matches(found, id, row)]
        assert full.labels.acceptance_rate.value == sum(accepted) / COUNT
        assert run.labels.acceptance_change.value == pytest.approx(4 / 8 - sum(accepted) / COUNT)
        assert full.labels.acceptance_change.value is None
        assert benchmark.judges is not None
        assert (benchmark.judges.names, benchmark.judges.shared, benchmark.judges.alpha) == (["anna"], 0, None)
        assert benchmark.judges.texts == len(found)
        import_labels(db, 1, "ben", [Judgement(id, accepted) for id, accepted in list(said.items())[:-1]])
        [again] = build_report(db, 1).benchmarks
        assert again.judges is not None
        assert (again.judges.names, again.judges.shared, again.judges.alpha) == (["anna", "ben"], len(found) - 1, 1)
        text = " ".join(printed(report).split())
        assert "Judges" in text
        assert f"1 judge judged {len(found)} texts, not knowing which policy wrote it" in text
        assert "Nobody was asked" not in text
        page = render_page(report)
        assert "Acceptance rate <small>judges</small>" in page
        assert JobReport.model_validate_json(report.model_dump_json()) == report
        row = report.table().set_index("policy").loc["theirs"]
        assert (row["judged"], row["acceptance_rate"], row["precision"]) == (8, 0.5, 0.75)
        assert theirs <= {item.completion for item in found}


def matches(found: list, id: str, row) -> bool:
    item = next(item for item in found if item.id == id)
    return item.completion == row.outcome.text and id.split(".")[1] == str(row.sample.id)
