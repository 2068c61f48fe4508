"""The byte-level language model: held-out text, perplexity and the baselines it must beat."""

import math

import numpy as np
import pytest
import torch

from tilewright import models
from tilewright.models import bytelm, stdlib_text, train_bytelm


def test_held_out_text_is_not_trained_on():
    training = stdlib_text.training_text().tobytes()
    for name in stdlib_text.HELD_OUT:
        text = (stdlib_text._root() / name).read_bytes()
        assert text in stdlib_text.held_out_text().tobytes()
        assert text[: len(text) // 2] not in training
    assert len(stdlib_text.held_out_text()) > 60_000
    assert stdlib_text.windows(np.arange(100, dtype=np.uint8), 33).tolist() == [
        list(range(0, 34)),
        list(range(33, 67)),
        list(range(66, 100)),
    ]
    with pytest.raises(ValueError, match="5 bytes of text do not fill one window of 6"):
        stdlib_text.windows(np.zeros(5, np.uint8), 5)


def test_heldout_rows():
    rows = bytelm.heldout()
    assert rows.dtype == np.int64 and rows.shape[1] == bytelm.CONTEXT + 1
    assert (rows[:-1, -1] == rows[1:, 0]).all(), "rows overlap by one byte"
    few = bytelm.heldout(limit=5)
    assert len(few) == 5 and (few[0] == rows[0]).all() and (few[-1] == rows[-1]).all()
    assert len(bytelm.heldout(limit=10**6)) == len(rows)


def test_perplexity_of_known_predictors():
    rows = bytelm.heldout(limit=3)
    uniform = bytelm.perplexity(lambda tokens: np.zeros((*tokens.shape, 256), np.float32), rows, batch=2)
    assert math.isclose(uniform, 256, rel_tol=1e-12)
    table = np.random.default_rng(0).normal(size=(256, 256)) + 500
    logits = torch.from_numpy(table[rows[:, :-1]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten()).exp()
    assert math.isclose(bytelm.perplexity(lambda t: table[t], rows, batch=2), expected.item(), rel_tol=1e-9)


def test_perplexity_beats_the_bigram_table():
    rows = bytelm.heldout(limit=96)
    perplexity = bytelm.perplexity(train_bytelm.eager_predict(models.get("bytelm").build()), rows)
    bigram = train_bytelm.bigram_perplexity(stdlib_text.training_text(), rows)
    assert bigram < 20
    assert perplexity < 4.0
    assert perplexity < bigram / 2


def test_causal():
    model = models.get("bytelm").build()
    tokens = torch.from_numpy(bytelm.heldout(limit=1)[:, :-1])
    changed = tokens.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 256
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100], after[:, 100])


def test_a_few_steps_lower_the_loss():
    model = train_bytelm.train(steps=12, batch=2, seed=0, muon=False)  # whose products in bfloat16 may be slow
    rows = bytelm.heldout(limit=4)
    assert bytelm.perplexity(train_bytelm.eager_predict(model), rows) < 64


def test_the_larger_model_is_trained_to_a_file_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_bytelm", "--large"])
    with pytest.raises(SystemExit):
        train_bytelm.main()
    assert "--large needs --output FILE" in capsys.readouterr().err


def test_a_checkpoint_of_the_other_size_is_refused():
    with pytest.raises(ValueError, match="bytelm.safetensors does not fit Decoder"):
        bytelm.load(bytelm.CHECKPOINT, bytelm.LARGE)
