/* Operations between the matrix products of a decoder layer. fused_ops.c includes this file once for each type of the
   products' operands: NUMBER, with LOAD and STORE between it and float32, and NAME for the functions of that type.
   All arithmetic is float32. Memory is contiguous, nothing is allocated, and rows are shared among `threads`. */

/* RMSNorm (arXiv 1910.07467): result = weight * hidden * scale, scales [rows] = 1 / rms(hidden). */
void NAME(norm)(int threads, long rows, int size, float epsilon, const float *hidden, const float *weight,
          float *scales,
                NUMBER *result)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = hidden + row * size;
        NUMBER *y = result + row * size;
        float sum = 0.0f;
        for (int i = 0; i < size; i++)
            sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / size + epsilon);
        for (int i = 0; i < size; i++)
            y[i] = STORE(x[i] * scale * weight[i]);
        scales[row] = scale;
    }
}

/* gradient [rows][size] -> grad_hidden [rows][size], added to `add` if that is not null, and partial sums of the
   weight's gradient in grad_weight [threads][size], which the caller has set to zero. */
void NAME(norm_backward)(int threads, long rows, int size, const float *hidden, const float *weight,
          const float *scales,
                         const NUMBER *gradient, const float *add, float *grad_hidden, float *grad_weight)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; share++) {
        float *dw = grad_weight + (long)share * size;
        for (long row = rows * share / threads; row < rows * (share + 1) / threads; row++) {
            const float *x = hidden + row * size, scale = scales[row];
            const NUMBER *g = gradient + row * size;
            float *dx = grad_hidden + row * size, sum = 0.0f;
            for (int i = 0; i < size; i++) {
                sum += LOAD(g[i]) * weight[i] * x[i];
                dw[i] += LOAD(g[i]) * x[i] * scale;
            }
            float correction = sum * scale * scale * scale / size;
            for (int i = 0; i < size; i++)
                dx[i] = LOAD(g[i]) * weight[i] * scale - x[i] * correction;
            if (add)
                for (int i = 0; i < size; i++)
                    dx[i] += add[row * size + i];
        }
    }
}

/* SwiGLU (arXiv 2002.05202): gates_ups [rows][2 size], the gate's half first -> silu(gate) * up [rows][size] */
void NAME(swiglu_rows)(int threads, long rows, int size, const NUMBER *gates_ups, NUMBER *result)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const NUMBER *gate = gates_ups + row * 2 * size, *up = gate + size;
        NUMBER *y = result + row * size;
#pragma omp simd
        for (int i = 0; i < size; i++) {
            const float g = LOAD(gate[i]);
            y[i] = STORE(g / (1.0f + exponential(-g)) * LOAD(up[i]));
        }
    }
}

/* gradient [rows][size] -> grad_gates_ups [rows][2 size], which may be the memory of gates_ups */
void NAME(swiglu_rows_backward)(int threads, long rows, int size, const NUMBER *gates_ups, const NUMBER *gradient,
                                NUMBER *grad_gates_ups)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const NUMBER *gate = gates_ups + row * 2 * size, *up = gate + size, *dy = gradient + row * size;
        NUMBER *grad_gate = grad_gates_ups + row * 2 * size, *grad_up = grad_gate + size;
#pragma omp simd
        for (int i = 0; i < size; i++) {
            const float g = LOAD(gate[i]), u = LOAD(up[i]), d = LOAD(dy[i]), share = 1.0f / (1.0f + exponential(-g));
            grad_gate[i] = STORE(d * u * (share + g * share * (1.0f - share)));
            grad_up[i] = STORE(d * g * share);
        }
    }
}

/* The split of joint projections, and RoPE (arXiv 2104.09864): mixed [tokens][(heads + 2 key_heads) size] -> query
   [tokens][heads][size], key and value [tokens][key_heads][size]; query and key are rotated by cosines and sines
   [tokens][size] unless these are null. */
void NAME(split_heads)(int threads, long tokens, int heads, int key_heads, int size, const NUMBER *mixed,
          const float *cosines,
                       const float *sines, float *query, float *key, float *value)
{
    const int half = size / 2, rotated = heads + key_heads, all = rotated + key_heads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < tokens; token++)
        for (int head = 0; head < all; head++) {
            const NUMBER *x = mixed + (token * all + head) * size;
            float *y = head < heads     ? query + (token * heads + head) * size
                       : head < rotated ? key + (token * key_heads + head - heads) * size
                                        : value + (token * key_heads + head - rotated) * size;
            if (!cosines || head >= rotated) {
                for (int i = 0; i < size; i++)
                    y[i] = LOAD(x[i]);
                continue;
            }
            const float *c = cosines + token * size, *s = sines + token * size;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                const float one = LOAD(x[i]), other = LOAD(x[i + half]);
                y[i] = one * c[i] - s[i] * other;
                y[i + half] = other * c[i + half] + s[i + half] * one;
            }
        }
}

/* The gradient of split_heads: gradients of query, key and value -> grad_mixed */
void NAME(join_heads)(int threads, long tokens, int heads, int key_heads, int size, const float *grad_query,
                      const float *grad_key, const float *grad_value, const float *cosines, const float *sines,
                      NUMBER *grad_mixed)
{
    const int half = size / 2, rotated = heads + key_heads, all = rotated + key_heads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < tokens; token++)
        for (int head = 0; head < all; head++) {
            const float *x = head < heads     ? grad_query + (token * heads + head) * size
                             : head < rotated ? grad_key + (token * key_heads + head - heads) * size
                                              : grad_value + (token * key_heads + head - rotated) * size;
            NUMBER *y = grad_mixed + (token * all + head) * size;
            if (!cosines || head >= rotated) {
                for (int i = 0; i < size; i++)
                    y[i] = STORE(x[i]);
                continue;
            }
            const float *c = cosines + token * size, *s = sines + token * size;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                const float one = x[i], other = x[i + half];
                y[i] = STORE(one * c[i] + s[i + half] * other);
                y[i + half] = STORE(other * c[i + half] - s[i] * one);
            }
        }
}
