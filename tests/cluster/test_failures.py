"""Failures as data: what a worker tells, and what the driver raises for it."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.cluster.failures import Failure, ray_failures
from pipeline.errors import ClusterError, InputError, PromiseError, ScumbleError, StoreError


def test_a_failure_of_ours_is_raised_as_what_it_was_and_names_its_shard() -> None:
    error = Failure.of(StoreError("cannot read a.tar: denied"), "a.tar").error()
    assert (type(error), str(error)) == (StoreError, "cannot read a.tar: denied")
    error = Failure.of(PromiseError("delta is 17/255"), "b/c.tar").error()
    assert (type(error), str(error)) == (PromiseError, "b/c.tar: delta is 17/255")


@pytest.mark.parametrize(
    "error", [KeyError("pipeline.errors.StoreError: no"), RuntimeError("SettingsError"), OSError()]
)
def test_a_foreign_one_is_a_cluster_error_of_one_line_whatever_its_text(error: Exception) -> None:
    raised = Failure.of(error, "a.tar").error()
    assert type(raised) is ClusterError
    assert str(raised).startswith(f"a worker failed: a.tar: {type(error).__name__}: ")
    assert "\n" not in str(raised)


def test_a_name_that_is_no_error_of_ours_builds_nothing() -> None:
    assert type(Failure("Reason", "text", "").error()) is ClusterError
    assert type(Failure("annotations", "text", "").error()) is ClusterError


def raised_for(error: Exception) -> ScumbleError:
    with pytest.raises(ScumbleError) as caught, ray_failures():
        raise error
    return caught.value


def test_what_ray_wraps_is_found_as_an_object_and_never_in_a_text() -> None:
    ours = InputError("a.tar has changed")
    wrapped = RayTaskError("task", "Traceback …\npipeline.errors.StoreError: of the text", ours)
    assert raised_for(wrapped) is ours
    assert raised_for(wrapped.as_instanceof_cause()) is ours  # what ray.get raises: an InputError with that text
    group = WorkerGroupError(
        "all of it", {1: UserExceptionWithTraceback(ours, "pipeline.errors.StoreError: of the text")}
    )
    assert raised_for(group) is ours
    group = WorkerGroupError("pipeline.errors.StoreError: of the text", {0: RuntimeError("worker died")})
    assert type(raised_for(group)) is ClusterError


def test_dead_workers_are_a_cluster_error() -> None:
    error = raised_for(RayActorError(error_msg="The actor died unexpectedly. It was killed."))
    assert type(error) is ClusterError
    assert str(error).startswith("a worker process died too often (The actor died unexpectedly), most often for lack")


def test_a_fault_of_the_driver_itself_is_left_as_it_is() -> None:
    with pytest.raises(KeyError), ray_failures():
        raise KeyError("ours")
