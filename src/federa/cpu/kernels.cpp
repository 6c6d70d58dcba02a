// The elementwise passes and the attention of a transformer encoder, fused, for one training step on a CPU.
//
// Plain C functions on raw pointers: rows are contiguous, `threads` splits rows or heads, and no result depends
// on it. bf16 is read and written, float32 is computed in. Dropout is a hash of (seed, index of the element),
// so the backward pass draws the same mask again instead of storing it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
// clang has no __builtin_shuffle; every processor with tiles has the other two.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__clang__)
#define WITH_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// ---- sixteen lanes at a time; the compiler splits them where the processor has fewer ----

struct bf16 {
    uint16_t bits;
};
constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Floats load(const float *from, int64_t count = LANES) {
    Floats x = {};
    std::memcpy(&x, from, count * 4);
    return x;
}
inline Words widened(Halves x) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}
inline Floats load(const bf16 *from, int64_t count = LANES) {
    Halves bits = {};
    std::memcpy(&bits, from, count * 2);
    return (Floats)(widened(bits) << 16);
}

// One truth value a lane.
#ifdef __AVX512BW__
typedef __mmask16 Lanes;
inline Lanes as_lanes(Ints truth) { return _mm512_test_epi32_mask((__m512i)truth, (__m512i)truth); }
inline Floats only(Lanes lanes, Floats x) { return (Floats)_mm512_maskz_mov_ps(lanes, (__m512)x); }
#else
typedef Ints Lanes;
inline Lanes as_lanes(Ints truth) { return truth; }
inline Floats only(Lanes lanes, Floats x) { return lanes != 0 ? x : Floats{}; }
#endif

inline void store(float *to, Floats x, int64_t count = LANES) { std::memcpy(to, &x, count * 4); }
inline void store(bf16 *to, Floats x, int64_t count = LANES) {  // to nearest, ties to even
#ifdef __AVX512BF16__
    auto bits = _mm512_cvtneps_pbh((__m512)x);
#else
    Words wide = (Words)x;
    wide += 0x7fff + ((wide >> 16) & 1);
    Halves bits = __builtin_convertvector(wide >> 16, Halves);
#endif
    std::memcpy(to, &bits, count * 2);
}

// Call body(i, count) for whole vectors, then for what is left of a row.
template <class Body> inline void sweep(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<int64_t, LANES>{});
    if (i < size) body(i, size - i);
}

// Halve until one lane is left; the order is fixed.
template <class Join> inline float fold(Floats x, Join join) {
    float lane[LANES];
    std::memcpy(lane, &x, sizeof lane);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) lane[i] = join(lane[i], lane[i + half]);
    }
    return lane[0];
}
inline float sum_of(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    return fold(x, [](float a, float b) { return a + b; });
#endif
}
inline float max_of(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    return fold(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// exp to 4e-7 relative: Taylor to degree 6 on [-ln2 / 2, ln2 / 2]; where bf16 is enough, to 5e-5 by degree 4. Below
// -80 it is zero, not a number so small that the processor slows down on it. x <= 88; NaN stays NaN.
template <int degree = 6> inline Floats exponential(Floats x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Floats shifted = x * 1.44269504f + round, n = shifted - round;
    Floats r = x - n * 0.69314718f;
    Floats p = Floats{} + 1.0f / 24;
    if (degree == 6) p = (r * (1.0f / 720) + 1.0f / 120) * r + p;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p *= (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
    return x < -80.0f ? Floats{} : p;
}

// log of normal numbers, to 1e-7 of 1 or relative: the series of atanh, whose argument is at most 0.172.
inline Floats logarithm(Floats x) {
    Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;  // so that what is left is between sqrt(1/2) and sqrt(2)
    Floats m = (Floats)((Ints)x - (exponent << 23)), z = (m - 1.0f) / (m + 1.0f), square = z * z;
    Floats series = ((square * (1.0f / 9) + 1.0f / 7) * square + 0.2f) * square + 1.0f / 3;
    Floats found = __builtin_convertvector(exponent, Floats) * 0.69314718f + 2.0f * (z + z * square * series);
    return x < INFINITY ? found : x;  // which is not so of what is not a number
}

// Which elements are dropped: a function of the seed and an element's index. A random word serves two neighbours, with 16
// bits for each: rates are so many 65536ths.
struct Dropout {
    uint32_t low, high, threshold;
    float scale;  // of what is kept

    Dropout(uint64_t seed, float rate)
        : low(uint32_t(seed)), high(uint32_t(seed >> 32)),
          threshold(uint32_t(std::min(65535.0, std::floor(double(rate) * 65536 + 0.5)))),
          scale(float(65536.0 / (65536 - threshold))) {}

    // lowbias32 (Wellons, hash-prospector), keyed before each of its two multiplications.
    inline Words hash(Words x) const {
        x = x * 0x9e3779b1u + low;
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= (x >> 15) + high;
        x *= 0x846ca68bu;
        return x ^ x >> 16;
    }
#ifdef __AVX512BW__
    // Which of the 32 elements of 16 words are kept.
    inline __mmask32 keeps(Words words) const {
        return _mm512_cmpge_epu16_mask((__m512i)words, _mm512_set1_epi16(short(threshold)));
    }
#endif
    // Which of 16 elements are kept.
    inline Lanes keeps(uint32_t first) const {
        const Words element = lane + first, word = hash(element >> 1);
        return as_lanes(((element & 1) != 0 ? word >> 16 : word & 0xffff) >= threshold);
    }
    // The same of 32, the first of them even.
    inline void keeps(uint32_t first, Lanes kept[2]) const {
        const Words words = hash(lane + first / 2);
#ifdef __AVX512BW__
        const __mmask32 all = keeps(words);
        kept[0] = Lanes(all), kept[1] = Lanes(all >> 16);
#else
        Halves numbers[2];
        std::memcpy(numbers, &words, sizeof words);
        for (int64_t half = 0; half < 2; half++) kept[half] = widened(numbers[half]) >= threshold;
#endif
    }
    inline Floats operator()(Floats value, Lanes kept) const { return only(kept, value * scale); }

    static constexpr Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// As `sweep`, but call body(i, count, which of the elements first + i and on are kept).
template <class Body> inline void sweep_dropping(int64_t size, Dropout drop, uint32_t first, Body body) {
    int64_t i = 0;
    if (first % 2 == 0) {
        for (; i + 2 * LANES <= size; i += 2 * LANES) {
            Lanes kept[2];
            drop.keeps(first + uint32_t(i), kept);
            body(i, std::integral_constant<int64_t, LANES>{}, kept[0]);
            body(i + LANES, std::integral_constant<int64_t, LANES>{}, kept[1]);
        }
    }
    for (; i < size; i += LANES) body(i, std::min(LANES, size - i), drop.keeps(first + uint32_t(i)));
}

struct Row {  // float32 scratch for one row
    float *data;
    explicit Row(int64_t cols) : data(static_cast<float *>(std::aligned_alloc(64, (cols * 4 + 63) / 64 * 64))) {}
    ~Row() { std::free(data); }
};

// ---- elementwise passes; T is float or bf16 ----

// y = x * Phi(x) and, where it is wanted, dy/dx = Phi(x) + x * phi(x), for x = h + bias.
// erf by Abramowitz and Stegun 7.1.26 (1.5e-7 absolute): one exponential serves both.
template <bool with_bias, bool with_slope>
void gelu_row(const float *h, const float *bias, float *y, float *slope, int64_t cols) {
    sweep(cols, [=](int64_t i, auto count) {
        Floats x = load(h + i, count);
        if (with_bias) x += load(bias + i, count);
        Floats z = x * 0.70710678f;
        Floats e = exponential(-z * z);
        z = z < 0.0f ? -z : z;
        Floats t = 1.0f / (z * 0.3275911f + 1.0f);
        Floats tail = t * 1.061405429f - 1.453152027f;
        tail = tail * t + 1.421413741f;
        tail = tail * t - 0.284496736f;
        tail = (tail * t + 0.254829592f) * t;
        Floats below = tail * e * 0.5f;  // Phi(-|x|)
        Floats cdf = x < 0.0f ? below : 1.0f - below;
        store(y + i, x * cdf, count);
        if (with_slope) store(slope + i, x * e * 0.39894228f + cdf, count);
    });
}

// For bf16 the same by parabolas, each for a quarter between -4 and 4, and 0 or 1 beyond, to 5e-4. Largest error: 4e-5 of Phi,
// 2e-4 of the slope, where bf16 keeps 4e-3.
struct Parabolas {
    static constexpr int64_t PARTS = 32;
    Floats c[3][2] = {};  // of t, which goes from -1/2 to 1/2 in each part

    template <class Function> explicit Parabolas(Function f) {
        for (int64_t i = 0; i < PARTS; i++) {
            double at[3] = {-0.4330127, 0, 0.4330127}, y[3];  // Chebyshev's: the least error, nearly
            if (i == 0) at[0] = -0.5;
            if (i == PARTS - 1) at[2] = 0.5;
            for (int64_t k = 0; k < 3; k++) y[k] = f((double(i) + 0.5 + at[k]) / 4 - 4);
            if (i == 0) y[0] = 0;
            if (i == PARTS - 1) y[2] = 1;
            const double left = (y[1] - y[0]) / (at[1] - at[0]), right = (y[2] - y[1]) / (at[2] - at[1]);
            const double bend = (right - left) / (at[2] - at[0]), of[3] = {y[1], left - bend * at[0], bend};
            for (int64_t k = 0; k < 3; k++) c[k][i / LANES][i % LANES] = float(of[k]);
        }
    }
    inline Floats operator()(Words part, Floats t) const { return (pick(2, part) * t + pick(1, part)) * t + pick(0, part); }

    inline Floats pick(int64_t k, Words part) const {  // by the low five bits
#ifdef __AVX512F__
        return (Floats)_mm512_permutex2var_ps((__m512)c[k][0], (__m512i)part, (__m512)c[k][1]);
#else
        Floats x = {};
        for (int64_t i = 0; i < LANES; i++) x[i] = c[k][part[i] / LANES % 2][part[i] % LANES];
        return x;
#endif
    }
};
double normal_cdf(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
const Parabolas PHI(normal_cdf);
const Parabolas SLOPE([](double x) { return normal_cdf(x) + x * std::exp(-x * x / 2) * 0.3989422804; });

template <bool with_bias, bool with_slope, class H>  // H: of the product before it, float32 if it comes from tiles
void gelu_row(const H *h, const bf16 *bias, bf16 *y, bf16 *slope, int64_t cols) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Parabolas cdf = PHI, steepness = SLOPE;  // in registers
    sweep(cols, [=](int64_t i, auto count) {
        Floats x = load(h + i, count);
        if (with_bias) x += load(bias + i, count);
        Floats u = x * 4.0f + 15.5f;  // part 0 is around 0
        u = u < -0.5f ? Floats{} - 0.5f : u;
        u = u > 31.499998f ? Floats{} + 31.499998f : u;  // half would be rounded to 32
        const Floats shifted = u + round, t = u - (shifted - round);
        store(y + i, x * cdf((Words)shifted, t), count);
        if (with_slope) store(slope + i, steepness((Words)shifted, t), count);
    });
}

// `bias` and `slope` may be null.
template <class H, class T> void any_gelu_row(const H *h, const T *bias, T *y, T *slope, int64_t cols) {
    if (bias && slope) gelu_row<true, true>(h, bias, y, slope, cols);
    else if (bias) gelu_row<true, false>(h, bias, y, slope, cols);
    else if (slope) gelu_row<false, true>(h, bias, y, slope, cols);
    else gelu_row<false, false>(h, bias, y, slope, cols);
}

template <class T> void gelu(const T *h, const T *bias, T *y, T *slope, int64_t rows, int64_t cols, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * cols;
        any_gelu_row(h + at, bias, y + at, slope ? slope + at : nullptr, cols);
    }
}

// One row of LN(dropout(h + bias) + residual) * weight + beta; v is scratch. Returns 1 / sigma.
template <class H, class T>
float norm_row(const H *h, const T *bias, const T *residual, const T *weight, const T *beta, T *y, T *normed, float *v,
               int64_t cols, float eps, bool drops, Dropout drop, uint32_t first) {
    Floats sum = {}, square = {};
    const auto add = [&](int64_t i, auto count, Lanes kept) {
        Floats x = load(h + i, count);
        if (bias) x += load(bias + i, count);
        if (drops) x = drop(x, kept);
        x += load(residual + i, count);
        store(v + i, x, count);
        sum += x;  // lanes beyond a row's end are zero; with dropout, because what they scale is
    };
    if (drops) sweep_dropping(cols, drop, first, add);
    else sweep(cols, [&](int64_t i, auto count) { add(i, count, Lanes{}); });
    float mean = sum_of(sum) / cols;
    sweep(cols, [&](int64_t i, auto count) {
        Floats x = load(v + i, count) - mean;
        if (count < LANES) {
            for (int64_t lane = count; lane < LANES; lane++) x[lane] = 0;
        }
        square += x * x;
    });
    float r = 1.0f / std::sqrt(sum_of(square) / cols + eps);
    sweep(cols, [&](int64_t i, auto count) {
        Floats x = (load(v + i, count) - mean) * r;
        if (normed) store(normed + i, x, count);
        store(y + i, x * load(weight + i, count) + load(beta + i, count), count);
    });
    return r;
}

// Keeps what the backward pass needs, where `normed` is wanted: the normalised rows and 1 / sigma.
template <class T>
void norm(const T *h, const T *bias, const T *residual, const T *weight, const T *beta, T *y, T *normed, float *rstd,
          int64_t rows, int64_t cols, float eps, float rate, uint64_t seed, int threads) {
    Dropout drop(seed, rate);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Row scratch(cols);
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            int64_t at = row * cols;
            float r = norm_row(h + at, bias, residual + at, weight, beta, y + at, normed ? normed + at : nullptr,
                               scratch.data, cols, eps, rate > 0, drop, uint32_t(at));
            if (normed) rstd[row] = r;
        }
    }
}

template <class T>
void norm_backward_row(const T *g, const T *n, float r, const T *weight, T *d, T *d_h, float *v, int64_t cols,
                       Dropout drop, uint32_t first) {
    Floats sums = {}, dots = {};
    sweep(cols, [&](int64_t i, auto count) {
        Floats x = load(g + i, count) * load(weight + i, count);
        store(v + i, x, count);
        sums += x;
        dots += x * load(n + i, count);
    });
    float sum = sum_of(sums) / cols, dot = sum_of(dots) / cols;
    const auto write = [&](int64_t i, auto count, Lanes kept) {
        Floats x = (load(v + i, count) - sum - load(n + i, count) * dot) * r;
        store(d + i, x, count);
        if (d_h) store(d_h + i, drop(x, kept), count);
    };
    if (d_h) sweep_dropping(cols, drop, first, write);
    else sweep(cols, [&](int64_t i, auto count) { write(i, count, Lanes{}); });
}

// d_residual and, with dropout, d_h = d_residual through the mask; d_h may be null.
template <class T>
void norm_backward(const T *grad, const T *normed, const float *rstd, const T *weight, T *d_residual, T *d_h,
                   int64_t rows, int64_t cols, float rate, uint64_t seed, int threads) {
    Dropout drop(seed, rate);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Row scratch(cols);
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            int64_t at = row * cols;
            norm_backward_row(grad + at, normed + at, rstd[row], weight, d_residual + at, d_h ? d_h + at : nullptr,
                              scratch.data, cols, drop, uint32_t(at));
        }
    }
}

template <class T> void dropout(const T *x, T *y, int64_t size, float rate, uint64_t seed, int threads) {
    const Dropout drop(seed, rate);
    constexpr int64_t PART = 1 << 14;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t from = 0; from < size; from += PART) {
        sweep_dropping(std::min(PART, size - from), drop, uint32_t(from), [=](int64_t i, auto count, Lanes kept) {
            store(y + from + i, drop(load(x + from + i, count), kept), count);
        });
    }
}

// ---- attention ----

struct Shape {
    int64_t batch, heads, length, width;
};

// Whether a batch element's keys are all hidden. The lowest number added to each of its scores swallows them: the
// weights are equal, and the log of their sum is lost beside that number. So such an element gets scores of zero
// and no mask.
bool all_hidden(const float *bias, int64_t length) {
    return bias && *std::max_element(bias, bias + length) < -1e30f;
}

struct Strides {  // in numbers, of (batch, head, position)
    int64_t b, h, t;
    int64_t at(int64_t batch, int64_t head) const { return batch * b + head * h; }
};

// The sum over a head's width.
template <class A, class B> inline float dot(const A *a, const B *b, int64_t width) {
    Floats sum = {};
    sweep(width, [&](int64_t i, auto count) { sum += load(a + i, count) * load(b + i, count); });
    return sum_of(sum);
}

// For one query a head: softmax(scale * q K' + bias), dropped out, times V. `weights` (batch, heads, length) is kept for
// the backward pass, without dropout; out is (batch, heads, width).
template <class T>
void attend_one(Shape s, const T *q, Strides qs, const T *k, Strides ks, const T *v, Strides vs, const float *bias, T *out,
                float *weights, float scale, float rate, uint64_t seed, int threads) {
    const Dropout drop(seed, rate);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Row sums(s.width), dropped(s.length);
#pragma omp for
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            const int64_t b = bh / s.heads, head = bh % s.heads;
            const float *own = bias ? bias + b * s.length : nullptr;
            const T *query = q + qs.at(b, head), *keys = k + ks.at(b, head), *values = v + vs.at(b, head);
            float *p = weights + bh * s.length, top = -INFINITY, sum = 0;
            if (all_hidden(own, s.length)) std::fill(p, p + s.length, 0.0f);
            else {
                for (int64_t c = 0; c < s.length; c++) {
                    p[c] = dot(query, keys + c * ks.t, s.width) * scale + (own ? own[c] : 0.0f);
                }
            }
            for (int64_t c = 0; c < s.length; c++) top = p[c] > top ? p[c] : top;
            sweep(s.length, [&](int64_t c, auto count) { store(p + c, exponential(load(p + c, count) - top), count); });
            for (int64_t c = 0; c < s.length; c++) sum += p[c];
            std::fill(sums.data, sums.data + s.width, 0.0f);
            sweep(s.length, [&](int64_t c, auto count) {
                Floats x = load(p + c, count) / sum;
                store(p + c, x, count);
                store(dropped.data + c, rate > 0 ? drop(x, drop.keeps(uint32_t(bh * s.length + c))) : x, count);
            });
            for (int64_t c = 0; c < s.length; c++) {
                const Floats weight = Floats{} + dropped.data[c];
                sweep(s.width, [&](int64_t i, auto count) {
                    store(sums.data + i, load(sums.data + i, count) + weight * load(values + c * vs.t + i, count), count);
                });
            }
            sweep(s.width, [&](int64_t i, auto count) { store(out + bh * s.width + i, load(sums.data + i, count), count); });
        }
    }
}

// grad and dq are (batch, heads, width), dk and dv (batch, length, heads, width), all contiguous.
template <class T>
void attend_one_backward(Shape s, const T *q, Strides qs, const T *k, Strides ks, const T *v, Strides vs,
                         const float *weights, const T *grad, T *dq, T *dk, T *dv, float scale, float rate, uint64_t seed,
                         int threads) {
    const Dropout drop(seed, rate);
    const int64_t step = s.heads * s.width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Row sums(s.width), dropped(s.length), d_scores(s.length);
#pragma omp for
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            const int64_t b = bh / s.heads, head = bh % s.heads, origin = b * s.length * step + head * s.width;
            const T *query = q + qs.at(b, head), *keys = k + ks.at(b, head), *values = v + vs.at(b, head);
            const T *g = grad + bh * s.width;
            const float *p = weights + bh * s.length;
            float *d = d_scores.data, delta = 0;
            for (int64_t c = 0; c < s.length; c++) d[c] = dot(g, values + c * vs.t, s.width);
            sweep(s.length, [&](int64_t c, auto count) {
                const Lanes kept = drop.keeps(uint32_t(bh * s.length + c));
                Floats weight = load(p + c, count), x = load(d + c, count);
                store(d + c, rate > 0 ? drop(x, kept) : x, count);
                store(dropped.data + c, rate > 0 ? drop(weight, kept) : weight, count);
            });
            for (int64_t c = 0; c < s.length; c++) delta += p[c] * d[c];
            for (int64_t c = 0; c < s.length; c++) d[c] = p[c] * (d[c] - delta) * scale;
            std::fill(sums.data, sums.data + s.width, 0.0f);
            for (int64_t c = 0; c < s.length; c++) {
                const Floats x = Floats{} + d[c], weight = Floats{} + dropped.data[c];
                sweep(s.width, [&](int64_t i, auto count) {
                    store(sums.data + i, load(sums.data + i, count) + x * load(keys + c * ks.t + i, count), count);
                    store(dk + origin + c * step + i, x * load(query + i, count), count);
                    store(dv + origin + c * step + i, weight * load(g + i, count), count);
                });
            }
            sweep(s.width, [&](int64_t i, auto count) { store(dq + bh * s.width + i, load(sums.data + i, count), count); });
        }
    }
}

}  // namespace

#ifdef WITH_TILES
namespace {

// ---- attention on AMX tiles: 16 x 32 bf16 times 32 x 16 bf16 into 16 x 16 float32 ----

constexpr int64_t TILE = 512;  // bf16 numbers in a tile

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// In static memory: the compiler thinks that the instruction reads its first bytes only, and may leave the rest of a
// local one unwritten.
const TileConfig tile_config;

// What is stored before is there for tiles to load: the compiler does not know that they read memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// C (m x n float32, row length n) = A (m x k bf16, its rows `step` apart) * B (k x n bf16, packed); m, n, k multiples of
// 32.
void multiply(const bf16 *A, int64_t step, const bf16 *B, float *C, int64_t m, int64_t n, int64_t k) {
    const int64_t depth = k / 32;
    settle();
    for (int64_t i = 0; i < m; i += 32) {
        for (int64_t j = 0; j < n; j += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            const bf16 *a = A + i * step, *b = B + j / 16 * depth * TILE;
            for (int64_t p = 0; p < depth; p++) {
                _tile_loadd(4, a + p * 32, step * 2);
                _tile_loadd(5, a + 16 * step + p * 32, step * 2);
                _tile_loadd(6, b + p * TILE, 64);
                _tile_loadd(7, b + (depth + p) * TILE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *c = C + i * n + j;
            _tile_stored(0, c, n * 4);
            _tile_stored(1, c + 16, n * 4);
            _tile_stored(2, c + 16 * n, n * 4);
            _tile_stored(3, c + 16 * n + 16, n * 4);
        }
    }
}

// Packed B holds for each 16 columns and each 32 of depth a tile whose row p has the pairs (B[2p], B[2p + 1]).

inline void interleave(const bf16 *even, const bf16 *odd, uint32_t *to) {
    Words pairs = (Words)load(odd) | (Words)load(even) >> 16;
    std::memcpy(to, &pairs, 64);
}

// Two rows of 32 as pairs: the left 16, and the right.
inline void interleave(const bf16 *even, const bf16 *odd, bf16 *left, bf16 *right) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(left, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(right, _mm512_permutex2var_epi16(a, _mm512_add_epi16(low, _mm512_set1_epi16(16)), b));
}

// Two rows of 16 to bf16; returns them as pairs.
inline __m512i store_rows(bf16 *even, bf16 *odd, Floats x, Floats y) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    std::memcpy(even, &both, 32);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(odd), _mm512_extracti64x4_epi64(both, 1));
    return _mm512_permutexvar_epi16(pairs, both);
}

// From X (rows x cols, both multiples of 32, its rows `step` apart): B = X, so depth runs over X's rows.
void pack_rows(const bf16 *X, int64_t step, bf16 *B, int64_t rows, int64_t cols) {
    int64_t depth = rows / 32;
    for (int64_t p = 0; p < rows / 2; p++) {
        const bf16 *even = X + 2 * p * step, *odd = even + step;
        bf16 *row = B + (p / 16) * TILE + (p % 16) * 32;
        for (int64_t j = 0; j < cols; j += 32, row += 2 * depth * TILE) {
            interleave(even + j, odd + j, row, row + depth * TILE);
        }
    }
}

// Transpose 16 x 16 words: swap the off-diagonal blocks of 8, then of 4, 2 and 1.
template <int block> inline void swap_blocks(Words *row) {
    Words first, second;
    for (int lane = 0; lane < 16; lane++) {
        first[lane] = lane & block ? lane + 16 - block : lane;
        second[lane] = lane & block ? lane + 16 : lane + block;
    }
    for (int i = 0; i < 16; i++) {
        if (i & block) continue;
        Words upper = row[i], lower = row[i + block];
        row[i] = __builtin_shuffle(upper, lower, first);
        row[i + block] = __builtin_shuffle(upper, lower, second);
    }
}
// Rows of X are `from` words apart, rows of Y `to`.
inline void transpose_words(const uint32_t *X, int64_t from, uint32_t *Y, int64_t to) {
    Words row[16];
    for (int i = 0; i < 16; i++) std::memcpy(&row[i], X + i * from, 64);
    swap_blocks<8>(row);
    swap_blocks<4>(row);
    swap_blocks<2>(row);
    swap_blocks<1>(row);
    for (int i = 0; i < 16; i++) std::memcpy(Y + i * to, &row[i], 64);
}

// B = X transposed, so depth runs over X's columns: pairs are neighbours in a row of X. The step is even.
void pack_columns(const bf16 *X, int64_t step, bf16 *B, int64_t rows, int64_t cols) {
    int64_t depth = cols / 32;
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(X);
    for (int64_t j = 0; j < rows; j += 16) {
        uint32_t *to = reinterpret_cast<uint32_t *>(B + j / 16 * depth * TILE);
        for (int64_t p = 0; p < depth; p++) {
            transpose_words(pairs + j * (step / 2) + p * 16, step / 2, to + p * TILE / 2, 16);
        }
    }
}

// Y = X transposed, out of what pack_columns made of X: its words are pairs of neighbouring rows of Y.
void unpack_rows(const bf16 *packed, bf16 *Y, int64_t rows, int64_t cols) {
    int64_t depth = cols / 32;
    for (int64_t j = 0; j < rows; j += 16) {
        const uint32_t *from = reinterpret_cast<const uint32_t *>(packed + j / 16 * depth * TILE);
        for (int64_t p = 0; p < cols / 2; p++) {
            Words pairs;
            std::memcpy(&pairs, from + p * 16, 64);
            Halves even = __builtin_convertvector(pairs, Halves), odd = __builtin_convertvector(pairs >> 16, Halves);
            std::memcpy(Y + 2 * p * rows + j, &even, 32);
            std::memcpy(Y + (2 * p + 1) * rows + j, &odd, 32);
        }
    }
}

// Y (cols x rows bf16, as pairs) = scale * X (rows x cols float32) transposed; scratch holds rows * cols numbers.
void transpose_down(const float *X, float scale, uint32_t *scratch, uint32_t *Y, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t c = 0; c < cols; c += 16) {
            bf16 even[16], odd[16];
            store(even, load(X + r * cols + c) * scale);
            store(odd, load(X + (r + 1) * cols + c) * scale);
            interleave(even, odd, scratch + r / 2 * cols + c);
        }
    }
    for (int64_t r = 0; r < rows / 2; r += 16) {
        for (int64_t c = 0; c < cols; c += 16) {
            transpose_words(scratch + r * cols + c, cols, Y + c * (rows / 2) + r, rows / 2);
        }
    }
}

// Copy rows x width out of rows that are `step` apart into a zero-padded block.
void gather(const bf16 *from, int64_t step, bf16 *to, int64_t rows, int64_t width, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) {
        sweep(width, [&](int64_t i, auto count) { std::memcpy(to + r * padded + i, from + r * step + i, count * 2); });
    }
}

// The rows of one head, as many and as wide as whole tiles: where they lie, or a copy that zeros make so.
struct Head {
    const bf16 *rows;
    int64_t step;

    Head(const bf16 *from, int64_t step, bf16 *copy, Shape s, int64_t width) : rows(from), step(step) {
        if (s.length % 32 == 0 && s.width == width && step % 2 == 0) return;
        gather(from, step, copy, s.length, s.width, width);
        this->rows = copy;
        this->step = width;
    }
    const bf16 *from(int64_t row) const { return rows + row * step; }
};

// Rows of one head lie far apart, which hides them from the processor's own prefetching. So each head asks for its
// share of the next batch element's rows, all heads of them; `written` for lines to write into.
template <bool written>
void prefetch(const bf16 *rows, int64_t stride, int64_t length, int64_t heads, int64_t head, int64_t width) {
    for (int64_t r = length * head / heads; r < length * (head + 1) / heads; r++) {
        for (int64_t c = 0; c < heads * width; c += 32) __builtin_prefetch(rows + r * stride + c, written, 2);
    }
}

struct Arena {  // scratch of one thread; if it is zeroed once, padding stays zero because nobody writes it
    char *memory, *next;
    explicit Arena(int64_t bytes, bool zeroed = true) {
        bytes = (bytes + 4095) / 4096 * 4096;
        memory = next = static_cast<char *>(std::aligned_alloc(4096, bytes));
        if (zeroed) std::memset(memory, 0, bytes);
    }
    ~Arena() { std::free(memory); }
    template <class T> T *take(int64_t count) {
        T *out = reinterpret_cast<T *>(next);
        // 320 bytes more, so that blocks of a power of two do not alias in the cache.
        next += (count * int64_t(sizeof(T)) + 63) / 64 * 64 + 320;
        return out;
    }
};

int64_t padded(int64_t size) { return (size + 31) / 32 * 32; }

bool tiles_granted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return granted;
}

// Call work(std::integral_constant<int64_t, L / LANES>), or with 0 where a row of L is too long for registers.
template <class Work> void by_length(int64_t L, Work work) {
    if (L == 32) work(std::integral_constant<int64_t, 2>{});
    else if (L == 64) work(std::integral_constant<int64_t, 4>{});
    else if (L == 96) work(std::integral_constant<int64_t, 6>{});
    else if (L == 128) work(std::integral_constant<int64_t, 8>{});
    else work(std::integral_constant<int64_t, 0>{});
}

// A row of numbers between passes over it: in registers, if it has a fixed number of vectors, or in memory.
template <int64_t fixed> struct Between {
    Floats own[fixed];
    explicit Between(float *) {}
    void put(int64_t v, Floats x) { own[v] = x; }
    Floats get(int64_t v) const { return own[v]; }
};
template <> struct Between<0> {
    float *row;
    explicit Between(float *row) : row(row) {}
    void put(int64_t v, Floats x) { store(row + v * LANES, x); }
    Floats get(int64_t v) const { return load(row + v * LANES); }
};

// Dropout of attention weights, whose rows are counted as L long.
struct WeightDropout : Dropout {
    int64_t L;

    WeightDropout(uint64_t seed, float rate, int64_t L) : Dropout(seed, rate), L(L) {}

    // Which of 32 keys of a query are kept; the first one is even.
    __mmask32 of_keys(int64_t query, int64_t key) const {
        return keeps(hash(lane + uint32_t((query * L + key) / 2)));
    }
    // Which of 16 queries keep an even key, and which the next one.
    void of_queries(int64_t query, int64_t key, Lanes *even, Lanes *odd) const {
        const Words words = hash(lane * uint32_t(L / 2) + uint32_t((query * L + key) / 2));
        const __m512i least = _mm512_set1_epi32(int(threshold << 16));
        *even = _mm512_cmpge_epu32_mask((__m512i)(words << 16), least);
        *odd = _mm512_cmpge_epu32_mask((__m512i)words, least);
    }
};

// One row of exp(scores * scale + mask - their maximum), dropped out; it is still to be divided by `sum`, that of all
// before dropout. L is a multiple of 32.
template <int64_t fixed>
inline void softmax_row(float *scores, const float *mask, bf16 *weights, int64_t L, float scale, bool drops,
                        const WeightDropout &drop, int64_t query, float *maximum, float *sum) {
    const int64_t vectors = fixed ? fixed : L / LANES;
    Between<fixed> row(scores);
    Floats tops = Floats{} - INFINITY, sums = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; v++) {
        Floats x = load(scores + v * LANES) * scale + load(mask + v * LANES);
        row.put(v, x);
        tops = x > tops ? x : tops;
    }
    const float top = max_of(tops);
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; v += 2) {
        const Floats x = exponential<4>(row.get(v) - top), y = exponential<4>(row.get(v + 1) - top);
        sums += x + y;
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
        if (drops) both = _mm512_maskz_mov_epi16(drop.of_keys(query, v * LANES), both);
        _mm512_storeu_si512(weights + v * LANES, both);
    }
    *maximum = top;
    *sum = sum_of(sums);
}

// How many rows of a head's scores are made at a time: they, and what is made of them, shall fit the nearest cache.
int64_t at_a_time(int64_t L) { return L <= 64 ? L : 32; }

struct Inputs {
    Shape s;
    const bf16 *q, *k, *v;
    Strides qs, ks, vs;
    const float *bias;
    float scale;
    bool drops;
    WeightDropout drop;
    int64_t L, D, R, step;  // length and width in whole tiles, rows at a time, and from row to row of what is contiguous

    Inputs(Shape s, const bf16 *q, Strides qs, const bf16 *k, Strides ks, const bf16 *v, Strides vs, const float *bias,
           float scale, float rate, uint64_t seed)
        : s(s), q(q), k(k), v(v), qs(qs), ks(ks), vs(vs), bias(bias), scale(scale), drops(rate > 0),
          drop(seed, rate, padded(s.length)), L(padded(s.length)), D(padded(s.width)), R(at_a_time(L)),
          step(s.heads * s.width) {}

    void prefetch_next(int64_t b, int64_t head) const {
        if (b + 1 == s.batch) return;
        prefetch<false>(q + qs.at(b + 1, 0), qs.t, s.length, s.heads, head, s.width);
        prefetch<false>(k + ks.at(b + 1, 0), ks.t, s.length, s.heads, head, s.width);
        prefetch<false>(v + vs.at(b + 1, 0), vs.t, s.length, s.heads, head, s.width);
    }
    const float *mask_of(int64_t b, bool *blind) const {
        const float *own = bias ? bias + b * s.length : nullptr;
        *blind = all_hidden(own, s.length);
        return *blind ? nullptr : own;
    }
};

// Call work(worker, head) for each head of each batch element; the worker is the thread's own.
template <class Worker, class Work> void by_heads(const Inputs &in, int threads, Work work) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&tile_config);
        Worker worker(in);
#pragma omp for
        for (int64_t bh = 0; bh < in.s.batch * in.s.heads; bh++) work(worker, bh);
        _tile_release();
    }
}

// The attention of one head, in steps.
struct Forward {
    const Inputs &in;
    Arena arena;
    bf16 *copies[3], *Kt, *Vp, *P;
    float *S, *mask, *O, *tops, *sums;
    const bf16 *Q = nullptr;
    int64_t bh = 0, b = 0, head = 0, q_step = 0;
    bool blind = false;

    explicit Forward(const Inputs &in)
        : in(in), arena(2 * (5 * in.L * in.D + in.R * in.L) + 4 * (in.R * in.L + in.L + in.R * in.D + 2 * in.R) + 8192) {
        for (bf16 *&copy : copies) copy = arena.take<bf16>(in.L * in.D);
        Kt = arena.take<bf16>(in.L * in.D), Vp = arena.take<bf16>(in.L * in.D), P = arena.take<bf16>(in.R * in.L);
        S = arena.take<float>(in.R * in.L), mask = arena.take<float>(in.L), O = arena.take<float>(in.R * in.D);
        tops = arena.take<float>(in.R), sums = arena.take<float>(in.R);
    }
    void read(int64_t of, bf16 *out) {
        const Shape s = in.s;
        bh = of, b = of / s.heads, head = of % s.heads;
        const Head q(in.q + in.qs.at(b, head), in.qs.t, copies[0], s, in.D);
        const Head k(in.k + in.ks.at(b, head), in.ks.t, copies[1], s, in.D);
        const Head v(in.v + in.vs.at(b, head), in.vs.t, copies[2], s, in.D);
        in.prefetch_next(b, head);
        if (b + 1 < s.batch) prefetch<true>(out + (b + 1) * s.length * in.step, in.step, s.length, s.heads, head, s.width);
        Q = q.rows, q_step = q.step;
        pack_columns(k.rows, k.step, Kt, in.L, in.D);
        pack_rows(v.rows, v.step, Vp, in.L, in.D);
        const float *own = in.mask_of(b, &blind);
        for (int64_t c = 0; c < in.L; c++) mask[c] = c >= s.length ? -INFINITY : own ? own[c] : 0.0f;
    }
    void score(int64_t i) {
        multiply(Q + i * q_step, q_step, Kt, S, in.R, in.L, in.D);
        if (blind) std::fill(S, S + in.R * in.L, 0.0f);
    }
    void weigh(int64_t i) {
        const int64_t L = in.L, rows = std::min(in.R, in.s.length - i), first = bh * in.s.length + i;
        const WeightDropout drop = in.drop;
        by_length(L, [=](auto vectors) {
            for (int64_t r = 0; r < rows; r++) {
                softmax_row<vectors()>(S + r * L, mask, P + r * L, L, in.scale, in.drops, drop, first + r, tops + r,
                                       sums + r);
            }
        });
    }
    void sum() { multiply(P, in.L, Vp, O, in.R, in.D, in.L); }
    void write(int64_t i, bf16 *out, float *lse) {
        const int64_t rows = std::min(in.R, in.s.length - i), first = bh * in.s.length + i, D = in.D;
        const float kept = in.drop.scale;
        float *const tops = this->tops, *const sums = this->sums, *const O = this->O;
        sweep(rows, [=](int64_t r, auto count) {
            const Floats sum = load(sums + r);
            if (lse) store(lse + first + r, load(tops + r) + logarithm(sum), count);
            store(sums + r, kept / sum);
        });
        for (int64_t r = 0; r < rows; r++) {
            bf16 *to = out + (b * in.s.length + i + r) * in.step + head * in.s.width;
            const float by = sums[r];
            sweep(in.s.width, [=](int64_t c, auto count) { store(to + c, load(O + r * D + c, count) * by, count); });
        }
    }
};

void attend(const Inputs &in, bf16 *out, float *lse, int threads) {
    by_heads<Forward>(in, threads, [&](Forward &head, int64_t bh) {
        head.read(bh, out);
        for (int64_t i = 0; i < in.s.length; i += in.R) {
            head.score(i);
            head.weigh(i);
            head.sum();
            head.write(i, out, lse);
        }
    });
}

// Its backward pass. It works on the transposed scores, key by key, so that P and dS are left operands without being
// transposed. out, grad, dq, dk, dv are (batch, length, heads, width), contiguous.
struct Backward {
    const Inputs &in;
    Arena arena;
    bf16 *copies[4], *Qt, *Gt, *Qp, *Gp, *Kt, *P, *dS, *dSp, *dQ16;
    float *S, *dP, *delta, *top, *dV, *dK, *dQ;
    uint32_t *words;
    const bf16 *K = nullptr, *V = nullptr;
    const float *own = nullptr;
    int64_t bh = 0, origin = 0, k_step = 0, v_step = 0;
    bool blind = false;

    explicit Backward(const Inputs &in)
        : in(in), arena(2 * (10 * in.L * in.D + 2 * in.R * in.L + in.L * in.L) +
                        4 * (2 * in.R * in.L + 2 * in.L + 2 * in.R * in.D + 2 * in.L * in.D) + 16384) {
        for (bf16 *&copy : copies) copy = arena.take<bf16>(in.L * in.D);
        for (bf16 **packed : {&Qt, &Gt, &Qp, &Gp, &Kt, &dQ16}) *packed = arena.take<bf16>(in.L * in.D);
        P = arena.take<bf16>(in.R * in.L), dS = arena.take<bf16>(in.R * in.L), dSp = arena.take<bf16>(in.L * in.L);
        S = arena.take<float>(in.R * in.L), dP = arena.take<float>(in.R * in.L);
        delta = arena.take<float>(in.L), top = arena.take<float>(in.L);
        dV = arena.take<float>(in.R * in.D), dK = arena.take<float>(in.R * in.D), dQ = arena.take<float>(in.L * in.D);
        words = arena.take<uint32_t>(in.L * in.D / 2);
    }
    void read(int64_t of, const bf16 *out, const float *lse, const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv) {
        const Shape s = in.s;
        const int64_t b = of / s.heads, head = of % s.heads, next = (b + 1) * s.length * in.step;
        bh = of, origin = b * s.length * in.step + head * s.width;
        const Head q(in.q + in.qs.at(b, head), in.qs.t, copies[0], s, in.D);
        const Head k(in.k + in.ks.at(b, head), in.ks.t, copies[1], s, in.D);
        const Head v(in.v + in.vs.at(b, head), in.vs.t, copies[2], s, in.D);
        const Head g(grad + origin, in.step, copies[3], s, in.D);
        in.prefetch_next(b, head);
        if (b + 1 < s.batch) {
            for (const bf16 *x : {grad, out}) prefetch<false>(x + next, in.step, s.length, s.heads, head, s.width);
            for (bf16 *x : {dq, dk, dv}) prefetch<true>(x + next, in.step, s.length, s.heads, head, s.width);
        }
        K = k.rows, k_step = k.step, V = v.rows, v_step = v.step;
        pack_columns(q.rows, q.step, Qt, in.L, in.D);
        pack_columns(g.rows, g.step, Gt, in.L, in.D);
        pack_rows(q.rows, q.step, Qp, in.L, in.D);
        pack_rows(g.rows, g.step, Gp, in.L, in.D);
        pack_columns(k.rows, k.step, dQ16, in.L, in.D);
        unpack_rows(dQ16, Kt, in.L, in.D);
        for (int64_t c = 0; c < in.L; c++) top[c] = INFINITY, delta[c] = 0;  // padding gets weight zero
        for (int64_t c = 0; c < s.length; c++) {
            delta[c] = dot(out + origin + c * in.step, g.from(c), s.width);
            top[c] = lse[bh * s.length + c];
        }
        own = in.mask_of(b, &blind);
    }
    void score(int64_t j) {
        multiply(K + j * k_step, k_step, Qt, S, in.R, in.L, in.D);
        if (blind) std::fill(S, S + in.R * in.L, 0.0f);
        multiply(V + j * v_step, v_step, Gt, dP, in.R, in.L, in.D);
    }
    // The weights of two keys at a time for all queries, dropped out but not scaled for it, and the gradients of their
    // scores, not yet scaled either.
    void weigh(int64_t j) {
        const int64_t L = in.L, length = in.s.length;
        const WeightDropout drop = in.drop;
        const Floats scale = Floats{} + in.scale, kept = Floats{} + drop.scale;
        const bool drops = in.drops;
        for (int64_t r = 0; r < in.R; r += 2) {
            const float *s = S + r * L, *dp = dP + r * L;
            bf16 *p = P + r * L, *ds = dS + r * L;
            bf16 *pairs = dSp + (j + r) / 32 * TILE + r % 32 * 16;  // the j-th of L / 32 tiles of each 16 columns
            float shift[2];
            for (int64_t i = 0; i < 2; i++) shift[i] = j + r + i >= length ? -INFINITY : own ? own[j + r + i] : 0.0f;
            for (int64_t c = 0; c < L; c += LANES, pairs += L / 32 * TILE) {
                const Floats lse = load(top + c), mean = load(delta + c);
                Floats x = exponential<4>(load(s + c) * scale - lse + shift[0]), dx = load(dp + c) * kept;
                Floats y = exponential<4>(load(s + L + c) * scale - lse + shift[1]), dy = load(dp + L + c) * kept;
                Floats px = x, py = y;
                if (drops) {
                    Lanes even, odd;
                    drop.of_queries(bh * length + c, j + r, &even, &odd);
                    px = only(even, x), dx = only(even, dx), py = only(odd, y), dy = only(odd, dy);
                }
                store_rows(p + c, p + L + c, px, py);
                _mm512_storeu_si512(pairs, store_rows(ds + c, ds + L + c, x * (dx - mean), y * (dy - mean)));
            }
        }
    }
    void sum() {
        multiply(P, in.L, Gp, dV, in.R, in.D, in.L);
        multiply(dS, in.L, Qp, dK, in.R, in.D, in.L);
    }
    void write(int64_t j, bf16 *dk, bf16 *dv) {
        const int64_t D = in.D;
        const float *const dK = this->dK, *const dV = this->dV, scale = in.scale, kept = in.drop.scale;
        for (int64_t r = 0; r < std::min(in.R, in.s.length - j); r++) {
            bf16 *of_key = dk + origin + (j + r) * in.step, *of_value = dv + origin + (j + r) * in.step;
            sweep(in.s.width, [=](int64_t c, auto count) {
                store(of_key + c, load(dK + r * D + c, count) * scale, count);
                store(of_value + c, load(dV + r * D + c, count) * kept, count);
            });
        }
    }
    void write_queries(bf16 *dq) {
        multiply(Kt, in.L, dSp, dQ, in.D, in.L, in.L);
        transpose_down(dQ, in.scale, words, reinterpret_cast<uint32_t *>(dQ16), in.D, in.L);
        for (int64_t r = 0; r < in.s.length; r++) {
            bf16 *to = dq + origin + r * in.step;
            const bf16 *from = dQ16 + r * in.D;
            sweep(in.s.width, [=](int64_t c, auto count) { std::memcpy(to + c, from + c, count * 2); });
        }
    }
};

void attend_backward(const Inputs &in, const bf16 *out, const float *lse, const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv,
                     int threads) {
    by_heads<Backward>(in, threads, [&](Backward &head, int64_t bh) {
        head.read(bh, out, lse, grad, dq, dk, dv);
        for (int64_t j = 0; j < in.L; j += in.R) {
            head.score(j);
            head.weigh(j);
            head.sum();
            head.write(j, dk, dv);
        }
        head.write_queries(dq);
    });
}

// ---- products with a frozen matrix that was packed once, 32 rows of x at a time ----

constexpr int64_t DEPTH = 12;  // tiles of depth at a time: 32 rows of x and 32 columns of W fill the nearest cache

// Rows of X, `count` of at most 32 and each k long, as tiles: `depth` of the first 16 rows, then of the others.
void pack_block(const bf16 *X, int64_t count, int64_t k, bf16 *to) {
    const int64_t depth = k / 32;
    for (int64_t r = 0; r < 32; r++) {
        bf16 *row = to + r / 16 * depth * TILE + r % 16 * 32;
        for (int64_t p = 0; p < depth; p++) {
            if (r < count) std::memcpy(row + p * TILE, X + r * k + p * 32, 64);
            else std::memset(row + p * TILE, 0, 64);
        }
    }
}

// Add 32 rows times 32 columns to tiles 0 to 3, `count` tiles of depth; the second tile of each lies a, b further.
inline void accumulate(const bf16 *x, int64_t a, const bf16 *packed, int64_t b, int64_t count) {
    for (int64_t p = 0; p < count; p++, x += TILE, packed += TILE) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, packed, 64);
        _tile_loadd(7, packed + b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + a, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// C (32 x n float32) = the packed block x (32 x k) * packed W (k x n) + the packed block low (32 x rank) * second; or
// that is added to C.
void multiply_block(const bf16 *x, const bf16 *W, float *C, int64_t n, int64_t k, const bf16 *low, const bf16 *second,
                    int64_t rank, bool adds = false) {
    const int64_t depth = k / 32 * TILE, ranks = rank / 32 * TILE, step = DEPTH * TILE;
    settle();
    for (int64_t p = 0; p < depth; p += step) {
        const bool last = p + step >= depth;
        for (int64_t j = 0; j < n; j += 32) {
            float *c = C + j;
            if (p == 0 && !adds) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, c, n * 4);
                _tile_loadd(1, c + 16, n * 4);
                _tile_loadd(2, c + 16 * n, n * 4);
                _tile_loadd(3, c + 16 * n + 16, n * 4);
            }
            accumulate(x + p, depth, W + j / 16 * depth + p, depth, std::min(step, depth - p) / TILE);
            if (last && rank) accumulate(low, ranks, second + j / 16 * ranks, ranks, rank / 32);
            _tile_stored(0, c, n * 4);
            _tile_stored(1, c + 16, n * 4);
            _tile_stored(2, c + 16 * n, n * 4);
            _tile_stored(3, c + 16 * n + 16, n * 4);
        }
    }
}

struct Rows {
    const bf16 *x;
    int64_t rows, k;
};

// (scale * x * first) * second is added to the product. `first` is (k x rank) and `second` (rank x n), or, if they
// are `transposed`, (rank x k) and (n x rank). low = scale * x * first, rows x rank.
struct Factors {
    const bf16 *first, *second;
    bool transposed;
    int64_t rank;
    float scale;
    bf16 *low;
};

// One factor, rows x cols, padded to multiples of 32 and packed.
void pack_factor(const bf16 *X, bf16 *to, int64_t rows, int64_t cols, bool transposed) {
    const int64_t R = padded(rows), C = padded(cols);
    Arena arena(2 * R * C + 1024);
    bf16 *copy = arena.take<bf16>(R * C);
    gather(X, cols, copy, rows, cols, C);
    if (transposed) pack_columns(copy, C, to, R, C);
    else pack_rows(copy, C, to, R, C);
}

// Factors, packed for all blocks of rows.
struct PackedFactors {
    Factors own;
    int64_t k, rank;  // padded
    Arena arena;
    bf16 *first, *second;

    PackedFactors(const Factors &factors, int64_t k, int64_t n)
        : own(factors), k(k), rank(padded(own.rank)), arena(2 * rank * (k + n) + 4096, false),
          first(arena.take<bf16>(rank * k)), second(arena.take<bf16>(rank * n)) {
        if (!rank) return;
        const int64_t r = own.rank;
        pack_factor(own.first, first, own.transposed ? r : k, own.transposed ? k : r, own.transposed);
        pack_factor(own.second, second, own.transposed ? n : r, own.transposed ? r : n, own.transposed);
    }
};

// What one thread needs for 32 rows.
struct Block {
    Arena arena;
    bf16 *x, *narrow, *slim;
    float *C, *wide, *scratch;

    Block(int64_t k, int64_t n, int64_t rank)
        : arena(32 * (2 * (k + 2 * rank) + 4 * (n + rank)) + 4 * n + 8192, false), x(arena.take<bf16>(32 * k)),
          narrow(arena.take<bf16>(32 * rank)), slim(arena.take<bf16>(32 * rank)), C(arena.take<float>(32 * n)),
          wide(arena.take<float>(32 * rank)), scratch(arena.take<float>(n)) {}

    // C = the packed rows x * W + what the factors add, or that is added; they are `count` rows from row i on.
    void multiply(const bf16 *W, int64_t n, int64_t k, const PackedFactors &low, int64_t i, int64_t count, bool adds) {
        const int64_t R = low.rank, r = low.own.rank;
        if (R) {
            multiply_block(x, low.first, wide, R, k, nullptr, nullptr, 0);
            for (int64_t c = 0; c < 32 * R; c += LANES) store(slim + c, load(wide + c) * low.own.scale);
            for (int64_t row = 0; row < count; row++) std::memcpy(low.own.low + (i + row) * r, slim + row * R, r * 2);
            pack_block(slim, 32, R, narrow);
        }
        multiply_block(x, W, C, n, k, narrow, low.second, R, adds);
    }
};

// Call work(block, i, count) for each 32 rows, the last ones may be fewer; the block is the thread's own.
template <class Work> void by_blocks(int64_t rows, int64_t k, int64_t n, int64_t rank, int threads, Work work) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&tile_config);
        Block block(k, n, rank);
#pragma omp for
        for (int64_t i = 0; i < rows; i += 32) work(block, i, std::min<int64_t>(32, rows - i));
        _tile_release();
    }
}

// Call finish(row, c, scratch) with each row of x * W as n float32 numbers, and scratch as long.
template <class Finish>
void product(Rows x, const bf16 *W, int64_t n, const Factors &factors, int threads, Finish finish) {
    const int64_t k = x.k;
    const PackedFactors low(factors, k, n);
    by_blocks(x.rows, k, n, low.rank, threads, [&](Block &block, int64_t i, int64_t count) {
        pack_block(x.x + i * k, count, k, block.x);
        block.multiply(W, n, k, low, i, count, false);
        for (int64_t r = 0; r < count; r++) finish(i + r, block.C + r * n, block.scratch);
    });
}

template <bool with_bias, bool with_after>
void store_row(const float *c, const bf16 *bias, const bf16 *after, bf16 *y, int64_t n) {
    sweep(n, [=](int64_t i, auto count) {
        Floats sum = load(c + i, count);
        if (with_bias) sum += load(bias + i, count);
        if (with_after) sum *= load(after + i, count);
        store(y + i, sum, count);
    });
}

// y = (c + bias) * after; the last two may be null.
void store_row(const float *c, const bf16 *bias, const bf16 *after, bf16 *y, int64_t n) {
    if (bias && after) store_row<true, true>(c, bias, after, y, n);
    else if (bias) store_row<true, false>(c, bias, after, y, n);
    else if (after) store_row<false, true>(c, bias, after, y, n);
    else store_row<false, false>(c, bias, after, y, n);
}

// One of several products that share what goes in or what comes out.
struct Map {
    const bf16 *W, *bias;
    bf16 *rows;         // what comes out, or goes in
    Factors factors;
};

struct PackedMaps {
    std::deque<PackedFactors> factors;  // which never moves them
    int64_t rank = 0;  // the largest
    PackedMaps(const Map *maps, int64_t count, int64_t k, int64_t n) {
        for (int64_t m = 0; m < count; m++) {
            factors.emplace_back(maps[m].factors, k, n);
            rank = std::max(rank, factors[m].rank);
        }
    }
};

// ---- A' B, for long and thin A: sums over rows ----

constexpr int64_t WIDE = 6;  // tiles of 16 columns of B at a time, one accumulator each

// A' (rank x rows) as tiles, for each 16 of rank and each 32 rows one; what is beyond an end is zero.
void pack_thin(const bf16 *A, bf16 *to, int64_t rows, int64_t rank) {
    for (int64_t c = 0; c < rank; c += 16) {
        const int64_t count = std::min<int64_t>(16, rank - c);
        for (int64_t from = 0; from < rows; from += 32, to += TILE) {
            uint32_t pairs[256] = {};
            for (int64_t r = from; r < std::min(from + 32, rows); r += 2) {
                bf16 even[16] = {}, odd[16] = {};
                std::memcpy(even, A + r * rank + c, count * 2);
                if (r + 1 < rows) std::memcpy(odd, A + (r + 1) * rank + c, count * 2);
                interleave(even, odd, pairs + (r - from) / 2 * 16);
            }
            transpose_words(pairs, 16, reinterpret_cast<uint32_t *>(to), 16);
        }
    }
}

// C (16 x 96 float32) = the tiles of 16 of rank * columns of B, of which `tiles` times 16 are there.
void sum_rows(const bf16 *thin, const bf16 *B, float *C, int64_t rows, int64_t n, int64_t tiles, bf16 *packed) {
    const bf16 none[16] = {};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t from = 0; from < rows; from += 32, thin += TILE) {
        for (int64_t p = 0; p < 16; p++) {
            const int64_t r = from + 2 * p;
            const bf16 *even = B + r * n, *odd = even + n;
            for (int64_t t = 0; t < tiles; t++) {
                interleave(r < rows ? even + 16 * t : none, r + 1 < rows ? odd + 16 * t : none,
                           reinterpret_cast<uint32_t *>(packed + t * TILE) + 16 * p);
            }
        }
        settle();
        _tile_loadd(6, thin, 64);
        _tile_loadd(7, packed, 64);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, packed + TILE, 64);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, packed + 2 * TILE, 64);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(7, packed + 3 * TILE, 64);
        _tile_dpbf16ps(3, 6, 7);
        _tile_loadd(7, packed + 4 * TILE, 64);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, packed + 5 * TILE, 64);
        _tile_dpbf16ps(5, 6, 7);
    }
    const int64_t row = WIDE * 16 * 4;
    _tile_stored(0, C, row);
    _tile_stored(1, C + 16, row);
    _tile_stored(2, C + 32, row);
    _tile_stored(3, C + 48, row);
    _tile_stored(4, C + 64, row);
    _tile_stored(5, C + 80, row);
    settle();
}

}  // namespace
#endif

extern "C" {

#define FOR_BOTH(MAKE) MAKE(float, f32) MAKE(bf16, bf16)
#define MAKE_FUNCTIONS(T, name)                                                                                        \
    void gelu_##name(const T *h, const T *bias, T *y, T *slope, int64_t rows, int64_t cols, int threads) {             \
        gelu(h, bias, y, slope, rows, cols, threads);                                                                  \
    }                                                                                                                  \
    void norm_##name(const T *h, const T *bias, const T *residual, const T *weight, const T *beta, T *y, T *normed,    \
                     float *rstd, int64_t rows, int64_t cols, float eps, float rate, uint64_t seed, int threads) {     \
        norm(h, bias, residual, weight, beta, y, normed, rstd, rows, cols, eps, rate, seed, threads);                  \
    }                                                                                                                  \
    void norm_backward_##name(const T *grad, const T *normed, const float *rstd, const T *weight, T *d_residual,       \
                              T *d_h, int64_t rows, int64_t cols, float rate, uint64_t seed, int threads) {            \
        norm_backward(grad, normed, rstd, weight, d_residual, d_h, rows, cols, rate, seed, threads);                   \
    }                                                                                                                  \
    void dropout_##name(const T *x, T *y, int64_t size, float rate, uint64_t seed, int threads) {                      \
        dropout(x, y, size, rate, seed, threads);                                                                      \
    }                                                                                                                  \
    /* strides: of q, k and v, in numbers, each (batch, head, position) */                                             \
    void attention_one_##name(const T *q, const T *k, const T *v, const int64_t *x, const float *bias, T *out,         \
                              float *weights, int64_t batch, int64_t heads, int64_t length, int64_t width,             \
                              float scale, float rate, uint64_t seed, int threads) {                                   \
        attend_one({batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v,                     \
                   {x[6], x[7], x[8]}, bias, out, weights, scale, rate, seed, threads);                                \
    }                                                                                                                  \
    void attention_one_backward_##name(const T *q, const T *k, const T *v, const int64_t *x, const float *weights,     \
                                       const T *grad, T *dq, T *dk, T *dv, int64_t batch, int64_t heads,               \
                                       int64_t length, int64_t width, float scale, float rate, uint64_t seed,          \
                                       int threads) {                                                                  \
        attend_one_backward({batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v,            \
                            {x[6], x[7], x[8]}, weights, grad, dq, dk, dv, scale, rate, seed, threads);                \
    }
FOR_BOTH(MAKE_FUNCTIONS)

// Whether this processor has bf16 matrix tiles and the system lets us use them.
int has_tiles() {
#ifdef WITH_TILES
    return tiles_granted();
#else
    return 0;
#endif
}

#ifdef WITH_TILES
// strides: of q, k and v, in numbers, each (batch, head, position).
void attention(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const float *bias, bf16 *out,
               float *lse, int64_t batch, int64_t heads, int64_t length, int64_t width, float scale, float rate,
               uint64_t seed, int threads) {
    const int64_t *x = strides;
    attend({{batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v, {x[6], x[7], x[8]}, bias,
            scale, rate, seed}, out, lse, threads);
}

void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const float *bias,
                        const bf16 *out, const float *lse, const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv,
                        int64_t batch, int64_t heads, int64_t length, int64_t width, float scale, float rate,
                        uint64_t seed, int threads) {
    const int64_t *x = strides;
    attend_backward({{batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v, {x[6], x[7], x[8]},
                     bias, scale, rate, seed}, out, lse, grad, dq, dk, dv, threads);
}

// Packed for `product`: W' of a W (rows x cols), or W itself. Both sides are multiples of 32.
void pack(const bf16 *W, bf16 *to, int64_t rows, int64_t cols, int transposed) {
    if (transposed) pack_columns(W, cols, to, rows, cols);
    else pack_rows(W, cols, to, rows, cols);
}

// y = (x W + bias) * after, and with a rank the product of two factors is in the sum, see Factors; bias and after may be
// null.
void linear(const bf16 *x, const bf16 *W, const bf16 *bias, const bf16 *after, bf16 *y, int64_t rows, int64_t k, int64_t n,
            const bf16 *first, const bf16 *second, int transposed, int64_t rank, float scale, bf16 *low, int threads) {
    product({x, rows, k}, W, n, {first, second, bool(transposed), rank, scale, low}, threads,
            [=](int64_t row, const float *c, float *) { store_row(c, bias, after ? after + row * n : nullptr, y + row * n, n); });
}

// As `linear` of one x for each of several maps.
void linear_each(const bf16 *x, const Map *maps, int64_t count, int64_t rows, int64_t k, int64_t n, int threads) {
    const PackedMaps packed(maps, count, k, n);
    by_blocks(rows, k, n, packed.rank, threads, [&](Block &block, int64_t i, int64_t here) {
        pack_block(x + i * k, here, k, block.x);
        for (int64_t m = 0; m < count; m++) {
            block.multiply(maps[m].W, n, k, packed.factors[m], i, here, false);
            for (int64_t r = 0; r < here; r++) store_row(block.C + r * n, maps[m].bias, nullptr, maps[m].rows + (i + r) * n, n);
        }
    });
}

// y = start + the sum of what several maps make of rows of their own; start may be null.
void linear_sum(const Map *maps, int64_t count, const bf16 *start, bf16 *y, int64_t rows, int64_t k, int64_t n,
                int threads) {
    const PackedMaps packed(maps, count, k, n);
    by_blocks(rows, k, n, packed.rank, threads, [&](Block &block, int64_t i, int64_t here) {
        for (int64_t m = 0; m < count; m++) {
            const Map &map = maps[m];
            pack_block(map.rows + i * k, here, k, block.x);
            block.multiply(map.W, n, k, packed.factors[m], i, here, m > 0);
        }
        for (int64_t r = 0; r < here; r++) {
            const int64_t at = (i + r) * n;
            store_row(block.C + r * n, start ? start + at : nullptr, nullptr, y + at, n);
        }
    });
}

// out = A' B, (rank x n), or `transposed` (n x rank); A is (rows x rank), B (rows x n), n a multiple of 16.
void sum_of_products(const bf16 *A, const bf16 *B, bf16 *out, int64_t rows, int64_t rank, int64_t n, int transposed,
                     int threads) {
    const int64_t depth = (rows + 31) / 32 * TILE;
    Arena shared(2 * depth * ((rank + 15) / 16) + 4096, false);
    bf16 *thin = shared.take<bf16>(depth * ((rank + 15) / 16));
    pack_thin(A, thin, rows, rank);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&tile_config);
        Arena arena(2 * WIDE * TILE + 4 * WIDE * 256 + 4096);
        bf16 *packed = arena.take<bf16>(WIDE * TILE);
        float *C = arena.take<float>(WIDE * 256);
#pragma omp for
        for (int64_t j = 0; j < n; j += 16 * WIDE) {
            const int64_t tiles = std::min(WIDE, (n - j) / 16);
            for (int64_t c = 0; c < rank; c += 16) {
                sum_rows(thin + c / 16 * depth, B + j, C, rows, n, tiles, packed);
                for (int64_t r = 0; r < std::min<int64_t>(16, rank - c); r++) {
                    bf16 row[16 * WIDE];
                    sweep(16 * tiles, [&](int64_t i, auto count) { store(row + i, load(C + r * 16 * WIDE + i, count), count); });
                    if (!transposed) std::memcpy(out + (c + r) * n + j, row, 32 * tiles);
                    else for (int64_t i = 0; i < 16 * tiles; i++) out[(j + i) * rank + c + r] = row[i];
                }
            }
        }
        _tile_release();
    }
}

// y = GELU(x W + bias), and the slope there; bias and slope may be null.
void linear_gelu(const bf16 *x, const bf16 *W, const bf16 *bias, bf16 *y, bf16 *slope, int64_t rows, int64_t k,
                 int64_t n, int threads) {
    product({x, rows, k}, W, n, {}, threads, [=](int64_t row, const float *c, float *) {
        any_gelu_row(c, bias, y + row * n, slope ? slope + row * n : nullptr, n);
    });
}

// As norm_bf16, of h = x W.
void linear_norm(const bf16 *x, const bf16 *W, const bf16 *bias, const bf16 *residual, const bf16 *weight,
                 const bf16 *beta, bf16 *y, bf16 *normed, float *rstd, int64_t rows, int64_t k, int64_t n, float eps,
                 float rate, uint64_t seed, int threads) {
    const Dropout drop(seed, rate);
    product({x, rows, k}, W, n, {}, threads, [=](int64_t row, const float *c, float *scratch) {
        const int64_t at = row * n;
        float r = norm_row(c, bias, residual + at, weight, beta, y + at, normed ? normed + at : nullptr, scratch, n,
                           eps, rate > 0, drop, uint32_t(at));
        if (normed) rstd[row] = r;
    });
}
#endif
}
