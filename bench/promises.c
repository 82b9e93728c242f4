/* What the kernel's part of a page's cycle costs, by what is promised of the page.
 *
 *     cc -O2 -o /tmp/promises bench/promises.c && taskset -c 1 /tmp/promises
 *
 * Each row is the system calls that the machine and two programs make for one promise, one page's worth of them, with
 * nothing around them. The best of several rounds, in microseconds.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CYCLES = 2000, ROUNDS = 15 };
enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW };
enum { SEAL_WRITES_TO_COME = 0x10 | F_SEAL_SEAL };

static int file, again, watcher, line[2];
static char path[64];

static void must(int good) {
    if (!good) {
        perror("promises");
        exit(1);
    }
}

static int memory_file(void) {
    int made = memfd_create("promises", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    must(made >= 0 && !fallocate(made, 0, 0, PAGE) && !fcntl(made, F_ADD_SEALS, SEALS));
    return made;
}

static void lock(int description, int command, short kind, off_t byte) {
    struct flock lock = {.l_type = kind, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    must(!fcntl(description, command, &lock));
}

static void a_file(void) { close(memory_file()); }

static void two_maps(void) {
    for (int side = 0; side < 2; side++) {
        char *range = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(range != MAP_FAILED);
        must(mmap(range, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, again, 0) == range);
        range[0] = 7;
        munmap(range, PAGE);
    }
}

static void counted(void) {
    for (int side = 0; side < 2; side++) {
        int description = open(path, O_RDWR | O_CLOEXEC);
        must(description >= 0);
        lock(description, F_OFD_SETLK, F_WRLCK, side);
        lock(file, F_OFD_GETLK, F_RDLCK, side);
        close(description);
    }
}

static void heard(void) {
    char events[256];
    int watch = inotify_add_watch(watcher, path, IN_CLOSE | IN_ONESHOT);
    must(watch >= 0);
    close(open(path, O_RDONLY | O_CLOEXEC));
    must(read(watcher, events, sizeof events) > 0);
}

static void opened_and_closed(void) { close(open(path, O_RDONLY | O_CLOEXEC)); }

static void not_hidden(void) {
    must(!fcntl(file, F_SETLEASE, F_WRLCK) && !fcntl(file, F_SETLEASE, F_UNLCK));
}

static void read_only(void) {
    int made = memory_file();
    char *window = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, made, 0);
    must(window != MAP_FAILED && !fcntl(made, F_ADD_SEALS, SEAL_WRITES_TO_COME));
    memset(window, 0, PAGE);
    munmap(window, PAGE);
    close(made);
}

static void two_messages(void) {
    for (int side = 0; side < 2; side++) {
        char bytes[64] = {0}, room[CMSG_SPACE(sizeof(int))] = {0};
        struct iovec part = {bytes, sizeof bytes};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        must(send(line[0], bytes, sizeof bytes, 0) > 0 && recv(line[1], bytes, sizeof bytes, 0) > 0);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &again, sizeof again);
        must(sendmsg(line[1], &message, 0) > 0);
        must(recvmsg(line[0], &message, MSG_CMSG_CLOEXEC) > 0);
        close(*(int *)CMSG_DATA(CMSG_FIRSTHDR(&message)));
    }
}

static double best(void (*work)(void)) {
    double least = 1e9;
    for (int round = 0; round < ROUNDS; round++) {
        struct timespec from, to;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
        for (int cycle = 0; cycle < CYCLES; cycle++)
            work();
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
        double took = ((to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec)) / CYCLES / 1e3;
        least = took < least ? took : least;
    }
    return least;
}

int main(void) {
    signal(SIGIO, SIG_IGN);
    file = memory_file();
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    again = open(path, O_RDWR | O_CLOEXEC);
    watcher = inotify_init1(IN_CLOEXEC);
    must(again >= 0 && watcher >= 0 && !socketpair(AF_UNIX, SOCK_STREAM, 0, line));
    double made = best(a_file);
    printf("a memory file of one page, zeroed          %6.1f\n", made);
    printf("two maps, placed, touched and taken down   %6.1f\n", best(two_maps));
    printf("two descriptions, counted by locks         %6.1f\n", best(counted));
    printf("told when one is closed (inotify)          %6.1f\n", best(heard) - best(opened_and_closed));
    printf("no other one is hidden (a lease)           %6.1f\n", best(not_hidden));
    printf("read-only: a window, a seal, wiped         %6.1f\n", best(read_only) - made);
    printf("two questions, answered with a descriptor  %6.1f\n", best(two_messages));
    return 0;
}
