/* Of other processes: whether they live. Of waiting: the system's part. */
#include "shared.h"
#include "shared_wait.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <sys/proc.h>
#include <sys/sysctl.h>
#endif

int64_t smlt_monotonic_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

void smlt_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#if defined(__linux__)

/* Not FUTEX_PRIVATE: the word is found by its place in the file, by all processes that have mapped it. */
void smlt_wait_on(_Atomic uint32_t *word, uint32_t seen, int timeout_ms) {
    struct timespec limit = {timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, NULL, 0);
}

void smlt_wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

#else

/* Naps that grow: an answer within a millisecond, at next to no load. */
void smlt_wait_on(_Atomic uint32_t *word, uint32_t seen, int timeout_ms) {
    int64_t until = smlt_monotonic_us() + (int64_t)timeout_ms * 1000;
    long nap_ns = 20000;
    while (atomic_load(word) == seen && smlt_monotonic_us() < until) {
        struct timespec nap = {0, nap_ns};
        nanosleep(&nap, NULL);
        if (nap_ns < 1000000) nap_ns *= 2;
    }
}

void smlt_wake_all(_Atomic uint32_t *word) { (void)word; }

#endif

static int is_gone(int64_t pid) { return kill((pid_t)pid, 0) != 0 && errno == ESRCH; }

#if defined(__linux__)

/* proc(5): field 3 is the state, field 22 the start in ticks since boot; field 2, in parentheses, may hold anything. */
uint64_t smlt_process_start(int64_t pid) {
    char path[64], text[1024];
    if (pid <= 0 || pid > INT_MAX || is_gone(pid)) return 0;
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    FILE *file = fopen(path, "r");
    if (!file) return is_gone(pid) ? 0 : 1;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    char *at = strrchr(text, ')');
    if (!at || at[1] != ' ') return is_gone(pid) ? 0 : 1;
    at += 2;
    if (*at == 'Z' || *at == 'X') return 0;
    for (int field = 3; field < 22; field++) {
        at = strchr(at, ' ');
        if (!at) return 1;
        at++;
    }
    uint64_t start = strtoull(at, NULL, 10);
    return start ? start : 1;
}

uint64_t smlt_process_namespace(void) {
    struct stat found;
    return stat("/proc/self/ns/pid", &found) == 0 ? (uint64_t)found.st_ino : 0;
}

#elif defined(__APPLE__)

uint64_t smlt_process_start(int64_t pid) {
    struct kinfo_proc info;
    size_t length = sizeof info;
    if (pid <= 0 || pid > INT_MAX) return 0;
    int name[] = {CTL_KERN, KERN_PROC, KERN_PROC_PID, (int)pid};
    if (sysctl(name, 4, &info, &length, NULL, 0) != 0) return is_gone(pid) ? 0 : 1;
    if (length < sizeof info || info.kp_proc.p_stat == SZOMB) return 0;
    return (uint64_t)info.kp_proc.p_starttime.tv_sec * 1000000 + (uint64_t)info.kp_proc.p_starttime.tv_usec;
}

uint64_t smlt_process_namespace(void) { return 0; }

#else

uint64_t smlt_process_start(int64_t pid) { return pid > 0 && pid <= INT_MAX && !is_gone(pid); }
uint64_t smlt_process_namespace(void) { return 0; }

#endif
