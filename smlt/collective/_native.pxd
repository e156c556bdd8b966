# What csrc offers to _native.pyx.
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "resp.h" nogil:
    ctypedef enum resp_event:
        RESP_MORE, RESP_ARRAY, RESP_BULK, RESP_DATA, RESP_BULK_END, RESP_NIL, RESP_STATUS, RESP_ERROR, RESP_INTEGER, RESP_INVALID
    ctypedef struct resp_item:
        const char *data
        size_t length
        int64_t integer
        int depth
        int last
    ctypedef struct resp_decoder:
        int64_t bulk_remaining
    void resp_reset(resp_decoder *decoder)
    resp_event resp_next(resp_decoder *decoder, const char *bytes, size_t length, size_t *consumed, resp_item *item)
    void resp_take(resp_decoder *decoder, size_t count)
    ctypedef struct resp_buffer:
        char *data
        size_t length
        int failed
    void resp_buffer_free(resp_buffer *buffer)
    void resp_append_array(resp_buffer *buffer, size_t elements)
    void resp_append_bulk(resp_buffer *buffer, const void *bytes, size_t length)


cdef extern from "codec.h" nogil:
    int SMLT_CHOOSE_EXPONENT
    int SMLT_KEEP_SCALES
    ctypedef struct smlt_kernel:
        size_t element_bytes
        size_t wire_bytes
        size_t accumulator_bytes
        size_t block_elements
        size_t block_header_bytes
        int (*encode)(void *wire, const void *source, size_t n, int exponent)
        int (*encode_feedback)(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent)
        void (*decode)(void *target, const void *wire, size_t n, int exponent)
        void (*decode_streaming)(void *target, const void *wire, size_t n, int exponent)
        void (*reduce)(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first)
        void (*reduce_own)(void *accumulator, const void *source, size_t n, int exponent, int shift, int first)
        int (*finish)(void *accumulator, size_t n, int world_size, int shift)
    int smlt_kernel_select(smlt_kernel *kernel, int dtype, int codec, int operation)
    size_t smlt_wire_size(const smlt_kernel *kernel, size_t n)
    size_t smlt_wire_elements(const smlt_kernel *kernel, size_t bytes, size_t left)
    const char *smlt_codec_path(int index)
    int smlt_codec_use(const char *path)
    const char *smlt_codec_current()


cdef extern from "aggregate.h" nogil:
    ctypedef enum smlt_status:
        SMLT_OK, SMLT_ACTIVE, SMLT_NO_MEMORY, SMLT_PROTOCOL, SMLT_STORE_ERROR, SMLT_STORE_FULL, SMLT_STORE_DENIED
        SMLT_VANISHED, SMLT_MISMATCH, SMLT_LOST, SMLT_ABORTED, SMLT_FENCED, SMLT_STORE_REFUSES
    int SMLT_LANE_KINDS
    int SMLT_NODES_MAX
    int SMLT_LANES_MAX
    ctypedef struct smlt_error:
        smlt_status status
        char message[1100]
    ctypedef struct smlt_segment:
        int dtype
        int codec
        const void *source
        void *target
        int64_t source_count
        int64_t target_count
        const void *residual
        void *next_residual
    ctypedef struct smlt_chunk:
        int32_t segment
        int32_t owner
        int64_t source
        int64_t target
        int64_t count
        int32_t reader
    ctypedef enum smlt_algorithm:
        SMLT_COPY, SMLT_HIERARCHICAL, SMLT_ONE_SHOT
    size_t SMLT_ONE_SHOT_BYTES_MAX
    ctypedef struct smlt_plan:
        smlt_algorithm algorithm
        int operation
        uint64_t digest
        const char *description
        const smlt_segment *segments
        int segment_count
        const smlt_chunk *chunks
        int chunk_count
    ctypedef struct smlt_engine:
        pass
    smlt_engine *smlt_engine_new(int rank, int world_size, uint64_t generation, int nodes, const char *const *prefixes,
                                 const char *control_key, int64_t ttl_ms, size_t chunk_elements, size_t chunk_bytes,
                                 size_t window_bytes, size_t store_window_bytes)
    int smlt_engine_lanes(const smlt_engine *engine)
    void smlt_engine_free(smlt_engine *engine)
    smlt_status smlt_engine_submit(smlt_engine *engine, const smlt_plan *plan, uint64_t *step)
    smlt_status smlt_engine_state(smlt_engine *engine, uint64_t step, smlt_error *error)
    void smlt_engine_retire(smlt_engine *engine, uint64_t step)
    int smlt_engine_has_ended(smlt_engine *engine, uint64_t step)
    uint64_t smlt_engine_ends(const smlt_engine *engine)
    int smlt_engine_flushed(const smlt_engine *engine)
    void smlt_engine_abandon(smlt_engine *engine, uint64_t step, smlt_status status, const char *text, int announce)
    void smlt_engine_leave(smlt_engine *engine, const char *text, int announce)
    void smlt_engine_fence(smlt_engine *engine, uint64_t generation)
    uint64_t smlt_engine_fenced_by(const smlt_engine *engine)
    void smlt_engine_complete_fenced(smlt_engine *engine, int on)
    uint64_t smlt_engine_first_unfinished(const smlt_engine *engine)
    uint64_t smlt_engine_failures(const smlt_engine *engine)
    int smlt_engine_missing_owner(smlt_engine *engine, uint64_t step)
    int smlt_engine_has_joined(smlt_engine *engine, uint64_t step, int rank)
    int smlt_engine_output(smlt_engine *engine, int lane, iovec *vectors, int max)
    void smlt_engine_sent(smlt_engine *engine, int lane, size_t bytes)
    char *smlt_engine_input(smlt_engine *engine, int lane, size_t *capacity)
    smlt_status smlt_engine_received(smlt_engine *engine, int lane, size_t bytes)
    const smlt_error *smlt_engine_fatal(const smlt_engine *engine)
    const smlt_error *smlt_engine_refusal(const smlt_engine *engine)
    void smlt_engine_give_up(smlt_engine *engine)
    int smlt_engine_vanished(smlt_engine *engine, uint64_t step, smlt_error *error)
    void smlt_engine_set_silence(smlt_engine *engine, int64_t silence_ms)
    int smlt_engine_is_silent(smlt_engine *engine, int64_t now_ms, const int *unsent)
    int64_t smlt_clock_ms()
    void smlt_engine_data_lost(smlt_engine *engine, int node)
    void smlt_engine_reconnected(smlt_engine *engine)
    smlt_trace *smlt_engine_trace(smlt_engine *engine)


cdef extern from "trace.h" nogil:
    ctypedef struct smlt_trace_event:
        int64_t begin_ns
        int64_t end_ns
        uint64_t step
        uint32_t chunk
        uint32_t bytes
        uint32_t kind
    ctypedef struct smlt_trace:
        smlt_trace_event *events
        size_t count
    int smlt_trace_start(smlt_trace *trace, size_t capacity)
    void smlt_trace_free(smlt_trace *trace)


cdef extern from "progress.h" nogil:
    ctypedef enum smlt_run_result:
        SMLT_RUN_ENDED, SMLT_RUN_AGAIN, SMLT_RUN_LOST
    ctypedef struct smlt_progress:
        pass
    smlt_progress *smlt_progress_new(smlt_engine *engine)
    void smlt_progress_free(smlt_progress *progress)
    void smlt_progress_lock(smlt_progress *progress)
    void smlt_progress_unlock(smlt_progress *progress)
    void smlt_progress_submitted(smlt_progress *progress)
    void smlt_progress_connected(smlt_progress *progress, const int *fds)
    void smlt_progress_disconnect(smlt_progress *progress)
    int smlt_progress_is_lost(smlt_progress *progress)
    int smlt_progress_start(smlt_progress *progress)
    void smlt_progress_stop(smlt_progress *progress)
    smlt_run_result smlt_progress_run(smlt_progress *progress, uint64_t step, int timeout_ms, int flush)
    int smlt_progress_take(smlt_progress *progress)
    void smlt_progress_release(smlt_progress *progress, int connection_lost)
    int smlt_progress_wake_fd(const smlt_progress *progress)
    void smlt_progress_drain(smlt_progress *progress)
    int smlt_progress_wait_for_work(smlt_progress *progress, int timeout_ms)
