// The products of latent attention on blocks of registers: scores of some rows by some keys, and values added up.
#pragma once

#include <type_traits>

#include "attention.h"
#include "reduce.h"

namespace ridgewalk {

// How a storage type is multiplied: BF16 in pairs where the CPU does that, else widened to FP32.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool PAIRS = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool PAIRS = false;
#endif
template <class T>
using RowOf = std::conditional_t<PAIRS<T>, bf16, float>;

#if defined(__AVX512BF16__)
static inline vf multiply_pairs(vf sums, const void* a, __m512i b) {
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(a), (__m512bh)b);
}
#endif

struct LatentShape {
    int num_heads, width, value_dim;
    Shape cache;  // as one KV head
};

// Fetches the next tile into the cache, line by line between the products: the hardware does not see past the end of a
// page, and many requests at once would stall.
struct Prefetch {
    const char* cache;
    Walk walk;
    int64_t element, lines;  // bytes of an element, lines of a latent
    int steps_of_row;        // calls of step that a row of queries makes in a tile, about
    const char* line = nullptr;
    int64_t left = 0;
    int rows = 0, steps = 0;

    template <class T>
    Prefetch(const T* cache, const LatentShape& s, const Walk& walk)
        : cache((const char*)cache), walk(walk), element(sizeof(T)), lines((s.width * sizeof(T) + 63) / 64) {
        const int lanes = PAIRS<T> ? 2 * LANES : LANES;
        steps_of_row = TILE / LANES * (s.width / lanes) + TILE / 8 * (s.value_dim / (2 * LANES)) * LANES / lanes;
    }

    // `count` latents from where `from` stands, spread over the products of a tile with `query_rows`.
    void start(const Walk& from, int count, int query_rows) {
        walk = from;
        rows = count;
        steps = 1 + count * lines / std::max(1, steps_of_row * query_rows);
        if (rows > 0) next_row();
    }
    void next_row() {
        line = cache + walk.next() * element;
        left = lines;
    }
    void step() {
        for (int i = 0; i < steps && rows > 0; i++) {
            __builtin_prefetch(line, 0, 2);
            line += 64;
            if (--left == 0 && --rows > 0) next_row();
        }
    }
};

// Scores of ROWS rows by LANES / ROWS keys.
template <class T, int ROWS>
void score_block(
    float* scores, const RowOf<T>* q, const T* const* keys, int width, float scale, Prefetch& prefetch
) {
    constexpr int KEYS = LANES / ROWS;
    vf sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = vf{};
    int i = 0;
#if defined(__AVX512BF16__)
    if constexpr (PAIRS<T>)
        for (; i + 2 * LANES <= width; i += 2 * LANES) {
            __m512i k[KEYS];
            for (int t = 0; t < KEYS; t++) k[t] = _mm512_loadu_si512(keys[t] + i);
            prefetch.step();
            for (int r = 0; r < ROWS; r++)
                for (int t = 0; t < KEYS; t++)
                    sums[r * KEYS + t] = multiply_pairs(sums[r * KEYS + t], q + (size_t)r * width + i, k[t]);
        }
#endif
    for (; i < width; i += LANES) {
        vf k[KEYS];
        for (int t = 0; t < KEYS; t++) k[t] = load(keys[t] + i);
        prefetch.step();
        for (int r = 0; r < ROWS; r++) {
            const vf x = load(q + (size_t)r * width + i);
            for (int t = 0; t < KEYS; t++) sums[r * KEYS + t] += x * k[t];
        }
    }
    const vf all = reduce(sums) * scale;
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * TILE, (const float*)&all + r * KEYS, KEYS * sizeof(float));
}

// acc[ROWS] += weights[ROWS][count] * values, in columns [column, column + 2 * LANES).
template <class T, int ROWS>
void add_columns(
    float* acc, const float* weights, const bf16* pairs, const T* const* values, int column, int count, int value_dim,
    Prefetch& prefetch
) {
    vf a[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) a[r][j] = load(acc + (size_t)r * value_dim + column + j * LANES);
    if constexpr (PAIRS<T>) {
#if defined(__AVX512BF16__)
        static const struct Interleave {
            uint16_t low[32], high[32];
            Interleave() {
                for (int i = 0; i < 32; i++) low[i] = i / 2 + i % 2 * 32, high[i] = low[i] + 16;
            }
        } order;
        const __m512i low = _mm512_loadu_si512(order.low), high = _mm512_loadu_si512(order.high);
        for (int t = 0; t < count; t += 2) {
            const __m512i x = _mm512_loadu_si512(values[t] + column);
            const __m512i y = _mm512_loadu_si512(values[t + 1 < count ? t + 1 : t] + column);
            const __m512bh both0 = (__m512bh)_mm512_permutex2var_epi16(x, low, y);
            const __m512bh both1 = (__m512bh)_mm512_permutex2var_epi16(x, high, y);
            prefetch.step();
            for (int r = 0; r < ROWS; r++) {
                int pair;
                memcpy(&pair, pairs + r * TILE + t, 4);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
                a[r][0] = (vf)_mm512_dpbf16_ps((__m512)a[r][0], weight, both0);
                a[r][1] = (vf)_mm512_dpbf16_ps((__m512)a[r][1], weight, both1);
            }
        }
#endif
    } else {
        for (int t = 0; t < count; t++) {
            const vf x = load(values[t] + column), y = load(values[t] + column + LANES);
            prefetch.step();
            for (int r = 0; r < ROWS; r++) {
                a[r][0] += weights[r * TILE + t] * x;
                a[r][1] += weights[r * TILE + t] * y;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) store(acc + (size_t)r * value_dim + column + j * LANES, a[r][j]);
}

}  // namespace ridgewalk
