"""Keep the hypervisor's state. It is pure: no I/O, no clock, no threads.

grants   a domain's grant table
ports    event channels
domains  all domains, found by domid
"""
