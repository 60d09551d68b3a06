#!/usr/bin/env bash
# Runs every benchmark, one after the other, and writes benchmarks/RESULTS.md.
#
#   benchmarks/all.sh [--quick] [--peers PEERS] [FOLDER]
#
# --quick takes three quarters of an hour instead of three and a half hours, with shorter and fewer
# measurements.
# PEERS has an environment for each peer of benchmarks.decode.
# FOLDER keeps the JSON and the output of each; by default they are thrown away. The exit status is
# 1 when a benchmark failed or missed what it promises; the others are run and written all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=
peers=()
while [ "${1:-}" = --quick ] || [ "${1:-}" = --peers ]; do
  if [ "$1" = --quick ]; then
    quick=1
  else
    peers=(--peers "$(realpath "${2:?--peers needs a folder}")")
    shift
  fi
  shift
done
if [ $# -gt 0 ]; then
  folder=$1
  mkdir -p "$folder"
  rm -f "$folder"/*.{command,status,txt,json}
else
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
fi
number=0
failed=0

run() { # run BENCHMARK ARGUMENT...
  number=$((number + 1))
  local kept
  kept=$(printf '%s/%02d-%s' "$folder" "$number" "$1")
  echo "python -m benchmarks.$*" | tee "$kept.command" >&2
  python -m "benchmarks.$1" "${@:2}" --json "$kept.json" >"$kept.txt"
  local status=$?
  echo "$status" >"$kept.status"
  [ "$status" = 0 ] || failed=1
}

if [ -n "$quick" ]; then
  run dispatch --calls 200
  run decode --prefill --transport auto ray --rounds 2 --passes 2 "${peers[@]}"
  run decode --size 445M --rounds 2 "${peers[@]}"
  run prefix
  run resume --rounds 3
  run sampling
  run load --rounds 1
  run identity --gigabytes 2
  run workshop --gigabytes 0.5
  run start --rounds 1
  run serve --rounds 2
  run scaling --quick
  run elastic --quick
  run failover --rounds 1 --seconds 20
  run handover --redeploys 2
  run simulate
  run diurnal --devices 2000 --routers 200 --hours 24
  run mixture_fit --quick
  run edges --seconds 45
  run knee --quick
  run world --minutes 2
  run wires --count 2000
  run fuzz --minutes 0.1
  run api_fuzz --minutes 1
  run soak --minutes 5
  run gray_soak --minutes 5
  run soak --minutes 5 --no-faults
else
  run dispatch
  run decode --prefill --transport auto ray --rounds 2 --passes 4 "${peers[@]}"
  run decode --size 445M --rounds 2 --passes 4 "${peers[@]}"
  run prefix --rounds 50
  run resume
  run sampling
  run load
  run identity
  run workshop
  run start
  run serve
  run scaling
  run elastic
  run failover
  run handover
  run simulate
  run diurnal
  run mixture_fit
  run edges
  run knee
  run world
  run wires
  run fuzz
  run api_fuzz --minutes 60
  run soak
  run gray_soak
  run soak --minutes 60 --no-faults
fi
python -m benchmarks.results "$folder" --write benchmarks/RESULTS.md || failed=1
exit "$failed"
