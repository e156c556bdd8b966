/* What an engine spent its time on, event by event: for one collective under a magnifying glass, off otherwise. */
#ifndef SMLT_TRACE_H
#define SMLT_TRACE_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    SMLT_TRACE_ENCODE,  /* a contribution, into the buffer that is sent */
    SMLT_TRACE_SEND,    /* sendmsg; chunk: the lane */
    SMLT_TRACE_WAIT,    /* poll with nothing to do; bytes: asked for and not received; chunk: bytes sent and not confirmed */
    SMLT_TRACE_RECEIVE, /* recv; chunk: the lane */
    SMLT_TRACE_ADD,     /* contributions, decoded and added as they come in */
    SMLT_TRACE_PUBLISH, /* a mean: divided, encoded, decoded into the target */
    SMLT_TRACE_DECODE,  /* aggregates, into the target */
    SMLT_TRACE_KINDS
} smlt_trace_kind;

typedef struct {
    int64_t begin_ns, end_ns; /* monotonic */
    uint64_t step;
    uint32_t chunk, bytes;
    uint32_t kind;
} smlt_trace_event;

typedef struct {
    smlt_trace_event *events; /* NULL: off */
    size_t count, capacity;
} smlt_trace;

int smlt_trace_start(smlt_trace *trace, size_t capacity); /* 0 when memory is out */
void smlt_trace_free(smlt_trace *trace);
int64_t smlt_trace_clock_ns(void);

/* When on: the time; 0 otherwise. */
static inline int64_t smlt_trace_begin(const smlt_trace *trace) { return trace->events ? smlt_trace_clock_ns() : 0; }

/* From `begin` to now; nothing when off or full. */
void smlt_trace_add(smlt_trace *trace, smlt_trace_kind kind, int64_t begin, uint64_t step, uint32_t chunk, size_t bytes);

static inline void smlt_trace_end(smlt_trace *trace, smlt_trace_kind kind, int64_t begin, uint64_t step, uint32_t chunk,
                                  size_t bytes) {
    if (trace->events) smlt_trace_add(trace, kind, begin, step, chunk, bytes);
}

#endif
