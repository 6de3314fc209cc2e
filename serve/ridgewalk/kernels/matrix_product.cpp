// y = x W^T (+ bias) for weights repacked once at load. Where the CPU has AMX, oneDNN uses it and is faster at many
// rows: BF16 is left to it there.
#include "matrix_product.h"

using namespace ridgewalk;

namespace {

#if defined(__AMX_BF16__)
constexpr bool LEAVE_BF16 = true;
#else
constexpr bool LEAVE_BF16 = false;
#endif

template <class T>
struct Output {
    T* out;
    const T* bias;
    int64_t n, panel;

    vf start(int j) const {
        vf v = {};
        const int64_t first = panel * PANEL + j * LANES;
        if (bias)
            for (int i = 0; i < LANES; i++)
                if (first + i < n) v[i] = to_float(bias[first + i]);
        return v;
    }
    void finish(int64_t row, vf low, vf high) const { store_panel(out + row * n, panel, n, low, high); }
};

template <class T>
void linear(T* out, const T* x, const T* packed, const T* bias, int64_t rows, int64_t n, int64_t k, ThreadPool& pool) {
    const InputRows<T> inputs(x, rows, k, k, pool);
    const int64_t panels = panels_of(n), blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    auto weight_of = [&](int64_t unit) { return packed + unit % panels * PANEL * k; };
    for_units(pool, blocks * panels, [&](int64_t unit, int64_t next) {
        const int64_t first = unit / panels * ROW_BLOCK, count = std::min<int64_t>(ROW_BLOCK, rows - first);
        const Output<T> sink{out, bias, n, unit % panels};
        multiply_panel(weight_of(unit), k, inputs.rows, first, count, sink, weight_of(next));
    });
}

template <class T>
void pack(T* to, const T* from, int64_t n, int64_t k, ThreadPool& pool) {
    for_rows(pool, panels_of(n), PANEL * k, [&](int64_t panel) {
        pack_panel(to + panel * PANEL * k, from, panel, n, k);
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
