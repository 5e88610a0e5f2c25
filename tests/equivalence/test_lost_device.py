"""After an error of the accelerator nothing works any more: it ends the engine wherever it appears, and is charged to no job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engines import assert_cancelled, drain, make_engine, once, run, work

from latentline_worker.engine.failures import raise_if_lost
from latentline_worker.engine.host_copies import HostCopies
from latentline_worker.engine.lane import Lane
from latentline_worker.engine.noise import Noise
from latentline_worker.engine.preview import LatentToRgb
from latentline_worker.models.sd import StableDiffusion


def lost(*_: Any, **__: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def stack_lost(tensors: Any, *args: Any, real: Callable[..., torch.Tensor] = torch.stack) -> torch.Tensor:
    """Fails where decoded pixels are joined."""
    return lost() if tensors[0].dtype == torch.uint8 else real(tensors, *args)


def result_copy_lost(self: HostCopies, tensors: Any, publish: Any, real: Any = HostCopies.copy) -> None:
    """Fails where a result is copied, which goes with the flag that says whether it is finite."""
    if len(tensors) == 2:
        lost()
    real(self, tensors, publish)


PATHS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "encoding": (StableDiffusion, "encode", lost),
    "growing the lane": (Lane, "grow", lost),
    "joining the lane": (StableDiffusion, "start", lost),
    "fresh noise": (Noise, "draw", lost),
    "the check of the rows": (torch, "isnan", lost),
    "gathering": (Lane, "_gather", lost),
    "the network": (StableDiffusion, "denoise", lost),
    "guidance": (Lane, "_guide", lost),
    "the sampler's update": (Lane, "_advance", lost),
    "the commit": (Lane, "_commit", lost),
    "a checkpoint": (Lane, "snapshot", lost),
    "the map for previews": (LatentToRgb, "fit", lost),
    "a preview": (Lane, "denoised", lost),
    "the final latents": (Lane, "latents", lost),
    "whether they are finite": (torch, "isfinite", lost),
    "decoding": (StableDiffusion, "decode", lost),
    "joining decoded images": (torch, "stack", stack_lost),
    "a copy to the host": (HostCopies, "copy", lost),
    "a result's copy": (HostCopies, "copy", result_copy_lost),
    "asking for copies": (HostCopies, "publish_done", lost),
}


@pytest.mark.parametrize("path", PATHS)
@once
def test_a_device_that_is_lost_ends_the_engine_on_every_path(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    requests = [
        engine.submit(work(family, f"thing {i}", "ddpm", steps=3, seeds=(i, i + 10), decode=True, preview_every=1)) for i in range(4)
    ]
    monkeypatch.setattr(*PATHS[path])
    with caplog.at_level(logging.CRITICAL):
        engine.start()
        for request in requests:
            with pytest.raises(Exception, match="lost"):
                request.result(60)
    for request in requests:
        assert_cancelled(request, "lost")
    assert engine.stalled_for() == float("inf"), "the watchdog ends the process by this"
    assert "the engine has failed" in caplog.text
    assert_cancelled(engine.submit(requests[0].work), "lost")
    engine.stop()


@once
def test_a_device_that_is_lost_while_stopping_leaves_the_jobs_to_others(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told as a shutdown, a job would be released as healthy; lost, its lease runs out."""
    engine = make_engine(family)
    requests = [engine.submit(work(family, seeds=(i,), steps=9)) for i in range(2)]
    engine.step()
    requests.append(engine.submit(work(family, "came last")))  # no step has admitted it
    monkeypatch.setattr(Lane, "snapshot", lost)
    engine.stop()
    engine.start()
    engine.stop()
    for request in requests:
        assert_cancelled(request, "lost")
    assert engine.stalled_for() == float("inf")


@once
def test_every_request_hears_once_of_a_device_lost_in_decode_and_no_finished_one_does(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(family, decode_batch=1)
    (done,) = run(engine, work(family, "done", steps=1, decode=True))
    decoding = [engine.submit(work(family, f"thing {i}", steps=1, seeds=(i, i + 10, i + 20), decode=True)) for i in range(2)]
    monkeypatch.setattr(StableDiffusion, "decode", lost)
    heard: list[object] = []
    for request in [done, *decoding]:
        request.future.add_done_callback(heard.append)
    engine.start()
    for request in decoding:
        with pytest.raises(Exception, match="lost"):
            request.result(60)
    engine.stop()
    assert not engine._thread.is_alive()
    assert len(heard) == 3
    assert done.result(0).shape == (1, 32, 32, 3)


class Synchronize:
    """``torch.cuda.synchronize`` of a process that has used CUDA; counts its calls, and raises what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.error, self.num_calls = error, 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self)

    def __call__(self) -> None:
        self.num_calls += 1
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "path", [(StableDiffusion, "encode"), (StableDiffusion, "denoise"), (StableDiffusion, "decode"), (Lane, "denoised")]
)
@once
def test_a_library_s_error_on_a_lost_device_is_charged_to_no_job(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, path: tuple[object, str]
) -> None:
    """cuBLAS and cuDNN report one as a plain RuntimeError; what CUDA itself says next shows that the device is lost."""

    def library(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`")

    Synchronize(monkeypatch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    engine = make_engine(family)
    requests = [engine.submit(work(family, f"thing {i}", steps=2, decode=True, preview_every=1)) for i in range(2)]
    monkeypatch.setattr(*path, library)
    engine.start()
    for request in requests:
        with pytest.raises(Exception, match="lost"):
            request.result(60)
        assert_cancelled(request, "lost")
    assert engine.stalled_for() == float("inf")
    engine.stop()


def test_the_device_is_asked_only_when_the_error_leaves_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = Synchronize(monkeypatch, None)
    raise_if_lost(ValueError("a job's own"))
    assert healthy.num_calls == 1
    raise_if_lost(torch.OutOfMemoryError("CUDA out of memory"))
    gone = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(torch.AcceleratorError) as raised:
        raise_if_lost(gone)
    assert raised.value is gone and healthy.num_calls == 1
    healthy.error = torch.AcceleratorError("CUDA error: out of memory")
    raise_if_lost(ValueError("a job's own"))
    healthy.error = gone
    with pytest.raises(torch.AcceleratorError) as raised:
        raise_if_lost(cause := RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert raised.value is gone and raised.value.__cause__ is cause


def test_a_process_without_cuda_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Synchronize(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    raise_if_lost(ValueError("a job's own"))
    assert device.num_calls == 0


@once
def test_missing_memory_is_no_lost_device(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reports pinned memory that cannot be had as an accelerator error; the device still works."""

    def no_memory(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    engine = make_engine(family)
    request = engine.submit(work(family, steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(HostCopies, "copy", no_memory)
        drain(engine)
    assert isinstance(request.future.exception(0), torch.AcceleratorError)
    assert run(engine, work(family, steps=2))[0].future.exception(0) is None
