"""The one error of the check."""


class CheckError(Exception):
    """The check cannot go on, or an image does not do what it should; the message is one sentence for the operator."""
