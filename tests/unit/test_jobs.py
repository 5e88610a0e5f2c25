"""The contract: what a request may hold, what an error says, and what survives a round trip."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from latentline import errors, jobs, models
from latentline.errors import InvalidRequest, LatentlineError
from latentline.jobs import JobError, JobEvent, JobRequest, ModelInfo, Phase, ResolvedRequest, Status, resolve


def request(**fields: Any) -> JobRequest:
    return JobRequest.parse({"prompt": "a cat", **fields})


BAD: list[tuple[str, Any, str]] = [
    ("prompt", "", "at least 1 character"),
    ("prompt", " \n\t ", "not all of them blank"),
    ("prompt", "x" * (jobs.MAX_PROMPT_CHARS + 1), "at most 32000 characters"),
    ("prompt", "a\x00b", "without NUL"),
    ("prompt", "a\ud800b", "unicode"),
    ("prompt", None, "string"),
    ("negative_prompt", "x" * (jobs.MAX_PROMPT_CHARS + 1), "at most 32000 characters"),
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
    ("seed", 1.5, "integer"),
    ("num_images", 0, "at least 1"),
    ("num_images", jobs.MAX_IMAGES + 1, "at most 10"),
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
    [
        "ftp://host/x", "//host/x", "http://", "http://host:0/", "http://host:99999/", "http://[::1/", "https://user:pw@host/", "host/x",
        " http://host/", "http://host/a b", "http://host/\n", "http://ho\tst/", "http://host/\x7f",
    ],
)  # fmt: skip
def test_a_callback_that_is_no_plain_http_url(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(callback={"url": url})
    assert caught.value.field == "callback.url"
    with pytest.raises(InvalidRequest) as caught:
        request(callback={"url": "https://host/", "prediction_base": url})
    assert caught.value.field == "callback.prediction_base"


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


def test_the_fingerprint_is_what_the_client_sent() -> None:
    assert request(idempotency_key="k").fingerprint() == request(idempotency_key="other").fingerprint()  # drawn seeds do not count
    assert request(seed=1).fingerprint() != request(seed=2).fingerprint()
    assert request(width=64, height=128).fingerprint() == request(height=128, width=64).fingerprint()
    assert request().fingerprint() == '{"prompt":"a cat"}'
    assert request(num_inference_steps=20).fingerprint() != request().fingerprint(), "what is sent counts, also where it is the default"
    one, other = (resolve(request(), info(default_width=side, default_height=side)) for side in (64, 128))
    assert one.fingerprint == other.fingerprint, "the model's defaults do not count"
    assert one.sized_fingerprint == '{"height":64,"prompt":"a cat","width":64}', "what version 0.1.0 compares"


# Storage


def info(**fields: Any) -> ModelInfo:
    base = {"id": "m", "family": "f", "default_width": 64, "default_height": 64, "max_pixels": 128 * 128}
    return ModelInfo.model_validate(base | fields)


def stored(**fields: Any) -> ResolvedRequest:
    base = {"version": 1, "model": "m", "prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 3.0, "scheduler": "ddim", "seed": 1}
    return ResolvedRequest.model_validate(base | fields)


def test_a_stored_request_of_a_newer_version_is_read() -> None:
    """Unknown fields are ignored, unknown values kept, limits not checked again."""
    newer = stored(
        extras=[{"name": "x"}],
        scheduler="newest",
        num_inference_steps=1000,
        output={"format": "avif", "lossless": True},
        callback={"url": "https://a.example", "events": ["job.paused"], "secret": 1},
        metadata={"list": [1, 2]},
    )
    assert (newer.scheduler, newer.num_inference_steps, newer.output.content_type) == ("newest", 1000, "image/avif")
    assert newer.callback is not None and newer.callback.events == ("job.paused",)
    assert not hasattr(newer, "extras") and newer.metadata == {"list": [1, 2]}


@pytest.mark.parametrize(
    ("loras", "problem"),
    [
        ([{"name": "../x"}], r"loras\.0\.name: got '\.\./x'; allowed: text that matches"),
        ([{"name": "a"}, {"name": "a", "scale": 0.5}], "loras: got .*; allowed: each adapter once"),
        ([{"name": "a", "scale": 11}], r"loras\.0\.scale: got 11; allowed: at most 10"),
        ([{"name": "a", "weight": 1}], r"loras\.0\.weight: got 1; allowed: only the known fields: name, scale"),
        ([{"name": str(i)} for i in range(9)], "loras: got .*; allowed: "),
        ("a", "loras: got 'a'; allowed: a list"),
    ],
)
def test_adapters_that_no_request_may_name(loras: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        request(loras=loras)


def test_adapters_are_level_3_and_those_of_every_worker() -> None:
    one, two = info(loras=("a", "b")), info(loras=("b", "c"))
    assert models.common([one, two]).loras == ("b",)
    asked = request(loras=[{"name": "b", "scale": 0.5}])
    assert resolve(asked, one).level == 3 and resolve(asked, one).request.loras[0].scale == 0.5
    assert (models.level_of_worker(one), models.level_of_worker(info())) == (3, 2)
    with pytest.raises(InvalidRequest, match=r"loras\.0\.name: got 'b'; allowed: one of: none"):
        resolve(asked, info())


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_stored_request_of_an_unknown_version_is_not_read(version: Any) -> None:
    with pytest.raises(ValidationError):
        stored(version=version)


def test_records_events_and_errors_of_a_newer_version_are_read() -> None:
    assert Phase("upscaling") == "upscaling" and Phase("upscaling").value == "upscaling"
    assert not Status("paused").terminal and Status("paused").value == "paused"
    assert pickle.loads(pickle.dumps(Phase("upscaling"))) == Phase("upscaling")
    event = JobEvent.model_validate({"id": "1-0", "type": "job.paused", "job_id": "j", "at": 0, "by": "an operator"})
    assert event.type == "job.paused" and not event.terminal
    assert JobError.model_validate({"code": "c", "message": "m", "hint": "h"}) == JobError(code="c", message="m")
    assert info(vram_bytes=1) == info()
    with pytest.raises(ValueError):
        Status(3)  # type: ignore[arg-type]


def test_what_is_stored_leaves_out_defaults_and_never_what_was_resolved() -> None:
    plain = resolve(request(seed=1), info(default_num_inference_steps=20)).request
    assert json.loads(plain.to_json()) == {
        "version": 1, "model": "latentline-emoji", "prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 20,
        "guidance_scale": 5.0, "scheduler": "dpmpp_2m", "seed": 1,
    }  # fmt: skip
    full = {"negative_prompt": "fog", "num_images": 2, "output": {"format": "webp"}, "tenant": "acme", "metadata": {"a": 1}}
    chosen = resolve(request(seed=1, **full), info()).request
    assert json.loads(chosen.to_json()).items() >= full.items()
    assert ResolvedRequest.model_validate_json(chosen.to_json()) == chosen


# Models' defaults and levels


def test_what_the_client_leaves_out_is_the_models_own() -> None:
    model = info(
        default_width=128, default_height=96, default_num_inference_steps=4, default_guidance_scale=1.0, default_scheduler="lcm",
        rows_guided=1,
    )  # fmt: skip
    left_open = resolve(request(num_images=3), model)
    made = left_open.request
    assert (made.width, made.height, made.num_inference_steps, made.guidance_scale, made.scheduler) == (128, 96, 4, 1.0, "lcm")
    assert left_open.cost == 4 * 3
    chosen = resolve(request(width=64, num_inference_steps=7, guidance_scale=0.0, scheduler="ddim"), model).request
    assert (chosen.width, chosen.height, chosen.num_inference_steps, chosen.guidance_scale, chosen.scheduler) == (64, 96, 7, 0.0, "ddim")
    assert resolve(request(num_inference_steps=None, scheduler=None), model).request.num_inference_steps == 4, "null is left out"


@pytest.mark.parametrize(
    ("guidance", "rows", "cost"),
    [
        (1.0, {}, 10), (1.1, {}, 20), (7.0, {"rows_guided": 1}, 10), (7.0, {"rows_guided": 3}, 30), (0.0, {"rows_unguided": 2}, 20),
        (0.0, {"guided_above": 0.0}, 10), (0.5, {"guided_above": 0.0}, 20),
    ],
)  # fmt: skip
def test_the_cost_counts_the_models_own_rows(guidance: float, rows: dict[str, Any], cost: int) -> None:
    assert resolve(request(num_inference_steps=5, num_images=2, guidance_scale=guidance), info(**rows)).cost == cost


def test_a_model_that_announces_no_defaults_has_those_of_before() -> None:
    """Workers of version 0.1.0 announce none."""
    old = json.loads(info(schedulers=("ddim", "euler")).first_fields())
    assert set(old) == {"id", "family", "default_width", "default_height", "size_multiple", "max_pixels", "schedulers"}
    made = resolve(request(), ModelInfo.model_validate(old)).request
    assert (made.num_inference_steps, made.guidance_scale) == (20, 5.0)
    assert made.scheduler == "ddim", "the first that it has, where it does not have the usual one"


def test_a_scheduler_is_one_of_the_models_own() -> None:
    model = info(schedulers=("flow_euler", "ddim"))
    assert resolve(request(scheduler="flow_euler"), model).request.scheduler == "flow_euler"
    with pytest.raises(InvalidRequest, match="scheduler: got 'euler'; allowed: one of: flow_euler, ddim"):
        resolve(request(scheduler="euler"), model)


@pytest.mark.parametrize("defaults", [{"default_num_inference_steps": 0}, {"default_guidance_scale": 31}, {"rows_guided": 0}])
def test_an_announced_default_that_no_request_may_have(defaults: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        info(**defaults)


def test_the_level_is_that_of_the_newest_thing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(request(preview_every=2, output={"format": "webp"}), info()).level == 1
    monkeypatch.setattr(models, "ADDED", {"preview_every": 2, "output.quality": 3, "output.format=webp": 4})

    def level(**fields: Any) -> tuple[int, str]:
        made = resolve(request(**fields), info())
        return made.level, made.level_field

    assert level() == (1, "")
    assert level(preview_every=2) == (2, "preview_every")
    assert level(preview_every=0, output={"quality": 90}) == (1, ""), "a default asks for nothing"
    assert level(preview_every=2, output={"quality": 80}) == (3, "output.quality")
    assert level(preview_every=2, output={"format": "webp", "quality": 80}) == (4, "output.format")


def test_a_jpeg_has_no_room_for_the_longest_prompts() -> None:
    fits: list[dict[str, Any]] = [
        {"prompt": "x" * 32_000},
        {"prompt": "\u00e9" * 4_600, "negative_prompt": "\u00e9" * 4_600},
    ]  # six bytes each
    for texts in fits:
        assert request(output={"format": "jpeg"}, **texts).output.format == "jpeg"
    for more in ({"prompt": "x" * 32_000, "negative_prompt": "x" * 32_000}, {"prompt": "\u00e9" * 9_400}):
        assert request(output={"format": "webp"}, **more) and request(**more)
        with pytest.raises(InvalidRequest, match="png or webp where the prompts") as caught:
            request(output={"format": "jpeg"}, **more)
        assert caught.value.field == "output"


def test_what_goes_beyond_the_limits_of_level_1_has_a_higher_level() -> None:
    def level(**fields: Any) -> tuple[int, str]:
        made = resolve(request(**fields), info(loras=("b",)))
        return made.level, made.level_field

    assert level(prompt="x" * 2000, negative_prompt="y" * 2000, num_images=8) == (1, "")
    assert level(prompt="x" * 2001) == (2, "prompt") and level(negative_prompt="x" * 2001) == (2, "negative_prompt")
    assert level(num_images=9) == (2, "num_images") and level(num_images=10, loras=[{"name": "b"}]) == (3, "loras")
    hook = {"url": "https://example.com/hook"}
    assert level(callback=hook) == (1, "")
    assert level(callback=hook | {"prediction_base": "https://example.com/replicate/v1"}) == (2, "callback.prediction_base")
    assert models.level_of_worker(info()) >= 2, "every worker of this release takes them"


def test_a_scheduler_that_level_1_does_not_know_has_a_higher_level() -> None:
    model = info(schedulers=("flow_euler", "ddim"), default_scheduler="flow_euler")
    assert (resolve(request(scheduler="ddim"), model).level, resolve(request(), model).level) == (1, 2)


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


@pytest.mark.parametrize("tenant", [".", "..", "...", "", "a/b"])
def test_a_tenant_that_is_no_name(tenant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(tenant=tenant)
    assert caught.value.field == "tenant"


@pytest.mark.parametrize("tenant", ["a", ".a", "a.", "..a", "-", "a.b"])
def test_a_tenant_with_dots(tenant: str) -> None:
    assert request(tenant=tenant).tenant == tenant


def test_a_whole_number_may_be_written_as_a_float() -> None:
    made = request(width=432.0, height=432.0, num_inference_steps=9.0, seed=7.0, num_images=2.0, priority=3.0, output={"quality": 80.0})
    assert (made.width, made.num_inference_steps, made.seed, made.num_images, made.output.quality) == (432, 9, 7, 2, 80)
    assert isinstance(made.width, int)
    with pytest.raises(InvalidRequest, match="an integer"):
        request(width=432.5)


@pytest.mark.parametrize("value", [True, "7"])
@pytest.mark.parametrize("field", ["version", "width", "num_inference_steps", "guidance_scale", "seed", "priority", "deadline_s"])
def test_a_truth_value_or_a_text_is_no_number(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**{field: value})
    assert caught.value.field == field
