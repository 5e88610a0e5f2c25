"""CUDA without a GPU: an engine whose tensors say that they lie on ``cuda:0``, and a watch on what its steps ask of them.

The tensors are fake ones of torch: they have shapes and types and no values. A build of torch for the CPU has no guard for the CUDA device;
:func:`pretend_cuda` gives it that of the CPU, which changes the whole process, so this runs in processes of its own.

``python -m support.fake_cuda`` runs a few jobs as they are, and once with each planted fault, and prints what was noted as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda:0")
aten: Any = torch.ops.aten

# These give the host a number or a size that the device has to compute first.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.item.default, aten.equal.default,
    aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


def pretend_cuda() -> None:
    """Let the tables of torch have a device guard for CUDA: that of the CPU."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = registry[0]


class Watch(TorchDispatchMode):
    """Notes what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.violations: list[str] = []
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.num_calls += 1
        on_device = [one for one in args if isinstance(one, torch.Tensor) and one.device.type == "cuda"]
        if func in WAITING and on_device:
            self.violations.append(f"synchronisation: {func}")
        if func in INDEXED and on_device and any(one is not None and one.device.type == "cpu" and one.dim() for one in args[1]):
            self.violations.append(f"index on the host: {func}")
        if func is aten._to_copy.default:
            self._copied(func, args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False), args[0])
        if func is aten.copy_.default:
            host = args[1] if args[1].device.type == "cpu" else args[0]
            self._copied(func, args[1], args[0].device, (len(args) > 2 and bool(args[2])) or kwargs.get("non_blocking", False), host)
        return func(*args, **kwargs)

    def _copied(self, func: Any, source: torch.Tensor, target: Any, non_blocking: bool, host: torch.Tensor) -> None:
        if source.device.type == torch.device(target).type or (source.dim() == 0 and source.device.type == "cpu"):
            return
        pinned = getattr(host, "is_really_pinned", False)
        if not (non_blocking and pinned):
            how = "pageable" if not pinned else "blocking"
            self.violations.append(f"{how} copy from {source.device.type} to {torch.device(target).type}: {func}")


class Event:
    """An event that has always happened. Waiting for one is counted."""

    waits = 0

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Everything that the engine asks of CUDA is answered."""
    pretend_cuda()
    real_empty = torch.empty

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.is_really_pinned = True  # type: ignore[attr-defined]
        return tensor

    def empty(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = real_empty(*args, **options)
        return pin(made) if pin_memory else made

    patches = [
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: Stream()),
        mock.patch.object(torch.cuda, "empty_cache", lambda: None),
        mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module),  # on_cuda() has placed them
        mock.patch.object(torch.Tensor, "pin_memory", pin),
        mock.patch.object(torch.Tensor, "record_stream", lambda *_: None),
        mock.patch.object(torch, "empty", empty),
        mock.patch("latentline_worker.engine.memory.free_bytes", lambda *_: 8 << 30),
        mock.patch("latentline_worker.models.checksums.of_modules", lambda _: "fake"),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def on_cuda(build: Callable[[], Any]) -> Any:
    """A pipeline whose modules have fake parameters on ``cuda:0``."""
    pipeline = build()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            for owner in module.modules():
                for store in (owner._parameters, owner._buffers):
                    for name, tensor in store.items():
                        if tensor is not None:
                            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                            store[name] = torch.nn.Parameter(moved, requires_grad=False) if store is owner._parameters else moved
    return pipeline


def engine_on(family: Any) -> Any:
    """An engine for the family, with previews and checkpoints, whose copies to the host have values."""
    from latentline_worker.engine.engine import Engine
    from latentline_worker.engine.host_copies import HostCopies
    from latentline_worker.engine.preview import LatentToRgb

    class Copies(HostCopies):
        def copy(self, tensors: Any, publish: Any) -> None:
            def with_values(hosts: Any) -> None:
                # Whether latents are finite is a scalar: yes. Whether something is broken is a list: no.
                publish([_Host(torch.Size(one.shape), not one.shape) for one in hosts])

            super().copy(tensors, with_values)

    engine = Engine([family], record=False, checkpoint_s=0.0)
    engine.publisher._copies = Copies(DEVICE)
    engine.publisher._rgb[family.info.id] = LatentToRgb(torch.zeros(5, 3, device=DEVICE))
    return engine


class _Host:
    """What another thread would read of a finished copy."""

    def __init__(self, shape: torch.Size, value: bool) -> None:
        self._shape, self._value = shape, value

    def numpy(self) -> Any:
        return np.zeros(self._shape, np.float32)

    def tolist(self) -> list[bool]:
        return [self._value] * self._shape[0]

    def __bool__(self) -> bool:
        return self._value


def plant(fault: str, family: Any) -> contextlib.AbstractContextManager[Any]:
    """Make the engine do what it must not do."""
    from latentline_worker.engine import lane as lane_module
    from latentline_worker.engine.lane import Lane

    denoise, gather = family.denoise, Lane._gather

    def asks_for_a_number(latents: torch.Tensor, timesteps: torch.Tensor, rows: Any) -> torch.Tensor:
        float(timesteps[0])
        return denoise(latents, timesteps, rows)  # type: ignore[no-any-return]

    def indexed(self: Any, requests: Any) -> Any:
        slots = [slot for request in requests for slot in request.slots]
        self._history[slots if fault == "list" else torch.tensor(slots)]
        return gather(self, requests)

    faults: dict[str, Any] = {
        "none": contextlib.nullcontext(),
        "synchronisation": mock.patch.object(family, "denoise", asks_for_a_number),
        "list": mock.patch.object(Lane, "_gather", indexed),
        "index": mock.patch.object(Lane, "_gather", indexed),
        "pageable": mock.patch.object(lane_module, "to_device", lambda tensor, _: tensor.to(DEVICE)),
    }
    return faults[fault]  # type: ignore[no-any-return]


FAULTS = ("none", "synchronisation", "list", "index", "pageable")
MOST_STEPS = 50
JOBS: list[dict[str, Any]] = [
    {"scheduler": "dpmpp_2m", "steps": 6, "guidance": 5.0, "seeds": (1, 2), "preview_every": 2, "decode": True},
    {"scheduler": "euler_ancestral", "steps": 4, "guidance": 0.0, "seeds": (3,)},
    {"scheduler": "unipc", "steps": 5, "guidance": 3.0, "seeds": (4,), "decode": True},
]


def noted(fault: str, config: dict[str, Any]) -> list[str]:
    """What the watch notes of the jobs with a planted fault, and how they ended."""
    from latentline_worker.models.sd import StableDiffusion
    from support.engines import work
    from support.tiny import tiny_pipeline

    pipeline = on_cuda(tiny_pipeline)
    family = StableDiffusion(
        "tiny", vae=pipeline.vae, unet=pipeline.unet, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
        scheduler_config=config, device=DEVICE, dtype=torch.float32,
    )  # fmt: skip
    engine = engine_on(family)
    works = [work(family, "a cat", **job) for job in JOBS]
    watch, steps, waits = Watch(), 0, Event.waits
    with plant(fault, family), watch:
        requests = [engine.submit(one) for one in works]
        while not engine.idle and steps < MOST_STEPS:
            engine.step()
            steps += 1
    found = list(dict.fromkeys(watch.violations))
    for request in requests:
        if not request.future.done():
            found.append("a job did not end")
        elif error := request.future.exception():
            found.append(f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    if Event.waits - waits > steps + len(works):  # one a step, and one for each result where nothing else is left to launch
        found.append(f"{Event.waits - waits} waits in {steps} steps")
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    from latentline_worker.samplers import sampler_table
    from support.tiny import tiny_pipeline

    config = dict(tiny_pipeline().scheduler.config)
    for job in JOBS:  # compiled with real numbers, and kept
        sampler_table(job["scheduler"], config, job["steps"])
    with fake_cuda():
        print(json.dumps({fault: noted(fault, config) for fault in FAULTS}))


if __name__ == "__main__":
    main()
