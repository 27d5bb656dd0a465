#!/usr/bin/env bash
# Fails where the contract breaks clients that were built against the one on the branch main.
# Without that branch (a shallow clone, an unpacked archive) it says so and passes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
buf=$1
contract=proto/diffusiongemma/v1/generation.proto
git_dir=$(git rev-parse --path-format=absolute --git-common-dir 2>/dev/null) || {
  echo "buf breaking: skipped, this is no git checkout"
  exit 0
}
for branch in main origin/main; do
  if git cat-file -e "$branch:$contract" 2>/dev/null; then
    # The contract as it stands on main, unpacked: no checkout is touched and no clone made.
    base=$(mktemp -d)
    trap 'rm -rf "$base"' EXIT
    git --git-dir="$git_dir" archive "$branch" proto | tar -x -C "$base"
    "$buf" breaking proto --against "$base/proto"
    exit 0
  fi
done
echo "buf breaking: skipped, no branch main with $contract here"
