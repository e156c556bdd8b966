/* From a plan to the state of a collective: checked, ordered, with all the arrays it needs in one block of memory. */
#include <stdlib.h>
#include <string.h>

#include "collective.h"

/* The block is kept for the next collective: a training run repeats itself and allocates nothing. */
static char *take_block(smlt_engine *engine, size_t *size) {
    char *block = engine->spare;
    if (!block || engine->spare_size < *size) return malloc(*size);
    *size = engine->spare_size;
    engine->spare = NULL;
    return block;
}

void smlt_collective_free(smlt_engine *engine, collective *c) {
    size_t size = c->block_size;
    if (engine->spare && engine->spare_size >= size) {
        free(c);
        return;
    }
    free(engine->spare);
    engine->spare = (char *)c;
    engine->spare_size = size;
}

static int reads_source(const smlt_engine *engine, const smlt_plan *plan, const smlt_chunk *chunk) {
    return plan->algorithm != SMLT_COPY || chunk->owner == engine->rank;
}

/* An owner keeps what it has aggregated, to publish it again after a lost connection. */
static int writes_target(const smlt_engine *engine, const smlt_plan *plan, const smlt_chunk *chunk) {
    return is_reader(chunk, engine->rank) || (plan->algorithm == SMLT_HIERARCHICAL && chunk->owner == engine->rank);
}

static int chunk_is_sound(const smlt_engine *engine, const smlt_plan *plan, int index) {
    const smlt_chunk *chunk = &plan->chunks[index];
    if (chunk->segment < 0 || chunk->segment >= plan->segment_count) return 0;
    if (chunk->owner < (index ? chunk[-1].owner : 0) || chunk->owner >= engine->world_size) return 0;
    if (chunk->reader < 0 || chunk->reader > engine->world_size) return 0;
    if (plan->algorithm == SMLT_COPY ? is_kept(chunk) : plan->algorithm == SMLT_ONE_SHOT && chunk->reader) return 0;
    if (chunk->count < 0 || (uint64_t)chunk->count > engine->chunk_elements) return 0;
    const smlt_segment *segment = &plan->segments[chunk->segment];
    smlt_kernel kernel;
    if (!smlt_kernel_select(&kernel, segment->dtype, segment->codec, plan->operation)) return 0;
    if (smlt_wire_size(&kernel, (size_t)chunk->count) > engine->chunk_bytes) return 0;
    if (reads_source(engine, plan, chunk) && (chunk->source < 0 || chunk->source > segment->source_count - chunk->count))
        return 0;
    if (!writes_target(engine, plan, chunk)) return 1;
    return chunk->target >= 0 && chunk->target <= segment->target_count - chunk->count;
}

static int plan_is_sound(const smlt_engine *engine, const smlt_plan *plan) {
    if (plan->chunk_count < 1 || (plan->algorithm == SMLT_HIERARCHICAL && plan->chunks[0].owner != 0)) return 0;
    for (int i = 0; i < plan->chunk_count; i++)
        if (!chunk_is_sound(engine, plan, i)) return 0;
    return 1;
}

/* `start[owner]`: its first chunk. */
static void find_starts(const smlt_engine *engine, const collective *c, uint32_t *start) {
    for (int32_t owner = 0, chunk = 0; owner <= engine->world_size; owner++) {
        while (chunk < (int32_t)c->chunk_count && c->chunks[chunk].owner < owner) chunk++;
        start[owner] = (uint32_t)chunk;
    }
}

/* Whether some worker's contributions, or aggregates, could exceed its credit at a node. Alike on all workers. */
static int exceeds_credit(const smlt_engine *engine, const collective *c) {
    for (int node = 0; engine->credit && node < engine->node_count; node++) {
        size_t bytes = 0;
        for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++)
            if (c->node[chunk] == node) bytes += smlt_chunk_stored_bytes(c, chunk);
        if (bytes > engine->credit) return 1;
    }
    return 0;
}

static void count_chunks(const smlt_engine *engine, const collective *c, node_work *work) {
    for (uint32_t chunk = 0, start = 0; chunk < c->chunk_count; chunk++) {
        int owner = c->chunks[chunk].owner;
        if (chunk && owner != c->chunks[chunk - 1].owner) start = chunk;
        node_work *at = &work[node_of(engine, owner, chunk - start)];
        at->chunks++;
        at->own += owner == engine->rank;
    }
}

static void add_upload(collective *c, uint32_t chunk) {
    chunk_queue *uploads = &c->work[c->node[chunk]].uploads;
    uploads->chunks[uploads->count++] = chunk;
    c->uploads_left++;
}

/* Round by round, one chunk for each owner, beginning behind this rank: every owner hears from everyone early, and no
 * two workers press on the same owner first. With less credit than that takes all begin with rank 0 (credit.c). A copy's
 * owner publishes its own chunks in order. */
static void order_uploads(const smlt_engine *engine, collective *c, const uint32_t *start) {
    if (c->algorithm == SMLT_COPY)
        for (uint32_t chunk = c->own_first; chunk < c->own_end; chunk++) add_upload(c, chunk);
    if (c->algorithm != SMLT_HIERARCHICAL) return;
    uint32_t ranks = (uint32_t)engine->world_size, foreign = c->chunk_count - (c->own_end - c->own_first);
    for (uint32_t round = 0; c->uploads_left < foreign; round++)
        for (uint32_t k = 1; k <= ranks; k++) {
            uint32_t owner = c->bounded ? k - 1 : ((uint32_t)engine->rank + k) % ranks, chunk = start[owner] + round;
            if (owner != (uint32_t)engine->rank && chunk < start[owner + 1]) add_upload(c, chunk);
        }
}

/* What the arrays of a collective need: counted with a NULL block first, laid out with the block then. */
typedef struct {
    char *block;
    size_t used;
} layout;

static void *room(layout *memory, size_t count, size_t size) {
    memory->used = (memory->used + 15) / 16 * 16;
    void *at = memory->block ? memory->block + memory->used : NULL;
    memory->used += count * size;
    return at;
}

/* The owner keeps the block headers of what it published, to publish the same bytes again after a lost connection. */
static size_t headers_size(const smlt_plan *plan, const collective *c, size_t *at) {
    size_t size = 0;
    for (uint32_t chunk = c->own_first; chunk < c->own_end; chunk++) {
        const smlt_segment *segment = &plan->segments[plan->chunks[chunk].segment];
        smlt_kernel kernel;
        smlt_kernel_select(&kernel, segment->dtype, segment->codec, plan->operation);
        if (at) at[chunk - c->own_first] = size;
        size +=
            smlt_wire_size(&kernel, (size_t)plan->chunks[chunk].count) - (size_t)plan->chunks[chunk].count * kernel.wire_bytes;
    }
    return size;
}

static void lay_out_work(collective *c, int nodes, const node_work *counts, layout *memory) {
    c->work = room(memory, (size_t)nodes, sizeof *c->work);
    for (int node = 0; node < nodes; node++) {
        size_t chunks = counts[node].chunks, own = counts[node].own;
        node_work work = counts[node];
        work.uploads.chunks = room(memory, chunks, sizeof *work.uploads.chunks);
        work.contributions.chunks = room(memory, 2 * own + REFETCHES, sizeof *work.uploads.chunks);
        work.aggregates.chunks = room(memory, 2 * chunks + REFETCHES, sizeof *work.uploads.chunks);
        work.republish.chunks = room(memory, own, sizeof *work.uploads.chunks);
        if (memory->block) c->work[node] = work;
    }
}

static uint32_t *lay_out(const smlt_engine *engine, const smlt_plan *plan, collective *c, const node_work *counts,
                         layout *memory) {
    size_t chunks = c->chunk_count, own = c->own_end - c->own_first, ranks = (size_t)engine->world_size;
    c->segments = room(memory, (size_t)plan->segment_count, sizeof *c->segments);
    lay_out_work(c, engine->node_count, counts, memory);
    c->exponent = room(memory, own, sizeof *c->exponent);
    c->headers_at = room(memory, own, sizeof *c->headers_at);
    c->arrived_count = room(memory, own, sizeof *c->arrived_count);
    uint32_t *start = room(memory, ranks + 1, sizeof *start);
    c->node = room(memory, chunks, 1);
    c->upload_state = room(memory, chunks, 1);
    c->chunk_state = room(memory, chunks, 1);
    c->aggregated = room(memory, chunks, 1);
    c->shift = room(memory, own, 1);
    c->gone = room(memory, own, 1);
    c->arrived = room(memory, own * ranks, 1);
    c->joined = room(memory, ranks, 1);
    c->headers = room(memory, headers_size(plan, c, NULL), 1);
    c->description = room(memory, strlen(plan->description) + 1, 1);
    return start;
}

static void set_parts(const smlt_engine *engine, collective *c, layout *memory) {
    if (c->algorithm != SMLT_ONE_SHOT) return;
    c->parts.arrived = room(memory, (size_t)engine->world_size, 1);
    c->parts.bytes = room(memory, (size_t)engine->world_size, c->parts.size);
}

static void set_counters(const smlt_engine *engine, collective *c) {
    c->chunks_left = c->chunk_count;
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++)
        if (c->chunks[chunk].owner != engine->rank && !is_reader(&c->chunks[chunk], engine->rank)) {
            c->chunk_state[chunk] = CHUNK_DONE; /* for others to read */
            c->chunks_left--;
        }
    c->tokens_left = c->chunks_left - (c->algorithm == SMLT_COPY ? c->uploads_left : 0);
    c->hello_left = c->hello_unsent = c->algorithm == SMLT_COPY && engine->rank != 0; /* others say it with a contribution */
    if (c->algorithm == SMLT_ONE_SHOT) {
        c->parts.unsent = 1;
        c->uploads_left = 1;
        c->tokens_left = others(engine);
    }
    if (engine->rank == 0) {
        c->joined[0] = 1;
        c->joined_left = engine->world_size - 1;
    }
}

collective *smlt_collective_new(smlt_engine *engine, const smlt_plan *plan) {
    if (!plan_is_sound(engine, plan)) return NULL;
    collective draft = {.step = engine->last_step + 1,
                        .digest = plan->digest,
                        .algorithm = plan->algorithm,
                        .chunks = plan->chunks,
                        .chunk_count = (uint32_t)plan->chunk_count,
                        .result.status = SMLT_ACTIVE};
    if (plan->algorithm != SMLT_ONE_SHOT) {
        while (draft.own_first < draft.chunk_count && draft.chunks[draft.own_first].owner < engine->rank) draft.own_first++;
        draft.own_end = draft.own_first;
        while (draft.own_end < draft.chunk_count && draft.chunks[draft.own_end].owner == engine->rank) draft.own_end++;
    } else {
        draft.parts.size = smlt_part_size(plan);
        if (draft.parts.size > SMLT_ONE_SHOT_BYTES_MAX) return NULL;
    }
    node_work counts[SMLT_NODES_MAX];
    memset(counts, 0, sizeof counts);
    count_chunks(engine, &draft, counts);
    layout counted = {.used = sizeof draft};
    lay_out(engine, plan, &draft, counts, &counted);
    set_parts(engine, &draft, &counted);

    draft.block_size = counted.used;
    char *block = take_block(engine, &draft.block_size);
    if (!block) return NULL;
    memset(block, 0, counted.used);
    collective *c = (collective *)block;
    *c = draft;
    layout memory = {.block = block, .used = sizeof draft};
    uint32_t *start = lay_out(engine, plan, c, counts, &memory);
    set_parts(engine, c, &memory);
    strcpy(c->description, plan->description);
    for (int i = 0; i < plan->segment_count; i++) {
        c->segments[i].segment = plan->segments[i];
        smlt_kernel *kernel = &c->segments[i].kernel;
        smlt_kernel_select(kernel, plan->segments[i].dtype, plan->segments[i].codec, plan->operation);
        if ((size_t)plan->segments[i].target_count * kernel->element_bytes >= STREAMING_BYTES)
            kernel->decode = kernel->decode_streaming;
    }
    headers_size(plan, c, c->headers_at);
    find_starts(engine, c, start);
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++)
        c->node[chunk] = (uint8_t)node_of(engine, c->chunks[chunk].owner, chunk - start[c->chunks[chunk].owner]);
    c->bounded = exceeds_credit(engine, c);
    smlt_count_aggregates(engine, c);
    order_uploads(engine, c, start);
    set_counters(engine, c);
    return c;
}
