"""Defines the errors a command line shows without a traceback, and puts those of libraries on one line."""


class UserError(Exception):
    """What a user asked for cannot be done.

    The message is a few lines: the value, what is allowed and what to do next. The command line prints it to stderr
    and exits with code 2.
    """


class DivergedError(RuntimeError):
    """Training has stopped: more steps in a row than allowed had a NaN or infinite loss or gradient.

    The message says how many and what was seen last. The command line prints it and exits with code 1.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end. The command line prints the message and exits with 128 + `signal`.

    Args:
        signal (`int`): Its number: 2 (SIGINT, Ctrl-C) or 15 (SIGTERM).
        message (`str`): What has been done, and how to go on.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def brief(error: BaseException, limit: int = 400) -> str:
    """Return an error's message on one line, cut off where it is long; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
