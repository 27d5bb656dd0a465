#!/usr/bin/env bash
# Fails where the contract breaks clients that were built against the one on the branch main: check_breaking.sh BUF
# Without that branch (a shallow clone of another one, an unpacked archive) it says so and passes.
set -euo pipefail
buf=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
contract=proto/diffusiongemma/v1/generation.proto
for branch in main origin/main; do
  if git cat-file -e "$branch:$contract" 2>/dev/null; then
    # The contract as it stands on main, unpacked elsewhere: no checkout is touched and no clone made.
    base=$(mktemp -d)
    trap 'rm -rf "$base"' EXIT
    git archive "$branch" proto | tar -x -C "$base"
    "$buf" breaking proto --against "$base/proto"
    exit 0
  fi
done
echo "buf breaking: skipped, since there is no branch main with $contract here"
