"""Errors for the user: their messages say what is wrong and what to do.

Programs catch UserError. Each kind has one of Python's own errors as a second base, for code that catches those.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input, or something this machine or version cannot do; the message says what to do."""


class ConfigError(UserError, ValueError):
    """Options that cannot work; the message names the flag and the remedy."""


class ArchitectureError(UserError, ValueError):
    """A model description that is malformed or not implemented; the message says what to do."""


class LayoutError(UserError, ValueError):
    """Degrees that do not fit the model or the number of processes; the message says what to change."""


class PlatformError(UserError, RuntimeError):
    """This machine cannot run with these options; the message says what to change."""


class RankError(UserError, RuntimeError):
    """An action that failed on another rank; the message names that rank and holds its message."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the last good checkpoint is intact. Every rank raises it."""

    on_all_ranks = True


class WorkerError(UserError, RuntimeError):
    """A worker process that died, or that this machine cannot run; the message says why and what to change."""


class LogError(UserError, RuntimeError):
    """A log file that cannot be read or created; the message names it."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file or tensor and what to do."""


class ConversionError(UserError, ValueError):
    """A source that does not fit the architecture; the message names the tensor and the expected value."""


class TokenizerError(UserError, ValueError):
    """A tokenizer folder that cannot be used; the message names it."""


class RemoteError(UserError, OSError):
    """A URL that cannot be read; the message names it and, where there is one, the remedy."""


class ShardReadError(UserError, OSError):
    """The file system failed. Ends the run, because other ranks may not see the failure; bad data only costs a row."""


class ShardError(UserError, ValueError):
    """A data set folder, shard or member that cannot be used; the message names the file and what to do."""


class TooManyBad(ShardError):
    """More bad samples than allowed, so no index was written; quarantine.jsonl names them."""


class RecordsError(UserError, ValueError):
    """A JSON file without a list of usable records; the message says why."""


class SampleError(UserError, ValueError):
    """A sample that cannot be trained on; the message is a short reason, for counting."""


class ConversationError(UserError, ValueError):
    """A conversation that cannot become a row; the message is a short reason, for counting."""


class NothingLeft(ConversationError):
    """A good sample without anything to train on under these options (template, row length, bounds)."""


class OverBounds(SampleError):
    """A good sample over the bounds of pictures or tokens, which is skipped; the message is a short reason."""


class ImageError(UserError, ValueError):
    """A picture that cannot be used; the message is a short reason, for counting."""
