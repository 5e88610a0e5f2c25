"""Names of models as Replicate's clients write them: ``owner/name``, and a version of 64 hexadecimal digits."""

from __future__ import annotations

from latentline.api.dialects.common import offered
from latentline.api.service import JobService
from latentline.predictions import OWNER, full_name, version_of
from latentline.settings import Settings


async def known_names(jobs: JobService, settings: Settings) -> dict[str, str]:
    """``owner/name`` of each model that is served, and of each alias -> the model."""
    return {full_name(name): model for name, model in (await offered(jobs, settings)).items()}


def find(version: str, names: dict[str, str]) -> str:
    """The model that ``VERSION``, ``owner/name`` or ``owner/name:VERSION`` stands for.

    What stands for none that is served is given back as the name that a model would have: the job service says what is wrong with it.
    """
    name, _, number = version.rpartition(":")
    if name:
        model = names.get(name)
        return model if model is not None and number == version_of(model) else version
    found = names.get(version) or next((model for model in names.values() if version_of(model) == version), None)
    return found or version.removeprefix(f"{OWNER}/").replace("--", "/")
