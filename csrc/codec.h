/* Codecs and reduction kernels: what happens to the elements of a chunk between the caller's buffer and the wire.
 *
 * A kernel is chosen by (dtype, codec, operation). Wire formats, both little-endian:
 *   raw   the elements as they are: exact.
 *   fp16  IEEE 754 binary16 times a power of two, one exponent a chunk, so that the chunk's largest finite magnitude
 *         lies in [2^14, 2^15): nothing overflows, 1e30 and 1e-30 survive. One encoding errs by at most
 *         max(2^-11 |x|, 2^-39 max|x|) for an element x of the chunk. Inf and NaN pass as themselves.
 *   bf16  float32 rounded to its upper 16 bits, to nearest, ties to even. One encoding errs by at most
 *         max(2^-8 |x|, 2^-134). Finite values stay finite: what would round to Inf becomes the largest bfloat16.
 *         Inf and NaN pass as themselves.
 *   int8  blocks of 256 elements, the last one of a chunk perhaps shorter: a header of 2 bytes, then a signed byte an
 *         element. The header is the block's scale s as a bfloat16, value = code * s, with s = max|x| / 127 rounded up
 *         to a bfloat16 (0 for a block of zeros, else 2^-126 at least; at most what keeps 127 s finite). The header's
 *         sign bit marks a block that holds Inf or NaN: there 127, -127 and -128 mean Inf, -Inf and NaN, and
 *         s = max|x| / 126 over the finite values, whose codes lie in [-126, 126].
 *         One encoding errs by at most max(max|x| / 250, 2^-126), the maximum taken over the finite values of the block:
 *         half a step, and a step is at most 1 + 2^-7 times max|x| / 126.
 * Sums of floats are taken in the array's own width in the order given; a mean of integers is the exact quotient
 * rounded to nearest, ties to even; sums and products of integers wrap, as NumPy's do.
 */
#ifndef SMLT_CODEC_H
#define SMLT_CODEC_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    SMLT_DTYPE_FLOAT32,
    SMLT_DTYPE_FLOAT64,
    SMLT_DTYPE_INT8,
    SMLT_DTYPE_INT16,
    SMLT_DTYPE_INT32,
    SMLT_DTYPE_INT64,
    SMLT_DTYPE_UINT8,
    SMLT_DTYPE_UINT16,
    SMLT_DTYPE_UINT32,
    SMLT_DTYPE_UINT64,
    SMLT_DTYPES
} smlt_dtype;

typedef enum { SMLT_RAW, SMLT_FP16, SMLT_BF16, SMLT_INT8, SMLT_CODECS } smlt_codec;

/* From SMLT_PRODUCT on only raw; bits of integers only. */
typedef enum {
    SMLT_MEAN,
    SMLT_SUM,
    SMLT_MIN,
    SMLT_MAX,
    SMLT_PRODUCT,
    SMLT_BAND,
    SMLT_BOR,
    SMLT_BXOR,
    SMLT_OPERATIONS
} smlt_operation;

/* As `exponent` of an encoding: find the scales (the exponent of fp16, the block headers of int8). */
#define SMLT_CHOOSE_EXPONENT INT32_MIN
/* As `exponent` of an int8 encoding: the block headers already lie in `wire`, use their scales. Values that were decoded
 * with these headers give the same bytes again. */
#define SMLT_KEEP_SCALES (INT32_MIN + 1)

#define SMLT_INT8_BLOCK 256

/* Pointers to the wire and to the caller's elements may lie at any address. `wire` points at the beginning of a block,
 * and `n` covers whole blocks except at the end of a chunk: a chunk decoded in pieces gives the bits of the whole. */
typedef struct {
    size_t element_bytes;      /* in the caller's buffers */
    size_t wire_bytes;         /* an element's on the wire, without block headers */
    size_t accumulator_bytes;  /* in the accumulator, >= element_bytes */
    size_t block_elements;     /* elements that share a block header on the wire; 1 when there is none */
    size_t block_header_bytes; /* 0 when there is none */

    /* Encode `n` elements; returns the exponent e of the scale: value = wire * 2^e (0 but for fp16). Given the exponent
     * with which a value was decoded, the same wire value comes out again. */
    int (*encode)(void *wire, const void *source, size_t n, int exponent);
    void (*decode)(void *target, const void *wire, size_t n, int exponent);
    /* The same, for a target that is larger than the caches: what is written does not go through them. */
    void (*decode_streaming)(void *target, const void *wire, size_t n, int exponent);

    /* Encode value = source + residual (NULL: zeros) and keep in `next_residual`, which may be `residual`, what the
     * encoding lost: value - decode(encode(value)), 0 where the value is not finite. Integers lose nothing and have no
     * residual: theirs is ignored. Returns the exponent, as `encode` does. */
    int (*encode_feedback)(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent);

    /* accumulator (op)= value * 2^-shift; `first` stores instead. From the wire, and from a caller's buffer. */
    void (*reduce)(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first);
    void (*reduce_own)(void *accumulator, const void *source, size_t n, int exponent, int shift, int first);

    /* Turn the accumulator into `n` elements, in place: for a mean, divide by `world_size` and undo the shift.
     * Returns 1 when a mean of floats holds Inf or NaN, which a larger shift may spare (a sum that overflowed). */
    int (*finish)(void *accumulator, size_t n, int world_size, int shift);
} smlt_kernel;

/* 1 and `*kernel` filled; 0 when there is no such kernel: integers have none but raw, float64 has neither bf16 nor int8,
 * whose range it exceeds; a product is of raw elements, floats have no AND, OR and XOR; or numbers out of range. */
int smlt_kernel_select(smlt_kernel *kernel, int dtype, int codec, int operation);

/* Bytes that a chunk of `n` elements takes on the wire. */
size_t smlt_wire_size(const smlt_kernel *kernel, size_t n);
/* How many of the `left` remaining elements of a chunk can be decoded from `bytes` bytes that begin at a block's start:
 * whole blocks, or everything when the last partial block is complete. */
size_t smlt_wire_elements(const smlt_kernel *kernel, size_t bytes, size_t left);

/* The instruction sets this machine can use, best last: "portable", then "avx2", "avx512" or "neon". NULL past the end.
 * All give the same bits: a sum that is NaN is always the same NaN. */
const char *smlt_codec_path(int index);
/* Use the named path from now on (tests compare the paths bit for bit); 0 when this machine lacks it. */
int smlt_codec_use(const char *path);
const char *smlt_codec_current(void);

#endif
