"""How many CPUs this process may use."""

from __future__ import annotations


def available_cpus() -> int:
    """CPUs of this process: a container, or `taskset`, may allow fewer than the machine has."""
    from joblib import cpu_count  # imported here: it takes a fifth of a second

    return int(cpu_count())
