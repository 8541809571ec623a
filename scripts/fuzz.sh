#!/bin/sh
# Damage input of every kind and run the commands on it: other cases each time, for a night.
# `scripts/fuzz.sh 2000` runs 2,000 of them, the default is 10,000. A case that fails is printed with
# a line (@reproduce_failure) that runs it alone.
set -eu
cd "$(dirname "$0")/.."

# A damaged size must end in a message, not in the memory of the machine: 32 GiB of addresses.
ulimit -v 33554432
MPD_FUZZ_CASES=${1:-10000} OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -p no:cacheprovider -q \
    tests/test_fuzz.py
