"""Other threads get host memory only: with a fake CUDA on which nothing is finished before the test says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import make_engine, once, work
from torch.utils._python_dispatch import TorchDispatchMode

from latentline_worker.engine import host_copies
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.host_copies import HostCopies
from latentline_worker.engine.request import Cancelled
from latentline_worker.models.sd import StableDiffusion


class OnDevice(torch.Tensor):
    """A tensor whose values nobody may read from the host: that would wait for the device."""

    users: list[object]
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    def record_stream(self, stream: object) -> None:
        self.users.append(stream)

    def cpu(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("this waits for the device")

    numpy = item = tolist = __bool__ = cpu  # type: ignore[assignment]


def on_device(values: Sequence[float]) -> OnDevice:
    tensor = torch.tensor(values).as_subclass(OnDevice)
    tensor.users = []
    return tensor


class FakeCuda:
    """Streams that do nothing, and events that happen when the test says so."""

    def __init__(self) -> None:
        self.happened = threading.Event()
        self.waiting = threading.Event()  # somebody waits for an event
        self.pinned: list[torch.Tensor] = []
        self.waited_for: list[object] = []
        self.lost = False
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing, "times are read from it"

            def record(self, stream: object = "default stream") -> None:
                assert stream is not None

            def elapsed_time(self, later: object) -> float:
                assert isinstance(later, Event)
                return 0.0

            def query(self) -> bool:
                cuda.fail_if_lost()
                return cuda.happened.is_set()

            def synchronize(self) -> None:
                cuda.waiting.set()
                cuda.fail_if_lost()
                assert cuda.happened.wait(60)

        class Stream:
            def __init__(self, device: object) -> None:
                pass

            def wait_stream(self, other: object) -> None:
                cuda.waited_for.append(other)

        @contextlib.contextmanager
        def stream(_: object) -> Iterator[None]:
            yield

        def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
            assert pin_memory, "a copy into memory that is not pinned waits for the device"
            self.pinned.append(torch.zeros(shape, dtype=dtype))
            return self.pinned[-1]

        self.torch = SimpleNamespace(
            cuda=SimpleNamespace(Event=Event, Stream=Stream, stream=stream, current_stream=lambda: "default stream"), empty=empty
        )

    def fail_if_lost(self) -> None:
        if self.lost:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    def copies(self) -> HostCopies:
        return HostCopies(torch.device("cuda"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(host_copies, "torch", fake.torch)
    return fake


def test_a_copy_is_published_when_its_event_has_happened_and_not_before(cuda: FakeCuda) -> None:
    copies, published = cuda.copies(), list[list[float]]()
    first, second = on_device([1.0, 2.0]), on_device([3.0])
    copies.copy([first], lambda tensors: published.append(tensors[0].tolist()))
    copies.copy([second], lambda tensors: published.append(tensors[0].tolist()))
    copies.publish_done()
    assert published == [] and not cuda.waiting.is_set(), "asking must not wait"
    cuda.happened.set()
    copies.publish_done()
    assert published == [[1.0, 2.0], [3.0]]
    copies.publish_done()
    assert len(published) == 2
    assert first.users and second.users, "the allocator has to know that the copy's stream reads them"
    assert cuda.waited_for == ["default stream"] * 2, "what is copied has to be computed first, on the device's side"


def test_publishing_all_waits_for_what_is_under_way(cuda: FakeCuda) -> None:
    copies, published = cuda.copies(), list[float]()
    copies.copy([on_device([1.0])], lambda tensors: published.append(float(tensors[0])))
    cuda.happened.set()
    copies.publish_all()
    assert published == [1.0] and cuda.waiting.is_set()


def test_without_memory_for_the_copies_nothing_is_published(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory (simulated)")

    cuda.torch.empty, copies = empty, cuda.copies()
    with pytest.raises(torch.OutOfMemoryError):
        copies.copy([on_device([1.0])], lambda _: pytest.fail("published"))
    cuda.happened.set()
    copies.publish_all()


@once
def test_nobody_waits_for_a_device_that_hangs_but_the_engines_own_thread(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    engine.publisher._copies = cuda.copies()

    # The engine's tensors are on the CPU here; the copies treat them as the device's.
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None, raising=False)
    request = engine.submit(work(family, steps=4, decode=True, preview_every=1))
    engine.start()
    assert cuda.waiting.wait(60), "with nothing left to launch, the engine's thread waits for its copies"
    # What leases and the watchdog do meanwhile, each at once:
    assert request.checkpoint is None and request.preview is None and not request.future.done()
    engine.intake.progress_at -= 3600
    assert engine.stalled_for() > 3000, "it hangs, with a job in it"
    cuda.happened.set()
    assert request.result(60).shape == (1, 32, 32, 3)
    checkpoint, preview = request.checkpoint, request.preview
    assert checkpoint is not None and preview is not None
    assert (checkpoint.step, preview.step) == (4, 3)
    assert isinstance(checkpoint.history, np.ndarray) and isinstance(preview.pixels, np.ndarray)
    assert any(np.shares_memory(checkpoint.history, host.numpy()) for host in cuda.pinned)
    assert Checkpoint.from_bytes(checkpoint.to_bytes(request.work), request.work) is not None
    engine.stop()


@once
def test_the_engine_goes_on_launching_while_copies_are_under_way(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda
) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    engine.publisher._copies = cuda.copies()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None, raising=False)
    monkeypatch.setattr(engine.checkpoint_schedule, "due", lambda *_: True)
    request = engine.submit(work(family, steps=9, preview_every=1))
    for _ in range(5):
        engine.step()
    assert request.step == 5 and not cuda.waiting.is_set()
    assert request.checkpoint is None, "a copy that is not complete is not shown"
    cuda.happened.set()
    engine.step()
    assert request.checkpoint is not None and request.preview is not None
    assert (request.checkpoint.step, request.preview.step) == (6, 6)


@pytest.mark.parametrize("steps", [1, 9], ids=["waiting for the copies", "asking for them"])
@once
def test_a_device_that_is_lost_while_it_copies_ends_the_engine(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, steps: int
) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    engine.publisher._copies = cuda.copies()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None, raising=False)
    cuda.lost = True
    request = engine.submit(work(family, steps=steps))
    engine.start()
    with pytest.raises(Cancelled, match="lost"):
        request.result(60)
    assert cuda.waiting.is_set() == (steps == 1)
    assert engine.stalled_for() == float("inf")
    engine.stop()


class NoWaiting(TorchDispatchMode):
    """Fails on operators that read a device value on the host, or whose result's size depends on values."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(self.WAITS), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail on what makes the host wait for a GPU: reading values, and indices that first have to get there.

    A list of numbers is such an index, since it is copied from memory that is not pinned.
    """

    def checked(access: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, index: Any, *value: Any) -> Any:
            for one in index if isinstance(index, tuple) else (index,):
                assert not isinstance(one, list | np.ndarray), f"the index {one} waits for the device"
                assert not (isinstance(one, torch.Tensor) and one.dtype == torch.bool), "a mask as an index waits for the device"
            return access(self, index, *value)

        return call

    with monkeypatch.context() as patch, NoWaiting():  # type: ignore[no-untyped-call]
        patch.setattr(torch.Tensor, "__getitem__", checked(torch.Tensor.__getitem__))
        patch.setattr(torch.Tensor, "__setitem__", checked(torch.Tensor.__setitem__))
        yield


@once
def test_neither_a_step_nor_what_is_taken_of_a_job_waits_for_the_device(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family)
    guided = engine.submit(work(family, "guided", "euler_ancestral", 5, seeds=(1, 2), preview_every=1))
    unguided = engine.submit(work(family, "unguided", "dpmpp_3m", 5, guidance=1.0))
    engine.step()
    (lane,) = engine.lanes.values()
    with no_waiting(monkeypatch):
        lane.step([guided, unguided], 8)
        taken = [lane.snapshot(guided), lane.snapshot(unguided), lane.latents(guided), lane.denoised(guided)]
    shapes = [(request.num_images, 2 * request.work.table.order, 1024) for request in (guided, unguided)]
    assert [tuple(tensor.shape) for tensor in taken] == [*shapes, (2, 4, 16, 16), (2, 4, 16, 16)]


@pytest.mark.parametrize("index", [[0], ([0], 1), torch.tensor([True, False])], ids=["list", "list and number", "mask"])
def test_the_guard_against_waiting_notices_an_index_that_waits(monkeypatch: pytest.MonkeyPatch, index: Any) -> None:
    values = torch.zeros(2, 2)
    with no_waiting(monkeypatch):
        with pytest.raises(AssertionError, match="waits for the device"):
            values[index]
        with pytest.raises(AssertionError, match="waits for the device"):
            values[index] = 1.0
        with pytest.raises(AssertionError, match="waits for the device"):
            float(values[0, 0])
