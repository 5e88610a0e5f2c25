"""The contract: what a request may hold, what an error says, and what survives a round trip."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from latentline import errors, jobs
from latentline.errors import InvalidRequest, LatentlineError
from latentline.jobs import JobEvent, JobRequest, Status


def request(**fields: Any) -> JobRequest:
    return JobRequest.parse({"prompt": "a cat", **fields})


BAD: list[tuple[str, Any, str]] = [
    ("prompt", "", "at least 1 character"),
    ("prompt", " \n\t ", "not all of them blank"),
    ("prompt", "x" * (jobs.MAX_PROMPT_CHARS + 1), "at most 2000 characters"),
    ("prompt", "a\x00b", "without NUL"),
    ("prompt", "a\ud800b", "unicode"),
    ("prompt", None, "string"),
    ("negative_prompt", "x" * (jobs.MAX_PROMPT_CHARS + 1), "at most 2000 characters"),
    ("width", 65, "a multiple of 8"),
    ("width", 56, "at least 64"),
    ("height", 2056, "at most 2048"),
    ("height", "64", "integer"),
    ("width", True, "integer"),
    ("num_inference_steps", 0, "at least 1"),
    ("num_inference_steps", jobs.MAX_STEPS + 1, "at most 150"),
    ("num_inference_steps", 2.5, "integer"),
    ("guidance_scale", -0.1, "at least 0"),
    ("guidance_scale", 30.1, "at most 30"),
    ("guidance_scale", float("nan"), "finite"),
    ("guidance_scale", float("inf"), "finite"),
    ("scheduler", "DPM++ 2M", "text that matches"),
    ("scheduler", "", "at least 1 character"),
    ("seed", -1, "at least 0"),
    ("seed", jobs.MAX_SEED + 1, "at most 4294967295"),
    ("seed", "7", "integer"),
    ("seed", 1.0, "integer"),
    ("num_images", 0, "at least 1"),
    ("num_images", jobs.MAX_IMAGES + 1, "at most 8"),
    ("model", "../etc", "text that matches"),
    ("model", "", "at least 1 character"),
    ("priority", 10, "at most 9"),
    ("priority", -1, "at least 0"),
    ("deadline_s", 0, "more than 0"),
    ("deadline_s", 7 * 86400 + 1, "at most 604800"),
    ("tenant", "a:b", "text that matches"),
    ("metadata", {"k": "x" * jobs.MAX_METADATA_BYTES}, "at most 4096 bytes"),
    ("metadata", {"k": float("nan")}, ""),  # the phrase is the union's first branch's
    ("metadata", [], "a JSON object"),
    ("idempotency_key", "", "at least 1 character"),
    ("version", 2, "one of 1"),
    ("stepz", 4, "only the known fields"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD)
def test_every_limit_names_the_field_and_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: value})
    assert caught.value.field.split(".")[0] == field
    assert allowed in caught.value.allowed
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x" * jobs.MAX_PROMPT_CHARS),
        ("prompt", "пингвин 🐧"),
        ("width", 64),
        ("height", 2048),
        ("num_inference_steps", 1),
        ("num_inference_steps", jobs.MAX_STEPS),
        ("guidance_scale", 0),
        ("guidance_scale", 30.0),
        ("seed", jobs.MAX_SEED),
        ("num_images", jobs.MAX_IMAGES),
        ("priority", 0),
        ("priority", 9),
        ("deadline_s", 0.5),
        ("model", "org/model-1.5_x"),
        ("metadata", {"a": 1, "b": None, "c": "d", "e": True}),
    ],
)
def test_the_limits_themselves_are_allowed(field: str, value: Any) -> None:
    assert getattr(request(**{field: value}), field) == value


@pytest.mark.parametrize("scheduler", jobs.SCHEDULERS)
def test_every_scheduler_that_is_named_is_accepted(scheduler: str) -> None:
    assert request(scheduler=scheduler).scheduler == scheduler


def test_the_seed_of_the_last_image_counts() -> None:
    assert request(seed=jobs.MAX_SEED - 1, num_images=2).num_images == 2
    with pytest.raises(InvalidRequest) as caught:
        request(seed=jobs.MAX_SEED, num_images=2)
    assert (caught.value.field, caught.value.value) == ("seed", jobs.MAX_SEED)


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "//host/x", "http://", "http://host:0/", "http://host:99999/", "http://[::1/", "https://user:pw@host/", "host/x"],
)
def test_a_callback_that_is_no_plain_http_url(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(callback={"url": url})
    assert caught.value.field == "callback.url"


def test_a_callback() -> None:
    callback = request(callback={"url": "https://app.example/hook?job=1"}).callback
    assert callback is not None and callback.events == ("job.succeeded", "job.failed", "job.cancelled")
    with pytest.raises(InvalidRequest, match=r"callback\.events"):
        request(callback={"url": "https://app.example/", "events": ["job.progress"]})


@pytest.mark.parametrize(("output", "field"), [({"quality": 0}, "quality"), ({"quality": 101}, "quality"), ({"format": "gif"}, "format")])
def test_output_limits(output: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(output=output)
    assert caught.value.field == f"output.{field}"


@pytest.mark.parametrize("data", [None, [], "a cat", 3])
def test_what_is_not_an_object_at_all(data: Any) -> None:
    with pytest.raises(InvalidRequest, match="a JSON object"):
        JobRequest.parse(data)


def test_a_missing_prompt() -> None:
    with pytest.raises(InvalidRequest) as caught:
        JobRequest.parse({})
    assert (caught.value.field, caught.value.value) == ("prompt", None)


def test_long_values_are_cut_in_the_message() -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(prompt="x" * 100_000)
    assert len(caught.value.message) < 200


def test_a_seed_is_drawn_and_the_request_survives_json() -> None:
    made = request(metadata={"k": 1}, callback={"url": "https://app.example/"})
    assert 0 <= made.seed < 2**31
    assert JobRequest.model_validate_json(made.model_dump_json()) == made


def test_messages_are_frozen() -> None:
    with pytest.raises(ValidationError):
        request().prompt = "a dog"


def test_the_fingerprint_is_what_the_caller_wrote() -> None:
    assert request(idempotency_key="k").fingerprint() == request(idempotency_key="other").fingerprint()  # drawn seeds do not count
    assert request(seed=1).fingerprint() != request(seed=2).fingerprint()
    assert request(width=64, height=128).fingerprint() == request(height=128, width=64).fingerprint()


def test_terminal_states_and_events() -> None:
    assert [status for status in Status if not status.terminal] == [Status.QUEUED, Status.RUNNING]
    ended = {kind for kind in ("job.queued", "job.running", "job.progress", "job.succeeded", "job.failed", "job.cancelled")
             if JobEvent.model_validate({"id": "1-0", "type": kind, "job_id": "j", "at": 0}).terminal}  # fmt: skip
    assert ended == {f"job.{status}" for status in Status if status.terminal}


def test_errors_carry_a_code_of_their_own_and_survive_pickling() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LatentlineError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind.code in (errors.__doc__ or "") or kind in (LatentlineError, errors.ServiceUnavailable)
    error = InvalidRequest("width", 65, "a multiple of 8")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.field, copy.value, copy.allowed, str(copy)) == ("width", 65, "a multiple of 8", str(error))
    assert str(pickle.loads(pickle.dumps(errors.MissingExtra("the worker", "worker")))).endswith("pip install 'latentline[worker]'")
