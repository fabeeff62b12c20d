"""Settings of this machine: `SHORTSTOP_…` in the environment, `.env`, `shortstop.toml`, in this order of precedence."""

import tomllib
from pathlib import Path
from typing import Literal

from platformdirs import user_data_path
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from engine.errors import BadInput
from engine.registry import unknown
from engine.spec import first_complaint

FILE = Path("shortstop.toml")


def _default_database_url() -> str:
    return f"sqlite:///{user_data_path('shortstop') / 'shortstop.db'}"


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


def load_settings(
    *,
    database_url: str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    gpus_per_worker: float | None = None,
) -> Settings:
    """The settings that hold in this folder, with a command's own options on top. Raises `BadInput`."""
    options: dict[str, object] = {"database_url": database_url, "workers": workers}
    options |= {"ray_address": ray_address, "gpus_per_worker": gpus_per_worker}
    given = {name: value for name, value in options.items() if value is not None}
    _check_file()
    try:
        return Settings(**given)  # type: ignore[arg-type]  # the types are what pydantic checks here
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
