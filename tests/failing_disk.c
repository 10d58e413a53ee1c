/* A disk that fails once: preloaded, it lets one call that changes a file below a folder fail.

   fail_nth(folder, n, half): of such calls from now on, the n-th reports a full disk. With `half`,
   a write that is the n-th is done by half, and the next call fails; then there is space again.
   has_failed(): whether that has happened. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static long left; /* calls until the fault; 0: none is to come */
static int by_half, failed;

void fail_nth(const char *folder, long n, int half) {
    snprintf(below, sizeof below, "%s", folder);
    by_half = half;
    failed = 0;
    left = n;
}

int has_failed(void) { return failed; }

static int is_below(const char *path) {
    return left > 0 && path && strncmp(path, below, strlen(below)) == 0;
}

static int is_file_below(int descriptor) {
    char link[64], path[4096];
    if (left <= 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return is_below(path);
}

/* 1: this call fails. 2: it is a write that is done by half. */
static int turn(int is_write) {
    if (__sync_sub_and_fetch(&left, 1) != 0) return 0;
    if (by_half && is_write) {
        by_half = 0;
        left = 1;
        return 2;
    }
    failed = 1;
    errno = ENOSPC;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *data, size_t size) {
    if (is_file_below(descriptor)) {
        int fault = turn(size > 1);
        if (fault == 1) return -1;
        if (fault == 2) size /= 2;
    }
    return REAL(write)(descriptor, data, size);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
    if (is_file_below(descriptor) && turn(0)) return -1;
    return REAL(pwrite)(descriptor, data, size, at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    if (is_file_below(descriptor) && turn(0)) return -1;
    return REAL(writev)(descriptor, parts, count);
}

int fsync(int descriptor) {
    if (is_file_below(descriptor) && turn(0)) return -1;
    return REAL(fsync)(descriptor);
}

int rename(const char *from, const char *to) {
    if (is_below(to) && turn(0)) return -1;
    return REAL(rename)(from, to);
}

int link(const char *from, const char *to) {
    if (is_below(to) && turn(0)) return -1;
    return REAL(link)(from, to);
}

int linkat(int at, const char *from, int to_at, const char *to, int flags) {
    if (is_below(to) && turn(0)) return -1;
    return REAL(linkat)(at, from, to_at, to, flags);
}

int mkdir(const char *path, mode_t mode) {
    if (is_below(path) && turn(0)) return -1;
    return ((int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir"))(path, mode);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    if ((flags & (O_CREAT | O_TRUNC)) && is_below(path) && turn(0)) return -1;
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name))(path, flags, mode);
}

#define MODE                                                                                       \
    mode_t mode = 0;                                                                               \
    if (flags & O_CREAT) {                                                                         \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...) {
    MODE return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE return opened("open64", path, flags, mode);
}
