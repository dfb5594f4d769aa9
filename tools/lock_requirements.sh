#!/usr/bin/env bash
# Resolves requirements/cpu.in into requirements/cpu.lock; run it after editing an input, from any folder.
# Versions already in the lock are kept where they still fit; `tools/lock_requirements.sh --upgrade` takes the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${MEGATRON_FIPO_VENV:-.venv}
uv=$venv/bin/uv
if [ ! -x "$uv" ]; then
    printf 'no %s: run `make setup` first\n' "$uv" >&2
    exit 1
fi

lock=requirements/cpu.lock
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
[ ! -f "$lock" ] || grep -v -x -F -f <(grep -v '^#' requirements/cpu-no-deps.in | grep .) "$lock" >"$scratch"

"$uv" pip compile --quiet "$@" --python "$venv/bin/python" --no-emit-index-url --no-emit-find-links \
    --custom-compile-command 'tools/lock_requirements.sh' requirements/cpu.in --output-file "$scratch"
{
    cat "$scratch"
    printf '\n# Installed without their dependencies, from requirements/cpu-no-deps.in.\n'
    grep -v '^#' requirements/cpu-no-deps.in | grep .
} >"$lock"
printf 'wrote %s\n' "$lock"
