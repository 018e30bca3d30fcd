// SwiGLU experts on CPU: one expert a call, one thread a call, float32 or bfloat16, AVX-512.
//
// Why not a matrix library: an expert has a few dozen rows, and a library packs its weights again for each of the nine
// products of a training step, which then costs as much as the product. Here no weight is ever transposed:
//   forward    weights are the factor that is broadcast, the (few) transposed rows fill the vector lanes;
//   backward   rows are broadcast, weights fill the lanes as they lie in memory (bfloat16: two rows interleaved).
// Products accumulate in float32. What one call computes does not depend on how rows or columns are cut into calls.
//
// Legend: R rows of the expert, D model width, H hidden width; both multiples of 16, all matrices row-major. A *word* is the 32 bits that
// one multiply-add takes from the contracted dimension: one float or a pair of bfloat16.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#define UNROLL _Pragma("GCC unroll 8")

namespace {

struct bf16 { uint16_t bits; };

constexpr long LANES = 16;   // words in a vector
constexpr long PANEL = 64;   // columns of a packed panel: 4 vectors
constexpr long BLOCK = 48;   // weight rows handled at a time in forward: of both tile heights, 6 and 8, a multiple

template <class T> constexpr long PER_WORD = 4 / sizeof(T);

// Scratch memory of this thread: grows, never shrinks.
template <int Slot> int* scratch(long words) {
    struct Buffer { int* data = nullptr; long words = 0; ~Buffer() { std::free(data); } };
    static thread_local Buffer buffer;
    if (buffer.words < words) {
        std::free(buffer.data);
        buffer.words = (words + 1023) / 1024 * 1024;
        buffer.data = static_cast<int*>(std::aligned_alloc(64, buffer.words * 4));
    }
    return buffer.data;
}

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const bf16* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

inline void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }

// Past the caches: nothing reads a weight gradient before many others are written. Aligned by the caller.
inline void stream(float* p, __m512 v) { _mm512_stream_ps(p, v); }
inline void stream(bf16* p, __m512 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }

template <class T> __m512 rounded(__m512 v) {
    if constexpr (sizeof(T) == 4) return v;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v)), 16));
}

// sum + a * b, over both halves of each word for bfloat16
template <class T> inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    if constexpr (sizeof(T) == 4) return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// exp(x) for |x| up to the range of float32, to 2 ulp; NaN stays NaN
inline __m512 exp16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// dst[c][i] = word_row(i) at column c, for 16 columns and `count` word rows; zeros up to the next multiple of 16
template <class Load> void transpose_columns(long count, int* dst, long ld, Load word_row) {
    for (long i0 = 0; i0 < count; i0 += LANES) {
        __m512i r[16];
        for (long i = 0; i < LANES; ++i) r[i] = i0 + i < count ? word_row(i0 + i) : _mm512_setzero_si512();
        transpose16(r);
        for (long c = 0; c < LANES; ++c) _mm512_storeu_si512(dst + c * ld + i0, r[c]);
    }
}

// The words of 16 columns that rows i (float32) or 2 i and 2 i + 1 (bfloat16) of a matrix give; zero beyond its rows.
inline __m512i word_row(const float* src, long ld, long i, long) { return _mm512_loadu_si512(src + i * ld); }
inline __m512i word_row(const bf16* src, long ld, long i, long rows) {
    const bf16* p = src + 2 * i * ld;
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if (2 * i + 1 == rows) return low;
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + ld)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <class T> const int* as_words(const T* p) { return reinterpret_cast<const int*>(p); }
template <class T> long words(long values) { return (values + PER_WORD<T> - 1) / PER_WORD<T>; }

// Pack up to 64 columns of a [rows, ld] matrix as [words(rows), 64]; columns beyond `columns` are zero.
template <class T> void pack_panel(const T* src, long ld, long rows, long columns, int* panel) {
    for (long i = 0; i < words<T>(rows); ++i)
        for (long c = 0; c < PANEL; c += LANES)
            _mm512_store_si512(panel + i * PANEL + c,
                               c < columns ? word_row(src + c, ld, i, rows) : _mm512_setzero_si512());
}

// Pack `columns` columns of a [rows, ld] matrix transposed: dst[c] holds its words, 16-rounded words apart.
template <class T> void pack_transposed(const T* src, long ld, long rows, long columns, int* dst, long dst_ld) {
    for (long c = 0; c < columns; c += LANES)
        transpose_columns(words<T>(rows), dst + c * dst_ld, dst_ld,
                          [&](long i) { return word_row(src + c, ld, i, rows); });
}

// Cache lines to be asked for while others are computed on: the hardware does not guess where the next tile lies.
struct Ahead {
    const char* row;
    long stride, lines, line = 0;  // bytes between rows, lines of each
    const char* end;
    void step() {
        if (row >= end) return;
        _mm_prefetch(row + 64 * line, _MM_HINT_T0);
        if (++line == lines) line = 0, row += stride;
    }
};

// out(m, v, A[m] . B[:, v]) for M rows of words and V vectors of columns
template <class T, int M, int V, class Out>
__attribute__((noinline)) void tile(long K, const int* A, long lda, const int* B, long ldb, Ahead& ahead, Out out) {
    __m512 sum[M][V];
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_ps();
    for (long k = 0; k < K; ++k) {
        ahead.step();
        __m512i b[V];
        UNROLL for (int v = 0; v < V; ++v) b[v] = _mm512_load_si512(B + k * ldb + v * LANES);
        UNROLL for (int m = 0; m < M; ++m) {
            __m512i a = _mm512_set1_epi32(A[m * lda + k]);
            UNROLL for (int v = 0; v < V; ++v) sum[m][v] = multiply_add<T>(sum[m][v], a, b[v]);
        }
    }
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int v = 0; v < V; ++v) out(m, v, sum[m][v]);
}

// out(m, v, A[m] . panel[:, v]) for any number of rows
template <class T, class Out> void times_panel(long M, long K, const int* A, long lda, const int* panel, Ahead ahead, Out out) {
    for (long m = 0; m < M; m += 6) {
        auto at = [&](int i, int v, __m512 sum) { out(m + i, v, sum); };
        const int* a = A + m * lda;
        switch (std::min(M - m, 6L)) {
            case 6: tile<T, 6, 4>(K, a, lda, panel, PANEL, ahead, at); break;
            case 5: tile<T, 5, 4>(K, a, lda, panel, PANEL, ahead, at); break;
            case 4: tile<T, 4, 4>(K, a, lda, panel, PANEL, ahead, at); break;
            case 3: tile<T, 3, 4>(K, a, lda, panel, PANEL, ahead, at); break;
            case 2: tile<T, 2, 4>(K, a, lda, panel, PANEL, ahead, at); break;
            case 1: tile<T, 1, 4>(K, a, lda, panel, PANEL, ahead, at); break;
        }
    }
}

inline Ahead contiguous(const int* words, long count) {
    const char* p = reinterpret_cast<const char*>(words);
    return {p, 64, 1, 0, p + 4 * count};
}

// 64 columns of a [rows, ld] matrix
template <class T> Ahead panel_ahead(const T* src, long ld, long rows) {
    const char* p = reinterpret_cast<const char*>(src);
    const long stride = ld * sizeof(T);
    return {p, stride, PANEL * long(sizeof(T)) / 64, 0, p + rows * stride};
}

// C[m, lane] = weights[m] . lanes[:, lane] for a multiple of 8 weight rows and 16 V lanes
template <class T, int V> void times_lanes(long M, long K, const int* A, const int* lanes, float* C) {
    Ahead ahead = contiguous(A + 8 * K, M * K);
    for (long m = 0; m < M; m += 8)
        tile<T, 8, V>(K, A + m * K, K, lanes, V * LANES, ahead,
                      [&](int i, int v, __m512 sum) { _mm512_store_ps(C + (m + i) * PANEL + v * LANES, sum); });
}

template <class T> void times_lanes(long M, long V, long K, const T* weights, const int* lanes, float* C) {
    const int* A = as_words(weights);
    switch (V) {
        case 1: return times_lanes<T, 1>(M, K, A, lanes, C);
        case 2: return times_lanes<T, 2>(M, K, A, lanes, C);
        case 3: return times_lanes<T, 3>(M, K, A, lanes, C);
    }
    times_panel<T>(M, K, A, K, lanes, contiguous(A + 6 * K, M * K),
                   [&](long m, int v, __m512 sum) { _mm512_store_ps(C + m * PANEL + v * LANES, sum); });
}

// Rows in groups of at most 64, of whole vectors, as even as can be.
struct Groups {
    long vectors, count;
    explicit Groups(long rows) : vectors((rows + LANES - 1) / LANES), count((vectors + 3) / 4) {}
    long first(long g) const { return g * vectors / count; }           // in vectors
    long size(long g) const { return first(g + 1) - first(g); }
};

// Write lanes r of C[16][lane] as rows r of dst, 16 columns.
template <class T> void store_rows(const float* C, long rows, T* dst, long ld) {
    for (long r0 = 0; r0 < rows; r0 += LANES) {
        __m512i t[16];
        for (long i = 0; i < LANES; ++i) t[i] = _mm512_load_si512(C + i * PANEL + r0);
        transpose16(t);
        for (long r = r0; r < std::min(rows, r0 + LANES); ++r) store(dst + r * ld, _mm512_castsi512_ps(t[r - r0]));
    }
}

// hidden = silu(gate) * up, as words along the hidden dimension
template <class T> void activate(long M, long lanes, const float* gate, const float* up, int* hidden) {
    auto at = [&](long m, long c) {
        __m512 g = rounded<T>(_mm512_load_ps(gate + m * PANEL + c)), u = rounded<T>(_mm512_load_ps(up + m * PANEL + c));
        return _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u);
    };
    for (long m = 0; m < M; m += PER_WORD<T>)
        for (long c = 0; c < lanes; c += LANES) {
            int* dst = hidden + m / PER_WORD<T> * lanes + c;
            if constexpr (sizeof(T) == 4) {
                _mm512_store_si512(dst, _mm512_castps_si512(at(m, c)));
            } else {
                __m512i low = _mm512_cvtepu16_epi32(narrow(at(m, c))), high = _mm512_cvtepu16_epi32(narrow(at(m + 1, c)));
                _mm512_store_si512(dst, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}

template <class T>
void forward(long R, long D, long H, const T* x, const T* w1, const T* w2, const T* w3, T* out, T* gate, T* up) {
    const Groups groups(R);
    const long KD = words<T>(D), KH = words<T>(H), lanes = groups.vectors * LANES;
    // Of bfloat16 rows whose width is an odd multiple of 16 the last transpose writes half a vector of columns too many:
    // into the next group, which is written after it, or into this room.
    int *x_lanes = scratch<0>(KD * lanes + LANES * PANEL), *hidden = scratch<1>(KH * lanes);
    float* block = reinterpret_cast<float*>(scratch<2>(2 * BLOCK * PANEL));
    const int* x_words = as_words(x);
    for (long g = 0; g < groups.count; ++g) {
        const long first = groups.first(g) * LANES, size = groups.size(g) * LANES;
        for (long k = 0; k < KD; k += LANES) {
            const __mmask16 inside = KD - k >= LANES ? 0xffff : (1 << (KD - k)) - 1;
            transpose_columns(std::min(size, R - first), x_lanes + KD * first + k * size, size, [&](long r) {
                return _mm512_maskz_loadu_epi32(inside, x_words + (first + r) * KD + k);
            });
        }
    }
    for (long h = 0; h < H; h += BLOCK)
        for (long g = 0; g < groups.count; ++g) {
            const long M = std::min(BLOCK, H - h), V = groups.size(g), first = groups.first(g) * LANES;
            const long rows = std::min(V * LANES, R - first);
            float *gates = block, *ups = block + BLOCK * PANEL;
            times_lanes(M, V, KD, w1 + h * D, x_lanes + KD * first, gates);
            times_lanes(M, V, KD, w3 + h * D, x_lanes + KD * first, ups);
            activate<T>(M, V * LANES, gates, ups, hidden + KH * first + h / PER_WORD<T> * V * LANES);
            for (long m = 0; gate && m < M; m += LANES) {
                store_rows(gates + m * PANEL, rows, gate + first * H + h + m, H);
                store_rows(ups + m * PANEL, rows, up + first * H + h + m, H);
            }
        }
    for (long d = 0; d < D; d += BLOCK)
        for (long g = 0; g < groups.count; ++g) {
            const long M = std::min(BLOCK, D - d), first = groups.first(g) * LANES;
            times_lanes(M, groups.size(g), KH, w2 + d * H, hidden + KH * first, block);
            for (long m = 0; m < M; m += LANES)
                store_rows(block + m * PANEL, std::min(groups.size(g) * LANES, R - first), out + first * D + d + m, D);
        }
}

// The gradients of both projections, and the hidden activation, of up to 64 columns: from the gradient of the latter.
template <class T>
void differentiate(long R, long columns, long H, const float* g_hidden, const T* gate, const T* up, T* g_projections,
                   T* hidden) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (long r = 0; r < R; ++r, gate += H, up += H, g_projections += 2 * H, hidden += H, g_hidden += PANEL)
        for (long c = 0; c < columns; c += LANES) {
            const __m512 g = load(gate + c), u = load(up + c), gh = _mm512_load_ps(g_hidden + c);
            const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s);
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));  // of silu
            store(hidden + c, _mm512_mul_ps(silu, u));
            store(g_projections + H + c, _mm512_mul_ps(gh, silu));
            store(g_projections + c, _mm512_mul_ps(_mm512_mul_ps(gh, u), slope));
        }
}

template <class T>
void backward_rows(long R, long D, long H, const T* g, const T* gate, const T* up, const T* w1, const T* w2,
                   const T* w3, T* gx, T* g_projections, T* hidden) {
    const long KD = words<T>(D), KH = words<T>(H);
    int* panel = scratch<0>(std::max(KD, KH) * PANEL);
    float* partial = reinterpret_cast<float*>(scratch<1>(R * PANEL));
    auto keep = [&](long r, int v, __m512 sum) { _mm512_store_ps(partial + r * PANEL + v * LANES, sum); };
    for (long h = 0; h < H; h += PANEL) {
        pack_panel(w2 + h, H, D, H - h, panel);
        times_panel<T>(R, KD, as_words(g), KD, panel, panel_ahead(w2 + h + PANEL, H, h + PANEL < H ? D : 0), keep);
        differentiate(R, std::min(PANEL, H - h), H, partial, gate + h, up + h, g_projections + h, hidden + h);
    }
    for (long d = 0; d < D; d += PANEL) {
        pack_panel(w1 + d, D, H, D - d, panel);
        times_panel<T>(R, KH, as_words(g_projections), 2 * KH, panel, panel_ahead(w3 + d, D, H), keep);
        pack_panel(w3 + d, D, H, D - d, panel);
        times_panel<T>(R, KH, as_words(g_projections + H), 2 * KH, panel,
                       panel_ahead(w1 + d + PANEL, D, d + PANEL < D ? H : 0), [&](long r, int v, __m512 sum) {
                           if (d + v * LANES >= D) return;
                           const __m512 first = _mm512_load_ps(partial + r * PANEL + v * LANES);
                           store(gx + r * D + d + v * LANES, _mm512_add_ps(first, sum));
                       });
    }
}

// dst[m, n] = sum over rows of a[r, m] b[r, n], for M columns of a and N columns of b
template <class T>
void gradient(long R, long M, long N, const int* a_words, const T* b, long ldb, T* dst, long ld) {
    const long K = words<T>(R), lda = (K + LANES - 1) / LANES * LANES;
    int* panel = scratch<0>(K * PANEL);
    for (long n = 0; n < N; n += PANEL) {
        pack_panel(b + n, ldb, R, N - n, panel);
        times_panel<T>(M, K, a_words, lda, panel, contiguous(panel, 0), [&](long m, int v, __m512 sum) {
            if (n + v * LANES < N) stream(dst + m * ld + n + v * LANES, sum);
        });
    }
}

template <class T>
void backward_weights(long R, long D, long H, long first, long end, const T* x, const T* g, const T* g_projections,
                      const T* hidden, T* gw1, T* gw2, T* gw3) {
    const long ld = (words<T>(R) + LANES - 1) / LANES * LANES, M = end - first;
    int* a_words = scratch<1>(std::max(M, D) * ld);
    pack_transposed(g_projections + first, 2 * H, R, M, a_words, ld);
    gradient(R, M, D, a_words, x, D, gw1 + first * D, D);
    pack_transposed(g_projections + H + first, 2 * H, R, M, a_words, ld);
    gradient(R, M, D, a_words, x, D, gw3 + first * D, D);
    pack_transposed(g, D, R, D, a_words, ld);
    gradient(R, D, M, a_words, hidden + first, H, gw2 + first, H);
    _mm_sfence();
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
    extern "C" void expert_forward_##NAME(long R, long D, long H, const T* x, const T* w1, const T* w2, const T* w3,  \
                                          T* out, T* gate, T* up) {                                                   \
        forward(R, D, H, x, w1, w2, w3, out, gate, up);                                                               \
    }                                                                                                                 \
    extern "C" void expert_backward_rows_##NAME(long R, long D, long H, const T* g, const T* gate, const T* up,       \
                                                const T* w1, const T* w2, const T* w3, T* gx, T* gp, T* hidden) {     \
        backward_rows(R, D, H, g, gate, up, w1, w2, w3, gx, gp, hidden);                                              \
    }                                                                                                                 \
    extern "C" void expert_backward_weights_##NAME(long R, long D, long H, long first, long end, const T* x,          \
                                                   const T* g, const T* gp, const T* hidden, T* gw1, T* gw2,          \
                                                   T* gw3) {                                                          \
        backward_weights(R, D, H, first, end, x, g, gp, hidden, gw1, gw2, gw3);                                       \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
