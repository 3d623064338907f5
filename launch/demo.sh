#!/usr/bin/env bash
# Sets up .venv if need be, then shows the main job on this machine in about 3 minutes: training on 2 ranks is killed in
# the middle of a save, resumed on 4 ranks and finished. Everything it makes is in demo-run/, fresh each time.
#
#   bash launch/demo.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python launch/demo.py
