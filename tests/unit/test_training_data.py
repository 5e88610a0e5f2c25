"""The training data: words, splits, compositions, pictures, the builder and the check for leaks."""

from __future__ import annotations

import colorsys
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import missing
from PIL import Image, ImageDraw
from support.training import LABELS, write_data

from latentline_worker.training import build, splits
from latentline_worker.training.compositions import Catalogue, Composition, Sprite, Thing
from latentline_worker.training.concepts import OBJECT_COLOURS, counted_words, is_plural, make_concept, object_words, plural
from latentline_worker.training.errors import TrainingError
from latentline_worker.training.manifest import HELD_BACK_STYLE, KINDS, find_leaks, held_out, load_catalogue, load_sprites
from latentline_worker.training.pictures import grey_share, recolour, render
from latentline_worker.training.sources import BuiltData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def catalogue_of(*labels: str) -> Catalogue:
    return Catalogue([Sprite(make_concept(f"{n}", label), "3d", f"{n}.png", 0.0, "train") for n, label in enumerate(labels)])


def disc(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, 159, 159), (*colour, 255))
    return image


# Words


@pytest.mark.parametrize(
    ("label", "noun", "colour", "can_recolour"),
    [
        ("red apple", "apple", "red", True),
        ("rocket", "rocket", None, True),
        ("light blue heart", "light blue heart", None, False),
        ("two o’clock", "clock showing two o'clock", None, True),
        ("high voltage", "lightning bolt", None, True),
    ],
)
def test_a_label_becomes_a_noun_and_a_colour(label: str, noun: str, colour: str | None, can_recolour: bool) -> None:
    concept = make_concept("0", label)
    assert (concept.noun, concept.own_colour, concept.can_recolour) == (noun, colour, can_recolour)
    assert make_concept("0", concept.label) == concept  # labels in a manifest are read in the same way


@pytest.mark.parametrize(
    ("noun", "one", "three"),
    [
        ("apple", "an apple", "three apples"),
        ("unicorn", "a unicorn", "three unicorns"),
        ("face with tears of joy", "a face with tears of joy", "three faces with tears of joy"),
        ("mouse", "a mouse", "three mice"),
        ("butterfly", "a butterfly", "three butterflies"),
        ("bus", "a bus", "three buses"),
        ("rhinoceros", "a rhinoceros", "three rhinoceroses"),
        ("hourglass", "an hourglass", "three hourglasses"),
    ],
)
def test_articles_and_plurals(noun: str, one: str, three: str) -> None:
    assert object_words(noun, None) == one
    assert counted_words(noun, None, 3) == three
    assert counted_words(noun, "red", 2) == f"two red {plural(noun)}"


def test_what_is_plural_already_takes_no_article() -> None:
    assert is_plural("grapes") and object_words("grapes", "green") == "green grapes"


# Splits


def test_splits_are_final() -> None:
    """Another answer to any of these means that models trained so far have seen held-out data: train anew."""
    keys = ["noun|otter", "noun|llama", "colour|rocket|blue", "scene|cup|red|green", "place|key|left", "count|bell|3", "pair|bell|key"]
    many = [splits.split_of_key(f"{kind}|{n}") for kind in splits.HELD_OUT for n in range(400)]
    assert [splits.split_of_key(key) for key in keys] == SPLITS_OF_KEYS
    assert (many.count("test"), many.count("validation")) == COUNTS


SPLITS_OF_KEYS = ["test", "validation", "train", "train", "train", "train", "train"]
COUNTS = (160, 84)


def test_core_names_and_plain_prompts_stay_in_training() -> None:
    assert {"rocket", "cat", "alarm clock"} <= splits.core_names()
    assert all(splits.split_of_noun(name, [name]) == "train" for name in splits.core_names())
    catalogue = catalogue_of(*LABELS)
    for sprite in catalogue.sprites:
        thing = Thing(sprite, None)
        assert catalogue.keys(Composition("single", (thing,), "white", None, 1, "")) in ([], [f"scene|apple|{thing.said_colour}|white"])


def test_a_colour_that_artwork_has_by_nature_is_never_held_out() -> None:
    catalogue = catalogue_of("red apple", "green apple")
    green_made_red = Composition("single", (Thing(catalogue.sprites[1], "red"),), "blue", None, 1, "")
    made_blue = Composition("single", (Thing(catalogue.sprites[1], "blue"),), "blue", None, 1, "")
    assert catalogue.keys(green_made_red) == ["scene|apple|red|blue"]
    assert catalogue.keys(made_blue) == ["colour|apple|blue", "scene|apple|blue|blue"]


def test_the_strictest_split_wins() -> None:
    assert splits.split_of([], ["train"]) == "train"
    assert splits.split_of([], ["validation", "train"]) == "validation"
    assert splits.split_of([], ["validation", "test"]) == "test"


# Compositions


def test_drawing_depends_on_the_generator_alone_and_stays_in_its_split(folder: Path) -> None:
    catalogue = load_catalogue(folder)
    trained = [sprite for sprite in catalogue.sprites if sprite.split == "train"]
    for number in range(200):
        drawn = [catalogue.draw(trained[number % len(trained)], random.Random(number)) for _ in range(2)]
        assert drawn[0] == drawn[1] and catalogue.split(drawn[0]) == "train"


def test_a_held_out_sprite_has_no_training_picture(folder: Path) -> None:
    catalogue = load_catalogue(folder)
    otter = next(sprite for sprite in catalogue.sprites if sprite.concept.noun == "otter")
    assert otter.split == "test"
    with pytest.raises(LookupError, match="no train picture"):
        catalogue.draw(otter, random.Random(0))


def test_captions_say_what_is_drawn(folder: Path) -> None:
    catalogue = load_catalogue(folder)
    rocket = next(sprite for sprite in catalogue.sprites if sprite.concept.noun == "rocket" and sprite.style == "flat")
    for number in range(300):
        made = catalogue.draw(rocket, random.Random(number))
        assert ("rocket" in made.caption) and made.caption.endswith(", flat style")
        assert (f" {made.background} background" in made.caption) or made.background == "white"
        assert all(thing.colour is None or thing.colour in made.caption for thing in made.things)
        assert made.layout != "pair" or f" {made.place} " in made.caption
        assert made.layout != "placed" or "small" in made.caption
        assert made.count == 1 or "rockets" in made.caption


def test_held_out_prompts_are_always_the_same_and_of_trained_things(folder: Path) -> None:
    catalogue = load_catalogue(folder)
    for layout in KINDS:
        first, second = (held_out(catalogue, "test", layout, 5) for _ in range(2))
        assert first == second and len({one.caption for one in first}) == 5
        assert all(one.layout == layout and catalogue.split(one) == "test" and one.things[0].sprite.split == "train" for one in first)


# Pictures


@pytest.mark.parametrize("colour", OBJECT_COLOURS)
def test_recolouring_gives_the_hue_also_to_dull_artwork(colour: str) -> None:
    r, g, b, alpha = np.asarray(recolour(disc((110, 80, 60)), colour))[80, 80] / 255
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    assert abs((hue * 360 - OBJECT_COLOURS[colour] + 180) % 360 - 180) < 3
    assert saturation > 0.55 and value > 0.65 and alpha == 1


def test_grey_pixels_keep_their_grey() -> None:
    grey = disc((120, 120, 125))
    assert grey_share(grey) == 1.0 and grey_share(disc((200, 30, 30))) == 0.0
    assert recolour(grey, "red") == grey


@pytest.mark.parametrize(("place", "axis", "low"), [("left", 1, True), ("right", 1, False), ("top", 0, True), ("bottom", 0, False)])
def test_a_placed_object_stands_where_the_caption_says(place: str, axis: int, low: bool) -> None:
    thing = Thing(catalogue_of("rocket").sprites[0], None)
    image = render(Composition("placed", (thing,), "white", place, 1, ""), {"0.png": disc((200, 0, 0))}, 64, random.Random(0))
    middle = np.argwhere(np.asarray(image)[..., 1] < 100)[:, axis].mean()
    assert (middle < 24) if low else (middle > 40)


@pytest.mark.parametrize(("relation", "red_first"), [("left of", True), ("right of", False), ("above", True), ("below", False)])
def test_pairs_stand_as_the_caption_says(relation: str, red_first: bool) -> None:
    red, green = (Thing(sprite, None) for sprite in catalogue_of("rocket", "key").sprites)
    sprites = {"0.png": disc((200, 0, 0)), "1.png": disc((0, 200, 0))}
    pixels = np.asarray(render(Composition("pair", (red, green), "blue", relation, 1, ""), sprites, 64, random.Random(0))).astype(int)
    axis = 1 if relation in ("left of", "right of") else 0
    where_red = np.argwhere(pixels[..., 0] > pixels[..., 2] + 50)[:, axis].mean()
    where_green = np.argwhere((pixels[..., 1] > 150) & (pixels[..., 2] < 100))[:, axis].mean()
    assert bool(where_red < where_green) is red_first


@pytest.mark.parametrize("count", [2, 3, 4])
def test_groups_do_not_overlap(count: int) -> None:
    thing = Thing(catalogue_of("rocket").sprites[0], None)
    for seed in range(20):
        image = render(Composition("count", (thing,), "white", None, count, ""), {"0.png": disc((0, 0, 0))}, 64, random.Random(seed))
        mask = np.asarray(image)[..., 0] < 60
        assert _components(mask) == count


def _components(mask: np.ndarray[Any, Any]) -> int:
    todo, number = {tuple(place) for place in np.argwhere(mask)}, 0
    while todo:
        number += 1
        front = [todo.pop()]
        while front:
            y, x = front.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & todo
            todo -= near
            front += near
    return number


# Leaks


def every(folder: Path) -> list[Composition]:
    source = BuiltData(folder, 32)
    return [source.composition(index, number) for number in range(4) for index in range(source.num_items)]


def test_a_clean_data_set_has_no_leaks(folder: Path) -> None:
    assert find_leaks(folder, every(folder)) == []


def test_leaks_are_named(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    trained = every(folder)
    catalogue = load_catalogue(folder)
    (secret,) = held_out(catalogue, "test", "pair", 1)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    otter = next(line for line in lines if line["label"] == "otter" and line["style"] == "flat")
    rocket = next(line for line in lines if line["label"] == "rocket" and line["style"] == "flat")
    otter["split"] = "train"  # its other styles are in the test
    (folder / rocket["file"]).write_bytes(b"another picture")
    banana, llama = (next(line for line in lines if line["label"] == name and line["style"] == "3d") for name in ("banana", "otter"))
    banana["sha256"] = llama["sha256"]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    leaks = "\n".join(find_leaks(folder, [*trained, secret]))
    assert "noun otter stands in test and train" in leaks
    assert f"{rocket['file']} is not the file" in leaks
    assert f"picture {llama['sha256']} stands in test and train" in leaks
    assert f"the test combination {secret.caption!r} is trained" in leaks


def test_a_training_caption_that_is_a_test_prompt_is_named(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    trained = every(folder)
    (folder / "prompts-test.jsonl").write_text(json.dumps({"prompt": trained[0].caption}) + "\n")
    assert any("is a training caption" in leak for leak in find_leaks(folder, trained))


def test_broken_data_sets_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"manifest\.jsonl cannot be read .*latentline train data"):
        load_catalogue(tmp_path)
    folder = write_data(tmp_path)
    catalogue = load_catalogue(folder)
    (folder / catalogue.sprites[3].file).write_bytes(b"\x89PNG broken")
    with pytest.raises(TrainingError, match=catalogue.sprites[3].file):
        load_sprites(folder, catalogue)


# The builder


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def packages(folder: Path) -> Path:
    """The three packages with two concepts, a person, and something that one set lacks."""
    folder.mkdir()
    webp = io.BytesIO()
    disc((200, 40, 40)).save(webp, "WEBP")
    labels = {"1F34E": ("red apple", 4), "2764-FE0F": ("red heart", 0), "1F9D1": ("person", 1), "1F680": ("rocket", 5)}
    entries = [{"hexcode": code, "label": label, "group": group} for code, (label, group) in labels.items()]
    archive(folder / "emojibase-data-17.0.0.tgz", {"en/data.json": json.dumps(entries).encode()})
    codes = [code.lower() for code in labels]
    archive(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {f"assets/{code}.webp": webp.getvalue() for code in codes if code != "1f680"})
    body = '<circle cx="16" cy="16" r="10" fill="#c00"/>'
    icons = {"icons": {code: {"body": body} for code in codes}, "chars": {code: code for code in codes}, "width": 32, "height": 32}
    sets = {f"json/{name}.json": json.dumps(icons).encode() for name, _ in build.ICON_SETS.values()}
    archive(folder / "iconify-json-2.2.535.tgz", sets)
    return folder


def test_the_builder_writes_what_stands_in_all_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        missing("resvg-py")
    monkeypatch.setattr(build, "write_prompts", lambda folder, catalogue: None)  # two concepts have too few pairs
    build.build(tmp_path / "data", lambda line: None, packages(tmp_path / "packages"))
    rows = [json.loads(line) for line in (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {"red apple", "red heart"}
    assert {(row["style"], row["licence"]) for row in rows} == {
        ("3d", "MIT"), ("flat", "MIT"), ("cartoon", "Apache-2.0"), (HELD_BACK_STYLE, "CC-BY-4.0"),
    }  # fmt: skip
    assert {row["split"] for row in rows if row["style"] == HELD_BACK_STYLE} == {"lora"}
    for row in rows:
        with Image.open(tmp_path / "data" / row["file"]) as image:
            assert image.size == (160, 160) and image.mode == "RGBA" and image.getpixel((80, 80))[0] > 150
    assert rows[0]["caption"] == "a red apple, 3d style" and rows[0]["grey"] == 0.0 and len(rows[0]["sha256"]) == 64


def test_a_package_without_its_files_is_named(tmp_path: Path) -> None:
    archive(packages(tmp_path / "packages") / "iconify-json-2.2.535.tgz", {"json/noto.json": b"{}"})
    with pytest.raises(TrainingError, match=r"iconify-json-2\.2\.535\.tgz holds no package/json/fluent-emoji-flat\.json"):
        build.build(tmp_path / "data", lambda line: None, tmp_path / "packages")


def test_without_npm_the_builder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match="npm is needed"):
        build.build(tmp_path / "data", lambda line: None)
