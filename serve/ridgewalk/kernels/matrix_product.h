// Products with weights repacked once at load, summed in FP32.
//
// Weights lie in panels of two registers of outputs, read front to back. Few rows (decode) are bound by reading the
// weights once, many rows by multiplying. BF16 goes through vdpbf16ps where the CPU has it, two products a lane;
// everything else is widened to FP32.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <utility>

#include "thread_pool.h"
#include "unit_runs.h"
#include "vector.h"

namespace ridgewalk {

constexpr int PANEL = 2 * LANES;             // outputs of a panel
constexpr int MAX_ROWS = REGISTERS * 3 / 8;  // rows at once: with two sums each they fill 3/4 of the registers
constexpr int ROW_BLOCK = 240;               // rows that share a panel before the next is read; x of that size stays in L2

static inline int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

// How a storage type is packed and multiplied: DEPTH inputs of one output lie side by side, panels are
// [k / DEPTH][PANEL][DEPTH], and rows of x are of type Input.
template <class T>
struct Packing {
    static constexpr int DEPTH = 1;
    using Input = float;
    struct Weights {
        vf low, high;
    };
    static Weights read(const T* w) { return {load(w), load(w + LANES)}; }
    static void multiply(vf& low, vf& high, const float* x, const Weights& w) {
        low += *x * w.low;
        high += *x * w.high;
    }
};

#if defined(__AVX512BF16__)
template <>
struct Packing<bf16> {
    static constexpr int DEPTH = 2;
    using Input = bf16;
    struct Weights {
        __m512bh low, high;
    };
    static Weights read(const bf16* w) {
        return {(__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(w + 2 * LANES)};
    }
    static void multiply(vf& low, vf& high, const bf16* x, const Weights& w) {
        int pair;
        memcpy(&pair, x, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        low = (vf)_mm512_dpbf16_ps((__m512)low, both, w.low);
        high = (vf)_mm512_dpbf16_ps((__m512)high, both, w.high);
    }
};
#endif

// Rows of x one after the other.
template <class T>
struct EvenRows {
    const typename Packing<T>::Input* x;
    int64_t stride;
    auto operator()(int64_t row) const { return x + row * stride; }
};

// The two vectors of a panel's sums to the panel's place in a row of a matrix [..., n].
template <class T>
static inline void store_panel(T* row, int64_t panel, int64_t n, vf low, vf high) {
    T* to = row + panel * PANEL;
    if ((panel + 1) * PANEL <= n) {
        store(to, low);
        store(to + LANES, high);
    } else {
        T whole[PANEL];
        store(whole, low);
        store(whole + LANES, high);
        memcpy(to, whole, (n - panel * PANEL) * sizeof(T));
    }
}

// ROWS rows by a panel of weights. `next` is fetched meanwhile, `step` bytes for every DEPTH inputs. sink.start(j) is
// what the sums of vector j begin with, sink.finish(row, low, high) takes them.
template <class T, int ROWS, class Rows, class Sink>
void multiply_tile(
    const T* weight, int64_t k, const Rows& rows, int64_t first, const Sink& sink, const char* next, int step
) {
    using P = Packing<T>;
    vf sums[ROWS][2];
    const typename P::Input* x[ROWS];
    for (int j = 0; j < 2; j++) {
        const vf start = sink.start(j);
        for (int r = 0; r < ROWS; r++) sums[r][j] = start;
    }
    for (int r = 0; r < ROWS; r++) x[r] = rows(first + r);
    for (int64_t i = 0; i < k; i += P::DEPTH) {
        const auto w = P::read(weight);
        weight += PANEL * P::DEPTH;
        for (int r = 0; r < ROWS; r++) P::multiply(sums[r][0], sums[r][1], x[r] + i, w);
        __builtin_prefetch(next, 0, 2);
        if (step > 64) __builtin_prefetch(next + 64, 0, 2);
        next += step;
    }
    for (int r = 0; r < ROWS; r++) sink.finish(first + r, sums[r][0], sums[r][1]);
}

template <class T, class Rows, class Sink>
using Tile = void (*)(const T*, int64_t, const Rows&, int64_t, const Sink&, const char*, int);

template <class T, class R, class S>
struct Tiles {
    template <size_t... I>
    static constexpr std::array<Tile<T, R, S>, MAX_ROWS> make(std::index_sequence<I...>) {
        return {multiply_tile<T, I + 1, R, S>...};
    }
    static constexpr auto BY_ROWS = make(std::make_index_sequence<MAX_ROWS>());
};

// `count` rows by a panel, in tiles of nearly equal height, which fetch the panel at `next` between them.
template <class T, class Rows, class Sink>
void multiply_panel(
    const T* weight, int64_t k, const Rows& rows, int64_t first, int64_t count, const Sink& sink, const T* next
) {
    constexpr int line = PANEL * Packing<T>::DEPTH * sizeof(T);  // bytes of weights read at once
    const int64_t tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
    const int step = std::max<int64_t>(line / tiles, 4);
    const char* ahead = (const char*)next;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t from = first + count * t / tiles, to = first + count * (t + 1) / tiles;
        Tiles<T, Rows, Sink>::BY_ROWS[to - from - 1](weight, k, rows, from, sink, ahead, step);
        ahead += step * k / Packing<T>::DEPTH;
    }
}

// One panel of a packed [n][k] matrix, from row-major weights.
template <class T>
void pack_panel(T* to, const T* from, int64_t panel, int64_t n, int64_t k) {
    constexpr int depth = Packing<T>::DEPTH;
    for (int64_t i = 0; i < k; i += depth)
        for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++)
            for (int j = 0; j < depth; j++) *to++ = row < n ? from[row * k + i + j] : T{};
}

// Rows as the product wants them: x itself, or a widened copy of it.
template <class T>
struct InputRows {
    EvenRows<T> rows;
    std::unique_ptr<float[]> wide;

    InputRows(const T* x, int64_t count, int64_t stride, int64_t k, ThreadPool& pool) {
        if constexpr (std::is_same_v<typename Packing<T>::Input, T>) {
            rows = {x, stride};
        } else {
            wide.reset(new float[count * k]);
            for_rows(pool, count, k, [&](int64_t r) {
                for (int64_t i = 0; i < k; i++) wide[r * k + i] = to_float(x[r * stride + i]);
            });
            rows = {wide.get(), k};
        }
    }
};

}  // namespace ridgewalk
