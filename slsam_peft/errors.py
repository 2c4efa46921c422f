"""The one error a command line shows without a traceback."""


class UserError(Exception):
    """What a user asked for cannot be done.

    The message is a few lines: the value, what is allowed and what to do next. The command line prints it to stderr
    and exits with code 2.
    """
