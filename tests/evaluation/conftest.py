"""What tests of evaluations share."""

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.bridge("gpt2", tokenizer)
