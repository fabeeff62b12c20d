"""A job from its spec to its summaries, inline: one worker, no Ray."""

import json
from contextlib import closing
from pathlib import Path
from socket import gethostname

import pytest
import torch
from small_world import World, bundle, columns, rows

from cluster import jobs
from db import jobs as record
from db import queue, results
from db.errors import BadInput as RecordBadInput
from db.session import Database, open_database
from engine.errors import BadInput, WeightsMismatch
from workers.worker import Unfit, Worker


def test_every_sample_ends_with_one_outcome_per_policy(world: World, db: Database) -> None:
    job_id = jobs.submit(db, world.spec())
    assert record.job(db, job_id).state is jobs.JobState.PREPARING
    seen = []
    state = jobs.work(db, job_id, inline=True, on_progress=lambda progress: seen.append(progress.batches_done))
    assert state is jobs.JobState.DONE
    assert len(columns(db, job_id)) == 48 * 4
    assert seen[0] == 0
    assert seen[-1] == 12
    assert [run.summary["samples"] for run in record.runs(db, job_id)] == [48] * 4
    assert rows(db, "select count(*) from timing where timed") == [(12 * 4,)]


def test_a_job_keeps_where_its_answers_came_from(world: World, db: Database) -> None:
    job_id = jobs.submit(db, world.spec())
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    pinned = record.job(db, job_id).pinned
    assert len(pinned["weights_hash"]) == len(pinned["tokenizer_hash"]) == len(pinned["exits_hash"]) == 64
    assert (pinned["threads"], pinned["batch_size"], pinned["seed"], pinned["device"]) == (1, 4, 0, "cpu")
    assert "1 thread," in pinned["device_class"]
    assert pinned["versions"]["torch"] == torch.__version__
    assert pinned["metrics"]["es"].startswith("es@")
    [content_hash] = pinned["benchmarks"].values()
    assert record.benchmark(db, record.runs(db, job_id)[0].benchmark_id).content_hash == content_hash


def test_the_size_of_shards_does_not_change_completions(
    world: World, db: Database, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    job_id = jobs.submit(db, world.spec(shard_batches=1))
    jobs.work(db, job_id, inline=True)
    assert rows(db, "select count(*) from task where kind = 'shard' and state = 'done'") == [(12,)]
    assert columns(db, job_id) == undisturbed


def test_postgresql_keeps_the_same_completions(
    world: World, postgresql_url: str, undisturbed: dict[tuple[str, str], tuple[object, ...]]
) -> None:
    with closing(open_database(postgresql_url)) as db:
        job_id = jobs.submit(db, world.spec())
        assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
        assert columns(db, job_id) == undisturbed


def test_workers_need_nothing_of_the_submitters_exits(world: World, db: Database, tmp_path: Path) -> None:
    exits = bundle(tmp_path / "exits", world.model, points=(2, 4), seed=3)
    job_id = jobs.submit(db, world.spec(exits="exits"), tmp_path)
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    for file in (*exits.glob("*.json"), *exits.glob("*.safetensors"), world.prompts.rename(tmp_path / "moved")):
        if file.parent == exits:
            file.unlink()
    try:
        assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    finally:
        (tmp_path / "moved").rename(world.prompts)
    assert {layer for (layer,) in rows(db, "select distinct exit_layer from token")} <= {2, 4, 6}


def test_a_suppressed_stop_is_not_shown(undisturbed: dict[tuple[str, str], tuple[object, ...]]) -> None:
    sec = [row for (policy, _), row in undisturbed.items() if policy.startswith("sec")]
    assert {(finish == "stop", shown) for _, _, finish, _, shown, *_ in sec} == {(True, False), (False, True)}


def test_the_papers_rule_on_other_heads_is_called_so(world: World, tmp_path: Path) -> None:
    bundle(tmp_path / "lens", world.model, head="lens")
    assert jobs.validate(world.spec(exits=str(tmp_path / "lens"))).policies[3].startswith("sec-lens ")
    assert jobs.validate(world.spec()).policies[3].startswith("sec ")


def test_a_dry_run_counts_what_a_job_would_do(world: World) -> None:
    [benchmark] = jobs.validate(world.spec(shard_batches=5)).benchmarks
    assert (benchmark.samples, benchmark.batches, benchmark.shards) == (48, 12, 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "smollm2-153m"}, "did you mean 'smollm2-135m'"),
        ({"benchmarks": ["humaneval-line"]}, "did you mean 'humaneval-lines'"),
        ({"benchmarks": [{"jsonl": "nowhere.jsonl"}]}, "there is no file"),
        ({"metrics": ["rouge"]}, "unknown metric 'rouge'"),
        ({"exits": None}, "needs exits"),
        ({"exits": "nowhere"}, "unknown exits"),
    ],
)
def test_cheap_bad_input_is_refused_before_there_is_a_job(
    world: World, db: Database, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        jobs.submit(db, world.spec(**changes))
    assert record.list_jobs(db) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policies": [{"fixed": {"exit_layer": 3}}]}, "trained ones: 1, 2, 4, 5"),
        ({"generation": {"max_new_tokens": 96}}, "max_new_tokens is 96"),
        ({"policies": [{"patience": {"patience": 9}}]}, "patience is 9"),
    ],
)
def test_bad_input_found_while_preparing_fails_the_job(
    world: World, db: Database, changes: dict[str, object], sentence: str
) -> None:
    job_id = jobs.submit(db, world.spec(**changes))
    with pytest.raises(BadInput, match=sentence) as caught:
        jobs.work(db, job_id, inline=True)
    job = record.job(db, job_id)
    assert (job.state, job.error) == (jobs.JobState.FAILED, str(caught.value))


def test_exits_of_other_weights_are_refused(world: World, db: Database, tmp_path: Path) -> None:
    from tiny_models import random_model, save

    other = save(random_model("llama", seed=1), tmp_path / "other")
    exits = bundle(tmp_path / "exits", other)
    job_id = jobs.submit(db, world.spec(exits=str(exits)))
    with pytest.raises(WeightsMismatch, match="trained for"):
        jobs.work(db, job_id, inline=True)
    assert record.job(db, job_id).state is jobs.JobState.FAILED


def test_a_benchmark_that_changed_under_its_name_is_refused(world: World, db: Database, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(world.prompts.read_bytes())
    spec = world.spec(benchmarks=[{"jsonl": str(file), "name": "mine"}])
    jobs.submit(db, spec)
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    file.write_text(json.dumps({"prompt": "other", "reference": "other"}) + "\n")
    job_id = jobs.submit(db, spec)
    with pytest.raises(RecordBadInput, match="has changed"):
        jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    assert record.job(db, job_id).state is jobs.JobState.FAILED


def test_weights_that_changed_after_preparing_are_refused(world: World, db: Database, tmp_path: Path) -> None:
    """No completion comes from other weights than the job pins; the work is not to blame, and loses no attempt."""
    from tiny_models import random_model, save

    model = save(random_model("llama"), tmp_path / "model")
    job_id = jobs.submit(db, world.spec(model=str(model), exits=None, policies=["full"], shard_batches=12))
    jobs.prepare(db, queue.claim(db, "test", kind="prepare"))
    save(random_model("llama", seed=1), tmp_path / "model")
    with pytest.raises(Unfit, match="prepared with"):
        Worker(db, "test", timed=True).work(job_id)
    with pytest.raises(BadInput, match=f"has weights .* on {gethostname()}, but the job was prepared with"):
        jobs.work(db, job_id, inline=True)
    assert rows(db, "select state, attempt from task where kind = 'shard'") == [("ready", 0)]
    assert columns(db, job_id) == {}


def test_a_sample_that_breaks_the_model_is_the_only_one_to_suffer(world: World, db: Database, tmp_path: Path) -> None:
    """One rare token has a broken embedding. Its batch is done again, sample by sample; only its sample fails."""
    from tiny_models import random_model, save, tiny_tokenizer

    model = random_model("llama untied")
    [rare] = tiny_tokenizer().encode("~")
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("nan")
        model.lm_head.weight[rare] = 0  # the model itself never writes it
    folder = save(model, tmp_path / "model")
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    lines[17]["prompt"] += " ~"
    (tmp_path / "poisoned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = world.spec(
        model=str(folder),
        exits=str(bundle(tmp_path / "exits", folder)),
        benchmarks=[{"jsonl": str(tmp_path / "poisoned.jsonl"), "id": "id", "ends": "text"}],
    )
    job_id = jobs.submit(db, spec)
    assert jobs.work(db, job_id, inline=True) is jobs.JobState.DONE
    outcomes = [(row.sample.position, row.outcome) for row in results.completions(db, job_id=job_id)]
    assert len(outcomes) == 48 * 4
    assert {position for position, outcome in outcomes if outcome.error} == {17}
    assert sum("not finite" in (outcome.error or "") for _, outcome in outcomes) == 4
    assert {position for position, outcome in outcomes if outcome.isolated} == {16, 17, 18, 19}
    assert rows(db, "select distinct batch from timing where not timed") == [(4,)]
    assert [run.summary["errors"] for run in record.runs(db, job_id)] == [1] * 4
