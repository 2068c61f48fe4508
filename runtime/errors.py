"""Every error that a user can see, with the exit code of the command line that reports it.

An error says what happened, where, and what to do about it. This table is the only place that knows exit codes.
"""


class TilewrightError(Exception):
    """Base of all of Tilewright's errors; on the command line it ends the process with ``exit_code``."""

    exit_code = 1


class CompileError(TilewrightError):
    """A stage of the compiler failed: a C compiler's message, a pass, a full disk."""


class InterpreterError(TilewrightError):
    """A GPU kernel failed in the interpreter, the interpreter itself ended, or Triton is not installed."""


class DeviceError(TilewrightError):
    """A GPU or its driver failed, or its memory is full; says what was being done and what memory is held by what."""


class ShapeError(TilewrightError):
    """An input does not fit what was compiled: names the input, what was expected and what came."""


class InputError(TilewrightError):
    """An input has the right shape but a value the model cannot take, such as an index past its table."""


class UsageError(TilewrightError):
    """The call itself is wrong: an unknown option, target or name."""

    exit_code = 2


class SourceError(TilewrightError):
    """What was given as a model is not one that can be read."""

    exit_code = 2


class UnsupportedOperator(TilewrightError):
    """The model uses operators that cannot be compiled; lists all of them at once."""

    exit_code = 3


class NumericsError(TilewrightError):
    """The compiled outputs differ from the reference by more than the tolerance table allows."""

    exit_code = 4


class ArtifactError(TilewrightError):
    """An artifact or a weight file is damaged, incomplete, from the future or not for this machine; names the file."""

    exit_code = 5
