"""Test doubles: test an application that submits jobs without a GPU, a worker or an object store.

::

    redis = fakeredis.FakeRedis(decode_responses=True)
    worker = FakeWorker(redis, FakeImages())
    worker.announce()
    ...                 # the application submits, through the same Redis
    worker.run_all()    # claims, sends heartbeats and settles as a real worker does
"""

from __future__ import annotations

import base64
import hashlib
import json

import redis as redis_py

from . import routing
from .errors import JobNotFound, StaleToken, StoreUnavailable
from .jobs import Claim, ImageRef, JobError, JobRecord, ModelInfo, Phase, Status
from .models import level_of_worker
from .records import Beat, Records, Verdict

MODEL = ModelInfo(id="latentline-emoji", family="fake", default_width=64, default_height=64, max_pixels=256 * 256)

# A grey PNG of one pixel: small, and real enough for whatever opens it.
TINY_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


class FakeImages:
    """An object store in memory, with the methods of :class:`latentline.images.Images`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.down = False
        """While true, every call fails as with a store that is unreachable."""

    def put(self, key: str, data: bytes) -> None:
        self.check()
        self.objects[key] = data

    def presign(self, key: str) -> str:
        return f"memory://{key}"

    def check(self) -> None:
        if self.down:
            raise StoreUnavailable("the fake object store is down")

    def download(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        self.check()
        try:
            return self.objects[key][start : None if end is None else end + 1]
        except KeyError:
            raise StoreUnavailable(f"the fake object store has no {key!r}") from None


class FakeWorker:
    """Plays a worker of one model over real records; every image is :data:`TINY_PNG`.

    Args:
        redis: the client on which the wake-ups are taken (``decode_responses=True``).
        images: where results go.
        fail_with: when set, each job fails with this error.
        level: of the requests that it can read; by default that of its model, see :func:`latentline.models.level_of_worker`.
    """

    def __init__(
        self,
        redis: redis_py.Redis,
        images: FakeImages,
        *,
        model: ModelInfo = MODEL,
        name: str = "fake@test",
        fail_with: JobError | None = None,
        level: int | None = None,
    ) -> None:
        self.redis, self.images, self.model, self.name, self.fail_with = redis, images, model, name, fail_with
        self.level = level_of_worker(model) if level is None else level
        self.records = Records(redis, level=self.level)

    def announce(self) -> None:
        """Say that this worker is alive and serves its model; submissions are refused before, and a minute after the last time."""
        self.records.announce(self.name, [self.model])

    def take(self) -> str | None:
        """Take the next wake-up as Celery would: its job id, or None when no job waits."""
        for priority in routing.PRIORITY_STEPS:
            for queue in routing.queue_names(self.model.id, self.level):
                message = self.redis.rpop(routing.queue_list(queue, priority))
                if message is not None:
                    (job_id,), _, _ = json.loads(json.loads(str(message))["body"])
                    return str(job_id)
        return None

    def run_all(self) -> list[JobRecord]:
        """Run every waiting job in turn; the records of those that this worker settled."""
        settled = []
        while (job_id := self.take()) is not None:
            record = self.run(job_id)
            if record is not None:
                settled.append(record)
        return settled

    def run(self, job_id: str) -> JobRecord | None:
        """Run one job from claim to settled record; None when it is not to be run now, or was deleted or taken over meanwhile."""
        try:
            claim = self.records.claim(job_id, self.name, lease_s=30)
            return None if claim is None else self.finish(claim)
        except (JobNotFound, StaleToken):
            return None

    def finish(self, claim: Claim) -> JobRecord:
        """Upload and settle a claimed job, with a heartbeat for each step; a cancel or a deadline takes effect between two steps."""
        record = claim.record
        for step in range(1, record.num_steps + 1):
            verdict = self.progress(claim, Phase.DENOISING, step)
            if verdict is Verdict.EXPIRED:
                error = JobError(code="deadline_exceeded", message="the deadline passed before the job ended")
                return self.records.settle(record.id, claim.token, Status.FAILED, error=error)
            if verdict is Verdict.CANCEL:
                return self.records.settle(record.id, claim.token, Status.CANCELLED)
        if self.fail_with:
            return self.records.settle(record.id, claim.token, Status.FAILED, error=self.fail_with)
        self.progress(claim, Phase.UPLOADING, record.num_steps)
        refs = [self._upload(record, i) for i in range(record.request.num_images)]
        return self.records.settle(record.id, claim.token, Status.SUCCEEDED, images=refs, timings={"denoising_s": 0.0})

    def progress(self, claim: Claim, phase: Phase, step: int) -> Verdict:
        """One heartbeat."""
        return self.records.beat([Beat(claim.record.id, claim.token, phase, step, lease_s=30, batch_jobs=1)])[0]

    def _upload(self, record: JobRecord, i: int) -> ImageRef:
        key = f"{record.request.tenant}/{record.id}/{record.attempt}/{i}.png"
        self.images.put(key, TINY_PNG)
        return ImageRef(
            key=key,
            seed=record.request.seed + i,
            width=1,
            height=1,
            content_type="image/png",
            sha256=hashlib.sha256(TINY_PNG).hexdigest(),
            num_bytes=len(TINY_PNG),
        )
