/* The vector kernels with AVX-512 (F, BW, VL and DQ: every server since Skylake, and Zen 4). */
#include "codec_paths.h"

#if defined(__x86_64__)
#include "codec_x86.h"

#include <immintrin.h>

#ifndef TARGET /* the tests emulate the instructions where the machine lacks them */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define SUPPORTED x86_has_avx512()
#endif
#define INLINE TARGET static inline __attribute__((always_inline))
#define OVERRIDE smlt_avx512_override
#define LANES 16

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

int smlt_avx512_supported(void) { return SUPPORTED; }

INLINE vf load_floats(const void *p) { return (vf)_mm512_loadu_ps(p); }
INLINE vf load_halves(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE vi load_shorts(const void *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE vi load_bytes(const void *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }

INLINE void store_floats(void *p, vf x) { _mm512_storeu_ps(p, (__m512)x); }
INLINE void stream_floats(void *p, vf x) { _mm512_stream_ps(p, (__m512)x); }
INLINE void stream_ends(void) { _mm_sfence(); }
INLINE void store_halves(void *p, vf x) { _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store_shorts(void *p, vi a, vi b) {
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16((__m512i)a));
    _mm256_storeu_si256((__m256i_u *)p + 1, _mm512_cvtepi32_epi16((__m512i)b));
}
INLINE void store_bytes(void *p, vi a, vi b, vi c, vi d) {
    __m128i_u *quarters = p;
    _mm_storeu_si128(quarters, _mm512_cvtepi32_epi8((__m512i)a));
    _mm_storeu_si128(quarters + 1, _mm512_cvtepi32_epi8((__m512i)b));
    _mm_storeu_si128(quarters + 2, _mm512_cvtepi32_epi8((__m512i)c));
    _mm_storeu_si128(quarters + 3, _mm512_cvtepi32_epi8((__m512i)d));
}

INLINE vi larger(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE vi where_greater(vi a, vi b, vi x, vi y) {
    return (vi)_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b), (__m512i)y, (__m512i)x);
}
INLINE vf one_nan_each(vf x) {
    __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(QUIET_NAN_BITS));
    return (vf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q), (__m512)x, nan);
}
INLINE vf limited(vf x, float limit) {
    return (vf)_mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit));
}
INLINE vi rounded(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }

#include "codec_vector.h"

#endif
