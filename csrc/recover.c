/* After a lost connection: what was not confirmed is done again, and missing chunks are looked for by key (invariant 5). */
#include <string.h>

#include "collective.h"

static void ask(smlt_engine *engine, smlt_message *message, const char *key, size_t length, smlt_expectation expectation) {
    resp_append_array(&message->head, 2);
    resp_append_text(&message->head, "EXISTS");
    resp_append_bulk(&message->head, key, length);
    smlt_expect(engine, SMLT_LANE_DOWN, expectation);
}

void smlt_ask_existence(smlt_engine *engine, collective *c) {
    if (c->algorithm == SMLT_ONE_SHOT) return; /* its tokens are the data: they are read again */
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    char key[SMLT_KEY_MAX];
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        if (c->chunk_state[chunk] != CHUNK_WAITING) continue;
        if (c->chunks[chunk].owner != engine->rank) {
            ask(engine, message, key, smlt_key_aggregate(key, engine->prefix, c->step, chunk),
                (smlt_expectation){.kind = EXPECT_AGGREGATE_EXISTS, .step = c->step, .chunk = chunk});
            continue;
        }
        const uint8_t *arrived = c->arrived + (size_t)(chunk - c->own_first) * (size_t)engine->world_size;
        for (int rank = 0; c->algorithm == SMLT_HIERARCHICAL && rank < engine->world_size; rank++)
            if (rank != engine->rank && !arrived[rank])
                ask(engine, message, key, smlt_key_contribution(key, engine->prefix, c->step, chunk, rank),
                    (smlt_expectation){
                        .kind = EXPECT_CONTRIBUTION_EXISTS, .step = c->step, .chunk = chunk, .first = (uint32_t)rank});
    }
    smlt_queue(engine, SMLT_LANE_DOWN, message);
}

static void recover(smlt_engine *engine, collective *c) {
    c->recovered = 1;
    c->hello_unsent = c->hello_left;
    if (c->algorithm == SMLT_ONE_SHOT) { /* reading goes on where it was: no token is lost */
        c->parts.unsent = c->uploads_left > 0;
        return;
    }
    c->upload_next = 0;
    for (uint32_t i = 0; i < c->upload_count; i++) {
        uint8_t *state = &c->upload_state[i];
        if (*state == UPLOAD_SENT) *state = UPLOAD_UNSENT;
    }
    c->contributions = (fetch_queue){c->contributions.chunks, 0, 0};
    c->aggregates = (fetch_queue){c->aggregates.chunks, 0, 0};
    c->republish = (fetch_queue){c->republish.chunks, 0, 0};
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        int own = chunk >= c->own_first && chunk < c->own_end;
        if (c->algorithm == SMLT_HIERARCHICAL && c->chunk_state[chunk] == CHUNK_PUBLISHED)
            c->republish.chunks[c->republish.count++] = chunk;
        if (c->chunk_state[chunk] == CHUNK_READY || c->chunk_state[chunk] == CHUNK_REQUESTED)
            smlt_queue_fetch(own ? &c->contributions : &c->aggregates, c, chunk);
    }
    smlt_ask_existence(engine, c);
}

void smlt_engine_reconnected(smlt_engine *engine) {
    if (engine->waiting_for_tokens && engine->tokens.entry_seen) /* it may have been cut off behind its name */
        strcpy(engine->stream_id[engine->tokens.stream], engine->before_id[engine->tokens.stream]);
    for (int lane = 0; lane < SMLT_LANES; lane++) smlt_lane_reset(&engine->lanes[lane], &engine->pool);
    smlt_pool_unreserve_all(&engine->pool); /* the replies will not come */
    engine->upload_outstanding = engine->fetch_outstanding = 0;
    engine->waiting_for_tokens = 0;
    memset(&engine->reading, 0, sizeof engine->reading);
    memset(&engine->tokens, 0, sizeof engine->tokens);
    memset(engine->expiry_set_ms, 0, ((size_t)engine->world_size + 1) * sizeof *engine->expiry_set_ms);
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status == SMLT_ACTIVE)
            recover(engine, c);
        else if (c->result.status != SMLT_OK)
            smlt_delete_uploads(engine, c);
    }
}
