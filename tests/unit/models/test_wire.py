"""Messages survive the way between processes."""

import dataclasses
import stat
from pathlib import Path

import orjson
import pytest

from models.protocol import (
    Choice,
    Delta,
    Ended,
    EngineError,
    Failure,
    GenerationRequest,
    InvalidRequest,
    SamplingParams,
    Structure,
    Timings,
    TokenLogprobs,
    Usage,
)
from models.wire import Channel, Told, dial, event_message, listen, read_event, read_request, submit_message


@pytest.mark.parametrize(
    "event",
    [
        Delta("a", 1, "é\n", (1, 2)),
        Ended("a", "released"),
        Ended("a", "succeeded", (Choice(0, "x", (5,), "stop"),), Usage(1, 0, 1), Timings(1, 2, 3, 4, 5, 6)),
        Delta("a", 0, "x", (7,), (TokenLogprobs(7, -0.5, ((7, -0.5), (8, -1.25))),)),
        Ended("a", "succeeded", (Choice(0, "x", (), "stop", (TokenLogprobs(5, -2.0),)),), Usage(2, 0, 1)),
        Ended("a", "succeeded", prompt_logprobs=(TokenLogprobs(4, None), TokenLogprobs(6, -1.0, ((3, -0.5),)))),
        Ended("a", "failed", error=Failure("out_of_memory", "no room", retryable=True)),
    ],
)
def test_events_survive_the_way(event: Told) -> None:
    """What is read is what was sent, frozen tuples and all."""
    assert read_event(*orjson.loads(orjson.dumps(event_message(event)))) == event


def test_requests_survive_the_way() -> None:
    """Every field of a request arrives as it left."""
    sampling = SamplingParams(7, 0.5, 0.9, 3, 0.1, 1.0, -1.0, 1.1, ((5, -2.0),), -(2**63), ("a", "é"), 2, True)
    request = GenerationRequest("id", (1, 2, 3), sampling, 1.5, True, 0, "tenant")
    read = read_request(orjson.loads(orjson.dumps(request)))
    assert read == request
    assert hash(read) == hash(request)
    assert orjson.loads(orjson.dumps([submit_message(request)])) == [["submit", orjson.loads(orjson.dumps(request))]]


@pytest.mark.parametrize(
    "structure",
    [
        Structure(json_schema='{"type":"object"}'),
        Structure(regex="é+"),
        Structure(choice=("a", "b")),
        Structure(json_object=True),
    ],
)
def test_structures_survive_the_way(structure: Structure) -> None:
    """So do the fields that say how a choice ends and what is told of it."""
    sampling = SamplingParams(
        7, stop_token_ids=(1, 2), min_tokens=3, logprobs=0, prompt_logprobs=5, structure=structure
    )
    request = GenerationRequest("id", (1, 2, 3), sampling)
    read = read_request(orjson.loads(orjson.dumps(request)))
    assert read == request
    assert hash(read) == hash(request)


@pytest.mark.parametrize("sampling", [SamplingParams(1, seed=2**70), SamplingParams(1, stop=("\ud800",))])
def test_what_json_cannot_carry_is_refused(sampling: SamplingParams) -> None:
    """An integer that is too large or text that is no Unicode is the request's fault, and no other's."""
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        submit_message(GenerationRequest("id", (1,), sampling))


@pytest.mark.parametrize(
    "change",
    [{"prompt_token_ids": None}, {"sampling": {}}, {"sampling": {"max_tokens": 1, "x": 1}}, {"colour": "red"}],
)
def test_a_request_of_another_form_is_refused(change: dict) -> None:
    """What is not a request is an error that says so, not a crash."""
    value = orjson.loads(orjson.dumps(GenerationRequest("id", (1,), SamplingParams(1))))
    with pytest.raises(InvalidRequest, match="request"):
        read_request({**value, **change})


def test_a_number_that_is_none_in_json_is_refused_at_intake() -> None:
    """NaN becomes null in JSON, which intake refuses by the field's name."""
    from models.protocol import check_request

    request = GenerationRequest("id", (1,), SamplingParams(1, temperature=float("nan")))
    read = read_request(orjson.loads(orjson.dumps(request)))
    with pytest.raises(InvalidRequest, match="temperature"):
        check_request(read, vocab_tokens=10, context_tokens=10)


def test_the_socket_is_its_owners_and_replaces_a_stale_one(tmp_path: Path) -> None:
    """Mode 0600 from the start; a socket left by a killed process is no obstacle, and nobody answers there."""
    path = tmp_path / "engine.sock"
    listen(path).close()
    assert path.exists()
    assert dial(path) is None
    with listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        here = dial(path)
        there = Channel(listener.accept()[0])
        here.send([("drain", None)])
        assert there.receive() == [["drain", None]]
        there.close()
        with pytest.raises(EOFError):
            here.receive()
        here.close()
        with pytest.raises(OSError, match="closed"):
            here.send([])


def test_a_frame_that_is_no_frame_is_refused(tmp_path: Path) -> None:
    """JSON of another form is a ValueError, like no JSON at all."""
    with listen(tmp_path / "s") as listener:
        here = dial(tmp_path / "s")
        there = Channel(listener.accept()[0])
        for data in (b"{", b"{}", b"[1]", b'[["a"]]'):
            here.connection.send_bytes(data)
            with pytest.raises(ValueError, match=r"."):
                there.receive()
        here.close()
        there.close()


def test_a_path_too_long_for_a_socket_is_an_error_that_says_so(tmp_path: Path) -> None:
    """The system's own message would only say that the path is invalid."""
    path = tmp_path / ("x" * 120)
    for use in (listen, dial):
        with pytest.raises(EngineError, match="107 bytes"):
            use(path)


def test_events_have_no_field_that_the_wire_forgets() -> None:
    """A field added to Ended must be read too: this fails until it is."""
    known = {"id", "outcome", "choices", "usage", "timings", "error", "prompt_logprobs"}
    assert {field.name for field in dataclasses.fields(Ended)} == known
