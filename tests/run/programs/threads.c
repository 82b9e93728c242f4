/* Threads that each open gntalloc, share a page of it with domain 2, map it, write to it, and close both again.
 *
 *     threads COUNT ROUNDS
 *
 * Prints how many rounds went wrong. */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALLOC_GREF 0x184705

static int rounds;
static atomic_int wrong;

static int round_of_one(void)
{
    struct { uint16_t domid, flags; uint32_t count; uint64_t index; uint32_t ref, pad; } asked = { 2, 1, 1, 0, 0, 0 };
    int file = open("/dev/xen/gntalloc", O_RDWR | O_CLOEXEC);
    if (file < 0 || ioctl(file, ALLOC_GREF, &asked)) return 1;
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, asked.index);
    if (page == MAP_FAILED) return 1;
    page[0] = 'x';
    return munmap(page, 4096) || close(file);
}

static void *work(void *unused)
{
    for (int round = 0; round < rounds; round++)
        wrong += round_of_one();
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t threads[64];
    int count = argc > 2 ? atoi(argv[1]) : 0;
    rounds = argc > 2 ? atoi(argv[2]) : 0;
    for (int which = 0; which < count; which++)
        pthread_create(&threads[which], NULL, work, NULL);
    for (int which = 0; which < count; which++)
        pthread_join(threads[which], NULL);
    printf("%d wrong\n", wrong);
    return 0;
}
