"""Labels: each text is judged once and blindly, and comes back as a whole or not at all."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from made import planned_job, results_of, summarise
from typer.testing import CliRunner

from cluster import labels
from cluster.cli import app
from cluster.labels import Item, Judgement, import_labels, items
from db import events, jobs, pruning, queue, results
from db.checks import check
from db.errors import Conflict, Missing
from db.exporting import export_job
from db.importing import import_job
from db.labels import judged, ratings
from db.queries import query
from db.records import OutcomeRow
from db.session import Database, open_database
from engine.errors import BadInput

POLICIES = ("full", "confidence threshold=0.9", "sec exit=0.9")
SAMPLES = 23


@pytest.fixture
def job(db: Database) -> int:
    return finished(db)


def finished(db: Database) -> int:
    """A job whose policies write the same for even samples, and each something else for odd ones."""
    job_id = planned_job(db, SAMPLES, policies=POLICIES)
    policies = {run.id: run.policy for run in jobs.runs(db, job_id)}
    while lease := queue.claim(db, "worker", kind="shard"):
        made = results_of(db, lease)
        outcomes = [written(one, policies[one.run_id]) for one in made.outcomes]
        results.commit_shard(db, lease, replace(made, outcomes=outcomes))
    assert results.finalise(db, job_id, summarise)
    return job_id


def written(one: OutcomeRow, policy: str) -> OutcomeRow:
    if one.text is None:
        return one
    return replace(one, text=f"text {one.sample_id} é\n" + (policy.split()[0] if one.sample_id % 2 else ""))


def yes(found: list[Item]) -> list[Judgement]:
    return [Judgement(item.id, True, line) for line, item in enumerate(found, start=1)]


def test_each_text_that_was_offered_is_judged_once_and_blindly(db: Database, job: int) -> None:
    """Errors and suppressed completions are not; no field of an item tells a policy."""
    found = list(items(db, job))
    offered = [row for row in results.completions(db, job_id=job) if row.outcome.shown and row.outcome.text is not None]
    pairs = {(row.sample.id, row.outcome.text) for row in offered}
    assert len(pairs) < len(offered)
    assert Counter(item.completion for item in found) == Counter(text for _, text in pairs)
    assert len({item.id for item in found}) == len(found)
    prompts = {row.outcome.text: (row.sample.prompt, row.sample.language) for row in offered}
    for item in found:
        assert (item.prompt, item.language) == prompts[item.completion]
        assert not [policy for policy in POLICIES if policy in (item.id, item.prompt)]


def test_fewer_samples_are_the_first_of_more_whole_ones(db: Database, job: int) -> None:
    """So a file that is judged half way has policies on the same samples; another seed has another order."""
    everything = list(items(db, job))
    for count in (1, 5, SAMPLES):
        some = list(items(db, job, samples=count))
        assert some == everything[: len(some)]
        assert len({item.prompt for item in some}) <= count
    others = list(items(db, job, seed=1))
    assert others != everything
    assert sorted(others, key=lambda item: item.id) == sorted(everything, key=lambda item: item.id)
    prompts = [item.prompt for item in everything]
    assert all(prompts[i] == prompts[i + 1] or prompts[i] not in prompts[i + 1 :] for i in range(len(prompts) - 1))


def test_the_same_again_changes_nothing_and_another_answer_replaces(db: Database, job: int) -> None:
    found = list(items(db, job))
    first = import_labels(db, job, " anna ", yes(found))
    assert (first.judge, first.new, first.changed, first.unchanged) == ("anna", len(found), 0, 0)
    last = events.events(db, job)[-1]
    again = import_labels(db, job, "anna", yes(found))
    assert (again.new, again.changed, again.unchanged) == (0, 0, len(found))
    assert events.events(db, job)[-1] == last
    assert (last.what, last.detail) == ("labelled", {"judge": "anna", "new": len(found), "changed": 0})
    changed = import_labels(db, job, "anna", [Judgement(found[3].id, False)])
    assert (changed.new, changed.changed, changed.unchanged) == (0, 1, 0)
    said = {rating.accepted for rating in ratings(db, job) if rating.item[1] == labels.hash_of(found[3].completion)}
    assert said == {False}
    import_labels(db, job, "ben", yes(found[:2]))
    assert Counter(rating.judge for rating in ratings(db, job)) == {"anna": len(found), "ben": 2}


def test_a_text_counts_for_every_policy_that_offered_it(db: Database, job: int) -> None:
    """Two judges of whom one accepts make a half; who was not offered is not judged."""
    found = list(items(db, job))
    import_labels(db, job, "anna", yes(found))
    import_labels(db, job, "ben", [replace(one, accepted=False) for one in yes(found)])
    rows = judged(db, job)
    offered = [row for row in results.completions(db, job_id=job) if row.outcome.shown and row.outcome.text is not None]
    assert [(row.run_id, row.sample_id) for row in rows] == [(row.run_id, row.sample.id) for row in offered]
    assert {row.accepted for row in rows} == {0.5}
    assert [row.source_group for row in rows] == [row.sample.source_group for row in offered]
    asked = "SELECT policy, judge, count(*) AS n FROM completion_label GROUP BY 1, 2 ORDER BY 1, 2"
    counted = Counter(row.policy for row in results.completions(db, job_id=job) if in_items(row.outcome, found))
    assert list(query(db, asked)) == [(p, j, counted[p]) for p in sorted(POLICIES) for j in ("anna", "ben")]


def in_items(outcome: OutcomeRow, found: list[Item]) -> bool:
    return outcome.text in {item.completion for item in found}


WRONG = {
    "unknown text": (
        lambda ids: [(f"{ids[0][:-4]}0000", True)],
        r"line 1: id '.*' is not of job \d+; `shortstop label",
    ),
    "another job": (lambda ids: [(ids[0], True), ("99" + ids[1], True)], r"line 2: id '99.*' is of job 99\d+, not of"),
    "no id": (lambda ids: [(ids[0], True), ("s/1", False)], r"line 2: id 's/1' is none of an export; keep the ids"),
    "twice": (lambda ids: [(ids[0], True), (ids[0], False)], r"line 2: id '.*' was judged otherwise on line 1; keep"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_line_and_nothing_is_written(db: Database, job: int, case: str) -> None:
    change, sentence = WRONG[case]
    made = change([item.id for item in items(db, job)])
    judgements = [Judgement(id, accepted, line) for line, (id, accepted) in enumerate(made, start=1)]
    with pytest.raises(BadInput, match=sentence):
        import_labels(db, job, "anna", judgements)
    assert ratings(db, job) == []


def test_a_job_that_has_not_ended_or_is_not_there_has_nothing_to_judge(db: Database) -> None:
    waiting = planned_job(db)
    with pytest.raises(Conflict, match=f"job {waiting} is ready; export what there is to judge once it has ended"):
        next(items(db, waiting))
    for do in (lambda: next(items(db, 99)), lambda: import_labels(db, 99, "anna", [])):
        with pytest.raises(Missing, match="job 99 does not exist"):
            do()


def test_labels_move_with_their_job_and_go_with_it(db: Database, job: int, tmp_path: Path) -> None:
    """Exported, imported into another record, pruned: the record stays whole."""
    found = list(items(db, job))
    import_labels(db, job, "anna", yes(found))
    import_labels(db, job, "ben", [Judgement(found[0].id, False)])
    export_job(db, job, tmp_path / "exported", shortstop="1.0")
    hashes = known_hashes(db)
    with closing(open_database(f"sqlite:///{tmp_path / 'other.db'}")) as other:
        planned_job(other, 4, benchmarks=("more",))  # so that no number is the same
        moved = import_job(other, tmp_path / "exported", hashes).job_id
        left, right = (said(database, id) for database, id in ((db, job), (other, moved)))
        assert left == right
        assert len(left) == len(found) + 1
        assert not [one for one in check(other, hashes) if "label" in one]
    pruning.prune(db, -1)
    assert jobs.list_jobs(db) == []
    with db.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM label").scalar_one() == 0


def said(db: Database, job_id: int) -> list[tuple[str, str, bool]]:
    with db.read() as connection:
        rows = connection.exec_driver_sql(f"SELECT judge, text, accepted, at FROM label WHERE job_id = {job_id}")
        return sorted((judge, text, bool(accepted), at) for judge, text, accepted, at in rows)


def known_hashes(db: Database):
    """The hashes that these made-up benchmarks and exits go under."""
    from db.checks import Hashes

    with db.read() as connection:
        [content_hash] = connection.exec_driver_sql("SELECT content_hash FROM benchmark").scalars()

    def of_benchmark(version: str, ends: str, samples: Iterator[object]) -> str:
        list(samples)
        return str(content_hash)

    return Hashes(of_benchmark, lambda kind, content: "hash-of-exits")


# --- files, through the command line -----------------------------------------------------------------------------


def shortstop(*arguments: str, database: Database) -> str:
    done = CliRunner().invoke(app, [*arguments, "--database", database.url])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_file_comes_back_as_it_went(db: Database, job: int, tmp_path: Path, form: str) -> None:
    """Filled in as people do; what is left empty is not judged. An export never overwrites what somebody judged."""
    file = tmp_path / f"judge.{form}"
    shortstop("label", "export", str(job), str(file), database=db)
    found = list(items(db, job))
    if form == "csv":
        text = file.read_bytes().decode()
        assert [row["completion"] for row in csv.DictReader(io.StringIO(text))] == [item.completion for item in found]
        answers = iter(["yes", " No ", "1", "0", "TRUE"])
        text = "\ufeff" + _filled(text, answers)
    else:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [line["completion"] for line in lines] == [item.completion for item in found]
        answers = iter([True, "no", 1, 0, "true"])
        text = "".join(json.dumps(line | {"accepted": next(answers, None)}) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8", newline="")
    done = json.loads(shortstop("label", "import", str(file), "--judge", "anna", "--json", database=db))
    assert done == {"job": job, "judge": "anna", "new": 5, "changed": 0, "unchanged": 0}
    expected = {labels.hash_of(item.completion): i % 2 == 0 for i, item in enumerate(found[:5])}
    assert {rating.item[1]: rating.accepted for rating in ratings(db, job)} == expected
    refused = CliRunner().invoke(app, ["label", "export", str(job), str(file), "--database", db.url])
    assert refused.exit_code == 2
    assert "is there already, and somebody may have judged in it" in refused.stderr
    assert file.read_bytes().decode() == text


def _filled(text: str, answers: Iterator[str]) -> str:
    header, *rows = list(csv.reader(io.StringIO(text, newline="")))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows([*row[:-1], next(answers, "")] for row in rows)
    return out.getvalue()


FILES = {
    "a.txt": ("", "the name ends with neither .csv nor .jsonl"),
    "a.csv": ("id;accepted\n1.1.ab;1\n", "line 2: column 'id' is missing among id;accepted; keep the columns"),
    "b.csv": ("id,accepted\n1.1.ab,maybe\n", "line 2: accepted is 'maybe'; say 1 or 0"),
    "c.csv": ('id,prompt,accepted\n1.1.ab,"a\nb",1\n1.1.cd,x,2\n', "line 4: accepted is '2'"),
    "d.csv": ("id,accepted\n1.1.ab\n", "line 2: 1 cells stand under 2 columns"),
    "e.csv": ('id,accepted\n"1.1.ab,1\n', "it is not CSV"),
    "f.csv": ("id,accepted\n1.1.ab,\n", "nothing is judged yet"),
    "a.jsonl": ('{"id": "1.1.ab", "accepted": true}\n{"id"\n', "line 2: it is not JSON"),
    "b.jsonl": ("[]\n", "line 1: it is no JSON object"),
    "c.jsonl": ('\n{"id": "1.1.ab"}\n', "line 2: column 'accepted' is missing among id"),
    "d.jsonl": (
        '{"id": "1.1.ab", "accepted": 1}\n{"id": "2.1.ab", "accepted": 1}\n',
        "line 2: id '2.1.ab' is not of the",
    ),
    "e.jsonl": ('{"id": "x", "accepted": 1}\n', "line 1: id 'x' is none of an export"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_wrong_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    text, sentence = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    url = f"sqlite:///{tmp_path / 'none.db'}"
    done = CliRunner().invoke(app, ["label", "import", str(tmp_path / name), "--judge", "anna", "--database", url])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none.db").exists()


def test_a_judge_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1.1.ab", "accepted": true}\n')
    for name in (" ", "a\nb", "x" * 101):
        done = CliRunner().invoke(app, ["label", "import", str(tmp_path / "a.jsonl"), "--judge", name])
        assert done.exit_code == 2
        assert "is no name; give 1 to 100 printable characters" in done.stderr
