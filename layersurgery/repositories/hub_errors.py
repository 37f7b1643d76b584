"""Turn errors of the Hub's client into errors that say what to do; check the name and the token before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LayerSurgeryError, OutputError, PlanError

_LOG_IN = "run: hf auth login (or set HF_TOKEN to a token that can write)"


def check_repo_name(repo: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        PlanError: it has another form than USER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo.count("/") != 1:
            raise HFValidationError(f"it has {'no' if '/' not in repo else 'more than one'} '/'")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PlanError(f"{repo!r} is not the name of a repository (USER/NAME): {error}") from error


def check_push(repo: str) -> None:
    """Refuse a push that cannot succeed, before the work whose result is pushed.

    Raises:
        PlanError: the name is not of the form USER/NAME.
        OutputError: there is no token, it is refused or cannot write, or the Hub cannot be reached.
    """
    check_repo_name(repo)
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"cannot push to {repo}: HF_HUB_OFFLINE is set; unset it, or leave the push out")
    if get_token() is None:
        raise OutputError(f"cannot push to {repo}: there is no token on this machine; {_LOG_IN}")
    with hub_errors(repo, "push to", OutputError):
        user = HfApi().whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise OutputError(f"cannot push to {repo}: the token of {user.get('name')} can only read; {_LOG_IN}")


@contextmanager
def hub_errors(repo: str, verb: str, kind: type[LayerSurgeryError]) -> Iterator[None]:
    """Turn errors of the Hub's client into one error with advice.

    Args:
        repo: the repository.
        verb: what is done with it: "push to" or "fetch".
        kind: the class of the error that is raised.
    """
    from huggingface_hub import errors

    try:
        yield
    except LayerSurgeryError:
        raise
    except Exception as error:  # the client also raises errors of its HTTP library
        # What uploads large files raises an error of its own, whose cause is that of the request.
        request_error = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        status = getattr(getattr(request_error, "response", None), "status_code", None)
        if isinstance(error, errors.LocalTokenNotFoundError):
            why = f"there is no token on this machine; {_LOG_IN}"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set; unset it to go online"
        elif isinstance(error, errors.GatedRepoError):
            why = "it is gated; accept its terms on its page, then run: hf auth login"
        elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            why = f"the Hub does not accept the token (401); {_LOG_IN}"
        elif status == 403:
            why = (
                f"the token may not do this (403: {_said(error)}); use a token that can write to "
                f"{repo.partition('/')[0]}, or a repository of your own"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = "the Hub has no such repository that you can read. Check the name; for a private one, " + _LOG_IN
        elif isinstance(error, errors.RevisionNotFoundError):
            why = "the repository has no such revision"
        elif isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
            why = f"the Hub cannot be reached ({_said(error)})"
        else:
            why = _said(error)
        raise kind(f"cannot {verb} {repo}: {why}") from error


def _said(error: BaseException) -> str:
    """Return what the server said, or else the first line of an error."""
    if server_message := getattr(error, "server_message", None):
        return " ".join(str(server_message).split())
    text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    return text if error.__cause__ is None else f"{text.rstrip('.')}: {_said(error.__cause__)}"
