"""What ``latentline evaluate`` does. Given again, it goes on with the pictures that are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentline_worker.training.inputs import find_device
from latentline_worker.training.manifest import MANIFEST
from latentline_worker.training.sources import BuiltData

from . import report
from .ceilings import ceilings, reconstructions, renders
from .drawing import Model
from .errors import EvaluationError
from .measures import look
from .page import Findings
from .probe import SHA256, load
from .prompts import Prompt, load_prompts
from .reconstruction import reconstruct
from .results import figures_of
from .sets import distances, neighbours
from .sweeps import choose

Say = Callable[[str], None]
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Options:
    """What an evaluation may be told.

    Args:
        given: settings (``guidance``, ``sampler``, ``steps``) that are not to be chosen.
        limit: prompts of each split, for a trial; the report then says that it is one.
        threads, device: of torch.
    """

    given: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    threads: int | None = None
    device: str | None = None


def evaluate(source: str, data: Path, out: Path, options: Options, say: Say) -> None:
    """Choose settings on the validation prompts, draw the test prompts, write ``report.md`` and ``report.json`` into ``out``.

    Raises:
        EvaluationError: model, data set, probe or ``out`` cannot be used; the message names it.
        TrainingError: torch has no such device.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    probe = load()
    model = Model(source, out, f"{_data_key(data)}/{SHA256}", say, device)
    built = BuiltData(data, model.size_px)
    validation, test = (load_prompts(data, split, built.catalogue, options.limit) for split in ("validation", "test"))
    if sampler := options.given.get("sampler"):
        _check_sampler(model, str(sampler))
    choice = choose(model, validation, probe, options.given)
    say(f"settings: {choice.settings.name}")
    by_seed = [model.draw("test", test, choice.settings, seed) for seed in SEEDS]
    seen = [look(pictures, test, probe) for pictures in by_seed]
    vae = model.pipeline.vae.cpu()
    real, again = (renders(test, built, purpose) for purpose in ("real", "again"))
    parts, shown = reconstructions(built, real, vae)
    findings = Findings(
        source=Path(source).name,
        trial=options.limit is not None,
        num_prompts=(len(validation), len(test)),
        choice=choice,
        seen=seen,
        model=figures_of(seen),
        ceilings=ceilings(test, real, vae, probe),
        reconstructions=parts,
        distances=distances(by_seed, real, again, reconstruct(vae, real)),
        neighbours={"the model, seed 0": neighbours(by_seed[0], test, built), "real renders": neighbours(real, test, built)},
    )
    shown_prompts = _first_of_each(test)
    sheets = report.Sheets(
        drawn=by_seed[0][[index for index, _ in shown_prompts]],
        real=real[[index for index, _ in shown_prompts]],
        seeds=np.concatenate([pictures[[index for index, _ in shown_prompts[::6]]] for pictures in by_seed]),
        reconstructed=shown,
        prompts=[prompt.words for _, prompt in shown_prompts],
    )
    try:
        report.write(out, findings, sheets, test)
    except OSError as error:
        raise EvaluationError(f"{out}: the report cannot be written: {error}") from error
    say(f"the report is {out / report.PAGE}")


def _first_of_each(prompts: list[Prompt]) -> list[tuple[int, Prompt]]:
    """The first twelve prompts of each layout, with their places in the list: nobody picks."""
    chosen: list[tuple[int, Prompt]] = []
    for kind in dict.fromkeys(prompt.composition.layout for prompt in prompts):
        chosen += [(i, prompt) for i, prompt in enumerate(prompts) if prompt.composition.layout == kind][:12]
    return chosen


def _check_sampler(model: Model, name: str) -> None:
    if name not in model.samplers:
        raise EvaluationError(f"sampler: got {name!r}; allowed for this model: {', '.join(model.samplers)}")


def _data_key(data: Path) -> str:
    """Changes with the data set or its prompts.

    Raises:
        EvaluationError: a file is missing.
    """
    digest = hashlib.sha256()
    try:
        for name in (MANIFEST, "prompts-validation.jsonl", "prompts-test.jsonl"):
            digest.update((data / name).read_bytes())
    except OSError as error:
        raise EvaluationError(f"{data}: no built data set: {error}; `latentline train data` makes one") from error
    return digest.hexdigest()
