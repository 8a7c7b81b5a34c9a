"""Python loads this by itself where its folder is on PYTHONPATH: processes die by SIGKILL at points that a test names.

A point is a call of the store by a process of the run, before it begins or after it has ended. A token is an empty
file in the folder KILL_TOKENS, named after the point; whoever reaches the point first renames it and is gone.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from typing import Any
from urllib.parse import quote

MODULE = "pipeline.storage.store"
METHODS = ("open_version", "put", "put_file", "create")


def reached(point: str) -> None:
    """Die here if a token of this name is left."""
    token = os.path.join(os.environ["KILL_TOKENS"], quote(point, safe=" "))
    try:
        os.rename(token, f"{token}.spent")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def watch(store: Any) -> None:
    """Make every call that reads or writes a point."""
    for method in METHODS:
        setattr(store, method, _watched(method, getattr(store, method)))


def _watched(method: str, original: Any) -> Any:
    def call(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        reached(f"before {method} {name}")
        result = original(self, name, *arguments, **options)
        reached(f"after {method} {name}")
        return result

    return call


class Finder(importlib.abc.MetaPathFinder):
    """Finds the store's module as everybody does, and watches it as soon as it is loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            watch(module.Store)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "KILL_TOKENS" in os.environ:
    sys.meta_path.insert(0, Finder())
