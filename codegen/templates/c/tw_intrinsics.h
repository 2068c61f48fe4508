/* The processor's intrinsics, for AVX2 with GCC only those up to AVX2.
 *
 * GCC's <immintrin.h> holds every set of instructions that there is, and takes ten times as long to read as these. Its
 * parts want to be included by it alone, which they know by the macro that keeps it from being read twice. So it is in the
 * releases named here; others read all of it.
 */
#ifndef TW_INTRINSICS_H
#define TW_INTRINSICS_H

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9 && __GNUC__ <= 15 && defined(__AVX2__) && \
    !defined(__AVX512F__) && !defined(_IMMINTRIN_H_INCLUDED)
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>

#include <avxintrin.h>

#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#else
#include <immintrin.h>
#endif

#endif
