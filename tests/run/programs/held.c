/* Makes one mmap of a shared file by hand, with a known value in every register, and says what became of it.
 *
 *     held HOW LENGTH FLAGS ADDRESS
 *
 * HOW is a row of letters: f the call is a child's, whose status is told; b SIGTRAP and SIGUSR2 are blocked; h SIGTRAP
 * has a handler; i it is ignored; s SIGSEGV has a handler; t there is another thread, which does what a line on standard
 * input says: u unmap the page where the instruction is that makes the call; j let it jump to itself; x exec.
 * Prints one line of what it saw. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, COUNT };
static const char *const names[] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
                                     "r12", "r13", "r14", "r15", "flags" };
unsigned long before[COUNT], after[COUNT], rescue[6];
void by_hand(void);
extern char the_call[], after_call[];

/* In a page of its own, so that it can go. */
#define LOAD(number, name) " mov before+8*" #number "(%rip), %" #name "\n"
#define STORE(set, number, name) " mov %" #name ", " #set "+8*" #number "(%rip)\n"
__asm__(".pushsection .text.held, \"ax\", @progbits\n .balign 4096\n"
        ".globl by_hand, the_call, after_call\n"
        "by_hand:\n"
        STORE(rescue, 0, rbx) STORE(rescue, 1, rbp) STORE(rescue, 2, r12) STORE(rescue, 3, r13) STORE(rescue, 4, r14)
        STORE(rescue, 5, r15)
        STORE(before, 7, rsp)
        " stc\n pushfq\n pop before+8*16(%rip)\n"
        LOAD(0, rax) LOAD(1, rbx) LOAD(2, rcx) LOAD(3, rdx) LOAD(4, rsi) LOAD(5, rdi) LOAD(6, rbp) LOAD(8, r8)
        LOAD(9, r9) LOAD(10, r10) LOAD(11, r11) LOAD(12, r12) LOAD(13, r13) LOAD(14, r14) LOAD(15, r15)
        "the_call:\n syscall\n"
        "after_call:\n"
        STORE(after, 0, rax) STORE(after, 1, rbx) STORE(after, 2, rcx) STORE(after, 3, rdx) STORE(after, 4, rsi)
        STORE(after, 5, rdi) STORE(after, 6, rbp) STORE(after, 7, rsp) STORE(after, 8, r8) STORE(after, 9, r9)
        STORE(after, 10, r10) STORE(after, 11, r11) STORE(after, 12, r12) STORE(after, 13, r13) STORE(after, 14, r14)
        STORE(after, 15, r15)
        " pushfq\n pop after+8*16(%rip)\n"
        " mov rescue(%rip), %rbx\n mov rescue+8(%rip), %rbp\n mov rescue+16(%rip), %r12\n mov rescue+24(%rip), %r13\n"
        " mov rescue+32(%rip), %r14\n mov rescue+40(%rip), %r15\n"
        " ret\n .balign 4096\n.popsection\n");

static volatile int handled, with_result, traps, value;

static void on_usr1(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    handled++;
    value = info->si_value.sival_int;
    with_result += registers[REG_RIP] == (greg_t)after_call && registers[REG_RAX] != (greg_t)before[RAX];
}

static void on_trap(int number) { traps++; }

static void on_segv(int number, siginfo_t *info, void *context)
{
    printf("fault=%s\n", info->si_code > 0 && info->si_addr == after_call ? "there" : "elsewhere");
    fflush(stdout);
    _exit(0);
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART };
    sigaction(number, &action, NULL);
}

static void *other(void *program)
{
    char line[16];
    if (!fgets(line, sizeof line, stdin)) return NULL;
    char *page = (char *)((unsigned long)by_hand & -4096UL);
    if (line[0] == 'u') munmap(page, 4096);
    if (line[0] == 'j') {
        mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
        memcpy(the_call, "\xeb\xfe", 2);
    }
    if (line[0] == 'x') execl("/bin/sh", "sh", "-c", "echo another; read line; echo $line", NULL);
    printf("done\n");
    fflush(stdout);
    pause();
    return NULL;
}

static int descriptors(void)
{
    int count = -1; /* the folder's own */
    DIR *folder = opendir("/proc/self/fd");
    for (struct dirent *entry; (entry = readdir(folder)); ) count += entry->d_name[0] != '.';
    closedir(folder);
    return count;
}

int main(int argc, char **argv)
{
    const char *how = argv[1];
    unsigned long length = atol(argv[2]), address = strtoul(argv[4], NULL, 0);
    int file = memfd_create("device", 0), status;
    if (strchr(how, 'f') && fork()) {
        wait(&status);
        printf("status=%d\n", status);
        return 0;
    }
    sigset_t mask, now;
    sigprocmask(SIG_BLOCK, NULL, &mask);
    if (strchr(how, 'b')) sigaddset(&mask, SIGTRAP), sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    handle(SIGUSR1, on_usr1);
    if (strchr(how, 's')) handle(SIGSEGV, on_segv);
    if (strchr(how, 'h')) signal(SIGTRAP, on_trap);
    if (strchr(how, 'i')) signal(SIGTRAP, SIG_IGN);
    pthread_t thread;
    if (strchr(how, 't')) pthread_create(&thread, NULL, other, argv[0]);
    int open_before = descriptors();

    for (int i = 0; i < COUNT; i++) before[i] = 0x1111111111111111UL * (i % 15 + 1);
    before[RAX] = 9, before[RDI] = address, before[RSI] = length, before[RDX] = PROT_READ | PROT_WRITE;
    before[R10] = strtoul(argv[3], NULL, 0), before[R8] = file, before[R9] = 0;
    by_hand();

    before[RCX] = (unsigned long)after_call; /* where SYSCALL keeps the way back */
    before[R11] = before[FLAGS];
    before[RAX] = after[RAX];
    printf("result=%ld registers=", (long)after[RAX]);
    for (int i = 0; i < COUNT; i++) if (before[i] != after[i]) printf("%s,", names[i]);
    sigprocmask(SIG_BLOCK, NULL, &now);
    struct sigaction trap;
    sigaction(SIGTRAP, NULL, &trap);
    printf(" mask=%s trap=%s traps=%d", memcmp(&mask, &now, 8) ? "other" : "same",
           trap.sa_handler == on_trap ? "handler" : trap.sa_handler == SIG_IGN ? "ignored" : "default", traps);
    printf(" handled=%d with_result=%d value=%d descriptors=%+d", handled, with_result, value,
           descriptors() - open_before);
    printf(" there=%d text=", address && !msync((void *)address, 4096, MS_ASYNC));
    if ((long)after[RAX] > 0)
        for (unsigned long at = 0; at < length; at += 4096) printf("%.5s,", (char *)after[RAX] + at);
    printf("\n");
    return 0;
}
