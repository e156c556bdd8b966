/* Error feedback: what an encoding loses is added to the next one. */
#include "codec_paths.h"

#include <math.h>

/* Elements in a piece: values and decoded values of doubles are 16 KB. A multiple of SMLT_INT8_BLOCK. */
#define PIECE 1024

static int chosen_exponent(const smlt_feedback_parts *parts, const char *source, const char *residual, size_t n) {
    double values[PIECE];
    int exponent = SMLT_CHOOSE_EXPONENT; /* below every other */
    for (size_t done = 0; done < n; done += PIECE) {
        size_t count = n - done < PIECE ? n - done : PIECE, offset = done * parts->element_bytes;
        parts->add(values, source + offset, residual ? residual + offset : NULL, count);
        int wanted = parts->exponent(values, count);
        if (wanted > exponent) exponent = wanted;
    }
    return exponent == SMLT_CHOOSE_EXPONENT ? 0 : exponent;
}

int smlt_encode_feedback(const smlt_feedback_parts *parts, void *wire, const void *source, const void *residual,
                         void *next_residual, size_t n, int exponent) {
    double values[PIECE], decoded[PIECE];
    size_t piece_bytes = PIECE * parts->wire_bytes + PIECE / SMLT_INT8_BLOCK * parts->block_bytes;
    if (exponent == SMLT_CHOOSE_EXPONENT && parts->exponent) exponent = chosen_exponent(parts, source, residual, n);
    char *coded = wire;
    int used = 0;
    for (size_t done = 0; done < n; done += PIECE, coded += piece_bytes) {
        size_t count = n - done < PIECE ? n - done : PIECE, offset = done * parts->element_bytes;
        parts->add(values, (const char *)source + offset, residual ? (const char *)residual + offset : NULL, count);
        used = parts->encode(coded, values, count, exponent);
        parts->decode(decoded, coded, count, used);
        parts->subtract((char *)next_residual + offset, values, decoded, count);
    }
    return used;
}

/* A difference that is not finite comes from a value that is not: nothing to make good. */
#define PARTS(type, quiet_nan)                                                                                                 \
    void smlt_add_##type(void *values, const void *source, const void *residual, size_t n) {                                   \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type sum = LOAD(type, source, i) + (residual ? LOAD(type, residual, i) : 0);                                       \
            STORE(type, values, i, sum == sum ? sum : (quiet_nan));                                                            \
        }                                                                                                                      \
    }                                                                                                                          \
    void smlt_subtract_##type(void *residual, const void *values, const void *decoded, size_t n) {                             \
        for (size_t i = 0; i < n; i++) {                                                                                       \
            type lost = LOAD(type, values, i) - LOAD(type, decoded, i);                                                        \
            STORE(type, residual, i, lost - lost == 0 ? lost : 0);                                                             \
        }                                                                                                                      \
    }

PARTS(float, float_of(QUIET_NAN_BITS))
PARTS(double, (double)NAN)
