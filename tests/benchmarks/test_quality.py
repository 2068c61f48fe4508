"""Quality of the quantized byte model on a little held-out text."""

import torch

from tilewright.benchmarks.quality import compare, log_probabilities, quantized, recipe_of
from tilewright.models.bytelm import heldout


def test_quantization_costs_little_and_the_search_helps():
    rows = heldout(16)
    reference = log_probabilities(quantized(None), rows)
    found = {
        name: compare(name, "int8", log_probabilities(quantized(name, "int8"), rows), reference, rows)
        for name in ("int8", "int4-g32", "int4-g32-plain")
    }
    assert abs(found["int8"].loss) < 0.003 and found["int8"].agreement > 0.98
    assert found["int4-g32"].loss < 0.02
    assert found["int4-g32"].divergence < found["int4-g32-plain"].divergence
    assert found["int8"].divergence < found["int4-g32"].divergence


def test_activations_by_rows_are_for_comparison_only():
    assert recipe_of("int4-g32", "int8-rows").of("layers.0.q.weight", "linear").activations == 0
    assert recipe_of("int4-g32", "int8").of("layers.0.q.weight", "linear").activations == 32


def test_a_model_beside_itself():
    rows = heldout(1)
    same = torch.log_softmax(torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0)), -1)
    found = compare("none", "float", same, same, rows)
    assert (found.loss, found.divergence, found.agreement) == (0.0, 0.0, 1.0)
