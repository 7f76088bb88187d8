# Read before each command of a page, so that its words can be run as they are: what goes on until
# somebody stops it must not keep the next command waiting, and ports are any free ones.
#
# SANDBOX: a folder of the test's own, outside of the page's; `servers` in it lists what is to be
# stopped in the end.

# `inflora serve`: in the background, once it listens; INFLORA_SERVER then says where. What served the
# same store before is stopped first, as it would have been in its terminal.
inflora() {
    if [[ ${1-} != serve || " $* " =~ " "(--help|--show-config)" " ]]; then
        command inflora "$@"
        return
    fi
    local store=inflora-store previous= word
    for word in "$@"; do
        [[ $previous != --store ]] || store=$word
        previous=$word
    done
    local own=$SANDBOX/servers/${store//\//_}
    stop_server "$own"
    mkdir -p "$own"
    command inflora "$@" --port 0 --http-port 0 --ready-file "$own/ready" >"$own/log" 2>&1 </dev/null &
    echo $! >"$own/pid"
    until [[ -e $own/ready ]]; do
        if ! kill -0 "$(<"$own/pid")" 2>/dev/null; then
            cat "$own/log" >&2
            return 1
        fi
        sleep 0.1
    done
    local address=$(<"$own/ready")
    export INFLORA_SERVER=${address/0.0.0.0/127.0.0.1}
}

stop_server() {
    [[ -e $1/pid ]] || return 0
    local pid=$(<"$1/pid")
    kill -TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    rm -rf "$1"
}

# `inflora-edge follow`, which goes on until it is told to stop: it is, once it has a model.
inflora-edge() {
    if [[ ${1-} != follow || " $* " == *" --once "* ]]; then
        command inflora-edge "$@"
        return
    fi
    local folder= previous= word
    for word in "$@"; do
        [[ $previous != --folder ]] || folder=$word
        previous=$word
    done
    command inflora-edge "$@" &
    local pid=$!
    until [[ -e $folder/state.json ]]; do
        kill -0 "$pid" || return 1
        sleep 0.1
    done
    kill -TERM "$pid"
    wait "$pid" || [[ $? == 143 ]]
}
