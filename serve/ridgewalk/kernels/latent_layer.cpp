// What surrounds latent attention: products with a matrix a head, the latent's norm, the rotation of queries and key.
#include <cmath>

#include "matrix_product.h"

using namespace ridgewalk;

namespace {

struct HeadShape {
    int64_t tokens, heads, outputs, inputs;
    int64_t matrix() const { return panels_of(outputs) * PANEL * inputs; }
};

template <class T>
struct HeadOutput {
    T* out;  // of the head's first row
    int64_t stride, panel, n;
    vf start(int) const { return vf{}; }
    void finish(int64_t row, vf low, vf high) const { store_panel(out + row * stride, panel, n, low, high); }
};

template <class T>
void head_linear(
    T* out, const T* x, int64_t token_stride, int64_t head_stride, const T* packed, const HeadShape& s, ThreadPool& pool
) {
    using Input = typename Packing<T>::Input;
    const Input* rows;
    std::unique_ptr<float[]> wide;
    if constexpr (std::is_same_v<Input, T>) {
        rows = x;
    } else {
        wide.reset(new float[s.tokens * s.heads * s.inputs]);
        for_rows(pool, s.tokens * s.heads, s.inputs, [&](int64_t r) {
            const T* from = x + r / s.heads * token_stride + r % s.heads * head_stride;
            for (int64_t i = 0; i < s.inputs; i++) wide[r * s.inputs + i] = to_float(from[i]);
        });
        rows = wide.get();
        token_stride = s.heads * s.inputs;
        head_stride = s.inputs;
    }
    const int64_t panels = panels_of(s.outputs), all = s.heads * panels;
    const int64_t blocks = (s.tokens + ROW_BLOCK - 1) / ROW_BLOCK;
    auto weight_of = [&](int64_t unit) { return packed + unit % all * PANEL * s.inputs; };  // panels, head by head
    for_units(pool, blocks * all, [&](int64_t unit, int64_t next) {
        const int64_t at = unit % all, head = at / panels, panel = at % panels, first = unit / all * ROW_BLOCK;
        const EvenRows<T> inputs{rows + head * head_stride, token_stride};
        const HeadOutput<T> sink{out + head * s.outputs, s.heads * s.outputs, panel, s.outputs};
        const int64_t count = std::min<int64_t>(ROW_BLOCK, s.tokens - first);
        multiply_panel(weight_of(unit), s.inputs, inputs, first, count, sink, weight_of(next));
    });
}

struct Rotation {
    int64_t heads, token_stride, head_stride;  // of the queries
    int latent, rope;
    bool interleaved;
    float eps;
    const int64_t *positions, *slots;
    const float* cos_sin;
};

template <class T>
void rotate(T* out, const T* x, const float* cos_sin, int rope, bool interleaved) {
    const int half = rope / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    const float *cos = cos_sin, *sin = cos_sin + half;
    for (int i = 0; i < half; i++) {
        const float a = to_float(x[i * step]), b = to_float(x[i * step + apart]);
        from_float(out + i, a * cos[i] - b * sin[i]);
        from_float(out + half + i, b * cos[i] + a * sin[i]);
    }
}

template <class T>
void normalise(T* out, const T* x, const T* weight, float eps, int n) {
    vf squares = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += to_float(x[i]) * to_float(x[i]);
    const float factor = 1.0f / std::sqrt(total / n + eps);
    for (i = 0; i < n; i++) {
        T rounded;  // before the weight is applied, as transformers does
        from_float(&rounded, to_float(x[i]) * factor);
        from_float(out + i, to_float(rounded) * to_float(weight[i]));
    }
}

template <class T>
void rotate_and_cache(
    T* query, const T* q, const T* kv, const T* weight, T* cache, const Rotation& r, int64_t tokens, ThreadPool& pool
) {
    const int64_t width = r.latent + r.rope;
    for_rows(pool, tokens, width + 4 * r.heads * r.rope, [&](int64_t t) {
        const float* cos_sin = r.cos_sin + r.positions[t] * r.rope;
        T* to = cache + r.slots[t] * width;
        normalise(to, kv + t * width, weight, r.eps, r.latent);
        rotate(to + r.latent, kv + t * width + r.latent, cos_sin, r.rope, r.interleaved);
        for (int64_t h = 0; h < r.heads; h++) {
            const T* from = q + t * r.token_stride + h * r.head_stride;
            rotate(query + (t * r.heads + h) * r.rope, from, cos_sin, r.rope, r.interleaved);
        }
    });
}

}  // namespace

extern "C" {

// Elements of the packed matrix of one head; 0 where it cannot be packed.
int64_t rw_head_matrix_size(int64_t outputs, int64_t inputs, int dtype) {
    int64_t size = 0;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (inputs % Packing<T>::DEPTH == 0) size = HeadShape{1, 1, outputs, inputs}.matrix();
    });
    return size;
}

void rw_pack_heads(
    void* packed, const void* weight, int64_t heads, int64_t outputs, int64_t inputs, int dtype, void* pool
) {
    const int64_t panels = panels_of(outputs);
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_rows(*(ThreadPool*)pool, heads * panels, PANEL * inputs, [&](int64_t i) {
            const T* from = (const T*)weight + i / panels * outputs * inputs;
            pack_panel((T*)packed + i * PANEL * inputs, from, i % panels, outputs, inputs);
        });
    });
}

void rw_head_linear(
    void* out, const void* x, int64_t token_stride, int64_t head_stride, const void* packed, int64_t tokens,
    int64_t heads, int64_t outputs, int64_t inputs, int dtype, void* pool
) {
    const HeadShape s{tokens, heads, outputs, inputs};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        head_linear((T*)out, (const T*)x, token_stride, head_stride, (const T*)packed, s, *(ThreadPool*)pool);
    });
}

void rw_latent_rotate_and_cache(
    void* query, const void* q, int64_t token_stride, int64_t head_stride, const void* kv, const void* norm, float eps,
    const int64_t* positions, const float* cos_sin, void* cache, const int64_t* slots, int64_t tokens, int64_t heads,
    int latent, int rope, int interleaved, int dtype, void* pool
) {
    const Rotation r{heads, token_stride, head_stride, latent, rope, interleaved != 0, eps, positions, slots, cos_sin};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rotate_and_cache(
            (T*)query, (const T*)q, (const T*)kv, (const T*)norm, (T*)cache, r, tokens, *(ThreadPool*)pool
        );
    });
}

}
