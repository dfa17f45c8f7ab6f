"""Token ids to text as they come: whole characters only, and never a piece of a stop string."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PENDING_BYTES = 3  # the longest beginning of a character, in UTF-8
_MAX_UNDECIDED_TOKENS = 8


class TextStream:
    """The text of one choice, growing.

    `push` and `finish` return what may be shown; their results join to `text`. Text that could be the beginning of a
    stop string, and bytes that could be the beginning of a character, wait until the next token decides. A stop string
    that is complete within the first `min_tokens` is text like any other. A token costs the same however many came
    before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decode = decode
        self._stop = stop
        self._min_tokens = min_tokens if stop else 0
        self._token_ids: list[int] = []
        # token_ids: [ ... | context: shown, kept because decoding depends on the left neighbour | undecided ]
        self._context_start = 0
        self._undecided_start = 0
        self._held = ""  # whole characters that may begin a stop string
        self._spared = 0  # the first of the held characters, which came too early to complete one
        self._shown: list[str] = []
        self.stopped = False  # a stop string was met: the text ends before it

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text they settle, "" if none."""
        early = self._min_tokens - len(self._token_ids)
        if 0 < early < len(token_ids):
            return self.push(token_ids[:early]) + self.push(token_ids[early:])
        self._token_ids.extend(token_ids)
        text = self._decode(self._token_ids[self._context_start :])
        if not text.endswith(_REPLACEMENT):
            return self._show(self._settle(text))
        if len(self._token_ids) - self._undecided_start > _MAX_UNDECIDED_TOKENS:
            return self._settle_garbage(text)
        return ""

    def finish(self, *, cut: bool) -> str:
        """No token follows; returns the text that was waiting. Cut short, a character without its end is dropped."""
        if self.stopped:
            return ""
        shown = self._show_undecided(cut=cut) if self._undecided_start < len(self._token_ids) else ""
        rest = "" if self.stopped else self._held
        self._held = ""
        self._shown.append(rest)
        return shown + rest

    def _show_undecided(self, *, cut: bool) -> str:
        text = self._decode(self._token_ids[self._context_start :])
        return self._show(self._settle(text.rstrip(_REPLACEMENT) if cut else text))

    def _settle(self, text: str, end: int | None = None) -> str:
        """The part of the decoded window (up to token `end`) that is new; the window moves on."""
        context = self._decode(self._token_ids[self._context_start : self._undecided_start])
        self._context_start, self._undecided_start = self._undecided_start, end or len(self._token_ids)
        return text[len(context) :]

    def _settle_garbage(self, text: str) -> str:
        """More bytes than a character has, and no end of it: all but the last few never become one.

        Without this a stream of such bytes would be decoded from its beginning at every token. The cut must not fall
        within a sequence that decodes to one replacement character: then the parts would decode to more than the whole.
        """
        last = len(self._token_ids) - _PENDING_BYTES
        for end in range(last, last - _PENDING_BYTES, -1):
            before = self._decode(self._token_ids[self._context_start : end])
            if before + self._decode(self._token_ids[end:]) == text:
                return self._show(self._settle(before, end))
        return ""

    def _show(self, new: str) -> str:
        text = self._held + new
        early = len(self._token_ids) <= self._min_tokens
        # the one that is complete first, so that it does not matter how many tokens came at once
        found = [] if early else [(at + len(stop), at) for stop in self._stop if (at := self._find(stop, text)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - self._possible_stop(text)
        self._held = "" if found else text[end:]
        self._spared = len(self._held) if early else max(0, self._spared - end)
        self._shown.append(text[:end])
        return text[:end]

    def _find(self, stop: str, text: str) -> int:
        return text.find(stop, max(0, self._spared - len(stop) + 1))

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((length for length in lengths if self._begins_stop(text[-length:])), 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
