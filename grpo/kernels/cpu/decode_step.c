/* One decoding step of a Llama-family model for many rows at once: what FusedDecoder (grpo/kernels/decode.py) does,
   in one call.

   Python passes pointers into torch tensors; nothing is allocated here. Weights are in panels of 16 outputs, padded
   with zeros: float32 [outputs / 16][inputs][16], or bfloat16 [outputs / 16][inputs / 2][16][2]. A panel is read once
   from memory and stays in the nearest cache while every row is multiplied with it. With bfloat16 panels, the inputs
   of products and the cached keys and values are rounded to bfloat16; sums, norms and attention are float32. The sums
   of a row are added up in the same order whatever rows are beside it and however many threads there are, so that a
   completion does not depend on them, to the last bit. */

#include "simd.h"

#define MAX_HEAD_SIZE 512 /* with bfloat16 panels */

typedef struct {
    const float *norm;
    const void *qkv;
    const float *qkv_bias, *head_norm;
    const void *out;
    const float *mlp_norm;
    const void *gate, *up, *down;
    float *keys, *values; /* [slots][key heads][length][head size] */
} Layer;

typedef struct {
    const Layer *layers;
    const float *embedding, *norm;
    const float *rotations; /* RoPE: [position][head size / 2] complex numbers */
    float epsilon, scaling;
    /* narrow: panels and the states they meet are bfloat16 */
    int32_t layer_count, hidden, intermediate_size, heads, key_heads, head_size, length, threads, narrow;
} Model;

/* The first `count` states of a row as bfloat16, in the first half of the row's memory. */
static void narrow_row(int count, float *row)
{
    bfloat16 *result = (bfloat16 *)row;
    for (int start = 0; start < count; start += 64) {
        bfloat16 part[64];
        const int width = count - start < 64 ? count - start : 64;
        for (int i = 0; i < width; i++)
            part[i] = to_bfloat16(row[start + i]);
        memcpy(result + start, part, sizeof(bfloat16) * width);
    }
}

#ifdef TILES
/* Whether this process may use matrix registers, for whose contents the kernel must reserve memory. */
static int may_use_tiles(void)
{
    static int granted = -1;
    if (granted < 0)
        granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

/* Configure the matrix registers of this thread: 16 rows, but registers 4 and 6 have `rest` rows. */
static void set_tiles(int rest)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) shape = {1};
    for (int t = 0; t < 8; t++) {
        shape.bytes[t] = 64;
        shape.rows[t] = t == 4 || t == 6 ? rest : 16;
    }
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc 12 believes that only the first bytes are read */
    _tile_loadconfig(&shape);
}

/* 32 rows, `stride` pairs apart, times two panels -> sums [32][16] of each. Of each row, 32 inputs are added at a time,
   in order, as in `multiply_rest`. Registers have literal numbers, since compilers paste them into instructions. */
static void multiply_32(int pairs, const uint32_t *states, long stride, const bfloat16 *one, const bfloat16 *other,
                        float (*sums)[PANEL], float (*others)[PANEL])
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < pairs; i += 16) {
        _tile_loadd(4, states + i, stride * 4);
        _tile_loadd(6, one + (long)i * 2 * PANEL, 64);
        _tile_loadd(5, states + 16 * stride + i, stride * 4);
        _tile_loadd(7, other + (long)i * 2 * PANEL, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums[16], 64);
    _tile_stored(2, others, 64);
    _tile_stored(3, others[16], 64);
}

/* At most 32 rows times one panel: 16, 16 and the rest, for which the registers are configured. */
static void multiply_rest(int rows, int pairs, const uint32_t *states, long stride, const bfloat16 *panel,
                          float (*sums)[PANEL])
{
    const int whole = rows / 16, rest = rows % 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(4);
    for (int i = 0; i < pairs; i += 16) {
        _tile_loadd(7, panel + (long)i * 2 * PANEL, 64);
        if (whole > 0) {
            _tile_loadd(5, states + i, stride * 4);
            _tile_dpbf16ps(0, 5, 7);
        }
        if (whole > 1) {
            _tile_loadd(5, states + 16 * stride + i, stride * 4);
            _tile_dpbf16ps(1, 5, 7);
        }
        if (rest) {
            _tile_loadd(6, states + whole * 16 * stride + i, stride * 4);
            _tile_dpbf16ps(4, 6, 7);
        }
    }
    if (whole > 0)
        _tile_stored(0, sums, 64);
    if (whole > 1)
        _tile_stored(1, sums[16], 64);
    if (rest)
        _tile_stored(4, sums[whole * 16], 64);
}
#endif

/* How a product is computed: of float32, of bfloat16 with vectors, of bfloat16 with matrix registers. */
enum { WIDE, NARROW, MATRIX };

#define MOST_ROWS 32 /* multiplied together */

static int way_of(int narrow, int inputs)
{
#ifdef TILES
    if (narrow && inputs % 32 == 0 && may_use_tiles())
        return MATRIX;
#endif
    return narrow ? NARROW : WIDE;
}

/* The number of rows that are multiplied together, from `first` on, for which the registers are prepared. */
static int next_rows(int way, int rows, int first)
{
    if (way != MATRIX)
        return tile_rows(rows, first);
    const int count = rows - first < MOST_ROWS ? rows - first : MOST_ROWS;
#ifdef TILES
    set_tiles(count % 16 ? count % 16 : 16);
#endif
    return count;
}

/* Called by every thread after its last product. */
static void finish(int way)
{
#ifdef TILES
    if (way == MATRIX)
        _tile_release();
#endif
}

/* `next_rows` rows, `stride` floats apart, times one panel or, unless `other` is null, two -> sums [rows][16] */
static void multiply_tile(int way, int rows, int inputs, const float *states, long stride, const void *one,
                                 const void *other, float (*sums)[PANEL], float (*others)[PANEL])
{
#ifdef TILES
    if (way == MATRIX && rows == MOST_ROWS && other) {
        multiply_32(inputs / 2, (const uint32_t *)states, stride, one, other, sums, others);
        return;
    }
    if (way == MATRIX)
        multiply_rest(rows, inputs / 2, (const uint32_t *)states, stride, one, sums);
#endif
    if (way == NARROW)
        tile_bf16_of(rows, inputs / 2, (const uint32_t *)states, stride, one, sums);
    if (way == WIDE)
        tile_of(rows, inputs, states, stride, one, sums);
    if (other)
        multiply_tile(way, rows, inputs, states, stride, other, 0, others, 0);
}

/* The panel that starts at output `start` */
static inline const void *panel_at(int narrow, int inputs, const void *panels, int start)
{
    return (const char *)panels + (long)start * inputs * (narrow ? sizeof(bfloat16) : sizeof(float));
}

/* sums [16] += the first `width` of `more` */
static inline void plus(int width, float *sums, const float *more)
{
    if (width == PANEL)
        for (int o = 0; o < PANEL; o++)
            sums[o] += more[o];
    else
        for (int o = 0; o < width; o++)
            sums[o] += more[o];
}

/* Sums of rows -> result, whose rows are `outputs` apart: set or added to */
static inline void write_sums(int rows, int width, float (*sums)[PANEL], const float *bias, float *result, long outputs,
                         int add)
{
    for (int r = 0; r < rows; r++) {
        float *target = result + r * outputs;
        if (bias)
            plus(width, sums[r], bias);
        if (add)
            plus(width, sums[r], target);
        if (width == PANEL) /* one vector */
            memcpy(target, sums[r], sizeof sums[r]);
        else
            memcpy(target, sums[r], sizeof(float) * width);
    }
}

/* states [rows][inputs] times all panels, shared among the threads -> result [rows][outputs], set or added to. */
static void gemm(int narrow, int rows, int inputs, int outputs, const float *states, long stride, const void *panels,
                 const float *bias, float *result, int add)
{
    const int way = way_of(narrow, inputs);
    /* With matrix registers, a few panels at a time: results of many rows are then written in longer pieces. */
    const int group = way != MATRIX ? PANEL : rows > MOST_ROWS ? 8 * PANEL : 2 * PANEL;
#pragma omp for schedule(static)
    for (int begin = 0; begin < outputs; begin += group) {
        const int end = outputs - begin < group ? outputs : begin + group;
        float sums[MOST_ROWS][PANEL], others[MOST_ROWS][PANEL];
        for (int first = 0, count; first < rows; first += count) {
            count = next_rows(way, rows, first);
            for (int start = begin; start < end; start += 2 * PANEL) {
                const int next = start + PANEL, width = end - start < PANEL ? end - start : PANEL;
                const float *from = states + first * stride;
                float *to = result + (long)first * outputs + start;
                multiply_tile(way, count, inputs, from, stride, panel_at(narrow, inputs, panels, start),
                              next < end ? panel_at(narrow, inputs, panels, next) : 0, sums, others);
                write_sums(count, width, sums, bias ? bias + start : 0, to, outputs, add);
                if (next < end)
                    write_sums(count, end - next < PANEL ? end - next : PANEL, others, bias ? bias + next : 0, to + PANEL,
                          outputs, add);
            }
        }
    }
    finish(way);
}

/* silu(states times gate) * (states times up) -> result [rows][outputs] (arXiv 2002.05202) */
static void gated_gemm(int narrow, int rows, int inputs, int outputs, const float *states, const void *gate,
                       const void *up, float *result)
{
    const int way = way_of(narrow, inputs);
#pragma omp for schedule(static)
    for (int start = 0; start < outputs; start += PANEL) {
        int width = outputs - start < PANEL ? outputs - start : PANEL;
        float gates[MOST_ROWS][PANEL], ups[MOST_ROWS][PANEL];
        for (int first = 0, count; first < rows; first += count) {
            count = next_rows(way, rows, first);
            multiply_tile(way, count, inputs, states + (long)first * inputs, inputs,
                          panel_at(narrow, inputs, gate, start), panel_at(narrow, inputs, up, start), gates, ups);
            for (int r = 0; r < count; r++) {
                for (int o = 0; o < PANEL; o++)
                    gates[r][o] = gates[r][o] / (1.0f + exponential(-gates[r][o])) * ups[r][o];
                float *row = result + (long)(first + r) * outputs;
                if (narrow)
                    for (int o = 0; o < width; o++)
                        ((bfloat16 *)row)[start + o] = to_bfloat16(gates[r][o]);
                else
                    memcpy(row + start, gates[r], sizeof(float) * width);
            }
        }
    }
    finish(way);
}

/* RMSNorm (arXiv 1910.07467); the weight carries the factor sqrt(size). */
static void normalize(int size, float epsilon, const float *state, const float *weight, float *result)
{
    float sum = 0.0f;
    for (int i = 0; i < size; i++)
        sum += state[i] * state[i];
    float scale = 1.0f / sqrtf(sum + size * epsilon);
    for (int i = 0; i < size; i++)
        result[i] = state[i] * scale * weight[i];
}

/* RMSNorm of one query or key head, where the model has one, and RoPE (arXiv 2104.09864): in place. */
static void place(const Model *model, const Layer *layer, int head, const float *rotation, float *state)
{
    int size = model->head_size;
    if (layer->head_norm)
        normalize(size, model->epsilon, state, layer->head_norm + (long)head * size, state);
    for (int i = 0; i < size; i += 2) {
        float real = state[i], imaginary = state[i + 1];
        state[i] = real * rotation[i] - imaginary * rotation[i + 1];
        state[i + 1] = real * rotation[i + 1] + imaginary * rotation[i];
    }
}

/* Number n of the result: the sum of row n of 8. */
static inline octet sums_of(const octet *row)
{
#ifdef SHUFFLES
    octet half[4], quarter[2];
    for (int r = 0; r < 4; r++)
        half[r] = LOW_HALVES(row[r], row[r + 4]) + HIGH_HALVES(row[r], row[r + 4]);
    for (int r = 0; r < 2; r++)
        quarter[r] = LOW(half[2 * r], half[2 * r + 1]) + HIGH(half[2 * r], half[2 * r + 1]);
    return LOW_PAIRS(quarter[0], quarter[1]) + HIGH_PAIRS(quarter[0], quarter[1]);
#else
    octet sums;
    for (int r = 0; r < 8; r++)
        sums[r] = ((row[r][0] + row[r][4]) + (row[r][2] + row[r][6])) +
                  ((row[r][1] + row[r][5]) + (row[r][3] + row[r][7]));
    return sums;
#endif
}

/* Numbers `place` to `place` + 7 of the cache. `narrow` is a constant wherever this is inlined, as below. */
static inline __attribute__((always_inline)) octet cached(const int narrow, const void *numbers, long place)
{
    if (!narrow)
        return *(const octet *)((const float *)numbers + place);
    uint32_t bits[8];
    octet wide;
    for (int lane = 0; lane < 8; lane++)
        bits[lane] = (uint32_t)((const bfloat16 *)numbers)[place + lane] << 16;
    memcpy(&wide, bits, sizeof wide);
    return wide;
}

/* A key or value -> the cache */
static void cache(int narrow, int size, const float *state, void *numbers, long place)
{
    if (!narrow)
        memcpy((float *)numbers + place, state, sizeof(float) * size);
    else
        for (int i = 0; i < size; i++)
            ((bfloat16 *)numbers)[place + i] = to_bfloat16(state[i]);
}

/* `count` octets, a constant wherever this is inlined, of the weighted sum of `seen` values from `place` on -> result,
   divided by the total */
static inline __attribute__((always_inline)) void
weighted(const int narrow, const int count, int seen, int size, const float *weights, const void *values, long place,
         float total, float *result)
{
    octet even[4] = {0}, odd[4] = {0}; /* two sums: the next one need not wait for the one before */
    int position = 0;
    for (; position + 1 < seen; position += 2, place += 2 * size)
        for (int i = 0; i < count; i++) {
            even[i] += weights[position] * cached(narrow, values, place + 8 * i);
            odd[i] += weights[position + 1] * cached(narrow, values, place + size + 8 * i);
        }
    for (int i = 0; i < count; i++) {
        if (position < seen)
            even[i] += weights[position] * cached(narrow, values, place + 8 * i);
        *(octet *)(result + 8 * i) = (even[i] + odd[i]) / total;
    }
}

/* One query head against `seen` keys and values from `place` on -> result [head size]. `weights` is a workspace of
   `seen` floats, rounded up to 8. */
static inline __attribute__((always_inline)) void
attend(const int narrow, const float *query, const void *keys, const void *values, long place, int seen, int size,
       float scaling, float *weights, float *result)
{
    float total = 0.0f;
    for (int first = 0; first < seen; first += 8) { /* scores of 8 at a time, the last key again and again at the end */
        octet rows[8];
        for (int r = 0; r < 8; r++) {
            const int position = first + r < seen ? first + r : seen - 1;
            rows[r] = (octet){0};
            for (int i = 0; i < size; i += 8)
                rows[r] += *(const octet *)(query + i) * cached(narrow, keys, place + (long)position * size + i);
        }
        *(octet *)(weights + first) = sums_of(rows) * scaling;
    }
    float largest = largest_of(seen, weights);
    for (int position = 0; position < seen; position++)
        weights[position] = exponential(weights[position] - largest);
    for (int position = 0; position < seen; position++)
        total += weights[position];
    int i = 0;
    for (; i + 32 <= size; i += 32)
        weighted(narrow, 4, seen, size, weights, values, place + i, total, result + i);
    for (; i < size; i += 8)
        weighted(narrow, 1, seen, size, weights, values, place + i, total, result + i);
}

static void attend_wide(const float *query, const Layer *layer, long place, int seen, int size, float scaling,
                        float *weights, float *result)
{
    attend(0, query, layer->keys, layer->values, place, seen, size, scaling, weights, result);
}

/* The result as bfloat16 */
static void attend_narrow(const float *query, const Layer *layer, long place, int seen, int size, float scaling,
                          float *weights, bfloat16 *result)
{
    float wide[MAX_HEAD_SIZE];
    attend(1, query, layer->keys, layer->values, place, seen, size, scaling, weights, wide);
    for (int i = 0; i < size; i++)
        result[i] = to_bfloat16(wide[i]);
}

/* weight [outputs][inputs] -> panels, the last one filled up with zeros */
void pack(int threads, int inputs, int outputs, const float *weight, float *panels)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int start = 0; start < outputs; start += PANEL)
        for (int i = 0; i < inputs; i++)
            for (int o = 0; o < PANEL; o++)
                panels[((long)start * inputs) + (long)i * PANEL + o] =
                    start + o < outputs ? weight[(long)(start + o) * inputs + i] : 0.0f;
}

/* weight [outputs][inputs], inputs even -> bfloat16 panels [outputs / 16][inputs / 2][16][2] */
void pack_bf16(int threads, int inputs, int outputs, const float *weight, bfloat16 *panels)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int start = 0; start < outputs; start += PANEL)
        for (int first = 0; first < inputs; first += 2 * PANEL) { /* 32 inputs of 16 outputs stay in registers */
            const int width = inputs - first < 2 * PANEL ? inputs - first : 2 * PANEL;
            bfloat16 part[PANEL][2 * PANEL] = {{0}};
            for (int o = 0; o < PANEL && start + o < outputs; o++) {
                const float *row = weight + (long)(start + o) * inputs + first;
                if (width == 2 * PANEL)
                    for (int i = 0; i < 2 * PANEL; i++)
                        part[o][i] = to_bfloat16(row[i]);
                else
                    for (int i = 0; i < width; i++)
                        part[o][i] = to_bfloat16(row[i]);
            }
            uint32_t pairs[PANEL][PANEL], turned[PANEL][PANEL];
            memcpy(pairs, part, sizeof pairs);
            for (int i = 0; i < PANEL; i++)
                for (int o = 0; o < PANEL; o++)
                    turned[i][o] = pairs[o][i];
            memcpy(panels + (long)start * inputs + (long)first * PANEL, turned, (long)width / 2 * PANEL * 4);
        }
}

/* A product alone, for prompts and the head. With bfloat16 panels, states are bfloat16 [rows][inputs]. */
void multiply(int threads, int narrow, int rows, int inputs, int outputs, const void *states, const void *panels,
              const float *bias, float *result)
{
#pragma omp parallel num_threads(threads)
    gemm(narrow, rows, inputs, outputs, states, narrow ? inputs / 2 : inputs, panels, bias, result, 0);
}

/* tokens and positions [rows] -> hidden [rows][hidden]; each row's key and value are written at its position.
   scratch: floats, rows * (hidden + (heads + 2 key heads) * head size + heads * head size + intermediate_size), and
   per thread length rounded up to 8 */
void step(const Model *model, int rows, const int64_t *tokens, const int64_t *positions, float *hidden, float *scratch)
{
    const int width = model->hidden, intermediate_size = model->intermediate_size, size = model->head_size,
    length = model->length;
    const int shared = model->heads / model->key_heads, mixed_width = (model->heads + 2 * model->key_heads) * size;
    const int attended_width = model->heads * size, narrow = model->narrow;
    float *normed = scratch, *mixed = normed + (long)rows * width, *attended = mixed + (long)rows * mixed_width;
    float *gated = attended + (long)rows * attended_width, *weights = gated + (long)rows * intermediate_size;

#pragma omp parallel num_threads(model->threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++)
            memcpy(hidden + (long)row * width, model->embedding + tokens[row] * width, sizeof(float) * width);
        for (int index = 0; index < model->layer_count; index++) {
            const Layer *layer = model->layers + index;
#pragma omp for schedule(static)
            for (int row = 0; row < rows; row++) {
                normalize(width, model->epsilon, hidden + (long)row * width, layer->norm, normed + (long)row * width);
                if (narrow)
                    narrow_row(width, normed + (long)row * width);
            }
            gemm(narrow, rows, width, mixed_width, normed, width, layer->qkv, layer->qkv_bias, mixed, 0);
#pragma omp for schedule(dynamic) collapse(2) /* rows differ in length */
            for (int row = 0; row < rows; row++)
                for (int group = 0; group < model->key_heads; group++) {
                    const float *rotation = model->rotations + positions[row] * size;
                    float *mine = weights + (long)omp_get_thread_num() * ((length + 7) / 8 * 8);
                    float *target = attended + (long)row * attended_width;
                    float *queries = mixed + (long)row * mixed_width + group * shared * size;
                    float *key = mixed + (long)row * mixed_width + (model->heads + group) * size;
                    const long first = ((long)row * model->key_heads + group) * length * size;
                    const int seen = (int)positions[row] + 1;
                    place(model, layer, model->heads + group, rotation, key);
                    cache(narrow, size, key, layer->keys, first + positions[row] * size);
                    cache(narrow, size, key + model->key_heads * size, layer->values, first + positions[row] * size);
                    for (int head = group * shared; head < (group + 1) * shared; head++, queries += size) {
                        place(model, layer, head, rotation, queries);
                        if (narrow)
                            attend_narrow(queries, layer, first, seen, size, model->scaling, mine,
                                          (bfloat16 *)target + head * size);
                        else
                            attend_wide(queries, layer, first, seen, size, model->scaling, mine, target + head * size);
                    }
                }
            gemm(narrow, rows, attended_width, width, attended, attended_width, layer->out, 0, hidden, 1);
#pragma omp for schedule(static)
            for (int row = 0; row < rows; row++) {
                normalize(width, model->epsilon, hidden + (long)row * width, layer->mlp_norm,
                          normed + (long)row * width);
                if (narrow)
                    narrow_row(width, normed + (long)row * width);
            }
            gated_gemm(narrow, rows, width, intermediate_size, normed, layer->gate, layer->up, gated);
            gemm(narrow, rows, intermediate_size, width, gated, intermediate_size, layer->down, 0, hidden, 1);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++)
            normalize(width, model->epsilon, hidden + (long)row * width, model->norm, hidden + (long)row * width);
    }
}
