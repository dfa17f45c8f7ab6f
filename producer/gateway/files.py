"""`/v1/files`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.responses import StreamingResponse

from jobs.errors import NotFound, RequestInvalid
from jobs.files import PIECE_BYTES, File, FileWriter
from jobs.ids import new_id
from producer.batch_runs import OUTPUT_SECONDS
from producer.gateway.document import FILE_BODY, query
from producer.gateway.errors import json_reply, not_found
from producer.gateway.intake import limit_of, order_of
from producer.gateway.names import FILE, cursor_of, id_of, named
from producer.gateway.service import Reader, Submitter, Visitor, in_thread

router = APIRouter(tags=["files"])

PURPOSES = ("batch", "user_data")
MAX_LISTED = 10_000
MIN_SECONDS, MAX_SECONDS = 3_600, 2_592_000
_FORM_FIELDS = 16
_NAME_CHARACTERS = 255


@router.post("/v1/files", openapi_extra=FILE_BODY)
async def upload(request: Request, visitor: Submitter) -> Response:
    """Store a file. What is in it is looked at when a batch is made of it."""
    async with request.form(max_files=1, max_fields=_FORM_FIELDS, max_part_size=PIECE_BYTES) as form:
        content, purpose = _upload_of(form), _purpose_of(form)
        name, seconds = _name_of(content), _seconds_of(form, purpose)
        files = visitor.producer.files
        file_id = new_id()
        await in_thread(files.begin, file_id, visitor.tenant_id, purpose, name, seconds)
        writer = FileWriter(files, file_id, visitor.tenant_id)
        while data := await content.read(PIECE_BYTES):
            await in_thread(writer.write, data)
        return json_reply(file_object(await in_thread(writer.finish)))


def _upload_of(form: FormData) -> UploadFile:
    content = form.get("file")
    if not isinstance(content, UploadFile):
        raise RequestInvalid("file", "is missing, or is no file", "missing_required_parameter")
    return content


def _name_of(content: UploadFile) -> str:
    name = content.filename or "upload"
    if len(name) > _NAME_CHARACTERS or not name.isprintable():
        raise RequestInvalid("file", f"its name must have at most {_NAME_CHARACTERS} printable characters")
    return name


def _purpose_of(form: FormData) -> str:
    purpose = form.get("purpose")
    if purpose is None:
        raise RequestInvalid("purpose", "is missing", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise RequestInvalid("purpose", f"must be one of {', '.join(PURPOSES)}")
    return str(purpose)


def _seconds_of(form: FormData, purpose: str) -> int | None:
    """How long it is kept; None: until it is deleted."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return OUTPUT_SECONDS if purpose == "batch" else None
    if anchor != "created_at":
        raise RequestInvalid("expires_after.anchor", "must be created_at")
    return expiry_seconds(seconds, "expires_after.seconds")


def expiry_seconds(value: Any, field: str) -> int:
    """Seconds within the range. Raises RequestInvalid."""
    digits = str(value)
    if not digits.isascii() or not digits.isdigit() or len(digits) > len(str(MAX_SECONDS)):
        raise RequestInvalid(field, "must be an integer", "invalid_type")
    if not MIN_SECONDS <= int(digits) <= MAX_SECONDS:
        raise RequestInvalid(field, f"must be {MIN_SECONDS} to {MAX_SECONDS}")
    return int(digits)


@router.get("/v1/files", openapi_extra=query("purpose", "limit", "order", "after"))
async def list_files(request: Request, visitor: Reader) -> Response:
    """List files."""
    limit, query = limit_of(request, MAX_LISTED, MAX_LISTED), request.query_params
    work = partial(
        visitor.producer.files.list,
        visitor.tenant_id,
        purpose=query.get("purpose"),
        after=cursor_of(FILE, "file", query.get("after")),
        limit=limit + 1,
        ascending=order_of(request) == "asc",
    )
    return json_reply(page([file_object(file) for file in await in_thread(work)], limit))


def page(objects: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """One page of a list, of which one more than the limit was looked up."""
    data = objects[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(objects) > limit,
    }


@router.get("/v1/files/{name}")
async def get_file(name: str, visitor: Reader) -> Response:
    """Describe a file."""
    return json_reply(file_object(await found_file(visitor, name)))


@router.get("/v1/files/{name}/content")
async def get_content(name: str, visitor: Reader) -> Response:
    """The file's bytes."""
    file = await found_file(visitor, name)
    # Never shown by a browser as what its owner says it is.
    headers = {"Content-Length": str(file.bytes), "Content-Disposition": "attachment"}
    return StreamingResponse(_pieces(visitor, file), headers=headers, media_type="application/octet-stream")


async def _pieces(visitor: Visitor, file: File) -> AsyncIterator[bytes]:
    files = visitor.producer.files
    for number in range(-(-file.bytes // PIECE_BYTES)):
        yield await in_thread(files.piece, file.id, number)


@router.delete("/v1/files/{name}")
async def delete_file(name: str, visitor: Submitter) -> Response:
    """Delete a file. A batch that was begun on it goes on."""
    file_id = id_of(FILE, "file", name)
    try:
        await in_thread(visitor.producer.files.delete, file_id, visitor.tenant_id)
    except NotFound:
        raise not_found("file", name) from None
    return json_reply({"id": name, "object": "file", "deleted": True})


async def found_file(visitor: Visitor, name: str, param: str | None = None) -> File:
    """The file. Raises ApiError."""
    file_id = id_of(FILE, "file", name, param)
    try:
        return await in_thread(visitor.producer.files.get, file_id, visitor.tenant_id)
    except NotFound:
        raise not_found("file", name, param) from None


def file_object(file: File) -> dict[str, Any]:
    """A FileObject."""
    return {
        "id": named(FILE, file.id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": unix(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def unix(moment: datetime | None) -> int | None:
    """Seconds since the epoch."""
    return None if moment is None else int(moment.timestamp())


def optional_name(prefix: str, one: UUID | None) -> str | None:
    """What clients call it, if there is one."""
    return None if one is None else named(prefix, one)
