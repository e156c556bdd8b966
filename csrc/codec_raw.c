/* The raw kernels: floats and integers as they are, on every machine. */
#include "codec_paths.h"

#include <math.h>

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

/* ---- floats: NaN wins in min and max, as in NumPy; a sum that is NaN is always the same one, as in codec_paths.h ---- */

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
    REDUCE(raw_product_##type, type, type, LOAD(type, source, i), a *x == a * x ? a * x : (type)NAN)                           \
    static void raw_sum_##type(void *accumulator, const void *source, size_t n, int exponent, int shift, int first) {          \
        type scale = (type)ldexp(1.0, -shift);                                                                                 \
        (void)exponent;                                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type x = LOAD(type, source, i) * scale;                                                                            \
            type sum = first ? x : LOAD(type, accumulator, i) + x;                                                             \
            STORE(type, accumulator, i, sum == sum ? sum : (type)NAN);                                                         \
        }                                                                                                                      \
    }                                                                                                                          \
    FEEDBACK(static, raw_feedback_##type, sizeof(type), sizeof(type), 0, smlt_add_##type, smlt_subtract_##type, NULL,          \
             raw_encode_##type, raw_decode_##type)

FLOAT_KERNELS(float)
FLOAT_KERNELS(double)

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
    REDUCE(raw_product_##type, type, type, LOAD(type, source, i), (type)((uint64_t)a * (uint64_t)x))                           \
    REDUCE(raw_and_##type, type, type, LOAD(type, source, i), (type)(a & x))                                                   \
    REDUCE(raw_or_##type, type, type, LOAD(type, source, i), (type)(a | x))                                                    \
    REDUCE(raw_xor_##type, type, type, LOAD(type, source, i), (type)(a ^ x))                                                   \
    REDUCE(raw_wide_##type, type, wide, (wide)LOAD(type, source, i), a + x)                                                    \
    static int raw_feedback_##type(void *wire, const void *source, const void *residual, void *next_residual, size_t n,        \
                                   int exponent) {                                                                             \
        (void)residual;                                                                                                        \
        memset(next_residual, 0, n * sizeof(type));                                                                            \
        return raw_encode_##type(wire, source, n, exponent);                                                                   \
    }                                                                                                                          \
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

#define PICK(operation, sum, minimum, maximum, product)                                                                        \
    ((operation) == SMLT_MIN       ? (minimum)                                                                                 \
     : (operation) == SMLT_MAX     ? (maximum)                                                                                 \
     : (operation) == SMLT_PRODUCT ? (product)                                                                                 \
                                   : (sum))
#define PICK_BITS(operation, type)                                                                                             \
    ((operation) == SMLT_BAND ? raw_and_##type : (operation) == SMLT_BOR ? raw_or_##type : raw_xor_##type)

#define SELECT(type, wide, sum)                                                                                                \
    do {                                                                                                                       \
        kernel->element_bytes = kernel->wire_bytes = sizeof(type);                                                             \
        kernel->accumulator_bytes = operation == SMLT_MEAN ? sizeof(wide) : sizeof(type);                                      \
        kernel->block_elements = 1;                                                                                            \
        kernel->block_header_bytes = 0;                                                                                        \
        kernel->encode = raw_encode_##type;                                                                                    \
        kernel->decode = raw_decode_##type;                                                                                    \
        kernel->encode_feedback = raw_feedback_##type;                                                                         \
        kernel->reduce = kernel->reduce_own = PICK(operation, sum, raw_min_##type, raw_max_##type, raw_product_##type);        \
        kernel->finish = operation == SMLT_MEAN ? finish_mean_##type : finish_as_is_##type;                                    \
        return 1;                                                                                                              \
    } while (0)

#define SELECT_FLOAT(type)                                                                                                     \
    if (operation > SMLT_PRODUCT) return 0;                                                                                    \
    SELECT(type, type, raw_sum_##type)
#define SELECT_INTEGER(type, wide)                                                                                             \
    SELECT(type, wide,                                                                                                         \
           operation == SMLT_MEAN   ? raw_wide_##type                                                                          \
           : operation >= SMLT_BAND ? PICK_BITS(operation, type)                                                               \
                                    : raw_sum_##type)

int smlt_raw_select(smlt_kernel *kernel, int dtype, int operation) {
    switch (dtype) {
    case SMLT_DTYPE_FLOAT32: SELECT_FLOAT(float);
    case SMLT_DTYPE_FLOAT64: SELECT_FLOAT(double);
    case SMLT_DTYPE_INT8: SELECT_INTEGER(int8_t, int64_t);
    case SMLT_DTYPE_INT16: SELECT_INTEGER(int16_t, int64_t);
    case SMLT_DTYPE_INT32: SELECT_INTEGER(int32_t, int64_t);
    case SMLT_DTYPE_INT64: SELECT_INTEGER(int64_t, int128_t);
    case SMLT_DTYPE_UINT8: SELECT_INTEGER(uint8_t, int64_t);
    case SMLT_DTYPE_UINT16: SELECT_INTEGER(uint16_t, int64_t);
    case SMLT_DTYPE_UINT32: SELECT_INTEGER(uint32_t, int64_t);
    case SMLT_DTYPE_UINT64: SELECT_INTEGER(uint64_t, int128_t);
    default: return 0;
    }
}
