#!/usr/bin/env bash
# Installs what the tests in tests/cluster start a private Slurm from: munge, slurmctld, slurmd and the client commands.
# Safe to run twice. Needs root and a Debian or Ubuntu; elsewhere it says what to do and fails, and those tests skip.
set -euo pipefail

commands=(munged slurmctld slurmd srun sbatch sinfo scontrol scancel)
packages=(munge slurmctld slurmd slurm-client)
# Daemons lie in sbin, which an ordinary user's PATH may lack.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf 'slurm: %s\n' "$*"; }
fail() {
    printf 'slurm: not installed: %s\n' "$*" >&2
    exit 1
}

missing() {
    local name
    for name in "${commands[@]}"; do
        command -v "$name" >/dev/null || printf '%s ' "$name"
    done
}

install_packages() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; }

if [ -z "$(missing)" ]; then
    say "$(slurmctld -V) is there"
    exit 0
fi
command -v apt-get >/dev/null || fail "this machine has no apt-get; install Slurm and munge by its own package manager \
(missing: $(missing))"
[ "$(id -u)" = 0 ] || fail "this needs root; run: sudo bash tools/install_slurm.sh"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The package lists may be absent or old; fetch them only then.
if ! install_packages >"$log" 2>&1 && ! { apt-get update -qq && install_packages; } >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "apt-get could not install ${packages[*]}; its last words are above"
fi
[ -z "$(missing)" ] || fail "after installing ${packages[*]}, these commands are still missing: $(missing)"
say "installed $(slurmctld -V) (${SECONDS} s)"
