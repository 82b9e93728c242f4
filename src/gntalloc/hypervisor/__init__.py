"""Keep the hypervisor's state. It is pure: no I/O, no clock, no threads.

grants      a domain's grant table
references  the free references of a table
ports       event channels
domains     all domains, found by domid
"""
