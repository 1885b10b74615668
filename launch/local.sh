#!/usr/bin/env bash
# Runs a command on this machine with glibc's malloc told to keep its memory:
#   launch/local.sh tljax train --config=configs/... --workdir=...
# A training step on a CPU allocates and frees the same large buffers again and again.  By default
# glibc gives each back to the kernel and faults it in anew: about 250,000 page faults in a ViT-S
# step, about 100 with these settings.  The price is 0.5 to 2 GB more resident memory.  They must be
# in the environment before the process starts, so tljax cannot set them itself; other C libraries
# (macOS, musl) ignore them.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: launch/local.sh COMMAND..." >&2; exit 2; }
export MALLOC_MMAP_MAX_=0                      # no mapping of its own for a large buffer
export MALLOC_TRIM_THRESHOLD_=17179869184      # bytes free at the top of the heap before it shrinks
export MALLOC_TOP_PAD_=2147483648              # bytes added each time the heap grows
export MALLOC_ARENA_MAX=1                      # one heap, so that threads reuse each other's buffers
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1   # ask for transparent huge pages
exec "$@"
