"""How soon the page of a job with ten million tokens can be seen, and how large it is: `python -m tests.bench.pages`.

In a real Chromium, with an empty cache, from asking for the page to its first paint.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from db import keys
from db.session import open_database
from tests.bench import postgresql
from tests.bench.big import Mould
from tests.bench.measure import Row, printed, summarise, write
from tests.bench.record import MILLION
from tests.bench.service import Served, serving
from tests.cluster.browser import Browser

TOKENS = 10 * MILLION
VISITS = 9


def job_page(served: Served, key: str, job_id: int) -> Iterator[Row]:
    """First paint, all that the page brings along but the chart library, and what its SQL takes at the server."""
    url = f"{served.url}/jobs/{job_id}"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    answer.raise_for_status()
    with Browser() as browser:
        browser.call("Network.setCacheDisabled", cacheDisabled=True)
        browser.open(served.url + "/login")
        browser.type_into("#key", key)
        browser.follow("main button")
        paints, sizes = [], []
        for _ in range(VISITS):
            browser.open(url)
            browser.wait_for("performance.getEntriesByName('first-contentful-paint').length > 0")
            paints.append(browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            browser.wait_for("document.querySelector('#depth-0').dataset.empty !== 'Tokens are being read…'")
            parts: list[Any] = browser.evaluate(
                "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                ".filter((one) => !one.name.includes('plotly')).map((one) => one.decodedBodySize)"
            )
            sizes.append(sum(parts))
    yield summarise("job page, 10 M tokens: first paint", paints[1:], "ms", at_most=1000)
    yield Row("job page, 10 M tokens: size without plotly", *[statistics.median(sizes) / 1e6] * 3, "MB", at_most=1.5)


def main() -> None:
    """Print the table and write it to build/bench/pages.json."""
    print(f"load before: {os.getloadavg()[0]:.2f}")
    with (
        tempfile.TemporaryDirectory(prefix="shortstop-bench-") as kept,
        postgresql.server() as server,
        postgresql.database(server) as url,
        closing(open_database(url)) as db,
    ):
        key = keys.create_key(db, "bench", ["read"])[0]
        job_id = Mould(db).cast(TOKENS)
        with serving(url, Path(kept)) as served:
            write("pages", printed(job_page(served, key, job_id)))


if __name__ == "__main__":
    main()
