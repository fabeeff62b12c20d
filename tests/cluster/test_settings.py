"""Settings come from where the user put them, and a bad one is one sentence."""

import json
from pathlib import Path

import pytest

from cluster.logs import configure_logs
from cluster.settings import load_settings
from engine.errors import BadInput


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL", "WORKERS", "LEASE_SECONDS", "LOG_LEVEL"):
        monkeypatch.delenv(f"SHORTSTOP_{name}", raising=False)


def test_the_database_lies_in_the_users_data_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert load_settings().database_url == "sqlite:////data/shortstop/shortstop.db"


def test_options_beat_the_environment_beats_env_file_beats_toml(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("shortstop.toml").write_text('workers = 2\nlog_level = "info"\nlease_seconds = 12\n')
    assert load_settings().workers == 2
    Path(".env").write_text("SHORTSTOP_WORKERS=3\nOTHER_PROGRAM=1\n")
    assert load_settings().workers == 3
    monkeypatch.setenv("SHORTSTOP_WORKERS", "4")
    assert load_settings().workers == 4
    assert load_settings(workers=5).workers == 5
    assert (load_settings().log_level, load_settings().lease_seconds) == ("info", 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", "two"), ("workers", "0"), ("lease_seconds", "1"), ("log_level", "loud"), ("database_url", "")],
)
def test_a_bad_value_is_named_with_its_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SHORTSTOP_{name.upper()}", value)
    with pytest.raises(BadInput, match=f"'{name}' is '{value}'.*SHORTSTOP_{name.upper()}") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "told"), [("workrs = 2", "did you mean 'workers'"), ("workers = ", "cannot be read")])
def test_a_fault_in_the_settings_file_is_not_passed_over(text: str, told: str) -> None:
    Path("shortstop.toml").write_text(text)
    with pytest.raises(BadInput, match=told):
        load_settings()


def test_an_event_is_one_line_of_json_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """Logs are read by machines, and never mix with a command's answer."""
    import structlog

    configure_logs("info")
    try:
        structlog.get_logger().debug("too small to tell")
        structlog.get_logger().info("shard done", shard=3, text="two\nlines")
    finally:
        structlog.reset_defaults()
    out, err = capfd.readouterr()
    [line] = err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["shard"]) == ("shard done", "info", 3)
    assert out == ""
