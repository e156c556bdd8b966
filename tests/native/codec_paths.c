/* Every path of the codec layer beside the portable one, bit for bit, over random and special elements.
 *
 * Prints the paths compared and a checksum of all that the portable path wrote, which is the same on every machine.
 * Exits with 1 and the case on the first difference. Argument: the number of rounds.
 */
#include "codec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 1500 /* elements: several pieces of every kind */
#define ROOM (MOST * 8 + 64)

static uint64_t state = 0x9e3779b97f4a7c15;

static uint32_t random_bits(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static uint32_t below(uint32_t limit) { return random_bits() % limit; }

static float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static const uint32_t SPECIAL[] = {
    0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000,
    0xffc12345, 0x7f800001, 0xffbfffff, 0x7f7f7fff, 0x7f7f8000, 0xff7f8001, 0x3f800000, 0x3f808000, 0x3f818000, 0x477ff000,
};

/* Kinds of chunks: any bits, special ones, few special ones, zeros, growing (in `fill`), otherwise one magnitude. */
static float element(int kind, float magnitude) {
    float uniform = (float)(int32_t)random_bits() * 0x1p-31f;
    switch (kind) {
    case 0: return of_bits(random_bits());
    case 1: return of_bits(SPECIAL[below(sizeof SPECIAL / sizeof *SPECIAL)]);
    case 2: return below(400) ? uniform * magnitude : of_bits(SPECIAL[below(sizeof SPECIAL / sizeof *SPECIAL)]);
    case 3: return below(3) ? 0.0f : -0.0f;
    default: return uniform * magnitude;
    }
}

static void fill(char *elements, size_t n, int dtype) {
    static const float MAGNITUDES[] = {3.4028235e38f, 1e30f, 65504.0f, 1.0f, 1e-30f, 1.2e-38f, 1e-41f};
    int kind = (int)below(8);
    float magnitude = MAGNITUDES[below(sizeof MAGNITUDES / sizeof *MAGNITUDES)];
    for (size_t i = 0; i < n; i++) {
        float value = kind == 4 ? element(kind, 0x1p-126f) * (float)(i * i * i) : element(kind, magnitude);
        double wide = value;
        if (dtype == SMLT_DTYPE_FLOAT64)
            memcpy(elements + i * sizeof wide, &wide, sizeof wide);
        else
            memcpy(elements + i * sizeof value, &value, sizeof value);
    }
}

/* One case, and all that a path writes for it. Everything lies at an odd address. */
typedef struct {
    int dtype, codec, operation, shift;
    size_t n, piece;
    char source[ROOM], other[ROOM], residual[ROOM], garbage[ROOM];
} question;

typedef struct {
    int exponent, feedback_exponent, finished;
    char wire[ROOM], decoded[ROOM], pieces[ROOM], again[ROOM], accumulator[ROOM], feedback_wire[ROOM], next[ROOM], first[ROOM];
    char from_garbage[ROOM], streamed[ROOM];
} answer;

static void ask(const question *q, answer *a) {
    smlt_kernel kernel;
    memset(a, 0, sizeof *a);
    if (!smlt_kernel_select(&kernel, q->dtype, q->codec, q->operation)) return;
    size_t n = q->n, bytes = smlt_wire_size(&kernel, n);
    a->exponent = kernel.encode(a->wire + 1, q->source + 1, n, SMLT_CHOOSE_EXPONENT);
    kernel.decode(a->decoded + 3, a->wire + 1, n, a->exponent);
    for (size_t elements = 0, taken = 0, count; elements < n; elements += count, taken += smlt_wire_size(&kernel, count)) {
        size_t room = q->piece < kernel.block_elements ? kernel.block_elements : q->piece;
        size_t there = bytes - taken, offered = smlt_wire_size(&kernel, room);
        count = smlt_wire_elements(&kernel, offered < there ? offered : there, n - elements);
        kernel.decode(a->pieces + 3 + elements * kernel.element_bytes, a->wire + 1 + taken, count, a->exponent);
    }
    memcpy(a->again, a->wire, sizeof a->again);
    kernel.encode(a->again + 1, a->decoded + 3, n, q->codec == SMLT_INT8 ? SMLT_KEEP_SCALES : a->exponent);
    kernel.reduce(a->accumulator + 1, a->wire + 1, n, a->exponent, q->shift, 1);
    kernel.reduce_own(a->accumulator + 1, q->other + 1, n, a->exponent, q->shift, 0);
    kernel.reduce(a->accumulator + 1, a->wire + 1, n, a->exponent, q->shift, 0);
    a->finished = kernel.finish(a->accumulator + 1, n, 3, q->shift);
    a->feedback_exponent =
        kernel.encode_feedback(a->feedback_wire + 1, q->source + 1, NULL, a->first + 1, n, SMLT_CHOOSE_EXPONENT);
    memcpy(a->next, q->residual, sizeof a->next);
    kernel.encode_feedback(a->feedback_wire + 1, q->source + 1, a->next + 1, a->next + 1, n, SMLT_CHOOSE_EXPONENT);
    kernel.decode(a->from_garbage + 1, q->garbage + 1, n, 3);
    kernel.decode_streaming(a->streamed + q->piece % 64, a->wire + 1, n, a->exponent);
}

static const char *difference(const answer *expected, const answer *got) {
    if (expected->exponent != got->exponent || expected->feedback_exponent != got->feedback_exponent) return "exponent";
    if (expected->finished != got->finished) return "finish's verdict";
#define COMPARE(field)                                                                                                         \
    if (memcmp(expected->field, got->field, ROOM)) return #field
    COMPARE(wire);
    COMPARE(decoded);
    COMPARE(pieces);
    COMPARE(again);
    COMPARE(accumulator);
    COMPARE(feedback_wire);
    COMPARE(first);
    COMPARE(next);
    COMPARE(from_garbage);
    COMPARE(streamed);
    return memcmp(got->decoded, got->pieces, ROOM) ? "decoding in pieces" : NULL;
}

static int fails(const question *q, const char *path, const char *what) {
    if (!what) return 0;
    printf("%s differs in %s: dtype %d, codec %d, operation %d, n %zu, shift %d\n", path, what, q->dtype, q->codec,
           q->operation, q->n, q->shift);
    return 1;
}

int main(int argc, char **argv) {
    static question q;
    static answer expected, got;
    uint64_t checksum = 14695981039346656037u;
    long rounds = argc > 1 ? atol(argv[1]) : 2000;
    for (long round = 0; round < rounds; round++) {
        q.dtype = below(8) ? SMLT_DTYPE_FLOAT32 : SMLT_DTYPE_FLOAT64;
        q.codec = (int)below(SMLT_CODECS);
        q.operation = (int)below(SMLT_PRODUCT); /* the others have one path only */
        q.n = below(4) ? below(MOST) : below(40);
        q.shift = (int)below(4);
        q.piece = 1 + below(600);
        fill(q.source + 1, q.n, q.dtype);
        fill(q.other + 1, q.n, q.dtype);
        fill(q.residual + 1, q.n, q.dtype);
        for (size_t i = 0; i < ROOM; i++) q.garbage[i] = (char)random_bits();
        smlt_codec_use("portable");
        ask(&q, &expected);
        for (size_t i = 0; i < offsetof(answer, from_garbage); i++)
            checksum = (checksum ^ ((unsigned char *)&expected)[i]) * 1099511628211u;
        if (q.codec != SMLT_RAW && fails(&q, "portable", memcmp(expected.wire, expected.again, ROOM) ? "encoding again" : NULL))
            return 1;
        for (int k = 0; smlt_codec_path(k); k++) {
            smlt_codec_use(smlt_codec_path(k));
            ask(&q, &got);
            if (fails(&q, smlt_codec_path(k), difference(&expected, &got))) return 1;
        }
    }
    for (int k = 0; smlt_codec_path(k); k++) printf("%s ", smlt_codec_path(k));
    printf("%016llx\n", (unsigned long long)checksum);
    return 0;
}
