"""Every error that latentline raises on purpose.

::

    LatentlineError                    code, HTTP status
    ├── InvalidRequest                 invalid_request, 422      a field, its value and what is allowed
    ├── JobNotFound                    job_not_found, 404
    ├── PictureNotFound                picture_not_found, 404    the job has no picture of that number
    ├── JobNotEnded                    job_not_ended, 409        only an ended job can be deleted
    ├── KeyNotFound                    key_not_found, 404
    ├── SecretNotFound                 secret_not_found, 404     the tenant has no callback secret of its own
    ├── NotAuthenticated               not_authenticated, 401    the API key is missing, wrong or revoked
    ├── NotAllowed                     not_allowed, 403          the API key lacks a scope, or the host is not allowed
    ├── RateExceeded                   rate_exceeded, 429        too many submissions with one API key
    ├── TooManyStreams                 too_many_streams, 429     of one API key on one process of the API
    ├── IdempotencyConflict            idempotency_conflict, 409 same key, another body
    ├── TenantQuotaExceeded            tenant_quota_exceeded, 429 the tenant has too much work queued; try again later
    ├── ServiceUnavailable             503
    │   ├── BrokerUnavailable          broker_unavailable        Redis does not answer, or answers with an error
    │   ├── StoreUnavailable           store_unavailable         the object store does not answer
    │   └── NoWorker                   no_worker                 no worker of the model has been heard of lately
    ├── ConfigurationError             configuration_error, 500  a setting is wrong, or an extra is missing
    │   └── MissingExtra               missing_extra, 500        names the pip install that brings it
    ├── ModelError                     model_error, 500          a model folder is broken; names the file
    ├── WaitTimeout                    wait_timeout, 504         the job is not affected; wait again
    ├── JobFailed                      job_failed, 500           ``wait(..., check=True)`` on a failed or cancelled job
    ├── NumericalError                 numerical_error, 500      latents are no longer finite numbers
    ├── OutOfMemory                    out_of_memory, 500        the job does not fit on the worker; names the bytes
    ├── StaleToken                     stale_token, 409          another worker has claimed the job since
    └── WebhookError                   invalid_webhook, 400      a callback is not authentic or too old
"""

from __future__ import annotations

from typing import Any


class LatentlineError(Exception):
    """Root of the tree. ``code`` is stable and machine-readable; the message is for people."""

    code = "error"
    http_status = 500
    retry_after_s: int | None = None
    """Seconds after which the same call may succeed, where that is known."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.code


class InvalidRequest(LatentlineError):
    """A field of a request is not acceptable.

    Args:
        field: dotted name of the field, for example ``width`` or ``callback.url``.
        value: what was given (shortened in the message).
        allowed: what would be accepted, as a phrase.
    """

    code = "invalid_request"
    http_status = 422

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        field = field if len(field) <= 100 else field[:97] + "..."  # a client may have made the name up
        self.field, self.value, self.allowed = field, value, allowed
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: got {shown}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


class JobNotFound(LatentlineError):
    code = "job_not_found"
    http_status = 404


class PictureNotFound(LatentlineError):
    code = "picture_not_found"
    http_status = 404


class JobNotEnded(LatentlineError):
    code = "job_not_ended"
    http_status = 409


class IdempotencyConflict(LatentlineError):
    code = "idempotency_conflict"
    http_status = 409


class KeyNotFound(LatentlineError):
    code = "key_not_found"
    http_status = 404


class SecretNotFound(LatentlineError):
    code = "secret_not_found"
    http_status = 404


class NotAuthenticated(LatentlineError):
    code = "not_authenticated"
    http_status = 401


class NotAllowed(LatentlineError):
    code = "not_allowed"
    http_status = 403


class RateExceeded(LatentlineError):
    """Too many submissions with one API key; ``retry_after_s`` says when the next is accepted."""

    code = "rate_exceeded"
    http_status = 429

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s)


class TooManyStreams(LatentlineError):
    code = "too_many_streams"
    http_status = 429
    retry_after_s = 10


class TenantQuotaExceeded(LatentlineError):
    code = "tenant_quota_exceeded"
    http_status = 429
    retry_after_s = 5


class ServiceUnavailable(LatentlineError):
    code = "service_unavailable"
    http_status = 503


class BrokerUnavailable(ServiceUnavailable):
    code = "broker_unavailable"


class StoreUnavailable(ServiceUnavailable):
    code = "store_unavailable"


class NoWorker(ServiceUnavailable):
    code = "no_worker"
    retry_after_s = 5


class ConfigurationError(LatentlineError):
    code = "configuration_error"


class MissingExtra(ConfigurationError):
    """A command needs packages that are not installed."""

    code = "missing_extra"

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra
        super().__init__(f"{what} needs more packages: pip install 'latentline[{extra}]'")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.extra)


class ModelError(LatentlineError):
    code = "model_error"


class WaitTimeout(LatentlineError):
    code = "wait_timeout"
    http_status = 504


class JobFailed(LatentlineError):
    code = "job_failed"


class NumericalError(LatentlineError):
    code = "numerical_error"


class OutOfMemory(LatentlineError):
    code = "out_of_memory"


class StaleToken(LatentlineError):
    code = "stale_token"
    http_status = 409


class WebhookError(LatentlineError):
    code = "invalid_webhook"
    http_status = 400
