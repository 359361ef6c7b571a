#!/bin/sh
# Makes a coordinator or an agent a service of this machine: programs, user, data folder, systemd unit. Run it again to upgrade: what runs goes on.
# It needs nothing of the repository but the programs and the templates beside it (systemd/), and no bash: `everlit node deploy` brings it to servers.
set -eu
# Where a login that is not root's, or sudo, does not look.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

usage() {
  cat <<'TEXT'
install-service.sh coordinator|agent [settings] [-- options of `everlit up` or `everlit-agent run`]

  --from FOLDER      where the programs are [default: target/release of this repository]
  --prefix FOLDER    they go to FOLDER/lib/everlit, with links in FOLDER/bin [/usr/local]
  --data-dir FOLDER  everything that is kept [/var/lib/everlit, /var/lib/everlit-agent]
  --user NAME        who runs it; made if missing [everlit]
  --libtorch FOLDER  libtorch for the built-in program, copied beside it
  --dry-run          tell what would be done
  --uninstall        end it (an agent's jobs are saved and go back in the queue) and remove all but the data folder

of an agent:
  --join URL         the coordinator, where this folder is no node's yet
  --token-file FILE  the join token; `-` is standard input
  --node NAME        the node's name [the host's name]
  --no-service       without systemd and root: as this user, below ~/.local, in the background

Options after `--` are kept for later runs that say none.
TEXT
}

say() { printf '%s\n' "-- $*" >&2; }
die() {
  printf '%s\n' "FAILED: $*" >&2
  exit 1
}
wrong() {
  printf '%s\n' "install-service.sh: $* (--help tells more)" >&2
  exit 2
}
# Does it, or says that it would.
run() {
  if [ -n "$dry" ]; then
    printf '%s\n' "would: $*" >&2
  else
    "$@" || die "$*"
  fi
}
# Replaces a file by what comes in, when that is another: MODE OWNER FILE.
keep() {
  new=$(cat && echo .)
  if [ -f "$3" ] && [ "$(cat "$3" && echo .)" = "$new" ]; then return 0; fi
  if [ -n "$dry" ]; then
    printf '%s\n' "would: write $3" >&2
    return 0
  fi
  printf '%s' "${new%.}" >"$3.new" || die "$3 can not be written"
  run chmod "$1" "$3.new"
  [ "$(id -u)" != 0 ] || run chown "$2" "$3.new"
  run mv -f "$3.new" "$3"
}

here=$(cd "$(dirname "$0")" && pwd)
role=${1:-}
case $role in
  coordinator | agent) shift ;;
  -h | --help) usage && exit 0 ;;
  *) wrong "say what to install: coordinator or agent" ;;
esac
from='' prefix='' data='' user=everlit libtorch='' join='' token_file='' node='' dry='' uninstall='' service=yes options='' with_options=''
while [ $# -gt 0 ]; do
  case $1 in
    --from | --prefix | --data-dir | --user | --libtorch | --join | --token-file | --node)
      [ $# -gt 1 ] || wrong "$1 needs a value"
      case $1 in
        --from) from=$2 ;;
        --prefix) prefix=$2 ;;
        --data-dir) data=$2 ;;
        --user) user=$2 ;;
        --libtorch) libtorch=$2 ;;
        --join) join=$2 ;;
        --token-file) token_file=$2 ;;
        --node) node=$2 ;;
      esac
      shift 2
      ;;
    --dry-run) dry=yes && shift ;;
    --uninstall) uninstall=yes && shift ;;
    --no-service) service= && shift ;;
    -h | --help) usage && exit 0 ;;
    --)
      shift
      with_options=yes
      for word in "$@"; do
        case $word in
          *[!A-Za-z0-9_./:=,@+%-]* | '') wrong "\`$word\`: options may have letters, digits and _./:=,@+%- only" ;;
        esac
        options="$options${options:+ }$word"
      done
      break
      ;;
    *) wrong "\`$1\` is not known" ;;
  esac
done
if [ "$role" = coordinator ] && [ -n "$join$token_file$node" ]; then wrong "--join, --token-file and --node are for an agent"; fi
if [ "$role" = coordinator ] && [ -z "$service" ]; then wrong "--no-service is for an agent"; fi

if [ -n "$service" ]; then
  prefix=${prefix:-/usr/local} etc=/etc/everlit
  if [ "$role" = agent ]; then data=${data:-/var/lib/everlit-agent}; else data=${data:-/var/lib/everlit}; fi
  unit=everlit-$role.service
else
  prefix=${prefix:-$HOME/.local} data=${data:-${XDG_DATA_HOME:-$HOME/.local/share}/everlit-agent} user=$(id -un)
  etc=$data unit=
fi
lib=$prefix/lib/everlit
for folder in "$prefix" "$data"; do
  case $folder in
    *[!A-Za-z0-9_./@+-]*) wrong "\`$folder\`: letters, digits and _./@+- only" ;;
    /*) ;;
    *) wrong "\`$folder\` must begin with /" ;;
  esac
done
if [ "$role" = agent ]; then other=coordinator; else other=agent; fi
if [ -n "$service" ] && [ -z "$dry" ]; then
  [ "$(id -u)" = 0 ] || die "this needs root: run it with sudo, or an agent with --no-service"
  [ -d /run/systemd/system ] || die "systemd does not run here: an agent can be installed with --no-service"
fi

# As the user that it runs as, who may not be root.
as_user() {
  if [ "$(id -un)" = "$user" ]; then "$@"; else runuser -u "$user" -- "$@"; fi
}
health() { as_user "$lib/everlit-agent" health --data-dir "$data" 2>/dev/null; }
# The living agent of the data folder, as it says itself.
agent_pid() { health | sed -n 's/.*"pid":\([0-9]*\).*/\1/p'; }
# Tells a living agent to end, and waits: SIGNAL SECONDS.
end_agent() {
  pid=$(agent_pid) || :
  [ -n "$pid" ] || return 0
  run kill -s "$1" "$pid"
  left=$2
  while [ -z "$dry" ] && kill -0 "$pid" 2>/dev/null; do
    [ "$left" -gt 0 ] || die "the agent (process $pid) has not ended within $2 s"
    left=$((left - 1))
    sleep 1
  done
}

if [ -n "$uninstall" ]; then
  if [ -n "$service" ]; then
    say "ending and removing $unit"
    [ ! -f "/etc/systemd/system/$unit" ] || run systemctl disable --now "$unit"
    # Its own machine's agent, which outlives it, and the jobs there.
    if [ "$role" = coordinator ] && [ -e "$data/agent/agent.lock" ]; then run as_user "$lib/everlit" down --data-dir "$data"; fi
    run rm -f "/etc/systemd/system/$unit" "$etc/$role.env"
    run systemctl daemon-reload
    [ ! -f "/etc/systemd/system/everlit-$other.service" ] || lib=
  else
    say "ending the agent of $data"
    end_agent TERM 600
    run rm -f "$etc/agent.env"
  fi
  if [ -n "$lib" ]; then
    for name in everlit everlit-agent everlit-shim everlit-worker; do
      [ "$(readlink "$prefix/bin/$name" 2>/dev/null)" != "$lib/$name" ] || run rm -f "$prefix/bin/$name"
    done
    run rm -rf "$lib"
  fi
  say "what it kept is still in $data"
  exit 0
fi

[ -n "$from" ] || from=$here/../target/release
need="everlit-agent everlit-shim"
[ "$role" = agent ] || need="everlit $need"
for name in $need; do
  [ -x "$from/$name" ] || die "$from/$name is not there: run scripts/build.sh, or say --from"
  told=$("$from/$name" --version 2>&1 </dev/null) || [ "$name" = everlit-shim ] || die "$from/$name does not run here: $told"
done
[ -x "$from/everlit-worker" ] || say "everlit-worker is not in $from: the built-in program will not run here"
[ -z "$libtorch" ] || [ -f "$libtorch/lib/libtorch_cpu.so" ] || die "$libtorch is not libtorch: there is no lib/libtorch_cpu.so in it"
if [ -n "$service" ]; then
  [ -f "$here/systemd/$unit" ] || die "$here/systemd/$unit is missing"
fi

if [ -n "$service" ] && ! id "$user" >/dev/null 2>&1; then
  say "making the user $user"
  # A system user: logind removes the shared memory of others when they log out.
  run useradd --system --user-group --no-create-home --home-dir "$data" --shell /usr/sbin/nologin "$user"
fi

say "programs to $lib"
run mkdir -p "$lib" "$prefix/bin"
for name in everlit everlit-agent everlit-shim everlit-worker; do
  [ -x "$from/$name" ] || continue
  if ! cmp -s "$from/$name" "$lib/$name"; then
    # By rename: the old ones may run.
    run cp -f "$from/$name" "$lib/$name.new"
    run chmod 755 "$lib/$name.new"
    run mv -f "$lib/$name.new" "$lib/$name"
  fi
  [ "$(readlink "$prefix/bin/$name" 2>/dev/null)" = "$lib/$name" ] || run ln -sfn "$lib/$name" "$prefix/bin/$name"
done
if [ -d "$from/sample-text" ] && [ ! -d "$lib/sample-text" ]; then run cp -RL "$from/sample-text" "$lib/sample-text"; fi
if [ -n "$libtorch" ]; then
  run mkdir -p "$lib/libtorch"
  run cp -RLu "$libtorch/lib" "$lib/libtorch/"
fi
if [ -z "$dry" ] && [ -x "$lib/everlit-worker" ]; then
  told=$(LD_LIBRARY_PATH="$lib/libtorch/lib" as_user "$lib/everlit-worker" --version 2>&1 </dev/null) ||
    say "the built-in program does not run here, other programs will: $told (--libtorch says where its library is)"
fi

say "data folder $data"
if [ -n "$service" ]; then
  run install -d -m 700 -o "$user" "$data"
else
  run mkdir -p -m 700 "$data"
fi
run mkdir -p "$etc"

if [ "$role" = agent ]; then
  if [ -n "$join" ]; then
    say "joining $join"
    set -- "$lib/everlit-agent" join "$join" --only --data-dir "$data"
    [ -z "$node" ] || set -- "$@" --node "$node"
    if [ -n "$dry" ]; then
      printf '%s\n' "would: $*" >&2
    elif [ -n "$token_file" ]; then
      # Neither in arguments nor in a file that this user could read: through a pipe.
      if [ "$token_file" = - ]; then cat; else cat -- "$token_file"; fi | as_user "$@" --token-file - >&2 || die "this machine did not join $join"
    else
      as_user "$@" >&2 </dev/null || die "this machine did not join $join"
    fi
  elif [ -z "$dry" ] && [ ! -f "$data/node.json" ]; then
    die "$data is the folder of no node: say --join URL --token-file FILE (\`everlit node token create\` makes a token)"
  fi
fi

settings=$etc/$role.env
if [ -z "$with_options" ] && [ -f "$settings" ]; then options=$(sed -n 's/^OPTIONS=//p' "$settings"); fi
{
  printf '%s\n' "OPTIONS=$options"
  if [ -d "$lib/libtorch" ] || [ -n "$libtorch" ]; then printf '%s\n' "LD_LIBRARY_PATH=$lib/libtorch/lib"; fi
} | keep 644 root "$settings"

if [ -n "$service" ]; then
  say "unit $unit"
  sed -e "s|@LIB@|$lib|g" -e "s|@DATA@|$data|g" -e "s|@USER@|$user|g" -e "s|@ETC@|$etc|g" "$here/systemd/$unit" | keep 644 root "/etc/systemd/system/$unit"
  run systemctl daemon-reload
  run systemctl enable --quiet "$unit"
  say "starting it; what runs already goes on"
  if [ -n "$dry" ]; then
    printf '%s\n' "would: systemctl restart $unit" >&2
  elif ! systemctl restart "$unit"; then
    journalctl --no-pager -n 20 -u "$unit" >&2 || :
    die "$unit does not start: journalctl -u $unit has more"
  fi
else
  say "starting it; what runs already goes on"
  end_agent USR1 60
  if [ -n "$dry" ]; then
    printf '%s\n' "would: $lib/everlit-agent run --data-dir $data $options" >&2
  else
    [ ! -d "$lib/libtorch" ] || export LD_LIBRARY_PATH="$lib/libtorch/lib"
    # shellcheck disable=SC2086 # words of options have no spaces in them
    setsid nohup "$lib/everlit-agent" run --data-dir "$data" $options >>"$data/agent.log" 2>&1 </dev/null &
  fi
fi

if [ "$role" = agent ] && [ -z "$dry" ]; then
  left=150
  until health >/dev/null; do
    left=$((left - 1))
    if [ "$left" = 0 ]; then
      if [ -n "$service" ]; then journalctl --no-pager -n 10 -u "$unit" >&2; else tail -n 10 "$data/agent.log" >&2; fi
      die "the agent has found no coordinator within 30 s; it goes on trying"
    fi
    sleep 0.2
  done
fi
if [ -n "$dry" ]; then exit 0; fi
if [ "$role" = agent ]; then
  node=$(sed -n 's/.*"node": *"\([^"]*\)".*/\1/p' "$data/node.json")
  printf '%s\n' "node $node is linked to its coordinator (data in $data)"
else
  printf '%s\n' "the coordinator is ready (data in $data)"
fi
