/* Which instruction sets this x86-64 has and its system keeps the registers of.
 *
 * Not __builtin_cpu_supports: it reads a table that the compiler's run-time library fills, and zig's, with which the released
 * wheels are linked, leaves it empty. */
#ifndef SMLT_CODEC_X86_H
#define SMLT_CODEC_X86_H

#include <cpuid.h>
#include <stdint.h>

enum { XMM_YMM = 0x6, XMM_YMM_ZMM = 0xe6 }; /* of XCR0 (Intel SDM 1, 13.3): the states that the system saves */

/* Whether the system saves all of `states`. */
static inline int x86_saves(uint32_t states) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0)); /* the intrinsic needs a target that has it */
    return (a & states) == states;
}

/* Register EBX of leaf 7: AVX2, AVX-512 and the like; 0 on processors without it. */
static inline uint32_t x86_extended(void) {
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? b : 0;
}

static inline int x86_has_avx2_f16c(void) {
    uint32_t a, b, c, d;
    return x86_saves(XMM_YMM) && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (x86_extended() & bit_AVX2);
}

static inline int x86_has_avx512(void) { /* F, BW, VL and DQ */
    uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    return x86_saves(XMM_YMM_ZMM) && (x86_extended() & wanted) == wanted;
}

#endif
