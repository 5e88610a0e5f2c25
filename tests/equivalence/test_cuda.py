"""What CUDA needs of the engine, held without a GPU: no wait but the intended one, graphs used as graphs are, errors of any call."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import FIXED_ROWS, MOST_STEPS, assert_close, drain, embeds, make_engine, once, run, short_of_memory, work
from torch.utils._python_dispatch import TorchDispatchMode

from latentline_worker.engine import graphs as graphs_module
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.graphs import BUCKETS, Graphs
from latentline_worker.engine.network import Network
from latentline_worker.models.sd import StableDiffusion

TESTS = Path(__file__).parents[1]
OWN = (64, 64)  # the size at which the tiny model warms up


@pytest.fixture(scope="module")
def noted() -> dict[str, list[str]]:
    """What the watch on a fake CUDA notes, by planted fault, in a process of its own: it changes tables of torch."""
    command = [sys.executable, "-m", "support.fake_cuda"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_no_step_waits_for_the_device_but_at_the_one_intended_place(noted: dict[str, list[str]]) -> None:
    assert noted["none"] == []


@pytest.mark.parametrize(
    ("fault", "start"),
    [
        ("synchronisation", "synchronisation: aten.item"),
        ("index", "index on the host: aten.index"),
        ("list", "failed: "),  # torch makes a tensor of the list on the device, for which a fake one has no memory
        ("pageable", "pageable copy from cpu to cuda"),
    ],
)
def test_the_watch_notes_what_is_planted(noted: dict[str, list[str]], fault: str, start: str) -> None:
    assert any(one.startswith(start) for one in noted[fault]), noted[fault]


class Recorder:
    """In the place of a captured graph: real values, and outputs that the next replay of any graph destroys, as in one shared pool."""

    made: list[Recorder]
    closed: bool

    def __init__(self, forward: Callable[..., torch.Tensor], static: tuple[torch.Tensor, ...], pool: Any) -> None:
        assert not Recorder.closed, "captured after warm-up"
        assert pool == "the pool", "graphs of one device share one pool"
        self._forward, self._static = forward, static
        self._out = forward(*static).clone()
        self.rows, self.num_replays = len(static[0]), 0
        Recorder.made.append(self)

    def __call__(self, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.num_replays += 1
        for other in Recorder.made:
            other._out.fill_(float("nan"))
        for static, fresh in zip(self._static, rows, strict=True):
            static.copy_(fresh)
        return self._out.copy_(self._forward(*self._static))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    Recorder.made, Recorder.closed = [], False
    monkeypatch.setattr(graphs_module, "Graph", Recorder)
    yield Recorder
    Recorder.made = []


def engine_with_graphs(family: StableDiffusion, **options: Any) -> Engine:
    engine = make_engine(family, **options)
    for network in engine.networks.values():
        network._graphs = Graphs("the pool")
        network.trace = lambda *_: None  # type: ignore[method-assign] # a recording of the CPU would take the place of the forward
    engine.warm_up()
    Recorder.closed = True
    return engine


@once
def test_jobs_on_graphs_equal_jobs_without(family: StableDiffusion, recorder: type[Recorder]) -> None:
    works = [
        work(family, f"thing {i}", ["dpmpp_2m", "euler_ancestral", "heun"][i % 3], 4 + i, i % 4 * 2.0, (i, 50 + i), OWN) for i in range(5)
    ]
    expected = [request.result(0) for request in run(make_engine(family), *works)]
    engine = engine_with_graphs(family, max_rows=16)
    assert [graph.rows for graph in recorder.made] == [bucket for bucket in reversed(BUCKETS) if bucket <= 16], "the largest first"
    replays = sum(graph.num_replays for graph in recorder.made)
    for request, picture in zip(run(engine, *works), expected, strict=True):
        assert_close(request.result(0), picture)
    assert sum(graph.num_replays for graph in recorder.made) > replays, "no graph was used"


@once
def test_other_shapes_run_without_a_graph_after_warm_up(family: StableDiffusion, recorder: type[Recorder]) -> None:
    engine = engine_with_graphs(family, max_rows=4)
    expected = run(make_engine(family), work(family, size=(48, 48)))[0].result(0)
    assert_close(run(engine, work(family, size=(48, 48)))[0].result(0), expected)


@once
def test_the_reproducible_mode_captures_its_one_row_count(family: StableDiffusion, recorder: type[Recorder]) -> None:
    engine = engine_with_graphs(family, fixed_rows=FIXED_ROWS)
    assert [graph.rows for graph in recorder.made] == [FIXED_ROWS]
    expected = run(make_engine(family, fixed_rows=FIXED_ROWS), work(family, size=OWN))[0].result(0)
    assert torch.equal(run(engine, work(family, size=OWN))[0].result(0), expected)


@once
def test_a_capture_outside_of_warm_up_is_noticed(family: StableDiffusion, recorder: type[Recorder]) -> None:
    engine = engine_with_graphs(family, max_rows=2)
    network = engine.networks["tiny"]
    assert network._graphs is not None
    with pytest.raises(AssertionError, match="captured after warm-up"):
        recorder(lambda *flat: flat[0], (torch.zeros(1, 4, 2, 2),), "the pool")


@once
def test_a_forward_that_cannot_be_captured_runs_without_a_graph(
    family: StableDiffusion, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    """For instance without memory for the largest; the smaller ones are captured all the same."""
    real = Recorder.__init__

    def init(self: Recorder, forward: Any, static: Any, pool: Any) -> None:
        if len(static[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, forward, static, pool)

    recorder.__init__ = init  # type: ignore[method-assign]
    try:
        engine = engine_with_graphs(family, max_rows=8)
    finally:
        recorder.__init__ = real  # type: ignore[method-assign]
    assert [graph.rows for graph in recorder.made] == [4, 3, 2, 1]
    assert "no CUDA graph for 8 rows (OutOfMemoryError): they run without one" in caplog.text
    works = [work(family, f"thing {i}", guidance=5.0, seeds=(i,), size=OWN) for i in range(4)]
    for request, expected in zip(run(engine, *works), run(make_engine(family), *works), strict=True):
        assert_close(request.result(0), expected.result(0))


@pytest.mark.parametrize("fixed_rows", [None, 4])
@once
def test_parts_of_a_split_batch_do_not_share_the_output_of_a_graph(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, recorder: type[Recorder], fixed_rows: int | None
) -> None:
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps, rows = torch.full((8,), 500.0), {"prompt_embeds": embeds(family, *"abcdefgh")}
    expected = Network(family)(x, timesteps, rows)[0]
    short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: len(latents) <= 4)
    net = Network(family, fixed_rows, Graphs("the pool"))
    net.capture(x[:1], timesteps[:1], {name: tensor[:1] for name, tensor in rows.items()}, most=8)
    got, most = net(x, timesteps, rows)
    assert most == 4
    assert_close(got, expected)


class Failing(TorchDispatchMode):
    """Lets one operator fail, counted from the start of the block."""

    def __init__(self, at: int, error: Exception | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.error, self.num_calls = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        if self.num_calls == self.at and self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


def three(family: StableDiffusion) -> list[Any]:
    return [
        work(family, "a", "euler_ancestral", 3, 4.0, (1,), decode=True, preview_every=1),
        work(family, "b", "dpmpp_2m", 4, 0.0, (2,)),
        work(family, "c", "unipc", 3, 2.0, (3,), decode=True),
    ]


@once
def test_whatever_operator_runs_out_of_memory_the_others_get_their_pictures(family: StableDiffusion) -> None:
    works = three(family)
    expected = [request.result(0) for request in run(make_engine(family), *works)]
    with Failing(-1, None) as counted:
        run(make_engine(family, checkpoint_s=0.0), *works)
    for at in range(1, counted.num_calls, counted.num_calls // 40):
        engine = make_engine(family, checkpoint_s=0.0)
        requests = [engine.submit(one) for one in works]
        with Failing(at, torch.OutOfMemoryError("CUDA out of memory")):
            drain(engine)
        failed = [request for request in requests if request.future.exception(0)]
        assert len(failed) <= 1, f"operator {at}: {[str(request.future.exception(0)) for request in failed]}"
        for request, picture in zip(requests, expected, strict=True):
            if request not in failed:
                assert (request.result(0).float() - picture.float()).abs().max() <= 1e-3 * picture.float().abs().max() + 1, at


@once
def test_whatever_operator_loses_the_device_no_job_is_blamed(family: StableDiffusion) -> None:
    works = three(family)
    engine = make_engine(family, checkpoint_s=0.0)
    for one in works:
        engine.submit(one)
    engine.step()
    with Failing(-1, None) as counted:
        drain(engine)
    for at in range(2, counted.num_calls, counted.num_calls // 20):
        engine = make_engine(family, checkpoint_s=0.0)
        requests = [engine.submit(one) for one in works]
        engine.step()  # tokenizers make errors of their own of those in them, and do not use the device
        lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(torch.AcceleratorError), Failing(at, lost):
            for _ in range(MOST_STEPS):
                engine.step()
        for request in requests:
            assert not (request.future.done() and request.future.exception(0)), f"operator {at}: {request.future.exception(0)}"
