"""The axes of ``latentline grid``: what may differ between its pictures, while all else and the seed stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentline.errors import InvalidRequest
from latentline.jobs import ModelInfo
from latentline.requests import JobRequest

MAX_CELLS = 64

# What an axis may be, and how its values are read. The seed is none: one grid has one seed.
FIELDS: Mapping[str, type] = {
    "guidance_scale": float, "height": int, "lora": str, "model": str, "num_inference_steps": int, "scheduler": str, "width": int,
}  # fmt: skip
KINDS = {int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Axis:
    """A field and its values, as they stand in requests; ``labels`` as they were given."""

    field: str
    values: Sequence[Any]
    labels: Sequence[str]

    @classmethod
    def parse(cls, option: str, text: str) -> Axis:
        """``num_inference_steps=8,16,32``; raises InvalidRequest."""
        field, sign, given = text.partition("=")
        if not sign or field not in FIELDS:
            raise InvalidRequest(option, text, "FIELD=VALUE,VALUE with FIELD one of: " + ", ".join(FIELDS))
        labels = [label.strip() for label in given.split(",")]
        if not all(labels) or len(set(labels)) < len(labels):
            raise InvalidRequest(f"{option} {field}", given, "different values, separated by commas")
        return cls(field, [_value(field, label) for label in labels], labels)

    def fields(self, number: int) -> dict[str, Any]:
        """What this value adds to a request."""
        return {"loras": self.values[number]} if self.field == "lora" else {self.field: self.values[number]}


def _value(field: str, label: str) -> Any:
    if field == "lora":
        return [] if label == "none" else [lora_of(label)]
    kind = FIELDS[field]
    try:
        return kind(label)
    except ValueError:
        raise InvalidRequest(field, label, KINDS[kind]) from None


def lora_of(text: str, field: str = "lora") -> dict[str, Any]:
    """``NAME`` or ``NAME:SCALE``; raises InvalidRequest."""
    name, _, scale = text.partition(":")
    try:
        return {"name": name, "scale": float(scale)} if scale else {"name": name}
    except ValueError:
        raise InvalidRequest(field, text, "NAME or NAME:SCALE, such as pixelart:0.8") from None


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    column: int
    row: int
    body: dict[str, Any]


def cells(body: dict[str, Any], x: Axis, y: Axis | None) -> list[Cell]:
    """Every combination, row by row, checked against the limits of a request.

    Raises:
        InvalidRequest: too many, an axis that is also an option of its own, or a request that is not acceptable.
    """
    if y and y.field == x.field:
        raise InvalidRequest("--y", y.field, f"another field than --x, {x.field}")
    for axis in filter(None, (x, y)):
        for name in axis.fields(0):
            if name in body:
                raise InvalidRequest(axis.field, body[name], "either an axis of the grid or an option, not both")
    rows = range(len(y.values) if y else 1)
    if len(x.values) * len(rows) > MAX_CELLS:
        raise InvalidRequest("grid", len(x.values) * len(rows), f"at most {MAX_CELLS} pictures")
    found = [Cell(i, j, {**body, **x.fields(i), **(y.fields(j) if y else {})}) for j in rows for i in range(len(x.values))]
    for cell in found:
        JobRequest.parse(cell.body)
    return found


def check_models(found: Sequence[Cell], served: Iterator[ModelInfo] | Sequence[ModelInfo]) -> None:
    """Check every cell against what its model offers; raises InvalidRequest."""
    models = {info.id: info for info in served}
    for cell in found:
        request = JobRequest.parse(cell.body)
        if request.model not in models:
            raise InvalidRequest("model", request.model, f"one of: {', '.join(models) or 'none, no worker is alive'}")
        models[request.model].size_of(request)
