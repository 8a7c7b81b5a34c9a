#!/usr/bin/env bash
# Run a command with a real S3 server (Ceph RADOS Gateway) on loopback, where Debian's packages are installed:
#   apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd
# Without them the command runs all the same, and S3 tests use an in-process server.
set -euo pipefail
if ! command -v radosgw >/dev/null; then
  echo "no radosgw on this machine: S3 tests use an in-process server instead" >&2
  exec "$@"
fi
S3_DIR=$(mktemp -d /tmp/scumble-s3-XXXXXX)
stop() {
  for pid in "$S3_DIR"/*.pid; do [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true; done
  rm -rf "$S3_DIR"
}
trap stop EXIT
environment=$("$(dirname "$0")/s3_server.sh" "$S3_DIR") # alone on its line: a server that does not start ends this
eval "$environment"
"$@"
