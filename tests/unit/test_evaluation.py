"""The evaluation: it tells right pictures from wrong ones, chooses on the validation prompts alone, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from support.training import LABELS, TINY_AUTOENCODER, TINY_DENOISER, write_data

from latentline.cli import main
from latentline_worker.evaluation import ceilings, commands, drawing, sweeps
from latentline_worker.evaluation.drawing import Model, Settings
from latentline_worker.evaluation.errors import EvaluationError
from latentline_worker.evaluation.foreground import background_rgb, cells, count_objects, cut_out, foreground
from latentline_worker.evaluation.hog import hog
from latentline_worker.evaluation.intervals import mean, share
from latentline_worker.evaluation.likeness import kid, nearest, picture_features, spread_of_prompts, spread_of_seeds
from latentline_worker.evaluation.measures import Seen, look
from latentline_worker.evaluation.probe import PATH, SIDE_PX, Probe, features, fit, load, save
from latentline_worker.evaluation.prompts import Prompt, load_prompts
from latentline_worker.evaluation.reconstruction import psnr_db
from latentline_worker.evaluation.results import by_layout, figures_of
from latentline_worker.evaluation.sweeps import Choice, Point, choose
from latentline_worker.training import distill
from latentline_worker.training.autoencoder import make_model
from latentline_worker.training.objectives import make_scheduler
from latentline_worker.training.sources import BuiltData
from latentline_worker.training.text import load_minilm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(folder: Path) -> BuiltData:
    return BuiltData(folder, 128)


@pytest.fixture(scope="module")
def tests(folder: Path, source: BuiltData) -> list[Prompt]:
    return load_prompts(folder, "test", source.catalogue)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, as diffusers keeps one."""
    tokenizer, encoder = load_minilm()
    vae, unet = make_model(TINY_AUTOENCODER, 0), make_model(TINY_DENOISER, 0)
    path = tmp_path_factory.mktemp("model")
    parts = (vae, encoder, tokenizer, unet, make_scheduler("flow"))
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(path)
    return path


def quiet(line: str) -> None:
    pass


def board(*discs: tuple[float, float, float], background: str = "white", colour: str = "red") -> Any:
    """A picture with discs of (radius, x, y), in shares of its side."""
    image = Image.new("RGB", (128, 128), background)
    for radius, x, y in discs:
        box = [128 * (x - radius), 128 * (y - radius), 128 * (x + radius), 128 * (y + radius)]
        ImageDraw.Draw(image).ellipse(box, fill=colour)
    return np.asarray(image)


# What a picture shows


def test_the_frozen_probe_knows_real_pictures_of_held_out_combinations(source: BuiltData, tests: list[Prompt], probe: Probe) -> None:
    """The shapes that tests draw are no emoji: the words of the measures are tested here, the probe's figures by its ceilings."""
    real = ceilings.renders(tests, source)
    figures = figures_of([look(real, tests, probe)])
    assert figures["background"].mean > 0.99 and figures["place"].mean > 0.95 and figures["count"].mean > 0.95
    assert {noun for prompt in tests for noun in prompt.nouns} <= set(probe.nouns)


def test_a_picture_of_something_else_is_found_out(source: BuiltData, tests: list[Prompt], probe: Probe) -> None:
    """Each prompt is shown the picture of the next one of its kind that differs."""
    placed = [prompt for prompt in tests if prompt.composition.layout == "placed"][:40]
    real = ceilings.renders(placed, source)
    shifted = np.roll(real, 1, axis=0)
    wrong = [
        (seen, asked.composition, shown.composition)
        for seen, asked, shown in zip(look(shifted, placed, probe), placed, [placed[-1], *placed[:-1]], strict=True)
    ]
    assert all(seen.place == (asked.place == shown.place) for seen, asked, shown in wrong)
    assert all(seen.background == (asked.background == shown.background) for seen, asked, shown in wrong)


def test_smaller_pictures_are_measured_as_well(folder: Path, probe: Probe) -> None:
    small = BuiltData(folder, 64)
    prompts = load_prompts(folder, "test", small.catalogue, limit=160)
    figures = figures_of([look(ceilings.renders(prompts, small), prompts, probe)])
    assert figures["count"].mean > 0.9 and figures["background"].mean > 0.95 and figures["place"].mean > 0.9


def test_objects_are_counted_apart() -> None:
    assert count_objects(foreground(board((0.4, 0.5, 0.5)))) == 1
    assert count_objects(foreground(board((0.2, 0.25, 0.5), (0.2, 0.75, 0.5)))) == 2
    assert count_objects(foreground(board((0.18, 0.25, 0.75), (0.18, 0.75, 0.75), (0.18, 0.5, 0.25)))) == 3
    assert count_objects(foreground(board((0.2, 0.25, 0.5), (0.02, 0.75, 0.5)))) == 1  # a speck is no object
    assert count_objects(foreground(board((0.3, 0.5, 0.5), (0.05, 0.26, 0.26)))) == 1  # a part within the box of another
    assert count_objects(foreground(board())) == 0


def test_objects_are_cut_out_of_any_background() -> None:
    one, two = (board((0.2, 0.3, 0.5), background=colour) for colour in ("white", "#468ce6"))
    cuts = [cut_out(pixels, foreground(pixels), (slice(0, 128), slice(0, 128)), 64) for pixels in (one, two)]
    assert np.array_equal(*cuts) and tuple(cuts[0][0, 0]) == (128, 128, 128) and tuple(cuts[0][32, 32]) == (255, 0, 0)
    assert tuple(background_rgb(two)) == (70, 140, 230)
    empty = board()
    assert (cut_out(empty, foreground(empty), (slice(0, 64), slice(0, 64)), 64) == 128).all()


def test_cells_follow_the_words(tests: list[Prompt]) -> None:
    pair = next(prompt for prompt in tests if prompt.composition.layout == "pair").composition
    low, high, whole = slice(0, 64), slice(64, 128), slice(0, 128)
    expected = {
        "left of": [(whole, low), (whole, high)], "right of": [(whole, high), (whole, low)],
        "above": [(low, whole), (high, whole)], "below": [(high, whole), (low, whole)],
    }  # fmt: skip
    for place, wanted in expected.items():
        assert cells(dataclasses.replace(pair, place=place), 128) == wanted
    assert [len(cells(dataclasses.replace(pair, layout="count", count=n), 128)) for n in (2, 3, 4)] == [2, 3, 4]


def test_the_order_of_two_things_is_read(source: BuiltData, tests: list[Prompt]) -> None:
    """With a probe that knows the drawn shapes: the same picture, asked for the other way round, is wrong."""
    singles = [prompt for prompt in tests if prompt.composition.layout == "single"]
    pairs = [prompt for prompt in tests if prompt.composition.layout == "pair"]
    singles += [
        Prompt(1000 + n, dataclasses.replace(singles[0].composition, things=(thing,), background="white"))
        for n, thing in enumerate(thing for pair in pairs for thing in pair.composition.things)
    ]
    pictures = ceilings.renders(singles, source)
    objects = np.stack([cut_out(p, foreground(p), (slice(0, 128), slice(0, 128)), SIDE_PX) for p in pictures])
    known = fit(features(objects), [prompt.nouns[0] for prompt in singles], 0.1)
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    other = [Prompt(p.number, dataclasses.replace(p.composition, place=turned[str(p.composition.place)])) for p in pairs]
    right, wrong = (look(ceilings.renders(pairs, source), asked, known) for asked in (pairs, other))
    assert np.mean([seen.order for seen in right]) > 0.7 > 0.3 > np.mean([seen.order for seen in wrong])


def test_edges_have_no_colour_and_no_brightness() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 64, 64, generator=generator)
    found = hog(torch.cat([picture, 0.2 + 0.5 * picture, 1 - picture]))
    assert found.shape == (3, 7 * 7 * 36)
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0.1)
    torch.testing.assert_close(found[0], found[2])
    turned = hog(picture.transpose(1, 2))
    assert (found[0] - turned[0]).abs().mean() > 0.01


# The probe


def test_another_probe_is_refused(tmp_path: Path, probe: Probe) -> None:
    sha256 = save(probe, tmp_path / "same")
    assert torch.equal(load(tmp_path / "same", sha256).weights, probe.weights)
    other = Probe(probe.nouns, probe.weights + 0.001)
    save(other, tmp_path / "other")
    with pytest.raises(EvaluationError, match=r"its SHA-256 is \w+, the frozen probe's is 62c916f9"):
        load(tmp_path / "other")
    with pytest.raises(EvaluationError, match="cannot be read"):
        load(tmp_path / "none")
    with pytest.raises(EvaluationError, match="does not know 'phlogiston'"):
        probe.index("phlogiston")
    assert PATH.stat().st_size < 4e6


# Figures


def test_intervals_are_those_of_the_books() -> None:
    """Wilson for 8 of 10: 0.490 to 0.943; at the ends the interval stays open to one side."""
    figure = share([1.0] * 8 + [0.0] * 2)
    assert (round(figure.low, 3), round(figure.high, 3)) == (0.490, 0.943)
    assert share([1.0] * 100).high > 0.9999 and 0.95 < share([1.0] * 100).low < 0.97
    drawn = mean([float(n) for n in range(100)])
    assert drawn.low < 49.5 < drawn.high and 10 < drawn.high - drawn.low < 13


def test_a_prompt_counts_once_whatever_its_seeds(tests: list[Prompt]) -> None:
    good = Seen((0,), True, 1.0, None, None, None)
    bad = Seen((7,), False, None, True, None, None)
    figures = figures_of([[good, bad], [bad, bad]])
    assert (figures["R@1"].mean, figures["R@1"].num) == (0.25, 2)
    assert (figures["object colour"].mean, figures["object colour"].num) == (1.0, 1)  # only those that were asked
    assert "place" not in figures and figures["count"].num == 2
    rows = by_layout(tests[:2], [[good, bad]])
    assert [row.figures["R@1"].num for row in rows] == [2] and rows[0].name == "one large object"


def test_kernel_distance_is_zero_for_equal_and_large_for_other_pictures(source: BuiltData, tests: list[Prompt]) -> None:
    one, two = (picture_features(ceilings.renders(tests, source, purpose)) for purpose in ("real", "again"))
    noise = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), dtype=np.uint8)
    assert abs(kid(two, one)) < 0.01 < 1 < kid(picture_features(noise), one)
    assert 0 < np.mean(spread_of_seeds([one, two])) < spread_of_prompts(one)
    distances, places = nearest(one[:5], one)
    assert max(distances) < 1e-3 and places == [0, 1, 2, 3, 4]


def test_psnr() -> None:
    black, grey = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 16, np.uint8)
    assert psnr_db(grey, black)[0] == pytest.approx(24.05, abs=0.01)


# Choosing


def point(recall: float, **settings: Any) -> Point:
    return Point(dataclasses.replace(sweeps.FIRST, **settings), {"R@5": share([recall] * 10)})


def test_the_best_setting_and_the_fewest_steps_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    quality = {1.0: 0.2, 2.0: 0.7, 3.0: 0.6, 4.5: 0.5, 6.0: 0.1}
    by_steps = {4: 0.2, 8: 0.694, 12: 0.695, 20: 0.7, 50: 0.697}
    asked: list[Settings] = []

    def measured(model: object, prompts: object, probe: object, settings: Settings) -> Point:
        asked.append(settings)
        bonus = 0.05 if settings.sampler == "unipc" else 0.0
        return point(0.4 * (quality[settings.guidance] + bonus) + by_steps[settings.steps], **dataclasses.asdict(settings))

    class Stub:
        samplers, distilled = ("dpmpp_2m", "unipc"), False

    monkeypatch.setattr(sweeps, "_point", measured)
    choice = choose(Stub(), [], None, {})  # type: ignore[arg-type]
    assert choice.settings == Settings("unipc", 8, 2.0) and set(choice.sweeps) == {"guidance", "sampler", "steps"}
    assert len(asked) == 5 + 2 + 5
    fixed = choose(Stub(), [], None, {"steps": 4, "guidance": 1.0})  # type: ignore[arg-type]
    assert fixed == Choice(Settings("unipc", 4, 1.0), {"sampler": fixed.sweeps["sampler"]}, ("steps", "guidance"))


def test_of_a_distilled_model_only_the_steps_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        samplers, distilled = ("euler",), True

    monkeypatch.setattr(sweeps, "_point", lambda *args: Point(args[-1], {"R@5": share([min(args[-1].steps, 4) / 4] * 10)}))
    choice = choose(Stub(), [], None, {})  # type: ignore[arg-type]
    assert choice.settings == Settings("euler", 4, 1.0)
    assert [point.settings.steps for point in choice.sweeps["steps"]] == [1, 2, 4, 8] and len(choice.sweeps) == 1
    assert [choice.origin(name) for name in ("guidance", "sampler", "steps")] == ["the model's own", "the model's own", "chosen"]


# Drawing and the command


def test_pictures_are_those_of_a_stock_pipeline_and_are_drawn_once(
    model_folder: Path, tests: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(str(model_folder), tmp_path, "key", quiet, torch.device("cpu"))
    assert model.samplers == drawing.FLOW_SAMPLERS and model.size_px == 32
    settings = Settings("dpmpp_2m", 2, 3.0)
    drawn = model.draw("test", tests[:3], settings, 1)
    stock = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    words = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(1)}
    alone = np.asarray(stock(tests[2].words, **words).images[0])
    assert np.abs(drawn[2].astype(int) - alone).max() <= 1  # batches round otherwise
    (tmp_path / "pictures" / "test" / settings.name / "seed-1" / f"{tests[1].number:04}.png").unlink()
    asked: list[int] = []
    real = Model._draw

    def counted(self: Model, words: list[str], *rest: Any) -> Any:
        asked.append(len(words))
        return real(self, words, *rest)

    monkeypatch.setattr(Model, "_draw", counted)
    again = model.draw("test", tests[:3], settings, 1)
    assert asked == [1] and np.abs(again.astype(int) - drawn).max() <= 1
    with pytest.raises(EvaluationError, match="of another model or data set: use another folder"):
        Model(str(model_folder), tmp_path, "other", quiet, torch.device("cpu"))


def test_a_distilled_model_is_drawn_in_euler_steps(model_folder: Path, tests: list[Prompt], tmp_path: Path) -> None:
    folder = tmp_path / "distilled"
    shutil.copytree(model_folder, folder)
    distill.make_scheduler().save_pretrained(folder / "scheduler")
    model = Model(str(folder), tmp_path / "out", "key", quiet, torch.device("cpu"))
    assert model.distilled and model.samplers == ("euler",)
    drawn = model.draw("test", tests[:1], Settings("euler", 4, 1.0), 1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(tests[0].words, torch.device("cpu"), 1, False)
        size = model.size_px // pipeline.vae_scale_factor
        z = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
        for t in flow.timesteps:
            z = flow.step(pipeline.unet(z, t, text).sample, t, z).prev_sample
        pixels = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    (image,) = pipeline.image_processor.postprocess(pixels)
    assert np.abs(drawn[0].astype(int) - np.asarray(image)).max() <= 1


def call(*args: object, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, ["evaluate", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.mark.slow
def test_a_report_has_every_part_and_says_that_a_trial_is_one(
    model_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "GUIDANCES", (1.0, 3.0))
    monkeypatch.setattr(sweeps, "STEPS", (1, 2))
    monkeypatch.setattr(sweeps, "FIRST", Settings("dpmpp_2m", 2, 3.0))
    monkeypatch.setattr(drawing, "FLOW_SAMPLERS", ("dpmpp_2m", "unipc"))
    monkeypatch.setattr(ceilings.reconstructions, "__defaults__", (8,))
    options = ("--data", folder, "--out", tmp_path, "--prompts", 8, "--threads", 1)
    said = call(model_folder, *options)
    assert "drawing 8 of 8 pictures" in said
    page, figures = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert "A trial on few prompts, not a result" in page and "8 test prompts with seeds 0 to 3, all of them reported" in page
    for link in re.findall(r"\]\((\S+)\)", page):
        assert (tmp_path / link).stat().st_size > 0
    assert {
        "sweep-guidance.png",
        "sweep-sampler.png",
        "sweep-steps.png",
        "drawn.webp",
        "real.webp",
        "seeds.webp",
        "reconstructed.webp",
    } == set(re.findall(r"\]\((\S+)\)", page))
    assert figures["trial"] and figures["num_prompts"] == {"validation": 8, "test": 8} and figures["num_seeds"] == 4
    assert set(figures["measures"]) == {"model", "real renders", "real renders through the autoencoder"}
    assert set(figures["sweeps"]["guidance"]) == {"1.0", "3.0"} and len(figures["kernel_distance"]["the model, by seed"]) == 4
    assert figures["measures"]["model"]["R@1"]["num"] == 8
    again = call(model_folder, *options)
    assert "drawing" not in again and json.loads((tmp_path / "report.json").read_text()) == figures


def test_mistakes_end_in_one_line(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--data", folder, "--out", tmp_path / "out")
    told = {
        "no such model folder; allowed: a diffusers folder or latentline-emoji": (tmp_path / "none", *options),
        "no Stable Diffusion model in diffusers format": (folder, *options),
        "no built data set": (model_folder, "--data", tmp_path, "--out", tmp_path / "a"),
        "sampler: got 'euler'; allowed for this model: dpmpp_2m": (model_folder, *options, "--sampler", "euler"),
        "device nonsense": (model_folder, *options, "--device", "nonsense"),
    }
    for said, args in told.items():
        lines = [line for line in call(*args, code=2).splitlines() if line.startswith("latentline: ")]
        assert len(lines) == 1 and said in lines[0]


def test_a_broken_line_of_prompts_is_named(folder: Path, source: BuiltData, tmp_path: Path) -> None:
    (tmp_path / "prompts-test.jsonl").write_text('{"layout": "single"}\n')
    with pytest.raises(EvaluationError, match=r"prompts-test\.jsonl cannot be used"):
        load_prompts(tmp_path, "test", source.catalogue)
    part = load_prompts(folder, "test", source.catalogue, limit=8)
    assert {prompt.composition.layout for prompt in part} == {"single", "placed", "count", "pair"} and len(part) == 8


def test_a_full_disk_is_named(model_folder: Path, tests: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(str(model_folder), tmp_path, "key", quiet, torch.device("cpu"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(EvaluationError, match=r"pictures cannot be kept there: .*No space left"):
        model.draw("test", tests[:1], Settings("dpmpp_2m", 1, 1.0), 0)


def test_labels_of_the_tiny_data_set_are_emoji(probe: Probe) -> None:
    assert {label.removeprefix("red ").removeprefix("green ") for label in LABELS} <= set(probe.nouns)
    assert commands.SEEDS == (0, 1, 2, 3)
