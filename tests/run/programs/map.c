/* Maps pages of a peer, prints the text of each, and answers in the last if it may write.
 *
 *     map PEER WRITABLE REF... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xengnttab.h>

int main(int argc, char **argv)
{
    uint32_t refs[64];
    unsigned peer = atoi(argv[1]), writable = atoi(argv[2]), pages = argc - 3;
    for (unsigned page = 0; page < pages; page++)
        refs[page] = atoi(argv[3 + page]);
    xengnttab_handle *handle = xengnttab_open(NULL, 0);
    if (!handle) { perror("xengnttab_open"); return 1; }
    int prot = PROT_READ | (writable ? PROT_WRITE : 0);
    char *memory = xengnttab_map_domain_grant_refs(handle, pages, peer, refs, prot);
    if (!memory) { perror("xengnttab_map_domain_grant_refs"); return 1; }
    for (unsigned page = 0; page < pages; page++)
        printf("%s\n", memory + 4096 * page);
    if (writable)
        strcpy(memory + 4096 * (pages - 1), "answer");
    if (xengnttab_unmap(handle, memory, pages)) { perror("xengnttab_unmap"); return 1; }
    xengnttab_close(handle);
    return 0;
}
