# cython: language_level=3
"""The collective's native core for Python: the engine, the RESP decoder, the codecs. Typed in _native.pyi."""

cimport cython
from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize, PyBytes_Size
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from "Python.h":
    int PyBUF_READ
    int PyBUF_WRITE

LANES = SMLT_LANE_KINDS  # to each node
NODES_MAX = SMLT_NODES_MAX
COPY = SMLT_COPY
HIERARCHICAL = SMLT_HIERARCHICAL
ONE_SHOT = SMLT_ONE_SHOT
ONE_SHOT_BYTES_MAX = SMLT_ONE_SHOT_BYTES_MAX
OK = SMLT_OK
ACTIVE = SMLT_ACTIVE
NO_MEMORY = SMLT_NO_MEMORY
PROTOCOL = SMLT_PROTOCOL
STORE_ERROR = SMLT_STORE_ERROR
STORE_FULL = SMLT_STORE_FULL
STORE_DENIED = SMLT_STORE_DENIED
VANISHED = SMLT_VANISHED
MISMATCH = SMLT_MISMATCH
LOST = SMLT_LOST
ABORTED = SMLT_ABORTED
FENCED = SMLT_FENCED
STORE_REFUSES = SMLT_STORE_REFUSES
ENDED = SMLT_RUN_ENDED
AGAIN = SMLT_RUN_AGAIN
CONNECTION_LOST = SMLT_RUN_LOST


cdef class ChunkTable:
    """The chunks of a plan: rows of (segment, owner, source, target, count), sorted by owner. Immutable.

    A sixth number in a row is the one rank that wants the result, -1 when all do.
    """

    cdef smlt_chunk *chunks
    cdef readonly int count

    def __cinit__(self, rows):
        self.count = len(rows)
        self.chunks = <smlt_chunk *>calloc(self.count if self.count else 1, sizeof(smlt_chunk))
        if self.chunks == NULL:
            raise MemoryError
        for i, row in enumerate(rows):
            segment, owner, source, target, count = row[:5]
            self.chunks[i] = smlt_chunk(segment, owner, source, target, count, row[5] + 1 if len(row) > 5 else 0)

    def __dealloc__(self):
        free(self.chunks)

    def __len__(self):
        return self.count


cdef class Held:
    """The caller's memory and the plan, held while a collective uses them."""

    cdef Py_buffer *buffers
    cdef int buffer_count
    cdef ChunkTable table

    def __cinit__(self, int capacity):
        self.buffers = <Py_buffer *>calloc(capacity if capacity else 1, sizeof(Py_buffer))
        if self.buffers == NULL:
            raise MemoryError

    def __dealloc__(self):
        self.release()
        free(self.buffers)

    cdef void release(self):
        """The buffers; the plan is kept."""
        for i in range(self.buffer_count):
            PyBuffer_Release(&self.buffers[i])
        self.buffer_count = 0

    cdef Py_buffer *hold(self, object owner, int flags) except NULL:
        PyObject_GetBuffer(owner, &self.buffers[self.buffer_count], flags)
        self.buffer_count += 1
        return &self.buffers[self.buffer_count - 1]


@cython.no_gc_clear  # the native thread reads what `held` holds until it has been stopped
cdef class Engine:
    """One worker's part in the collectives of a session (csrc/aggregate.h), and who drives it (csrc/progress.h).

    For use from any thread: every call takes the engine's lock, and gives up the GIL for as long as it has it. Not for use
    in a child process.
    """

    cdef smlt_engine *engine
    cdef smlt_progress *progress
    cdef int lanes
    cdef dict held

    def __cinit__(self, int rank, int world_size, uint64_t generation, prefixes, bytes control_key, int64_t ttl_ms,
                  size_t chunk_elements, size_t chunk_bytes, size_t window_bytes, size_t store_window_bytes=0):
        cdef const char *names[64]
        cdef int nodes = len(prefixes)
        cdef list kept = list(prefixes)
        self.held = {}
        if not 1 <= nodes <= SMLT_NODES_MAX:
            raise ValueError(f"{nodes} store nodes: 1 to {SMLT_NODES_MAX} can be used")
        for i in range(nodes):
            names[i] = <bytes?>kept[i]
        self.engine = smlt_engine_new(rank, world_size, generation, nodes, names, control_key, ttl_ms, chunk_elements,
                                      chunk_bytes, window_bytes, store_window_bytes)
        if self.engine == NULL:
            raise MemoryError("no memory for the collective's buffers, or arguments out of range")
        self.lanes = smlt_engine_lanes(self.engine)
        self.progress = smlt_progress_new(self.engine)
        if self.progress == NULL:
            raise OSError("no memory or no pipe for the collective's progress")

    def __dealloc__(self):
        with nogil:  # the thread never takes the GIL, but it may hold the lock
            smlt_progress_free(self.progress)
        smlt_engine_free(self.engine)

    def submit(self, *, int algorithm, int operation, uint64_t digest, bytes description, segments, ChunkTable table):
        """Begin a collective; returns its step. `segments`: (dtype, codec, source, target, itemsize, residual, next) each.

        Source and target are contiguous buffers (source may be None on a worker that only receives) and are held until
        `retire`, as are residual and next residual (None without error feedback; residual None: zeros). Raises BufferError
        for memory that cannot be used, ValueError for a plan that does not fit it.
        """
        cdef int count = len(segments)
        cdef Held held = Held(4 * count)
        cdef smlt_segment *native = <smlt_segment *>calloc(count if count else 1, sizeof(smlt_segment))
        cdef smlt_plan plan
        cdef uint64_t step = 0
        cdef Py_buffer *view
        if native == NULL:
            raise MemoryError
        try:
            held.table = table
            for i, (dtype, codec, source, target, itemsize, residual, next_residual) in enumerate(segments):
                native[i].dtype = dtype
                native[i].codec = codec
                if source is not None:
                    view = held.hold(source, PyBUF_ANY_CONTIGUOUS)
                    native[i].source = view.buf
                    native[i].source_count = view.len // <Py_ssize_t>itemsize
                view = held.hold(target, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
                native[i].target = view.buf
                native[i].target_count = view.len // <Py_ssize_t>itemsize
                if next_residual is not None:
                    view = held.hold(next_residual, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
                    native[i].next_residual = view.buf
                    if view.len < native[i].source_count * <Py_ssize_t>itemsize:
                        raise ValueError("a residual is shorter than its source")
                    if residual is not None:
                        native[i].residual = held.hold(residual, PyBUF_ANY_CONTIGUOUS).buf
            plan.algorithm = <smlt_algorithm>algorithm
            plan.operation = operation
            plan.digest = digest
            plan.description = description
            plan.segments = native
            plan.segment_count = count
            plan.chunks = table.chunks
            plan.chunk_count = table.count
            with nogil:
                smlt_progress_lock(self.progress)
                smlt_engine_submit(self.engine, &plan, &step)
                smlt_progress_submitted(self.progress)
                smlt_progress_unlock(self.progress)
        finally:
            free(native)
        if step == 0:
            raise ValueError("the plan does not fit its buffers, or memory is out")
        self.held[step] = held
        return step

    def connected(self, sockets):
        """New connections: one non-blocking descriptor a lane, or None when the caller moves the bytes (TLS).

        LANES descriptors for each node, node by node.
        """
        cdef int fds[3 * 64]
        if sockets is not None:
            if len(sockets) != self.lanes:
                raise ValueError(f"{len(sockets)} connections for {self.lanes} lanes")
            for i in range(self.lanes):
                fds[i] = sockets[i]
        cdef const int *given = NULL if sockets is None else fds
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_progress_connected(self.progress, given)
            smlt_progress_unlock(self.progress)

    def disconnect(self):
        """Nobody uses the connections any more when this returns: they may be closed."""
        with nogil:
            smlt_progress_disconnect(self.progress)

    def lost(self):
        """Whether the connections are lost, or to be closed."""
        cdef bint lost
        with nogil:
            lost = smlt_progress_is_lost(self.progress)
        return lost

    def reconnected(self, data_lost=()):
        """Forget what the connections before had under way, and what the nodes in `data_lost` had; before `connected`."""
        cdef int node
        cdef list lost = list(data_lost)
        if not all(0 <= node < self.lanes // SMLT_LANE_KINDS for node in lost):
            raise IndexError(lost)
        smlt_progress_lock(self.progress)
        try:
            for node in lost:
                smlt_engine_data_lost(self.engine, node)
            smlt_engine_reconnected(self.engine)
        finally:
            smlt_progress_unlock(self.progress)

    def run(self, uint64_t step, int timeout_ms, bint flush=False):
        """Move bytes, or wait for whoever does, for at most `timeout_ms`: ENDED, AGAIN or CONNECTION_LOST."""
        cdef smlt_run_result result
        with nogil:
            result = smlt_progress_run(self.progress, step, timeout_ms, flush)
        return result

    def start(self):
        """Have a native thread drive while nobody waits. OSError when there is no thread to be had."""
        cdef bint started
        with nogil:
            started = smlt_progress_start(self.progress)
        if not started:
            raise OSError("no thread for the progress of asynchronous collectives")

    def stop(self):
        """End that thread for good."""
        with nogil:
            smlt_progress_stop(self.progress)

    def state(self, uint64_t step):
        """(status, message) of a collective."""
        cdef smlt_error error
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_state(self.engine, step, &error)
            smlt_progress_unlock(self.progress)
        return error.status, error.message.decode("utf-8", "replace") if error.message[0] else ""

    def fatal(self):
        """(status, message): OK, or why the engine is of no further use."""
        cdef smlt_error error
        with nogil:
            smlt_progress_lock(self.progress)
            error = smlt_engine_fatal(self.engine)[0]
            smlt_progress_unlock(self.progress)
        return error.status, error.message.decode("utf-8", "replace")

    def refusal(self):
        """(status, message): the error reply for which the connections were given up; OK when there was none."""
        cdef smlt_error error
        with nogil:
            smlt_progress_lock(self.progress)
            error = smlt_engine_refusal(self.engine)[0]
            smlt_progress_unlock(self.progress)
        return error.status, error.message.decode("utf-8", "replace")

    def give_up(self):
        """The refusal does not pass: the engine fails with it."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_give_up(self.engine)
            smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)

    def vanished(self, uint64_t step):
        """Which chunk was announced and is not there, in words; empty when none is."""
        cdef smlt_error error
        cdef bint vanished
        with nogil:
            smlt_progress_lock(self.progress)
            vanished = smlt_engine_vanished(self.engine, step, &error)
            smlt_progress_unlock(self.progress)
        return error.message.decode("utf-8", "replace") if vanished else ""

    def set_silence(self, int64_t silence_ms):
        """For how long a connection may be still that owes a reply."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_set_silence(self.engine, silence_ms)
            smlt_progress_unlock(self.progress)

    def is_silent(self):
        """For a transport in Python, at least every second: whether a connection has been still for too long."""
        cdef bint silent
        with nogil:
            smlt_progress_lock(self.progress)
            silent = smlt_engine_is_silent(self.engine, smlt_clock_ms(), NULL)
            smlt_progress_unlock(self.progress)
        return silent

    def retire(self, uint64_t step):
        """Forget a collective and let go of its memory."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_retire(self.engine, step)
            if not smlt_engine_flushed(self.engine):
                smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)
        self.held.pop(step, None)

    def abandon(self, uint64_t step, int status, bytes text, bint announce):
        """End a collective in error here; with `announce`, for everyone."""
        cdef const char *said = text
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_abandon(self.engine, step, <smlt_status>status, said, announce)
            smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)

    def leave(self, bytes text, bint announce):
        """End what is under way; with `announce`, tell whoever waits for this worker in that or the next collective."""
        cdef const char *said = text
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_leave(self.engine, said, announce)
            smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)

    def fence(self, uint64_t generation):
        """A newer generation has begun: collectives under way count as ended, but stay as they are."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_fence(self.engine, generation)
            smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)

    def fenced_by(self):
        """The newer generation, or 0."""
        cdef uint64_t generation
        with nogil:
            smlt_progress_lock(self.progress)
            generation = smlt_engine_fenced_by(self.engine)
            smlt_progress_unlock(self.progress)
        return generation

    def complete_fenced(self, bint on):
        """Go on with what is under way though a newer generation has begun, or rest again."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_complete_fenced(self.engine, on)
            smlt_progress_submitted(self.progress)
            smlt_progress_unlock(self.progress)

    def ends(self):
        """How many collectives have ended so far."""
        cdef uint64_t ends
        with nogil:
            smlt_progress_lock(self.progress)
            ends = smlt_engine_ends(self.engine)
            smlt_progress_unlock(self.progress)
        return ends

    def standing(self):
        """(the first collective that has not ended or 0, how many have ended in error)."""
        cdef uint64_t step, failures
        with nogil:
            smlt_progress_lock(self.progress)
            step = smlt_engine_first_unfinished(self.engine)
            failures = smlt_engine_failures(self.engine)
            smlt_progress_unlock(self.progress)
        return step, failures

    def let_go(self):
        """Let go of all the callers' memory: after `leave` and `disconnect`, when nobody uses it any more."""
        for held in list(self.held.values()):
            (<Held>held).release()

    def has_ended(self, uint64_t step):
        """Whether a collective has ended, one way or another."""
        cdef bint ended
        with nogil:
            smlt_progress_lock(self.progress)
            ended = smlt_engine_has_ended(self.engine, step)
            smlt_progress_unlock(self.progress)
        return ended

    def flushed(self):
        cdef bint flushed
        with nogil:
            smlt_progress_lock(self.progress)
            flushed = smlt_engine_flushed(self.engine)
            smlt_progress_unlock(self.progress)
        return flushed

    def missing_owner(self, uint64_t step):
        cdef int owner
        with nogil:
            smlt_progress_lock(self.progress)
            owner = smlt_engine_missing_owner(self.engine, step)
            smlt_progress_unlock(self.progress)
        return owner

    def has_joined(self, uint64_t step, int rank):
        cdef bint joined
        with nogil:
            smlt_progress_lock(self.progress)
            joined = smlt_engine_has_joined(self.engine, step, rank)
            smlt_progress_unlock(self.progress)
        return joined

    def start_trace(self, size_t capacity):
        """Note from now on what time is spent on, up to `capacity` events. MemoryError when there is no room."""
        cdef bint started
        with nogil:
            smlt_progress_lock(self.progress)
            started = smlt_trace_start(smlt_engine_trace(self.engine), capacity)
            smlt_progress_unlock(self.progress)
        if not started:
            raise MemoryError("no memory for the trace")

    def take_trace(self):
        """End the trace: tuples (kind, begin ns, end ns, step, chunk or lane, bytes), kinds as in csrc/trace.h."""
        cdef smlt_trace trace
        with nogil:
            smlt_progress_lock(self.progress)
            trace = smlt_engine_trace(self.engine)[0]
            memset(smlt_engine_trace(self.engine), 0, sizeof(trace))
            smlt_progress_unlock(self.progress)
        try:
            return [(trace.events[i].kind, trace.events[i].begin_ns, trace.events[i].end_ns, trace.events[i].step,
                     trace.events[i].chunk, trace.events[i].bytes) for i in range(trace.count)]
        finally:
            smlt_trace_free(&trace)

    # For a transport in Python (TLS): take the driver's part, move bytes, release it. The memoryviews are good until the
    # driver's next call on that lane.

    def take(self):
        """Become the driver; False when someone is, or the connections are lost."""
        cdef bint taken
        with nogil:
            taken = smlt_progress_take(self.progress)
        return taken

    def release(self, bint connection_lost):
        """Be the driver no longer."""
        with nogil:
            smlt_progress_release(self.progress, connection_lost)

    def wake_fd(self):
        """Readable when there is something new to send."""
        return smlt_progress_wake_fd(self.progress)

    def drain(self):
        """Take note of having been woken."""
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_progress_drain(self.progress)
            smlt_progress_unlock(self.progress)

    def wait_for_work(self, int timeout_ms):
        """Wait for an unfinished collective that nobody drives; True when there is one."""
        cdef bint work
        with nogil:
            work = smlt_progress_wait_for_work(self.progress, timeout_ms)
        return work

    def output(self, int lane):
        """What the lane has to send: memoryviews."""
        cdef iovec vectors[24]
        cdef int count
        if not 0 <= lane < self.lanes:
            raise IndexError(lane)
        with nogil:
            smlt_progress_lock(self.progress)
            count = smlt_engine_output(self.engine, lane, vectors, 24)
            smlt_progress_unlock(self.progress)
        return [PyMemoryView_FromMemory(<char *>vectors[i].iov_base, <Py_ssize_t>vectors[i].iov_len, PyBUF_READ)
                for i in range(count)]

    def sent(self, int lane, size_t count):
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_sent(self.engine, lane, count)
            smlt_progress_unlock(self.progress)

    def input(self, int lane):
        """Where to put received bytes: a writable memoryview."""
        cdef size_t capacity = 0
        cdef char *room
        if not 0 <= lane < self.lanes:
            raise IndexError(lane)
        with nogil:
            smlt_progress_lock(self.progress)
            room = smlt_engine_input(self.engine, lane, &capacity)
            smlt_progress_unlock(self.progress)
        return PyMemoryView_FromMemory(room, <Py_ssize_t>capacity, PyBUF_WRITE)

    def received(self, int lane, size_t count):
        """`count` bytes were put there. Returns a status: OK, or the engine has failed."""
        cdef smlt_status status
        cdef size_t capacity = 0
        cdef bint fits
        with nogil:
            smlt_progress_lock(self.progress)
            smlt_engine_input(self.engine, lane, &capacity)
            fits = count <= capacity
            status = smlt_engine_received(self.engine, lane, count) if fits else SMLT_PROTOCOL
            smlt_progress_unlock(self.progress)
        if not fits:
            raise ValueError("more bytes than there is room for")
        return status


class ReplyError(Exception):
    """An error reply of the store."""


cdef class Decoder:
    """RESP2 replies out of bytes, however they are split. For the handshake and the tests; chunks never come here."""

    cdef resp_decoder decoder
    cdef bytes pending
    cdef list stack, content

    def __cinit__(self):
        resp_reset(&self.decoder)
        self.pending = b""
        self.stack = []
        self.content = None

    def feed(self, data):
        """Decode `data`; returns the replies that are complete: bytes, int, None, list, str (status) or ReplyError.

        Raises ValueError when the bytes are not RESP.
        """
        cdef resp_item item
        cdef resp_event event
        cdef size_t consumed, start = 0
        cdef bytes whole = self.pending + bytes(data)
        cdef const char *base = PyBytes_AsString(whole)
        cdef size_t length = PyBytes_Size(whole)
        replies = []
        while True:
            event = resp_next(&self.decoder, base + start, length - start, &consumed, &item)
            if event == RESP_MORE:
                break
            if event == RESP_INVALID:
                raise ValueError("not the Redis protocol")
            start += consumed
            if event == RESP_DATA:
                self.content.append(PyBytes_FromStringAndSize(item.data, <Py_ssize_t>item.length))
                resp_take(&self.decoder, item.length)
                start += item.length
                continue
            if event == RESP_BULK:
                self.content = []
                continue
            if event == RESP_ARRAY:
                value = []
                if item.integer > 0:
                    self.stack.append((value, item.integer))
                    continue
            elif event == RESP_BULK_END:
                value = b"".join(self.content)
            elif event == RESP_NIL:
                value = None
            elif event == RESP_INTEGER:
                value = item.integer
            elif event == RESP_STATUS:
                value = PyBytes_FromStringAndSize(item.data, <Py_ssize_t>item.length).decode("utf-8", "replace")
            else:
                value = ReplyError(PyBytes_FromStringAndSize(item.data, <Py_ssize_t>item.length).decode("utf-8", "replace"))
            while self.stack:
                elements, expected = self.stack[-1]
                elements.append(value)
                if len(elements) < expected:
                    break
                value = elements
                self.stack.pop()
            else:
                replies.append(value)
        self.pending = whole[start:]
        return replies


def encode_command(*arguments):
    """One command as RESP bytes; each argument is bytes."""
    cdef resp_buffer buffer
    cdef bytes argument
    memset(&buffer, 0, sizeof(buffer))
    try:
        resp_append_array(&buffer, len(arguments))
        for argument in arguments:
            resp_append_bulk(&buffer, PyBytes_AsString(argument), PyBytes_Size(argument))
        if buffer.failed:
            raise MemoryError
        return PyBytes_FromStringAndSize(buffer.data, <Py_ssize_t>buffer.length)
    finally:
        resp_buffer_free(&buffer)


def codec_paths():
    """The instruction sets this machine can use, best last."""
    paths = []
    while smlt_codec_path(len(paths)) != NULL:
        paths.append(smlt_codec_path(len(paths)).decode())
    return paths


def codec_path():
    """The instruction set in use."""
    return smlt_codec_current().decode()


def use_codec_path(str path):
    """Use the named instruction set from now on; ValueError when this machine lacks it."""
    if not smlt_codec_use(path.encode()):
        raise ValueError(f"this machine has no codec path {path!r}; it has {codec_paths()}")


KEEP_SCALES = SMLT_KEEP_SCALES


cdef class Kernel:
    """One (dtype, codec, operation) of csrc/codec.h on plain buffers, as it is: for the tests and benchmarks."""

    cdef smlt_kernel kernel
    cdef readonly size_t element_bytes, wire_bytes, accumulator_bytes, block_elements, block_header_bytes

    def __cinit__(self, int dtype, int codec, int operation):
        if not smlt_kernel_select(&self.kernel, dtype, codec, operation):
            raise ValueError("no such kernel")
        self.element_bytes = self.kernel.element_bytes
        self.wire_bytes = self.kernel.wire_bytes
        self.accumulator_bytes = self.kernel.accumulator_bytes
        self.block_elements = self.kernel.block_elements
        self.block_header_bytes = self.kernel.block_header_bytes

    def wire_size(self, size_t n):
        """Bytes that `n` elements take on the wire."""
        return smlt_wire_size(&self.kernel, n)

    def wire_elements(self, size_t length, size_t left):
        """How many of the `left` remaining elements can be decoded from `length` bytes that begin at a block's start."""
        return smlt_wire_elements(&self.kernel, length, left)

    def encode(self, const unsigned char[::1] source, unsigned char[::1] wire, exponent=None):
        """Encode; returns the exponent of the scale. With KEEP_SCALES the int8 headers already lie in `wire`."""
        cdef size_t n = source.shape[0] // self.kernel.element_bytes
        cdef int chosen = SMLT_CHOOSE_EXPONENT if exponent is None else exponent
        if <size_t>wire.shape[0] < smlt_wire_size(&self.kernel, n):
            raise ValueError("wire is too short")
        return self.kernel.encode(&wire[0], &source[0], n, chosen) if n else 0

    def encode_feedback(self, const unsigned char[::1] source, const unsigned char[::1] residual,
                        unsigned char[::1] next_residual, unsigned char[::1] wire, exponent=None):
        """Encode source + residual (None: zeros), keep what was lost in `next_residual`; returns the exponent."""
        cdef size_t n = source.shape[0] // self.kernel.element_bytes, length = source.shape[0]
        cdef int chosen = SMLT_CHOOSE_EXPONENT if exponent is None else exponent
        if <size_t>wire.shape[0] < smlt_wire_size(&self.kernel, n):
            raise ValueError("wire is too short")
        if <size_t>next_residual.shape[0] < length or (residual is not None and <size_t>residual.shape[0] < length):
            raise ValueError("residual is too short")
        cdef const void *kept = NULL
        if n == 0:
            return 0
        if residual is not None:
            kept = &residual[0]
        return self.kernel.encode_feedback(&wire[0], &source[0], kept, &next_residual[0], n, chosen)

    def decode(self, const unsigned char[::1] wire, int exponent, unsigned char[::1] target, bint streaming=False):
        """Decode; with `streaming`, past the caches."""
        cdef size_t n = target.shape[0] // self.kernel.element_bytes
        if <size_t>wire.shape[0] < smlt_wire_size(&self.kernel, n):
            raise ValueError("wire is too short")
        if n and streaming:
            self.kernel.decode_streaming(&target[0], &wire[0], n, exponent)
        elif n:
            self.kernel.decode(&target[0], &wire[0], n, exponent)

    def reduce(self, unsigned char[::1] accumulator, const unsigned char[::1] wire, int exponent, int shift, bint first):
        """Reduce as many elements as `wire` holds, the last block perhaps partial."""
        cdef size_t length = wire.shape[0], header = self.kernel.block_header_bytes
        cdef size_t blocks = (length + smlt_wire_size(&self.kernel, self.kernel.block_elements) - 1) // smlt_wire_size(
            &self.kernel, self.kernel.block_elements)
        cdef size_t n = (length - blocks * header) // self.kernel.wire_bytes if length > blocks * header else 0
        if <size_t>accumulator.shape[0] < n * self.kernel.accumulator_bytes:
            raise ValueError("accumulator is too short")
        if n:
            self.kernel.reduce(&accumulator[0], &wire[0], n, exponent, shift, first)

    def finish(self, unsigned char[::1] accumulator, int world_size, int shift):
        cdef size_t n = accumulator.shape[0] // self.kernel.accumulator_bytes
        return bool(self.kernel.finish(&accumulator[0], n, world_size, shift)) if n else False
