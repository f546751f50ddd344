/* One decoding step of a Llama-family model in float32, for many rows at once: what FusedBackbone does, in one call.

   Python hands over pointers into torch tensors (compiled.py); nothing is allocated here. Weights come in panels of
   16 outputs, [outputs / 16][inputs][16], padded with zeros: a panel is read once from memory, and stays in the nearest
   cache while every row is multiplied with it. The sums of a row are added up in the same order whatever rows are
   beside it and however many threads there are, so that a completion does not depend on them, to the last bit. */

#include "../lanes.h"

typedef struct {
    const float *norm, *qkv, *qkv_bias, *head_norm, *out, *mlp_norm, *gate, *up, *down;
    float *keys, *values; /* [slots][key heads][length][head size] */
} Layer;

typedef struct {
    const Layer *layers;
    const float *embedding, *norm;
    const float *turns; /* RoPE: [position][head size / 2] complex numbers */
    float epsilon, scaling;
    int32_t layer_count, hidden, inside, heads, key_heads, head_size, length, threads;
} Model;

/* states [rows][inputs] times all panels, shared among the threads -> result [rows][outputs], set or added to. */
static void product(int rows, int inputs, int outputs, const float *states, const float *panels, const float *bias,
                    float *result, int add)
{
#pragma omp for schedule(static)
    for (int start = 0; start < outputs; start += PANEL) {
        int width = outputs - start < PANEL ? outputs - start : PANEL;
        float sums[ROWS][PANEL];
        for (int first = 0, count; first < rows; first += count) {
            count = tile_rows(rows, first);
            tile_of(count, inputs, states + (long)first * inputs, inputs, panels + (long)start * inputs, sums);
            for (int r = 0; r < count; r++) {
                float *target = result + (long)(first + r) * outputs + start;
                for (int o = 0; o < width; o++)
                    target[o] = sums[r][o] + (bias ? bias[start + o] : 0.0f) + (add ? target[o] : 0.0f);
            }
        }
    }
}

/* silu(states times gate) * (states times up) -> result [rows][outputs] (arXiv 2002.05202) */
static void gated_product(int rows, int inputs, int outputs, const float *states, const float *gate, const float *up,
                          float *result)
{
#pragma omp for schedule(static)
    for (int start = 0; start < outputs; start += PANEL) {
        int width = outputs - start < PANEL ? outputs - start : PANEL;
        float gates[ROWS][PANEL], ups[ROWS][PANEL];
        for (int first = 0, count; first < rows; first += count) {
            count = tile_rows(rows, first);
            tile_of(count, inputs, states + (long)first * inputs, inputs, gate + (long)start * inputs, gates);
            tile_of(count, inputs, states + (long)first * inputs, inputs, up + (long)start * inputs, ups);
            for (int r = 0; r < count; r++) {
                for (int o = 0; o < PANEL; o++)
                    gates[r][o] = gates[r][o] / (1.0f + exponential(-gates[r][o])) * ups[r][o];
                memcpy(result + (long)(first + r) * outputs + start, gates[r], sizeof(float) * width);
            }
        }
    }
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
static void place(const Model *model, const Layer *layer, int head, const float *turn, float *state)
{
    int size = model->head_size;
    if (layer->head_norm)
        normalize(size, model->epsilon, state, layer->head_norm + (long)head * size, state);
    for (int i = 0; i < size; i += 2) {
        float real = state[i], imaginary = state[i + 1];
        state[i] = real * turn[i] - imaginary * turn[i + 1];
        state[i + 1] = real * turn[i + 1] + imaginary * turn[i];
    }
}

/* One query head against `seen` keys and values -> result [head size]. `weights` has room for `seen` numbers. */
static void attend(const float *query, const float *keys, const float *values, int seen, int size, float scaling,
                   float *weights, float *result)
{
    float total = 0.0f;
    for (int position = 0; position < seen; position++) {
        octet sum = {0};
        for (int i = 0; i < size; i += 8)
            sum += *(const octet *)(query + i) * *(const octet *)(keys + (long)position * size + i);
        float score = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
        weights[position] = score * scaling;
    }
    float largest = largest_of(seen, weights);
    for (int position = 0; position < seen; position++)
        weights[position] = exponential(weights[position] - largest);
    for (int position = 0; position < seen; position++)
        total += weights[position];
    for (int i = 0; i < size; i += 8) {
        octet even = {0}, odd = {0};
        int position = 0;
        for (; position + 1 < seen; position += 2) {
            even += weights[position] * *(const octet *)(values + (long)position * size + i);
            odd += weights[position + 1] * *(const octet *)(values + (long)(position + 1) * size + i);
        }
        if (position < seen)
            even += weights[position] * *(const octet *)(values + (long)position * size + i);
        *(octet *)(result + i) = (even + odd) / total;
    }
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

/* Product alone, for prompts and the head. */
void multiply(int threads, int rows, int inputs, int outputs, const float *states, const float *panels,
              const float *bias, float *result)
{
#pragma omp parallel num_threads(threads)
    product(rows, inputs, outputs, states, panels, bias, result, 0);
}

/* tokens and positions [rows] -> hidden [rows][hidden]; each row's key and value are written at its position.
   scratch: floats, rows * (hidden + (heads + 2 key heads) * head size + heads * head size + inside) + heads * rows * length */
void step(const Model *model, int rows, const int64_t *tokens, const int64_t *positions, float *hidden, float *scratch)
{
    const int width = model->hidden, inside = model->inside, size = model->head_size, length = model->length;
    const int shared = model->heads / model->key_heads, mixed_width = (model->heads + 2 * model->key_heads) * size;
    const int attended_width = model->heads * size;
    float *normed = scratch, *mixed = normed + (long)rows * width, *attended = mixed + (long)rows * mixed_width;
    float *gated = attended + (long)rows * attended_width, *weights = gated + (long)rows * inside;

#pragma omp parallel num_threads(model->threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++)
            memcpy(hidden + (long)row * width, model->embedding + tokens[row] * width, sizeof(float) * width);
        for (int index = 0; index < model->layer_count; index++) {
            const Layer *layer = model->layers + index;
#pragma omp for schedule(static)
            for (int row = 0; row < rows; row++)
                normalize(width, model->epsilon, hidden + (long)row * width, layer->norm, normed + (long)row * width);
            product(rows, width, mixed_width, normed, layer->qkv, layer->qkv_bias, mixed, 0);
#pragma omp for schedule(static) collapse(2)
            for (int row = 0; row < rows; row++)
                for (int group = 0; group < model->key_heads; group++) {
                    const float *turn = model->turns + positions[row] * size;
                    float *queries = mixed + (long)row * mixed_width + group * shared * size;
                    float *key = mixed + (long)row * mixed_width + (model->heads + group) * size;
                    float *value = key + model->key_heads * size;
                    long cached = ((long)row * model->key_heads + group) * length;
                    place(model, layer, model->heads + group, turn, key);
                    memcpy(layer->keys + (cached + positions[row]) * size, key, sizeof(float) * size);
                    memcpy(layer->values + (cached + positions[row]) * size, value, sizeof(float) * size);
                    for (int s = 0; s < shared; s++) {
                        int head = group * shared + s;
                        place(model, layer, head, turn, queries + s * size);
                        attend(queries + s * size, layer->keys + cached * size, layer->values + cached * size,
                               (int)positions[row] + 1, size, model->scaling,
                               weights + ((long)row * model->heads + head) * length,
                               attended + (long)row * attended_width + head * size);
                    }
                }
            product(rows, attended_width, width, attended, layer->out, 0, hidden, 1);
#pragma omp for schedule(static)
            for (int row = 0; row < rows; row++)
                normalize(width, model->epsilon, hidden + (long)row * width, layer->mlp_norm, normed + (long)row * width);
            gated_product(rows, width, inside, normed, layer->gate, layer->up, gated);
            product(rows, inside, width, gated, layer->down, 0, hidden, 1);
        }
#pragma omp for schedule(static)
        for (int row = 0; row < rows; row++)
            normalize(width, model->epsilon, hidden + (long)row * width, model->norm, hidden + (long)row * width);
    }
}
