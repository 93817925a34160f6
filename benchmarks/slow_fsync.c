/* A disk that takes its time: waits before each fsync, for a machine whose own costs next to nothing. Linux:

     gcc -shared -fPIC -O2 -DNS=30000 -o slow_fsync.so slow_fsync.c -ldl
     LD_PRELOAD=./slow_fsync.so python durable_queue.py aenqueue

   The wait is of NS nanoseconds and what the system adds, some 60,000. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

#define SLOW(name) int name(int fd) { \
    int (*real)(int) = (int (*)(int)) dlsym(RTLD_NEXT, #name); \
    struct timespec t = {0, NS}; nanosleep(&t, 0); \
    return real(fd); }

SLOW(fsync)
SLOW(fdatasync)
