"""One way to talk to every dialect, for the suite that asks the same of all of them.

A dialect's speaker knows how to ask for pictures, where to look for a job, and what the dialect's errors look like. What they are about is
the same underneath: the native code in the header of an error, and the native record.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

# Native words for which a dialect has its own: none of them may appear in its errors.
NATIVE_WORDS = ("num_images", "num_inference_steps", "guidance_scale", "output.format", "preview_every", "idempotency_key")


@dataclass
class Ask:
    """What a request asks for, in no dialect's words."""

    prompt: str = "a cat"
    steps: int | None = 2
    count: int | None = None
    size: tuple[int, int] | None = None
    model: str | None = None
    sampler: str | None = None
    seed: int | None = None
    more: dict[str, Any] = field(default_factory=dict)  # as it stands in the body


class Speaker:
    """The native dialect."""

    name = "native"
    path = "/v1/jobs"
    waits = False  # whether a request is answered when its job has ended
    shows_running = False  # whether it shows a job only while that runs
    statuses: ClassVar[dict[str, int]] = {}  # native code -> status, where it is not the native one
    words: ClassVar[tuple[str, ...]] = ()  # native words that are this dialect's own too
    lacks: ClassVar[dict[str, str]] = {}  # behaviours (names of tests) that this dialect cannot have -> why

    def send(self, http: httpx.Client, headers: dict[str, str], body: dict[str, Any]) -> httpx.Response:
        """Ask for pictures."""
        return http.post(self.path, headers=headers, json=body)

    def refused(self, answer: httpx.Response) -> bool:
        return answer.is_error

    def code(self, answer: httpx.Response) -> str:
        """The native code of an error."""
        return str(answer.headers["latentline-error"])

    def retry_after_s(self, answer: httpx.Response) -> int:
        return int(answer.headers["retry-after"])

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def body(self, ask: Ask) -> dict[str, Any]:
        width, height = ask.size or (None, None)
        fields = {
            "prompt": ask.prompt, "num_inference_steps": ask.steps, "num_images": ask.count, "width": width, "height": height,
            "model": ask.model, "scheduler": ask.sampler, "seed": ask.seed,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value is not None} | ask.more

    def field_of(self, word: str) -> str:
        """This dialect's word for a field of :class:`Ask`."""
        words = {"size": "width", "sampler": "scheduler", "steps": "num_inference_steps", "count": "num_images"}
        return words.get(word, word)

    def status(self, code: str, native: int) -> int:
        return self.statuses.get(code, native)

    def job_id(self, answer: httpx.Response) -> str:
        return str(answer.json()["id"])

    def pictures(self, http: httpx.Client, answer: httpx.Response, headers: dict[str, str]) -> list[bytes]:
        """The pictures of the job of an answer to a request that was accepted, once the job has ended."""
        job = http.get(f"/v1/jobs/{self.job_id(answer)}", headers=headers).json()
        return [http.get(f"/v1/jobs/{job['id']}/images/{i}", headers=headers).content for i in range(len(job["images"]))]

    def blamed(self, answer: httpx.Response) -> str | None:
        """The field that an error blames; checks that the error has the dialect's shape."""
        error = answer.json()["error"]
        assert set(error) - {"field", "allowed"} == {"code", "message"}
        return error.get("field")

    def progress(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> float:
        """How far a running job is, from 0 to 1."""
        job = http.get(f"/v1/jobs/{job_id}", headers=headers).json()
        return float(job["step"] / job["num_steps"])

    def cancel(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> None:
        http.post(f"/v1/jobs/{job_id}/cancel", headers=headers).raise_for_status()

    def ended(self, answer: httpx.Response) -> str:
        """'succeeded', 'failed' or 'cancelled', of an answer that waited for its job."""
        raise NotImplementedError

    def sees(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> bool:
        """Whether this dialect shows a job that another dialect made."""
        return http.get(f"/v1/jobs/{job_id}", headers=headers).status_code == 200


class Native(Speaker):
    def code(self, answer: httpx.Response) -> str:
        return str(answer.json()["error"]["code"])


class OpenAI(Speaker):
    name = "openai"
    path = "/openai/v1/images/generations"
    waits = True
    lacks: ClassVar[dict[str, str]] = {"test_progress": "only a stream tells, see test_openai.py"}
    statuses: ClassVar[dict[str, int]] = {"invalid_request": 400}

    def body(self, ask: Ask) -> dict[str, Any]:
        fields = {
            "prompt": ask.prompt, "steps": ask.steps, "n": ask.count, "size": ask.size and f"{ask.size[0]}x{ask.size[1]}",
            "model": ask.model, "scheduler": ask.sampler, "seed": ask.seed,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value is not None} | ask.more

    def field_of(self, word: str) -> str:
        return {"sampler": "scheduler", "count": "n"}.get(word, word)

    def status(self, code: str, native: int) -> int:
        return 404 if code == "model_not_found" else super().status(code, native)

    def pictures(self, http: httpx.Client, answer: httpx.Response, headers: dict[str, str]) -> list[bytes]:
        return [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]

    def blamed(self, answer: httpx.Response) -> str | None:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
        return error["param"]  # type: ignore[no-any-return]

    def ended(self, answer: httpx.Response) -> str:
        if answer.status_code == 200:
            return "succeeded"
        assert answer.headers["x-should-retry"] == "false"
        return {"image_generation_failed": "failed", "image_generation_cancelled": "cancelled"}[answer.json()["error"]["code"]]

    def sees(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> bool:
        answer = http.get(f"{self.path}/{job_id}", headers=headers)
        return answer.status_code == 200 and answer.json()["id"] == job_id


class A1111(Speaker):
    name = "a1111"
    path = "/sdapi/v1/txt2img"
    waits = True
    shows_running = True

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"anyone:{key}".encode()).decode()}

    def body(self, ask: Ask) -> dict[str, Any]:
        width, height = ask.size or (None, None)
        fields = {
            "prompt": ask.prompt, "steps": ask.steps, "batch_size": ask.count, "width": width, "height": height,
            "override_settings": ask.model and {"sd_model_checkpoint": ask.model}, "sampler_name": ask.sampler, "seed": ask.seed,
        }  # fmt: skip
        return {name: value for name, value in fields.items() if value is not None} | ask.more

    def field_of(self, word: str) -> str:
        return {"size": "width", "sampler": "sampler_name", "count": "batch_size", "model": "sd_model_checkpoint"}.get(word, word)

    def job_id(self, answer: httpx.Response) -> str:
        return str(json.loads(answer.json()["info"])["job_id"])

    def pictures(self, http: httpx.Client, answer: httpx.Response, headers: dict[str, str]) -> list[bytes]:
        return [base64.b64decode(one) for one in answer.json()["images"]]

    def blamed(self, answer: httpx.Response) -> str | None:
        error = answer.json()
        assert set(error) == {"error", "detail", "body", "errors"} and error["errors"]
        if isinstance(error["detail"], str):
            return None
        ((place, name),) = [one["loc"] for one in error["detail"]]
        assert place == "body"
        return str(name)

    def progress(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> float:
        found = http.get("/sdapi/v1/progress", headers=headers).json()
        assert found["state"]["job"] == job_id
        return float(found["progress"])

    def cancel(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> None:
        http.post("/sdapi/v1/interrupt", headers=headers).raise_for_status()

    def ended(self, answer: httpx.Response) -> str:
        if answer.status_code == 200:
            return "cancelled" if json.loads(answer.json()["info"])["interrupted"] else "succeeded"
        return "failed"

    def sees(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> bool:
        return bool(http.get("/sdapi/v1/progress", headers=headers).json()["state"]["job"] == job_id)


class Replicate(Speaker):
    name = "replicate"
    path = "/replicate/v1/predictions"
    words: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale")

    def body(self, ask: Ask) -> dict[str, Any]:
        width, height = ask.size or (None, None)
        fields = {
            "prompt": ask.prompt, "num_inference_steps": ask.steps, "num_outputs": ask.count, "width": width, "height": height,
            "scheduler": ask.sampler, "seed": ask.seed,
        }  # fmt: skip
        given = {name: value for name, value in fields.items() if value is not None}
        return {"version": f"latentline/{ask.model or 'latentline-emoji'}", "input": given} | ask.more

    def field_of(self, word: str) -> str:
        words = {"size": "width", "sampler": "scheduler", "steps": "num_inference_steps", "count": "num_outputs", "model": "version"}
        return words.get(word, word)

    def pictures(self, http: httpx.Client, answer: httpx.Response, headers: dict[str, str]) -> list[bytes]:
        output = http.get(f"{self.path}/{self.job_id(answer)}", headers=headers).json()["output"]
        return [base64.b64decode(one.partition(",")[2]) for one in output]

    def blamed(self, answer: httpx.Response) -> str | None:
        error = answer.json()
        assert (
            set(error) - {"invalid_fields"} == {"title", "detail", "status", "type", "instance"} and error["status"] == answer.status_code
        )
        return error["invalid_fields"][0]["field"].removeprefix("input.") if "invalid_fields" in error else None

    def progress(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> float:
        step, _, num_steps = http.get(f"{self.path}/{job_id}", headers=headers).json()["logs"].split()[-1].partition("/")
        return int(step) / int(num_steps)

    def cancel(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> None:
        http.post(f"{self.path}/{job_id}/cancel", headers=headers).raise_for_status()

    def sees(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> bool:
        return http.get(f"{self.path}/{job_id}", headers=headers).status_code == 200


SPEAKERS: tuple[Speaker, ...] = (Native(), OpenAI(), Replicate(), A1111())
