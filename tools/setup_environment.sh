#!/usr/bin/env bash
# Creates the project's environment, or brings it up to date; a second run with nothing changed returns at once.
#
#   MEGATRON_FIPO_VENV   where the environment goes (default: .venv in the repository)
#
# `setup-state` inside the environment says how far a set-up got: "incomplete" while packages are being
# installed, the digest of all inputs once everything is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${MEGATRON_FIPO_VENV:-.venv}
lock=requirements/cpu.lock
state_file=$venv/setup-state
probe='import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(0 if sys.version_info[:2] == (3, 12) and os.path.exists(header) else 1)'

say() { printf 'set-up: %s\n' "$*"; }
fail() {
    printf 'set-up failed: %s\n' "$*" >&2
    exit 1
}

# Takes a lock for this environment, so that two runs at once do not install over each other.
take_turn() {
    command -v flock >/dev/null || return 0
    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.setup-lock"
    flock --nonblock 9 && return 0
    say "another set-up of $venv is running; waiting for it"
    flock 9
}

# True where the given command is a Python 3.12 that really runs (a pyenv shim may not), with venv and headers.
is_python312() { "$1" -c "$probe" >/dev/null 2>&1; }

find_on_path() {
    local name
    for name in python3.12 python3 python; do
        if command -v "$name" >/dev/null && is_python312 "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

find_in_pyenv() {
    command -v pyenv >/dev/null || return 1
    local root version
    root=$(pyenv root)
    while read -r version; do
        if is_python312 "$root/versions/$version/bin/python"; then
            printf '%s\n' "$root/versions/$version/bin/python"
            return 0
        fi
    done < <(pyenv versions --bare | grep -E '^3\.12\.[0-9]+$' | sort -t. -k3,3nr)
    return 1
}

# Lets uv find or download an interpreter; uv itself comes from PATH or from the package index.
find_with_uv() {
    local uv scratch='' found=''
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        scratch=$(mktemp -d)
        python3 -m pip install --quiet --target "$scratch" "$(grep '^uv==' "$lock")" >/dev/null 2>&1 || true
        uv=$scratch/bin/uv
    fi
    if [ -x "$uv" ]; then
        found=$("$uv" python find 3.12 2>/dev/null) && is_python312 "$found" || found=''
        if [ -z "$found" ] && "$uv" python install --no-bin 3.12 >&2; then
            found=$("$uv" python find --managed-python 3.12 2>/dev/null) && is_python312 "$found" || found=''
        fi
    fi
    [ -z "$scratch" ] || rm -rf "$scratch"
    [ -n "$found" ] && printf '%s\n' "$found"
}

find_python() {
    find_on_path || find_in_pyenv || find_with_uv || fail "no Python 3.12 that runs was found: neither on PATH, \
nor among pyenv's versions, and uv could not get one. Install Python 3.12 with its venv module and headers \
(Debian: apt-get install python3.12-venv python3.12-dev; pyenv: pyenv install 3.12), then run this again."
}

# A few locked packages come as source only and are compiled while they are installed.
check_compiler() {
    command -v cc >/dev/null || command -v gcc >/dev/null || fail "no C compiler (cc or gcc) on PATH; \
some packages are compiled from source. Install one (Debian: apt-get install gcc), then run this again."
}

# Digest of everything that decides what the environment holds; the version of the interpreter is added to it.
inputs_digest() {
    {
        cat "$lock" pyproject.toml setup.py tools/setup_environment.sh
        pwd
        "$venv/bin/python" --version
    } | sha256sum | cut -d' ' -f1
}

runs() { "$venv/bin/python" -c "$probe" >/dev/null 2>&1; }

# Removes an environment that cannot be trusted, and nothing that is not one.
remove_venv() {
    [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists but is no Python environment; \
move it away or set MEGATRON_FIPO_VENV to another folder."
    rm -rf "$venv"
}

create_venv() {
    local python
    check_compiler
    python=$(find_python)
    say "creating $venv with $python"
    "$python" -m venv "$venv"
}

install_packages() {
    local uv_pin
    uv_pin=$(grep '^uv==' "$lock")
    printf 'incomplete\n' >"$state_file"
    say "installing ${uv_pin/==/ }"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$uv_pin"
    say "installing $(grep -c '^[a-z0-9]' "$lock") locked packages (about 6 GB)"
    # Compiled now: where Python may not write bytecode, each of a server's processes would compile its imports anew.
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode -r "$lock"
    say "installing megatron-fipo itself, editable"
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
}

take_turn
if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    if ! runs; then
        remove_venv
        say "$venv had no working Python 3.12; making it anew"
    elif [ "$(cat "$state_file" 2>/dev/null)" = incomplete ]; then
        remove_venv
        say "an earlier set-up of $venv was interrupted; making it anew (downloads are kept)"
    elif [ "$(cat "$state_file" 2>/dev/null)" = "$(inputs_digest)" ]; then
        say "$venv is up to date (${SECONDS} s)"
        exit 0
    fi
fi
[ -x "$venv/bin/python" ] || create_venv
check_compiler
install_packages
inputs_digest >"$state_file.new"
mv "$state_file.new" "$state_file"
say "$venv is ready (${SECONDS} s)"
