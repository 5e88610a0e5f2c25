"""A poll of one job: what clients ask for most, in one round trip to the broker."""

from __future__ import annotations

from fastapi import Request

from latentline.async_client import AsyncClient
from latentline.errors import JobNotFound
from latentline.jobs import JobRecord

from .auth import Access, Principal, credential_of
from .service import JobService, seen


async def poll(request: Request, job_id: str, wait_s: float = 0) -> JobRecord:
    """One job for the key of a request, both in one round trip: what clients ask for most.

    With ``wait_s``, once it has ended or after so many seconds. The wait ends within seconds after the key was revoked.
    """
    record, principal = await _poll(request, job_id)
    if wait_s and not record.status.terminal:
        await JobService(request.app.state, principal).wait(job_id, wait_s)
        record, _ = await _poll(request, job_id)
    return record


async def _poll(request: Request, job_id: str) -> tuple[JobRecord, Principal]:
    client: AsyncClient = request.app.state.client
    access: Access = request.app.state.access
    credential = credential_of(request) if access.keys else None
    if credential is None:
        principal = await access.principal(None, "read")
        return await client.get(job_id), principal
    found, key = await client.get_with_key(job_id, credential.prefix)
    principal = access.check(credential, key, "read")
    if isinstance(found, JobNotFound):
        raise found
    return seen(found, principal), principal
