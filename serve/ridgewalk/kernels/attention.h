// What decode and prefill share: causal attention over a paged KV cache with an online softmax (arXiv 1805.02867),
// accumulated in FP32.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace ridgewalk {

constexpr int TILE = 64;          // keys scored before the softmax is rescaled
constexpr float LOWEST = -1e30f;  // below any score; finite, so that differences of two stay numbers

struct Shape {
    int num_heads, num_kv_heads, head_dim, block_size;
    int64_t table_stride;
    float scale;  // of scores, times log2(e)
    int group() const { return num_heads / num_kv_heads; }
    int64_t row() const { return (int64_t)num_kv_heads * head_dim; }  // elements of one token in a cache
};

// Walks the tokens of a sequence through its pages without a division for each.
struct Walk {
    const int32_t* table;
    int64_t page, row;
    int block_size, block, offset;

    Walk(const int32_t* table, int position, const Shape& s)
        : table(table), page(s.row() * s.block_size), row(s.row()), block_size(s.block_size),
          block(position / s.block_size), offset(position % s.block_size) {}
    int64_t next() {  // index of the token's first element in a cache
        int64_t at = table[block] * page + offset * row;
        if (++offset == block_size) offset = 0, block++;
        return at;
    }
};

// Turn one row of `count` scores (padded to a multiple of LANES) into weights; returns the factor for older sums.
static inline float soften(float* scores, int count, float& top, float& total) {
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int t = count; t < padded; t++) scores[t] = LOWEST;
    vf best = splat(top);
    for (int t = 0; t < padded; t += LANES) best = vmax(best, load(scores + t));
    float now = max(best);
    vf added = {};
    for (int t = 0; t < padded; t += LANES) {
        vf s = load(scores + t);
        vf w = exp2_vector(s - now);
        w = s > LOWEST ? w : vf{};
        store(scores + t, w);
        added += w;
    }
    float factor = exp2_vector(splat(std::max(top - now, -126.0f)))[0];
    total = total * factor + sum(added);
    top = now;
    return factor;
}

template <class T>
static inline void write_head(T* out, const float* acc, float total, int d) {
    const float factor = 1.0f / total;
    for (int i = 0; i < d; i += LANES) store(out + i, load(acc + i) * factor);
}

// A batch of sequences. Caches are [num_blocks, block_size, num_kv_heads, head_dim], queries and outputs
// [tokens, num_heads, head_dim].
template <class T>
struct Batch {
    T* out;
    const T *query, *keys, *values;
    const int32_t *cu_q;   // [num_seqs + 1], where the queries of each sequence begin
    const int32_t *used;   // keys of each sequence
    const int32_t *table;  // [num_seqs][table_stride]
    int64_t num_seqs;
};

}  // namespace ridgewalk
