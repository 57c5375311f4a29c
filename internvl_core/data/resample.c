/* The loops of resample.py: pixels weighed by whole numbers, as Pillow weighs them, several at a time.

   A pixel is four bytes of memory: R, G, B and one that nobody reads. Nothing here checks a bound or
   knows Python; resample.py checks, and calls without the interpreter's lock.
   Give a function another name when its arguments change: a library built earlier then lacks that name
   and is left alone, where it would read wild memory. */
#include <stdint.h>
#include <string.h>

/* Vectors may not be wider than the processor's: the compiler takes them apart in memory, and that is slower than
   Pillow. Those of AVX-512 gain nothing over AVX2 (4.6 and 4.8 ms for 1920x1280 to 1344x896). */
#ifdef __x86_64__
#define FOR_PROCESSOR __attribute__((target("avx2")))
#define LANES 8
#else
#define FOR_PROCESSOR
#define LANES 4
#endif
#define INLINE FOR_PROCESSOR static inline __attribute__((always_inline))

#define FRACTION_BITS 22

typedef uint32_t Pixels __attribute__((vector_size(LANES * 4)));
typedef int32_t Sums __attribute__((vector_size(LANES * 4)));

/* Whether this processor has the instructions of the functions below. */
int is_supported(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 1;
#endif
}

INLINE Pixels load(const uint32_t *pixels, int64_t count)
{
    Pixels loaded = {0};
    memcpy(&loaded, pixels, count == LANES ? sizeof loaded : (size_t)count * sizeof *pixels);
    return loaded;
}

INLINE void store(Pixels stored, uint32_t *pixels, int64_t count)
{
    memcpy(pixels, &stored, count == LANES ? sizeof stored : (size_t)count * sizeof *pixels);
}

INLINE Pixels to_bytes(Sums sums)
{
    sums >>= FRACTION_BITS;
    sums &= ~(sums >> 31); /* Below 0: 0. */
    sums |= sums > 255;    /* Above 255: all bits. */
    return (Pixels)sums & 255;
}

/* Weigh num_taps pixels that lie `stride` apart, and alike up to LANES columns beside them. */
INLINE Pixels weigh(const uint32_t *pixels, int64_t stride, const int32_t *weights, int64_t num_taps, int64_t count)
{
    Sums half = (Sums){0} + (1 << (FRACTION_BITS - 1));
    Sums red = half, green = half, blue = half;
    for (int64_t tap = 0; tap < num_taps; tap++) {
        Pixels loaded = load(pixels + tap * stride, count);
        red += (Sums)(loaded & 255) * weights[tap];
        green += (Sums)(loaded >> 8 & 255) * weights[tap];
        blue += (Sums)(loaded >> 16 & 255) * weights[tap];
    }
    return to_bytes(red) | to_bytes(green) << 8 | to_bytes(blue) << 16;
}

/* Resize [height, width] to [new_height, width]: row y is weighed from num_taps rows, the first of them starts[y]. */
FOR_PROCESSOR void resample_rows(const uint32_t *pixels, int64_t width, int64_t new_height, const int32_t *starts,
                                 const int32_t *weights, int64_t num_taps, uint32_t *result)
{
    int64_t whole = width - width % LANES;
    for (int64_t y = 0; y < new_height; y++, weights += num_taps, result += width) {
        const uint32_t *first = pixels + starts[y] * width;
        for (int64_t x = 0; x < whole; x += LANES)
            store(weigh(first + x, width, weights, num_taps, LANES), result + x, LANES);
        if (whole < width)
            store(weigh(first + whole, width, weights, num_taps, width - whole), result + whole, width - whole);
    }
}

/* Turn LANES pixels of each of up to LANES rows: pixels [rows, columns] to turned [columns, LANES]. */
INLINE void turn(const uint32_t *pixels, int64_t stride, int64_t rows, int64_t columns, uint32_t *turned)
{
    for (int64_t y = 0; y < rows; y++)
        for (int64_t x = 0; x < columns; x++)
            turned[x * LANES + y] = pixels[y * stride + x];
}

/* Resize [height, width] to [height, new_width]. LANES rows at a time are turned, weighed as rows, and turned back.
   `turned` is room for [width, 8] pixels. */
FOR_PROCESSOR void resample_columns(const uint32_t *pixels, int64_t width, int64_t height, int64_t new_width,
                                    const int32_t *starts, const int32_t *weights, int64_t num_taps,
                                    uint32_t *turned, uint32_t *result)
{
    for (int64_t y = 0; y < height; y += LANES) {
        int64_t rows = height - y < LANES ? height - y : LANES;
        for (int64_t x = 0; x < width; x += LANES)
            turn(pixels + y * width + x, width, rows, width - x < LANES ? width - x : LANES, turned + x * LANES);
        for (int64_t x = 0; x < new_width; x += LANES) {
            uint32_t block[LANES * LANES] = {0}, back[LANES * LANES];
            int64_t columns = new_width - x < LANES ? new_width - x : LANES;
            for (int64_t i = 0; i < columns; i++)
                store(weigh(turned + starts[x + i] * LANES, LANES, weights + (x + i) * num_taps, num_taps, LANES),
                      block + i * LANES, LANES);
            turn(block, LANES, LANES, LANES, back);
            for (int64_t i = 0; i < rows; i++)
                memcpy(result + (y + i) * new_width + x, back + i * LANES, (size_t)columns * sizeof *back);
        }
    }
}

/* Cut [rows * size, columns * size] into planar tiles [rows * columns, 3, size, size]. */
FOR_PROCESSOR void cut_planes(const uint32_t *pixels, int64_t rows, int64_t columns, int64_t size, uint8_t *tiles)
{
    for (int64_t y = 0; y < rows * size; y++)
        for (int64_t column = 0; column < columns; column++, pixels += size)
            for (int64_t band = 0; band < 3; band++) {
                uint8_t *plane = tiles + ((y / size * columns + column) * 3 + band) * size * size + y % size * size;
                for (int64_t x = 0; x < size; x++)
                    plane[x] = (uint8_t)(pixels[x] >> 8 * band);
            }
}
