"""What made a job's pictures beside its request, for their files and for the job's timeline."""

from __future__ import annotations

import diffusers
import PIL
import torch

import latentline
from latentline.provenance import LoraFile, Made
from latentline_worker.engine.request import Request
from latentline_worker.models.base import Family

VERSIONS = {
    "latentline": latentline.__version__,
    "torch": str(torch.__version__),
    "diffusers": diffusers.__version__,
    "pillow": PIL.__version__,
}


def made_with(request: Request, family: Family, fixed_rows: int | None) -> Made:
    """What the engine made a request with; ``fixed_rows`` as in :class:`~latentline_worker.engine.engine.Engine`."""
    work = request.work
    tokens, read = request.tokens[0] if request.tokens else (0, 0)
    return Made(
        weights=family.revision,
        dtype=str(family.dtype).removeprefix("torch."),
        sampler=work.table.digest,
        loras=tuple(LoraFile(name=name, sha256=sha256) for name, sha256, _ in (work.adapters.parts if work.adapters else ())),
        prompt_tokens=tokens,
        prompt_tokens_read=min(tokens, read),
        versions=VERSIONS,
        device=family.device.type,
        reproducible_rows=fixed_rows,
    )
