"""Storage calls are made again where a failure may pass; what does not pass leaves as an error of one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.errors import InputError, SettingsError, StoreError
from pipeline.storage.failures import advice_for, line_of, may_pass

_ATTEMPTS = 5
_T = TypeVar("_T")


def retried(where: str, action: Callable[[], _T], *, missing: str) -> _T:
    """The answer of one storage call, tried up to five times.

    where    what cannot be done, for the error
    missing  what it means that nothing is there
    Raises InputError if nothing is there, SettingsError for an endpoint, a region or a key that cannot be, StoreError
    for everything else; FileExistsError leaves as it is.
    """
    for tries in range(_ATTEMPTS):  # s3fs itself retries throttling and 5xx within each
        try:
            return action()
        except FileExistsError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise InputError(f"{where}: {missing}") from None
        except ValueError as error:  # raised before anything is sent: an invalid endpoint, region or key
            raise SettingsError(f"{where}: {line_of(error)}{advice_for(error)}") from None
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            passing = may_pass(error)
            if tries == _ATTEMPTS - 1 or not passing:
                failure = StoreError(f"{where}: {line_of(error)}{advice_for(error)}")
                failure.may_pass = passing
                raise failure from None
            time.sleep(min(0.2 * 4**tries, 10))
    raise AssertionError("unreachable")
