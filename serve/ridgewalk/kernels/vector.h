// A register of floats at a time, in GCC's vector extensions, and conversions from and to the storage types of tensors.
//
// Registers hold 16 floats with AVX-512, 8 with AVX2 and 4 elsewhere (NEON, SSE). GCC computes a wider vector than the
// CPU has through memory, thirty times slower than one that fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace ridgewalk {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 32;  // of NEON
#endif

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2)));

struct bf16 {
    uint16_t bits;
};
typedef _Float16 fp16;

static inline vf splat(float x) { return vf{} + x; }

template <class V, class P>
static inline V load_as(const P* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vf load(const float* p) { return load_as<vf>(p); }
static inline vf load(const bf16* p) {
    vu wide = __builtin_convertvector(load_as<vh>(p), vu) << 16;
    return (vf)wide;
}
static inline vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = (float)p[i];
    return v;
#endif
}

static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    vu nan = (u >> 16) | 0x40;
    vu bits = (v == v) ? rounded : nan;
    vh h = __builtin_convertvector(bits, vh);
    memcpy(p, &h, sizeof h);
}
static inline void store(fp16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; i++) p[i] = (fp16)v[i];
#endif
}

static inline float to_float(float x) { return x; }
static inline float to_float(fp16 x) { return (float)x; }
static inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline void from_float(float* p, float x) { *p = x; }
static inline void from_float(fp16* p, float x) { *p = (fp16)x; }
static inline void from_float(bf16* p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    p->bits = x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40;
}

static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }

// Every lane of the result is the combination of all lanes.
template <class F>
static inline vf combine(vf v, F op) {
#if defined(__AVX512F__)
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif
}
static inline float sum(vf v) {
    return combine(v, [](vf a, vf b) { return a + b; })[0];
}
static inline float max(vf v) { return combine(v, vmax)[0]; }

// 2^x by a Taylor series of degree 7 on [-0.5, 0.5], relative error about 2e-7; x is clamped to [-126, 127].
static inline vf exp2_vector(vf x) {
    x = vmin(vmax(x, splat(-126.0f)), splat(127.0f));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vi n = (vi)shifted - (vi)magic;
    vf p = splat(1.5252734e-5f);
    p = p * f + splat(1.5403530e-4f);
    p = p * f + splat(1.3333558e-3f);
    p = p * f + splat(9.6181291e-3f);
    p = p * f + splat(5.5504109e-2f);
    p = p * f + splat(2.4022651e-1f);
    p = p * f + splat(6.9314718e-1f);
    p = p * f + splat(1.0f);
    return (vf)((vi)p + (n << 23));
}

constexpr float LOG2E = 1.4426950408889634f;

// Calls body with a null pointer of the storage type that a dtype code (see cpu_kernels.py) stands for.
template <class F>
static inline void dispatch(int dtype, F body) {
    if (dtype == 0) body((float*)nullptr);
    else if (dtype == 1) body((bf16*)nullptr);
    else body((fp16*)nullptr);
}

}  // namespace ridgewalk
