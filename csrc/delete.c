/* What is over is deleted (invariant 6): contributions that are added up, aggregates and tokens that everyone has read. */
#include "collective.h"

void smlt_delete_contributions(smlt_engine *engine, collective *c, uint32_t chunk) {
    smlt_node *node = chunk_node(engine, c, chunk);
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    char key[SMLT_KEY_MAX];
    resp_append_array(&message->head, (size_t)engine->world_size);
    resp_append_text(&message->head, "UNLINK");
    for (int rank = 0; rank < engine->world_size; rank++)
        if (rank != engine->rank)
            resp_append_bulk(&message->head, key, smlt_key_contribution(key, node->prefix, c->step, chunk, rank));
    smlt_expect_nothing(engine, node);
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

static void delete_uploads_at(smlt_engine *engine, smlt_node *node, const collective *c) {
    const chunk_queue *uploads = &c->work[node->number].uploads;
    uint32_t sent = 0;
    for (uint32_t i = 0; i < uploads->count; i++) sent += c->upload_state[uploads->chunks[i]] != UPLOAD_UNSENT;
    smlt_message *message = sent ? smlt_new_text(engine) : NULL;
    if (!message) return;
    char key[SMLT_KEY_MAX];
    resp_append_array(&message->head, 1 + sent);
    resp_append_text(&message->head, "UNLINK");
    for (uint32_t i = 0; i < uploads->count; i++)
        if (c->upload_state[uploads->chunks[i]] != UPLOAD_UNSENT)
            resp_append_bulk(&message->head, key,
                             smlt_key_contribution(key, node->prefix, c->step, uploads->chunks[i], engine->rank));
    smlt_expect_nothing(engine, node);
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

/* Contributions that nobody may come to fetch: of a collective that ended in error, or sent twice. */
void smlt_delete_uploads(smlt_engine *engine, collective *c) {
    if (c->algorithm != SMLT_HIERARCHICAL) return;
    if (!c->uploads_deleted) smlt_uploads_deleted(engine, c);
    c->uploads_deleted = 1;
    for (int node = 0; node < engine->node_count; node++) delete_uploads_at(engine, &engine->nodes[node], c);
}

static void append_trim(smlt_engine *engine, smlt_node *node, resp_buffer *buffer, int stream, const char *id) {
    resp_append_array(buffer, 5);
    resp_append_text(buffer, "XTRIM");
    resp_append_text(buffer, node->stream_key[stream]);
    resp_append_text(buffer, "MINID");
    resp_append_text(buffer, "~");
    resp_append_text(buffer, id);
    smlt_expect_nothing(engine, node);
}

void smlt_delete_aggregates(smlt_engine *engine, smlt_node *node, const published_chunk *published, size_t count) {
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    char key[SMLT_KEY_MAX];
    resp_append_array(&message->head, 1 + count);
    resp_append_text(&message->head, "UNLINK");
    for (size_t i = 0; i < count; i++)
        resp_append_bulk(&message->head, key,
                         smlt_key_aggregate(key, node->prefix, published[i].place.step, published[i].place.chunk));
    smlt_expect_nothing(engine, node);
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}

/* Own chunks lie on the nodes in turn, beginning with the one of this rank's number. */
void smlt_delete_remains(smlt_engine *engine, const remains *past) {
    uint32_t chunks = past->own_end - past->own_first, nodes = (uint32_t)engine->node_count;
    for (uint32_t first = 0; first < nodes && first < chunks; first++) {
        smlt_node *node = &engine->nodes[node_of(engine, engine->rank, first)];
        smlt_message *message = smlt_new_text(engine);
        if (!message) return;
        char key[SMLT_KEY_MAX];
        resp_append_array(&message->head, 1 + (chunks - first + nodes - 1) / nodes);
        resp_append_text(&message->head, "UNLINK");
        for (uint32_t position = first; position < chunks; position += nodes)
            resp_append_bulk(&message->head, key,
                             smlt_key_aggregate(key, node->prefix, past->step, past->own_first + position));
        smlt_expect_nothing(engine, node);
        smlt_queue(engine, node, SMLT_LANE_UP, message);
    }
}

/* What all workers have read: tokens of collectives that all have completed. */
void smlt_trim_streams(smlt_engine *engine, smlt_node *node) {
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    append_trim(engine, node, &message->head, INBOX, node->trim.inbox_id);
    if (engine->rank == 0) append_trim(engine, node, &message->head, OUTBOX, node->trim.outbox_id);
    smlt_queue(engine, node, SMLT_LANE_UP, message);
}
