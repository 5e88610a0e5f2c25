"""Reads an adapter's file: low-rank updates of a model's layers (Hu et al. 2021, arXiv:2106.09685).

The formats of diffusers, old diffusers, peft and kohya are understood; diffusers' own key maps translate them. The factor alpha / rank
is multiplied into the updates first, layer by layer: diffusers applies one factor to many layers where a file has several.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open

from latentline.errors import ModelError

MAX_BYTES = 4 << 30  # of a file; rank 128 on every layer of FLUX.1 has 1.4 GB

# Parts of key names of other methods than LoRA, which change a layer in other ways than by a product of two matrices.
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "a Tucker decomposition",
    ".diff": "whole differences of weights",
}
DENOISERS = ("unet", "transformer")
# (update's end, the same layer's down-projection): kohya; diffusers; peft.
DOWN = (".lora_down.weight", ".lora.down.weight", ".lora_A.weight")
UP = (".lora_up.weight", ".lora.up.weight", ".lora_B.weight")

Layers = dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Target:
    """The model that adapters are read for.

    Args:
        pipeline: its diffusers class, which translates keys.
        modules: its parts by their names in the pipeline: "unet" or "transformer", "text_encoder" and so on.
    """

    pipeline: Any
    modules: Mapping[str, torch.nn.Module]

    def layer(self, part: str, name: str) -> torch.nn.Linear | torch.nn.Conv2d | None:
        """The layer that an update of this name changes."""
        try:
            found = self.modules[part].get_submodule(name)
        except AttributeError:
            return None
        return found if isinstance(found, torch.nn.Linear | torch.nn.Conv2d) else None


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter for one model, in host memory."""

    name: str
    sha256: str  # of the file; empty for one of which only the keys were read
    layers: Layers
    """By part and layer: (rank, fan_in) and (fan_out, rank); the update of the layer's weight is their product, second times first."""

    @property
    def rank(self) -> int:
        """Of its largest update."""
        return max(len(down) for part in self.layers.values() for down, _ in part.values())

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for part in self.layers.values() for pair in part.values() for one in pair)


def read(path: Path, name: str, target: Target, *, only_keys: bool = False) -> Adapter:
    """Read an adapter and check it against a model.

    Args:
        path: of a safetensors file.
        name: of the adapter, for messages.
        target: the model.
        only_keys: check names and shapes without reading the updates.

    Raises:
        ModelError: it cannot be read, is no LoRA, or belongs to another model; the message says why.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"adapter {name}: {size} bytes; allowed: {MAX_BYTES}")
        state, metadata = _tensors(path, only_keys)
        with path.open("rb") as file:
            sha256 = "" if only_keys else hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter {name}: cannot be read as safetensors: {error}") from None
    for mark, method in OTHER_METHODS.items():
        if key := next((key for key in state if mark in key), None):
            raise ModelError(f"adapter {name}: {key} is of {method}; allowed: LoRA")
    try:
        layers = _layers(name, _folded(name, state, metadata), target)
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError) as error:  # from diffusers' key maps
        raise ModelError(f"adapter {name}: its keys are not those of a LoRA for {target.pipeline.__name__}: {error}") from error
    if not layers:
        raise ModelError(f"adapter {name}: it has no updates for {target.pipeline.__name__}")
    return Adapter(name, sha256, layers)


def _tensors(path: Path, only_keys: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The file's tensors, on the meta device where only their shapes are asked for; and its metadata."""
    with safe_open(path, framework="pt") as file:
        state = {}
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            if only_keys and not key.endswith(".alpha"):
                state[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
            else:
                state[key] = file.get_tensor(key)
        return state, file.metadata() or {}


def _folded(name: str, state: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Multiply alpha / rank into each layer's up-projection and drop the alphas."""
    folded = {key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}
    for key, tensor in state.items():
        if not key.endswith(".alpha"):
            continue
        base = key.removesuffix(".alpha")
        for down, up in zip(DOWN, UP, strict=True):
            if base + down in folded and base + up in folded:
                folded[base + up] = folded[base + up] * (float(tensor) / len(folded[base + down]))
                break
        else:
            raise ModelError(f"adapter {name}: {key} has no layer")
    if text := metadata.get("lora_adapter_metadata"):
        for key, scale in _scales_of_peft(json.loads(text), folded):
            folded[key] = folded[key] * scale
    return folded


def _scales_of_peft(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """(key of the up-projection, alpha / rank) by peft's configuration, which diffusers writes into the file's metadata by part."""
    ends = dict(zip(UP, DOWN, strict=True))
    for key in state:
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None:
            continue
        base = key.removesuffix(end)
        part, _, layer = base.partition(".")
        alpha = config.get(f"{part}.lora_alpha")
        if alpha is None:
            continue
        for pattern, other in config.get(f"{part}.alpha_pattern", {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = other
        rank = len(state[base + ends[end]])
        yield key, alpha / (rank**0.5 if config.get(f"{part}.use_rslora") else rank)


def _layers(name: str, state: dict[str, torch.Tensor], target: Target) -> Layers:
    """Translate the keys and check every update against its layer."""
    denoiser = next(part for part in DENOISERS if part in target.modules)
    options = {"unet_config": target.modules["unet"].config} if denoiser == "unet" else {}
    translated = target.pipeline.lora_state_dict(state, **options)
    translated = translated[0] if isinstance(translated, tuple) else translated
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in translated.items():
        part, _, rest = key.partition(".")
        if part.startswith("text_encoder") and part not in target.modules:
            raise ModelError(f"adapter {name}: {key} changes a text encoder; allowed: updates of the {' and '.join(target.modules)}")
        if part not in target.modules:  # a file of the denoiser alone
            part, rest = denoiser, key
        parts.setdefault(part, {})[rest] = tensor
    layers: Layers = {}
    for part, updates in parts.items():
        updates = _of_encoder(updates, target.modules[part]) if part not in DENOISERS else convert_unet_state_dict_to_peft(updates)
        for key, down in updates.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up = updates[layer + ".lora_B.weight"]
                layers.setdefault(part, {})[layer] = _checked(f"adapter {name}: {part}.{layer}", target.layer(part, layer), down, up)
            elif not key.endswith(".lora_B.weight"):
                raise ModelError(f"adapter {name}: {part}.{key} is no LoRA update")
    return layers


def _of_encoder(updates: dict[str, torch.Tensor], encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Keys of a text encoder's updates as peft names them."""
    if not any(".lora_A." in key for key in updates):
        # Without an update of an output projection diffusers cannot tell its old format from the others.
        old = any("_lora." in key for key in updates)
        updates = convert_state_dict_to_peft(updates, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS)
    else:
        updates = convert_state_dict_to_peft(convert_state_dict_to_diffusers(updates, StateDictType.PEFT), StateDictType.DIFFUSERS)
    if hasattr(encoder, "text_model"):
        return updates
    return {key.removeprefix("text_model."): tensor for key, tensor in updates.items()}  # transformers 5 has one level less


def _checked(
    what: str, layer: torch.nn.Linear | torch.nn.Conv2d | None, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update as two matrices, if it fits the layer."""
    if layer is None:
        raise ModelError(f"{what}: this model has no such layer")
    if isinstance(layer, torch.nn.Conv2d) and layer.groups != 1:
        raise ModelError(f"{what}: a grouped convolution; allowed: one without groups")
    fan_out, *rest = layer.weight.shape
    fan_in = torch.Size(rest).numel()
    rank = len(down)
    if up.shape[:2] != (fan_out, rank) or down.numel() != rank * fan_in or up.numel() != fan_out * rank:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        weight = tuple(layer.weight.shape)
        raise ModelError(f"{what}: updates of shapes {shapes} do not fit the weight {weight}: the adapter belongs to another model")
    return down.reshape(rank, fan_in), up.reshape(fan_out, rank)
