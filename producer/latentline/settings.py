"""Connection settings of producers, API and workers, read from ``LATENTLINE_*`` variables and validated once."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .requests import DEFAULT_RETENTION_S

Network = IPv4Network | IPv6Network


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks and single addresses, separated by commas.

    Raises:
        ValueError: one of them is neither a network nor an address.
    """
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"networks or addresses separated by commas, such as 10.1.0.0/16: {error}") from None


class Settings(BaseSettings):
    """Where the broker and the object store are. Secrets are masked in repr."""

    model_config = SettingsConfigDict(env_prefix="LATENTLINE_", frozen=True, extra="ignore")

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")  # secret: it may carry a password
    s3_endpoint_url: str | None = None  # None: AWS itself
    s3_region: str = "us-east-1"
    s3_bucket: str = "images"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    presign_ttl_s: Annotated[int, Field(ge=1, le=7 * 86400)] = 3600  # S3 allows a week at most
    retention_s: Annotated[int, Field(ge=1)] = DEFAULT_RETENTION_S  # how long an ended job's record and images are kept
    durable: bool = False  # accept a job only once the broker's append-only file holds it
    tenant_cap: Annotated[int, Field(ge=0)] = 0  # rows of denoising one tenant may have queued and running; 0: no bound
    # whsec_..., or several separated by commas during a rotation: each callback is signed with all of them. Needed for callbacks.
    callback_secret: SecretStr | None = None
    # Callbacks go to global addresses only, and to these networks: 10.1.0.0/16,192.168.7.5
    callback_allow: str = ""

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, url: SecretStr) -> SecretStr:
        from redis.connection import parse_url

        try:
            parse_url(url.get_secret_value())  # type: ignore[no-untyped-call]
        except ValueError:  # its text may hold the password
            raise ValueError("a redis://, rediss:// or unix:// URL") from None
        return url

    @field_validator("callback_allow")
    @classmethod
    def _callback_allow(cls, text: str) -> str:
        parse_networks(text)
        return text

    @property
    def callback_networks(self) -> tuple[Network, ...]:
        """Networks to which callbacks may go although they are not global."""
        return parse_networks(self.callback_allow)

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> Self:
        """Settings from a mapping of ``LATENTLINE_*`` variables."""
        fields: dict[str, Any] = {key.removeprefix("LATENTLINE_").lower(): value for key, value in variables.items()}
        return cls(**fields)
