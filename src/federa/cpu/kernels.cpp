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
#if defined(__AMX_BF16__) && !defined(__clang__)  // which has no __builtin_shuffle
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
inline Floats load(const bf16 *from, int64_t count = LANES) {
    Halves bits = {};
    std::memcpy(&bits, from, count * 2);
#ifdef __AVX512F__
    Words wide = (Words)_mm512_cvtepu16_epi32((__m256i)bits);
#else
    Words wide = __builtin_convertvector(bits, Words);
#endif
    return (Floats)(wide << 16);
}
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

struct Dropout {
    uint32_t low, high, threshold;
    float scale;

    Dropout(uint64_t seed, float rate)
        : low(uint32_t(seed)), high(uint32_t(seed >> 32)), threshold(uint32_t(double(rate) * 4294967296.0)),
          scale(float(1.0 / (1.0 - double(rate)))) {}

    // x where element first + lane * step is kept, scaled; zero where it is dropped.
    // lowbias32 (Wellons, hash-prospector), keyed before each of its two multiplications.
    inline Floats operator()(Floats value, uint32_t first, uint32_t step = 1) const {
        const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const uint32_t golden = 0x9e3779b1u;
        Words x = lane * (step * golden) + (first * golden + low);  // the first product is the same for all elements
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= (x >> 15) + high;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        return x >= threshold ? value * scale : Floats{};
    }
};

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

// For bf16 the same by odd polynomials of x, plus a half: both are so between -4 and 4, and 0 or 1 beyond to 5e-4.
// Fitted for the least largest error: 2e-5 of Phi, 6e-5 of the slope, where bf16 keeps 4e-3.
constexpr float PHI[] = {
    3.988475018e-01f, -6.617535941e-02f, 9.664860115e-03f, -1.048200022e-03f, 8.066670012e-05f,
    -4.100807570e-06f, 1.217085777e-07f, -1.580742838e-09f};
constexpr float SLOPE[] = {
    7.976095349e-01f, -2.648264856e-01f, 5.845605641e-02f, -8.716302267e-03f, 9.073226465e-04f,
    -6.495708651e-05f, 3.028313474e-06f, -8.218674780e-08f, 9.795861385e-10f};

template <int64_t terms> inline Floats half_plus_odd(const float (&c)[terms], Floats x, Floats square) {
    Floats sum = Floats{} + c[terms - 1];
    for (int64_t i = terms - 2; i >= 0; i--) sum = sum * square + c[i];
    sum = sum * x + 0.5f;
    return x < -4.0f ? Floats{} : x > 4.0f ? Floats{} + 1.0f : sum;
}

template <bool with_bias, bool with_slope, class H>  // H: of the product before it, float32 if it comes from tiles
void gelu_row(const H *h, const bf16 *bias, bf16 *y, bf16 *slope, int64_t cols) {
    sweep(cols, [=](int64_t i, auto count) {
        Floats x = load(h + i, count);
        if (with_bias) x += load(bias + i, count);
        Floats square = x * x;
        store(y + i, x * half_plus_odd(PHI, x, square), count);
        if (with_slope) store(slope + i, half_plus_odd(SLOPE, x, square), count);
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
    sweep(cols, [&](int64_t i, auto count) {
        Floats x = load(h + i, count);
        if (bias) x += load(bias + i, count);
        if (drops) x = drop(x, first + uint32_t(i));
        x += load(residual + i, count);
        store(v + i, x, count);
        sum += x;  // lanes beyond a row's end are zero; with dropout, because what they scale is
    });
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
    sweep(cols, [&](int64_t i, auto count) {
        Floats x = (load(v + i, count) - sum - load(n + i, count) * dot) * r;
        store(d + i, x, count);
        if (d_h) store(d_h + i, drop(x, first + uint32_t(i)), count);
    });
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
        sweep(std::min(PART, size - from), [=](int64_t i, auto count) {
            store(y + from + i, drop(load(x + from + i, count), uint32_t(from + i)), count);
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
                store(dropped.data + c, rate > 0 ? drop(x, uint32_t(bh * s.length + c)) : x, count);
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
                const uint32_t first = uint32_t(bh * s.length + c);
                Floats weight = load(p + c, count), x = load(d + c, count);
                store(d + c, rate > 0 ? drop(x, first) : x, count);
                store(dropped.data + c, rate > 0 ? drop(weight, first) : weight, count);
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

// C (m x n float32, row length n) = A (m x k bf16, rows) * B (k x n bf16, packed); m, n, k multiples of 32.
void multiply(const bf16 *A, const bf16 *B, float *C, int64_t m, int64_t n, int64_t k) {
    int64_t depth = k / 32;
    settle();
    for (int64_t i = 0; i < m; i += 32) {
        for (int64_t j = 0; j < n; j += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            const bf16 *a = A + i * k, *b = B + j / 16 * depth * TILE;
            for (int64_t p = 0; p < depth; p++) {
                _tile_loadd(4, a + p * 32, k * 2);
                _tile_loadd(5, a + 16 * k + p * 32, k * 2);
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

// From X (rows x cols, zero-padded copy, row length cols): B = X, so depth runs over X's rows.
void pack_rows(const bf16 *X, bf16 *B, int64_t rows, int64_t cols) {
    int64_t depth = rows / 32;
    for (int64_t p = 0; p < rows / 2; p++) {
        const bf16 *even = X + 2 * p * cols, *odd = even + cols;
        bf16 *row = B + (p / 16) * TILE + (p % 16) * 32;
        for (int64_t j = 0; j < cols; j += 16) {
            uint32_t *to = reinterpret_cast<uint32_t *>(row + j / 16 * depth * TILE);
            interleave(even + j, odd + j, to);
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

// B = X transposed, so depth runs over X's columns: pairs are neighbours in a row of X.
void pack_columns(const bf16 *X, bf16 *B, int64_t rows, int64_t cols) {
    int64_t depth = cols / 32;
    const uint32_t *pairs = reinterpret_cast<const uint32_t *>(X);
    for (int64_t j = 0; j < rows; j += 16) {
        uint32_t *to = reinterpret_cast<uint32_t *>(B + j / 16 * depth * TILE);
        for (int64_t p = 0; p < depth; p++) {
            transpose_words(pairs + j * (cols / 2) + p * 16, cols / 2, to + p * TILE / 2, 16);
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

// Y (cols x rows bf16, as pairs) = X (rows x cols float32) transposed; scratch holds rows * cols numbers.
void transpose_down(const float *X, uint32_t *scratch, uint32_t *Y, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t c = 0; c < cols; c += 16) {
            bf16 even[16], odd[16];
            store(even, load(X + r * cols + c));
            store(odd, load(X + (r + 1) * cols + c));
            interleave(even, odd, scratch + r / 2 * cols + c);
        }
    }
    for (int64_t r = 0; r < rows / 2; r += 16) {
        for (int64_t c = 0; c < cols; c += 16) {
            transpose_words(scratch + r * cols + c, cols, Y + c * (rows / 2) + r, rows / 2);
        }
    }
}

// Copy one head, rows x width out of strided rows, into a zero-padded block.
void gather(const bf16 *from, int64_t stride, bf16 *to, int64_t rows, int64_t width, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) {
        sweep(width, [&](int64_t i, auto count) { std::memcpy(to + r * padded + i, from + r * stride + i, count * 2); });
    }
}

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

// One row of softmax(scores * scale + mask), dropped out; returns the log of the sum of exponentials.
// L is a multiple of 32.
float softmax_row(float *scores, const float *mask, bf16 *weights, int64_t L, float scale, bool drops, Dropout drop,
                  uint32_t first) {
    Floats tops = load(scores) * scale + load(mask), sums = {};
    for (int64_t c = 0; c < L; c += LANES) {
        Floats x = load(scores + c) * scale + load(mask + c);
        store(scores + c, x);
        tops = x > tops ? x : tops;
    }
    float top = max_of(tops);
    for (int64_t c = 0; c < L; c += LANES) {
        Floats x = exponential<4>(load(scores + c) - top);
        store(scores + c, x);
        sums += x;
    }
    float sum = sum_of(sums), inverse = 1.0f / sum;
    for (int64_t c = 0; c < L; c += LANES) {
        Floats x = load(scores + c) * inverse;
        store(weights + c, drops ? drop(x, first + uint32_t(c)) : x);
    }
    return top + std::log(sum);
}

// One key's weights for all queries, dropped out, and the gradient of its scores.
void softmax_backward_row(const float *scores, const float *d_weights, const float *lse, const float *delta,
                          bf16 *weights, bf16 *d_scores, int64_t L, float scale, float shift, bool drops, Dropout drop,
                          uint32_t first, uint32_t step) {
    for (int64_t c = 0; c < L; c += LANES) {
        Floats x = load(scores + c) * scale + shift - load(lse + c), d = load(d_weights + c);
        Floats weight = exponential<4>(x);
        if (drops) d = drop(d, first + uint32_t(c) * step, step);
        store(d_scores + c, weight * (d - load(delta + c)) * scale);
        store(weights + c, drops ? drop(weight, first + uint32_t(c) * step, step) : weight);
    }
}

void attend(Shape s, const bf16 *q, Strides qs, const bf16 *k, Strides ks, const bf16 *v, Strides vs, const float *bias,
            bf16 *out, float *lse, float scale, float rate, uint64_t seed, int threads) {
    const int64_t L = padded(s.length), D = padded(s.width), step = s.heads * s.width;
    Dropout drop(seed, rate);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&tile_config);
        Arena arena(2 * (5 * L * D + 32 * L) + 4 * (32 * L + L + 32 * D) + 8192);
        bf16 *Q = arena.take<bf16>(L * D), *K = arena.take<bf16>(L * D), *V = arena.take<bf16>(L * D);
        bf16 *Kt = arena.take<bf16>(L * D), *Vp = arena.take<bf16>(L * D), *P = arena.take<bf16>(32 * L);
        float *S = arena.take<float>(32 * L), *mask = arena.take<float>(L), *O = arena.take<float>(32 * D);
#pragma omp for
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            int64_t b = bh / s.heads, head = bh % s.heads;
            gather(q + qs.at(b, head), qs.t, Q, s.length, s.width, D);
            gather(k + ks.at(b, head), ks.t, K, s.length, s.width, D);
            gather(v + vs.at(b, head), vs.t, V, s.length, s.width, D);
            if (b + 1 < s.batch) {
                prefetch<false>(q + qs.at(b + 1, 0), qs.t, s.length, s.heads, head, s.width);
                prefetch<false>(k + ks.at(b + 1, 0), ks.t, s.length, s.heads, head, s.width);
                prefetch<false>(v + vs.at(b + 1, 0), vs.t, s.length, s.heads, head, s.width);
                prefetch<true>(out + (b + 1) * s.length * step, step, s.length, s.heads, head, s.width);
            }
            pack_columns(K, Kt, L, D);
            pack_rows(V, Vp, L, D);
            const float *own = bias ? bias + b * s.length : nullptr;
            const bool blind = all_hidden(own, s.length);
            for (int64_t c = 0; c < L; c++) mask[c] = c >= s.length ? -INFINITY : own && !blind ? own[c] : 0.0f;
            for (int64_t i = 0; i < s.length; i += 32) {
                multiply(Q + i * D, Kt, S, 32, L, D);
                if (blind) std::fill(S, S + 32 * L, 0.0f);
                for (int64_t r = 0; r < std::min<int64_t>(32, s.length - i); r++) {
                    int64_t query = bh * s.length + i + r;
                    float sum = softmax_row(S + r * L, mask, P + r * L, L, scale, rate > 0, drop,
                                            uint32_t(query * s.length));
                    if (lse) lse[query] = sum;
                }
                multiply(P, Vp, O, 32, D, L);
                for (int64_t r = 0; r < std::min<int64_t>(32, s.length - i); r++) {
                    bf16 *to = out + (b * s.length + i + r) * step + head * s.width;
                    sweep(s.width, [&](int64_t c, auto count) { store(to + c, load(O + r * D + c, count), count); });
                }
            }
        }
        _tile_release();
    }
}

// Works on the transposed scores, key by key, so that P and dS are left operands without being transposed.
// out, grad, dq, dk, dv are (batch, length, heads, width), contiguous.
void attend_backward(Shape s, const bf16 *q, Strides qs, const bf16 *k, Strides ks, const bf16 *v, Strides vs,
                     const float *bias, const bf16 *out, const float *lse, const bf16 *grad, bf16 *dq, bf16 *dk,
                     bf16 *dv, float scale, float rate, uint64_t seed, int threads) {
    const int64_t L = padded(s.length), D = padded(s.width), step = s.heads * s.width;
    Dropout drop(seed, rate);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&tile_config);
        Arena arena(2 * (11 * L * D + 64 * L + L * L) + 4 * (64 * L + 2 * L + 64 * D + L * D) + 16384);
        bf16 *Q = arena.take<bf16>(L * D), *K = arena.take<bf16>(L * D), *V = arena.take<bf16>(L * D);
        bf16 *G = arena.take<bf16>(L * D), *Qt = arena.take<bf16>(L * D), *Gt = arena.take<bf16>(L * D);
        bf16 *Qp = arena.take<bf16>(L * D), *Gp = arena.take<bf16>(L * D), *Kt = arena.take<bf16>(L * D);
        bf16 *P = arena.take<bf16>(32 * L), *dS = arena.take<bf16>(32 * L), *dSp = arena.take<bf16>(L * L);
        float *S = arena.take<float>(32 * L), *dP = arena.take<float>(32 * L);
        float *delta = arena.take<float>(L), *top = arena.take<float>(L);
        float *dV = arena.take<float>(32 * D), *dK = arena.take<float>(32 * D), *dQ = arena.take<float>(L * D);
        bf16 *dQ16 = arena.take<bf16>(L * D);
        uint32_t *words = arena.take<uint32_t>(L * D / 2);
#pragma omp for
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            int64_t b = bh / s.heads, head = bh % s.heads, origin = b * s.length * step + head * s.width;
            gather(q + qs.at(b, head), qs.t, Q, s.length, s.width, D);
            gather(k + ks.at(b, head), ks.t, K, s.length, s.width, D);
            gather(v + vs.at(b, head), vs.t, V, s.length, s.width, D);
            gather(grad + origin, step, G, s.length, s.width, D);
            if (b + 1 < s.batch) {
                int64_t next = (b + 1) * s.length * step;
                prefetch<false>(q + qs.at(b + 1, 0), qs.t, s.length, s.heads, head, s.width);
                prefetch<false>(k + ks.at(b + 1, 0), ks.t, s.length, s.heads, head, s.width);
                prefetch<false>(v + vs.at(b + 1, 0), vs.t, s.length, s.heads, head, s.width);
                for (const bf16 *read : {grad, out}) prefetch<false>(read + next, step, s.length, s.heads, head, s.width);
                for (bf16 *write : {dq, dk, dv}) prefetch<true>(write + next, step, s.length, s.heads, head, s.width);
            }
            pack_columns(Q, Qt, L, D);
            pack_columns(G, Gt, L, D);
            pack_rows(Q, Qp, L, D);
            pack_rows(G, Gp, L, D);
            pack_columns(K, dQ16, L, D);
            unpack_rows(dQ16, Kt, L, D);
            for (int64_t c = 0; c < L; c++) top[c] = INFINITY, delta[c] = 0;  // padding gets weight zero
            for (int64_t c = 0; c < s.length; c++) {
                const bf16 *o = out + origin + c * step, *g = G + c * D;
                Floats sum = {};
                sweep(s.width, [&](int64_t i, auto count) { sum += load(o + i, count) * load(g + i, count); });
                delta[c] = sum_of(sum);
                top[c] = lse[bh * s.length + c];
            }
            const float *own = bias ? bias + b * s.length : nullptr;
            const bool blind = all_hidden(own, s.length);
            for (int64_t j = 0; j < L; j += 32) {
                multiply(K + j * D, Qt, S, 32, L, D);
                if (blind) std::fill(S, S + 32 * L, 0.0f);
                multiply(V + j * D, Gt, dP, 32, L, D);
                for (int64_t r = 0; r < 32; r++) {
                    bool real = j + r < s.length;
                    float shift = !real ? -INFINITY : own && !blind ? own[j + r] : 0.0f;
                    softmax_backward_row(S + r * L, dP + r * L, top, delta, P + r * L, dS + r * L, L, scale, shift,
                                         rate > 0, drop, uint32_t(bh * s.length * s.length + j + r),
                                         uint32_t(s.length));
                }
                multiply(P, Gp, dV, 32, D, L);
                multiply(dS, Qp, dK, 32, D, L);
                for (int64_t r = 0; r < std::min<int64_t>(32, s.length - j); r++) {
                    bf16 *kk = dk + origin + (j + r) * step, *vv = dv + origin + (j + r) * step;
                    sweep(s.width, [&](int64_t c, auto count) {
                        store(kk + c, load(dK + r * D + c, count), count);
                        store(vv + c, load(dV + r * D + c, count), count);
                    });
                }
                for (int64_t c = 0; c < L; c += 16) {  // the j-th of L / 32 tiles of each 16 columns
                    uint32_t *to = reinterpret_cast<uint32_t *>(dSp + (c / 16 * (L / 32) + j / 32) * TILE);
                    for (int64_t pair = 0; pair < 16; pair++) {
                        const bf16 *even = dS + 2 * pair * L + c, *odd = even + L;
                        interleave(even, odd, to + pair * 16);
                    }
                }
            }
            multiply(Kt, dSp, dQ, D, L, L);
            transpose_down(dQ, words, reinterpret_cast<uint32_t *>(dQ16), D, L);
            for (int64_t r = 0; r < s.length; r++) std::memcpy(dq + origin + r * step, dQ16 + r * D, s.width * 2);
        }
        _tile_release();
    }
}

// ---- products with a frozen matrix that was packed once, 32 rows of x at a time ----

constexpr int64_t DEPTH = 12;  // tiles of depth at a time: 32 rows of x and 32 columns of W fill the nearest cache

// Rows of X, `count` of at most 32 and each k long, as tiles: `depth` of the first 16 rows, then of the others.
// With `times` every number is multiplied with its own there.
void pack_block(const bf16 *X, const bf16 *times, int64_t count, int64_t k, bf16 *to) {
    const int64_t depth = k / 32;
    for (int64_t r = 0; r < 32; r++) {
        bf16 *row = to + r / 16 * depth * TILE + r % 16 * 32;
        for (int64_t p = 0; p < depth; p++) {
            const int64_t at = r * k + p * 32;
            if (r >= count) std::memset(row + p * TILE, 0, 64);
            else if (!times) std::memcpy(row + p * TILE, X + at, 64);
            else {
                for (int64_t half = 0; half < 32; half += LANES) {
                    store(row + p * TILE + half, load(X + at + half) * load(times + at + half));
                }
            }
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
    const bf16 *x, *times;  // times may be null, see pack_block
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
    if (transposed) pack_columns(copy, to, R, C);
    else pack_rows(copy, to, R, C);
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
            pack_block(slim, nullptr, 32, R, narrow);
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
        pack_block(x.x + i * k, x.times ? x.times + i * k : nullptr, count, k, block.x);
        block.multiply(W, n, k, low, i, count, false);
        for (int64_t r = 0; r < count; r++) finish(i + r, block.C + r * n, block.scratch);
    });
}

void store_row(const float *c, const bf16 *bias, bf16 *y, int64_t n) {
    sweep(n, [&](int64_t i, auto count) {
        Floats sum = load(c + i, count);
        if (bias) sum += load(bias + i, count);
        store(y + i, sum, count);
    });
}

// One of several products that share what goes in or what comes out.
struct Map {
    const bf16 *W, *bias;
    bf16 *rows;         // what comes out, or goes in
    const bf16 *times;  // of what goes in, may be null, see pack_block
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
    attend({batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v, {x[6], x[7], x[8]}, bias,
           out, lse, scale, rate, seed, threads);
}

void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *strides, const float *bias,
                        const bf16 *out, const float *lse, const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv,
                        int64_t batch, int64_t heads, int64_t length, int64_t width, float scale, float rate,
                        uint64_t seed, int threads) {
    const int64_t *x = strides;
    attend_backward({batch, heads, length, width}, q, {x[0], x[1], x[2]}, k, {x[3], x[4], x[5]}, v,
                    {x[6], x[7], x[8]}, bias, out, lse, grad, dq, dk, dv, scale, rate, seed, threads);
}

// Packed for `product`: W' of a W (rows x cols), or W itself. Both sides are multiples of 32.
void pack(const bf16 *W, bf16 *to, int64_t rows, int64_t cols, int transposed) {
    if (transposed) pack_columns(W, to, rows, cols);
    else pack_rows(W, to, rows, cols);
}

// y = (x * times) W + bias, and with a rank the product of two factors, see Factors; times and bias may be null.
void linear(const bf16 *x, const bf16 *times, const bf16 *W, const bf16 *bias, bf16 *y, int64_t rows, int64_t k,
            int64_t n, const bf16 *first, const bf16 *second, int transposed, int64_t rank, float scale, bf16 *low,
            int threads) {
    product({x, times, rows, k}, W, n, {first, second, bool(transposed), rank, scale, low}, threads,
            [=](int64_t row, const float *c, float *) { store_row(c, bias, y + row * n, n); });
}

// As `linear` of one x for each of several maps.
void linear_each(const bf16 *x, const Map *maps, int64_t count, int64_t rows, int64_t k, int64_t n, int threads) {
    const PackedMaps packed(maps, count, k, n);
    by_blocks(rows, k, n, packed.rank, threads, [&](Block &block, int64_t i, int64_t here) {
        pack_block(x + i * k, nullptr, here, k, block.x);
        for (int64_t m = 0; m < count; m++) {
            block.multiply(maps[m].W, n, k, packed.factors[m], i, here, false);
            for (int64_t r = 0; r < here; r++) store_row(block.C + r * n, maps[m].bias, maps[m].rows + (i + r) * n, n);
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
            pack_block(map.rows + i * k, map.times ? map.times + i * k : nullptr, here, k, block.x);
            block.multiply(map.W, n, k, packed.factors[m], i, here, m > 0);
        }
        for (int64_t r = 0; r < here; r++) {
            const int64_t at = (i + r) * n;
            store_row(block.C + r * n, start ? start + at : nullptr, y + at, n);
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
    product({x, nullptr, rows, k}, W, n, {}, threads, [=](int64_t row, const float *c, float *) {
        any_gelu_row(c, bias, y + row * n, slope ? slope + row * n : nullptr, n);
    });
}

// As norm_bf16, of h = x W.
void linear_norm(const bf16 *x, const bf16 *W, const bf16 *bias, const bf16 *residual, const bf16 *weight,
                 const bf16 *beta, bf16 *y, bf16 *normed, float *rstd, int64_t rows, int64_t k, int64_t n, float eps,
                 float rate, uint64_t seed, int threads) {
    const Dropout drop(seed, rate);
    product({x, nullptr, rows, k}, W, n, {}, threads, [=](int64_t row, const float *c, float *scratch) {
        const int64_t at = row * n;
        float r = norm_row(c, bias, residual + at, weight, beta, y + at, normed ? normed + at : nullptr, scratch, n,
                           eps, rate > 0, drop, uint32_t(at));
        if (normed) rstd[row] = r;
    });
}
#endif
}
