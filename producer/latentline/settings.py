"""Connection settings of producers, API and workers, read from ``LATENTLINE_*`` variables and validated once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .addresses import DEFAULT_PORTS, CallbackRule, parse_networks, parse_ports
from .requests import DEFAULT_RETENTION_S, MODEL_NAME


class Settings(BaseSettings):
    """Where the broker and the object store are. Secrets are masked in repr."""

    model_config = SettingsConfigDict(env_prefix="LATENTLINE_", frozen=True, extra="ignore")

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")  # secret: it may carry a password
    s3_endpoint_url: str | None = None  # None: AWS itself
    # How clients reach the same store, where that differs: the host for which URLs of images are signed.
    s3_public_endpoint_url: str | None = None
    s3_region: str = "us-east-1"
    s3_bucket: str = "images"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    presign_ttl_s: Annotated[int, Field(ge=1, le=7 * 86400)] = 3600  # S3 allows a week at most
    retention_s: Annotated[int, Field(ge=1)] = DEFAULT_RETENTION_S  # how long an ended job's record and images are kept
    # keys: every request to the API needs one. none: whoever reaches it may do everything; on loopback alone.
    auth: Literal["keys", "none"] = "keys"
    durable: bool = False  # accept a job only once the broker's append-only file holds it
    tenant_cap: Annotated[int, Field(ge=0)] = 0  # rows of denoising one tenant may have queued and running; 0: no bound
    cors_origins: str = ""  # of pages that may call the API from a browser: https://a.example,https://b.example
    model_aliases: str = ""  # what clients of other services may call a model: gpt-image-2=latentline-emoji,sdxl=base/sdxl
    metrics_port: Annotated[int, Field(ge=0, le=65000)] = 0  # for Prometheus; 0: no metrics are served
    metrics_host: str = "127.0.0.1"
    log_format: Literal["text", "json"] = "text"  # of API, workers and deliverers, on stderr
    # whsec_..., or several separated by commas during a rotation: each callback is signed with all of them. Needed for callbacks.
    callback_secret: SecretStr | None = None
    # Callbacks go to global addresses only, and to these networks: 10.1.0.0/16,192.168.7.5
    callback_allow: str = ""
    callback_ports: str = DEFAULT_PORTS  # to which callbacks may go, on any host: 443,8000-8999

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, url: SecretStr) -> SecretStr:
        from redis.connection import parse_url

        try:
            parse_url(url.get_secret_value())  # type: ignore[no-untyped-call]
        except ValueError:  # its text may hold the password
            raise ValueError("a redis://, rediss:// or unix:// URL") from None
        return url

    @field_validator("s3_public_endpoint_url")
    @classmethod
    def _public_endpoint(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/?#\s@]+/?", url):
            raise ValueError("an http:// or https:// URL with a host, without a path, such as https://images.example.com")
        return url

    @field_validator("callback_allow")
    @classmethod
    def _callback_allow(cls, text: str) -> str:
        parse_networks(text)
        return text

    @field_validator("callback_ports")
    @classmethod
    def _callback_ports(cls, text: str) -> str:
        parse_ports(text)
        return text

    @field_validator("cors_origins")
    @classmethod
    def _cors_origins(cls, text: str) -> str:
        for origin in filter(None, text.split(",")):
            if not re.fullmatch(r"https?://[^/?#\s@*]+", origin):
                raise ValueError("origins separated by commas, such as https://app.example; not *, which would open the API to any page")
        return text

    @field_validator("model_aliases")
    @classmethod
    def _model_aliases(cls, text: str) -> str:
        _aliases(text)
        return text

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Model names of other services -> the models that they stand for here."""
        return _aliases(self.model_aliases)

    @cached_property
    def callback_rule(self) -> CallbackRule:
        """Where callbacks may go: the same for those who submit and for the process that delivers."""
        return CallbackRule(parse_networks(self.callback_allow), parse_ports(self.callback_ports))

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> Self:
        """Settings from a mapping of ``LATENTLINE_*`` variables."""
        fields: dict[str, Any] = {key.removeprefix("LATENTLINE_").lower(): value for key, value in variables.items()}
        return cls(**fields)


def _aliases(text: str) -> dict[str, str]:
    """Raises ValueError for what is no list of ``NAME=MODEL``, and for a name that stands twice."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, model = (side.strip() for side in part.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}", name) or not re.fullmatch(MODEL_NAME, model) or name in found:
            raise ValueError("names and the models that they stand for, each name once: gpt-image-2=latentline-emoji,sdxl=base/sdxl")
        found[name] = model
    return found
