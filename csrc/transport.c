#include "transport.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#define VECTORS 24
#define READS_IN_A_ROW 4 /* then the other lanes get their turn */

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE is set on the socket */
#endif

enum { IDLE, MOVED, LOST };

static int would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/* Send while the socket takes it. `*pending` says whether something is left. */
static int send_lane(smlt_engine *engine, int lane, int fd, int *pending, int *error) {
    int result = IDLE;
    struct iovec vectors[VECTORS];
    *pending = 0;
    for (;;) {
        int count = smlt_engine_output(engine, lane, vectors, VECTORS);
        if (count == 0) return result;
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)count};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            *pending = 1;
            if (would_block(errno)) return result;
            *error = errno;
            return LOST;
        }
        smlt_engine_sent(engine, lane, (size_t)sent);
        result = MOVED;
    }
}

static int receive_lane(smlt_engine *engine, int lane, int fd, int *error) {
    int result = IDLE;
    for (int i = 0; i < READS_IN_A_ROW; i++) {
        size_t capacity;
        char *room = smlt_engine_input(engine, lane, &capacity);
        ssize_t received = recv(fd, room, capacity, MSG_DONTWAIT);
        if (received < 0 && would_block(errno)) return result;
        if (received <= 0) {
            *error = received < 0 ? errno : 0;
            return LOST;
        }
        result = MOVED;
        if (smlt_engine_received(engine, lane, (size_t)received) != SMLT_OK) return result;
        if ((size_t)received < capacity) return result; /* most likely empty: poll will tell */
    }
    return result;
}

static int is_over(smlt_engine *engine, int flush) {
    if (smlt_engine_fatal(engine)->status != SMLT_OK) return 1;
    return flush ? smlt_engine_flushed(engine) : smlt_engine_any_ended(engine);
}

smlt_transport_result smlt_transport_run(smlt_engine *engine, const int fds[SMLT_LANES], int timeout_ms, int flush,
                                         int *lost_lane, int *lost_errno) {
    int64_t deadline = smlt_clock_ms() + timeout_ms;
    struct pollfd polled[SMLT_LANES];
    for (int lane = 0; lane < SMLT_LANES; lane++) polled[lane] = (struct pollfd){.fd = fds[lane]};
    for (;;) {
        int moved = 0;
        for (int lane = 0; lane < SMLT_LANES; lane++) {
            int pending, result = IDLE;
            if (polled[lane].revents & (POLLIN | POLLHUP | POLLERR)) result = receive_lane(engine, lane, fds[lane], lost_errno);
            if (result != LOST) {
                moved |= result;
                result = send_lane(engine, lane, fds[lane], &pending, lost_errno);
            }
            if (result == LOST) {
                *lost_lane = lane;
                return SMLT_TRANSPORT_LOST;
            }
            moved |= result;
            polled[lane].events = (short)(POLLIN | (pending ? POLLOUT : 0));
        }
        if (is_over(engine, flush)) return SMLT_TRANSPORT_ENDED;
        int64_t left = deadline - smlt_clock_ms();
        if (left <= 0) return SMLT_TRANSPORT_AGAIN;
        /* After movement the lanes composed before may have more to say: look without waiting. */
        if (poll(polled, SMLT_LANES, moved ? 0 : (int)left) < 0 && errno != EINTR) {
            *lost_lane = 0;
            *lost_errno = errno;
            return SMLT_TRANSPORT_LOST;
        }
    }
}
