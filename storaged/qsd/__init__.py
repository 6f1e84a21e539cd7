"""qemu-storage-daemon: its versions, processes and QMP sessions. Only this package imports qemu.qmp."""
