/* Operations between products (grpo/kernels/cpu/ops.py), each in one pass over memory. Float32 where nothing else is
   said, contiguous, nothing allocated; rows are shared among `threads`. */

#include "simd.h"

#define NUMBER float
#define NAME(function) function
#define LOAD(x) (x)
#define STORE(x) (x)
#include "layer_ops.h"
#undef NUMBER
#undef NAME
#undef LOAD
#undef STORE
#define NUMBER bfloat16
#define NAME(function) function##_bf16
#define LOAD(x) from_bfloat16(x)
#define STORE(x) to_bfloat16(x)
#include "layer_ops.h"

/* silu(gate) * up (arXiv 2002.05202) */
void swiglu(int threads, long count, const float *gate, const float *up, float *result)
{
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++)
        result[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void swiglu_backward(int threads, long count, const float *gate, const float *up, const float *gradient,
                     float *grad_gate, float *grad_up)
{
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
        float share = 1.0f / (1.0f + exponential(-gate[i]));
        float slope = share + gate[i] * share * (1.0f - share), reaches = gradient[i];
        grad_up[i] = reaches * gate[i] * share; /* may lie where gradient does */
        grad_gate[i] = reaches * up[i] * slope;
    }
}

/* RoPE (arXiv 2104.09864): states [tokens, heads, size], cosines and sines [tokens, size] -> result. Numbers i and i
   + size / 2 of a head are rotated together, in their place if that is the result; `back`: the inverse rotation, for
   gradients. */
void rotate(int threads, long tokens, int heads, int size, int back, const float *states, const float *cosines,
            const float *sines, float *result)
{
    const int half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < tokens; token++) {
        const float *c = cosines + token * size, *s = sines + token * size;
        const float *first = back ? s + half : s, *second = back ? s : s + half, sign = back ? -1.0f : 1.0f;
        for (int head = 0; head < heads; head++) {
            const float *x = states + (token * heads + head) * size;
            float *y = result + (token * heads + head) * size;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                const float one = x[i], other = x[i + half];
                y[i] = one * c[i] - sign * first[i] * other;
                y[i + half] = other * c[i + half] + sign * second[i] * one;
            }
        }
    }
}

#define BLOCK 128

/* sampling.draw_tokens: one token for each row of logits [rows, size], by inverting the cumulative distribution at
   its uniform number; the most likely one where the temperature is 0. blocks [rows, size / 128 rounded up]: room for
   sums. */
void draw(int threads, long rows, int size, float temperature, const float *logits, const double *uniforms,
          double *blocks,
          int64_t *tokens, float *logprobs)
{
    const float inverse = temperature == 0.0f ? 1.0f : 1.0f / temperature;
    const int count = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * size, largest = largest_of(size, x);
        double *sums = blocks + row * count, total = 0.0;
        for (int block = 0; block < count; block++) {
            int stop = (block + 1) * BLOCK < size ? (block + 1) * BLOCK : size;
            float sum = 0.0f;
            for (int i = block * BLOCK; i < stop; i++)
                sum += exponential((x[i] - largest) * inverse);
            sums[block] = sum;
            total += sum;
        }
        int token = 0;
        if (temperature == 0.0f) {
            while (token < size - 1 && x[token] != largest)
                token++;
        } else {
            double threshold = fmin(uniforms[row] * total, nextafter(total, 0.0)), before = 0.0;
            int block = 0;
            while (block < count - 1 && before + sums[block] <= threshold)
                before += sums[block++];
            int stop = (block + 1) * BLOCK < size ? (block + 1) * BLOCK : size;
            /* the last that has a weight: rounding may leave a little of the threshold */
            int last = token = block * BLOCK;
            for (double seen = before; token < stop; token++) {
                float weight = exponential((x[token] - largest) * inverse);
                last = weight > 0.0f ? token : last;
                seen += weight;
                if (seen > threshold)
                    break;
            }
            token = token < stop ? token : last;
        }
        tokens[row] = token;
        logprobs[row] = (float)((double)((x[token] - largest) * inverse) - log(total));
    }
}
