// y = x W^T (+ bias), summed in FP32, for weights repacked once at load.
//
// Weights lie in panels of 32 outputs, read front to back. Few rows (decode) are bound by reading the weights once,
// many rows by multiplying. BF16 goes through vdpbf16ps where the CPU has it, two products a lane; everything else is
// widened to FP32. Where the CPU has AMX, oneDNN uses it and is faster at many rows: BF16 is left to it there.
#include <algorithm>
#include <vector>

#include "thread_pool.h"
#include "vector.h"

using namespace ridgewalk;

namespace {

constexpr int PANEL = 32;       // outputs of a panel: two vectors
constexpr int MAX_ROWS = 12;    // rows at once: 24 sums stay in registers
constexpr int ROW_BLOCK = 240;  // rows that share a panel before the next is read; x of that size stays in L2

#if defined(__AMX_BF16__)
constexpr bool LEAVE_BF16 = true;
#else
constexpr bool LEAVE_BF16 = false;
#endif

int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

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

template <class T>
struct Product {
    T* out;
    const typename Packing<T>::Input* x;
    const T *weight, *bias;
    int64_t n, k;  // outputs, inputs
};

// One tile of ROWS rows and a panel. `next` is fetched meanwhile, `step` bytes for every DEPTH inputs.
template <class T, int ROWS>
void tile(const Product<T>& p, int64_t row, int64_t panel, const char* next, int step) {
    using P = Packing<T>;
    vf sums[ROWS][2];
    const int64_t first = panel * PANEL;
    for (int j = 0; j < 2; j++) {
        vf start = {};
        if (p.bias)
            for (int i = 0; i < LANES; i++)
                if (first + j * LANES + i < p.n) start[i] = to_float(p.bias[first + j * LANES + i]);
        for (int r = 0; r < ROWS; r++) sums[r][j] = start;
    }
    const T* weight = p.weight + panel * PANEL * p.k;
    const typename P::Input* x = p.x + row * p.k;
    for (int64_t i = 0; i < p.k; i += P::DEPTH) {
        const auto w = P::read(weight);
        weight += PANEL * P::DEPTH;
        for (int r = 0; r < ROWS; r++) P::multiply(sums[r][0], sums[r][1], x + r * p.k + i, w);
        __builtin_prefetch(next, 0, 2);
        if (step > 64) __builtin_prefetch(next + 64, 0, 2);
        next += step;
    }
    for (int r = 0; r < ROWS; r++) {
        T* to = p.out + (row + r) * p.n + first;
        if (first + PANEL <= p.n) {
            store(to, sums[r][0]);
            store(to + LANES, sums[r][1]);
        } else {
            T whole[PANEL];
            store(whole, sums[r][0]);
            store(whole + LANES, sums[r][1]);
            memcpy(to, whole, (p.n - first) * sizeof(T));
        }
    }
}

template <class T>
using Tile = void (*)(const Product<T>&, int64_t, int64_t, const char*, int);

template <class T>
constexpr Tile<T> TILES[MAX_ROWS + 1] = {
    nullptr,    tile<T, 1>, tile<T, 2>, tile<T, 3>,  tile<T, 4>,  tile<T, 5>, tile<T, 6>,
    tile<T, 7>, tile<T, 8>, tile<T, 9>, tile<T, 10>, tile<T, 11>, tile<T, 12>,
};

template <class T>
void multiply(const Product<T>& p, int64_t rows, ThreadPool& pool) {
    constexpr int line = PANEL * Packing<T>::DEPTH * sizeof(T);  // bytes of weights read at once
    const int64_t panels = panels_of(p.n), blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, all = blocks * panels;
    const int64_t chunk = std::max<int64_t>(1, all / (pool.threads() * 8));
    pool.run((all + chunk - 1) / chunk, [&](int64_t piece) {
        for (int64_t work = piece * chunk; work < std::min(all, (piece + 1) * chunk); work++) {
            const int64_t panel = work % panels, begin = work / panels * ROW_BLOCK;
            const int64_t count = std::min<int64_t>(ROW_BLOCK, rows - begin);
            // Tiles of nearly equal height; while a panel is multiplied its tiles fetch the next one between them.
            const int64_t tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
            const int step = std::max<int64_t>(line / tiles, 4);
            const char* next = (const char*)(p.weight + (panel + 1 < panels ? panel + 1 : panel) * PANEL * p.k);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t from = begin + count * t / tiles, to = begin + count * (t + 1) / tiles;
                TILES<T>[to - from](p, from, panel, next, step);
                next += step * p.k / Packing<T>::DEPTH;
            }
        }
    });
}

template <class T>
void linear(T* out, const T* x, const T* packed, const T* bias, int64_t rows, int64_t n, int64_t k, ThreadPool& pool) {
    using Input = typename Packing<T>::Input;
    if constexpr (std::is_same_v<Input, T>) {
        multiply<T>({out, x, packed, bias, n, k}, rows, pool);
    } else {
        std::vector<float> wide(rows * k);
        for_rows(pool, rows, k, [&](int64_t r) {
            for (int64_t i = 0; i < k; i++) wide[r * k + i] = to_float(x[r * k + i]);
        });
        multiply<T>({out, wide.data(), packed, bias, n, k}, rows, pool);
    }
}

template <class T>
void pack(T* to, const T* from, int64_t n, int64_t k, ThreadPool& pool) {
    constexpr int depth = Packing<T>::DEPTH;
    for_rows(pool, panels_of(n), PANEL * k, [&](int64_t panel) {
        T* at = to + panel * PANEL * k;
        for (int64_t i = 0; i < k; i += depth)
            for (int64_t row = panel * PANEL; row < (panel + 1) * PANEL; row++)
                for (int j = 0; j < depth; j++) *at++ = row < n ? from[row * k + i + j] : T{};
    });
}

template <class T>
void unpack_rows(T* out, const T* packed, const int64_t* rows, int64_t count, int64_t k, ThreadPool& pool) {
    constexpr int depth = Packing<T>::DEPTH;
    for_rows(pool, count, 8 * k, [&](int64_t r) {  // each element or pair is on a line of its own
        const T* from = packed + rows[r] / PANEL * PANEL * k + rows[r] % PANEL * depth;
        for (int64_t i = 0; i < k; i += depth, from += PANEL * depth) memcpy(out + r * k + i, from, depth * sizeof(T));
    });
}

}  // namespace

extern "C" {

// Elements of a packed [n][k] matrix; 0 where it is left to oneDNN.
int64_t rw_packed_size(int64_t n, int64_t k, int dtype) {
    int64_t size = panels_of(n) * PANEL * k;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (k % Packing<T>::DEPTH || (std::is_same_v<T, bf16> && LEAVE_BF16)) size = 0;
    });
    return size;
}

void rw_pack(void* packed, const void* weight, int64_t n, int64_t k, int dtype, void* pool) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pack((T*)packed, (const T*)weight, n, k, *(ThreadPool*)pool);
    });
}

// Rows of a packed matrix: an embedding that shares its memory with the head.
void rw_unpack_rows(
    void* out, const void* packed, const int64_t* rows, int64_t count, int64_t k, int dtype, void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        unpack_rows((T*)out, (const T*)packed, rows, count, k, *(ThreadPool*)pool);
    });
}

void rw_linear(
    void* out, const void* x, const void* packed, const void* bias, int64_t rows, int64_t n, int64_t k, int dtype,
    void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        linear((T*)out, (const T*)x, (const T*)packed, (const T*)bias, rows, n, k, *(ThreadPool*)pool);
    });
}

}
