/* The portable fp16, bf16 and int8 kernels: what every other path must equal bit for bit. */
#include "codec_paths.h"

#include <math.h>

float smlt_power_of_two(int exponent) { return ldexpf(1.0f, exponent); }

/* ---- fp16 ---- */

/* Round to nearest even, as VCVTPS2PH and FCVT do; a NaN keeps its sign and upper payload and becomes quiet. */
uint16_t smlt_half_from_float(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & MAGNITUDE;
    if (magnitude > INFINITY_BITS) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more */
    if (magnitude < 0x38800000) { /* subnormal half: adding 0.5 aligns the last place with 2^-24 and rounds */
        uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
        return (uint16_t)(sign | rounded);
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

float smlt_float_from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
    if (exponent == 0x1f) return float_of(sign | INFINITY_BITS | (mantissa ? 0x400000 | mantissa << 13 : 0));
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* Clamped so that the scale and its inverse are normal numbers; a chunk of denormals is scaled by 2^126 only. */
int smlt_fp16_exponent(uint32_t largest_bits) {
    int exponent = largest_bits >= 0x00800000 ? (int)(largest_bits >> 23) - 127 - 14 : -126;
    return exponent < -126 ? -126 : exponent;
}

void smlt_fp16_saturate(void *wire, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half = LOAD(uint16_t, wire, i);
        if ((half & 0x7fff) == 0x7800) STORE(uint16_t, wire, i, (uint16_t)(half - 1));
    }
}

static int half_exponent_float(const void *values, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(LOAD(float, values, i)) & MAGNITUDE;
        if (magnitude < INFINITY_BITS && magnitude > largest) largest = magnitude;
    }
    return largest ? smlt_fp16_exponent(largest) : SMLT_CHOOSE_EXPONENT;
}

static int half_exponent_double(const void *values, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        double magnitude = fabs(LOAD(double, values, i));
        if (magnitude <= 1.7976931348623157e308 && magnitude > largest) largest = magnitude;
    }
    if (largest == 0) return SMLT_CHOOSE_EXPONENT;
    return ilogb(largest) - 14;
}

/* In two factors: the scale of denormal doubles is no double itself. For a float the second is 1. */
#define HALF_CODEC(type, largest_exponent)                                                                                     \
    static int half_encode_##type(void *wire, const void *source, size_t n, int exponent) {                                    \
        if (exponent == SMLT_CHOOSE_EXPONENT) exponent = half_exponent_##type(source, n);                                      \
        if (exponent == SMLT_CHOOSE_EXPONENT) exponent = 0;                                                                    \
        int part = exponent < -1000 ? exponent / 2 : exponent;                                                                 \
        type scale = (type)ldexp(1.0, -part), rest = (type)ldexp(1.0, part - exponent);                                        \
        for (size_t i = 0; i < n; i++)                                                                                         \
            STORE(uint16_t, wire, i, smlt_half_from_float((float)(LOAD(type, source, i) * scale * rest)));                     \
        if (exponent == (largest_exponent)) smlt_fp16_saturate(wire, n);                                                       \
        return exponent;                                                                                                       \
    }                                                                                                                          \
    static void half_expand_##type(void *target, const void *wire, size_t n, int exponent, int shift) {                        \
        int part = exponent - shift < -1000 ? (exponent - shift) / 2 : exponent - shift;                                       \
        type scale = (type)ldexp(1.0, part), rest = (type)ldexp(1.0, exponent - shift - part);                                 \
        for (size_t i = 0; i < n; i++)                                                                                         \
            STORE(type, target, i, (type)smlt_float_from_half(LOAD(uint16_t, wire, i)) * scale * rest);                        \
    }

HALF_CODEC(float, SMLT_FP16_EXPONENT_MAX)
HALF_CODEC(double, 1023 - 14)

/* ---- bf16 ---- */

uint16_t smlt_bf16_from_float(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & MAGNITUDE;
    if (magnitude > INFINITY_BITS) return (uint16_t)(sign | 0x40 | magnitude >> 16);
    if (magnitude == INFINITY_BITS) return (uint16_t)(sign | 0x7f80);
    uint32_t rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
    return (uint16_t)(sign | (rounded > 0x7f7f ? 0x7f7f : rounded));
}

static int bf16_encode_float(void *wire, const void *source, size_t n, int exponent) {
    (void)exponent;
    for (size_t i = 0; i < n; i++) STORE(uint16_t, wire, i, smlt_bf16_from_float(LOAD(float, source, i)));
    return 0;
}

static void bf16_expand_float(void *target, const void *wire, size_t n, int exponent, int shift) {
    float scale = smlt_power_of_two(-shift);
    (void)exponent;
    for (size_t i = 0; i < n; i++) {
        float value = smlt_float_from_bf16(LOAD(uint16_t, wire, i));
        STORE(float, target, i, shift ? value * scale : value); /* a compiler may drop the factor 1, which quiets NaNs */
    }
}

/* ---- int8 ---- */

/* The scale for a block whose largest finite magnitude has these bits. The upper limits are the largest bfloat16 numbers
 * s of which 127 s or 126 s is finite; there the largest values of a block are clamped by a hundredth of a step. */
uint16_t smlt_int8_header(uint32_t largest_bits, int not_finite) {
    uint32_t flag = not_finite ? SMLT_INT8_NOT_FINITE : 0, limit = not_finite ? 0x7c02 : 0x7c01;
    if (largest_bits == 0) return (uint16_t)flag;
    float scale = float_of(largest_bits) / (not_finite ? 126.0f : 127.0f);
    uint32_t rounded_up = (bits_of(scale < 0x1p-126f ? 0x1p-126f : scale) + 0xffff) >> 16;
    return (uint16_t)(flag | (rounded_up > limit ? limit : rounded_up));
}

/* 0 for a block of zeros, and for scales that no encoder writes. */
float smlt_int8_inverse(uint16_t header) {
    float scale = smlt_float_from_bf16(header & 0x7fff);
    return scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
}

void smlt_int8_encode_block(void *wire, const void *source, size_t n, int keep_scale) {
    uint32_t largest = 0;
    int not_finite = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(LOAD(float, source, i)) & MAGNITUDE;
        if (magnitude >= INFINITY_BITS)
            not_finite = 1;
        else if (magnitude > largest)
            largest = magnitude;
    }
    uint16_t header = keep_scale ? LOAD(uint16_t, wire, 0) : smlt_int8_header(largest, not_finite);
    STORE(uint16_t, wire, 0, header);
    int flagged = header & SMLT_INT8_NOT_FINITE;
    float inverse = smlt_int8_inverse(header), limit = flagged ? 126.0f : 127.0f;
    char *codes = (char *)wire + SMLT_INT8_HEADER;
    for (size_t i = 0; i < n; i++) {
        float value = LOAD(float, source, i), scaled = value * inverse;
        uint32_t magnitude = bits_of(value) & MAGNITUDE;
        int code;
        if (magnitude < INFINITY_BITS) {
            scaled = scaled > limit ? limit : scaled < -limit ? -limit : scaled;
            code = (int)(bits_of(scaled + ROUNDING_MAGIC) - ROUNDING_MAGIC_BITS);
        } else if (magnitude == INFINITY_BITS) {
            code = value > 0 ? 127 : -127;
        } else {
            code = flagged ? -128 : 0; /* a kept header that knows of no NaN: not from these values */
        }
        STORE(int8_t, codes, i, (int8_t)code);
    }
}

static int int8_encode_float(void *wire, const void *source, size_t n, int exponent) {
    for (size_t done = 0; done < n; done += SMLT_INT8_BLOCK) {
        size_t count = n - done < SMLT_INT8_BLOCK ? n - done : SMLT_INT8_BLOCK;
        char *block = (char *)wire + done / SMLT_INT8_BLOCK * (SMLT_INT8_HEADER + SMLT_INT8_BLOCK);
        smlt_int8_encode_block(block, (const float *)source + done, count, exponent == SMLT_KEEP_SCALES);
    }
    return 0;
}

void smlt_int8_expand_block(void *target, const void *wire, size_t n, int shift) {
    uint16_t header = LOAD(uint16_t, wire, 0);
    float scale = smlt_float_from_bf16(header & 0x7fff) * smlt_power_of_two(-shift);
    const char *codes = (const char *)wire + SMLT_INT8_HEADER;
    for (size_t i = 0; i < n; i++) {
        int code = LOAD(int8_t, codes, i);
        float value = (float)code * scale;
        if (header & SMLT_INT8_NOT_FINITE && (code > 126 || code < -126))
            value = float_of(code == 127 ? INFINITY_BITS : code == -127 ? 0x80000000 | INFINITY_BITS : QUIET_NAN_BITS);
        STORE(float, target, i, value);
    }
}

static void int8_expand_float(void *target, const void *wire, size_t n, int exponent, int shift) {
    (void)exponent;
    for (size_t done = 0; done < n; done += SMLT_INT8_BLOCK) {
        size_t count = n - done < SMLT_INT8_BLOCK ? n - done : SMLT_INT8_BLOCK;
        const char *block = (const char *)wire + done / SMLT_INT8_BLOCK * (SMLT_INT8_HEADER + SMLT_INT8_BLOCK);
        smlt_int8_expand_block((float *)target + done, block, count, shift);
    }
}

/* ---- kernels: decode a piece, reduce it as raw ---- */

#define PIECE SMLT_INT8_BLOCK

static void reduce_pieces(smlt_kernel raw, void (*expand)(void *, const void *, size_t, int, int), size_t piece_bytes,
                          void *accumulator, const char *wire, size_t n, int exponent, int shift, int first) {
    double values[PIECE];
    for (size_t done = 0; done < n; done += PIECE, wire += piece_bytes) {
        size_t count = n - done < PIECE ? n - done : PIECE;
        expand(values, wire, count, exponent, shift);
        raw.reduce_own((char *)accumulator + done * raw.element_bytes, values, count, 0, 0, first);
    }
}

#define REDUCE(codec, type, dtype, operation, piece_bytes)                                                                     \
    static void codec##_reduce_##operation##_##type(void *accumulator, const void *wire, size_t n, int exponent, int shift,    \
                                                    int first) {                                                               \
        smlt_kernel raw;                                                                                                       \
        smlt_raw_select(&raw, dtype, SMLT_##operation);                                                                        \
        reduce_pieces(raw, codec##_expand_##type, piece_bytes, accumulator, wire, n, exponent, shift, first);                  \
    }

#define KERNELS(linkage, codec, type, dtype, header, wire_element, exponents)                                                  \
    static void codec##_decode_##type(void *target, const void *wire, size_t n, int exponent) {                                \
        codec##_expand_##type(target, wire, n, exponent, 0);                                                                   \
    }                                                                                                                          \
    REDUCE(codec, type, dtype, SUM, PIECE *(wire_element) + (header))                                                          \
    REDUCE(codec, type, dtype, MIN, PIECE *(wire_element) + (header))                                                          \
    REDUCE(codec, type, dtype, MAX, PIECE *(wire_element) + (header))                                                          \
    FEEDBACK(linkage, smlt_##codec##_feedback_##type, sizeof(type), wire_element, header, smlt_add_##type,                     \
             smlt_subtract_##type, exponents, codec##_encode_##type, codec##_decode_##type)                                    \
    static int codec##_select_##type(smlt_kernel *kernel, int operation) {                                                     \
        smlt_raw_select(kernel, dtype, operation);                                                                             \
        kernel->wire_bytes = wire_element;                                                                                     \
        kernel->block_header_bytes = header;                                                                                   \
        kernel->block_elements = (header) ? SMLT_INT8_BLOCK : 1;                                                               \
        kernel->encode = codec##_encode_##type;                                                                                \
        kernel->decode = codec##_decode_##type;                                                                                \
        kernel->encode_feedback = smlt_##codec##_feedback_##type;                                                              \
        kernel->reduce = operation == SMLT_MIN   ? codec##_reduce_MIN_##type                                                   \
                         : operation == SMLT_MAX ? codec##_reduce_MAX_##type                                                   \
                                                 : codec##_reduce_SUM_##type;                                                  \
        return 1;                                                                                                              \
    }

KERNELS(, half, float, SMLT_DTYPE_FLOAT32, 0, 2, half_exponent_float)
KERNELS(static, half, double, SMLT_DTYPE_FLOAT64, 0, 2, half_exponent_double)
KERNELS(, bf16, float, SMLT_DTYPE_FLOAT32, 0, 2, NULL)
KERNELS(, int8, float, SMLT_DTYPE_FLOAT32, SMLT_INT8_HEADER, 1, NULL)

int smlt_compressed_select(smlt_kernel *kernel, int dtype, int codec, int operation) {
    if (operation > SMLT_MAX) return 0;
    if (dtype == SMLT_DTYPE_FLOAT64) return codec == SMLT_FP16 && half_select_double(kernel, operation);
    if (dtype != SMLT_DTYPE_FLOAT32) return 0;
    switch (codec) {
    case SMLT_FP16: return half_select_float(kernel, operation);
    case SMLT_BF16: return bf16_select_float(kernel, operation);
    case SMLT_INT8: return int8_select_float(kernel, operation);
    default: return 0;
    }
}
