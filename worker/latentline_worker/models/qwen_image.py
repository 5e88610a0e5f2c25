"""Qwen-Image: a transformer over picture and text tokens together, with texts of Qwen2.5-VL, trained with flow matching.

Qwen Team 2025, "Qwen-Image Technical Report" (arXiv:2508.02324). Loads any diffusers-format directory or hub id of a
``QwenImagePipeline``, safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImagePipeline

from latentline.errors import ModelError
from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable

from . import checksums
from .base import Encoded, Row, Text
from .flow import names_with_levels, table_with_levels, with_flow
from .lora import Adapters, Target
from .parts import decoded, first_noise, load_pipeline, lora_target, place
from .patches import PATCH, pack, unpack
from .sources import ModelFiles
from .texts import LENGTHS, levelled, padded
from .transfer import to_device

PARTS = ("vae", "transformer", "text_encoder")
# Of other pipelines' models: guidance as an input, an edited picture's tokens, layers.
OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImage:
    """The :class:`~latentline_worker.models.base.Family` of Qwen-Image.

    A row holds ``prompt_embeds`` (64 to 512, 3584), of which ``num_tokens`` () are the text.
    """

    def __init__(self, model_id: str, pipeline: QwenImagePipeline, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        for name in OTHERS:
            if self.transformer.config.get(name):
                raise ModelError(f"{model_id}: transformer: {name}: got True; allowed: False, as in Qwen-Image")
        self.adapters: Adapters | None = None
        self.revision = checksums.of_modules((self.vae, self.transformer, pipeline.text_encoder))
        for part in (pipeline.text_encoder, self.transformer, self.vae):
            place(part, device, dtype)
        values = (torch.tensor(self.vae.config[name], dtype=dtype, device=device) for name in ("latents_mean", "latents_std"))
        self._mean, self._std = (value.view(1, -1, 1, 1) for value in values)
        rope = self.transformer.pos_embed
        self._turns = torch.cat([rope.neg_freqs, rope.pos_freqs]).to(device)  # (places, half of a head) complex, place 0 in the middle
        self.scheduler_config = with_flow(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.vae_scale_factor = pipeline.vae_scale_factor
        side = max(MIN_SIZE_PX, pipeline.default_sample_size * self.vae_scale_factor)
        self.info = ModelInfo(
            id=model_id,
            family="qwen-image",
            default_width=side,
            default_height=side,
            size_multiple=max(8, PATCH * self.vae_scale_factor),
            max_pixels=MAX_SIZE_PX**2,
            schedulers=names_with_levels(self.scheduler_config),
            default_num_inference_steps=50,
            default_guidance_scale=4.0,
            default_scheduler="euler",
            rows_guided=2,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> QwenImage:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        return cls(model_id, load_pipeline(QwenImagePipeline, files, dtype, PARTS), device, dtype)

    def lora_target(self) -> Target:
        """What adapters change."""
        return lora_target(self._pipeline, ("transformer",))

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        channels = int(self.transformer.config.in_channels) // PATCH**2
        return channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        assert request.width is not None and request.height is not None
        _, rows, columns = self.latent_shape(request.width, request.height)
        return table_with_levels(request, self.scheduler_config, (rows // PATCH) * (columns // PATCH))

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        prompt = Text(request.prompt)
        return (prompt, Text(request.negative_prompt, negative=True)) if request.guidance_scale > 1 else (prompt,)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        # The same computation as QwenImagePipeline.encode_prompt, which asks the device for each text's length. The encoder looks backwards
        # only, so that a text that is cut before it gives the states of one that is cut after it.
        pipeline = self._pipeline
        skipped = pipeline.prompt_template_encode_start_idx  # tokens of the template before the prompt
        prompts = [pipeline.prompt_template_encode.format(text.prompt) for text in texts]
        counts = [len(ids) - skipped for ids in pipeline.tokenizer(prompts, truncation=False, verbose=False).input_ids]
        most = LENGTHS[-1] + skipped
        tokens = pipeline.tokenizer(prompts, padding=True, max_length=most, truncation=True, padding_side="right", return_tensors="pt")
        ids, mask = to_device(tokens.input_ids, self.device), to_device(tokens.attention_mask, self.device)
        states = pipeline.text_encoder(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
        ).hidden_states[-1]
        rows = padded(states[:, skipped:].to(self.dtype), (tokens.attention_mask.sum(1) - skipped).tolist())
        return [Encoded(row, (count, LENGTHS[-1])) for row, count in zip(rows, counts, strict=True)]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        return levelled(encoded)

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        """As ``QwenImageTransformer2DModel.forward``, with positions that are computed from the size at each call.

        diffusers keeps them by size, which recordings would take for constants, and sends a number to the device, which a CUDA graph
        cannot capture.
        """
        net = self.transformer
        picture = net.img_in(pack(latents.to(self.dtype)))
        text = net.txt_in(net.txt_norm(rows["prompt_embeds"]))
        mask = torch.arange(text.shape[1], device=text.device) < rows["num_tokens"][:, None]
        time = net.time_text_embed(timesteps.to(self.dtype) / 1000, picture)  # in bf16 the order tells
        turns = self._rotations(latents.shape[-2] // PATCH, latents.shape[-1] // PATCH, text.shape[1])
        for block in net.transformer_blocks:
            text, picture = block(
                hidden_states=picture,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=time,
                image_rotary_emb=turns,
            )
        return unpack(net.proj_out(net.norm_out(picture, time)), latents.shape)

    def _rotations(self, height: int, width: int, num_text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Complex rotations of the picture's tokens and of the text's, (tokens, half of a head) each.

        The picture's middle is at place 0 of both sides; the text's places go on, in all three axes, where the longer side ends.
        """
        rows = torch.arange(height, device=self.device) - (height - height // 2)
        columns = torch.arange(width, device=self.device) - (width - width // 2)
        last = torch.maximum(rows.amax(), columns.amax())  # no comparison in Python: a recording would keep its result
        middle = len(self._turns) // 2
        frame, row, column = self._turns.split([axis // 2 for axis in self.transformer.config.axes_dims_rope], 1)
        picture = torch.cat(
            [
                frame[middle].expand(height, width, -1),
                row[rows + middle].view(height, 1, -1).expand(height, width, -1),
                column[columns + middle].view(1, width, -1).expand(height, width, -1),
            ],
            -1,
        )
        return picture.reshape(height * width, -1), self._turns[torch.arange(num_text, device=self.device) + last + 1 + middle]

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance, each token scaled to the length that it has in the conditional branch."""
        both = pack(uncond + scale * (cond - uncond))
        length = torch.linalg.vector_norm(pack(cond), dim=-1, keepdim=True)
        return unpack(both * (length / torch.linalg.vector_norm(both, dim=-1, keepdim=True)), cond.shape)

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        z = latents.to(self.vae.dtype) * self._std + self._mean
        return decoded(self.vae, z[:, :, None], tiled=tiled)  # the VAE is one of videos: a picture is one frame
