import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's library


@pytest.fixture(autouse=True, scope="session")
def _own_dataset_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    torch.set_num_threads(2)
