"""The Hub's refusals and failures, as this tool's errors."""

import errno
from typing import Never

from lora_cli.errors import AccessDenied, NetworkError, NothingMatched, OutputError, Partial, UsageError


class MissingFile(NothingMatched):
    """The repository exists, but not this file in it."""


class Gated(AccessDenied):
    """The repository shows its files only to users with the owner's permission."""


class Overloaded(NetworkError):
    """The Hub did not answer in time or failed while it answered: asking for less may help."""


class BudgetSpent(Partial):
    """The number of requests allowed for this piece of work is used up."""


def raise_translated(error: Exception, what: str) -> Never:
    """Raise this tool's error for one of the client or its transport; raise any other as it is.

    Args:
        what: the name of the thing asked for, for the message.
    """
    import httpx2
    from huggingface_hub import errors as theirs

    try:
        raise error
    except theirs.OfflineModeIsEnabled as error:
        raise NetworkError(f"{what}: offline mode is on", hint="unset HF_HUB_OFFLINE") from error
    except theirs.GatedRepoError as error:
        raise Gated(
            f"{what} is gated", hint=f"ask for access on its page (huggingface.co/{what}), then `hf auth login`"
        ) from error
    except theirs.RemoteEntryNotFoundError as error:
        raise MissingFile(f"{what}: no such file at this commit") from error
    except theirs.RevisionNotFoundError as error:
        raise NothingMatched(
            f"{what}: no such commit, branch or tag on the Hub", hint="give all 40 digits of a commit"
        ) from error
    except theirs.DisabledRepoError as error:
        raise NothingMatched(f"{what}: disabled by the Hub") from error
    except theirs.RepositoryNotFoundError as error:
        raise NothingMatched(
            f"{what}: no such repository on the Hub, or a private one", hint="check `hf auth whoami`"
        ) from error
    except theirs.HFValidationError as error:
        raise UsageError(f"{what}: not a repository id") from error
    except theirs.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AccessDenied(f"{what}: the Hub refuses the login ({status})", hint="hf auth login") from error
        if status == 404:
            raise NothingMatched(f"{what}: not found on the Hub") from error
        if status == 429:
            raise NetworkError(f"{what}: the Hub limits the rate", hint="rerun later") from error
        kind = Overloaded if status >= 500 else NetworkError
        raise kind(f"{what}: the Hub answers {status}", hint="rerun later") from error
    except httpx2.TimeoutException as error:
        raise Overloaded(f"{what}: the Hub does not answer", hint="check the network, then rerun") from error
    except (theirs.LocalEntryNotFoundError, theirs.FileMetadataError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = _transport_reason(error)
        raise NetworkError(f"{what}: {reason}", hint="check the network and HF_ENDPOINT, then rerun") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{what}: the disk is full", hint="free some space, then rerun") from error
        if "Consistency check failed" in str(error):
            raise NetworkError(f"{what}: the file arrived incomplete", hint="rerun") from error
        if error.filename is not None:
            raise OutputError(f"{error.filename}: {error.strerror}", hint="check HF_HOME") from error
        raise


def _transport_reason(error: BaseException) -> str:
    import httpx2

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, httpx2.TimeoutException):
            return "the Hub does not answer"
        if isinstance(seen, httpx2.ConnectError):
            return "the Hub cannot be reached"
        seen = seen.__cause__ or seen.__context__
    return "the connection to the Hub broke"
