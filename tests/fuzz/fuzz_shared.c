/* What a hostile or broken process could write into the memory that a machine's workers share: any bytes at any time. The
 * others must not touch foreign memory nor spin; they may get wrong numbers, and may fail.
 *
 * Input: a byte for the number of workers, one for the ring, one for the calls; then records of four bytes: what to do, where
 * (2 bytes), a byte. All workers are here, and work in turns without waiting.
 */
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "shared.h"

#define MEMBERS_MAX 3
#define COUNT 700 /* of float32: three blocks of 1024 bytes */
#define STEPS_MAX 400

typedef struct {
    smlt_shared *shared;
    float *values; /* exact: the sanitizer sees one byte beyond */
    int busy, over;
} member;

static void begin(member *m, int what, int local_size) {
    smlt_shared_segment segment = {SMLT_DTYPE_FLOAT32, what % SMLT_PRODUCT, m->values, m->values, COUNT};
    smlt_shared_call call = {.kind = what & 8 ? SMLT_SHARED_COPY : SMLT_SHARED_REDUCE,
                             .divisor = local_size,
                             .root = 0,
                             .takers = what & 16 ? 2 : ~(uint64_t)0,
                             .digest = (uint64_t)what,
                             .description = "a fuzzed call"};
    if (smlt_shared_begin(m->shared, &call, &segment, what & 32 ? 0 : 1) != SMLT_SHARED_DONE) abort();
    m->busy = 1;
}

static void work(member *m) {
    if (!m->busy || m->over) return;
    smlt_shared_status status = smlt_shared_run(m->shared, 0);
    m->busy = status == SMLT_SHARED_AGAIN;
    m->over = status > SMLT_SHARED_MISMATCH;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3) return 0;
    int local_size = 1 + data[0] % MEMBERS_MAX, blocks = 1 + data[1] % 3, what = data[2], steps = 0;
    size_t bytes = smlt_shared_size(local_size, 1024, blocks);
    size_t rings = (size_t)local_size * (size_t)blocks * 1024;
    char *memory = aligned_alloc(64, bytes);
    member members[MEMBERS_MAX] = {0};
    if (!memory || bytes == 0) abort();
    memset(memory, 0, bytes);
    if (!smlt_shared_format(memory, bytes, local_size, 1024, blocks, 7)) abort();
    for (int r = 0; r < local_size; r++) {
        smlt_shared_status status;
        members[r].shared = smlt_shared_open(memory, bytes, r, local_size, 7, &status);
        members[r].values = calloc(COUNT, sizeof(float));
        if (!members[r].shared || !members[r].values) abort();
        if (smlt_shared_claim(members[r].shared, r) != SMLT_SHARED_DONE) abort();
        if (smlt_shared_claim(members[r].shared, r) != SMLT_SHARED_TAKEN) abort();
    }
    for (size_t at = 3; at + 4 <= size && steps < STEPS_MAX; at += 4, steps++) {
        member *m = &members[data[at] % local_size];
        size_t where = (size_t)(data[at + 1] | data[at + 2] << 8) % (bytes - rings);
        smlt_shared_member said;
        switch (data[at] >> 2 & 7) {
        case 0: memory[where] = (char)data[at + 3]; break;
        case 1: memset(memory + where, data[at + 3], 16 < bytes - where ? 16 : bytes - where); break;
        case 2:
            if (!m->busy && !m->over) begin(m, data[at + 3] & 1 ? what : data[at + 3], local_size);
            break;
        case 3:
            smlt_shared_look(m->shared, (int)(where % (size_t)local_size), &said);
            if (strlen(said.description) >= sizeof said.description || strlen(said.failure) >= sizeof said.failure) abort();
            break;
        case 4:
            if (data[at + 3] == 0) smlt_shared_fail(m->shared, "a fuzzed failure");
            if (data[at + 3] == 1) smlt_shared_leave(m->shared);
            if (smlt_shared_missing(m->shared) >> local_size) abort();
            break;
        default:
            for (int i = 0; i <= data[at + 3] % 16; i++)
                for (int r = 0; r < local_size; r++) work(&members[r]);
        }
    }
    /* Somebody else's file, as it is now: opened or not, but nothing worse. */
    smlt_shared_status status;
    smlt_shared_free(smlt_shared_open(memory, bytes, 0, local_size, 7, &status));
    for (int r = 0; r < local_size; r++) {
        smlt_shared_free(members[r].shared);
        free(members[r].values);
    }
    free(memory);
    return 0;
}
