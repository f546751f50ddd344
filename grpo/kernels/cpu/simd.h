/* Vector types, exp, bfloat16 and the matrix tiles that fused_ops.c, attention.c and decode_step.c share. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES /* matrix registers of 16 rows of 64 bytes (AMX) */
#endif

int omp_get_thread_num(void); /* without omp.h, which not every compiler brings */

/* exp(x) within 2 units in the last place, without a call, so that a loop of it becomes vector code: x = n ln 2 + r,
   and exp(r) by the polynomial of Cephes (S. Moshier, netlib.org/cephes). 0 below -87, and at most exp(88). */
static inline float exponential(float exponent)
{
    float x = exponent < -87.0f ? -87.0f : exponent > 88.0f ? 88.0f : exponent;
    float whole = rintf(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return exponent < -87.0f ? 0.0f : sum * power;
}

/* bfloat16: the upper half of a float32, rounded to nearest, ties to even. */
typedef uint16_t bfloat16;

static inline float from_bfloat16(bfloat16 x)
{
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline bfloat16 to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bfloat16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded); /* NaN stays NaN */
}

/* Eight lanes of a vector register (or of two), at any address. */
typedef float octet __attribute__((vector_size(32), aligned(4)));
typedef int32_t octet_mask __attribute__((vector_size(32)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES /* lanes of two octets put together; all but the last two within halves of four lanes */
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#endif
#endif

/* In lanes by hand: the compiler may not reorder comparisons, in which a NaN could hide. */
static inline float largest_of(long count, const float *x)
{
    const octet lowest = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
    octet first = lowest, second = lowest;
    float largest = -INFINITY;
    long i = 0;
    for (; i + 16 <= count; i += 16) {
        octet here = *(const octet *)(x + i), there = *(const octet *)(x + i + 8);
        octet_mask here_is = here > first, there_is = there > second;
        first = (octet)(((octet_mask)here & here_is) | ((octet_mask)first & ~here_is));
        second = (octet)(((octet_mask)there & there_is) | ((octet_mask)second & ~there_is));
    }
    for (; i < count; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (int lane = 0; lane < 8; lane++) {
        largest = first[lane] > largest ? first[lane] : largest;
        largest = second[lane] > largest ? second[lane] : largest;
    }
    return largest;
}

#define PANEL 16 /* outputs that lie side by side in memory */

#ifdef __AVX512F__
#define ROWS 12 /* of one tile: as many sums as there are registers for */
typedef float vector __attribute__((vector_size(64)));
#else
#define ROWS 6
typedef float vector __attribute__((vector_size(32)));
#endif
#define VECTORS (PANEL * sizeof(float) / sizeof(vector))

/* states [rows][inputs], each row `stride` after the one before and each input `step`, times one panel -> sums
   [rows][16]. `rows` and `step` are constants wherever this is inlined. */
static inline __attribute__((always_inline)) void
tile(const int rows, int inputs, const float *states, long stride, const long step, const float *panel,
     float (*sums)[PANEL])
{
    vector total[ROWS][VECTORS] = {0};
    for (int i = 0; i < inputs; i++) {
        const vector *weights = (const vector *)(panel + (long)i * PANEL);
        __builtin_prefetch(panel + (long)(inputs + i) * PANEL, 0, 2); /* of the next panel, while this one is at work */
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (unsigned v = 0; v < VECTORS; v++)
                total[r][v] += states[r * stride + i * step] * weights[v];
    }
    memcpy(sums, total, sizeof(float) * PANEL * rows);
}

static void tile_of(int rows, int inputs, const float *states, long stride, const float *panel, float (*sums)[PANEL])
{
#define CASE(n) case n: tile(n, inputs, states, stride, 1, panel, sums); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* The same of bfloat16 inputs with float32 sums, two inputs at a time: states [rows][pairs], `stride` pairs apart,
   and a panel [pairs][16][2]. */
static inline __attribute__((always_inline)) void
tile_bf16(const int rows, int pairs, const uint32_t *states, long stride, const bfloat16 *panel, float (*sums)[PANEL])
{
#ifdef __AVX512BF16__
    __m512 total[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        total[r] = _mm512_setzero_ps();
    for (int i = 0; i < pairs; i++) {
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(panel + (long)i * 2 * PANEL);
        __builtin_prefetch(panel + (long)(pairs + i) * 2 * PANEL, 0, 2);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            total[r] = _mm512_dpbf16_ps(total[r], (__m512bh)_mm512_set1_epi32((int)states[r * stride + i]), weights);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        _mm512_storeu_ps(sums[r], total[r]);
#else
    memset(sums, 0, sizeof(float) * PANEL * rows);
    for (int i = 0; i < pairs; i++)
        for (int r = 0; r < rows; r++) {
            const uint32_t pair = states[r * stride + i];
            const float even = from_bfloat16((bfloat16)pair), odd = from_bfloat16((bfloat16)(pair >> 16));
            for (int o = 0; o < PANEL; o++) {
                const bfloat16 *weight = panel + ((long)i * PANEL + o) * 2;
                sums[r][o] += even * from_bfloat16(weight[0]) + odd * from_bfloat16(weight[1]);
            }
        }
#endif
}

static inline void tile_bf16_of(int rows, int pairs, const uint32_t *states, long stride, const bfloat16 *panel,
                         float (*sums)[PANEL])
{
#define CASE_BF16(n) case n: tile_bf16(n, pairs, states, stride, panel, sums); break;
    switch (rows) {
        CASE_BF16(1) CASE_BF16(2) CASE_BF16(3) CASE_BF16(4) CASE_BF16(5) CASE_BF16(6)
#if ROWS > 6
        CASE_BF16(7) CASE_BF16(8) CASE_BF16(9) CASE_BF16(10) CASE_BF16(11) CASE_BF16(12)
#endif
    }
}

/* The rows of the tile that starts at `first`: as even as can be, since a tile of few rows keeps the processor
   waiting. */
static int tile_rows(int rows, int first)
{
    int left = rows - first, tiles = (left + ROWS - 1) / ROWS;
    return (left + tiles - 1) / tiles;
}
