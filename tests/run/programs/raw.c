/* Grants one page with "raw" in it to the domain of its argument, prints the reference, and waits for end of file. With
 * BARE there is no C library at all. */
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

struct alloc { uint16_t domid, flags; uint32_t count; uint64_t index; uint32_t ref, pad; };

static int go(const char *peer)
{
    struct alloc asked = { peer[0] - '0', 1, 1, 0, 0, 0 };
    long file = call(SYS_open, (long)"/dev/xen/gntalloc", O_RDWR, 0, 0, 0, 0);
    if (file < 0 || call(SYS_ioctl, file, 0x184705, (long)&asked, 0, 0, 0)) return 1;
    char *page = (char *)call(SYS_mmap, 0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, asked.index);
    if ((unsigned long)page > -4096UL) return 2;
    page[0] = 'r', page[1] = 'a', page[2] = 'w';
    char text[16], *at = text + sizeof text;
    *--at = '\n';
    for (uint32_t ref = asked.ref; ; ref /= 10) { *--at = '0' + ref % 10; if (ref < 10) break; }
    call(SYS_write, 1, (long)at, text + sizeof text - at, 0, 0, 0);
    while (call(SYS_read, 0, (long)text, 1, 0, 0, 0) > 0) ;
    return 0;
}

#ifdef BARE
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call start\n");
void start(long *stack)
{
    call(SYS_exit_group, go(((char **)stack)[2]), 0, 0, 0, 0, 0);
}
#else
int main(int argc, char **argv) { return argc > 1 ? go(argv[1]) : 1; }
#endif
