"""Recipes and folders of pictures as users write them, and the command line in front of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click.testing
import pytest
from PIL import Image
from support.training import TINY_DENOISER, autoencoder_recipe, denoiser_recipe, toml, write_data

from latentline.cli import main
from latentline_worker.training import autoencoder, denoiser
from latentline_worker.training.commands import Run
from latentline_worker.training.errors import TrainingError
from latentline_worker.training.folders import FolderData
from latentline_worker.training.recipe import AutoencoderRecipe, DenoiserRecipe, load, parse

RECIPE = toml(autoencoder_recipe())


def picture(path: Path, size: tuple[int, int] = (40, 40), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def pictures(folder: Path, count: int = 6) -> Path:
    for number, colour in zip(range(count), ("red", "green", "blue", "white", "black", "yellow"), strict=False):
        picture(folder / f"a_{colour}_square-{number}.png", colour=colour)
    return folder


# Recipes


def test_a_recipe_comes_back_from_its_file(tmp_path: Path) -> None:
    for recipe in (autoencoder_recipe(), denoiser_recipe()):
        (tmp_path / "recipe.toml").write_text(toml(recipe))
        assert load(tmp_path / "recipe.toml", type(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("size_px = 32", "size_px = 32\nsise = 3"), "sise: no such key; known are model, schedule, size_px"),
        (("batch = 2", "batch = 2\nstep = 3"), r"schedule\.step: no such key"),
        (("batch = 2\n", ""), r"schedule\.batch is missing"),
        (("batch = 2", 'batch = "two"'), r"schedule\.batch: got 'two'; must be int"),
        (("batch = 2", "batch = true"), r"schedule\.batch: got True; must be int"),
        (("batch = 2", "batch = 0"), "batch: got 0; allowed: 1 or more"),
        (("ema_decay = 0.0", "ema_decay = 1"), r"ema_decay: got 1\.0; allowed: 0 up to"),
        (('precision = "fp32"', 'precision = "fp8"'), "precision: got 'fp8'; allowed: fp32, bf16"),
        (("crop_px = 16", "crop_px = 64"), "crop_px: got 64; allowed: at most size_px, 32"),
        (('"AutoencoderTiny"', '"UNet"'), r"model\.class: got 'UNet'; allowed: AutoencoderTiny, AutoencoderKL"),
        (("[model]", "[model]\nwidth = 3"), r"model\.width: AutoencoderTiny has no such argument"),
        (("[schedule]", "[schedule"), "Expected"),
    ],
)
def test_mistakes_in_a_recipe_are_named(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    assert change[0] in RECIPE
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(*change))
    with pytest.raises(TrainingError, match=rf"recipe\.toml: .*{said}"):
        load(tmp_path / "recipe.toml", AutoencoderRecipe)


def test_densities_and_dropout_are_checked() -> None:
    for change, said in (
        ({"density_mean": [1.0, 0.3]}, "density_until"),
        ({"density_until": [0.5]}, "density_until"),
        ({"prediction": "x0"}, "prediction: got 'x0'; allowed: flow, v_prediction, epsilon"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
    ):
        with pytest.raises(TrainingError, match=said):
            parse(toml(dataclasses.replace(denoiser_recipe(), **change)), DenoiserRecipe, "recipe")  # type: ignore[arg-type]


def test_floats_may_be_written_as_whole_numbers() -> None:
    recipe = parse(RECIPE.replace("learning_rate = 0.001", "learning_rate = 1"), AutoencoderRecipe, "recipe")
    assert type(recipe.schedule.learning_rate) is float


# Folders


def test_captions_come_from_file_names_or_from_a_file(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    data = FolderData(folder, 32, lambda line: None)
    captions = {data.item(i, 0)[1] for i in range(data.num_items)} | {data.held_out_pairs(9)[0][1]}
    assert captions == {f"a {colour} square" for colour in ("red", "green", "blue", "white", "black", "yellow")}
    lines = [{"file": path.name, "caption": f" number  {n} "} for n, path in enumerate(sorted(folder.glob("*.png")))]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = FolderData(folder, 32, lambda line: None)
    assert {data.item(i, 0)[1] for i in range(data.num_items)} <= {f"number {n}" for n in range(6)}


def test_a_folder_gives_the_same_batches_and_holds_pictures_back(tmp_path: Path) -> None:
    one, two = (FolderData(pictures(tmp_path), 32, lambda line: None) for _ in range(2))
    assert one.batch(0, 3, 0, 8) == two.batch(0, 3, 0, 8)
    held = one.held_out(100)
    assert len(held) == 1 and one.num_items == 5 and held[0] not in [one.item(i, 0)[0] for i in range(5)]
    assert one.item(2, 1) == two.item(2, 1)


def test_mixed_sizes_become_squares(tmp_path: Path) -> None:
    for name, size in (("small", (5, 9)), ("wide", (300, 40)), ("tall", (33, 100)), ("same", (32, 32))):
        picture(tmp_path / f"{name}.png", size)
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    data = FolderData(tmp_path, 32, lambda line: None)
    made = [data.item(i, n)[0] for i in range(data.num_items) for n in range(3)] + data.held_out(5)
    assert {image.size for image in made} == {(32, 32)} and {image.mode for image in made} == {"RGB"}
    assert any(image.getpixel((3, 3)) == (255, 255, 255) for image in made)  # what was transparent is white


def test_what_cannot_be_used_is_named_and_left_out(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n no picture")
    whole = (folder / "a_red_square-0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) - 20])
    picture(folder / "007.png")
    (folder / "notes.txt").write_text("not a picture")
    said: list[str] = []
    assert FolderData(folder, 32, said.append).num_items == 5
    assert sorted(line.split(":")[0] for line in said) == ["left out 007.png", "left out broken.png", "left out cut.png"]
    assert any("its caption is empty" in line for line in said)
    said.clear()
    assert FolderData(folder, 32, said.append, need_captions=False).num_items == 6  # an autoencoder needs no captions


def test_many_broken_pictures_are_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    for number in range(30):
        (folder / f"broken {number}.png").write_bytes(b"")
    said: list[str] = []
    FolderData(folder, 32, said.append)
    assert len(said) == 21 and said[-1] == "left out 10 more"


@pytest.mark.parametrize("count", [0, 1])
def test_folders_with_too_few_pictures_are_refused(count: int, tmp_path: Path) -> None:
    pictures(tmp_path, count)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=rf"{count} usable pictures, at least 2 are needed \(1 left out\)"):
        FolderData(tmp_path, 32, lambda line: None)


@pytest.mark.parametrize("line", ["no json", '{"file": "a.png"}', '{"file": "a.png", "caption": 3}', "[]"])
def test_a_broken_line_of_captions_is_refused(line: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "a_red_square-0.png", "caption": "red"}\n' + line)
    with pytest.raises(TrainingError, match=r"captions\.jsonl, line 2"):
        FolderData(tmp_path, 32, lambda line: None)


# The command line


@pytest.fixture(autouse=True)
def few_pictures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (autoencoder, denoiser):
        monkeypatch.setattr(module, "NUM_MEASURED", 4)
        monkeypatch.setattr(module, "NUM_SHOWN", 2)


def call(*args: object, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, ["train", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.stderr


def test_autoencoder_and_denoiser_from_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (tmp_path / "a.toml").write_text(RECIPE)
    (tmp_path / "d.toml").write_text(toml(denoiser_recipe()))
    first = call("autoencoder", tmp_path / "a.toml", "--data", folder, "--out", tmp_path / "a", "--threads", 1)
    assert "step 8/8" in first and "images_per_s" in first and f"the model is in {tmp_path / 'a'}" in first
    vae = tmp_path / "a" / "autoencoder"
    second = call("denoiser", tmp_path / "d.toml", "--data", folder, "--autoencoder", vae, "--out", tmp_path / "d")
    assert "held_out_loss" in second and (tmp_path / "d" / "denoiser" / "config.json").exists()
    again = call("denoiser", tmp_path / "d.toml", "--data", folder, "--autoencoder", vae, "--out", tmp_path / "d")
    assert "going on at step 8 of 8" in again


def test_check_reads_a_built_data_set(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    assert "nothing that is held out is among them" in call("check", folder, "--compositions", 2)
    (folder / "sprites" / "flat" / "2.png").write_bytes(b"")
    assert "cannot be read" in call("check", folder, code=2)


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    options = ("--data", folder, "--out", tmp_path / "out")
    (tmp_path / "a.toml").write_text(RECIPE)
    (tmp_path / "d.toml").write_text(toml(denoiser_recipe()))
    told = {
        "come with latentline: emoji-autoencoder, emoji-denoiser, emoji-distill, emoji-lora": (
            "autoencoder",
            "none.toml",
            *options,
        ),
        "no such folder": ("autoencoder", tmp_path / "a.toml", "--data", tmp_path / "none", "--out", tmp_path / "out"),
        "no training's state is there": ("export", tmp_path, tmp_path / "weights"),
        "device nonsense": ("autoencoder", tmp_path / "a.toml", *options, "--device", "nonsense"),
        "no AutoencoderTiny in diffusers format": ("autoencoder", tmp_path / "a.toml", *options, "--init", folder),
        "no autoencoder in diffusers format": ("denoiser", tmp_path / "d.toml", *options, "--autoencoder", folder),
    }
    for said, args in told.items():
        (line,) = call(*args, code=2).splitlines()
        assert line.startswith("latentline: ") and said in line


def test_the_recipes_of_the_package_are_whole() -> None:
    from latentline_worker.training.inputs import find_recipe

    assert find_recipe("emoji-autoencoder", AutoencoderRecipe).model["class"] == "AutoencoderTiny"
    bundled = find_recipe("emoji-denoiser", DenoiserRecipe)
    assert bundled.prediction == "flow" and set(bundled.model) >= set(TINY_DENOISER)
    assert Run(Path("out")).prepare().type in ("cpu", "cuda")
