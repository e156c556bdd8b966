/* A newer generation, lived through: whoever waits is told at once and nothing new begins, but what is under way stays as
 * it is. When another worker has completed it, all its aggregates are in the store and it can be completed here too. */
#include <stdio.h>
#include <string.h>

#include "collective.h"

void smlt_engine_fence(smlt_engine *engine, uint64_t generation) {
    if (generation <= engine->generation || generation <= engine->fenced_by) return;
    engine->fenced_by = generation;
    engine->ends++; /* for those who wait, everything has */
}

uint64_t smlt_engine_fenced_by(const smlt_engine *engine) { return engine->fenced_by; }

int smlt_is_frozen(const smlt_engine *engine) { return engine->fenced_by && !engine->completing; }

void smlt_fence_error(const smlt_engine *engine, smlt_error *error) {
    error->status = SMLT_FENCED;
    snprintf(error->message, sizeof error->message, "generation %llu has begun; this worker is of generation %llu",
             (unsigned long long)engine->fenced_by, (unsigned long long)engine->generation);
}

void smlt_engine_complete_fenced(smlt_engine *engine, int on) { engine->completing = on; }

uint64_t smlt_engine_first_unfinished(const smlt_engine *engine) {
    for (const collective *c = engine->active; c; c = c->next)
        if (c->result.status == SMLT_ACTIVE) return c->step;
    return 0;
}

uint64_t smlt_engine_failures(const smlt_engine *engine) { return engine->failures + (engine->fatal.status != SMLT_OK); }

void smlt_engine_leave(smlt_engine *engine, const char *text, int announce) {
    smlt_error why = {SMLT_ABORTED, "the communicator was closed before it was complete"};
    if (engine->fenced_by) smlt_fence_error(engine, &why);
    uint64_t step = smlt_engine_first_unfinished(engine);
    for (collective *c = engine->active; c; c = c->next)
        smlt_end_collective(engine, c, why.status, why.message, strlen(why.message));
    if (announce) smlt_announce(engine, step ? step : engine->last_step + 1, SMLT_TOKEN_ABORT, SMLT_LOST, text, strlen(text));
}
