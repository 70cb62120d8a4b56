# Shared by the scripts beside it: finds Python, makes the virtual environment, installs.
# Sourced, not run. Needs: bash, Python 3.11 or newer with the venv module, a few GB of disk.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment="$root/.venv"
constraints="$root/launch/constraints.txt"
minimum_free_mb=3000

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\n%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# The first Python on the path that is new enough; the pins are known to install on 3.11 to 3.13.
find_python() {
    local candidate seen=""
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
        seen="$seen $("$candidate" --version 2>&1 | head -n 1) ($candidate);"
    done
    fail "this needs Python 3.11 to 3.14; found:${seen:- none}. Install one, or name it: PYTHON=/path/to/python $0"
}

# make_environment EXTRAS: a virtual environment with ddinfer, its pins, and the named extras.
make_environment() {
    local extras=$1 python stamp wanted free
    python=$(find_python) || exit 1
    stamp="$environment/.installed$extras"
    wanted=$(cat "$root/setup.cfg" "$constraints" | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        say "Using the environment in $environment"
        return
    fi
    if [ ! -x "$environment/bin/python" ] || ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        free=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
        [ "$free" -ge "$minimum_free_mb" ] ||
            fail "this needs $minimum_free_mb MB of free disk in $root for PyTorch and the rest; found $free MB"
        say "Making a virtual environment in $environment with $("$python" --version)"
        "$python" -m venv --clear "$environment" ||
            fail "Python's venv module is missing or broken. On Debian and Ubuntu: apt install python3-venv"
    fi
    say "Installing ddinfer with PyTorch and diffusers (the first time downloads a few hundred MB, with CUDA several GB)"
    "$environment/bin/python" -m pip install --progress-bar on --disable-pip-version-check \
        --constraint "$constraints" --editable "$root$extras" ||
        fail "the installation failed; the lines above say why. Nothing outside $environment was changed"
    printf '%s' "$wanted" > "$stamp"
}
