#!/bin/sh
# Makes the certificates of the migration tests: an authority, its receiver and sender, and a stranger's authority.
# Test keys, for 127.0.0.1 and localhost, valid from 2020 to 2120 whatever the clock says; they protect nothing.
set -e
cd "$(dirname "$0")"
work=$(mktemp -d)
cat >"$work/config" <<END
[ca]
default_ca = here
[here]
database = $work/index
new_certs_dir = $work
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[serverAuth]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
[clientAuth]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = clientAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
END
: >"$work/index"
# Name, extensions, and what it is signed with.
certificate() {
    name=$1 extensions=$2
    shift 2
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj "/CN=dirtylog test $name" \
        -keyout "$work/$name.key" -out "$work/$name.csr"
    openssl ca -batch -notext -config "$work/config" -extensions "$extensions" -startdate 20200101000000Z \
        -enddate 21200101000000Z -in "$work/$name.csr" -out "$work/$name.crt" "$@"
}
for each in authority strangers; do
    certificate "$each" authority -selfsign -keyfile "$work/$each.key"
    cp "$work/$each.crt" "$each.pem"
done
certificate receiver serverAuth -cert authority.pem -keyfile "$work/authority.key"
certificate sender clientAuth -cert authority.pem -keyfile "$work/authority.key"
certificate stranger clientAuth -cert strangers.pem -keyfile "$work/strangers.key"
# One file with the key and the certificate.
for each in receiver sender stranger; do
    cat "$work/$each.key" "$work/$each.crt" >"$each.pem"
done
rm -r "$work"
