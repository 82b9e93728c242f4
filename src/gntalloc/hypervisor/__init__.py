"""What the hypervisor keeps: domains and their grant tables. Pure state: no I/O, no clock, no threads."""
