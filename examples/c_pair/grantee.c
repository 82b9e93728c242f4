/* Maps one page of a peer, and shows what is there: grantee PEER REFERENCE */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
    xengnttab_handle *handle = xengnttab_open(NULL, 0);
    if (argc != 3 || !handle) { perror("grantee PEER REFERENCE: xengnttab_open"); return 1; }
    char *page = xengnttab_map_grant_ref(handle, atoi(argv[1]), atoi(argv[2]), PROT_READ);
    if (!page) { perror("xengnttab_map_grant_ref"); return 1; }
    printf("%.4096s\n", page);
    xengnttab_unmap(handle, page, 1);
    xengnttab_close(handle);
    return 0;
}
