#!/usr/bin/env bash
# Draw the passwords of compose.yaml, once, into docker/.env, for its owner alone.
set -euo pipefail
umask 077
cd "$(dirname "$0")"

if [[ -e .env ]]; then
    echo "docker/.env is there already; remove it to draw new passwords." >&2
    exit 1
fi
draw() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

cat >.env <<ENV
POSTGRES_PASSWORD=$(draw)
PREFECT_PASSWORD=$(draw)
MLFLOW_PASSWORD=$(draw)
MLFLOW_SECRET_KEY=$(draw)
ENV
echo "Wrote docker/.env: Prefect's and MLflow's user is admin, the passwords are in it."
