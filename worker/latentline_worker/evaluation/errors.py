"""What can go wrong in an evaluation, on purpose."""

from __future__ import annotations

from latentline.errors import LatentlineError


class EvaluationError(LatentlineError):
    """A model, a data set, a probe or a folder of results cannot be used; the message names it."""

    code = "evaluation_error"
