"""A process that looks at what may be meant to hurt, and may be killed at it: `python -m models.screening`.

Over standard input and output, one question after another: a kind and a length, then so many bytes; the answer is a
length and JSON. It dies of a question that takes too much time or memory, by limits that the kernel keeps, and with
whoever asks.
"""

import re
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import orjson
from llguidance import LLTokenizer

from models.grammar import compiled
from models.protocol import InvalidRequest, Structure

QUESTION = struct.Struct(">BI")  # kind, bytes that follow
ANSWER = struct.Struct(">I")  # bytes that follow
BODY, STRUCTURE = range(2)
# What it may use: of processor time for each question, and of address space in all.
CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20

_STRING = re.compile(rb'"[^"]*"')


def shape(body: bytes) -> list[int]:
    """How many objects, lists and names a JSON text has, and how many commas between them: outside of its strings."""
    bare = _STRING.sub(b"", body.replace(rb"\\", b"").replace(rb"\"", b""))
    return [bare.count(b"[") + bare.count(b"{") + bare.count(b":"), bare.count(b",")]


def fault(structure: bytes) -> str | None:
    """Why a structure cannot be followed, whatever the model; `structure` is JSON with the fields of `Structure`."""
    try:
        compiled(LLTokenizer("byte"), Structure(**orjson.loads(structure)))
    except InvalidRequest as error:
        return error.message
    return None


_KINDS: Mapping[int, Callable[[bytes], Any]] = {BODY: shape, STRUCTURE: fault}


def main() -> None:
    """Answer until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    _tell(told, b"")  # it is there
    while head := asked.read(QUESTION.size):
        kind, size = QUESTION.unpack(head)
        content = asked.read(size)
        _limit_time()
        _tell(told, orjson.dumps(_KINDS[kind](content)))


def _limit_time() -> None:
    """From now on."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, hard))


def _tell(told: BinaryIO, answer: bytes) -> None:
    told.write(ANSWER.pack(len(answer)) + answer)
    told.flush()


if __name__ == "__main__":
    main()
