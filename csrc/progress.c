#include "progress.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "transport.h"

#define THREAD_POLL_MS 1000
#define LOOK_MS 250 /* how often a driver looks whether a connection has fallen silent */

struct smlt_progress {
    smlt_engine *engine;
    pthread_mutex_t mutex, gate;           /* whoever waits for the mutex holds the gate: the driver cannot overtake it */
    pthread_cond_t changed;                /* a collective has ended, the driver has left, the connections are new or lost */
    int fds[SMLT_LANES_MAX], lanes, plain; /* plain: this transport moves the bytes */
    int driving, polling, lost;
    int64_t looked_ms;
    int flushing; /* how many wait until everything is sent and answered */
    uint64_t ends_told;
    int wake[2];

    pthread_t thread;
    int thread_runs, stopping;
    pid_t pid; /* neither threads nor locks survive fork */
};

void smlt_progress_lock(smlt_progress *progress) {
    pthread_mutex_lock(&progress->gate);
    pthread_mutex_lock(&progress->mutex);
    pthread_mutex_unlock(&progress->gate);
}

void smlt_progress_unlock(smlt_progress *progress) { pthread_mutex_unlock(&progress->mutex); }

smlt_progress *smlt_progress_new(smlt_engine *engine) {
    smlt_progress *progress = calloc(1, sizeof *progress);
    if (!progress) return NULL;
    if (pipe(progress->wake) != 0) {
        free(progress);
        return NULL;
    }
    for (int end = 0; end < 2; end++) {
        fcntl(progress->wake[end], F_SETFL, O_NONBLOCK);
        fcntl(progress->wake[end], F_SETFD, FD_CLOEXEC);
    }
    progress->engine = engine;
    progress->lanes = smlt_engine_lanes(engine);
    progress->pid = getpid();
    progress->lost = 1; /* there are no connections yet */
    pthread_mutex_init(&progress->mutex, NULL);
    pthread_mutex_init(&progress->gate, NULL);
    pthread_cond_init(&progress->changed, NULL);
    return progress;
}

void smlt_progress_free(smlt_progress *progress) {
    if (!progress) return;
    smlt_progress_stop(progress);
    close(progress->wake[0]);
    close(progress->wake[1]);
    if (progress->pid == getpid()) {
        pthread_cond_destroy(&progress->changed);
        pthread_mutex_destroy(&progress->gate);
        pthread_mutex_destroy(&progress->mutex);
    }
    free(progress);
}

/* ---- all below with the lock held, unless it says otherwise ---- */

static void tell(smlt_progress *progress) { pthread_cond_broadcast(&progress->changed); }

static void wake_driver(smlt_progress *progress) {
    if (!progress->polling) return;
    progress->polling = 0;
    ssize_t written = write(progress->wake[1], "", 1);
    (void)written; /* a full pipe wakes as well */
}

void smlt_progress_submitted(smlt_progress *progress) {
    wake_driver(progress);
    if (progress->thread_runs || !progress->plain) tell(progress);
}

int smlt_progress_wake_fd(const smlt_progress *progress) { return progress->wake[0]; }

void smlt_progress_drain(smlt_progress *progress) {
    char bytes[64];
    while (read(progress->wake[0], bytes, sizeof bytes) > 0) continue;
    progress->polling = !progress->plain; /* another transport may poll at any time */
}

void smlt_progress_connected(smlt_progress *progress, const int *fds) {
    progress->plain = fds != NULL;
    for (int lane = 0; fds && lane < progress->lanes; lane++) progress->fds[lane] = fds[lane];
    progress->lost = 0;
    tell(progress);
}

static void wait_for_change(smlt_progress *progress, int64_t timeout_ms) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)(timeout_ms / 1000);
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_cond_timedwait(&progress->changed, &progress->mutex, &until);
}

typedef enum { UNTIL_ENDED, UNTIL_FLUSHED, UNTIL_NO_WORK } purpose;

static int has_work(const smlt_progress *progress) {
    return smlt_engine_fatal(progress->engine)->status == SMLT_OK &&
           (smlt_engine_unfinished(progress->engine) || !smlt_engine_flushed(progress->engine));
}

static int is_over(smlt_progress *progress, purpose what, uint64_t step) {
    if (smlt_engine_fatal(progress->engine)->status != SMLT_OK) return 1;
    if (what == UNTIL_NO_WORK) return progress->stopping || !has_work(progress);
    return what == UNTIL_FLUSHED ? smlt_engine_flushed(progress->engine) : smlt_engine_has_ended(progress->engine, step);
}

static int is_silent(smlt_progress *progress, int64_t now) {
    if (now - progress->looked_ms < LOOK_MS) return 0;
    progress->looked_ms = now;
    int unsent[SMLT_LANES_MAX] = {0};
#ifdef TIOCOUTQ
    for (int lane = 0; lane < progress->lanes; lane++) ioctl(progress->fds[lane], TIOCOUTQ, &unsent[lane]);
#endif
    return smlt_engine_is_silent(progress->engine, now, unsent);
}

/* The lock is open only around poll. */
static void drive(smlt_progress *progress, purpose what, uint64_t step, int64_t deadline) {
    int lanes = progress->lanes;
    struct pollfd polled[SMLT_LANES_MAX + 1];
    memset(polled, 0, (size_t)(lanes + 1) * sizeof *polled);
    for (int lane = 0; lane < progress->lanes; lane++) polled[lane].fd = progress->fds[lane];
    polled[lanes] = (struct pollfd){.fd = progress->wake[0], .events = POLLIN};
    progress->driving = 1;
    for (;;) {
        int lane = 0, error = 0;
        smlt_exchange_result result = smlt_transport_exchange(progress->engine, polled, &lane, &error);
        if (result == SMLT_CONNECTION_LOST) {
            progress->lost = 1;
            break;
        }
        if (progress->ends_told != smlt_engine_ends(progress->engine)) {
            progress->ends_told = smlt_engine_ends(progress->engine);
            tell(progress);
        }
        if (progress->flushing && smlt_engine_flushed(progress->engine)) tell(progress);
        if (is_over(progress, what, step)) break;
        int64_t now = smlt_clock_ms(), left = deadline - now;
        if (left <= 0) break;
        if (is_silent(progress, now)) {
            progress->lost = 1;
            break;
        }
        /* After movement the lanes composed before may have more to say: look without waiting. */
        int wait_ms = result == SMLT_MOVED ? 0 : (int)(left < THREAD_POLL_MS ? left : THREAD_POLL_MS);
        progress->polling = wait_ms > 0;
        smlt_trace *trace = smlt_engine_trace(progress->engine);
        int64_t began = smlt_trace_begin(trace);
        pthread_mutex_unlock(&progress->mutex);
        int ready = poll(polled, (nfds_t)lanes + 1, wait_ms);
        int failure = ready < 0 && errno != EINTR;
        smlt_progress_lock(progress);
        smlt_trace_end(trace, SMLT_TRACE_WAIT, began, 0, (uint32_t)smlt_engine_unconfirmed(progress->engine),
                       smlt_engine_requested(progress->engine));
        progress->polling = 0;
        if (failure) progress->lost = 1;
        if (progress->lost) break;
        if (ready < 0)
            for (int i = 0; i < lanes; i++) polled[i].revents = 0;
        if (polled[lanes].revents) smlt_progress_drain(progress);
    }
    progress->driving = 0;
    tell(progress);
}

static int can_drive(const smlt_progress *progress) { return progress->plain && !progress->driving && !progress->lost; }

static void *thread_main(void *argument) {
    smlt_progress *progress = argument;
    smlt_progress_lock(progress);
    while (!progress->stopping) {
        if (can_drive(progress) && has_work(progress))
            drive(progress, UNTIL_NO_WORK, 0, INT64_MAX);
        else
            pthread_cond_wait(&progress->changed, &progress->mutex);
    }
    smlt_progress_unlock(progress);
    return NULL;
}

/* ---- without the lock ---- */

int smlt_progress_start(smlt_progress *progress) {
    sigset_t all, before;
    sigfillset(&all);
    smlt_progress_lock(progress);
    if (!progress->thread_runs && !progress->stopping) {
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that were there */
        progress->thread_runs = pthread_create(&progress->thread, NULL, thread_main, progress) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    int there_is_one = progress->thread_runs || progress->stopping;
    smlt_progress_unlock(progress);
    return there_is_one;
}

void smlt_progress_stop(smlt_progress *progress) {
    if (progress->pid != getpid()) return;
    smlt_progress_lock(progress);
    int ran = progress->thread_runs;
    progress->thread_runs = 0;
    progress->stopping = 1;
    wake_driver(progress);
    tell(progress);
    smlt_progress_unlock(progress);
    if (ran) pthread_join(progress->thread, NULL);
}

void smlt_progress_disconnect(smlt_progress *progress) {
    smlt_progress_lock(progress);
    progress->lost = 1;
    wake_driver(progress);
    tell(progress);
    while (progress->driving) wait_for_change(progress, THREAD_POLL_MS);
    smlt_progress_unlock(progress);
}

int smlt_progress_is_lost(smlt_progress *progress) {
    smlt_progress_lock(progress);
    int lost = progress->lost;
    smlt_progress_unlock(progress);
    return lost;
}

smlt_run_result smlt_progress_run(smlt_progress *progress, uint64_t step, int timeout_ms, int flush) {
    purpose what = flush ? UNTIL_FLUSHED : UNTIL_ENDED;
    int64_t deadline = smlt_clock_ms() + timeout_ms;
    smlt_run_result result;
    smlt_progress_lock(progress);
    progress->flushing += flush;
    for (;;) {
        int64_t left = deadline - smlt_clock_ms();
        result = is_over(progress, what, step) ? SMLT_RUN_ENDED : progress->lost ? SMLT_RUN_LOST : SMLT_RUN_AGAIN;
        if (result != SMLT_RUN_AGAIN || left <= 0) break;
        if (can_drive(progress))
            drive(progress, what, step, deadline);
        else
            wait_for_change(progress, left);
    }
    progress->flushing -= flush;
    smlt_progress_unlock(progress);
    return result;
}

int smlt_progress_take(smlt_progress *progress) {
    smlt_progress_lock(progress);
    int free_to_drive = !progress->driving && !progress->lost;
    if (free_to_drive) progress->driving = progress->polling = 1;
    smlt_progress_unlock(progress);
    return free_to_drive;
}

void smlt_progress_release(smlt_progress *progress, int connection_lost) {
    smlt_progress_lock(progress);
    progress->driving = progress->polling = 0;
    if (connection_lost) progress->lost = 1;
    tell(progress);
    smlt_progress_unlock(progress);
}

int smlt_progress_wait_for_work(smlt_progress *progress, int timeout_ms) {
    smlt_progress_lock(progress);
    if (progress->driving || progress->lost || !has_work(progress)) wait_for_change(progress, timeout_ms);
    int work = !progress->driving && !progress->lost && has_work(progress);
    smlt_progress_unlock(progress);
    return work;
}
