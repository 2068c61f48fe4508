"""The process of the GPU benchmark that measures: ``[kind, parameters]`` per line in, a JSON object per line out."""

from __future__ import annotations

import gc
import json
import os
import sys


def main() -> None:
    """Answer until the input ends. An error that may have spoilt the device ends the process after its answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print does not get between the answers
    import torch

    from .gpu_measure import KINDS

    for line in sys.stdin:
        kind, parameters = json.loads(line)
        try:
            answer = KINDS[kind](**parameters)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


if __name__ == "__main__":
    main()
