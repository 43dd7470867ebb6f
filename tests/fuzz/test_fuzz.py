"""A short run of the fuzzer, with fixed seeds, and all inputs that once failed."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.readers import READERS, inputs

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", READERS)
def test_valid_input_is_read(name):
    for data in READERS[name].bases():
        READERS[name].read(data)


@pytest.mark.parametrize("name", READERS)
def test_mutated_input_gives_a_right_result_or_an_error(name):
    for data in islice(inputs(READERS[name], seed=1), 60):
        READERS[name].check(data)


@pytest.mark.parametrize("kept", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_input_that_once_failed_gives_a_right_result_or_an_error(kept):
    READERS[kept.parent.name].check(kept.read_bytes())
