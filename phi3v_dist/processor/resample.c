/* Pillow's bilinear resize of an RGB picture, bit for bit, written straight into uint8 tiles.
 *
 * A pixel is the sum of its neighbours times 22-bit integer weights, rounded to uint8 after each of the two
 * passes; resample.py makes the weights. Columns first, then rows, as Pillow does; `rows_first` swaps the
 * passes, for pictures that the published processor resizes with x and y exchanged. Plain C without Python.h:
 * loaded through ctypes, which lets go of the GIL. Where no compiler was at hand at installation, Pillow does the
 * work instead.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PRECISION 22
#define HALF (1 << (PRECISION - 1))

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx2", "sse4.1", "default")))
#else
#define CLONES
#endif

typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint8_t byte4 __attribute__((vector_size(4)));

/* Weights of one axis: output i is the sum over k < count[i] of input[first[i] + k] * weight[i * width + k]. */
typedef struct {
    int32_t size, width;
    const int32_t *first, *count, *weight;
} axis;

/* One row of RGBX pixels -> three planes of x.size bytes, one after the other. */
CLONES static void filter_columns(const uint8_t *row, axis x, uint8_t *planes) {
    for (int32_t i = 0; i < x.size; i++) {
        const uint8_t *pixel = row + 4 * (size_t)x.first[i];
        const int32_t *weight = x.weight + (size_t)i * x.width;
        int4 sum = {HALF, HALF, HALF, HALF};
        for (int32_t k = 0; k < x.count[i]; k++) {
            byte4 bytes;
            memcpy(&bytes, pixel + 4 * k, 4);
            sum += __builtin_convertvector(bytes, int4) * weight[k];
        }
        sum >>= PRECISION;
        planes[i] = (uint8_t)sum[0];
        planes[x.size + i] = (uint8_t)sum[1];
        planes[2 * x.size + i] = (uint8_t)sum[2];
    }
}

/* Rows of n bytes -> their weighted sum. rows[k] belongs to weight[k]; sums is scratch of n values. */
CLONES static void filter_rows(const uint8_t *const *rows, const int32_t *weight, int32_t count, int32_t n,
                               int32_t *restrict sums, uint8_t *restrict out) {
    if (count == 1) {
        const uint8_t *restrict a = rows[0];
        const int32_t wa = weight[0];
        for (int32_t i = 0; i < n; i++) out[i] = (uint8_t)((HALF + a[i] * wa) >> PRECISION);
        return;
    }
    const uint8_t *restrict a = rows[0], *restrict b = rows[1];
    const int32_t wa = weight[0], wb = weight[1];
    if (count == 2) {
        for (int32_t i = 0; i < n; i++) out[i] = (uint8_t)((HALF + a[i] * wa + b[i] * wb) >> PRECISION);
        return;
    }
    for (int32_t i = 0; i < n; i++) sums[i] = HALF + a[i] * wa + b[i] * wb;
    for (int32_t k = 2; k < count; k++) {
        const uint8_t *restrict c = rows[k];
        const int32_t wc = weight[k];
        for (int32_t i = 0; i < n; i++) sums[i] += c[i] * wc;
    }
    for (int32_t i = 0; i < n; i++) out[i] = (uint8_t)(sums[i] >> PRECISION);
}

/* Where row y of plane c lies in tiles [rows, cols, 3, tile, tile], piece by piece. */
static void scatter(const uint8_t *plane, int32_t c, int32_t y, int32_t left, int32_t width, int32_t cols,
                    int32_t tile, uint8_t *tiles) {
    for (int32_t x = left; x < left + width;) {
        const int32_t col = x / tile, inside = x % tile;
        const int32_t n = tile - inside < left + width - x ? tile - inside : left + width - x;
        uint8_t *target = tiles + ((((size_t)(y / tile) * cols + col) * 3 + c) * tile + y % tile) * tile + inside;
        memcpy(target, plane + (x - left), (size_t)n);
        x += n;
    }
}

/* pixels: RGBX [height, source_width, 4]. tiles: uint8 [rows, cols, 3, tile, tile], already white where padded.
 * top, left: where the resized picture lies on the canvas. Returns 0, or 1 when memory ran out. */
int phi3v_resample(const uint8_t *pixels, int32_t source_width, axis x, axis y, int32_t rows_first,
                   uint8_t *tiles, int32_t cols, int32_t tile, int32_t top, int32_t left) {
    const int32_t wide = 4 * source_width;
    const int32_t n = rows_first ? wide : 3 * x.size;
    uint8_t *ring = malloc((size_t)(rows_first ? 1 : y.width) * (size_t)n);
    uint8_t *line = malloc((size_t)3 * (size_t)x.size);
    int32_t *sums = malloc(sizeof(int32_t) * (size_t)n);
    const uint8_t **rows = malloc(sizeof(uint8_t *) * (size_t)y.width);
    const int failed = !ring || !line || !sums || !rows;
    int32_t made = 0; /* source rows that have passed filter_columns */
    for (int32_t i = 0; i < y.size && !failed; i++) {
        const int32_t first = y.first[i], count = y.count[i];
        const int32_t *weight = y.weight + (size_t)i * y.width;
        if (rows_first) {
            for (int32_t k = 0; k < count; k++) rows[k] = pixels + (size_t)(first + k) * wide;
            filter_rows(rows, weight, count, n, sums, ring);
            filter_columns(ring, x, line);
        } else {
            for (made = made > first ? made : first; made < first + count; made++)
                filter_columns(pixels + (size_t)made * wide, x, ring + (size_t)(made % y.width) * n);
            for (int32_t k = 0; k < count; k++) rows[k] = ring + (size_t)((first + k) % y.width) * n;
            filter_rows(rows, weight, count, n, sums, line);
        }
        for (int32_t c = 0; c < 3; c++)
            scatter(line + (size_t)c * x.size, c, top + i, left, x.size, cols, tile, tiles);
    }
    free(ring);
    free(line);
    free(sums);
    free(rows);
    return failed;
}
