/* A file system that fails: loaded before libc (LD_PRELOAD), it counts the calls about files below one folder, whoever
 * makes them (Python, Arrow, safetensors), and at the n-th does what it was told. See disk.py.
 *
 * Kinds of calls: 1 changes the disk, 2 reads it, 4 makes it durable. Only kinds in the mask are counted.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { ONCE, FROM_THEN_ON, SHORT, KILL, SLOW, CLOCK };
enum { CHANGES = 1, READS = 2, SYNCS = 4 };
#define FILES 65536

static char below[PATH_MAX];
static size_t below_length;
static atomic_long left = -1, counted;
static int number, mode, mask;
static atomic_int dead, jump;
static atomic_char mine[FILES];

void disk_arm(const char *folder, long at, int error, int what, int kinds) {
  strncpy(below, folder, sizeof below - 1);
  below_length = strlen(below);
  number = error, mode = what, mask = kinds;
  dead = 0;
  counted = 0;
  left = at;
}
long disk_disarm(void) {
  below_length = 0;
  dead = 0;
  jump = 0;
  return counted;
}

static int ours(int folder, const char *path) {
  if (!below_length || !path) return 0;
  if (path[0] != '/') return folder >= 0 && folder < FILES && mine[folder];
  return !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}
static int known(int fd) { return below_length && fd >= 0 && fd < FILES && mine[fd]; }

/* True if this call has to fail; errno is set. */
static int fails(int kind) {
  if (!(kind & mask)) return 0;
  counted++;
  if (mode == SLOW) {
    struct timespec pause = {0, 2000000};
    nanosleep(&pause, NULL);
    return 0;
  }
  if (dead) { errno = number; return 1; }
  if (atomic_fetch_sub(&left, 1) != 0) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (mode == CLOCK) {
    jump = number;
    return 0;
  }
  if (mode == SHORT) return 0;
  if (mode == FROM_THEN_ON) dead = 1;
  errno = number;
  return 1;
}

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int fd, int is_ours) {
  if (fd >= 0 && fd < FILES) mine[fd] = (char)is_ours;
  return fd;
}
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, #name, const char *, int, ...); \
    mode_t how = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); how = va_arg(rest, mode_t); va_end(rest); } \
    int is_ours = ours(AT_FDCWD, path); \
    if (is_ours && fails(flags & (O_CREAT | O_WRONLY | O_RDWR) ? CHANGES : READS)) return -1; \
    return opened(real(path, flags, how), is_ours); \
  }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(int, #name, int, const char *, int, ...); \
    mode_t how = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); how = va_arg(rest, mode_t); va_end(rest); } \
    int is_ours = ours(folder, path); \
    if (is_ours && fails(flags & (O_CREAT | O_WRONLY | O_RDWR) ? CHANGES : READS)) return -1; \
    return opened(real(folder, path, flags, how), is_ours); \
  }
OPENAT(openat)
OPENAT(openat64)
int close(int fd) {
  REAL(int, "close", int);
  if (fd >= 0 && fd < FILES) mine[fd] = 0;
  return real(fd);
}

/* A short write does not fail: a part is written, and the caller has to ask again for the rest. From the n-th on. */
static size_t part(int fd, size_t count) { return mode == SHORT && known(fd) && left < 0 && count > 1 ? count / 2 : count; }
#define GUARD(fd, kind) if (known(fd) && fails(kind)) return -1
ssize_t write(int fd, const void *data, size_t count) {
  REAL(ssize_t, "write", int, const void *, size_t);
  GUARD(fd, CHANGES);
  return real(fd, data, part(fd, count));
}
#define PWRITE(name) \
  ssize_t name(int fd, const void *data, size_t count, off_t at) { \
    REAL(ssize_t, #name, int, const void *, size_t, off_t); \
    GUARD(fd, CHANGES); \
    return real(fd, data, part(fd, count), at); \
  }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  GUARD(fd, CHANGES);
  return real(fd, parts, mode == SHORT && known(fd) && left < 0 && count > 1 ? 1 : count);
}
ssize_t read(int fd, void *data, size_t count) {
  REAL(ssize_t, "read", int, void *, size_t);
  GUARD(fd, READS);
  return real(fd, data, count);
}
#define PREAD(name) \
  ssize_t name(int fd, void *data, size_t count, off_t at) { \
    REAL(ssize_t, #name, int, void *, size_t, off_t); \
    GUARD(fd, READS); \
    return real(fd, data, count, at); \
  }
PREAD(pread)
PREAD(pread64)
#define SYNC(name) \
  int name(int fd) { \
    REAL(int, #name, int); \
    GUARD(fd, SYNCS); \
    return real(fd); \
  }
SYNC(fsync)
SYNC(fdatasync)
#define TRUNCATE(name) \
  int name(int fd, off_t size) { \
    REAL(int, #name, int, off_t); \
    GUARD(fd, CHANGES); \
    return real(fd, size); \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int link(const char *from, const char *to) {
  REAL(int, "link", const char *, const char *);
  if (ours(AT_FDCWD, to) && fails(CHANGES)) return -1;
  return real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
  REAL(int, "linkat", int, const char *, int, const char *, int);
  if (ours(b, to) && fails(CHANGES)) return -1;
  return real(a, from, b, to, flags);
}
int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  if (ours(AT_FDCWD, to) && fails(CHANGES)) return -1;
  return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  REAL(int, "renameat", int, const char *, int, const char *);
  if (ours(b, to) && fails(CHANGES)) return -1;
  return real(a, from, b, to);
}
int mkdir(const char *path, mode_t how) {
  REAL(int, "mkdir", const char *, mode_t);
  if (ours(AT_FDCWD, path) && fails(CHANGES)) return -1;
  return real(path, how);
}
int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  if (ours(AT_FDCWD, path) && (number != ENOSPC || !dead) && fails(CHANGES)) return -1;
  return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  if (ours(folder, path) && (number != ENOSPC || !dead) && fails(CHANGES)) return -1;
  return real(folder, path, flags);
}
int rmdir(const char *path) {
  REAL(int, "rmdir", const char *);
  if (ours(AT_FDCWD, path) && (number != ENOSPC || !dead) && fails(CHANGES)) return -1;
  return real(path);
}

DIR *opendir(const char *path) {
  REAL(DIR *, "opendir", const char *);
  if (ours(AT_FDCWD, path) && fails(READS)) return NULL;
  return real(path);
}

/* A clock that someone set: what asks for the time of day is told another one. */
int clock_gettime(clockid_t which, struct timespec *now) {
  REAL(int, "clock_gettime", clockid_t, struct timespec *);
  int code = real(which, now);
  if (!code && which == CLOCK_REALTIME) now->tv_sec += jump;
  return code;
}
