"""axe-core on a page: what a screen reader, a keyboard or weak eyes would stumble over."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from browser import Browser


@cache
def _script() -> str:
    """axe-core, out of the package that carries it; that package's own code drives another browser than ours."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None, "axe-playwright-python is not installed; `make test` does it"
    [folder] = found.submodule_search_locations or []
    return (Path(folder) / "axe.min.js").read_text(encoding="utf-8")


def serious_findings(browser: Browser) -> list[tuple[str, list[str]]]:
    """Rules that the page breaks, of serious or critical weight, each with the places where it does."""
    # put in by the debugger, as no script of the page's own may come from elsewhere
    browser.call("Runtime.evaluate", expression=_script())
    result: dict[str, Any] = browser.ask("axe.run(document, {resultTypes: ['violations']})")
    assert result["passes"], "axe looked at nothing"
    return [
        (found["id"], [f"{node['html'][:120]}: {node['failureSummary'][:300]}" for node in found["nodes"]])
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]
