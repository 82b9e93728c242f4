"""Share pages between domains, the way Xen does."""
