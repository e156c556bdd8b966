#include "codec.h"

#include <math.h>
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

/* Round to nearest even, as VCVTPS2PH and FCVT do; a NaN keeps its sign and upper payload and becomes quiet. */
uint16_t smlt_half_from_float(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
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
    if (exponent == 0x1f) return float_of(sign | 0x7f800000 | (mantissa ? 0x400000 | mantissa << 13 : 0));
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

float smlt_power_of_two(int exponent) { return ldexpf(1.0f, exponent); }

/* Clamped so that the scale and its inverse are normal numbers; a chunk of denormals is scaled by 2^126 only. */
int smlt_fp16_exponent(uint32_t largest_bits) {
    if (largest_bits == 0) return 0;
    int exponent = largest_bits >= 0x00800000 ? (int)(largest_bits >> 23) - 127 - 14 : -126;
    return exponent < -126 ? -126 : exponent;
}

void smlt_fp16_saturate(void *wire, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half = LOAD(uint16_t, wire, i);
        if ((half & 0x7fff) == 0x7800) STORE(uint16_t, wire, i, (uint16_t)(half - 1));
    }
}

/* ---- raw codec ---- */

#define RAW_CODEC(type)                                                                                                        \
    static int raw_encode_##type(void *wire, const void *source, size_t n, int exponent) {                                     \
        (void)exponent;                                                                                                        \
        memcpy(wire, source, n * sizeof(type));                                                                                \
        return 0;                                                                                                              \
    }                                                                                                                          \
    static void raw_decode_##type(void *target, const void *wire, size_t n, int exponent) {                                    \
        (void)exponent;                                                                                                        \
        memcpy(target, wire, n * sizeof(type));                                                                                \
    }

/* `combine` is an expression of `a`, what the accumulator holds, and `x`, the new value. */
#define REDUCE(name, type, accumulator_type, value, combine)                                                                   \
    static void name(void *accumulator, const void *source, size_t n, int exponent, int shift, int first) {                    \
        (void)exponent, (void)shift;                                                                                           \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            accumulator_type x = value;                                                                                        \
            accumulator_type a = first ? x : LOAD(accumulator_type, accumulator, i);                                           \
            STORE(accumulator_type, accumulator, i, (accumulator_type)(first ? x : (combine)));                                \
        }                                                                                                                      \
    }

#define FINISH_AS_IS(type)                                                                                                     \
    static int finish_as_is_##type(void *accumulator, size_t n, int world_size, int shift) {                                   \
        (void)accumulator, (void)n, (void)world_size, (void)shift;                                                             \
        return 0;                                                                                                              \
    }

/* ---- floats: NaN wins in min and max, as in NumPy ---- */

#define SMALLER(a, x) ((a) != (a) || (a) < (x) ? (a) : (x))
#define LARGER(a, x) ((a) != (a) || (a) > (x) ? (a) : (x))

#define FLOAT_FINISH_MEAN(type)                                                                                                \
    static int finish_mean_##type(void *accumulator, size_t n, int world_size, int shift) {                                    \
        type divisor = (type)world_size, scale = (type)ldexp(1.0, shift);                                                      \
        int not_finite = 0;                                                                                                    \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type mean = LOAD(type, accumulator, i) / divisor * scale;                                                          \
            not_finite |= !(mean - mean == 0);                                                                                 \
            STORE(type, accumulator, i, mean);                                                                                 \
        }                                                                                                                      \
        return not_finite;                                                                                                     \
    }

#define FLOAT_KERNELS(type)                                                                                                    \
    RAW_CODEC(type)                                                                                                            \
    FINISH_AS_IS(type)                                                                                                         \
    FLOAT_FINISH_MEAN(type)                                                                                                    \
    REDUCE(raw_min_##type, type, type, LOAD(type, source, i), SMALLER(a, x))                                                   \
    REDUCE(raw_max_##type, type, type, LOAD(type, source, i), LARGER(a, x))                                                    \
    static void raw_sum_##type(void *accumulator, const void *source, size_t n, int exponent, int shift, int first) {          \
        type scale = (type)ldexp(1.0, -shift);                                                                                 \
        (void)exponent;                                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type x = LOAD(type, source, i) * scale;                                                                            \
            STORE(type, accumulator, i, first ? x : LOAD(type, accumulator, i) + x);                                           \
        }                                                                                                                      \
    }

#define HALF_KERNEL(name, type, combine)                                                                                       \
    static void name(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first) {                      \
        type scale = (type)ldexp(1.0, exponent - shift);                                                                       \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type x = (type)smlt_float_from_half(LOAD(uint16_t, wire, i)) * scale;                                              \
            type a = first ? x : LOAD(type, accumulator, i);                                                                   \
            STORE(type, accumulator, i, first ? x : (combine));                                                                \
        }                                                                                                                      \
    }

#define HALF_KERNELS(type)                                                                                                     \
    HALF_KERNEL(half_sum_##type, type, a + x)                                                                                  \
    HALF_KERNEL(half_min_##type, type, SMALLER(a, x))                                                                          \
    HALF_KERNEL(half_max_##type, type, LARGER(a, x))                                                                           \
    static void half_decode_##type(void *target, const void *wire, size_t n, int exponent) {                                   \
        half_sum_##type(target, wire, n, exponent, 0, 1);                                                                      \
    }

FLOAT_KERNELS(float)
FLOAT_KERNELS(double)
HALF_KERNELS(float)
HALF_KERNELS(double)

static int fp16_exponent_float(const void *source, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(LOAD(float, source, i)) & 0x7fffffff;
        if (magnitude < 0x7f800000 && magnitude > largest) largest = magnitude;
    }
    return smlt_fp16_exponent(largest);
}

static int half_encode_float(void *wire, const void *source, size_t n, int exponent) {
    if (exponent == SMLT_CHOOSE_EXPONENT) exponent = fp16_exponent_float(source, n);
    float scale = smlt_power_of_two(-exponent);
    for (size_t i = 0; i < n; i++) STORE(uint16_t, wire, i, smlt_half_from_float(LOAD(float, source, i) * scale));
    if (exponent == SMLT_FP16_EXPONENT_MAX) smlt_fp16_saturate(wire, n);
    return exponent;
}

static int fp16_exponent_double(const void *source, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        double magnitude = fabs(LOAD(double, source, i));
        if (magnitude <= 1.7976931348623157e308 && magnitude > largest) largest = magnitude;
    }
    int exponent = largest > 0 ? ilogb(largest) - 14 : 0;
    return exponent < -1008 ? -1008 : exponent; /* the scale stays a normal number */
}

static int half_encode_double(void *wire, const void *source, size_t n, int exponent) {
    if (exponent == SMLT_CHOOSE_EXPONENT) exponent = fp16_exponent_double(source, n);
    double scale = ldexp(1.0, -exponent);
    for (size_t i = 0; i < n; i++) STORE(uint16_t, wire, i, smlt_half_from_float((float)(LOAD(double, source, i) * scale)));
    if (exponent == 1023 - 14) smlt_fp16_saturate(wire, n);
    return exponent;
}

/* ---- integers ---- */

/* The exact quotient rounded to nearest, ties to even; divisor > 0. */
static inline int128_t rounded_quotient(int128_t sum, int divisor) {
    int128_t quotient = sum / divisor, remainder = sum % divisor;
    if (remainder < 0) {
        quotient -= 1;
        remainder += divisor;
    }
    if (2 * remainder > divisor || (2 * remainder == divisor && (quotient & 1))) quotient += 1;
    return quotient;
}

/* The results are no wider than the accumulator's elements and are written front to back: in place is safe. */
#define INTEGER_KERNELS(type, wrapping, wide)                                                                                  \
    RAW_CODEC(type)                                                                                                            \
    FINISH_AS_IS(type)                                                                                                         \
    REDUCE(raw_sum_##type, type, type, LOAD(type, source, i), (type)((wrapping)a + (wrapping)x))                               \
    REDUCE(raw_min_##type, type, type, LOAD(type, source, i), a < x ? a : x)                                                   \
    REDUCE(raw_max_##type, type, type, LOAD(type, source, i), a > x ? a : x)                                                   \
    REDUCE(raw_wide_##type, type, wide, (wide)LOAD(type, source, i), a + x)                                                    \
    static int finish_mean_##type(void *accumulator, size_t n, int world_size, int shift) {                                    \
        (void)shift;                                                                                                           \
        for (size_t i = 0; i < n; i++)                                                                                         \
            STORE(type, accumulator, i, (type)rounded_quotient(LOAD(wide, accumulator, i), world_size));                       \
        return 0;                                                                                                              \
    }

INTEGER_KERNELS(int8_t, uint8_t, int64_t)
INTEGER_KERNELS(int16_t, uint16_t, int64_t)
INTEGER_KERNELS(int32_t, uint32_t, int64_t)
INTEGER_KERNELS(int64_t, uint64_t, int128_t)
INTEGER_KERNELS(uint8_t, uint8_t, int64_t)
INTEGER_KERNELS(uint16_t, uint16_t, int64_t)
INTEGER_KERNELS(uint32_t, uint32_t, int64_t)
INTEGER_KERNELS(uint64_t, uint64_t, int128_t)

/* ---- selection ---- */

#define PICK(operation, sum, minimum, maximum)                                                                                 \
    ((operation) == SMLT_MIN ? (minimum) : (operation) == SMLT_MAX ? (maximum) : (sum))

#define SELECT_FLOAT(type)                                                                                                     \
    do {                                                                                                                       \
        int half = codec == SMLT_FP16;                                                                                         \
        kernel->element_bytes = kernel->accumulator_bytes = sizeof(type);                                                      \
        kernel->wire_bytes = half ? 2 : sizeof(type);                                                                          \
        kernel->encode = half ? half_encode_##type : raw_encode_##type;                                                        \
        kernel->decode = half ? half_decode_##type : raw_decode_##type;                                                        \
        kernel->reduce_own = PICK(operation, raw_sum_##type, raw_min_##type, raw_max_##type);                                  \
        kernel->reduce = half ? PICK(operation, half_sum_##type, half_min_##type, half_max_##type) : kernel->reduce_own;       \
        kernel->finish = operation == SMLT_MEAN ? finish_mean_##type : finish_as_is_##type;                                    \
        return 1;                                                                                                              \
    } while (0)

#define SELECT_INTEGER(type, wide)                                                                                             \
    do {                                                                                                                       \
        if (codec != SMLT_RAW) return 0;                                                                                       \
        kernel->element_bytes = kernel->wire_bytes = sizeof(type);                                                             \
        kernel->accumulator_bytes = operation == SMLT_MEAN ? sizeof(wide) : sizeof(type);                                      \
        kernel->encode = raw_encode_##type;                                                                                    \
        kernel->decode = raw_decode_##type;                                                                                    \
        kernel->reduce = kernel->reduce_own =                                                                                  \
            operation == SMLT_MEAN ? raw_wide_##type : PICK(operation, raw_sum_##type, raw_min_##type, raw_max_##type);        \
        kernel->finish = operation == SMLT_MEAN ? finish_mean_##type : finish_as_is_##type;                                    \
        return 1;                                                                                                              \
    } while (0)

static int select_portable(smlt_kernel *kernel, int dtype, int codec, int operation) {
    switch (dtype) {
    case SMLT_FLOAT32: SELECT_FLOAT(float);
    case SMLT_FLOAT64: SELECT_FLOAT(double);
    case SMLT_INT8: SELECT_INTEGER(int8_t, int64_t);
    case SMLT_INT16: SELECT_INTEGER(int16_t, int64_t);
    case SMLT_INT32: SELECT_INTEGER(int32_t, int64_t);
    case SMLT_INT64: SELECT_INTEGER(int64_t, int128_t);
    case SMLT_UINT8: SELECT_INTEGER(uint8_t, int64_t);
    case SMLT_UINT16: SELECT_INTEGER(uint16_t, int64_t);
    case SMLT_UINT32: SELECT_INTEGER(uint32_t, int64_t);
    case SMLT_UINT64: SELECT_INTEGER(uint64_t, int128_t);
    default: return 0;
    }
}

static const char *const PATHS[] = {"portable", "avx2"};
static int current_path = -1; /* chosen at the first use */

const char *smlt_codec_path(int index) { return index >= 0 && index <= smlt_avx2_supported() ? PATHS[index] : NULL; }

int smlt_codec_use(const char *path) {
    for (int i = 0; smlt_codec_path(i); i++)
        if (strcmp(path, PATHS[i]) == 0) {
            current_path = i;
            return 1;
        }
    return 0;
}

static int path_in_use(void) {
    if (current_path < 0) current_path = smlt_avx2_supported();
    return current_path;
}

const char *smlt_codec_current(void) { return PATHS[path_in_use()]; }

int smlt_kernel_select(smlt_kernel *kernel, int dtype, int codec, int operation) {
    if (codec < 0 || codec >= SMLT_CODECS || operation < 0 || operation >= SMLT_OPERATIONS) return 0;
    if (!select_portable(kernel, dtype, codec, operation)) return 0;
    if (path_in_use() == 1) smlt_avx2_override(kernel, dtype, codec, operation);
    return 1;
}
