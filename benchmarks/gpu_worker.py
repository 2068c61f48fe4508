"""The process of the GPU benchmark that measures: ``[kind, parameters]`` per line in, a JSON object per line out."""

from __future__ import annotations

import gc
from typing import Any

from .process import serve


def main() -> None:
    """Answer until the input ends. An error that may have spoilt the device ends the process after its answer."""
    import torch

    from .gpu_measure import KINDS

    def handle(request: Any) -> dict[str, Any]:
        kind, parameters = request
        answer = KINDS[kind](**parameters)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        return answer

    serve(handle)


if __name__ == "__main__":
    main()
