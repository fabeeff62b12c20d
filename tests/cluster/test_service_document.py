"""docs/service.md is true: every command and every line of Python in it is run against the server that it starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from served import serving

from db.session import open_database

TEXT = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
SPEC = {
    "name": "my-first",
    "model": "smollm2-135m",
    "exits": "smollm2-135m",
    "benchmarks": [{"source": "./src", "samples": 3}],
    "policies": ["full", {"confidence": {"threshold": 0.9}}],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.timeout(900)
def test_commands_and_python_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHORTSTOP_CACHE")  # the converted model lies in the user's cache
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(9)))
    url = f"sqlite:///{tmp_path / 'record.db'}"
    open_database(url).close()
    environment = os.environ | {"SHORTSTOP_DATABASE_URL": url, "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    commands = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    [begin] = [command for command in commands if command.startswith("shortstop serve")]
    key = run(commands[0]).strip()
    assert key.startswith("shortstop_")
    with serving(url, tmp_path / "uploads", *begin.split()[5:]) as served:
        environment |= {"SHORTSTOP_SERVER": served.url, "SHORTSTOP_KEY": key}
        for command in commands[1:-1]:
            if not command.startswith(("export", "shortstop serve")):
                run(command)
        for code in blocks("python"):
            run(f"{sys.executable} - <<'END'\n{code}END")
        revoking = commands[-1].replace("0123456789ab", key.split("_")[1])
        assert "revoked" in run(revoking)
        assert served.ask("GET", "/v1/jobs", key).status_code == 401
