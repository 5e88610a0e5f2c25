"""Writes a diffusers pipeline as one file in the layout of its authors: the inverse of what diffusers does when it reads one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def write_sd(pipeline: Any, path: Path) -> Path:
    """Stable Diffusion 1.x: U-Net, VAE and CLIP."""
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    return _save(path, {**_networks(pipeline), **_under("cond_stage_model.transformer.", text)})


def write_sd2(pipeline: Any, path: Path) -> Path:
    """Stable Diffusion 2.x: the text encoder in OpenCLIP's layout."""
    return _save(path, {**_networks(pipeline), **_under("cond_stage_model.model.", _open_clip(pipeline.text_encoder.state_dict()))})


def write_sd3(pipeline: Any, path: Path) -> Path:
    """SD3 as it is published without its text encoders: transformer and VAE."""
    tensors, vae = _sd3(pipeline.transformer.state_dict(), pipeline.transformer.config.num_layers), pipeline.vae
    levels = len(vae.config.block_out_channels)
    parts = {f"first_stage_model.{_vae(name, levels)}": _conv(name, tensor) for name, tensor in vae.state_dict().items()}
    return _save(path, {**_under("model.diffusion_model.", tensors), **parts})


def write_sdxl(pipeline: Any, path: Path) -> Path:
    """SDXL: the second text encoder in OpenCLIP's layout."""
    first = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    return _save(
        path,
        {
            **_networks(pipeline),
            **_under("conditioner.embedders.0.transformer.", first),
            **_under("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2.state_dict())),
        },
    )


def _save(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _networks(pipeline: Any) -> Tensors:
    unet, vae = pipeline.unet, pipeline.vae
    levels = len(vae.config.block_out_channels)
    return {
        **{f"model.diffusion_model.{_unet(name, unet.config.layers_per_block)}": tensor for name, tensor in unet.state_dict().items()},
        **{f"first_stage_model.{_vae(name, levels)}": _conv(name, tensor) for name, tensor in vae.state_dict().items()},
    }


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet(name: str, layers: int) -> str:
    for old, new in _UNET_ENDS.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    kind, rest = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    part, number, inner = re.fullmatch(r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest).groups()  # type: ignore[union-attr]
    layer = int(number)
    if part == "resnets":
        first = inner.split(".")[0]
        inner = inner.replace(first, _RESNET[first], 1)
    if kind == "mid_block":
        return f"middle_block.{2 * layer if part == 'resnets' else 1}.{inner}"
    block = int(kind.split(".")[1])
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.{inner.replace('conv', 'op', 1)}"
    if kind.startswith("down"):
        return f"input_blocks.{1 + block * (layers + 1) + layer}.{int(part == 'attentions')}.{inner}"
    if part == "upsamplers":  # behind the resnet and, where the block has one, the attention of its last layer
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block == 0 else 1}.{inner}"
    return f"output_blocks.{block * (layers + 1) + layer}.{int(part == 'attentions')}.{inner}"


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae(name: str, levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for old, new in _ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def _conv(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The authors' attention is made of 1 x 1 convolutions."""
    return tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
            continue
        for old, new in _OPEN_CLIP.items():
            name = name.replace(old, new)
        if found := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            others = [state[next(k for k in state if k.endswith(_original(found[1], letter, found[2])))] for letter in "kv"]
            tensors[f"{found[1]}.attn.in_proj_{found[2]}"] = torch.cat([tensor, *others])
        elif ".self_attn." not in name:
            tensors[name] = tensor
    return tensors


def _original(layer: str, letter: str, kind: str) -> str:
    return f"encoder.layers.{layer.rsplit('.', 1)[1]}.self_attn.{letter}_proj.{kind}"


_SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def _sd3(state: Mapping[str, torch.Tensor], layers: int) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in (f"transformer_blocks.{layers - 1}.norm1_context.linear", "norm_out.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])  # scale and shift, where the authors have shift and scale
        if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
            if found[2] in ("attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj"):
                continue
            if found[2] in ("attn.to_q", "attn.add_q_proj"):
                tensor = torch.cat([tensor, *(state[name.replace("_q", f"_{letter}")] for letter in "kv")])
            tensors[f"joint_blocks.{found[1]}.{_SD3_BLOCK[found[2]]}.{kind}"] = tensor
        elif name in _SD3_ENDS:
            tensors[_SD3_ENDS[name]] = tensor
        else:
            tensors[f"{_SD3_ENDS.get(module, module)}.{kind}"] = tensor
    return tensors
