"""Z-Image and Z-Image-Turbo: one stream of picture and text tokens, with texts of a Qwen3 language model, trained with flow matching.

Tongyi-MAI 2025, "Z-Image" (arXiv:2511.22699). Loads any diffusers-format directory or hub id of a ``ZImagePipeline``, safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline

from latentline.errors import ModelError
from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable

from . import checksums
from .base import Encoded, Row, Text
from .flow import names_with_levels, table_with_levels, with_flow
from .lora import Adapters, Target
from .parts import decoded, decoder_dtype, first_noise, load_pipeline, lora_target, place
from .sources import ModelFiles
from .texts import LENGTHS, levelled, padded
from .transfer import to_device

PARTS = ("vae", "transformer", "text_encoder")
PATCH = 2  # latents along the side of a token
MULTIPLE = 32  # the network takes texts and pictures in multiples of this many tokens (SEQ_MULTI_OF of diffusers)
SIDE_PX = 1024  # the pipeline's own


class ZImage:
    """The :class:`~latentline_worker.models.base.Family` of Z-Image.

    A row holds ``prompt_embeds`` (64 to 512, 2560), of which ``num_tokens`` () are the text.
    """

    def __init__(self, model_id: str, pipeline: ZImagePipeline, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        if f"{PATCH}-1" not in self.transformer.all_x_embedder:
            sizes = list(zip(self.transformer.config.all_patch_size, self.transformer.config.all_f_patch_size, strict=True))
            raise ModelError(f"{model_id}: transformer: patch sizes: got {sizes}; allowed: {(PATCH, 1)} among them")
        if not pipeline.tokenizer.chat_template:
            raise ModelError(f"{model_id}: tokenizer: it has no chat template; allowed: one, such as in chat_template.jinja")
        self.adapters: Adapters | None = None
        self.revision = checksums.of_modules((self.vae, self.transformer, pipeline.text_encoder))
        for part in (pipeline.text_encoder, self.transformer):
            place(part, device, dtype)
        place(self.vae, device, decoder_dtype(self.vae, dtype), convolutions=True)
        self.scheduler_config = with_flow(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.vae_scale_factor = pipeline.vae_scale_factor
        # Made here, since the network keeps what it makes at its first call: memory is counted by calls that compute nothing.
        self.transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.int32, device=device))
        longest = min(self.transformer.config.axes_lens[1:]) * PATCH * self.vae_scale_factor  # positions along a side
        self.info = ModelInfo(
            id=model_id,
            family="z-image",
            default_width=max(MIN_SIZE_PX, min(SIDE_PX, longest)),
            default_height=max(MIN_SIZE_PX, min(SIDE_PX, longest)),
            size_multiple=max(8, PATCH * self.vae_scale_factor),
            max_pixels=min(MAX_SIZE_PX, longest) ** 2,
            schedulers=names_with_levels(self.scheduler_config),
            default_num_inference_steps=50,
            default_guidance_scale=5.0,
            default_scheduler="euler",
            rows_guided=2,
            guided_above=0.0,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> ZImage:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        return cls(model_id, load_pipeline(ZImagePipeline, files, dtype, PARTS), device, dtype)

    def lora_target(self) -> Target:
        """What adapters change."""
        return lora_target(self._pipeline, ("transformer",))

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return int(self.transformer.config.in_channels), height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        assert request.width is not None and request.height is not None
        _, rows, columns = self.latent_shape(request.width, request.height)
        return table_with_levels(request, self.scheduler_config, (rows // PATCH) * (columns // PATCH))

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        prompt = Text(request.prompt)
        return (prompt, Text(request.negative_prompt, negative=True)) if request.guidance_scale > 0 else (prompt,)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        # The same computation as ZImagePipeline.encode_prompt, which asks the device for each text's length. The encoder looks backwards
        # only, so that padding to another length changes no state of a text.
        tokenizer = self._pipeline.tokenizer
        chats = [[{"role": "user", "content": text.prompt}] for text in texts]
        prompts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True, enable_thinking=True) for one in chats]
        counts = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
        tokens = tokenizer(prompts, padding=True, max_length=LENGTHS[-1], truncation=True, padding_side="right", return_tensors="pt")
        ids, mask = to_device(tokens.input_ids, self.device), to_device(tokens.attention_mask, self.device).bool()
        encoder = self._pipeline.text_encoder
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-2]
        rows = padded(states.to(self.dtype), tokens.attention_mask.sum(1).tolist())
        return [Encoded(row, (count, LENGTHS[-1])) for row, count in zip(rows, counts, strict=True)]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        return levelled(encoded)

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator, torch.float32)  # whatever the network's type

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        """As ``ZImageTransformer2DModel.forward``, over tensors instead of lists of texts, which are padded and masked.

        So nothing waits for the device to tell a text's length, the forward can be recorded
        and captured, and every layer sees a row axis, which adapters need.
        """
        net = self.transformer
        count, channels, height, width = latents.shape
        high, wide = height // PATCH, width // PATCH
        patches = latents.to(self.dtype).view(count, channels, high, PATCH, wide, PATCH).permute(0, 2, 4, 3, 5, 1)
        x = net.all_x_embedder[f"{PATCH}-1"](patches.reshape(count, high * wide, PATCH**2 * channels))
        x = torch.cat([x, net.x_pad_token.expand(count, -(high * wide) % MULTIPLE, -1)], 1)
        time = net.t_embedder((1000 - timesteps) / 1000 * net.t_scale).to(self.dtype)

        text = net.cap_embedder(rows["prompt_embeds"])
        place_of = torch.arange(text.shape[1], device=text.device)
        num_tokens = rows["num_tokens"][:, None]
        text = torch.where((place_of < num_tokens)[..., None], text, net.cap_pad_token)
        # Filled up with padding that takes part; the rest does not. One multiple at least: a row of zeros has no text.
        num_places = ((num_tokens + MULTIPLE - 1) // MULTIPLE * MULTIPLE).clamp(min=MULTIPLE)
        text_mask = place_of < num_places

        x_angles = self._angles(self._picture_ids(num_places + 1, high, wide, x.shape[1]))
        text_ids = torch.stack([place_of + 1, torch.zeros_like(place_of), torch.zeros_like(place_of)], -1)
        text_angles = self._angles(text_ids[None]).expand(count, -1, -1)
        for layer in net.noise_refiner:
            x = layer(x, None, x_angles, time)
        for layer in net.context_refiner:
            text = layer(text, text_mask, text_angles)
        both, angles = torch.cat([x, text], 1), torch.cat([x_angles, text_angles], 1)
        mask = torch.cat([torch.ones_like(x[..., 0], dtype=torch.bool), text_mask], 1)
        for layer in net.layers:
            both = layer(both, mask, angles, time)
        out: torch.Tensor = net.all_final_layer[f"{PATCH}-1"](both[:, : high * wide], c=time)
        out = out.view(count, high, wide, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4).reshape(count, channels, height, width)
        return -out  # the network predicts original - noise

    def _picture_ids(self, first: torch.Tensor, high: int, wide: int, length: int) -> torch.Tensor:
        """(rows, length, 3): where the text ends, row and column of each token; zeros for padding.

        Args:
            first: (rows, 1) number of the first place after the text.
        """
        row = torch.arange(high, device=first.device).view(-1, 1).expand(high, wide).reshape(1, -1)
        column = torch.arange(wide, device=first.device).view(1, -1).expand(high, wide).reshape(1, -1)
        ids = torch.stack([first + 0 * row, row + 0 * first, column + 0 * first], -1)
        return torch.cat([ids, ids.new_zeros(first.shape[0], length - high * wide, 3)], 1)

    def _angles(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, 3) ids -> (rows, tokens, half of a head) complex rotations."""
        found: torch.Tensor = self.transformer.rope_embedder(ids.reshape(-1, 3))
        return found.view(ids.shape[0], ids.shape[1], -1)

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return cond + scale * (cond - uncond)

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return decoded(self.vae, z, tiled=tiled)
