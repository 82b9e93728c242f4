/* Shares one page with a peer for reading, says which, and keeps it until its input ends: granter PEER */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
    uint32_t reference;
    xengntshr_handle *handle = xengntshr_open(NULL, 0);
    if (argc != 2 || !handle) { perror("granter PEER: xengntshr_open"); return 1; }
    char *page = xengntshr_share_pages(handle, atoi(argv[1]), 1, &reference, 0);
    if (!page) { perror("xengntshr_share_pages"); return 1; }
    strcpy(page, "hello from C");
    printf("%u\n", reference);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    xengntshr_unshare(handle, page, 1);
    xengntshr_close(handle);
    return 0;
}
