"""Nested values as structure and tensors, and what their fingerprints tell apart."""

import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from ddinfer.parallel.tensor_tree import TensorTree, UnsupportedValueError, fingerprint

Pair = namedtuple("Pair", "left right")


def test_a_nested_value_comes_back_with_other_tensors():
    value = {"a": [torch.zeros(2, 3).T, 1.5], "b": Pair(None, (torch.ones(2), "text"))}
    tree = pickle.loads(pickle.dumps(TensorTree.of(value, torch.device("cpu"))))
    assert [tuple(t.shape) for t in tree.empty.values()] == [(3, 2), (2,)]
    assert tree.empty[0].stride() == (1, 3)
    made = tree.unflatten({k: torch.full(t.shape, 7.0) for k, t in tree.empty.items()})
    assert made["a"][1] == 1.5
    assert isinstance(made["b"], Pair)
    assert made["b"].right[1] == "text"
    assert bool((made["a"][0] == 7).all())


DIFFERENT = [
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(2, 3), torch.zeros(3, 2).T),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    ("1", 1),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"b": 1}),
    ({"a": 1}, OrderedDict(a=1)),
    (["a", "b"], ["a\nstr 'b'", ""]),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_unlike_values_have_unlike_fingerprints(one, other):
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_elements_count_where_they_are_asked_for():
    zeros, ones = [torch.zeros(3), torch.zeros(0)], [torch.ones(3), torch.zeros(0)]
    assert fingerprint(zeros) == fingerprint(ones)
    assert fingerprint(zeros, contents=[1]) == fingerprint(ones, contents=[1])
    for contents in (True, [0]):
        assert fingerprint(zeros, contents=contents) != fingerprint(ones, contents=contents)


def test_other_types_are_refused_or_count_by_their_pickle():
    arrays = np.zeros(2000), np.zeros(2000)
    arrays[1][1000] = 1
    with pytest.raises(UnsupportedValueError, match="ndarray"):
        fingerprint(arrays[0])
    found = [fingerprint(array, other_types=True) for array in (*arrays, arrays[0].copy())]
    assert found[0] == found[2] != found[1]
    with pytest.raises(UnsupportedValueError, match="generator"):
        fingerprint((x for x in ()), other_types=True)
