/* float16 and bfloat16 as they lie in memory, to and from float32: round to nearest even, without branches.
 *
 * Integer arithmetic only, because compilers turn scalar F16C intrinsics into scalar code: loops over these become
 * vector code on every target.
 */
#ifndef TW_HALF_H
#define TW_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t tw_bits_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float tw_from_bits_f32(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint64_t tw_bits_f64(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline double tw_from_bits_f64(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }

static inline float tw_bf16_to_f32(uint16_t h) { return tw_from_bits_f32((uint32_t)h << 16); }

/* NaN becomes 0x7fc0 whatever its sign and payload, as in PyTorch's scalar conversion. */
static inline uint16_t tw_f32_to_bf16(float x) {
    const uint32_t bits = tw_bits_f32(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

static inline float tw_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + 0x38000000u; /* exponent bias 15 -> 127 */
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    const uint32_t subnormal = tw_bits_f32((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : normal;
    return tw_from_bits_f32(bits | sign);
}

static inline uint16_t tw_f32_to_f16(float x) {
    const uint32_t bits = tw_bits_f32(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    /* Adding 0.5 leaves the 10 bits that a float16 below 2^-14 has at the end of the sum, rounded by the addition. */
    const uint32_t subnormal = tw_bits_f32(tw_from_bits_f32(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)(sign | (magnitude >= 0x477ff000u ? special : finite)); /* 65520 and above round to infinity */
}

#endif
