"""What the workers' tests share: models that are looked up nowhere, and a cache of their own."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from caches import cache_beside_the_users


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the engine keeps of tiny models belongs in a temporary folder, here and in every process started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHORTSTOP_CACHE", str(cache_beside_the_users(tmp_path_factory.mktemp("cache"))))
        yield
