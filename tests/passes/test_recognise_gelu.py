import math

import pytest
import torch
from torch import nn

from tilewright.passes.recognise_gelu import RecogniseGelu


class Written(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("root", torch.tensor(math.sqrt(2)))
        self.register_buffer("halved", torch.tensor([0.5]))
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.function(self.linear(x), self)


ROOT = math.sqrt(2 / math.pi)
ERF = {
    "bert": lambda x, m: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "onnx": lambda x, m: m.halved * (x * (torch.erf(x / m.root) + 1)),
    "half_of_gate": lambda x, m: x * (0.5 + 0.5 * torch.erf(x * 0.7071067690849304)),
    "distributed": lambda x, m: 0.5 * x + torch.erf(m.halved.sqrt() * x) * x / 2,
    "cloned": lambda x, m: (x.clone() * ((torch.erf(x * 2**-0.5) + 1) / 2)).reshape(x.shape),
}
TANH = {
    "gpt2": lambda x, m: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "products": lambda x, m: x * (torch.tanh(ROOT * x * (1 + 0.044715 * x * x)) + 1) * 0.5,
    "cube": lambda x, m: (1 + torch.tanh((x + x * x * x * 0.044715) * 0.7978845608)) * x * m.halved,
}


@pytest.mark.parametrize("name", [*ERF, *TANH])
def test_every_spelling(name, exported, run_pass, targets):
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=16)
    written = {**ERF, **TANH}[name]
    program = exported(Written(written), torch.randn(3, 8), dynamic_shapes=({0: batch},))
    report = run_pass(RecogniseGelu(), program)
    assert len(report.changes) == 1
    ignored = ("aten.sym_size.int", "aten.view", "aten.reshape")
    assert [target for target in targets(program) if target not in ignored] == ["aten.linear", "aten.gelu"]
    gelu = next(node for node in program.graph.nodes if "gelu" in node.name)
    assert gelu.kwargs.get("approximate", "none") == ("tanh" if name in TANH else "none")


def test_golden(exported, run_pass, show, golden):
    program = exported(Written(ERF["bert"]), torch.randn(3, 8))
    run_pass(RecogniseGelu(), program)
    golden(show(program))


def test_two_products_of_one_gate(exported, run_pass, targets):
    def twice(x, m):
        gate = torch.erf(x * 2**-0.5)
        return x * 0.5 * (gate + 1), (gate + 1) * (0.5 * x)

    program = exported(Written(twice), torch.randn(3, 8))
    assert len(run_pass(RecogniseGelu(), program).changes) == 2
    assert targets(program).count("aten.gelu") == 2 and "aten.erf" not in targets(program)


def test_silu_but_not_quick_gelu(exported, run_pass, targets):
    program = exported(Written(lambda x, m: x * torch.sigmoid(x) + x * torch.sigmoid(1.702 * x)), torch.randn(3, 8))
    run_pass(RecogniseGelu(), program)
    assert targets(program).count("aten.silu") == 1 and targets(program).count("aten.sigmoid") == 1


NOT_GELU = [
    lambda x, m: x * 0.5 * (1.0 + torch.erf(x / 1.4)),
    lambda x, m: x * 0.5 * (1.0 + torch.erf((x + 1) / math.sqrt(2))),
    lambda x, m: x * 0.5 * (1.0 - torch.erf(x / math.sqrt(2))),
    lambda x, m: m.linear(x) * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))),
    lambda x, m: x.unsqueeze(0) * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))),
    lambda x, m: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.0447 * torch.pow(x, 3.0)))),
    lambda x, m: torch.tanh(x) * x,
]


def test_refuses_what_is_something_else(exported, refusals):
    every = Written(lambda x, m: tuple(written(x, m) for written in NOT_GELU))
    refusals(RecogniseGelu(), exported(every, torch.randn(3, 8)))


def test_says_why(exported, refusals):
    def other(x, m):
        return m.linear(x) * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), torch.erf(x)

    reasons = refusals(RecogniseGelu(), exported(Written(other), torch.randn(3, 8)))
    assert reasons == ["no product of linear / 2 and 1 + erf follows", "its argument is not x / sqrt(2)"]
