/* What the store says to the collective. Nothing that came off the wire is trusted: every length, number and name is
 * checked against what was asked for before it is used. */
#include <stdio.h>
#include <string.h>

#include "collective.h"

static const char *const LANE_NAMES[] = {"up", "down", "tokens"};

static smlt_status not_as_asked(smlt_engine *engine, const smlt_node *node, int kind, const char *what) {
    if (engine->node_count > 1)
        return smlt_fail_engine(engine, SMLT_PROTOCOL,
                                "the reply of the store's node %d on the %s connection is not as it must be: %s", node->number,
                                LANE_NAMES[kind], what);
    return smlt_fail_engine(engine, SMLT_PROTOCOL, "the store's reply on the %s connection is not as it must be: %s",
                            LANE_NAMES[kind], what);
}

static int starts_with(const resp_item *item, const char *text) {
    size_t length = strlen(text);
    return item->length >= length && memcmp(item->data, text, length) == 0;
}

/* What a store says while it starts, fails over, is busy or short of something: it passes. */
static const char *const REFUSALS[] = {"LOADING ",     "READONLY ",   "BUSY ",      "MASTERDOWN ",
                                       "CLUSTERDOWN ", "TRYAGAIN ",   "MOVED ",     "ASK ",
                                       "MISCONF ",     "NOREPLICAS ", "UNBLOCKED ", "ERR max number of clients"};

static smlt_status kind_of_error(const resp_item *item) {
    if (starts_with(item, "OOM")) return SMLT_STORE_FULL;
    if (starts_with(item, "NOAUTH") || starts_with(item, "WRONGPASS") || starts_with(item, "NOPERM")) return SMLT_STORE_DENIED;
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++)
        if (starts_with(item, REFUSALS[i])) return SMLT_STORE_REFUSES;
    return SMLT_STORE_ERROR;
}

static smlt_status error_reply(smlt_engine *engine, const resp_item *item) {
    smlt_status status = kind_of_error(item);
    char text[901];
    size_t length = item->length < sizeof text - 1 ? item->length : sizeof text - 1;
    for (size_t i = 0; i < length; i++) text[i] = item->data[i] ? item->data[i] : '?';
    text[length] = 0;
    if (status != SMLT_STORE_FULL && status != SMLT_STORE_REFUSES)
        return smlt_fail_engine(engine, status, "%s", length ? text : "an error without a text");
    engine->refusal.status = status;
    strcpy(engine->refusal.message, text);
    return SMLT_STORE_REFUSES;
}

/* ---- the Shard Aggregator (contributions) and the Global Aggregator (aggregates): MGET on the DOWN lane, decoded as the
 * bytes come ---- */

/* Which chunk and which rank's bytes the current element of the reply is. */
static uint32_t element_chunk(const smlt_node *node, const collective *c, const smlt_expectation *expected) {
    if (expected->kind == EXPECT_CONTRIBUTIONS) return expected->chunk;
    return c->work[node->number].aggregates.chunks[expected->first + node->reading.element];
}

static int element_rank(const smlt_engine *engine, const smlt_node *node, const collective *c,
                        const smlt_expectation *expected) {
    if (expected->kind == EXPECT_AGGREGATES) return c->chunks[element_chunk(node, c, expected)].owner;
    int element = (int)node->reading.element;
    return element < engine->rank ? element : element + 1;
}

/* Contributions are added in rank order (invariant 1); this worker's own at its place among them. */
static void add_own(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    const char *source = (const char *)typed->segment.source + (size_t)chunk->source * typed->kernel.element_bytes;
    typed->kernel.reduce_own(chunk_node(engine, c, chunk_index)->accumulator, source, (size_t)chunk->count, 0,
                             c->shift[chunk_index - c->own_first], engine->rank == 0);
}

static smlt_status chunk_bulk_begins(smlt_engine *engine, smlt_node *node, collective *c, const smlt_expectation *expected,
                                     const resp_item *item) {
    node->reading.header_seen = 0;
    node->reading.elements_done = 0;
    if (!c) return SMLT_OK;
    uint32_t chunk = element_chunk(node, c, expected);
    const typed_segment *typed = &c->segments[c->chunks[chunk].segment];
    if (item->integer != (int64_t)(SMLT_HEADER_BYTES + smlt_wire_size(&typed->kernel, (size_t)c->chunks[chunk].count)))
        return not_as_asked(engine, node, SMLT_LANE_DOWN, "a chunk of another length than planned");
    if (expected->kind == EXPECT_CONTRIBUTIONS && (int)node->reading.element == engine->rank) add_own(engine, c, chunk);
    return SMLT_OK;
}

static smlt_status check_header(smlt_engine *engine, smlt_node *node, const collective *c, const smlt_expectation *expected,
                                const char *bytes) {
    smlt_header *header = &node->reading.header;
    uint32_t chunk = element_chunk(node, c, expected);
    if (!smlt_header_parse(bytes, SMLT_HEADER_BYTES, header) || header->step != c->step || header->digest != c->digest ||
        header->chunk != chunk || header->elements != (uint64_t)c->chunks[chunk].count ||
        header->rank != element_rank(engine, node, c, expected))
        return not_as_asked(engine, node, SMLT_LANE_DOWN, "a chunk whose header is of another collective");
    node->reading.header_seen = 1;
    return SMLT_OK;
}

/* Content of a chunk has arrived: use what is whole of it. `*taken` receives how many bytes that were. */
static smlt_status chunk_data(smlt_engine *engine, smlt_node *node, collective *c, const smlt_expectation *expected,
                              const resp_item *item, size_t *taken) {
    if (!c) {
        *taken = item->length; /* of a collective that has ended */
        return SMLT_OK;
    }
    const char *bytes = item->data;
    size_t length = item->length;
    if (!node->reading.header_seen) {
        if (length < SMLT_HEADER_BYTES) return SMLT_OK;
        smlt_status status = check_header(engine, node, c, expected, bytes);
        if (status != SMLT_OK) return status;
        bytes += SMLT_HEADER_BYTES;
        length -= SMLT_HEADER_BYTES;
        *taken = SMLT_HEADER_BYTES;
    }
    uint32_t chunk_index = element_chunk(node, c, expected);
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    size_t done = node->reading.elements_done;
    size_t n = smlt_wire_elements(&typed->kernel, length, (size_t)chunk->count - done);
    if (n == 0) return SMLT_OK;
    int64_t began = smlt_trace_begin(&engine->trace);
    if (expected->kind == EXPECT_CONTRIBUTIONS) {
        int first = engine->rank != 0 && node->reading.element == 0;
        typed->kernel.reduce(node->accumulator + done * typed->kernel.accumulator_bytes, bytes, n,
                             node->reading.header.exponent, c->shift[chunk_index - c->own_first], first);
    } else {
        char *target = (char *)typed->segment.target + ((size_t)chunk->target + done) * typed->kernel.element_bytes;
        typed->kernel.decode(target, bytes, n, node->reading.header.exponent);
    }
    smlt_trace_end(&engine->trace, expected->kind == EXPECT_CONTRIBUTIONS ? SMLT_TRACE_ADD : SMLT_TRACE_DECODE, began, c->step,
                   chunk_index, n * typed->kernel.element_bytes);
    node->reading.elements_done += (uint32_t)n;
    *taken += smlt_wire_size(&typed->kernel, n);
    return SMLT_OK;
}

/* 2^-shift for the second try: so many values of any size cannot overflow. */
uint8_t smlt_shift_for(int world_size) {
    uint8_t shift = 1;
    while ((1L << shift) < world_size) shift++;
    return shift;
}

static void contributions_complete(smlt_engine *engine, smlt_node *node, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    uint8_t *shift = &c->shift[chunk_index - c->own_first];
    if (engine->rank == engine->world_size - 1) add_own(engine, c, chunk_index);
    int not_finite = typed->kernel.finish(node->accumulator, (size_t)chunk->count, engine->world_size, *shift);
    if (not_finite && *shift == 0) { /* rare: fetch again and add smaller, lest a sum overflow whose mean does not */
        *shift = smlt_shift_for(engine->world_size);
        smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
        if (!is_kept(chunk)) smlt_unreserve_aggregate(engine, node, smlt_chunk_stored_bytes(c, chunk_index));
        c->chunk_state[chunk_index] = CHUNK_READY;
        chunk_queue *contributions = &c->work[node->number].contributions;
        contributions->chunks[--contributions->first] = chunk_index;
        return;
    }
    if (is_kept(chunk)) {
        smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
        smlt_keep(engine, c, chunk_index);
    } else {
        smlt_publish(engine, c, chunk_index, node->accumulator, SMLT_CHOOSE_EXPONENT, SMLT_FOR_AGGREGATES);
    }
}

static smlt_status chunks_event(smlt_engine *engine, smlt_node *node, const smlt_expectation *expected, resp_event event,
                                const resp_item *item, size_t *taken) {
    collective *c = smlt_find(engine, expected->step);
    if (c && c->result.status != SMLT_ACTIVE) c = NULL; /* it has ended: read past the reply */
    if (event == RESP_ARRAY && item->depth == 0 && item->integer == expected->count) {
        node->reading.element = 0;
        node->reading.incomplete = 0;
    } else if (event == RESP_BULK && item->depth == 1) {
        return chunk_bulk_begins(engine, node, c, expected, item);
    } else if (event == RESP_DATA) {
        return chunk_data(engine, node, c, expected, item, taken);
    } else if (event == RESP_NIL && item->depth == 1) {
        if (c) smlt_chunk_is_not_there(engine, c, element_chunk(node, c, expected), element_rank(engine, node, c, expected));
        node->reading.incomplete = 1;
        node->reading.element++;
    } else if (event == RESP_BULK_END) {
        if (c && expected->kind == EXPECT_AGGREGATES) smlt_chunk_complete(engine, c, element_chunk(node, c, expected));
        node->reading.element++;
    } else {
        return not_as_asked(engine, node, SMLT_LANE_DOWN, "not the chunks that were asked for");
    }
    if (item->last) {
        node->fetch_outstanding -= expected->bytes;
        engine->fetched_bytes += expected->bytes;
    }
    if (item->last && expected->kind == EXPECT_CONTRIBUTIONS) {
        if (c && !node->reading.incomplete) {
            contributions_complete(engine, node, c, expected->chunk);
        } else {
            smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
            smlt_unreserve_aggregate(engine, node, expected->first);
            if (c) smlt_contributions_incomplete(engine, c, expected->chunk);
        }
    }
    return SMLT_OK;
}

/* ---- tokens: XREAD on the TOKENS lane ---- */

static smlt_status control_event(smlt_engine *engine, smlt_node *node, const char *text, size_t length) {
    const char *kind = node->tokens.control_kind;
    if (strcmp(kind, "abort") == 0)
        return smlt_fail_engine(engine, SMLT_ABORTED, "%.*s", (int)(length < 1000 ? length : 1000), text);
    if (strcmp(kind, "generation") == 0) {
        uint64_t generation = 0;
        for (size_t i = 0; i < length && text[i] >= '0' && text[i] <= '9' && generation < UINT64_MAX / 16; i++)
            generation = generation * 10 + (uint64_t)(text[i] - '0');
        smlt_engine_fence(engine, generation);
    }
    return SMLT_OK;
}

static void copy_text(char *target, size_t capacity, const char *text, size_t length) {
    if (length >= capacity) length = capacity - 1;
    memcpy(target, text, length);
    target[length] = 0;
}

static smlt_status stream_value(smlt_engine *engine, smlt_node *node, const char *bytes, size_t length) {
    const char *field = node->tokens.field;
    if (node->tokens.stream == CONTROL) {
        if (strcmp(field, "kind") == 0) copy_text(node->tokens.control_kind, sizeof node->tokens.control_kind, bytes, length);
        return strcmp(field, "text") == 0 ? control_event(engine, node, bytes, length) : SMLT_OK;
    }
    smlt_token token;
    if (node->tokens.stream == INBOX || engine->rank == 0) node->token_bytes_since_trim += length;
    if (strcmp(field, "t") == 0) {
        node->tokens.token_length = 0;
        if (!smlt_token_parse(bytes, length, &token)) return SMLT_OK; /* not one of ours: no hint */
        memcpy(node->tokens.token, bytes, length);
        node->tokens.token_length = length;
        /* Token and part are taken together: between the two reads of a split entry its collective may begin. */
        return token.kind == SMLT_TOKEN_PART ? SMLT_OK : smlt_take_token(engine, node, &token, bytes, length);
    }
    const char *before = node->tokens.token;
    if (strcmp(field, "p") != 0 || !smlt_token_parse(before, node->tokens.token_length, &token)) return SMLT_OK;
    if (token.kind != SMLT_TOKEN_PART) return SMLT_OK;
    smlt_status status = smlt_take_token(engine, node, &token, before, node->tokens.token_length);
    return status != SMLT_OK ? status : smlt_take_part(engine, node, &token, before, node->tokens.token_length, bytes, length);
}

/* Reply: [[stream, [[id, [field, value, ...]], ...]], ...]; the depth tells which string this is. */
static smlt_status stream_string(smlt_engine *engine, smlt_node *node, const resp_item *item) {
    if (item->depth == 2) {
        for (int i = 0; i < node->streams; i++)
            if (item->length == strlen(node->stream_key[i]) && memcmp(item->data, node->stream_key[i], item->length) == 0) {
                node->tokens.stream = i;
                node->tokens.entry_seen = 0;
                return SMLT_OK;
            }
        return not_as_asked(engine, node, SMLT_LANE_TOKENS, "a stream that was not asked for");
    }
    if (item->depth == 4) {
        if (item->length >= sizeof node->stream_id[0])
            return not_as_asked(engine, node, SMLT_LANE_TOKENS, "an entry's name is too long");
        node->tokens.token_length = 0;
        strcpy(node->before_id[node->tokens.stream], node->stream_id[node->tokens.stream]);
        copy_text(node->stream_id[node->tokens.stream], sizeof node->stream_id[0], item->data, item->length);
        node->tokens.is_value = 0;
        node->tokens.entry_seen = 1;
        return SMLT_OK;
    }
    if (item->depth != 5) return not_as_asked(engine, node, SMLT_LANE_TOKENS, "not the entries of a stream");
    int is_value = node->tokens.is_value;
    node->tokens.is_value = !is_value;
    if (is_value) return stream_value(engine, node, item->data, item->length);
    copy_text(node->tokens.field, sizeof node->tokens.field, item->data, item->length);
    return SMLT_OK;
}

#define STREAM_VALUE_MAX (SMLT_ONE_SHOT_BYTES_MAX + 4 * SMLT_TOKEN_MAX)

static smlt_status tokens_event(smlt_engine *engine, smlt_node *node, resp_event event, const resp_item *item, size_t *taken) {
    const resp_decoder *decoder = &node->lanes[SMLT_LANE_TOKENS].decoder;
    smlt_status status = SMLT_OK;
    if (event == RESP_DATA) {
        if ((int64_t)item->length < decoder->bulk_remaining) return SMLT_OK; /* come back when it is whole */
        *taken = item->length;
        status = stream_string(engine, node, item);
    } else if (event == RESP_BULK) {
        if (item->integer > STREAM_VALUE_MAX || item->depth < 2)
            status = not_as_asked(engine, node, SMLT_LANE_TOKENS, "not a token");
    } else if (event != RESP_ARRAY && event != RESP_BULK_END && event != RESP_NIL) {
        status = not_as_asked(engine, node, SMLT_LANE_TOKENS, "not the entries of a stream");
    }
    if (item->last) node->waiting_for_tokens = node->tokens.entry_seen = 0;
    return status;
}

/* ---- confirmations: UP, and EXISTS on DOWN ---- */

static void contribution_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c || c->upload_state[expected->chunk] == UPLOAD_STORED) return;
    c->upload_state[expected->chunk] = UPLOAD_STORED;
    c->uploads_left--;
    smlt_end_if_complete(engine, c);
}

static void aggregate_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c || c->result.status != SMLT_ACTIVE) return;
    if (c->algorithm == SMLT_HIERARCHICAL) {
        if (!c->bounded) { /* else it has been done */
            smlt_delete_contributions(engine, c, expected->chunk);
            smlt_tell_consumed(engine, c, expected->chunk);
        }
    } else {
        uint8_t *state = &c->upload_state[expected->chunk];
        if (*state != UPLOAD_STORED) c->uploads_left--;
        *state = UPLOAD_STORED;
    }
    smlt_chunk_complete(engine, c, expected->chunk);
}

static void aggregate_set(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c || c->result.status != SMLT_ACTIVE) return;
    smlt_delete_contributions(engine, c, expected->chunk);
    smlt_tell_consumed(engine, c, expected->chunk);
    smlt_publish_token(engine, c, expected->chunk);
}

static void hello_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c) return;
    c->hello_left = 0;
    smlt_end_if_complete(engine, c);
}

static void part_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c) return;
    c->uploads_left = 0;
    smlt_end_if_complete(engine, c);
}

static smlt_status confirmation(smlt_engine *engine, smlt_node *node, int kind, const smlt_expectation *expected,
                                resp_event event, const resp_item *item, size_t *taken) {
    if (event == RESP_DATA) *taken = item->length; /* an XADD's entry name */
    if (!item->last)
        return event == RESP_ARRAY ? not_as_asked(engine, node, kind, "a list where a confirmation must be") : SMLT_OK;
    collective *c = smlt_find(engine, expected->step);
    switch (expected->kind) {
    case EXPECT_SET:
    case EXPECT_AGGREGATE_SET:
        if (event != RESP_STATUS) return not_as_asked(engine, node, kind, "a SET that was not confirmed");
        node->upload_outstanding -= expected->bytes;
        if (expected->kind == EXPECT_AGGREGATE_SET) aggregate_set(engine, expected);
        return SMLT_OK;
    case EXPECT_CONTRIBUTION_STORED:
    case EXPECT_AGGREGATE_STORED:
    case EXPECT_HELLO_STORED:
    case EXPECT_PART_STORED:
        if (event != RESP_BULK_END) return not_as_asked(engine, node, kind, "an XADD that was not confirmed");
        if (expected->kind == EXPECT_CONTRIBUTION_STORED) contribution_stored(engine, expected);
        if (expected->kind == EXPECT_AGGREGATE_STORED) aggregate_stored(engine, expected);
        if (expected->kind == EXPECT_HELLO_STORED) hello_stored(engine, expected);
        if (expected->kind == EXPECT_PART_STORED) part_stored(engine, expected);
        return SMLT_OK;
    case EXPECT_CONTRIBUTION_EXISTS:
    case EXPECT_AGGREGATE_EXISTS:
        if (event != RESP_INTEGER) return not_as_asked(engine, node, kind, "no number where EXISTS was asked");
        if (item->integer != 1 || !c || c->result.status != SMLT_ACTIVE) return SMLT_OK;
        if (expected->kind == EXPECT_AGGREGATE_EXISTS)
            smlt_aggregate_is_there(engine, c, expected->chunk);
        else
            smlt_contribution_is_there(engine, c, expected->chunk, (int)expected->first);
        return SMLT_OK;
    default: return SMLT_OK;
    }
}

/* ---- one lane's bytes ---- */

static smlt_status dispatch(smlt_engine *engine, smlt_node *node, int kind, resp_event event, const resp_item *item,
                            size_t *taken) {
    smlt_expectation *expected = smlt_lane_expected(&node->lanes[kind]);
    if (event == RESP_ERROR) return error_reply(engine, item);
    if (!expected) return not_as_asked(engine, node, kind, "a reply to no command");
    smlt_expectation what = *expected; /* handlers may add expectations and so move the ring */
    if (what.kind == EXPECT_TOKENS) return tokens_event(engine, node, event, item, taken);
    if (what.kind == EXPECT_CONTRIBUTIONS || what.kind == EXPECT_AGGREGATES)
        return chunks_event(engine, node, &what, event, item, taken);
    return confirmation(engine, node, kind, &what, event, item, taken);
}

smlt_status smlt_decode(smlt_engine *engine, smlt_node *node, int kind) {
    smlt_lane *lane = &node->lanes[kind];
    for (;;) {
        resp_item item;
        size_t consumed, taken = 0;
        resp_event event =
            resp_next(&lane->decoder, lane->input + lane->input_start, lane->input_end - lane->input_start, &consumed, &item);
        if (event == RESP_MORE) break;
        if (event == RESP_INVALID) return not_as_asked(engine, node, kind, "it is not the Redis protocol");
        smlt_status status = dispatch(engine, node, kind, event, &item, &taken);
        if (status != SMLT_OK) return status;
        if (item.last) smlt_lane_expected_done(lane);
        if (event == RESP_DATA) {
            if (taken == 0) break; /* less than an element, a header or a token */
            resp_take(&lane->decoder, taken);
        }
        lane->input_start += consumed + taken;
    }
    smlt_lane_compact(lane);
    return engine->fatal.status;
}

/* ---- what the transport drives ---- */

static smlt_node *node_of_lane(smlt_engine *engine, int lane) { return &engine->nodes[lane / SMLT_LANE_KINDS]; }

int smlt_engine_lanes(const smlt_engine *engine) { return engine->node_count * SMLT_LANE_KINDS; }

int smlt_engine_output(smlt_engine *engine, int lane, struct iovec *vectors, int max) {
    smlt_node *node = node_of_lane(engine, lane);
    smlt_compose(engine, node, lane % SMLT_LANE_KINDS);
    return smlt_lane_output(&node->lanes[lane % SMLT_LANE_KINDS], vectors, max);
}

void smlt_engine_sent(smlt_engine *engine, int lane, size_t bytes) {
    smlt_lane_sent(&node_of_lane(engine, lane)->lanes[lane % SMLT_LANE_KINDS], &engine->pool, bytes);
}

char *smlt_engine_input(smlt_engine *engine, int lane, size_t *capacity) {
    return smlt_lane_room(&node_of_lane(engine, lane)->lanes[lane % SMLT_LANE_KINDS], capacity);
}

smlt_status smlt_engine_received(smlt_engine *engine, int lane, size_t bytes) {
    if (engine->fatal.status != SMLT_OK) return engine->fatal.status;
    if (engine->refusal.status != SMLT_OK) return SMLT_STORE_REFUSES;
    smlt_node *node = node_of_lane(engine, lane);
    node->lanes[lane % SMLT_LANE_KINDS].input_end += bytes;
    node->lanes[lane % SMLT_LANE_KINDS].moved += bytes;
    return smlt_decode(engine, node, lane % SMLT_LANE_KINDS);
}
