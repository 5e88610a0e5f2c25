"""Where models come from: folder, single file and hub cache give the same model without a network; what is broken is named."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.engines import embeds
from support.original_layout import write_sd, write_sd2, write_sd3, write_sdxl
from support.tiny import tiny_pipeline
from support.tiny_families import TINY, sdxl

from latentline.errors import ModelError
from latentline_worker.models import registry
from latentline_worker.models.sd import StableDiffusion

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address is looked up, no socket connects, and nothing is in the hub cache."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion as a folder and as a single file, ``tiny`` and ``single.safetensors``; not to be changed."""
    path, pipeline = tmp_path_factory.mktemp("saved"), tiny_pipeline()
    pipeline.save_pretrained(path / "tiny")
    write_sd(pipeline, path / "single.safetensors")
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(source: Path | str, **options: Any) -> Any:
    return registry.load(str(source), CPU, torch.float32, **options)


def in_cache(folder: Path, cache: Path, name: str) -> None:
    """Lay a model into a hub cache, as a download of its branch main does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)


def test_a_folder_is_served_under_its_name_and_equals_the_pipeline(folder: Path, family: StableDiffusion) -> None:
    loaded = load(folder)
    assert loaded.info.id == "my-model"
    assert isinstance(loaded, StableDiffusion)
    assert loaded.scheduler_config["prediction_type"] == family.scheduler_config["prediction_type"]
    rows = {"prompt_embeds": embeds(loaded, "a cat")}
    assert torch.equal(rows["prompt_embeds"], embeds(family, "a cat"))
    assert loaded.revision == family.revision
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, torch.tensor([500.0]), rows), family.denoise(x, torch.tensor([500.0]), rows))
        assert (loaded.decode(x, tiled=False) == family.decode(x, tiled=False)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_has_the_weights_of_the_folder(saved: Path, dtype: torch.dtype) -> None:
    one = registry.load(str(saved / "single.safetensors"), CPU, dtype, config=str(saved / "tiny"))
    assert one.info.id == "single"
    assert one.revision == registry.load(str(saved / "tiny"), CPU, dtype).revision
    assert one.dtype == dtype


def test_a_single_file_of_sdxl_has_the_weights_of_the_folder(tmp_path: Path) -> None:
    pipeline = sdxl(second_width=48)
    pipeline.save_pretrained(tmp_path / "xl")
    one = load(write_sdxl(pipeline, tmp_path / "one.safetensors"), config=str(tmp_path / "xl"))
    assert (one.info.id, one.info.family) == ("one", "sdxl")
    assert one.revision == load(tmp_path / "xl").revision


def test_a_single_file_of_stable_diffusion_2_has_the_weights_of_the_folder(saved: Path, tmp_path: Path) -> None:
    one = load(write_sd2(tiny_pipeline(), tmp_path / "two.safetensors"), config=str(saved / "tiny"))
    assert one.revision == load(saved / "tiny").revision


def test_a_single_file_of_sd3_takes_its_text_encoders_from_the_folder(tmp_path: Path) -> None:
    pipeline = TINY["sd3"]()
    pipeline.save_pretrained(tmp_path / "sd3")
    one = load(write_sd3(pipeline, tmp_path / "one.safetensors"), config=str(tmp_path / "sd3"))
    assert (one.info.family, one.revision) == ("sd3", load(tmp_path / "sd3").revision)


def test_parts_that_a_single_file_lacks_come_from_the_folder_of_its_configuration(copy: Path) -> None:
    file, whole = copy / "single.safetensors", load(copy / "tiny").revision
    save_file({name: tensor for name, tensor in load_file(file).items() if name.startswith("model.")}, file)
    assert load(file, config=str(copy / "tiny")).revision == whole
    next((copy / "tiny" / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"tiny/vae: no \.safetensors file"):
        load(file, config=str(copy / "tiny"))


def test_a_model_in_the_hub_cache_needs_no_network(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache(saved / "tiny", tmp_path / "hub", "somebody/tiny")
    loaded = load("somebody/tiny")
    assert loaded.info.id == "somebody/tiny"
    assert load(f"somebody/tiny@{COMMIT}").revision == loaded.revision
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # without it, asking for a pinned revision is tried for a while
    assert load(saved / "single.safetensors", config=f"somebody/tiny@{COMMIT}").revision == loaded.revision
    with pytest.raises(ModelError, match=r"^config: somebody/tiny@v2 is not in the hub cache"):
        load(saved / "single.safetensors", config="somebody/tiny@v2")


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("somebody/else", "hf download somebody/else`"),
        ("somebody/tiny@v2", "hf download somebody/tiny --revision v2`"),
    ],
)
def test_what_is_not_in_the_cache_is_said_to_be_fetched(saved: Path, tmp_path: Path, source: str, command: str) -> None:
    in_cache(saved / "tiny", tmp_path / "hub", "somebody/tiny")
    with pytest.raises(ModelError, match=rf"^source: .* not in the hub cache .*{re.escape(command)}$"):
        load(source)


def test_a_single_file_alone_names_the_configuration_to_fetch(saved: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^config: stable-diffusion-v1-5/stable-diffusion-v1-5 is not .*hf download .* --include '\*\.json'"
    ):
        load(saved / "single.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_named(folder: Path, part: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=re.escape(str(weights))):
        load(folder)


def test_a_single_file_that_is_cut_off_or_incomplete_is_named(copy: Path) -> None:
    file = copy / "single.safetensors"
    tensors = load_file(file)
    for missing in ("model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.weight"):
        save_file({name: tensor for name, tensor in tensors.items() if name != missing}, file)
        with pytest.raises(ModelError, match=re.escape(str(file))):
            load(file, config=str(copy / "tiny"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{re.escape(str(file))}: not a whole safetensors file"):
        load(file, config=str(copy / "tiny"))


def test_weights_in_another_format_are_not_loaded(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"unet: no \.safetensors file"):
        load(folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_refused_and_not_read(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("the pickle was run",)

    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=rf"^source: got .*; allowed: a \.safetensors file.*{re.escape(suffix)} files are pickles"):
        load(file)


def test_a_single_file_of_unknown_layout_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"^source: got .*named lora_unet_down.lora_up.weight, .*; allowed: .*SDXL, Stable"):
        load(tmp_path / "other.safetensors")


def edit_index(folder: Path, **entries: Any) -> Path:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_encoder": [None, None]}, r"text_encoder: got \[None, None\]; allowed: its library and class"),
        ({"unet": ["my_unet", "MyUNet"]}, r"unet: got \['my_unet', 'MyUNet'\]; allowed: .*code that comes with a model is not run"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, r"_class_name: got \['pipeline', 'MyPipeline'\]; allowed: StableDiffusionPipeline"),
        ({"_class_name": "WanPipeline"}, r"_class_name: got 'WanPipeline'; allowed: StableDiffusionPipeline"),
    ],
)
def test_an_index_that_cannot_be_served_is_refused(copy: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(edit_index(copy / "tiny", **entries))


def test_missing_files_are_named(copy: Path) -> None:
    listing = copy / "tiny" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors: missing"):
        load(copy / "tiny")
    listing.unlink()
    for file in (copy / "tiny" / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer: no vocabulary"):
        load(copy / "tiny")


def test_only_t5_of_sd3_may_be_absent(tmp_path: Path) -> None:
    TINY["sd3"]().save_pretrained(tmp_path / "sd3")
    assert load(edit_index(tmp_path / "sd3", text_encoder_3=[None, None], tokenizer_3=[None, None])).info.family == "sd3"
    with pytest.raises(ModelError, match=r"text_encoder_2: got \[None, None\]"):
        load(edit_index(tmp_path / "sd3", text_encoder_2=[None, None]))


def test_a_configuration_of_another_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    sdxl().save_pretrained(tmp_path / "xl")
    with pytest.raises(ModelError, match=r"^config: got .* of a 'StableDiffusionXLPipeline'; allowed .*: one of StableDiffusionPipeline"):
        load(saved / "single.safetensors", config=str(tmp_path / "xl"))
    with pytest.raises(ModelError, match=r"^config: got .*; allowed: none: only a single"):
        load(saved / "tiny", config=str(tmp_path / "xl"))


@pytest.mark.parametrize("source", ["/no/such/folder", "a b c", "a/b/c", "a/b@", "nothing.safetensors", "./nothing.ckpt"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(ModelError, match=r"^source: got .*; allowed: "):
        load(source)
