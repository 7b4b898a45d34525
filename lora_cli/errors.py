"""Everything that can go wrong for the user, and the exit code of each.

    LoraError               1  the work failed for a reason outside the tool
    ├── OutputError         1  an output exists, cannot be written, or the disk is full
    ├── DataError           1  a data file or a line of it cannot be used
    ├── UsageError          2  the command line or a setting is wrong
    ├── NothingMatched      3  no adapter fits what was asked, or an id is unknown
    ├── AccessDenied        4  login missing, token refused, or repository gated
    ├── Refused             5  a check on weights, base, licence or effect said no
    │   ├── ConfigError     5  an adapter_config.json that cannot be used
    │   └── HeaderError     5  a safetensors header that cannot be trusted
    ├── Partial             6  some of the work is done; a rerun goes on from there
    └── NetworkError        7  the Hub cannot be reached or limits the rate

Any other exception is a bug of the tool and keeps its traceback.
"""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `lora` command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOTHING_MATCHED = 3
    ACCESS_DENIED = 4
    REFUSED = 5
    PARTIAL = 6
    NETWORK = 7
    INTERRUPTED = 130


class LoraError(Exception):
    """A condition that the user can act on: `message` is the fault, `hint` the remedy."""

    exit_code = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class OutputError(LoraError):
    """An output exists already, cannot be written, or does not fit on the disk."""


class DataError(LoraError):
    """A data file, or one line of it, cannot be used."""


class UsageError(LoraError):
    """The command line or a setting is wrong."""

    exit_code = ExitCode.USAGE


class NothingMatched(LoraError):
    """No adapter fits what was asked for, or an id is unknown."""

    exit_code = ExitCode.NOTHING_MATCHED


class AccessDenied(LoraError):
    """The Hub wants a login, refuses the token, or the repository is gated."""

    exit_code = ExitCode.ACCESS_DENIED


class Refused(LoraError):
    """A check on weights, base model, licence or effect said no."""

    exit_code = ExitCode.REFUSED


class ConfigError(Refused):
    """An adapter_config.json that cannot be read or describes something this tool cannot represent."""


class HeaderError(Refused):
    """A safetensors header that is malformed or does not describe its file."""


class Partial(LoraError):
    """Some of the work is done and kept; a rerun continues from there."""

    exit_code = ExitCode.PARTIAL


class NetworkError(LoraError):
    """The Hub cannot be reached, answers with an error, or limits the rate."""

    exit_code = ExitCode.NETWORK


def shortage(error: BaseException) -> str:
    """What this machine lacks, memory or threads, if that is why something failed or why its cause did; else "".

    torch's own class is known by its name, as an import of torch takes a second.
    """
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _ALLOCATOR in said:
        return "out of memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "out of memory"
    if isinstance(error, RuntimeError) and _NO_THREAD in said:
        return "no new thread can be started: too little memory, or too many processes"
    if isinstance(error, ImportError) and _NO_MAP in said:
        return f"a library cannot be loaded, most often for lack of memory: {said}"
    return "" if error.__cause__ is None else shortage(error.__cause__)


_ALLOCATOR, _NO_THREAD = "DefaultCPUAllocator", "can't start new thread"
_NO_MAP = "failed to map segment from shared object"
"""Messages of torch about memory of the CPU, of Python, and of the system's loader."""
