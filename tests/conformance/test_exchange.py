"""`shortstop export` and `shortstop import`: a job moves between databases, of either kind, and says the same there."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import claimed, planned_job, results_of, summarise, work
from sqlalchemy import func, select
from test_checks import HASHES
from test_pruning import Killed, killed_before

from cluster.reports.build import build_report
from db import devices, exporting, importing, jobs, queue, results
from db.checks import check
from db.errors import BadInput
from db.exchange import SCHEMAS, digest
from db.exporting import export_job
from db.importing import Imported, import_job
from db.pruning import prune
from db.queries import query
from db.rollups import rollup
from db.session import Database, open_database
from db.tables import job, metadata

POLICIES = ("full", "self-speculative exit_layer=18")
TOKENS = """
SELECT policy, sample, t.position, token_id, exit_layer, layers_run, decision, confidence, draft_layer, draft_kept
FROM token AS t JOIN completion AS c USING (run_id, sample_id, policy) ORDER BY 1, 2, 3
"""


@pytest.fixture
def done(db: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A finished job of 23 samples, of which one shard was split; written in small pieces."""
    monkeypatch.setattr(exporting, "_WINDOW", 5)
    monkeypatch.setattr(exporting, "_ROW_GROUP", 16)
    planned_job(db, 4, benchmarks=("more",))  # so that no number is the same in the other record
    jobs.cancel_job(db, 1)
    finish(db, planned_job(db, 23, shard_batches=4, policies=POLICIES))
    return db


def finish(db: Database, job_id: int) -> None:
    lease = claimed(db, job_id=job_id)
    devices.keep_kernels(db, job_id, "cpu-test", {"1x2": ["packed"]})
    results.commit_shard(db, lease, results_of(db, lease, end_batch=1), split_at=1)
    work(db)
    results.finalise(db, job_id, summary)


def summary(data) -> dict[str, object]:
    return summarise(data) | {"errors": int(data.error.sum()), "tokens": int(data.n_tokens.sum())}


@pytest.fixture(params=["sqlite", "postgresql"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty record of each kind."""
    if request.param == "sqlite":
        with closing(open_database(f"sqlite:///{tmp_path / 'other.db'}")) as database:
            yield database
        return
    with request.getfixturevalue("new_postgresql_url")() as url, closing(open_database(url)) as database:
        yield database


@pytest.fixture
def exported(done: Database, tmp_path: Path) -> Path:
    export_job(done, 2, tmp_path / "exported", shortstop="1.0")
    return tmp_path / "exported"


def counts(db: Database) -> dict[str, int]:
    with db.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        }


def left(db: Database) -> dict[str, int]:
    """Of everything, but for the names of metrics, which stay."""
    return {table: n for table, n in counts(db).items() if n and table != "metric_list"}


def said(db: Database, job_id: int) -> dict[str, object]:
    """What a record says of a job, its own numbers left out."""
    completions = [
        (
            row.policy,
            row.sample.name,
            row.sample.prompt,
            row.scores,
            replace(row.outcome, run_id=0, sample_id=0, tokens=None),
        )
        for row in results.completions(db, job_id=job_id)
    ]
    tokens = [
        np.column_stack([vars(row.outcome.tokens)[name] for name in vars(row.outcome.tokens)]).tolist()
        for row in results.completions(db, job_id=job_id)
        if row.outcome.tokens is not None
    ]
    row, progress = asdict(jobs.job(db, job_id)), asdict(jobs.progress(db, job_id))
    for name in ("id", "principal"):
        row.pop(name)
    return {
        "job": row,
        "progress": progress,
        "completions": completions,
        "tokens": tokens,
        "runs": [(run.policy, run.benchmark, run.policy_spec, run.summary) for run in jobs.runs(db, job_id)],
        "sums": [rollup(db, run.id) for run in jobs.runs(db, job_id)],
        "kernels": devices.kernels_of(db, job_id),
    }


def test_an_imported_job_says_what_the_exported_one_says(done: Database, other: Database, exported: Path) -> None:
    """Job, runs, summaries, sums, completions, scores and every token; and `db check` finds nothing there."""
    assert import_job(other, exported, HASHES) == Imported(1, True)
    assert said(other, 1) == said(done, 2)
    assert list(check(other, HASHES)) == []
    columns = "policy, batch, rows, prefill_ns, decode_ns, flops, device_class, drafted, drafts_kept, full_decode_ns"
    for sql in (
        TOKENS.replace("ORDER BY", "WHERE t.job_id = {job} ORDER BY"),
        f"SELECT {columns} FROM batch WHERE job_id = {{job}} ORDER BY policy, batch",
        "SELECT policy, metric, version, value FROM completion_score WHERE job_id = {job} ORDER BY 1, 2, 3, 4",
        "SELECT job, state, policy, samples, errors, tokens FROM run_summary WHERE job_id = {job} ORDER BY 3",
    ):
        left, right = (list(query(db, sql.format(job=id))) for db, id in ((done, 2), (other, 1)))
        assert left == right
        assert left


def test_the_live_report_is_the_same(done: Database, other: Database, tmp_path: Path) -> None:
    """Of a job without summaries: from the sums."""
    cancelled = planned_job(done, 23, shard_batches=4, policies=POLICIES)
    lease = claimed(done, job_id=cancelled)
    results.commit_shard(done, lease, results_of(done, lease))
    jobs.cancel_job(done, cancelled)
    export_job(done, cancelled, tmp_path / "exported", shortstop="1.0")
    imported = import_job(other, tmp_path / "exported", HASHES)
    left, right = build_report(done, cancelled), build_report(other, imported.job_id)
    assert left.batches_done == 4
    numbers = {"job_id": 0}
    assert plain(right.model_copy(update=numbers)) == plain(left.model_copy(update=numbers))


def plain(report) -> dict:
    fields = report.model_dump()
    for benchmark in fields["benchmarks"]:
        for run in benchmark["runs"]:
            run["run_id"] = 0
    return fields


def test_the_same_export_twice_is_one_job(done: Database, other: Database, exported: Path, tmp_path: Path) -> None:
    """Nothing is doubled, also not by a copy, by a second export of the same job, or by one of the imported job."""
    import_job(other, exported, HASHES)
    before = counts(other)
    shutil.copytree(exported, tmp_path / "copied")
    export_job(done, 2, tmp_path / "again", shortstop="2.0")
    for folder in (exported, tmp_path / "copied", tmp_path / "again"):
        assert import_job(other, folder, HASHES) == Imported(1, False)
    assert counts(other) == before


def test_an_interrupted_import_goes_on_where_it_was(
    done: Database, other: Database, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once in every transaction, run after run: until it is whole nobody sees a job that has ended well."""
    monkeypatch.setattr(importing, "_ROWS", 7)
    kills = 0
    while True:
        with killed_before(2 if kills else 0):  # one piece further each time
            try:
                found = import_job(other, exported, HASHES)
                break
            except Killed:
                kills += 1
        if jobs_in(other):
            assert jobs.job(other, 1).state is jobs.JobState.CANCELLED
            assert jobs.list_jobs(other) == []
            [sentence] = check(other, HASHES)
            assert sentence == (
                "job 1 is half imported; run its `shortstop import` again, or remove it with `shortstop db prune`."
            )
            with pytest.raises(BadInput, match="was cancelled"):
                jobs.resume_job(other, 1)
    assert found == Imported(1, True)
    assert kills > 20
    assert said(other, 1) == said(done, 2)
    assert list(check(other, HASHES)) == []
    assert import_job(other, exported, HASHES) == Imported(1, False)


def jobs_in(db: Database) -> int:
    return counts(db)["job"]


def test_two_imports_of_one_export_write_it_once(
    done: Database, other: Database, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that finds that the other went on without it says so, and leaves what is written alone."""
    monkeypatch.setattr(importing, "_ROWS", 7)
    pieces = importing._Import._pieces

    def overtaken_pieces(self):
        for number, piece in enumerate(pieces(self)):
            if number == 2:
                monkeypatch.setattr(importing._Import, "_pieces", pieces)
                assert import_job(other, exported, HASHES) == Imported(1, True)
            yield piece

    monkeypatch.setattr(importing._Import, "_pieces", overtaken_pieces)
    with pytest.raises(BadInput, match="is being imported by somebody else; wait until that has ended"):
        import_job(other, exported, HASHES)
    assert said(other, 1) == said(done, 2)


def test_others_write_while_a_job_is_imported(other: Database, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transaction holds more than a piece: on SQLite a job is submitted between any two."""
    monkeypatch.setattr(importing, "_ROWS", 7)
    pieces, submitted = importing._Import._pieces, []

    def busy(self):
        for piece in pieces(self):
            submitted.append(jobs.create_job(other, name="meanwhile", spec={"model": "none"}))
            yield piece

    monkeypatch.setattr(importing._Import, "_pieces", busy)
    import_job(other, exported, HASHES)
    assert len(submitted) > 10


def test_an_imported_job_ages_from_its_import(other: Database, exported: Path) -> None:
    """Red where a prune goes by the time at which the job ended elsewhere."""
    import_job(other, exported, HASHES)
    with other.write() as connection:
        connection.execute(job.update().values(finished_at=1.5))
    assert prune(other, 3600).jobs == []
    assert list(check(other, HASHES)) == []
    assert prune(other, 0).jobs == [1]
    assert left(other) == {}


def test_an_import_that_is_given_up_is_pruned(other: Database, exported: Path) -> None:
    with killed_before(2), pytest.raises(Killed):
        import_job(other, exported, HASHES)
    assert prune(other, 3600).jobs == []
    assert prune(other, 0).jobs == [1]
    assert left(other) == {}


def test_a_failed_job_can_be_imported_and_go_on(done: Database, other: Database, tmp_path: Path) -> None:
    failed = planned_job(done, 23, shard_batches=4, policies=POLICIES)
    for _ in range(queue.MAX_ATTEMPTS):
        claimed(done, "doomed", job_id=failed)
        queue.reap(done, dead_workers=["doomed"])
    work(done)
    results.finalise(done, failed, summarise)
    export_job(done, failed, tmp_path / "exported", shortstop="1.0")
    imported = import_job(other, tmp_path / "exported", HASHES).job_id
    assert said(other, imported) == said(done, failed)
    assert jobs.resume_job(other, imported) == 1
    work(other)
    results.finalise(other, imported, summarise)
    assert jobs.job(other, imported).state is jobs.JobState.DONE
    assert list(check(other, HASHES)) == []


def test_a_job_that_could_not_be_prepared_is_exported_too(done: Database, other: Database, tmp_path: Path) -> None:
    job_id = jobs.create_job(done, name="broken", spec={"model": "nowhere"})
    jobs.fail_job(done, job_id, "no such model")
    export_job(done, job_id, tmp_path / "exported", shortstop="1.0")
    imported = import_job(other, tmp_path / "exported", HASHES).job_id
    assert said(other, imported) == said(done, job_id)


def test_samples_that_are_there_are_used(done: Database, exported: Path) -> None:
    """Into the record that it came from: another job on the same benchmark."""
    before = counts(done)
    imported = import_job(done, exported, HASHES)
    after = counts(done)
    assert imported.new
    assert {name: after[name] for name in ("benchmark", "sample")} == {
        name: before[name] for name in ("benchmark", "sample")
    }
    assert said(done, imported.job_id) == said(done, 2)


def test_the_exits_of_a_job_travel_with_it(done: Database, other: Database, tmp_path: Path) -> None:
    with done.write() as connection:
        pinned = jobs.job(done, 2).pinned | {"exits_hash": "hash-of-exits"}  # type: ignore[operator]
        connection.execute(job.update().where(job.c.id == 2).values(pinned=pinned))
    export_job(done, 2, tmp_path / "exported", shortstop="1.0")
    import_job(other, tmp_path / "exported", HASHES)
    assert jobs.artifact(other, "hash-of-exits") == b"\x00exits"


def test_an_export_reads_as_parquet(done: Database, exported: Path) -> None:
    """In pieces, with the columns that docs/database.md names."""
    assert sorted(file.name for file in exported.iterdir()) == sorted(
        ["manifest.json", *(f"{name}.parquet" for name in SCHEMAS)]
    )
    tokens = pq.ParquetFile(exported / "tokens.parquet")
    assert tokens.num_row_groups > 3
    kept = tokens.read().to_pydict()
    [(counted,)] = query(done, "SELECT count(*) FROM token WHERE job_id = 2")
    assert len(kept["decision"]) == counted
    assert {decision for decision, id in zip(kept["decision"], kept["token_id"], strict=True) if id is None} == {"stop"}
    assert {
        (layer is None) == (kept_ is None) for layer, kept_ in zip(kept["draft_layer"], kept["draft_kept"], strict=True)
    } == {True}
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["content"]["job"]["pinned"] == jobs.job(done, 2).pinned
    assert manifest["content"]["kernels"] == {"cpu-test": {"1x2": ["packed"]}}


def change_json(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(folder: Path) -> None:
    content = (folder / "tokens.parquet").read_bytes()
    (folder / "tokens.parquet").write_bytes(content[: len(content) // 2])


def flip(folder: Path) -> None:
    content = bytearray((folder / "samples.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "samples.parquet").write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (truncate, r"is damaged: tokens.parquet is not as it was written; copy or export it again"),
    (flip, r"is damaged: samples.parquet is not"),
    (lambda folder: (folder / "scores.parquet").unlink(), r"is damaged: scores.parquet is not"),
    (lambda folder: (folder / "manifest.json").unlink(), r"holds no manifest.json; name the folder of an export"),
    (lambda folder: (folder / "manifest.json").write_text('{"format": 1,'), r"is damaged: manifest.json is not"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), r"is damaged: manifest.json is not"),
    (lambda folder: change_json(folder, lambda m: m["content"]["job"].update(name="x")), r"damaged: manifest.json"),
    (
        lambda folder: change_json(folder, lambda m: m.update(format=4)),
        r"has format 4, this version reads 3; export it",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_export_is_refused_in_one_sentence_and_nothing_is_written(
    other: Database, sqlite_exported: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sqlite_exported, folder)
    damage(folder)
    with pytest.raises(BadInput, match=message) as caught:
        import_job(other, folder, HASHES)
    assert "\n" not in str(caught.value)
    assert left(other) == {}


@pytest.fixture(scope="module")
def sqlite_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with closing(open_database(f"sqlite:///{folder / 'record.db'}")) as db:
        finish(db, planned_job(db, 23, shard_batches=4, policies=POLICIES))
        export_job(db, 1, folder / "exported", shortstop="1.0")
    return folder / "exported"


def without(table: pa.Table, row: int) -> pa.Table:
    return pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def forge(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another content with the right hashes."""
    file = folder / f"{name}.parquet"
    table = change(pq.read_table(file))
    pq.write_table(table.cast(SCHEMAS[name]), file)

    def rehash(manifest: dict) -> None:
        manifest["content"]["files"][name] = {"rows": len(table), "sha256": digest(file)}
        from db.exchange import _id

        manifest["id"] = _id(manifest["content"])

    change_json(folder, rehash)


def other_prompt(table: pa.Table) -> pa.Table:
    return table.set_column(3, "prompt", pa.array(["other"] * len(table)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", lambda table: without(table, 5), "has other tokens than it counts"),
        ("tokens", lambda table: pa.concat_tables([table, table.slice(0, 1)]), "is damaged: tokens.parquet"),
        ("completions", lambda table: table.slice(0, 0), "is damaged: tokens.parquet"),
        ("samples", other_prompt, "is damaged: samples.parquet"),
        ("samples", lambda table: without(table, 5), "is damaged: samples.parquet"),
        ("scores", lambda table: table.set_column(1, "sample", pa.array([999] * len(table))), "IndexError"),
        (
            "timings",
            lambda table: table.set_column(1, "batch", pa.array([99 + i for i in range(len(table))])),
            "batches are timed",
        ),
        ("tasks", lambda table: without(table, len(table) - 1), "IndexError"),
        ("runs", lambda table: table.set_column(5, "policy_spec", pa.array(["{"] * len(table))), "JSONDecodeError"),
    ],
)
def test_an_export_that_was_made_up_is_refused_and_nothing_is_written(
    other: Database,
    sqlite_exported: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[pa.Table], pa.Table],
    message: str,
) -> None:
    """Its hashes are right and its rows are not: the transaction is rolled back."""
    folder = tmp_path / "forged"
    shutil.copytree(sqlite_exported, folder)
    forge(folder, name, change)
    with pytest.raises(BadInput, match=message) as caught:
        import_job(other, folder, HASHES)
    assert "\n" not in str(caught.value)
    assert left(other) == {}


def test_another_content_under_a_known_name_is_refused(other: Database, sqlite_exported: Path) -> None:
    """A changed benchmark under its old name is an error, not a shrug."""
    planned_job(other, 5)
    before = counts(other)
    with pytest.raises(BadInput, match="benchmark 'lines' version '1' has another content in this record"):
        import_job(other, sqlite_exported, HASHES)
    assert counts(other) == before


@pytest.mark.parametrize(
    ("job_id", "message"), [(77, "job 77 does not exist"), (3, "job 3 is ready; export it when it has ended")]
)
def test_what_cannot_be_exported_is_refused(done: Database, tmp_path: Path, job_id: int, message: str) -> None:
    planned_job(done, 23)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=message):
        export_job(done, job_id, tmp_path / "exported", shortstop="1.0")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_not_overwritten(done: Database, exported: Path) -> None:
    with pytest.raises(BadInput, match=r"exported' is there already; remove it, or name another one"):
        export_job(done, 2, exported, shortstop="1.0")


def test_an_export_that_breaks_off_leaves_nothing(
    done: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_outcomes", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"cannot be written \(No space left on device\); name another one"):
        export_job(done, 2, tmp_path / "exported", shortstop="1.0")
    assert sorted(tmp_path.iterdir()) == before
