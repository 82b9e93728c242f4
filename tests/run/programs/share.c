/* Shares pages with a peer, says which, and shows what the peer wrote.
 *
 *     share PEER PAGES WRITABLE TEXT
 *
 * Prints the references; for each line on standard input it prints the second page's text, or the first's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
    uint32_t refs[64];
    unsigned peer = atoi(argv[1]), pages = atoi(argv[2]), writable = atoi(argv[3]);
    xengntshr_handle *handle = xengntshr_open(NULL, 0);
    if (!handle) { perror("xengntshr_open"); return 1; }
    char *memory = xengntshr_share_pages(handle, peer, pages, refs, writable);
    if (!memory) { perror("xengntshr_share_pages"); return 1; }
    for (unsigned page = 0; page < pages; page++)
        snprintf(memory + 4096 * page, 4096, "%s %u", argv[4], page);
    for (unsigned page = 0; page < pages; page++)
        printf("%u%c", refs[page], page + 1 < pages ? ' ' : '\n');
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        printf("%s\n", memory + (pages > 1 ? 4096 : 0));
        fflush(stdout);
    }
    if (xengntshr_unshare(handle, memory, pages)) { perror("xengntshr_unshare"); return 1; }
    xengntshr_close(handle);
    return 0;
}
