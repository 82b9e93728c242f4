"""What a program inside a domain uses.

domain    Domain: share, map; current_domain: which one am I in
pages     shared and mapped pages, grants
devices/  the two providers of /dev/xen: the machine, and a real kernel
connection  messages to the machine
control   orders to the machine, for its owner
absence   why nobody answers there
"""
