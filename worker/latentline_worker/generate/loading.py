"""Loads the models onto their device and makes the engine for them."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping

import torch

from latentline.errors import ConfigurationError
from latentline.images import connect_s3
from latentline_worker.engine import residents
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.free_memory import free_bytes
from latentline_worker.engine.memory import USABLE
from latentline_worker.engine.warm_up import warm_up
from latentline_worker.images.store import TRIES
from latentline_worker.models import catalog, registry, weights
from latentline_worker.models.base import Family
from latentline_worker.models.catalog import Catalog, ModelEntry
from latentline_worker.models.lora import Bucket, Folder, Source
from latentline_worker.settings import WorkerSettings

from .roster import Member, Roster

log = logging.getLogger(__name__)

WEIGHTS_SHARE = 0.8  # of what is usable, for weights of several models together; the rest is for their jobs


def catalog_of(settings: WorkerSettings) -> Catalog:
    """What the settings say is served: the file's models, or the one model.

    Raises:
        ConfigurationError: the file cannot be read, or says something that has no meaning.
    """
    if settings.models is not None:
        return catalog.read(settings.models)
    return Catalog(models=(ModelEntry(source=settings.model, config=settings.config),))


class Loader:
    """Loads the configured models onto the one visible device, or onto the CPU."""

    def __init__(self, settings: WorkerSettings, entries: Mapping[str, ModelEntry]) -> None:
        self._settings, self._entries = settings, entries
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bucket = _bucket(settings)
        # Loading a model again must not wait for what the engine's thread has queued.
        self._stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    def check(self, model: str) -> int:
        """Bytes of a model's weights, from the heads of its files.

        Raises:
            ModelError: a file is missing or cut off.
        """
        return weights.of_files(self._entries[model], self._dtype(self._entries[model]))

    def load(self, model: str) -> Family:
        """Load a model with its adapters.

        Raises:
            ModelError: it is missing, damaged or of a kind that is not served; the message names the file or the field.
        """
        with torch.cuda.stream(self._stream):  # None: no other stream
            family = self._load(self._entries[model])
        if self._stream:
            self._stream.synchronize()
        return family

    def _load(self, entry: ModelEntry) -> Family:
        family = registry.load_entry(entry, self.device, self._dtype(entry))
        folder = entry.lora_dir or self._settings.lora_dir
        sources: list[Source] = [*([Folder(folder)] if folder else []), *([self._bucket] if self._bucket else [])]
        if sources:
            registry.add_adapters(family, sources, self._settings.lora_slots, self._settings.lora_rank)
        return family

    def _dtype(self, entry: ModelEntry) -> torch.dtype:
        name = entry.dtype or self._settings.dtype
        dtype: torch.dtype = getattr(torch, name if name != "auto" else _own_type(self.device))
        return dtype


def _bucket(settings: WorkerSettings) -> Bucket | None:
    if settings.lora_prefix is None:
        return None
    bucket, _, prefix = settings.lora_prefix.removeprefix("s3://").partition("/")
    s3 = connect_s3(settings, read_timeout_s=10, retries=TRIES)
    return Bucket(s3, bucket, prefix, settings.lora_cache.expanduser(), settings.lora_cache_mb << 20)


def _own_type(device: torch.device) -> str:
    """float32 on a CPU; on a GPU bfloat16 where it computes in it, since float16 may overflow, and float16 elsewhere."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def start(settings: WorkerSettings) -> tuple[Roster, Engine, Loader]:
    """The models, an engine that is warm and not started, and what loads the models again.

    Every model is loaded once, measured, and let go again where not all of them fit; the first ones of the file stay.

    Raises:
        ConfigurationError: the file that names the models cannot be read or says something that has no meaning, a model does not
            fit alone, or the fixed rows of the reproducible mode do not fit into memory.
        ModelError: a model is missing, damaged or of a kind that is not served; the message names the file or the field.
        OutOfMemory: not even one row of a model's own size fits.
    """
    found = catalog_of(settings)
    loader = Loader(settings, {entry.name: entry for entry in found.models})
    if settings.models is None:  # the one model, whatever it takes
        return *_keep_all(settings, [loader.load(found.models[0].name)]), loader
    usable = int(free_bytes(loader.device) * USABLE)
    sizes = {entry.name: loader.check(entry.name) for entry in found.models}
    budget = _budget(found, sizes, usable)
    if sum(sizes.values()) <= budget:
        return *_keep_all(settings, [loader.load(model) for model in sizes]), loader
    return *_take_turns(settings, found, loader, sizes, budget, usable), loader


def _budget(found: Catalog, sizes: Mapping[str, int], usable: int) -> int:
    """Bytes for the weights of models that are in memory together.

    Raises:
        ConfigurationError: one model needs more.
    """
    most, source = usable, "what this device has free"
    if found.weights_mb is not None:
        most, source = int(found.weights_mb * 2**20), f"weights_mb = {found.weights_mb:g}"
    for number, (model, size) in enumerate(sizes.items()):
        if size > most:
            problem = f"its weights need {size:,} bytes, also when it is alone in memory; allowed: {most:,} ({source})"
            raise ConfigurationError(f"models.{number}: {model}: {problem}")
    return most if found.weights_mb is not None else max(int(usable * WEIGHTS_SHARE), *sizes.values())


def _keep_all(settings: WorkerSettings, families: list[Family]) -> tuple[Roster, Engine]:
    engine = _engine(settings, families, limit_bytes=settings.memory_limit_mb and settings.memory_limit_mb << 20)
    engine.warm_up()
    return Roster.of(families), engine


def _take_turns(
    settings: WorkerSettings, found: Catalog, loader: Loader, sizes: Mapping[str, int], budget: int, usable: int
) -> tuple[Roster, Engine]:
    """Load and measure the last model of the file first, so that the first ones are in memory at the end."""
    limit = settings.memory_limit_mb << 20 if settings.memory_limit_mb else usable - budget
    members: dict[str, Member] = {}
    engine: Engine | None = None
    for model in reversed(list(sizes)):
        warm = [member for member in members.values() if member.family is not None]
        while warm and sum(member.num_bytes for member in warm) + sizes[model] > budget:
            gone = warm.pop(0)
            assert engine is not None
            gone.family = None
            residents.remove(engine, gone.info.id)
            gc.collect()
        family = loader.load(model)
        if engine is None:
            engine = _engine(settings, [family], limit_bytes=limit, record=False)
        else:
            residents.add(engine, family)
        warm_up(engine, family)
        now = time.monotonic()
        members[model] = Member(family.info, max(sizes[model], weights.of_family(family)), family, now, now, family.adapters is not None)
    assert engine is not None
    ordered = {model: members[model] for model in sizes}
    log.info("models: %d MB for weights: not all fit, so they take turns", budget >> 20)
    return Roster(ordered, budget, found.cold_wait_s), engine


def _engine(settings: WorkerSettings, families: list[Family], *, limit_bytes: int | None, record: bool = True) -> Engine:
    return Engine(
        families,
        max_rows=settings.max_rows,
        decode_batch=settings.decode_batch,
        fixed_rows=settings.reproducible_rows,
        checkpoint_s=settings.checkpoint_s,
        memory_limit_bytes=limit_bytes,
        record=record,
    )
