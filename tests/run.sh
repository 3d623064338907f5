#!/usr/bin/env bash
# Sets up .venv if need be, then checks style and types and runs the whole test suite.
#
#   bash tests/run.sh [--quick] [pytest arguments]
#
# --quick leaves out the tests that are marked slow. Other arguments go to pytest. Every check runs, also after another
# one failed; the last line names those that failed, and the exit code is 1 then.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

arguments=()
for argument in "$@"; do
    if [ "$argument" = --quick ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done

failed=()
run() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

run "ruff check" .venv/bin/python -m ruff check .
run "ruff format" .venv/bin/python -m ruff format --check .
run "mypy" .venv/bin/python -m mypy
run "pytest" .venv/bin/python -m pytest ${arguments[@]+"${arguments[@]}"}

minutes=$((SECONDS / 60)) seconds=$((SECONDS % 60))
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFailed after %d min %d s:' "$minutes" "$seconds"
    printf ' %s;' "${failed[@]}"
    printf ' what is wrong stands above.\n'
    exit 1
fi
printf '\nEverything passed in %d min %d s.\n' "$minutes" "$seconds"
