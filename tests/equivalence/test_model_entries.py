"""Models as a worker's file names them: their defaults, and the commands that list, check and add them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from support.tiny import tiny_pipeline
from support.tiny_families import TINY, sdxl

from latentline.cli import main
from latentline.errors import ConfigurationError, ModelError
from latentline.jobs import JobRequest, resolve
from latentline_worker.generate.loading import start
from latentline_worker.models import catalog, registry
from latentline_worker.models.catalog import Defaults, ModelEntry
from latentline_worker.settings import WorkerSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sd``, ``sd3`` and ``xl``, tiny; not to be changed."""
    path = tmp_path_factory.mktemp("folders")
    tiny_pipeline().save_pretrained(path / "sd")
    TINY["sd3"]().save_pretrained(path / "sd3")
    sdxl().save_pretrained(path / "xl")
    return path


def load(source: Path | str, **fields: Any) -> Any:
    return registry.load_entry(ModelEntry(source=str(source), **fields), CPU, torch.float32)


def test_defaults_of_the_entry_go_before_those_of_the_family(folders: Path) -> None:
    plain = load(folders / "sd3").info
    given = Defaults(scheduler="heun", num_inference_steps=7, guidance_scale=3.0, width=128, height=96)
    info = load(folders / "sd3", id="mine", defaults=given).info
    assert info == plain.model_copy(
        update={
            "id": "mine",
            "default_scheduler": "heun",
            "default_num_inference_steps": 7,
            "default_guidance_scale": 3.0,
            "default_width": 128,
            "default_height": 96,
        }
    )
    request = resolve(JobRequest(model="mine", prompt="a"), info).request
    assert (request.scheduler, request.num_inference_steps, request.width, request.height) == ("heun", 7, 128, 96)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"scheduler": "euler_ancestral"}, r"^sd3: defaults\.scheduler: got 'euler_ancestral'; allowed: one of: euler, "),
        ({"width": 2048, "height": 2048}, r"^sd3: defaults\.width: got 2048; allowed: width \* height at most"),
    ],
)
def test_defaults_that_the_model_cannot_do_are_refused(folders: Path, defaults: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(folders / "sd3", defaults=Defaults(**defaults))


def test_a_default_scheduler_that_cannot_be_compiled_is_refused(folders: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders / "sd", tmp_path / "odd")) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholding": True}))
    with pytest.raises(ModelError, match=r"^odd: defaults\.scheduler: got 'ddim' with 20 steps; allowed: what it can do: "):
        load(tmp_path / "odd", defaults=Defaults(scheduler="ddim"))


def test_a_few_step_model_has_the_defaults_of_its_authors(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--stabilityai--sdxl-turbo"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders / "xl", cached / "snapshots" / ("0" * 40))
    turbo = load("stabilityai/sdxl-turbo")
    info = turbo.info
    assert (info.default_scheduler, info.default_num_inference_steps, info.default_guidance_scale) == ("euler_ancestral", 1, 0.0)
    request = resolve(JobRequest(model=info.id, prompt="a", width=64, height=64), info).request
    assert turbo.table(request).timesteps[0] == 999  # trailing: the first step begins with pure noise
    assert load(folders / "xl").table(request).timesteps[0] != 999  # the folder itself says otherwise
    own = load("stabilityai/sdxl-turbo", defaults=Defaults(num_inference_steps=4)).info
    assert (own.default_scheduler, own.default_num_inference_steps) == ("euler_ancestral", 4)


def test_an_entry_cannot_say_of_the_bundled_model_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^config and revision: got None and 'v1'; allowed: neither for latentline-emoji"):
        load("latentline-emoji", revision="v1")
    with pytest.raises(ModelError, match=r"^lora_dir: got '.*nothing'; allowed: a folder that exists"):
        load("latentline-emoji", lora_dir=tmp_path / "nothing")


def test_a_worker_loads_the_models_of_its_file_each_in_its_type(folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    catalog.append(path, ModelEntry(source=str(folders / "sd"), lora_dir=tmp_path))
    catalog.append(path, ModelEntry(source=str(folders / "sd3"), dtype="bfloat16", id="three"))
    roster, _, _ = start(WorkerSettings(models=path))
    with roster.use("sd") as one, roster.use("three") as other:
        pass
    assert [(family.info.id, family.dtype) for family in (one, other)] == [("sd", torch.float32), ("three", torch.bfloat16)]
    assert one.adapters is not None and other.adapters is None


def test_one_model_and_a_file_of_models_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"models: got 'm\.toml'; allowed: no file beside config and model"):
        WorkerSettings(models=Path("m.toml"), model="a/b", config="c/d")


def run(*args: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["models", *map(str, args)])
    assert result.exit_code == status, result.output
    return result.stderr if status == 2 else result.stdout  # progress bars go to stderr as well


def test_models_are_added_once_they_load_then_listed_and_checked(folders: Path, tmp_path: Path) -> None:
    path, sd = tmp_path / "models.toml", Path(shutil.copytree(folders / "sd", tmp_path / "sd"))
    assert "sd: added to" in run("add", sd, "--models", path, "--num-inference-steps", "6")
    assert "guidance 7" in run("add", folders / "sd3", "--models", path, "--id", "three")
    assert "sampler" in run("add", folders / "sd3", "--models", path, "--scheduler", "sampler", status=2)
    assert "models.id: got 'a b'; allowed: text that matches" in run("add", folders / "sd3", "--models", path, "--id", "a b", status=2)
    assert "no other model" in run("add", sd, "--models", path, status=2)
    assert run("list", "--models", path) == f"sd  {sd}  num_inference_steps=6\nthree  {folders / 'sd3'}\n"
    assert [one["id"] for one in json.loads(run("list", "--models", path, "--json"))["models"]] == ["sd", "three"]
    assert run("check", "--models", path).splitlines()[0] == "sd: fine: sd, 64x64, dpmpp_2m, 6 steps, guidance 5"
    shutil.rmtree(sd / "vae")
    first, second = run("check", "--models", path, status=1).splitlines()
    assert first == f"sd: {sd / 'vae' / 'config.json'}: missing from the model" and second.startswith("three: fine: sd3, ")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("[[models]]\nsource = 1")
    assert "models.0.source: got 1; allowed: a string" in run("check", "--models", path, status=2)
    with pytest.raises(ConfigurationError, match=r"models\.0\.source: got 1"):
        start(WorkerSettings(models=path))
