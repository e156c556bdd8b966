#include "trace.h"

#include <stdlib.h>
#include <time.h>

int64_t smlt_trace_clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int smlt_trace_start(smlt_trace *trace, size_t capacity) {
    smlt_trace_free(trace);
    trace->events = calloc(capacity, sizeof *trace->events);
    trace->capacity = trace->events ? capacity : 0;
    return trace->events != NULL;
}

void smlt_trace_free(smlt_trace *trace) {
    free(trace->events);
    *trace = (smlt_trace){0};
}

void smlt_trace_add(smlt_trace *trace, smlt_trace_kind kind, int64_t begin, uint64_t step, uint32_t chunk, size_t bytes) {
    if (begin == 0 || trace->count == trace->capacity) return; /* begun before tracing was on */
    trace->events[trace->count++] = (smlt_trace_event){.begin_ns = begin,
                                                       .end_ns = smlt_trace_clock_ns(),
                                                       .step = step,
                                                       .chunk = chunk,
                                                       .bytes = (uint32_t)bytes,
                                                       .kind = kind};
}
