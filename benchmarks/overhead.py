"""What a call costs beyond its arithmetic: the Python side, a step on one thread, a step shared by several.

    python benchmarks/overhead.py [--threads N]

The model does (almost) nothing: its kernels look at one element. Medians of several repetitions, in microseconds.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import timeit
from pathlib import Path
from statistics import median

import numpy as np

import tilewright
from tilewright.codegen.artifact import TargetBinaries, weights_id, write_artifact
from tilewright.codegen.c import toolchain
from tilewright.runtime.plan import Plan, Port, Ref, Step, Symbol, Variant

SOURCES = Path(toolchain.__file__).parents[1] / "templates" / "c"
STEPS = 100

CODE = """
#include "tw_runtime.h"
static void look(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                 int32_t *restrict fault) {
    (void)dim, (void)end, (void)fault;
    if (begin == 0) ((float *)buf[1])[0] = ((const float *)buf[0])[0];
}
#define ENTRY(name, steps, work)                                                        \\
    TW_API int64_t tw_arena_##name(const int64_t *symbols, int64_t *offsets) {          \\
        (void)symbols, (void)offsets;                                                   \\
        return 0;                                                                       \\
    }                                                                                   \\
    TW_API int32_t tw_run_##name(tw_call *call) {                                       \\
        void *const buf[] = {call->inputs[0], call->outputs[0]};                        \\
        for (int i = 0; i < steps; i++) tw_step(call, i, 0, look, buf, 0, 64, work);    \\
        return call->fault;                                                             \\
    }
ENTRY(one_input, 1, 0)
ENTRY(three_inputs, 1, 0)
ENTRY(alone, %(steps)d, 0)
ENTRY(shared, %(steps)d, 1 << 30)
const char tw_weights_id[65] = "%(identity)s";
const int64_t tw_weights_size = %(size)d;
"""


def plan(entry: str, inputs: int, steps: int) -> Plan:
    look = Variant("look", (Ref("input", 0), Ref("output", 0)), (), 64)
    return Plan(
        entry=entry,
        symbols=(Symbol("n", 1, 64, 2, 0, 0),),
        inputs=tuple(Port(f"x{index}", "float32", ("n", 8)) for index in range(inputs)),
        outputs=(Port("y", "float32", ("n", 8)),),
        results={"output": 0},
        checks=(),
        states=(),
        constants=(),
        buffers=(),
        steps=tuple(Step(f"look_{index}", "loop", (look,), (1,)) for index in range(steps)),
    )


def build(folder: Path) -> Path:
    identity, size = weights_id(())
    source = folder / "model.c"
    source.write_text(CODE % {"steps": STEPS, "identity": identity, "size": size})
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", "-I", str(SOURCES)]
    command = [*toolchain.find_compiler().command, *flags, str(source), str(SOURCES / "tw_runtime.c")]
    subprocess.run([*command, "-o", str(folder / "model.so")], check=True)
    return write_artifact(
        folder / "overhead.tw",
        plans=[plan("one_input", 1, 1), plan("three_inputs", 3, 1), plan("alone", 1, STEPS), plan("shared", 1, STEPS)],
        constants=(),
        targets=[TargetBinaries("cpu:any", (), {"model.so": (folder / "model.so").read_bytes()})],
        info={},
    )


def microseconds(call, number: int = 2000) -> float:
    return median(timeit.repeat(call, number=number, repeat=9)) / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    x = np.zeros((4, 8), np.float32)
    y = np.zeros((4, 8), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model = tilewright.load(build(Path(folder)), threads=arguments.threads)
        one, three, alone, shared = (model.entry(name) for name in model.entries)
        base = microseconds(lambda: one(x))
        print(f"call, 1 input              {base:8.2f} us")
        print(f"call, 1 input, out=        {microseconds(lambda: one(x, out=y)):8.2f} us")
        view, memory = memoryview(bytearray(x.nbytes)).cast("f", x.shape), bytearray(x.nbytes)
        print(f"call, 1 input as a view    {microseconds(lambda: one(view)):8.2f} us")
        print(f"call, the same, out=       {microseconds(lambda: one(view, out=memory)):8.2f} us")
        print(f"call, 3 inputs             {microseconds(lambda: three(x, x, x)):8.2f} us")
        print(f"call, 3 inputs by name     {microseconds(lambda: three(x0=x, x1=x, x2=x)):8.2f} us")
        for name, entry in (("one thread", alone), (f"{arguments.threads} threads", shared)):
            step = (microseconds(lambda entry=entry: entry(x)) - base) / (STEPS - 1)
            print(f"step on {name:19}{step:8.3f} us")
        model.close()


if __name__ == "__main__":
    main()
