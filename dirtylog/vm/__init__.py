"""The virtual machine: memslots, page tables, vCPUs and the dirty log as KVM keeps it."""
