"""Settings of this machine: `SHORTSTOP_…` in the environment, `.env`, `shortstop.toml`, in this order of precedence."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_data_path
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from engine.errors import BadInput
from engine.registry import unknown
from engine.spec import first_complaint

FILE = Path("shortstop.toml")


def _default_database_url() -> str:
    return f"sqlite:///{user_data_path('shortstop') / 'shortstop.db'}"


def _default_uploads() -> Path:
    return user_data_path("shortstop") / "uploads"


class Settings(BaseSettings):
    """What a command assumes where its options say nothing."""

    model_config = SettingsConfigDict(
        env_prefix="SHORTSTOP_", env_file=".env", toml_file=FILE, extra="ignore", frozen=True
    )

    database_url: str = Field(default_factory=_default_database_url, min_length=1)
    workers: int = Field(1, ge=1, description="workers that share this machine")
    lease_seconds: float = Field(
        30, gt=5, description="after this long without a sign of life a worker's shard is given on"
    )
    gpus_per_worker: float = Field(
        1, gt=0, description="what a worker holds where a job's device is a GPU: 0.5 lets two share one, untimed"
    )
    ray_address: str | None = Field(None, min_length=1, description="of a running Ray cluster; absent: one of our own")
    idle_seconds: float = Field(60, ge=0, description="how long a fleet keeps a worker that has nothing to do")
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    server: str | None = Field(None, min_length=1, description="where the commands that can ask a server do")
    key: str | None = Field(None, min_length=1, description="the API key for it")
    # of `shortstop serve`
    allow: Annotated[list[str], NoDecode] = Field(
        [], description="folders, hub ids and installed packages that a submitted spec may name"
    )
    uploads: Path = Field(default_factory=_default_uploads, description="folder of what clients uploaded")
    upload_mb: int = Field(64, ge=1, le=4096, description="of one upload, packed; four times as much unpacked")
    uploads_mb: int = Field(4096, ge=1, description="of all uploads; the oldest make room")
    requests_per_second: float = Field(100, gt=0, description="of one key, on the long run; at once twice as many")

    webhook_allow: Annotated[list[str], NoDecode] = Field(
        [], description="private addresses, networks and hosts that webhooks of schedules may call all the same"
    )

    @field_validator("allow", "webhook_allow", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """The environment has no lists: entries are set apart by commas there."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was passed, then the environment, `.env`, `shortstop.toml`."""
        return init_settings, env_settings, dotenv_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(**options: Any) -> Settings:
    """The settings that hold in this folder, with a command's own options on top. Raises `BadInput`.

    options: fields of `Settings`; None where the command's option was not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_file()
    try:
        return Settings(**given)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        raise BadInput(
            f"settings: {first_complaint(error)} Correct SHORTSTOP_{field.upper()} in the environment or in .env, "
            f"{field} in {FILE}, or the command's option."
        ) from None


def _check_file() -> None:
    # A misspelt name in .env may be another program's; one in our own file is a mistake.
    if not FILE.is_file():
        return
    try:
        names = list(tomllib.loads(FILE.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadInput(f"settings: {FILE} cannot be read ({error}); correct it or remove it.") from None
    for name in names:
        if name not in Settings.model_fields:
            raise BadInput(f"settings: {FILE}: {unknown('setting', name, list(Settings.model_fields))}")
