"""Settings of a worker process, on top of the connections it shares with producers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from latentline.settings import Settings


class ProcessSettings(Settings):
    """Settings of every process of the worker side."""

    ready_file: Path | None = None  # touched continually while the process is well, for container probes


class WorkerSettings(ProcessSettings):
    """Read from ``LATENTLINE_*`` variables, checked once at start."""

    # The bundled model's id, a diffusers folder, a .safetensors file, or a hub id (owner/name or owner/name@revision).
    model: str = "latentline-emoji"
    # Of a .safetensors file: the folder or hub id of its configurations and tokenizers.
    config: str | None = None
    # A TOML file that names the models that this worker serves, instead of the two settings above: docs/families.md.
    models: Path | None = None
    # A folder of LoRA adapters, NAME.safetensors, that jobs may name. So many sets of them are in device memory at once, each of at
    # most so large a rank in all.
    lora_dir: Path | None = None
    lora_slots: Annotated[int, Field(ge=1, le=1024)] = 8
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 64
    # Adapters in a bucket of the same object store, s3://BUCKET/PREFIX/, and how much of them is kept on this machine's disk.
    lora_prefix: str | None = None
    lora_cache: Path = Path("~/.cache/latentline/loras")
    lora_cache_mb: Annotated[int, Field(ge=1)] = 10_240
    # auto: float32 on a CPU; on a GPU bfloat16, or float16 where it has none.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # Jobs in flight per process from one shard of tenants; the process takes the same number again from other shards.
    concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    # Most network rows of one forward; a guided image takes two. Measured costs and memory may allow fewer.
    max_rows: Annotated[int, Field(ge=1, le=1024)] = 64
    # The reproducible mode: every forward is padded to exactly this many rows, so that an image does not depend on its batch.
    reproducible_rows: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory_limit_mb: Annotated[int, Field(ge=1)] | None = None  # besides the weights; default: most of what is free
    decode_batch: Annotated[int, Field(ge=1, le=64)] = 4  # images per VAE call; larger is often slower per image
    lease_s: Annotated[float, Field(ge=1)] = 30.0  # a worker that does not renew its leases for this long loses its jobs
    checkpoint_s: Annotated[float, Field(gt=0)] = 1.0  # between two checkpoints of a job; more if they would cost over 1% of the time
    # An engine that finishes nothing for this long loses its jobs, and the process ends so that its supervisor starts another.
    stall_s: Annotated[float, Field(ge=1)] = 120.0
    # After SIGTERM, jobs that denoise go back to the queue at once; those that upload have this many seconds.
    drain_s: Annotated[float, Field(ge=0)] = 10.0

    @field_validator("lora_prefix")
    @classmethod
    def _lora_prefix(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/([^/]+/)+", text):
            raise ValueError(f"got {text!r}; allowed: s3://BUCKET/PREFIX/, of the store that keeps the pictures")
        return text

    @model_validator(mode="after")
    def _adapters_do_not_expire(self) -> Self:
        if self.lora_prefix is not None and self.lora_prefix.split("/")[2] == self.s3_bucket:
            allowed = "another bucket than that of the pictures, which are deleted in time"
            raise ValueError(f"lora_prefix: got {self.lora_prefix!r}; allowed: {allowed}")
        return self

    @model_validator(mode="after")
    def _models_are_named_once(self) -> Self:
        if self.models is not None and (named := sorted(self.model_fields_set & {"model", "config"})):
            raise ValueError(f"models: got {str(self.models)!r}; allowed: no file beside {' and '.join(named)}, which the file names")
        return self
