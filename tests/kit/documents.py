"""Values against the schemas of an OpenAPI document: those words of JSON Schema that ours uses, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_REFERENCE = "#/components/schemas/"
_KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_KNOWN = {"$ref", "anyOf", "type", "enum", "const", "required", "properties", "additionalProperties", "items"}
_SAID_TO_PEOPLE = {"title", "description"}


def faults(document: dict[str, Any], schema: dict[str, Any], value: Any, path: str = "$") -> Iterator[str]:
    """Where the value is not as the schema says, fields that it does not name included."""
    assert schema.keys() <= _KNOWN | _SAID_TO_PEOPLE, f"{path}: a schema with {schema.keys()}"
    if "$ref" in schema:
        yield from faults(
            document, document["components"]["schemas"][schema["$ref"].removeprefix(_REFERENCE)], value, path
        )
        return
    if "anyOf" in schema:
        if all(any(faults(document, one, value, path)) for one in schema["anyOf"]):
            yield f"{path}: {value!r} is none of {schema['anyOf']}"
        return
    if "type" in schema and not _is(value, schema["type"]):
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    allowed = [schema["const"]] if "const" in schema else schema.get("enum", [value])
    if value not in allowed:
        yield f"{path}: {value!r} is none of {allowed}"
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from faults(document, schema.get("items", {}), one, f"{path}[{index}]")
    if isinstance(value, dict):
        yield from _faults_of_fields(document, schema, value, path)


def _faults_of_fields(
    document: dict[str, Any], schema: dict[str, Any], value: dict[str, Any], path: str
) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
    yield from (f"{path}.{name}: is missing" for name in schema.get("required", ()) if name not in value)
    for name, one in value.items():
        if name in properties or isinstance(others, dict):
            yield from faults(document, properties.get(name, others), one, f"{path}.{name}")
        elif not others:
            yield f"{path}.{name}: is not in the document"


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))
