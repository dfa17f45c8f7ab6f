"""Token ids to text as they come: whole characters only, and never a piece of a stop string."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one choice, growing.

    `push` and `finish` return what may be shown; their results join to `text`. Text that could be the beginning of a
    stop string, and bytes that could be the beginning of a character, wait until the next token decides.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._token_ids: list[int] = []
        # token_ids: [ ... | context: shown, kept because decoding depends on the left neighbour | undecided ]
        self._context_start = 0
        self._undecided_start = 0
        self._held = ""  # whole characters that may begin a stop string
        self._shown: list[str] = []
        self.stopped = False  # a stop string was met: the text ends before it

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text they settle, "" if none."""
        self._token_ids.extend(token_ids)
        text = self._decode(self._token_ids[self._context_start :])
        if text.endswith(_REPLACEMENT):
            return ""
        return self._show(self._settle(text))

    def finish(self, *, cut: bool) -> str:
        """No token follows; returns the text that was waiting. Cut short, a character without its end is dropped."""
        if self.stopped:
            return ""
        text = self._decode(self._token_ids[self._context_start :])
        text = text.rstrip(_REPLACEMENT) if cut else text
        shown = self._show(self._settle(text))
        rest = "" if self.stopped else self._held
        self._held = ""
        self._shown.append(rest)
        return shown + rest

    def _settle(self, text: str) -> str:
        """The part of the decoded window that is new; the window moves on."""
        context = self._decode(self._token_ids[self._context_start : self._undecided_start])
        self._context_start, self._undecided_start = self._undecided_start, len(self._token_ids)
        return text[len(context) :]

    def _show(self, new: str) -> str:
        text = self._held + new
        # the one that is complete first, so that it does not matter how many tokens came at once
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - self._possible_stop(text)
        self._held = "" if found else text[end:]
        self._shown.append(text[:end])
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((length for length in lengths if self._begins_stop(text[-length:])), 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
