# What .ci/run and .ci/full share, to be sourced: environments of other versions, and parts that pass or fail.
unset PYTHONPATH
work=$(mktemp -d)
passed=0 failed=0

# Makes what everything below needs: uv, which can resolve to the lowest versions, the source distribution and the wheel
# made from it, both by the lowest version of what builds them, and the list of interpreters.
prepare() {
    python3.11 -m venv "$work/uv"
    "$work/uv/bin/pip" install -q build uv
    uv=$work/uv/bin/uv
    sed -n 's/^requires = \["\(setuptools\)>=\(.*\)"\]/\1~=\2.0/p' pyproject.toml > "$work/builder"
    [ -s "$work/builder" ] || { echo "pyproject.toml names no lowest setuptools" >&2; return 1; }
    UV_CONSTRAINT=$work/builder "$work/uv/bin/python" -m build --installer uv --outdir "$work/dist" &> "$work/build.log" ||
        { cat "$work/build.log" >&2; return 1; }
    wheel=$(ls "$work"/dist/*.whl)
    mapfile -t pythons < <(interpreters)
    oldest=${pythons[0]}
}

# Installs what the examples' tests need besides Python's packages, where it is missing. They may not skip afterwards.
tools() {
    local program wanted=()
    for program in node npm chromium; do
        type -P "$program" > /dev/null || wanted+=("${program/#node/nodejs}")
    done
    if [ ${#wanted[@]} -gt 0 ]; then
        apt-get update -q && apt-get install -y -q --no-install-recommends "${wanted[@]}"
    fi &> "$work/tools.log" || { cat "$work/tools.log" >&2; return 1; }
    export ADAVIT_EXAMPLES=required
}

# The wheel holds the files of the package, all of them and no others.
contents() {
    diff <(find adavit -type f -not -path '*/__pycache__/*' | LC_ALL=C sort) \
        <("$work/uv/bin/python" -c 'import sys, zipfile; print(*zipfile.ZipFile(sys.argv[1]).namelist(), sep="\n")' \
            "$wheel" | grep -v '^adavit-[^/]*\.dist-info/' | LC_ALL=C sort)
}

# The paths of the interpreters from 3.11 to the newest, by name: on PATH, and in pyenv's versions, whose names on PATH
# run only where they are active.
interpreters() {
    local PATH=$PATH version minor candidate
    for version in $(pyenv versions --bare 2>/dev/null); do PATH+=:$(pyenv prefix "$version")/bin; done
    for minor in {11..40}; do
        while read -r candidate; do
            "$candidate" -c 'import ctypes, ssl, sys; print(sys.executable)' 2>/dev/null && break
        done < <(type -aP "python3.$minor")
    done
}

# install FOLDER PYTHON RESOLUTION EXTRAS [OPTION ...]: an environment with adavit and these extras.
install() {
    "$uv" venv -q --clear --no-python-downloads --python "$2" "$1" &&
        "$uv" pip install -q --python "$1/bin/python" --resolution "$3" "${@:5}" \
            "$wheel" -r pyproject.toml $(printf -- "--extra %s " ${4//,/ })
}

# smoke PYTHON RESOLUTION EXTRAS PART ...: the parts of .ci/smoke.py in an environment of their own.
smoke() {
    install "$work/environment" "${@:1:3}" &&
        XDG_CACHE_HOME=$work/cache "$work/environment/bin/python" .ci/smoke.py "${@:4}"
}

# part NAME COMMAND ...: runs a command, and counts whether it passed.
part() {
    local started=$SECONDS
    if "${@:2}"; then passed=$((passed + 1)) && set -- "passed: $1"; else failed=$((failed + 1)) && set -- "FAILED: $1"; fi
    echo "$1 ($((SECONDS - started)) s)"
}

# summary NAME: the last line, and whether everything passed.
summary() {
    echo "$1: $passed passed, $failed failed"
    [ "$failed" = 0 ]
}
