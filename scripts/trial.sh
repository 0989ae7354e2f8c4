#!/usr/bin/env bash
# Try the package as a user and as an attacker would: built as a wheel, installed beside the libraries of
# an environment that has them, on a read-only cache, a full disk, hostile pictures and packages.
# A line for each point; leaves with 1 if one failed. Needs no network; as root it mounts small disks.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
[ -x "$python" ] || { echo "trial: no $python: run make setup, or set PYTHON" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/dynaslim-trial.XXXXXX")
trial=
clean() {
    [ -z "$trial" ] || { kill "$trial" 2>/dev/null && wait "$trial" || true; }
    for disk in "$work"/disks/*; do
        mountpoint -q "$disk" 2>/dev/null && umount -l "$disk"
    done
    chmod -R u+w "$work" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
unset PYTHONPATH PYTHONHOME DYNASLIM_CACHE DYNASLIM_TOKEN
# one thread: on a machine that others use, those of torch wait for each other
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

# from a copy, so that the build leaves nothing in the tree
mkdir "$work/tree" "$work/disks" "$work/home"
cp -r pyproject.toml README.md LICENSE dynaslim "$work/tree"
export HOME=$work/home
"$python" -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir "$work" "$work/tree"
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-index --no-deps "$work"/*.whl
rm -rf "$work/tree"
# the libraries of the other environment; its own dynaslim is linked by a file that is not read here
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/libraries.pth"

cp scripts/trial.py "$work"
cd "$work"
timeout --kill-after=10 900 venv/bin/python trial.py "$@" &
trial=$!
wait "$trial" || exit 1
trial=
