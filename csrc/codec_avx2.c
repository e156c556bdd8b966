/* The vector kernels with AVX2 and F16C. */
#include "codec_paths.h"

#if defined(__x86_64__)
#include "codec_x86.h"

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define OVERRIDE smlt_avx2_override
#define LANES 8

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

int smlt_avx2_supported(void) { return x86_has_avx2_f16c(); }

INLINE vf load_floats(const void *p) { return (vf)_mm256_loadu_ps(p); }
INLINE vf load_halves(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE vi load_shorts(const void *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
INLINE vi load_bytes(const void *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }

INLINE void store_floats(void *p, vf x) { _mm256_storeu_ps(p, (__m256)x); }
INLINE void stream_floats(void *p, vf x) { _mm256_stream_ps(p, (__m256)x); }
INLINE void stream_ends(void) { _mm_sfence(); }
INLINE void store_halves(void *p, vf x) { _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }

/* The packing instructions work on each half of a vector by itself: the permutations put the pieces in order. */
INLINE void store_shorts(void *p, vi a, vi b) {
    __m256i packed = _mm256_packus_epi32((__m256i)a, (__m256i)b);
    _mm256_storeu_si256(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_bytes(void *p, vi a, vi b, vi c, vi d) {
    __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
}

INLINE vi larger(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE vi where_greater(vi a, vi b, vi x, vi y) {
    return (vi)_mm256_blendv_epi8((__m256i)y, (__m256i)x, _mm256_cmpgt_epi32((__m256i)a, (__m256i)b));
}
INLINE vf one_nan_each(vf x) {
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(QUIET_NAN_BITS));
    return (vf)_mm256_blendv_ps((__m256)x, nan, _mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
}
INLINE vf limited(vf x, float limit) {
    return (vf)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit));
}
INLINE vi rounded(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }

#include "codec_vector.h"

#endif
