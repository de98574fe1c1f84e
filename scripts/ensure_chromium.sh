#!/bin/sh
# A Chromium for the browser tests: one that is there, or Debian's through apt where this user may install.
set -eu
for name in chromium chromium-browser; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ -n "${STUDIO_CHROMIUM:-}" ] && [ -x "$STUDIO_CHROMIUM" ]; then exit 0; fi
if command -v apt-get >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then as=""; elif sudo -n true 2>/dev/null; then as="sudo"; else as="none"; fi
    if [ "$as" != none ]; then
        echo "Installing Debian's chromium for the browser tests ..."
        $as apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $as apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk >/dev/null
        exit 0
    fi
fi
echo "The browser tests need Chromium. Install it ('sudo apt-get install chromium'), or set" >&2
echo "STUDIO_CHROMIUM=/path/to/chrome. Without one they are left out: make check" >&2
exit 1
