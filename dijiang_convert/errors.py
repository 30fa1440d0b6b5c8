"""The one exception the package raises for anything a user can put right."""


class DijiangError(Exception):
    """A failure told in one line: what went wrong, where, and what to do about it.

    The command line prints it as ``error: …`` and exits with code 1; ``--debug`` adds the traceback.
    """


class Unsupported(DijiangError):
    """The source is fine, but this package does not convert its kind of model."""
