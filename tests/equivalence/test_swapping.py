"""Models of a file that do not fit together: refused, measured, exchanged, and the same to the bit when they come back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from support.engines import run, work
from support.tiny import tiny_pipeline
from support.tiny_families import TINY

from latentline.errors import ConfigurationError, ModelError
from latentline_worker.engine import residents
from latentline_worker.generate.loading import Loader, start
from latentline_worker.models import catalog, weights
from latentline_worker.models.catalog import ModelEntry
from latentline_worker.settings import WorkerSettings

NAMES = ("one", "two", "flow")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, pipeline in zip(NAMES, (tiny_pipeline(), tiny_pipeline("v_prediction"), TINY["sd3"]()), strict=True):
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def sizes(folders: dict[str, Path]) -> dict[str, int]:
    """Bytes of the models' weights, by the heads of their files."""
    return {name: weights.of_files(ModelEntry(source=str(folder)), torch.float32) for name, folder in folders.items()}


def settings(path: Path, folders: dict[str, Path], weights_bytes: int) -> WorkerSettings:
    path.write_text(f"weights_mb = {weights_bytes / 2**20}\n")
    for name, folder in folders.items():
        catalog.append(path, ModelEntry(source=str(folder), id=name))
    return WorkerSettings(models=path)


@pytest.mark.parametrize("name", sorted(TINY))
def test_weights_are_counted_from_the_heads_of_the_files(name: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path / name)
    entry = ModelEntry(source=str(tmp_path / name))
    family = Loader(WorkerSettings(), {name: entry}).load(name)
    counted, loaded = weights.of_files(entry, torch.float32), weights.of_family(family)
    assert 0.95 * loaded <= counted <= 1.05 * loaded
    assert weights.of_files(entry, torch.bfloat16) == counted / 2


def test_the_bundled_model_is_counted_as_it_is_loaded() -> None:
    entry = ModelEntry(source="latentline-emoji")
    family = Loader(WorkerSettings(), {entry.source: entry}).load(entry.source)
    loaded = weights.of_family(family)
    assert 0.95 * loaded <= weights.of_files(entry, torch.float32) <= 1.05 * loaded


def test_a_model_that_does_not_fit_alone_is_refused_by_name(folders: dict[str, Path], sizes: dict[str, int], tmp_path: Path) -> None:
    largest = max(sizes, key=lambda name: sizes[name])
    allowed = sizes[largest] - 1
    with pytest.raises(ConfigurationError) as refused:
        start(settings(tmp_path / "models.toml", folders, allowed))
    needed = f"its weights need {sizes[largest]:,} bytes, also when it is alone in memory; allowed: "
    said = f"models.{NAMES.index(largest)}: {largest}: {needed}"
    assert refused.value.message.startswith(said) and "weights_mb = " in refused.value.message


def test_a_file_that_is_cut_off_is_refused_before_anything_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = dict(folders)
    tiny_pipeline().save_pretrained(tmp_path / "cut")
    broken["one"] = tmp_path / "cut"
    weights_file = next((tmp_path / "cut" / "unet").glob("*.safetensors"))
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        start(settings(tmp_path / "models.toml", broken, 10**9))


def test_all_models_stay_where_they_fit(folders: dict[str, Path], sizes: dict[str, int], tmp_path: Path) -> None:
    roster, engine, _ = start(settings(tmp_path / "models.toml", folders, sum(sizes.values()) + 100))
    assert roster.all_fit and roster.said().cold == () and set(engine.families) == set(NAMES)


def test_a_model_that_went_and_came_back_gives_the_same_picture_to_the_bit(
    folders: dict[str, Path], sizes: dict[str, int], tmp_path: Path
) -> None:
    """The first models of the file are in memory at first; what leaves is let go of, with all that refers to it."""
    roster, engine, loader = start(settings(tmp_path / "models.toml", folders, sum(sizes.values()) - 100))
    assert roster.said().cold == ("flow",) and set(engine.families) == {"one", "two"}
    assert set(engine.memory.footprints) == set(NAMES), "each was measured"

    def picture(model: str) -> torch.Tensor:
        with roster.use(model) as family:
            (request,) = run(engine, work(family, seeds=(7,), decode=True))
        return request.result(0)

    def exchange(old: str, new: str) -> None:
        left = [weakref.ref(tensor) for tensor in engine.families[old].lora_target().modules[unet(old)].parameters()]
        assert left and roster.take_out(old)
        residents.remove(engine, old)
        gc.collect()
        assert not any(one() is not None for one in left), "weights of a model that has left are still in memory"
        assert not [key for key in engine.lanes if key.model == old]
        family = loader.load(new)
        residents.add(engine, family)
        roster.put_in(new, family, weights.of_family(family), swapped=True)

    def unet(model: str) -> str:
        return "transformer" if model == "flow" else "unet"

    before = picture("one")
    exchange("one", "flow")
    flow = picture("flow")
    exchange("two", "one")
    assert picture("one").equal(before)
    exchange("flow", "two")
    exchange("one", "flow")
    assert picture("flow").equal(flow)
    assert roster.said().swaps == {"flow": 2, "one": 1, "two": 1}


def test_a_model_with_unfinished_requests_is_not_let_go(folders: dict[str, Path], tmp_path: Path) -> None:
    roster, engine, _ = start(settings(tmp_path / "models.toml", folders, 10**9))
    with roster.use("one") as family:
        engine.submit(work(family))
        with pytest.raises(RuntimeError, match="one: has unfinished requests"):
            residents.remove(engine, "one")
