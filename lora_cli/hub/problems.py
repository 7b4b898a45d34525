"""The Hub's refusals and failures, as this tool's errors."""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Never

from lora_cli.errors import AccessDenied, NetworkError, NothingMatched, OutputError, UsageError
from lora_cli.hub.patience import Overdue, Stopped, Unreachable

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import errors as theirs


class Busy(Exception):
    """An answer that asks for another try: the Hub is overloaded, or limits the rate."""

    def __init__(self, response: "httpx2.Response") -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


class Broken(Exception):
    """A request that writes broke off; its cause is the error of the transport."""


class Absent(NothingMatched):
    """The Hub itself says that it has no such repository or revision; another NothingMatched may be a passing fault."""


class MissingFile(Absent):
    """The Hub itself says that the repository has no such file at this commit."""


class Gated(AccessDenied):
    """The repository shows its files only to users with the owner's permission."""


class Overloaded(NetworkError):
    """The Hub did not answer in time or failed while it answered: asking for less may help."""


class Silent(Overloaded):
    """Nothing at all came from the Hub, to any request, while this one was tried."""


class Unfit(NetworkError):
    """What came cannot be what the Hub holds: a portal's page, a body cut short, bytes of another hash."""


class Halted(NetworkError):
    """The connection was stopped before this was asked, or while it was."""

    def __init__(self) -> None:
        super().__init__("stopped", hint="rerun to continue")


_CHECK = "check the network and HF_ENDPOINT, then rerun"
_SENSELESS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def raise_translated(error: Exception, what: str) -> Never:
    """Raise this tool's error for one of the client, its transport or the reading of an answer; any other as it is.

    Args:
        what: the name of the thing asked for, for the message.
    """
    import httpx2
    from huggingface_hub import errors as theirs

    try:
        raise error
    except Unfit as error:
        raise Unfit(f"{what}: {error.message}", hint=error.hint or "rerun later; check the network") from error
    except Stopped as error:
        raise Halted from error
    except Overdue as error:
        raise Overloaded(f"{what}: the Hub sends too slowly", hint="check the network, then rerun") from error
    except Unreachable as error:
        if error.silent:
            raise Overloaded(f"{what}: the Hub does not answer", hint=_CHECK) from error
        raise NetworkError(f"{what}: the Hub cannot be reached", hint=_CHECK) from error
    except Busy as error:
        _raise_for_status(error, error.response, what)
    except theirs.OfflineModeIsEnabled as error:
        raise NetworkError(f"{what}: offline mode is on", hint="unset HF_HUB_OFFLINE") from error
    except theirs.HFValidationError as error:
        raise UsageError(f"{what}: not a repository id") from error
    except theirs.HfHubHTTPError as error:
        _raise_for_refusal(error, what)
    except httpx2.TimeoutException as error:
        raise Overloaded(f"{what}: the Hub does not answer", hint="check the network, then rerun") from error
    except (theirs.LocalEntryNotFoundError, theirs.FileMetadataError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        if isinstance(error.__cause__, theirs.HfHubHTTPError):
            _raise_for_refusal(error.__cause__, what)
        reason = _transport_reason(error)
        raise NetworkError(f"{what}: {reason}", hint=_CHECK) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{what}: the disk is full", hint="free some space, then rerun") from error
        if "Consistency check failed" in str(error):
            raise Unfit(f"{what}: the file arrived incomplete", hint="rerun") from error
        if error.filename is not None:
            raise OutputError(f"{error.filename}: {error.strerror}", hint="check HF_HOME") from error
        raise
    except _SENSELESS as error:
        raise Unfit(
            f"{what}: the Hub's answer makes no sense ({type(error).__name__})", hint="check HF_ENDPOINT and proxies"
        ) from error


def _raise_for_refusal(error: "theirs.HfHubHTTPError", what: str) -> Never:
    """Raise this tool's error for a refusal with the Hub's own code, or for its bare status."""
    from huggingface_hub import errors as theirs

    told = error.response.headers
    match error:
        case theirs.GatedRepoError():
            raise Gated(
                f"{what} is gated", hint=f"ask for access on its page (huggingface.co/{what}), then `hf auth login`"
            ) from error
        case theirs.RemoteEntryNotFoundError():
            # A repository that was found is named by its commit; without one, anybody may have said this.
            kind = MissingFile if "x-repo-commit" in told else NothingMatched
            raise kind(f"{what}: no such file at this commit") from error
        case theirs.RevisionNotFoundError():
            raise Absent(
                f"{what}: no such commit, branch or tag on the Hub", hint="give all 40 digits of a commit"
            ) from error
        case theirs.DisabledRepoError():
            raise Absent(f"{what}: disabled by the Hub") from error
        case theirs.RepositoryNotFoundError():
            kind = Absent if "x-error-code" in told else NothingMatched
            raise kind(
                f"{what}: no such repository on the Hub, or a private one", hint="check `hf auth whoami`"
            ) from error
    _raise_for_status(error, error.response, what)


def _raise_for_status(error: Exception, response: "httpx2.Response", what: str) -> Never:
    status = response.status_code
    if status in (401, 403):
        raise AccessDenied(f"{what}: the Hub refuses the login ({status})", hint="hf auth login") from error
    if status == 404:
        raise NothingMatched(f"{what}: not found on the Hub") from error
    if status == 429:
        raise NetworkError(f"{what}: the Hub limits the rate", hint="rerun later") from error
    kind = Overloaded if status >= 500 else NetworkError
    raise kind(f"{what}: the Hub answers {status}", hint="rerun later") from error


def unwrapped(error: Exception) -> Exception:
    """The error below the words that the client, or the guard on its own tries, puts around it."""
    while type(error) in (RuntimeError, Broken) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def is_silence(error: BaseException) -> bool:
    """Whether a request failed because nothing came in time."""
    import httpx2

    if isinstance(error, Unreachable):
        return error.silent
    return any(isinstance(cause, httpx2.TimeoutException | Overdue) for cause in _causes(error))


def _transport_reason(error: BaseException) -> str:
    import httpx2
    from huggingface_hub.errors import FileMetadataError

    if is_silence(error):
        return "the Hub does not answer"
    causes = [*_causes(error)]
    if any(isinstance(cause, httpx2.ConnectError) for cause in causes):
        return "the Hub cannot be reached"
    if any(isinstance(cause, FileMetadataError) for cause in causes):
        return "the answer does not come from a Hub"
    return "the connection to the Hub broke"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
