"""Folders of tiny models, each saved once a session."""

import pytest
import torch
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(family, dtype) -> folder, made once a session; read only."""
    made = {}

    def save(family: str, dtype: torch.dtype = torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family)
            tiny_model(family, dtype).save_pretrained(made[family, dtype])
        return made[family, dtype]

    return save
