"""What bad input raises: every error whose message tells the user what is wrong and what to do.

A program catches UserError alone. The second base of a kind is what code that expects Python's own errors catches.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input, or something that cannot be done here; the message says what to do."""


class ConfigError(UserError, ValueError):
    """Options that cannot work; the message names the flag and the remedy."""


class ArchitectureError(UserError, ValueError):
    """A model description that is malformed or that this trainer does not implement; the message says what to do."""


class LayoutError(UserError, ValueError):
    """Degrees that do not fit the model or the number of processes; the message says what to change."""


class PlatformError(UserError, RuntimeError):
    """This machine cannot run what was asked; the message says what to change."""


class RankError(UserError, RuntimeError):
    """An action that failed on another rank; the message names that rank and holds its message."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the last good checkpoint is intact. Every rank raises it."""

    on_all_ranks = True


class LogError(UserError, RuntimeError):
    """A file of figures that cannot be read or begun; the message names it."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file or tensor and what to do."""


class ConversionError(UserError, ValueError):
    """A source that does not fit the architecture; the message names the tensor and says what was expected."""


class TokenizerError(UserError, ValueError):
    """A tokenizer folder that cannot be used; the message names it."""


class RemoteError(UserError, OSError):
    """A URL that cannot be read; the message names it and, where there is one, the remedy."""


class ShardReadError(UserError, OSError):
    """The file system failed. Unlike bad data, another rank may not see it, so it ends the run instead of a row."""


class ShardError(UserError, ValueError):
    """A data set folder, shard or member that cannot be used; the message names the file and what to do."""


class TooManyBad(ShardError):
    """More samples were bad than allowed, so no index was written; quarantine.jsonl names them."""


class RecordsError(UserError, ValueError):
    """A JSON file without a list of usable records; the message says why."""


class SampleError(UserError, ValueError):
    """A sample that cannot be trained on; the message is a short reason, meant to be counted."""


class ConversationError(UserError, ValueError):
    """A conversation that cannot become a row; the message is a short reason, meant to be counted."""


class NothingLeft(ConversationError):
    """A good sample of which the options (template, row length, bounds) leave nothing to train on."""


class ImageError(UserError, ValueError):
    """A picture that cannot be used; the message is a short reason, meant to be counted."""
