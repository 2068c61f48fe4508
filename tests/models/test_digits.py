"""The trained digits CNN: its data, its checkpoint and its accuracy."""

import numpy as np
import pytest
import torch

from tilewright import models
from tilewright.models import checkpoint, digits, train_digits


def test_accuracy():
    assert train_digits.accuracy(models.get("digits").build()) >= 0.98


def test_split_is_fixed_and_disjoint():
    images, labels = digits.test_set()
    again, _ = digits.test_set()
    others, other_labels = digits.training_set()
    assert images.shape == (360, 1, 8, 8) and images.dtype == np.float32 and labels.dtype == np.int64
    assert np.array_equal(images, again)
    assert len(others) + len(images) == 1797 == len(labels) + len(other_labels)
    assert images.min() == 0 and images.max() == 1
    assert set(labels) == set(range(10))


def test_two_epochs_learn_and_round_trips(tmp_path):
    model = train_digits.train(epochs=2, seed=1)
    accuracy = train_digits.accuracy(model)
    assert accuracy > 0.8
    checkpoint.save(model, tmp_path / "digits.safetensors")
    loaded = checkpoint.load(digits.DigitsCNN(), tmp_path / "digits.safetensors", trainer="x")
    assert train_digits.accuracy(loaded) == accuracy
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))


def test_shifts_move_by_at_most_one_pixel():
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    moved = train_digits.shifted(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    assert (moved[:, 0, 3:6, 3:6].sum((1, 2)) == 1).all()
    assert (moved.sum(0)[0, 3:6, 3:6] > 0).all()


def test_missing_and_foreign_checkpoints_name_the_trainer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python -m pkg\.train"):
        checkpoint.load(digits.DigitsCNN(), tmp_path / "none.safetensors", trainer="pkg.train")
    checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="does not fit DigitsCNN .*head.weight.*python -m pkg"):
        checkpoint.load(digits.DigitsCNN(), tmp_path / "linear.safetensors", trainer="pkg")
