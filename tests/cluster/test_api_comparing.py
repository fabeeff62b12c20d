"""Comparisons and gates of a server, on both databases: the answers of a local database, and its refusals."""

from collections.abc import Iterator
from typing import Any

import pytest
from served import Site

from cluster.client import Client
from cluster.comparing.build import compare
from cluster.comparing.sides import parse_side
from cluster.gates import Outcome, judge, parse_gate
from cluster.spec import parse_job
from db import jobs
from db.errors import BadInput, Missing

RULES = {"rules": [{"metric": "es", "max_loss": 0.5}]}


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.served.url, site.keys["read"]) as client:
        yield client


def test_a_server_compares_as_a_local_database_does(site: Site, client: Client) -> None:
    a, b = f"{site.done}:full", f"{site.done}:confidence"
    here = compare(site.db, parse_side(a), parse_side(b), confidence=0.9, metrics=["es"], levels=["es"])
    assert client.compare(a, b, confidence=0.9, metrics=["es"], levels=["es"]) == here
    assert [one.metric for one in here.differences] == ["es"]
    assert list(here.pairs[0].levels) == ["es"]
    assert client.compare(str(site.done)).pairs[0].samples == 8
    assert client.compare(str(site.done), without=site.done).pairs[0].samples == 0


def test_a_server_judges_as_a_local_database_does(site: Site, client: Client) -> None:
    """Neither policy of a random model gets anything right: nothing is lost, and nothing has a similarity of 2."""
    for rules, outcome in ((RULES, Outcome.PASS), ({"rules": [{"metric": "es", "min": 2}]}, Outcome.FAIL)):
        gate = parse_gate(rules)
        verdict = client.judge(gate, str(site.done))
        assert verdict == judge(site.db, gate, parse_side(str(site.done)))
        assert verdict.outcome is outcome


@pytest.mark.parametrize(
    ("params", "status", "sentence"),
    [
        ({"a": "99999"}, 404, "job 99999 does not exist"),
        ({"a": "x"}, 422, "side 'x' is no job"),
        ({"a": "run:99999"}, 404, "run 99999 does not exist"),
        ({"a": "{waiting}"}, 422, "only a job that is done can be compared"),
        ({"a": "{done}", "b": "{done}"}, 422, "are the same run"),
        ({"a": "{done}", "metric": "nothing"}, 422, "unknown metric 'nothing'"),
        ({"a": "{done}", "confidence": "2"}, 422, "'confidence'"),
        ({}, 422, "'a'"),
    ],
)
def test_refusals_are_problems(site: Site, params: dict[str, str], status: int, sentence: str) -> None:
    filled = {name: value.format(done=site.done, waiting=site.waiting) for name, value in params.items()}
    answer = site.ask("GET", "/v1/compare", "read", params=filled)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert sentence in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "field 'gate' is missing"),
        ({"gate": [], "a": "1"}, "gate: [] is not a mapping"),
        ({"gate": {"rules": [{"metric": "es"}]}, "a": "1"}, "give one of max_loss and min"),
        ({"gate": RULES}, "field 'a' is missing"),
        ({"gate": RULES, "a": "1", "c": 1}, "field 'c' is not known here"),
        ([1], "gate: "),
    ],
)
def test_a_gate_that_makes_no_sense_is_a_problem(site: Site, body: Any, sentence: str) -> None:
    answer = site.ask("POST", "/v1/gate", "read", json=body)
    assert answer.status_code == 422
    assert sentence in answer.json()["detail"]


def test_a_client_raises_what_a_local_database_raises(site: Site, client: Client) -> None:
    with pytest.raises(Missing, match="job 99999"):
        client.compare("99999")
    with pytest.raises(BadInput, match="no job"):
        client.judge(parse_gate(RULES), "x")


def test_a_server_knows_what_was_done_before(site: Site) -> None:
    """The same spec is; another number of tokens is not, and neither asks for a job."""
    before = len(jobs.list_jobs(site.db))
    with Client(site.served.url, site.keys["submit"]) as client:
        assert client.done_before(parse_job(site.body(name="another name"))) == site.done
        changed = site.body(generation={"max_new_tokens": 5, "batch_size": 4})
        assert client.done_before(parse_job(changed)) is None
    assert len(jobs.list_jobs(site.db)) == before
