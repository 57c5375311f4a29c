#!/usr/bin/env bash
# Draw the passwords of compose.yaml, once: docker/.env and docker/secrets/mlflow-auth.ini, for their owner alone.
set -euo pipefail
umask 077
cd "$(dirname "$0")"

if [[ -e .env ]]; then
    echo "docker/.env is there already; remove it to draw new passwords." >&2
    exit 1
fi
draw() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

mlflow_password=$(draw)
mkdir -p secrets
cat >secrets/mlflow-auth.ini <<INI
[mlflow]
default_permission = READ
database_uri = sqlite:////home/internvl/mlflow/auth.db
admin_username = admin
admin_password = ${mlflow_password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
# The container's user is not the host's.
chmod 644 secrets/mlflow-auth.ini
chmod 711 secrets
cat >.env <<ENV
POSTGRES_PASSWORD=$(draw)
PREFECT_PASSWORD=$(draw)
MLFLOW_PASSWORD=${mlflow_password}
MLFLOW_SECRET_KEY=$(draw)
ENV
echo "Wrote docker/.env: Prefect's and MLflow's user is admin, the passwords are in it."
