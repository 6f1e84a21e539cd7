#!/bin/bash
# A fio with all engines; and no server runs that bench/backends.py has not started.
set -euo pipefail
bench/fio-engines /opt/fio
systemctl mask --quiet tgt.service nfs-ganesha.service nfs-ganesha-lock.service rpcbind.service rpcbind.socket \
    ceph.target ceph-mon.target ceph-osd.target ceph-crash.service
