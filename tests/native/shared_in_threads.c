/* Three workers of a machine as threads of one process, under ThreadSanitizer: whatever one writes and another reads, in
 * the rings and beside them, is ordered by the counters. Also that every result is right, in rings of any number of blocks.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "shared.h"

#define MEMBERS 3
#define CALLS 1000
#define FLOATS_MAX 20000

static char *memory;
static size_t bytes;

static void check(int true_of_it, const char *what, int call) {
    if (true_of_it) return;
    fprintf(stderr, "call %d: %s\n", call, what);
    exit(1);
}

/* All draw the same calls; in some of them worker 1 calls something else, which all must be told. */
static void call_once(smlt_shared *shared, int rank, int call, float *values, unsigned *seed) {
    size_t count = (size_t)rand_r(seed) % (call % 50 ? 900 : FLOATS_MAX);
    int copies = rand_r(seed) % 3 == 0, root = rand_r(seed) % MEMBERS, disagrees = rand_r(seed) % 20 == 0;
    int odd = disagrees && rank == 1;
    for (size_t i = 0; i < count; i++) values[i] = (float)(rank + 1) * (float)(i % 7);
    smlt_shared_segment segment = {SMLT_DTYPE_FLOAT32, SMLT_SUM, values, values, odd ? 5 : count};
    smlt_shared_call called = {.kind = copies ? SMLT_SHARED_COPY : SMLT_SHARED_REDUCE,
                               .divisor = 1,
                               .root = root,
                               .takers = (1 << MEMBERS) - 1,
                               .digest = (uint64_t)(2 * call + odd),
                               .description = "a call"};
    check(smlt_shared_begin(shared, &called, &segment, 1) == SMLT_SHARED_DONE, "cannot begin", call);
    smlt_shared_status status;
    while ((status = smlt_shared_run(shared, 50)) == SMLT_SHARED_AGAIN) continue;
    check(status == (disagrees ? SMLT_SHARED_MISMATCH : SMLT_SHARED_DONE), "ended otherwise", call);
    float factor = copies ? (float)(root + 1) : (float)(MEMBERS * (MEMBERS + 1) / 2);
    for (size_t i = 0; i < count && !disagrees; i++) check(values[i] == factor * (float)(i % 7), "a wrong value", call);
}

static void *work(void *argument) {
    int rank = (int)(intptr_t)argument;
    smlt_shared_status status;
    smlt_shared *shared = smlt_shared_open(memory, bytes, rank, MEMBERS, 7, &status);
    float *values = malloc(FLOATS_MAX * sizeof *values);
    unsigned seed = 1;
    check(shared && values && smlt_shared_claim(shared, rank) == SMLT_SHARED_DONE, "cannot join", 0);
    while ((status = smlt_shared_gather(shared, 50)) == SMLT_SHARED_AGAIN) continue;
    check(status == SMLT_SHARED_DONE, "not all have joined", 0);
    for (int call = 0; call < CALLS; call++) call_once(shared, rank, call, values, &seed);
    smlt_shared_leave(shared);
    smlt_shared_free(shared);
    free(values);
    return NULL;
}

int main(void) {
    for (int blocks = 1; blocks <= 3; blocks++) {
        pthread_t threads[MEMBERS];
        bytes = smlt_shared_size(MEMBERS, 1024, blocks);
        memory = aligned_alloc(64, bytes);
        check(memory != NULL, "no memory", 0);
        memset(memory, 0, bytes);
        check(smlt_shared_format(memory, bytes, MEMBERS, 1024, blocks, 7), "cannot be made", 0);
        for (int r = 0; r < MEMBERS; r++) pthread_create(&threads[r], NULL, work, (void *)(intptr_t)r);
        for (int r = 0; r < MEMBERS; r++) pthread_join(threads[r], NULL);
        free(memory);
    }
    return 0;
}
