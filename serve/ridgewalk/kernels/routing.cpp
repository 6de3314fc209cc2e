// What surrounds the experts of a sparse layer: choosing them, putting rows in their order, adding up their results.
#include <algorithm>
#include <cmath>
#include <vector>

#include "thread_pool.h"
#include "vector.h"

using namespace ridgewalk;

namespace {

struct Rules {
    int top_k, groups, topk_groups;
    bool sigmoid, top2, normalize;
    float scale;
};

// The first of the greatest. `n` is a multiple of LANES.
int first_greatest(const float* x, int n) {
    vf top = load(x);
    for (int i = LANES; i < n; i += LANES) top = vmax(load(x + i), top);
    const float best = max(top);
    for (int i = 0; i < n; i++)
        if (x[i] == best) return i;
    return 0;  // a row of NaN
}

// Scores of one row of logits, padded with -inf to whole vectors.
template <class T>
void score(float* scores, const T* logits, int n, int padded, bool sigmoid) {
    for (int i = 0; i < n; i++) scores[i] = to_float(logits[i]);
    std::fill(scores + n, scores + padded, -INFINITY);
    if (sigmoid) {
        for (int i = 0; i < padded; i += LANES)
            store(scores + i, 1.0f / (1.0f + exp2_vector(load(scores + i) * -LOG2E)));
    } else {
        vf top = load(scores), total = {};
        for (int i = LANES; i < padded; i += LANES) top = vmax(load(scores + i), top);
        const float best = max(top);
        for (int i = 0; i < padded; i += LANES) store(scores + i, exp2_vector((load(scores + i) - best) * LOG2E));
        std::fill(scores + n, scores + padded, 0.0f);
        for (int i = 0; i < padded; i += LANES) total += load(scores + i);
        const float sums = sum(total);
        for (int i = 0; i < padded; i += LANES) store(scores + i, load(scores + i) / sums);
    }
    std::fill(scores + n, scores + padded, -INFINITY);
}

// Give experts of all but the best groups the score `value`.
void limit_groups(float* by, int n, const Rules& rules, float value, std::vector<float>& group_scores) {
    const int size = n / rules.groups, padded = (rules.groups + LANES - 1) / LANES * LANES;
    group_scores.assign(padded, -INFINITY);
    for (int g = 0; g < rules.groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (by[i] > best) second = best, best = by[i];
            else if (by[i] > second) second = by[i];
        }
        group_scores[g] = rules.top2 && size > 1 ? best + second : best;
    }
    std::vector<char> allowed(rules.groups, 0);
    for (int i = 0; i < rules.topk_groups; i++) {
        const int g = first_greatest(group_scores.data(), padded);
        allowed[g] = 1;
        group_scores[g] = -INFINITY;
    }
    for (int g = 0; g < rules.groups; g++)
        if (!allowed[g]) std::fill(by + g * size, by + (g + 1) * size, value);
}

template <class T>
void route(
    float* weights, int64_t* experts, const T* logits, const float* bias, int64_t rows, int n, const Rules& rules,
    ThreadPool& pool
) {
    const int padded = (n + LANES - 1) / LANES * LANES;
    for_rows(pool, rows, (int64_t)padded * (rules.top_k + 4), [&](int64_t row) {
        thread_local std::vector<float> scores, by, group_scores;
        scores.resize(padded);
        score(scores.data(), logits + row * n, n, padded, rules.sigmoid);
        by = scores;
        if (bias)
            for (int i = 0; i < n; i++) by[i] += bias[i];
        if (rules.topk_groups < rules.groups)
            limit_groups(by.data(), n, rules, rules.top2 ? -INFINITY : 0.0f, group_scores);
        const float* from = bias || rules.top2 ? scores.data() : by.data();
        float *to = weights + row * rules.top_k, total = 0;
        for (int k = 0; k < rules.top_k; k++) {
            const int best = first_greatest(by.data(), padded);
            experts[row * rules.top_k + k] = best;
            total += to[k] = from[best];
            by[best] = -INFINITY;
        }
        const float factor = rules.scale / (rules.normalize ? total + 1e-20f : 1.0f);
        for (int k = 0; k < rules.top_k; k++) to[k] *= factor;
    });
}

template <class T>
void weighted_sum(
    T* out, const T* rows, const float* weights, const int64_t* position, int64_t tokens, int k, int64_t n,
    ThreadPool& pool
) {
    for_rows(pool, tokens, n * k, [&](int64_t t) {
        auto row = [&](int j) { return rows + (position ? position[t * k + j] : t * k + j) * n; };
        const float* factors = weights + t * k;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            vf total = {};
            for (int j = 0; j < k; j++) total += load(row(j) + i) * factors[j];
            store(out + t * n + i, total);
        }
        for (; i < n; i++) {
            float total = 0;
            for (int j = 0; j < k; j++) total += to_float(row(j)[i]) * factors[j];
            from_float(out + t * n + i, total);
        }
    });
}

// A stable counting sort of rows by group_of(row): starts is [groups + 1].
template <class F>
void group_rows(int64_t* order, int64_t* position, int64_t* starts, int64_t rows, int64_t groups, const F& group_of) {
    std::fill(starts, starts + groups + 1, 0);
    for (int64_t i = 0; i < rows; i++) starts[group_of(i) + 1]++;
    for (int64_t g = 0; g < groups; g++) starts[g + 1] += starts[g];
    std::vector<int64_t> next(starts, starts + groups);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = next[group_of(i)]++;
        order[at] = i;
        position[i] = at;
    }
}

// The slot that travels with a row: an integer of an element's size, after it.
template <class T>
using TagOf = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;

template <class T>
void tag_rows(
    T* out, const T* x, const int64_t* order, const int64_t* tags, int64_t rows, int64_t copies, int64_t n,
    ThreadPool& pool
) {
    for_rows(pool, rows, n, [&](int64_t r) {
        T* to = out + r * (n + 1);
        memcpy(to, x + order[r] / copies * n, n * sizeof(T));
        const TagOf<T> tag = tags[r];
        memcpy(to + n, &tag, sizeof tag);
    });
}

}  // namespace

extern "C" {

void rw_route(
    float* weights, int64_t* experts, const void* logits, const float* bias, int64_t rows, int n, int top_k, int groups,
    int topk_groups, int sigmoid, int top2, int normalize, float scale, int dtype, void* pool
) {
    const Rules rules{top_k, groups, topk_groups, sigmoid != 0, top2 != 0, normalize != 0, scale};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        route(weights, experts, (const T*)logits, bias, rows, n, rules, *(ThreadPool*)pool);
    });
}

void rw_group_rows(
    int64_t* order, int64_t* position, int64_t* starts, const int64_t* groups, int64_t rows, int64_t num_groups
) {
    group_rows(order, position, starts, rows, num_groups, [&](int64_t i) { return groups[i]; });
}

// Rows of `width` elements, the last of which is the tag.
void rw_group_tagged(
    int64_t* order, int64_t* position, int64_t* starts, const void* tagged, int64_t rows, int64_t width,
    int64_t num_groups, int dtype
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        group_rows(order, position, starts, rows, num_groups, [&](int64_t i) -> int64_t {
            return load_as<TagOf<T>>((const T*)tagged + (i + 1) * width - 1);
        });
    });
}

void rw_plan_send(
    int64_t* order, int64_t* position, int64_t* tags, int64_t* counts, const int64_t* experts, const int64_t* table,
    int64_t tokens, int64_t k, int64_t turns, int64_t turn, int64_t ranks, int64_t slots
) {
    const int64_t rows = tokens * k, places = ranks * slots;
    std::vector<int64_t> place(rows), starts(places + 1);
    for (int64_t i = 0; i < rows; i++) place[i] = table[experts[i] * turns + (i / k + turn) % turns];
    group_rows(order, position, starts.data(), rows, places, [&](int64_t i) { return place[i]; });
    for (int64_t i = 0; i < rows; i++) tags[i] = place[order[i]] % slots;
    for (int64_t r = 0; r < ranks; r++) counts[r] = starts[(r + 1) * slots] - starts[r * slots];
}

void rw_tag_rows(
    void* out, const void* x, const int64_t* order, const int64_t* tags, int64_t rows, int64_t copies, int64_t n,
    int dtype, void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        tag_rows((T*)out, (const T*)x, order, tags, rows, copies, n, *(ThreadPool*)pool);
    });
}

void rw_weighted_sum(
    void* out, const void* rows, const float* weights, const int64_t* position, int64_t tokens, int k, int64_t n,
    int dtype, void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        weighted_sum((T*)out, (const T*)rows, weights, position, tokens, k, n, *(ThreadPool*)pool);
    });
}

}
