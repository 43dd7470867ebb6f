"""What tests share: the real model, fetched once, and engines on it."""

from __future__ import annotations

import pytest

import workbench


@pytest.fixture(scope="session")
def model():
    return workbench.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def engine(model):
    return workbench.open_engine("numba", model)


@pytest.fixture(scope="session")
def reference(model):
    return workbench.open_engine("transformers", model)


@pytest.fixture(scope="session")
def japan(model):
    """The prompt that asks for France's capital with the row of ` Japan` over ` France`, and its plain twin."""
    ids = model.chat_ids("What is the capital of France?")
    france, japan = (model.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" France", " Japan"))
    at = ids.index(france)
    return workbench.Prompt(ids, [model.embedding_table[[japan]]], [(at, at + 1)]), workbench.Prompt(ids)
