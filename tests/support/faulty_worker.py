"""A real worker process whose model misbehaves for certain prompts. Run as a script; arguments are the worker's.

A prompt with ``[oom@T]``, ``[nan@T]``, ``[error@T]``, ``[kill@T]`` or ``[wedge@T]`` does that in network calls at timestep T
and below, so always at the same step however often the job is taken up again; wedged, the call never returns.
``FAULT_STEP_S`` is added to every call, as time on a device would be, and ``FAULT_LOAD_S`` to every loading of a model;
``FAULT_SKEW_S`` moves this process's clock.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

STEP_S = float(os.environ.get("FAULT_STEP_S", "0"))
LOAD_S = float(os.environ.get("FAULT_LOAD_S", "0"))
SKEW_S = float(os.environ.get("FAULT_SKEW_S", "0"))


def main() -> int:
    if SKEW_S:
        real_time = time.time
        time.time = lambda: real_time() + SKEW_S
    import torch

    from latentline_worker.engine.network import Network
    from latentline_worker.generate import launch
    from latentline_worker.models import registry
    from latentline_worker.models.base import Encoded, Row, Text

    real_load = registry.load_entry

    def load_entry(*args: Any) -> Any:
        time.sleep(LOAD_S)
        return real_load(*args)

    registry.load_entry = load_entry
    poison: dict[str, tuple[torch.Tensor, str, int]] = {}

    def faulty(family: Any) -> None:
        """Patch a family's class."""
        real_encode, real_denoise = family.encode, family.denoise

        def encode(self: Any, texts: Sequence[Text]) -> list[Encoded]:
            encoded: list[Encoded] = real_encode(self, texts)
            for text, one in zip(texts, encoded, strict=True):
                if found := re.search(r"\[(oom|nan|error|kill|wedge)@(\d+)\]", text.prompt):
                    poison[text.prompt] = (one.row["prompt_embeds"].clone(), found[1], int(found[2]))
            return encoded

        def denoise(self: Any, latents: torch.Tensor, timesteps: torch.Tensor, given: Row) -> torch.Tensor:
            time.sleep(STEP_S)
            out: torch.Tensor = real_denoise(self, latents, timesteps, given)
            for state, kind, when in poison.values():
                rows = [i for i, row in enumerate(given["prompt_embeds"]) if torch.equal(row, state) and timesteps[i] <= when]
                if rows:
                    out = failed(out, rows, kind)
            return out

        family.encode, family.denoise = encode, denoise

    def failed(out: torch.Tensor, rows: list[int], kind: str) -> torch.Tensor:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "wedge":
            threading.Event().wait()
        if kind == "oom":
            raise torch.OutOfMemoryError("out of memory, as asked for")
        if kind == "error":
            raise RuntimeError("failed, as asked for")
        out = out.clone()
        out[rows] = float("nan")
        return out

    for family in set(registry.FAMILIES.values()):
        faulty(family)
    Network.trace = lambda *_: None  # a recording would leave the faults out
    return launch.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
