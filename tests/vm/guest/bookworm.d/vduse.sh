#!/bin/bash
# Debian 12's kernel has no VDUSE: it gets it as its users do.
set -euo pipefail
kernel-config/dkms/install
