"""From latents to pixels, between denoise steps."""

from __future__ import annotations

import pytest
import torch
from support.engines import (
    FIXED_ROWS,
    Decodes,
    make_engine,
    num_used,
    once,
    psnr_db,
    run,
    solo,
    work,
)

from latentline_worker.engine import decoder
from latentline_worker.models.sd import StableDiffusion


def test_the_engine_gives_the_pixels_that_the_family_decodes(family: StableDiffusion) -> None:
    latents = solo(family, work(family, steps=6, seeds=(1, 2)))
    pixels = solo(family, work(family, steps=6, seeds=(1, 2), decode=True))
    with torch.inference_mode():
        assert torch.equal(pixels, family.decode(latents, tiled=False))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 32, 32, 3))


@once
def test_images_of_several_jobs_are_decoded_together(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    requests = run(make_engine(family, decode_batch=4), *[work(family, seeds=(i, i + 10), decode=True) for i in range(3)])
    assert decodes.calls == [(4, False), (2, False)]
    for i, request in enumerate(requests):
        expected = solo(family, work(family, seeds=(i, i + 10), decode=True))
        assert (request.result(0).int() - expected.int()).abs().max() <= 1  # rounding


@once
def test_images_of_unlike_sizes_are_not_decoded_together(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    engine = make_engine(family)
    requests = run(engine, work(family, size=(48, 40), decode=True), work(family, decode=True))
    assert decodes.calls == [(1, False), (1, False)]
    assert [request.result(0).shape for request in requests] == [(1, 40, 48, 3), (1, 32, 32, 3)]


@once
def test_in_the_reproducible_mode_images_are_decoded_one_by_one(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    run(make_engine(family, fixed_rows=FIXED_ROWS), *[work(family, seeds=(i, i + 10), decode=True) for i in range(2)])
    assert decodes.calls == [(1, False)] * 4


@pytest.mark.parametrize("guilty_image", [0, 1])
@once
def test_a_decode_that_fails_fails_its_own_job_alone(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, guilty_image: int) -> None:
    bad = work(family, "bad", seeds=(5, 6), decode=True)
    poison = solo(family, work(family, "bad", seeds=(5, 6)))[guilty_image]
    decodes = Decodes(family, monkeypatch)

    def fails(latents: torch.Tensor, tiled: bool) -> Exception | None:
        return ValueError("poison") if any(torch.allclose(image, poison, atol=1e-4) for image in latents) else None

    decodes.fails = fails
    engine = make_engine(family)
    before, failed, after = run(engine, work(family, "before", decode=True), bad, work(family, "after", seeds=(7, 8, 9), decode=True))
    with pytest.raises(ValueError, match="poison"):
        failed.result(0)
    assert before.result(0).shape == (1, 32, 32, 3)
    assert after.result(0).shape == (3, 32, 32, 3)
    assert num_used(engine) == 0


@once
def test_large_images_are_decoded_in_tiles(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TILE_ABOVE_PIXELS", 32 * 32)
    decodes = Decodes(family, monkeypatch)
    large, small = run(make_engine(family), work(family, size=(64, 64), decode=True), work(family, decode=True))
    assert sorted(decodes.calls) == [(1, False), (1, True)]
    latents = solo(family, work(family, size=(64, 64)))
    with torch.inference_mode():
        tiled, whole = family.decode(latents, tiled=True), family.decode(latents, tiled=False)
    assert torch.equal(large.result(0), tiled)
    assert large.result(0).shape == whole.shape == (1, 64, 64, 3)
    assert psnr_db(tiled, whole) > 25.0  # measured 34.6: group norms see one tile each
    assert small.result(0).shape == (1, 32, 32, 3)


@once
def test_a_decode_without_memory_is_tried_in_tiles(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [work(family, f"thing {i}", seeds=(i, i + 10), size=(64, 64), decode=True) for i in range(2)]
    expected = [solo(family, work(family, f"thing {i}", seeds=(i, i + 10), size=(64, 64))) for i in range(2)]
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: None if tiled else torch.OutOfMemoryError("out of memory (simulated)")
    requests = run(make_engine(family), *works)
    assert decodes.calls[0] == (4, False)
    for request, latents in zip(requests, expected, strict=True):
        with torch.inference_mode():
            tiled = torch.cat([family.decode(image[None], tiled=True) for image in latents])
        assert (request.result(0).int() - tiled.int()).abs().max() <= 1  # rounding


@once
def test_in_the_reproducible_mode_a_decode_without_memory_fails_its_job(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles would give another picture: 34.6 dB against the whole image."""
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("simulated") if latents.shape[-1] > 16 and not tiled else None
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    large, small = run(engine, work(family, size=(64, 64), decode=True), work(family, decode=True))
    with pytest.raises(torch.OutOfMemoryError):
        large.result(0)
    assert small.result(0).shape == (1, 32, 32, 3)
    assert not any(tiled for _, tiled in decodes.calls)


@once
def test_in_the_reproducible_mode_large_images_are_decoded_in_tiles_too(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TILE_ABOVE_PIXELS", 32 * 32)
    decodes = Decodes(family, monkeypatch)
    run(make_engine(family, fixed_rows=FIXED_ROWS), work(family, size=(64, 64), decode=True))
    assert decodes.calls == [(1, True)]


@once
def test_a_decode_batch_without_memory_is_tried_in_smaller_parts_before_tiles(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("out of memory (simulated)") if len(latents) > 1 else None
    requests = run(make_engine(family), *[work(family, seeds=(i,), decode=True) for i in range(3)])
    assert decodes.calls == [(3, False), (2, False), (1, False), (1, False), (1, False)]
    for i, request in enumerate(requests):
        assert (request.result(0).int() - solo(family, work(family, seeds=(i,), decode=True)).int()).abs().max() <= 1


@once
def test_a_decode_that_does_not_fit_in_tiles_either_fails_its_job(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("simulated") if latents.shape[-1] > 16 else None
    large, small = run(make_engine(family), work(family, size=(64, 64), decode=True), work(family, decode=True))
    with pytest.raises(torch.OutOfMemoryError):
        large.result(0)
    assert small.result(0).shape == (1, 32, 32, 3)
    assert decodes.calls.count((1, True)) == 1


@once
def test_an_image_in_tiles_and_a_whole_one_are_not_decoded_in_one_call(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal size, one of them in tiles because there was no memory for it as a whole."""
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("simulated") if len(decodes.calls) == 1 else None
    results: dict[str, torch.Tensor | Exception] = {}
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = decoder.Decoder(max_batch=4)
    made.submit(family, latents[:1], lambda outcome: results.update(tiled=outcome))
    made.decode_some()
    made.submit(family, latents[1:], lambda outcome: results.update(whole=outcome))
    made.decode_some()
    assert results.keys() == {"tiled"}
    made.decode_some()
    assert decodes.calls == [(1, False), (1, True), (2, False)]
    assert not made.pending
    with torch.inference_mode():
        expected = {"tiled": family.decode(latents[:1], tiled=True), "whole": family.decode(latents[1:], tiled=False)}
    for name, pixels in expected.items():
        result = results[name]
        assert isinstance(result, torch.Tensor) and torch.equal(result, pixels)


@once
def test_images_of_one_job_that_need_tiles_keep_their_order(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: None if tiled else torch.OutOfMemoryError("simulated")
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = decoder.Decoder(max_batch=2).decode_now(family, latents)
    with torch.inference_mode():
        expected = torch.cat([family.decode(image[None], tiled=True) for image in latents])
    assert (pixels.int() - expected.int()).abs().max() <= 1  # rounding


@once
def test_a_request_is_told_once_however_many_of_its_images_fail(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: ValueError("broken")
    outcomes: list[torch.Tensor | Exception] = []
    made = decoder.Decoder(max_batch=2)
    made.submit(family, torch.randn(5, 4, 16, 16), outcomes.append)
    made.decode_some()
    assert [str(outcome) for outcome in outcomes] == ["broken"]
    assert not made.pending, "the request's other images are dropped"
    assert decodes.calls == [(2, False), (1, False), (1, False)]
