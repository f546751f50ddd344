/* A whole decoder layer of the Llama family, forward and backward, from the parts in fused_ops.c, gemm.c and attention.c: for a row of
   packed tokens, so that between its steps nothing else runs and no thread waits for one that is busy in Python.

       middle = hidden + out(attention(RoPE(q, k), v))      q, k, v = projections of norm(hidden)
       result = middle + down(silu(gate) * up)              gate, up = projections of norm(middle)

   Of the inside is kept what the fields of Layer name; the norms and the gated product are formed again on the way back. Weights
   are [outputs][inputs]. Nothing is allocated. */

#include "attention.c"
#include "fused_ops.c"
#include "gemm.c"

typedef struct {
    int32_t tokens, width, inside, heads, key_heads, size, window, longest, sequence_count, group_count;
    float epsilon, mlp_epsilon, scaling;
    const Sequence *sequences;
    const int64_t *groups;
    const float *const *prompt_keys, *const *prompt_values;
    const float *norm, *projections[3], *biases[3], *out, *mlp_norm, *gate, *up, *down; /* a bias may be null */
    const float *cosines, *sines, *hidden;
    float *states[3];  /* query, key, value: [tokens][heads or key heads][size], query and key turned */
    float *attended;   /* as query */
    float *lses, *middle, *gates, *ups; /* [heads][tokens], [tokens][width], [tokens][inside] twice */
} Layer;

/* Where gradients of weights are to be added; null where none are wanted. */
typedef struct {
    float *norm, *projections[3], *biases[3], *out, *mlp_norm, *gate, *up, *down;
} Gradients;

static void copy(int threads, long count, const float *from, float *to)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; share++) {
        const long first = count * share / threads, last = count * (share + 1) / threads;
        memcpy(to + first, from + first, sizeof(float) * (last - first));
    }
}

/* totals [columns] += the sum of rows [rows][columns] */
static void add_rows(int rows, int columns, const float *numbers, float *totals)
{
    const long next = columns;
    int row = 0;
    for (; row + 4 <= rows; row += 4, numbers += 4 * next) /* four at a time: fewer roundings one after the other */
        for (int i = 0; i < columns; i++)
            totals[i] += (numbers[i] + numbers[i + next]) + (numbers[i + 2 * next] + numbers[i + 3 * next]);
    for (; row < rows; row++, numbers += next)
        for (int i = 0; i < columns; i++)
            totals[i] += numbers[i];
}

/* grad_weight [outputs][inputs] += gradient [tokens][outputs], turned, times states [tokens][inputs] */
static void learn(int threads, int tokens, int outputs, int inputs, const float *gradient, const float *states, float *room,
                  float *grad_weight)
{
    if (grad_weight)
        product(threads, outputs, inputs, tokens, 1, 0, 1, gradient, states, 0, room, grad_weight);
}

/* scratch: floats, tokens * (width + inside + 1); room and attention_room: what products and attention want */
void layer_forward(int threads, const Layer *it, float *scratch, float *room, float *attention_room, float *result)
{
    const int tokens = it->tokens, width = it->width, inside = it->inside, size = it->size;
    const int outputs[] = {it->heads * size, it->key_heads * size, it->key_heads * size};
    float *normed = scratch, *gated = normed + (long)tokens * width, *scales = gated + (long)tokens * inside;
    norm(threads, tokens, width, it->epsilon, it->hidden, it->norm, scales, normed);
    for (int i = 0; i < 3; i++)
        product(threads, tokens, outputs[i], width, 0, 1, 0, normed, it->projections[i], it->biases[i], room, it->states[i]);
    rotate(threads, tokens, it->heads, size, 0, it->states[0], it->cosines, it->sines, it->states[0]);
    rotate(threads, tokens, it->key_heads, size, 0, it->states[1], it->cosines, it->sines, it->states[1]);
    /* As in compiled_attention.py: one task for each key head, or for each head, where that keeps more threads busy. */
    const int parts = it->sequence_count * it->key_heads >= 2 * threads ? it->key_heads : it->heads;
    attention_forward(threads, parts, it->heads, it->key_heads, size, tokens, it->window, it->longest, it->scaling,
                      it->sequence_count, it->sequences, it->prompt_keys, it->prompt_values, it->states[0], it->states[1],
                      it->states[2], attention_room, it->attended, it->lses);
    copy(threads, (long)tokens * width, it->hidden, it->middle);
    product(threads, tokens, width, outputs[0], 0, 1, 1, it->attended, it->out, 0, room, it->middle);
    norm(threads, tokens, width, it->mlp_epsilon, it->middle, it->mlp_norm, scales, normed);
    product(threads, tokens, inside, width, 0, 1, 0, normed, it->gate, 0, room, it->gates);
    product(threads, tokens, inside, width, 0, 1, 0, normed, it->up, 0, room, it->ups);
    swiglu(threads, (long)tokens * inside, it->gates, it->ups, gated);
    copy(threads, (long)tokens * width, it->middle, result);
    product(threads, tokens, width, inside, 0, 1, 1, gated, it->down, 0, room, result);
}

/* From the gradient of the result to grad_middle [tokens][width], and of attention to grad_query, grad_key and grad_value (as
   attention.c gives them, `parts` of each). scratch: floats, tokens * (2 width + 2 inside + heads * size + 1) + threads * width */
void layer_backward(int threads, int parts, const Layer *it, const Gradients *to, const float *gradient, float *scratch,
                    float *room, float *attention_room, float *grad_middle, float *grad_query, float *grad_key, float *grad_value)
{
    const int tokens = it->tokens, width = it->width, inside = it->inside, wide = it->heads * it->size;
    float *normed = scratch, *grad_normed = normed + (long)tokens * width, *first = grad_normed + (long)tokens * width;
    float *second = first + (long)tokens * inside, *grad_attended = second + (long)tokens * inside;
    float *scales = grad_attended + (long)tokens * wide, *shares = scales + tokens;
    swiglu(threads, (long)tokens * inside, it->gates, it->ups, first);
    learn(threads, tokens, width, inside, gradient, first, room, to->down);
    product(threads, tokens, inside, width, 0, 0, 0, gradient, it->down, 0, room, second);
    swiglu_backward(threads, (long)tokens * inside, it->gates, it->ups, second, first, second); /* of gate, of up */
    norm(threads, tokens, width, it->mlp_epsilon, it->middle, it->mlp_norm, scales, normed);
    learn(threads, tokens, inside, width, first, normed, room, to->gate);
    learn(threads, tokens, inside, width, second, normed, room, to->up);
    product(threads, tokens, width, inside, 0, 0, 0, first, it->gate, 0, room, grad_normed);
    product(threads, tokens, width, inside, 0, 0, 1, second, it->up, 0, room, grad_normed);
    memset(shares, 0, sizeof(float) * threads * width);
    norm_backward(threads, tokens, width, it->middle, it->mlp_norm, scales, grad_normed, gradient, grad_middle, shares);
    if (to->mlp_norm)
        add_rows(threads, width, shares, to->mlp_norm);
    learn(threads, tokens, width, wide, grad_middle, it->attended, room, to->out);
    product(threads, tokens, wide, width, 0, 0, 0, grad_middle, it->out, 0, room, grad_attended);
    attention_backward(threads, parts, it->heads, it->key_heads, it->size, tokens, it->window, it->longest, it->scaling,
                       it->group_count, it->groups, it->sequences, it->prompt_keys, it->prompt_values, it->states[0],
                       it->states[1], it->states[2], it->attended, it->lses, grad_attended, attention_room, grad_query,
                       grad_key, grad_value);
}

/* The rest of the way, once grad_key and grad_value [tokens][key heads][size] are all that they will be. grad_query and grad_key are turned
   back in their place. scratch: floats, tokens * (2 width + 1) + threads * width */
void layer_backward_inputs(int threads, const Layer *it, const Gradients *to, float *grad_query, float *grad_key,
                           float *grad_value, const float *grad_middle, float *scratch, float *room, float *grad_hidden)
{
    const int tokens = it->tokens, width = it->width, size = it->size;
    const int outputs[] = {it->heads * size, it->key_heads * size, it->key_heads * size};
    float *gradients[] = {grad_query, grad_key, grad_value};
    float *normed = scratch, *grad_normed = normed + (long)tokens * width, *scales = grad_normed + (long)tokens * width;
    float *shares = scales + tokens;
    rotate(threads, tokens, it->heads, size, 1, grad_query, it->cosines, it->sines, grad_query);
    rotate(threads, tokens, it->key_heads, size, 1, grad_key, it->cosines, it->sines, grad_key);
    norm(threads, tokens, width, it->epsilon, it->hidden, it->norm, scales, normed);
    for (int i = 0; i < 3; i++) {
        learn(threads, tokens, outputs[i], width, gradients[i], normed, room, to->projections[i]);
        if (to->biases[i])
            add_rows(tokens, outputs[i], gradients[i], to->biases[i]);
        product(threads, tokens, width, outputs[i], 0, 0, i > 0, gradients[i], it->projections[i], 0, room, grad_normed);
    }
    memset(shares, 0, sizeof(float) * threads * width);
    norm_backward(threads, tokens, width, it->hidden, it->norm, scales, grad_normed, grad_middle, grad_hidden, shares);
    if (to->norm)
        add_rows(threads, width, shares, to->norm);
}
