// The small operations of a decoder layer, each fused into one pass over its rows.
#include <cmath>
#include <vector>

#include "thread_pool.h"
#include "vector.h"

using namespace ridgewalk;

namespace {

template <class T>
float square_sum(const T* x, int n) {
    vf total0 = {}, total1 = {};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        vf a = load(x + i), b = load(x + i + LANES);
        total0 += a * a;
        total1 += b * b;
    }
    float s = 0;
    for (; i < n; i++) s += to_float(x[i]) * to_float(x[i]);
    return sum(total0 + total1) + s;
}

// out = weight * round(x * factor): rounding first is what transformers does
template <class T>
void scale_row(T* out, const T* x, const T* weight, float factor, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        T rounded[LANES];
        store(rounded, load(x + i) * factor);
        store(out + i, load(rounded) * load(weight + i));
    }
    for (; i < n; i++) {
        T rounded;
        from_float(&rounded, to_float(x[i]) * factor);
        from_float(out + i, to_float(rounded) * to_float(weight[i]));
    }
}

template <class T>
void norm_row(T* out, const T* x, const T* weight, float eps, int n) {
    scale_row(out, x, weight, 1.0f / std::sqrt(square_sum(x, n) / n + eps), n);
}

template <class T>
void rms_norm(T* out, const T* x, T* residual, const T* weight, float eps, int64_t rows, int n, ThreadPool& pool) {
    for_rows(pool, rows, n, [&](int64_t r) {
        const T* row = x + r * n;
        if (residual) {
            T* sums = residual + r * n;
            int i = 0;
            for (; i + LANES <= n; i += LANES) store(sums + i, load(sums + i) + load(row + i));
            for (; i < n; i++) from_float(sums + i, to_float(sums[i]) + to_float(row[i]));
            row = sums;
        }
        norm_row(out + r * n, row, weight, eps, n);
    });
}

template <class T>
void silu_and_mul(T* out, const T* gate_up, int64_t rows, int n, ThreadPool& pool) {
    for_rows(pool, rows, n, [&](int64_t r) {
        const T* gate = gate_up + r * 2 * n;
        const T* up = gate + n;
        T* to = out + r * n;
        int i = 0;
        for (; i + LANES <= n; i += LANES) {
            vf g = load(gate + i);
            store(to + i, g / (1.0f + exp2_vector(g * -LOG2E)) * load(up + i));
        }
        for (; i < n; i++) {
            float g = to_float(gate[i]);
            from_float(to + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    });
}

// First half of a head against the second: the layout of Hugging Face checkpoints.
template <class T>
void rotate_head(T* out, const T* x, const float* cos_sin, int half) {
    const float *cos = cos_sin, *sin = cos_sin + half;
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = to_float(x[i]), b = to_float(x[half + i]);
        from_float(out + i, a * cos[i] - b * sin[i]);
        from_float(out + half + i, b * cos[i] + a * sin[i]);
    }
}

struct Rotation {
    int num_heads, num_kv_heads, head_dim;
    float eps;
    const int64_t *positions, *slots;
    const float* cos_sin;
};

template <class T>
void rotate_and_cache(
    T* query, T* qkv, const T* q_norm, const T* k_norm, T* key_cache, T* value_cache, const Rotation& r,
    int64_t tokens, ThreadPool& pool
) {
    const int d = r.head_dim, half = d / 2;
    const int64_t q_size = (int64_t)r.num_heads * d, kv_size = (int64_t)r.num_kv_heads * d;
    for_rows(pool, tokens, q_size + kv_size, [&](int64_t t) {
        T* row = qkv + t * (q_size + 2 * kv_size);
        const float* cos_sin = r.cos_sin + r.positions[t] * d;
        for (int h = 0; h < r.num_heads; h++) {
            T* head = row + h * d;
            if (q_norm) norm_row(head, head, q_norm, r.eps, d);
            rotate_head(query + t * q_size + h * d, head, cos_sin, half);
        }
        T* keys = key_cache + r.slots[t] * kv_size;
        for (int h = 0; h < r.num_kv_heads; h++) {
            T* head = row + q_size + h * d;
            if (k_norm) norm_row(head, head, k_norm, r.eps, d);
            rotate_head(keys + h * d, head, cos_sin, half);
        }
        memcpy(value_cache + r.slots[t] * kv_size, row + q_size + kv_size, kv_size * sizeof(T));
    });
}

template <class T>
void arg_max(int64_t* index, float* best, const T* x, int64_t rows, int64_t n, ThreadPool& pool) {
    for_rows(pool, rows, n, [&](int64_t r) {
        const T* row = x + r * n;
        vf top = splat(-INFINITY);
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) top = vmax(load(row + i), top);
        float m = max(top);
        for (; i < n; i++) m = to_float(row[i]) > m ? to_float(row[i]) : m;
        int64_t at = 0;  // also the answer when nothing compares equal: a row of NaN
        for (i = 0; i < n; i++)
            if (to_float(row[i]) == m) {
                at = i;
                break;
            }
        index[r] = at;
        best[r] = m;
    });
}

}  // namespace

extern "C" {

void rw_rms_norm(
    void* out, const void* x, void* residual, const void* weight, float eps, int64_t rows, int n, int dtype,
    void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rms_norm((T*)out, (const T*)x, (T*)residual, (const T*)weight, eps, rows, n, *(ThreadPool*)pool);
    });
}

void rw_silu_and_mul(void* out, const void* gate_up, int64_t rows, int n, int dtype, void* pool) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        silu_and_mul((T*)out, (const T*)gate_up, rows, n, *(ThreadPool*)pool);
    });
}

void rw_rotate_and_cache(
    void* query, void* qkv, const void* q_norm, const void* k_norm, float eps, const int64_t* positions,
    const float* cos_sin, void* key_cache, void* value_cache, const int64_t* slots, int64_t tokens, int num_heads,
    int num_kv_heads, int head_dim, int dtype, void* pool
) {
    Rotation r{num_heads, num_kv_heads, head_dim, eps, positions, slots, cos_sin};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rotate_and_cache(
            (T*)query, (T*)qkv, (const T*)q_norm, (const T*)k_norm, (T*)key_cache, (T*)value_cache, r, tokens,
            *(ThreadPool*)pool
        );
    });
}

void rw_arg_max(int64_t* index, float* best, const void* x, int64_t rows, int64_t n, int dtype, void* pool) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        arg_max(index, best, (const T*)x, rows, n, *(ThreadPool*)pool);
    });
}

}
