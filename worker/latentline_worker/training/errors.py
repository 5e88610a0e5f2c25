"""What can go wrong in training, on purpose."""

from __future__ import annotations

from latentline.errors import LatentlineError


class TrainingError(LatentlineError):
    """A recipe, a data set or a state folder cannot be used, or the state cannot be saved; the message names it."""

    code = "training_error"
