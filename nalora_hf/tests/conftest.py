import pytest
import torch

pytest.register_assert_rewrite("nalora_hf.tests.helpers")

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
