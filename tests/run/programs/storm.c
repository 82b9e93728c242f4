/* Threads that map and unmap pages of a peer through one handle, with or without a timer's signals all the time.
 *
 *     storm ROUNDS MICROSECONDS PEER REF...
 *
 * One thread a REF; the byte that each page must begin with is 'A' for the first, 'B' for the second. MICROSECONDS is
 * the timer's, 0 for none. Prints how many rounds went wrong, and how many signals came at least (1 or 0). */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <xengnttab.h>

static xengnttab_handle *handle;
static unsigned peer, rounds;
static uint32_t refs[16];
static atomic_uint wrong, signals;

static void handler(int number)
{
    signals += number == SIGALRM;
}

static void *work(void *argument)
{
    size_t which = (size_t)argument;
    for (unsigned round = 0; round < rounds; round++) {
        char *page = xengnttab_map_grant_ref(handle, peer, refs[which], PROT_READ | PROT_WRITE);
        if (!page) { wrong++; continue; }
        wrong += *page != 'A' + (char)which;
        wrong += xengnttab_unmap(handle, page, 1) != 0;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[16];
    size_t count = argc - 4;
    rounds = atoi(argv[1]);
    peer = atoi(argv[3]);
    for (size_t which = 0; which < count; which++)
        refs[which] = atoi(argv[4 + which]);
    struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART };
    sigaction(SIGALRM, &action, NULL);
    handle = xengnttab_open(NULL, 0);
    if (!handle) { perror("xengnttab_open"); return 1; }
    struct itimerval timer = { { 0, atoi(argv[2]) }, { 0, atoi(argv[2]) } };
    setitimer(ITIMER_REAL, &timer, NULL);
    for (size_t which = 0; which < count; which++)
        pthread_create(&threads[which], NULL, work, (void *)which);
    for (size_t which = 0; which < count; which++)
        pthread_join(threads[which], NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
    printf("%u %d\n", wrong, signals > 0);
    return 0;
}
