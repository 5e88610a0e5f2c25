"""What both clients do with requests and records: check and complete requests, write them in chunks, sign the URLs of images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from . import records
from .addresses import CallbackRule
from .errors import InvalidRequest, JobFailed, LatentlineError
from .images import Images
from .jobs import JobRecord, JobRequest, ResolvedRequest, Sending, Status, Submission
from .keys import Limits
from .records import CachedFleet, Fleet, JobFilter, Operation
from .settings import Settings
from .tracing import current_traceparent

SUBMIT_CHUNK = 500  # jobs of one pipeline

Request = JobRequest | ResolvedRequest

Outcome = JobRecord | LatentlineError
"""What became of one of many submissions: the accepted record, or why there is none."""


class Operations:
    """The operations of both clients."""

    def __init__(self, settings: Settings | None) -> None:
        self.settings = settings or Settings()
        self.images = Images(self.settings)
        self._fleet = CachedFleet()

    def _write(self, chunk: Sequence[Submission], limits: Limits) -> Operation[list[Outcome]]:
        outcomes = yield from records.submit(
            chunk,
            self.settings.retention_s,
            tenant_cap=limits.max_cost or self.settings.tenant_cap,
            max_jobs=limits.max_jobs,
            durable=self.settings.durable,
        )
        return [one if isinstance(one, LatentlineError) else self._with_urls(one) for one in outcomes]

    def _submit(self, requests: Sequence[Request], limits: Limits, sending: Sending | None = None) -> Operation[list[Outcome]]:
        accepted = yield from self._fleet.accept_many(lambda fleet: _accept(requests, fleet, self.settings.callback_rule))
        traceparent = current_traceparent()
        accepted = [one if isinstance(one, LatentlineError) else replace(one, sending=sending, traceparent=traceparent) for one in accepted]
        written: list[Outcome] = []
        failure: LatentlineError | None = None
        for chunk in _chunks(accepted):
            try:
                with records.domain_errors():
                    written += yield from self._write(chunk, limits)
            except LatentlineError as error:
                failure = error
                break  # a broker that fails would take seconds to fail again for each chunk
        return _outcomes(accepted, written, failure)

    def _get(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.get(job_id)))

    def _cancel(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.cancel(job_id, self.settings.retention_s)))

    def _delete(self, job_id: str) -> Operation[None]:
        return records.delete(job_id)

    def _list(
        self, status: Status | str | None, cursor: str | None, limit: int, tenant: str | None, where: JobFilter | None
    ) -> Operation[tuple[list[JobRecord], str | None]]:
        if status and status not in list(Status):
            raise InvalidRequest("status", status, "one of " + ", ".join(Status))
        asked = replace(where or JobFilter(), status=Status(status) if status else None, tenant=tenant or "")
        page, following = yield from records.list_jobs(cursor=cursor, limit=limit, where=asked)
        return [self._with_urls(record) for record in page], following

    def _with_urls(self, record: JobRecord) -> JobRecord:
        if not record.images:
            return record
        signed = tuple(image.model_copy(update={"url": self.images.presign(image.key)}) for image in record.images)
        return record.model_copy(update={"images": signed})


def _accept(requests: Sequence[Request], fleet: Fleet, rule: CallbackRule) -> list[Submission | LatentlineError]:
    accepted: list[Submission | LatentlineError] = []
    for request in requests:
        try:
            if isinstance(request, ResolvedRequest):  # of a record: checked as what any client sends
                # Without its idempotency key, which stands for what was sent before the defaults were filled in.
                fields = request.model_dump(mode="json", exclude={"idempotency_key"}, exclude_defaults=True)
                request = JobRequest.parse(fields)
            if request.callback is not None:
                rule.check(request.callback.url)
            accepted.append(fleet.accept(request))
        except LatentlineError as error:
            accepted.append(error)
    return accepted


def _chunks(accepted: Sequence[Submission | LatentlineError]) -> Iterator[list[Submission]]:
    ready = [one for one in accepted if isinstance(one, Submission)]
    for start in range(0, len(ready), SUBMIT_CHUNK):
        yield ready[start : start + SUBMIT_CHUNK]


def _outcomes(
    accepted: Sequence[Submission | LatentlineError], written: Sequence[Outcome], failure: LatentlineError | None
) -> list[Outcome]:
    """What was refused and what was written, in the order of the requests; ``failure`` for those without an answer."""
    rest = itertools.chain(written, itertools.repeat(failure) if failure else ())
    return [next(rest) if isinstance(one, Submission) else one for one in accepted]


def accepted_record(outcome: Outcome) -> JobRecord:
    if isinstance(outcome, LatentlineError):
        raise outcome
    return outcome


def finished(record: JobRecord, check: bool) -> JobRecord:
    if check and record.status is not Status.SUCCEEDED:
        reason = f"{record.error.code}: {record.error.message}" if record.error else record.status.value
        raise JobFailed(f"job {record.id} did not succeed ({reason})")
    return record


def one_request(request: Request | None, fields: dict[str, Any]) -> Request:
    if request is None:
        return JobRequest.parse(fields)
    if fields:
        raise InvalidRequest("request", ", ".join(fields), "a JobRequest, or its fields by name, but not both")
    return request
