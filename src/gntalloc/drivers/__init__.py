"""The guest kernel's half: what is behind each file in /dev/xen. One object a driver and a domain.

chardev    what every device file does, once
gntalloc   allocate pages, grant them, take them back: the heart
gntdev     map what others granted
indexes    which index a map gets, as Linux chooses
copy       copy from and to granted pages
evtchn     event channels: bind, send, wait
notify     what the two grant drivers promise to do when pages go
releases   programs that are told when no peer holds pages any more
privcmd    the hypercalls that channel libraries make
behaviour  where we differ from Linux, switch by switch
"""
