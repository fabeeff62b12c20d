"""The compose file is one by its schema, keeps what docs/deploy.md promises, and is read as an engine reads it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cluster.compose.__main__ import app as compose
from cluster.compose.file import Condition, Service, chosen, read_compose
from cluster.compose.host import Host
from engine.errors import BadInput

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
SECRETS = {"POSTGRES_PASSWORD": "secret-of-postgres", "RAY_AUTH_TOKEN": "secret-of-ray"}
OURS = {"migrate", "api", "fleet", "ray-head", "ray-worker", "ray-worker-gpu"}


@pytest.fixture(scope="module")
def raw() -> dict[str, dict]:
    return yaml.safe_load(FILE.read_text())["services"]


def read(text: str, folder: Path, **environment: str) -> dict[str, Service]:
    (folder / "compose.yml").write_text(text)
    return read_compose(folder / "compose.yml", environment)


def fits_the_schema(file: Path) -> bool:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_it_fits_the_compose_specifications_schema(tmp_path: Path) -> None:
    assert fits_the_schema(FILE)
    broken = tmp_path / "broken.yml"
    broken.write_text(FILE.read_text().replace("stop_signal: SIGINT", "stop_signals: SIGINT"))
    assert not fits_the_schema(broken)


def test_all_that_runs_together_is_there(raw: dict[str, dict]) -> None:
    assert set(raw) == OURS | {"postgres"}
    assert raw["ray-worker-gpu"]["profiles"] == ["gpu"]
    [device] = raw["ray-worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_service_of_ours_has_an_init_no_rights_and_no_root(raw: dict[str, dict], name: str) -> None:
    service = raw[name]
    assert (service["user"], service["init"], service["cap_drop"]) == ("shortstop", True, ["ALL"])
    assert "no-new-privileges:true" in service["security_opt"]
    if name.startswith(("ray", "fleet")):
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "shm_size" in service


def test_ports_are_the_machines_own_images_are_pinned_and_no_secret_is_written_down(raw: dict[str, dict]) -> None:
    for name, service in raw.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"])
        assert re.search(r":\d+\.\d+", image), name
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|TOKEN", variable):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), f"{name}: {variable}"
    assert re.fullmatch(r".*:\$\{POSTGRES_PASSWORD:\?.*\}@.*", raw["api"]["environment"]["SHORTSTOP_DATABASE_URL"])


def test_the_images_base_is_pinned_and_what_it_copies_is_not_ignored() -> None:
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    sources = [
        word for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "cluster", "db"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    assert re.search(r"^USER shortstop$", dockerfile, re.MULTILINE)
    assert len(re.findall("pip install", dockerfile)) == len(re.findall("--constraint constraints.txt", dockerfile))


def test_everything_that_the_image_installs_is_locked() -> None:
    """What our dependencies need in turn has its version in constraints.txt too."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(line.split("==")[0]) for line in lines if not line.startswith("#")}
    assert set(needed("shortstop", frozenset({"postgres", "demo"}), {})) - pins == {"shortstop"}


def needed(name: str, extras: frozenset[str], seen: dict[tuple[str, frozenset[str]], None]) -> Iterator[str]:
    if (name, extras) in seen:
        return
    seen[name, extras] = None
    yield normal(name)
    for line in distribution(name).requires or []:
        asked = Requirement(line)
        if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield from needed(asked.name, frozenset(asked.extras), seen)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_document_names_every_service_and_every_variable(raw: dict[str, dict]) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    variables = set(re.findall(r"`([A-Z][A-Z_]+)`", text)) - {"RAY_AUTH_MODE"}
    assert set(re.findall(r"\$\{(\w+)", FILE.read_text())) == variables
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)) == set(raw)
    verbs = {command.name or command.callback.__name__ for command in compose.registered_commands}
    assert set(re.findall(r"^python -m cluster\.compose ([a-z]+)", text, re.MULTILINE)) == verbs


# --- how it is read ------------------------------------------------------------------------------------------


def test_our_file_is_read_whole() -> None:
    services = read_compose(FILE, SECRETS)
    url = services["fleet"].environment["SHORTSTOP_DATABASE_URL"]
    assert url == "postgresql+psycopg://shortstop:secret-of-postgres@postgres:5432/shortstop"
    assert services["ray-worker"].environment["RAY_AUTH_TOKEN"] == "secret-of-ray"
    assert services["fleet"].depends_on["migrate"] is Condition.COMPLETED
    assert services["ray-worker"].command[:3] == ("ray", "start", "--block")
    order = [one.name for one in chosen(services, [], [])]
    assert order.index("postgres") < order.index("migrate") < order.index("ray-worker") < order.index("fleet")
    assert "ray-worker-gpu" not in order
    assert "ray-worker-gpu" in [one.name for one in chosen(services, [], ["gpu"])]


@pytest.mark.parametrize("missing", SECRETS)
def test_a_missing_secret_is_named(missing: str) -> None:
    with pytest.raises(BadInput, match=f"the variable {missing} is missing; set it in .env"):
        read_compose(FILE, SECRETS | {missing: ""})


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("$A-${A}", "a-a"),
        ("${NONE:-d}${NONE-d}", "dd"),
        ("[${EMPTY:-d}${EMPTY-d}]", "[d]"),
        ("$$A $${A}", "$A ${A}"),
        ("${A:?why}${EMPTY?why}", "a"),
        ("[$NONE]", "[]"),
        ("${A:-http://x:1/}", "a"),
    ],
)
def test_variables_mean_what_they_mean_to_a_container_engine(word: str, meant: str, tmp_path: Path) -> None:
    text = yaml.safe_dump({"services": {"s": {"image": "x", "environment": {"IT": word}}}})
    assert read(text, tmp_path, A="a", EMPTY="")["s"].environment == {"IT": meant}


@pytest.mark.parametrize(
    ("service", "complaint"),
    [
        ("{network_mode: host}", "service 's': network_mode cannot be honoured without a container engine"),
        (
            "{depends_on: {t: {condition: service_happy}}}",
            "service 's': depends_on needs a condition of service_started",
        ),
        ("{depends_on: [t]}", "service 's' depends on unknown service 't'"),
        ("{stop_grace_period: soon}", "service 's': 'soon' is no duration"),
        ("{volumes: [{type: tmpfs}]}", "is not written like name:/path"),
        ("{healthcheck: {disable: true}}", "service 's': a healthcheck has a test"),
        ("{environment: {A: '${B:?give B}'}}", "the variable B is missing; give B"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_sentence(service: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(complaint)):
        read(f"services: {{s: {service}}}", tmp_path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_compose(tmp_path / "none.yml", {})
    for text in ("[1, 2]", "services: 3", "{a: [", "services: {s: 1}"):
        with pytest.raises(BadInput, match="has no services"):
            read(text, tmp_path)


def test_services_that_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    services = read("services: {a: {depends_on: [b]}, b: {depends_on: [a]}}", tmp_path)
    with pytest.raises(BadInput, match="wait for each other"):
        chosen(services, [], [])
    with pytest.raises(BadInput, match="unknown service 'c'"):
        chosen(services, ["c"], [])


def test_on_the_host_names_localhost_and_volumes_become_what_they_are_there(tmp_path: Path) -> None:
    text = """
    services:
      web:
        image: x
        command: serve --host 0.0.0.0 --log /var/log/web/it.log --not /var/logger
        environment: {PEER: "http://store:80/a", OTHER: "bookstore:80 store", STATE: "/var/log/web"}
        volumes: ["logs:/var/log", "./own:/own:ro"]
        healthcheck: {test: "curl http://127.0.0.1:80 http://10.127.0.0.1"}
      store: {image: x, command: ray start --head}
    """
    host = Host(tmp_path, tmp_path / "state")
    processes = host.settled(read(text, tmp_path).values())
    web, store = processes["web"], processes["store"]
    assert web.inside.address != store.inside.address
    logs = tmp_path / "state" / "volumes" / "logs"
    assert web.command == ("serve", "--host", web.inside.address, "--log", f"{logs}/web/it.log", "--not", "/var/logger")
    assert web.environment["PEER"] == f"http://{store.inside.address}:80/a"
    assert (web.environment["OTHER"], web.environment["STATE"]) == ("bookstore:80 store", f"{logs}/web")
    assert web.health[2] == f"curl http://{web.inside.address}:80 http://10.127.0.0.1"
    assert web.inside.volumes["/own"] == str(tmp_path / "own")
    assert store.command[-1] == f"--node-ip-address={store.inside.address}"
    elsewhere = Host(tmp_path, tmp_path / "other").settled(read(text, tmp_path).values())
    assert elsewhere["web"].inside.address != web.inside.address


def test_a_service_sees_nothing_of_its_callers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: not the user's database, not his Ray, not his home."""
    monkeypatch.setenv("SHORTSTOP_DATABASE_URL", "sqlite:///mine.db")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    [process] = (Host(tmp_path, tmp_path / "state").settled(read("services: {s: {image: x}}", tmp_path).values())["s"],)
    assert not {"SHORTSTOP_DATABASE_URL", "RAY_ADDRESS"} & set(process.environment)
    assert process.environment["HOME"] == str(tmp_path / "state" / "s")
