#!/usr/bin/env bash
# Installs Debian's Chromium and its driver where they are missing and we may. Does nothing otherwise.
set -euo pipefail

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    echo "browser tests: Chromium is there"
    exit 0
fi
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "browser tests: no Chromium, and it cannot be installed here: install the packages chromium" \
        "and chromium-driver (Debian), or name them with EPMQ_CHROMIUM and EPMQ_CHROMEDRIVER." >&2
    # The tests say so again, as failures; these two variables may have named a browser elsewhere.
    exit 0
fi
echo "browser tests: installing Chromium (a minute)"
export DEBIAN_FRONTEND=noninteractive
# Bounded, so that a stuck download is an error and not a hang.
timeout 300 apt-get update -qq
timeout 600 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
