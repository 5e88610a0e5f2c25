"""The body of ``txt2img``: what becomes of each field. As in the web UI, what has no meaning here is ignored; ``info`` lists it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from latentline.errors import InvalidRequest
from latentline.infotext import SAMPLER_NAMES, sampler_name
from latentline.models import ModelInfo
from latentline.requests import MAX_IMAGES, MAX_SEED, Guidance, Steps, Whole

# Native field -> this dialect's word for it.
NAMES = {
    "model": "sd_model_checkpoint", "num_images": "batch_size", "num_inference_steps": "steps", "guidance_scale": "cfg_scale",
    "scheduler": "sampler_name", "loras": "prompt", "preview_every": "show_progress_every_n_steps",
    "width": "width", "height": "height", "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed",
}  # fmt: skip

CLIENTS_SIZE_PX = 512
"""Width and height that clients send where their user chose none, as in the web UI: where the model cannot, they ask for nothing."""

PREVIEW_EVERY = 10  # steps, as in the web UI's own settings

# Fields without a meaning here, with the values that ask for nothing: clients send all of them with every request.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,), "denoising_strength": (0, 0.7, 0.75, None), "firstphase_width": (0,), "firstphase_height": (0,),
    "hr_scale": (2,), "hr_upscaler": (None, "Latent"), "hr_second_pass_steps": (0,), "hr_resize_x": (0,), "hr_resize_y": (0,),
    "hr_checkpoint_name": (None,), "hr_sampler_name": (None,), "hr_scheduler": (None,), "hr_prompt": ("",), "hr_negative_prompt": ("",),
    "styles": ([], None), "subseed": (-1,), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1),
    "restore_faces": (False, None), "tiling": (False, None), "do_not_save_samples": (False, True), "do_not_save_grid": (False, True),
    "eta": (None, 1.0), "s_churn": (None, 0), "s_tmax": (None, 0), "s_tmin": (None, 0), "s_noise": (None, 1), "s_min_uncond": (None, 0),
    "override_settings_restore_afterwards": (True, False), "script_name": (None, ""), "script_args": ([],), "save_images": (False,),
    "alwayson_scripts": ({},), "refiner_checkpoint": (None, ""), "refiner_switch_at": (None, 0), "disable_extra_networks": (False,),
    "firstpass_image": (None,), "comments": (None, {}), "force_task_id": (None, ""), "infotext": (None, ""),
}  # fmt: skip

_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?(?::[^<>]*)?>")


def _minus_one(value: Any) -> Any:
    """-1 means any seed."""
    return None if value == -1 and not isinstance(value, bool) else value


class Txt2Img(BaseModel):
    """``POST txt2img``: the fields with a meaning here."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    steps: Steps | None = None
    cfg_scale: Guidance | None = None
    width: Annotated[int, Field(strict=True), Whole] | None = None
    height: Annotated[int, Field(strict=True), Whole] | None = None
    seed: Annotated[Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole] | None, BeforeValidator(_minus_one)] = None
    batch_size: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] = 1
    n_iter: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool = True

    @property
    def checkpoint(self) -> str | None:
        """The model that this request alone asks for."""
        name = (self.override_settings or {}).get("sd_model_checkpoint")
        if name is not None and not isinstance(name, str):
            raise InvalidRequest("override_settings.sd_model_checkpoint", name, "a model's title or name")
        return name.partition(" [")[0] if name else None  # titles there end in a hash in brackets

    def native(self, model: str, info: ModelInfo | None) -> dict[str, Any]:
        """The native request.

        Args:
            model: what the request's checkpoint stands for.
            info: of that model; None where nobody serves it, which the job service refuses.
        """
        prompt, loras = self._prompt()
        width, height = self._size(info)
        if self.batch_size * self.n_iter > MAX_IMAGES:
            raise InvalidRequest("n_iter", self.n_iter, f"batch_size * n_iter at most {MAX_IMAGES}")
        fields = {
            "model": model,
            "prompt": prompt,
            "negative_prompt": self.negative_prompt,
            "num_images": self.batch_size * self.n_iter,
            "width": width,
            "height": height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "scheduler": self._scheduler(info),
            "loras": loras,
            "seed": self.seed,
            "preview_every": PREVIEW_EVERY,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def ignored(self, info: ModelInfo | None) -> list[str]:
        """What the request asks for and does not get, by its names."""
        given = self.model_extra or {}
        found = [name for name, value in given.items() if name not in NEUTRAL or value not in NEUTRAL[name]]
        found += [f"override_settings.{name}" for name in self.override_settings or {} if name != "sd_model_checkpoint"]
        if self._size(info) != (self.width, self.height):
            found += ["width", "height"]
        return sorted(found)

    def _size(self, info: ModelInfo | None) -> tuple[int | None, int | None]:
        """The size that was asked for, or nothing for the clients' own where the model cannot make it."""
        unchosen = all(side in (None, CLIENTS_SIZE_PX) for side in (self.width, self.height))
        if unchosen and info and (CLIENTS_SIZE_PX % info.size_multiple or info.max_pixels < CLIENTS_SIZE_PX**2):
            return None, None
        return self.width, self.height

    def _scheduler(self, info: ModelInfo | None) -> str | None:
        """The scheduler of a sampler's name there, with the noise schedule that may stand apart from it."""
        given = self.sampler_name or self.sampler_index
        if given is None:
            return None
        offered = {name.casefold(): one for one in (info.schedulers if info else SAMPLER_NAMES) for name in (one, sampler_name(one))}
        schedule = (self.scheduler or "automatic").casefold()
        for name in [given] if schedule == "automatic" else [f"{given} {schedule}"]:
            if name.casefold() in offered:
                return offered[name.casefold()]
        field, value = ("sampler_name", given) if given.casefold() not in offered else ("scheduler", self.scheduler)
        names = ", ".join(sorted({sampler_name(one) for one in offered.values()}))
        allowed = f"one of: {names}" if field == "sampler_name" else f"automatic, or karras where the sampler has it ({names})"
        raise InvalidRequest(field, value, allowed)

    def _prompt(self) -> tuple[str, list[dict[str, Any]] | None]:
        """The prompt without its ``<lora:NAME:SCALE>``, and these adapters."""
        loras: list[dict[str, Any]] = []
        for found in _LORA.finditer(self.prompt):
            try:
                loras.append({"name": found[1], "scale": float(found[2] or 1)})
            except ValueError:
                raise InvalidRequest("prompt", found[0], "<lora:NAME:SCALE> with a number as its scale") from None
        return (_LORA.sub("", self.prompt).strip(), loras) if loras else (self.prompt, None)
