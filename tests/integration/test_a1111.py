"""``webuiapi``, the client of A1111's web UI, unmodified, against the whole stack."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
import webuiapi
from support.jobs import PATIENCE_S, SIDE, until

from latentline_worker.embedded.stack import Stack


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator[webuiapi.WebUIApi]:
    made = webuiapi.WebUIApi(port=urlsplit(stack.url).port, sampler="DPM++ 2M", steps=4)
    yield made
    made.session.close()


def test_txt2img_as_the_client_sends_it(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    """It asks for 512 by 512 pixels where its caller names no size; this model cannot, and makes its own."""
    answer = api.txt2img(prompt="a red apple <lora:one:0.5>", negative_prompt="blue", seed=7, cfg_scale=3, batch_size=2, n_iter=2)
    assert [image.size for image in answer.images] == [(SIDE, SIDE)] * 4
    info = answer.info
    assert (info["all_seeds"], info["sampler_name"], info["steps"], info["cfg_scale"]) == ([7, 8, 9, 10], "DPM++ 2M", 4, 3.0)
    assert (info["width"], info["height"], info["ignored"]) == (SIDE, SIDE, ["height", "width"])
    assert answer.parameters["prompt"].endswith(">")
    assert info["infotexts"][1] == answer.images[1].text["parameters"]
    job = http.get(f"/v1/jobs/{info['job_id']}").json()["request"]
    assert (job["prompt"], job["loras"], job["num_images"]) == ("a red apple", [{"name": "one", "scale": 0.5}], 4)


def test_what_has_no_meaning_is_ignored_and_listed(api: webuiapi.WebUIApi) -> None:
    answer = api.txt2img(
        prompt="a key", steps=1, width=SIDE, height=96, enable_hr=True, restore_faces=True, styles=["warm"], send_images=False,
        override_settings={"sd_model_checkpoint": "gpt-image-2 [0a1b]", "CLIP_stop_at_last_layers": 2},
        alwayson_scripts={"an extension": {"args": []}},
    )  # fmt: skip
    assert answer.images == [] and (answer.info["width"], answer.info["height"]) == (SIDE, 96) and answer.info["seed"] >= 0
    assert answer.info["ignored"] == [
        "alwayson_scripts",
        "enable_hr",
        "override_settings.CLIP_stop_at_last_layers",
        "restore_faces",
        "styles",
    ]


def test_a_schedule_that_stands_apart_from_its_sampler(api: webuiapi.WebUIApi) -> None:
    names = {api.txt2img(prompt="a key", steps=2, scheduler=name).info["sampler_name"] for name in ("Karras", "Automatic")}
    assert names == {"DPM++ 2M Karras", "DPM++ 2M"}
    with pytest.raises(RuntimeError, match="allowed: automatic, or karras where the sampler has it"):
        api.txt2img(prompt="a key", scheduler="Exponential")
    with pytest.raises(RuntimeError, match=r"sampler_name: got .*Restart.*; allowed: one of: .*DPM\+\+ 2M"):
        api.txt2img(prompt="a key", sampler_name="Restart")


def test_progress_from_a_second_thread(api: webuiapi.WebUIApi) -> None:
    assert until(lambda: api.get_progress()["state"]["job_count"] == 0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.txt2img, prompt="a tent", steps=50)
        seen = until(lambda: (found := api.get_progress())["current_image"] and found)
        assert 0 < seen["progress"] <= 1 and seen["eta_relative"] > 0 and seen["state"]["job_count"] == 1
        assert 0 < seen["state"]["sampling_step"] <= seen["state"]["sampling_steps"]
        assert len(answer.result(PATIENCE_S).images) == 1
    api.util_wait_for_ready(0.05)


@pytest.mark.parametrize("call", ["interrupt", "skip"])
def test_an_interrupted_request_is_answered_with_the_unfinished_picture(api: webuiapi.WebUIApi, call: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.txt2img, prompt="a bear", steps=150, batch_size=2)
        until(lambda: api.get_progress()["current_image"])
        assert getattr(api, call)() == {}
        found = answer.result(PATIENCE_S)
    assert found.info["interrupted"] and len(found.images) == 2


def test_lists_and_settings(api: webuiapi.WebUIApi) -> None:
    assert api.util_get_model_names() == ["gpt-image-2", "latentline-emoji"] and api.util_get_current_model() == "latentline-emoji"
    assert {"Euler a", "DPM++ 2M Karras"} <= set(api.util_get_sampler_names()) and api.util_get_scheduler_names() == ["automatic", "karras"]
    assert [lora["name"] for lora in api.get_loras()] == ["one", "two"]
    assert (api.has_controlnet, api.has_adetailer) == (False, False), "it asks for the scripts before anything else"
    assert api.get_upscalers() == [] and api.get_embeddings()["loaded"] == {} and api.refresh_checkpoints() is None
    assert api.set_options({"sd_model_checkpoint": "gpt-image-2", "samples_format": "jpg"}) is None
    refused = api.set_options({"sd_model_checkpoint": "another"})
    assert refused["detail"][0]["loc"] == ["body", "sd_model_checkpoint"] and "override_settings" in refused["detail"][0]["msg"]


def test_what_needs_image_inputs_says_so(api: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError, match=r"501.*takes no pictures as input"):
        api.img2img(prompt="a key")
