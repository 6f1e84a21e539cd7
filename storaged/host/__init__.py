"""The edges to the kernel: every system call that can block runs in a thread with a deadline."""
