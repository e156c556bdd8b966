/* What the collective says to the store. Every function here appends commands and the expectations of their replies. */
#include <string.h>

#include "collective.h"

void smlt_queue(smlt_engine *engine, smlt_node *node, int kind, smlt_message *message) {
    if (message->head.failed || message->tail.failed) {
        smlt_pool_give(&engine->pool, message);
        smlt_fail_engine(engine, SMLT_NO_MEMORY, "out of memory for commands to the store");
        return;
    }
    if (message->head.length == 0) /* it turned out that there was nothing to say */
        smlt_pool_give(&engine->pool, message);
    else
        smlt_lane_queue(&node->lanes[kind], message);
}

smlt_message *smlt_new_text(smlt_engine *engine) {
    smlt_message *message = smlt_pool_take_text(&engine->pool);
    if (!message) smlt_fail_engine(engine, SMLT_NO_MEMORY, "out of memory for commands to the store");
    return message;
}

void smlt_expect(smlt_engine *engine, smlt_node *node, int kind, smlt_expectation expectation) {
    if (!smlt_lane_expect(&node->lanes[kind], expectation))
        smlt_fail_engine(engine, SMLT_NO_MEMORY, "out of memory for replies of the store");
}

void smlt_expect_nothing(smlt_engine *engine, smlt_node *node) {
    smlt_expect(engine, node, SMLT_LANE_UP, (smlt_expectation){.kind = EXPECT_IGNORED});
}

/* ---- tokens ---- */

/* Streams live on between collectives; their TTL is renewed now and then, always behind an XADD that made them. */
static void append_expiry(smlt_engine *engine, smlt_node *node, resp_buffer *buffer, const char *key, int64_t *set_ms) {
    int64_t now = smlt_clock_ms();
    if (*set_ms && now - *set_ms < engine->ttl_ms / 4) return;
    *set_ms = now;
    resp_append_array(buffer, 3);
    resp_append_text(buffer, "PEXPIRE");
    resp_append_text(buffer, key);
    resp_append_number(buffer, engine->ttl_ms);
    smlt_expect_nothing(engine, node);
}

/* Beside the token a one-shot part, when there is one. */
static void append_entry(smlt_engine *engine, smlt_node *node, resp_buffer *buffer, int to_rank, smlt_token token,
                         const char *part, size_t part_length, smlt_expectation expectation) {
    char key[SMLT_KEY_MAX], bytes[SMLT_TOKEN_MAX];
    token.rank = (uint16_t)engine->rank;
    token.completed = engine->completed;
    if (to_rank >= 0)
        smlt_key_inbox(key, node->prefix, to_rank);
    else
        smlt_key_outbox(key, node->prefix);
    resp_append_array(buffer, part ? 7 : 5);
    resp_append_text(buffer, "XADD");
    resp_append_text(buffer, key);
    resp_append_text(buffer, "*");
    resp_append_text(buffer, "t");
    resp_append_bulk(buffer, bytes, smlt_token_pack(bytes, &token));
    if (part) {
        resp_append_text(buffer, "p");
        resp_append_bulk(buffer, part, part_length);
    }
    smlt_expect(engine, node, SMLT_LANE_UP, expectation);
    append_expiry(engine, node, buffer, key, &node->expiry_set_ms[to_rank >= 0 ? to_rank : engine->world_size]);
}

static void append_token(smlt_engine *engine, smlt_node *node, resp_buffer *buffer, int to_rank, smlt_token token,
                         smlt_expectation expectation) {
    append_entry(engine, node, buffer, to_rank, token, NULL, 0, expectation);
}

void smlt_tell(smlt_engine *engine, smlt_node *node, int to_rank, smlt_token token) {
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    append_token(engine, node, &message->head, to_rank, token, (smlt_expectation){.kind = EXPECT_IGNORED});
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

/* Whoever waits for anything waits at the first node too. */
void smlt_announce(smlt_engine *engine, uint64_t step, int kind, smlt_status status, const char *text, size_t length) {
    smlt_tell(
        engine, &engine->nodes[0], -1,
        (smlt_token){.kind = (uint8_t)kind, .status = (uint8_t)status, .step = step, .text = text, .text_length = length});
}

/* Have the XREAD that is under way answered now. */
void smlt_end_wait(smlt_engine *engine, smlt_node *node, uint64_t step) {
    smlt_tell(engine, node, -1, (smlt_token){.kind = SMLT_TOKEN_HELLO, .step = step});
}

static void compose_hello(smlt_engine *engine, collective *c) {
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    append_token(engine, &engine->nodes[0], &message->head, 0,
                 (smlt_token){.kind = SMLT_TOKEN_HELLO,
                              .step = c->step,
                              .digest = c->digest,
                              .text = c->description,
                              .text_length = strlen(c->description)},
                 (smlt_expectation){.kind = EXPECT_HELLO_STORED, .step = c->step});
    c->hello_unsent = 0;
    smlt_queue(engine, &engine->nodes[0], SMLT_LANE_UP, message);
}

/* ---- the Shard Generator: chunks going up ---- */

/* SET key <header, elements> PX ttl: value and expiry in one command (invariant 6). */
static void begin_set(smlt_engine *engine, collective *c, uint32_t chunk, smlt_message *message, const char *key,
                      size_t key_length, size_t elements_bytes, int exponent) {
    smlt_header_pack(message->payload, &(smlt_header){.step = c->step,
                                                      .digest = c->digest,
                                                      .chunk = chunk,
                                                      .exponent = exponent,
                                                      .elements = (uint32_t)c->chunks[chunk].count,
                                                      .rank = (uint16_t)engine->rank});
    message->payload_length = SMLT_HEADER_BYTES + elements_bytes;
    resp_append_array(&message->head, 5);
    resp_append_text(&message->head, "SET");
    resp_append_bulk(&message->head, key, key_length);
    resp_append_bulk_header(&message->head, message->payload_length);
    resp_append(&message->tail, "\r\n", 2);
    resp_append_text(&message->tail, "PX");
    resp_append_number(&message->tail, engine->ttl_ms);
}

static void expect_set(smlt_engine *engine, smlt_node *node, const smlt_message *message, smlt_expectation expectation) {
    node->upload_outstanding += message->payload_length;
    expectation.bytes = message->payload_length;
    smlt_expect(engine, node, SMLT_LANE_UP, expectation);
}

/* Encode this worker's elements of a chunk, with what earlier encodings lost where there is error feedback. */
int smlt_encode_contribution(const typed_segment *typed, const smlt_chunk *chunk, void *wire) {
    size_t offset = (size_t)chunk->source * typed->kernel.element_bytes, n = (size_t)chunk->count;
    const char *source = (const char *)typed->segment.source + offset, *residual = typed->segment.residual;
    if (!typed->segment.next_residual) return typed->kernel.encode(wire, source, n, SMLT_CHOOSE_EXPONENT);
    return typed->kernel.encode_feedback(wire, source, residual ? residual + offset : NULL,
                                         (char *)typed->segment.next_residual + offset, n, SMLT_CHOOSE_EXPONENT);
}

static void compose_part(smlt_engine *engine, collective *c) {
    smlt_node *node = one_shot_node(engine, c);
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    append_entry(engine, node, &message->head, -1,
                 (smlt_token){.kind = SMLT_TOKEN_PART,
                              .step = c->step,
                              .digest = c->digest,
                              .text = c->description,
                              .text_length = strlen(c->description)},
                 smlt_own_part(engine, c), c->parts.size, (smlt_expectation){.kind = EXPECT_PART_STORED, .step = c->step});
    c->parts.unsent = 0;
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

static void compose_contribution(smlt_engine *engine, smlt_node *node, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    smlt_message *message = smlt_pool_take_bulk(&engine->pool, SMLT_FOR_UPLOADS);
    int64_t began = smlt_trace_begin(&engine->trace);
    int exponent = smlt_encode_contribution(typed, chunk, message->payload + SMLT_HEADER_BYTES);
    smlt_trace_end(&engine->trace, SMLT_TRACE_ENCODE, began, c->step, chunk_index,
                   (size_t)chunk->count * typed->kernel.element_bytes);
    char key[SMLT_KEY_MAX];
    size_t key_length = smlt_key_contribution(key, node->prefix, c->step, chunk_index, engine->rank);
    begin_set(engine, c, chunk_index, message, key, key_length, smlt_wire_size(&typed->kernel, (size_t)chunk->count), exponent);
    expect_set(engine, node, message, (smlt_expectation){.kind = EXPECT_SET});
    if (engine->credit) node->credit.contributions += smlt_chunk_stored_bytes(c, chunk_index);
    smlt_token token = {.kind = SMLT_TOKEN_CONTRIBUTION, .step = c->step, .digest = c->digest, .chunk = chunk_index};
    if (chunk_index == 0) { /* rank 0 hears what this worker called */
        token.text = c->description;
        token.text_length = strlen(c->description);
    }
    append_token(engine, node, &message->tail, chunk->owner, token,
                 (smlt_expectation){.kind = EXPECT_CONTRIBUTION_STORED, .step = c->step, .chunk = chunk_index});
    c->upload_state[chunk_index] = UPLOAD_SENT;
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

/* With an exponent given, the bytes are those of the first time: block headers were kept, what was lost is known. */
static int encode_aggregate(collective *c, uint32_t chunk_index, char *wire, const void *elements, int exponent) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    const smlt_kernel *kernel = &typed->kernel;
    size_t n = (size_t)chunk->count, offset = (size_t)chunk->source * kernel->element_bytes, blocks = 0;
    size_t block_bytes = kernel->block_header_bytes + kernel->block_elements * kernel->wire_bytes;
    char *headers = c->headers + c->headers_at[chunk_index - c->own_first];
    if (kernel->block_header_bytes) blocks = (n + kernel->block_elements - 1) / kernel->block_elements;
    if (exponent != SMLT_CHOOSE_EXPONENT) {
        for (size_t i = 0; i < blocks; i++)
            memcpy(wire + i * block_bytes, headers + i * kernel->block_header_bytes, kernel->block_header_bytes);
        return kernel->encode(wire, elements, n, blocks ? SMLT_KEEP_SCALES : exponent);
    }
    if (typed->segment.next_residual && c->algorithm == SMLT_HIERARCHICAL) {
        const char *residual = typed->segment.residual;
        exponent = kernel->encode_feedback(wire, elements, residual ? residual + offset : NULL,
                                           (char *)typed->segment.next_residual + offset, n, exponent);
    } else {
        exponent = kernel->encode(wire, elements, n, exponent);
    }
    for (size_t i = 0; i < blocks; i++)
        memcpy(headers + i * kernel->block_header_bytes, wire + i * block_bytes, kernel->block_header_bytes);
    return exponent;
}

static void append_aggregate_token(smlt_engine *engine, smlt_node *node, resp_buffer *buffer, const collective *c,
                                   uint32_t chunk) {
    append_token(engine, node, buffer, c->chunks[chunk].reader - 1, /* -1: to everyone */
                 (smlt_token){.kind = SMLT_TOKEN_AGGREGATE, .step = c->step, .digest = c->digest, .chunk = chunk},
                 (smlt_expectation){.kind = EXPECT_AGGREGATE_STORED, .step = c->step, .chunk = chunk});
}

/* Whoever has contributed to a chunk that is not for everyone hears by this alone that its contribution is deleted. */
void smlt_tell_consumed(smlt_engine *engine, const collective *c, uint32_t chunk) {
    if (engine->credit && c->chunks[chunk].reader)
        smlt_tell(
            engine, chunk_node(engine, c, chunk), -1,
            (smlt_token){
                .kind = SMLT_TOKEN_CONSUMED, .step = c->step, .chunk = chunk, .digest = smlt_chunk_stored_bytes(c, chunk)});
}

/* Publish an own chunk; a bulk message was reserved. What everyone will decode is written to this worker's target too:
 * the same bytes everywhere (invariant 1). With an exponent given, elements decoded before are encoded again. A copy
 * for one reader leaves the target alone. */
void smlt_publish(smlt_engine *engine, collective *c, uint32_t chunk_index, const void *elements, int exponent, int purpose) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    smlt_node *node = chunk_node(engine, c, chunk_index);
    smlt_message *message = smlt_pool_take_bulk(&engine->pool, purpose);
    char *wire = message->payload + SMLT_HEADER_BYTES;
    char *target = (char *)typed->segment.target + (size_t)chunk->target * typed->kernel.element_bytes;
    int64_t began = smlt_trace_begin(&engine->trace);
    exponent = encode_aggregate(c, chunk_index, wire, elements, exponent);
    if (c->algorithm == SMLT_HIERARCHICAL || chunk->reader == 0)
        typed->kernel.decode(target, wire, (size_t)chunk->count, exponent);
    smlt_trace_end(&engine->trace, SMLT_TRACE_PUBLISH, began, c->step, chunk_index,
                   (size_t)chunk->count * typed->kernel.element_bytes);
    c->exponent[chunk_index - c->own_first] = exponent;
    if (c->chunk_state[chunk_index] != CHUNK_PUBLISHED && !smlt_note_published(engine, node, c, chunk_index))
        smlt_fail_engine(engine, SMLT_NO_MEMORY, "out of memory for what was published");
    c->chunk_state[chunk_index] = CHUNK_PUBLISHED;
    char key[SMLT_KEY_MAX];
    size_t key_length = smlt_key_aggregate(key, node->prefix, c->step, chunk_index);
    begin_set(engine, c, chunk_index, message, key, key_length, smlt_wire_size(&typed->kernel, (size_t)chunk->count), exponent);
    if (c->bounded && c->algorithm == SMLT_HIERARCHICAL) { /* the token behind the UNLINK: others count on that room */
        expect_set(engine, node, message,
                   (smlt_expectation){.kind = EXPECT_AGGREGATE_SET, .step = c->step, .chunk = chunk_index});
    } else {
        expect_set(engine, node, message, (smlt_expectation){.kind = EXPECT_SET});
        append_aggregate_token(engine, node, &message->tail, c, chunk_index);
    }
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

void smlt_publish_token(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    smlt_node *node = chunk_node(engine, c, chunk_index);
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    append_aggregate_token(engine, node, &message->head, c, chunk_index);
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

/* What the owner alone wants is complete: it goes to the target, and nowhere else. */
void smlt_keep(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    char *target = (char *)typed->segment.target + (size_t)chunk->target * typed->kernel.element_bytes;
    memcpy(target, chunk_node(engine, c, chunk_index)->accumulator, (size_t)chunk->count * typed->kernel.element_bytes);
    smlt_delete_contributions(engine, c, chunk_index);
    smlt_tell_consumed(engine, c, chunk_index);
    smlt_chunk_complete(engine, c, chunk_index);
}

static void publish_again(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    const char *target = (const char *)typed->segment.target + (size_t)chunk->target * typed->kernel.element_bytes;
    smlt_publish(engine, c, chunk_index, target, c->exponent[chunk_index - c->own_first], SMLT_FOR_UPLOADS);
}

static void compose_copy(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    const char *source = (const char *)typed->segment.source + (size_t)chunk->source * typed->kernel.element_bytes;
    c->upload_state[chunk_index] = UPLOAD_SENT;
    if (c->chunk_state[chunk_index] == CHUNK_PUBLISHED && chunk->reader == 0)
        publish_again(engine, c, chunk_index);
    else
        smlt_publish(engine, c, chunk_index, source, SMLT_CHOOSE_EXPONENT, SMLT_FOR_UPLOADS);
}

/* An aggregate that is there holds this worker's contribution: after a lost connection it is not sent again, for in place
 * its memory may hold the result by now, and error feedback would take that for what is to be sent. */
static int is_aggregated(const collective *c, uint32_t chunk) {
    return c->algorithm == SMLT_HIERARCHICAL && c->aggregated[chunk];
}

/* A copy's aggregates are reserved when they are sent; what is published again was before. */
static int has_credit(smlt_engine *engine, smlt_node *node, const collective *c, uint32_t chunk) {
    if (!engine->credit || c->chunk_state[chunk] == CHUNK_PUBLISHED) return 1;
    if (c->algorithm == SMLT_HIERARCHICAL) return smlt_may_upload(engine, node, c, chunk);
    return smlt_reserve_aggregate(engine, node, c, chunk);
}

typedef enum { NOTHING_TO_SEND, COMPOSED, NO_CREDIT } upload_result;

/* One more bulk message of `c` for `node`. */
static upload_result compose_upload(smlt_engine *engine, smlt_node *node, collective *c) {
    node_work *work = &c->work[node->number];
    chunk_queue *uploads = &work->uploads;
    if (work->republish.first < work->republish.count) {
        publish_again(engine, c, work->republish.chunks[work->republish.first++]);
        return COMPOSED;
    }
    for (; uploads->first < uploads->count; uploads->first++) {
        uint32_t chunk = uploads->chunks[uploads->first];
        if (c->upload_state[chunk] != UPLOAD_UNSENT) continue;
        if (!is_aggregated(c, chunk)) break;
        c->upload_state[chunk] = UPLOAD_STORED;
        c->uploads_left--;
    }
    if (uploads->first == uploads->count) {
        smlt_end_if_complete(engine, c);
        return NOTHING_TO_SEND;
    }
    uint32_t chunk = uploads->chunks[uploads->first];
    if (!has_credit(engine, node, c, chunk)) {
        node->credit.blocked = 1;
        return NO_CREDIT;
    }
    uploads->first++;
    if (c->algorithm == SMLT_HIERARCHICAL)
        compose_contribution(engine, node, c, chunk);
    else
        compose_copy(engine, c, chunk);
    return COMPOSED;
}

/* At the beginning nothing comes down: whatever has been sent waits in the uplink's queue, and commands wait behind it.
 * Later confirmations wait behind what comes down, and more must be under way to fill the uplink. */
static size_t upload_limit(const smlt_engine *engine) {
    size_t least = engine->upload_least, more = engine->fetched_bytes, room = engine->upload_most - least;
    return least + (more < room ? more : room);
}

static void compose_uploads(smlt_engine *engine, smlt_node *node) {
    smlt_lane *lane = &node->lanes[SMLT_LANE_UP];
    smlt_ask_who_has_read(engine, node);
    node->credit.blocked = 0; /* perhaps no more */
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status != SMLT_ACTIVE) continue;
        if (c->hello_unsent && node->number == 0) compose_hello(engine, c);
        if (c->parts.unsent && node == one_shot_node(engine, c)) compose_part(engine, c);
        while (lane->queued_bytes < UPLOAD_QUEUE_BYTES && node->upload_outstanding < upload_limit(engine) &&
               smlt_pool_reserve(&engine->pool, SMLT_FOR_UPLOADS)) {
            upload_result result = compose_upload(engine, node, c);
            if (result == COMPOSED) continue;
            smlt_pool_unreserve(&engine->pool, SMLT_FOR_UPLOADS);
            if (result == NO_CREDIT) return; /* nor for a later collective: all workers keep to one order */
            break;
        }
    }
}

/* ---- chunks coming down ---- */

static size_t chunk_wire_bytes(const collective *c, uint32_t chunk) {
    return SMLT_HEADER_BYTES + smlt_wire_size(&c->segments[c->chunks[chunk].segment].kernel, (size_t)c->chunks[chunk].count);
}

static void compose_contributions_fetch(smlt_engine *engine, smlt_node *node, collective *c, smlt_message *message) {
    chunk_queue *ready = &c->work[node->number].contributions;
    uint32_t chunk = ready->chunks[ready->first++];
    char key[SMLT_KEY_MAX];
    resp_append_array(&message->head, (size_t)engine->world_size); /* MGET and a key for each of the others */
    resp_append_text(&message->head, "MGET");
    for (int rank = 0; rank < engine->world_size; rank++)
        if (rank != engine->rank)
            resp_append_bulk(&message->head, key, smlt_key_contribution(key, node->prefix, c->step, chunk, rank));
    c->chunk_state[chunk] = CHUNK_REQUESTED;
    size_t bytes = others(engine) * chunk_wire_bytes(c, chunk);
    node->fetch_outstanding += bytes;
    node->credit.asked_bytes += bytes;
    smlt_expect(engine, node, SMLT_LANE_DOWN,
                (smlt_expectation){.kind = EXPECT_CONTRIBUTIONS,
                                   .step = c->step,
                                   .chunk = chunk,
                                   .count = others(engine),
                                   .bytes = bytes,
                                   .first = is_kept(&c->chunks[chunk]) ? 0 : (uint32_t)smlt_chunk_stored_bytes(c, chunk)});
}

/* Whether the next contributions may be fetched: there is room for what comes of them, here and in the store. */
static int reserve_for_aggregate(smlt_engine *engine, smlt_node *node, const collective *c) {
    const chunk_queue *ready = &c->work[node->number].contributions;
    if (ready->first == ready->count || !smlt_pool_reserve(&engine->pool, SMLT_FOR_AGGREGATES)) return 0;
    uint32_t chunk = ready->chunks[ready->first];
    if (is_kept(&c->chunks[chunk]) || smlt_reserve_aggregate(engine, node, c, chunk)) return 1;
    smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
    return 0;
}

/* Small aggregates share an MGET; large ones do not, so that the next MGET is under way while one is received. */
static void compose_aggregates_fetch(smlt_engine *engine, smlt_node *node, collective *c, smlt_message *message) {
    chunk_queue *ready = &c->work[node->number].aggregates;
    uint32_t first = ready->first;
    size_t bytes = 0;
    do {
        uint32_t chunk = ready->chunks[ready->first++];
        bytes += chunk_wire_bytes(c, chunk);
        c->chunk_state[chunk] = CHUNK_REQUESTED;
    } while (ready->first < ready->count && bytes < FETCH_TOGETHER_BYTES);
    node->fetch_outstanding += bytes;
    node->credit.asked_bytes += bytes;
    char key[SMLT_KEY_MAX];
    resp_append_array(&message->head, 1 + ready->first - first);
    resp_append_text(&message->head, "MGET");
    for (uint32_t i = first; i < ready->first; i++)
        resp_append_bulk(&message->head, key, smlt_key_aggregate(key, node->prefix, c->step, ready->chunks[i]));
    smlt_expect(engine, node, SMLT_LANE_DOWN,
                (smlt_expectation){
                    .kind = EXPECT_AGGREGATES, .step = c->step, .first = first, .count = ready->first - first, .bytes = bytes});
}

static void unreserve_for_aggregate(smlt_engine *engine, smlt_node *node, const collective *c) {
    uint32_t chunk = c->work[node->number].contributions.chunks[c->work[node->number].contributions.first];
    smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
    if (!is_kept(&c->chunks[chunk])) smlt_unreserve_aggregate(engine, node, smlt_chunk_stored_bytes(c, chunk));
}

/* How much the next fetch brings, at most. */
static size_t next_fetch_bytes(const smlt_engine *engine, const collective *c, const node_work *work, int contributions) {
    if (contributions) return others(engine) * chunk_wire_bytes(c, work->contributions.chunks[work->contributions.first]);
    return FETCH_TOGETHER_BYTES + chunk_wire_bytes(c, work->aggregates.chunks[work->aggregates.first]);
}

/* Contributions first: others wait for what comes of them. */
static void compose_fetches(smlt_engine *engine, smlt_node *node) {
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status != SMLT_ACTIVE) continue;
        const node_work *work = &c->work[node->number];
        while (node->fetch_outstanding < engine->window_bytes) {
            int contributions = reserve_for_aggregate(engine, node, c);
            if (!contributions && work->aggregates.first == work->aggregates.count) break;
            if (!smlt_may_fetch(engine, node, c, next_fetch_bytes(engine, c, work, contributions))) {
                if (contributions) unreserve_for_aggregate(engine, node, c);
                break;
            }
            smlt_message *message = smlt_new_text(engine);
            if (!message) return;
            if (contributions)
                compose_contributions_fetch(engine, node, c, message);
            else
                compose_aggregates_fetch(engine, node, c, message);
            smlt_queue(engine, node, SMLT_LANE_DOWN, message);
        }
    }
}

/* Whoever misses anything listens at every node: at the first speak the scheduler and those who give up, and anywhere somebody
 * may ask what was read. To listen costs nothing where nobody speaks. */
static int tokens_are_missing(const smlt_engine *engine) {
    for (const collective *c = engine->active; c; c = c->next) {
        if (c->result.status != SMLT_ACTIVE) continue;
        if (c->tokens_left > 0 || c->joined_left > 0 || c->bounded) return 1;
    }
    for (int node = 0; node < engine->node_count; node++)
        if (engine->nodes[node].credit.blocked) return 1;
    return 0;
}

/* Read again from the first token that was not kept. */
static void rewind_streams(smlt_node *node) {
    for (int i = 0; i < node->streams; i++) {
        if (node->rewind_id[i][0]) strcpy(node->stream_id[i], node->rewind_id[i]);
        node->rewind_id[i][0] = 0;
    }
    node->early_dropped = 0;
    node->rewind = 0;
}

/* The wait: blocks in the store until there is a token, or word from the scheduler (invariant 8). */
static void compose_wait(smlt_engine *engine, smlt_node *node) {
    if (node->waiting_for_tokens || !tokens_are_missing(engine)) return;
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    if (node->rewind) rewind_streams(node);
    resp_buffer *buffer = &message->head;
    resp_append_array(buffer, (size_t)(6 + 2 * node->streams));
    resp_append_text(buffer, "XREAD");
    resp_append_text(buffer, "COUNT");
    resp_append_number(buffer, 1000);
    resp_append_text(buffer, "BLOCK");
    resp_append_number(buffer, engine->silence_ms * 2 / 5);
    resp_append_text(buffer, "STREAMS");
    for (int i = 0; i < node->streams; i++) resp_append_text(buffer, node->stream_key[i]);
    for (int i = 0; i < node->streams; i++) resp_append_text(buffer, node->stream_id[i]);
    node->waiting_for_tokens = 1;
    smlt_expect(engine, node, SMLT_LANE_TOKENS, (smlt_expectation){.kind = EXPECT_TOKENS});
    smlt_queue(engine, node, SMLT_LANE_TOKENS, message);
}

void smlt_compose(smlt_engine *engine, smlt_node *node, int kind) {
    if (engine->fatal.status != SMLT_OK || smlt_is_frozen(engine)) return;
    if (kind == SMLT_LANE_UP)
        compose_uploads(engine, node);
    else if (kind == SMLT_LANE_DOWN)
        compose_fetches(engine, node);
    else
        compose_wait(engine, node);
}
