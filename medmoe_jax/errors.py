"""The exceptions whose text is written for the user."""


class UserError(ValueError):
    """Bad input: the message names the field, file or line and says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


class Stopped(Exception):
    """The machine asked the run to stop: all that was done is saved, the same command continues."""
