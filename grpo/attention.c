/* Causal attention of one sequence whose last `queries` tokens ask: query c sees the keys up to keys - queries + c, and of those
   the last `window` (0 = all). query and result [heads][queries][size], key and value [key heads][keys][size], heads that share a
   key head side by side. The scores of a few queries at a time are all that exists. Float32, contiguous, size a multiple of 8;
   each head is one thread's, its sums always in the same order. */

#include "lanes.h"

typedef struct {
    int heads, key_heads, size, queries, keys, window;
    float scaling;
} Shape;

static inline int up_to_panel(int count) { return (count + PANEL - 1) / PANEL * PANEL; }

/* rows [count][size] -> panels of 16 rows, [count / 16][size][16]: to multiply states with every row */
static void by_rows(int count, int size, const float *rows, float *panels)
{
    for (int start = 0; start < count; start += PANEL, panels += (long)size * PANEL)
        for (int i = 0; i < PANEL; i++)
            for (int d = 0; d < size; d++)
                panels[d * PANEL + i] = start + i < count ? rows[(long)(start + i) * size + d] : 0.0f;
}

/* rows [count][size] -> panels of 16 columns, [size / 16][count][16]: to add up rows */
static void by_columns(int count, int size, const float *rows, float *panels)
{
    memset(panels, 0, sizeof(float) * up_to_panel(count) * up_to_panel(size));
    for (int start = 0; start < size; start += 8) { /* half a panel */
        float *half = panels + (long)(start / PANEL) * up_to_panel(count) * PANEL + start % PANEL;
        for (int i = 0; i < count; i++)
            memcpy(half + (long)i * PANEL, rows + (long)i * size + start, 8 * sizeof(float));
    }
}

/* states [rows][inputs] times the panels up to `outputs` of them -> result, each row `stride` after the one before */
static void times(int rows, int inputs, const float *states, long state_stride, const float *panels, long panel_size,
                  int outputs, float *result, long stride)
{
    float sums[ROWS][PANEL];
    for (int start = 0; start < outputs; start += PANEL, panels += panel_size) {
        int width = outputs - start < PANEL ? outputs - start : PANEL;
        tile_of(rows, inputs, states, state_stride, panels, sums);
        for (int r = 0; r < rows; r++)
            memcpy(result + r * stride + start, sums[r], sizeof(float) * width);
    }
}

/* totals [count][size] += the sum over rows of factors [rows][stride] (the first `count` of each) times vectors [rows][size] */
static void add_products(int rows, int first, int count, int size, const float *factors, long stride, const float *vectors,
                         float *totals)
{
    for (int d = 0; d < size; d += 8) {
        octet held[ROWS];
        for (int r = 0; r < ROWS; r++)
            held[r] = r < rows ? *(const octet *)(vectors + (long)r * size + d) : (octet){0};
        for (int i = first; i < count; i++) {
            octet total = *(octet *)(totals + (long)i * size + d);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) /* rows beyond `rows` are zeros, and their factors are finite */
                total += factors[r * stride + i] * held[r];
            *(octet *)(totals + (long)i * size + d) = total;
        }
    }
}

/* Where query c may look: keys [first, last). */
static inline int last_key(const Shape *shape, int c) { return shape->keys - shape->queries + c + 1; }
static inline int first_key(const Shape *shape, int c)
{
    int first = shape->window ? last_key(shape, c) - shape->window : 0;
    return first < 0 ? 0 : first;
}

/* One query head: result [queries][size] and lses [queries]. */
static void head_forward(const Shape *shape, const float *key_rows, const float *value_columns, const float *query, float *scores,
                         float *result, float *lses)
{
    const int size = shape->size, wide = up_to_panel(shape->keys);
    const float scaling = shape->scaling; /* a copy: for all that the compiler knows, a store could change the other */
    for (int c = 0, rows; c < shape->queries; c += rows) {
        rows = tile_rows(shape->queries, c);
        const int seen = up_to_panel(last_key(shape, c + rows - 1));
        times(rows, size, query + (long)c * size, size, key_rows, (long)size * PANEL, seen, scores, wide);
        for (int r = 0; r < rows; r++) {
            float *row = scores + (long)r * wide, total = 0.0f;
            const int from = first_key(shape, c + r), to = last_key(shape, c + r);
            const float largest = largest_of(to - from, row + from);
            for (int i = from; i < to; i++)
                total += row[i] = exponential((row[i] - largest) * scaling);
            const float inverse = 1.0f / total;
            for (int i = from; i < to; i++)
                row[i] *= inverse;
            memset(row, 0, sizeof(float) * from);
            memset(row + to, 0, sizeof(float) * (seen - to));
            lses[c + r] = largest * scaling + logf(total);
        }
        times(rows, seen, scores, wide, value_columns, (long)wide * PANEL, size, result + (long)c * size, size);
    }
}

/* scratch, in floats: per key head 2 * keys * size, per head ROWS * keys (keys and size rounded up to 16) */
void forward(int threads, int heads, int key_heads, int size, int queries, int keys, int window, float scaling,
             const float *query, const float *key, const float *value, float *scratch, float *result, float *lses)
{
    const Shape shape = {heads, key_heads, size, queries, keys, window, scaling};
    const int wide = up_to_panel(keys), shared = heads / key_heads;
    const long packed = (long)wide * up_to_panel(size), each = (long)queries * size;
    float *key_rows = scratch, *value_columns = key_rows + key_heads * packed, *room = value_columns + key_heads * packed;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int group = 0; group < key_heads; group++) {
            by_rows(keys, size, key + (long)group * keys * size, key_rows + group * packed);
            by_columns(keys, size, value + (long)group * keys * size, value_columns + group * packed);
        }
#pragma omp for schedule(static)
        for (int head = 0; head < heads; head++)
            head_forward(&shape, key_rows + head / shared * packed, value_columns + head / shared * packed, query + head * each,
                         room + (long)head * ROWS * wide, result + head * each, lses + (long)head * queries);
    }
}

/* One query head; what the keys and values get is added to grad_key and grad_value [keys][size]. */
static void head_backward(const Shape *shape, int head, const float *key_rows, const float *value_rows, const float *key_columns,
                          const float *query, const float *result, const float *lses, const float *gradient, float *weights,
                          float *slopes, float *grad_query, float *grad_key, float *grad_value)
{
    const int size = shape->size, wide = up_to_panel(shape->keys);
    const float scaling = shape->scaling; /* a copy: for all that the compiler knows, a store could change the other */
    for (int c = 0, rows; c < shape->queries; c += rows) {
        rows = tile_rows(shape->queries, c);
        const long place = ((long)head * shape->queries + c) * size;
        const int last = last_key(shape, c + rows - 1), seen = up_to_panel(last);
        times(rows, size, query + place, size, key_rows, (long)size * PANEL, seen, weights, wide);
        times(rows, size, gradient + place, size, value_rows, (long)size * PANEL, seen, slopes, wide);
        for (int r = 0; r < rows; r++) {
            float *weight = weights + (long)r * wide, *slope = slopes + (long)r * wide, product = 0.0f;
            const int from = first_key(shape, c + r), to = last_key(shape, c + r);
            const float lse = lses[(long)head * shape->queries + c + r];
            for (int d = 0; d < size; d++) /* = the sum of weight * slope */
                product += gradient[place + r * size + d] * result[place + r * size + d];
            for (int i = from; i < to; i++) {
                weight[i] = exponential(weight[i] * scaling - lse);
                slope[i] = weight[i] * (slope[i] - product) * scaling;
            }
            memset(weight, 0, sizeof(float) * from);
            memset(slope, 0, sizeof(float) * from);
            memset(weight + to, 0, sizeof(float) * (seen - to));
            memset(slope + to, 0, sizeof(float) * (seen - to));
        }
        times(rows, seen, slopes, wide, key_columns, (long)wide * PANEL, size, grad_query + place, size);
        const int first = first_key(shape, c);
        add_products(rows, first, last, size, slopes, wide, query + place, grad_key);
        add_products(rows, first, last, size, weights, wide, gradient + place, grad_value);
    }
}

/* gradient and grad_query [heads][queries][size]; grad_key and grad_value [parts][keys][size], where each part is of as many heads,
   which share a key head: that much can be done at a time. scratch: per key head 3 * keys * size, per part 2 * ROWS * keys. */
void backward(int threads, int parts, int heads, int key_heads, int size, int queries, int keys, int window, float scaling,
              const float *query, const float *key, const float *value, const float *result, const float *lses,
              const float *gradient, float *scratch, float *grad_query, float *grad_key, float *grad_value)
{
    const Shape shape = {heads, key_heads, size, queries, keys, window, scaling};
    const int wide = up_to_panel(keys), shared = heads / key_heads;
    const long packed = (long)wide * up_to_panel(size);
    float *key_rows = scratch, *value_rows = key_rows + key_heads * packed;
    float *key_columns = value_rows + key_heads * packed, *room = key_columns + key_heads * packed;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int group = 0; group < key_heads; group++) {
            by_rows(keys, size, key + (long)group * keys * size, key_rows + group * packed);
            by_rows(keys, size, value + (long)group * keys * size, value_rows + group * packed);
            by_columns(keys, size, key + (long)group * keys * size, key_columns + group * packed);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < parts; part++) {
            float *weights = room + (long)part * 2 * ROWS * wide, *slopes = weights + (long)ROWS * wide;
            float *part_key = grad_key + (long)part * keys * size, *part_value = grad_value + (long)part * keys * size;
            memset(weights, 0, sizeof(float) * 2 * ROWS * wide); /* rows that no tile has filled are multiplied with 0 */
            memset(part_key, 0, sizeof(float) * keys * size);
            memset(part_value, 0, sizeof(float) * keys * size);
            for (int head = heads / parts * part; head < heads / parts * (part + 1); head++)
                head_backward(&shape, head, key_rows + head / shared * packed, value_rows + head / shared * packed,
                              key_columns + head / shared * packed, query, result, lses, gradient, weights, slopes, grad_query,
                              part_key, part_value);
        }
    }
}
