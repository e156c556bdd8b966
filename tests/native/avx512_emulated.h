/* The AVX-512 instructions that csrc/codec_avx512.c uses, lane by lane as Intel's guide defines them, for machines that
 * lack them. Included before that file, with -D'TARGET=__attribute__((target("avx2,f16c")))'. It proves the kernels'
 * logic, not that the compiler's AVX-512 code is right: that needs the machine.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define SUPPORTED 1

#define EMULATED __attribute__((target("avx2,f16c"), unused)) static inline
typedef uint16_t lanes_mask;

EMULATED __m512 emulated_loadu_ps(const void *p) {
    __m512 result;
    memcpy(&result, p, sizeof result);
    return result;
}
EMULATED void emulated_storeu_ps(void *p, __m512 x) { memcpy(p, &x, sizeof x); }
EMULATED void emulated_stream_ps(void *p, __m512 x) {
    if ((uintptr_t)p % sizeof x) __builtin_trap();
    memcpy(p, &x, sizeof x);
}

EMULATED __m512 emulated_cvtph_ps(__m256i halves) {
    __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    return emulated_loadu_ps(parts);
}
EMULATED __m256i emulated_cvtps_ph(__m512 x, int rounding) {
    __m256 parts[2];
    memcpy(parts, &x, sizeof x);
    (void)rounding; /* always to nearest */
    return _mm256_set_m128i(_mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT));
}

#define WIDEN(name, narrow_vector, narrow_type)                                                                                \
    EMULATED __m512i name(narrow_vector narrow) {                                                                              \
        narrow_type from[16];                                                                                                  \
        int32_t lanes[16];                                                                                                     \
        __m512i result;                                                                                                        \
        memcpy(from, &narrow, sizeof from);                                                                                    \
        for (int k = 0; k < 16; k++) lanes[k] = from[k];                                                                       \
        memcpy(&result, lanes, sizeof result);                                                                                 \
        return result;                                                                                                         \
    }
WIDEN(emulated_cvtepu16_epi32, __m256i, uint16_t)
WIDEN(emulated_cvtepi8_epi32, __m128i, int8_t)

#define TRUNCATE(name, narrow_vector, narrow_type)                                                                             \
    EMULATED narrow_vector name(__m512i wide) {                                                                                \
        uint32_t from[16];                                                                                                     \
        narrow_type lanes[16];                                                                                                 \
        narrow_vector result;                                                                                                  \
        memcpy(from, &wide, sizeof from);                                                                                      \
        for (int k = 0; k < 16; k++) lanes[k] = (narrow_type)from[k];                                                          \
        memcpy(&result, lanes, sizeof result);                                                                                 \
        return result;                                                                                                         \
    }
TRUNCATE(emulated_cvtepi32_epi16, __m256i, uint16_t)
TRUNCATE(emulated_cvtepi32_epi8, __m128i, uint8_t)

/* `expression` of the lanes a and b. */
#define LANEWISE(name, vector, lane_type, expression)                                                                          \
    EMULATED vector name(vector first, vector second) {                                                                        \
        lane_type lanes[16], others[16];                                                                                       \
        memcpy(lanes, &first, sizeof lanes), memcpy(others, &second, sizeof others);                                           \
        for (int k = 0; k < 16; k++) {                                                                                         \
            lane_type a = lanes[k], b = others[k];                                                                             \
            lanes[k] = (expression);                                                                                           \
        }                                                                                                                      \
        memcpy(&first, lanes, sizeof lanes);                                                                                   \
        return first;                                                                                                          \
    }
LANEWISE(emulated_max_epi32, __m512i, int32_t, a > b ? a : b)
LANEWISE(emulated_max_ps, __m512, float, a > b ? a : b)
LANEWISE(emulated_min_ps, __m512, float, a < b ? a : b)

#define MASK(name, vector, lane_type, expression)                                                                              \
    EMULATED lanes_mask name(vector first, vector second) {                                                                    \
        lane_type lanes[16], others[16];                                                                                       \
        lanes_mask mask = 0;                                                                                                   \
        memcpy(lanes, &first, sizeof lanes), memcpy(others, &second, sizeof others);                                           \
        for (int k = 0; k < 16; k++) {                                                                                         \
            lane_type a = lanes[k], b = others[k];                                                                             \
            mask |= (lanes_mask)((expression) << k);                                                                           \
        }                                                                                                                      \
        return mask;                                                                                                           \
    }
MASK(emulated_cmpgt_epi32_mask, __m512i, int32_t, a > b)
MASK(emulated_unordered_mask, __m512, float, a != a || b != b)

/* Where the mask's bit is set, `second`. */
EMULATED __m512i emulated_mask_blend_epi32(lanes_mask mask, __m512i first, __m512i second) {
    int32_t lanes[16], others[16];
    memcpy(lanes, &first, sizeof lanes), memcpy(others, &second, sizeof others);
    for (int k = 0; k < 16; k++)
        if (mask >> k & 1) lanes[k] = others[k];
    memcpy(&first, lanes, sizeof lanes);
    return first;
}

EMULATED __m512i emulated_cvtps_epi32(__m512 x) {
    __m256 parts[2];
    memcpy(parts, &x, sizeof x);
    __m256i rounded[2] = {_mm256_cvtps_epi32(parts[0]), _mm256_cvtps_epi32(parts[1])};
    __m512i result;
    memcpy(&result, rounded, sizeof result);
    return result;
}

#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_stream_ps emulated_stream_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_cvtps_ph
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_cmpgt_epi32_mask emulated_cmpgt_epi32_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emulated_unordered_mask(a, b) /* the one predicate in use */
#define _mm512_mask_blend_epi32 emulated_mask_blend_epi32
#define _mm512_mask_blend_ps(mask, a, b) ((__m512)emulated_mask_blend_epi32(mask, (__m512i)(a), (__m512i)(b)))
#define _mm512_set1_epi32(x) ((__m512i)((__attribute__((vector_size(64))) int32_t){0} + (x)))
#define _mm512_set1_ps(x) ((__m512)((__attribute__((vector_size(64))) float){0} + (x)))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
