/* AVX2 + F16C kernels for float32, chosen at run time; bit-identical to the portable ones in codec.c. */
#include "codec.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))

int smlt_avx2_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

TARGET static uint32_t largest_finite_bits(const float *source, size_t n) {
    const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff), infinity = _mm256_set1_epi32(0x7f800000);
    __m256i largest = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 8 <= n; i += 8) { /* magnitudes are below 2^31: signed comparison orders them */
        __m256i bits = _mm256_and_si256(_mm256_loadu_si256((const void *)(source + i)), magnitude_mask);
        bits = _mm256_and_si256(bits, _mm256_cmpgt_epi32(infinity, bits));
        largest = _mm256_max_epi32(largest, bits);
    }
    uint32_t lanes[8], result = 0;
    _mm256_storeu_si256((void *)lanes, largest);
    for (; i < n; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, source + i, sizeof bits);
        bits &= 0x7fffffff;
        if (bits < 0x7f800000 && bits > result) result = bits;
    }
    for (int k = 0; k < 8; k++)
        if (lanes[k] > result) result = lanes[k];
    return result;
}

TARGET static int half_encode(void *wire, const void *source, size_t n, int exponent) {
    const float *values = source;
    uint16_t *halves = wire;
    if (exponent == SMLT_CHOOSE_EXPONENT) exponent = smlt_fp16_exponent(largest_finite_bits(values, n));
    float scale = smlt_power_of_two(-exponent);
    __m256 scales = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((void *)(halves + i),
                         _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(values + i), scales), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) {
        uint16_t half = smlt_half_from_float(values[i] * scale);
        __builtin_memcpy(halves + i, &half, sizeof half);
    }
    if (exponent == SMLT_FP16_EXPONENT_MAX) smlt_fp16_saturate(wire, n);
    return exponent;
}

TARGET static void half_sum(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first) {
    float *sums = accumulator;
    const uint16_t *halves = wire;
    float scale = smlt_power_of_two(exponent - shift);
    __m256 scales = _mm256_set1_ps(scale);
    size_t i = 0;
    if (first)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(sums + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *)(halves + i))), scales));
    else
        for (; i + 8 <= n; i += 8) {
            __m256 x = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *)(halves + i))), scales);
            _mm256_storeu_ps(sums + i, _mm256_add_ps(_mm256_loadu_ps(sums + i), x));
        }
    for (; i < n; i++) {
        uint16_t half;
        __builtin_memcpy(&half, halves + i, sizeof half);
        float x = smlt_float_from_half(half) * scale;
        sums[i] = first ? x : sums[i] + x;
    }
}

TARGET static void half_decode(void *target, const void *wire, size_t n, int exponent) {
    half_sum(target, wire, n, exponent, 0, 1);
}

TARGET static void raw_sum(void *accumulator, const void *source, size_t n, int exponent, int shift, int first) {
    float *sums = accumulator;
    const float *values = source;
    float scale = smlt_power_of_two(-shift);
    __m256 scales = _mm256_set1_ps(scale);
    (void)exponent;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(values + i), scales);
        _mm256_storeu_ps(sums + i, first ? x : _mm256_add_ps(_mm256_loadu_ps(sums + i), x));
    }
    for (; i < n; i++) {
        float x;
        __builtin_memcpy(&x, values + i, sizeof x);
        x *= scale;
        sums[i] = first ? x : sums[i] + x;
    }
}

TARGET static int finish_mean(void *accumulator, size_t n, int world_size, int shift) {
    float *sums = accumulator, divisor = (float)world_size, scale = smlt_power_of_two(shift);
    __m256 divisors = _mm256_set1_ps(divisor), scales = _mm256_set1_ps(scale), bad = _mm256_setzero_ps();
    size_t i = 0;
    int not_finite = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 mean = _mm256_mul_ps(_mm256_div_ps(_mm256_loadu_ps(sums + i), divisors), scales);
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(_mm256_sub_ps(mean, mean), _mm256_setzero_ps(), _CMP_NEQ_UQ));
        _mm256_storeu_ps(sums + i, mean);
    }
    for (; i < n; i++) {
        sums[i] = sums[i] / divisor * scale;
        not_finite |= !(sums[i] - sums[i] == 0);
    }
    return not_finite || _mm256_movemask_ps(bad) != 0;
}

void smlt_avx2_override(smlt_kernel *kernel, int dtype, int codec, int operation) {
    if (dtype != SMLT_FLOAT32) return;
    int sums = operation == SMLT_MEAN || operation == SMLT_SUM;
    if (sums) kernel->reduce_own = raw_sum;
    if (operation == SMLT_MEAN) kernel->finish = finish_mean;
    if (codec == SMLT_FP16) {
        kernel->encode = half_encode;
        kernel->decode = half_decode;
        if (sums) kernel->reduce = half_sum;
    } else if (sums) {
        kernel->reduce = raw_sum;
    }
}

#else

int smlt_avx2_supported(void) { return 0; }
void smlt_avx2_override(smlt_kernel *kernel, int dtype, int codec, int operation) {
    (void)kernel, (void)dtype, (void)codec, (void)operation;
}

#endif
