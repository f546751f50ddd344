/* Causal attention of sequences that lie end to end in one row of tokens, and of which several may share a prompt:
   each token looks at its prompt and at what came before it in its own sequence, of that at the last `window` tokens
   (0 = all). query and result [tokens][heads][size], key and value [tokens][key heads][size], heads that share a key
   head side by side. The scores of a few tokens at a time are all that exists. Float32, contiguous, size a multiple
   of 8. */

#include "simd.h"

typedef struct {
    int heads, key_heads, size, tokens, window, longest; /* longest: keys of any sequence */
    float scaling;
} Shape;

/* Tokens [first, first + queries) of the row. Before them come `before` tokens of a prompt, which lies in the row
   from prompt_row on, or, if there is such, at prompts[elsewhere] (and its gradients from prompt_row on, behind those
   of the row). */
typedef struct {
    int64_t first, queries, before, prompt_row, elsewhere;
} Sequence;

/* The keys or values of a sequence that one head reads: a prompt's and its own, `stride` apart. */
typedef struct {
    const float *prompt, *own;
    int before, count;
    long stride;
} Rows;

static inline int up_to_panel(int count) { return (count + PANEL - 1) / PANEL * PANEL; }

static Rows rows_of(const Shape *shape, const Sequence *it, const float *row, const float *const *prompts, int key_head)
{
    const long stride = (long)shape->key_heads * shape->size, place = (long)key_head * shape->size;
    const float *prompt = it->elsewhere < 0 ? row + it->prompt_row * stride : prompts[it->elsewhere];
    return (Rows){prompt + place, row + it->first * stride + place, (int)it->before, (int)(it->before + it->queries),
            stride};
}

static inline const float *row_at(const Rows *rows, int i)
{
    return i < rows->before ? rows->prompt + i * rows->stride : rows->own + (i - rows->before) * rows->stride;
}

/* -> panels of 16 rows, [count / 16][size][16]: to multiply states with every row */
static void by_rows(const Rows *rows, int size, float *panels)
{
    for (int start = 0; start < rows->count; start += PANEL, panels += (long)size * PANEL)
        for (int i = 0; i < PANEL; i++) {
            const float *row = start + i < rows->count ? row_at(rows, start + i) : 0;
            for (int d = 0; d < size; d++)
                panels[d * PANEL + i] = row ? row[d] : 0.0f;
        }
}

/* -> panels of 16 columns, [size / 16][count][16]: to add up rows */
static void by_columns(const Rows *rows, int size, float *panels)
{
    const int wide = up_to_panel(rows->count);
    memset(panels, 0, sizeof(float) * wide * up_to_panel(size));
    for (int start = 0; start < size; start += 8) { /* half a panel */
        float *half = panels + (long)(start / PANEL) * wide * PANEL + start % PANEL;
        for (int i = 0; i < rows->count; i++)
            memcpy(half + (long)i * PANEL, row_at(rows, i) + start, 8 * sizeof(float));
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

/* totals, rows [first, last) of `stride`, += the sum over `rows` of factors [rows][wide] times vectors [rows][size] */
static void add_products(int rows, int first, int last, int size, const float *factors, long wide, const float *vectors,
                         long vector_stride, float *totals, long stride)
{
    for (int d = 0; d < size; d += 8) {
        octet held[ROWS];
        for (int r = 0; r < ROWS; r++)
            held[r] = r < rows ? *(const octet *)(vectors + r * vector_stride + d) : (octet){0};
        for (int i = first; i < last; i++) {
            octet total = *(octet *)(totals + i * stride + d);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) /* rows beyond `rows` are zeros, and their factors are finite */
                total += factors[r * wide + i] * held[r];
            *(octet *)(totals + i * stride + d) = total;
        }
    }
}

/* Where query c of a sequence may look: keys [first, last). */
static inline int last_key(const Sequence *it, int c) { return (int)it->before + c + 1; }
static inline int first_key(const Shape *shape, const Sequence *it, int c)
{
    int first = shape->window ? last_key(it, c) - shape->window : 0;
    return first < 0 ? 0 : first;
}

/* Floats that one worker wants: keys and values in `panels` layouts, and `scores` rows of scores. */
static long workspace_size(const Shape *shape, int panels, int scores)
{
    const long wide = up_to_panel(shape->longest);
    return panels * wide * up_to_panel(shape->size) + scores * (long)ROWS * wide;
}

/* The next task that no worker has: sequences differ in length, so that none is given out beforehand. */
static inline int take(int *next)
{
    int task;
#pragma omp atomic capture
    task = (*next)++;
    return task;
}

/* One query head of one sequence. */
static void head_forward(const Shape *shape, const Sequence *it, int head, const float *key_rows,
                         const float *value_columns,
                         const float *query, float *scores, float *result, float *lses)
{
    const int size = shape->size, wide = up_to_panel((int)(it->before + it->queries)), queries = (int)it->queries;
    const long stride = (long)shape->heads * size, place = it->first * stride + (long)head * size;
    const float scaling = shape->scaling; /* a copy: for all that the compiler knows, a store could change the other */
    for (int c = 0, rows; c < queries; c += rows) {
        rows = tile_rows(queries, c);
        const int seen = up_to_panel(last_key(it, c + rows - 1));
        times(rows, size, query + place + c * stride, stride, key_rows, (long)size * PANEL, seen, scores, wide);
        for (int r = 0; r < rows; r++) {
            float *row = scores + (long)r * wide, total = 0.0f;
            const int from = first_key(shape, it, c + r), to = last_key(it, c + r);
            const float largest = largest_of(to - from, row + from);
            for (int i = from; i < to; i++)
                total += row[i] = exponential((row[i] - largest) * scaling);
            const float inverse = 1.0f / total;
            for (int i = from; i < to; i++)
                row[i] *= inverse;
            memset(row, 0, sizeof(float) * from);
            memset(row + to, 0, sizeof(float) * (seen - to));
            lses[(long)head * shape->tokens + it->first + c + r] = largest * scaling + logf(total);
        }
        times(rows, seen, scores, wide, value_columns, (long)wide * PANEL, size, result + place + c * stride, stride);
    }
}

/* parts: key heads, or heads where there are more threads than the former can keep busy. scratch: threads * (2 *
   longest * size + ROWS * longest) floats, longest and size rounded up to 16; lses [heads][tokens]. */
void attention_forward(int threads, int parts, int heads, int key_heads, int size, int tokens, int window,
                       int longest, float scaling,
             int count, const Sequence *sequences, const float *const *prompt_keys, const float *const *prompt_values,
             const float *query, const float *key, const float *value, float *scratch, float *result, float *lses)
{
    const Shape shape = {heads, key_heads, size, tokens, window, longest, scaling};
    const long packed = (long)up_to_panel(longest) * up_to_panel(size), workspace = workspace_size(&shape, 2, 1);
    int next = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int worker = 0; worker < threads; worker++)
        for (int task; (task = take(&next)) < count * parts;) {
            const Sequence *it = sequences + task / parts;
            const int part = task % parts, key_head = part * key_heads / parts;
            float *key_rows = scratch + worker * workspace, *value_columns = key_rows + packed,
            *scores = value_columns + packed;
            const Rows keys = rows_of(&shape, it, key, prompt_keys, key_head);
            const Rows values = rows_of(&shape, it, value, prompt_values, key_head);
            by_rows(&keys, size, key_rows);
            by_columns(&values, size, value_columns);
            for (int head = heads / parts * part; head < heads / parts * (part + 1); head++)
                head_forward(&shape, it, head, key_rows, value_columns, query, scores, result, lses);
        }
}

/* One query head of one sequence; what the keys and values get is added to grad_key and grad_value, whose rows are
   `grad_stride` apart, the prompt's and its own. */
static void head_backward(const Shape *shape, const Sequence *it, int head, const float *key_rows,
                          const float *value_rows,
                          const float *key_columns, const float *query, const float *result, const float *lses,
                          const float *gradient, float *weights, float *slopes, float *grad_query, float *grad_key,
                          float *grad_value, long grad_stride)
{
    const int size = shape->size, wide = up_to_panel((int)(it->before + it->queries)), queries = (int)it->queries;
    const int before = (int)it->before;
    const long stride = (long)shape->heads * size;
    const long prompt = it->prompt_row * grad_stride, own = (it->first - it->before) * grad_stride;
    const float scaling = shape->scaling; /* a copy: for all that the compiler knows, a store could change the other */
    for (int c = 0, rows; c < queries; c += rows) {
        rows = tile_rows(queries, c);
        const long place = (it->first + c) * stride + (long)head * size;
        const int last = last_key(it, c + rows - 1), seen = up_to_panel(last);
        times(rows, size, query + place, stride, key_rows, (long)size * PANEL, seen, weights, wide);
        times(rows, size, gradient + place, stride, value_rows, (long)size * PANEL, seen, slopes, wide);
        for (int r = 0; r < rows; r++) {
            float *weight = weights + (long)r * wide, *slope = slopes + (long)r * wide, product = 0.0f;
            const int from = first_key(shape, it, c + r), to = last_key(it, c + r);
            const float lse = lses[(long)head * shape->tokens + it->first + c + r];
            for (int d = 0; d < size; d++) /* = the sum of weight * slope */
                product += gradient[place + r * stride + d] * result[place + r * stride + d];
            for (int i = from; i < to; i++) {
                weight[i] = exponential(weight[i] * scaling - lse);
                slope[i] = weight[i] * (slope[i] - product) * scaling;
            }
            memset(weight, 0, sizeof(float) * from);
            memset(slope, 0, sizeof(float) * from);
            memset(weight + to, 0, sizeof(float) * (seen - to));
            memset(slope + to, 0, sizeof(float) * (seen - to));
        }
        times(rows, seen, slopes, wide, key_columns, (long)wide * PANEL, size, grad_query + place, stride);
        const int first = first_key(shape, it, c), middle = last < before ? last : before;
        add_products(rows, first, middle, size, slopes, wide, query + place, stride, grad_key + prompt, grad_stride);
        add_products(rows, first, middle, size, weights, wide, gradient + place, stride, grad_value + prompt,
                     grad_stride);
        const int start = first > before ? first : before;
        add_products(rows, start, last, size, slopes, wide, query + place, stride, grad_key + own, grad_stride);
        add_products(rows, start, last, size, weights, wide, gradient + place, stride, grad_value + own, grad_stride);
    }
}

/* groups [group_count + 1]: where the sequences begin that share one prompt. gradient and grad_query
   [tokens][heads][size]; grad_key and grad_value [tokens, and those of prompts elsewhere][parts][size], parts as
   above. scratch: threads * (3 * longest * size + 2 * ROWS * longest). */
void attention_backward(int threads, int parts, int heads, int key_heads, int size, int tokens, int window,
                        int longest, float scaling,
              int group_count, const int64_t *groups, const Sequence *sequences, const float *const *prompt_keys,
              const float *const *prompt_values, const float *query, const float *key, const float *value,
              const float *result,
              const float *lses, const float *gradient, float *scratch, float *grad_query, float *grad_key,
              float *grad_value)
{
    const Shape shape = {heads, key_heads, size, tokens, window, longest, scaling};
    const long packed = (long)up_to_panel(longest) * up_to_panel(size), workspace = workspace_size(&shape, 3, 2),
                         stride = (long)parts * size;
    int next = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int worker = 0; worker < threads; worker++)
        for (int task; (task = take(&next)) < group_count * parts;) {
            const Sequence *begin = sequences + groups[task / parts], *end = sequences + groups[task / parts + 1];
            const int part = task % parts, key_head = part * key_heads / parts;
            float *key_rows = scratch + worker * workspace, *value_rows = key_rows + packed,
            *key_columns = value_rows + packed;
            float *weights = key_columns + packed, *slopes = weights + (long)ROWS * up_to_panel(longest);
            float *part_key = grad_key + (long)part * size, *part_value = grad_value + (long)part * size;
            /* rows that no tile has filled are multiplied with 0 */
            memset(weights, 0, sizeof(float) * 2 * ROWS * up_to_panel(longest));
            if (begin < end && begin->elsewhere >= 0)
                for (long i = begin->prompt_row; i < begin->prompt_row + begin->before; i++) {
                    memset(part_key + i * stride, 0, sizeof(float) * size);
                    memset(part_value + i * stride, 0, sizeof(float) * size);
                }
            for (const Sequence *it = begin; it < end; it++)
                for (long i = it->first; i < it->first + it->queries; i++) {
                    memset(part_key + i * stride, 0, sizeof(float) * size);
                    memset(part_value + i * stride, 0, sizeof(float) * size);
                }
            for (const Sequence *it = begin; it < end; it++) {
                const Rows keys = rows_of(&shape, it, key, prompt_keys, key_head);
                const Rows values = rows_of(&shape, it, value, prompt_values, key_head);
                by_rows(&keys, size, key_rows);
                by_rows(&values, size, value_rows);
                by_columns(&keys, size, key_columns);
                for (int head = heads / parts * part; head < heads / parts * (part + 1); head++)
                    head_backward(&shape, it, head, key_rows, value_rows, key_columns, query, result, lses, gradient,
                                  weights,
                                  slopes, grad_query, part_key, part_value, stride);
            }
        }
}
