// File systems with gaps: chosen system calls fail below chosen paths. See gaps.py, which compiles this.
//
// GAPS holds a rule per line, "call:errno:path". A path of a call is made absolute, but links in it are not resolved; a
// file descriptor stands for the path that /proc tells of it. Calls of one C library function by another one (as of
// open by opendir) are not seen.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define LONG (2 * PATH_MAX)

static const char *absolute(int folder, const char *path, char text[LONG])
{
    char base[PATH_MAX] = "", link[64];
    if (path[0] == '/')
        return path;
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    if (readlink(link, base, sizeof base - 1) < 0)
        return "";
    snprintf(text, LONG, path[0] ? "%s/%s" : "%s", base, path);
    return text;
}

// the error that this call is to end with, 0 if it is not to fail
static int gap(const char *call, int folder, const char *path)
{
    char text[LONG];
    const char *rule = getenv("GAPS"), *where = "";
    if (rule && path)
        where = absolute(folder, path, text);
    while (rule && *rule) {
        const char *end = strchrnul(rule, '\n'), *error = strchrnul(rule, ':') + 1;
        if (error < end && strlen(call) == (size_t)(error - 1 - rule) && !strncmp(rule, call, error - 1 - rule)) {
            const char *prefix = strchrnul(error, ':') + 1;
            size_t length = prefix < end ? end - prefix : 0;
            if (length && !strncmp(where, prefix, length) && (where[length] == 0 || where[length] == '/'))
                return atoi(error);
        }
        rule = *end ? end + 1 : end;
    }
    return 0;
}

static int fails(int error)
{
    if (error)
        errno = error;
    return error;
}

#define AT(call, folder, path) fails(gap(call, folder, path))
#define FD(call, file) fails(gap(call, file, ""))

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

static int open_fails(int folder, const char *path, int flags)
{
    return AT("open", folder, path) || (writes(flags) && AT("open-write", folder, path)) ||
           ((flags & O_EXCL) && AT("open-new", folder, path));
}

#define MODE(flags, mode)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        MODE(flags, mode)                                                                                              \
        return open_fails(AT_FDCWD, path, flags) ? -1 : NEXT(name)(path, flags, mode);                                 \
    }
#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...)                                                             \
    {                                                                                                                  \
        MODE(flags, mode)                                                                                              \
        return open_fails(folder, path, flags) ? -1 : NEXT(name)(folder, path, flags, mode);                           \
    }
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode)                                                                     \
    {                                                                                                                  \
        int flags = strpbrk(mode, "wa+") ? O_RDWR : O_RDONLY;                                                          \
        return open_fails(AT_FDCWD, path, flags) ? NULL : NEXT(name)(path, mode);                                      \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

int shm_open(const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "/dev/shm/%s", name + (name[0] == '/'));
    return open_fails(AT_FDCWD, path, flags) ? -1 : NEXT(shm_open)(name, flags, mode);
}

// made by open and link within libc, which are not seen
sem_t *sem_open(const char *name, int flags, ...)
{
    char path[PATH_MAX];
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    unsigned value = va_arg(more, unsigned);
    va_end(more);
    snprintf(path, sizeof path, "/dev/shm/%s", name + (name[0] == '/'));
    return open_fails(AT_FDCWD, path, flags | O_RDWR) ? SEM_FAILED : NEXT(sem_open)(name, flags, mode, value);
}

static int sync_fails(int file)
{
    struct stat about;
    return FD(fstat(file, &about) == 0 && S_ISDIR(about.st_mode) ? "fsync-dir" : "fsync", file);
}
int fsync(int file) { return sync_fails(file) ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return sync_fails(file) ? -1 : NEXT(fdatasync)(file); }

int flock(int file, int operation) { return FD("flock", file) ? -1 : NEXT(flock)(file, operation); }

static int is_lock(int command)
{
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}
#define FCNTL(name)                                                                                                    \
    int name(int file, int command, ...)                                                                               \
    {                                                                                                                  \
        va_list more;                                                                                                  \
        va_start(more, command);                                                                                       \
        void *argument = va_arg(more, void *);                                                                         \
        va_end(more);                                                                                                  \
        return is_lock(command) && FD("fcntl", file) ? -1 : NEXT(name)(file, command, argument);                       \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

ssize_t write(int file, const void *data, size_t size) { return FD("write", file) ? -1 : NEXT(write)(file, data, size); }

#define FTRUNCATE(name, offset)                                                                                        \
    int name(int file, offset size) { return FD("ftruncate", file) ? -1 : NEXT(name)(file, size); }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)
#define FALLOCATE(name, offset)                                                                                        \
    int name(int file, offset from, offset size)                                                                       \
    {                                                                                                                  \
        int error = gap("fallocate", file, "");                                                                        \
        return error ? error : NEXT(name)(file, from, size);                                                           \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

#define MMAP(name, offset)                                                                                             \
    void *name(void *start, size_t size, int protection, int flags, int file, offset from)                             \
    {                                                                                                                  \
        int failed = file >= 0 && FD("mmap", file);                                                                    \
        return failed ? MAP_FAILED : NEXT(name)(start, size, protection, flags, file, from);                           \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int mkdir(const char *path, mode_t mode) { return AT("mkdir", AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode)
{
    return AT("mkdir", folder, path) ? -1 : NEXT(mkdirat)(folder, path, mode);
}
int unlink(const char *path) { return AT("unlink", AT_FDCWD, path) ? -1 : NEXT(unlink)(path); }
int unlinkat(int folder, const char *path, int flags)
{
    return AT(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) ? -1 : NEXT(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return AT("rmdir", AT_FDCWD, path) ? -1 : NEXT(rmdir)(path); }

// one of the two paths is enough
int rename(const char *from, const char *to)
{
    return AT("rename", AT_FDCWD, from) || AT("rename", AT_FDCWD, to) ? -1 : NEXT(rename)(from, to);
}
int renameat(int folder, const char *from, int other, const char *to)
{
    return AT("rename", folder, from) || AT("rename", other, to) ? -1 : NEXT(renameat)(folder, from, other, to);
}
int link(const char *from, const char *to)
{
    return AT("link", AT_FDCWD, from) || AT("link", AT_FDCWD, to) ? -1 : NEXT(link)(from, to);
}
int linkat(int folder, const char *from, int other, const char *to, int flags)
{
    return AT("link", folder, from) || AT("link", other, to) ? -1 : NEXT(linkat)(folder, from, other, to, flags);
}
int symlink(const char *target, const char *path)
{
    return AT("symlink", AT_FDCWD, path) ? -1 : NEXT(symlink)(target, path);
}
int symlinkat(const char *target, int folder, const char *path)
{
    return AT("symlink", folder, path) ? -1 : NEXT(symlinkat)(target, folder, path);
}
