"""What workers announce about the models that they serve, and the level of what a request asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt

from .errors import InvalidRequest
from .requests import FIRST_PROMPT_CHARS, MAX_SIZE_PX, MIN_SIZE_PX, SIZE_MULTIPLE_PX, Guidance, JobRequest, Message, Scheduler, Steps

if TYPE_CHECKING:
    from .jobs import ResolvedRequest

LEVEL: Final = 3
"""The level of requests up to which this code knows every field and value."""

ADDED: dict[str, int] = {"loras": 3, "callback.prediction_base": 2}
"""What was added to requests after level 1, with its level: a field by its dotted name, or a new value as ``field=value``.

Adapters have a level of their own: workers whose models have none do not read its queues."""

RAISED: dict[str, tuple[int, int]] = {
    "prompt": (FIRST_PROMPT_CHARS, 2),
    "negative_prompt": (FIRST_PROMPT_CHARS, 2),
    "num_images": (8, 2),
}
"""Limits that were raised after level 1: a field's limit then, and the level of what goes beyond it."""

SCHEDULERS: tuple[str, ...] = (
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_karras",
    "dpmpp_3m", "dpmpp_2s", "deis", "unipc", "sa_solver", "lcm", "tcd",
)  # fmt: skip
"""The scheduler names of level 1. A request for any other name has a higher level: workers of level 1 cannot read it."""

# What a request that left them out got before models announced their own; also of a model that announces none.
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 5.0
DEFAULT_SCHEDULER = "dpmpp_2m"

# The fields that workers of version 0.1.0 announce, and the only ones that its readers accept.
FIRST_FIELDS = {"id", "family", "default_width", "default_height", "size_multiple", "max_pixels", "schedulers"}


class ModelInfo(Message):
    """A model that a worker serves: its limits, its defaults, and what an image costs."""

    id: str
    family: str
    default_width: int
    default_height: int
    size_multiple: int = SIZE_MULTIPLE_PX
    max_pixels: int
    schedulers: tuple[str, ...] = SCHEDULERS
    """The names that this model offers."""
    default_num_inference_steps: Steps = DEFAULT_STEPS
    default_guidance_scale: Guidance = DEFAULT_GUIDANCE
    default_scheduler: Scheduler = DEFAULT_SCHEDULER
    rows_unguided: PositiveInt = 1
    """Network rows that a step of one image takes at a guidance scale of ``guided_above`` and below."""
    rows_guided: PositiveInt = 2
    """The same above it: a row per guidance branch. 1 for a model whose guidance is an input of the network."""
    guided_above: float = 1.0
    """The largest guidance scale that has no effect."""
    loras: tuple[str, ...] = ()
    """The adapters that a request may name."""
    negative_prompts: bool = True
    """Whether a negative prompt has an effect; it needs a guidance branch of its own."""

    @property
    def first_scheduler(self) -> str:
        """The scheduler of a request that names none: the model's default, or its first where it does not offer that one."""
        return self.default_scheduler if self.default_scheduler in self.schedulers or not self.schedulers else self.schedulers[0]

    def rows(self, guidance_scale: float) -> int:
        """Network rows that a step of one image takes."""
        return self.rows_guided if guidance_scale > self.guided_above else self.rows_unguided

    def size_of(self, request: JobRequest | ResolvedRequest) -> tuple[int, int]:
        """(width, height) that this model makes for a request.

        Raises:
            InvalidRequest: it does not make that size, does not have the scheduler or an adapter, or has no use for a negative prompt.
        """
        width, height = request.width or self.default_width, request.height or self.default_height
        for name, value in (("width", width), ("height", height)):
            if value % self.size_multiple:
                raise InvalidRequest(name, value, f"a multiple of {self.size_multiple} for model {self.id}")
        if width * height > self.max_pixels:
            raise InvalidRequest("width", width, f"width * height at most {self.max_pixels} for model {self.id}")
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            raise InvalidRequest("scheduler", request.scheduler, f"one of: {', '.join(self.schedulers)}")
        for number, name in enumerate(lora.name for lora in request.loras):
            if name not in self.loras:
                raise InvalidRequest(f"loras.{number}.name", name, f"one of: {', '.join(self.loras) or 'none'}")
        if request.negative_prompt and not self.negative_prompts:
            raise InvalidRequest("negative_prompt", request.negative_prompt, f"none: model {self.id} has no use for one")
        return width, height

    def first_fields(self) -> str:
        """As JSON that readers of version 0.1.0 accept."""
        return self.model_dump_json(include=FIRST_FIELDS)


UNANNOUNCED = ModelInfo(id="unannounced", family="", default_width=MIN_SIZE_PX, default_height=MIN_SIZE_PX, max_pixels=MAX_SIZE_PX**2)
"""Stands in for a model of which nothing is announced: only the defaults of the contract."""


class ServedModel(ModelInfo):
    """A model as the workers of its highest level serve it together."""

    workers: NonNegativeInt = 0
    """That serve it, of every level."""
    warm: NonNegativeInt = 0
    """Of those, how many have it in memory now. The others load it once a job has waited for it for a while."""
    swaps: NonNegativeInt = 0
    """How often these workers have loaded it in the place of other models, since each one's start."""


class Announcement(Message):
    """What one worker says of itself."""

    level: PositiveInt
    models: tuple[ModelInfo, ...]
    cold: tuple[str, ...] = ()
    """The ids of those that are not in its memory now."""
    swaps: Mapping[str, NonNegativeInt] = {}
    """How often it has loaded a model in the place of others, by the model's id."""


class StepCost(Message):
    """What denoising takes on one worker, as its planner has measured it, at the number of rows with the best throughput."""

    rows: PositiveInt
    step_s: PositiveFloat
    """Seconds of a step of so many rows."""
    pixels: PositiveInt
    """Of an image in the measured steps: width times height."""


class Working(Message):
    """What one worker does now, as its heartbeats tell: averages since the heartbeat before."""

    device: str = ""
    """As torch names it, such as ``cuda`` or ``cpu``, with the card's name where there is one."""
    jobs: int = 0
    """Jobs that it holds, from claim to settled record."""
    capacity: int = 0
    """Jobs that it may hold."""
    steps_per_s: float = 0.0
    """Forwards of the network each second; each advances every job of its batch by one step."""
    rows_per_step: float = 0.0
    warm: tuple[str, ...] = ()
    """Ids of the models that are in memory."""
    costs: Mapping[str, StepCost] = {}
    """By the model's id; of those that are in memory."""


def common(infos: Sequence[ModelInfo]) -> ModelInfo:
    """What every one of these announcements of one model allows, with the defaults of the first.

    Any of the workers may take the job, so all of them have to be able to do it.
    """
    first = infos[0]
    offered = [name for name in first.schedulers if all(name in info.schedulers for info in infos)]
    return first.model_copy(
        update={
            "size_multiple": math.lcm(*(info.size_multiple for info in infos)),
            "max_pixels": min(info.max_pixels for info in infos),
            "schedulers": tuple(offered),
            "loras": tuple(name for name in first.loras if all(name in info.loras for info in infos)),
            "negative_prompts": all(info.negative_prompts for info in infos),
        }
    )


def level_of_worker(info: ModelInfo) -> int:
    """The level that a worker of this model announces, and up to which it reads queues.

    Each level adds the lists of its queues to what an idle worker asks the broker for, so that of adapters is left out where the
    model has none.
    """
    unused = () if info.loras else (ADDED.get("loras"),)
    return max(level for level in range(1, LEVEL + 1) if level not in unused)


def level_of(request: BaseModel) -> tuple[int, str]:
    """The level that a request asks for, and the field that asks for it; (1, "") for what every worker knows."""
    level, field = 1, ""
    for name, value in _leaves(request.model_dump(mode="json", exclude_defaults=True)):
        needed = max(ADDED.get(name, 1), ADDED.get(f"{name}={value}", 2 if name == "scheduler" and value not in SCHEDULERS else 1))
        if name in RAISED:
            limit, raised = RAISED[name]
            needed = max(needed, raised if (len(value) if isinstance(value, str) else value) > limit else 1)
        if needed > level:
            level, field = needed, name
    return level, field


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field by its dotted name, groups as well as what is in them."""
    for name, value in fields.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
