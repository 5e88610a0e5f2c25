#!/bin/sh
# Starts the broker with a user for each role: users.acl with the passwords of the environment, of which only hashes are
# written. Arguments go to the server.
set -eu
umask 077
here=$(dirname "$0")
acl=${VALKEY_ACL_FILE:-/tmp/users.acl}

hash() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }

sed -e '/^#/d' \
    -e "s/@producer@/$(hash "${VALKEY_PRODUCER_PASSWORD:?}")/" \
    -e "s/@worker@/$(hash "${VALKEY_WORKER_PASSWORD:?}")/" \
    -e "s/@callbacks@/$(hash "${VALKEY_CALLBACKS_PASSWORD:?}")/" \
    -e "s/@operator@/$(hash "${VALKEY_OPERATOR_PASSWORD:?}")/" \
    "$here/users.acl" >"$acl"
unset VALKEY_PRODUCER_PASSWORD VALKEY_WORKER_PASSWORD VALKEY_CALLBACKS_PASSWORD VALKEY_OPERATOR_PASSWORD
exec valkey-server "$here/valkey.conf" --aclfile "$acl" "$@"
