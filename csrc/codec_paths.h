/* What the files of the codec layer share: access to unaligned elements, the scalar codecs, error feedback by blocks. */
#ifndef SMLT_CODEC_PATHS_H
#define SMLT_CODEC_PATHS_H

#include "codec.h"

#include <string.h>

/* Wire and caller's buffers may lie at any address: elements are read and written with memcpy, which costs nothing. */
#define LOAD(type, bytes, i) load_##type((const char *)(bytes) + (i) * sizeof(type))
#define STORE(type, bytes, i, value) store_##type((char *)(bytes) + (i) * sizeof(type), (value))
#define ACCESS(type)                                                                                                           \
    static inline type load_##type(const char *p) {                                                                            \
        type value;                                                                                                            \
        memcpy(&value, p, sizeof value);                                                                                       \
        return value;                                                                                                          \
    }                                                                                                                          \
    static inline void store_##type(char *p, type value) { memcpy(p, &value, sizeof value); }

typedef __int128 int128_t;
ACCESS(float)
ACCESS(double)
ACCESS(int8_t)
ACCESS(int16_t)
ACCESS(int32_t)
ACCESS(int64_t)
ACCESS(uint8_t)
ACCESS(uint16_t)
ACCESS(uint32_t)
ACCESS(uint64_t)
ACCESS(int128_t)

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define MAGNITUDE 0x7fffffff
#define INFINITY_BITS 0x7f800000
#define QUIET_NAN_BITS 0x7fc00000

/* Which payload survives the sum of two NaNs is the processor's choice: every sum that is NaN becomes this one. */
static inline float one_nan(float sum) { return sum == sum ? sum : float_of(QUIET_NAN_BITS); }

/* Adding 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, ties to even, and leaves it in the low bits. */
#define ROUNDING_MAGIC 12582912.0f
#define ROUNDING_MAGIC_BITS 0x4b400000

/* The kernels that every machine has. 0 when there is none. */
int smlt_raw_select(smlt_kernel *kernel, int dtype, int operation);
int smlt_compressed_select(smlt_kernel *kernel, int dtype, int codec, int operation);

/* The vector kernels, each in a file of its own, replace them where they exist. */
int smlt_avx2_supported(void);
void smlt_avx2_override(smlt_kernel *kernel, int dtype, int codec, int operation);
int smlt_avx512_supported(void);
void smlt_avx512_override(smlt_kernel *kernel, int dtype, int codec, int operation);
int smlt_neon_supported(void);
void smlt_neon_override(smlt_kernel *kernel, int dtype, int codec, int operation);

float smlt_power_of_two(int exponent);

/* fp16: the exponent for a chunk whose largest finite magnitude, > 0, has these float32 bits. */
int smlt_fp16_exponent(uint32_t largest_bits);
/* Under the largest exponent of a dtype (113 for float32), rounding up to 2^15 would decode to Inf: round down. */
#define SMLT_FP16_EXPONENT_MAX 113
void smlt_fp16_saturate(void *wire, size_t n);
uint16_t smlt_half_from_float(float value);
float smlt_float_from_half(uint16_t half);

uint16_t smlt_bf16_from_float(float value);
static inline float smlt_float_from_bf16(uint16_t value) { return float_of((uint32_t)value << 16); }

/* int8: one block of n <= 256 elements. The vector kernels leave partial blocks and those that are not finite to these. */
#define SMLT_INT8_HEADER 2
#define SMLT_INT8_NOT_FINITE 0x8000
uint16_t smlt_int8_header(uint32_t largest_bits, int not_finite);
float smlt_int8_inverse(uint16_t header);
void smlt_int8_encode_block(void *wire, const void *source, size_t n, int keep_scale);
void smlt_int8_expand_block(void *target, const void *wire, size_t n, int shift);

/* Error feedback of any codec: the chunk goes through encode and decode in pieces that stay in the innermost cache. The
 * parts work on elements of one type. */
typedef struct {
    size_t element_bytes;
    size_t wire_bytes;  /* as in smlt_kernel */
    size_t block_bytes; /* of a block's header */
    void (*add)(void *values, const void *source, const void *residual, size_t n);
    void (*subtract)(void *residual, const void *values, const void *decoded, size_t n);
    /* The exponent that `n` values ask for; SMLT_CHOOSE_EXPONENT when all are 0. NULL: the codec has none. */
    int (*exponent)(const void *values, size_t n);
    int (*encode)(void *wire, const void *source, size_t n, int exponent);
    void (*decode)(void *target, const void *wire, size_t n, int exponent);
} smlt_feedback_parts;

int smlt_encode_feedback(const smlt_feedback_parts *parts, void *wire, const void *source, const void *residual,
                         void *next_residual, size_t n, int exponent);

/* A function for the kernel's table out of such parts; `linkage` is static or nothing. */
#define FEEDBACK(linkage, name, ...)                                                                                           \
    linkage int name(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent) {      \
        static const smlt_feedback_parts parts = {__VA_ARGS__};                                                                \
        return smlt_encode_feedback(&parts, wire, source, residual, next_residual, n, exponent);                               \
    }

void smlt_add_float(void *values, const void *source, const void *residual, size_t n);
void smlt_subtract_float(void *residual, const void *values, const void *decoded, size_t n);
void smlt_add_double(void *values, const void *source, const void *residual, size_t n);
void smlt_subtract_double(void *residual, const void *values, const void *decoded, size_t n);

/* Made of such parts. The vector paths leave the end of a chunk to them. */
typedef int smlt_feedback(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent);
smlt_feedback smlt_half_feedback_float, smlt_bf16_feedback_float, smlt_int8_feedback_float;

#endif
