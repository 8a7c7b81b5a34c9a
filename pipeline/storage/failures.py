"""What a failed call to a store means: in which words it said so, what to do about it, and whether it may pass."""

from __future__ import annotations

import asyncio
import errno
import os

import aiohttp
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import (
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError

from pipeline.errors import one_line
from pipeline.storage import buckets

_PASSING = (
    *(TimeoutError, ConnectionError, asyncio.TimeoutError, asyncio.IncompleteReadError, aiohttp.ClientConnectionError),
    *(aiohttp.ClientPayloadError, BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError),
)
_PASSING_ERRNOS = {errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "OperationAborted", "ConditionalRequestConflict", "409"}
_PASSING_CODES |= {"InternalError", "ServiceUnavailable"}  # also in the body of a 200
_CREDENTIALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}


def line_of(error: BaseException) -> str:
    """What the store, the system or the library said, in one line; the store's code where the words lack it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{os.strerror(errno.ENOSPC)}: make room there, then run the same command again"
    code, text = buckets.code_of(error), one_line(error)
    return (f"{code}: {text}" if code and code not in text else text)[:200]


def advice_for(error: BaseException) -> str:
    """What to do about it, where that can be told from the kind of the failure."""
    code = buckets.code_of(error)
    if code == "InvalidObjectState":
        return "; the object is archived: restore it, then start again"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return "; set AWS_ACCESS_KEY_ID …"
    if code in _CREDENTIALS or (isinstance(error, PermissionError) and error.errno is None):
        return "; access denied: check the credentials of this environment"
    if isinstance(error, PermissionError):
        return "; check the owner and the mode of it and of its folder"
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return "; an endpoint, such as AWS_ENDPOINT_URL, begins with http:// or https://"
    return ""


def may_pass(error: BaseException) -> bool:
    """Timeouts, broken connections, throttling and 5xx pass; a full disk or a refused request does not."""
    status = buckets.http_status(error)
    if status is not None:
        return status >= 500 or status == 429 or buckets.code_of(error) in _PASSING_CODES
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status == 429
    return isinstance(error, _PASSING) or (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS)
