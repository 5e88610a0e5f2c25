"""What `latentline verify` finds: a picture beside its job's record, and beside what came of making it again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentline.provenance import Made, Provenance

if TYPE_CHECKING:
    from .picture_file import Picture

GOOD = frozenset(("equal", "within_tolerance"))

# What pictures may differ by outside of the reproducible mode.
MAX_LEVELS = 2  # of 255, for a picture that was stored without loss and made in float32
MIN_PSNR_DB = 45.0  # otherwise: half precision batched with other jobs, or lossy compression of such differences

REQUEST_FIELDS = ("model", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "loras")
# What decides the pixels; the rest of `made` (versions, device, mode) may explain a difference.
DECIDING = ("weights", "sampler", "loras", "prompt_tokens", "prompt_tokens_read")


@dataclass
class Verdict:
    """What came of it; ``fields`` are those of the file that are not what they were, or not what they are here."""

    outcome: str  # equal, within_tolerance, different, edited
    says: str
    job_id: str | None = None  # that made the picture again
    fields: list[str] = field(default_factory=list)
    largest_difference: int | None = None
    psnr_db: float | None = None
    tolerance: str | None = None


def differing(says: Provenance, request: dict[str, Any]) -> list[str]:
    """Fields of the request that are not those of the job."""
    own = says.model_dump(mode="json")
    fields = [name for name in REQUEST_FIELDS if own[name] != request.get(name)]
    fields += [name for name in ("width", "height") if request.get(name) not in (None, own[name])]
    return fields + (["output"] if own["output"] != request.get("output") else [])


def compare(picture: Picture, again: Picture, module: Any) -> Verdict:
    """A picture and what came of making it again; ``module`` is :mod:`latentline.cli.picture_file`."""
    says, made = picture.says, again.says.made
    unlike = [f"made.{name}" for name in Made.model_fields if getattr(made, name) != getattr(says.made, name)]
    here = f"; here are others than the file says: {', '.join(unlike)}" if unlike else ""
    found = Verdict("different", f"different: it does not reproduce{here}", again.says.job_id, unlike)
    if picture.image.size != again.image.size:
        return found
    largest = found.largest_difference = module.largest_difference(picture.image, again.image)
    if largest == 0:
        deciding = [name for name in unlike if name.removeprefix("made.") in DECIDING]
        found.outcome, found.says = "equal", f"equal to the bit{here}"
        if deciding:  # other weights do not make the same picture
            found.outcome, found.says = "edited", f"edited: it was made by other than the file says: {', '.join(deciding)}"
        return found
    psnr_db = found.psnr_db = round(10 * math.log10(255**2 / module.mean_square(picture.image, again.image)), 1)
    exact = says.output.format == "png" and says.made.dtype == made.dtype == "float32"
    found.tolerance = f"at most {MAX_LEVELS} of 255 levels" if exact else f"at least {MIN_PSNR_DB:g} dB"
    seen = f"largest difference {largest} of 255 levels, {psnr_db} dB; tolerance: {found.tolerance}"
    if largest <= MAX_LEVELS if exact else psnr_db >= MIN_PSNR_DB:
        found.outcome, found.says = "within_tolerance", f"within the tolerance ({seen}){here}"
    else:
        found.says = f"different: it does not reproduce ({seen}){here}"
    return found
