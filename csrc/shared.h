/* A reduction among the processes of one machine, in memory that they share.
 *
 * The memory is a file that all have mapped. It holds a ring of a few blocks for each process (a "local rank"), and three
 * counters each: blocks filled, reduced and taken. A call walks over its elements block by block:
 *   fill    every process copies its elements of the block into its own ring, but for its share of the block;
 *   reduce  when all have filled it, each reduces its share for all, in the order of the local ranks, and leaves the
 *           result in its own ring: so every process gets the same bits, and no element is added twice;
 *   take    when all have reduced it, each copies the shares to where it wants them; then the ring's place is free.
 * So an array of any size passes through a buffer of fixed size. Nobody holds a lock: each writes its own counters and reads
 * the others'. Who has to wait sleeps on a futex (elsewhere than on Linux: naps).
 *
 * Nothing that is read from the file is trusted: offsets and lengths come from the process's own memory, counters that
 * cannot be are an error, texts are cut.
 */
#ifndef SMLT_SHARED_H
#define SMLT_SHARED_H

#include <stddef.h>
#include <stdint.h>

#define SMLT_SHARED_MEMBERS_MAX 64 /* a bit each in a mask */
#define SMLT_SHARED_TEXT_BYTES 1024
#define SMLT_SHARED_BLOCK_BYTES_MIN 1024
#define SMLT_SHARED_BLOCK_BYTES_MAX (16 << 20)
#define SMLT_SHARED_BLOCKS_MAX 64

typedef enum {
    SMLT_SHARED_DONE,
    SMLT_SHARED_AGAIN,    /* the time is over; call again */
    SMLT_SHARED_MISMATCH, /* the processes have called different things; all are told so, and all may go on */
    SMLT_SHARED_FAILED,   /* a process has given up: `smlt_shared_culprit` */
    SMLT_SHARED_LEFT,     /* one that is waited for has left */
    SMLT_SHARED_GARBLED,  /* the file holds what none of the processes can have written */
    SMLT_SHARED_TAKEN,    /* the local rank is another process's */
    SMLT_SHARED_NO_MEMORY,
    SMLT_SHARED_INVALID /* arguments that cannot be */
} smlt_shared_status;

typedef enum { SMLT_SHARED_REDUCE, SMLT_SHARED_COPY } smlt_shared_kind;
typedef enum { SMLT_SHARED_ABSENT, SMLT_SHARED_JOINED, SMLT_SHARED_IS_LEFT, SMLT_SHARED_HAS_FAILED } smlt_shared_state;

/* `count` elements of a dtype, reduced by an operation of codec.h (of no account in a copy). `source` and `target` are the
 * same, or do not overlap. `source` may be NULL where it is not read (a copy from another), `target` where the process is no
 * taker. */
typedef struct {
    int dtype;
    int operation;
    const void *source;
    void *target;
    size_t count;
} smlt_shared_segment;

typedef struct {
    smlt_shared_kind kind;
    int divisor;     /* of a mean; it may be a mean over more than this machine's processes */
    int root;        /* of a copy: the local rank that it goes out from */
    uint64_t takers; /* a bit for each local rank that wants the result */
    uint64_t digest; /* of what all must agree on */
    const char *description;
} smlt_shared_call;

typedef struct {
    int state; /* smlt_shared_state */
    int64_t rank, pid;
    uint64_t start, pid_namespace;
    uint64_t digest;                          /* of its call under way, or its last */
    char description[SMLT_SHARED_TEXT_BYTES]; /* the same in words */
    char failure[SMLT_SHARED_TEXT_BYTES];     /* why it has given up */
} smlt_shared_member;

typedef struct smlt_shared smlt_shared;

/* Bytes of the file; 0 for arguments out of range. */
size_t smlt_shared_size(int local_size, size_t block_bytes, int blocks);
/* Write a new group into zeroed memory of that size. `key` says what the group is for. 0 for arguments out of range. */
int smlt_shared_format(void *memory, size_t size, int local_size, size_t block_bytes, int blocks, uint64_t key);

/* A process's hold on a group, in memory that the caller keeps mapped until `smlt_shared_free`. NULL, and `status`. */
smlt_shared *smlt_shared_open(void *memory, size_t size, int local_rank, int local_size, uint64_t key,
                              smlt_shared_status *status);
void smlt_shared_free(smlt_shared *shared);

/* Take the place of the local rank; `rank` is the worker's number in the whole job. DONE or TAKEN. */
smlt_shared_status smlt_shared_claim(smlt_shared *shared, int64_t rank);
/* Wait until all have taken theirs. */
smlt_shared_status smlt_shared_gather(smlt_shared *shared, int timeout_ms);

/* Begin a call; `segments` are copied, the memory that they point to is used until `smlt_shared_run` has returned
 * something other than AGAIN. INVALID, for a dtype or operation that there is not, before anything is written. */
smlt_shared_status smlt_shared_begin(smlt_shared *shared, const smlt_shared_call *call, const smlt_shared_segment *segments,
                                     int count);
/* Work on it for at most about `timeout_ms`. After anything but DONE, AGAIN and MISMATCH the group is of no more use. */
smlt_shared_status smlt_shared_run(smlt_shared *shared, int timeout_ms);

/* The local ranks that this one waits for, a bit each. */
uint64_t smlt_shared_missing(const smlt_shared *shared);
/* Who has failed or left, after FAILED or LEFT. */
int smlt_shared_culprit(const smlt_shared *shared);
/* What a local rank has said of itself. */
void smlt_shared_look(const smlt_shared *shared, int local_rank, smlt_shared_member *member);

/* Tell the others that this process gives up, or that it leaves in order. */
void smlt_shared_fail(smlt_shared *shared, const char *text);
void smlt_shared_leave(smlt_shared *shared);

/* When a process was started, in units of its system's; 0 when there is none of this number, or it has ended and nobody has
 * asked for its exit code yet. 1 where the system does not tell. */
uint64_t smlt_process_start(int64_t pid);
/* Two processes know each other's number only when this is the same; 0 where there is one for all. */
uint64_t smlt_process_namespace(void);

#endif
