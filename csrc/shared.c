/* The ring of blocks among the processes of a machine: see shared.h. */
#include "shared.h"

#include "codec_paths.h"
#include "shared_wait.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if ATOMIC_INT_LOCK_FREE != 2
#error "atomics that take a lock do not work between processes"
#endif

#define MAGIC "SMLTshm1"
#define LINE 64 /* bytes that processors hand to each other at once */
#define PAGE 4096
/* Elements that are reduced at a time: what they are added up in stays in the innermost cache. */
#define PIECE_ELEMENTS 4096
#define SHARE_ELEMENTS 64 /* shares begin at multiples: no two processes write to one line */
#define WIDEST_BYTES 16
#define SPINS 2000

/* The file. Its beginning, up to the namespace, is also read by smlt/collective/shared_group.py. */
typedef struct {
    char magic[8];
    int64_t pid; /* of who has made it */
    uint64_t start, pid_namespace;
    uint64_t key;
    uint32_t local_size, block_bytes, blocks;
    _Alignas(LINE) _Atomic uint32_t bell; /* counts what others may be waiting for */
    _Atomic uint32_t sleepers;            /* an upper bound: one that was killed asleep stays in it */
} header;

typedef struct {
    _Alignas(LINE) _Atomic uint32_t counters[3]; /* FILLED, REDUCED, TAKEN */
    _Atomic uint32_t state;
    int64_t rank, pid;
    uint64_t start, pid_namespace;
    _Atomic uint32_t calls; /* its call's digest and description are at calls & 1 */
    uint64_t digest[2];
    char description[2][SMLT_SHARED_TEXT_BYTES];
    char failure[SMLT_SHARED_TEXT_BYTES];
} place;

enum { FILLED, REDUCED, TAKEN };

typedef struct {
    int segment;
    size_t element; /* the next block begins here */
} cursor;

typedef struct {
    const smlt_shared_segment *segment;
    const smlt_kernel *kernel;
    size_t first, count; /* elements */
} block;

struct smlt_shared {
    header *at;
    place *places;
    char *rings;
    int local_rank, local_size, culprit, spins;
    uint32_t ring; /* blocks in it */
    size_t block_bytes;

    /* The call. This process's counters are never read back from the file. */
    uint32_t mine[3], first, last, calls;
    int agreed;
    smlt_shared_call call;
    smlt_shared_segment *segments;
    smlt_kernel *kernels;
    int segment_count;
    cursor at_block[3];
    void *accumulator;
};

/* ---- the file ---- */

static size_t rings_offset(int local_size) {
    size_t bytes = sizeof(header) + (size_t)local_size * sizeof(place);
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

size_t smlt_shared_size(int local_size, size_t block_bytes, int blocks) {
    if (local_size < 1 || local_size > SMLT_SHARED_MEMBERS_MAX || blocks < 1 || blocks > SMLT_SHARED_BLOCKS_MAX) return 0;
    if (block_bytes < SMLT_SHARED_BLOCK_BYTES_MIN || block_bytes > SMLT_SHARED_BLOCK_BYTES_MAX || block_bytes % LINE) return 0;
    return rings_offset(local_size) + (size_t)local_size * (size_t)blocks * block_bytes;
}

int smlt_shared_format(void *memory, size_t size, int local_size, size_t block_bytes, int blocks, uint64_t key) {
    size_t needed = smlt_shared_size(local_size, block_bytes, blocks);
    if (needed == 0 || needed != size || (uintptr_t)memory % LINE) return 0;
    header *at = memory;
    memcpy(at->magic, MAGIC, sizeof at->magic);
    at->pid = (int64_t)getpid();
    at->start = smlt_process_start(at->pid);
    at->pid_namespace = smlt_process_namespace();
    at->key = key;
    at->local_size = (uint32_t)local_size;
    at->block_bytes = (uint32_t)block_bytes;
    at->blocks = (uint32_t)blocks;
    return 1;
}

smlt_shared *smlt_shared_open(void *memory, size_t size, int local_rank, int local_size, uint64_t key,
                              smlt_shared_status *status) {
    header *at = memory;
    *status = SMLT_SHARED_INVALID;
    if (local_rank < 0 || local_rank >= local_size || local_size > SMLT_SHARED_MEMBERS_MAX) return NULL;
    *status = SMLT_SHARED_GARBLED;
    if (size < sizeof *at || (uintptr_t)memory % LINE || memcmp(at->magic, MAGIC, sizeof at->magic) != 0) return NULL;
    uint32_t block_bytes = at->block_bytes, blocks = at->blocks; /* once: they may change under us */
    if (at->key != key || at->local_size != (uint32_t)local_size || blocks > SMLT_SHARED_BLOCKS_MAX) return NULL;
    if (smlt_shared_size(local_size, block_bytes, (int)blocks) != size) return NULL;
    *status = SMLT_SHARED_NO_MEMORY;
    smlt_shared *shared = calloc(1, sizeof *shared);
    if (!shared) return NULL;
    shared->accumulator = malloc((size_t)PIECE_ELEMENTS * WIDEST_BYTES);
    if (!shared->accumulator) {
        free(shared);
        return NULL;
    }
    shared->at = at;
    shared->places = (place *)((char *)memory + sizeof(header));
    shared->rings = (char *)memory + rings_offset(local_size);
    shared->local_rank = local_rank;
    shared->local_size = local_size;
    shared->ring = blocks;
    shared->block_bytes = block_bytes;
    shared->culprit = -1;
    /* With a core for each, an answer comes sooner than a sleeper is woken. */
    shared->spins = sysconf(_SC_NPROCESSORS_ONLN) > local_size ? SPINS : 0;
    *status = SMLT_SHARED_DONE;
    return shared;
}

static void forget_call(smlt_shared *shared) {
    free(shared->segments);
    free(shared->kernels);
    shared->segments = NULL;
    shared->kernels = NULL;
    shared->segment_count = 0;
}

void smlt_shared_free(smlt_shared *shared) {
    if (!shared) return;
    forget_call(shared);
    free(shared->accumulator);
    free(shared);
}

/* ---- waiting ---- */

static void ring_bell(smlt_shared *shared) {
    atomic_fetch_add(&shared->at->bell, 1);
    if (atomic_load(&shared->at->sleepers)) smlt_wake_all(&shared->at->bell);
}

/* Until the bell has rung since it was `seen`, or the time is over. */
static void await_bell(smlt_shared *shared, uint32_t seen, int64_t until_us) {
    for (int i = 0; i < shared->spins; i++) {
        if (atomic_load(&shared->at->bell) != seen) return;
        smlt_relax();
    }
    int64_t left_ms = (until_us - smlt_monotonic_us() + 999) / 1000;
    if (left_ms <= 0) return;
    atomic_fetch_add(&shared->at->sleepers, 1);
    smlt_wait_on(&shared->at->bell, seen, (int)left_ms);
    atomic_fetch_sub(&shared->at->sleepers, 1);
}

/* SMLT_SHARED_DONE, or how somebody has put an end to it: who has failed, or has left though he is waited for. */
static smlt_shared_status look_for_end(smlt_shared *shared, uint64_t missing) {
    for (int r = 0; r < shared->local_size; r++) {
        uint32_t state = atomic_load(&shared->places[r].state);
        if (r == shared->local_rank || state <= SMLT_SHARED_JOINED) continue;
        if (state == SMLT_SHARED_IS_LEFT && !(missing >> r & 1)) continue;
        shared->culprit = r;
        return state == SMLT_SHARED_IS_LEFT      ? SMLT_SHARED_LEFT
               : state == SMLT_SHARED_HAS_FAILED ? SMLT_SHARED_FAILED
                                                 : SMLT_SHARED_GARBLED;
    }
    return SMLT_SHARED_DONE;
}

smlt_shared_status smlt_shared_claim(smlt_shared *shared, int64_t rank) {
    place *own = &shared->places[shared->local_rank];
    int64_t nobody = 0, pid = (int64_t)getpid();
    if (!__atomic_compare_exchange_n(&own->pid, &nobody, pid, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return SMLT_SHARED_TAKEN;
    own->start = smlt_process_start(pid);
    own->pid_namespace = smlt_process_namespace();
    own->rank = rank;
    atomic_store(&own->state, SMLT_SHARED_JOINED);
    ring_bell(shared);
    return SMLT_SHARED_DONE;
}

static uint64_t not_joined(const smlt_shared *shared) {
    uint64_t missing = 0;
    for (int r = 0; r < shared->local_size; r++)
        if (atomic_load(&shared->places[r].state) == SMLT_SHARED_ABSENT) missing |= (uint64_t)1 << r;
    return missing;
}

smlt_shared_status smlt_shared_gather(smlt_shared *shared, int timeout_ms) {
    int64_t until_us = smlt_monotonic_us() + (int64_t)timeout_ms * 1000;
    for (;;) {
        uint32_t bell = atomic_load(&shared->at->bell);
        smlt_shared_status end = look_for_end(shared, 0); /* who has left already had come */
        if (end != SMLT_SHARED_DONE) return end;
        if (not_joined(shared) == 0) return SMLT_SHARED_DONE;
        if (smlt_monotonic_us() >= until_us) return SMLT_SHARED_AGAIN;
        await_bell(shared, bell, until_us);
    }
}

/* ---- counters ---- */

/* How far a local rank has come. -1 in `*garbled` when it cannot be there: between blocks `low` and `high`, which are
 * nearer to each other than half the numbers that a counter has. */
static uint32_t reached(const smlt_shared *shared, int local_rank, int what, uint32_t low, uint32_t high, int *garbled) {
    uint32_t value = atomic_load(&shared->places[local_rank].counters[what]);
    if (value - low > high - low) *garbled = 1;
    return value;
}

/* The local ranks that have not yet done `what` to `block`. What follows from how far this process is: nobody is further
 * than a ring ahead of what it has taken, and nobody behind what all must have done before it could go on. */
static uint64_t behind(const smlt_shared *shared, int what, uint32_t block, int *garbled) {
    uint32_t low = what == FILLED    ? shared->mine[REDUCED]
                   : what == REDUCED ? shared->mine[TAKEN]
                                     : shared->mine[FILLED] - shared->ring;
    uint32_t high = what == TAKEN     ? shared->mine[REDUCED]
                    : what == REDUCED ? shared->mine[FILLED]
                                      : shared->mine[TAKEN] + shared->ring;
    uint64_t missing = 0;
    for (int r = 0; r < shared->local_size; r++) {
        if (r == shared->local_rank) {
            if ((int32_t)(shared->mine[what] - block) <= 0) missing |= (uint64_t)1 << r;
            continue;
        }
        uint32_t value = reached(shared, r, what, low, high, garbled);
        if ((int32_t)(value - block) <= 0) missing |= (uint64_t)1 << r;
    }
    return missing;
}

/* This process has done `what` to its next block. The last to do it rings: all conditions are that all have. */
static void advance(smlt_shared *shared, int what) {
    uint32_t block = shared->mine[what]++;
    int ignored = 0;
    atomic_store(&shared->places[shared->local_rank].counters[what], shared->mine[what]);
    if (behind(shared, what, block, &ignored) == 0) ring_bell(shared);
}

/* ---- blocks ---- */

static size_t block_elements(const smlt_shared *shared, int segment) {
    return shared->block_bytes / shared->kernels[segment].element_bytes;
}

static block next_block(smlt_shared *shared, int what) {
    cursor *next = &shared->at_block[what];
    while (next->segment < shared->segment_count && next->element >= shared->segments[next->segment].count) {
        next->segment++;
        next->element = 0;
    }
    if (next->segment == shared->segment_count) return (block){NULL, NULL, 0, 0}; /* the one block of an empty call */
    const smlt_shared_segment *segment = &shared->segments[next->segment];
    size_t most = block_elements(shared, next->segment), left = segment->count - next->element;
    block found = {segment, &shared->kernels[next->segment], next->element, left < most ? left : most};
    next->element += found.count;
    return found;
}

static char *ring_at(const smlt_shared *shared, int local_rank, uint32_t block) {
    return shared->rings + ((size_t)local_rank * shared->ring + block % shared->ring) * shared->block_bytes;
}

/* The elements of a block of `count` that a local rank reduces: [*begin, *end). */
static void share_of(const smlt_shared *shared, size_t count, int local_rank, size_t *begin, size_t *end) {
    size_t each = (count + (size_t)shared->local_size - 1) / (size_t)shared->local_size;
    each = (each + SHARE_ELEMENTS - 1) / SHARE_ELEMENTS * SHARE_ELEMENTS;
    *begin = each * (size_t)local_rank < count ? each * (size_t)local_rank : count;
    *end = *begin + each < count ? *begin + each : count;
}

static const char *source_of(const block *b) { return (const char *)b->segment->source + b->first * b->kernel->element_bytes; }

static void fill(smlt_shared *shared) {
    block b = next_block(shared, FILLED);
    if (b.count > 0) {
        char *ring = ring_at(shared, shared->local_rank, shared->mine[FILLED]);
        size_t size = b.kernel->element_bytes, begin = b.count, end = b.count;
        if (shared->call.kind == SMLT_SHARED_REDUCE) share_of(shared, b.count, shared->local_rank, &begin, &end);
        if (shared->call.kind == SMLT_SHARED_REDUCE || shared->call.root == shared->local_rank) {
            memcpy(ring, source_of(&b), begin * size);
            memcpy(ring + end * size, source_of(&b) + end * size, (b.count - end) * size);
        }
    }
    advance(shared, FILLED);
}

/* Elements [begin, end) of a block, in the order of the local ranks. 1 when a mean holds Inf or NaN. */
static int reduce_piece(smlt_shared *shared, const block *b, size_t begin, size_t end, int shift) {
    size_t size = b->kernel->element_bytes;
    for (int r = 0; r < shared->local_size; r++) {
        const char *from = r == shared->local_rank ? source_of(b) : ring_at(shared, r, shared->mine[REDUCED]);
        b->kernel->reduce_own(shared->accumulator, from + begin * size, end - begin, 0, shift, r == 0);
    }
    return b->kernel->finish(shared->accumulator, end - begin, shared->call.divisor, shift);
}

static void reduce(smlt_shared *shared) {
    block b = next_block(shared, REDUCED);
    if (b.count > 0 && shared->call.kind == SMLT_SHARED_REDUCE) {
        char *ring = ring_at(shared, shared->local_rank, shared->mine[REDUCED]);
        size_t begin, last, size = b.kernel->element_bytes;
        share_of(shared, b.count, shared->local_rank, &begin, &last);
        for (size_t end; begin < last; begin = end) {
            end = last - begin > PIECE_ELEMENTS ? begin + PIECE_ELEMENTS : last;
            /* A sum that overflows though the mean does not: once more, with smaller values (64 = 2^6 members at most). */
            if (reduce_piece(shared, &b, begin, end, 0)) reduce_piece(shared, &b, begin, end, 6);
            memcpy(ring + begin * size, shared->accumulator, (end - begin) * size);
        }
    }
    advance(shared, REDUCED);
}

static void take(smlt_shared *shared) {
    block b = next_block(shared, TAKEN);
    int takes = (int)(shared->call.takers >> shared->local_rank & 1);
    if (b.count > 0 && takes) {
        size_t size = b.kernel->element_bytes;
        char *target = (char *)b.segment->target + b.first * size;
        if (shared->call.kind == SMLT_SHARED_COPY)
            memcpy(target, ring_at(shared, shared->call.root, shared->mine[TAKEN]), b.count * size);
        else
            for (int r = 0; r < shared->local_size; r++) {
                size_t begin, end;
                share_of(shared, b.count, r, &begin, &end);
                memcpy(target + begin * size, ring_at(shared, r, shared->mine[TAKEN]) + begin * size, (end - begin) * size);
            }
    }
    advance(shared, TAKEN);
}

/* ---- a call ---- */

/* Memory is slower than the additions: kernels for one processor would be no faster. */
static int select_kernel(smlt_kernel *kernel, int dtype, int operation) {
    return operation >= 0 && operation < SMLT_OPERATIONS && smlt_raw_select(kernel, dtype, operation);
}

static int fits(const smlt_shared *shared, const smlt_shared_call *call, const smlt_shared_segment *segment) {
    int reduces = call->kind == SMLT_SHARED_REDUCE, takes = (int)(call->takers >> shared->local_rank & 1);
    int reads = reduces || call->root == shared->local_rank;
    return segment->count == 0 || ((segment->source || !reads) && (segment->target || !takes));
}

smlt_shared_status smlt_shared_begin(smlt_shared *shared, const smlt_shared_call *call, const smlt_shared_segment *segments,
                                     int count) {
    if (shared->mine[TAKEN] != shared->last || count < 0 || call->root < 0 || call->root >= shared->local_size ||
        (call->kind == SMLT_SHARED_REDUCE && call->divisor < 1))
        return SMLT_SHARED_INVALID;
    forget_call(shared);
    shared->segments = calloc((size_t)count + 1, sizeof *segments);
    shared->kernels = calloc((size_t)count + 1, sizeof *shared->kernels);
    if (!shared->segments || !shared->kernels) return SMLT_SHARED_NO_MEMORY;
    uint32_t blocks = 0;
    for (int i = 0; i < count; i++) {
        int operation = call->kind == SMLT_SHARED_REDUCE ? segments[i].operation : SMLT_SUM;
        if (!select_kernel(&shared->kernels[i], segments[i].dtype, operation)) return SMLT_SHARED_INVALID;
        if (!fits(shared, call, &segments[i])) return SMLT_SHARED_INVALID;
        shared->segments[i] = segments[i];
        size_t each = block_elements(shared, i);
        blocks += (uint32_t)(segments[i].count / each + (segments[i].count % each != 0));
    }
    shared->segment_count = count;
    shared->call = *call;
    shared->first = shared->last;
    shared->last = shared->first + (blocks ? blocks : 1); /* at least one: everybody hears from everybody */
    memset(shared->at_block, 0, sizeof shared->at_block);
    shared->agreed = 0;
    shared->calls++;
    place *own = &shared->places[shared->local_rank];
    /* Nobody reads this half any more: the call before the last is over when the last is (all have reduced its blocks). */
    own->digest[shared->calls & 1] = call->digest;
    snprintf(own->description[shared->calls & 1], SMLT_SHARED_TEXT_BYTES, "%s", call->description ? call->description : "");
    shared->call.description = NULL; /* the caller's */
    atomic_store(&own->calls, shared->calls);
    return SMLT_SHARED_DONE;
}

/* All have filled the call's first block, so all have said what they call. */
static int all_agree(const smlt_shared *shared) {
    for (int r = 0; r < shared->local_size; r++)
        if (shared->places[r].digest[shared->calls & 1] != shared->call.digest) return 0;
    return 1;
}

/* Nobody has gone past the first block. All leave it behind. */
static smlt_shared_status disagree(smlt_shared *shared) {
    shared->last = shared->first + 1;
    advance(shared, REDUCED);
    advance(shared, TAKEN);
    return SMLT_SHARED_MISMATCH;
}

/* Does one thing to one block: DONE. AGAIN when nothing can be done now. Finishing comes before beginning. */
static smlt_shared_status step(smlt_shared *shared) {
    uint32_t *mine = shared->mine;
    int garbled = 0;
    if (mine[TAKEN] != mine[REDUCED] && behind(shared, REDUCED, mine[TAKEN], &garbled) == 0 && !garbled) {
        take(shared);
        return SMLT_SHARED_DONE;
    }
    if (mine[REDUCED] != mine[FILLED] && behind(shared, FILLED, mine[REDUCED], &garbled) == 0 && !garbled) {
        if (!shared->agreed && !all_agree(shared)) return disagree(shared);
        shared->agreed = 1;
        reduce(shared);
        return SMLT_SHARED_DONE;
    }
    int may_fill = mine[FILLED] != shared->last && (mine[FILLED] == shared->first || shared->agreed);
    if (may_fill && behind(shared, TAKEN, mine[FILLED] - shared->ring, &garbled) == 0 && !garbled) {
        fill(shared);
        return SMLT_SHARED_DONE;
    }
    return garbled ? SMLT_SHARED_GARBLED : SMLT_SHARED_AGAIN;
}

smlt_shared_status smlt_shared_run(smlt_shared *shared, int timeout_ms) {
    int64_t until_us = smlt_monotonic_us() + (int64_t)timeout_ms * 1000;
    while (shared->mine[TAKEN] != shared->last) {
        uint32_t bell = atomic_load(&shared->at->bell); /* before looking: what comes after it rings anew */
        smlt_shared_status status = step(shared);
        if (status == SMLT_SHARED_AGAIN) {
            if ((status = look_for_end(shared, smlt_shared_missing(shared))) != SMLT_SHARED_DONE) return status;
            await_bell(shared, bell, until_us);
        } else if (status != SMLT_SHARED_DONE) {
            return status;
        }
        if (shared->mine[TAKEN] != shared->last && smlt_monotonic_us() >= until_us) return SMLT_SHARED_AGAIN;
    }
    return SMLT_SHARED_DONE;
}

/* ---- who does what ---- */

uint64_t smlt_shared_missing(const smlt_shared *shared) {
    const uint32_t *mine = shared->mine;
    int ignored = 0;
    uint64_t missing = not_joined(shared);
    if (missing == 0 && mine[REDUCED] != mine[FILLED]) missing = behind(shared, FILLED, mine[REDUCED], &ignored);
    if (missing == 0 && mine[TAKEN] != mine[REDUCED]) missing = behind(shared, REDUCED, mine[TAKEN], &ignored);
    if (missing == 0 && mine[TAKEN] != shared->last) missing = behind(shared, TAKEN, mine[FILLED] - shared->ring, &ignored);
    return missing & ~((uint64_t)1 << shared->local_rank);
}

int smlt_shared_culprit(const smlt_shared *shared) { return shared->culprit; }

static void copy_text(char *to, const char *from) {
    memcpy(to, from, SMLT_SHARED_TEXT_BYTES);
    to[SMLT_SHARED_TEXT_BYTES - 1] = 0;
}

void smlt_shared_look(const smlt_shared *shared, int local_rank, smlt_shared_member *member) {
    const place *other = &shared->places[local_rank];
    member->state = (int)atomic_load(&other->state);
    member->rank = other->rank;
    member->pid = other->pid;
    member->start = other->start;
    member->pid_namespace = other->pid_namespace;
    member->digest = other->digest[shared->calls & 1];
    copy_text(member->description, other->description[shared->calls & 1]);
    copy_text(member->failure, other->failure);
}

static void end(smlt_shared *shared, smlt_shared_state state) {
    atomic_store(&shared->places[shared->local_rank].state, (uint32_t)state);
    ring_bell(shared);
}

void smlt_shared_fail(smlt_shared *shared, const char *text) {
    snprintf(shared->places[shared->local_rank].failure, SMLT_SHARED_TEXT_BYTES, "%s", text);
    end(shared, SMLT_SHARED_HAS_FAILED);
}

void smlt_shared_leave(smlt_shared *shared) { end(shared, SMLT_SHARED_IS_LEFT); }
