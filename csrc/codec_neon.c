/* The vector kernels with NEON, which every aarch64 has. */
#include "codec_paths.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define INLINE static inline __attribute__((always_inline))
#define OVERRIDE smlt_neon_override
#define LANES 4

typedef float32x4_t vf;
typedef int32x4_t vi;

int smlt_neon_supported(void) { return 1; }

/* Loads and stores of bytes, which assume no alignment. */
INLINE vf load_floats(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
INLINE vf load_halves(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE vi load_shorts(const void *p) { return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p)))); }
INLINE vi load_bytes(const void *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))));
}

INLINE void store_floats(void *p, vf x) { vst1q_u8(p, vreinterpretq_u8_f32(x)); }
INLINE void stream_floats(void *p, vf x) { store_floats(p, x); } /* its hint has no intrinsic */
INLINE void stream_ends(void) {}
INLINE void store_halves(void *p, vf x) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(x))); }
INLINE void store_shorts(void *p, vi a, vi b) { vst1q_u8(p, vreinterpretq_u8_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)))); }
INLINE void store_bytes(void *p, vi a, vi b, vi c, vi d) {
    int16x8_t ab = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), cd = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
    vst1q_u8(p, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(ab), vmovn_s16(cd))));
}

INLINE vi larger(vi a, vi b) { return vmaxq_s32(a, b); }
INLINE vi where_greater(vi a, vi b, vi x, vi y) { return vbslq_s32(vcgtq_s32(a, b), x, y); }
INLINE vf one_nan_each(vf x) { return vbslq_f32(vceqq_f32(x, x), x, vreinterpretq_f32_u32(vdupq_n_u32(QUIET_NAN_BITS))); }
INLINE vf limited(vf x, float limit) { return vmaxq_f32(vminq_f32(x, vdupq_n_f32(limit)), vdupq_n_f32(-limit)); }
INLINE vi rounded(vf x) { return vcvtnq_s32_f32(x); }

#include "codec_vector.h"

#endif
