"""The errors a user may see: one clear line each, with what is wrong, where, and what to do."""


def one_line(text: str) -> str:
    """The text with every kind of space as a space, and every other sign that cannot be shown as an escape."""
    spaced = "".join(" " if sign in "\n\r\t" else sign for sign in text)
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in spaced)


def plain_lines(text: str) -> str:
    """The text with its line breaks, and in each line only signs that can be shown, see `one_line`."""
    return "\n".join(map(one_line, text.split("\n")))


class FedFactoryError(Exception):
    """Something went wrong that the user can act on. The command line prints it and exits with 1.

    Names of files, texts of headers and what others sent appear in messages: signs that could command a terminal, break
    a line or turn its direction are written as escapes, here, for all that print or log an error.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(str(message)))


class UsageError(FedFactoryError):
    """The request itself is invalid (missing folder, unknown name). Exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is out of range."""


class VolumeError(FedFactoryError):
    """A medical volume cannot be read, or is not a usable 3-D image."""


class StoreError(FedFactoryError):
    """A slice store is missing, damaged or unsuitable for what it is used for."""


class CheckpointError(FedFactoryError):
    """A weights file is truncated, foreign, or of another configuration."""


class TrainingError(FedFactoryError):
    """Training met a value that it must not continue from, such as NaN."""


class NodeDataError(FedFactoryError):
    """A node's data cannot be trained on. The text may travel to the researcher: counts only, no names."""


class FederationError(FedFactoryError):
    """Nodes or researcher cannot work together: port taken, plan not approved, too few nodes."""


class QuorumError(FederationError):
    """Fewer sites answered in a round than are required; the round can be repeated."""
