# Makes a Valkey of this machine (Amazon Linux 2023): TLS with an authority of its own, the password from Secrets Manager.
# Its packages come from S3 through the gateway endpoint: the machine has no way to the internet.
# What it needs: REGION, SECRET (ARN of a JSON secret with "password"), READY_URL ("" or where CloudFormation waits).
# Neither dollar-brace nor percent-brace may stand in here: CloudFormation and Terraform would read them.
set -euo pipefail
umask 077
ROOT=$(printenv ROOT || true)  # "" but in tests
ANSWERED=no
: "$REGION" "$SECRET"
FOLDER="$ROOT/etc/smlt-store"
export AWS_DEFAULT_REGION="$REGION"

tell() {
    if [ -n "$READY_URL" ]; then
        curl -sS --retry 5 -X PUT -H 'Content-Type:' --data-binary \
            "{\"Status\": \"$1\", \"Reason\": \"$2\", \"UniqueId\": \"store\", \"Data\": \"$2\"}" "$READY_URL" || true
    fi
}
trap 'tell FAILURE "the store did not start: line $LINENO of its script, see /var/log/cloud-init-output.log"' ERR

dnf install -y valkey

secret_part() {
    aws secretsmanager get-secret-value --secret-id "$SECRET" --query SecretString --output text |
        python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}
PASSWORD=$(secret_part password)

mkdir -p "$FOLDER" "$ROOT/var/lib/smlt-store"
cd "$FOLDER"
ADDRESS=$(hostname -I | cut -d' ' -f1)
if [ ! -f ca.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -sha256 \
        -keyout ca.key -out ca.crt -subj "/CN=SMLT store authority" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 \
        -keyout server.key -out server.csr -subj "/CN=SMLT store"
    printf '%s\n' "subjectAltName=IP:$ADDRESS,IP:127.0.0.1,DNS:localhost" "extendedKeyUsage=serverAuth" \
        "basicConstraints=CA:FALSE" "authorityKeyIdentifier=keyid" > server.ext
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -sha256 \
        -extfile server.ext -out server.crt
    rm -f ca.key server.csr server.ext  # nothing more is to be signed by it
fi

# Three quarters of the memory for data, the rest for connections and the system.
MEMORY_KB=$(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo)
cat > valkey.conf <<CONF
bind * -::*
port 0
tls-port 6379
tls-cert-file $FOLDER/server.crt
tls-key-file $FOLDER/server.key
tls-ca-cert-file $FOLDER/ca.crt
tls-auth-clients no
requirepass $PASSWORD
maxmemory $((MEMORY_KB / 4 * 3))kb
maxmemory-policy noeviction
save ""
appendonly no
dir $ROOT/var/lib/smlt-store
CONF
chown -R valkey:valkey "$FOLDER" "$ROOT/var/lib/smlt-store"

mkdir -p "$ROOT/etc/systemd/system"
cat > "$ROOT/etc/systemd/system/smlt-store.service" <<UNIT
[Unit]
Description=Valkey as SMLT's parameter store
After=network-online.target
Wants=network-online.target

[Service]
User=valkey
ExecStart=/usr/bin/valkey-server $FOLDER/valkey.conf
Restart=always
LimitNOFILE=65536
NoNewPrivileges=true
ProtectSystem=strict
ReadWritePaths=$ROOT/var/lib/smlt-store
PrivateTmp=true

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable --now smlt-store.service

# Only a store that answers over TLS is one: then workers may find its certificate.
for _ in $(seq 60); do
    if valkey-cli --tls --cacert ca.crt -h 127.0.0.1 ping 2>&1 | grep -q -e PONG -e NOAUTH; then
        ANSWERED=yes
        break
    fi
    sleep 1
done
[ "$ANSWERED" = yes ]

# By a file, not by an argument: arguments can be read by others.
aws secretsmanager get-secret-value --secret-id "$SECRET" --query SecretString --output text |
    python3 -c 'import json, sys; print(json.dumps({**json.load(sys.stdin), "ca": open("ca.crt").read()}))' > secret.json
aws secretsmanager put-secret-value --secret-id "$SECRET" --secret-string file://secret.json > /dev/null
rm -f secret.json
tell SUCCESS "the store answers at $ADDRESS:6379"
