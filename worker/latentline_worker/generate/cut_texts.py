"""What a model's text encoder did not read of a job's texts."""

from __future__ import annotations

from latentline.jobs import JobWarning
from latentline_worker.engine.request import Request


def cut_texts(request: Request) -> list[JobWarning]:
    """A warning for each text that is longer than the text encoder reads, once the texts are encoded."""
    found = []
    for text, (count, read) in zip(request.work.texts, request.tokens, strict=False):
        if count > read:
            field = "negative_prompt" if text.negative else "prompt"
            message = f"{field} has {count} tokens, of which {request.work.model} reads the first {read}: {count - read} were cut"
            found.append(JobWarning(code="prompt_truncated", field=field, message=message))
    return found
