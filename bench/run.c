/* What bench/run.py measures, in C, with Xen's own libraries. Prints lines of a name and a number.
 *
 *     run share PEER                        grant a page to PEER, print its reference, wait for the end of the input
 *     run calls ROUNDS PEER REF             microseconds of each call, the median of batches; REF is a page of PEER
 *     run opens ROUNDS                      of those that are not about /dev/xen
 *     run vchan ROLE PEER PATH RING TASK COUNT SIZE    TASK is echo or ask, drain or pour, of COUNT messages of SIZE
 *     run plain RING COUNT SIZE             the same bulk between two processes, through a ring in shared memory
 *     run bells RING COUNT SIZE             likewise, waking each other by NOTIFY and read(2) instead of futexes
 *     run bounce COUNT                      nothing but that: NOTIFY there, NOTIFY back
 *
 * gcc -O2 run.c -o run -lxengnttab -lxenevtchn -lxenvchan */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libxenvchan.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <xenevtchn.h>
#include <xengnttab.h>

enum { BATCHES = 15, NOTIFY = 0x44504 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void *need(const void *it, const char *what)
{
    if (!it) { perror(what); exit(1); }
    return (void *)it;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#define MEASURE(name, rounds, ...) do { \
    double took[BATCHES]; \
    for (int batch = 0; batch < BATCHES; batch++) { \
        double start = now(); \
        for (int round = 0; round < (rounds); round++) { __VA_ARGS__; } \
        took[batch] = (now() - start) / (rounds); \
    } \
    qsort(took, BATCHES, sizeof *took, compare); \
    printf("%s %.3f\n", name, took[BATCHES / 2]); \
} while (0)

static int share(unsigned peer)
{
    uint32_t ref;
    xengntshr_handle *handle = need(xengntshr_open(NULL, 0), "xengntshr_open");
    need(xengntshr_share_pages(handle, peer, 1, &ref, 1), "xengntshr_share_pages");
    printf("%u\n", ref);
    fflush(stdout);
    return getchar() != EOF;
}

static int opens(int rounds)
{
    char name[] = "/tmp/gntalloc-bench-XXXXXX";
    int file = mkstemp(name), bytes;
    MEASURE("open+close of a file, O_RDONLY", rounds, close(open(name, O_RDONLY)));
    MEASURE("open+close of a file, O_RDWR", rounds, close(open(name, O_RDWR)));
    MEASURE("ioctl of a file", rounds, ioctl(file, FIONREAD, &bytes));
    unlink(name);
    return 0;
}

static int calls(int rounds, unsigned peer, uint32_t ref)
{
    xenevtchn_handle *ports = need(xenevtchn_open(NULL, 0), "xenevtchn_open");
    xengntshr_handle *grants = need(xengntshr_open(NULL, 0), "xengntshr_open");
    xengnttab_handle *maps = need(xengnttab_open(NULL, 0), "xengnttab_open");
    evtchn_port_t port = xenevtchn_bind_unbound_port(ports, peer);
    MEASURE("NOTIFY", rounds, xenevtchn_notify(ports, port));
    MEASURE("open+close", rounds, close(open("/dev/xen/gntdev", O_RDWR)));
    uint32_t own;
    MEASURE("share+unshare", rounds,
            xengntshr_unshare(grants, need(xengntshr_share_pages(grants, peer, 1, &own, 1), "share"), 1));
    MEASURE("map+unmap", rounds,
            xengnttab_unmap(maps, need(xengnttab_map_grant_ref(maps, peer, ref, PROT_READ | PROT_WRITE), "map"), 1));
    return opens(rounds);
}

static int vchan(char **argv)
{
    size_t ring = atol(argv[3]), count = atol(argv[5]), size = atol(argv[6]), done;
    const char *task = argv[4];
    struct libxenvchan *end;
    if (!strcmp(argv[0], "server")) {
        end = need(libxenvchan_server_init(NULL, atoi(argv[1]), argv[2], ring, ring), "libxenvchan_server_init");
        printf("listening\n");
        fflush(stdout);
    } else {
        end = need(libxenvchan_client_init(NULL, atoi(argv[1]), argv[2]), "libxenvchan_client_init");
    }
    end->blocking = 1;
    while (libxenvchan_is_open(end) == 2)
        libxenvchan_wait(end);
    char *buffer = calloc(1, size);
    double start = now();
    for (done = 0; done < count; done++) {
        int sends = !strcmp(task, "ask") || !strcmp(task, "pour"), answers = *task == 'e' || *task == 'a';
        if (sends && libxenvchan_send(end, buffer, size) < 0) return 1;
        if ((!sends || answers) && libxenvchan_recv(end, buffer, size) < 0) return 1;
        if (!sends && answers && libxenvchan_send(end, buffer, size) < 0) return 1;
    }
    double took = now() - start;
    if (!strcmp(task, "ask")) printf("us %.3f\n", took / count);
    if (!strcmp(task, "drain")) printf("MB/s %.1f\n", count * size / took);
    if (!strcmp(task, "drain") && libxenvchan_send(end, "!", 1) != 1) return 1; /* so that it is not closed too early */
    if (!strcmp(task, "pour") && libxenvchan_recv(end, buffer, 1) != 1) return 1;
    fflush(stdout);
    libxenvchan_close(end);
    return 0;
}

struct ring {
    _Atomic uint32_t written, read, writer_waits, reader_waits, there;
    char data[];
};

static int bell = -1; /* evtchn, if that is what wakes */

static void ring_bell(void)
{
    uint32_t port = 1;
    if (ioctl(bell, NOTIFY, &port)) perror("NOTIFY");
}

static void wait_for_bell(void)
{
    uint32_t port;
    if (read(bell, &port, sizeof port) != sizeof port) perror("read");
}

static void sleep_at(_Atomic uint32_t *word, uint32_t seen, _Atomic uint32_t *waits)
{
    *waits = 1;
    if (*word != seen) return;
    if (bell >= 0) wait_for_bell();
    else syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void move_on(_Atomic uint32_t *word, uint32_t by, _Atomic uint32_t *waits)
{
    *word += by;
    if (!atomic_exchange(waits, 0)) return;
    if (bell >= 0) ring_bell();
    else syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* A second process, and a ring between the two. */
static struct ring *split(uint32_t size, int bells, int *child)
{
    struct ring *ring = mmap(NULL, sizeof *ring + size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *child = fork();
    if (bells) bell = open("/dev/xen/evtchn", O_RDWR);
    for (ring->there++; ring->there < 2;) usleep(100);
    return ring;
}

static int bounce(int count)
{
    int child;
    split(0, 1, &child);
    double start = now();
    for (int done = 0; done < count; done++) {
        if (child) ring_bell();
        wait_for_bell();
        if (!child) ring_bell();
    }
    if (!child) _exit(0);
    printf("us %.3f\n", (now() - start) / count);
    return waitpid(child, NULL, 0) < 0;
}

static int plain(uint32_t size, size_t count, uint32_t chunk, int bells)
{
    int writer;
    struct ring *ring = split(size, bells, &writer);
    char *buffer = calloc(1, chunk);
    double start = now();
    for (size_t done = 0; done < count; done++) {
        for (uint32_t left = chunk; left;) {
            uint32_t written = ring->written, read = ring->read;
            uint32_t ready = writer ? written - read : size - (written - read);
            uint32_t at = (writer ? read : written) % size, part = ready < left ? ready : left;
            if (!ready) {
                if (writer) sleep_at(&ring->written, written, &ring->reader_waits);
                else sleep_at(&ring->read, read, &ring->writer_waits);
                continue;
            }
            if (part > size - at) part = size - at;
            if (writer) {
                memcpy(buffer + chunk - left, ring->data + at, part);
                move_on(&ring->read, part, &ring->writer_waits);
            } else {
                memcpy(ring->data + at, buffer + chunk - left, part);
                move_on(&ring->written, part, &ring->reader_waits);
            }
            left -= part;
        }
    }
    if (!writer) _exit(0);
    printf("MB/s %.1f\n", count * (double)chunk / (now() - start));
    return waitpid(writer, NULL, 0) < 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    if (!strcmp(what, "share")) return share(atoi(argv[2]));
    if (!strcmp(what, "opens")) return opens(atoi(argv[2]));
    if (!strcmp(what, "calls") && argc == 5) return calls(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    if (!strcmp(what, "vchan") && argc == 9) return vchan(argv + 2);
    if (!strcmp(what, "plain") && argc == 5) return plain(atol(argv[2]), atol(argv[3]), atol(argv[4]), 0);
    if (!strcmp(what, "bells") && argc == 5) return plain(atol(argv[2]), atol(argv[3]), atol(argv[4]), 1);
    if (!strcmp(what, "bounce")) return bounce(atoi(argv[2]));
    fprintf(stderr, "see the head of run.c\n");
    return 2;
}
