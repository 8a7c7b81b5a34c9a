"""Calls to a bucket that s3fs has no name for: pages in order, one version made, read or replaced, its clock."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

_REFUSED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def page(filesystem: Any, start: str, token: str) -> tuple[list[dict[str, Any]], str | None]:
    """Up to 1000 objects whose paths begin with `start` ("bucket/a/b"), in byte order, and the next page's token.

    token  of the page before, "" for the first; the last has None
    """
    bucket, prefix = _split(start)
    options = {"ContinuationToken": token} if token else {}
    answer = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1000, **options)
    return answer.get("Contents", []), answer.get("NextContinuationToken") if answer.get("IsTruncated") else None


def clock(filesystem: Any, root: str) -> float:
    """Seconds since the epoch, as the server tells the time."""
    bucket, prefix = _split(root)
    return _date(filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1))


def get(filesystem: Any, path: str, etag: str | None = None) -> tuple[bytes, str, float] | None:
    """Content, etag and age in seconds by the server's clock, in one answer; None if it is not the version `etag`."""
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
    """Bytes, etag and seconds since the epoch of an object, in one request. Raises FileNotFoundError."""
    bucket, key = _split(path)
    answer = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
    return int(answer["ContentLength"]), answer["ETag"].strip('"'), answer["LastModified"].timestamp()


def create(filesystem: Any, path: str, data: bytes) -> None:
    """Put an object if there is none of that name. Raises FileExistsError if another one is there.

    What stands there tells a refusal from a success whose answer was lost, and from a conflict that will pass. It is
    asked after every failure: Ceph's 412 reaches us as EINVAL.
    """
    try:
        filesystem.pipe_file(path, data, mode="create")
    except OSError as error:
        try:
            there = filesystem.cat_file(path)
        except FileNotFoundError:
            if was_refused(error):
                raise OSError(errno.EAGAIN, "conflict with another request, although nothing is there") from error
            raise error from error.__cause__  # botocore's own, which tells whether it may pass
        if there != data:
            raise FileExistsError(path) from error


def replace(filesystem: Any, path: str, data: bytes, etag: str) -> str | None:
    """The new etag; None if what is there is not the version `etag`.

    Two things are cleared up by reading back: a success whose answer was lost, which looks like a refusal when s3fs
    sends it again, and Ceph's gateway, which takes the etag's quotes for a part of it when something is put.
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
    """True if a condition did not hold, however the server's word for it was translated."""
    return code_of(error) in _REFUSED


def code_of(error: BaseException) -> str:
    """The server's word for an error, e.g. AccessDenied; "" if no server has answered."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int | None:
    """HTTP status of an error; None if no server has answered."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def _response(error: BaseException) -> dict[str, Any]:
    """botocore's own, which s3fs hides behind an OSError."""
    found: dict[str, Any] = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return found


def entries(found: list[dict[str, Any]], root: str) -> Iterator[tuple[str, int, str, float]]:
    """(name below the root, bytes, etag, seconds since the epoch) of a page; markers of folders are left out."""
    prefix = root.partition("/")[2]
    base = len(prefix) + 1 if prefix else 0
    for one in found:
        key = one["Key"]
        if not key.endswith("/"):
            yield key[base:], int(one["Size"]), one["ETag"].strip('"'), one["LastModified"].timestamp()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


def _date(answer: dict[str, Any]) -> float:
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
