#include "transport.h"

#include <errno.h>
#include <sys/socket.h>

#define VECTORS 24
#define READS_IN_A_ROW 4 /* then the other lanes get their turn */

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE is set on the socket */
#endif

static int would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/* Send while the socket takes it. `*pending` says whether something is left. */
static smlt_exchange_result send_lane(smlt_engine *engine, int lane, int fd, int *pending, int *error) {
    smlt_exchange_result result = SMLT_IDLE;
    struct iovec vectors[VECTORS];
    *pending = 0;
    for (;;) {
        int count = smlt_engine_output(engine, lane, vectors, VECTORS);
        if (count == 0) return result;
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)count};
        smlt_trace *trace = smlt_engine_trace(engine);
        int64_t began = smlt_trace_begin(trace);
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        smlt_trace_end(trace, SMLT_TRACE_SEND, began, 0, (uint32_t)lane, sent > 0 ? (size_t)sent : 0);
        if (sent < 0) {
            *pending = 1;
            if (would_block(errno)) return result;
            *error = errno;
            return SMLT_CONNECTION_LOST;
        }
        smlt_engine_sent(engine, lane, (size_t)sent);
        result = SMLT_MOVED;
    }
}

static smlt_exchange_result receive_lane(smlt_engine *engine, int lane, int fd, int *error) {
    smlt_exchange_result result = SMLT_IDLE;
    for (int i = 0; i < READS_IN_A_ROW; i++) {
        size_t capacity;
        char *room = smlt_engine_input(engine, lane, &capacity);
        smlt_trace *trace = smlt_engine_trace(engine);
        int64_t began = smlt_trace_begin(trace);
        ssize_t received = recv(fd, room, capacity, MSG_DONTWAIT);
        smlt_trace_end(trace, SMLT_TRACE_RECEIVE, began, 0, (uint32_t)lane, received > 0 ? (size_t)received : 0);
        if (received < 0 && would_block(errno)) return result;
        if (received <= 0) {
            *error = received < 0 ? errno : 0;
            return SMLT_CONNECTION_LOST;
        }
        result = SMLT_MOVED;
        smlt_status status = smlt_engine_received(engine, lane, (size_t)received);
        if (status == SMLT_STORE_REFUSES) return SMLT_CONNECTION_LOST;
        if (status != SMLT_OK) return result;
        if ((size_t)received < capacity) return result; /* most likely empty: poll will tell */
    }
    return result;
}

smlt_exchange_result smlt_transport_exchange(smlt_engine *engine, struct pollfd *polled, int *lost_lane, int *lost_errno) {
    smlt_exchange_result moved = SMLT_IDLE;
    for (int lane = 0; lane < smlt_engine_lanes(engine); lane++) {
        int pending, fd = polled[lane].fd;
        smlt_exchange_result result = SMLT_IDLE;
        if (polled[lane].revents & (POLLIN | POLLHUP | POLLERR)) result = receive_lane(engine, lane, fd, lost_errno);
        if (result == SMLT_MOVED) moved = SMLT_MOVED;
        if (result != SMLT_CONNECTION_LOST) result = send_lane(engine, lane, fd, &pending, lost_errno);
        if (result == SMLT_CONNECTION_LOST) {
            *lost_lane = lane;
            return SMLT_CONNECTION_LOST;
        }
        if (result == SMLT_MOVED) moved = SMLT_MOVED;
        polled[lane].events = (short)(POLLIN | (pending ? POLLOUT : 0));
    }
    return moved;
}
