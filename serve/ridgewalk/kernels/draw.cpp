// Draws one token a row: temperature, top-k, top-p, min-p and an inverse CDF, in time linear in the vocabulary.
//
// The kept set is found by a histogram of weights over the leading bits of their floats, and a sort of the one bucket
// in which the cut falls. Rules and order are those of torch_draw.py: equal weights in the order of their ids, the CDF
// in the order of the vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "thread_pool.h"
#include "vector.h"

using namespace ridgewalk;

namespace {

constexpr int SHIFT = 19;                              // sign, exponent and 4 bits of the fraction name a bucket
constexpr int BUCKETS = (0x3f800000 >> SHIFT) + 1;     // weights are at most 1
constexpr int BLOCK = 128;                             // weights summed in FP32 on the way to a sum in FP64

struct Rules {
    float temperature;
    int64_t top_k;
    double top_p, min_p, uniform;
};

// Tokens are kept up to here in the order of falling weight, then rising id.
struct Cut {
    float weight;
    int64_t id;
    bool keeps(float w, int64_t i) const { return w > weight || (w == weight && i <= id); }
};

struct Scratch {
    std::vector<float> weights;
    std::vector<double> mass;
    std::vector<int32_t> count;
    std::vector<std::pair<float, int64_t>> members;
};

int bucket_of(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    return bits >> SHIFT;
}

template <class T>
int64_t arg_max(const T* logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (to_float(logits[i]) > to_float(logits[best])) best = i;
    return best;
}

// Weights relative to the greatest; false where there is none (every logit -inf, or one is +inf or NaN).
template <class T>
bool weigh(Scratch& s, const T* logits, int64_t n, float temperature) {
    vf top = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) top = vmax(load(logits + i), top);
    float best = max(top);
    for (; i < n; i++) best = std::max(best, to_float(logits[i]));
    const int64_t padded = (n + BLOCK - 1) / BLOCK * BLOCK;
    s.weights.assign(padded, 0.0f);
    if (!(std::abs(best) < INFINITY)) return false;
    const float factor = LOG2E / std::max(temperature, 1e-30f);
    const vf least = splat(-120.0f);  // in powers of two: under it a weight is zero
    for (i = 0; i + LANES <= n; i += LANES) {
        vf x = (load(logits + i) - best) * factor;
        store(&s.weights[i], x > least ? exp2_vector(x) : vf{});
    }
    for (; i < n; i++) {
        const float x = (to_float(logits[i]) - best) * factor;
        s.weights[i] = x > -120.0f ? exp2_vector(splat(x))[0] : 0.0f;
    }
    return true;
}

// Walks falling weights within `within` until `most` tokens or a mass of `enough` are passed; the token that reaches
// either is kept. `passed` receives the mass that is kept.
Cut cut_at(Scratch& s, int64_t n, const Cut& within, int64_t most, double enough, double& passed) {
    int64_t tokens = 0;
    passed = 0;
    int b = BUCKETS - 1;
    for (; b > 0; b--) {
        if (tokens + s.count[b] >= most || passed + s.mass[b] >= enough) break;
        tokens += s.count[b];
        passed += s.mass[b];
    }
    s.members.clear();
    for (int64_t i = 0; i < n; i++)
        if (bucket_of(s.weights[i]) == b && s.weights[i] > 0 && within.keeps(s.weights[i], i))
            s.members.push_back({-s.weights[i], i});
    std::sort(s.members.begin(), s.members.end());
    Cut cut = within;
    for (const auto& [weight, id] : s.members) {
        cut = {-weight, id};
        tokens++;
        passed -= weight;
        if (tokens >= most || passed >= enough) return cut;
    }
    return within;  // rounding of sums: everything is kept
}

int64_t inverse_cdf(const std::vector<float>& weights, double uniform) {
    const int64_t blocks = weights.size() / BLOCK;
    auto block_sum = [&](int64_t b) {
        vf total = {};
        for (int i = 0; i < BLOCK; i += LANES) total += load(&weights[b * BLOCK + i]);
        return (double)sum(total);
    };
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) total += block_sum(b);
    const double target = uniform * total;
    double before = 0;
    int64_t last = 0;  // of positive weight
    for (int64_t b = 0; b < blocks; b++) {
        const double here = block_sum(b);
        if (before + here <= target && b + 1 < blocks) {
            before += here;
            continue;
        }
        for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i++) {
            if (weights[i] <= 0) continue;
            last = i;
            before += weights[i];
            if (before > target) return i;
        }
    }
    if (last == 0)
        for (int64_t i = weights.size() - 1; i > 0 && last == 0; i--)
            if (weights[i] > 0) last = i;
    return last;
}

template <class T>
int64_t draw(Scratch& s, const T* logits, int64_t n, const Rules& rules) {
    if (!weigh(s, logits, n, rules.temperature)) return arg_max(logits, n);
    const bool few = rules.top_k > 0 && rules.top_k < n;
    if (few || rules.top_p < 1.0 || rules.min_p > 0.0) {
        s.mass.assign(BUCKETS, 0.0);
        s.count.assign(BUCKETS, 0);
        for (int64_t i = 0; i < n; i++) {
            const int b = bucket_of(s.weights[i]);
            s.mass[b] += s.weights[i];
            s.count[b]++;
        }
        s.count[0] = 0;
        Cut cut{0.0f, n};
        double total = 0;
        if (few) cut = cut_at(s, n, cut, rules.top_k, INFINITY, total);
        else for (double mass : s.mass) total += mass;
        double kept;
        if (rules.top_p < 1.0) cut = cut_at(s, n, cut, n + 1, rules.top_p * total, kept);
        const float least = rules.min_p;
        for (int64_t i = 0; i < n; i++)
            if (!cut.keeps(s.weights[i], i) || s.weights[i] < least) s.weights[i] = 0.0f;
    }
    return inverse_cdf(s.weights, rules.uniform);
}

}  // namespace

// Logits [rows][stride], of which `n` are tokens; rules of every row; a temperature of 0 takes the greatest.
extern "C" void rw_draw(
    int64_t* tokens, const void* logits, const float* temperature, const int64_t* top_k, const double* top_p,
    const double* min_p, const double* uniform, int64_t rows, int64_t n, int64_t stride, int dtype, void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        ((ThreadPool*)pool)->run(rows, [&](int64_t r) {
            thread_local Scratch scratch;
            const T* row = (const T*)logits + r * stride;
            tokens[r] = temperature[r] > 0
                ? draw(scratch, row, n, {temperature[r], top_k[r], top_p[r], min_p[r], uniform[r]})
                : arg_max(row, n);
        });
    });
}
