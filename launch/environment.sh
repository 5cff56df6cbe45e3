# The virtual environment .venv at the root of the repository, made if missing, entered, and brought up to setup.py.
#
#   source launch/environment.sh "[extra]"       an extra of setup.py: test, cuda, tpu; "" for none (without it, the caller's arguments count)
#
# PYTHON=python3.12 chooses the interpreter of a new environment. Nothing is installed while setup.py is as it was.

_environment() {
    local root python candidate extra stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    extra="$1"
    stamp="$root/.venv/installed${extra:+-$extra}"

    if [ ! -x "$root/.venv/bin/pip" ]; then
        python=""
        for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "Python 3.11 or later is needed; ${PYTHON:-python3} is missing or older. Install it, or name it: PYTHON=/path/to/python3.11" >&2
            return 1
        fi
        echo "Making .venv with $("$python" --version) ..." >&2
        "$python" -m venv --clear "$root/.venv" || return 1
    fi

    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate" || return 1

    if [ ! "$stamp" -nt "$root/setup.py" ]; then
        echo "Installing tuning${extra:+[$extra]} into .venv; the first time takes minutes ..." >&2
        pip install -qq --disable-pip-version-check --editable "$root${extra:+[$extra]}" || return 1
        touch "$stamp"
    fi
}

_environment "${1:-}"
