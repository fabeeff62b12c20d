"""What the cluster's tests share: one tiny model, one undisturbed run of its job, one Ray."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "engine"))
# workers of a fleet are made of what stands there, too
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

from caches import cache_beside_the_users
from lines_record import copied, make_record
from served import Site, opened_site
from small_world import World, bundle, columns, write_prompts

from cluster import jobs
from cluster.ray_environment import set_up_ray
from db.session import Database, open_database

set_up_ray()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the engine keeps of these models belongs in a temporary folder, here and in every process started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORTSTOP_CACHE", str(cache_beside_the_users(tmp_path_factory.mktemp("cache"))))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> World:
    from tiny_models import random_model, save

    folder = tmp_path_factory.mktemp("world")
    model = save(random_model("llama"), folder / "model")
    exits = bundle(folder / "exits", model)
    return World(folder, model, exits, write_prompts(folder / "prompts.jsonl"))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(f"sqlite:///{tmp_path / 'record.db'}")
    yield database
    database.close()


@pytest.fixture(scope="session")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[object, ...]]:
    """Text and token columns of the small job, done by one worker in one piece."""
    database = open_database(f"sqlite:///{tmp_path_factory.mktemp('undisturbed') / 'record.db'}")
    job_id = jobs.submit(database, world.spec())
    assert jobs.work(database, job_id, inline=True) is jobs.JobState.DONE
    found = columns(database, job_id)
    database.close()
    return found


@pytest.fixture(scope="session")
def record_of_lines(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_record(world, tmp_path_factory.mktemp("lines"))


@pytest.fixture
def url(record_of_lines: Path, tmp_path: Path) -> str:
    """A record of its own with one finished job of lines, see `lines_record`."""
    return copied(record_of_lines, tmp_path)


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray for all tests that kill nothing but workers."""
    import ray

    from cluster.fleet.placement import OBJECT_STORE_BYTES

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,  # that nobody has: places are given out all the same
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server on each database, with keys, a finished job and one that waits."""
    folder = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite:///{folder / 'record.db'}"
        else:
            url = stack.enter_context(request.getfixturevalue("new_postgresql_url")())
        yield stack.enter_context(opened_site(url, folder / "uploads", world))
