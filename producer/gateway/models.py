"""`/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from jobs.errors import ModelUnknown
from producer.gateway.errors import ApiError, json_reply
from producer.gateway.service import MAY_READ, Reader, Visitor

router = APIRouter(tags=["models"])

# Nobody knows when a model was made; one time for all keeps the answers of all gateways alike.
_CREATED = 1_735_689_600


@router.get("/v1/models")
async def list_models(visitor: Reader) -> Response:
    """List the models that this key may use."""
    names = [name for name in visitor.gateway.models() if visitor.key.models is None or name in visitor.key.models]
    return json_reply({"object": "list", "data": [_model(visitor, name) for name in names]})


# A hub's models have a slash in their names, which clients send encoded.
@router.get("/v1/models/{model:path}")
async def get_model(model: str, visitor: Reader) -> Response:
    """Describe one model."""
    if model not in visitor.gateway.models():
        raise ModelUnknown(f"The model {model!r} does not exist.")
    visitor.key.require_model(model)
    return json_reply(_model(visitor, model))


@router.delete("/v1/models/{model:path}", dependencies=[MAY_READ])
async def delete_model(model: str) -> Response:
    """Refuse: models are configured, not deleted."""
    raise ApiError(403, f"The model {model!r} cannot be deleted here.", code="permission_denied", param="model")


def _model(visitor: Visitor, name: str) -> dict[str, Any]:
    fields = {"id": name, "object": "model", "created": _CREATED, "owned_by": "headrace"}
    context_tokens = visitor.producer.validator.context_tokens(name)
    return fields if context_tokens is None else fields | {"max_model_len": context_tokens}
