/*
 * Reads a disk as fast as the kernel's own driver can: O_DIRECT, so many requests in flight by the kernel's native
 * asynchronous I/O. For bench/disk_lab.py; without libaio, which is a few system calls.
 *
 *     disk_lab PATH BLOCK DEPTH COUNT sequential|random
 *
 * Prints the seconds that COUNT reads of BLOCK bytes took, the processor seconds of this process, and a sum over the
 * first word of each block, as bench/disk_lab_guest.py does: both read the same places in the same order.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* The places of random reads: a Lehmer generator, so that Python can say the same without a library. */
static uint64_t place(uint64_t number, uint64_t blocks, int random)
{
    static uint64_t state = 1;
    if (!random)
        return number % blocks;
    state = state * 48271 % 2147483647;
    return state % blocks;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        errx(2, "usage: disk_lab PATH BLOCK DEPTH COUNT sequential|random");
    size_t block = strtoul(argv[2], NULL, 10);
    unsigned depth = strtoul(argv[3], NULL, 10), count = strtoul(argv[4], NULL, 10);
    int random = !strcmp(argv[5], "random");
    uint64_t size, sum = 0;
    int file = open(argv[1], O_RDONLY | O_DIRECT);
    if (file < 0 || ioctl(file, BLKGETSIZE64, &size) < 0)
        err(1, "%s", argv[1]);

    aio_context_t context = 0;
    struct iocb requests[depth], *each[depth];
    struct io_event done[depth];
    char *memory;
    if (syscall(SYS_io_setup, depth, &context) < 0 || posix_memalign((void **)&memory, 4096, block * depth))
        err(1, "io_setup");
    memset(memory, 0, block * depth);
    memset(requests, 0, sizeof requests);

    double begin = now(CLOCK_MONOTONIC), busy = now(CLOCK_PROCESS_CPUTIME_ID);
    unsigned asked = 0, answered = 0, free_[depth], many = depth;
    for (unsigned i = 0; i < depth; i++)
        free_[i] = i;
    while (answered < count) {
        unsigned new = 0;
        while (many && asked < count) {
            unsigned slot = free_[--many];
            struct iocb *request = &requests[slot];
            request->aio_fildes = file;
            request->aio_lio_opcode = IOCB_CMD_PREAD;
            request->aio_buf = (uintptr_t)(memory + slot * block);
            request->aio_nbytes = block;
            request->aio_offset = place(asked++, size / block, random) * block;
            request->aio_data = slot;
            each[new++] = request;
        }
        for (unsigned sent = 0; sent < new;) {
            long taken = syscall(SYS_io_submit, context, new - sent, each + sent);
            if (taken <= 0)
                err(1, "io_submit");
            sent += taken;
        }
        long got = syscall(SYS_io_getevents, context, 1, depth, done, NULL);
        if (got < 0)
            err(1, "io_getevents");
        for (long i = 0; i < got; i++) {
            unsigned slot = done[i].data;
            if (done[i].res != (long long)block)
                errx(1, "a read of %zu bytes gave %lld", block, (long long)done[i].res);
            sum += *(uint32_t *)(memory + slot * block);
            free_[many++] = slot;
        }
        answered += got;
    }
    printf("%.6f %.6f %llu\n", now(CLOCK_MONOTONIC) - begin, now(CLOCK_PROCESS_CPUTIME_ID) - busy,
           (unsigned long long)sum);
}
