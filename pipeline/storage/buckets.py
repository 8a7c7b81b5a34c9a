"""S3 calls that s3fs does not offer: ordered pages, conditional reads and writes, the server's clock."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

_REFUSED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def page(filesystem: Any, start: str, token: str) -> tuple[list[dict[str, Any]], str | None]:
    """Up to 1000 objects whose paths begin with `start` ("bucket/a/b"), in byte order, and the next page's token.

    token  from the previous page, "" for the first page; the last page returns None
    """
    bucket, prefix = _split(start)
    options = {"ContinuationToken": token} if token else {}
    answer = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1000, **options)
    return answer.get("Contents", []), answer.get("NextContinuationToken") if answer.get("IsTruncated") else None


def clock(filesystem: Any, root: str) -> float:
    """The server's time, in seconds since the epoch."""
    bucket, prefix = _split(root)
    return _date(filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1))


def get(filesystem: Any, path: str, etag: str | None = None) -> tuple[bytes, str, float] | None:
    """Content, etag and age in seconds by the server's clock, in one request; None if the version is not `etag`."""
    bucket, key = _split(path)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    try:
        answer = filesystem.call_s3("get_object", Bucket=bucket, Key=key, **condition)
    except OSError as error:
        if was_refused(error):
            return None
        raise
    data = asyncio.run_coroutine_threadsafe(answer["Body"].read(), filesystem.loop).result()
    return data, answer["ETag"].strip('"'), _date(answer) - answer["LastModified"].timestamp()


def head(filesystem: Any, path: str) -> tuple[int, str, float]:
    """Size in bytes, etag and modification time (seconds since the epoch) of an object, in one request.

    Raises FileNotFoundError.
    """
    bucket, key = _split(path)
    answer = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
    return int(answer["ContentLength"]), answer["ETag"].strip('"'), answer["LastModified"].timestamp()


def create(filesystem: Any, path: str, data: bytes) -> None:
    """Create an object if it does not exist. Raises FileExistsError if a different one exists.

    After any failure the object is read back, to tell a refusal from a success whose response was lost, and from a
    transient conflict. This is done after every failure, because Ceph's 412 reaches us as EINVAL.
    """
    try:
        filesystem.pipe_file(path, data, mode="create")
    except OSError as error:
        try:
            there = filesystem.cat_file(path)
        except FileNotFoundError:
            if was_refused(error):
                raise OSError(
                    errno.EAGAIN, "conflict with another request, although the object does not exist"
                ) from error
            raise error from error.__cause__  # botocore's error, which tells whether it is transient
        if there != data:
            raise FileExistsError(path) from error


def replace(filesystem: Any, path: str, data: bytes, etag: str) -> str | None:
    """Replace the version `etag`; returns the new etag, or None if the current version is another one.

    Reading back resolves two cases: a success whose response was lost, which looks like a refusal when s3fs retries,
    and Ceph's gateway, which takes the etag's quotes as part of it on writes.
    """
    bucket, key = _split(path)
    for condition in (f'"{etag}"', etag):
        try:
            answer = filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=condition)
            return str(answer["ETag"]).strip('"')
        except OSError as error:
            if not was_refused(error):
                raise
        now = get(filesystem, path)
        if now is None or now[1] != etag:
            return now[1] if now is not None and now[0] == data else None
    return None


def was_refused(error: BaseException) -> bool:
    """True if a condition did not hold, whatever the error code was translated to."""
    return code_of(error) in _REFUSED


def code_of(error: BaseException) -> str:
    """The server's error code, e.g. AccessDenied; "" if there was no response."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int | None:
    """HTTP status of an error; None if there was no response."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def _response(error: BaseException) -> dict[str, Any]:
    """botocore's response, which s3fs hides behind an OSError."""
    response: dict[str, Any] = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return response


def entries(objects: list[dict[str, Any]], root: str) -> Iterator[tuple[str, int, str, float]]:
    """(name below the root, bytes, etag, seconds since the epoch) for each object of a page, without folder markers."""
    prefix = root.partition("/")[2]
    base = len(prefix) + 1 if prefix else 0
    for item in objects:
        key = item["Key"]
        if not key.endswith("/"):
            yield key[base:], int(item["Size"]), item["ETag"].strip('"'), item["LastModified"].timestamp()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _date(answer: dict[str, Any]) -> float:
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
