/* Codecs and reduction kernels: what happens to the elements of a chunk between the caller's buffer and the wire.
 *
 * A kernel is chosen by (dtype, codec, operation). Wire formats, both little-endian:
 *   raw   the elements as they are: exact.
 *   fp16  IEEE 754 binary16 times a power of two, one exponent a chunk, so that the chunk's largest finite magnitude
 *         lies in [2^14, 2^15): nothing overflows, 1e30 and 1e-30 survive. One encoding errs by at most
 *         max(2^-11 |x|, 2^-39 max|x|) for an element x of the chunk. Inf and NaN pass as themselves.
 * Sums of floats are taken in the array's own width in the order given; a mean of integers is the exact quotient
 * rounded to nearest, ties to even; sums of integers wrap, as NumPy's do.
 */
#ifndef SMLT_CODEC_H
#define SMLT_CODEC_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    SMLT_FLOAT32,
    SMLT_FLOAT64,
    SMLT_INT8,
    SMLT_INT16,
    SMLT_INT32,
    SMLT_INT64,
    SMLT_UINT8,
    SMLT_UINT16,
    SMLT_UINT32,
    SMLT_UINT64,
    SMLT_DTYPES
} smlt_dtype;

typedef enum { SMLT_RAW, SMLT_FP16, SMLT_CODECS } smlt_codec;

typedef enum { SMLT_MEAN, SMLT_SUM, SMLT_MIN, SMLT_MAX, SMLT_OPERATIONS } smlt_operation;

#define SMLT_CHOOSE_EXPONENT INT32_MIN

typedef struct {
    size_t element_bytes;     /* in the caller's buffers */
    size_t wire_bytes;        /* on the wire */
    size_t accumulator_bytes; /* in the accumulator, >= element_bytes */

    /* Encode `n` elements; returns the exponent e of the scale: value = wire * 2^e. Given the exponent with which a
     * value was decoded, the same wire value comes out again. */
    int (*encode)(void *wire, const void *source, size_t n, int exponent);
    void (*decode)(void *target, const void *wire, size_t n, int exponent);

    /* accumulator (op)= value * 2^-shift; `first` stores instead. From the wire, and from a caller's buffer. */
    void (*reduce)(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first);
    void (*reduce_own)(void *accumulator, const void *source, size_t n, int exponent, int shift, int first);

    /* Turn the accumulator into `n` elements, in place: for a mean, divide by `world_size` and undo the shift.
     * Returns 1 when a mean of floats holds Inf or NaN, which a larger shift may spare (a sum that overflowed). */
    int (*finish)(void *accumulator, size_t n, int world_size, int shift);
} smlt_kernel;

/* 1 and `*kernel` filled; 0 when there is no such kernel (fp16 of integers, values out of range). */
int smlt_kernel_select(smlt_kernel *kernel, int dtype, int codec, int operation);

/* The instruction sets this machine can use, best last: "portable", "avx2". NULL past the end. */
const char *smlt_codec_path(int index);
/* Use the named path from now on (tests compare the paths bit for bit); 0 when this machine lacks it. */
int smlt_codec_use(const char *path);
const char *smlt_codec_current(void);

/* The vector kernels of codec_x86.c replace the portable ones where they exist. */
int smlt_avx2_supported(void);
void smlt_avx2_override(smlt_kernel *kernel, int dtype, int codec, int operation);

/* Shared by the paths: the exponent for a chunk whose largest finite magnitude has these float32 bits, and 2^e. */
int smlt_fp16_exponent(uint32_t largest_bits);
/* Under the largest exponent of a dtype (113 for float32), rounding up to 2^15 would decode to Inf: round down. */
void smlt_fp16_saturate(void *wire, size_t n);
#define SMLT_FP16_EXPONENT_MAX 113
float smlt_power_of_two(int exponent);

uint16_t smlt_half_from_float(float value);
float smlt_float_from_half(uint16_t half);

#endif
