/* One end of a vchan of libxenvchan.
 *
 *     vchan ROLE PEER PATH RING TASK [COUNT [SIZE]]
 *
 * ROLE is server or client, RING the least size of each ring. TASK is what is done when both are there:
 *
 *     echo     send back what comes, until the peer closes
 *     ask      send COUNT messages of SIZE bytes and check that each comes back; print microseconds a round trip
 *     pour     send COUNT bytes in pieces of SIZE, each byte as `drain` expects it
 *     drain    receive COUNT bytes in pieces of SIZE and check them; print megabytes a second
 *     wait     wait until the peer is gone, and print how it is then */
#include <libxenvchan.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static unsigned char byte_at(unsigned long at)
{
    return at * 31 + (at >> 12);
}

static struct libxenvchan *open_end(char **argv)
{
    int peer = atoi(argv[2]);
    size_t ring = atol(argv[4]);
    struct libxenvchan *end = NULL;
    if (!strcmp(argv[1], "server")) {
        end = libxenvchan_server_init(NULL, peer, argv[3], ring, ring);
        if (!end) fail("libxenvchan_server_init");
        printf("listening\n");
        fflush(stdout);
    } else {
        end = libxenvchan_client_init(NULL, peer, argv[3]);
        if (!end) fail("libxenvchan_client_init");
    }
    end->blocking = 1;
    return end;
}

int main(int argc, char **argv)
{
    struct libxenvchan *end = open_end(argv);
    const char *task = argv[5];
    unsigned long count = argc > 6 ? atol(argv[6]) : 0, done = 0;
    size_t size = argc > 7 ? atol(argv[7]) : 65536;
    unsigned char *buffer = malloc(size), *other = malloc(size);
    while (libxenvchan_is_open(end) == 2)
        libxenvchan_wait(end);
    double start = now();
    if (!strcmp(task, "echo")) {
        int got;
        while ((got = libxenvchan_read(end, buffer, size)) > 0)
            if (libxenvchan_send(end, buffer, got) != got) break;
    } else if (!strcmp(task, "ask")) {
        for (; done < count; done++) {
            for (size_t at = 0; at < size; at++) buffer[at] = byte_at(done + at);
            if (libxenvchan_send(end, buffer, size) != (int)size) fail("send");
            if (libxenvchan_recv(end, other, size) != (int)size) fail("recv");
            if (memcmp(buffer, other, size)) { fprintf(stderr, "message %lu came back changed\n", done); return 1; }
        }
        printf("%.1f us a round trip\n", (now() - start) / count * 1e6);
    } else if (!strcmp(task, "pour")) {
        for (; done < count; done += size) {
            for (size_t at = 0; at < size; at++) buffer[at] = byte_at(done + at);
            if (libxenvchan_send(end, buffer, size) != (int)size) fail("send");
        }
        if (libxenvchan_recv(end, buffer, 1) != 1) fail("recv");
    } else if (!strcmp(task, "drain")) {
        for (; done < count; done += size) {
            if (libxenvchan_recv(end, buffer, size) != (int)size) fail("recv");
            for (size_t at = 0; at < size; at++)
                if (buffer[at] != byte_at(done + at)) { fprintf(stderr, "byte %lu is wrong\n", done + at); return 1; }
        }
        printf("%.1f MB/s\n", count / (now() - start) / 1e6);
        if (libxenvchan_send(end, "!", 1) != 1) fail("send");
    } else if (!strcmp(task, "wait")) {
        printf("both are there\n");
        fflush(stdout);
        while (libxenvchan_is_open(end) == 1)
            if (libxenvchan_wait(end)) break;
        printf("open: %d\n", libxenvchan_is_open(end));
    }
    libxenvchan_close(end);
    free(buffer);
    free(other);
    return 0;
}
