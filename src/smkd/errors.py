"""The errors a user can cause. The command line prints them as one line and exits with code 2."""


class SmkdError(Exception):
    """Base of every error whose message is meant for the user."""


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


class SmkdWarning(UserWarning):
    """Something was left out, or is done otherwise than asked; the command line prints it as one line."""
