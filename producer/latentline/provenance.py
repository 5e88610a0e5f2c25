"""What a picture's file says of how it was made: enough to make it again, and a digest of its pixels.

The file is its owner's, so it names its own job; it never names a tenant or another job. Workers write it
(``latentline_worker.images.encode``), and ``latentline verify`` reads it. Readers ignore fields that they do not know.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from .jobs import StoredLora, StoredOutput
from .requests import Message

FORMAT: Final = 1


class LoraFile(Message):
    """An adapter as it was on the worker."""

    name: str
    sha256: str


class Made(Message):
    """What made a picture beside its request."""

    weights: str
    """A digest of the model's weights as they were in memory: names, shapes, types and values."""
    dtype: str
    """The type in which the network ran, such as ``float32``."""
    sampler: str
    """A digest of the sampler's table of coefficients."""
    loras: tuple[LoraFile, ...] = ()
    prompt_tokens: int = 0
    """Tokens in the prompt."""
    prompt_tokens_read: int = 0
    """How many of them the text encoder reads; what is beyond is cut."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of latentline, torch and diffusers, and of Pillow, which wrote the file."""
    device: str
    """The device's type: ``cpu`` or ``cuda``."""
    reproducible_rows: int | None = None
    """Rows of every forward in the reproducible mode; None outside of it, where pictures agree within a tolerance."""


class Provenance(Message):
    """Everything that made one picture."""

    provenance: Literal[1] = FORMAT
    job_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$")]
    model: str
    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    loras: tuple[StoredLora, ...] = ()
    seed: int
    """The picture's own: that of its job plus its number in it."""
    output: StoredOutput = StoredOutput()
    made: Made
    pixels_sha256: str
    """SHA-256 of the picture's pixels as they are decoded from its file: RGB, 8 bits, row by row."""
