"""The test machine: a Debian kernel under QEMU's emulator, and commands in it. ``scripts/vm`` is its command line."""
