#!/bin/sh
# Starts the store with two pairs of keys: one that may do everything (workers, API), and one that may only read objects of the
# bucket (the process that delivers callbacks). Arguments go to the server.
set -eu
umask 077
config=${S3_CONFIG_FILE:-/tmp/s3.json}

for value in "${S3_ACCESS_KEY_ID:?}" "${S3_SECRET_ACCESS_KEY:?}" "${S3_READER_ACCESS_KEY_ID:?}" "${S3_READER_SECRET_ACCESS_KEY:?}"; do
    case $value in
        *[!A-Za-z0-9._~+/=-]*) echo "start.sh: the keys of the store may hold letters, digits and ._~+/=- only" >&2; exit 1 ;;
    esac
done
cat >"$config" <<END
{"identities": [
  {"name": "latentline", "credentials": [{"accessKey": "$S3_ACCESS_KEY_ID", "secretKey": "$S3_SECRET_ACCESS_KEY"}],
   "actions": ["Admin"]},
  {"name": "callbacks", "credentials": [{"accessKey": "$S3_READER_ACCESS_KEY_ID", "secretKey": "$S3_READER_SECRET_ACCESS_KEY"}],
   "actions": ["Read:images"]}
]}
END
unset S3_ACCESS_KEY_ID S3_SECRET_ACCESS_KEY S3_READER_ACCESS_KEY_ID S3_READER_SECRET_ACCESS_KEY
exec weed "$@" "-s3.config=$config"
