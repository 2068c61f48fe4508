"""What the processor can do at most: multiply-adds per second by dtype, and bytes read from memory per second.

Loops in C that do nothing else, compiled for this machine's widest target, on as many threads as asked for.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilewright.codegen.c.toolchain import Source, compile_objects, find_compiler, link_shared
from tilewright.codegen.targets import Target, parse
from tilewright.runtime.cpu import features

Kernel = Callable[..., None]

SIGNATURE = """void kernel(
    void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end, int32_t *restrict fault) {"""
FLOAT32 = f"""
#include "tw_simd.h"
#define START(r) tw_vec c##r = tw_load(x + r);
#define ADD(r) \\
    __asm__ volatile("" : "+x"(a), "+x"(c##r)); /* no product is known: they are fused with the sums */ \\
    c##r += a * b;
#define SUM(r) s += c##r;
{SIGNATURE}
    const float *const x = buf[0];
    tw_vec a = tw_load(x);
    const tw_vec b = tw_load(x + 1);
    TW_REPEAT_12(START)
    for (int64_t i = begin; i < end; i++) {{ TW_REPEAT_12(ADD) }}
    tw_vec s = {{0}};
    TW_REPEAT_12(SUM)
    if (s[0] != s[0]) {{ *fault = 1; }} /* keeps the sums alive */
}}
"""
DOTS = f"""
#include <immintrin.h>
#include "tw_simd.h"
#define START(r) ACC c##r = {{0}};
#define ADD(r) c##r = DOT(c##r, a, b);
#define KEEP(r) __asm__ volatile("" : "+x"(c##r));
#define STORE(r) _mm512_storeu_si512((char *)buf[0] + 64, (__m512i)c##r);
{SIGNATURE}
    const OPERAND a = (OPERAND)_mm512_loadu_si512(buf[0]), b = a;
    TW_REPEAT_12(START)
    for (int64_t i = begin; i < end; i++) {{ TW_REPEAT_12(ADD) TW_REPEAT_12(KEEP) }}
    TW_REPEAT_12(STORE) /* keeps the sums alive */
}}
"""
BFLOAT16 = "#define ACC __m512\n#define OPERAND __m512bh\n#define DOT _mm512_dpbf16_ps\n" + DOTS
INT8 = "#define ACC __m512i\n#define OPERAND __m512i\n#define DOT _mm512_dpbusd_epi32\n" + DOTS
INT8_WORDS = f"""
#include <immintrin.h>
#include "tw_simd.h"
#define START(r) __m256i c##r = _mm256_setzero_si256();
#define ADD(r) \\
    __asm__ volatile("" : "+x"(a), "+x"(c##r)); /* no product is known */ \\
    c##r = _mm256_add_epi32(c##r, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
#define STORE(r) _mm256_storeu_si256((__m256i *)((char *)buf[0] + 64), c##r);
{SIGNATURE}
    __m256i a = _mm256_loadu_si256((const __m256i *)buf[0]);
    const __m256i b = a, ones = _mm256_set1_epi16(1);
    TW_REPEAT_12(START)
    for (int64_t i = begin; i < end; i++) {{ TW_REPEAT_12(ADD) }}
    TW_REPEAT_12(STORE) /* keeps the sums alive */
}}
"""
READ = f"""
#include "tw_simd.h"
#define START(r) tw_vec c##r = {{0}};
#define ADD(r) c##r += tw_load(x + (i * 12 + r) * TW_LANES);
#define SUM(r) s += c##r;
{SIGNATURE}
    const float *const x = buf[0];
    TW_REPEAT_12(START)
    for (int64_t i = begin; i < end; i++) {{ TW_REPEAT_12(ADD) }}
    tw_vec s = {{0}};
    TW_REPEAT_12(SUM)
    if (s[0] == 1) {{ *fault = 1; }}
}}
"""
STEPS = 2_000_000  # of some milliseconds, against which threads start at the same time
READ_BYTES = 512 << 20  # many times the caches


@dataclass(frozen=True)
class Loop:
    """One limit's loop: what a unit counts for, in operations or bytes, and over which array it runs."""

    kernel: Kernel
    array: np.ndarray
    units: int
    amount: int

    def rate(self, threads: int) -> float:
        """Operations or bytes per second, now."""
        return self.amount * self.units / timed(self.kernel, [self.array], self.units, threads)


def loops(target: Target, folder: Path, *, reading: bool = True) -> dict[str, Loop]:
    """The loops that a target can run, by dtype, and ``read``.

    Args:
        target: the machine's.
        folder: for the libraries.
        reading: whether to measure memory, for which half a gigabyte is filled.
    """
    lanes, names = target.vector_bits // 32, [extension.name for extension in target.extensions]
    found = {"float32": Loop(build(FLOAT32, target, folder), np.ones(64, np.float32), STEPS, 12 * lanes * 2)}
    for name, extension, source, products in (("bfloat16", "bf16", BFLOAT16, 2), ("int8", "vnni", INT8, 4)):
        if extension in names:
            amount = 12 * lanes * products * 2
            found[name] = Loop(build(source, target, folder), np.zeros(128, np.uint8), STEPS, amount)
    if "int8" not in found:  # products of bytes in pairs as 16 bits, those in pairs as 32 bits, and the sum
        found["int8"] = Loop(build(INT8_WORDS, target, folder), np.zeros(128, np.uint8), STEPS, 12 * 8 * 4 * 2)
    if reading:
        step = 12 * lanes * 4
        array = np.ones(READ_BYTES // 4, np.float32)
        found["read"] = Loop(build(READ, target, folder), array, READ_BYTES // step, step)
    return found


def target_of(name: str = "") -> Target:
    """A target by name; without one, the widest that this machine runs."""
    return parse(name or "cpu", features())


def build(source: str, target: Target, folder: Path) -> Kernel:
    """A kernel's function, from its C text."""
    compiler = find_compiler()
    text = "#pragma GCC visibility push(default)\n" + source
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
        file.write(link_shared(compiler, compile_objects(compiler, [Source("kernel", text)], target), target))
    kernel: Kernel = ctypes.CDLL(file.name).kernel
    return kernel


def timed(kernel: Kernel, arrays: Sequence[np.ndarray], units: int, threads: int, repeats: int = 1) -> float:
    """Seconds for all units, shared out between threads, from the first thread's start to the last one's end.

    Every thread has a processor of its own: new threads may share one for longer than this takes.
    """
    buffers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    sizes, fault = (ctypes.c_int64 * 1)(0), ctypes.c_int32(0)
    cuts = [ctypes.c_int64(units * index // threads) for index in range(threads + 1)]
    starts, ends = [0.0] * threads, [0.0] * threads
    barrier = threading.Barrier(threads)
    allowed = os.sched_getaffinity(0)
    processors = sorted(allowed)

    def share(index: int) -> None:
        os.sched_setaffinity(0, {processors[index % len(processors)]})  # of the calling thread
        barrier.wait()
        starts[index] = time.perf_counter()
        for _ in range(repeats):
            kernel(buffers, sizes, cuts[index], cuts[index + 1], ctypes.byref(fault))
        ends[index] = time.perf_counter()

    others = [threading.Thread(target=share, args=(index,)) for index in range(1, threads)]
    for other in others:
        other.start()
    try:
        share(0)
    finally:
        os.sched_setaffinity(0, allowed)
    for other in others:
        other.join()
    return (max(ends) - min(starts)) / repeats
