"""Whatever is sent to whatever route: an answer or a refusal in the one form, never a fault of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.gateways import RunningGateway

FIELDS = {
    "/v1/chat/completions": (
        "messages n max_tokens max_completion_tokens temperature top_p stop seed logit_bias logprobs top_logprobs "
        "response_format stream_options tools tool_choice metadata min_tokens stop_token_ids ignore_eos"
    ),
    "/v1/completions": "prompt n best_of max_tokens echo logprobs stop suffix seed logit_bias temperature",
    "/v1/responses": (
        "input instructions background store previous_response_id conversation max_output_tokens text include "
        "top_logprobs metadata truncation background_options tools prompt"
    ),
    "/v1/responses/input_tokens": "input instructions previous_response_id conversation text",
    "/v1/conversations": "items metadata",
    "/v1/batches": "input_file_id endpoint completion_window metadata output_expires_after",
    "/login": "key",
}

odd = st.sampled_from(
    ["", "\0", "\ud7ff", "x" * 600, "resp_" + "0" * 32, "conv_" + "0" * 32, "user", "text", "auto", "24h"]
)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-2, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | odd
)
keys = st.sampled_from(["role", "content", "type", "text", "id", "name", "schema", "json_schema", "format", "anchor"])
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": anything})
good = st.sampled_from(["hello", [{"role": "user", "content": "hello"}], 1, {}, []])
value = anything | good | st.lists(message, max_size=2)


@pytest.fixture(scope="module")
def http(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=gateway.url, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {gateway.key()[1]}"
        client.headers["Content-Type"] = "application/json"
        yield client


@pytest.mark.parametrize("path", FIELDS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_body(path: str, data: st.DataObject, http: httpx2.Client) -> None:
    """Known fields with any JSON in them."""
    chosen = data.draw(st.dictionaries(st.sampled_from(FIELDS[path].split()), value, max_size=6))
    body: dict[str, Any] = {"model": "echo"} | chosen
    reply = http.post(path, content=orjson.dumps(body))
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
