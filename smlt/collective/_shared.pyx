# cython: language_level=3
"""A machine's processes in memory that they share (csrc/shared.h), for Python. Typed in _shared.pyi."""

from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef extern from "shared.h" nogil:
    int SMLT_SHARED_MEMBERS_MAX
    ctypedef enum smlt_shared_status:
        SMLT_SHARED_DONE, SMLT_SHARED_AGAIN, SMLT_SHARED_MISMATCH, SMLT_SHARED_FAILED, SMLT_SHARED_LEFT, SMLT_SHARED_GARBLED
        SMLT_SHARED_TAKEN, SMLT_SHARED_NO_MEMORY, SMLT_SHARED_INVALID
    ctypedef enum smlt_shared_kind:
        SMLT_SHARED_REDUCE, SMLT_SHARED_COPY
    ctypedef enum smlt_shared_state:
        SMLT_SHARED_ABSENT, SMLT_SHARED_JOINED
    ctypedef struct smlt_shared_segment:
        int dtype
        int operation
        const void *source
        void *target
        size_t count
    ctypedef struct smlt_shared_call:
        smlt_shared_kind kind
        int divisor
        int root
        uint64_t takers
        uint64_t digest
        const char *description
    ctypedef struct smlt_shared_member:
        int state
        int64_t rank
        int64_t pid
        uint64_t start
        uint64_t pid_namespace
        uint64_t digest
        char description[1024]
        char failure[1024]
    ctypedef struct smlt_shared:
        pass
    size_t smlt_shared_size(int local_size, size_t block_bytes, int blocks)
    int smlt_shared_format(void *memory, size_t size, int local_size, size_t block_bytes, int blocks, uint64_t key)
    smlt_shared *smlt_shared_open(void *memory, size_t size, int local_rank, int local_size, uint64_t key,
                                  smlt_shared_status *status)
    void smlt_shared_free(smlt_shared *shared)
    smlt_shared_status smlt_shared_claim(smlt_shared *shared, int64_t rank)
    smlt_shared_status smlt_shared_gather(smlt_shared *shared, int timeout_ms)
    smlt_shared_status smlt_shared_begin(smlt_shared *shared, const smlt_shared_call *call, const smlt_shared_segment *segments,
                                         int count)
    smlt_shared_status smlt_shared_run(smlt_shared *shared, int timeout_ms)
    uint64_t smlt_shared_missing(const smlt_shared *shared)
    int smlt_shared_culprit(const smlt_shared *shared)
    void smlt_shared_look(const smlt_shared *shared, int local_rank, smlt_shared_member *member)
    void smlt_shared_fail(smlt_shared *shared, const char *text)
    void smlt_shared_leave(smlt_shared *shared)
    uint64_t smlt_process_start(int64_t pid)
    uint64_t smlt_process_namespace()

cdef extern from "codec_paths.h" nogil:
    ctypedef struct smlt_kernel:
        size_t element_bytes
        size_t accumulator_bytes
        int (*finish)(void *accumulator, size_t n, int world_size, int shift)
    int smlt_raw_select(smlt_kernel *kernel, int dtype, int operation)

MEMBERS_MAX = SMLT_SHARED_MEMBERS_MAX
DONE = SMLT_SHARED_DONE
AGAIN = SMLT_SHARED_AGAIN
MISMATCH = SMLT_SHARED_MISMATCH
FAILED = SMLT_SHARED_FAILED
LEFT = SMLT_SHARED_LEFT
GARBLED = SMLT_SHARED_GARBLED
TAKEN = SMLT_SHARED_TAKEN
REDUCE = SMLT_SHARED_REDUCE
COPY = SMLT_SHARED_COPY
JOINED = SMLT_SHARED_JOINED


def process_start(int64_t pid):
    """When a process was started, in its system's units; 0 when there is none, or it has ended."""
    return smlt_process_start(pid)


def process_namespace():
    """Processes know each other's numbers only when this is the same."""
    return smlt_process_namespace()


def size_of(int local_size, size_t block_bytes, int blocks):
    """Bytes of a group's file. ValueError for arguments out of range."""
    cdef size_t size = smlt_shared_size(local_size, block_bytes, blocks)
    if size == 0:
        raise ValueError(f"no group of {local_size} processes with {blocks} blocks of {block_bytes} bytes")
    return size


def format_file(memory, int local_size, size_t block_bytes, int blocks, uint64_t key):
    """Write a new group into zeroed memory of `size_of` bytes. ValueError for arguments that do not fit it."""
    cdef Py_buffer view
    PyObject_GetBuffer(memory, &view, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
    cdef int done = smlt_shared_format(view.buf, <size_t>view.len, local_size, block_bytes, blocks, key)
    PyBuffer_Release(&view)
    if not done:
        raise ValueError("the memory does not fit the group")


def finish_mean(accumulator, target, int dtype, int divisor):
    """Exact sums of integers to means, rounded to nearest, ties to even.

    `accumulator` holds an int64 for each element, or for 64-bit dtypes an integer of 128 bits; it is overwritten. BufferError
    or ValueError for memory that does not fit.
    """
    cdef smlt_kernel kernel
    cdef Py_buffer sums, means
    cdef size_t count
    if not smlt_raw_select(&kernel, dtype, 0):
        raise ValueError(f"there is no mean of dtype {dtype}")
    PyObject_GetBuffer(accumulator, &sums, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(target, &means, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
        count = <size_t>means.len // kernel.element_bytes
        try:
            if <size_t>sums.len != count * kernel.accumulator_bytes or divisor < 1:
                raise ValueError("the accumulator does not fit the target")
            kernel.finish(sums.buf, count, divisor, 0)
            memcpy(means.buf, sums.buf, <size_t>means.len)
        finally:
            PyBuffer_Release(&means)
    finally:
        PyBuffer_Release(&sums)


cdef class Member:
    """What a local rank has said of itself: its state, its number in the job, its process, its call, why it gave up."""

    cdef readonly object state, rank, pid, start, pid_namespace, digest, description, failure


cdef class Group:
    """This process's place in a group; `memory` is a writable map of its file. For use by one thread at a time.

    ValueError for a file that is not of this group; `claim` takes the place.
    """

    cdef smlt_shared *shared
    cdef Py_buffer memory
    cdef Py_buffer *held
    cdef int held_count
    cdef bint mapped

    def __cinit__(self, memory, int local_rank, int local_size, uint64_t key):
        cdef smlt_shared_status status
        PyObject_GetBuffer(memory, &self.memory, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
        self.mapped = True
        self.shared = smlt_shared_open(self.memory.buf, <size_t>self.memory.len, local_rank, local_size, key, &status)
        if self.shared == NULL and status == SMLT_SHARED_NO_MEMORY:
            raise MemoryError
        if self.shared == NULL:
            raise ValueError("the file is not what this group has made")

    def __dealloc__(self):
        self._release()
        smlt_shared_free(self.shared)
        if self.mapped:
            PyBuffer_Release(&self.memory)

    cdef void _release(self):
        for i in range(self.held_count):
            PyBuffer_Release(&self.held[i])
        free(self.held)
        self.held = NULL
        self.held_count = 0

    def claim(self, int64_t rank):
        """Take this local rank's place, as rank `rank` of the job: DONE, or TAKEN by another process."""
        return smlt_shared_claim(self.shared, rank)

    def gather(self, int timeout_ms):
        """Wait for the others to take theirs: DONE, AGAIN when the time is over, or a failure."""
        cdef smlt_shared_status status
        with nogil:
            status = smlt_shared_gather(self.shared, timeout_ms)
        return status

    def begin(self, *, int kind, int divisor=1, int root=0, uint64_t takers, uint64_t digest,
              bytes description, segments):
        """Begin a call. `segments`: (dtype, operation, source or None, target or None, count) each; the buffers are held until it has ended.

        ValueError for what does not fit.
        """
        cdef int count = len(segments)
        cdef smlt_shared_call call
        cdef smlt_shared_status status
        cdef smlt_shared_segment *native = <smlt_shared_segment *>calloc(count + 1, sizeof(smlt_shared_segment))
        self._release()
        self.held = <Py_buffer *>calloc(2 * count + 1, sizeof(Py_buffer))
        memset(&call, 0, sizeof(call))
        try:
            if native == NULL or self.held == NULL:
                raise MemoryError
            for i, (dtype, operation, source, target, elements) in enumerate(segments):
                native[i].dtype = dtype
                native[i].operation = operation
                native[i].count = elements
                if source is not None:
                    native[i].source = self._hold(source, PyBUF_ANY_CONTIGUOUS, dtype, elements)
                if target is not None:
                    native[i].target = self._hold(target, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE, dtype, elements)
            call.kind = <smlt_shared_kind>kind
            call.divisor = divisor
            call.root = root
            call.takers = takers
            call.digest = digest
            call.description = description
            status = smlt_shared_begin(self.shared, &call, native, count)
            if status == SMLT_SHARED_NO_MEMORY:
                raise MemoryError
            if status != SMLT_SHARED_DONE:
                raise ValueError("the call does not fit its buffers")
        except BaseException:
            self._release()
            raise
        finally:
            free(native)

    cdef void *_hold(self, owner, int flags, int dtype, size_t elements) except? NULL:
        cdef smlt_kernel kernel
        if not smlt_raw_select(&kernel, dtype, 1):
            raise ValueError(f"there is no dtype {dtype}")
        cdef Py_buffer *view = &self.held[self.held_count]
        PyObject_GetBuffer(owner, view, flags)
        self.held_count += 1
        if <size_t>view.len // kernel.element_bytes < elements:
            raise ValueError("a buffer is shorter than its segment")
        return view.buf

    def run(self, int timeout_ms):
        """Work on the call for at most about `timeout_ms`: AGAIN when it is not over yet."""
        cdef smlt_shared_status status
        with nogil:
            status = smlt_shared_run(self.shared, timeout_ms)
        if status != SMLT_SHARED_AGAIN:
            self._release()
        return status

    def missing(self):
        """The local ranks that this one waits for."""
        cdef uint64_t mask = smlt_shared_missing(self.shared)
        return [r for r in range(SMLT_SHARED_MEMBERS_MAX) if mask >> r & 1]

    def culprit(self):
        """Who has failed or left, after FAILED or LEFT."""
        return smlt_shared_culprit(self.shared)

    def look(self, int local_rank):
        """What a local rank has said of itself."""
        cdef smlt_shared_member *found = <smlt_shared_member *>calloc(1, sizeof(smlt_shared_member))
        if found == NULL:
            raise MemoryError
        smlt_shared_look(self.shared, local_rank, found)
        cdef Member member = Member()
        member.state, member.rank, member.pid = found.state, found.rank, found.pid
        member.start, member.pid_namespace, member.digest = found.start, found.pid_namespace, found.digest
        member.description = (<bytes>found.description).decode(errors="replace")
        member.failure = (<bytes>found.failure).decode(errors="replace")
        free(found)
        return member

    def fail(self, bytes text):
        """Tell the others that this process gives up."""
        smlt_shared_fail(self.shared, text)

    def leave(self):
        """Tell the others that this process leaves in order."""
        smlt_shared_leave(self.shared)
