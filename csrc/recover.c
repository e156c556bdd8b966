/* After a lost connection: what was not confirmed is done again, and missing chunks are looked for by key (invariant 5). */
#include <stdio.h>
#include <string.h>

#include "collective.h"

static void ask(smlt_engine *engine, smlt_node *node, smlt_message *message, const char *key, size_t length,
                smlt_expectation expectation) {
    resp_append_array(&message->head, 2);
    resp_append_text(&message->head, "EXISTS");
    resp_append_bulk(&message->head, key, length);
    smlt_expect(engine, node, SMLT_LANE_DOWN, expectation);
}

static void ask_for_aggregate(smlt_engine *engine, smlt_node *node, smlt_message *message, const collective *c,
                              uint32_t chunk) {
    char key[SMLT_KEY_MAX];
    ask(engine, node, message, key, smlt_key_aggregate(key, node->prefix, c->step, chunk),
        (smlt_expectation){.kind = EXPECT_AGGREGATE_EXISTS, .step = c->step, .chunk = chunk});
}

static void ask_for_contribution(smlt_engine *engine, smlt_node *node, smlt_message *message, const collective *c,
                                 uint32_t chunk, int rank) {
    char key[SMLT_KEY_MAX];
    ask(engine, node, message, key, smlt_key_contribution(key, node->prefix, c->step, chunk, rank),
        (smlt_expectation){.kind = EXPECT_CONTRIBUTION_EXISTS, .step = c->step, .chunk = chunk, .first = (uint32_t)rank});
}

void smlt_ask_existence(smlt_engine *engine, smlt_node *node, collective *c) {
    if (c->algorithm == SMLT_ONE_SHOT) return; /* its tokens are the data: they are read again */
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        if (c->chunk_state[chunk] != CHUNK_WAITING || c->node[chunk] != node->number) continue;
        if (c->chunks[chunk].owner != engine->rank) {
            ask_for_aggregate(engine, node, message, c, chunk);
            continue;
        }
        const uint8_t *arrived = c->arrived + (size_t)(chunk - c->own_first) * (size_t)engine->world_size;
        for (int rank = 0; c->algorithm == SMLT_HIERARCHICAL && rank < engine->world_size; rank++)
            if (rank != engine->rank && !arrived[rank]) ask_for_contribution(engine, node, message, c, chunk, rank);
    }
    smlt_queue(engine, node, SMLT_LANE_DOWN, message);
}

static void forget_queues(node_work *work) {
    work->uploads.first = 0;
    work->again.contributions = work->again.aggregates = 0;
    work->contributions.first = work->contributions.count = 0;
    work->aggregates.first = work->aggregates.count = 0;
    work->republish.first = work->republish.count = 0;
}

static void recover(smlt_engine *engine, collective *c) {
    c->recovered = 1;
    c->hello_unsent = c->hello_left;
    if (c->algorithm == SMLT_ONE_SHOT) { /* reading goes on where it was: no token is lost */
        c->parts.unsent = c->uploads_left > 0;
        return;
    }
    for (int node = 0; node < engine->node_count; node++) forget_queues(&c->work[node]);
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        node_work *work = &c->work[c->node[chunk]];
        int own = chunk >= c->own_first && chunk < c->own_end;
        if (c->upload_state[chunk] == UPLOAD_SENT) c->upload_state[chunk] = UPLOAD_UNSENT;
        if (c->algorithm == SMLT_HIERARCHICAL && c->chunk_state[chunk] == CHUNK_PUBLISHED)
            work->republish.chunks[work->republish.count++] = chunk;
        if (c->chunk_state[chunk] == CHUNK_READY || c->chunk_state[chunk] == CHUNK_REQUESTED)
            smlt_queue_fetch(own ? &work->contributions : &work->aggregates, c, chunk);
    }
    for (int node = 0; node < engine->node_count; node++) smlt_ask_existence(engine, &engine->nodes[node], c);
}

/* ---- a chunk that was announced and is not there: its SET was refused, its token was not; or it was evicted ---- */

/* Wait for it again; so often as there is room in the queues. */
static void wait_again(smlt_engine *engine, collective *c, uint32_t chunk) {
    node_work *work = &c->work[c->node[chunk]];
    int is_aggregate = c->chunks[chunk].owner != engine->rank;
    uint32_t *times = is_aggregate ? &work->again.aggregates : &work->again.contributions;
    c->chunk_state[chunk] = CHUNK_WAITING;
    c->tokens_left++;
    smlt_error error;
    if (++*times > (is_aggregate ? work->chunks : work->own) + REFETCHES && smlt_has_vanished(engine, c, 0, &error))
        smlt_end_collective(engine, c, error.status, error.message, strlen(error.message));
}

/* The sender sends both again, perhaps it has done so already: look once more, then wait for the token. */
void smlt_chunk_is_not_there(smlt_engine *engine, collective *c, uint32_t chunk, int rank) {
    smlt_node *node = chunk_node(engine, c, chunk);
    c->vanished.since_ms = smlt_clock_ms();
    c->vanished.chunk = chunk;
    c->vanished.rank = rank;
    c->recovered = 1;
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    if (c->chunks[chunk].owner != engine->rank) {
        ask_for_aggregate(engine, node, message, c, chunk);
        wait_again(engine, c, chunk);
    } else {
        uint32_t own = chunk - c->own_first;
        c->arrived[(size_t)own * (size_t)engine->world_size + (size_t)rank] = 0;
        c->arrived_count[own]--;
        ask_for_contribution(engine, node, message, c, chunk, rank);
    }
    smlt_queue(engine, node, SMLT_LANE_DOWN, message);
}

/* The MGET is over, and not all were there. By now they may have been announced again. */
void smlt_contributions_incomplete(smlt_engine *engine, collective *c, uint32_t chunk) {
    wait_again(engine, c, chunk);
    if (c->result.status == SMLT_ACTIVE && c->arrived_count[chunk - c->own_first] == others(engine))
        smlt_queue_fetch(&c->work[c->node[chunk]].contributions, c, chunk);
}

int smlt_has_vanished(const smlt_engine *engine, const collective *c, int64_t for_ms, smlt_error *error) {
    if (!c->vanished.since_ms || c->chunk_state[c->vanished.chunk] != CHUNK_WAITING) return 0;
    if (smlt_clock_ms() - c->vanished.since_ms < for_ms) return 0;
    char key[SMLT_KEY_MAX];
    const char *prefix = chunk_node(engine, c, c->vanished.chunk)->prefix;
    if (c->chunks[c->vanished.chunk].owner != engine->rank)
        smlt_key_aggregate(key, prefix, c->step, c->vanished.chunk);
    else
        smlt_key_contribution(key, prefix, c->step, c->vanished.chunk, c->vanished.rank);
    error->status = SMLT_VANISHED;
    snprintf(error->message, sizeof error->message,
             "key %s was announced by rank %d and is gone: evicted, expired or flushed. The store must run with "
             "maxmemory-policy noeviction",
             key, c->vanished.rank);
    return 1;
}

int smlt_engine_vanished(smlt_engine *engine, uint64_t step, smlt_error *error) {
    const collective *c = smlt_find(engine, step);
    return c && c->result.status == SMLT_ACTIVE && smlt_has_vanished(engine, c, 0, error);
}

/* ---- a connection that is dead and does not say so ---- */

void smlt_engine_set_silence(smlt_engine *engine, int64_t silence_ms) { engine->silence_ms = silence_ms; }

int smlt_engine_is_silent(smlt_engine *engine, int64_t now_ms, const int *unsent) {
    int unattended = now_ms - engine->looked_at_ms > UNATTENDED_MS, silent = 0;
    engine->looked_at_ms = now_ms;
    for (int i = 0; i < smlt_engine_lanes(engine); i++) {
        smlt_lane *lane = &engine->nodes[i / SMLT_LANE_KINDS].lanes[i % SMLT_LANE_KINDS];
        int *before = &engine->nodes[i / SMLT_LANE_KINDS].unsent[i % SMLT_LANE_KINDS];
        int draining = unsent && unsent[i] != *before; /* a slow link takes what was sent long ago */
        if (unsent) *before = unsent[i];
        if (unattended || draining) smlt_lane_is_alive(lane, now_ms);
        silent |= smlt_lane_still_ms(lane, now_ms) > engine->silence_ms;
    }
    return silent;
}

/* ---- a store that has lost what it held ---- */

static void start_waiting(collective *c, uint32_t chunk) {
    if (c->chunk_state[chunk] != CHUNK_WAITING) c->tokens_left++;
    c->chunk_state[chunk] = CHUNK_WAITING;
}

/* Contributions are uploaded again unless their chunk is known to be aggregated: then its owner has the result, and the
 * memory may hold it here too. Own results are published again from the target. */
static void lose_chunk(smlt_engine *engine, collective *c, uint32_t chunk) {
    uint8_t *upload = &c->upload_state[chunk], *state = &c->chunk_state[chunk];
    int own = chunk >= c->own_first && chunk < c->own_end;
    int is_upload = own == (c->algorithm == SMLT_COPY);
    if (is_upload && !(*upload == UPLOAD_STORED && c->algorithm == SMLT_HIERARCHICAL && c->aggregated[chunk])) {
        if (*upload == UPLOAD_STORED) c->uploads_left++;
        *upload = UPLOAD_UNSENT;
    }
    if (own && *state == CHUNK_DONE && !is_kept(&c->chunks[chunk]) && !c->gone[chunk - c->own_first]) {
        *state = CHUNK_PUBLISHED;
        c->chunks_left++;
    }
    if (*state == CHUNK_READY || *state == CHUNK_REQUESTED) start_waiting(c, chunk);
    if (!own || c->algorithm != SMLT_HIERARCHICAL || *state == CHUNK_DONE) return;
    memset(c->arrived + (size_t)(chunk - c->own_first) * (size_t)engine->world_size, 0, (size_t)engine->world_size);
    c->arrived_count[chunk - c->own_first] = 0;
}

static void lose_streams(smlt_node *node) {
    for (int i = 0; i < STREAMS; i++) {
        strcpy(node->stream_id[i], "0-0");
        strcpy(node->before_id[i], "0-0");
        node->rewind_id[i][0] = 0;
    }
    node->rewind = 0;
    node->trim.newest = 0;
    memset(&node->tokens, 0, sizeof node->tokens);
}

void smlt_engine_data_lost(smlt_engine *engine, int number) {
    smlt_node *node = &engine->nodes[number];
    lose_streams(node);
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status != SMLT_ACTIVE) continue;
        if (number == 0) c->hello_left = c->algorithm == SMLT_COPY && engine->rank != 0;
        if (c->algorithm == SMLT_ONE_SHOT && node == one_shot_node(engine, c)) c->uploads_left = 1;
        for (uint32_t chunk = 0; c->algorithm != SMLT_ONE_SHOT && chunk < c->chunk_count; chunk++)
            if (c->node[chunk] == number) lose_chunk(engine, c, chunk);
    }
}

/* ---- new connections ---- */

static void reconnect_node(smlt_engine *engine, smlt_node *node) {
    if (node->waiting_for_tokens && node->tokens.entry_seen) /* it may have been cut off behind its name */
        strcpy(node->stream_id[node->tokens.stream], node->before_id[node->tokens.stream]);
    for (int kind = 0; kind < SMLT_LANE_KINDS; kind++) smlt_lane_reset(&node->lanes[kind], &engine->pool);
    node->upload_outstanding = node->fetch_outstanding = 0;
    node->waiting_for_tokens = 0;
    memset(&node->reading, 0, sizeof node->reading);
    memset(&node->tokens, 0, sizeof node->tokens);
    memset(node->expiry_set_ms, 0, ((size_t)engine->world_size + 1) * sizeof *node->expiry_set_ms);
}

void smlt_engine_reconnected(smlt_engine *engine) {
    engine->refusal.status = SMLT_OK;
    engine->looked_at_ms = 0;
    for (int node = 0; node < engine->node_count; node++) reconnect_node(engine, &engine->nodes[node]);
    smlt_pool_unreserve_all(&engine->pool); /* the replies will not come */
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status == SMLT_ACTIVE)
            recover(engine, c);
        else if (c->result.status != SMLT_OK)
            smlt_delete_uploads(engine, c);
    }
    for (int node = 0; node < engine->node_count; node++) smlt_credit_reconnected(engine, &engine->nodes[node]);
}
