"""Be the guest kernel's half: the drivers behind the files in /dev/xen. Each domain has an object of each driver.

chardev    the part that every device file shares
gntalloc   allocate pages, grant them, take them back: the heart
pages      count the users of granted pages, and end a page with its last user, for gntalloc
grefs      keep granted pages, those of one ALLOC together, for gntalloc
refusals   say why gntalloc refuses a call
gntdev     map what others granted
indexes    choose the index of a map, as Linux does
copy       copy from and to granted pages
evtchn     event channels: bind, send, wait
placing    find out whether a granter has its pages mapped
notify     keep the promises that the two grant drivers make for when pages go
releases   tell programs when no peer holds pages any more
privcmd    the hypercalls that channel libraries make
behaviour  where we differ from Linux, switch by switch
"""
