"""Names of tasks and their targets."""

import math

import pytest

from fluxcompile.errors import DataError
from fluxcompile.training.tasks import Task, resolve_tasks


def test_the_papers_two_tasks_are_always_known():
    assert resolve_tasks(None) == {
        "retrieval": Task("retrieval", "retrieval", 0.45),
        "holistic": Task("holistic", "holistic", 1.0),
    }
    assert resolve_tasks({}) == resolve_tasks(None)


def test_names_map_to_a_target_or_to_a_built_in_task():
    tasks = resolve_tasks({"qa": "retrieval", "code": "holistic", "sums": 0.7, "none": 0})
    assert list(tasks) == ["retrieval", "holistic", "qa", "code", "sums", "none"]
    assert tasks["qa"] == Task("qa", "retrieval", 0.45)
    assert tasks["code"] == Task("code", "holistic", 1.0)
    assert tasks["sums"] == Task("sums", "custom", 0.7)
    assert tasks["none"] == Task("none", "custom", 0.0)


def test_a_built_in_task_takes_another_target_and_keeps_its_kind():
    tasks = resolve_tasks({"holistic": 0.8})
    assert tasks["holistic"] == Task("holistic", "holistic", 0.8)
    assert list(tasks) == ["retrieval", "holistic"]


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, math.nan, math.inf, True, None, "dense", [0.5]], ids=repr
)
def test_a_value_that_is_no_target_is_refused(value):
    with pytest.raises(DataError, match=r"tasks\['qa'\]: expected a target in \[0, 1\] or one of"):
        resolve_tasks({"qa": value})


def test_a_built_in_name_is_not_given_the_other_kind():
    with pytest.raises(DataError, match=r"tasks\['retrieval'\].*got 'holistic'"):
        resolve_tasks({"retrieval": "holistic"})


@pytest.mark.parametrize("tasks", [{"": 0.5}, {3: 0.5}, ["qa"], "qa"], ids=repr)
def test_names_are_strings_in_a_mapping(tasks):
    with pytest.raises(DataError, match="tasks: expected"):
        resolve_tasks(tasks)
