/* One end of a vchan as a C program makes it, with the stock libxenvchan. peer.py is the other end, or another of these.
 *
 *     peer DATA PEER CASE...      CASE is ROLE,PATH,READ,WRITE,MODE,COUNT,WHO
 *
 * What the words mean, and what is printed, stands in peer.py. A case that is not as it has to be is told on standard
 * error, and then the exit status is 1. Each case is a process of its own.
 */

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <libxenvchan.h>

#define PATIENCE 90 /* seconds against hangs */
#define CLIENTS_FROM 1000003
#define CHUNK 65536

static unsigned char *data; /* the file, twice in a row, so that no piece of it wraps */
static size_t data_size;

static unsigned char *buffer;
static size_t buffer_size;

struct one_case {
    int server, mine; /* mine: WHO is this end */
    const char *path, *mode;
    size_t read, write, count;
};

struct flow { /* one direction */
    size_t from, done, limit;
    unsigned seed;
};

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static size_t step(struct flow *flow, size_t left)
{
    flow->seed = (flow->seed * 1103515245u + 12345u) & 0x7fffffff;
    size_t size = 1 + (flow->seed >> 8) % flow->limit;
    return size < left ? size : left;
}

static void check(const struct flow *flow, size_t count)
{
    if (memcmp(buffer, data + (flow->from + flow->done) % data_size, count))
        fail("bytes from %zu to %zu of what came differ", flow->done, flow->done + count);
}

/* -1 can mean: closed, and with bytes that came between the library's two looks. */
static int really_over(struct libxenvchan *vchan, int result)
{
    return result < 0 && libxenvchan_data_ready(vchan) <= 0;
}

static void send_all(struct libxenvchan *vchan, struct flow *flow, size_t count, int packets)
{
    while (flow->done < count) {
        size_t size = step(flow, count - flow->done);
        const unsigned char *bytes = data + (flow->from + flow->done) % data_size;
        int sent = packets ? libxenvchan_send(vchan, bytes, size) : libxenvchan_write(vchan, bytes, size);
        if (sent != (int)size)
            fail("%zu bytes after %zu: wrote %d", size, flow->done, sent);
        flow->done += size;
    }
}

/* How many came before the end, or `count`. */
static size_t receive(struct libxenvchan *vchan, struct flow *flow, size_t count, int packets)
{
    while (flow->done < count) {
        size_t size = packets ? step(flow, count - flow->done) : count - flow->done;
        if (size > buffer_size)
            size = buffer_size;
        int got = packets ? libxenvchan_recv(vchan, buffer, size) : libxenvchan_read(vchan, buffer, size);
        if (really_over(vchan, got))
            break;
        if (got < 0)
            continue;
        check(flow, got);
        flow->done += got;
    }
    return flow->done;
}

static void both(struct libxenvchan *vchan, struct flow *out, struct flow *in, size_t count)
{
    size_t size = 0;
    vchan->blocking = 0;
    while (out->done < count || in->done < count) {
        int moved = 0;
        if (out->done < count) {
            if (!size)
                size = step(out, count - out->done);
            int sent = libxenvchan_write(vchan, data + (out->from + out->done) % data_size, size);
            if (sent < 0)
                fail("%zu bytes after %zu: the peer is gone", size, out->done);
            out->done += sent;
            size -= sent;
            moved += sent;
        }
        if (in->done < count) {
            int got = libxenvchan_read(vchan, buffer, buffer_size);
            if (really_over(vchan, got))
                fail("after %zu bytes: the end", in->done);
            if (got > 0) {
                check(in, got);
                in->done += got;
                moved += got;
            }
        }
        if (!moved)
            libxenvchan_wait(vchan);
    }
    vchan->blocking = 1;
}

static void timed(struct libxenvchan *vchan, const struct one_case *this)
{
    double started = now();
    if (!strcmp(this->mode, "trips")) {
        for (size_t trip = 0; trip < this->count; trip++) {
            if (this->mine && libxenvchan_send(vchan, data, 64) != 64)
                fail("the peer is gone");
            if (libxenvchan_recv(vchan, buffer, 64) != 64)
                fail("the peer is gone");
            if (!this->mine && libxenvchan_send(vchan, data, 64) != 64)
                fail("the peer is gone");
        }
    } else if (this->mine) {
        for (size_t done = 0; done < this->count; done += CHUNK)
            if (libxenvchan_write(vchan, data, CHUNK) != CHUNK)
                fail("the peer is gone");
        libxenvchan_recv(vchan, buffer, 1);
    } else {
        for (size_t done = 0, got; done < this->count; done += got)
            if ((int)(got = libxenvchan_read(vchan, buffer, CHUNK)) <= 0)
                fail("the peer is gone");
        libxenvchan_send(vchan, buffer, 1);
    }
    if (this->mine)
        printf("%s %.6f\n", this->mode, now() - started);
}

static void run(const struct one_case *this, int peer)
{
    struct libxenvchan *vchan;
    alarm(PATIENCE);
    if (this->server) {
        vchan = libxenvchan_server_init(NULL, peer, this->path, this->read, this->write);
        if (!vchan)
            fail("no server: %s", strerror(errno));
    } else {
        while (!(vchan = libxenvchan_client_init(NULL, peer, this->path)))
            usleep(20000); /* the library does not wait for its server */
    }
    vchan->blocking = 1;
    if (this->server)
        while (libxenvchan_is_open(vchan) == 2)
            libxenvchan_wait(vchan);

    int packets = !strcmp(this->mode, "packets");
    struct flow out = { this->server ? 0 : CLIENTS_FROM, 0, 0, this->server ? 1 : 2 };
    struct flow in = { this->server ? CLIENTS_FROM : 0, 0, 0, this->server ? 2 : 1 };
    out.limit = (size_t)(packets ? 1 : 2) << vchan->write.order;
    in.limit = (size_t)(packets ? 1 : 2) << vchan->read.order;

    if (packets || !strcmp(this->mode, "turns")) {
        if (this->mine) {
            send_all(vchan, &out, this->count, packets);
            receive(vchan, &in, this->count, packets);
        } else {
            receive(vchan, &in, this->count, packets);
            send_all(vchan, &out, this->count, packets);
        }
        printf("%s %zu %zu\n", this->mode, out.done, in.done);
    } else if (!strcmp(this->mode, "both") || !strcmp(this->mode, "awaiting")) {
        both(vchan, &out, &in, this->count);
        printf("%s %zu %zu\n", this->mode, out.done, in.done);
    } else if (!strcmp(this->mode, "stream") || !strcmp(this->mode, "trips")) {
        timed(vchan, this);
    } else if (!strcmp(this->mode, "stalled")) {
        if (this->mine) {
            receive(vchan, &in, this->count, 0);
            kill(getpid(), SIGKILL);
        }
        while (libxenvchan_write(vchan, data + (out.from + out.done) % data_size, 1000) == 1000)
            out.done += 1000;
        printf("%s gone\n", this->mode);
    } else { /* closing, killed */
        if (this->mine) {
            send_all(vchan, &out, this->count, 0);
            if (!strcmp(this->mode, "killed"))
                kill(getpid(), SIGKILL);
        } else {
            size_t got = receive(vchan, &in, data_size, 0);
            int more = libxenvchan_write(vchan, data, 1);
            printf("%s %zu %s\n", this->mode, got, more < 0 ? "gone" : "not gone");
        }
    }
    fflush(stdout);
    libxenvchan_close(vchan);
}

int main(int count, char **words)
{
    FILE *file = count > 3 ? fopen(words[1], "rb") : NULL;
    if (!file)
        fail("usage: peer DATA PEER CASE...");
    fseek(file, 0, SEEK_END);
    data_size = ftell(file);
    rewind(file);
    data = malloc(2 * data_size);
    buffer = malloc(buffer_size = 1 << 20);
    if (fread(data, 1, data_size, file) != data_size)
        fail("%s cannot be read", words[1]);
    memcpy(data + data_size, data, data_size);

    int bad = 0;
    for (int each = 3; each < count; each++) {
        struct one_case this;
        char *words_of_it = strdup(words[each]), *role = strtok(words_of_it, ",");
        this.server = !strcmp(role, "server");
        this.path = strtok(NULL, ",");
        this.read = atol(strtok(NULL, ","));
        this.write = atol(strtok(NULL, ","));
        this.mode = strtok(NULL, ",");
        this.count = atol(strtok(NULL, ","));
        this.mine = !strcmp(role, strtok(NULL, ","));
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            run(&this, atoi(words[2]));
            return 0;
        }
        int status, killed = this.mine && (!strcmp(this.mode, "killed") || !strcmp(this.mode, "stalled"));
        waitpid(child, &status, 0);
        if (killed ? !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL : status) {
            fprintf(stderr, "%s ended with %#x\n", words[each], status);
            bad = 1;
        }
    }
    return bad;
}
