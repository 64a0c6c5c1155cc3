"""The errors a user can cause. The command line prints them as one line and exits with their code."""


class SmkdError(Exception):
    """Base of every error whose message is meant for the user.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 2


class ConfigError(SmkdError):
    """A recipe, a key or a value is wrong."""


class DataError(SmkdError):
    """An image, a folder or a split is missing, unreadable or too small."""


class CheckpointError(SmkdError):
    """A checkpoint cannot be read, written, or does not fit the model."""


class DownloadError(SmkdError):
    """A file cannot be fetched; the message is the reason."""


class ChecksumError(DownloadError):
    """What was fetched is another file; the message says what it has and where it is kept."""


class Stopped(SmkdError):  # noqa: N818  # it went as asked
    """A run stopped between two steps because it was asked to, with everything saved.

    Args:
        message: one line.
        exit_code: 128 + the signal's number, or 75 when `max_hours` are over (docs/reliability.md).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class SmkdWarning(UserWarning):
    """Something was left out, or is done otherwise than asked; the command line prints it as one line."""
