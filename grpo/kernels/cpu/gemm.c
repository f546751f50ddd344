/* Matrix products in float32 for the few hundred rows of a training batch: result = (or +=) a times b, and a bias.

   The blocks are those of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34, 2008): a panel of
   b, 16 columns wide and DEPTH terms deep, stays in the nearest cache while the rows of a block are multiplied with it, and that
   block of a in the one behind. Each number of the result is added up in the same order however many threads there are. */

#include "simd.h"

#define DEPTH 384   /* terms at most that are added up at a time: a panel is 24 KiB */
#define WIDTH 1024  /* columns of b that are laid out at a time: a multiple of PANEL */
#define HEIGHT 96   /* rows of a, at most about, that are one task: half as many where they need not be laid out */

static inline int smaller(int one, int other) { return one < other ? one : other; }

/* 8 rows of 8 numbers, `stride` apart -> the same as columns, PANEL apart */
static inline void turn(const float *rows, long stride, float *columns)
{
#ifdef SHUFFLES
    octet row[8], pair[8], four[8];
    for (int r = 0; r < 8; r++)
        row[r] = *(const octet *)(rows + r * stride);
    for (int r = 0; r < 8; r += 2) {
        pair[r] = LOW(row[r], row[r + 1]);
        pair[r + 1] = HIGH(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        four[r] = LOW_PAIRS(pair[r], pair[r + 2]);
        four[r + 1] = HIGH_PAIRS(pair[r], pair[r + 2]);
        four[r + 2] = LOW_PAIRS(pair[r + 1], pair[r + 3]);
        four[r + 3] = HIGH_PAIRS(pair[r + 1], pair[r + 3]);
    }
    for (int r = 0; r < 4; r++) {
        *(octet *)(columns + r * PANEL) = LOW_HALVES(four[r], four[r + 4]);
        *(octet *)(columns + (r + 4) * PANEL) = HIGH_HALVES(four[r], four[r + 4]);
    }
#else
    for (int c = 0; c < 8; c++)
        for (int r = 0; r < 8; r++)
            columns[c * PANEL + r] = rows[r * stride + c];
#endif
}

/* Terms [from, from + depth) of 16 columns of b, the last ones filled up with zeros -> panel [depth][16] */
static void lay_out(int columns, int terms, int across, const float *b, int start, int from, int depth, float *panel)
{
    const int width = smaller(PANEL, columns - start);
    if (across) { /* b [columns][terms] */
        const float *rows = b + (long)start * terms + from;
        int i = 0;
        for (; width == PANEL && i + 8 <= depth; i += 8)
            for (int half = 0; half < PANEL; half += 8)
                turn(rows + (long)half * terms + i, terms, panel + i * PANEL + half);
        for (; i < depth; i++)
            for (int o = 0; o < PANEL; o++)
                panel[i * PANEL + o] = o < width ? rows[(long)o * terms + i] : 0.0f;
    } else
        for (int i = 0; i < depth; i++) {
            const float *row = b + (long)(from + i) * columns + start;
            if (width == PANEL)
                memcpy(panel + i * PANEL, row, sizeof(float) * PANEL);
            else
                for (int o = 0; o < PANEL; o++)
                    panel[i * PANEL + o] = o < width ? row[o] : 0.0f;
        }
}

/* a [terms][rows]: terms [from, from + depth) of rows [first, last) -> tiles [depth][ROWS], the last one filled up with zeros */
static void lay_out_rows(int rows, const float *a, int first, int last, int from, int depth, float *tiles)
{
    for (int i = 0; i < depth; i++) {
        const float *row = a + (long)(from + i) * rows;
        float *tile = tiles + (long)i * ROWS;
        int r = first;
        for (; r + ROWS <= last; r += ROWS, tile += (long)depth * ROWS)
            memcpy(tile, row + r, sizeof(float) * ROWS);
        for (int left = 0; r < last && left < ROWS; left++)
            tile[left] = r + left < last ? row[r + left] : 0.0f;
    }
}

typedef struct {
    int rows, columns, terms, a_across;
    const float *a, *bias;
    float *result;
} Factors;

/* Rows [first, last) of the result, columns [left, right): terms [from, from + depth) of a times the panels. `set`: not added to what
   is there, but to the bias. */
static void multiply(const Factors *it, int first, int last, int left, int right, int from, int depth, int set,
                     const float *panels, float *tiles)
{
    if (it->a_across)
        lay_out_rows(it->rows, it->a, first, last, from, depth, tiles);
    for (int start = left; start < right; start += PANEL, panels += (long)PANEL * depth) {
        const int width = smaller(PANEL, it->columns - start);
        float sums[ROWS][PANEL];
        for (int row = first, count; row < last; row += count) {
            if (it->a_across) {
                count = smaller(ROWS, last - row);
                tile(ROWS, depth, tiles + (long)(row - first) * depth, 1, ROWS, panels, sums);
            } else {
                count = tile_rows(last, row);
                tile_of(count, depth, it->a + (long)row * it->terms + from, it->terms, panels, sums);
            }
            for (int r = 0; r < count; r++) {
                float *target = it->result + (long)(row + r) * it->columns + start;
                const float *before = !set ? target : it->bias ? it->bias + start : 0;
                if (width < PANEL)
                    for (int o = 0; o < width; o++)
                        target[o] = sums[r][o] + (before ? before[o] : 0.0f);
                else if (before)
                    for (int o = 0; o < PANEL; o += 8)
                        *(octet *)(target + o) = *(octet *)(sums[r] + o) + *(const octet *)(before + o);
                else
                    memcpy(target, sums[r], sizeof(float) * PANEL);
            }
        }
    }
}

/* a [rows][terms], or [terms][rows] if a_across; b [terms][columns], or [columns][terms] if b_across; bias [columns] or null; result
   [rows][columns], set or added to. scratch: floats, DEPTH * WIDTH + threads * DEPTH * (HEIGHT + ROWS) */
void product(int threads, int rows, int columns, int terms, int a_across, int b_across, int add, const float *a, const float *b,
             const float *bias, float *scratch, float *result)
{
    const int depths = (terms + DEPTH - 1) / DEPTH, depth = (terms + depths - 1) / depths;
    const int tiles = (rows + ROWS - 1) / ROWS, together = (a_across ? HEIGHT : HEIGHT / 2) * threads;
    const int blocks = smaller((rows + together - 1) / together * threads, tiles); /* for each thread as many */
    const Factors it = {rows, columns, terms, a_across, a, bias, result};
#pragma omp parallel num_threads(threads)
    for (int left = 0; left < columns; left += WIDTH) {
        const int right = smaller(left + WIDTH, columns);
        for (int from = 0; from < terms; from += depth) {
            const int deep = smaller(depth, terms - from), set = !add && !from;
#pragma omp for schedule(static)
            for (int start = left; start < right; start += PANEL)
                lay_out(columns, terms, b_across, b, start, from, deep, scratch + (long)(start - left) * deep);
#pragma omp for schedule(dynamic)
            for (int block = 0; block < blocks; block++) {
                float *room = scratch + DEPTH * WIDTH + (long)omp_get_thread_num() * DEPTH * (HEIGHT + ROWS);
                const int first = (long)tiles * block / blocks * ROWS, last = smaller((long)tiles * (block + 1) / blocks * ROWS, rows);
                multiply(&it, first, last, left, right, from, deep, set, scratch, room);
            }
        }
    }
}
