"""Packages that the documents show, installed as the reader would have them."""

import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.registry import Registry

DOCUMENTS = Path(__file__).parents[1] / "docs"


@contextmanager
def installed(document: str, registry: Registry, folder: Path) -> Iterator[None]:
    """Python blocks of a document as the modules that the text in front of them names, with its entry points."""
    text = (DOCUMENTS / document).read_text()
    modules = re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
    [toml] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    facts = folder / "documented-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: documented\nVersion: 1.0\n")
    lines = [
        line
        for group, points in tomllib.loads(toml)["project"]["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in points.items()))
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    for name, code in modules:
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        vars(registry).pop("_installed", None)
        yield
    vars(registry).pop("_installed", None)
    for name, _ in modules:
        sys.modules.pop(name, None)
