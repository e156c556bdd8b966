/* The one-shot reduction of small values: everyone's contribution travels inside a token that everyone reads, and each
 * worker adds them all in rank order: the same bits everywhere (invariant 1), its own decoded like the others'. */
#include <string.h>

#include "collective.h"

#define EXPONENT_BYTES 4

size_t smlt_part_size(const smlt_plan *plan) {
    size_t size = 0;
    for (int i = 0; i < plan->chunk_count; i++) {
        const smlt_segment *segment = &plan->segments[plan->chunks[i].segment];
        smlt_kernel kernel;
        smlt_kernel_select(&kernel, segment->dtype, segment->codec, plan->operation);
        size += EXPONENT_BYTES + smlt_wire_size(&kernel, (size_t)plan->chunks[i].count);
    }
    return size;
}

static char *part_of(const collective *c, int rank) { return c->parts.bytes + (size_t)rank * c->parts.size; }

/* Encode this worker's contribution, once: after a lost connection the same bytes are sent again. */
const char *smlt_own_part(smlt_engine *engine, collective *c) {
    char *at = part_of(c, engine->rank);
    if (c->parts.encoded) return at;
    c->parts.encoded = 1;
    for (uint32_t i = 0; i < c->chunk_count; i++) {
        const smlt_chunk *chunk = &c->chunks[i];
        const typed_segment *typed = &c->segments[chunk->segment];
        int32_t exponent = smlt_encode_contribution(typed, chunk, at + EXPONENT_BYTES);
        memcpy(at, &exponent, sizeof exponent);
        at += EXPONENT_BYTES + smlt_wire_size(&typed->kernel, (size_t)chunk->count);
    }
    return part_of(c, engine->rank);
}

/* Add chunk `i`, which lies `offset` bytes into each part. Returns 1 when a mean is not finite. */
static int add_parts(smlt_engine *engine, const collective *c, uint32_t i, size_t offset, int shift) {
    const typed_segment *typed = &c->segments[c->chunks[i].segment];
    size_t n = (size_t)c->chunks[i].count;
    for (int rank = 0; rank < engine->world_size; rank++) {
        const char *part = part_of(c, rank) + offset;
        int32_t exponent;
        memcpy(&exponent, part, sizeof exponent);
        typed->kernel.reduce(engine->one_shot_accumulator, part + EXPONENT_BYTES, n, exponent, shift, rank == 0);
    }
    return typed->kernel.finish(engine->one_shot_accumulator, n, engine->world_size, shift);
}

static void add_up(smlt_engine *engine, collective *c) {
    size_t offset = 0;
    for (uint32_t i = 0; i < c->chunk_count; i++) {
        const smlt_chunk *chunk = &c->chunks[i];
        const typed_segment *typed = &c->segments[chunk->segment];
        if (add_parts(engine, c, i, offset, 0)) /* rare: add smaller, lest a sum overflow whose mean does not */
            add_parts(engine, c, i, offset, smlt_shift_for(engine->world_size));
        char *target = (char *)typed->segment.target + (size_t)chunk->target * typed->kernel.element_bytes;
        memcpy(target, engine->one_shot_accumulator, (size_t)chunk->count * typed->kernel.element_bytes);
        offset += EXPONENT_BYTES + smlt_wire_size(&typed->kernel, (size_t)chunk->count);
    }
    for (uint32_t i = 0; i < c->chunk_count; i++) smlt_chunk_complete(engine, c, i);
}

/* Exponents off the wire are limited to what ldexp-like scales can take; a hostile one changes values, nothing else. */
static int exponents_are_sound(const collective *c, const char *part) {
    for (uint32_t i = 0; i < c->chunk_count; i++) {
        const typed_segment *typed = &c->segments[c->chunks[i].segment];
        int32_t exponent;
        memcpy(&exponent, part, sizeof exponent);
        if (exponent < -2048 || exponent > 2048) return 0;
        part += EXPONENT_BYTES + smlt_wire_size(&typed->kernel, (size_t)c->chunks[i].count);
    }
    return 1;
}

void smlt_part_is_there(smlt_engine *engine, collective *c, int rank, const char *bytes, size_t length) {
    if (c->parts.arrived[rank] || length != c->parts.size || !exponents_are_sound(c, bytes)) return;
    c->parts.arrived[rank] = 1;
    memcpy(part_of(c, rank), bytes, length);
    if (--c->tokens_left == 0) {
        smlt_own_part(engine, c); /* before the target is written: it may be the source */
        add_up(engine, c);
    }
}
