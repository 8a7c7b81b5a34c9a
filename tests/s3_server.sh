#!/usr/bin/env bash
# Start a real S3 server (Ceph RADOS Gateway) on loopback, data in memory, logs and pids in FOLDER; prints export
# lines for AWS clients. Used by with_s3.sh, which also stops it:  eval "$(tests/s3_server.sh FOLDER)"
set -euo pipefail
D=${1:?usage: s3_server.sh FOLDER} PORT=${S3_PORT:-9100} BUCKET=scumble STORE=memstore
MON=$((PORT + 1)) KEY=scumbletestkey SECRET=scumbletestsecret
mkdir -p "$D"/{mon,osd,run,rgw}
F=$(cat /proc/sys/kernel/random/uuid) O=$(cat /proc/sys/kernel/random/uuid)
cat >"$D/ceph.conf" <<C
[global]
fsid = $F
mon host = [v2:127.0.0.1:$MON/0]
auth cluster required = none
auth service required = none
auth client required = none
public addr = 127.0.0.1
ms mon client mode = crc
cluster addr = 127.0.0.1
run dir = $D/run
admin socket = $D/run/\$name.asok
log file = $D/\$name.log
crash dir = $D
mon data = $D/mon
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
osd data = $D/osd
osd objectstore = $STORE
memstore device bytes = 6442450944
bluestore block size = 6442450944
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd memory target = 1073741824
osd max object name len = 2048
osd max object namespace len = 64
rgw data = $D/rgw
rgw frontends = beast endpoint=127.0.0.1:$PORT
rgw enable usage log = false
rgw enable gc threads = true
rgw enable lc threads = false
rgw enable quota threads = false
rgw run sync thread = false
C
c=(-c "$D/ceph.conf")
run() { # name, command: start in the background, in the foreground mode of ceph
  local n=$1; shift
  setsid "$@" -f >"$D/$n.out" 2>&1 </dev/null & echo $! >"$D/$n.pid"
}
fail() { echo "s3_up: $1; see $D" >&2; exit 1; }
monmaptool --create --fsid "$F" --addv a "[v2:127.0.0.1:$MON]" "$D/monmap" >"$D/mkfs.out" 2>&1
ceph-mon "${c[@]}" -i a --mkfs --monmap "$D/monmap" >>"$D/mkfs.out" 2>&1
run mon ceph-mon "${c[@]}" -i a
ceph="timeout 20 ceph ${c[*]}"
for i in $(seq 40); do $ceph --connect-timeout 2 -s >/dev/null 2>&1 && break; [ "$i" = 40 ] && fail "monitor"; sleep 0.25; done
$ceph osd new "$O" >"$D/osd.id" 2>>"$D/mkfs.out"
ceph-osd "${c[@]}" -i 0 --mkfs --osd-uuid "$O" >>"$D/mkfs.out" 2>&1
run osd ceph-osd "${c[@]}" -i 0
for i in $(seq 60); do $ceph osd stat 2>/dev/null | grep -q "1 up" && break; [ "$i" = 60 ] && fail "osd"; sleep 0.25; done
timeout 60 radosgw-admin "${c[@]}" user create --uid=dev --display-name=dev --access-key=$KEY --secret=$SECRET >"$D/user.json" 2>>"$D/mkfs.out" || fail "user"
run rgw radosgw "${c[@]}" -n client.rgw
for i in $(seq 120); do curl -s -o /dev/null "http://127.0.0.1:$PORT/" && break; [ "$i" = 120 ] && fail "gateway"; sleep 0.25; done
now=$(date -Ru | sed 's/+0000/GMT/') # the bucket: a PUT signed the old way (AWS signature 2)
sig=$(printf 'PUT\n\n\n%s\n/%s' "$now" "$BUCKET" | openssl dgst -sha1 -hmac $SECRET -binary | base64)
curl -sf -o /dev/null -X PUT -H "Date: $now" -H "Authorization: AWS $KEY:$sig" "http://127.0.0.1:$PORT/$BUCKET" || fail "bucket"
cat <<C
export AWS_ACCESS_KEY_ID=$KEY AWS_SECRET_ACCESS_KEY=$SECRET AWS_DEFAULT_REGION=us-east-1 AWS_REGION=us-east-1
export AWS_ENDPOINT_URL=http://127.0.0.1:$PORT AWS_ENDPOINT_URL_S3=http://127.0.0.1:$PORT AWS_EC2_METADATA_DISABLED=true
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
export SCUMBLE_TEST_S3=1
C
