"""Read the text of a session: what is asked for, the model's tokenizer, and the tokens, when first needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoints.sources import Source, find_source
from ..errors import PlanError, SourceError
from .documents import check_data
from .first_token import uses_bos
from .options import RunOptions
from .reporter import Reporter
from .requests import GivenText, Padding, given_tokens
from .text import TokenizedText, fingerprint_of, read_text
from .text_request import ALL, TextRequest

if TYPE_CHECKING:
    from ..tasks.harness import Harness
    from ..tasks.task_precision import TaskTargets
    from ..tasks.task_request import TaskRequest
    from .session_model import SessionModel


class SessionText:
    """Reader of a session's text.

    Args:
        request: the text, as the options name it.
        given: text or tasks that were given from Python.
        options: options of the measurements.
        reporter: receives what is said.
        model: the model that reads the text, with its limits and its tokenizer.

    Attributes:
        harness: the tasks, once the text is read; None if a text is measured.
    """

    def __init__(
        self,
        request: TextRequest,
        given: GivenText | None,
        options: RunOptions,
        reporter: Reporter,
        model: SessionModel,
    ) -> None:
        self._request, self.given, self.options, self.reporter = request, given, options, reporter
        self.model = model
        self.harness: Harness | None = None
        self._text: TokenizedText | None = None
        self._tokenizer: Any = None

    @property
    def may_contact_hub(self) -> bool:
        """Return whether reading the text contacts the Hub."""
        return self.given is None and self._text is None and self._request.from_hub

    def check(self) -> None:
        """Refuse a text that cannot be had, before anything is read or loaded."""
        if self.given is None:
            check_data(self._request)

    @property
    def has_tasks(self) -> bool:
        """Return whether the text is that of tasks."""
        return self.given is not None and self.given.tasks is not None

    @property
    def targets(self) -> TaskTargets | None:
        """Return how precisely the changes of tasks' metrics are to be known; None to measure all there is."""
        return None if self.given is None or self.given.tasks is None else self.given.tasks.until

    def task_arguments(self) -> dict[str, Any]:
        """Return what the requests of tasks depend on; nothing if a text is measured."""
        return {} if self.given is None or self.given.tasks is None else self.given.tasks.arguments()

    @property
    def request(self) -> TextRequest:
        """Return the text to read.

        Raises:
            SourceError: the model has no tokenizer, which is needed for `bos="auto"`.
        """
        if self._request.bos is None:
            self._request = replace(self._request, bos=uses_bos(None, self.tokenizer))
        return self._request

    @property
    def text(self) -> TokenizedText:
        """Return the tokens; read them at the first use."""
        if self._text is None:
            self._text = self._read_tokens()
        return self._text

    def _read_tokens(self) -> TokenizedText:
        request, reporter = self.request, self.reporter
        if self.given is not None and self.given.tasks is not None:
            text = self._requests_as_text(self.given.tasks)
        elif self.given is not None and self.given.tokens is not None:
            text = given_tokens(self.given, self.model.padding | Padding.of(self.options.tokenizer))
        else:
            tokenizer = self.tokenizer
            with reporter.status(f"Reading text: {request.data}"):
                text = read_text(request, tokenizer)
        present = text.ids[text.mask.bool()]
        if int(present.min()) < 0:
            raise PlanError(f"the text has token {int(present.min())}; token ids are not negative")
        self.check_vocabulary(int(present.max()))
        if bool((padding := ~text.mask.bool()).any()):
            # A padding token may be one that the model does not have (-100, or one that was added to the tokenizer).
            known = (text.ids >= 0) & (text.ids < (self.model.vocabulary or ALL))
            text = replace(text, ids=text.ids.where(known | ~padding, 0))
        sequences, length = text.ids.shape
        positions = self.model.positions
        if positions is not None and length - (text.scored is not None) > positions:
            raise PlanError(
                f"the sequences have {length} tokens, more than the model's {positions} positions; give shorter ones"
            )
        at_most = "" if request.pack else "up to "
        bos = f", each after {tokenizer.bos_token}" if request.bos else ""
        chats = text.read.get("conversations", 0)
        chat = f"; {chats:,} conversation{'s'[: chats != 1]} in the tokenizer's chat template" if chats else ""
        if self.harness is not None:
            asked = len(self.harness.requests)
            equal = f" ({asked:,} with those that are equal)" if asked != sequences else ""
            reporter.log(f"{text.count(sequences)} of {request.data}{equal}, {text.tokens:,} tokens")
        else:
            reporter.log(f"{text.tokens:,} tokens in {text.count(sequences)} of {at_most}{length}{bos}{chat}")
        for note in text.notes:
            reporter.note(note)
        return text

    def _requests_as_text(self, tasks: TaskRequest) -> TokenizedText:
        """Ask lm-eval for the requests of the tasks, and return them as a text of which the continuations count."""
        from ..tasks.harness import Harness

        with self.reporter.status(f"Loading tasks: {tasks}"):
            self.harness = Harness(tasks, self.model.config(), self.tokenizer)
        requests = self.harness.text
        fingerprint = fingerprint_of(requests.ids, requests.mask + requests.scored)
        read = {"tasks": self.harness.tasks, "requests": len(self.harness.requests)}
        return TokenizedText(requests.ids, requests.mask, fingerprint, (), read, requests.scored)

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer, or the one that the options name; load it at the first use.

        Raises:
            SourceError: there is none.
        """
        if self._tokenizer is None:
            options = self.options
            self._tokenizer = tokenizer_of_run(
                self.model.source, options.tokenizer, self.model.label, trust_remote_code=options.trust_remote_code
            )
        return self._tokenizer

    @property
    def tokenizer_name(self) -> str | None:
        """Return the name of the tokenizer that the options give; None if it is the model's own."""
        tokenizer = self.options.tokenizer
        if tokenizer is None or isinstance(tokenizer, str):
            return tokenizer
        return str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__))

    def check_vocabulary(self, max_token: int) -> None:
        """Check that the model's vocabulary includes a token.

        Raises:
            SourceError: it does not.
        """
        vocabulary = self.model.vocabulary
        if vocabulary is not None and max_token >= vocabulary:
            raise SourceError(
                f"the text has token {max_token}, but the model's vocabulary has {vocabulary} tokens: this is another "
                "model's tokenizer"
            )

    def tokenizer_or_none(self) -> Any:
        """Return the tokenizer that writes tokens as text; None if tokens were given without one."""
        if self.given is not None and self.options.tokenizer is None and self.model.source is None:
            return None
        return self.tokenizer


def tokenizer_of_run(source: Source | None, other: Any, label: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer for the text.

    Args:
        source: the model's files; None for a loaded model.
        other: a tokenizer, the name of another model to take it from, or None.
        label: the model's name, for errors.
        trust_remote_code: run the code that comes with the other model's tokenizer.

    Raises:
        SourceError: the model has no tokenizer.
    """
    from ..checkpoints.loading import tokenizer_of

    if other is not None and not isinstance(other, str):
        return other
    if source is None and other is None:
        raise SourceError("a loaded model needs a tokenizer for texts: give `tokenizer`, or token ids")
    if other:
        source = replace(find_source(other, weights=False), trust_remote_code=trust_remote_code)
    assert source is not None
    tokenizer = tokenizer_of(source)
    if tokenizer is None:
        raise SourceError(f"{other or label} has no tokenizer; name a model that has one (`tokenizer`)")
    return tokenizer
